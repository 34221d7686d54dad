"""Running models on batches: their modes, devices and precision, mirrored copies and ensembles."""

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.grid.windows import Gaussian
from ..core.sizes import Ints
from ..core.values import sum_dtype
from ..errors import DeviceMemoryError, ModeError, OutputError, SizeError
from ..runtime import memory
from ..runtime.devices import as_device
from ..runtime.kept_memory import begin_model, judge
from .forms import CallForm
from .modes import evaluating, home_of
from .outputs import ACTIVATIONS, OutputRequest, OutputSpec, RequestsFor, called, check_output, outputs_of, weighted

__all__ = ["Models", "as_models"]

Model = Callable[[Tensor], Any]
# Bytes of an output that are mirrored at a time.
PIECE_BYTES = 4 * 2**20


def as_models(model: Any) -> tuple[Model, ...]:
    """Make a tuple of one model, or of those of an ensemble.

    Raises:
        ModeError: if one of them cannot be called.
    """
    # An nn.ModuleList is a sequence too, and an nn.Sequential has a length but is called as a whole.
    is_ensemble = isinstance(model, nn.ModuleList) or (isinstance(model, Sequence) and not callable(model))
    models = tuple(model) if is_ensemble else (model,)
    if not models:
        raise ModeError("the list of models is empty: give at least one model")
    for each in models:
        if not callable(each):
            raise ModeError(
                f"the model is of type {type(each).__name__}, which cannot be called: give a function or module that takes a"
                " tensor (B, C, I, J, K)"
            )
    return models


