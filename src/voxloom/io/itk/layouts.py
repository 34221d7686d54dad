"""Where the voxels of MetaImage and NRRD files lie, and how many bytes there must be, as the header says.

ITK reads past the end of such files without a word, trusts whatever a header claims, and ignores checksums. So each file is
compared with its header first.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import IO, Any

from isal import isal_zlib

from ...errors import UnsupportedImageError
from ..compression import GREATEST_GZIP_RATIO

__all__ = ["Layout", "Part", "layout_of_metaimage", "layout_of_nrrd"]

CHUNK_BYTES = 2**20
LONGEST_LINE = 2**16
# A segmentation of 65,535 segments has eight lines for each.
MOST_LINES = 10**6
MOST_FILES = 10_000
MOST_DIMENSIONS = 10
METAIMAGE_BYTES = {
    f"met_{sign}{name}": size
    for name, size in {"char": 1, "short": 2, "int": 4, "long": 4, "long_long": 8}.items()
    for sign in ("", "u")
} | {"met_float": 4, "met_double": 8}
NRRD_BYTES = {
    name: size
    for size, names in {
        1: "signed char|int8|int8_t|uchar|unsigned char|uint8|uint8_t",
        2: "short|short int|signed short|signed short int|int16|int16_t|ushort|unsigned short|unsigned short int|uint16|uint16_t",
        4: "int|signed int|int32|int32_t|uint|unsigned int|uint32|uint32_t|float",
        8: "longlong|long long|long long int|signed long long|signed long long int|int64|int64_t|ulonglong|unsigned long long"
        "|unsigned long long int|uint64|uint64_t|double",
    }.items()
    for name in names.split("|")
}
MILLIMETRES_IN = {
    name: size
    for size, names in {
        1.0: "|?|pixel|pixels|voxel|voxels|mm|millimeter|millimeters|millimetre|millimetres",
        10.0: "cm|centimeter|centimeters|centimetre|centimetres",
        1000.0: "m|meter|meters|metre|metres",
        1e-3: "um|µm|μm|micron|microns|micrometer|micrometers|micrometre|micrometres",
        1e-6: "nm|nanometer|nanometers|nanometre|nanometres",
        25.4: "in|inch|inches",
    }.items()
    for name in names.split("|")
}
"""Of a unit of length, as files say it; what is not said is millimetres."""
NRRD_ENCODINGS = {"raw": "raw", "gz": "gzip", "gzip": "gzip", "txt": "text", "text": "text", "ascii": "text", "hex": "hex"}


@dataclass(frozen=True)
class Part:
    """Some of the voxels, one after the other."""

    path: Path
    offset: int | None
    """Bytes before them; None if they are the last ones of the file."""
    num_bytes: int
    """Bytes of the voxels, when they are no longer compressed."""
    num_values: int
    lines_to_skip: int = 0
    skipped_when_unpacked: int = 0
    """Bytes before them in what is compressed."""
    packed_bytes: int | None = None
    """Bytes that are compressed, where the header says it: ITK looks at no more."""

    def check_size(self, encoding: str) -> None:
        """Compare the size of the file with what it should hold, before memory is asked for.

        Raises:
            EOFError: if it is too short.
        """
        size = self.path.stat().st_size - (self.offset or 0)
        if self.packed_bytes is not None:
            if self.packed_bytes > size:
                raise ValueError(f"its header says that {self.packed_bytes} bytes are compressed voxels, but there are {size}")
            size = self.packed_bytes
        needed, most = self.num_bytes, size
        if encoding in ("gzip", "zlib"):
            most = size * GREATEST_GZIP_RATIO
        elif encoding == "hex":
            most = size // 2
        elif encoding == "text":
            needed, most = self.num_values, (size + 1) // 2
        if size < 0 or needed > most:
            raise EOFError(
                f"{needed} {_unit(encoding)} of voxels should be in {self.path.name}, which has {max(size, 0)} bytes for them"
            )

    def check_contents(self, encoding: str) -> None:
        """Read what is compressed or written as text, to its checksum if it has one.

        Raises:
            EOFError: if it ends too early.
            ValueError: if a checksum does not fit, or something else is there than digits.
        """
        if encoding == "raw":
            return
        with self.path.open("rb") as file:
            file.seek(self.offset or 0)
            for _ in range(self.lines_to_skip):
                file.readline()
            needed = self.num_values if encoding == "text" else self.num_bytes + self.skipped_when_unpacked
            count = _COUNTS[encoding](file if self.packed_bytes is None else _Start(file, self.packed_bytes), needed)
        if count < needed:
            raise EOFError(f"{self.path.name} has {count} of {needed} {_unit(encoding)} of voxels")


@dataclass(frozen=True)
class Layout:
    """All voxels of an image."""

    parts: tuple[Part, ...]
    encoding: str
    """`"raw"`, `"zlib"`, `"gzip"`, `"text"` or `"hex"`."""
    millimetres: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """What a step along each axis is a multiple of, and the place of the first voxel."""


class _Start:
    """So many bytes of an open file, and no more."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._left = file, size

    def read(self, size: int) -> bytes:
        found = self._file.read(min(size, self._left))
        self._left -= len(found)
        return found


