"""Arrays and tensors: which types become which, and anything that can be sliced as a source of voxels."""

import hashlib
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core.boxes import Box
from ...core.geometry.affines import Affine, as_affine
from ...core.walking import walk
from ...errors import ImageError, UnsupportedImageError
from ..protocols import Json, SpaceCodes, VolumeSource, read_checked

__all__ = [
    "ArraySource",
    "affine_of",
    "as_tensor",
    "as_volume",
    "hash_of",
    "raw_bytes",
    "torch_dtype",
    "values_hash",
    "widest_unsigned",
]

# What the channels of an array look like where they come last: few of them, behind three long axes.
LAST_CHANNELS, FIRST_CHANNELS = 4, 32
# Values that are hashed at a time.
CHUNK_VALUES = 2**20

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
    _check_unmasked(data)
    if isinstance(data, np.ndarray):
        dtype = torch_dtype(data.dtype, "the array")
        widest_unsigned(data, "the array")
        data = np.asarray(data, dtype=torch.empty(0, dtype=dtype).numpy().dtype)
        if any(stride < 0 for stride in data.strides) or not data.flags.writeable:
            data = data.copy()
        return torch.from_numpy(data)
    if data.is_complex():
        raise ImageError(f"the data of an image are {data.dtype}: save real and imaginary parts as two channels")
    data = data.detach()
    # A subclass may do other things than tensors do, and costs time for each of them.
    return data if type(data) is Tensor else data.as_subclass(Tensor)


def _check_unmasked(data: Any) -> None:
    # Asking for `np.ma` imports it, which takes 10 ms: what is not masked for sure is not asked.
    is_plain = isinstance(data, Tensor) or type(data) is np.ndarray
    if not is_plain and isinstance(data, np.ma.MaskedArray) and np.ma.is_masked(data):
        raise ImageError("some values of the array are masked, which a tensor cannot say: give array.filled(VALUE)")


def affine_of(data: Any) -> Affine | None:
    """Give the affine that an array or a tensor brings along, as MONAI's `MetaTensor` does; None where there is none.

    Raises:
        ImageError: if it cannot be one.
    """
    found = getattr(data, "affine", None)
    if found is None or callable(found) or tuple(getattr(found, "shape", ())) != (4, 4):
        return None
    affine = as_affine(found, f"the affine of the {type(data).__name__}")
    meta = getattr(data, "meta", None)
    is_lps = isinstance(meta, Mapping) and str(meta.get("space", "")).upper() == "LPS"
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine if is_lps else affine


def as_volume(data: Any) -> Tensor:
    """Make a tensor of what must be a volume `(C, I, J, K)`, or `(I, J, K)`, which has one channel.

    Raises:
        ImageError: if it has another number of dimensions, no voxels, or is not of numbers.
    """
    tensor = as_tensor(data)
    shape = tuple(tensor.shape)
    if tensor.ndim == 5:
        raise ImageError(
            f"an image was given data of shape {shape}, which is a batch: it must be 4D, (C, I, J, K); take one of its"
            f" {shape[0]} volumes, batch[0]"
        )
    if tensor.ndim not in (3, 4):
        raise ImageError(
            f"an image was given data of shape {shape}: it must be 4D, (C, I, J, K), or 3D, (I, J, K); tensor[None, ..., None]"
            " makes that of a 2-D image"
        )
    if 0 in shape:
        raise ImageError(f"an image was given data of shape {shape}, which has no voxels")
    check_channels(shape)
    return tensor if tensor.ndim == 4 else tensor[None]


def check_channels(shape: tuple[int, ...]) -> None:
    """Warn of a shape that looks as if its channels came last."""
    if len(shape) == 4 and shape[3] <= LAST_CHANNELS and min(shape[:3]) >= FIRST_CHANNELS:
        warnings.warn(
            f"data of shape {shape} are {shape[0]} channels of {' × '.join(map(str, shape[1:]))} voxels, since channels come"
            " first. If they come last there, put them first: np.moveaxis(array, -1, 0)",
            RuntimeWarning,
            stacklevel=4,
        )


