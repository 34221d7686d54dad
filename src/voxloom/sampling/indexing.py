"""Sums of maps that are kept beside their files, so that a sampler need not go through a large map again."""

import contextlib
import json
import zipfile
import zlib
from collections.abc import Callable, Hashable
from contextvars import ContextVar
from pathlib import Path

import numpy as np

from ..core.rows import RowSums
from ..errors import ImageError, SaveError
from ..io.arrays.memory import hash_of
from ..io.formats import stem_of
from ..io.writing.saving import as_save_error
from ..runtime.marks import left_by_dead, new_mark
from ..volumes.images.image import Image
from ..volumes.subject import Subject
from .random import PatchSampler

__all__ = ["build_index", "index_folder", "kept_sums"]

Classes = dict[int, RowSums]
# The entry that names all others, so that a damaged table of contents shows.
LABELS = "labels"
_failed: ContextVar[list[tuple[Path, OSError]] | None] = ContextVar("failed", default=None)
"""What could not be written, where that is to be said."""


def index_folder(image: Image) -> Path | None:
    """Name the folder in which sums of an image are kept: beside its file; None for one that is of no file, or of several."""
    paths = image.paths
    if len(paths) != 1 or not image.can_be_reloaded:
        return None
    place = paths[0] if image.path is None or isinstance(image.path, list) else image.path
    return place.with_name(f".{stem_of(place)}.index")


def kept_sums(image: Image, key: Hashable, compute: Callable[[], Classes]) -> Classes:
    """Give sums that are kept in the folder of an image, if it has one; what is not there is computed, and put there.

    Args:
        image: the map.
        key: what the sums are of.
        compute: makes them.
    """
    folder = index_folder(image)
    if folder is None or not folder.is_dir():
        return compute()
    # What was kept of another state of the file has another name.
    name = hash_of([json.dumps(image.fingerprint(), sort_keys=True), repr(key)])[:32]
    file = folder / f"{name}.npz"
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as found:
            if sorted(map(int, found[LABELS].tolist())) != sorted(int(name) for name in found.files if name != LABELS):
                raise ValueError("not all are there")
            return {int(label): RowSums(found[label]) for label in found.files if label != LABELS}
    except FileNotFoundError:
        pass
    except (OSError, ValueError, EOFError, LookupError, RuntimeError, zipfile.BadZipFile, zlib.error):
        with contextlib.suppress(OSError):
            file.unlink()  # damaged
    sums = compute()
    try:
        _write(file, sums)
    except OSError as error:  # where nothing can be written, they are made each time
        failed = _failed.get()
        if failed is not None:
            failed.append((file, error))
    return sums


def _write(file: Path, sums: Classes) -> None:
    for _, left in left_by_dead(file.parent, ".", r"\.unfinished"):
        with contextlib.suppress(OSError):
            left.unlink()
    unfinished = file.with_name(f".{new_mark()}.unfinished")
    try:
        with unfinished.open("wb") as opened:
            labels = np.array(list(sums), dtype=np.int64)
            np.savez(opened, **{LABELS: labels}, **{str(label): each.rows for label, each in sums.items()})  # type: ignore[arg-type]
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def build_index(sampler: PatchSampler, *subjects: Subject) -> list[Path]:
    """Go through the maps of a sampler once, and keep what it needs of them beside their files, so that it starts at once later.

    Samplers look there by themselves from then on. What is kept of a file that has been changed is not used.

    Args:
        sampler: a `LabelSampler`, `WeightedSampler` or `MixedSampler`, made without a subject: of the patch size, classes and
            border that it will be used with.
        *subjects: the subjects.

    Returns:
        The folders, `.STEM.index`, which may be removed at any time.

    Raises:
        ImageError: if a subject has no image that is in a single file.
        SaveError: if a folder cannot be made, or written to.

    Example:
        >>> import tempfile, torch, voxloom as vx
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     vx.LabelMap(torch.ones(1, 16, 16, 16, dtype=torch.uint8)).save(f"{folder}/seg.nii")
        ...     subject = vx.Subject(seg=vx.LabelMap(f"{folder}/seg.nii"))
        ...     [path.name for path in vx.build_index(vx.LabelSampler(8, "seg"), subject)]
        ['.seg.index']
    """
    made: list[Path] = []
    for subject in subjects:
        # Files of one stem share a folder.
        folders = list(dict.fromkeys(filter(None, map(index_folder, subject.images.values()))))
        if not folders:
            raise ImageError("the subject has no image that is in a file of its own, beside which sums could be kept")
        new = [folder for folder in folders if not folder.exists()]
        try:
            for folder in new:
                folder.mkdir()
        except OSError as error:
            raise as_save_error(new[0], error) from error
        failed: list[tuple[Path, OSError]] = []
        before = _failed.set(failed)
        try:
            sampler.prepare(subject)
            if failed:
                raise as_save_error(*failed[0]) from failed[0][1]
        finally:
            _failed.reset(before)
            for folder in new:
                with contextlib.suppress(OSError):
                    folder.rmdir()  # of images that are no maps: it is empty
        made += [folder for folder in folders if folder.exists()]
    if not made:
        raise SaveError(f"{type(sampler).__name__} goes through no map: there is nothing to keep")
    return made
