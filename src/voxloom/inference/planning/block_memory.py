"""What a block of a prediction takes in memory, and into how many blocks a volume is cut for them to fit."""

import math
from collections.abc import Callable, Sequence

import torch

from ...aggregation.weights import KEPT_WEIGHTS
from ...core.geometry.interpolation import SpaceMap
from ...core.grid.traversal import AxisTraversal, Block, Traversal
from ...core.sizes import pretty_bytes
from ...errors import SizeError
from ...models.outputs import OutputSpec
from .plan import count_batches
from .results import ResultSpec
from .settings import Settings

__all__ = ["PIECE_BYTES", "batch_bytes", "best_split", "interpolation_bytes", "open_bytes", "reduced_bytes"]

# Finished sums that may wait for the writer beside all that is open, at most. Less would make small sums wait for one another.
WAITING_BYTES = 16 * 2**20
# Bytes of a result that are interpolated before they are written.
PIECE_BYTES = 8 * 2**20
# Threads that interpolate at a time.
INTERPOLATING = 2


def open_bytes(outputs: Sequence[OutputSpec], traversals: Sequence[Traversal], block: Block, is_partial: bool) -> int:
    """Bytes of the open sums of all outputs while a block is gathered, and of what waits to be reduced and written."""
    size = sum(
        traversal.open_voxels(block) * output.bytes_per_voxel(traversal.is_cropped, is_partial)
        for output, traversal in zip(outputs, traversals, strict=True)
    )
    return size + min(size // 8, WAITING_BYTES)


def reduced_bytes(
    outputs: Sequence[OutputSpec], traversals: Sequence[Traversal], results: Sequence[ResultSpec], is_partial: bool
) -> int:
    """Bytes of what is made of the sums that are finished together: the most that one tile comes to."""
    most = 0
    for number, (output, traversal) in enumerate(zip(outputs, traversals, strict=True)):
        tile = math.prod(max(stop - start for start, stop in part.intervals) for part in traversal.parts)
        made = [result for result in results if result.output == number]
        # Twice the result, as reduced and as it is stored.
        size = sum(2 * result.volume.shape[0] * result.volume.dtype.itemsize for result in made)
        size += output.bytes_per_voxel(traversal.is_cropped, is_partial) * any(result.needs_copy for result in made)
        most = max(most, tile * size)
    return most


def interpolation_bytes(
    outputs: Sequence[OutputSpec],
    traversals: Sequence[Traversal],
    maps: Sequence[SpaceMap],
    block: Block,
    is_partial: bool,
) -> int:
    """Bytes of the edges of tiles that are kept for those behind them, and of what is interpolated and written together."""
    total = 0
    for output, traversal, space in zip(outputs, traversals, maps, strict=True):
        sizes = [
            [stop - start for start, stop in part.intervals if stop > first and start < last]
            for part, (first, last) in zip(traversal.parts, _ends(traversal, block), strict=True)
        ]
        deepest, middle, inner = max(sizes[0]) + 1, sum(sizes[1]) + len(sizes[1]), sum(sizes[2]) + len(sizes[2])
        row = max(sizes[1]) + 1
        edges = (middle + row) * inner + 2 * deepest * (inner + row)
        total += (edges + INTERPOLATING * space.part_voxels) * output.bytes_per_voxel(traversal.is_cropped, is_partial)
    return total


def _ends(traversal: Traversal, block: Block) -> list[tuple[int, int]]:
    """First voxel of a block, and one past the last, on the outer, the middle and the inner axis."""
    box = traversal.block_box(block)
    return [(box.start[axis], box.stop[axis]) for axis in traversal.axes]


def batch_bytes(settings: Settings, channels: int, dtype: torch.dtype, outputs: Sequence[OutputSpec], num_models: int) -> int:
    """Bytes of batches on their way into a model, of its outputs, and of the weights of patches."""
    patch_size, batch_size, is_cropped = settings.patch_size, settings.batch_size, settings.window is None
    # One is read, one waits, one is in the model, and where it is used more than once, a copy of it.
    total = (3 + int(num_models > 1)) * batch_size * channels * math.prod(settings.input_size) * dtype.itemsize
    for each in outputs:
        voxels, held = math.prod(each.size(patch_size)), each.held_dtype(is_cropped)
        total += voxels * batch_size * each.channels * each.dtype.itemsize * each.copies
        total += voxels * (KEPT_WEIGHTS + 1) * held.itemsize
        if held != each.dtype:
            total += voxels * each.channels * held.itemsize  # a patch in the type of the sum
    return total


def best_split(
    traversal: Traversal,
    memory_of: Callable[[Block, int | None], int],
    limit: int | None,
    is_given: bool,
    batch_size: int,
    has_edges: bool = False,
) -> list[Block]:
    """Cut the volume into as many blocks as are needed for each to fit, such that the fewest passes are made.

    Args:
        traversal: goes through the volume.
        memory_of: bytes for a block under a limit, of which decoded chunks of the input have a share.
        limit: what they may be; None for any.
        is_given: whether the user said so.
        batch_size: patches of a batch.
        has_edges: whether blocks need those before them.

    Raises:
        SizeError: if no cut fits; says the least that would do.
    """
    whole = traversal.whole
    if limit is None or memory_of(whole, limit) <= limit:
        return [whole]
    best: tuple[int, list[Block]] | None = None

    def peak(middle: int, inner: int, limit: int) -> int:
        return _peak(traversal, traversal.split(middle, inner, has_edges), lambda block: memory_of(block, limit))

    _, middles, inners = (_counts_of_parts(part) for part in traversal.parts)
    for middle in middles:
        fitting = next((inner for inner in inners if peak(middle, inner, limit) <= limit), None)
        if fitting is not None:
            blocks = traversal.split(middle, fitting, has_edges)
            passes = count_batches(traversal, blocks, batch_size, None)
            if best is None or passes < best[0]:
                best = passes, blocks
            if fitting == 1:
                break  # more middle only cost more
    if best is None:
        least, finest = limit, (len(whole.middle), len(whole.inner))
        while (needed := peak(*finest, least)) > least:
            least = needed
        raise SizeError(
            f"{'memory_limit is' if is_given else 'the memory that is free comes to'} {pretty_bytes(limit)}, but at least"
            f" {pretty_bytes(least)} ({least} bytes) are needed: {'allow that, or ' if is_given else ''}use smaller patches, a"
            " smaller batch_size, or a reduction that keeps less"
        )
    return best[1]


def _peak(traversal: Traversal, blocks: Sequence[Block], memory_of: Callable[[Block], int]) -> int:
    """Give the memory for the largest of the blocks; only those that differ are looked at."""
    whole = traversal.whole
    kinds = {}
    for block in blocks:
        shape = traversal.block_box(block).shape
        ends = [
            (part.start == 0, part.stop == len(of)) for part, of in ((block.middle, whole.middle), (block.inner, whole.inner))
        ]
        kinds[shape, *ends] = block
    return max(map(memory_of, kinds.values()))


def _counts_of_parts(part: AxisTraversal) -> list[int]:
    """Numbers of parts that an axis can be cut into, such that each makes the longest of them shorter."""
    return sorted({len(part.cut(count)) for count in range(1, len(part.groups) + 1)})
