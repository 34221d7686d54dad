"""Working out a plan: what the model's outputs look like, what they are reduced to, and what fits into memory."""

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..core.memory import pretty_bytes
from ..core.sweeps import Column, Sweep
from ..core.values import can_hold
from ..errors import OutputError, SizeError
from ..sampling.padded import Voxels
from ..volumes.formats import SpaceCodes
from ..volumes.image import Image
from ..volumes.space import Affine, scaled
from .guards import exported_for_others
from .limits import free_bytes
from .masks import looks_at_volumes, needed_patches
from .models import Models
from .options import Options
from .outputs import Form, Name, Result, Stream, called
from .plans import (
    Memory,
    PredictionPlan,
    ResultForm,
    SumForm,
    batch_bytes,
    best_split,
    open_bytes,
    passes_of,
    reduced_bytes,
    repeated_passes,
)
from .reductions import Function
from .sinks import VolumeForm
from .spooling import can_be_spooled, spooled

__all__ = ["Job", "Planner", "of_name"]

# Of the memory that is free, what a prediction takes at most if no limit is given.
USED_PART = 0.9


_Setting = tuple[int, torch.dtype, torch.device]


@dataclass
class Job:
    """Everything about one prediction that is known before it begins."""

    volumes: dict[str, Voxels]
    name: str
    """What messages call the input."""
    affine: Affine
    codes: SpaceCodes
    sweep: Sweep
    needed: np.ndarray | None
    """Which patches are computed, by their numbers; None for all."""
    streams: list[Stream]
    sums: list[SumForm]
    results: list[tuple[Result, ResultForm]]
    output: Any
    bytes_to_load: dict[str, int]
    """Memory that each image takes because it cannot be read in parts."""
    unpacked: dict[str, Voxels] | None = None
    """The volumes with temporary files in place of the compressed ones, if these have been unpacked already."""

    def volume_form(self, form: ResultForm) -> VolumeForm:
        """Say what a result will be as a volume."""
        affine = scaled(self.affine, tuple(map(float, form.scale)))
        return VolumeForm(form.shape, form.dtype, affine, self.codes, form.is_labels)


