"""Going through a volume box by box."""

import math
from collections.abc import Iterator, Sequence

from .boxes import Box
from .sizes import Ints

__all__ = ["walk"]


def walk(box: Box, chunks: Sequence[int], most: int) -> Iterator[Box]:
    """Cut a box into boxes of whole chunks, as many as are allowed, along as few axes as possible.

    Args:
        box: the box.
        chunks: voxels that are read together on each axis; chunks begin at index 0.
        most: voxels of a box at most, where a single chunk has not more.

    Example:
        >>> [part.shape for part in walk(Box((0, 0, 0), (4, 4, 10)), chunks=(4, 4, 1), most=64)]
        [(4, 4, 4), (4, 4, 4), (4, 4, 2)]
    """
    size = [min(chunk, length) for chunk, length in zip(chunks, box.shape, strict=True)]
    for axis in reversed(range(len(size))):
        whole, chunk = box.shape[axis], chunks[axis]
        fitting = most // max(1, math.prod(size) // max(1, size[axis]))
        size[axis] = whole if fitting >= whole else max(size[axis], fitting // chunk * chunk)
    yield from _cut(box, tuple(size), chunks, 0)


def _cut(box: Box, size: Ints, chunks: Sequence[int], axis: int) -> Iterator[Box]:
    if axis == box.ndim:
        yield box
        return
    start = box.start[axis]
    while start < box.stop[axis]:
        stop = min(box.stop[axis], start + size[axis])
        aligned = stop // chunks[axis] * chunks[axis]
        if start < aligned and stop < box.stop[axis]:
            stop = aligned
        part = Box((*box.start[:axis], start, *box.start[axis + 1 :]), (*box.stop[:axis], stop, *box.stop[axis + 1 :]))
        yield from _cut(part, size, chunks, axis + 1)
        start = stop
