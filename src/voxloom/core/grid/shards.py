"""Cutting a volume into boxes of whole shards, each of which is computed on its own: arithmetic, and nothing is listed."""

import bisect
import math
from dataclasses import dataclass

from ..boxes import Box
from ..sizes import Ints
from .grids import PatchGrid

__all__ = ["ShardGrid"]

# Along each axis a box is at least so many patches long, if nothing else is said: the patches at its border are computed for its
# neighbour as well.
PATCHES_LONG = 4


@dataclass(frozen=True)
class ShardGrid:
    """Boxes of a volume, by their numbers: the last axis varies fastest.

    Example:
        >>> boxes = ShardGrid((100, 100, 40), (64, 64, 64))
        >>> len(boxes), boxes[1]
        (4, Box(start=(0, 64, 0), stop=(64, 100, 40)))
    """

    shape: Ints
    """Voxels of the volume."""
    size: Ints
    """Voxels of a box; the last one on each axis may have fewer."""

    @classmethod
    def of(cls, shape: Ints, shard: Ints, patch: Ints, scale: tuple[float, ...] = (1.0, 1.0, 1.0)) -> "ShardGrid":
        """Choose boxes of whole shards that are a few patches long.

        Args:
            shape: voxels of the result.
            shard: voxels that are written together.
            patch: voxels of a patch.
            scale: voxels of the result for one of the input, along each axis.
        """
        wanted = [PATCHES_LONG * size * factor for size, factor in zip(patch, scale, strict=True)]
        size = tuple(
            min(length, part * max(1, math.ceil(want / part))) for length, part, want in zip(shape, shard, wanted, strict=True)
        )
        return cls(shape, size)

    @property
    def counts(self) -> Ints:
        """Number of boxes along each axis."""
        return tuple(-(-length // size) for length, size in zip(self.shape, self.size, strict=True))

    def __len__(self) -> int:
        return math.prod(self.counts)

    def __getitem__(self, number: int) -> Box:
        if not 0 <= number < len(self):
            raise IndexError(number)
        place = []
        for count in reversed(self.counts):
            number, rest = divmod(number, count)
            place.append(rest)
        start = tuple(at * size for at, size in zip(reversed(place), self.size, strict=True))
        stop = tuple(min(at + size, length) for at, size, length in zip(start, self.size, self.shape, strict=True))
        return Box(start, stop)

    def computed_patches(self, grid: PatchGrid) -> int:
        """Number of patches that all boxes are gathered from, those counted again that several share.

        Args:
            grid: the patches, in the frame of the same volume.
        """
        return math.prod(
            sum(_touching(starts, axis.patch, at, min(at + size, length)) for at in range(0, length, size))
            for axis, starts, size, length in zip(grid.axes, self._starts(grid), self.size, self.shape, strict=True)
        )

    @staticmethod
    def _starts(grid: PatchGrid) -> list[list[int]]:
        return [list(axis) for axis in grid.axes]

    @property
    def middle(self) -> int:
        """Number of the box in the middle, which has neighbours wherever one has."""
        place = 0
        for count in self.counts:
            place = place * count + count // 2
        return place

    def halved(self, shard: Ints) -> "ShardGrid | None":
        """Give boxes of about half the size, of whole shards still; None if they are single shards.

        Example:
            >>> boxes = ShardGrid((100, 100, 40), (64, 32, 40))
            >>> boxes.halved((16, 16, 16)).size, ShardGrid((9, 9, 9), (4, 4, 4)).halved((4, 4, 4))
            ((32, 32, 40), None)
        """
        numbers = [-(-size // part) for size, part in zip(self.size, shard, strict=True)]
        longest = max(range(len(numbers)), key=numbers.__getitem__)
        if numbers[longest] == 1:
            return None
        sizes = list(self.size)
        sizes[longest] = -(-numbers[longest] // 2) * shard[longest]
        return ShardGrid(self.shape, tuple(sizes))


def _touching(starts: list[int], patch: int, start: int, stop: int) -> int:
    """Count the patches of an axis that hold one of some voxels."""
    return bisect.bisect_left(starts, stop) - bisect.bisect_right(starts, start - patch)
