"""Arrays of Blosc2 (`.b2nd`), as nnU-Net keeps preprocessed cases: read block by block, and nothing else of the file."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core.boxes import Box
from ...core.geometry.affines import Affine
from ...errors import MissingDependencyError, UnsupportedImageError, VoxloomError
from ..files import FileSource, explained
from ..protocols import SpaceCodes, VolumeSpec
from .memory import as_tensor, torch_dtype

__all__ = ["BloscFile", "write_blosc"]


class BloscFile(FileSource):
    """An array `(C, I, J, K)` or `(I, J, K)` in a file of Blosc2. It has no affine of its own: voxels of 1 mm.

    Args:
        path: the file.
        affine: RAS+ matrix of 4 × 4 from voxels to millimetres, if it is known.
        codes: what NIfTI records beside it.
        dtype: type of what is read, where it is another one than that of the array.
        way_out: what to do where it is damaged.
    """

    is_sliceable = True

    def __init__(
        self,
        path: Path,
        affine: Affine | None = None,
        codes: SpaceCodes | None = None,
        dtype: torch.dtype | None = None,
        way_out: str = "copy or download it again",
    ) -> None:
        self.name, self.paths, self._path, self._way_out = str(path), (path,), path, way_out
        place = np.eye(4) if affine is None else affine
        with self._opened("is no array of Blosc2") as array:
            shape = tuple(map(int, array.shape))
            if len(shape) not in (3, 4) or 0 in shape:
                raise UnsupportedImageError(f"{path} holds an array of shape {shape}: it must be (C, I, J, K), or (I, J, K)")
            self._has_channels = len(shape) == 4
            c, i, j, k = shape if self._has_channels else (1, *shape)
            dtype = torch_dtype(np.dtype(array.dtype), self.name) if dtype is None else dtype
            self.spec = VolumeSpec((c, i, j, k), dtype, place, SpaceCodes(qform=0, sform=0) if codes is None else codes)
            self._chunks = tuple(map(int, array.chunks[-3:]))
        self.remember()

    @property
    def chunks(self) -> tuple[int, int, int]:
        """See `VolumeSource`."""
        i, j, k = self._chunks
        return i, j, k

    def read(self, box: Box) -> Tensor:
        """See `VolumeSource`."""
        slices = (slice(None), *box.slices) if self._has_channels else box.slices
        self.check_unchanged()
        with self._opened("cannot be read") as array:
            values = as_tensor(np.asarray(array[slices]))
        values = values if self._has_channels else values[None]
        return values.to(self.dtype) if values.dtype != self.dtype else values.contiguous()

    @contextmanager
    def _opened(self, what: str) -> Iterator[Any]:
        blosc2 = _blosc2(self.name)
        try:
            # One thread: several readers work side by side, and more would wait for one another.
            yield blosc2.open(urlpath=str(self._path), mode="r", dparams={"nthreads": 1})
        except (VoxloomError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a damaged file makes Blosc2 stumble over
            raise explained(error, self.name, what, self._way_out) from error


# Blocks of 16³ voxels in chunks of 128³, packed by LZ4: random patches of 64³ are read three times as fast as from blocks of 32³,
# and four times as fast as with Zstandard, which is an eighth smaller.
BLOCK, CHUNK = 16, 128


def write_blosc(path: Path, values: Tensor) -> None:
    """Write a volume `(C, I, J, K)` such that random patches are read quickly.

    Raises:
        MissingDependencyError: if Blosc2 is not installed.
        OSError: if it cannot be written.
    """
    blosc2 = _blosc2(str(path))
    array = np.ascontiguousarray(values.numpy())
    chunks = (1, *(min(CHUNK, size) for size in array.shape[1:]))
    blocks = (1, *(min(BLOCK, size) for size in array.shape[1:]))
    packing = {
        "codec": blosc2.Codec.LZ4,
        "clevel": 1,
        "filters": [blosc2.Filter.SHUFFLE],
        "typesize": array.dtype.itemsize,
        "nthreads": 1,
    }
    try:
        blosc2.asarray(array, urlpath=str(path), mode="w", chunks=chunks, blocks=blocks, cparams=packing)
    except RuntimeError as error:  # which does not say why
        free = shutil.disk_usage(path.parent).free
        raise OSError(f"Blosc2 cannot write it ({error}); {free} bytes are free there") from error


def _blosc2(name: str) -> Any:
    try:
        import blosc2
    except ImportError as error:
        raise MissingDependencyError(f"{name} needs blosc2: pip install 'voxloom[cache]'") from error
    return blosc2
