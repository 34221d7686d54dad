"""The part of a sum of patches that is open while a sweep goes through it."""

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from . import memory
from .accumulator import sum_dtype
from .boxes import Box
from .sizes import Ints
from .sweeps import Column, Place, Sweep
from .weave import AxisWeave
from .windows import Window

__all__ = ["KEPT_WEIGHTS", "SHARED_BYTES", "Allocate", "Finished", "Front", "Share", "WeightsOfPatches", "Work"]

Allocate = Callable[[Sequence[int], torch.dtype], Tensor]
"""Makes a tensor on the CPU whose values are not set."""

Work = Callable[[], object]

Share = Callable[[Sequence[Work]], None]
"""Does pieces of work, in any order; comes back when all are done."""

# Weights of patches that are kept: the first, the middle and the last of a row differ.
KEPT_WEIGHTS = 3
# Patches that are smaller than this are added at once: sharing out would take longer.
SHARED_BYTES = 16 * 2**20
# What is shared out at a time, at most: with less, threads would wait for Python's lock more often than for memory.
PIECE_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Finished:
    """Voxels to which no patch will be added any more."""

    box: Box
    """Where they are in the output."""
    values: Tensor | None
    """Tensor `(C, *box.shape)`, or None if no patch was added to any of them."""
    uncovered: Tensor | None
    """Boolean tensor of the box's shape: voxels that no patch was added to; None if there are none."""

    @property
    def num_bytes(self) -> int:
        """Memory of the values."""
        return 0 if self.values is None else self.values.nbytes


class WeightsOfPatches:
    """What each voxel of a patch counts; over all patches of the grid the weights of a voxel sum to 1.

    Args:
        sweep: the grid, and the voxels that its patches add to.
        window: the weights of a patch along an axis.
        dtype: type of the weights.
        device: where they are used.
    """

    def __init__(self, sweep: Sweep, window: Window, dtype: torch.dtype, device: torch.device) -> None:
        self._sweep = sweep
        self._weaves = [AxisWeave(axis, window) for axis in sweep.grid.axes]
        self._dtype, self._device = dtype, device
        self._vectors: dict[tuple[int, int], tuple[int, Tensor]] = {}
        self._distinct: dict[tuple[int, bytes], int] = {}
        self._products: OrderedDict[Ints, Tensor] = OrderedDict()

    def move_to(self, device: torch.device) -> None:
        """Make weights on another device from now on."""
        self._device = device
        self._products.clear()

    def of(self, numbers: Ints) -> Tensor:
        """Weights of the part of a patch that lies in the volume: exact to three roundings."""
        names, vectors = zip(*(self._vector(axis, number) for axis, number in enumerate(numbers)), strict=True)
        if names not in self._products:
            rest = vectors[1][:, None] * vectors[2]
            first, rest = (factor.to(self._device, self._dtype) for factor in (vectors[0], rest))
            if len(self._products) == KEPT_WEIGHTS:
                self._products.popitem(last=False)
            shape = (len(first), *rest.shape)
            product = memory.empty(shape, self._dtype) if self._device.type == "cpu" else rest.new_empty(shape)
            self._products[names] = torch.mul(first[:, None, None], rest, out=product)
        self._products.move_to_end(names)
        return self._products[names]

    def _vector(self, axis: int, number: int) -> tuple[int, Tensor]:
        """Give the weights of a patch along an axis, and a number that tells them from others."""
        if (axis, number) not in self._vectors:
            start = self._sweep.grid.axes[axis][number]
            clipped = slice(max(0, -start), self._sweep.grid.spatial_shape[axis] - start)
            vector = self._weaves[axis].weights(number)[clipped]
            name = self._distinct.setdefault((axis, vector.numpy().tobytes()), len(self._distinct))
            self._vectors[axis, number] = name, vector
        return self._vectors[axis, number]


@dataclass
class _Cell:
    """Voxels that are finished together."""

    box: Box
    values: Tensor
    weights: Tensor | None
    """Sum of the weights that were added, where some patches are left out; None where none is."""
    reached: int = 0
    """How far along the third axis of the sweep values have been set; clearing all of them first would be a pass of its own."""

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        return self.values.nbytes + (0 if self.weights is None else self.weights.nbytes)


