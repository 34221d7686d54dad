"""What of a volume is open at which time, as a traversal goes through it."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .traversal import AxisTraversal, Block, Traversal

__all__ = ["Openness"]


@dataclass(frozen=True)
class Openness:
    """When each tile of a block is opened and finished, as if no patch were left out.

    Time is counted in steps: each gathers a group of patches of the outer, the middle and the inner axis.

    Example:
        >>> from voxloom.core.grid.grids import PatchGrid
        >>> traversal = Traversal.smallest(PatchGrid.cover((10, 20, 60), patch_size=10, patch_overlap=4), is_cropped=False)
        >>> found = Openness(traversal, traversal.whole)
        >>> found.num_steps, int(found.voxels.max()), int(found.voxels[-1])
        (27, 1600, 1200)
    """

    traversal: Traversal
    block: Block

    @cached_property
    def groups(self) -> tuple[range, range, range]:
        """Numbers of the groups that are gathered, along the outer, the middle and the inner axis."""
        outer, middle, inner = self.traversal.parts
        return range(len(outer.groups)), middle.added_by(self.block.middle), inner.added_by(self.block.inner)

    @property
    def num_steps(self) -> int:
        """Number of steps."""
        outer, middle, inner = map(len, self.groups)
        return outer * middle * inner

    @cached_property
    def ends(self) -> tuple[np.ndarray, np.ndarray]:
        """The steps that open each tile and that finish it, each of shape `(outer, middle, inner)`."""
        own = (self.groups[0], self.block.middle, self.block.inner)
        each = [_ends(part, groups, of) for part, groups, of in zip(self.traversal.parts, self.groups, own, strict=True)]
        _, middle, inner = map(len, self.groups)
        opened, finished = (
            np.add.outer(np.add.outer(outer * middle * inner, row * inner), last) for outer, row, last in zip(*each, strict=True)
        )
        return opened, finished

    @cached_property
    def voxels(self) -> np.ndarray:
        """Voxels that are open when the patches of each step have been added, before anything is finished with them."""
        _, lengths = self.tiles
        outer, middle, inner = lengths
        sizes = np.multiply.outer(np.multiply.outer(outer, middle), inner).ravel()
        changes = np.zeros(self.num_steps + 1, dtype=np.int64)
        opened, finished = self.ends
        np.add.at(changes, opened.ravel(), sizes)
        np.add.at(changes, finished.ravel() + 1, -sizes)
        return changes.cumsum()[:-1]

    @cached_property
    def tiles(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """First voxels of the tiles of the block along each axis, and their lengths."""
        own = (self.groups[0], self.block.middle, self.block.inner)
        spans = [
            np.array([part.intervals[number] for number in _numbers(part, of)], dtype=np.int64).reshape(-1, 2)
            for part, of in zip(self.traversal.parts, own, strict=True)
        ]
        return [each[:, 0] for each in spans], [each[:, 1] - each[:, 0] for each in spans]


def _numbers(part: AxisTraversal, groups: range) -> range:
    """Numbers of the intervals that are finished with some groups that follow one another."""
    return range(part.finished_with(groups.start).start, part.finished_with(groups.stop - 1).stop)


def _ends(part: AxisTraversal, gathered: range, own: range) -> tuple[np.ndarray, np.ndarray]:
    """Which of the groups that are gathered first adds to each interval of the block, and which finishes it."""
    numbers = _numbers(part, own)
    opened = np.full(len(numbers), len(gathered) - 1, dtype=np.int64)
    finished = np.zeros(len(numbers), dtype=np.int64)
    for place, group in reversed(list(enumerate(gathered))):
        for patch in part.groups[group]:
            added = part.adds_to(patch)
            opened[max(0, added.start - numbers.start) : max(0, added.stop - numbers.start)] = place
        done = part.finished_with(group)
        finished[max(0, done.start - numbers.start) : max(0, done.stop - numbers.start)] = place
    return opened, finished
