"""Interpolation between grids whose axes permute, flip, scale and shift: one axis after the other."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..boxes import Box
from ..sizes import Ints
from ..walking import walk
from .interpolation import PART_VOXELS, ROUNDING, Interpolation, cut
from .splines import BEYOND

__all__ = ["AlignedMap", "AlignedPart", "AxisMap"]


@dataclass(frozen=True, eq=False)
class AxisMap:
    """What the voxels along an axis of the target are interpolated from, along one axis of the source.

    Example:
        >>> axis = AxisMap.of(length=4, scale=0.5, offset=-0.25, source_length=2, kind="linear")
        >>> axis.lower.tolist(), axis.upper.tolist(), axis.weight.tolist()
        ([0, 0, 0, 1], [0, 1, 1, 1], [0.0, 0.25, 0.75, 0.0])
        >>> axis.owned(1, 2)
        range(1, 4)
    """

    lower: np.ndarray
    """For each voxel of the target, the voxel before its centre."""
    upper: np.ndarray
    """The one behind it; the same where the centre lies on a voxel."""
    weight: np.ndarray
    """How much the one behind counts, from 0 to 1."""
    is_inside: np.ndarray
    """Whether the centre lies in the source."""
    places: np.ndarray
    """Where the centre lies, at most `BEYOND` voxels outside of the source."""

    @classmethod
    def of(
        cls,
        length: int,
        scale: float,
        offset: float,
        source_length: int,
        kind: Interpolation,
        extent: tuple[float, float] | None = None,
    ) -> "AxisMap":
        """Map the voxels of the target `0 ... length - 1` to `scale · index + offset` in the source.

        Args:
            length: see above.
            scale: see above.
            offset: see above.
            source_length: voxels of the source.
            kind: how to interpolate.
            extent: where the source begins and ends; None for the edges of its voxels.
        """
        first, last = (-0.5, source_length - 0.5) if extent is None else extent
        places = scale * np.arange(length) + offset
        is_inside = (places >= first - ROUNDING) & (places <= last + ROUNDING)
        near = places.clip(-BEYOND, source_length - 1 + BEYOND)
        places = places.clip(0, source_length - 1)
        if kind == "nearest":
            # Of two that are equally near, the one behind.
            exact = _places_in_one_volume(length, scale, offset, source_length)
            nearest = np.floor(places + 0.5 + ROUNDING) if exact is None else np.floor(exact + 0.5)
            nearest = nearest.astype(np.int64).clip(0, source_length - 1)
            return cls(nearest, nearest, np.zeros(length), is_inside, near)
        rounded = np.rint(places)
        places = np.where(abs(places - rounded) < ROUNDING, rounded, places)
        lower = np.floor(places).astype(np.int64)
        return cls(lower, np.ceil(places).astype(np.int64), places - lower, is_inside, near)

    def __len__(self) -> int:
        return len(self.lower)

    @cached_property
    def _is_reversed(self) -> bool:
        return bool(self.upper[0] > self.upper[-1])

    def owned(self, start: int, stop: int) -> range:
        """Voxels of the target that can be interpolated once those of the source before `stop` are there, not before `start`."""
        upper = self.upper[::-1] if self._is_reversed else self.upper
        first, end = np.searchsorted(upper, (start, stop)).tolist()
        return range(len(self) - end, len(self) - first) if self._is_reversed else range(first, end)

    def inside(self, start: int, stop: int) -> range:
        """Those voxels of the target from `start` to `stop` that lie in the source."""
        found = np.flatnonzero(self.is_inside[start:stop])
        return range(start + int(found[0]), start + int(found[-1]) + 1) if len(found) else range(start, start)

    def apply(self, values: Tensor, dim: int) -> Tensor:
        """Interpolate a whole source along one dimension."""
        whole = _Segment.of(self, 0, len(self))
        first, stop = whole.support
        return whole.apply(values.narrow(dim, first, stop - first), dim)


def _places_in_one_volume(length: int, scale: float, offset: float, source_length: int) -> np.ndarray | None:
    """Give where voxels lie in a source that fills a whole number of them, as SciPy and scikit-image compute it; else None.

    Slices that are as near as the next one are decided by the rounding of that, as in nnU-Net.
    """
    step = abs(scale)
    count = max(1, round(source_length / step))
    start = offset if scale > 0 else offset + scale * (length - 1)
    first = (0.5 * step - 0.5 - start) / step
    if abs(source_length / count - step) * length > ROUNDING or abs(first - round(first)) * step > ROUNDING:
        return None
    places = source_length / count * (np.arange(length) - round(first) + 0.5) - 0.5
    return places if scale > 0 else places[::-1]


@dataclass(frozen=True, eq=False)
class _Segment:
    """Voxels of the target along an axis, and where they lie among those of the source that they need."""

    support: tuple[int, int]
    """These, as the first and one past the last."""
    lower: "_Indices"
    upper: "_Indices"
    weight: Tensor
    is_on_voxels: bool

    @classmethod
    def of(cls, axis: AxisMap, start: int, stop: int) -> "_Segment":
        lower, upper, weight = axis.lower[start:stop], axis.upper[start:stop], axis.weight[start:stop]
        first, last = int(lower.min()), int(upper.max())
        indices = _Indices.of(lower - first), _Indices.of(upper - first)
        return cls((first, last + 1), *indices, torch.from_numpy(weight), not weight.any())

    def apply(self, values: Tensor, dim: int) -> Tensor:
        """Interpolate along one dimension, on which all that is needed lies, and nothing else."""
        if dim == values.ndim - 1 and not (self.lower.is_run and self.upper.is_run):
            # Taking single values from rows takes ten times as long as taking rows.
            turned = values.transpose(dim, dim - 1).contiguous()
            return self.apply(turned, dim - 1).transpose(dim, dim - 1).contiguous()
        before = self.lower.taken(values, dim)
        if self.is_on_voxels:
            return before
        behind = self.upper.taken(values, dim)
        shape = [1] * values.ndim
        shape[dim] = -1
        factors = self.weight.to(values.device, values.dtype).view(shape)
        # One rounding each, whatever the shape is, so that bits do not depend on it; and where both are equal, so is the result.
        difference = behind - before if self.upper.is_run else behind.sub_(before)
        return difference.mul_(factors).add_(before)


@dataclass(frozen=True, eq=False)
class _Indices:
    """Voxels along an axis: a run, or one after the other."""

    first: int
    numbers: Tensor
    is_run: bool

    @classmethod
    def of(cls, indices: np.ndarray) -> "_Indices":
        is_run = bool((np.diff(indices) == 1).all())
        return cls(int(indices[0]), torch.from_numpy(np.ascontiguousarray(indices)), is_run)

    def taken(self, values: Tensor, dim: int) -> Tensor:
        """Take them along a dimension: a view where they follow one another, or else a copy."""
        if self.is_run:
            return values.narrow(dim, self.first, len(self.numbers))
        return values.index_select(dim, self.numbers.to(values.device))


@dataclass(frozen=True, eq=False)
class AlignedMap:
    """A map between grids whose axes permute, flip, scale and shift: each axis is interpolated on its own; see `SpaceMap`.

    Args:
        axes: for each axis of the target, what it is interpolated from.
        order: number of the source's axis for each axis of the target.
        shape: voxels of the source.
    """

    axes: tuple[AxisMap, AxisMap, AxisMap]
    order: tuple[int, int, int]
    shape: Ints

    @cached_property
    def sequence(self) -> list[int]:
        """Axes of the target in the order in which they are interpolated: first those along which least is left."""
        ratios = [len(axis) / self.shape[of] for axis, of in zip(self.axes, self.order, strict=True)]
        return sorted(range(3), key=lambda axis: (ratios[axis], -self.order[axis]))

    @property
    def mixing_axes(self) -> Ints:
        """See `SpaceMap`."""
        return tuple(of for axis, of in zip(self.axes, self.order, strict=True) if axis.weight.any())

    @cached_property
    def _ratios(self) -> list[float]:
        return [self.shape[of] / len(axis) for axis, of in zip(self.axes, self.order, strict=True)]

    @cached_property
    def _steps(self) -> Ints:
        """Voxels of a part along each axis of the target."""
        return tuple(max(1, math.floor(PART_VOXELS / max(1.0, ratio))) for ratio in self._ratios)

    @property
    def part_voxels(self) -> int:
        """See `SpaceMap`."""
        steps = [min(step, len(axis)) for step, axis in zip(self._steps, self.axes, strict=True)]
        lengths = [self.shape[of] for of in self.order]
        sizes = zip(steps, self._ratios, lengths, strict=True)
        support = math.prod(min(math.ceil(step * ratio) + 2, length) for step, ratio, length in sizes)
        # Where there are fewer voxels than in the source, what is put together and turned is larger than what is made of it.
        copies = 3 if max(self._ratios) > 1 else 1
        return copies * support + 3 * math.prod(steps)

    def owned(self, own: Box) -> Box:
        """Voxels of the target whose last voxels of the source lie in a box."""
        ranges = [axis.owned(own.start[of], own.stop[of]) for axis, of in zip(self.axes, self.order, strict=True)]
        return Box(tuple(each.start for each in ranges), tuple(each.stop for each in ranges))

    def pieces(self, own: Box, most: int) -> Iterator[Box]:
        """See `SpaceMap`."""
        target = self.owned(own)
        return walk(target, (1, 1, 1), most) if target.numel else iter(())

    def boxes(self, piece: Box, own: Box) -> list[Box]:
        """See `SpaceMap`."""
        return [piece]

    def parts(self, piece: Box, own: Box) -> Iterator["AlignedPart"]:
        """See `SpaceMap`."""
        ranges = [axis.inside(*ends) for axis, *ends in zip(self.axes, piece.start, piece.stop, strict=True)]
        inside = Box(tuple(each.start for each in ranges), tuple(each.stop for each in ranges))
        return (AlignedPart(self, box) for box in cut(inside, self._steps))


@dataclass(frozen=True, eq=False)
class AlignedPart:
    """A box of the target; see `Part`."""

    space: AlignedMap
    box: Box

    @property
    def shape(self) -> Ints:
        """See `Part`."""
        return self.box.shape

    @cached_property
    def support(self) -> Box:
        """See `Part`."""
        ends = {number: each.support for number, each in zip(self.space.order, self._segments, strict=True)}
        return Box(tuple(ends[number][0] for number in range(3)), tuple(ends[number][1] for number in range(3)))

    @cached_property
    def _segments(self) -> list[_Segment]:
        return [_Segment.of(axis, *ends) for axis, *ends in zip(self.space.axes, self.box.start, self.box.stop, strict=True)]

    def apply(self, values: Tensor) -> Tensor:
        """See `Part`."""
        order = self.space.order
        for axis in self.space.sequence:
            values = self._segments[axis].apply(values, 1 + order[axis])
        return values.permute(0, *(1 + of for of in order))

    def put(self, piece: Tensor, origin: Ints, values: Tensor) -> None:
        """See `Part`."""
        piece[(slice(None), *self.box.relative_to(origin).slices)] = values
