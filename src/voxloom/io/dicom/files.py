"""DICOM as people have it: a folder of slices, or a file.

ITK decodes the pixels, scales them to units such as Hounsfield's, turns MONOCHROME1 (where 0 is white) round and palettes to
colours. pydicom reads the headers, decodes what ITK reads wrongly or not at all, and gives what is stored, if that is wanted.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK
import torch
from pydicom.uid import ExplicitVRBigEndian, RLELossless, RTDoseStorage

from ...core.affines import Affine
from ...core.boxes import Box
from ...errors import CorruptImageError, SeriesError, VoxloomError
from ..files import FileSource
from ..itk import ItkFile, dtype_of, read_header
from .frames import DAMAGE, frame_count, header_of, is_segmentation, scales_of, table_of
from .pixels import DecodedFile, DecodedSlices, OrderedFrames, check_size
from .planes import arranged

__all__ = ["open_dicom", "open_series", "stored_dicom"]

POSITION, ORIENTATION, DESCRIPTION = "0020|0032", "0020|0037", "0008|103e"


def open_dicom(path: Path) -> FileSource:
    """Open a single file, whose frames are put in the order of their places.

    Raises:
        SeriesError: if its frames are no volume: one is missing, or repeated, or they are not parallel.
        CorruptImageError, UnsupportedImageError: see `voxloom.errors`.
    """
    return _opened(path, is_stored=False)


def stored_dicom(path: Path) -> tuple[torch.Tensor, Affine]:
    """See the function of the package."""
    if not path.is_dir():
        source = _opened(path, is_stored=True)
        return source.read(Box.of_shape(source.shape[1:])), source.affine
    series = open_series(path)
    planes = [_opened(file, is_stored=True) for file in series.paths]
    return torch.cat([plane.read(Box.of_shape(plane.shape[1:])) for plane in planes], dim=3), series.affine


def _opened(path: Path, is_stored: bool) -> FileSource:
    header = header_of(path)
    if header is None:
        return ItkFile.open(path)
    if "Rows" not in header:
        kind = header.get("SOPClassUID")
        raise CorruptImageError(f"{path} is DICOM, but holds no image: it is {getattr(kind, 'name', kind) or 'of no known kind'}")
    try:
        check_size(path, header)
        table = table_of(header, path)
        frames = DecodedFile(path, header, is_stored) if is_stored or _is_for_pydicom(header, path) else ItkFile.open(path)
    except VoxloomError:
        raise
    except DAMAGE as error:
        raise CorruptImageError(f"{path}: its DICOM header cannot be used: {error}. Copy or download it again") from error
    return frames if table is None else OrderedFrames(frames, table)


def _is_for_pydicom(header: Any, path: Path) -> bool:
    """Whether ITK would give other values than are stored, or none."""
    count, bits, syntax = frame_count(header, path), int(header.BitsAllocated), header.file_meta.get("TransferSyntaxUID")
    slopes, intercepts = scales_of(header, count)
    return (
        is_segmentation(header)
        or (syntax == ExplicitVRBigEndian and bits > 16)
        or (syntax == RLELossless and bits > 8 and int(header.get("SamplesPerPixel", 1)) > 1)
        or (header.get("SOPClassUID") == RTDoseStorage and count == 1)
        or ("PixelRepresentation" not in header and bits >= 32)
        or bool(np.ptp(slopes) or np.ptp(intercepts))
    )


def open_series(folder: Path) -> FileSource:
    """Open a folder that holds exactly one DICOM series of parallel, evenly spaced slices.

    Raises:
        SeriesError: if there is no series, more than one, or one with slices missing, repeated or shifted sideways.
    """
    series = SimpleITK.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
    if not series:
        raise SeriesError(f"{folder} is a folder without DICOM files: give a file, or a folder that holds one DICOM series")
    files = {
        name: [Path(file) for file in SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), name)] for name in series
    }
    if len(series) > 1:
        listed = "; ".join(f"{name}, {len(paths)} files{_described(paths[0])}" for name, paths in files.items())
        raise SeriesError(f"{folder} holds {len(series)} DICOM series: put each into a folder of its own. They are {listed}")
    paths = files[series[0]]
    _check_none_left_out(folder, paths)
    if len(paths) == 1:
        return open_dicom(paths[0])
    return _checked_series(paths, folder)


def _check_none_left_out(folder: Path, paths: list[Path]) -> None:
    """Refuse damaged slices, which GDCM leaves out without a word: at the ends of a series nobody would miss them."""
    kind = _storage_class(paths[0])
    listed = {path.resolve() for path in paths}
    names = {_pattern(path) for path in paths}
    for path in sorted(folder.iterdir()):
        if not path.is_file() or path.resolve() in listed or path.name.startswith("."):
            continue
        found = _storage_class(path)
        if (found is None and _pattern(path) in names) or (kind is not None and found == kind):
            raise SeriesError(
                f"{path} is a slice that cannot be read: it is damaged or truncated. Copy or download it again, or, if it is"
                " none, move it elsewhere"
            )


def _pattern(path: Path) -> str:
    """What the names of slices share: all but the digits."""
    return re.sub(r"\d+", "0", path.name.lower())


def _storage_class(path: Path) -> bytes | None:
    """Say what kind of object a DICOM file holds, such as a CT slice, or None where it is no DICOM file."""
    with path.open("rb") as file:
        start = file.read(1024)
    place = start.find(b"\x02\x00\x02\x00UI")
    if start[128:132] != b"DICM" or place < 0:
        return None
    length = int.from_bytes(start[place + 6 : place + 8], "little")
    return start[place + 8 : place + 8 + length].rstrip(b"\0 ")


def _checked_series(paths: list[Path], folder: Path) -> FileSource:
    headers = [read_header(path) for path in paths]
    for path, header in zip(paths, headers, strict=True):
        missing = [tag for tag in (POSITION, ORIENTATION) if not header.HasMetaDataKey(tag)]
        if missing:
            raise SeriesError(f"{path} has no DICOM tag {missing[0]}, so that the place of its slice is unknown")
        if (header.GetSize(), header.GetNumberOfComponents()) != (headers[0].GetSize(), headers[0].GetNumberOfComponents()):
            raise SeriesError(
                f"{path} has {header.GetSize()} pixels of {header.GetNumberOfComponents()} components, but {paths[0].name} has"
                f" {headers[0].GetSize()} of {headers[0].GetNumberOfComponents()}: a series must be of one kind"
            )
        if header.GetSize()[2:] not in ((), (1,)):
            raise SeriesError(f"{path} holds {header.GetSize()[2]} slices, and is one of several: open such files one by one")
    types = {dtype_of(header, str(path)) for path, header in zip(paths, headers, strict=True)}
    positions = np.array([_numbers(path, header, POSITION, 3) for path, header in zip(paths, headers, strict=True)])
    orientations = np.array([_numbers(path, header, ORIENTATION, 6) for path, header in zip(paths, headers, strict=True)])
    order, affine = arranged(str(folder), [path.name for path in paths], positions, orientations, headers[0].GetSpacing()[:2])
    paths = [paths[index] for index in order]
    first = header_of(paths[0])
    if first is not None and _is_for_pydicom(first, paths[0]):
        return DecodedSlices([DecodedFile(path, header_of(path)) for path in paths], affine)
    # Slices that are scaled on their own, as in PET, may have types of their own, too.
    return ItkFile(paths, str(folder), affine, None if len(types) == 1 else torch.float64)


def _numbers(path: Path, header: Any, tag: str, count: int) -> list[float]:
    value = header.GetMetaData(tag)
    try:
        numbers = [float(number) for number in value.split("\\")]
    except ValueError:
        numbers = []
    if len(numbers) != count:
        raise SeriesError(f"{path}: the DICOM tag {tag} is {value!r}, where {count} numbers should say where the slice lies")
    return numbers


def _described(path: Path) -> str:
    header = read_header(path)
    return f" ({header.GetMetaData(DESCRIPTION).strip()})" if header.HasMetaDataKey(DESCRIPTION) else ""
