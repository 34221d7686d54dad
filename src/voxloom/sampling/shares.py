"""How often each of several things is drawn."""

import math
import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import SamplingError

__all__ = ["as_probabilities", "pick_share"]

# Probabilities that are not 0 are at least so large, so that their parts of the sum are numbers.
LEAST_SHARE = 1e-300


def as_probabilities(given: Any, name: str = "label_probabilities") -> dict[int, float]:
    """Check what was given as a dict of labels and how often each is drawn, in any unit.

    Raises:
        SamplingError: if a label is no whole number, or a probability is negative, not finite, or too small to be drawn.
    """
    if not isinstance(given, Mapping) or not given:
        raise SamplingError(f"{name} is {given!r}: it must be a dict of labels and their probabilities")
    result = {}
    for label, share in given.items():
        is_whole = not isinstance(label, bool) and not (isinstance(label, Tensor) and label.dtype in (torch.bool, torch.float32))
        try:
            number = operator.index(label) if is_whole else None
        except (TypeError, ValueError):
            number = None
        if number is None:
            raise SamplingError(f"{name} names the label {label!r}: labels must be whole numbers")
        try:
            value = float("nan") if isinstance(share, bool | str | complex) else float(share)
        except (TypeError, ValueError, OverflowError):
            value = float("nan")
        if not math.isfinite(value) or value < 0:
            raise SamplingError(f"the probability of {label!r} in {name} is {share!r}: it must be a finite number of at least 0")
        result[number] = value
    wanted = [value for value in result.values() if value > 0]
    if wanted and not (min(wanted) >= LEAST_SHARE and math.isfinite(sum(wanted))):
        raise SamplingError(f"{name} is {dict(result)}: its numbers must be 0 or at least {LEAST_SHARE}, and have a finite sum")
    return result


def pick_share(shares: Mapping[int, float], rng: np.random.Generator) -> int:
    """Draw one of several numbers, each as often as its share says."""
    cumulative = np.cumsum(list(shares.values()))
    return list(shares)[int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))]
