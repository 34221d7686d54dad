"""Checks that ITK does not make: it reads damaged MetaImage, NRRD and TIFF files without a word, and gives wrong values."""

import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from isal import igzip, igzip_lib, isal_zlib

from ..errors import CorruptImageError

__all__ = ["check_metaimage", "check_nrrd", "check_tiff"]

CHUNK_BYTES = 2**20
DAMAGE: tuple[Any, ...] = (OSError, EOFError, ValueError, zlib.error, struct.error, igzip_lib.IsalError)
TIFF_NEXT, TIFF_STRIPS, TIFF_STRIP_BYTES, TIFF_TILES, TIFF_TILE_BYTES = 0, 273, 279, 324, 325
# Code and bytes of the whole numbers that a TIFF directory may hold, with their letters in `struct`.
TIFF_TYPES = {3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}


def check_metaimage(path: Path) -> None:
    """Check that the data of a MetaImage file in one part are whole.

    Raises:
        CorruptImageError: names the file, and what is wrong with it.
    """
    _check(path, _check_metaimage)


def check_nrrd(path: Path) -> None:
    """Check that the data of an NRRD file in one part are whole; see `check_metaimage`."""
    _check(path, _check_nrrd)


def check_tiff(path: Path) -> None:
    """Check that all pages of a TIFF file lie in it; see `check_metaimage`."""
    _check(path, _check_tiff)


def _check(path: Path, check: Callable[[IO[bytes]], None]) -> None:
    try:
        with path.open("rb") as file:
            check(file)
    except DAMAGE as error:
        raise CorruptImageError(f"{path} is damaged or truncated: {error}. Copy or download it again") from error


def _check_metaimage(file: IO[bytes]) -> None:
    """Decompress the data of a file in one part, which end in a checksum."""
    fields = {}
    for line in iter(file.readline, b""):
        name, _, value = line.partition(b"=")
        fields[name.strip().lower()] = value.strip().lower()
        if name.strip().lower() == b"elementdatafile":
            break
    if fields.get(b"compresseddata") != b"true" or fields.get(b"elementdatafile") != b"local":
        return
    stream = isal_zlib.decompressobj(wbits=47)  # finds out whether it is zlib or gzip
    while not stream.eof:
        chunk = file.read(CHUNK_BYTES)
        if not chunk:
            raise EOFError("the compressed data end too early")
        stream.decompress(chunk)


def _check_nrrd(file: IO[bytes]) -> None:
    """Decompress the data of a file in one part."""
    encoding = b""
    for line in iter(file.readline, b""):
        name, _, value = line.partition(b":")
        if name.strip().lower() in (b"data file", b"datafile"):
            return
        if name.strip().lower() == b"encoding":
            encoding = value.strip().lower()
        if not line.strip():
            break
    if encoding in (b"gzip", b"gz"):
        with igzip.open(file, "rb") as stream:
            while stream.read(CHUNK_BYTES):
                pass


def _check_tiff(file: IO[bytes]) -> None:
    """Follow the pages of a file from one to the next, and see that their data lie within it."""
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
        entries = dict(_tiff_entries(file, offset, order, is_big))
        for places, lengths in ((TIFF_STRIPS, TIFF_STRIP_BYTES), (TIFF_TILES, TIFF_TILE_BYTES)):
            pairs = zip(entries.get(places, ()), entries.get(lengths, ()), strict=False)
            if any(place + length > size for place, length in pairs):
                raise EOFError(f"page {len(seen)} lies beyond the end of the file")
        offset = entries[TIFF_NEXT][0]
        if offset >= size:
            raise EOFError(f"page {len(seen) + 1} lies beyond the end of the file")


def _tiff_entries(file: IO[bytes], offset: int, order: str, is_big: bool) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Yield tag and values of the entries that hold whole numbers, and last, under tag 0, where the next page is."""
    count_type, entry_type, inline, next_type = ("Q", "HHQ", 8, "Q") if is_big else ("H", "HHI", 4, "I")

    def unpack(layout: str) -> tuple[int, ...]:
        return struct.unpack(order + layout, file.read(struct.calcsize(order + layout)))

    file.seek(offset)
    (count,) = unpack(count_type)
    for _ in range(count):
        tag, kind, length = unpack(entry_type)
        after = file.tell() + inline
        if kind in TIFF_TYPES and tag in (TIFF_STRIPS, TIFF_STRIP_BYTES, TIFF_TILES, TIFF_TILE_BYTES):
            layout = f"{length}{TIFF_TYPES[kind]}"
            if struct.calcsize(order + layout) > inline:
                file.seek(*unpack(next_type))
            yield tag, unpack(layout)
        file.seek(after)
    yield TIFF_NEXT, unpack(next_type)