def _unit(encoding: str) -> str:
    return "numbers" if encoding == "text" else "bytes"


def _unpacked_bytes(file: Any, needed: int, may_go_on: bool = True) -> int:
    """Count the bytes that are compressed in what follows, in one stream or more; all checksums are compared."""
    count = 0
    stream = isal_zlib.decompressobj(wbits=47)  # finds out whether it is zlib or gzip
    while chunk := stream.unconsumed_tail or file.read(CHUNK_BYTES):
        count += len(stream.decompress(chunk, CHUNK_BYTES))
        while stream.eof and may_go_on and count < needed and (chunk := stream.unused_data or file.read(CHUNK_BYTES)):
            stream = isal_zlib.decompressobj(wbits=47)  # gzip may go on with another member
            count += len(stream.decompress(chunk, CHUNK_BYTES))
        if stream.eof:
            return count
    raise EOFError("the compressed data end too early")


def _numbers(file: IO[bytes], needed: int) -> int:
    count, is_within = 0, False
    for chunk in iter(lambda: file.read(CHUNK_BYTES), b""):
        count += len(chunk.split()) - (is_within and not chunk[:1].isspace())
        is_within = not chunk[-1:].isspace()
    return count


def _hex_bytes(file: IO[bytes], needed: int) -> int:
    digits = 0
    for chunk in iter(lambda: file.read(CHUNK_BYTES), b""):
        packed = b"".join(chunk.split())
        if packed.strip(b"0123456789abcdefABCDEF"):
            raise ValueError("it holds something else than hexadecimal digits")
        digits += len(packed)
    return digits // 2


_COUNTS: dict[str, Callable[[Any, int], int]] = {
    "gzip": _unpacked_bytes,
    "zlib": partial(_unpacked_bytes, may_go_on=False),
    "text": _numbers,
    "hex": _hex_bytes,
}


# MetaImage


def layout_of_metaimage(path: Path) -> Layout:
    """Read the header of a MetaImage file, in one part or two.

    Raises:
        ValueError: if it cannot be that of an image.
        UnsupportedImageError: if the voxels are written in a way that nobody here reads.
        OSError: if it cannot be read.
    """
    with path.open("rb") as file:
        fields = _metaimage_fields(file)
        start = file.tell()
    name = fields.get("elementdatafile", "")
    dimensions = _whole(fields, "ndims", 1, MOST_DIMENSIONS)
    sizes = _sizes(fields, "dimsize", dimensions)
    if prod(sizes[3:]) * prod(sizes[:3]) >= 2**62:
        raise ValueError(f"DimSize is {sizes}")
    channels = _whole(fields, "elementnumberofchannels", 1, 2**20) if "elementnumberofchannels" in fields else 1
    kind = fields.get("elementtype", "").removesuffix("_array")
    if kind not in METAIMAGE_BYTES:
        raise ValueError(f"ElementType is {kind.upper() or 'missing'}")
    values, is_compressed = prod(sizes) * channels, fields.get("compresseddata", "").startswith("t")
    is_text = fields.get("binarydata", "true").startswith("f")
    encoding = "zlib" if is_compressed else "text" if is_text else "raw"
    header = _whole(fields, "headersize", -1, 2**62) if "headersize" in fields else 0
    if name.lower() in ("local", "."):
        # The data begin where the header ends, unless they are the end of the file.
        if header > 0 and header != start:
            raise ValueError(f"its header says that it has {header} bytes (HeaderSize), but it has {start}")
        parts = [(path, None if header < 0 and encoding == "raw" else start)]
    else:
        offset = None if header < 0 and encoding == "raw" else max(header, 0)
        parts = [(path.parent / part, offset) for part in _metaimage_files(path, name, start, sizes)]
    values //= len(parts)
    packed = None
    if encoding == "zlib" and len(parts) == 1:
        fields["compresseddatasize"] = re.sub(r"\.0*$", "", fields.get("compresseddatasize", "0"))
        packed = _whole(fields, "compresseddatasize", 0, 2**62)
        if not packed and parts[0][0] == path:
            raise ValueError("it does not say how many bytes its compressed voxels take (CompressedDataSize): write it again")
    millimetres = _millimetres(path, "DistanceUnits", fields.get("distanceunits", ""))
    return Layout(
        tuple(Part(part, offset, values * METAIMAGE_BYTES[kind], values, packed_bytes=packed or None) for part, offset in parts),
        encoding,
        (millimetres,) * 3,
    )


