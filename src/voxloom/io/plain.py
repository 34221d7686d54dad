"""Values as JSON, from which they come back as they were: tuples as tuples, and keys of dicts as numbers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .protocols import Json

__all__ = ["MOST_NUMBERS", "from_plain", "to_plain"]

# Numbers in an array that is written as text.
MOST_NUMBERS = 2**16


def to_plain(value: Any) -> Json:
    """Write a value as JSON: numbers, texts, paths, small arrays, and lists, tuples and dicts of these.

    Raises:
        TypeError: names what else there is.
        RecursionError: if something holds itself.

    Example:
        >>> from_plain(to_plain({1: ("liver", 2.5)}))
        {1: ('liver', 2.5)}
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return {"path": str(value)}
    if isinstance(value, tuple):
        return {"tuple": list(map(to_plain, value))}
    if isinstance(value, list):
        return list(map(to_plain, value))
    if isinstance(value, Mapping):
        return {"dict": [[to_plain(key), to_plain(each)] for key, each in value.items()]}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf" and value.itemsize <= 8 and value.size <= MOST_NUMBERS:
        return {"array": value.tolist(), "dtype": value.dtype.str, "shape": value.shape}
    if isinstance(value, Tensor) and _is_plain(value):
        return {"tensor": value.tolist(), "dtype": str(value.dtype).removeprefix("torch."), "shape": value.shape}
    raise TypeError(f"{type(value).__module__}.{type(value).__qualname__}")


def _is_plain(tensor: Tensor) -> bool:
    is_kept = tensor.layout == torch.strided and not (tensor.is_meta or tensor.is_quantized or tensor.dtype.is_complex)
    return is_kept and tensor.numel() <= MOST_NUMBERS


def from_plain(told: Json) -> Any:
    """Give a value that was written.

    Raises:
        KeyError, ValueError, TypeError, AttributeError: if it is damaged.
    """
    if isinstance(told, list):
        return list(map(from_plain, told))
    if not isinstance(told, dict):
        return told
    if "path" in told:
        return Path(told["path"])
    if "tuple" in told:
        return tuple(map(from_plain, told["tuple"]))
    if "array" in told:
        return np.array(told["array"], told["dtype"]).reshape(told["shape"])
    if "tensor" in told:
        return torch.tensor(told["tensor"], dtype=getattr(torch, told["dtype"])).reshape(told["shape"])
    return {from_plain(key): from_plain(each) for key, each in told["dict"]}
