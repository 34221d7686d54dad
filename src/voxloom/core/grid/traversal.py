"""In what order the patches of a grid are gathered, so that little of the sum is open at any time.

A traversal goes through a grid along three axes in nested order: outer, middle, inner. What lies before the next patches of an
axis is finished with those at hand: so a step finishes the voxels that are finished on all three axes, whatever else is open.

On the outer and the middle axis most groups of patches are one patch deep; they hold more where patches begin less than an eighth
of a patch apart, which would cut each into very many pieces. The last two groups of an axis often overlap by nearly their whole
size, since the last patch ends where the volume does: joined to one group, they keep less open. Groups on the inner axis begin
half a patch apart at least: shorter steps would keep little less open, and cut patches into many short pieces.
"""

import bisect
import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ...errors import SizeError
from ..boxes import Box
from ..sizes import Ints
from .blending import AxisWeights
from .grids import AxisGrid, PatchGrid

__all__ = ["AxisTraversal", "Block", "Step", "Tile", "Traversal"]

# Groups of the outer and the middle axis that begin within the length of a patch, at most.
MOST_STEPS = 8

Ends = tuple[int, int]
"""First voxel, and one past the last."""

Groups = tuple[range, ...]
"""Numbers of the patches of an axis, group by group."""

Step = tuple[int, int, int]
"""Numbers of a group of patches on the outer, the middle and the inner axis."""

Tile = tuple[int, int, int]
"""Numbers of an interval of voxels on the outer, the middle and the inner axis: its voxels are finished together."""


@dataclass(frozen=True)
class AxisTraversal:
    """What is finished along one axis, which is cut into intervals.

    Example:
        >>> axis = AxisTraversal.of(AxisGrid(start=0, stop=10, patch=5, stride=3), size=10, is_cropped=False)
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
    def of(cls, grid: AxisGrid, size: int, is_cropped: bool, is_joined: bool = False) -> "AxisTraversal":
        """Group the patches: each is a group of its own unless they are many, and the last two groups may be joined to one."""
        is_steep = len(grid) > MOST_STEPS and grid[MOST_STEPS] < grid[0] + grid.patch
        groups = _groups(grid, MOST_STEPS) if is_steep else [range(number, number + 1) for number in range(len(grid))]
        if is_joined and len(groups) > 1:
            groups[-2:] = [range(groups[-2].start, groups[-1].stop)]
        return cls(grid, size, is_cropped, tuple(groups), is_steep)

    @classmethod
    @functools.lru_cache(maxsize=64)
    def in_long_steps(cls, grid: AxisGrid, size: int, is_cropped: bool) -> "AxisTraversal":
        """Group the patches such that groups begin half a patch apart at least."""
        return cls(grid, size, is_cropped, tuple(_groups(grid, 2)), is_coarse=True)

    @cached_property
    def spans(self) -> list[Ends]:
        """Voxels of the volume that each patch adds to; a patch may be cropped to none."""
        if self.is_cropped:
            weights = AxisWeights(self.grid, None)
            spans = [weights.core(number) for number in range(len(self.grid))]
        else:
            spans = [(start, start + self.grid.patch) for start in self.grid]
        return [(min(max(0, start), self.size), max(0, min(stop, self.size))) for start, stop in spans]

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
            raise SizeError(f"{count} groups of patches cannot be cut into {parts} parts")

        def cut_to(longest: int) -> list[range]:
            ends = [0]
            while ends[-1] < count:
                ends.append(max(ends[-1] + 1, bisect.bisect_right(self._starts, self._starts[ends[-1]] + longest) - 1))
            return [range(start, stop) for start, stop in itertools.pairwise(ends)]

        lengths = range(self.size + 1)
        return cut_to(lengths[bisect.bisect_left(lengths, True, key=lambda longest: len(cut_to(longest)) <= parts)])

    def covering(self, start: int, stop: int) -> range:
        """Numbers of the groups that finish some voxels that follow one another, and of as few others as can be."""
        first = bisect.bisect_right(self._starts, start) - 1
        return range(min(first, len(self.groups) - 1), min(bisect.bisect_left(self._starts, stop), len(self.groups)))

    def added_by(self, groups: range) -> range:
        """Numbers of the groups that add to what is finished with some groups that follow one another."""
        start, _ = self.ends(groups)
        before = range(groups.start)
        first = next((group for group in before if self.spans[self.groups[group].stop - 1][1] > start), groups.start)
        return range(first, groups.stop)

    def before(self, group: int) -> int:
        """Number of the last group that finishes a voxel before those that a group finishes; its own where there is none."""
        return next((each for each in reversed(range(group)) if self._starts[each] < self._starts[group]), group)

    def adds_to_any(self, groups: range) -> np.ndarray:
        """Whether each patch adds to what is finished with some groups that follow one another."""
        begin, end = self.ends(groups)
        return np.array([max(start, begin) < min(stop, end) for start, stop in self.spans])

    def states(self, groups: range) -> np.ndarray:
        """Say how far a traversal has come, as it goes through the groups that add to what some groups finish.

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


