"""What each voxel of a patch counts, for patches of a grid and for any others."""

from collections import OrderedDict

import torch
from torch import Tensor

from ..core.boxes import Box
from ..core.grid.blending import AxisWeights
from ..core.grid.grids import PatchGrid
from ..core.grid.windows import Window, for_axis
from ..core.locations import PatchLocation
from ..core.sizes import Ints
from ..runtime import memory

__all__ = ["KEPT_WEIGHTS", "PatchWeights"]

# Weights of patches that are kept: the first, the middle and the last of a row differ.
KEPT_WEIGHTS = 3


class PatchWeights:
    """Weights of the voxels of a patch that lie in the volume; over all patches of the grid those of a voxel sum to 1.

    Args:
        grid: the patches.
        window: the weights of a patch along an axis, before they are divided.
        dtype: type of the weights.
        device: where they are used.
    """

    def __init__(self, grid: PatchGrid, window: Window, dtype: torch.dtype, device: torch.device) -> None:
        self._grid, self._window = grid, window
        self._axes = [AxisWeights(axis, for_axis(window, number)) for number, axis in enumerate(grid.axes)]
        self._dtype, self._device = dtype, device
        self._vectors: dict[tuple[int, int], tuple[int, Tensor]] = {}
        self._distinct: dict[tuple[int, bytes], int] = {}
        self._products: OrderedDict[Ints, Tensor] = OrderedDict()
        self._window_sums: list[Tensor] | None = None

    def move_to(self, device: torch.device) -> None:
        """Make weights on another device from now on."""
        self._device = device
        self._products.clear()

    def of(self, numbers: Ints) -> Tensor:
        """Weights of a patch of the grid, by its numbers on the axes."""
        names, vectors = zip(*(self._vector(axis, number) for axis, number in enumerate(numbers)), strict=True)
        if names not in self._products:
            if len(self._products) == KEPT_WEIGHTS:
                self._products.popitem(last=False)
            self._products[names] = self._product(list(vectors))
        self._products.move_to_end(names)
        return self._products[names]

    def off_grid(self, location: PatchLocation, box: Box) -> Tensor:
        """Weights of a part of any patch: its window over the sum of the windows of the grid, so that both kinds mix."""
        if self._window_sums is None:
            self._window_sums = [axis.window_sum()[-axis.grid.start :] for axis in self._axes]
        local = box.relative_to(location.index).slices
        windows = [
            for_axis(self._window, axis)(size)[part] for axis, (size, part) in enumerate(zip(location.size, local, strict=True))
        ]
        sums = zip(windows, self._window_sums, box.slices, strict=True)
        return self._product([window / total[part] for window, total, part in sums])

    def _vector(self, axis: int, number: int) -> tuple[int, Tensor]:
        """Give the weights of a patch along an axis, and a number that tells them from others."""
        if (axis, number) not in self._vectors:
            start = self._grid.axes[axis][number]
            vector = self._axes[axis].of(number)[max(0, -start) : self._grid.spatial_shape[axis] - start]
            name = self._distinct.setdefault((axis, vector.numpy().tobytes()), len(self._distinct))
            self._vectors[axis, number] = name, vector
        return self._vectors[axis, number]

    def _product(self, vectors: list[Tensor]) -> Tensor:
        """Outer product of one vector per axis, exact to three roundings: two factors, their product, and each is rounded."""
        first, rest = vectors[0], torch.ones((), dtype=torch.float64)
        for vector in vectors[1:]:
            rest = rest[..., None] * vector
        first, rest = (factor.to(self._device, self._dtype) for factor in (first, rest))
        shape = (len(first), *rest.shape)
        out = memory.empty(shape, self._dtype) if self._device.type == "cpu" else rest.new_empty(shape)
        return torch.mul(first.view(-1, *(1,) * rest.ndim), rest, out=out)
