"""A whole volume through a model in one call, in bounded memory."""

import contextlib
import os
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from ..core.arguments import known_arguments
from ..core.geometry.interpolation import as_interpolation
from ..core.grid.grids import PatchSpacing
from ..core.grid.windows import OverlapMode
from ..core.values import as_number
from ..errors import ModeError, SaveError, TargetExistsError
from ..io.fingerprints import differences
from ..io.protocols import Json, is_source
from ..io.writing.sidecars import is_as_written, read_sidecar, sidecar_of
from ..io.writing.targets import as_target, would_lose
from ..models.loading import as_loaded
from ..models.running import Models, as_models
from ..models.spec import ModelSpec
from ..runs.log import RunLog, is_to_be_published, remove_leftovers
from ..runs.parts import is_being_published
from ..runtime.kept_memory import kept_for_models
from ..runtime.limits import as_bytes
from ..runtime.progress import shown_if
from .call import Call
from .destinations import Stores, as_stores
from .entering import Entrance, Request
from .options import settings_of, usual_options
from .parts.launchers import ProcessLauncher, ShardJob, as_launcher
from .parts.shards import ShardedRun
from .planning.plan import PredictionPlan
from .planning.settings import Input
from .preparing import Preparation
from .threads import ThreadExecutor

__all__ = ["Predictor", "Sizes"]

Sizes = int | Sequence[int]


