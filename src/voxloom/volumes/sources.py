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
from .formats.base import as_tensor
from .space import SPACE_TOLERANCE, Affine, as_affine, corner_displacement, spacing_of

__all__ = ["CustomFile", "StackedFiles"]


class StackedFiles:
    """Several files of one shape and place, whose channels are put one behind the other.

    Args:
        readers: the files.
        names: what to call them in a message.
        check_place: check that their affines agree; not where another one takes their place.
    """

    def __init__(self, readers: Sequence[VolumeReader], names: Sequence[str], check_place: bool) -> None:
        self.readers = list(readers)
        first = self.readers[0].info
        for reader, name in zip(self.readers, names, strict=True):
            info = reader.info
            if info.shape[1:] != first.shape[1:]:
                raise SpaceError(
                    f"{name} has {info.shape[1:]} voxels, but {names[0]} has {first.shape[1:]}: files of one image must agree"
                )
            distance = corner_displacement(info.affine, first.affine, info.shape[1:])
            if check_place and not distance <= SPACE_TOLERANCE * min(spacing_of(first.affine)):
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
    """A file of a format that a user's function reads: it is called once for the header and the first look at the data."""

    sliceable = False

    def __init__(self, path: Path, function: Callable[[Path], tuple[Any, Any]]) -> None:
        self.path, self.function = path, function
        data, affine = self._call()
        self._first: Tensor | None = data
        c, i, j, k = data.shape
        self.info = VolumeInfo((c, i, j, k), data.dtype, affine)

    def read(self, box: Box) -> Tensor:
        """Read a box `(C, I, J, K)` into a new tensor; see `VolumeReader`."""
        data, self._first = self._first, None
        if data is None:
            data, _ = self._call()
        return data[box.slices].clone(memory_format=torch.contiguous_format)

    def _call(self) -> tuple[Tensor, Affine]:
        result = self.function(self.path)
        if not isinstance(result, tuple | list) or len(result) != 2:
            raise ImageFileError(f"{self.path}: the reader must return data and affine, but it returned {type(result).__name__}")
        data, affine = (
            as_tensor(result[0]),
            np.eye(4) if result[1] is None else as_affine(result[1], f"the affine of {self.path}"),
        )
        if not 2 <= data.ndim <= 4 or 0 in data.shape:
            raise ImageFileError(
                f"{self.path}: the reader returned data of shape {tuple(data.shape)}: it must be 2-D, 3-D or (C, I, J, K)"
            )
        if data.ndim == 2:
            data = data[None, ..., None]
        return data[None] if data.ndim == 3 else data, affine
