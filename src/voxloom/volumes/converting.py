"""Writing an image in another format, box by box, so that it need never be in memory as a whole."""

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..core.walking import walk
from ..errors import ModeError, SaveError, TargetExistsError, UnsupportedImageError, VoxloomError
from ..io.formats import endings, format_of, is_folder_target
from ..io.protocols import VolumeSpec, VolumeStore, is_source, read_checked
from ..io.spooling import spooled
from ..io.writing.saving import appeared, remove_unfinished
from ..io.writing.targets import as_target, discard_dead, replacing, save_volume, store_at, would_lose
from ..io.writing.words import OVERWRITE
from ..io.zarr.source import is_label_of_image
from ..io.zarr.store import ZarrStore
from ..runtime.marks import new_mark
from ..runtime.progress import shown_if
from .constants import LABEL
from .images.image import Image, LabelMap, ScalarImage
from .libraries import as_image

__all__ = ["WRITTEN", "convert"]

# Bytes that are read at a time.
BOX_BYTES = 64 * 2**20
# Endings of what can be written.
WRITTEN = endings(lambda each: each.write or (each.is_streamed and each.ending != ".seg.nrrd"))


def convert(
    image: Any,
    output: Any,
    *,
    labels: bool | None = None,
    overwrite: bool = False,
    chunks: int | Sequence[int] | None = None,
    shards: int | Sequence[int] | None = None,
    levels: int | None = None,
    version: str | None = None,
    progress: bool | str = False,
) -> Image:
    """Write an image in another format: voxels and affine stay as they are.

    NIfTI and Zarr are written box by box. What SimpleITK or nibabel write (`.nrrd`, `.mha`, `.mgz`) is in memory as a whole.

    Args:
        image: anything that `as_image` takes: a path, an `Image`, an array, a source of voxels.
        output: name of the file or folder: `.nii`, `.nii.gz`, `.ome.zarr`, `.nii.zarr`, `.zarr` (a plain array),
            `IMAGE.ome.zarr/labels/NAME`, `.nrrd`, `.mha`, `.mgz`; or a `VolumeStore`.
        labels: whether it holds labels, of which a coarser level has those of most voxels rather than a mean; by default as the
            image says, and true of a label image beside another one.
        overwrite: whether what is there may be replaced.
        chunks: of Zarr, see `ZarrStore`; for training half the patch or less is good.
        shards: of Zarr.
        levels: of OME-Zarr.
        version: of OME-Zarr; by default 0.5.
        progress: show how far it has come.

    Returns:
        The image as it was written, which is read lazily.

    Raises:
        TargetExistsError: if the output exists.
        ModeError: if something is said of Zarr, and the output is none.
        UnsupportedImageError: if there is no format of that ending that can be written.
        SaveError: if it cannot be written; what was there before is untouched.

    Example:
        >>> import tempfile, torch, voxloom as vx
        >>> scan = vx.ScalarImage(torch.rand(1, 40, 30, 20))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     made = vx.convert(scan, f"{folder}/scan.ome.zarr", chunks=16, levels=2)
        ...     torch.equal(made.data, scan.data)
        True
    """
    given = as_image(image)
    if not isinstance(output, str | os.PathLike | VolumeStore):
        raise SaveError(f"output is {output!r}: it must be the name of a file or a folder, or a VolumeStore")
    is_labels = (given.type == LABEL or _is_label_target(output)) if labels is None else labels
    image_class = LabelMap if is_labels else ScalarImage
    layout = {"chunks": chunks, "shards": shards, "levels": levels, "version": version}
    if isinstance(output, VolumeStore) or not is_folder_target(Path(output)):
        unused = [name for name, value in layout.items() if value is not None]
        if unused:
            what = "a store, which has its own" if isinstance(output, VolumeStore) else f"{output}, which is no Zarr"
            raise ModeError(f"{unused[0]} was given for {what}: leave it out")
    if not isinstance(output, VolumeStore):
        _check_ending(Path(output))
    if _is_written_whole(output):
        path = Path(output).expanduser()
        _check_lost(path, given)
        if path.exists() and not overwrite:
            known = format_of(path)
            remove_unfinished(path.resolve(), "" if known is None else known.ending)
            raise SaveError(f"{path} exists, and is kept: remove it, choose another name, or give {OVERWRITE}")
        save_volume(path, given.data, given.affine, given.codes, overwrite=overwrite, stored=_stored_dtype(given))
        return image_class(path)
    store = _store_of(output, overwrite, {name: value for name, value in layout.items() if value is not None})
    if store.path is not None:
        _check_lost(store.path, given)
    spec = VolumeSpec(given.shape, given.dtype, given.affine, given.codes, is_labels, _stored_dtype(given))
    made = _copied(given, store, spec, progress)
    return image_class(made) if isinstance(made, Path) or is_source(made) else made


