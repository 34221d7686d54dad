"""Arrays of NumPy (`.npy`), mapped into memory."""

from pathlib import Path

import numpy as np
from torch import Tensor

from ...core.boxes import Box
from ...errors import UnsupportedImageError, VoxloomError
from ..files import FileSource, explained
from ..protocols import SpaceCodes, VolumeSpec
from .memory import as_tensor, torch_dtype

__all__ = ["NpyFile"]


class NpyFile(FileSource):
    """An array `(C, I, J, K)` or `(I, J, K)` in a file of NumPy. It has no affine of its own: voxels of 1 mm.

    Args:
        path: the file.
    """

    is_sliceable = True

    def __init__(self, path: Path) -> None:
        self.name, self.paths, self._path = str(path), (path,), path
        array = self._mapped()
        if array.ndim not in (3, 4) or 0 in array.shape:
            raise UnsupportedImageError(f"{path} holds an array of shape {array.shape}: it must be (C, I, J, K), or (I, J, K)")
        self._has_channels, self._in_order = array.ndim == 4, array.flags.c_contiguous
        c, i, j, k = array.shape if self._has_channels else (1, *array.shape)
        self.spec = VolumeSpec((c, i, j, k), torch_dtype(array.dtype, self.name), np.eye(4), SpaceCodes(qform=0, sform=0))
        self.remember()

    @property
    def chunks(self) -> tuple[int, int, int]:
        """Planes of the axis that is slowest in the file."""
        _, i, j, k = self.shape
        return (1, j, k) if self._in_order else (i, j, 1)

    def read(self, box: Box) -> Tensor:
        """See `VolumeSource`."""
        self.check_unchanged()
        array = self._mapped()
        try:
            values = as_tensor(np.array(array[(slice(None), *box.slices) if self._has_channels else box.slices]))
        except (VoxloomError, MemoryError):
            raise
        except (OSError, ValueError) as error:
            raise explained(error, self.name, "cannot be read") from error
        return values if self._has_channels else values[None]

    def _mapped(self) -> np.ndarray:
        """Map the file, for each box anew, because a mapping keeps it open."""
        try:
            found: np.ndarray = np.load(self._path, mmap_mode="r", allow_pickle=False)
            return found
        except (OSError, ValueError, EOFError) as error:
            if "Python object" in str(error) or "allow_pickle" in str(error):
                raise UnsupportedImageError(f"{self.name} holds objects of Python, and no array of numbers") from error
            raise explained(error, self.name, "is no array of NumPy that can be read") from error