class Models:
    """Calls one model, or several whose outputs are averaged.

    Args:
        models: each takes a batch `(B, C, I, J, K)`.
        device: where they run; None for where the first one's weights are.
        amp: type in which matrices are multiplied (`torch.autocast`); True for that of the device, False for none.
        mirror_axes: axes along which patches are mirrored as well: outputs are averaged over all combinations.
        form: how a model is called.
        weights: of the voxels of a patch, where these are no product of one for each axis; outputs are multiplied by them, and
            they follow as one more channel.
    """

    def __init__(
        self,
        models: tuple[Model, ...],
        device: Any = None,
        amp: bool | torch.dtype = False,
        mirror_axes: int | Sequence[int] | None = (),
        form: CallForm = CallForm(),  # noqa: B008 - it is frozen
        weights: Gaussian | None = None,
    ) -> None:
        self.models = models
        self.form = form
        self.weights = weights
        self._given_device = None if device is None else as_device(device)
        self._given_amp = _checked_amp(amp)
        axes = _as_axes(mirror_axes)
        # Axes of a batch, beginning with no mirroring.
        self.flips: list[Ints] = [
            tuple(axis + 2 for axis in chosen) for count in range(len(axes) + 1) for chosen in itertools.combinations(axes, count)
        ]
        self.largest_batch: int | None = None
        """Patches at a time that the device has room for, where it has been found to lack room for more."""

    @property
    def device(self) -> torch.device:
        """Where the models run: where weights are may change from one call to the next."""
        if self._given_device is not None:
            return self._given_device
        homes = (home_of(module) for module in self.modules)
        return next((home for home in homes if home is not None), torch.device("cpu"))

    @property
    def amp(self) -> torch.dtype | None:
        """Type in which matrices are multiplied; None for that of the weights."""
        given = self._given_amp
        return given if not isinstance(given, bool) else torch.get_autocast_dtype(self.device.type) if given else None

    @property
    def modules(self) -> list[nn.Module]:
        """Those models that are modules."""
        return [model for model in self.models if isinstance(model, nn.Module)]

    @property
    def num_passes(self) -> int:
        """How often a model is called for each batch."""
        return len(self.models) * len(self.flips)

    @property
    def weights_dtype(self) -> torch.dtype | None:
        """Type of the first weights; None where there are none."""
        found = (weight.dtype for module in self.modules for weight in module.parameters() if weight.is_floating_point())
        return next(found, None)

    def ready(self) -> contextlib.AbstractContextManager[None]:
        """Let all modules be on the device and in evaluation mode; see `evaluating`."""
        return evaluating(self.modules, self.device)

    def run(self, batch: Tensor, requests_for: RequestsFor, read_again: Callable[[], Tensor]) -> list[Tensor]:
        """Give the outputs for a batch: one tensor `(B, C, I, J, K)` for each request.

        Args:
            batch: a batch; models may write to it.
            requests_for: says which outputs are wanted, and their activations.
            read_again: gives the batch once more, as it was.

        Raises:
            OutputError: if a model returns something else than it should.
            DeviceMemoryError: if the device lacks room for a single patch.
        """
        while True:
            size = min(len(batch), self.largest_batch or len(batch))
            try:
                return self._in_parts(batch, size, requests_for)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if size == 1:
                    raise DeviceMemoryError(
                        f"there is too little memory on {self.device} for a single patch of {tuple(batch.shape[2:])}: use a"
                        " smaller patch_size, or amp=True"
                    ) from error
            self.largest_batch = size // 2
            self.free()
            batch = read_again()
            warnings.warn(
                f"there was too little memory on {self.device} for a batch of {size}: the run goes on with batches of"
                f" {self.largest_batch}, whose outputs may differ in the last bits from those of larger ones",
                RuntimeWarning,
                stacklevel=2,
            )

    def _in_parts(self, batch: Tensor, size: int, requests_for: RequestsFor) -> list[Tensor]:
        """Run a batch, so many patches at a time."""
        if size >= len(batch):
            return self._average(batch.to(self.device, non_blocking=True), requests_for)
        whole: list[Tensor] = []
        for start in range(0, len(batch), size):
            part = batch[start : start + size]
            # Copied, since a model may return the same memory each time.
            outputs = self._average(part.to(self.device, non_blocking=True), requests_for)
            whole = whole or [output.new_empty((len(batch), *output.shape[1:])) for output in outputs]
            for number, (target, output) in enumerate(zip(whole, outputs, strict=True)):
                if output.shape[1:] != target.shape[1:] or output.dtype != target.dtype:
                    raise OutputError(
                        f"output {number} of the model changed, from {target.dtype} of shape {tuple(target.shape[1:])} for a"
                        f" patch to {output.dtype} of shape {tuple(output.shape[1:])}"
                    )
                target[start : start + size] = output
        return whole

    def _weighted(self, value: Tensor, weights: Gaussian, input_size: Sequence[int]) -> Tensor:
        """Multiply an output by the weights of its voxels, which follow it as one more channel."""
        patch = tuple(size - 2 * around for size, around in zip(input_size, self.form.context, strict=True))
        return weighted(value, weights.of_patch(patch)[None, None].to(value.device))

    def free(self) -> None:
        """Give back memory of the device that is kept for later."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def spec_of(self, request: OutputRequest, output: Tensor) -> OutputSpec:
        """Say what the outputs for a request are, by those of a batch."""
        copies = 1 + 2 * int(request.activation is not None) + int(self.num_passes > 1) + int(request.has_squares)
        copies += int(self.weights is not None)
        return OutputSpec(request.source, output.shape[1], output.dtype, request.scale, copies)

    @torch.no_grad()  # rather than inference mode: what a model keeps of a forward pass must be good for training, too
    def _average(self, batch: Tensor, requests_for: RequestsFor) -> list[Tensor]:
        sums: list[Tensor] = []
        requests: list[OutputRequest] | None = None
        for number, (model, flip) in enumerate(itertools.product(self.models, self.flips)):
            given = _copied(batch, flip) if self.num_passes > 1 else batch
            begin_model(has_freed=number > 0)
            with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
                outputs = outputs_of(model(self.form.given(given)))
            judge(sum(each.numel() * each.element_size() for each in outputs.values() if isinstance(each, Tensor)))
            requests = requests_for(list(outputs)) if requests is None else requests
            for index, request in enumerate(requests):
                if request.source not in outputs:
                    raise OutputError(
                        f"{called(request.source)} of the model is missing: earlier calls returned it, or another model did"
                    )
                output = outputs[request.source]
                if isinstance(output, Tensor):
                    output = self.form.returned(output, batch, request.scale)
                check_output(request.source, output, len(batch))
                # Outputs of two names may be one tensor.
                value = _activated(output, request, is_shared=len(requests) > 1)
                if request.has_squares:
                    value = value.double()  # the difference of two large numbers is wanted
                    value = torch.cat([value, value.square()], 1)
                if self.weights is not None:
                    value = self._weighted(value, self.weights, batch.shape[2:])
                if self.num_passes == 1:
                    sums.append(value)
                elif number == 0:
                    make = memory.empty if value.device.type == "cpu" else value.new_empty
                    sums.append(make(value.shape, dtype=sum_dtype(value.dtype)).copy_(value))
                elif value.shape != sums[index].shape:
                    raise OutputError(
                        f"{called(request.source)} of one model has shape {tuple(sums[index].shape)}, and of another"
                        f" {tuple(value.shape)}: outputs that are averaged must be alike"
                    )
                else:
                    _add_mirrored(sums[index], value, flip)
                del value, output
            del given, outputs  # before those of the next call are made
        return sums if self.num_passes == 1 else [total.div_(self.num_passes) for total in sums]


def _copied(batch: Tensor, flip: Ints) -> Tensor:
    """Copy a batch, mirrored along some axes, for a model that may write to it."""
    if batch.device.type != "cpu":
        return batch.flip(flip) if flip else batch.clone()
    copy = memory.empty(batch.shape, batch.dtype)
    for part in _parts_of(batch):
        copy[part] = batch[part].flip(flip)
    return copy


def _add_mirrored(total: Tensor, value: Tensor, flip: Ints) -> None:
    """Add an output to a sum, mirrored along some axes."""
    if not flip:
        total.add_(value)
        return
    for part in _parts_of(value):
        total[part].add_(value[part].flip(flip))


def _parts_of(batch: Tensor) -> Iterator[tuple[slice, slice]]:
    """Cut a batch into some channels at a time, so that of what is made of each no copy of all is needed."""
    step = max(1, PIECE_BYTES * batch.shape[1] // max(1, batch[0].nbytes))
    if batch.device.type != "cpu":
        step = max(1, batch.shape[1])
    for number in range(len(batch)):
        for start in range(0, batch.shape[1], step):
            yield slice(number, number + 1), slice(start, start + step)


def _activated(output: Tensor, request: OutputRequest, is_shared: bool) -> Tensor:
    if request.activation is None:
        return output
    with torch.inference_mode(output.is_inference()):  # as the model itself may have run
        # A function of the user's may write to what it is given.
        copies = is_shared and request.activation not in ACTIVATIONS.values()
        result = request.activation(output.clone() if copies else output)
    if not isinstance(result, Tensor) or result.ndim != 5 or len(result) != len(output):
        what = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else f"type {type(result).__name__}"
        raise OutputError(
            f"activation was called with a batch of shape {tuple(output.shape)} and must return a tensor (B, C, I, J, K), but"
            f" it returned one of {what}"
        )
    return result


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device has no memory left."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or "MPS backend out of memory" in str(error)


def _as_axes(given: Any) -> Ints:
    axes = () if given is None else tuple(given) if isinstance(given, Iterable) else (given,)
    if any(isinstance(axis, bool) or axis not in (0, 1, 2) for axis in axes) or len(set(axes)) < len(axes):
        raise SizeError(f"mirror_axes is {given!r}: it must name each of the axes 0, 1 and 2 once at most")
    return axes


def _checked_amp(amp: Any) -> bool | torch.dtype:
    if not isinstance(amp, bool) and amp not in (torch.float16, torch.bfloat16):
        raise ModeError(f"amp is {amp!r}: it must be True, False, torch.float16 or torch.bfloat16")
    return amp
