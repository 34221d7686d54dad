"""Sources that are put together from others, or made of a user's function."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core.boxes import Box
from ...core.geometry.affines import SPACE_TOLERANCE, Affine, as_affine, corner_displacement, spacing_of
from ...errors import ImageFileError, SpaceError
from ..files import FileSource
from ..fingerprints import fingerprint_of_option
from ..protocols import Json, SpaceCodes, VolumeSource, VolumeSpec, chunk_bytes, keeps_whole, loading_bytes, read_checked
from ..spooling import Packed
from .memory import as_tensor

__all__ = ["CustomFile", "StackedSource", "read_into"]


class StackedSource:
    """Several sources of one shape and place, whose channels are put one behind the other.

    Args:
        sources: the sources.
        names: what to call them in a message.
        check_place: check that their affines agree; not where another one takes their place.
        dtype: type of the values; by default one that all types become without being asked.

    Raises:
        SpaceError: if they do not agree.
    """

    def __init__(
        self, sources: Sequence[VolumeSource], names: Sequence[str], check_place: bool = True, dtype: torch.dtype | None = None
    ) -> None:
        self.parts, self.names = list(sources), list(names)
        first = self.parts[0]
        spatial = first.shape[1:]
        for part, name in zip(self.parts, names, strict=True):
            if part.shape[1:] != spatial:
                raise SpaceError(
                    f"{name} has {part.shape[1:]} voxels, but {names[0]} has {spatial}: files of one image must agree"
                )
            distance = corner_displacement(part.affine, first.affine, spatial)
            if check_place and not distance <= SPACE_TOLERANCE * min(spacing_of(first.affine)):
                raise SpaceError(f"{name} lies up to {distance:.3g} mm away from {names[0]}: files of one image must agree")
        self.dtype = first.dtype
        for part in self.parts[1:]:
            self.dtype = torch.promote_types(self.dtype, part.dtype)
        self.dtype = self.dtype if dtype is None else dtype
        self.shape = (sum(part.shape[0] for part in self.parts), *spatial)
        self.affine: Affine = first.affine
        self.codes: SpaceCodes = first.codes
        self.chunks = first.chunks

    @property
    def resident_bytes(self) -> int:
        """See `VolumeSource`."""
        return sum(part.resident_bytes for part in self.parts)

    @property
    def loading_bytes(self) -> int:
        """See the function `loading_bytes`: one is read after the other."""
        return max(map(loading_bytes, self.parts))

    @property
    def packed_loading_bytes(self) -> int:
        """See the function `loading_bytes`."""
        return self.loading_bytes - max(loading_bytes(part, is_unpacked=True) for part in self.parts)

    @property
    def keeps_whole(self) -> bool:
        """See the function `keeps_whole`."""
        return all(keeps_whole(part) for part in self.parts if part.resident_bytes)

    @property
    def chunk_bytes(self) -> int:
        """See the function `chunk_bytes`."""
        return sum(map(chunk_bytes, self.parts))

    @property
    def paths(self) -> tuple[Path, ...]:
        """See `VolumeSource`."""
        return tuple(path for part in self.parts for path in part.paths)

    def read(self, box: Box) -> Tensor:
        """See `VolumeSource`."""
        out = torch.empty((self.shape[0], *box.shape), dtype=self.dtype)
        self.read_into(out, box)
        return out

    def read_into(self, out: Tensor, box: Box) -> None:
        """Read a box into a tensor `(C, *box.shape)` of any type."""
        channels = [part.shape[0] for part in self.parts]
        for part, target in zip(self.parts, out.split_with_sizes(channels), strict=True):
            read_into(part, target, box)

    def fingerprint(self) -> Json:
        """See `VolumeSource`."""
        return {"channels": [part.fingerprint() for part in self.parts]}

    @property
    def packed_bytes(self) -> int:
        """See `Packed`."""
        return sum(part.packed_bytes for part in self.parts if isinstance(part, Packed))

    def unpacked(self, folder: Path) -> "StackedSource":
        """See `Packed`."""
        parts = [part.unpacked(folder) if isinstance(part, Packed) and part.packed_bytes else part for part in self.parts]
        return StackedSource(parts, self.names, check_place=False, dtype=self.dtype)


def read_into(source: VolumeSource, out: Tensor, box: Box) -> None:
    """Read a box into a tensor `(C, *box.shape)`, straight into it where the source has a way to do that."""
    straight = getattr(source, "read_into", None)
    if straight is None:
        out.copy_(read_checked(source, box))
    else:
        straight(out, box)


class CustomFile(FileSource):
    """A file of a format that a user's function reads: it is called once for the header and the first look at the data."""

    is_sliceable = False

    def __init__(self, path: Path, function: Callable[[Path], tuple[Any, Any]]) -> None:
        self.paths, self.function = (path,), function
        data, affine = self._call()
        self._first: Tensor | None = data
        c, i, j, k = data.shape
        self.spec = VolumeSpec((c, i, j, k), data.dtype, affine)
        self.name = str(path)
        self.remember()

    def read(self, box: Box) -> Tensor:
        """See `VolumeSource`."""
        self.check_unchanged()
        data, self._first = self._first, None
        if data is None:
            data, _ = self._call()
        return data[(slice(None), *box.slices)].clone(memory_format=torch.contiguous_format)

    def fingerprint(self) -> Json:
        """See `VolumeSource`."""
        # What an object has in it may change with each call.
        is_plain = isinstance(self.function, FunctionType | MethodType | BuiltinFunctionType | partial)
        return {**super().fingerprint(), "reader": fingerprint_of_option(self.function if is_plain else type(self.function))}

    def _call(self) -> tuple[Tensor, Affine]:
        (path,) = self.paths
        result = self.function(path)
        if not isinstance(result, tuple | list) or len(result) != 2:
            raise ImageFileError(f"{path}: the reader must return data and affine, but it returned {type(result).__name__}")
        data = as_tensor(result[0])
        affine = np.eye(4) if result[1] is None else as_affine(result[1], f"the affine of {path}")
        if not 2 <= data.ndim <= 4 or not math.prod(data.shape):
            raise ImageFileError(
                f"{path}: the reader returned data of shape {tuple(data.shape)}: it must be 2-D, 3-D or (C, I, J, K)"
            )
        if data.ndim == 2:
            data = data[None, ..., None]
        return data[None] if data.ndim == 3 else data, affine
