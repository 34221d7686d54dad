"""Running models on batches: their modes, devices and precision, mirrored copies and ensembles."""

import contextlib
import itertools
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.accumulator import sum_dtype
from ..core.forks import in_forked_process
from ..core.sizes import Ints
from ..errors import DeviceMemoryError, ModeError, OutputError, SizeError
from .outputs import Form, Name, Stream, called, check_output, outputs_of
from .reductions import ACTIVATIONS

__all__ = ["Models", "as_models"]

Model = Callable[[Tensor], Any]


@dataclass
class _Use:
    """How many make predictions with a module at a time, and what it was like before the first of them."""

    was_training: bool
    home: torch.device | None = None
    """Where it was, if it was moved."""
    count: int = 0


_uses: dict[int, _Use] = {}
"""By the modules' `id`, all parts of each model among them."""
_changing_modes = threading.Lock()


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
    """

    def __init__(
        self,
        models: tuple[Model, ...],
        device: Any = None,
        amp: bool | torch.dtype = False,
        mirror_axes: int | Sequence[int] | None = (),
    ) -> None:
        self.models = models
        self._given_device = None if device is None else _as_device(device)
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
        homes = (_home_of(module) for module in self.modules)
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
    def dtype(self) -> torch.dtype:
        """Type in which batches are given to the models: that of the first weights, or else float32."""
        found = (weight.dtype for module in self.modules for weight in module.parameters() if weight.is_floating_point())
        return next(found, torch.float32)

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Let all modules be on the device and in evaluation mode.

        When nobody makes predictions with them any more, which other threads may do meanwhile, they are as they were.

        Raises:
            ModeError: if one is in use on another device.
        """
        parts = {id(part): part for module in self.modules for part in module.modules()}
        with _changing_modes:
            device = self.device
            for module in self.modules:
                if _home_of(module) not in (None, device) and any(id(part) in _uses for part in module.modules()):
                    raise ModeError(
                        f"the model {type(module).__name__} is being used on {_home_of(module)} by another thread, and so cannot"
                        f" be moved to {device}: wait for it, or use a copy"
                    )
            for number, part in parts.items():
                _uses.setdefault(number, _Use(part.training)).count += 1
        try:
            with _changing_modes:
                for module in self.modules:
                    home = _home_of(module)
                    if home is not None and home != device:
                        _uses[id(module)].home = home  # first, since it may fail halfway
                        module.to(device)
                    if any(part.training for part in module.modules()):
                        with contextlib.suppress(NotImplementedError):  # exported programs have no modes
                            module.eval()
            yield
        finally:
            with _changing_modes:
                _leave(parts)

    def run(self, batch: Tensor, streams: Sequence[Stream], read_again: Callable[[], Tensor]) -> list[Tensor]:
        """Give the outputs for a batch: one tensor `(B, C, I, J, K)` for each stream.

        Args:
            batch: a batch; models may write to it.
            streams: which outputs, and their activations.
            read_again: gives the batch once more, as it was.

        Raises:
            OutputError: if a model returns something else than it should.
            DeviceMemoryError: if the device lacks room for a single patch.
        """
        while True:
            size = min(len(batch), self.largest_batch or len(batch))
            try:
                return self._in_parts(batch, size, streams)
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

    def _in_parts(self, batch: Tensor, size: int, streams: Sequence[Stream]) -> list[Tensor]:
        """Run a batch, so many patches at a time."""
        if size >= len(batch):
            return self._average(batch.to(self.device, non_blocking=True), streams)
        whole: list[Tensor] = []
        for start in range(0, len(batch), size):
            part = batch[start : start + size]
            # Copied, since a model may return the same memory each time.
            outputs = self._average(part.to(self.device, non_blocking=True), streams)
            whole = whole or [output.new_empty((len(batch), *output.shape[1:])) for output in outputs]
            for stream, target, output in zip(streams, whole, outputs, strict=True):
                if output.shape[1:] != target.shape[1:] or output.dtype != target.dtype:
                    raise OutputError(
                        f"{called(stream.source)} of the model changed, from {target.dtype} of shape {tuple(target.shape[1:])}"
                        f" for a patch to {output.dtype} of shape {tuple(output.shape[1:])}"
                    )
                target[start : start + size] = output
        return whole

    def free(self) -> None:
        """Give back memory of the device that is kept for later."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def trial(self, batch: Tensor) -> dict[Name, Any]:
        """Give all outputs of the first model for a batch, by name."""
        return self._call(self.models[0], batch.to(self.device), None)

    def form(self, outputs: dict[Name, Any], stream: Stream, batch_size: int) -> Form:
        """Say what the outputs of a stream look like, by those of a trial."""
        check_output(stream.source, outputs[stream.source], batch_size)
        value = self._activated(outputs[stream.source], stream, True)
        dtype = value.dtype if self.num_passes == 1 else sum_dtype(value.dtype)
        copies = 1 + 2 * int(value is not outputs[stream.source]) + int(self.num_passes > 1) + int(len(self.flips) > 1)
        return Form(value.shape[1], tuple(value.shape[2:]), dtype, copies, value[:1, :, :1, :1, :1].to("cpu", copy=True))

    def _average(self, batch: Tensor, streams: Sequence[Stream]) -> list[Tensor]:
        sums: list[Tensor] = []
        for number, (model, flip) in enumerate(itertools.product(self.models, self.flips)):
            given = batch.flip(flip) if flip else batch.clone() if self.num_passes > 1 else batch
            outputs = self._call(model, given, streams)
            for index, stream in enumerate(streams):
                # Outputs of two names may be one tensor.
                value = self._activated(outputs[stream.source], stream, is_shared=len(streams) > 1)
                if flip:
                    value = value.flip(flip)
                if self.num_passes == 1:
                    sums.append(value)
                elif number == 0:
                    sums.append(value.to(sum_dtype(value.dtype), copy=True))
                elif value.shape != sums[index].shape:
                    raise OutputError(
                        f"{called(stream.source)} of one model has shape {tuple(sums[index].shape)}, and of another"
                        f" {tuple(value.shape)}: outputs that are averaged must be alike"
                    )
                else:
                    sums[index] += value
                del value
            del given, outputs  # before those of the next call are made
        return sums if self.num_passes == 1 else [total.div_(self.num_passes) for total in sums]

    def _call(self, model: Model, batch: Tensor, streams: Sequence[Stream] | None) -> dict[Name, Any]:
        with torch.inference_mode(), torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
            outputs = outputs_of(model(batch))
        missing = [stream.source for stream in streams or () if stream.source not in outputs]
        if missing:
            raise OutputError(f"{called(missing[0])} of the model is missing: earlier calls returned it, or another model did")
        for stream in streams or ():
            check_output(stream.source, outputs[stream.source], len(batch))
        return outputs

    @staticmethod
    def _activated(output: Tensor, stream: Stream, is_shared: bool) -> Tensor:
        if stream.activation is None:
            return output
        with torch.inference_mode():
            # A function of the user's may write to what it is given.
            copies = is_shared and stream.activation not in ACTIVATIONS.values()
            result = stream.activation(output.clone() if copies else output)
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


def _leave(parts: Mapping[int, nn.Module]) -> None:
    """Stop using modules; those that nobody uses any more are restored."""
    moved = []
    for number, part in parts.items():
        use = _uses.get(number)
        if use is None:  # in a process that was forked meanwhile
            continue
        use.count -= 1
        if use.count == 0:
            del _uses[number]
            part.training = use.was_training
            if use.home is not None:
                moved.append((part, use.home))
    for part, home in moved:
        part.to(home)


@in_forked_process
def _start_anew() -> None:
    """In a forked process: threads that make predictions, and may hold the lock, are not there any more."""
    global _changing_modes
    _changing_modes = threading.Lock()
    _uses.clear()


def _home_of(module: nn.Module) -> torch.device | None:
    tensors = itertools.chain(module.parameters(), module.buffers())
    return next((tensor.device for tensor in tensors), None)


def _as_device(device: Any) -> torch.device:
    try:
        return torch.empty(0, device=torch.device(device)).device  # with its number
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ModeError(f"device is {device!r}, which cannot be used here: {str(error).splitlines()[0]}") from error


def _as_axes(given: Any) -> Ints:
    axes = () if given is None else tuple(given) if isinstance(given, Iterable) else (given,)
    if any(axis not in (0, 1, 2) for axis in axes) or len(set(axes)) < len(axes):
        raise SizeError(f"mirror_axes is {given!r}: it must name each of the axes 0, 1 and 2 once at most")
    return axes


def _checked_amp(amp: Any) -> bool | torch.dtype:
    if not isinstance(amp, bool) and amp not in (torch.float16, torch.bfloat16):
        raise ModeError(f"amp is {amp!r}: it must be True, False, torch.float16 or torch.bfloat16")
    return amp
