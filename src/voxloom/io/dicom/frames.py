"""What the header of a DICOM file says of its frames: which of them makes which plane, and where that lies."""

import re
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydicom
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, RTDoseStorage, SegmentationStorage

from ...core.geometry.affines import Affine
from ...errors import CorruptImageError, ImageNotFoundError, SeriesError, UnsupportedImageError, VoxloomError
from . import MARK, MARK_PLACE
from .planes import arranged, arranged_with_gaps

__all__ = [
    "DAMAGE",
    "EMPTY",
    "DicomHeader",
    "FrameTable",
    "brief",
    "frame_count",
    "header_of",
    "is_segmentation",
    "place_of",
    "scales_of",
    "spacing_of",
    "stated_spacing",
    "table_of",
]

# What pydicom raises when a file is damaged.
DAMAGE: tuple[Any, ...] = (
    ArithmeticError,
    AttributeError,
    BytesLengthException,
    EOFError,
    LookupError,
    NotImplementedError,
    OSError,
    RecursionError,
    RuntimeError,
    StopIteration,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)
EMPTY = -1
"""In a table: no frame, and so a plane of zeros."""

LABEL_MAP_STORAGE = "1.2.840.10008.5.1.4.1.1.66.7"
GREATEST_DEFLATE_RATIO = 1032
# Groups of the first tags of files without a mark, in both orders of bytes.
FIRST_GROUPS = (b"\x02\0", b"\x08\0", b"\0\x08")
# Whole numbers, floats and doubles.
PIXELS = (0x7FE00010, 0x7FE00008, 0x7FE00009)
# Positions of segments that lie in one plane may differ by so many millimetres.
ONE_PLACE = 0.01
# Attributes that number the planes of one volume: what they tell apart are places, and not volumes.
PLACES = (0x00200032, 0x00209057, 0x00201041)


@dataclass(frozen=True)
class FrameTable:
    """How frames become a volume."""

    numbers: np.ndarray
    """`(C, K)`: for each channel and plane the number of its frame, or `EMPTY`."""
    affine: Affine
    """RAS+."""


@dataclass(frozen=True)
class DicomHeader:
    """What comes before the pixels of a file."""

    path: Path
    data: Any
    """A data set of pydicom's."""
    pixel_bytes: int | None
    """Bytes of the file from where its pixels begin; None where there are none. Of deflated files it is what they may hold."""
    has_mark: bool = True
    """Whether it begins as DICOM files do today."""


def header_of(path: Path) -> DicomHeader | None:
    """Read what comes before the pixels; None for what is not DICOM.

    Raises:
        CorruptImageError: if the file is damaged, or ends before its pixels.
    """
    try:
        with warnings.catch_warnings(), path.open("rb") as file:
            warnings.simplefilter("ignore")  # values against the rules, which nothing here depends on
            start = file.read(MARK_PLACE + len(MARK))
            # Old files lack the mark, and begin with a group of theirs.
            if start[MARK_PLACE:] != MARK and start[:2] not in FIRST_GROUPS:
                return None
            has_mark = start[MARK_PLACE:] == MARK
            file.seek(0)
            data = pydicom.dcmread(file, stop_before_pixels=True, force=True)
            if "SOPClassUID" not in data and "Rows" not in data:
                return None
            if "TransferSyntaxUID" not in data.file_meta:
                is_implicit, is_little = data.original_encoding
                plain = ExplicitVRLittleEndian if is_little else ExplicitVRBigEndian
                data.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if is_implicit else plain
            size = path.stat().st_size
            if data.file_meta.TransferSyntaxUID.is_deflated:
                return DicomHeader(path, data, size * GREATEST_DEFLATE_RATIO if "Rows" in data else None)
            rest, start = size - file.tell(), file.read(4)
            if not start:
                return DicomHeader(path, data, None)
            order: Literal["little", "big"] = "little" if data.original_encoding[1] else "big"
            tag = int.from_bytes(start[:2], order) << 16 | int.from_bytes(start[2:], order)
            if tag not in PIXELS or "Rows" not in data:
                raise EOFError("its header has no end that is followed by pixels")
            return DicomHeader(path, data, rest, has_mark)
    except InvalidDicomError:
        return None
    except FileNotFoundError as error:
        raise ImageNotFoundError(f"there is no file {path}") from error
    except DAMAGE as error:
        raise CorruptImageError(f"{path} is not a DICOM file that can be read: {brief(error)}. Copy it again") from error


