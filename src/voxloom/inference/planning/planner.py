"""Working out a plan: which patches, in which order, and what fits into memory."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial

import torch

from ...core.geometry.affines import scaled
from ...core.geometry.interpolation import SpaceMap
from ...core.geometry.resampling import space_map
from ...core.grid.grids import PatchGrid
from ...core.grid.traversal import Block, Traversal
from ...core.grid.windows import sampled
from ...errors import RecordError, SizeError
from ...io.protocols import Json, VolumeSource, chunk_bytes, extent_of, loading_bytes
from ...io.spooling import Packed
from ...io.writing.words import BEGIN_AGAIN
from ...models.outputs import OutputSpec
from ...runtime.chunk_cache import CHUNKS
from ...runtime.limits import free_bytes
from ..destinations import Destinations
from .block_memory import PIECE_BYTES, batch_bytes, best_split, interpolation_bytes, open_bytes, reduced_bytes
from .plan import Memory, PredictionPlan, count_batches
from .results import ResultSpec, spec_of_result
from .settings import Input, Settings

__all__ = ["Planner"]

# Of the memory that is free, what a prediction takes at most if no limit is given.
USED_PART = 0.9
# What Linux maps around a page that is touched, before and behind.
MAPPED_AROUND = 2**17
# Files are not unpacked to the disk where they take less than this part of the memory that is free, and no limit is given.
SPOOLED_PART = 1 / 8
# Decoded chunks of the input take no more than this part of a limit that is given.
CHUNKS_PART = 4


class Planner:
    """Plans predictions.

    Args:
        settings: how the model is applied.
        num_models: how often it is called for each batch.
        kept_bytes: tells how much memory is kept for the next prediction, and is as good as free.
    """

    def __init__(self, settings: Settings, num_models: int, kept_bytes: Callable[[], int] = lambda: 0) -> None:
        self._settings, self._num_models, self._kept_bytes = settings, num_models, kept_bytes

    def input(self, source: VolumeSource, name: str, dtype: torch.dtype) -> Input:
        """Say what is to be known of a source before it is read."""
        packed = source.packed_bytes if isinstance(source, Packed) else 0
        limit, is_given = self._limit()
        may_be_spooled = is_given or (limit is not None and packed > SPOOLED_PART * limit)
        return Input(source, name, dtype, source.resident_bytes, packed if may_be_spooled else 0)

    def traversal(self, grid: PatchGrid) -> Traversal:
        """Say in what order patches are gathered."""
        return Traversal.smallest(grid, self._settings.window is None)

    def plan(
        self,
        given: Input,
        outputs: Sequence[OutputSpec],
        results: Sequence[ResultSpec],
        destinations: Destinations,
        blocks: Sequence[Block] | None = None,
    ) -> PredictionPlan:
        """Plan a prediction: find blocks that fit, unless they are given.

        Args:
            given: the input.
            outputs: what the model gives.
            results: what is made of it.
            destinations: where the results go.
            blocks: those of a run that is resumed.

        Raises:
            SizeError: if nothing fits; says the least that would do.
        """
        settings, source = self._settings, given.source
        grid = settings.grid_of(source.shape[1:])
        traversal = self.traversal(grid)
        window = settings.window
        plan = PredictionPlan(
            name=given.name,
            grid=grid,
            traversal=traversal,
            blocks=(traversal.whole,),
            needed=given.needed,
            batch_size=settings.batch_size,
            has_full_batches=settings.full_batches,
            dtype=given.dtype,
            window=None
            if window is None
            else sampled(window, [{each.size(settings.patch_size)[axis] for each in outputs} for axis in range(3)]),
            fill=settings.fill,
            num_models=self._num_models,
            outputs=tuple(outputs),
            results=tuple(results),
            bytes_read=0,
            bytes_written=sum(result.volume.num_bytes for result in results if not destinations.is_memory(result.name)),
            memory=Memory(0, 0, 0, 0),
            maps=self._maps(given, outputs, traversal.grid),
            kinds=given.kinds,
            steps=given.steps,
            context=settings.context,
            source_affine=source.affine,
        )
        kept = sum(result.volume.num_bytes for result in results if destinations.is_memory(result.name))
        writing = max(map(destinations.writing_bytes, results), default=0)  # one store after the other

        def memory_of(block: Block, limit: int | None, spooled_bytes: int, plan: PredictionPlan = plan) -> Memory:
            return replace(self._memory(given, plan, block, kept, limit, spooled_bytes), writing=writing)

        chosen, spooled_bytes = self._blocks(given, plan, memory_of, blocks)
        limit, _ = self._limit()

        def worst_of(plan: PredictionPlan) -> Memory:
            return max((memory_of(block, limit, spooled_bytes, plan) for block in chosen), key=lambda memory: memory.peak)

        # Blocks are chosen as if no steps were joined: that must not cost passes.
        joined = replace(plan, is_joined=True)
        worst = worst_of(joined)
        if limit is None or worst.peak <= limit:
            plan = joined
        else:
            worst = worst_of(plan)
        plan = replace(plan, blocks=tuple(chosen), memory=worst, spooled_bytes=spooled_bytes)
        loaded = given.resident_bytes - spooled_bytes
        patch_bytes = math.prod(settings.input_size) * source.shape[0] * source.dtype.itemsize
        return replace(plan, bytes_read=loaded if loaded > 0 else given.resident_bytes + patch_bytes * plan.computed_patches)

    def memory_of(self, given: Input, plan: PredictionPlan, block: Block) -> Memory:
        """Say what a block takes that is none of a plan's, such as a part that is computed on its own."""
        limit, _ = self._limit()
        memory = self._memory(given, plan, block, plan.memory.results, limit, plan.spooled_bytes)
        return replace(memory, writing=plan.memory.writing)

    def restored(self, recorded: Json, given: Input, destinations: Destinations, where: str) -> PredictionPlan:
        """Make the plan of a run that was recorded; today's memory does not matter to it.

        Raises:
            RecordError: if it is not a plan for this input.
        """
        try:
            blocks = [Block(range(*each[:2]), range(*each[2:4]), (each[4], each[5])) for each in recorded["blocks"]]
            outputs = [
                OutputSpec(source, channels, _as_dtype(dtype), tuple(map(Fraction, scale)), copies)
                for source, channels, dtype, scale, copies in recorded["outputs"]
            ]
            grid = self._settings.grid_of(given.source.shape[1:])
            results = [
                ResultSpec(
                    name,
                    output,
                    spec_of_result(given.source, outputs[output].scale, tuple(shape), _as_dtype(dtype), is_labels, given.like),
                    needs_copy,
                )
                for name, output, shape, dtype, is_labels, needs_copy in recorded["results"]
            ]
            for result in results:
                if given.like is None and result.volume.shape[1:] != grid.scaled(outputs[result.output].scale).spatial_shape:
                    raise ValueError
            traversal = self.traversal(grid)
            num_voxels = sum(traversal.block_box(block.own).numel for block in blocks)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise RecordError(f"the plan that {where} records is damaged: {BEGIN_AGAIN}") from error
        if num_voxels != math.prod(grid.spatial_shape) or list(traversal.axes) != recorded.get("traversal"):
            raise RecordError(f"the plan that {where} records does not fit {given.name}: {BEGIN_AGAIN}")
        return self.plan(given, outputs, results, destinations, blocks)

    def _blocks(
        self,
        given: Input,
        plan: PredictionPlan,
        memory_of: Callable[[Block, int | None, int], Memory],
        chosen: Sequence[Block] | None,
    ) -> tuple[Sequence[Block], int]:
        """Find blocks that fit, unless they are given, and how many bytes of the input are unpacked to files for that.

        Files are unpacked if otherwise nothing fits, or more passes were needed.
        """
        limit, is_given = self._limit()
        batch_size, packed = self._settings.batch_size, given.packed_bytes

        def peak(block: Block, limit: int | None = limit, spooled_bytes: int = 0) -> int:
            return memory_of(block, limit, spooled_bytes).peak

        def split(spooled_bytes: int) -> Sequence[Block]:
            memory = partial(peak, spooled_bytes=spooled_bytes)
            return best_split(plan.traversal, memory, limit, is_given, batch_size, has_edges=plan.maps is not None)

        if chosen is not None:
            fits = limit is None or max(map(peak, chosen)) <= limit
            return chosen, packed if given.unpacked is not None or not fits else 0
        if not packed or given.unpacked is not None:
            return split(packed), packed
        try:
            blocks = split(0)
        except SizeError:
            return split(packed), packed
        if len(blocks) > 1:
            others = split(packed)
            counts = [count_batches(plan.traversal, each, batch_size, plan.needed) for each in (blocks, others)]
            if counts[1] < counts[0]:
                return others, packed
        return blocks, 0

    def _memory(
        self, given: Input, plan: PredictionPlan, block: Block, kept: int, limit: int | None, spooled_bytes: int
    ) -> Memory:
        batches = batch_bytes(self._settings, given.source.shape[0], given.dtype, plan.outputs, self._num_models)
        is_partial = given.needed is not None
        joining = plan.joining(block)
        sums = (plan.outputs, list(map(joining.applied, plan.traversals)))
        front = open_bytes(*sums, joining.block, is_partial)
        if plan.maps is None:
            front += reduced_bytes(*sums, plan.results, is_partial)
        else:
            front += interpolation_bytes(*sums, plan.maps, joining.block, is_partial)
            front += 2 * max(min(PIECE_BYTES, result.volume.num_bytes) for result in plan.results)
        volume = given.resident_bytes - spooled_bytes
        if given.source.paths and not volume:
            batches += self._bytes_mapped(given.source)
        loading = loading_bytes(given.source, is_unpacked=spooled_bytes > 0) if volume else 0
        return Memory(volume, batches, front, kept, self._chunks_kept(given, limit), loading)

    def _chunks_kept(self, given: Input, limit: int | None) -> int:
        """Say how much memory decoded chunks of the input may take."""
        is_given = self._settings.memory_limit is not None
        most = min(CHUNKS.limit, chunk_bytes(given.source))
        return min(most, limit // CHUNKS_PART) if is_given and limit is not None else most

    def _maps(self, given: Input, outputs: Sequence[OutputSpec], grid: PatchGrid) -> tuple[SpaceMap, ...] | None:
        """Say what results on another grid are interpolated from, for each output."""
        like = given.like
        if like is None:
            return None
        maps = []
        for output in outputs:
            scale = tuple(map(float, output.scale))
            affine = scaled(given.source.affine, scale)
            shape = grid.scaled(output.scale).spatial_shape
            # In voxels of the output, as those of the input are scaled.
            extent = [
                ((first + 0.5) * factor - 0.5, (last + 0.5) * factor - 0.5)
                for (first, last), factor in zip(extent_of(given.source), scale, strict=True)
            ]
            maps.append(space_map(shape, affine, like.shape, like.affine, given.kinds, extent))
        return tuple(maps)

    def _limit(self) -> tuple[int | None, bool]:
        """Give how much memory may be used, and whether the user said so."""
        if self._settings.memory_limit is not None:
            return self._settings.memory_limit, True
        free = free_bytes()
        return None if free is None else int((free + self._kept_bytes()) * USED_PART), False

    def _bytes_mapped(self, source: VolumeSource) -> int:
        """Memory for the part of a file that is mapped while a patch is read: whole rows, and what is mapped around them."""
        patch = self._settings.input_size
        line, planes = source.shape[1] * source.dtype.itemsize, min(source.shape[3], patch[2])
        # Of each plane the rows of the patch; or, where planes are small, all of it.
        in_parts = planes * (line * min(source.shape[2], patch[1]) + MAPPED_AROUND)
        return source.shape[0] * min(in_parts, planes * line * source.shape[2] + MAPPED_AROUND)


def _as_dtype(name: str) -> torch.dtype:
    found = getattr(torch, name.removeprefix("torch."))
    if not isinstance(found, torch.dtype):
        raise TypeError(f"{name} is no type")
    return found