class ArraySource:
    """Anything that is read by slices, such as an array of Zarr, HDF5 or Dask, as a source of voxels.

    Args:
        array: `(C, I, J, K)` or `(I, J, K)`: a tensor, or what has a `shape`, a `dtype`, and slices that NumPy makes arrays of.
        affine: RAS+ matrix of 4 × 4 from voxels to millimetres; by default that of the array, if it has one, or else that of
            voxels of 1 mm that begin at the origin.

    Raises:
        ImageError: if the array has another number of axes, or no voxels, or the affine cannot be one.

    Example:
        >>> import numpy as np, voxloom as vx
        >>> source = vx.ArraySource(np.zeros((20, 30, 40), dtype=np.uint16), affine=np.diag([2, 2, 5, 1]))
        >>> vx.ScalarImage(source).spacing, source.dtype
        ((2.0, 2.0, 5.0), torch.int32)
    """

    resident_bytes = 0
    paths: tuple[Path, ...] = ()

    def __init__(self, array: Any, affine: Any = None) -> None:
        _check_unmasked(array)
        if any(size != size for size in array.shape):  # NaN, as Dask has it
            raise ImageError(f"the array has shape {tuple(array.shape)}: let Dask find its sizes first, by compute_chunk_sizes()")
        self._array = array
        self._has_channels = len(array.shape) == 4
        if not self._has_channels and len(array.shape) != 3:
            raise ImageError(f"the array has shape {tuple(array.shape)}: it must be (I, J, K), or (C, I, J, K)")
        is_tensor = isinstance(array, Tensor)
        # What nibabel has of a file may be scaled when it is read, whatever its type says.
        is_proxy = hasattr(array, "slope") and hasattr(array, "inter")
        stored = None if is_tensor else np.asarray(array[:1, :1, :1]).dtype if is_proxy else np.dtype(array.dtype)
        self.dtype = as_tensor(array[:0]).dtype if stored is None else torch_dtype(stored, "the array")
        self.stored_dtype = stored
        sizes = [int(size) for size in array.shape]
        if 0 in sizes:
            raise ImageError(f"the array has shape {tuple(sizes)}, which has no voxels")
        check_channels(tuple(sizes))
        c, i, j, k = sizes if self._has_channels else [1, *sizes]
        self.shape = (c, i, j, k)
        given = affine_of(array) if affine is None else as_affine(affine)
        self.affine: Affine = np.eye(4) if given is None else given
        self.codes = SpaceCodes()

    @property
    def chunks(self) -> tuple[int, int, int]:
        """Those that the array says, or planes of its first axis."""
        given = getattr(self._array, "chunks", None)
        if not isinstance(given, tuple) or len(given) < 3 or not all(isinstance(size, int) for size in given[-3:]):
            return (1, *self.shape[2:])
        i, j, k = given[-3:]
        return i, j, k

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self._array).__name__} of shape {self.shape}, {self.dtype})"

    def read(self, box: Box) -> Tensor:
        """See `VolumeSource`."""
        values = self._slice(box)
        values = as_tensor(values.cpu() if isinstance(values, Tensor) else np.asarray(values))
        return values if self._has_channels else values[None]

    def read_into(self, out: Tensor, box: Box) -> None:
        """Read a box into a tensor `(C, *box.shape)` of any type; of an array of that type each voxel is copied once."""
        is_plain = isinstance(self._array, np.ndarray) and type(self).read is ArraySource.read
        if is_plain and out.dtype == self.dtype and out.device.type == "cpu":
            values, target = self._slice(box), out.detach().numpy()
            if values.dtype == target.dtype:
                np.copyto(target, values if self._has_channels else values[None])
                return
        out.copy_(self.read(box))

    def _slice(self, box: Box) -> Any:
        return self._array[(slice(None), *box.slices) if self._has_channels else box.slices]

    def fingerprint(self) -> Json:
        """See `VolumeSource`."""
        return {"sha256": values_hash(self), "shape": list(self.shape), "dtype": str(self.dtype), "affine": self.affine.tolist()}


def values_hash(source: VolumeSource) -> str:
    """Hash all values of a source (SHA-256), box by box."""
    most = max(1, CHUNK_VALUES // source.shape[0])
    return hash_of(raw_bytes(read_checked(source, box)) for box in walk(Box.of_shape(source.shape[1:]), source.chunks, most))


def raw_bytes(values: Tensor) -> Any:
    """Give the values of a tensor as bytes, in order."""
    contiguous = values.detach().cpu().contiguous()
    return contiguous.view(-1).view(torch.uint8).numpy() if contiguous.numel() else b""


def hash_of(parts: Iterable[Any]) -> str:
    """Hash texts and bytes, one after the other (SHA-256)."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()