def brief(error: BaseException) -> str:
    """Give the first line of an error: pydicom's hold tracebacks."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def frame_count(header: Any, path: Path) -> int:
    """Say how many frames there are."""
    given = header.get("NumberOfFrames", 1) or 1
    number = re.match(r"\s*(\d+)", str(given))
    count = 0 if number is None else int(number[1])
    if count < 1:
        raise CorruptImageError(f"{path} has {given!r} as its number of frames: its header is damaged")
    return count


def is_segmentation(header: Any) -> bool:
    """Whether it holds segments."""
    return header.get("SOPClassUID") in (SegmentationStorage, LABEL_MAP_STORAGE)


def scales_of(header: Any, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Give slope and intercept of each frame."""
    if header.get("SegmentationType") == "FRACTIONAL":
        return np.full(count, 1 / float(header.MaximumFractionalValue)), np.zeros(count)
    frames = _groups(header, count, "PixelValueTransformationSequence")
    slopes = [float(_first(frame or header, "RescaleSlope", 1)) or 1.0 for frame in frames]  # a slope of 0 is none
    intercepts = [float(_first(frame or header, "RescaleIntercept", 0)) for frame in frames]
    return np.array(slopes), np.array(intercepts)


def place_of(header: Any) -> Affine:
    """Give the affine of frames that have no places of their own, which are taken to follow each other evenly."""
    # Nuclear medicine says it of the first detector.
    detector = (header.get("DetectorInformationSequence") or [None])[0]
    position = _numbers(header, "ImagePositionPatient", 3) or _numbers(detector, "ImagePositionPatient", 3)
    orientation = _numbers(header, "ImageOrientationPatient", 6) or _numbers(detector, "ImageOrientationPatient", 6)
    planes = np.array([(0, 0, 0) if position is None else position])
    is_flat = orientation is None or abs(np.linalg.norm(np.cross(orientation[:3], orientation[3:])) - 1) > 0.1
    orientations = np.array([(1, 0, 0, 0, 1, 0) if is_flat else orientation])
    # What ITK takes, too: how thick a plane is says nothing of where the next one lies.
    distance = abs(float(_first(_measures(header), "SpacingBetweenSlices", 0))) or 1.0
    _, affine = arranged(str(header.filename), ["it"], planes, orientations, spacing_of(header), distance)
    return affine


def spacing_of(header: Any) -> tuple[float, float]:
    """Give mm from column to column, and from row to row: 1 where nothing says it."""
    return stated_spacing(header) or (1.0, 1.0)


def stated_spacing(header: Any) -> tuple[float, float] | None:
    """Give mm from column to column, and from row to row; None where nothing says it."""
    measures = _measures(header)
    for name in ("PixelSpacing", "ImagerPixelSpacing", "ImagePlanePixelSpacing", "NominalScannedPixelSpacing"):
        found = _numbers(measures, name, 2)
        if found is not None and min(found) > 0:
            return found[1], found[0]
    return None


def _measures(header: Any) -> Any:
    return next(filter(None, _groups(header, 1, "PixelMeasuresSequence")), header)


def table_of(header: Any, path: Path) -> FrameTable | None:
    """Arrange the frames by their places; None where they have none.

    Raises:
        SeriesError: if the frames are no volume.
        CorruptImageError: if the header contradicts itself.
    """
    try:
        return _table_of(header, path)
    except VoxloomError:
        raise
    except DAMAGE as error:
        raise CorruptImageError(f"{path}: its header does not say where its frames lie: {brief(error)}. Copy it again") from error


