"""NRRD, MetaImage, TIFF stacks and DICOM, with SimpleITK: read whole."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK
import torch
from torch import Tensor

from ...core.boxes import Box
from ...core.copying import copy_voxels
from ...core.geometry.affines import Affine, lps_to_ras
from ...errors import CorruptImageError, UnsupportedImageError, VoxloomError
from ..arrays.memory import torch_dtype, widest_unsigned
from ..files import FileSource
from ..protocols import VolumeSpec
from .integrity import Integrity

__all__ = ["ItkFile", "ItkHeader", "check_name", "dtype_of", "read_header"]


@dataclass(frozen=True)
class ItkHeader:
    """What ITK says of an image, in its own order and its LPS+ world."""

    size: Sequence[int]
    components: int
    pixel: str
    direction: Sequence[float]
    spacing: Sequence[float]
    origin: Sequence[float]


class ItkFile(FileSource):
    """A volume that SimpleITK reads, whole: from one file, or from the files of a series in the order of their slices.

    Args:
        files: one path, or those of a series.
        name: what to call it in a message.
        affine: RAS+ affine, where the headers of single files do not tell it.
        dtype: type to read the voxels as, where the files of a series differ; by default that of the first file.
        integrity: compares a file with its header, where ITK does not.
    """

    is_sliceable = False

    def __init__(
        self,
        files: Sequence[Path],
        name: str,
        affine: Affine | None = None,
        dtype: torch.dtype | None = None,
        integrity: Integrity | None = None,
    ) -> None:
        for path in files:
            check_name(path)
        self.paths = tuple(files)
        self.name = name
        self._integrity = integrity
        if integrity is not None:
            integrity.check_header(self.paths[0])
        header = self.header(self.paths[0])
        size, components = header.size, header.components
        # The last axis of four is time; of a series every file adds a slice.
        spatial = [*size[:3], 1][:3] if len(self.paths) == 1 else [*size[:2], len(self.paths)]
        volumes = size[3] if len(size) == 4 else 1
        if len(size) > 4 or (volumes > 1 and components > 1):
            raise UnsupportedImageError(
                f"{name} has size {size} with {components} components: it must be 2-D, 3D or 4D, and 4-D only with one component"
            )
        i, j, k = map(int, spatial)
        self.is_vector = components > 1
        if affine is None:
            affine = lps_to_ras(header.direction, header.spacing, header.origin)
            if integrity is not None:
                units = integrity.units(self.paths[0])
                affine = affine @ np.diag([*units, 1.0])
                affine[:3, 3] *= units
        self.pixel_type = SimpleITK.sitkUnknown if dtype is None else SimpleITK.sitkFloat64
        self.stored_dtype = stored_dtype(header, name) if dtype is None else None
        self.spec = VolumeSpec((int(volumes * components), i, j, k), dtype or dtype_of(header, name), affine)
        self.remember()

    @classmethod
    def open(cls, path: Path, integrity: Integrity | None = None) -> "ItkFile":
        """Open a single file."""
        return cls([path], str(path), integrity=integrity)

    def read(self, box: Box) -> Tensor:
        """Read a box of voxels into a new tensor; see `VolumeSource`."""
        self.check_unchanged()
        array, _owner = self.voxels()
        widest_unsigned(array, self.name)
        shape = self.shape
        if array.size != math.prod(shape):
            raise CorruptImageError(f"{self.name} holds {array.size} values, and not {shape} as its header says: copy it again")
        if self.is_vector:
            array = np.moveaxis(array.reshape(*shape[:0:-1], shape[0]), -1, 0)
        channels = array.reshape(shape[0], shape[3], shape[2], shape[1]).transpose(0, 3, 2, 1)
        out = torch.empty((shape[0], *box.shape), dtype=self.dtype)
        copy_voxels(out.numpy(), channels[(slice(None), *box.slices)])
        return out

    def header(self, path: Path) -> ItkHeader:
        """Read what the file says of its image."""
        return read_header(path)

    def voxels(self) -> tuple[np.ndarray, Any]:
        """Read the voxels, as ITK orders them; with them comes what owns their memory, and must live as long."""
        names = [str(path) for path in self.paths]
        try:
            if len(names) > 1:
                image = SimpleITK.ReadImage(names, self.pixel_type)
            else:
                if self._integrity is not None:
                    self._integrity.check_data(self.paths[0])
                image = SimpleITK.ReadImage(names[0], imageIO=_reader_of(self.paths[0]))
        except RuntimeError as error:
            if isinstance(error, VoxloomError):
                raise
            raise CorruptImageError(f"{self.name} cannot be read: {_reason(str(error))}. Copy or download it again") from error
        return SimpleITK.GetArrayViewFromImage(image), image

    @staticmethod
    def explained(path: Path, message: str) -> CorruptImageError:
        """Make an error of a message of ITK's."""
        if "Unable to determine ImageIO reader" in message:
            return CorruptImageError(
                f"{path} is not an image that can be read: it is damaged, or of another format. Copy or download it again, or"
                f" give its values as an array; a data set in HDF5 is named {path.name}:/its/path"
            )
        return CorruptImageError(f"{path} is not an image that can be read: {_reason(message)}. Copy or download it again")


def check_name(path: Path) -> None:
    """Check that ITK can take the name of a file: with bytes that are no text it ends the process.

    Raises:
        UnsupportedImageError: if it cannot.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise UnsupportedImageError(f"{path} has a name that is not UTF-8, which ITK cannot take: rename it") from error


def read_header(path: Path) -> ItkHeader:
    """Read what a file says of its image, without its voxels."""
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO(_reader_of(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise ItkFile.explained(path, str(error)) from error
    pixel = SimpleITK.GetPixelIDValueAsString(reader.GetPixelID())
    components = reader.GetNumberOfComponents()
    return ItkHeader(reader.GetSize(), components, pixel, reader.GetDirection(), reader.GetSpacing(), reader.GetOrigin())


def _reader_of(path: Path) -> str:
    """Name the part of ITK that reads a file: it finds MetaImage by its ending alone, and that only in small letters."""
    return "MetaImageIO" if path.suffix.lower() in (".mha", ".mhd") else ""


def stored_dtype(header: ItkHeader, name: str) -> np.dtype:
    """Say which type the pixels of a file have."""
    kind = header.pixel.removeprefix("vector of ").removeprefix("label of ")
    names = {"32-bit float": "float32", "64-bit float": "float64"}
    for bits in (8, 16, 32, 64):
        names[f"{bits}-bit unsigned integer"] = f"uint{bits}"
        names[f"{bits}-bit signed integer"] = f"int{bits}"
    if kind not in names:
        raise UnsupportedImageError(f"{name} stores pixels of type {header.pixel}: real numbers can be read")
    return np.dtype(names[kind])


def dtype_of(header: ItkHeader, name: str) -> torch.dtype:
    """Say which type of tensor the pixels of a file become."""
    return torch_dtype(stored_dtype(header, name), name)


def _reason(message: str) -> str:
    """The part of ITK's message that says what happened."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    reason = lines[-1].split("): ", 1)[-1] if lines else ""
    return "its header is not what it should be" if not reason or reason.endswith("Success") else reason
