"""Interpolation between grids whose axes lie at any angle: one voxel after the other."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..boxes import Box
from ..sizes import Ints
from .affines import Affine
from .interpolation import PART_VOXELS, ROUNDING, Interpolation, cut

__all__ = ["ObliqueMap", "ObliquePart", "boxes_of"]


@dataclass(frozen=True, eq=False)
class ObliqueMap:
    """A map between grids whose axes lie at any angle: each voxel is interpolated on its own; see `SpaceMap`.

    Args:
        shape: voxels of the source.
        target_shape: voxels of the target.
        matrix: from voxels of the target to those of the source, 4 × 4.
        kinds: how to interpolate along each axis of the source.
        extent: where the source begins and ends along each axis.
    """

    shape: Ints
    target_shape: Ints
    matrix: Affine
    kinds: tuple[Interpolation, ...]
    extent: tuple[tuple[float, float], ...]

    mixing_axes = (0, 1, 2)

    @property
    def part_voxels(self) -> int:
        """See `SpaceMap`."""
        lengths = np.minimum(PART_VOXELS, self.target_shape)
        support = np.minimum(np.ceil(abs(self.matrix[:3, :3]) @ lengths) + 2, self.shape)
        return int(support.prod()) + 8 * int(lengths.prod())

    def places(self, box: Box) -> tuple[list[np.ndarray], np.ndarray]:
        """Give the places of voxels in the source, those outside brought to its border, and whether they lie inside.

        Returns:
            An array of the box's shape for each axis of the source, and one of booleans.
        """
        i, j, k = np.ogrid[tuple(slice(start, stop) for start, stop in zip(box.start, box.stop, strict=True))]
        is_inside = np.ones(box.shape, dtype=bool)
        places = []
        for row, length, kind, (first, last) in zip(self.matrix[:3], self.shape, self.kinds, self.extent, strict=True):
            place = i * row[0] + (j * row[1] + (k * row[2] + row[3]))
            is_inside &= (place >= first - ROUNDING) & (place <= last + ROUNDING)
            place = place.clip(0, length - 1)
            if kind == "nearest":
                place = np.floor(place + 0.5 + ROUNDING).clip(0, length - 1)
            else:
                rounded = np.rint(place)
                place = np.where(abs(place - rounded) < ROUNDING, rounded, place)
            places.append(place)
        return places, is_inside

    def owned(self, box: Box, own: Box) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
        """Say which voxels of a box of the target have their last voxels of the source in a box, and what `places` says."""
        places, is_inside = self.places(box)
        is_owned = np.ones(box.shape, dtype=bool)
        for place, start, stop in zip(places, own.start, own.stop, strict=True):
            last = np.ceil(place)
            is_owned &= (last >= start) & (last < stop)
        return is_owned, places, is_inside

    def pieces(self, own: Box, most: int) -> Iterator[Box]:
        """See `SpaceMap`."""
        corners = np.array([(*corner, 1) for corner in itertools.product(*((0, length - 1) for length in self.target_shape))])
        places = corners @ self.matrix[:3].T
        ends = []
        for axis, (start, stop, length) in enumerate(zip(own.start, own.stop, self.shape, strict=True)):
            # What lies beyond the source belongs to its border.
            first = min(-1.0, places[:, axis].min()) if start == 0 else start - 1
            ends.append((first - 1, max(length, places[:, axis].max()) + 1 if stop == length else stop + 1))
        around = np.array([(*corner, 1) for corner in itertools.product(*ends)]) @ np.linalg.inv(self.matrix)[:3].T
        limits = np.asarray(self.target_shape)
        starts = np.floor(around.min(0)).clip(0, limits).astype(int).tolist()
        stops = (np.ceil(around.max(0)) + 1).clip(starts, limits).astype(int).tolist()
        box = Box(tuple(starts), tuple(stops))
        if not box.numel:
            return
        # Cubes, rather than slabs, since most of a slab would not be of this box.
        edge = max(1, min(4 * PART_VOXELS, math.floor(most ** (1 / 3))))
        for piece in cut(box, (edge,) * 3):
            if self.owned(piece, own)[0].any():
                yield piece

    def boxes(self, piece: Box, own: Box) -> list[Box]:
        """See `SpaceMap`."""
        return boxes_of(self.owned(piece, own)[0], piece.start)

    def parts(self, piece: Box, own: Box) -> Iterator["ObliquePart"]:
        """See `SpaceMap`."""
        for box in cut(piece, (PART_VOXELS,) * 3):
            is_owned, places, is_inside = self.owned(box, own)
            chosen = is_owned & is_inside
            if chosen.any():
                yield ObliquePart(box, chosen, [place[chosen] for place in places])


@dataclass(frozen=True, eq=False)
class ObliquePart:
    """Voxels of a box of the target, one by one; see `Part`."""

    box: Box
    chosen: np.ndarray
    """Which voxels of the box."""
    places: list[np.ndarray]
    """Where they are in the source, on each axis."""

    @property
    def shape(self) -> Ints:
        """See `Part`."""
        return (len(self.places[0]), 1, 1)

    @cached_property
    def support(self) -> Box:
        """See `Part`."""
        starts = tuple(int(np.floor(place.min())) for place in self.places)
        return Box(starts, tuple(int(np.ceil(place.max())) + 1 for place in self.places))

    def apply(self, values: Tensor) -> Tensor:
        """See `Part`."""
        flat = values.reshape(len(values), -1)
        strides = (self.support.shape[1] * self.support.shape[2], self.support.shape[2], 1)
        lower = [np.floor(place).astype(np.int64) for place in self.places]
        index = sum((one - start) * stride for one, start, stride in zip(lower, self.support.start, strides, strict=True))
        steps, weights = [], []
        for place, one, stride in zip(self.places, lower, strides, strict=True):
            steps.append((np.ceil(place).astype(np.int64) - one) * stride)
            weights.append(torch.from_numpy(place - one).to(values.device, values.dtype))

        def along(axis: int, index: np.ndarray) -> Tensor:
            """Interpolate along an axis and those behind it."""
            if axis == 3:
                return flat[:, torch.from_numpy(index).to(values.device)]
            before = along(axis + 1, index)
            if not steps[axis].any():
                return before
            behind = along(axis + 1, index + steps[axis])
            return behind.sub_(before).mul_(weights[axis]).add_(before)

        return along(0, np.asarray(index))[..., None, None]

    def put(self, piece: Tensor, origin: Ints, values: Tensor) -> None:
        """See `Part`."""
        part = piece[(slice(None), *self.box.relative_to(origin).slices)]
        part[:, torch.from_numpy(self.chosen)] = values.reshape(len(values), -1).to(piece.device)


def boxes_of(chosen: np.ndarray, origin: Ints) -> list[Box]:
    """Cut voxels of which each row holds one run at most into boxes: rows that are alike and follow one another go together.

    Example:
        >>> boxes_of(np.array([[[1, 1], [1, 1]], [[1, 1], [0, 1]]], dtype=bool), (0, 0, 0))
        [Box(start=(0, 0, 0), stop=(1, 2, 2)), Box(start=(1, 0, 0), stop=(2, 1, 2)), Box(start=(1, 1, 1), stop=(2, 2, 2))]
    """
    counts = chosen.sum(2)
    firsts = chosen.argmax(2)
    found: list[Box] = []
    open_before: dict[tuple[int, int, int, int], int] = {}
    for plane in range(len(chosen) + 1):
        now: dict[tuple[int, int, int, int], int] = {}
        if plane < len(chosen):
            runs = np.stack([firsts[plane], counts[plane]], 1)
            turns = [0, *(np.flatnonzero((np.diff(runs, axis=0) != 0).any(1)) + 1).tolist(), len(runs)]
            for start, stop in itertools.pairwise(turns):
                first, count = runs[start].tolist()
                if count:
                    key = (start, stop, first, first + count)
                    now[key] = open_before.pop(key, plane)
        for (start, stop, first, end), begin in open_before.items():
            found.append(Box((begin, start, first), (plane, stop, end)).shift(origin))
        open_before = now
    return found