def _check_ending(path: Path) -> None:
    if not is_folder_target(path) and not path.name.lower().endswith(WRITTEN):
        raise UnsupportedImageError(f"{path} cannot be written: its name must end in {', '.join(WRITTEN[:-1])} or {WRITTEN[-1]}")


def _check_lost(path: Path, image: Image) -> None:
    if would_lose(path, image.paths):
        raise SaveError(f"the image {path} would be written over itself, or over what holds it: choose another output")


def _is_label_target(output: Any) -> bool:
    path = output.path if isinstance(output, VolumeStore) else Path(output)
    return path is not None and is_label_of_image(path)


def _is_written_whole(output: Any) -> bool:
    """Whether a result is of a format that is not written box by box."""
    if isinstance(output, VolumeStore) or is_folder_target(Path(output)):
        return False
    known = format_of(Path(output))
    return known is not None and known.write is not None and not known.is_streamed


def _store_of(output: Any, overwrite: bool, options: dict[str, Any]) -> VolumeStore:
    if isinstance(output, VolumeStore):
        return replacing(output, overwrite)
    target = as_target(output)
    return ZarrStore(target, overwrite, **options) if is_folder_target(target) else store_at(target, overwrite)


def _stored_dtype(image: Image) -> str | None:
    """Give the type that the voxels are stored in, where a tensor of them has a wider one."""
    stored = image.stored_dtype
    if stored is None or stored.kind != "u" or image.dtype.is_floating_point:
        return None
    if image.is_loaded:  # and perhaps changed in place
        low, high = (int(value) for value in image.data.aminmax())
        if low < 0 or high > np.iinfo(stored).max:
            return None
    return str(stored.newbyteorder("=").name)


def _copied(image: Image, store: VolumeStore, spec: VolumeSpec, progress: bool | str) -> Any:
    discard_dead(store)
    store.check()
    run = new_mark()
    try:
        with contextlib.ExitStack() as stack:
            source = stack.enter_context(spooled(image))
            told = stack.enter_context(shown_if(progress, "converted", spec.box.numel, "voxels"))
            store.create(spec, run)
            most = max(1, BOX_BYTES // (spec.shape[0] * spec.dtype.itemsize))
            # Whole shards, so that none waits for its other parts; of a store without any, what the source reads at a time.
            for box in walk(spec.box, store.chunk_shape or source.chunks, most):
                store.write(box, read_checked(source, box))
                told(box.numel)
            store.flush()
        return store.commit({}, run)
    except TargetExistsError as error:
        _leave_nothing(store, run)  # unlike a prediction's, which goes on from there
        if store.path is None:
            raise
        raise appeared(store.path) from error
    except BaseException:
        _leave_nothing(store, run)
        raise


def _leave_nothing(store: VolumeStore, run: str) -> None:
    steps: list[Callable[[], object]] = [store.abort, lambda: store.discard(run)]
    for step in steps:
        with contextlib.suppress(OSError, VoxloomError):
            step()
