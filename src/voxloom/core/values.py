"""Numbers: which ones a type can hold, in which type they are summed, and whether they are finite."""

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..errors import SizeError

__all__ = ["as_number", "can_hold", "is_finite", "limits_of", "sum_dtype"]


def as_number(value: Any, name: str) -> float | int:
    """Check that a value is a real number.

    Raises:
        SizeError: if it is something else.
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        raise SizeError(f"{name} is {value!r}, of type {type(value).__name__}: it must be a number")
    return value  # type: ignore[return-value]


def limits_of(dtype: torch.dtype) -> tuple[float | int, float | int]:
    """Give the least and the greatest finite number of a type."""
    if dtype == torch.bool:
        return 0, 1
    info = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    return info.min, info.max


def can_hold(dtype: torch.dtype, value: float) -> bool:
    """Whether a type holds a number: whole types hold only whole numbers, and floats of all sizes only what they reach."""
    low, high = limits_of(dtype)
    if dtype.is_floating_point:
        return not math.isfinite(value) or low <= value <= high
    return math.isfinite(value) and value == int(value) and low <= value <= high


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type in which values are summed: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_finite(values: Tensor) -> bool:
    """Whether a tensor `(C, ...)` holds neither NaN nor infinity: quick where it does not, which a sum of all values shows."""
    if not values.is_floating_point():
        return True
    # Channel by channel, since sums of another type are made of a copy; in half precision they would soon be infinite.
    dtype = sum_dtype(values.dtype)
    parts = [values] if values.dtype == dtype else values
    if math.isfinite(sum(float(part.sum(dtype=dtype)) for part in parts)):
        return True
    return bool(values.isfinite().all())
