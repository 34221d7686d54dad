"""The sum of patches that becomes a volume."""

import warnings
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ..errors import IncompleteError, LocationError, OutputError
from .boxes import Box
from .grids import PatchGrid
from .locations import PatchLocation
from .sizes import Ints
from .weave import AxisWeave
from .windows import Window

__all__ = ["Accumulator", "sum_dtype"]

# Weight sums of an incomplete or irregular output are made for this many voxels at a time.
SLAB_VOXELS = 2**22
LARGE_CHANNEL_VOXELS = 2**15


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type in which values are summed: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Accumulator:
    """Weaves the patches of one output into its volume.

    Patches of the grid are added with weights that sum to 1, so that nothing is divided as long as each of them is
    added once. Patches at any other place are added with their window, divided by the sum of the grid's windows so that
    both kinds mix; they, and patches that were left out or repeated, are evened out when the result is asked for.

    Patches may come from within `torch.inference_mode` or not, as they like: what is kept is made outside of it.

    Args:
        shape: voxels of the output along each axis.
        grid: the patches that are expected, in the frame of the output; its box must hold the whole output.
        window: the weights of a patch along an axis, or None to `crop`, that is to copy the centres.
        device: where the volume is held.
        fill: value of voxels that no patch covers.
    """

    def __init__(self, shape: Ints, grid: PatchGrid, window: Window | None, device: torch.device, fill: float = 0.0) -> None:
        self.shape = shape
        self.grid = grid
        self.window = window
        self.device = device
        self.fill = fill
        self._weaves = tuple(AxisWeave(axis, window) for axis in grid.axes)
        self._times_added = np.zeros(grid.num_patches, dtype=np.uint32)
        self._strays: list[PatchLocation] = []
        self._total: Tensor | None = None
        self._dtype: torch.dtype | None = None
        self._is_handed_out = False
        self._vectors: dict[tuple[int, int], Tensor] = {}
        self._weights_of: Ints | None = None
        self._weights = torch.empty(0)
        self._window_sums: list[Tensor] | None = None

    def check(self, channels: int, dtype: torch.dtype) -> None:
        """Check that patches of these channels and this type belong to this output.

        Raises:
            OutputError: if earlier ones had another number or type.
        """
        if dtype.is_complex:
            raise OutputError(f"the output is {dtype}, which cannot be weighed: give its real and imaginary parts as two outputs")
        if self._total is None:
            return
        if channels != len(self._total):
            raise OutputError(f"the output has {channels} channels, but earlier batches had {len(self._total)}")
        if dtype != self._dtype:
            raise OutputError(f"the output is {dtype}, but earlier batches were {self._dtype}: give all batches the same type")

    @torch.inference_mode(False)
    @torch.no_grad()
    def add(self, patch: Tensor, location: PatchLocation) -> None:
        """Add the output for one patch.

        Args:
            patch: tensor `(C, *location.size)`; it is only read.
            location: where it belongs, in the frame of the output; what lies outside of the volume is dropped.

        Raises:
            OutputError: if the patch holds NaN.
            LocationError: if the patch is not one of the grid's and the mode is `crop`.
        """
        numbers = self.grid.find(location)
        if numbers is None and self.window is None:
            raise LocationError(
                f"the patch {location.index} to {location.index_fin} is none of the grid of {self.grid.num_patches} patches of"
                f" {self.grid.patch_size}, of which the first is {self.grid[0].index} to {self.grid[0].index_fin}: 'crop' keeps"
                " the centres of a grid, so give the patch_overlap that the patches were cut with, use GridAggregator(sampler),"
                " or choose 'average', 'hann' or 'gaussian'"
            )
        patch = patch.detach().to(self.device)
        check_values(patch, location)
        total = self._writable(len(patch), patch.dtype)
        box = location.box & Box.of_shape(self.shape) if numbers is None or self.window is not None else self._core(numbers)
        piece = patch[(slice(None), *box.relative_to(location.index).slices)]
        target = total[(slice(None), *box.slices)]
        if self.window is None:
            target.copy_(piece)
        else:
            weights = self._stray_weights(location, box) if numbers is None else self._grid_weights(numbers)
            # Large channels one by one: a channel and the weights then stay in the processor's cache.
            channels = zip(target, piece, strict=True) if weights.numel() >= LARGE_CHANNEL_VOXELS else [(target, piece)]
            for part, values in channels:
                part.addcmul_(values.to(total.dtype), weights)
        if numbers is None:
            self._strays.append(location)
        else:
            self._times_added[self.grid.ravel(numbers)] += 1

    @torch.inference_mode(False)
    @torch.no_grad()
    def result(self, strict: bool = True) -> Tensor:
        """Give the volume `(C, *shape)`.

        Calls that follow without a patch added in between give the same tensor, which is not written to again.

        Args:
            strict: raise an error if anything is missing; otherwise voxels are normalised by what there is, and those
                that nothing covers are set to `fill`.

        Raises:
            IncompleteError: if no patch has been added, or some are missing.
        """
        expected = self.grid.num_patches
        if self._total is None:
            raise IncompleteError(f"no patch has been added yet, of {expected}: call add_batch for each batch first")
        missing = np.flatnonzero(self._times_added == 0)
        if strict and len(missing) and not self._strays:
            first = self.grid[int(missing[0])]
            raise IncompleteError(
                f"{len(missing)} of {expected} patches are missing, the first at {first.index} to {first.index_fin}:"
                " add them, or ask with strict=False for what there is"
            )
        if self.window is None:
            total = self._filled(self._total, missing)
        elif self._strays or (self._times_added != 1).any():
            total = self._evened_out(self._total, strict)
        else:
            total = self._total
        self._is_handed_out = self._is_handed_out or total is self._total
        return total

    def _writable(self, channels: int, dtype: torch.dtype) -> Tensor:
        if self._total is None:
            self._dtype = dtype
            held = dtype if self.window is None else sum_dtype(dtype)
            self._total = torch.zeros((channels, *self.shape), dtype=held, device=self.device)
        elif self._is_handed_out:
            self._total = self._total.clone()
            self._is_handed_out = False
        return self._total

    def _core(self, numbers: Ints) -> Box:
        cores = [weave.core(number) for weave, number in zip(self._weaves, numbers, strict=True)]
        start, stop = zip(*cores, strict=True)
        return Box(start, stop) & Box.of_shape(self.shape)

    def _grid_weights(self, numbers: Ints) -> Tensor:
        """Weights of the part of a patch that lies in the volume."""
        if numbers != self._weights_of:
            self._weights = self._product([self._vector(axis, number) for axis, number in enumerate(numbers)], self._weights)
            self._weights_of = numbers
        return self._weights

    def _vector(self, axis: int, number: int) -> Tensor:
        if (axis, number) not in self._vectors:
            start = self.grid.axes[axis][number]
            clipped = slice(max(0, -start), self.shape[axis] - start)
            self._vectors[axis, number] = self._weaves[axis].weights(number)[clipped]
        return self._vectors[axis, number]

    def _stray_weights(self, location: PatchLocation, box: Box) -> Tensor:
        assert self.window is not None
        if self._window_sums is None:
            self._window_sums = [
                weave.window_sum()[-weave.grid.start :][:size] for weave, size in zip(self._weaves, self.shape, strict=True)
            ]
        local = box.relative_to(location.index).slices
        windows = [self.window(size)[part] for size, part in zip(location.size, local, strict=True)]
        vectors = [window / total[part] for window, total, part in zip(windows, self._window_sums, box.slices, strict=True)]
        return self._product(vectors)

    def _product(self, vectors: list[Tensor], out: Tensor | None = None) -> Tensor:
        """Outer product of one vector per axis: exact to three roundings, into memory that is used again where it fits."""
        assert self._total is not None
        first, rest = vectors[0], torch.ones((), dtype=torch.float64)
        for vector in vectors[1:]:
            rest = rest[..., None] * vector
        first, rest = (factor.to(self._total) for factor in (first, rest))
        first = first.view(-1, *(1,) * rest.ndim)
        shape = (len(first), *rest.shape)
        reuse = out if out is not None and out.shape == shape and out.dtype == rest.dtype else None
        return torch.mul(first, rest, out=reuse)

    def _filled(self, total: Tensor, missing: np.ndarray) -> Tensor:
        if len(missing) == 0:
            return total
        total = total.clone()
        for index in missing.tolist():
            total[(slice(None), *self._core(self.grid.unravel(index)).slices)] = self.fill
        return total

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
        sums = torch.zeros(slab.shape, dtype=self._total.dtype, device=self.device)
        on_grid = ((self.grid[index], int(self._times_added[index])) for index in self.grid.touching(slab))
        strays = ((location, 1) for location in self._strays)
        for locations in (on_grid, strays):
            for location, times in locations:
                box = location.box & slab
                if times and box.numel:
                    # A patch of the grid weighs its window over the sum of all windows too, so one rule serves both.
                    sums[box.relative_to(slab.start).slices].add_(self._stray_weights(location, box), alpha=times)
        return sums


def check_values(patch: Tensor, location: PatchLocation) -> None:
    """Refuse NaN, and warn of infinity, in the output for one patch."""
    if not patch.is_floating_point() or bool(patch.sum(dtype=sum_dtype(patch.dtype)).isfinite()):
        return  # A sum of values of which one is NaN or infinite is never finite.
    where = f"the output for the patch {location.index} to {location.index_fin}"
    if bool(patch.isnan().any()):
        raise OutputError(
            f"{where} holds {int(patch.isnan().sum())} NaN of {patch.numel()} values, which would spread to its neighbours:"
            " look for a division by zero or an overflow in the model, or replace them with torch.nan_to_num"
        )
    if bool(patch.isinf().any()):
        warnings.warn(f"{where} holds infinity", RuntimeWarning, stacklevel=4)
