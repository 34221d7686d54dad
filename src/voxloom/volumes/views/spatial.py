"""Images in another space: turned, or resampled, when they are read."""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core.boxes import Box
from ...core.geometry.affines import Affine, shifted
from ...core.geometry.aligned import AlignedMap
from ...core.geometry.interpolation import Interpolation, SpaceMap, interpolated_dtype
from ...core.geometry.oblique import ObliqueMap
from ...core.geometry.resampling import space_map
from ...core.values import as_number, can_hold
from ...errors import ImageError, ModeError
from ...io.protocols import Extent, Json, Space, SpaceCodes, VolumeSource, chunk_bytes, keeps_whole, loading_bytes, read_checked
from ...io.spooling import Packed
from .cubic import bytes_along_axes, bytes_at_angle, cubic_along_axes, cubic_at_angle

__all__ = ["CroppedSource", "ResampledSource", "TurnedSource", "View", "as_orientation"]


def as_orientation(given: Any) -> str:
    """Check an orientation: where each axis points to.

    Raises:
        ModeError: if it does not name each pair of directions once.
    """
    is_text = isinstance(given, str) or (isinstance(given, tuple | list) and all(isinstance(each, str) for each in given))
    text = "".join(given).upper() if is_text else ""
    pairs = [next((pair for pair in ("LR", "AP", "IS") if letter in pair), "") for letter in text]
    if len(text) != 3 or len({*pairs, ""}) != 4:
        raise ModeError(f"the orientation is {given!r}: give where the axes point to, such as 'RAS' or 'LPS'")
    return text


class View(ABC):
    """What a view has in common with the source that it is of.

    Args:
        of: the source.
    """

    def __init__(self, of: VolumeSource) -> None:
        self.of = of

    @property
    def codes(self) -> SpaceCodes:
        """See `VolumeSource`."""
        return self.of.codes

    @property
    def paths(self) -> tuple[Path, ...]:
        """See `VolumeSource`."""
        return self.of.paths

    @property
    def resident_bytes(self) -> int:
        """See `VolumeSource`: what it is of is kept in memory where it can only be read whole."""
        return self.of.resident_bytes

    @property
    def loading_bytes(self) -> int:
        """See the function `loading_bytes`."""
        return loading_bytes(self.of)

    @property
    def packed_loading_bytes(self) -> int:
        """See the function `loading_bytes`."""
        return loading_bytes(self.of) - loading_bytes(self.of, is_unpacked=True)

    @property
    def keeps_whole(self) -> bool:
        """See the function `keeps_whole`."""
        return keeps_whole(self.of)

    @property
    def chunk_bytes(self) -> int:
        """See the function `chunk_bytes`."""
        return chunk_bytes(self.of)

    @property
    def extent(self) -> Extent | None:
        """Where the volume begins and ends; see `extent_of`."""
        return None

    def prepare(self) -> None:
        """Load what can only be read whole."""
        prepare = getattr(self.of, "prepare", None)
        if prepare is not None:
            prepare()

    @property
    def packed_bytes(self) -> int:
        """See `Packed`."""
        return self.of.packed_bytes if isinstance(self.of, Packed) else 0

    def unpacked(self, folder: Path) -> VolumeSource:
        """See `Packed`."""
        assert isinstance(self.of, Packed)
        return self.over(self.of.unpacked(folder))

    @abstractmethod
    def over(self, source: VolumeSource) -> VolumeSource:
        """Give the same view of another source."""


