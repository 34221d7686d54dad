"""What a format offers: what the header says, and the voxels of a box."""

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ...core.boxes import Box
from ...errors import ImageError, UnsupportedImageError
from ..space import Affine

__all__ = ["MILLIMETRES", "SpaceCodes", "VolumeInfo", "VolumeReader", "as_tensor", "torch_dtype", "widest_unsigned"]


# NIfTI's units of length other than the millimetre.
MILLIMETRES = {"meter": 1000.0, "micron": 0.001}


@dataclass(frozen=True, slots=True)
class SpaceCodes:
    """What NIfTI records of a space beside the affine; kept from reading to saving."""

    qform: int = 1
    """What the world of the quaternion is: 1 the scanner, 2 another image, 3 Talairach, 4 MNI."""
    sform: int = 1
    """The same of the matrix."""
    qform_world: tuple[tuple[float, ...], ...] = ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1))
    """Matrix from the world of the affine to that of the quaternion, in mm: not the identity where the two forms differ."""
    space_unit: str = "mm"
    time_unit: str = "unknown"
    time_step: float = 1.0
    """Distance between volumes of a 4-D image, in `time_unit`."""


@dataclass(frozen=True, slots=True)
class VolumeInfo:
    """What the header of a file says of its volume."""

    shape: tuple[int, int, int, int]
    """Channels and voxels `(C, I, J, K)`."""
    dtype: torch.dtype
    """Type that the voxels are read as."""
    affine: Affine
    """RAS+, in millimetres."""
    codes: SpaceCodes = field(default_factory=SpaceCodes)

    @property
    def box(self) -> Box:
        """All channels and voxels."""
        return Box.of_shape(self.shape)


class VolumeReader(Protocol):
    """An open file. Any thread may call it; in another process the file is opened anew."""

    info: VolumeInfo
    sliceable: bool
    """Whether a box can be read without reading the whole file."""

    def read(self, box: Box) -> Tensor:
        """Read the channels and voxels of a box `(C, I, J, K)` into a new, contiguous tensor, which the caller owns."""
        ...


# PyTorch stores uint16, uint32 and uint64, but can hardly calculate with them: they become the next wider signed type.
_BECOMES = {
    "bool": torch.bool,
    "uint8": torch.uint8,
    "int8": torch.int8,
    "uint16": torch.int32,
    "int16": torch.int16,
    "uint32": torch.int64,
    "int32": torch.int32,
    "uint64": torch.int64,
    "int64": torch.int64,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
    "longdouble": torch.float64,
    "float128": torch.float64,
}


def torch_dtype(dtype: np.dtype, what: str) -> torch.dtype:
    """Say which type of tensor the voxels of a stored type become.

    Raises:
        UnsupportedImageError: for complex numbers and everything else that is not a number.
    """
    try:
        return _BECOMES[dtype.newbyteorder("=").name]
    except KeyError:
        raise UnsupportedImageError(
            f"{what} stores voxels of type {dtype.name}, for which there is no type of tensor: real numbers can be read"
            + (", so save its magnitude and phase as two images" if dtype.kind == "c" else "")
        ) from None


def widest_unsigned(array: np.ndarray, what: str) -> None:
    """Refuse numbers of uint64 that int64 cannot hold."""
    if array.dtype.kind == "u" and array.dtype.itemsize == 8 and array.size and array.max() > np.iinfo(np.int64).max:
        raise UnsupportedImageError(f"{what} holds {array.max()}, which is more than int64 can hold: save it as float64")


def as_tensor(data: Any) -> Tensor:
    """Make a tensor of a type that PyTorch can calculate with; arrays of such a type are not copied."""
    if not isinstance(data, Tensor | np.ndarray):
        raise ImageError(f"the data of an image are of type {type(data).__name__}: give a tensor or a NumPy array")
    narrow = {"torch.uint16", "torch.uint32", "torch.uint64"}
    if isinstance(data, Tensor) and str(data.dtype) in narrow:
        data = data.numpy()
    if isinstance(data, np.ndarray):
        dtype = torch_dtype(data.dtype, "the array")
        widest_unsigned(data, "the array")
        data = np.asarray(data, dtype=torch.empty(0, dtype=dtype).numpy().dtype)
        if any(stride < 0 for stride in data.strides) or not data.flags.writeable:
            data = data.copy()
        return torch.from_numpy(data)
    if data.is_complex():
        raise ImageError(f"the data of an image are {data.dtype}: save real and imaginary parts as two channels")
    return data.detach()