def _metaimage_fields(file: IO[bytes]) -> dict[str, str]:
    fields: dict[str, str] = {}
    for line in _lines(file):
        name, separator, value = line.partition("=")
        key = name.strip().lower()
        if separator and key:
            fields[key] = value.strip() if key == "elementdatafile" else value.strip().lower()
        if key == "elementdatafile":
            return fields
    raise ValueError("it does not say where its voxels are (ElementDataFile)")


def _metaimage_files(path: Path, name: str, start: int, sizes: tuple[int, ...]) -> list[str]:
    """Name the files that hold the voxels: one; those that follow in a list; or those of a pattern."""
    if name.lower().startswith("list"):
        with path.open("rb") as file:
            file.seek(start)
            names = [line.strip() for line in _lines(file) if line.strip()]
    elif "%" in name:
        pattern, *numbers = name.split()
        first, last, step = ([int(number) for number in numbers] + [1, sizes[-1], 1][len(numbers) :])[:3]
        names = _numbered(pattern, first, last, step)
    else:
        return [name]
    return _divided(names, sizes[-1])


# NRRD


def layout_of_nrrd(path: Path) -> Layout:
    """Read the header of an NRRD file, in one part or more; see `layout_of_metaimage`."""
    with path.open("rb") as file:
        fields, names = _nrrd_fields(file)
        start = file.tell()
    dimensions = _whole(fields, "dimension", 1, 16)
    sizes = _sizes(fields, "sizes", dimensions)
    kind = fields.get("type", "")
    if kind not in NRRD_BYTES:
        raise ValueError(f"its type is {kind or 'missing'}")
    encoding = NRRD_ENCODINGS.get(fields.get("encoding", ""))
    if encoding is None:
        given = fields.get("encoding", "missing")
        raise UnsupportedImageError(f"{path} has the encoding {given}: {', '.join(NRRD_ENCODINGS)} can be read; save it as gzip")
    lines = _whole(fields, "line skip", 0, 2**31) if "line skip" in fields else 0
    skipped = _whole(fields, "byte skip", -1, 2**62) if "byte skip" in fields else 0
    values = prod(sizes)
    is_attached = names is None
    if names is None:
        names = [path.name]
    elif len(names) > 1:
        _divided(names, values)
    values //= len(names)
    is_packed = encoding == "gzip"
    before = (start if is_attached else 0) + (0 if is_packed else max(skipped, 0))
    offset = None if skipped < 0 and encoding == "raw" else before
    return Layout(
        tuple(
            Part(path.parent / name, offset, values * NRRD_BYTES[kind], values, lines, max(skipped, 0) if is_packed else 0)
            for name in names
        ),
        encoding,
        _nrrd_units(path, fields),
    )


