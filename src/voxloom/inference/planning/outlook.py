"""Finding out what a model's outputs look like, by the first batch if it can be read, and otherwise by zeros."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from ...core.sizes import Ints
from ...errors import OutputError, SizeError
from ...models.guards import exported_for_others
from ...models.outputs import Name, OutputRequest, OutputSpec, called
from ...models.running import Models
from .results import ResultOptions, ResultRequest
from .settings import Settings

__all__ = ["Outlook", "Seen"]

_Setting = tuple[int, torch.dtype, torch.device]


@dataclass(frozen=True, eq=False)
class Seen:
    """What is known of the outputs that are wanted."""

    requests: Sequence[OutputRequest]
    results: Sequence[ResultRequest]
    outputs: Sequence[OutputSpec]
    samples: Sequence[Tensor]
    """A voxel `(1, C, 1, 1, 1)` of each output, in the type of its sum."""


@dataclass(eq=False)
class Outlook:
    """What is known of a model's outputs, kept from one volume to the next."""

    models: Models
    settings: Settings
    options: ResultOptions
    _names: dict[_Setting, list[Name]] = field(default_factory=dict)
    """By what the model was given, and where and in what type it ran."""
    _seen: dict[tuple[_Setting, OutputRequest], tuple[OutputSpec, Tensor]] = field(default_factory=dict)

    def known(self, channels: int, dtype: torch.dtype, target: Any) -> Seen | None:
        """Give what is known of the outputs for inputs of some channels and type; None if they must be looked at first.

        Args:
            channels: channels of the input.
            dtype: type of the batches.
            target: where results go: a dict, if that is by name.
        """
        setting = (channels, dtype, self.models.device)
        if setting not in self._names:
            return None
        requests, results = self.options.resolve(self._names[setting], target)
        found = [self._seen.get((setting, request)) for request in requests]
        if None in found:
            return None
        specs, samples = zip(*(each for each in found if each is not None), strict=True)
        return Seen(requests, results, specs, samples)

    def look(self, batch: Tensor, target: Any, read_again: Callable[[], Tensor], name: str, is_real: bool) -> list[Tensor]:
        """Run a batch, and learn from its outputs.

        Args:
            batch: the batch.
            target: where results go: a dict, if that is by name.
            read_again: gives the batch once more.
            name: what messages call the input.
            is_real: whether the batch is of the input, rather than zeros.

        Returns:
            The outputs that are wanted.
        """
        setting = (batch.shape[1], batch.dtype, self.models.device)
        requests: list[OutputRequest] = []

        def requests_for(names: list[Name]) -> list[OutputRequest]:
            self._names[setting] = names
            requests[:] = self.options.resolve(names, target)[0]
            return requests

        shape, dtype = tuple(batch.shape), batch.dtype
        try:
            outputs = self.models.run(batch, requests_for, read_again)
        except (SizeError, OutputError):
            raise
        except Exception as error:
            if isinstance(error, AssertionError) and str(error).startswith("Guard failed"):  # so exported programs refuse
                raise exported_for_others(shape, str(error).splitlines()[0]) from error
            if not requests:
                error.add_note(self._note(shape, dtype, name, is_real))
            raise
        for request, output in zip(requests, outputs, strict=True):
            self._check_size(request, tuple(output.shape[2:]), name)
            spec = self.models.spec_of(request, output)
            sample = output[:1, :, :1, :1, :1].to("cpu", spec.held_dtype(self.settings.window is None), copy=True)
            self._seen[setting, request] = spec, sample
        return outputs

    def _note(self, shape: tuple[int, ...], dtype: torch.dtype, name: str, is_real: bool) -> str:
        what = "its first batch, " if is_real else "zeros, to see what its output looks like, "
        text = (
            f"The model was called with {what}of shape {shape} and type {dtype}: it must take batches of up to"
            f" {self.settings.batch_size}, {shape[1]} channels as {name} has, and patches of {self.settings.input_size}"
        )
        if self.models.weights_dtype is None and dtype != torch.float32:
            text += f". A model without weights is given the type of the input, {dtype}: dtype=torch.float32 (--dtype float32)"
            text += " converts it"
        return text

    def _check_size(self, request: OutputRequest, size: Ints, name: str) -> None:
        patch_size = self.settings.patch_size
        expected = tuple(length * factor for length, factor in zip(patch_size, request.scale, strict=True))
        if size != expected:
            raise OutputError(
                f"{called(request.source)} of the model has spatial shape {size} for a patch of {patch_size} of {name}: at"
                f" output_scale {tuple(map(str, request.scale))} it must be {tuple(map(str, expected))}."
                f" {_way_out(size, self.settings.input_size)}"
            )


def _way_out(size: Ints, patch_size: Ints) -> str:
    """Say what to do with an output of another size: as a change of scale, valid convolutions would move what they find."""
    ratios = [Fraction(length, patch) for length, patch in zip(size, patch_size, strict=True)]
    ways = []
    if all(1 in (ratio.numerator, ratio.denominator) for ratio in ratios):
        ways.append(f"If the model changes the scale, give it: output_scale=({', '.join(map(str, ratios))})")
    lost = [patch - length for length, patch in zip(size, patch_size, strict=True)]
    if min(lost) >= 0 and not any(number % 2 for number in lost):
        sides = tuple(number // 2 for number in lost)
        ways.append(
            f"If its convolutions are valid, they give nothing for {sides} voxels on each side: give context={sides}, so that it"
            " is given as many voxels around each patch, and predicts all of the patch"
        )
    return ". ".join(ways or ["Let the model pad or crop its output to that size"])
