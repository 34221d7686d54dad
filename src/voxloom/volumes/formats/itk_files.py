"""NRRD, MetaImage, TIFF stacks, single DICOM files, DICOM series and whatever else SimpleITK can read: read whole."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK
import torch
from torch import Tensor

from ...core.boxes import Box
from ...errors import CorruptImageError, SeriesError, UnsupportedImageError
from ..space import Affine, lps_to_ras
from .base import VolumeInfo, torch_dtype, widest_unsigned

__all__ = ["ItkFile", "open_series"]

# Slices may lie this part of their distance away from where even spacing would put them: positions are stored rounded.
SLICE_TOLERANCE = 0.05
# A slice may be shifted sideways by this many degrees against the one below before the series counts as tilted.
TILT_TOLERANCE_DEGREES = 0.1

POSITION, ORIENTATION, DESCRIPTION = "0020|0032", "0020|0037", "0008|103e"


class ItkFile:
    """A volume that SimpleITK reads, whole: from one file, or from the files of a series in the order of their slices.

    Args:
        files: one path, or those of a series.
        name: what to call it in a message.
        affine: RAS+ affine, where the headers of single files do not tell it.
    """

    sliceable = False

    def __init__(self, files: Sequence[Path], name: str, affine: Affine | None = None) -> None:
        self.files = list(files)
        self.name = name
        header = read_header(self.files[0])
        size, components = header.GetSize(), header.GetNumberOfComponents()
        # The last axis of four is time; of a series every file adds a slice.
        spatial = [*size[:3], 1][:3] if len(self.files) == 1 else [*size[:2], len(self.files)]
        volumes = size[3] if len(size) == 4 else 1
        if len(size) > 4 or (volumes > 1 and components > 1):
            raise UnsupportedImageError(
                f"{name} has size {size} with {components} components: it must be 2-D, 3D or 4D, and 4-D only with one component"
            )
        i, j, k = map(int, spatial)
        if affine is None:
            affine = lps_to_ras(header.GetDirection(), header.GetSpacing(), header.GetOrigin())
        self.info = VolumeInfo((int(volumes * components), i, j, k), _dtype_of(header, name), affine)

    def read(self, box: Box) -> Tensor:
        """Read a box `(C, I, J, K)` into a new tensor; see `VolumeReader`."""
        names = [str(file) for file in self.files]
        try:
            image = SimpleITK.ReadImage(names[0] if len(names) == 1 else names)
        except RuntimeError as error:
            raise CorruptImageError(f"{self.name} cannot be read: {_reason(error)}. Copy or download it again") from error
        array = SimpleITK.GetArrayViewFromImage(image)
        widest_unsigned(array, self.name)
        shape = self.info.shape
        if image.GetNumberOfComponentsPerPixel() > 1:
            array = np.moveaxis(array, -1, 0)
        channels = array.reshape(shape[0], shape[3], shape[2], shape[1]).transpose(0, 3, 2, 1)
        # Copied one plane of channels at a time: the copy is contiguous, and ITK's own memory is freed with `image`.
        out = torch.empty(box.shape, dtype=self.info.dtype)
        np.copyto(out.numpy(), channels[box.slices], casting="unsafe")
        return out


def read_header(path: Path) -> Any:
    """Read what a file says of its image, without its voxels."""
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise CorruptImageError(f"{path} is not an image that can be read: {_reason(error)}") from error
    return reader


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
    if len(paths) == 1:
        return ItkFile(paths, str(folder))
    return _checked_series(paths, folder)


def _checked_series(paths: list[Path], folder: Path) -> ItkFile:
    headers = [read_header(path) for path in paths]
    for path, header in zip(paths, headers, strict=True):
        missing = [tag for tag in (POSITION, ORIENTATION) if not header.HasMetaDataKey(tag)]
        if missing:
            raise SeriesError(f"{path} has no DICOM tag {missing[0]}, so that the place of its slice is unknown")
        if header.GetSize()[:2] != headers[0].GetSize()[:2] or header.GetPixelID() != headers[0].GetPixelID():
            raise SeriesError(
                f"{path} has {header.GetSize()[:2]} pixels of type {header.GetPixelID()}, but {paths[0].name} has"
                f" {headers[0].GetSize()[:2]} of {headers[0].GetPixelID()}: a series must be of one kind"
            )
    positions = np.array([_numbers(header, POSITION) for header in headers])
    orientations = np.array([_numbers(header, ORIENTATION) for header in headers])
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
    return ItkFile(paths, str(folder), lps_to_ras(columns, (1.0, 1.0, 1.0), positions[0]))


def _numbers(header: Any, tag: str) -> list[float]:
    return [float(number) for number in header.GetMetaData(tag).split("\\")]


def _described(path: Path) -> str:
    header = read_header(path)
    return f" ({header.GetMetaData(DESCRIPTION).strip()})" if header.HasMetaDataKey(DESCRIPTION) else ""


def _dtype_of(header: Any, name: str) -> torch.dtype:
    pixel = SimpleITK.GetPixelIDValueAsString(header.GetPixelID())
    kind = pixel.removeprefix("vector of ").removeprefix("label of ")
    names = {"32-bit float": "float32", "64-bit float": "float64"}
    for bits in (8, 16, 32, 64):
        names[f"{bits}-bit unsigned integer"] = f"uint{bits}"
        names[f"{bits}-bit signed integer"] = f"int{bits}"
    if kind not in names:
        raise UnsupportedImageError(f"{name} stores pixels of type {pixel}: real numbers can be read")
    return torch_dtype(np.dtype(names[kind]), name)


def _reason(error: RuntimeError) -> str:
    """The part of ITK's message that says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].split("): ", 1)[-1] if lines else "no reason is given"
