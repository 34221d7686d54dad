"""In what order the patches of a grid are gathered, so that little of the sum is open at any time.

A sweep goes through a grid layer by layer along one axis, and through a layer row by row along a second. What lies before the
next layer or row on its axis is finished with the one at hand: so a row of a layer finishes the voxels that are finished on both
axes, whatever else is still open.

Most layers and rows are one patch deep. The last two patches of an axis often overlap by nearly their whole size, since the last
one ends where the volume does: joined to one layer, gathered row by row together, they keep less open.
"""

import bisect
import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ..errors import SizeError
from .boxes import Box
from .grids import AxisGrid, PatchGrid
from .sizes import Ints
from .weave import AxisWeave

__all__ = ["AxisSweep", "Column", "Place", "Sweep"]

Ends = tuple[int, int]
"""First voxel, and one past the last."""

Groups = tuple[range, ...]
"""Numbers of the patches of an axis, group by group."""

Place = tuple[int, int]
"""Numbers on the axis of the layers and on that of the rows: of groups of patches, or of intervals."""


@dataclass(frozen=True)
class AxisSweep:
    """What a sweep finishes along one axis, which is cut into intervals wherever a patch begins or ends.

    Example:
        >>> axis = AxisSweep.of(AxisGrid(start=0, stop=10, patch=5, stride=3), size=10, is_cropped=False)
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
    groups: Groups
    """Patches that are gathered together."""
    longest: int | None = None
    """What is longer than so many voxels is cut further; None not to."""

    @classmethod
    @functools.lru_cache(maxsize=64)
    def of(cls, grid: AxisGrid, size: int, is_cropped: bool, is_joined: bool = False) -> "AxisSweep":
        """Group the patches: each is a group of its own, or the last two may be joined to one."""
        alone = max(1, len(grid) - 2 * is_joined)
        groups = (*(range(number, number + 1) for number in range(alone)), range(alone, len(grid)))
        return cls(grid, size, is_cropped, tuple(filter(len, groups)))

    @cached_property
    def spans(self) -> list[Ends]:
        """Voxels of the volume that each patch adds to; a patch may be cropped to none."""
        if self.is_cropped:
            weave = AxisWeave(self.grid, None)
            spans = [weave.core(number) for number in range(len(self.grid))]
        else:
            spans = [(start, start + self.grid.patch) for start in self.grid]
        return [(min(max(0, start), self.size), max(0, min(stop, self.size))) for start, stop in spans]

    @cached_property
    def group_of(self) -> list[int]:
        """Number of the group of each patch."""
        return [number for number, group in enumerate(self.groups) for _ in group]

    @cached_property
    def _starts(self) -> list[int]:
        """First voxels of what is finished with each group, and the end of the last."""
        return [0, *(self.spans[group.start][0] for group in self.groups[1:]), self.size]

    @cached_property
    def _bounds(self) -> list[int]:
        bounds = sorted({0, self.size, *itertools.chain.from_iterable(self.spans)})
        if self.longest is None:
            return bounds
        parts = (_cut(range(*ends), -(-(ends[1] - ends[0]) // self.longest)) for ends in itertools.pairwise(bounds))
        return [*(part.start for part in itertools.chain.from_iterable(parts)), self.size]

    @cached_property
    def intervals(self) -> list[Ends]:
        """All intervals."""
        return list(itertools.pairwise(self._bounds))

    def adds_to(self, patch: int) -> range:
        """Numbers of the intervals that a patch adds to."""
        return range(*(bisect.bisect_left(self._bounds, end) for end in self.spans[patch]))

    def finished_with(self, group: int) -> range:
        """Numbers of the intervals that no later group adds to, but a later one than the group before."""
        return range(*(bisect.bisect_left(self._bounds, self._starts[end]) for end in (group, group + 1)))

    def ends(self, groups: range) -> Ends:
        """The voxels that are finished with some groups that follow one another."""
        return self._starts[groups.start], self._starts[groups.stop]

    def added_by(self, groups: range) -> range:
        """Numbers of the groups that add to what is finished with some groups that follow one another."""
        start, _ = self.ends(groups)
        before = range(groups.start)
        first = next((group for group in before if self.spans[self.groups[group].stop - 1][1] > start), groups.start)
        return range(first, groups.stop)

    def adds_to_any(self, groups: range) -> np.ndarray:
        """Whether each patch adds to what is finished with some groups that follow one another."""
        begin, end = self.ends(groups)
        return np.array([max(start, begin) < min(stop, end) for start, stop in self.spans])

    def states(self, groups: range) -> np.ndarray:
        """Say how far a sweep has come, as it goes through the groups that add to what some groups finish.

        Returns:
            A row for each group, once its patches have been added and before anything is finished with them. In voxels from the
            first that is finished with the groups: where what it finishes begins and ends, how far groups before it have
            reached, and how far it has reached. Of several groups that follow one another, of which each advances all four by
            the same, only the first and the last are there.
        """
        begin, end = self.ends(groups)
        rows = []
        reached = begin
        for group in self.added_by(groups):
            start, stop = self._starts[group], self._starts[group + 1]
            before = max(reached, start)
            reached = max(before, stop, self.spans[self.groups[group].stop - 1][1])
            rows.append((start, stop, before, reached))
        found = np.clip(rows, begin, end) - begin
        turns = (np.diff(found, 2, axis=0) != 0).any(1)
        return found[np.concatenate(([True], turns, [True]))] if len(found) > 1 else found


@dataclass(frozen=True)
class Column:
    """A part of the volume that is swept on its own: all of it along the axis of the sweep, some of it on the others."""

    rows: range
    """Numbers of the groups that it is finished with, along the axis of the rows."""
    thirds: range
    """The same along the third axis."""


@dataclass(frozen=True)
class Sweep:
    """The order in which patches are gathered.

    Args:
        grid: the patches.
        axes: the axis along which the sweep goes, that of the rows, and the third.
        steps: what is finished along these.

    Example:
        >>> grid = PatchGrid.cover((10, 20, 60), patch_size=10, patch_overlap=4)
        >>> sweep = Sweep.smallest(grid, is_cropped=False)
        >>> sweep.axes, sweep.open_voxels(sweep.whole)
        ((2, 1, 0), 1600)
    """

    grid: PatchGrid
    axes: Ints
    steps: tuple[AxisSweep, AxisSweep, AxisSweep]

    @classmethod
    def of(cls, grid: PatchGrid, is_cropped: bool, axes: Ints, joined: Sequence[bool] = (False, False)) -> "Sweep":
        """Make a sweep along some axes; the last two layers and the last two rows may be joined."""
        layers, rows, thirds = (
            AxisSweep.of(grid.axes[axis], grid.spatial_shape[axis], is_cropped, is_joined)
            for axis, is_joined in zip(axes, (*joined, False), strict=True)
        )
        return cls(grid, axes, (layers, rows, thirds))

    @classmethod
    @functools.lru_cache(maxsize=16)
    def smallest(cls, grid: PatchGrid, is_cropped: bool) -> "Sweep":
        """Choose the axes and groups for which least is open at a time; of those that are equal, the first.

        The grid alone decides, so that each voxel's sum has the same order however the volume is cut into columns.
        """
        options = itertools.product(itertools.permutations(range(len(grid.axes))), (False, True), (False, True))
        sweeps = [cls.of(grid, is_cropped, axes, joined) for axes, *joined in options]
        return min(sweeps, key=lambda sweep: sweep.open_voxels(sweep.whole))

    @property
    def is_cropped(self) -> bool:
        """Whether each voxel is taken from one patch alone."""
        return self.steps[0].is_cropped

    def scaled(self, grid: PatchGrid) -> "Sweep":
        """Make the same sweep through a grid of outputs of another scale."""
        layers, rows, thirds = (
            replace(step, grid=grid.axes[axis], size=grid.spatial_shape[axis])
            for step, axis in zip(self.steps, self.axes, strict=True)
        )
        return Sweep(grid, self.axes, (layers, rows, thirds))

    def cut(self, num_voxels: int) -> "Sweep":
        """Make the same sweep with cells of no more than so many voxels, as far as cutting rows can do it."""
        layers, rows, thirds = self.steps
        depth = max(stop - start for start, stop in layers.intervals)
        return replace(self, steps=(layers, replace(rows, longest=max(1, num_voxels // (depth * thirds.size))), thirds))

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.steps[0].groups)

    @property
    def whole(self) -> Column:
        """The whole volume as one column."""
        return Column(*(range(len(step.groups)) for step in self.steps[1:]))

    def split(self, rows: int, thirds: int) -> list[Column]:
        """Cut the volume into columns: so many along the second axis, and so many along the third.

        Rows of padding may finish no voxel; columns of such rows alone are left out.
        """
        whole = self.whole
        for groups, parts in ((whole.rows, rows), (whole.thirds, thirds)):
            if not 1 <= parts <= len(groups):
                raise SizeError(f"{len(groups)} rows of patches cannot be cut into {parts} parts")
        columns = itertools.starmap(Column, itertools.product(_cut(whole.rows, rows), _cut(whole.thirds, thirds)))
        return [column for column in columns if self.column_box(column).numel]

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

    def cell(self, place: Place, column: Column) -> Box:
        """Voxels of an interval of the first axis and one of the second, in a column."""
        layers, rows, thirds = self.steps
        return self.box(layers.intervals[place[0]], rows.intervals[place[1]], thirds.ends(column.thirds))

    def column_box(self, column: Column, layer: int | None = None) -> Box:
        """Voxels of a column, or those that are finished with one layer of it."""
        layers, rows, thirds = self.steps
        ends = (0, layers.size) if layer is None else layers.ends(range(layer, layer + 1))
        return self.box(ends, rows.ends(column.rows), thirds.ends(column.thirds))

    def span(self, numbers: Ints) -> Box:
        """Voxels of the volume that a patch adds to, by its numbers on the axes of the volume."""
        return self.box(*(step.spans[numbers[axis]] for step, axis in zip(self.steps, self.axes, strict=True)))

    def rows_of(self, column: Column) -> range:
        """Rows that add to a column."""
        return self.steps[1].added_by(column.rows)

    def place(self, numbers: Ints) -> Place:
        """Say in which layer and which row a patch is, by its numbers on the axes of the volume."""
        layers, rows, _ = self.steps
        return layers.group_of[numbers[self.axes[0]]], rows.group_of[numbers[self.axes[1]]]

    def patches(self, layer: int, column: Column, needed: np.ndarray | None = None) -> Iterator[Ints]:
        """Give the patches of a layer that add to a column, row by row, by their numbers on the axes of the volume.

        Args:
            layer: number of the layer.
            column: the column.
            needed: which patches of the grid are to be computed, by their numbers; None for all.
        """
        in_layers, in_rows, in_thirds = self._adding_to(column)
        layers, rows, _ = self.steps
        of_layer = [number for number in layers.groups[layer] if in_layers[number]]
        of_thirds = in_thirds.nonzero()[0].tolist()
        for row in self.rows_of(column):
            of_row = [number for number in rows.groups[row] if in_rows[number]]
            for each in itertools.product(of_layer, of_row, of_thirds):
                numbers = self.ordered(each)
                if needed is None or needed[numbers]:
                    yield numbers

    def num_patches(self, column: Column, needed: np.ndarray | None = None) -> list[int]:
        """Number of patches in each layer of a column."""
        layers, rows, thirds = self._adding_to(column)
        if needed is None:
            counts = layers * int(rows.sum() * thirds.sum())
        else:
            counts = (needed.transpose(self.axes) & layers[:, None, None] & rows[:, None] & thirds).sum((1, 2))
        return [int(counts[group.start : group.stop].sum()) for group in self.steps[0].groups]

    def _adding_to(self, column: Column) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Whether each patch adds to a column, as far as that is a matter of each axis."""
        layers, rows, thirds = self.steps
        every_layer = range(self.num_layers)
        return layers.adds_to_any(every_layer), rows.adds_to_any(column.rows), thirds.adds_to_any(column.thirds)

    def open_voxels(self, column: Column) -> int:
        """The most voxels that are open at a time while a column is swept."""
        layers, rows, thirds = self.steps
        own, own_end, before, reached = layers.states(range(self.num_layers)).T[:, :, None]
        row, _, _, row_reached = rows.states(column.rows).T
        start, stop = rows.ends(column.rows)
        # Planes that earlier layers reached are open all over, others as far as this layer has come. Of either, those that are
        # finished with this layer are finished as far as it has come. That is linear on each axis, so that ends are enough.
        opened = (before - own) * (stop - start) + (reached - before) * row_reached
        finished = (own_end - own) * row
        start, stop = thirds.ends(column.thirds)
        return int((opened - finished).max()) * (stop - start)


def _cut(numbers: range, parts: int) -> list[range]:
    """Cut numbers into parts of nearly the same length."""
    ends = [numbers.start + len(numbers) * number // parts for number in range(parts + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(ends)]