class TurnedSource(View):
    """A source whose axes are permuted and flipped: no value and no place changes.

    Args:
        of: the source.
        order: number of the source's axis for each axis.
        flipped: whether each is flipped.
    """

    def __init__(self, of: VolumeSource, order: Sequence[int], flipped: Sequence[bool] = (False, False, False)) -> None:
        super().__init__(of)
        self._order, self._flipped = list(order), list(flipped)
        i, j, k = (of.shape[1 + source] for source in self._order)
        self.shape = (of.shape[0], i, j, k)
        self.dtype = of.dtype
        turn = np.eye(4)
        turn[:3, :3] = 0
        for axis, (source, is_flipped) in enumerate(zip(self._order, self._flipped, strict=True)):
            turn[source, axis] = -1 if is_flipped else 1
            turn[source, 3] = of.shape[1 + source] - 1 if is_flipped else 0
        self.affine: Affine = of.affine @ turn

    @classmethod
    def to(cls, of: VolumeSource, orientation: Any) -> "TurnedSource":
        """Let the axes point to other directions, such as `"RAS"`; of axes that are oblique, the nearest."""
        import nibabel as nib

        wanted = nib.orientations.axcodes2ornt(as_orientation(orientation))
        turn = nib.orientations.ornt_transform(nib.io_orientation(of.affine), wanted)
        # For each axis of the source where it goes to, and whether it is flipped.
        order = [int(np.flatnonzero(turn[:, 0] == axis)[0]) for axis in range(3)]
        return cls(of, order, [bool(turn[source, 1] < 0) for source in order])

    @property
    def chunks(self) -> tuple[int, int, int]:
        """See `VolumeSource`."""
        i, j, k = (self.of.chunks[source] for source in self._order)
        return i, j, k

    def read(self, box: Box) -> Tensor:
        """See `VolumeSource`."""
        starts, stops = [0] * 3, [0] * 3
        for axis, (source, is_flipped) in enumerate(zip(self._order, self._flipped, strict=True)):
            start, stop, length = box.start[axis], box.stop[axis], self.shape[1 + axis]
            starts[source], stops[source] = (length - stop, length - start) if is_flipped else (start, stop)
        values = read_checked(self.of, Box(tuple(starts), tuple(stops))).permute(0, *(1 + source for source in self._order))
        flips = [1 + axis for axis, is_flipped in enumerate(self._flipped) if is_flipped]
        return values.flip(flips) if flips else values

    def fingerprint(self) -> Json:
        """See `VolumeSource`."""
        return {"axes": self._order, "flipped": self._flipped, "of": self.of.fingerprint()}

    def over(self, source: VolumeSource) -> "TurnedSource":
        """See `View`."""
        return TurnedSource(source, self._order, self._flipped)


class CroppedSource(View):
    """A box of a source.

    Args:
        of: the source.
        box: voxels `(I, J, K)` of it.
    """

    def __init__(self, of: VolumeSource, box: Box) -> None:
        super().__init__(of)
        self.box = box
        i, j, k = box.shape
        self.shape = (of.shape[0], i, j, k)
        self.dtype, self.chunks = of.dtype, of.chunks
        self.affine: Affine = shifted(of.affine, box.start)

    def read(self, box: Box) -> Tensor:
        """See `VolumeSource`."""
        return read_checked(self.of, box.shift(self.box.start))

    def fingerprint(self) -> Json:
        """See `VolumeSource`."""
        return {"cropped": [*self.box.start, *self.box.stop], "of": self.of.fingerprint()}

    def over(self, source: VolumeSource) -> "CroppedSource":
        """See `View`."""
        return CroppedSource(source, self.box)


KINDS: dict[int, Interpolation] = {0: "nearest", 1: "linear", 3: "linear"}
# Voxels by which axes that count as parallel may stray along the whole of a volume.
PARALLEL = 0.01


