"""The part of a sum of patches that is open while a traversal goes through it."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..core.boxes import Box
from ..core.grid.traversal import Block, Step, Tile, Traversal
from ..core.sizes import Ints
from ..core.values import sum_dtype
from ..runtime.sharing import Share, Work
from .weights import PatchWeights

__all__ = ["SHARED_BYTES", "Allocate", "FinishedTile", "StreamingAccumulator"]

Allocate = Callable[[Sequence[int], torch.dtype], Tensor]
"""Makes a tensor on the CPU whose values are not set."""

# Patches that are smaller than this are added at once: sharing out would take longer.
SHARED_BYTES = 16 * 2**20
# What is shared out at a time, at most: with less, threads would wait for Python's lock more often than for memory.
PIECE_BYTES = 16 * 2**20


@dataclass(frozen=True)
class FinishedTile:
    """Voxels to which no patch will be added any more."""

    box: Box
    """Where they are in the output."""
    values: Tensor | None
    """Tensor `(C, *box.shape)`, or None if no patch was added to any of them."""
    uncovered: Tensor | None
    """Boolean tensor of the box's shape: voxels that no patch was added to; None if there are none."""

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        return sum(each.nbytes for each in (self.values, self.uncovered) if each is not None)


@dataclass
class _OpenTile:
    """Voxels that are finished together."""

    box: Box
    values: Tensor
    weights: Tensor | None
    """Sum of the weights that were added, where some patches are left out; None where none is."""
    reached: int = 0
    """How far along the inner axis values have been set; clearing all of them first would be a pass of its own."""

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        return self.values.nbytes + (0 if self.weights is None else self.weights.nbytes)


@dataclass(frozen=True)
class _Addition:
    """A piece of a patch that is added to a tile."""

    values: Tensor
    """Where it is added."""
    patch: Tensor
    weights: Tensor | None
    axis: int
    old: int
    """To how many planes along the axis something was added before; others are set."""

    def carry_out(self, channels: slice | None = None) -> None:
        """Add some channels, by default all; without gradients."""
        values, patch, weights = self.values, self.patch, self.weights
        if channels is not None:
            values, patch = values[channels], patch[channels]
        new = values.shape[self.axis] - self.old
        if weights is None:
            values.copy_(patch)
        elif not new:
            values.addcmul_(patch, weights)
        elif not self.old:
            torch.mul(patch, weights, out=values)
        else:
            parts = [torch.split(each, [self.old, new], self.axis) for each in (values, patch, weights)]
            (before, *added), (target, *factors) = zip(*parts, strict=True)
            before.addcmul_(*added)
            torch.mul(*factors, out=target)


class _Overlap(NamedTuple):
    """Where a patch and an interval lie over one another along an axis."""

    interval: int
    source: slice
    """Voxels of what the patch adds to."""
    target: slice
    """Voxels of the interval."""
    is_whole: bool
    """Whether these are all."""


