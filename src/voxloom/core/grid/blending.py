"""Blending weights: a separable partition of unity over a grid of patches.

Along every axis, each patch gets a vector of weights: its window, divided by the sum of the windows of all patches over
that axis. The weight of a voxel in a patch is the product of one number per axis, and over all patches of the grid the
weights of a voxel sum to 1. So neither a volume of counts nor a division is needed, and a voxel is finished as soon as the
last patch that covers it has been added.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .grids import AxisGrid
from .windows import Window

__all__ = ["AxisWeights"]

Neighbours = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class AxisWeights:
    """What each patch contributes to each voxel of one axis.

    Example:
        >>> from voxloom.core.grid.windows import average
        >>> weights = AxisWeights(AxisGrid(start=0, stop=4, patch=3, stride=1), average)
        >>> weights.of(0).tolist(), weights.of(1).tolist()
        ([1.0, 0.5, 0.5], [0.5, 0.5, 1.0])
    """

    grid: AxisGrid
    window: Window | None
    """None for `crop`: each voxel belongs to the patch whose centre is nearest."""

    def neighbours(self, number: int) -> Neighbours:
        """Distances from a patch to every patch that it overlaps, itself included."""
        start = self.grid[number]
        return tuple(self.grid[other] - start for other in self.grid.touching(start, start + self.grid.patch))

    def of(self, number: int) -> Tensor:
        """Weights of the voxels of a patch, where it has a window: a float64 tensor as long as the patch.

        Over all patches they sum to 1 on every voxel of the grid.
        """
        assert self.window is not None
        size = self.grid.patch
        window = self.window(size)
        total = torch.zeros(size, dtype=torch.float64)
        for distance in self.neighbours(number):
            if distance >= 0:
                total[distance:] += window[: size - distance]
            else:
                total[:distance] += window[-distance:]
        return window / total

    def window_sum(self) -> Tensor:
        """Sum of the windows of all patches over each voxel from `grid.start` to `grid.stop`, in float64."""
        assert self.window is not None
        total = torch.zeros(self.grid.stop - self.grid.start, dtype=torch.float64)
        window = self.window(self.grid.patch)
        for start in self.grid:
            total[start - self.grid.start :][: self.grid.patch] += window
        return total

    def core(self, number: int) -> tuple[int, int]:
        """First voxel, and one past the last, that lie nearest to the centre of this patch.

        Boundaries are at the middle of each actual overlap; where that falls on a voxel, it goes to the patch on its right.
        """
        start = self.grid.start if number == 0 else self._boundary(number - 1)
        stop = self.grid.stop if number == len(self.grid) - 1 else self._boundary(number)
        return start, stop

    def _boundary(self, number: int) -> int:
        return (self.grid[number] + self.grid[number + 1] + self.grid.patch) // 2