class Planner:
    """Plans predictions of one model; what is known of its outputs is kept from one to the next.

    Args:
        models: the model.
        options: how it is applied.
        kept_bytes: tells how much memory is kept for the next prediction, and is as good as free.
    """

    def __init__(self, models: Models, options: Options, kept_bytes: Callable[[], int] = lambda: 0) -> None:
        self._models, self._options, self._kept_bytes = models, options, kept_bytes
        # By what the model was given, and where and in what type it ran.
        self._outputs: dict[_Setting, list[Name]] = {}
        self._forms: dict[tuple[_Setting, Stream], Form] = {}

    def job(self, volumes: dict[str, Voxels], name: str, mask: Any, output: Any, stack: contextlib.ExitStack) -> Job:
        """Plan the prediction of some volumes, whose channels lie one after the other.

        If that takes unpacking a file, the temporary one stays until the stack is closed.
        """
        first = next(iter(volumes.values()))
        affine, codes = (first.affine, first.codes) if isinstance(first, Image) else (np.eye(4), SpaceCodes())
        grid = self._options.grid_of(first.spatial_shape)
        sweep = Sweep.smallest(grid, self._options.window is None)
        channels = sum(volume.num_channels for volume in volumes.values())
        setting = (channels, self._models.dtype, self._models.device)
        streams, results = self._look_at(setting, name, output)
        sums = [self._sum(stream, self._forms[setting, stream], sweep) for stream in streams]
        forms = [(result, self._result_form(result, results, sums)) for result in results]
        to_load = {key: 0 if volume.can_be_sliced else volume.memory for key, volume in _images_of(volumes).items()}
        job = Job(volumes, name, affine, codes, sweep, None, streams, sums, forms, output, to_load)
        if mask is not None:
            if looks_at_volumes(mask) and self._columns(job)[1]:
                job.unpacked = stack.enter_context(spooled(volumes))
            job.needed = needed_patches(mask, job.unpacked or volumes, affine, grid)
        return job

    def _look_at(self, setting: _Setting, name: str, output: Any) -> tuple[list[Stream], list[Result]]:
        """Find the sums and the results, and by a trial what the outputs look like, if that is not known yet."""
        options = self._options
        if setting in self._outputs:
            streams, results = options.wanted.resolve(self._outputs[setting], output)
            if all((setting, stream) in self._forms for stream in streams):
                return streams, results
        batch = torch.zeros((options.batch_size, setting[0], *options.patch_size), dtype=self._models.dtype)
        with self._models.ready():
            try:
                outputs = self._models.trial(batch)
            except SizeError:
                raise
            except Exception as error:
                if isinstance(error, AssertionError) and str(error).startswith("Guard failed"):  # so exported programs refuse
                    raise exported_for_others(batch, str(error).splitlines()[0]) from error
                error.add_note(
                    f"The model was called with zeros of shape {tuple(batch.shape)}, to see what its output looks like: it must"
                    f" take batches of {options.batch_size}, {setting[0]} channels as {name} has, and patches of"
                    f" {options.patch_size}"
                )
                raise
            self._outputs[setting] = list(outputs)
            streams, results = options.wanted.resolve(self._outputs[setting], output)
            for stream in streams:
                form = self._models.form(outputs, stream, options.batch_size)
                expected = tuple(size * factor for size, factor in zip(options.patch_size, stream.scale, strict=True))
                if form.size != expected:
                    scale = ", ".join(f"{size}/{patch}" for size, patch in zip(form.size, options.patch_size, strict=True))
                    raise OutputError(
                        f"{called(stream.source)} of the model has spatial shape {form.size} for a patch of {options.patch_size}"
                        f" of {name}: at output_scale {tuple(map(str, stream.scale))} it must be {tuple(map(str, expected))}."
                        f" Give its scale, ({scale}), or let the model pad or crop it"
                    )
                self._forms[setting, stream] = form
        return streams, results

    @staticmethod
    def _sum(stream: Stream, form: Form, sweep: Sweep) -> SumForm:
        is_plain = all(factor == 1 for factor in stream.scale)
        scaled_sweep = sweep if is_plain else sweep.scaled(sweep.grid.scaled(stream.scale))
        return SumForm(form, stream.scale, scaled_sweep)

    def _result_form(self, result: Result, results: list[Result], sums: list[SumForm]) -> ResultForm:
        each = sums[result.stream]
        with torch.no_grad():
            reduced = result.reduction(each.form.sample[0].to(each.dtype(), copy=True).nan_to_num_())
        is_labels = result.reduction.is_labels or not reduced.dtype.is_floating_point
        if not can_hold(reduced.dtype, self._options.fill):
            raise OutputError(f"fill is {self._options.fill}, which a result of {reduced.dtype} cannot hold: choose another one")
        i, j, k = each.sweep.grid.spatial_shape
        return ResultForm(
            result.name,
            result.stream,
            (len(reduced), i, j, k),
            reduced.dtype,
            is_labels,
            each.scale,
            # A function of the user's may write to what it is given.
            needs_copy=isinstance(result.reduction, Function) and sum(other.stream == result.stream for other in results) > 1,
        )

    def plan(self, job: Job, columns: list[Column] | None = None) -> PredictionPlan:
        """Plan a job: find columns that fit, unless they are given."""
        options, sweep, needed = self._options, job.sweep, job.needed
        forms = [form for _, form in job.results]
        kept = sum(form.num_bytes for form in forms if of_name(job.output, form.name) is None)
        loaded = sum(job.bytes_to_load.values())
        columns, spooled_bytes = self._columns(job, columns)
        made, computed = passes_of(sweep, columns, options.batch_size, needed)
        times = self._models.num_passes
        in_parts = [volume for name, volume in job.volumes.items() if spooled_bytes or not job.bytes_to_load.get(name)]
        patch_bytes = math.prod(options.patch_size) * sum(volume.num_channels * volume.dtype.itemsize for volume in in_parts)
        return PredictionPlan(
            grid=sweep.grid,
            sweep=sweep,
            columns=tuple(columns),
            batch_size=options.batch_size,
            num_patches=passes_of(sweep, [sweep.whole], 1, needed)[1],
            computed_patches=computed,
            forward_passes=made * times + 1,
            restart_passes=repeated_passes(sweep, columns, options.batch_size, needed) * times + 1,
            bytes_read=loaded + patch_bytes * computed,
            bytes_written=sum(form.num_bytes for form in forms) - kept,
            memory=max((self._memory_of(job, column, spooled_bytes) for column in columns), key=lambda memory: memory.peak),
            spooled_bytes=spooled_bytes,
        )

    def _columns(self, job: Job, given: list[Column] | None = None) -> tuple[list[Column], int]:
        """Find columns that fit, unless they are given, and how many bytes of the input are unpacked to files for that.

        Files are unpacked if otherwise nothing fits, or more passes were needed.

        Raises:
            SizeError: if nothing fits; says the least that would do.
        """
        limit, is_given = self._limit()
        images = _images_of(job.volumes)
        spoolable = sum(size for name, size in job.bytes_to_load.items() if size and can_be_spooled(images[name]))

        def split(spooled_bytes: int) -> list[Column]:
            def peak(column: Column) -> int:
                return self._memory_of(job, column, spooled_bytes).peak

            if given is None:
                return best_split(job.sweep, peak, limit, is_given, self._options.batch_size)
            if limit is not None and not spooled_bytes and max(map(peak, given)) > limit:
                raise SizeError(f"the plan takes more than {pretty_bytes(limit)}")
            return given

        if not spoolable or job.unpacked is not None:
            return split(spoolable), spoolable
        try:
            columns = split(0)
        except SizeError:
            return split(spoolable), spoolable
        if len(columns) > 1:
            others = split(spoolable)
            passes = [passes_of(job.sweep, each, self._options.batch_size, job.needed)[0] for each in (columns, others)]
            if passes[1] < passes[0]:
                return others, spoolable
        return columns, 0

    def _memory_of(self, job: Job, column: Column, spooled_bytes: int) -> Memory:
        options = self._options
        loaded = sum(job.bytes_to_load.values()) - spooled_bytes
        forms = [form for _, form in job.results]
        channels = sum(volume.num_channels for volume in job.volumes.values())
        batches = batch_bytes(
            options.patch_size, options.batch_size, channels, self._models.dtype, job.sums, self._models.num_passes
        )
        batches += sum(map(self._bytes_mapped, job.volumes.values()))
        kept = sum(form.num_bytes for form in forms if of_name(job.output, form.name) is None)
        is_partial = job.needed is not None
        front = open_bytes(job.sums, column, is_partial) + reduced_bytes(job.sums, forms, is_partial)
        return Memory(loaded, batches, front, kept)

    def _limit(self) -> tuple[int | None, bool]:
        """Give how much memory may be used, and whether the user said so."""
        if self._options.memory_limit is not None:
            return self._options.memory_limit, True
        free = free_bytes()
        return None if free is None else int((free + self._kept_bytes()) * USED_PART), False

    def _bytes_mapped(self, volume: Voxels) -> int:
        """Memory for the part of a file that is mapped while a patch is read: whole rows of voxels, in two steps of planes."""
        if not isinstance(volume, Image) or volume.is_loaded:
            return 0
        i, j, _ = volume.spatial_shape
        patch = self._options.patch_size
        return 2 * i * min(j, patch[1]) * patch[2] * volume.dtype.itemsize


def _images_of(volumes: dict[str, Voxels]) -> dict[str, Image]:
    return {name: volume for name, volume in volumes.items() if isinstance(volume, Image)}


def of_name(given: Any, name: Name) -> Any:
    """Give what belongs to a result, where a dict may say it by name."""
    return given.get(name) if isinstance(given, Mapping) else given
