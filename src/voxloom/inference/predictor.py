"""A whole volume through a model in one call, in bounded memory."""

import contextlib
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..core.front import Allocate
from ..core.memory import FreedMemory, pretty_bytes
from ..core.padding import check_padding_mode
from ..core.sizes import as_int, as_sizes
from ..core.sweeps import Column
from ..core.values import as_number
from ..core.windows import OverlapMode, resolve_window
from ..errors import OutputError, RecordError, SaveError, TargetExistsError
from ..volumes.image import Image
from ..volumes.subject import Subject
from .execution import Execution
from .files import (
    BEGIN_ANEW,
    NiftiSink,
    UnfinishedRun,
    as_target,
    is_ready_to_publish,
    remove_leftovers,
)
from .inputs import PatchReader, volumes_of
from .limits import as_bytes, home_of_front
from .models import Models, as_models
from .options import Options, overlap_of
from .outputs import Wanted
from .planning import Job, Planner, of_name
from .plans import PredictionPlan
from .provenance import identity_of, sidecar_of_run
from .sidecars import difference_of_made
from .sinks import MemorySink, Sink
from .spooling import paths_of, spooled

__all__ = ["Predictor", "plan", "predict"]

Sizes = int | Sequence[int]


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
        mirror_axes: int | Sequence[int] | None = (),
        fill: float = 0,
        memory_limit: int | str | None = None,
        model_name: str | None = None,
    ) -> None:
        size = as_sizes(patch_size, 3, "patch_size")
        self.options = Options(
            patch_size=size,
            patch_overlap=overlap_of(patch_overlap, size),
            overlap_mode=overlap_mode,
            window=resolve_window(overlap_mode),
            batch_size=as_int(batch_size, "batch_size", 1),
            padding_mode=None if padding_mode is None else check_padding_mode(padding_mode, 0),
            fill=as_number(fill, "fill"),
            memory_limit=None if memory_limit is None else as_bytes(memory_limit, "memory_limit"),
            wanted=Wanted(activation, reduce, output_scale),
        )
        self.model_name = model_name
        self._models = Models(as_models(model), device, amp, mirror_axes)
        self._memory = FreedMemory(0)
        self._planner = Planner(self._models, self.options, lambda: self._memory.num_bytes)

    def plan(
        self, image: Any, *, image_name: str | Sequence[str] | None = None, mask: Any = None, output: Any = None
    ) -> PredictionPlan:
        """Say what a call with these arguments would do, without doing it.

        Of the image only the header is read, unless there is a mask. The model is called once, the first time, to see what its
        output looks like.
        """
        with contextlib.ExitStack() as stack:
            return self._planner.plan(self._job(image, image_name, mask, output, stack))

    def __call__(
        self,
        image: Any,
        *,
        image_name: str | Sequence[str] | None = None,
        mask: Any = None,
        output: Any = None,
        resume: bool = True,
        overwrite: bool = False,
        progress: bool | str = False,
    ) -> Any:
        """Apply the model to a volume.

        Args:
            image: a path, an `Image`, a `Subject`, a tensor `(C, I, J, K)`, or an array that is read by slices.
            image_name: which image of a subject; several become channels, in that order.
            mask: compute only patches that hold a voxel of it: an image or its path, matched by affine; a tensor; a threshold; or
                a function that makes a mask of a part `(C, i, j, k)` of the volume.
            output: where the result goes: None for memory; a name that ends in `.nii` or `.nii.gz`, beside which a `.json` says
                how it was made; or a `Sink`. A dict for several results.
            resume: let a run that was interrupted be taken up, if its files are found beside the output; by its own plan,
                whatever the memory limit is now. False begins anew.
            overwrite: replace a file that is there.
            progress: show how far it has come, under the name of the image or another one.

        Returns:
            An `Image` with the shape and affine of the input, or what the sink returns; a dict where there are several results.

        Raises:
            OutputError: if the model returns something that cannot be summed, or NaN.
            SizeError: if the memory limit is too low; says what would do.
            TargetExistsError: if the output exists.
            RecordError: if an interrupted run is found that is of another image, model or option; says in what.
            SaveError: if a file cannot be written. What is finished stays, and the same call goes on from there.
        """
        with contextlib.ExitStack() as stack:
            job = self._job(image, image_name, mask, output, stack)
            return self._made(job, _inputs_of(job, mask), resume, overwrite, progress)

    def _made(self, job: Job, inputs: set[Path], resume: bool, overwrite: bool, progress: bool | str) -> Any:
        """Carry out a job, and give what `__call__` returns."""
        sinks = [_sink_of(of_name(job.output, result.name)) for result, _ in job.results]
        if len(set(map(id, sinks))) < len(sinks):
            raise OutputError("one sink was given for several results: give a dict with one for each")
        files = {result.name: sink for (result, _), sink in zip(job.results, sinks, strict=True) if isinstance(sink, NiftiSink)}
        for sink in files.values():
            if sink.target.resolve() in inputs:
                raise SaveError(f"the result would replace the input {sink.target}: choose another output")
        if files:
            made = self._run_into_files(job, sinks, UnfinishedRun(files, overwrite), resume, progress)
        else:
            self._run(job, self._planner.plan(job), sinks, progress)
            made = _closed(sinks)
        by_name = {result.name: each for (result, _), each in zip(job.results, made, strict=True)}
        return by_name[None] if list(by_name) == [None] else by_name

    def is_made(
        self, image: Any, *, output: str | os.PathLike[str], image_name: str | Sequence[str] | None = None, mask: Any = None
    ) -> bool:
        """Whether a call with these arguments has already made its file, as the file's sidecar says.

        Raises:
            TargetExistsError: if the file is there, but was made of another image, or by another model or option.
        """
        target = as_target(output)
        if is_ready_to_publish(target):
            return False
        remove_leftovers(target)
        with contextlib.ExitStack() as stack:
            job = self._job(image, image_name, mask, output, stack)
        difference = difference_of_made(target, identity_of(self._models, self.options, self.model_name, job))
        if difference:
            raise TargetExistsError(
                f"{target} exists, and is of something else: {difference}. Remove it, or let it be overwritten"
            )
        return difference is not None

    def _job(
        self, image: Any, image_name: str | Sequence[str] | None, mask: Any, output: Any, stack: contextlib.ExitStack
    ) -> Job:
        return self._planner.job(volumes_of(image, image_name), _name_of(image), mask, output, stack)

    def _run_into_files(self, job: Job, sinks: list[Sink], run: UnfinishedRun, resume: bool, progress: bool | str) -> list[Any]:
        """Run with a record beside the files, from which another call can go on."""
        with contextlib.closing(run):
            identity = identity_of(self._models, self.options, self.model_name, job)
            recorded = run.recorded(identity, resume)
            if recorded is not None and len(run.sinks) < len(sinks):
                raise RecordError(
                    f"{run.folder} holds an unfinished run, but what was finished of the results that are not in files is gone:"
                    f" let all of them be files, or {BEGIN_ANEW}"
                )
            made: list[Any] = [None] * len(sinks)
            columns = None if recorded is None else _columns_of(recorded, job, run)
            if columns is not None and run.is_ready:  # it was interrupted in the last moment
                run.publish()
            else:
                plan = self._planner.plan(job, columns)
                if columns is None:
                    run.begin(identity, plan.to_json())
                notes = self._run(job, plan, sinks, progress, run)
                made = _closed(sinks)
                sidecar = sidecar_of_run(identity, job, plan, self._models, notes)
                run.publish(sidecar)
        forms = [job.volume_form(form) for _, form in job.results]
        return [
            form.image_class(sink.target) if isinstance(sink, NiftiSink) else each
            for sink, form, each in zip(sinks, forms, made, strict=True)
        ]

    def _run(
        self, job: Job, plan: PredictionPlan, sinks: list[Sink], progress: bool | str, run: UnfinishedRun | None = None
    ) -> list[str]:
        """Carry out a plan, and give the warnings that there were."""
        notes = [] if plan.num_blocks == 1 else [_warn_of_blocks(job, plan)]
        with contextlib.ExitStack() as stack:
            volumes = job.unpacked or (stack.enter_context(spooled(job.volumes)) if plan.spooled_bytes else job.volumes)
            padding = 0 if self.options.padding_mode is None else self.options.padding_mode
            execution = Execution(
                plan=plan,
                models=self._models,
                streams=job.streams,
                sums=job.sums,
                results=[(*pair, sink) for pair, sink in zip(job.results, sinks, strict=True)],
                needed=job.needed,
                window=self.options.window,
                fill=self.options.fill,
                reader=PatchReader(volumes, plan.grid, padding, self._models.dtype),
                name=job.name,
                front_device=home_of_front(self._models.device, plan.memory.front),
                allocate=self._allocate(plan.memory.front),
            )
            layers_done = 0
            if run is not None:
                execution.layer_finished = run.layer_finished
                layers_done = run.layers_done
                if layers_done:
                    notes.append(_warn_of_restart(run, plan, execution.repeated_passes(layers_done)))
            try:
                for sink, (_, form) in zip(sinks, job.results, strict=True):
                    sink.open(job.volume_form(form))
                if run is not None:
                    run.opened()
                if progress:
                    name = progress if isinstance(progress, str) else job.name
                    bar = stack.enter_context(tqdm(total=execution.num_patches(layers_done), unit="patch", desc=name))
                    execution.run(layers_done, bar.update)
                else:
                    execution.run(layers_done)
            except BaseException:
                for sink in sinks:
                    sink.abort()
                if run is not None:
                    run.discard_if_empty()
                raise
        return notes + execution.warnings

    def _allocate(self, num_bytes: int) -> Allocate:
        """Give memory for sums that is kept from volume to volume."""
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
    resume: bool = True,
    overwrite: bool = False,
    progress: bool | str = False,
    **options: Any,
) -> Any:
    """Apply a model to a whole volume, patch by patch, in bounded memory.

    Args:
        model: see `Predictor`.
        image: see `Predictor.__call__`, also for all others that are not listed under `Predictor`.
        patch_size: voxels of a patch `(I, J, K)`, or one number for all axes.
        patch_overlap: what neighbours share: an even number of voxels, or a fraction of the patch.
        overlap_mode: how overlapping patches are combined.
        image_name: which image of a subject.
        mask: compute only patches that hold a voxel of it.
        output: where the result goes.
        resume: let a run that was interrupted be taken up.
        overwrite: replace a file that is there.
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
    return predictor(
        image,
        image_name=image_name,
        mask=mask,
        output=output,
        resume=resume,
        overwrite=overwrite,
        progress=progress,
    )


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


def _sink_of(given: Any) -> Sink:
    if given is None:
        return MemorySink()
    if isinstance(given, str | os.PathLike):
        return NiftiSink(as_target(given))
    if isinstance(given, Sink):
        return given
    raise OutputError(f"output is {given!r}: it must be None, the name of a file, or a sink with open, write, close and abort")


def _columns_of(recorded: Any, job: Job, run: UnfinishedRun) -> list[Column]:
    """Give the columns of a plan that was recorded.

    Raises:
        RecordError: if they are not those of a plan for this job, or more or less is done than there is.
    """
    sweep = job.sweep
    try:
        columns = [Column(range(*each[:2]), range(*each[2:])) for each in recorded["columns"]]
        num_voxels = sum(sweep.column_box(column).numel for column in columns)
    except (LookupError, TypeError, ValueError) as error:
        raise RecordError(f"the plan that {run.folder} records is damaged: {BEGIN_ANEW}") from error
    num_layers = len(columns) * sweep.num_layers
    is_done = run.layers_done == num_layers
    is_possible = is_done if run.is_ready else run.layers_done <= num_layers
    if num_voxels != math.prod(sweep.grid.spatial_shape) or not is_possible:
        raise RecordError(
            f"{run.folder} records a plan of {num_layers} layers and {num_voxels} voxels, and {run.layers_done} layers that are"
            f" done, which does not fit {job.name}: {BEGIN_ANEW}"
        )
    return columns


def _inputs_of(job: Job, mask: Any) -> set[Path]:
    """Give the files that are read, which must not be written to."""
    paths = [path for volume in (*job.volumes.values(), mask) if isinstance(volume, Image) for path in paths_of(volume)]
    paths += [Path(mask)] if isinstance(mask, str | os.PathLike) else []
    return {path.expanduser().resolve() for path in paths}


def _closed(sinks: list[Sink]) -> list[Any]:
    """Close all sinks, or abort those that are left after an error."""
    made: list[Any] = []
    try:
        for sink in sinks:
            made.append(sink.close())
    except BaseException:
        for sink in sinks[len(made) :]:
            sink.abort()
        raise
    return made


def _name_of(image: Any) -> str:
    if isinstance(image, Image):
        return "the image" if image.path is None else str(image.path)
    if isinstance(image, str | os.PathLike):
        return str(image)
    return "the subject" if isinstance(image, Subject) else "the array"


def _warn_of_blocks(job: Job, plan: PredictionPlan) -> str:
    text = (
        f"the output of {job.name} is computed in {plan.num_blocks} blocks, so that {pretty_bytes(plan.peak_bytes)} of memory are"
        f" enough: each patch is computed {plan.redundancy:.3g} times"
    )
    warnings.warn(text, RuntimeWarning, stacklevel=5)
    return text


def _warn_of_restart(run: UnfinishedRun, plan: PredictionPlan, passes: int) -> str:
    text = (
        f"{run.sinks[0].target}: an unfinished run is taken up, with {run.layers_done} of"
        f" {plan.num_blocks * plan.sweep.num_layers} layers finished; {passes} forward passes are made again"
    )
    warnings.warn(text, RuntimeWarning, stacklevel=5)
    return text