class ResampledSource(View):
    """A source on another grid of voxels.

    Args:
        of: the source.
        space: the grid.
        order: 0 takes the nearest voxel, 1 interpolates linearly, and both do so when a box is read; 3 fits cubic splines to the
            whole volume, and keeps the result. One number, or one for each axis of the source.
        fill: value of voxels whose centres lie outside of the source, more than half a voxel beyond its outermost centres; None
            for what is at its border.
        is_clipped: keep what cubic splines overshoot within the range of the values; where an axis has order 0, of each of its
            planes.

    Raises:
        ModeError: if there is no such order, or it is 3 along some axes alone and those of the grid lie at an angle to them.
        ImageError: if the result cannot hold the value.
    """

    def __init__(
        self, of: VolumeSource, space: Space, order: int | Sequence[int], fill: float | None = 0, is_clipped: bool = False
    ) -> None:
        super().__init__(of)
        if fill is not None:
            as_number(fill, "fill")
        orders = tuple(order) if isinstance(order, Sequence) and not isinstance(order, str) else (order,) * 3
        if len(orders) != 3 or any(each not in KINDS or isinstance(each, bool) for each in orders):
            raise ModeError(f"order is {order!r}: it must be 0 for the nearest voxel, 1 for linear or 3 for cubic interpolation")
        self.space, self.orders, self.fill, self.is_clipped = space, orders, fill, is_clipped
        self.shape = (of.shape[0], *space.shape)
        self.affine: Affine = space.affine
        self.dtype = interpolated_dtype(of.dtype, [KINDS[each] for each in orders])
        if fill is not None and not can_hold(self.dtype, fill):
            raise ImageError(f"fill is {fill}, which a volume of {self.dtype} cannot hold: choose another one")
        if self._is_cubic and set(orders) != {3} and not isinstance(self._map, AlignedMap):
            raise ModeError(
                f"order is {order!r}, but the axes of the grid lie at an angle to those of the image: give one order for all"
            )
        self._whole: Tensor | None = None

    @property
    def _is_cubic(self) -> bool:
        return 3 in self.orders

    @cached_property
    def extent(self) -> Extent | None:
        """Where the volume begins and ends: as what it is of, where that goes on for a part of a voxel; see `extent_of`."""
        matrix, sizes = np.linalg.inv(self.affine) @ self.of.affine, np.array(self.of.shape[1:])
        # Single precision turns what is parallel by a little.
        is_parallel = (np.abs(matrix[:3, :3] - np.diag(np.diag(matrix)[:3])) @ sizes < PARALLEL).all()
        if not isinstance(self._map, AlignedMap) and not is_parallel:
            return None
        corners = np.array([(*corner, 1) for corner in itertools.product(*((-0.5, size - 0.5) for size in sizes))])
        ends = corners @ matrix[:3].T
        lows, highs = ends.min(0).tolist(), ends.max(0).tolist()
        if self.fill is None:  # its own grid goes on without end, or beyond the volume
            return tuple(zip(lows, highs, strict=True))
        own = [(-0.5, size - 0.5) for size in self.shape[1:]]
        return tuple(
            (low if -1 < low - first < 0 else first, high if 0 < high - last < 1 else last)
            for low, high, (first, last) in zip(lows, highs, own, strict=True)
        )

    @cached_property
    def _map(self) -> SpaceMap:
        kinds = [KINDS[each] for each in self.orders]
        everywhere = [(-math.inf, math.inf)] * 3 if self.fill is None else None
        return space_map(self.of.shape[1:], self.of.affine, self.space.shape, self.affine, kinds, everywhere)

    @property
    def codes(self) -> SpaceCodes:
        """See `VolumeSource`."""
        return self.space.codes

    @property
    def chunks(self) -> tuple[int, int, int]:
        """See `VolumeSource`: patches of any shape are as quick."""
        return (1, *self.shape[2:]) if self._is_cubic else (1, 1, 1)

    @property
    def resident_bytes(self) -> int:
        """See `VolumeSource`."""
        whole = math.prod(self.shape) * self.dtype.itemsize if self._is_cubic and self._whole is None else 0
        return super().resident_bytes + whole

    @property
    def loading_bytes(self) -> int:
        """See the function `loading_bytes`."""
        if not self._is_cubic:
            return super().loading_bytes
        source, size = self.of.shape[1:], self.dtype.itemsize
        if isinstance(self._map, AlignedMap):
            return super().loading_bytes + bytes_along_axes(self.of, self._map, self.orders, size)
        return super().loading_bytes + math.prod(self.of.shape) * size + bytes_at_angle(source, self.shape[1:], size)

    def read(self, box: Box) -> Tensor:
        """See `VolumeSource`."""
        if self._is_cubic:
            if self._whole is None:
                self._whole = self._cubic()
            return self._whole[(slice(None), *box.slices)]
        out = torch.full((self.shape[0], *box.shape), self.fill or 0, dtype=self.dtype)
        own = Box.of_shape(self.of.shape[1:])
        for part in self._map.parts(box, own):
            values = read_checked(self.of, part.support).to(self.dtype).contiguous()
            part.put(out, box.start, part.apply(values))
        return out

    def _cubic(self) -> Tensor:
        """Resample the whole volume."""
        space = self._map
        self.prepare()
        with torch.inference_mode(False), torch.no_grad():
            if isinstance(space, AlignedMap):
                return cubic_along_axes(self.of, space, self.orders, self.dtype, self.is_clipped, self.fill or 0)
            assert isinstance(space, ObliqueMap)
            values = read_checked(self.of, Box.of_shape(self.of.shape[1:])).to(self.dtype)
            return cubic_at_angle(values, space, self.is_clipped, self.fill or 0)

    def fingerprint(self) -> Json:
        """See `VolumeSource`."""
        how = {"order": list(self.orders), "fill": self.fill, "clipped": self.is_clipped}
        return {"resampled": self.space.fingerprint(), **how, "of": self.of.fingerprint()}

    def over(self, source: VolumeSource) -> "ResampledSource":
        """See `View`."""
        return ResampledSource(source, self.space, self.orders, self.fill, self.is_clipped)
