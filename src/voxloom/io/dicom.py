"""DICOM series: a folder of files, of which each holds a slice of one volume."""

from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK
import torch

from ..core.affines import lps_to_ras
from ..errors import SeriesError
from .itk import ItkFile, dtype_of, read_header

__all__ = ["open_series"]

# Slices may lie this part of their distance away from where even spacing would put them: positions are stored rounded.
SLICE_TOLERANCE = 0.05
# A slice may be shifted sideways by this many degrees against the one below before the series counts as tilted.
TILT_TOLERANCE_DEGREES = 0.1

POSITION, ORIENTATION, DESCRIPTION = "0020|0032", "0020|0037", "0008|103e"


def open_series(folder: Path) -> ItkFile:
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
        return ItkFile(paths, str(folder))
    return _checked_series(paths, folder)


def _check_none_left_out(folder: Path, paths: list[Path]) -> None:
    """Refuse damaged slices, which GDCM leaves out without a word: at the ends of a series nobody would miss them."""
    kind = _storage_class(paths[0])
    listed = {path.resolve() for path in paths}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.resolve() not in listed and kind is not None and _storage_class(path) == kind:
            raise SeriesError(f"{path} is a slice that cannot be read: it is damaged or truncated. Copy or download it again")


def _storage_class(path: Path) -> bytes | None:
    """Say what kind of object a DICOM file holds, such as a CT slice, or None where it is no DICOM file."""
    with path.open("rb") as file:
        start = file.read(1024)
    place = start.find(b"\x02\x00\x02\x00UI")
    if start[128:132] != b"DICM" or place < 0:
        return None
    length = int.from_bytes(start[place + 6 : place + 8], "little")
    return start[place + 8 : place + 8 + length].rstrip(b"\0 ")


def _checked_series(paths: list[Path], folder: Path) -> ItkFile:
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
    if np.abs(orientations - orientations[0]).max() > 1e-3:
        raise SeriesError(f"{folder}: the slices are not parallel, so that they are no volume: split the series")
    normal = np.cross(orientations[0, :3], orientations[0, 3:])
    order = np.argsort(positions @ normal, kind="stable")
    paths, positions = [paths[index] for index in order], positions[order]
    steps = np.diff(positions, axis=0)
    along = steps @ normal
    usual = float(np.median(along))
    for index, distance in enumerate(along):
        pair = f"{paths[index].name} and {paths[index + 1].name}"
        if distance < SLICE_TOLERANCE * max(usual, 1e-6):
            raise SeriesError(
                f"{folder}: {pair} are slices at the same place ({positions[index].tolist()}): remove the duplicate, or, if"
                " the series has several times or echoes, put each into a folder of its own"
            )
        if abs(distance - usual) > SLICE_TOLERANCE * usual:
            gap = distance / usual
            raise SeriesError(
                f"{folder}: {pair} are {distance:.4g} mm apart, but slices are usually {usual:.4g} mm apart:"
                + (f" {round(gap) - 1} of them are missing" if round(gap) > 1 else " the slices are not evenly spaced")
            )
    sideways = np.linalg.norm(steps - along[:, None] * normal, axis=1)
    tilt = float(np.degrees(np.arctan2(sideways, along)).max())
    if tilt > TILT_TOLERANCE_DEGREES:
        raise SeriesError(
            f"{folder}: the gantry was tilted by {tilt:.3g} degrees, so that slices are shifted against one another and no"
            " affine fits: resample the series onto a straight grid first"
        )
    step = (positions[-1] - positions[0]) / (len(positions) - 1)
    spacing = headers[0].GetSpacing()[:2]
    columns = np.stack([orientations[0, :3] * spacing[0], orientations[0, 3:] * spacing[1], step], axis=1)
    affine = lps_to_ras(columns, (1.0, 1.0, 1.0), positions[0])
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