def _table_of(header: Any, path: Path) -> FrameTable | None:
    count = frame_count(header, path)
    if header.get("SOPClassUID") == RTDoseStorage and count > 1:
        return _dose(header, path, count)
    if "TotalPixelMatrixColumns" in header and "PerFrameFunctionalGroupsSequence" in header:
        raise UnsupportedImageError(f"{path} holds the tiles of a slide, which are no volume: read it with a library for slides")
    listed = len(header.get("PerFrameFunctionalGroupsSequence", ()))
    if not listed:
        return None
    if listed != count and count > 1:
        raise SeriesError(f"{path} has {count} frames, but describes {listed}: it is damaged. Copy or download it again")
    positions = [_numbers(frame, "ImagePositionPatient", 3) for frame in _groups(header, count, "PlanePositionSequence")]
    orientations = [_numbers(frame, "ImageOrientationPatient", 6) for frame in _groups(header, count, "PlaneOrientationSequence")]
    lacking = [number for number, pair in enumerate(zip(positions, orientations, strict=True), 1) if None in pair]
    if len(lacking) == count:
        return None
    if lacking:
        raise SeriesError(
            f"{path}: frame {lacking[0]} does not say where it lies, as others do, so that there is no volume: take it out"
        )
    measures = _groups(header, count, "PixelMeasuresSequence")
    spacings = np.array([(1, 1) if frame is None else frame.PixelSpacing for frame in measures], dtype=float)
    if np.ptp(spacings, axis=0).max() > 1e-3 * spacings.max():
        raise SeriesError(f"{path}: its frames have pixels of several sizes, {spacings.min(0)} to {spacings.max(0)} mm")
    planes = _Planes(np.array(positions), np.array(orientations), (spacings[0, 1], spacings[0, 0]), measures[0])
    return _segments(header, path, planes) if is_segmentation(header) else _volumes(header, path, planes)


@dataclass(frozen=True)
class _Planes:
    positions: np.ndarray
    orientations: np.ndarray
    spacing: tuple[float, float]
    measures: Any

    def arranged(self, path: Path, chosen: Sequence[int]) -> tuple[np.ndarray, Affine]:
        names = [f"frame {number + 1}" for number in chosen]
        index = np.array(chosen)
        thickness = (
            float(_first(self.measures, "SpacingBetweenSlices", 0)) or float(_first(self.measures, "SliceThickness", 0)) or 1
        )
        order, affine = arranged(str(path), names, self.positions[index], self.orientations[index], self.spacing, abs(thickness))
        return index[order], affine


def _volumes(header: Any, path: Path, planes: _Planes) -> FrameTable:
    """One volume, or several of the same places, such as the times of a series, which become channels."""
    groups: dict[Any, list[int]] = {}
    count = len(planes.positions)
    keys = [()] * count if len(np.unique(planes.positions.round(4), axis=0)) == count else _indices(header, count)
    for number, key in enumerate(keys):
        groups.setdefault(key, []).append(number)
    arrangements = [planes.arranged(path, groups[key]) for key in sorted(groups)]
    first, affine = arrangements[0]
    for (order, other), key in zip(arrangements[1:], sorted(groups)[1:], strict=True):
        if len(order) != len(first) or np.abs(other - affine).max() > 1e-2 * np.abs(affine[:3, :3]).max():
            raise SeriesError(
                f"{path} holds {len(groups)} volumes, and that of the indices {key} has {len(order)} frames at other places than"
                f" the first, which has {len(first)}: frames are missing, or it must be split"
            )
    return FrameTable(np.stack([order for order, _ in arrangements]), affine)


