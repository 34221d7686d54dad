"""Arrays of Blosc2 (`.b2nd`), as nnU-Net keeps preprocessed cases: read block by block, and nothing else of the file."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.boxes import Box
from ..errors import CorruptImageError, MissingDependencyError, UnsupportedImageError, VoxloomError
from .arrays import as_tensor, torch_dtype
from .files import FileSource, explained
from .protocols import SpaceCodes, VolumeSpec

__all__ = ["BloscFile"]


class BloscFile(FileSource):
    """An array `(C, I, J, K)` or `(I, J, K)` in a file of Blosc2. It has no affine of its own: voxels of 1 mm.

    Args:
        path: the file.
    """

    is_sliceable = True

    def __init__(self, path: Path) -> None:
        self.name, self.paths, self._path = str(path), (path,), path
        with self._opened("is no array of Blosc2") as array:
            shape = tuple(map(int, array.shape))
            if len(shape) not in (3, 4) or 0 in shape:
                raise UnsupportedImageError(f"{path} holds an array of shape {shape}: it must be (C, I, J, K), or (I, J, K)")
            self._has_channels = len(shape) == 4
            c, i, j, k = shape if self._has_channels else (1, *shape)
            dtype = torch_dtype(np.dtype(array.dtype), self.name)
            self.spec = VolumeSpec((c, i, j, k), dtype, np.eye(4), SpaceCodes(qform=0, sform=0))
            self._chunks = tuple(map(int, array.chunks[-3:]))

    @property
    def chunks(self) -> tuple[int, int, int]:
        """See `VolumeSource`."""
        i, j, k = self._chunks
        return i, j, k

    def read(self, box: Box) -> Tensor:
        """See `VolumeSource`."""
        slices = (slice(None), *box.slices) if self._has_channels else box.slices
        with self._opened("cannot be read") as array:
            if tuple(array.shape)[-3:] != self.shape[1:]:
                raise CorruptImageError(f"{self.name} has been changed since its header was read: make the image anew")
            values = as_tensor(np.asarray(array[slices]))
        values = values if self._has_channels else values[None]
        return values.to(self.dtype) if values.dtype != self.dtype else values.contiguous()

    @contextmanager
    def _opened(self, what: str) -> Iterator[Any]:
        try:
            import blosc2
        except ImportError as error:
            raise MissingDependencyError(f"{self.name} needs blosc2: pip install 'voxloom[nnunet]'") from error
        try:
            # One thread: several readers work side by side, and more would wait for one another.
            yield blosc2.open(urlpath=str(self._path), mode="r", dparams={"nthreads": 1})
        except (VoxloomError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a damaged file makes Blosc2 stumble over
            raise explained(error, self.name, what) from error