class Predictor:
    """Applies a model to whole volumes, patch by patch; made once, and called for many.

    Patches are gathered in an order in which little of their sum is open at any time; a voxel that is complete is reduced and
    written at once. So labels of many classes never need the memory of all classes. Each patch is given to the model
    once, unless there are several models, mirrored axes, or blocks.

    Args:
        model: takes a batch `(B, C, I, J, K)` and returns a tensor `(B, C', I', J', K')`, or a dict or tuple of tensors. A module
            runs in evaluation mode, without gradients. Several in a list are an ensemble, whose outputs are averaged. Or the name
            of a file (`.pt2`), or what `load_model` gives.
        patch_size: voxels of a patch `(I, J, K)`, or one number for all axes; -1 is all of an axis. A volume that is smaller is
            padded.
        patch_overlap: what neighbours share on each axis: voxels, or a fraction of the patch below 1, with which patches are
            `patch · (1 - fraction)` voxels apart, rounded down. An even number where there is a padding mode.
        overlap_mode: how overlapping patches are combined: `"crop"`, `"average"`, `"hann"`, `"gaussian"`, or a window; see
            `PatchAggregator`. `"monai"` has exactly the weights of MONAI's Gaussian, for which one more channel is summed.
        spec: what the model expects, and what its outputs mean; by default that which came with the model. Arguments that are
            given count in place of what it says. Without one, a model is given raw intensities on the image's own grid.
        patch_spacing: `"fixed"` lets the last patch on each axis overlap its neighbour by more than the others do; `"even"`
            spreads as many evenly, as nnU-Net does.
        context: voxels around each patch that the model is given and does not predict: what valid convolutions lose on each side,
            or the neighbours of a slice. Beyond the volume they are 0, or as `padding_mode` says.
        slice_axis: axis along which patches are one voxel deep, for a 2-D model that takes `(B, C, height, width)`; slices that
            `context` adds come as more channels.
        batch_size: patches that the model is given at a time, at most: the last batch is smaller.
        device: where the model runs; None for where its weights are. A module that is elsewhere is moved there for the run.
        amp: let the model run in mixed precision (`torch.autocast`): True, or `torch.float16` or `torch.bfloat16`.
        dtype: type of the batches; None for that of the model's weights, or of the input where it has none.
        activation: acts on each output, before it is summed: `"softmax"`, `"sigmoid"`, or a function of a batch. A dict for
            several results.
        reduce: acts on each voxel that is complete: `"argmax"`, a threshold, `Regions`, `"entropy"`, `"variance"` of what was
            averaged (an ensemble, mirrored patches, overlaps; summed over channels), a list of channels, or a function of blocks
            `(C, i, j, k)`. A dict for several results.
        output_scale: how many times larger an output is than the input, such as `1 / 2`; a number, one for each axis, or a dict
            by the names of outputs.
        padding_mode: pad the volume by half the overlap on each side; see `GridSampler`. None pads only what is smaller than a
            patch, with zeros.
        mirror_axes: axes, of 0, 1 and 2, along which each patch is mirrored as well; outputs of all combinations are averaged.
        fill: value of voxels that are not computed because of a mask, or that lie outside of the image.
        interpolation: how scores are interpolated to the grid of `like`: `"linear"` or `"nearest"`, or one for each axis of the
            image.
        memory_limit: bytes, or such as `"2GiB"`, that may be used beside what the process has and what the model itself uses.
            None for what is free. If the sum does not fit, it is computed in blocks, and patches that they share several times.
        full_batches: fill the last batch up with copies, for a model that takes batches of one size only.
        model_name: what stands for the model in records of runs, in place of the hash of its weights and its code.
        executor: what carries plans out; None for threads of this process. Or what has parts of results computed elsewhere: a
            client of Dask, or a `Launcher` such as `ProcessLauncher`; results go to files or to Zarr then.
        devices: several devices of this machine, a process each, as `ProcessLauncher` takes them: `"all"` GPUs, `"0,1"`, or
            `["cpu", "cpu"]`; in place of an executor.

    Raises:
        SizeError, ModeError, ScaleError: if an argument cannot be used.

    Example:
        >>> import torch, voxloom as vx
        >>> model = torch.nn.Conv3d(1, 3, kernel_size=3, padding=1)
        >>> predictor = vx.Predictor(model, patch_size=16, reduce="argmax")
        >>> predictor(torch.rand(1, 40, 30, 20))
        LabelMap(shape: (1, 40, 30, 20); spacing: (1.00, 1.00, 1.00); orientation: RAS+; dtype: torch.uint8; ...; type: label)
    """

    @known_arguments
    def __init__(
        self,
        model: Any,
        patch_size: Sizes | None = None,
        patch_overlap: float | Sequence[float] | None = None,
        overlap_mode: OverlapMode | None = None,
        *,
        spec: ModelSpec | None = None,
        patch_spacing: PatchSpacing | None = None,
        context: int | Sequence[int] | None = None,
        slice_axis: int | None = None,
        batch_size: int | None = None,
        device: Any = None,
        amp: bool | torch.dtype = False,
        dtype: torch.dtype | None = None,
        activation: Any = None,
        reduce: Any = None,
        output_scale: Any = 1,
        padding_mode: str | float | None = None,
        mirror_axes: int | Sequence[int] | None = None,
        fill: float = 0,
        interpolation: str | Sequence[str] | None = None,
        memory_limit: int | str | None = None,
        full_batches: bool = False,
        model_name: str | None = None,
        executor: Any = None,
        devices: Any = None,
    ) -> None:
        self._arguments = {name: value for name, value in locals().items() if name not in ("self", "executor", "devices")}
        if devices is not None and executor is not None:
            raise ModeError("devices and executor were given, and either says where parts are computed: leave one out")
        executor = executor if devices is None else ProcessLauncher(devices)
        self._launcher = as_launcher(executor)
        if executor is not None and self._launcher is None and not callable(getattr(executor, "run", None)):
            raise ModeError(f"executor is {executor!r}: it must be an Executor, a Launcher or a client of Dask; see devices, too")
        loaded = as_loaded(model)
        if loaded.program is not None:  # a process elsewhere may be in another folder
            self._arguments["model"] = loaded
        spec = loaded.spec if spec is None else spec
        self.spec = ModelSpec() if spec is None else spec
        own = usual_options(self.spec).unless(reduce=loaded.reduce)
        own = own.unless(
            patch_size=patch_size,
            patch_overlap=patch_overlap,
            overlap_mode=overlap_mode,
            patch_spacing=patch_spacing,
            context=context,
            slice_axis=slice_axis,
            mirror_axes=mirror_axes,
            padding_mode=padding_mode,
            activation=activation,
            reduce=reduce,
        )
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise ModeError(f"dtype is {dtype!r}: it must be a type of PyTorch's, such as torch.float32")
        self.settings = settings_of(
            own,
            loaded,
            batch_size=batch_size,
            full_batches=full_batches,
            fill=as_number(fill, "fill"),
            memory_limit=None if memory_limit is None else as_bytes(memory_limit, "memory_limit"),
            dtype=dtype,
        )
        self._entrance = Entrance(
            spec=self.spec,
            is_specified=spec is not None,
            kinds=None if interpolation is None else as_interpolation(interpolation),
            preceding=loaded.preceding,
            shared_options={"device": device, "amp": amp, "memory_limit": memory_limit, "batch_size": batch_size},
            memory_limit=self.settings.memory_limit,
        )
        self._preparation = Preparation(
            Models(as_models(loaded.model), device, amp, own.mirror_axes, self.settings.form, own.weights),
            self.settings,
            own.result_options(output_scale),
            ThreadExecutor() if executor is None or self._launcher is not None else executor,
            loaded.name if model_name is None else model_name,
        )

    def __repr__(self) -> str:
        models, settings = self._preparation.models, self.settings
        names = ", ".join(getattr(type(model), "__name__", "?") for model in models.models)
        return (
            f"{type(self).__name__}({names} on {models.device}; patches: {settings.patch_size}, overlap {settings.patch_overlap},"
            f" {settings.overlap_mode!r}; batch size: {settings.batch_size})"
        )

    def _prepared(self, request: Request, target: Any, stack: contextlib.ExitStack) -> tuple[Preparation, Input]:
        """Give what prepares a prediction, and what the model is applied to, with the patches that are needed.

        Args:
            request: what is asked for.
            target: where results go.
            stack: ends what was made for it.
        """
        entered = self._entrance.enter(request, stack)
        if -1 in self.settings.patch_size:
            settings = self.settings.for_shape(entered.source.shape[1:])
            if self._preparation.settings.patch_size != settings.patch_size:
                self._preparation = replace(self._preparation, settings=settings)
        preparation = self._preparation
        given = entered.told(preparation.input(entered.source, entered.name), self.spec)
        return preparation, preparation.masked(given, entered.mask, target, stack)

    def plan(
        self,
        image: Any,
        *,
        image_name: str | Sequence[str] | None = None,
        like: Any = None,
        resample_to: str | None = None,
        affine: Any = None,
        mask: Any = None,
        output: Any = None,
    ) -> PredictionPlan:
        """Say what a call with these arguments would do, without doing it.

        Of the image only the header is read, unless there is a mask, or a spec that needs numbers of the volume. The model is
        called once, the first time, with a patch of zeros, to see what its output looks like.
        """
        request = Request(image, image_name, like, resample_to, mask, affine)
        with contextlib.ExitStack() as stack:
            preparation, given = self._prepared(request, output, stack)
            was_known = preparation.known(given, output) is not None
            return preparation.planned(given, preparation.seen(given, output), output, was_known)

    def __call__(
        self,
        image: Any,
        *,
        image_name: str | Sequence[str] | None = None,
        like: Any = None,
        resample_to: str | None = None,
        affine: Any = None,
        mask: Any = None,
        output: Any = None,
        resume: bool = True,
        overwrite: bool = False,
        progress: bool | str = False,
    ) -> Any:
        """Apply the model to a volume.

        Args:
            image: a path, an `Image` or another source, a `Subject`, a tensor `(C, I, J, K)`, or an array that is read by slices.
            image_name: which image of a subject; several become channels, in that order.
            like: the grid that the result is to be on, if that is not the image's: another image or its path, or a shape
                `(I, J, K)` and an affine. Scores are interpolated to its voxels, and then reduced.
            resample_to: name of the image of a subject onto whose grid the others are resampled (linearly), where they are not
                all on one.
            affine: RAS+ matrix of 4 × 4 from voxels to millimetres, of an array, or in place of an image's own.
            mask: compute only patches that hold a voxel of it: an image or its path, matched by affine; a tensor; a threshold; or
                a function that makes a mask of a part `(C, i, j, k)` of the volume.
            output: where the result goes: None for memory; a name that ends in `.nii`, `.nii.gz` or `.seg.nrrd`, beside which a
                `.json` says how it was made; one that ends in `.ome.zarr`, `.nii.zarr` or `.zarr`, or is
                `IMAGE.ome.zarr/labels/NAME`; a `VolumeStore` such as `ZarrStore`, or a `Sink`. A dict for several results.
            resume: let a run that was interrupted be resumed, if its log is found beside the output; by its own plan, whatever
                the memory limit is now. False starts over.
            overwrite: replace a file that is there.
            progress: show how far it has come, under the name of the image or another one.

        Returns:
            An `Image` with the shape and affine of the input, or what the store or sink returns; a dict where there are several
            results.

        Raises:
            OutputError: if the model returns something that cannot be summed, or NaN.
            SizeError: if the memory limit is too low; says what would do.
            TargetExistsError: if the output exists.
            RecordError: if an interrupted run is found that is of another image, model or option; says in what.
            SaveError: if a file cannot be written. What is finished stays, and the same call goes on from there.
        """
        request = Request(image, image_name, like, resample_to, mask, affine)
        if self._launcher is not None:
            asked = {each.name: getattr(request, each.name) for each in fields(request)}
            call = asked | {"output": output, "overwrite": overwrite, "shard_size": self._launcher.shard_size}
            run = self.shards(**call)
            self.compute_parts([call], [run], progress)
            return run.publish()
        with contextlib.ExitStack() as stack:
            stores = as_stores(output, self._preparation.options.names(output), overwrite)
            preparation, given = self._prepared(request, output, stack)
            _check_inputs(stores, given, mask, like)
            # What reads and writes the files has been imported by now, which would count as memory of the prediction.
            stack.enter_context(kept_for_models(preparation.models.device, preparation.settings.memory_limit))
            with_path = {name: store for name, store in stores.items() if store.path is not None}
            log = stack.enter_context(contextlib.closing(RunLog(with_path))) if with_path else None
            return Call(preparation, given, output, stores, log).run(resume, progress)

    def shards(
        self,
        image: Any,
        *,
        output: Any,
        image_name: str | Sequence[str] | None = None,
        like: Any = None,
        resample_to: str | None = None,
        affine: Any = None,
        mask: Any = None,
        overwrite: bool = False,
        shard_size: int | Sequence[int] | None = None,
    ) -> ShardedRun:
        """Give a prediction in parts, any of which any process that sees the output's folder may compute, in any order.

        Args:
            image: see `__call__`, also for the others.
            output: files or Zarr stores.
            image_name: which image of a subject.
            like: the grid that the result is to be on.
            resample_to: name of the image of a subject onto whose grid the others are resampled.
            affine: of an array, or in place of an image's own.
            mask: compute only patches that hold a voxel of it.
            overwrite: replace what is there.
            shard_size: voxels of a part, which is made up to whole shards; by default about four patches along each axis; -1
                makes one part of all.

        Raises:
            OutputError: if results cannot be made in parts.
        """
        request = Request(image, image_name, like, resample_to, mask, affine)
        stores = as_stores(output, self._preparation.options.names(output), overwrite)
        stack = contextlib.ExitStack()
        preparation, given = self._prepared(request, output, stack)
        _check_inputs(stores, given, mask, like)
        run = ShardedRun(preparation, given, output, stores, shard_size)
        weakref.finalize(run, stack.close)  # what was unpacked for it
        return run

    def compute_parts(self, calls: Sequence[Mapping[str, Any]], runs: Sequence[ShardedRun], progress: bool | str = False) -> None:
        """Have the parts of several predictions computed, spread over what this predictor's executor has for workers.

        A part that fails is recorded, which is said when the result is published.

        Args:
            calls: what each prediction is asked for; see `shards`.
            runs: what `shards` gave for it.
            progress: whether, or under which name, to show how far it is.

        Raises:
            ModeError: if the executor is none that has parts computed elsewhere.
        """
        if self._launcher is None:
            raise ModeError("parts are computed by a Launcher or a client of Dask: give one as executor")
        for run in runs:
            run.join()  # whoever began says how many parts there are
        job = ShardJob(self._arguments, calls, [len(run) for run in runs], dict(enumerate(runs)))
        numbers = job.remaining()
        if not numbers:
            return
        name = runs[0].plan.plan.name if len(runs) == 1 else f"{len(runs)} images"
        with contextlib.ExitStack() as stack:
            told = stack.enter_context(shown_if(progress, name, len(numbers), "parts"))
            self._launcher.launch(job, numbers, lambda number: told(1))

    def is_made(
        self,
        image: Any,
        *,
        output: str | os.PathLike[str],
        image_name: str | Sequence[str] | None = None,
        like: Any = None,
        resample_to: str | None = None,
        affine: Any = None,
        mask: Any = None,
    ) -> bool:
        """Whether a call with these arguments has already made its file, as the file's sidecar says.

        Raises:
            TargetExistsError: if the file is there, but was made of another image, or by another model or option.
        """
        target = as_target(output)
        if is_to_be_published(target) or is_being_published(target):
            return False
        remove_leftovers(target)
        if not target.exists():
            return False
        request = Request(image, image_name, like, resample_to, mask, affine)
        with contextlib.ExitStack() as stack:
            preparation, given = self._prepared(request, output, stack)
            difference = _difference(target, preparation.fingerprint(given), given)
        if difference:
            raise TargetExistsError(
                f"{target} exists, and is of something else: {difference}. Remove it, or let it be overwritten"
            )
        return True