def _groups(grid: AxisGrid, most: int) -> list[range]:
    """Group the patches of an axis such that so many groups at most begin within the length of a patch."""
    groups: list[range] = []
    for number, start in enumerate(grid):
        if groups and most * (start - grid[groups[-1].start]) < grid.patch:
            groups[-1] = range(groups[-1].start, number + 1)
        else:
            groups.append(range(number, number + 1))
    return groups


@dataclass(frozen=True)
class Block:
    """A part of the volume that is gathered on its own: all of it along the outer axis, some of it on the others."""

    middle: range
    """Numbers of the groups that it is gathered from, along the middle axis."""
    inner: range
    """The same along the inner axis."""
    before: tuple[int, int] = (0, 0)
    """How many of the first of these, along either axis, finish what belongs to the block before this one: it is gathered once
    more, because what lies between the two is interpolated from both."""

    @property
    def own(self) -> "Block":
        """What it is of the volume, without what belongs to others."""
        return Block(self.middle[self.before[0] :], self.inner[self.before[1] :])


@dataclass(frozen=True)
class Traversal:
    """The order in which patches are gathered.

    Args:
        grid: the patches.
        axes: numbers of the outer, the middle and the inner axis.
        parts: what is finished along these.

    Example:
        >>> grid = PatchGrid.cover((10, 20, 60), patch_size=10, patch_overlap=4)
        >>> traversal = Traversal.smallest(grid, is_cropped=False)
        >>> traversal.axes, traversal.open_voxels(traversal.whole)
        ((2, 1, 0), 1600)
    """

    grid: PatchGrid
    axes: Ints
    parts: tuple[AxisTraversal, AxisTraversal, AxisTraversal]

    @classmethod
    def of(cls, grid: PatchGrid, is_cropped: bool, axes: Ints, joined: Sequence[bool] = (False, False)) -> "Traversal":
        """Make a traversal along some axes; the last two groups of the outer and of the middle axis may be joined."""
        outer, middle, inner = ((grid.axes[axis], grid.spatial_shape[axis], is_cropped) for axis in axes)
        parts = (AxisTraversal.of(*each, is_joined) for each, is_joined in zip((outer, middle), joined, strict=True))
        return cls(grid, axes, (*parts, AxisTraversal.in_long_steps(*inner)))  # type: ignore[arg-type]

    @classmethod
    @functools.lru_cache(maxsize=16)
    def smallest(cls, grid: PatchGrid, is_cropped: bool) -> "Traversal":
        """Choose the axes and groups for which least is open at a time; of those that are equal, the first.

        The grid alone decides, so that each voxel's sum has the same order however the volume is cut into blocks.
        """
        options = itertools.product(itertools.permutations(range(len(grid.axes))), (False, True), (False, True))
        traversals = [cls.of(grid, is_cropped, axes, joined) for axes, *joined in options]
        return min(traversals, key=lambda traversal: traversal.open_voxels(traversal.whole))

    @property
    def outer(self) -> AxisTraversal:
        """What is finished along the outer axis."""
        return self.parts[0]

    @property
    def num_outer(self) -> int:
        """Number of groups of the outer axis: after each of them a slab of every block is finished."""
        return len(self.outer.groups)

    @property
    def is_cropped(self) -> bool:
        """Whether each voxel is taken from one patch alone."""
        return self.outer.is_cropped

    def scaled(self, grid: PatchGrid) -> "Traversal":
        """Make the same traversal of a grid of outputs of another scale."""
        outer, middle, inner = (
            replace(part, grid=grid.axes[axis], size=grid.spatial_shape[axis])
            for part, axis in zip(self.parts, self.axes, strict=True)
        )
        return Traversal(grid, self.axes, (outer, middle, inner))

    @property
    def whole(self) -> Block:
        """The whole volume as one block."""
        _, middle, inner = self.parts
        return Block(range(len(middle.groups)), range(len(inner.groups)))

    def split(self, middle: int, inner: int, has_edges: bool = False) -> list[Block]:
        """Cut the volume into blocks: so many at most along the middle axis, and so many along the inner.

        Groups of padding may finish no voxel; blocks of such groups alone are left out.

        Args:
            middle: blocks along the middle axis.
            inner: blocks along the inner axis.
            has_edges: let blocks also be gathered from the groups before them that finish the voxels next to them.
        """
        parts = itertools.product(self.parts[1].cut(middle), self.parts[2].cut(inner))
        found = [block for block in itertools.starmap(Block, parts) if self.block_box(block).numel]
        return [self.with_edges(block) for block in found] if has_edges else found

    def with_edges(self, block: Block) -> Block:
        """Let a block also be gathered from the groups before it that finish the voxels next to it."""
        middle, inner = self.parts[1].before(block.middle.start), self.parts[2].before(block.inner.start)
        before = (block.middle.start - middle, block.inner.start - inner)
        return Block(range(middle, block.middle.stop), range(inner, block.inner.stop), before)

    def ordered(self, values: Sequence[int]) -> Ints:
        """Put numbers of the three axes from the order of the traversal into that of the volume."""
        result = [0, 0, 0]
        for axis, value in zip(self.axes, values, strict=True):
            result[axis] = value
        return tuple(result)

    def box(self, *spans: Ends) -> Box:
        """Make a box of its ends on the outer, the middle and the inner axis."""
        starts, stops = zip(*spans, strict=True)
        return Box(self.ordered(starts), self.ordered(stops))

    def tile_box(self, tile: Tile) -> Box:
        """Voxels of a tile."""
        return self.box(*(part.intervals[number] for part, number in zip(self.parts, tile, strict=True)))

    def block_box(self, block: Block, outer: int | None = None) -> Box:
        """Voxels of a block, or those that are finished with one group of the outer axis."""
        parts = self.parts
        ends = (0, parts[0].size) if outer is None else parts[0].ends(range(outer, outer + 1))
        return self.box(ends, parts[1].ends(block.middle), parts[2].ends(block.inner))

    def span(self, numbers: Ints) -> Box:
        """Voxels of the volume that a patch adds to, by its numbers on the axes of the volume."""
        return self.box(*(part.spans[numbers[axis]] for part, axis in zip(self.parts, self.axes, strict=True)))

    def steps(self, outer: int, block: Block) -> Iterator[Step]:
        """Give the steps with a group of the outer axis that add to a block."""
        _, middle, inner = self.parts
        return itertools.product((outer,), middle.added_by(block.middle), inner.added_by(block.inner))

    def patches(self, step: Step, block: Block, needed: np.ndarray | None = None) -> Iterator[Ints]:
        """Give the patches of a step that add to a block, by their numbers on the axes of the volume.

        Args:
            step: the step.
            block: the block.
            needed: which patches of the grid are to be computed, by their numbers; None for all.
        """
        groups = (part.groups[group] for part, group in zip(self.parts, step, strict=True))
        adding = self._adding_to(block)
        chosen = ([number for number in group if adds[number]] for group, adds in zip(groups, adding, strict=True))
        for each in itertools.product(*chosen):
            numbers = self.ordered(each)
            if needed is None or needed[numbers]:
                yield numbers

    def patches_from(self, outer: int, block: Block, needed: np.ndarray | None = None, stop: int | None = None) -> Iterator[Ints]:
        """Give all patches of a block in order, from a group of the outer axis on, and up to another one; see `patches`."""
        for number in range(outer, self.num_outer if stop is None else stop):
            for step in self.steps(number, block):
                yield from self.patches(step, block, needed)

    def num_patches(self, block: Block, needed: np.ndarray | None = None) -> list[int]:
        """Number of patches of a block with each group of the outer axis."""
        outer, middle, inner = self._adding_to(block)
        if needed is None:
            counts = outer * int(middle.sum() * inner.sum())
        else:
            counts = (needed.transpose(self.axes) & outer[:, None, None] & middle[:, None] & inner).sum((1, 2))
        return [int(counts[group.start : group.stop].sum()) for group in self.outer.groups]

    def _adding_to(self, block: Block) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Whether each patch adds to a block, as far as that is a matter of each axis."""
        return _adding(self.parts, block)

    def open_voxels(self, block: Block) -> int:
        """The most voxels that are open at a time while a block is gathered."""
        outer, middle, inner = self.parts
        num_middle, num_inner = (stop - start for start, stop in (middle.ends(block.middle), inner.ends(block.inner)))
        own, own_end, before, reached = outer.states(range(self.num_outer)).T[:, :, None, None]
        row, row_end, row_before, row_reached = middle.states(block.middle).T[:, :, None]
        inner_own, _, _, inner_reached = inner.states(block.inner).T
        # What earlier groups of the outer or middle axis reached is open all over, the rest as far as this one has come; and what
        # is finished with this one is finished as far as it has come. That is linear on each axis, so that ends are enough.
        reached_area = row_before * num_inner + (row_reached - row_before) * inner_reached
        finished_area = row * num_inner + (row_end - row) * inner_own
        opened = (before - own) * num_middle * num_inner + (reached - before) * reached_area
        return int((opened - (own_end - own) * finished_area).max())


@functools.lru_cache(maxsize=16)
def _adding(parts: tuple[AxisTraversal, AxisTraversal, AxisTraversal], block: Block) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    outer, middle, inner = parts
    every = range(len(outer.groups))
    return outer.adds_to_any(every), middle.adds_to_any(block.middle), inner.adds_to_any(block.inner)
