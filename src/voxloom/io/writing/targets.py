"""Where a volume goes that is written to a path, whole or block by block: by which store, or in which format."""

import contextlib
import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core.geometry.affines import Affine
from ...errors import SaveError, UnsupportedImageError
from ...runtime.marks import left_by_dead, new_mark
from ..formats import endings, format_of, import_for, is_folder_target, stem_of
from ..nifti.store import NiftiStore
from ..protocols import SpaceCodes, VolumeSpec, VolumeStore
from ..zarr.source import is_zarr
from ..zarr.store import ZarrStore
from .saving import atomic_write, saving
from .whole_volumes import storable

__all__ = ["as_target", "discard_dead", "replacing", "save_volume", "store_at", "would_lose"]


# So many folders up it is looked whether a target lies in a store.
NEAR = 4


def store_at(target: Path, overwrite: bool) -> VolumeStore:
    """Give the store that writes a target; see `as_target`."""
    import_for(target)
    return ZarrStore(target, overwrite) if is_folder_target(target) else NiftiStore(target, overwrite)


def replacing(store: VolumeStore, overwrite: bool) -> VolumeStore:
    """Let a store replace what is there, if that is allowed and it can be told so."""
    if not overwrite or getattr(store, "overwrite", True):
        return store
    store = copy.copy(store)
    store.overwrite = True  # type: ignore[attr-defined]
    return store


def would_lose(target: Path, inputs: Iterable[Path]) -> bool:
    """Whether an input is a target, or lies in it, as a level lies in its store."""
    place = target.resolve()
    return any(path.resolve().is_relative_to(place) for path in inputs)


def as_target(path: Any) -> Path:
    """Check the name of a file that a result is to be written to.

    Raises:
        UnsupportedImageError: if there is no format of that ending that can be written block by block.
        SaveError: if there is no folder for it.
    """
    target = Path(path).expanduser()
    if target.is_symlink():
        try:
            target = target.resolve()  # the file is made beside where it will be
        except RuntimeError as error:
            raise SaveError(f"{target} cannot be written: it is a link to itself") from error
    streamed = endings(lambda each: each.is_streamed)
    is_folder = is_folder_target(target)
    if not is_folder and not target.name.lower().endswith(streamed):
        raise UnsupportedImageError(
            f"{target} cannot be written block by block: its name must end in {' or '.join(streamed)}. For other formats leave"
            " out output, and save the image that is returned"
        )
    if target.is_dir() and not (is_folder and is_zarr(target)):
        way = "it holds no image in Zarr, and is kept: choose another name" if is_folder else "give the name of a file in it"
        raise SaveError(f"{target} is a folder: {way}")
    if is_folder and is_zarr(target.parent.parent) and target.parent.name == "labels":
        with saving(target):
            target.parent.mkdir(exist_ok=True)
    store = next((parent for parent in list(target.parents)[:NEAR] if is_zarr(parent)), None)
    if store is not None and not (is_folder and target.parent.name == "labels"):
        raise SaveError(f"{target} lies in {store}, which is of Zarr: give another name, or {store}/labels/NAME for labels of it")
    if not target.parent.is_dir():
        raise SaveError(f"{target} cannot be written: there is no folder {target.parent}; make it first")
    return target


def save_volume(
    path: Path,
    data: Tensor,
    affine: Affine,
    codes: SpaceCodes,
    is_labels: bool = False,
    overwrite: bool = True,
    stored: str | None = None,
) -> None:
    """Write a volume `(C, I, J, K)` in the format that the name's ending says; for `stored` see `VolumeSpec`.

    Raises:
        UnsupportedImageError: if there is no such format, or it cannot hold the volume.
        SaveError: if it could not be written.
    """
    if is_folder_target(path):
        _save_folder(path, data, affine, codes, is_labels)
        return
    known = format_of(path)
    if known is None or known.write is None:
        written = ", ".join(endings(lambda each: each.write or each.is_folder))
        raise UnsupportedImageError(
            f"{path} cannot be written: its name must end in {written}. Formats of two files (.mhd, .hdr and .img) are not"
            " written, because two files cannot be replaced at once; nor are those that cannot hold an affine"
        )
    write, array = known.write, storable(data, stored)
    atomic_write(path, lambda target: write(target, array, affine, codes), known.ending, overwrite)


def discard_dead(store: VolumeStore) -> None:
    """Remove what killed processes have left of images that they saved or converted; other runs have a log, and go on."""
    if store.path is not None:
        names = {stem_of(store.path), store.path.name}
        found = {run for name in names for run, _ in left_by_dead(store.path.parent, f".{name}.", r"\..*")}
        for run in found:
            with contextlib.suppress(OSError):  # it may be another user's
                store.discard(run)


def _save_folder(path: Path, data: Tensor, affine: Affine, codes: SpaceCodes, is_labels: bool) -> None:
    values = torch.from_numpy(storable(data))
    c, i, j, k = values.shape
    spec = VolumeSpec((c, i, j, k), values.dtype, affine, codes, is_labels)
    store, run = ZarrStore(as_target(path), overwrite=True), new_mark()
    discard_dead(store)
    store.check()
    try:
        store.create(spec, run)
        store.write(spec.box, values)
        store.flush()
        store.commit({}, run)
    finally:
        store.discard(run)
