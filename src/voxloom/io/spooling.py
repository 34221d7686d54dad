"""Compressed files that are too large for memory: unpacked once, to temporary files that can be read in parts."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

from ..errors import SaveError
from ..runtime.marks import left_by_dead, new_mark
from .compression import READ_ERRORS, open_compressed
from .formats import format_of
from .protocols import VolumeSource
from .writing.saving import as_save_error

__all__ = ["Packed", "is_packed", "spooled", "unpack"]

CHUNK_BYTES = 2**22
PREFIX = "voxloom-"


@runtime_checkable
class Packed(Protocol):
    """A source whose files can be unpacked to files that are read in parts: what a source may offer beside `VolumeSource`."""

    @property
    def packed_bytes(self) -> int:
        """Of the resident bytes those that unpacking saves; 0 if there is nothing to unpack."""
        ...

    def unpacked(self, folder: Path) -> VolumeSource:
        """Unpack the files into a folder, and give a source that reads these."""
        ...


def is_packed(path: Path) -> bool:
    """Whether a file need only be unpacked to be read in parts."""
    known = format_of(path)
    return known is not None and known.unpacked is not None


def unpack(path: Path, folder: Path) -> Path:
    """Unpack a file into a folder.

    Raises:
        OSError, EOFError, ValueError: if the file is damaged.
        SaveError: if there is no room for it.
    """
    known = format_of(path)
    assert known is not None
    target = folder / f"{len(list(folder.iterdir()))}{known.unpacked}"
    try:
        with open_compressed(path) as stream, target.open("wb") as file:
            shutil.copyfileobj(stream, file, CHUNK_BYTES)
    except READ_ERRORS as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise SaveError(f"{as_save_error(target, error)}. Set TMPDIR to a folder with more room") from error
        raise
    return target


@contextlib.contextmanager
def spooled(source: VolumeSource) -> Iterator[VolumeSource]:
    """Unpack the files of a source, if it has any; the temporary files are removed in the end.

    Raises:
        SaveError: if there is no room for them.
    """
    if not isinstance(source, Packed) or not source.packed_bytes:
        yield source
        return
    place = Path(tempfile.gettempdir())
    for _, left in left_by_dead(place, PREFIX):
        shutil.rmtree(left, ignore_errors=True)
    folder = place / f"{PREFIX}{new_mark()}"
    try:
        folder.mkdir(mode=0o700)
    except OSError as error:
        raise SaveError(f"{as_save_error(folder, error)}. Set TMPDIR to a folder with more room") from error
    try:
        yield source.unpacked(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
