"""What a prediction will do, and how much memory it will take: worked out before it begins."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ...core.geometry.affines import Affine
from ...core.geometry.interpolation import Interpolation, SpaceMap
from ...core.grid.grids import PatchGrid
from ...core.grid.joining import Joining
from ...core.grid.traversal import Block, Traversal
from ...core.grid.windows import Window
from ...core.sizes import Ints, pretty_bytes, pretty_sizes
from ...io.protocols import Json
from ...models.outputs import OutputSpec
from ...volumes.images.exchange import pictures
from .results import ResultSpec

__all__ = ["BASE_BYTES", "Batch", "Memory", "PredictionPlan", "count_batches"]

# What threads, buffers of files and the allocator take in addition; and gaps between blocks of memory, as a part of these.
BASE_BYTES = 32 * 2**20
GAPS = 1 / 16

Batch = tuple[Ints, ...]
"""Patches that the model is given at a time, by their numbers on the axes of the grid."""


@dataclass(frozen=True)
class Memory:
    """What is needed at a time, in bytes."""

    volume: int
    """The input, where it can only be read whole."""
    batches: int
    """Patches on their way into the model, and its outputs."""
    front: int
    """The sum of patches, as far as it is open, and what is being reduced and written."""
    results: int
    """What is kept in memory in the end."""
    chunks: int = 0
    """Chunks of the input that have been decoded, and are kept for the next patch."""
    loading: int = 0
    """What reading the whole input takes beside it, before there is anything else."""
    writing: int = 0
    """What a store takes while it writes, such as a shard that is encoded."""

    @property
    def peak(self) -> int:
        """All of it."""
        held = max(self.batches + self.chunks + self.front + self.results + self.writing, self.loading)
        return self.volume + held + int(GAPS * held) + BASE_BYTES


@dataclass(frozen=True, eq=False)
class PredictionPlan:
    """What `predict` will do: complete, so that it can be printed, pickled, and executed elsewhere.

    Example:
        >>> import torch, voxloom as vx
        >>> plan = vx.plan(torch.nn.Identity(), torch.zeros(1, 100, 100, 100), patch_size=64, batch_size=2)
        >>> plan.num_patches, plan.forward_passes, plan.num_blocks, plan.redundancy
        (27, 14, 1, 1.0)
    """

    name: str
    """What messages call the input."""
    grid: PatchGrid
    """The patches."""
    traversal: Traversal
    """In what order they are gathered."""
    blocks: tuple[Block, ...]
    """Blocks of output that are gathered one after the other; patches that touch several are computed for each."""
    needed: np.ndarray | None
    """Which patches are computed, by their numbers; None for all."""
    batch_size: int
    has_full_batches: bool
    """Whether the last batch of a block is filled up with copies, for a model that takes batches of one size only."""
    dtype: torch.dtype
    """Type of the batches."""
    window: Window | None
    """The weights of a patch along an axis; None to copy the centres."""
    fill: float
    """Value of voxels that are not computed."""
    num_models: int
    """How often a model is called for each batch: for each of an ensemble, and each way to mirror."""
    outputs: tuple[OutputSpec, ...]
    """What the model gives."""
    results: tuple[ResultSpec, ...]
    """What is made of it."""
    bytes_read: int
    bytes_written: int
    memory: Memory
    spooled_bytes: int = 0
    """Size of the temporary files that a compressed input is unpacked to, where it is too large for memory."""
    maps: tuple[SpaceMap, ...] | None = None
    """What the voxels of the results are interpolated from, for each output; None where they are those of the output."""
    context: Ints = (0, 0, 0)
    """Voxels around a patch that the model is given, and that it does not predict."""
    kinds: tuple[Interpolation, ...] = ()
    """How they are interpolated, along each axis of the output."""
    steps: tuple[str, ...] = ()
    """What was done to an image for the input, in words; none where a model is given the image as it is."""
    source_affine: Affine | None = None
    """RAS+, of the input."""
    is_joined: bool = False
    """Whether steps that finish few voxels are joined, which is quicker and takes more memory; the bits are the same."""
    trial_patches: int = 0
    """Patches that the model is given beforehand, to see what its outputs look like, and that are given once more."""

    @property
    def num_blocks(self) -> int:
        """Blocks of output, each gathered on its own from all patches that touch it."""
        return len(self.blocks)

    @cached_property
    def num_patches(self) -> int:
        """Patches that are computed at least once."""
        return sum(self.traversal.num_patches(self.traversal.whole, self.needed))

    @cached_property
    def computed_patches(self) -> int:
        """Patches that are computed, those counted again that are computed again."""
        return sum(sum(self.traversal.num_patches(block, self.needed)) for block in self.blocks)

    @property
    def given_patches(self) -> int:
        """Patches that each model is given, in all: those that are computed, a trial, and copies that fill up batches."""
        filled = count_batches(self.traversal, self.blocks, self.batch_size, self.needed) * self.batch_size
        return self.trial_patches + (filled if self.has_full_batches else self.computed_patches)

    @property
    def redundancy(self) -> float:
        """How many times a patch is computed, on average."""
        return self.computed_patches / max(1, self.num_patches)

    @property
    def forward_passes(self) -> int:
        """Calls of models."""
        batches = count_batches(self.traversal, self.blocks, self.batch_size, self.needed)
        return batches * self.num_models + (self.num_models if self.trial_patches else 0)

    @property
    def restart_passes(self) -> int:
        """Calls of models that are made again, at most, if a run is interrupted and resumed.

        That is if it ends when a slab is not recorded yet, the next one has been computed, and a patch of the one after that.
        """
        worst = 0
        counts = [self.traversal.num_patches(block, self.needed) for block in self.blocks]
        for number, own in enumerate(counts):
            firsts = [0, *itertools.accumulate(own)]
            following = counts[number + 1] if number + 1 < len(counts) else []
            for outer in range(self.traversal.num_outer):
                begin, stop = self.begin(outer), outer + 2
                last = min(firsts[min(stop, len(own))] + 1, firsts[-1])
                beyond = min(sum(following[: max(0, stop - len(own))]) + 1, sum(following)) if stop >= len(own) else 0
                passes = -(-last // self.batch_size) - firsts[begin] // self.batch_size - (-beyond // self.batch_size)
                worst = max(worst, passes)
        return worst * self.num_models

    @property
    def num_slabs(self) -> int:
        """Parts of the output that are finished one after the other: as many as steps along the outer axis, for each block."""
        return self.num_blocks * self.traversal.num_outer

    @property
    def peak_bytes(self) -> int:
        """Memory that is needed at most, beyond what the process has and what the model itself uses."""
        return self.memory.peak

    def plot(self, *, at: float = 0.5, output: Any = None) -> Any:
        """Draw how much of the sum is open while the prediction runs, and which voxels are finished and open at one moment.

        Args:
            at: that moment, from 0 for the beginning to 1 for the end.
            output: name of a picture to write, such as `"plan.png"`.

        Returns:
            Figure of matplotlib.

        Raises:
            MissingDependencyError: if matplotlib is not installed: `pip install voxloom[plot]`.

        Example:
            >>> import torch, voxloom as vx
            >>> plan = vx.plan(torch.nn.Identity(), torch.zeros(1, 100, 100, 100), patch_size=64)
            >>> len(plan.plot().axes)
            2
        """
        return pictures("plans").plot_plan(self, at, output)

    def _repr_html_(self) -> str:
        return str(pictures("plans").html_of_plan(self))

    def begin(self, outer: int) -> int:
        """Say with which group of the outer axis gathering begins, if all that is finished with one and later ones is wanted."""
        part = self.traversal.outer
        return part.added_by(range(outer if self.maps is None else part.before(outer), outer + 1)).start

    def __repr__(self) -> str:
        return str(self)

    @cached_property
    def traversals(self) -> tuple[Traversal, ...]:
        """The traversal in the frame of each output."""
        return tuple(
            self.traversal if set(output.scale) == {1} else self.traversal.scaled(self.grid.scaled(output.scale))
            for output in self.outputs
        )

    def joining(self, block: Block) -> Joining:
        """Say which steps of a block are joined."""
        return Joining.of(self.traversal, block) if self.is_joined else Joining(block)

    def batches(self, block: Block, outer: int = 0, stop: int | None = None) -> Iterator[tuple[Batch, int]]:
        """Give the batches of a block, which are the same wherever it begins.

        Args:
            block: the block.
            outer: group of the outer axis to begin with.
            stop: group to end before; None for all.

        Yields:
            A batch, and how many of its first patches belong to earlier groups.
        """
        before = sum(self.traversal.num_patches(block, self.needed)[:outer])
        whole, rest = divmod(before, self.batch_size)
        patches = itertools.islice(self.traversal.patches_from(0, block, self.needed, stop), whole * self.batch_size, None)
        while batch := tuple(itertools.islice(patches, self.batch_size)):
            yield batch, rest
            rest = 0

    def repeated_passes(self, slabs_done: int) -> int:
        """Calls of models, when a run is resumed at a slab, that had been made before."""
        number, outer = divmod(slabs_done, self.traversal.num_outer)
        if number >= self.num_blocks or not outer:
            return 0
        firsts = [0, *itertools.accumulate(self.traversal.num_patches(self.blocks[number], self.needed))]
        begin = self.begin(outer)
        return (-(-firsts[outer] // self.batch_size) - firsts[begin] // self.batch_size) * self.num_models

    def remaining_patches(self, slabs_done: int) -> int:
        """Number of patches that are computed from a slab to the end."""
        number, outer = divmod(slabs_done, self.traversal.num_outer)
        counts = [self.traversal.num_patches(block, self.needed) for block in self.blocks[number:]]
        begin = self.begin(outer) if outer else 0
        return sum(map(sum, counts)) - sum(counts[0][:begin]) if counts else 0

    @property
    def _groups(self) -> list[list[int]]:
        """Ends of the groups of patches along each axis of the traversal, which slabs and blocks are counted by."""
        return [[group.stop for group in part.groups] for part in self.traversal.parts]

    def has_groups_of(self, recorded: Json) -> bool:
        """Whether a run that was recorded groups the patches alike: those of another version may do otherwise."""
        return bool(recorded.get("groups") == self._groups)

    def to_json(self) -> Json:
        """Give what a run that resumes this one must do alike."""
        axes = [axis.to_json() for axis in self.grid.axes]
        return {
            "axes": axes,
            "traversal": list(self.traversal.axes),
            "blocks": [
                [part.middle.start, part.middle.stop, part.inner.start, part.inner.stop, *part.before] for part in self.blocks
            ],
            "slabs": self.num_slabs,
            "groups": self._groups,
            "batch_size": self.batch_size,
            "outputs": [
                [each.source, each.channels, str(each.dtype), [str(factor) for factor in each.scale], each.copies]
                for each in self.outputs
            ],
            "results": [
                [each.name, each.output, list(each.volume.shape), str(each.volume.dtype), each.volume.is_labels, each.needs_copy]
                for each in self.results
            ],
        }

    def _told_of_result(self) -> str:
        shape = self.results[0].volume.shape[1:]
        kinds = self.kinds[0] if len(set(self.kinds)) == 1 else ", ".join(self.kinds)
        return f"{pretty_sizes(shape)} voxels, of scores that are interpolated ({kinds})"

    def __str__(self) -> str:
        memory, grid = self.memory, self.grid
        skipped = grid.num_patches - self.num_patches
        some = f", {skipped} of which the mask leaves out" if skipped else ""
        around = f" with {pretty_sizes(self.context)} around them" if any(self.context) else ""
        times = "once" if self.redundancy == 1 else f"{self.redundancy:.3g} times on average"
        order = " then ".join("IJK"[axis] for axis in self.traversal.axes)
        parts = "one block" if self.num_blocks == 1 else f"{self.num_blocks} blocks"
        beside = f"; {self.trial_patches} patches to see what the output looks like" if self.trial_patches else ""
        copies = self.given_patches - self.trial_patches - self.computed_patches
        beside += f"; {copies} copies fill up batches" if copies else ""
        chunks = f", its chunks {pretty_bytes(memory.chunks)}" if memory.chunks else ""
        writing = f", writing {pretty_bytes(memory.writing)}" if memory.writing else ""
        loading = f" and {pretty_bytes(memory.loading)} while it is read" if memory.loading else ""
        image = {"image": "; ".join(self.steps)} if self.steps else {}
        plain = "" if self.steps else ", raw intensities, native grid"
        lines = image | {
            "volume": f"{pretty_sizes(grid.spatial_shape)} voxels{plain}",
            **({} if self.maps is None else {"result": self._told_of_result()}),
            "patches": f"{grid.num_patches} of {pretty_sizes(grid.patch_size)}{around}{some}, each computed {times}",
            "model": f"{self.forward_passes} forward passes of {self.batch_size} patches at most{beside}",
            "order": f"{parts}, along {order}; an interrupted run repeats at most {self.restart_passes} passes",
            "files": f"reads {pretty_bytes(self.bytes_read)}, writes {pretty_bytes(self.bytes_written)}",
            "memory": f"{pretty_bytes(memory.peak)} at most: input {pretty_bytes(memory.volume)}{loading}{chunks}, batches"
            f" {pretty_bytes(memory.batches)}, open sums {pretty_bytes(memory.front)}, results {pretty_bytes(memory.results)}"
            f"{writing}; what the model itself uses comes on top",
        }
        if self.spooled_bytes:
            lines["disk"] = f"{pretty_bytes(self.spooled_bytes)} for the unpacked input, in the folder for temporary files"
        return "\n".join(f"{name + ':':<9}{text}" for name, text in lines.items())


def count_batches(traversal: Traversal, blocks: Sequence[Block], batch_size: int, needed: np.ndarray | None) -> int:
    """Count the batches of some blocks; a batch never crosses from one block to the next."""
    return sum(-(-sum(traversal.num_patches(block, needed)) // batch_size) for block in blocks)
