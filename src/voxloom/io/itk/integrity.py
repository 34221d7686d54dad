"""Checks that ITK does not make: it reads damaged MetaImage, NRRD and TIFF files without a word, and gives wrong values."""

import math
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from isal import igzip_lib

from ...errors import CorruptImageError, VoxloomError
from .layouts import Layout, layout_of_metaimage, layout_of_nrrd

__all__ = ["METAIMAGE", "NRRD", "TIFF", "Integrity"]

DAMAGE: tuple[Any, ...] = (
    OSError,
    EOFError,
    ValueError,
    ArithmeticError,
    zlib.error,
    struct.error,
    igzip_lib.IsalError,
)
TIFF_NEXT, TIFF_WIDTH, TIFF_LENGTH, TIFF_BITS, TIFF_COMPRESSION = 0, 256, 257, 258, 259
TIFF_STRIPS, TIFF_SAMPLES, TIFF_STRIP_BYTES, TIFF_TILES, TIFF_TILE_BYTES = 273, 277, 279, 324, 325
TIFF_TAGS = frozenset(range(TIFF_WIDTH, TIFF_COMPRESSION + 1)) | {
    TIFF_STRIPS,
    TIFF_SAMPLES,
    TIFF_STRIP_BYTES,
    TIFF_TILES,
    TIFF_TILE_BYTES,
}
# Code and bytes of the whole numbers that a TIFF directory may hold, with their letters in `struct`.
TIFF_TYPES = {3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}
# By how much TIFF's ways to compress shrink a page at most: one colour, by the best of them.
GREATEST_TIFF_RATIO = 5000


class Integrity(Protocol):
    """Compares a file of one format with its own header."""

    def check_header(self, path: Path) -> None:
        """Check what can be checked without reading the voxels; before anything else reads the file.

        Raises:
            CorruptImageError: names the file, and what is wrong with it.
        """
        ...

    def check_data(self, path: Path) -> None:
        """Check the voxels, before they are read; see `check_header`."""
        ...

    def units(self, path: Path) -> tuple[float, float, float]:
        """Give millimetres of a step along each axis, which ITK takes for millimetres, and of the origin likewise."""
        ...


@dataclass(frozen=True)
class _ByLayout:
    """Checks that as many voxels are there as the header says, and that checksums fit."""

    layout_of: Callable[[Path], Layout]

    def check_header(self, path: Path) -> None:
        """See `Integrity`."""
        _checked(path, self._check_sizes)

    def check_data(self, path: Path) -> None:
        """See `Integrity`."""
        _checked(path, self._check_contents)

    def units(self, path: Path) -> tuple[float, float, float]:
        """See `Integrity`."""
        return self.layout_of(path).millimetres

    def _check_sizes(self, path: Path) -> None:
        layout = self.layout_of(path)
        for part in layout.parts:
            part.check_size(layout.encoding)

    def _check_contents(self, path: Path) -> None:
        layout = self.layout_of(path)
        for part in layout.parts:
            part.check_size(layout.encoding)
            part.check_contents(layout.encoding)


class _Tiff:
    """Checks that all pages lie in the file, and are as large as they claim to be."""

    def check_header(self, path: Path) -> None:
        """See `Integrity`."""
        _checked(path, _check_tiff)

    def check_data(self, path: Path) -> None:
        """See `Integrity`."""

    def units(self, path: Path) -> tuple[float, float, float]:
        """See `Integrity`."""
        return 1.0, 1.0, 1.0


METAIMAGE, NRRD, TIFF = _ByLayout(layout_of_metaimage), _ByLayout(layout_of_nrrd), _Tiff()


def _checked(path: Path, check: Callable[[Path], None]) -> None:
    try:
        check(path)
    except VoxloomError:
        raise
    except DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            which = error.filename or path
            raise CorruptImageError(f"{path} cannot be read: {which}: {error.strerror}") from error
        raise CorruptImageError(f"{path} is damaged or truncated: {error}. Copy or download it again") from error


def _check_tiff(path: Path) -> None:
    with path.open("rb") as file:
        _check_pages(file)


def _check_pages(file: IO[bytes]) -> None:
    """Follow the pages of a file from one to the next, and see that their data lie within it, and suffice."""
    size = file.seek(0, 2)
    file.seek(0)
    start = file.read(8)
    order = {b"II": "<", b"MM": ">"}.get(start[:2])
    if order is None:
        return  # not a TIFF: the reader says so
    is_big = struct.unpack(order + "H", start[2:4])[0] == 43
    offset = struct.unpack(order + "Q", file.read(8))[0] if is_big else struct.unpack(order + "I", start[4:8])[0]
    seen = set()
    while offset:
        if offset in seen:
            raise ValueError("its pages go round in a circle")
        seen.add(offset)
        entries = dict(_tiff_entries(file, offset, order, is_big, size))
        for places, lengths in ((TIFF_STRIPS, TIFF_STRIP_BYTES), (TIFF_TILES, TIFF_TILE_BYTES)):
            pairs = zip(entries.get(places, ()), entries.get(lengths, ()), strict=False)
            if any(place + length > size for place, length in pairs):
                raise EOFError(f"page {len(seen)} lies beyond the end of the file")
        _check_page(entries, len(seen))
        offset = entries[TIFF_NEXT][0]
        if offset >= size:
            raise EOFError(f"page {len(seen) + 1} lies beyond the end of the file")


def _check_page(entries: dict[int, tuple[int, ...]], number: int) -> None:
    """Compare the size of a page with the bytes that it has."""
    width, length, samples, bits = (entries.get(tag, (1,)) for tag in (TIFF_WIDTH, TIFF_LENGTH, TIFF_SAMPLES, TIFF_BITS))
    claimed = math.ceil(width[0] * length[0] * max(samples[0], 1) * max(bits) / 8)
    held = sum(entries.get(TIFF_STRIP_BYTES, entries.get(TIFF_TILE_BYTES, ())))
    is_plain = entries.get(TIFF_COMPRESSION, (1,))[0] == 1
    if claimed > held * (1 if is_plain else GREATEST_TIFF_RATIO):
        raise EOFError(f"page {number} claims {claimed} bytes of pixels, but has {held}")


def _tiff_entries(file: IO[bytes], offset: int, order: str, is_big: bool, size: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Yield tag and values of the entries that hold whole numbers, and last, under tag 0, where the next page is."""
    count_type, entry_type, inline, next_type = ("Q", "HHQ", 8, "Q") if is_big else ("H", "HHI", 4, "I")

    def unpack(layout: str) -> tuple[int, ...]:
        return struct.unpack(order + layout, file.read(struct.calcsize(order + layout)))

    file.seek(offset)
    (count,) = unpack(count_type)
    for _ in range(count):
        tag, kind, length = unpack(entry_type)
        after = file.tell() + inline
        if kind in TIFF_TYPES and tag in TIFF_TAGS:
            layout = f"{length}{TIFF_TYPES[kind]}"
            if not length or struct.calcsize(order + layout) > size:
                raise EOFError(f"an entry claims {length} numbers")
            if struct.calcsize(order + layout) > inline:
                file.seek(*unpack(next_type))
            yield tag, unpack(layout)
        file.seek(after)
    yield TIFF_NEXT, unpack(next_type)
