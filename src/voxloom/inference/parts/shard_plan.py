"""Cutting a prediction into parts: which patches each is gathered from."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from ...core.boxes import Box
from ...core.geometry.affines import scaled
from ...core.grid.shards import ShardGrid
from ...core.grid.traversal import Block
from ...core.sizes import pretty_bytes
from ...errors import SizeError
from ..planning.plan import Memory, PredictionPlan

__all__ = ["Shard", "ShardPlan", "as_share"]


@dataclass(frozen=True)
class Shard:
    """A part of a result, and what it is gathered from."""

    box: Box
    """Voxels of the result."""
    block: Block
    """Groups of patches along the middle and the inner axis."""
    outer: range
    """Groups of patches along the outer axis."""


@dataclass(frozen=True, eq=False)
class ShardPlan:
    """What a prediction is in parts, a pure function of its plan: whoever computes a part gets the same.

    Args:
        plan: the prediction.
        boxes: the parts of its results.

    Example:
        >>> import torch, voxloom as vx
        >>> from voxloom.core.grid.shards import ShardGrid
        >>> from voxloom.inference import ShardPlan
        >>> plan = vx.plan(torch.nn.Identity(), torch.zeros(1, 128, 128, 128), patch_size=32, patch_overlap=0.5)
        >>> parts = ShardPlan(plan, ShardGrid((128, 128, 128), (64, 64, 64)))
        >>> len(parts), parts.num_patches(0), round(parts.redundancy, 2)
        (8, 64, 1.49)
    """

    plan: PredictionPlan
    boxes: ShardGrid

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, number: int) -> Shard:
        box = self.boxes[number]
        traversal = self.plan.traversals[0]
        inside = box if self.plan.maps is None else self._support(box)
        spans = [(inside.start[axis], inside.stop[axis]) for axis in traversal.axes]
        outer, middle, inner = (part.covering(*span) for part, span in zip(traversal.parts, spans, strict=True))
        return Shard(box, self._block(middle, inner), outer)

    def _support(self, box: Box) -> Box:
        """Give the voxels of the output that those of a box on another grid are interpolated from, and a voxel around them."""
        output, result = self.plan.outputs[0], self.plan.results[0].volume
        assert self.plan.source_affine is not None
        to_output = np.linalg.inv(scaled(self.plan.source_affine, tuple(map(float, output.scale)))) @ result.affine
        ends = [(start - 1, stop) for start, stop in zip(box.start, box.stop, strict=True)]
        corners = np.array(np.meshgrid(*ends, indexing="ij")).reshape(3, -1).T @ to_output[:3, :3].T + to_output[:3, 3]
        shape = self.plan.traversals[0].grid.spatial_shape
        low, high = np.floor(corners.min(0)).astype(int) - 1, np.ceil(corners.max(0)).astype(int) + 2
        start = tuple(min(max(0, int(first)), size - 1) for first, size in zip(low, shape, strict=True))
        stop = tuple(max(first + 1, min(int(last), size)) for first, last, size in zip(start, high, shape, strict=True))
        return Box(start, stop)

    def num_patches(self, number: int) -> int:
        """Number of patches that a part is gathered from."""
        shard = self[number]
        counts = self.plan.traversal.num_patches(shard.block, self.plan.needed)
        return sum(counts[self.begin(shard) : shard.outer.stop])

    def begin(self, shard: Shard) -> int:
        """Say with which group of the outer axis gathering a part begins."""
        return self.plan.begin(shard.outer.start) if shard.outer.start else 0

    @property
    def redundancy(self) -> float:
        """How many times a patch is computed, on average, if no mask leaves any out and results are on the input's grid."""
        plan = self.plan
        return self.boxes.computed_patches(plan.traversals[0].grid) / max(1, plan.grid.num_patches)

    def of(self, shard: Shard, memory_of: Callable[[Block], Memory], limit: int | None) -> Iterator[PredictionPlan]:
        """Give the plans for a part, one after the other: one, or several if it takes more memory than it may.

        The slabs of each are those of its only block.

        Args:
            shard: the part.
            memory_of: says what a block takes.
            limit: bytes that it may take; None for as many as it does.

        Raises:
            SizeError: if a block that cannot be divided takes more.
        """
        memory = memory_of(shard.block)
        if limit is None or memory.peak <= limit:
            yield replace(self.plan, blocks=(shard.block,), memory=memory)
            return
        own = shard.block.own
        middle, inner = len(own.middle), len(own.inner)
        if max(middle, inner) == 1:
            raise SizeError(
                f"memory_limit is {pretty_bytes(limit)}, but {pretty_bytes(memory.peak)} ({memory.peak} bytes) are needed: allow"
                " that, or use smaller patches, a smaller batch_size, or a reduction"
            )
        for half in (slice(None, (middle + 1) // 2), slice((middle + 1) // 2, None)) if middle >= inner else ():
            yield from self.of(replace(shard, block=self._block(own.middle[half], own.inner)), memory_of, limit)
        for half in (slice(None, (inner + 1) // 2), slice((inner + 1) // 2, None)) if middle < inner else ():
            yield from self.of(replace(shard, block=self._block(own.middle, own.inner[half])), memory_of, limit)

    def _block(self, middle: range, inner: range) -> Block:
        block = Block(middle, inner)
        return block if self.plan.maps is None else self.plan.traversals[0].with_edges(block)


def as_share(given: object) -> tuple[int, int]:
    """Read a share of several, `"3/8"`, of which the first is 0.

    Raises:
        SizeError: if it is none.
    """
    number, slash, count = str(given).partition("/")
    if not slash or not number.isdecimal() or not count.isdecimal() or int(number) >= int(count):
        raise SizeError(f"the share is {given!r}: it must be I/N, with I from 0 to N - 1, such as 0/8")
    return int(number), int(count)
