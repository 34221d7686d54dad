"""DICOM as people have it: a folder of slices, or a file.

Values are scaled to units such as Hounsfield's, MONOCHROME1 (where 0 is white) is turned round, and palettes become colours.
pydicom reads the headers, and all pixels but those that are compressed as pictures are, or have a palette: these are ITK's.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydicom.uid import RLELossless

from ...core.boxes import Box
from ...core.geometry.affines import Affine
from ...core.sizes import pretty_mm
from ...errors import CorruptImageError, SeriesError, VoxloomError
from ..files import FileSource
from ..itk.files import ItkFile, dtype_of, read_header
from ..itk.isolated import IsolatedFile
from .frames import (
    DAMAGE,
    DicomHeader,
    brief,
    frame_count,
    header_of,
    is_segmentation,
    scales_of,
    spacing_of,
    stated_spacing,
    table_of,
)
from .pixels import DecodedFile, DecodedSlices, OrderedFrames, RescaledFrames, check_size, check_values
from .planes import arranged

__all__ = ["open_dicom", "open_series", "stored_dicom"]

# By how much the sides of pixels of one volume may differ.
PIXEL_TOLERANCE = 1e-3


def open_dicom(path: Path) -> FileSource:
    """Open a single file, whose frames are put in the order of their places.

    Raises:
        SeriesError: if its frames are no volume: one is missing, or repeated, or they are not parallel.
        CorruptImageError, UnsupportedImageError: see `voxloom.errors`.
    """
    return _opened(path, is_stored=False)


def stored_dicom(path: Path) -> tuple[torch.Tensor, Affine]:
    """See the function of the package."""
    path = Path(path)
    if not path.is_dir():
        source = _opened(path, is_stored=True)
        return source.read(Box.of_shape(source.shape[1:])), source.affine
    series = open_series(path, is_stored=True)
    planes = [_opened(file, is_stored=True) for file in series.paths]
    return torch.cat([plane.read(Box.of_shape(plane.shape[1:])) for plane in planes], dim=3), series.affine


def _opened(path: Path, is_stored: bool) -> FileSource:
    header = header_of(path)
    if header is None:
        return IsolatedFile.open(path)
    if header.pixel_bytes is None:
        kind = header.data.get("SOPClassUID", "of no known kind")
        raise CorruptImageError(
            f"{path} is DICOM, but holds no image: it is {getattr(kind, 'name', kind)}. Give a file that does"
        )
    try:
        check_size(header)
        if not is_stored:
            check_values(header)
        table = table_of(header.data, path)
        if is_stored or not _is_for_itk(header.data):
            frames: FileSource = DecodedFile(header, is_stored)
        else:
            frames = _scaled(ItkFile.open(path), header.data)
    except VoxloomError:
        raise
    except DAMAGE as error:
        raise CorruptImageError(f"{path}: its DICOM header cannot be used: {brief(error)}. Copy it again") from error
    return frames if table is None else OrderedFrames(frames, table)


def _scaled(frames: FileSource, header: Any) -> FileSource:
    """Give frames that ITK has decoded the scale of each: it takes that of the first for all, and knows nothing of fractions."""
    slopes, intercepts = scales_of(header, frames.shape[3])
    first = scales_of(header, 1) if not is_segmentation(header) else (np.ones(1), np.zeros(1))
    if (slopes == first[0]).all() and (intercepts == first[1]).all():
        return frames
    return RescaledFrames(frames, slopes / first[0], intercepts - first[1] * slopes / first[0])


def _is_for_itk(header: Any) -> bool:
    """Whether pixels are compressed as pictures are, or have the colours of a palette.

    All others are pydicom's: ITK turns some of them to other values, and takes gigabytes before it notices that one is damaged.
    """
    syntax = header.file_meta.TransferSyntaxUID
    is_picture = syntax.is_encapsulated and syntax != RLELossless
    return is_picture or (header.get("PhotometricInterpretation") == "PALETTE COLOR" and not is_segmentation(header))


def open_series(folder: Path, is_stored: bool = False) -> FileSource:
    """See the function of the package; stored numbers may mean something that is not done here."""
    slices, others = [], []
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.startswith("."):
            found = Slice.of(path)
            slices.append(found) if isinstance(found, Slice) else others.append((path, found))
    _check_none_is_damaged(slices, others)
    series: dict[str, list[Slice]] = {}
    for each in slices:
        series.setdefault(each.series, []).append(each)
    if not series:
        raise SeriesError(f"{folder} is a folder without DICOM files of images: give a file, or a folder with one DICOM series")
    if len(series) > 1:
        listed = "; ".join(f"{name}, {len(each)} files{each[0].described}" for name, each in series.items())
        raise SeriesError(f"{folder} holds {len(series)} DICOM series: put each into a folder of its own. They are {listed}")
    return _opened(slices[0].path, is_stored) if len(slices) == 1 else _checked_series(slices, folder, is_stored)


@dataclass(frozen=True)
class Slice:
    """What a file of a series says of itself."""

    path: Path
    header: DicomHeader
    series: str
    shape: tuple[int, int, int]
    """Columns, rows and samples."""
    frames: int

    @classmethod
    def of(cls, path: Path) -> "Slice | str | None":
        """Read a header; where there are no pixels, say of which kind the file is, or None.

        Raises:
            SeriesError: if the file is damaged.
        """
        try:
            header = header_of(path)
            if header is None or header.pixel_bytes is None:
                return None if header is None else str(header.data.get("SOPClassUID"))
            check_size(header)
            data = header.data
            shape = int(data.Columns), int(data.Rows), int(data.get("SamplesPerPixel", 1))
            return cls(path, header, str(data.get("SeriesInstanceUID", "")), shape, frame_count(data, path))
        except (CorruptImageError, *DAMAGE) as error:
            raise SeriesError(_unreadable(path, f": {brief(error)}")) from error

    @property
    def described(self) -> str:
        """The name of the series, in parentheses."""
        name = str(self.header.data.get("SeriesDescription", "") or "").strip()
        return f" ({name})" if name else ""


def _unreadable(path: Path, why: str = "") -> str:
    return (
        f"{path} is a slice that cannot be read, since it is damaged or truncated{why}. Copy or download it again, or move it"
        " elsewhere if it is none"
    )


def _check_none_is_damaged(slices: list[Slice], others: list[tuple[Path, str | None]]) -> None:
    """Refuse what was a slice by its kind or its name, and no longer is one: at the ends of a series nobody would miss it."""
    kinds, names = {str(each.header.data.get("SOPClassUID")) for each in slices}, {_pattern(each.path) for each in slices}
    for path, kind in others:
        if kind in kinds or (_pattern(path) in names and kind is None):
            raise SeriesError(_unreadable(path))


def _pattern(path: Path) -> str:
    """What the names of slices share: all but the digits."""
    return re.sub(r"\d+", "0", path.name.lower())


def _checked_series(slices: list[Slice], folder: Path, is_stored: bool) -> FileSource:
    first = slices[0]
    sized = next((each for each in slices if stated_spacing(each.header.data)), first)
    for each in slices:
        if each.shape != first.shape:
            raise SeriesError(
                f"{each.path} has {each.shape[:2]} pixels of {each.shape[2]} components, but {first.path.name} has"
                f" {first.shape[:2]} of {first.shape[2]}: a series must be of one kind"
            )
        if each.frames > 1:
            raise SeriesError(f"{each.path} holds {each.frames} slices, and is one of several: open such files one by one")
        try:
            _check_pixels(each, sized)
            if not is_stored:
                check_values(each.header)
        except VoxloomError:
            raise
        except DAMAGE as error:
            raise CorruptImageError(f"{each.path}: its DICOM header cannot be used: {brief(error)}. Copy it again") from error
    positions = np.array([_numbers(each, "ImagePositionPatient", 3) for each in slices])
    orientations = np.array([_numbers(each, "ImageOrientationPatient", 6) for each in slices])
    names = [each.path.name for each in slices]
    order, affine = arranged(str(folder), names, positions, orientations, spacing_of(sized.header.data))
    ordered = [slices[index] for index in order]
    try:
        if not any(_is_for_itk(each.header.data) for each in slices):
            return DecodedSlices([DecodedFile(each.header, affine=affine) for each in ordered], affine)
        kinds = {_kind_of_values(each.header.data): each.path for each in slices}
    except DAMAGE as error:
        raise CorruptImageError(f"{folder}: a DICOM header cannot be used: {brief(error)}. Copy it again") from error
    types = {dtype_of(read_header(path), str(path)) for path in kinds.values()}
    # Slices that are scaled on their own, as in PET, may have types of their own, too.
    return ItkFile([each.path for each in ordered], str(folder), affine, None if len(types) == 1 else torch.float64)


def _check_pixels(each: Slice, first: Slice) -> None:
    own, others = stated_spacing(each.header.data), stated_spacing(first.header.data)
    if own is None or others is None:
        return
    if max(abs(one - other) for one, other in zip(own, others, strict=True)) > PIXEL_TOLERANCE * max(others):
        raise SeriesError(
            f"{each.path} has pixels of {pretty_mm(own)}, but {first.path.name} has pixels of {pretty_mm(others)}: a series must"
            " be of one kind"
        )


def _kind_of_values(header: Any) -> tuple[str, ...]:
    """What decides of which type the values are."""
    names = (
        "RescaleSlope",
        "RescaleIntercept",
        "BitsAllocated",
        "BitsStored",
        "PixelRepresentation",
        "PhotometricInterpretation",
    )
    return tuple(str(header.get(name)) for name in names)


def _numbers(each: Slice, name: str, count: int) -> list[float]:
    try:
        value = each.header.data.get(name)
        numbers = None if value is None else [float(number) for number in value]
    except DAMAGE:
        value, numbers = "no numbers", []
    if numbers is None:
        raise SeriesError(f"{each.path} has no DICOM tag {name}, so that the place of its slice is unknown")
    if len(numbers) != count or not np.isfinite(numbers).all():
        raise SeriesError(
            f"{each.path}: the DICOM tag {name} is {value!r}, where {count} numbers should say where the slice lies"
        )
    return numbers
