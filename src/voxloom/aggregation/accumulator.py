"""The sum of patches that becomes a volume."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ..core.boxes import Box
from ..core.grid.blending import AxisWeights
from ..core.grid.grids import PatchGrid
from ..core.grid.windows import Window
from ..core.locations import PatchLocation
from ..core.sizes import Ints
from ..core.values import can_hold, sum_dtype
from ..errors import IncompleteError, OutputError
from .weights import PatchWeights

__all__ = ["Accumulator"]

# Weight sums of an incomplete or irregular output are made for this many voxels at a time.
SLAB_VOXELS = 2**22


class Accumulator:
    """Sums the patches of one output, and gives its volume.

    Patches of the grid are added with weights that sum to 1, so that nothing is divided as long as each of them is
    added once. Patches at any other place are added with their window, divided by the sum of the grid's windows so that
    both kinds mix; they, and patches that were left out or repeated, are evened out when the result is asked for.

    Patches may come from within `torch.inference_mode` or not, as they like: what is kept is made outside of it.

    Args:
        grid: the patches that are expected, in the frame of the output.
        window: the weights of a patch along an axis, or None to `crop`, that is to copy the centres.
        device: where the volume is held.
        fill: value of voxels that no patch covers.
    """

    def __init__(self, grid: PatchGrid, window: Window | None, device: torch.device, fill: float = 0.0) -> None:
        self.shape = grid.spatial_shape
        self.grid = grid
        self.window = window
        self.device = device
        self.fill = fill
        self.off_grid: list[PatchLocation] = []
        """Patches that lie on no grid."""
        self._times_added = np.zeros(grid.num_patches, dtype=np.uint32)
        self._total: Tensor | None = None
        self._dtype: torch.dtype | None = None
        self._result: Tensor | None = None
        self._weights: PatchWeights | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been added yet."""
        return self._total is None

    @property
    def missing(self) -> np.ndarray:
        """Indices of the patches of the grid that have not been added."""
        return np.flatnonzero(self._times_added == 0)

    def check(self, channels: int, dtype: torch.dtype) -> None:
        """Check that patches of these channels and this type belong to this output.

        Raises:
            OutputError: if earlier ones had another number or type, or the type is of no use.
        """
        if dtype.is_complex:
            raise OutputError(f"is {dtype}, which cannot be averaged: give its real and imaginary parts as two outputs")
        if not can_hold(self._held(dtype), self.fill):
            raise OutputError(f"is {dtype}, which cannot hold the fill value {self.fill}: choose another one")
        if self._total is None:
            return
        if channels != len(self._total):
            raise OutputError(f"has {channels} channels, but earlier batches had {len(self._total)}")
        if dtype != self._dtype:
            raise OutputError(f"is {dtype}, but earlier batches were {self._dtype}: give all batches the same type")

    @torch.inference_mode(False)
    @torch.no_grad()
    def add(self, patch: Tensor, location: PatchLocation) -> None:
        """Add the output for one patch, which must have been checked.

        Args:
            patch: tensor `(C, *location.size)`; it is only read.
            location: where it belongs, in the frame of the output; what lies outside of the volume is dropped. Where
                patches are cropped, it must be one of the grid's.
        """
        numbers = self.grid.find(location)
        total = self._writable(len(patch), patch.dtype)
        box = self._core(numbers) if self.window is None and numbers else location.box & Box.of_shape(self.shape)
        piece = patch.to(self.device)[(slice(None), *box.relative_to(location.index).slices)]
        target = total[(slice(None), *box.slices)]
        if self._weights is None:
            target.copy_(piece)
        else:
            weights = self._weights.off_grid(location, box) if numbers is None else self._weights.of(numbers)
            target.addcmul_(piece.to(total.dtype), weights)
        if numbers is None:
            self.off_grid.append(location)
        else:
            self._times_added[self.grid.ravel(numbers)] += 1

    @torch.inference_mode(False)
    @torch.no_grad()
    def result(self, strict: bool = True) -> Tensor:
        """Give the volume `(C, *shape)`; something must have been added.

        Calls that follow without a patch added in between give the same tensor, which is not written to again.

        Args:
            strict: raise an error if patches from elsewhere than the grid leave voxels uncovered; otherwise these are set to
                `fill`.

        Raises:
            IncompleteError: says how many voxels are uncovered.
        """
        assert self._total is not None
        if self._result is None:
            is_plain = self.window is None or (not self.off_grid and bool((self._times_added == 1).all()))
            self._result = self._total if is_plain else self._evened_out(self._total, strict and bool(self.off_grid))
        return self._result

    def _held(self, dtype: torch.dtype) -> torch.dtype:
        return dtype if self.window is None else sum_dtype(dtype)

    def _writable(self, channels: int, dtype: torch.dtype) -> Tensor:
        """Give the sum, made when the first patch comes; a tensor that was given away is not written to again."""
        if self._total is None:
            self._dtype = dtype
            start = self.fill if self.window is None else 0
            self._total = torch.full((channels, *self.shape), start, dtype=self._held(dtype), device=self.device)
            if self.window is not None:
                self._weights = PatchWeights(self.grid, self.window, self._total.dtype, self.device)
        elif self._result is self._total:
            self._total = self._total.clone()
        self._result = None
        return self._total

    def _core(self, numbers: Ints) -> Box:
        cores = [AxisWeights(axis, None).core(number) for axis, number in zip(self.grid.axes, numbers, strict=True)]
        start, stop = zip(*cores, strict=True)
        return Box(start, stop) & Box.of_shape(self.shape)

    def _evened_out(self, total: Tensor, strict: bool) -> Tensor:
        """Divide by the sum of the weights that were added, slab by slab."""
        result = torch.empty_like(total)
        uncovered = 0
        for slab in self._slabs():
            part = (slice(None), *slab.slices)
            weights = self._weight_sum(slab)
            is_covered = weights > 0
            uncovered += slab.numel - int(is_covered.sum())
            torch.div(total[part], weights, out=result[part])
            result[part].masked_fill_(~is_covered, self.fill)
        if strict and uncovered:
            raise IncompleteError(
                f"{uncovered} of {Box.of_shape(self.shape).numel} voxels are covered by no patch: add the patches that hold them,"
                f" or ask with strict=False to set them to {self.fill}"
            )
        return result

    def _slabs(self) -> Iterator[Box]:
        rows = max(1, SLAB_VOXELS // max(1, Box.of_shape(self.shape[1:]).numel))
        for start in range(0, self.shape[0], rows):
            yield Box((start, *(0,) * (len(self.shape) - 1)), (min(start + rows, self.shape[0]), *self.shape[1:]))

    def _weight_sum(self, slab: Box) -> Tensor:
        """Sum of the weights of all patches that were added, over the voxels of a slab."""
        assert self._total is not None
        assert self._weights is not None
        sums = torch.zeros(slab.shape, dtype=self._total.dtype, device=self.device)
        for location, times in self._added_to(slab):
            box = location.box & slab
            if box.numel:
                sums[box.relative_to(slab.start).slices].add_(self._weights.off_grid(location, box), alpha=times)
        return sums

    def _added_to(self, slab: Box) -> Iterator[tuple[PatchLocation, int]]:
        """Yield the patches that were added and may touch a slab, and how often."""
        layers = self.grid.axes[0].touching(slab.start[0], slab.stop[0])
        per_layer = self.grid.num_patches // len(self.grid.axes[0])
        first = layers.start * per_layer
        times_added = self._times_added[first : layers.stop * per_layer]
        for index in np.flatnonzero(times_added).tolist():
            yield self.grid[first + index], int(times_added[index])
        if self.off_grid:
            spans = np.array([(location.index[0], location.index_fin[0]) for location in self.off_grid])
            touching = (spans[:, 0] < slab.stop[0]) & (spans[:, 1] > slab.start[0])
            yield from ((self.off_grid[index], 1) for index in np.flatnonzero(touching).tolist())