def _cut(additions: Sequence[_Addition]) -> list[Work]:
    """Cut additions into some that take about as long, those of the same channels one after the other."""
    pieces = []
    for number, each in enumerate(additions):
        channels = len(each.patch)
        step = max(1, PIECE_BYTES * channels // each.patch.nbytes)
        # Whether there are gradients is a matter of each thread.
        carry_out = torch.no_grad()(each.carry_out)
        pieces += [(start, number, partial(carry_out, slice(start, start + step))) for start in range(0, channels, step)]
    return [work for _, _, work in sorted(pieces, key=lambda piece: piece[:2])]


class StreamingAccumulator:
    """Sums the patches of one block, and gives what is finished.

    Patches must come in the order of the traversal. They may come from within `torch.inference_mode` or not.

    Args:
        traversal: the order, in the frame of the output.
        block: the block.
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
        traversal: Traversal,
        block: Block,
        channels: int,
        dtype: torch.dtype,
        device: torch.device,
        weights: PatchWeights | None,
        needed: np.ndarray | None = None,
        allocate: Allocate | None = None,
        share: Share | None = None,
    ) -> None:
        self._traversal = traversal
        self._allocate, self._share = (allocate, share) if device.type == "cpu" else (None, None)
        self._channels, self._device = channels, device
        self._dtype = dtype if weights is None else sum_dtype(dtype)
        self._weights = weights
        self._needed = needed
        self._tiles: dict[Tile, _OpenTile] = {}
        self.num_bytes = 0
        """Memory that open sums take; counted along, since there may be hundreds of them."""
        self._overlaps: dict[tuple[int, int], list[_Overlap]] = {}
        # Where each axis of the volume comes in the traversal.
        self._places = tuple(traversal.axes.index(axis) for axis in range(3))
        groups = (range(traversal.num_outer), block.middle, block.inner)
        # Intervals of each axis that lie in the block.
        self._intervals = [
            range(part.finished_with(numbers.start).start, part.finished_with(numbers.stop - 1).stop)
            for part, numbers in zip(traversal.parts, groups, strict=True)
        ]

    def bytes_to_open(self, numbers: Ints) -> int:
        """Memory that it will take in addition to add a patch."""
        boxes = [self._traversal.tile_box(tile) for tile, _ in self._added_to(numbers) if tile not in self._tiles]
        weights = sum_dtype(self._dtype).itemsize
        return sum(box.numel * (self._channels * self._dtype.itemsize + weights * self._is_partial(box)) for box in boxes)

    @torch.inference_mode(False)
    @torch.no_grad()
    def add(self, patch: Tensor, numbers: Ints) -> None:
        """Add a patch: all of it, or after an error for want of memory nothing.

        Args:
            patch: tensor `(C, *patch size)`; it is only read.
            numbers: which one of the grid's it is.
        """
        axes = self._traversal.grid.axes
        starts = tuple(axis[number] for axis, number in zip(axes, numbers, strict=True))
        inside = self._traversal.span(numbers).relative_to(starts).slices
        piece = patch[(slice(None), *inside)]
        if (piece.device, piece.dtype) != (self._device, self._dtype):  # another thread may get its turn otherwise, and keep it
            piece = piece.to(self._device, self._dtype)
        weights = None if self._weights is None else self._weights.of(numbers)
        # Everything that takes memory comes first.
        tiles = [(self._open(tile), overlaps) for tile, overlaps in self._added_to(numbers)]
        additions = [self._addition(tile, piece, overlaps, weights) for tile, overlaps in tiles]
        if self._share is None or piece.nbytes < SHARED_BYTES:
            for each in additions:
                each.carry_out()
        else:
            self._share(_cut(additions))

    def _added_to(self, numbers: Ints) -> Iterator[tuple[Tile, tuple[_Overlap, ...]]]:
        """Give the tiles that a patch adds to, with where it lies over them on the outer, the middle and the inner axis."""
        along = [self._overlaps_of(place, numbers[axis]) for place, axis in enumerate(self._traversal.axes)]
        for outer, middle, inner in itertools.product(*along):
            yield (outer.interval, middle.interval, inner.interval), (outer, middle, inner)

    def _overlaps_of(self, place: int, patch: int) -> list[_Overlap]:
        """Give the intervals of this block that a patch adds to along an axis, by its place in the traversal."""
        found = self._overlaps.get((place, patch))
        if found is None:
            part, own = self._traversal.parts[place], self._intervals[place]
            start, stop = part.spans[patch]
            found = self._overlaps[place, patch] = []
            numbers = part.adds_to(patch)
            for number in range(max(numbers.start, own.start), min(numbers.stop, own.stop)):
                begin, end = part.intervals[number]
                first, last = max(begin, start), min(end, stop)
                source, target = slice(first - start, last - start), slice(first - begin, last - begin)
                found.append(_Overlap(number, source, target, (first, last) == (begin, end)))
        return found

    def _in_block(self, intervals: Iterable[range]) -> Iterable[Tile]:
        """Give the tiles of this block that lie in some intervals of each axis."""
        outer, middle, inner = (
            range(max(one.start, other.start), min(one.stop, other.stop))
            for one, other in zip(intervals, self._intervals, strict=True)
        )
        return itertools.product(outer, middle, inner)

    def _addition(self, tile: _OpenTile, piece: Tensor, overlaps: tuple[_Overlap, ...], weights: Tensor | None) -> _Addition:
        """Say how to add a patch to a tile, of which that counts as done."""
        outer, middle, inner = overlaps
        i, j, k = (overlaps[place] for place in self._places)
        start, stop = inner.target.start, inner.target.stop
        # A patch of several that are gathered together may be the first in a tile without filling its cross-section.
        self._clear(tile, start if outer.is_whole and middle.is_whole else stop)
        old = min(max(tile.reached - start, 0), stop - start)
        tile.reached = max(tile.reached, stop)
        if weights is not None:
            weights = weights[i.source, j.source, k.source]
        if tile.weights is not None:
            tile.weights[i.target, j.target, k.target].add_(1 if weights is None else weights)
        values, patch = tile.values[:, i.target, j.target, k.target], piece[:, i.source, j.source, k.source]
        return _Addition(values, patch, weights, self._traversal.axes[2] - 3, old)

    def _clear(self, tile: _OpenTile, stop: int) -> None:
        """Set to 0 what no patch has been added to, up to some place.

        To -0, to be exact: unlike 0 it leaves every number as it is that is added to it, -0 too.
        """
        if stop > tile.reached:
            tile.values.narrow(self._traversal.axes[2] - 3, tile.reached, stop - tile.reached).fill_(-0.0)
            tile.reached = stop

    def _open(self, tile: Tile) -> _OpenTile:
        found = self._tiles.get(tile)
        if found is None:
            box = self._traversal.tile_box(tile)
            shape = (self._channels, *box.shape)
            if self._allocate is None:
                values = torch.empty(shape, dtype=self._dtype, device=self._device)
            else:
                values = self._allocate(shape, self._dtype)
            weights = torch.zeros(box.shape, dtype=sum_dtype(self._dtype), device=self._device) if self._is_partial(box) else None
            self._tiles[tile] = found = _OpenTile(box, values, weights)
            self.num_bytes += found.num_bytes
        return found

    def _is_partial(self, box: Box) -> bool:
        """Whether a patch that holds a voxel of a box is left out."""
        return len(self._left_out(box)) > 0

    def _left_out(self, box: Box) -> np.ndarray:
        """Give the patches that hold a voxel of a box and are left out: a row of numbers for each."""
        if self._needed is None:
            return np.empty((0, 3), dtype=int)
        touching = [axis.touching(*ends) for axis, *ends in zip(self._traversal.grid.axes, box.start, box.stop, strict=True)]
        needed = self._needed[tuple(slice(numbers.start, numbers.stop) for numbers in touching)]
        return np.argwhere(~needed) + [numbers.start for numbers in touching]

    def _has_all(self, box: Box) -> Tensor:
        """Whether no patch that holds a voxel is left out, for each voxel of a box."""
        result = torch.ones(box.shape, dtype=torch.bool)
        for numbers in self._left_out(box).tolist():
            result[(self._traversal.span(tuple(numbers)) & box).relative_to(box.start).slices] = False
        return result.to(self._device)

    @torch.inference_mode(False)
    @torch.no_grad()
    def move_to(self, device: torch.device) -> None:
        """Hold the sum on another device from now on."""
        self._device = device
        for tile in self._tiles.values():
            tile.values = tile.values.to(device)
            tile.weights = None if tile.weights is None else tile.weights.to(device)

    @torch.inference_mode(False)
    @torch.no_grad()
    def finish(self, step: Step) -> Iterator[FinishedTile]:
        """Give what is finished with a step, and forget it."""
        intervals = [part.finished_with(group) for part, group in zip(self._traversal.parts, step, strict=True)]
        for each in self._in_block(intervals):
            tile = self._tiles.pop(each, None)
            if tile is None:
                yield FinishedTile(self._traversal.tile_box(each), None, None)
                continue
            self.num_bytes -= tile.num_bytes
            self._clear(tile, tile.box.shape[self._traversal.axes[2]])
            uncovered = None
            if tile.weights is not None:
                uncovered = tile.weights == 0
                if self._weights is not None:
                    # Where all patches were added, weights sum to 1, and which tile a voxel is in must not show in its bits.
                    tile.values.div_(tile.weights.masked_fill_(uncovered | self._has_all(tile.box), 1))
            yield FinishedTile(tile.box, tile.values, uncovered)
