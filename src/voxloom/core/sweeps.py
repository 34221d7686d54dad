"""In what order the patches of a grid are gathered, so that little of the sum is open at any time.

A sweep goes through a grid layer by layer along one axis, and through a layer row by row along a second. Each axis is cut
into intervals wherever a patch begins or ends. What lies before the next patch on an axis is finished with a patch: so a row
of a layer finishes the cells of its own intervals on both axes, whatever else is still open.
"""

import bisect
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..errors import SizeError
from .boxes import Box
from .grids import AxisGrid, PatchGrid
from .sizes import Ints
from .weave import AxisWeave

__all__ = ["AxisSweep", "Column", "Sweep"]

Ends = tuple[int, int]
"""First voxel, and one past the last."""


@dataclass(frozen=True)
class AxisSweep:
    """What a sweep finishes along one axis.

    Example:
        >>> axis = AxisSweep(AxisGrid(start=0, stop=10, patch=5, stride=3), size=10, is_cropped=False)
        >>> axis.intervals
        [(0, 3), (3, 5), (5, 8), (8, 10)]
        >>> axis.adds_to(1), axis.finished_with(1)
        (range(1, 3), range(1, 2))
    """

    grid: AxisGrid
    size: int
    """Voxels of the volume, without padding."""
    is_cropped: bool
    """Whether a patch adds only the voxels that lie nearest to its centre."""

    @cached_property
    def spans(self) -> list[Ends]:
        """Voxels of the volume that each patch adds to; there may be none in a patch of padding."""
        if self.is_cropped:
            weave = AxisWeave(self.grid, None)
            spans = [weave.core(number) for number in range(len(self.grid))]
        else:
            spans = [(start, start + self.grid.patch) for start in self.grid]
        return [(min(max(0, start), self.size), max(0, min(stop, self.size))) for start, stop in spans]

    @cached_property
    def _bounds(self) -> list[int]:
        return sorted({0, self.size, *itertools.chain.from_iterable(self.spans)})

    @property
    def intervals(self) -> list[Ends]:
        """All intervals: between two neighbours no patch begins or ends."""
        return list(itertools.pairwise(self._bounds))

    def adds_to(self, number: int) -> range:
        """Numbers of the intervals that a patch adds to."""
        return range(*(bisect.bisect_left(self._bounds, end) for end in self.spans[number]))

    def finished_with(self, number: int) -> range:
        """Numbers of the intervals that no later patch adds to, but a later one than the patch before."""
        start = self.spans[number][0] if number else 0
        stop = self.spans[number + 1][0] if number + 1 < len(self.spans) else self.size
        return range(*(bisect.bisect_left(self._bounds, end) for end in (start, stop)))

    def ends(self, numbers: range) -> Ends:
        """The voxels that are finished with some patches that follow one another."""
        return (
            self._bounds[self.finished_with(numbers.start).start],
            self._bounds[self.finished_with(numbers.stop - 1).stop],
        )

    def added_by(self, numbers: range) -> range:
        """Numbers of the patches that add to what is finished with some patches that follow one another."""
        start, _ = self.ends(numbers)
        first = next((number for number in range(numbers.start) if self.spans[number][1] > start), numbers.start)
        return range(first, numbers.stop)


@dataclass(frozen=True)
class Column:
    """A part of the volume that is swept on its own: all of it along the axis of the sweep, some intervals on the others."""

    rows: range
    """Numbers of the patches that it is finished with, along the axis of the rows."""
    thirds: range
    """The same along the last axis."""


