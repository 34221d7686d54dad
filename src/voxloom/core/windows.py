"""How much a voxel counts, by its place in the patch."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..errors import ModeError

__all__ = ["MODES", "OverlapMode", "Window", "resolve_window", "sampled"]

Window = Callable[[int], Tensor]
"""Takes the voxels of a patch along an axis, and gives their weights: a 1-D tensor of that length, positive."""

OverlapMode = str | Window
"""`"crop"`, `"average"`, `"hann"`, `"gaussian"`, or a window of one's own."""


def average(size: int) -> Tensor:
    """Every voxel counts the same."""
    return torch.ones(size, dtype=torch.float64)


def hann(size: int) -> Tensor:
    """Hann window without the zeros at its two ends."""
    return torch.hann_window(size + 2, periodic=False, dtype=torch.float64)[1:-1]


def gaussian(size: int) -> Tensor:
    """Gaussian with a standard deviation of an eighth of the patch, as MONAI and nnU-Net use it.

    Unlike theirs, it is nowhere rounded to 0 nor raised to 0.001, and its peak is at the middle also of even sizes.

    Source: Isensee et al., nnU-Net, Nature Methods 18, 203-211 (2021), https://doi.org/10.1038/s41592-020-01008-z.
    """
    distance = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    return torch.exp(-0.5 * (distance / (size / 8)) ** 2)


WINDOWS: dict[str, Window] = {"average": average, "hann": hann, "gaussian": gaussian}
MODES = ("crop", *WINDOWS)


def resolve_window(mode: OverlapMode) -> Window | None:
    """Find the window of an overlap mode; None stands for `crop`, which has none.

    Raises:
        ModeError: if there is no such mode, or, when the window is used, if it does not return positive weights.
    """
    if mode == "crop":
        return None
    if callable(mode):
        return _Checked(mode)
    try:
        return WINDOWS[mode]
    except (KeyError, TypeError):
        raise ModeError(
            f"Overlap mode must be one of {', '.join(map(repr, MODES))} or a function that makes a window of a size,"
            f" but overlap_mode is {mode!r}"
        ) from None


class _Checked:
    """A user's window, whose weights are checked each time."""

    def __init__(self, window: Window) -> None:
        self.window = window
        self.name = getattr(window, "__name__", repr(window))

    def __call__(self, size: int) -> Tensor:
        returned = self.window(size)
        try:
            weights = torch.as_tensor(returned).detach().to("cpu", torch.float64)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ModeError(
                f"the window {self.name} was called with {size} and must return a 1-D tensor, but it returned {returned!r}"
            ) from error
        if weights.shape != (size,) or not bool(((weights > 0) & weights.isfinite()).all()):
            raise ModeError(
                f"the window {self.name} was called with {size} and must return a 1-D tensor of {size} positive, finite numbers,"
                f" but it returned shape {tuple(weights.shape)} and values from {_extreme(weights, 'min')}"
                f" to {_extreme(weights, 'max')}; to give a voxel no weight, use a very small number"
            )
        return weights


class _Sampled:
    """A window for some sizes only, so that it can be pickled whatever it was made of."""

    def __init__(self, weights: dict[int, Tensor]) -> None:
        self.weights = weights

    def __call__(self, size: int) -> Tensor:
        return self.weights[size]


def sampled(window: Window, sizes: Iterable[int]) -> Window:
    """Work a window of the user's out for the sizes that are needed; those that have a name stay as they are."""
    return window if window in WINDOWS.values() else _Sampled({size: window(size) for size in sizes})


def _extreme(weights: Tensor, which: str) -> float:
    return float(getattr(weights, which)()) if weights.numel() else float("nan")