def _check_inputs(stores: Stores, given: Input, *others: Any) -> None:
    """Refuse to write over what is read."""
    paths = list(given.source.paths)
    for other in others:
        paths += [Path(other)] if isinstance(other, str | os.PathLike) else other.paths if is_source(other) else []
    inputs = [path.expanduser() for path in paths]
    for store in stores.values():
        if store.path is not None and would_lose(store.path, inputs):
            raise SaveError(f"the result would replace the input {store.path}, or what holds it: choose another output")


def _difference(target: Path, fingerprint: Json, given: Input) -> str:
    """Say in what the result that is at a target differs from what would be made; empty if in nothing."""
    beside = sidecar_of(target)
    made = read_sidecar(beside)
    if made is None:
        return f"nothing beside it says how it was made ({beside.name})"
    if not is_as_written(target, target, made):
        return f"{beside.name} is not of it as it is now, but of {made.get('written')}"
    if None in fingerprint["models"]:
        return "the model is a function without a name, so that it may be another one"
    names = {label.value: label.name for label in given.labels}
    told = {label["value"]: label["name"] for label in made.get("labels", ())}
    recorded = {key: made.get(key) for key in fingerprint}
    return "; ".join(differences({**recorded, "labels": told}, {**fingerprint, "labels": names}))
