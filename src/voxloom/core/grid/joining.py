"""Gathering the patches of a block in fewer steps, where each step of a traversal finishes few voxels.

To add a small patch to many small tiles takes longer than to add its voxels. So groups of patches are joined, within a block and
along the inner axis first. The patches keep their order, so that sums keep their bits.
"""

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from .traversal import AxisTraversal, Block, Step, Traversal

__all__ = ["Joining"]

# Voxels that a step finishes, about and at least; and as a part of the volume, of which little is to be open.
LEAST_VOXELS = 2**16
LEAST_PART = 1 / 64
# How many times as many a row of tiles may hold for the middle axis to be cut only where groups begin.
COARSE = 4


@dataclass(frozen=True)
class _Joined:
    """Groups of an axis, some of which are joined."""

    groups: tuple[range, ...]
    """Numbers of the groups that each is made of."""
    is_coarse: bool
    """Whether the axis is cut only where groups begin, rather than also where they end."""


@dataclass(frozen=True)
class Joining:
    """A block with its groups of patches joined.

    Example:
        >>> from voxloom.core.grid.grids import PatchGrid
        >>> traversal = Traversal.smallest(PatchGrid.cover((64, 64, 64), patch_size=8, patch_overlap=4), is_cropped=False)
        >>> joining = Joining.of(traversal, traversal.whole)
        >>> len(list(traversal.steps(0, traversal.whole))), len(list(joining.steps(traversal, 0)))
        (225, 4)
    """

    block: Block
    """The block, in the numbers of joined groups."""
    _parts: tuple[_Joined, _Joined] | None = None
    """Those of the middle and of the inner axis; None where all stay as they are."""

    @classmethod
    def of(cls, traversal: Traversal, block: Block) -> "Joining":
        """Join groups of a block by the voxels that are finished with them: those of the volume, whatever scale an output has."""
        outer, middle, inner = traversal.parts
        least = min(LEAST_VOXELS, LEAST_PART * math.prod(part.size for part in traversal.parts))
        depth, height = (part.size / len(part.groups) for part in (outer, middle))
        start, stop = inner.ends(block.inner)
        row = depth * height * (stop - start)
        if block.before != (0, 0) or not row:
            return cls(block)
        columns = _joined(inner, block.inner, least / (depth * height))
        # Rows are joined only if each is gathered at once: the order of the patches would be another one.
        is_one = len(columns) == 1 and inner.added_by(block.inner) == block.inner
        rows = _joined(middle, block.middle, least / row * height if is_one else 0)
        if len(columns) == len(block.inner) and len(rows) == len(block.middle) and row > COARSE * least:
            return cls(block)
        joined = Block(
            range(block.middle.start, block.middle.start + len(rows)), range(block.inner.start, block.inner.start + len(columns))
        )
        is_coarse = middle.is_coarse or row <= COARSE * least
        return cls(
            joined, (_Joined(_all(middle, block.middle, rows), is_coarse), _Joined(_all(inner, block.inner, columns), True))
        )

    def applied(self, traversal: Traversal) -> Traversal:
        """Join the groups of a traversal, be it that of the volume or that of an output of another scale."""
        if self._parts is None:
            return traversal
        outer, *others = traversal.parts
        middle, inner = itertools.starmap(_with, zip(others, self._parts, strict=True))
        return replace(traversal, parts=(outer, middle, inner))

    def steps(self, traversal: Traversal, outer: int) -> Iterator[tuple[Step, list[Step]]]:
        """Give the steps with a group of the outer axis, and those of the traversal itself that each is made of."""
        for step in self.applied(traversal).steps(outer, self.block):
            if self._parts is None:
                yield step, [step]
            else:
                middle, inner = (joined.groups[number] for joined, number in zip(self._parts, step[1:], strict=True))
                yield step, list(itertools.product((outer,), middle, inner))


def _joined(part: AxisTraversal, groups: range, apart: float) -> list[range]:
    """Join groups that follow one another, such that those begin so many voxels apart at least."""
    joined: list[range] = []
    for group in groups:
        if joined and part.ends(range(group, group + 1))[0] - part.ends(joined[-1])[0] < apart:
            joined[-1] = range(joined[-1].start, group + 1)
        else:
            joined.append(range(group, group + 1))
    return joined


def _all(part: AxisTraversal, groups: range, joined: list[range]) -> tuple[range, ...]:
    """Put groups that are joined in the place of those that they are made of, among all of an axis."""
    rest = (range(groups.start), range(groups.stop, len(part.groups)))
    before, behind = ([range(each, each + 1) for each in numbers] for numbers in rest)
    return (*before, *joined, *behind)


@functools.lru_cache(maxsize=64)
def _with(part: AxisTraversal, joined: _Joined) -> AxisTraversal:
    patches = (range(part.groups[each.start].start, part.groups[each.stop - 1].stop) for each in joined.groups)
    return replace(part, groups=tuple(patches), is_coarse=joined.is_coarse)
