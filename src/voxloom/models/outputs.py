"""What a model gives: its outputs by name, and what acts on them before patches are summed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.sizes import Ints, Scale
from ..core.values import sum_dtype
from ..errors import ModeError, OutputError
from ..runtime import memory

__all__ = [
    "Activation",
    "Name",
    "OutputRequest",
    "OutputSpec",
    "RequestsFor",
    "as_activation",
    "called",
    "check_output",
    "outputs_of",
]

# Types of outputs.
DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool} | {
    getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)
}

Name = str | None
"""Name of an output or a result; None where there is only one, without a name."""

Activation = Callable[[Tensor], Tensor]
"""Takes and gives a batch `(B, C, I, J, K)`."""


def _softmax(output: Tensor) -> Tensor:
    return torch.softmax(output if output.dtype == torch.float64 else output.float(), dim=1)


def _sigmoid(output: Tensor) -> Tensor:
    return torch.sigmoid(output if output.dtype == torch.float64 else output.float())


def weighted(output: Tensor, weights: Tensor) -> Tensor:
    """Multiply an output `(B, C, ...)` by the weights of its voxels, which follow it as one more channel.

    Args:
        output: the output.
        weights: `(B or 1, 1, ...)`, of a patch; of an output of another size the nearest are taken.
    """
    if weights.shape[2:] != output.shape[2:]:
        weights = nn.functional.interpolate(weights, output.shape[2:], mode="nearest-exact")
    shape, dtype = (len(output), output.shape[1] + 1, *output.shape[2:]), sum_dtype(output.dtype)
    made = memory.empty(shape, dtype) if output.device.type == "cpu" else output.new_empty(shape, dtype=dtype)
    torch.mul(output, weights, out=made[:, :-1])
    made[:, -1:] = weights
    return made


ACTIVATIONS: dict[str, Activation] = {"softmax": _softmax, "sigmoid": _sigmoid}


def as_activation(given: Any) -> Activation | None:
    """Find an activation.

    Raises:
        ModeError: if there is none of that name.
    """
    if given is None or callable(given):
        return given
    try:
        return ACTIVATIONS[given]
    except (KeyError, TypeError):
        raise ModeError(f"activation is {given!r}: it must be None, {', '.join(map(repr, ACTIVATIONS))} or a function") from None


@dataclass(frozen=True)
class OutputRequest:
    """One sum of patches that is asked for: an output of the model, after an activation."""

    source: Name
    """Name of the output."""
    activation: Activation | None
    scale: Scale
    """How many times larger the output is than the input, on each axis."""
    has_squares: bool = False
    """Whether the squares of its channels follow them, as more channels, for what is made of both."""


RequestsFor = Callable[[list[Name]], list[OutputRequest]]
"""Says what is asked for of a model whose outputs have these names."""


@dataclass(frozen=True)
class OutputSpec:
    """What a model gives for each patch, after an activation."""

    source: Name
    """Name of the output."""
    channels: int
    dtype: torch.dtype
    scale: Scale
    copies: int
    """How many tensors of its size there are at a time while it is made."""

    def size(self, patch_size: Ints) -> Ints:
        """Voxels of the output for one patch."""
        return tuple(int(length * factor) for length, factor in zip(patch_size, self.scale, strict=True))

    def held_dtype(self, is_cropped: bool) -> torch.dtype:
        """Type in which patches are put together: their own where each voxel is taken from one of them."""
        return self.dtype if is_cropped else sum_dtype(self.dtype)

    def bytes_per_voxel(self, is_cropped: bool, is_partial: bool) -> int:
        """Bytes of the sum, and of the weights where patches are left out."""
        held = self.held_dtype(is_cropped)
        return self.channels * held.itemsize + sum_dtype(held).itemsize * is_partial


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
