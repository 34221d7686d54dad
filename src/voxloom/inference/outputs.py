"""What is wanted of a model's outputs: which results, by which activation and reduction, at which scale."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.sizes import Ints, Scale, as_scale
from ..errors import ModeError, NoSuchKeyError, OutputError
from .reductions import Activation, Reduction, as_activation, as_reduction

__all__ = ["Form", "Name", "Result", "Stream", "Wanted", "outputs_of"]

# Types of outputs.
DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool} | {
    getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)
}

Name = str | None
"""Name of an output or a result; None where there is only one, without a name."""


@dataclass(frozen=True)
class Form:
    """What the outputs of a stream look like, as a trial has shown."""

    channels: int
    size: Ints
    """Voxels of the output for one patch."""
    dtype: torch.dtype
    copies: int
    """How many tensors of its size there are at a time while it is made."""
    sample: Tensor
    """One voxel of it, `(1, C, 1, 1, 1)`."""


@dataclass(frozen=True)
class Stream:
    """One sum of patches: an output of the model, after an activation."""

    source: Name
    activation: Activation | None
    scale: Scale


@dataclass(frozen=True)
class Result:
    """One result: what is made of a sum."""

    name: Name
    stream: int
    """Number of the sum."""
    reduction: Reduction


def outputs_of(returned: Any) -> dict[Name, Any]:
    """Give a model's outputs by name; those of a tuple are called "0", "1" and so on.

    Raises:
        OutputError: if there are none.
    """
    outputs: dict[Name, Any]
    if isinstance(returned, Mapping):
        outputs = {str(name): value for name, value in returned.items()}
    elif isinstance(returned, tuple | list):
        outputs = {str(number): value for number, value in enumerate(returned)}
    else:
        outputs = {None: returned}
    if not outputs:
        raise OutputError(f"the model returned an empty {type(returned).__name__}: it must return at least one tensor")
    return outputs


def check_output(name: Name, value: Any, batch_size: int) -> None:
    """Check that an output is a tensor `(B, C, I, J, K)` of numbers.

    Raises:
        OutputError: says what it is instead.
    """
    what = called(name)
    if not isinstance(value, Tensor):
        raise OutputError(
            f"{what} of the model is of type {type(value).__name__}: a model must return a tensor (B, C, I, J, K), or a dict or"
            " tuple of such tensors"
        )
    if value.ndim != 5:
        raise OutputError(f"{what} of the model has shape {tuple(value.shape)}: it must have 5 dimensions, (B, C, I, J, K)")
    if len(value) != batch_size:
        raise OutputError(
            f"{what} of the model has shape {tuple(value.shape)} for a batch of {batch_size}: its first size must be {batch_size}"
        )
    if value.is_complex():
        raise OutputError(f"{what} of the model is {value.dtype}: return its real and imaginary parts as two outputs")
    if not value.numel():
        raise OutputError(f"{what} of the model has shape {tuple(value.shape)}, which holds nothing")
    if value.layout != torch.strided or value.is_meta or value.is_quantized or value.dtype not in DTYPES:
        raise OutputError(
            f"{what} of the model is a tensor of {value.dtype} and {value.layout} on {value.device}, which cannot be summed:"
            " return a dense one of floats or whole numbers"
        )


def called(name: Name) -> str:
    """Call an output by its name in a message."""
    return "the output" if name is None else f"the output {name!r}"


@dataclass(frozen=True)
class Wanted:
    """What the user asked for, before it is known which outputs there are. Each may be a dict by the names of results."""

    activation: Any
    reduce: Any
    scale: Any
    ndim: int = 3

    def __post_init__(self) -> None:
        for given, check in ((self.activation, as_activation), (self.reduce, as_reduction), (self.scale, self._as_scale)):
            for value in given.values() if isinstance(given, Mapping) else [given]:
                check(value)

    def _as_scale(self, value: Any) -> Scale:
        return as_scale(value, self.ndim, "output_scale")

    def names(self, target: Any) -> list[Name] | None:
        """Names of the results, where a dict gives them."""
        dicts = [given for given in (self.reduce, target, self.activation) if isinstance(given, Mapping)]
        names = list(dict.fromkeys(name for given in dicts for name in given))
        if dicts and not names:
            raise ModeError("the dict of results is empty: name at least one, or leave the dict out")
        return names if dicts else None

    def resolve(self, outputs: list[Name], target: Any = None) -> tuple[list[Stream], list[Result]]:
        """Find the sums that are needed, and the results that are made of them.

        Args:
            outputs: names of the model's outputs.
            target: where results go: a dict, if that is by name.

        Raises:
            NoSuchKeyError: if it is not clear which output a result is made of.
        """
        names = self.names(target)
        streams: list[Stream] = []
        results = []
        for name in outputs if names is None else names:
            source = self._source(name, outputs)
            scale = self._as_scale(_of(self.scale, name, _of(self.scale, source, 1)))
            stream = Stream(source, as_activation(_of(self.activation, name)), scale)
            if stream not in streams:
                streams.append(stream)
            results.append(Result(name, streams.index(stream), as_reduction(_of(self.reduce, name))))
        return streams, results

    @staticmethod
    def _source(name: Name, outputs: list[Name]) -> Name:
        if name in outputs:
            return name
        if len(outputs) == 1:
            return outputs[0]
        there = ", ".join(map(repr, outputs))
        raise NoSuchKeyError(f"there is a result {name!r}, but the model returns {there}: call results after these")


def _of(given: Any, name: Name, default: Any = None) -> Any:
    return given.get(name, default) if isinstance(given, Mapping) else given
