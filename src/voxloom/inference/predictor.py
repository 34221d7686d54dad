"""A whole volume through a model in one call, in bounded memory."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..core.front import Allocate
from ..core.grids import PatchGrid
from ..core.memory import FreedMemory
from ..core.padding import check_padding_mode
from ..core.sizes import Ints, as_int, as_overlap, as_sizes
from ..core.sweeps import Column, Sweep
from ..core.values import as_number, can_hold
from ..core.windows import OverlapMode, resolve_window
from ..errors import OutputError, SizeError
from ..sampling.padded import Voxels
from ..volumes.formats import SpaceCodes
from ..volumes.image import Image
from ..volumes.space import Affine, scaled
from .execution import Execution
from .inputs import PatchReader, volumes_of
from .limits import as_bytes, free_bytes, pretty_bytes
from .masks import needed_patches
from .models import Models, as_models
from .outputs import Form, Name, Result, Stream, Wanted, called
from .plans import (
    Memory,
    PredictionPlan,
    ResultForm,
    SumForm,
    batch_bytes,
    best_split,
    passes_of,
    repeated_passes,
    sum_bytes,
)
from .sinks import MemorySink, Sink, VolumeForm

__all__ = ["Predictor", "plan", "predict"]

Sizes = int | Sequence[int]
# Of the memory that is free, what a prediction takes at most if no limit is given.
USED_PART = 0.9


@dataclass
class _Job:
    """Everything about one prediction that is known before it begins."""

    volumes: dict[str, Voxels]
    name: str
    affine: Affine
    codes: SpaceCodes
    needed: np.ndarray | None
    streams: list[Stream]
    sums: list[SumForm]
    results: list[tuple[Result, ResultForm]]
    plan: PredictionPlan


class Predictor:
    """Applies a model to whole volumes, patch by patch; made once, and called for many.

    Patches are gathered in an order in which little of their sum is open at any time; a voxel that is complete is reduced and
    written at once. So labels of many classes never need the memory of all classes.

    Args:
        model: takes a batch `(B, C, I, J, K)` and returns a tensor `(B, C', I', J', K')`, or a dict or tuple of tensors. A module
            runs in evaluation mode, without gradients. Several in a list are an ensemble, whose outputs are averaged.
        patch_size: voxels of a patch `(I, J, K)`, or one number for all axes. A volume that is smaller is padded.
        patch_overlap: what neighbours share on each axis: an even number of voxels, or a fraction of the patch below 1.
        overlap_mode: how overlapping patches are combined: `"crop"`, `"average"`, `"hann"`, `"gaussian"`, or a window; see
            `PatchAggregator`.
        batch_size: patches that the model is given at a time.
        device: where the model runs; None for where its weights are. A module that is elsewhere is moved there for the run.
        amp: let the model run in mixed precision (`torch.autocast`): True, or `torch.float16` or `torch.bfloat16`.
        activation: acts on each output, before it is summed: `"softmax"`, `"sigmoid"`, or a function of a batch. A dict for
            several results.
        reduce: acts on each voxel that is complete: `"argmax"`, a threshold, `Regions`, `"entropy"`, a list of channels, or a
            function of blocks `(C, i, j, k)`. A dict for several results.
        output_scale: how many times larger an output is than the input, such as `1 / 2`; a number, one for each axis, or a dict
            by the names of outputs.
        padding_mode: pad the volume by half the overlap on each side; see `GridSampler`. None pads only what is smaller than a
            patch, with zeros.
        mirror_axes: axes, of 0, 1 and 2, along which each patch is mirrored as well; outputs of all combinations are averaged.
        fill: value of voxels that are not computed because of a mask.
        memory_limit: bytes, or such as `"2GiB"`, that may be used beside what the process has and what the model itself uses.
            None for what is free. If the sum does not fit, the output is computed in blocks, and patches between them repeatedly.
        model_name: what stands for the model in records of runs, in place of the hash of its weights.

    Raises:
        SizeError, ModeError, ScaleError: if an argument cannot be used.

    Example:
        >>> import torch, voxloom as vx
        >>> model = torch.nn.Conv3d(1, 3, kernel_size=3, padding=1)
        >>> predictor = vx.Predictor(model, patch_size=16, reduce="argmax")
        >>> predictor(torch.rand(1, 40, 30, 20))
        LabelMap(shape: (1, 40, 30, 20); spacing: (1.00, 1.00, 1.00); orientation: RAS+; dtype: torch.uint8; ...; type: label)
    """

    def __init__(
        self,
        model: Any,
        patch_size: Sizes,
        patch_overlap: float | Sequence[float] = 0.5,
        overlap_mode: OverlapMode = "gaussian",
        *,
        batch_size: int = 1,
        device: Any = None,
        amp: bool | torch.dtype = False,
        activation: Any = None,
        reduce: Any = None,
        output_scale: Any = 1,
        padding_mode: str | float | None = None,
        mirror_axes: Sequence[int] = (),
        fill: float = 0,
        memory_limit: int | str | None = None,
        model_name: str | None = None,
    ) -> None:
        self.patch_size = as_sizes(patch_size, 3, "patch_size")
        self.patch_overlap = overlap_of(patch_overlap, self.patch_size)
        self.overlap_mode = overlap_mode
        self.batch_size = as_int(batch_size, "batch_size", 1)
        self.padding_mode = None if padding_mode is None else check_padding_mode(padding_mode, 0)
        self.fill = as_number(fill, "fill")
        self.memory_limit = None if memory_limit is None else as_bytes(memory_limit, "memory_limit")
        self.model_name = model_name
        self._window = resolve_window(overlap_mode)
        self._wanted = Wanted(activation, reduce, output_scale)
        self._models = Models(as_models(model), device, amp, mirror_axes)
        self._outputs: dict[int, list[Name]] = {}  # by the number of channels that the model was given
        self._forms: dict[tuple[int, Stream], Form] = {}
        self._memory: FreedMemory | None = None

    def plan(
        self, image: Any, *, image_name: str | Sequence[str] | None = None, mask: Any = None, output: Any = None
    ) -> PredictionPlan:
        """Say what a call with these arguments would do, without doing it.

        Of the image only the header is read, unless there is a mask. The model is called once, the first time, to see what its
        output looks like.
        """
        return self._prepared(image, image_name, mask, output).plan

    def __call__(
        self,
        image: Any,
        *,
        image_name: str | Sequence[str] | None = None,
        mask: Any = None,
        output: Any = None,
        progress: bool = False,
    ) -> Any:
        """Apply the model to a volume.

        Args:
            image: a path, an `Image`, a `Subject`, a tensor `(C, I, J, K)`, or an array that is read by slices.
            image_name: which image of a subject; several become channels, in that order.
            mask: compute only patches that hold a voxel of it: an image or its path, matched by affine; a tensor; a threshold; or
                a function that makes a mask of a part `(C, i, j, k)` of the volume.
            output: where the result goes: None for memory, or a `Sink`; a dict for several results.
            progress: show how far it has come.

        Returns:
            An `Image` with the shape and affine of the input, or what the sink returns; a dict where there are several results.

        Raises:
            OutputError: if the model returns something that cannot be summed, or NaN.
            SizeError: if the memory limit is too low; says what would do.
        """
        job = self._prepared(image, image_name, mask, output)
        sinks = self._sinks(job, output)
        self._run(job, sinks, progress)
        made = {result.name: sink.close() for (result, _), sink in zip(job.results, sinks, strict=True)}
        return made[None] if list(made) == [None] else made

    # Planning

    def _prepared(self, image: Any, image_name: Any, mask: Any, output: Any) -> _Job:
        volumes = volumes_of(image, image_name)
        first = next(iter(volumes.values()))
        affine, codes = (first.affine, first.codes) if isinstance(first, Image) else (np.eye(4), SpaceCodes())
        grid = covering(first.spatial_shape, self.patch_size, self.patch_overlap, self.padding_mode is not None)
        sweep = Sweep.smallest(grid, self._window is None)
        channels = sum(volume.num_channels for volume in volumes.values())
        name = _name_of(image)
        streams, results = self._look_at(channels, name, output)
        sums = [self._sum(stream, self._forms[channels, stream], sweep) for stream in streams]
        forms = [(result, self._result_form(result, sums)) for result in results]
        needed = needed_patches(mask, volumes, affine, grid)
        plan = self._plan(sweep, volumes, sums, [form for _, form in forms], output, needed)
        return _Job(volumes, name, affine, codes, needed, streams, sums, forms, plan)

    def _look_at(self, channels: int, name: str, output: Any) -> tuple[list[Stream], list[Result]]:
        """Find the sums and the results, and by a trial what the outputs look like, if that is not known yet."""
        if channels in self._outputs:
            streams, results = self._wanted.resolve(self._outputs[channels], output)
            if all((channels, stream) in self._forms for stream in streams):
                return streams, results
        batch = torch.zeros((self.batch_size, channels, *self.patch_size), dtype=self._models.dtype)
        with self._models.ready():
            outputs = self._models.trial(batch)
            self._outputs[channels] = list(outputs)
            streams, results = self._wanted.resolve(self._outputs[channels], output)
            for stream in streams:
                form = self._models.form(outputs, stream)
                expected = tuple(size * factor for size, factor in zip(self.patch_size, stream.scale, strict=True))
                if form.size != expected:
                    scale = tuple(f"{size}/{patch}" for size, patch in zip(form.size, self.patch_size, strict=True))
                    raise OutputError(
                        f"{called(stream.source)} of the model has spatial shape {form.size} for a patch of {self.patch_size} of"
                        f" {name}: at output_scale {tuple(map(str, stream.scale))} it must be {tuple(map(str, expected))}. Give"
                        f" its scale, ({', '.join(scale)}), or pad or crop it"
                    )
                self._forms[channels, stream] = form
        return streams, results

    def _sum(self, stream: Stream, form: Form, sweep: Sweep) -> SumForm:
        is_plain = all(factor == 1 for factor in stream.scale)
        scaled_sweep = sweep if is_plain else Sweep(sweep.grid.scaled(stream.scale), sweep.is_cropped, sweep.axes)
        return SumForm(form, stream.scale, scaled_sweep)

    def _result_form(self, result: Result, sums: list[SumForm]) -> ResultForm:
        each = sums[result.stream]
        sample = each.form.sample[0].to(each.dtype())
        with torch.no_grad():
            reduced = result.reduction(sample.clone())
        is_labels = result.reduction.is_labels or not reduced.dtype.is_floating_point
        if not can_hold(reduced.dtype, self.fill):
            raise OutputError(f"fill is {self.fill}, which a result of {reduced.dtype} cannot hold: choose another one")
        i, j, k = each.sweep.grid.spatial_shape
        return ResultForm(result.name, result.stream, (len(reduced), i, j, k), reduced.dtype, is_labels, each.scale)

    def _plan(
        self,
        sweep: Sweep,
        volumes: dict[str, Voxels],
        sums: list[SumForm],
        results: list[ResultForm],
        output: Any,
        needed: np.ndarray | None,
    ) -> PredictionPlan:
        channels = sum(volume.num_channels for volume in volumes.values())
        batches = batch_bytes(self.patch_size, self.batch_size, channels, self._models.dtype, sums)
        volume = sum(_bytes_to_load(each) for each in volumes.values())
        kept = sum(form.num_bytes for form in results if _of_name(output, form.name) is None)

        def memory_of(column: Column) -> Memory:
            return Memory(volume, batches, sum_bytes(sums, results, column, needed is not None), kept)

        limit = self.memory_limit
        if limit is None and (free := free_bytes()) is not None:
            limit = int(free * USED_PART)
        columns = best_split(sweep, lambda column: memory_of(column).peak, limit, self.batch_size)
        batches_made, computed = passes_of(sweep, columns, self.batch_size, needed)
        num_patches = passes_of(sweep, [sweep.whole], 1, needed)[1]
        times = self._models.num_passes
        read = sum(
            each.num_channels * each.dtype.itemsize * int(np.prod(sweep.grid.patch_size)) * computed
            if not _bytes_to_load(each)
            else _bytes_to_load(each)
            for each in volumes.values()
        )
        return PredictionPlan(
            grid=sweep.grid,
            sweep=sweep,
            columns=tuple(columns),
            batch_size=self.batch_size,
            num_patches=num_patches,
            computed_patches=computed,
            forward_passes=batches_made * times + 1,
            restart_passes=repeated_passes(sweep, columns, self.batch_size, needed) * times + 1,
            bytes_read=read,
            bytes_written=sum(form.num_bytes for form in results if _of_name(output, form.name) is not None),
            memory=max(map(memory_of, columns), key=lambda memory: memory.peak),
        )

    # Running

    def _sinks(self, job: _Job, output: Any) -> list[Sink]:
        sinks: list[Sink] = []
        for result, form in job.results:
            given = _of_name(output, result.name)
            if given is None:
                given = MemorySink()
            elif not isinstance(given, Sink):
                raise OutputError(f"output is {given!r}: it must be None, or a sink with open, write, close and abort")
            sinks.append(given)
            factors = tuple(map(float, form.scale))
            given.open(VolumeForm(form.shape, form.dtype, scaled(job.affine, factors), job.codes, form.is_labels))
        return sinks

    def _run(self, job: _Job, sinks: list[Sink], progress: bool) -> None:
        if job.plan.num_blocks > 1:
            plan = job.plan
            warnings.warn(
                f"the output of {job.name} is computed in {plan.num_blocks} blocks, so that {pretty_bytes(plan.peak_bytes)} of"
                f" memory are enough: each patch is computed {plan.redundancy:.3g} times",
                RuntimeWarning,
                stacklevel=3,
            )
        padding = 0 if self.padding_mode is None else self.padding_mode
        execution = Execution(
            plan=job.plan,
            models=self._models,
            streams=job.streams,
            sums=job.sums,
            results=[(*pair, sink) for pair, sink in zip(job.results, sinks, strict=True)],
            needed=job.needed,
            window=self._window,
            fill=self.fill,
            reader=PatchReader(job.volumes, job.plan.grid, padding, self._models.dtype),
            name=job.name,
            front_device=torch.device("cpu"),
            allocate=self._allocate(job.plan.memory.front),
        )
        try:
            execution.run()
        except BaseException:
            for sink in sinks:
                sink.abort()
            raise

    def _allocate(self, num_bytes: int) -> Allocate:
        """Give memory for sums that is kept from volume to volume."""
        if self._memory is None:
            self._memory = FreedMemory(num_bytes, num_bytes)
        self._memory.kept_bytes = self._memory.total_bytes = num_bytes
        return self._memory.empty


def predict(
    model: Any,
    image: Any,
    patch_size: Sizes,
    patch_overlap: float | Sequence[float] = 0.5,
    overlap_mode: OverlapMode = "gaussian",
    *,
    image_name: str | Sequence[str] | None = None,
    mask: Any = None,
    output: Any = None,
    progress: bool = False,
    **options: Any,
) -> Any:
    """Apply a model to a whole volume, patch by patch, in bounded memory.

    Args:
        model: see `Predictor`.
        image: see `Predictor.__call__`, also for `image_name`, `mask`, `output` and `progress`.
        patch_size: voxels of a patch `(I, J, K)`, or one number for all axes.
        patch_overlap: what neighbours share: an even number of voxels, or a fraction of the patch.
        overlap_mode: how overlapping patches are combined.
        image_name: which image of a subject.
        mask: compute only patches that hold a voxel of it.
        output: where the result goes.
        progress: show how far it has come.
        **options: the keywords of `Predictor`.

    Returns:
        An `Image` with the shape and affine of the input, or what the sink returns; a dict where there are several results.

    Example:
        >>> import torch, voxloom as vx
        >>> image = vx.ScalarImage(torch.rand(1, 40, 30, 20))
        >>> model = torch.nn.Conv3d(1, 3, kernel_size=3, padding=1)
        >>> labels = vx.predict(model, image, patch_size=16, patch_overlap=0.5, reduce="argmax")
        >>> labels.shape, labels.data.dtype
        ((1, 40, 30, 20), torch.uint8)
    """
    predictor = Predictor(model, patch_size, patch_overlap, overlap_mode, **options)
    return predictor(image, image_name=image_name, mask=mask, output=output, progress=progress)


def plan(
    model: Any,
    image: Any,
    patch_size: Sizes,
    patch_overlap: float | Sequence[float] = 0.5,
    overlap_mode: OverlapMode = "gaussian",
    *,
    image_name: str | Sequence[str] | None = None,
    mask: Any = None,
    output: Any = None,
    **options: Any,
) -> PredictionPlan:
    """Say what `predict` would do with the same arguments, and how much memory it would take.

    Args:
        model: see `predict`, also for all other arguments. It is called once, to see what its output looks like.
        image: of which only the header is read, unless there is a mask.
        patch_size: voxels of a patch.
        patch_overlap: what neighbours share.
        overlap_mode: how overlapping patches are combined.
        image_name: which image of a subject.
        mask: compute only patches that hold a voxel of it.
        output: where the result would go.
        **options: the keywords of `Predictor`.

    Example:
        >>> import torch, voxloom as vx
        >>> print(vx.plan(torch.nn.Identity(), torch.zeros(1, 100, 100, 100), patch_size=64))
        volume:  100 × 100 × 100 voxels
        patches: 27 of 64 × 64 × 64, each computed 1 times
        ...
    """
    predictor = Predictor(model, patch_size, patch_overlap, overlap_mode, **options)
    return predictor.plan(image, image_name=image_name, mask=mask, output=output)


def overlap_of(value: Any, patch_size: Ints) -> Ints:
    """Make an even number of voxels for each axis out of voxels or fractions of the patch, which are rounded down to even.

    Raises:
        SizeError: if a fraction is not below 1, or a number of voxels cannot be used.
    """
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value] * len(patch_size)
    if len(values) != len(patch_size):
        raise SizeError(f"patch_overlap is {tuple(values)}: give one number for all axes, or {len(patch_size)}, one for each")
    voxels = []
    for part, patch in zip(values, patch_size, strict=True):
        if isinstance(part, float):
            if not 0 <= part < 1:
                raise SizeError(
                    f"patch_overlap is {part}: a fraction of the patch must be at least 0 and below 1, and voxels whole"
                )
            part = int(part * patch + 1e-9) // 2 * 2  # 0.29 · 100 is a little less than 29
        voxels.append(part)
    return as_overlap(voxels, patch_size)


def covering(shape: Ints, patch_size: Ints, overlap: Ints, padded: bool) -> PatchGrid:
    """Cover a volume with patches; an axis that is shorter than a patch is padded in any case."""
    if padded:
        return PatchGrid.cover(shape, patch_size, overlap, padded=True)
    axes = [
        PatchGrid.cover((length,), patch, 0 if length < patch else shared, padded=length < patch).axes[0]
        for length, patch, shared in zip(shape, patch_size, overlap, strict=True)
    ]
    return PatchGrid(tuple(axes), tuple(shape), any(map(int.__lt__, shape, patch_size)))


def _of_name(given: Any, name: Name) -> Any:
    return given.get(name) if isinstance(given, Mapping) else given


def _name_of(image: Any) -> str:
    if isinstance(image, Image):
        return "the image" if image.path is None else str(image.path)
    return f"the {type(image).__name__}" if hasattr(image, "shape") else "the subject" if hasattr(image, "images") else str(image)


def _bytes_to_load(volume: Voxels) -> int:
    """Memory that an image will take because its file cannot be read in parts."""
    return volume.memory if isinstance(volume, Image) and not volume.is_loaded and not volume._can_be_sliced() else 0