@dataclass(frozen=True)
class _Addition:
    """A piece of a patch that is added to a cell."""

    values: Tensor
    """Where it is added."""
    patch: Tensor
    weights: Tensor | None
    axis: int
    old: int
    """To how many planes along the axis something was added before; others are set."""

    @torch.no_grad()  # which is a matter of each thread
    def carry_out(self, channels: slice) -> None:
        """Add some channels."""
        values, patch = self.values[channels], self.patch[channels]
        if self.weights is None:
            values.copy_(patch)
            return
        new = values.shape[self.axis] - self.old
        if self.old:
            target, *factors = (each.narrow(self.axis, 0, self.old) for each in (values, patch, self.weights))
            target.addcmul_(*factors)
        if new:
            target, *factors = (each.narrow(self.axis, self.old, new) for each in (values, patch, self.weights))
            torch.mul(*factors, out=target)


def _cut(additions: Sequence[_Addition]) -> list[Work]:
    """Cut additions into some that take about as long, those of the same channels one after the other."""
    pieces = []
    for number, each in enumerate(additions):
        channels = len(each.patch)
        step = max(1, PIECE_BYTES * channels // each.patch.nbytes)
        pieces += [(start, number, partial(each.carry_out, slice(start, start + step))) for start in range(0, channels, step)]
    return [work for _, _, work in sorted(pieces, key=lambda piece: piece[:2])]


class Front:
    """Sums the patches of one column, and gives what is finished.

    Patches must come in the order of the sweep. They may come from within `torch.inference_mode` or not.

    Args:
        sweep: the order, in the frame of the output.
        column: the column.
        channels: channels of the patches.
        dtype: type of the patches.
        device: where the sum is held.
        weights: those of the patches; None to crop, that is to copy the centres.
        needed: which patches will be added, by their numbers; None for all.
        allocate: makes memory for sums on the CPU.
        share: does the work of a large patch on the CPU.
    """

    def __init__(
        self,
        sweep: Sweep,
        column: Column,
        channels: int,
        dtype: torch.dtype,
        device: torch.device,
        weights: WeightsOfPatches | None,
        needed: np.ndarray | None = None,
        allocate: Allocate | None = None,
        share: Share | None = None,
    ) -> None:
        self._sweep, self.column = sweep, column
        self._allocate, self._share = (allocate, share) if device.type == "cpu" else (None, None)
        self._channels, self._device = channels, device
        self._dtype = dtype if weights is None else sum_dtype(dtype)
        self._weights = weights
        self._needed = needed
        self._box = sweep.column_box(column)
        self._cells: dict[Place, _Cell] = {}
        groups = (range(sweep.num_layers), column.rows, column.thirds)
        # Intervals of each axis that lie in the column.
        self._intervals = [
            range(part.finished_with(numbers.start).start, part.finished_with(numbers.stop - 1).stop)
            for part, numbers in zip(sweep.parts, groups, strict=True)
        ]

    @property
    def num_bytes(self) -> int:
        """Memory that open sums take."""
        return sum(cell.num_bytes for cell in self._cells.values())

    def bytes_to_open(self, numbers: Ints) -> int:
        """Memory that it will take in addition to add a patch."""
        places = [place for place in self._added_to(numbers) if place not in self._cells]
        return sum(self._bytes_per_voxel(box) * box.numel for box in map(self._sweep.cell, places))

    @torch.inference_mode(False)
    @torch.no_grad()
    def add(self, patch: Tensor, numbers: Ints) -> None:
        """Add a patch: all of it, or after an error for want of memory nothing.

        Args:
            patch: tensor `(C, *patch size)`; it is only read.
            numbers: which one of the grid's it is.
        """
        sweep = self._sweep
        whole = sweep.span(numbers)
        box = whole & self._box
        origin = sweep.grid.location(numbers).index
        piece = patch[(slice(None), *box.relative_to(origin).slices)].to(self._device, self._dtype)
        weights = None if self._weights is None else self._weights.of(numbers)[box.relative_to(whole.start).slices]
        additions = []
        # Everything that takes memory comes first.
        for cell in [self._open(place) for place in self._added_to(numbers)]:
            part = box & cell.box
            target = part.relative_to(cell.box.start).slices
            source = part.relative_to(box.start).slices
            additions.append(
                self._addition(cell, piece[(slice(None), *source)], target, None if weights is None else weights[source])
            )
        if self._share is None or piece.nbytes < SHARED_BYTES:
            for each in additions:
                each.carry_out(slice(None))
        else:
            self._share(_cut(additions))

    def _added_to(self, numbers: Ints) -> Iterable[Place]:
        """Give the cells that a patch adds to."""
        sweep = self._sweep
        return self._places([part.adds_to(numbers[axis]) for part, axis in zip(sweep.parts, sweep.axes, strict=True)])

    def _places(self, intervals: Iterable[range]) -> Iterable[Place]:
        """Give the cells of this column that lie in some intervals of each axis."""
        layers, rows, thirds = (
            range(max(one.start, other.start), min(one.stop, other.stop))
            for one, other in zip(intervals, self._intervals, strict=True)
        )
        return itertools.product(layers, rows, thirds)

    def _addition(self, cell: _Cell, piece: Tensor, target: tuple[slice, ...], weights: Tensor | None) -> "_Addition":
        """Say how to add a piece of a patch to a cell, of which that counts as done."""
        first, second, third = self._sweep.axes
        start, stop = target[third].start, target[third].stop
        # A patch of several that are gathered together may be the first in a cell without filling its cross-section.
        is_whole = all(piece.shape[1 + axis] == cell.box.shape[axis] for axis in (first, second))
        self._clear(cell, start if is_whole else stop)
        old = min(max(cell.reached - start, 0), stop - start)
        values = cell.values[(slice(None), *target)]
        cell.reached = max(cell.reached, stop)
        if cell.weights is not None:
            cell.weights[target].add_(1 if weights is None else weights)
        return _Addition(values, piece, weights, third - 3, old)

    def _clear(self, cell: _Cell, stop: int) -> None:
        """Set to 0 what no patch has been added to, up to some place.

        To -0, to be exact: unlike 0 it leaves every number as it is that is added to it, -0 too.
        """
        if stop > cell.reached:
            cell.values.narrow(self._sweep.axes[2] - 3, cell.reached, stop - cell.reached).fill_(-0.0)
            cell.reached = stop

    def _bytes_per_voxel(self, box: Box) -> int:
        return self._channels * self._dtype.itemsize + sum_dtype(self._dtype).itemsize * self._is_partial(box)

    def _open(self, place: Place) -> _Cell:
        cell = self._cells.get(place)
        if cell is None:
            box = self._sweep.cell(place)
            shape = (self._channels, *box.shape)
            if self._allocate is None:
                values = torch.empty(shape, dtype=self._dtype, device=self._device)
            else:
                values = self._allocate(shape, self._dtype)
            weights = torch.zeros(box.shape, dtype=sum_dtype(self._dtype), device=self._device) if self._is_partial(box) else None
            self._cells[place] = cell = _Cell(box, values, weights)
        return cell

    def _is_partial(self, box: Box) -> bool:
        """Whether a patch that holds a voxel of a box is left out."""
        return len(self._left_out(box)) > 0

    def _left_out(self, box: Box) -> np.ndarray:
        """Give the patches that hold a voxel of a box and are left out: a row of numbers for each."""
        if self._needed is None:
            return np.empty((0, 3), dtype=int)
        touching = [axis.touching(*ends) for axis, *ends in zip(self._sweep.grid.axes, box.start, box.stop, strict=True)]
        needed = self._needed[tuple(slice(numbers.start, numbers.stop) for numbers in touching)]
        return np.argwhere(~needed) + [numbers.start for numbers in touching]

    def _has_all(self, box: Box) -> Tensor:
        """Whether no patch that holds a voxel is left out, for each voxel of a box."""
        result = torch.ones(box.shape, dtype=torch.bool)
        for numbers in self._left_out(box).tolist():
            result[(self._sweep.span(tuple(numbers)) & box).relative_to(box.start).slices] = False
        return result.to(self._device)

    @torch.inference_mode(False)
    @torch.no_grad()
    def move_to(self, device: torch.device) -> None:
        """Hold the sum on another device from now on."""
        self._device = device
        for cell in self._cells.values():
            cell.values = cell.values.to(device)
            cell.weights = None if cell.weights is None else cell.weights.to(device)

    @torch.inference_mode(False)
    @torch.no_grad()
    def finish(self, place: Place) -> Iterator[Finished]:
        """Give what is finished with a step of a row of a layer, and forget it."""
        for each in self._places(part.finished_with(group) for part, group in zip(self._sweep.parts, place, strict=True)):
            cell = self._cells.pop(each, None)
            if cell is None:
                yield Finished(self._sweep.cell(each), None, None)
                continue
            self._clear(cell, cell.box.shape[self._sweep.axes[2]])
            uncovered = None
            if cell.weights is not None:
                uncovered = cell.weights == 0
                if self._weights is not None:
                    # Where all patches were added, weights sum to 1, and which cell a voxel is in must not show in its bits.
                    cell.values.div_(cell.weights.masked_fill_(uncovered | self._has_all(cell.box), 1))
            yield Finished(cell.box, cell.values, uncovered)
