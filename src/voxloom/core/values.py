"""Which numbers a type can hold."""

import math
from numbers import Real
from typing import Any

import torch

from ..errors import SizeError

__all__ = ["as_number", "can_hold", "limits_of"]


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