def _segments(header: Any, path: Path, planes: _Planes) -> FrameTable:
    """A channel for each segment, in the order of their numbers; frames that are left out are empty."""
    count = len(planes.positions)
    if header.get("SegmentationType") == "LABELMAP":
        numbers, channel_of = [0] * count, {0: 0}
    else:
        numbers = [
            int(frame.ReferencedSegmentNumber) for frame in _groups(header, count, "SegmentIdentificationSequence") if frame
        ]
        channel_of = {number: i for i, number in enumerate(sorted(int(each.SegmentNumber) for each in header.SegmentSequence))}
    if len(numbers) != count or not channel_of.keys() >= set(numbers):
        raise CorruptImageError(f"{path}: not all of its frames name a segment that it describes: it is damaged")
    places, affine = arranged_with_gaps(str(path), planes.positions, planes.orientations, planes.spacing, _steps_of(planes))
    table = np.full((len(channel_of), int(places.max()) + 1), EMPTY)
    for frame, (segment, place) in enumerate(zip(numbers, places, strict=True)):
        before = table[channel_of[segment], place]
        if before != EMPTY:
            raise SeriesError(f"{path}: frames {before + 1} and {frame + 1} are of one segment and at one place: remove one")
        table[channel_of[segment], place] = frame
    return FrameTable(table, affine)


def _steps_of(planes: _Planes) -> list[float]:
    """Give what the distance of the planes of a segmentation may be, which may lack most of them; nothing if nothing says it."""
    stated, thickness = (abs(float(_first(planes.measures, name, 0))) for name in ("SpacingBetweenSlices", "SliceThickness"))
    if stated:
        return [stated]
    normal = np.cross(planes.orientations[0, :3], planes.orientations[0, 3:])
    distances = np.diff(np.sort(planes.positions @ normal))
    distances = distances[distances > min(ONE_PLACE, distances.max(initial=0) / 2)]
    # Positions are rounded, so that the least distance is a little less than a step.
    usual = [float(np.median(distances[distances < 1.5 * distances.min()]))] if len(distances) else []
    return usual + [thickness] * (thickness > 0)


def _dose(header: Any, path: Path, count: int) -> FrameTable:
    offsets = np.array(header.get("GridFrameOffsetVector") or [], dtype=float)
    position, orientation = _numbers(header, "ImagePositionPatient", 3), _numbers(header, "ImageOrientationPatient", 6)
    if len(offsets) != count or position is None or orientation is None:
        raise SeriesError(f"{path} has {count} frames, but places {len(offsets)} (GridFrameOffsetVector): copy it again")
    # Offsets begin with 0, or are the z of planes.
    normal = np.cross(orientation[:3], orientation[3:])
    positions = np.array(position) + np.outer(offsets - offsets[0], normal)
    rows, columns = map(float, header.PixelSpacing)
    planes = _Planes(positions, np.array([orientation] * count), (columns, rows), header)
    order, affine = planes.arranged(path, range(count))
    return FrameTable(order[None], affine)


def _groups(header: Any, count: int, name: str) -> list[Any | None]:
    """Give each frame's item of a sequence: its own, or else that of all."""
    frames = header.get("PerFrameFunctionalGroupsSequence") or [None] * count
    shared = _item((header.get("SharedFunctionalGroupsSequence") or [None])[0], name)
    return [_item(frame, name) or shared for frame in frames[:count]]


def _item(group: Any | None, name: str) -> Any | None:
    items = None if group is None else group.get(name)
    return items[0] if items else None


def _indices(header: Any, count: int) -> list[tuple[int, ...]]:
    """Give what tells each frame from others at the same place."""
    pointers = [int(each.DimensionIndexPointer) for each in header.get("DimensionIndexSequence") or ()]
    keep = [number for number, pointer in enumerate(pointers) if pointer not in PLACES]
    return [tuple(int(values[number]) for number in keep) for values in _dimension_values(header, count)]


def _dimension_values(header: Any, count: int) -> Iterator[Sequence[int]]:
    for frame in _groups(header, count, "FrameContentSequence"):
        values = None if frame is None else frame.get("DimensionIndexValues")
        yield [] if values is None else [values] if isinstance(values, int) else values


def _first(item: Any | None, name: str, default: float) -> Any:
    value = None if item is None else item.get(name)
    return default if value is None or value == "" else value


def _numbers(item: Any | None, name: str, count: int) -> tuple[float, ...] | None:
    values = None if item is None else item.get(name)
    if values is None or isinstance(values, str):
        return None
    numbers = tuple(map(float, values))
    return numbers if len(numbers) == count and np.isfinite(numbers).all() else None
