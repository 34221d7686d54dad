"""In what order the patches of a grid are gathered, so that little of the sum is open at any time.

A sweep goes through a grid layer by layer along one axis, through a layer row by row along a second, and through a row step by
step along the third. What lies before the next layer, row or step on its axis is finished with the one at hand: so a step
finishes the voxels that are finished on all three axes, whatever else is still open.

Most layers and rows are one patch deep. The last two patches of an axis often overlap by nearly their whole size, since the last
one ends where the volume does: joined to one layer, gathered row by row together, they keep less open. Steps along the third axis
are half a patch long at least: shorter ones would keep little less open, and cut each patch into many short pieces.
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

Place = tuple[int, int, int]
"""Numbers on the axes of layers, rows and steps: of groups of patches, or of intervals."""


@dataclass(frozen=True)
class AxisSweep:
    """What a sweep finishes along one axis, which is cut into intervals.

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
    is_coarse: bool = False
    """Whether the axis is cut only where groups begin, rather than also where they end."""

    @classmethod
    @functools.lru_cache(maxsize=64)
    def of(cls, grid: AxisGrid, size: int, is_cropped: bool, is_joined: bool = False) -> "AxisSweep":
        """Group the patches: each is a group of its own, or the last two may be joined to one."""
        alone = max(1, len(grid) - 2 * is_joined)
        groups = (*(range(number, number + 1) for number in range(alone)), range(alone, len(grid)))
        return cls(grid, size, is_cropped, tuple(filter(len, groups)))

    @classmethod
    @functools.lru_cache(maxsize=64)
    def in_long_steps(cls, grid: AxisGrid, size: int, is_cropped: bool) -> "AxisSweep":
        """Group the patches such that groups begin half a patch apart at least."""
        groups: list[range] = []
        for number, start in enumerate(grid):
            if groups and 2 * (start - grid[groups[-1].start]) < grid.patch:
                groups[-1] = range(groups[-1].start, number + 1)
            else:
                groups.append(range(number, number + 1))
        return cls(grid, size, is_cropped, tuple(groups), is_coarse=True)

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
        ends = () if self.is_coarse else (self.spans[group.stop - 1][1] for group in self.groups)
        return sorted({*self._starts, *ends})

    @cached_property
    def intervals(self) -> list[Ends]:
        """All intervals."""
        return list(itertools.pairwise(self._bounds))

    def adds_to(self, patch: int) -> range:
        """Numbers of the intervals that a patch adds to."""
        start, stop = self.spans[patch]
        return range(bisect.bisect_right(self._bounds, start) - 1, bisect.bisect_left(self._bounds, stop) if stop > start else 0)

    def finished_with(self, group: int) -> range:
        """Numbers of the intervals that no later group adds to, but a later one than the group before."""
        return range(*(bisect.bisect_left(self._bounds, self._starts[end]) for end in (group, group + 1)))

    def ends(self, groups: range) -> Ends:
        """The voxels that are finished with some groups that follow one another."""
        return self._starts[groups.start], self._starts[groups.stop]

    def cut(self, parts: int) -> list[range]:
        """Cut the groups into so many parts at most, such that the longest in voxels is as short as can be.

        Raises:
            SizeError: if there are fewer groups.
        """
        count = len(self.groups)
        if not 1 <= parts <= count:
            raise SizeError(f"{count} rows of patches cannot be cut into {parts} parts")

        def cut_to(longest: int) -> list[range]:
            ends = [0]
            while ends[-1] < count:
                ends.append(max(ends[-1] + 1, bisect.bisect_right(self._starts, self._starts[ends[-1]] + longest) - 1))
            return [range(start, stop) for start, stop in itertools.pairwise(ends)]

        lengths = range(self.size + 1)
        return cut_to(lengths[bisect.bisect_left(lengths, True, key=lambda longest: len(cut_to(longest)) <= parts)])

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
            first that is finished with the groups: where what it finishes begins and ends, how far the intervals reach that
            groups before it have added to, and those that it has added to. Of several groups that follow one another, of which
            each advances all four by the same, only the first and the last are there.
        """
        begin, end = self.ends(groups)
        rows = []
        reached = begin
        for group in self.added_by(groups):
            start, stop = self._starts[group], self._starts[group + 1]
            before = max(reached, start)
            reached = max(before, stop, self.spans[self.groups[group].stop - 1][1])
            reached = self._bounds[bisect.bisect_left(self._bounds, reached)]
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
        axes: those of the layers, of the rows, and of the steps through a row.
        parts: what is finished along these.

    Example:
        >>> grid = PatchGrid.cover((10, 20, 60), patch_size=10, patch_overlap=4)
        >>> sweep = Sweep.smallest(grid, is_cropped=False)
        >>> sweep.axes, sweep.open_voxels(sweep.whole)
        ((2, 1, 0), 1600)
    """

    grid: PatchGrid
    axes: Ints
    parts: tuple[AxisSweep, AxisSweep, AxisSweep]

    @classmethod
    def of(cls, grid: PatchGrid, is_cropped: bool, axes: Ints, joined: Sequence[bool] = (False, False)) -> "Sweep":
        """Make a sweep along some axes; the last two layers and the last two rows may be joined."""
        first, second, third = ((grid.axes[axis], grid.spatial_shape[axis], is_cropped) for axis in axes)
        layers, rows = (AxisSweep.of(*each, is_joined) for each, is_joined in zip((first, second), joined, strict=True))
        return cls(grid, axes, (layers, rows, AxisSweep.in_long_steps(*third)))

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
        return self.parts[0].is_cropped

    def scaled(self, grid: PatchGrid) -> "Sweep":
        """Make the same sweep through a grid of outputs of another scale."""
        layers, rows, thirds = (
            replace(part, grid=grid.axes[axis], size=grid.spatial_shape[axis])
            for part, axis in zip(self.parts, self.axes, strict=True)
        )
        return Sweep(grid, self.axes, (layers, rows, thirds))

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.parts[0].groups)

    @property
    def whole(self) -> Column:
        """The whole volume as one column."""
        return Column(*(range(len(part.groups)) for part in self.parts[1:]))

    def split(self, rows: int, thirds: int) -> list[Column]:
        """Cut the volume into columns: so many at most along the second axis, and so many along the third.

        Rows of padding may finish no voxel; columns of such rows alone are left out.
        """
        columns = itertools.starmap(Column, itertools.product(self.parts[1].cut(rows), self.parts[2].cut(thirds)))
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

    def cell(self, place: Place) -> Box:
        """Voxels of an interval of each axis."""
        return self.box(*(part.intervals[number] for part, number in zip(self.parts, place, strict=True)))

    def column_box(self, column: Column, layer: int | None = None) -> Box:
        """Voxels of a column, or those that are finished with one layer of it."""
        layers, rows, thirds = self.parts
        ends = (0, layers.size) if layer is None else layers.ends(range(layer, layer + 1))
        return self.box(ends, rows.ends(column.rows), thirds.ends(column.thirds))

    def span(self, numbers: Ints) -> Box:
        """Voxels of the volume that a patch adds to, by its numbers on the axes of the volume."""
        return self.box(*(part.spans[numbers[axis]] for part, axis in zip(self.parts, self.axes, strict=True)))

    def places(self, layer: int, column: Column) -> Iterator[Place]:
        """Give the steps of a layer that add to a column, row by row."""
        _, rows, thirds = self.parts
        return itertools.product((layer,), rows.added_by(column.rows), thirds.added_by(column.thirds))

    def place(self, numbers: Ints) -> Place:
        """Say in which layer, row and step a patch is, by its numbers on the axes of the volume."""
        layer, row, third = (part.group_of[numbers[axis]] for part, axis in zip(self.parts, self.axes, strict=True))
        return layer, row, third

    def patches(self, layer: int, column: Column, needed: np.ndarray | None = None) -> Iterator[Ints]:
        """Give the patches of a layer that add to a column, step by step, by their numbers on the axes of the volume.

        Args:
            layer: number of the layer.
            column: the column.
            needed: which patches of the grid are to be computed, by their numbers; None for all.
        """
        adding = self._adding_to(column)
        for place in self.places(layer, column):
            groups = (part.groups[group] for part, group in zip(self.parts, place, strict=True))
            chosen = ([number for number in group if adds[number]] for group, adds in zip(groups, adding, strict=True))
            for each in itertools.product(*chosen):
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
        return [int(counts[group.start : group.stop].sum()) for group in self.parts[0].groups]

    def _adding_to(self, column: Column) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Whether each patch adds to a column, as far as that is a matter of each axis."""
        layers, rows, thirds = self.parts
        every_layer = range(self.num_layers)
        return layers.adds_to_any(every_layer), rows.adds_to_any(column.rows), thirds.adds_to_any(column.thirds)

    def open_voxels(self, column: Column) -> int:
        """The most voxels that are open at a time while a column is swept."""
        layers, rows, thirds = self.parts
        num_rows, num_thirds = (stop - start for start, stop in (rows.ends(column.rows), thirds.ends(column.thirds)))
        own, own_end, before, reached = layers.states(range(self.num_layers)).T[:, :, None, None]
        row, row_end, row_before, row_reached = rows.states(column.rows).T[:, :, None]
        third, _, _, third_reached = thirds.states(column.thirds).T
        # What earlier layers or rows reached is open all over, the rest as far as this one has come; and what is finished with
        # this layer is finished as far as it has come. That is linear on each axis, so that ends are enough.
        reached_area = row_before * num_thirds + (row_reached - row_before) * third_reached
        finished_area = row * num_thirds + (row_end - row) * third
        opened = (before - own) * num_rows * num_thirds + (reached - before) * reached_area
        return int((opened - (own_end - own) * finished_area).max())