def _nrrd_units(path: Path, fields: dict[str, str]) -> tuple[float, float, float]:
    """Give millimetres of a step along each axis: by the units of the space, or else of the axes."""
    in_space = re.findall(r'"([^"]*)"', fields.get("space units", ""))[:3]  # a fourth one is of times
    if in_space:
        sizes = {_millimetres(path, "space units", each) for each in in_space}
        if len(sizes) > 1:
            raise UnsupportedImageError(
                f"{path} has the space units {fields['space units']}: they must be the same along all axes"
            )
        (size,) = sizes
        return (size,) * 3
    units = re.findall(r'"([^"]*)"', fields.get("units", ""))
    kinds = fields.get("kinds", "").split() or ["domain"] * len(units)
    if "space directions" in fields or len(units) != len(kinds):
        return 1.0, 1.0, 1.0
    # ITK takes axes of channels out, wherever they are; what follows the first three is of times.
    own = [unit for unit, kind in zip(units, kinds, strict=True) if kind in ("domain", "space", "???", "none")][:3]
    i, j, k = (*(_millimetres(path, "units", unit) for unit in own), 1.0, 1.0, 1.0)[:3]
    return i, j, k


def _nrrd_fields(file: IO[bytes]) -> tuple[dict[str, str], list[str] | None]:
    """Give the fields, and the names of the files with the voxels; None if they follow in this one."""
    lines = _lines(file)
    if not re.fullmatch(r"NRRD000[1-5]", next(lines, "").strip()):
        raise ValueError("it does not begin with NRRD")
    fields: dict[str, str] = {}
    names: list[str] | None = None
    for line in lines:
        if not line.strip():
            break
        name, separator, value = line.partition(": ")
        key = {"datafile": "data file", "lineskip": "line skip", "byteskip": "byte skip"}.get(name.strip().lower(), name.lower())
        if line.startswith("#") or not separator or ":=" in name:
            continue
        fields[key] = value.strip().lower()
        if key == "data file":
            given = value.strip()
            if given.upper().startswith("LIST"):
                return fields, [line.strip() for line in lines if line.strip()]
            names = _nrrd_pattern(given) if "%" in given else [given]
    return fields, names


def _nrrd_pattern(given: str) -> list[str]:
    pattern, *numbers = given.split()
    if len(numbers) < 3:
        raise ValueError(f"the pattern of its data files is {given}")
    first, last, step = (int(number) for number in numbers[:3])
    return _numbered(pattern, first, last, step)


# Both


def _millimetres(path: Path, field: str, unit: str) -> float:
    name = unit.strip().lower()
    if name not in MILLIMETRES_IN:
        known = ", ".join(each for each in MILLIMETRES_IN if each not in ("", "?"))
        raise UnsupportedImageError(f"{path} has {field} {unit!r}, which is no length that is known ({known}): correct it")
    return MILLIMETRES_IN[name]


def _lines(file: IO[bytes]) -> Iterator[str]:
    for _ in range(MOST_LINES):
        line = file.readline(LONGEST_LINE)
        if not line:
            return
        if len(line) == LONGEST_LINE:
            raise ValueError("a line of its header has no end")
        yield line.decode("utf-8", "replace").rstrip("\r\n")
    raise ValueError("its header has no end")


def _whole(fields: dict[str, str], name: str, least: int, most: int) -> int:
    text = fields.get(name, "missing")
    if not re.fullmatch(r"[+-]?\d{1,19}", text) or not least <= int(text) <= most:
        raise ValueError(f"{name} is {text}: it must be a whole number of at least {least}")
    return int(text)


def _sizes(fields: dict[str, str], name: str, count: int) -> tuple[int, ...]:
    texts = fields.get(name, "").split()
    if len(texts) != count or not all(re.fullmatch(r"\d{1,18}", text) and int(text) for text in texts):
        raise ValueError(f"{name} is {fields.get(name, 'missing')}: {count} whole numbers of at least 1 are needed")
    return tuple(map(int, texts))


def _numbered(pattern: str, first: int, last: int, step: int) -> list[str]:
    """Fill numbers into a pattern such as `slice%03d.raw`."""
    if not re.fullmatch(r"[^%]*%0?\d{0,2}[di][^%]*", pattern) or step == 0:
        raise ValueError(f"the pattern of its data files is {pattern}, by steps of {step}")
    numbers = range(first, last + (1 if step > 0 else -1), step)
    if not 0 < len(numbers) <= MOST_FILES:
        raise ValueError(f"its data files are numbered from {first} to {last} by {step}")
    return [pattern % number for number in numbers]


def _divided(names: list[str], among: int) -> list[str]:
    if not names or among % len(names):
        raise ValueError(f"it names {len(names)} data files, among which its voxels cannot be divided")
    return names
