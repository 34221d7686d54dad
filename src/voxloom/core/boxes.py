"""Half-open boxes of voxels on any number of axes."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from operator import le, sub
from typing import Self

from ..errors import SizeError
from .sizes import Ints

__all__ = ["Box"]


@dataclass(frozen=True, slots=True)
class Box:
    """The voxels with `start <= index < stop` on every axis.

    Example:
        >>> box = Box((0, 2), (4, 6))
        >>> box.shape, box.numel
        ((4, 4), 16)
        >>> box & Box((2, 0), (9, 3))
        Box(start=(2, 2), stop=(4, 3))
    """

    start: Ints
    """First index on each axis."""
    stop: Ints
    """One past the last index on each axis, never less than `start`."""

    def __post_init__(self) -> None:
        if len(self.start) != len(self.stop):
            raise SizeError(f"a box needs as many starts as stops, not {self.start} and {self.stop}")
        if not all(map(le, self.start, self.stop)):
            raise SizeError(f"a box must not stop before it starts: {self.start} to {self.stop}")

    @classmethod
    def of_shape(cls, shape: Iterable[int], start: Iterable[int] | None = None) -> Self:
        """Make the box of a shape that begins at `start`, or at the origin."""
        shape = tuple(shape)
        start = (0,) * len(shape) if start is None else tuple(start)
        return cls(start, tuple([first + size for first, size in zip(start, shape, strict=True)]))

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.start)

    @property
    def shape(self) -> Ints:
        """Voxels along each axis."""
        return tuple(map(sub, self.stop, self.start))

    @property
    def numel(self) -> int:
        """Number of voxels."""
        return math.prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """Slices that cut the box out of an array whose first voxel is the origin; only for boxes without negative indices."""
        if min(self.start, default=0) < 0:
            raise SizeError(f"the box {self.start} to {self.stop} reaches outside of the array: clip it first")
        return tuple(map(slice, self.start, self.stop))

    def __and__(self, other: "Box") -> "Box":
        """Voxels in both boxes; where there are none the result is empty."""
        if self.ndim != other.ndim:
            raise SizeError(f"boxes of {self.ndim} and of {other.ndim} axes have nothing in common")
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(max, start, map(min, self.stop, other.stop)))
        return Box(start, stop)

    def __contains__(self, other: object) -> bool:
        """Whether a box lies inside of this one."""
        return (
            isinstance(other, Box)
            and all(map(int.__le__, self.start, other.start))
            and all(map(int.__ge__, self.stop, other.stop))
        )

    def shift(self, offset: Iterable[int]) -> "Box":
        """Move the box by a number of voxels on each axis."""
        offset = tuple(offset)
        return Box(tuple(map(int.__add__, self.start, offset)), tuple(map(int.__add__, self.stop, offset)))

    def relative_to(self, origin: Ints) -> "Box":
        """Express the box in a frame whose first voxel is `origin`."""
        return Box(tuple(map(sub, self.start, origin)), tuple(map(sub, self.stop, origin)))
