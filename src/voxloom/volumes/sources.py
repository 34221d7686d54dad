"""Readers that are put together from others, or made of a user's function."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.boxes import Box
from ..errors import ImageFileError, SpaceError
from .formats import VolumeInfo, VolumeReader
from .formats.base import torch_dtype
from .space import SPACE_TOLERANCE, corner_displacement, spacing_of

__all__ = ["CustomFile", "StackedFiles"]


class StackedFiles:
    """Several files of one shape and place, whose channels are put one behind the other."""

    def __init__(self, readers: Sequence[VolumeReader], names: Sequence[str]) -> None:
        self.readers = list(readers)
        first = self.readers[0].info
        for reader, name in zip(self.readers, names, strict=True):
            info = reader.info
            if info.shape[1:] != first.shape[1:]:
                raise SpaceError(
                    f"{name} has {info.shape[1:]} voxels, but {names[0]} has {first.shape[1:]}: files of one image must agree"
                )
            distance = corner_displacement(info.affine, first.affine, info.shape[1:])
            if not distance <= SPACE_TOLERANCE * min(spacing_of(first.affine)):
                raise SpaceError(f"{name} lies up to {distance:.3g} mm away from {names[0]}: files of one image must agree")
        self.sliceable = all(reader.sliceable for reader in self.readers)
        dtype = first.dtype
        for reader in self.readers[1:]:
            dtype = torch.promote_types(dtype, reader.info.dtype)
        channels = sum(reader.info.shape[0] for reader in self.readers)
        self.info = VolumeInfo((channels, *first.shape[1:]), dtype, first.affine, first.codes)

    def read(self, box: Box) -> Tensor:
        """Read a box `(C, I, J, K)` into a new tensor; see `VolumeReader`."""
        parts, offset = [], 0
        for reader in self.readers:
            count = reader.info.shape[0]
            wanted = box.relative_to((offset, 0, 0, 0)) & Box((0, *box.start[1:]), (count, *box.stop[1:]))
            if wanted.numel:
                parts.append(reader.read(wanted).to(self.info.dtype))
            offset += count
        return torch.cat(parts)


class CustomFile:
    """A file of a format that a user's function reads."""

    sliceable = False

    def __init__(self, path: Path, function: Callable[[Path], tuple[Any, Any]]) -> None:
        self.path, self.function = path, function
        array, affine = self._call()
        i, j, k = array.shape[1:]
        self.info = VolumeInfo((array.shape[0], i, j, k), torch_dtype(array.dtype, str(path)), affine)

    def read(self, box: Box) -> Tensor:
        """Read a box `(C, I, J, K)` into a new tensor; see `VolumeReader`."""
        array = self._call()[0][box.slices]
        return torch.from_numpy(np.array(array, dtype=torch.empty(0, dtype=self.info.dtype).numpy().dtype))

    def _call(self) -> tuple[np.ndarray, np.ndarray]:
        data, affine = self.function(self.path)
        array = np.asarray(data)
        if not 2 <= array.ndim <= 4:
            raise ImageFileError(
                f"{self.path}: the reader returned data of shape {array.shape}: it must be 2-D, 3-D or (C, I, J, K)"
            )
        if array.ndim == 2:
            array = array[None, ..., None]
        elif array.ndim == 3:
            array = array[None]
        return array, np.eye(4) if affine is None else np.asarray(affine, dtype=np.float64)