@dataclass(frozen=True)
class Sweep:
    """The order in which patches are gathered.

    Args:
        grid: the patches.
        is_cropped: whether each voxel is taken from one patch alone.
        axes: the axis along which the sweep goes, that of the rows, and the third.

    Example:
        >>> grid = PatchGrid.cover((10, 20, 60), patch_size=10, patch_overlap=4)
        >>> sweep = Sweep.smallest(grid, is_cropped=False)
        >>> sweep.axes, sweep.open_voxels(sweep.whole)
        ((2, 1, 0), 1800)
    """

    grid: PatchGrid
    is_cropped: bool
    axes: Ints

    @classmethod
    def smallest(cls, grid: PatchGrid, is_cropped: bool) -> "Sweep":
        """Choose the axes for which least is open at a time; of those that are equal, the first."""
        sweeps = [cls(grid, is_cropped, axes) for axes in itertools.permutations(range(len(grid.axes)))]
        return min(sweeps, key=lambda sweep: sweep.open_voxels(sweep.whole))

    @cached_property
    def steps(self) -> tuple[AxisSweep, AxisSweep, AxisSweep]:
        """The axes in the order of the sweep."""
        layers, rows, columns = (
            AxisSweep(self.grid.axes[axis], self.grid.spatial_shape[axis], self.is_cropped) for axis in self.axes
        )
        return layers, rows, columns

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.steps[0].grid)

    @property
    def whole(self) -> Column:
        """The whole volume as one column."""
        return Column(range(len(self.steps[1].grid)), range(len(self.steps[2].grid)))

    def split(self, rows: int, columns: int) -> list[Column]:
        """Cut the volume into columns: so many along the second axis, and so many along the third.

        Patches of nothing but padding finish no voxel; columns of such patches alone are left out.
        """
        whole = self.whole
        parts = itertools.product(_cut(len(whole.rows), rows), _cut(len(whole.thirds), columns))
        return [column for column in (Column(*part) for part in parts) if self.column_box(column).numel]

    def ordered(self, values: Sequence[int]) -> Ints:
        """Put numbers of the three axes from the order of the sweep into that of the volume."""
        result = [0, 0, 0]
        for axis, value in zip(self.axes, values, strict=True):
            result[axis] = value
        return tuple(result)

    def box(self, *spans: Ends) -> Box:
        """Make a box of its ends on the three axes in the order of the sweep."""
        starts, stops = zip(*spans, strict=True)
        return Box(self.ordered(starts), self.ordered(stops))

    def cell(self, layer: int, row: int, column: Column) -> Box:
        """Voxels of an interval of the first axis and one of the second, by their numbers, in a column."""
        layers, rows, thirds = self.steps
        return self.box(layers.intervals[layer], rows.intervals[row], thirds.ends(column.thirds))

    def finished_cells(self, layer: int, row: int) -> Iterator[tuple[int, int]]:
        """Give the cells that are finished with a row of patches of a layer."""
        return itertools.product(self.steps[0].finished_with(layer), self.steps[1].finished_with(row))

    def column_box(self, column: Column, layer: int | None = None) -> Box:
        """Voxels of a column, or those that are finished with one layer of it."""
        layers, rows, thirds = self.steps
        ends = (0, layers.size) if layer is None else layers.ends(range(layer, layer + 1))
        return self.box(ends, rows.ends(column.rows), thirds.ends(column.thirds))

    def span(self, numbers: Ints) -> Box:
        """Voxels of the volume that a patch adds to, by its numbers on the axes of the volume."""
        return self.box(*(step.spans[numbers[axis]] for step, axis in zip(self.steps, self.axes, strict=True)))

    def rows_of(self, column: Column) -> range:
        """Rows of patches that add to a column."""
        return self.steps[1].added_by(column.rows)

    def patches(self, layer: int, row: int, column: Column, needed: np.ndarray | None = None) -> Iterator[Ints]:
        """Give the patches of a row of a layer that add to a column, by their numbers on the axes of the volume.

        Args:
            layer: number of the layer.
            row: number of the row.
            column: the column.
            needed: which patches of the grid are to be computed, by their numbers; None for all.
        """
        for third in self.steps[2].added_by(column.thirds):
            numbers = self.ordered((layer, row, third))
            if (needed is None or needed[numbers]) and self.span(numbers).numel:
                yield numbers

    def num_patches(self, column: Column, needed: np.ndarray | None = None) -> list[int]:
        """Number of patches in each layer of a column."""
        layers, rows, thirds = (np.array([start < stop for start, stop in step.spans]) for step in self.steps)
        row_numbers, third_numbers = _slice(self.rows_of(column)), _slice(self.steps[2].added_by(column.thirds))
        if needed is None:
            each = int(rows[row_numbers].sum() * thirds[third_numbers].sum())
            return [each * int(is_filled) for is_filled in layers]
        part = needed.transpose(self.axes)[:, row_numbers, third_numbers]
        counts: list[int] = (part & layers[:, None, None] & rows[row_numbers, None] & thirds[third_numbers]).sum((1, 2)).tolist()
        return counts

    def open_voxels(self, column: Column) -> int:
        """The most voxels that are open at a time while a column is swept."""
        layers, rows, thirds = self.steps
        start, stop = thirds.ends(column.thirds)
        begin, end = rows.ends(column.rows)
        ends = np.array([rows.ends(range(row, row + 1)) for row in column.rows])
        unfinished = end - ends[:, 0]  # when a row is added to, those before it are finished
        opened = np.minimum([rows.spans[row][1] for row in column.rows], end)
        opened = np.maximum.accumulate(np.maximum(opened, ends[:, 0])) - begin
        most, reached = 0, 0
        seen = set()
        for layer in range(self.num_layers):
            own_start, own_stop = layers.ends(range(layer, layer + 1))
            was_reached, reached = reached, max(reached, layers.spans[layer][1])
            old_own = max(0, min(own_stop, was_reached) - own_start)
            new_own = own_stop - own_start - old_own
            old_later = max(0, was_reached - own_stop)
            new_later = max(0, reached - max(own_stop, was_reached))
            key = (old_own, new_own, old_later, new_later)
            if key not in seen:
                seen.add(key)
                # Rows of what was open before, and rows that were opened in this layer, with or without those it has finished.
                old = old_own * unfinished + old_later * (end - begin)
                new = new_own * (opened - (ends[:, 0] - begin)) + new_later * opened
                most = max(most, int((old + new).max()))
        return most * (stop - start)


def _slice(numbers: range) -> slice:
    return slice(numbers.start, numbers.stop)


def _cut(count: int, parts: int) -> list[range]:
    """Cut numbers into parts of nearly the same length."""
    if not 1 <= parts <= count:
        raise SizeError(f"{count} rows of patches cannot be cut into {parts} parts")
    ends = [math.floor(count * number / parts) for number in range(parts + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(ends)]
