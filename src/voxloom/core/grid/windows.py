"""How much a voxel counts, by its place in the patch."""

import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Real

import torch
from torch import Tensor

from ...errors import ModeError

__all__ = ["MODES", "MONAI", "Gaussian", "OverlapMode", "Window", "for_axis", "resolve_window", "sampled"]

Window = Callable[[int], Tensor]
"""Takes the voxels of a patch along an axis, and gives their weights: a 1-D tensor of that length, positive. If it has a method
`for_axis(axis)`, that gives the window of each axis."""

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
    return _gaussian(size, 1 / 8)


def _gaussian(size: int, width: float) -> Tensor:
    distance = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    return torch.exp(-0.5 * (distance / (size * width)) ** 2)


def nnunet(size: int) -> Tensor:
    """The Gaussian of nnU-Net, whose peak is on a voxel: that behind the middle of an even size.

    Source: see `gaussian`.
    """
    distance = torch.arange(size, dtype=torch.float64) - size // 2
    return torch.exp(-0.5 * (distance / (size / 8)) ** 2)


class Gaussian:
    """A Gaussian of any width, in place of `"gaussian"`.

    Args:
        width: standard deviation as a part of the patch: one number, or one for each axis.
        floor: what weights are raised to, in a patch whose largest weight is 1. `Gaussian(0.125, floor=0.001)`, or `"monai"`, has
            MONAI's weights. Predictions know it, and aggregators do not, since such weights are no product of one for each axis.

    Raises:
        ModeError: if one is not a positive number.

    Example:
        >>> Gaussian(0.25)(4).tolist() == Gaussian((1, 0.25, 1)).for_axis(1)(4).tolist()
        True
    """

    def __init__(self, width: float | Sequence[float] = 1 / 8, floor: float = 0) -> None:
        widths = tuple(width) if isinstance(width, Sequence) and not isinstance(width, str) else (width,)
        for each in widths:
            if not isinstance(each, Real) or isinstance(each, bool) or not 0 < each < math.inf:
                raise ModeError(f"the width of a Gaussian is {width!r}: it must be a positive part of the patch, such as 0.125")
        if not isinstance(floor, Real) or isinstance(floor, bool) or not 0 <= floor < 1:
            raise ModeError(f"the floor of a Gaussian is {floor!r}: it must be at least 0 and less than 1, as MONAI's 0.001")
        self.widths: tuple[float, ...] = tuple(float(each) for each in widths)
        self.floor: float = float(floor)

    def of_patch(self, sizes: Sequence[int]) -> Tensor:
        """Give the weights of a whole patch, in float32."""
        weights = torch.ones((), dtype=torch.float64)
        for axis, size in enumerate(sizes):
            weights = weights[..., None] * self._along(axis)(size)
        return weights.clamp_(min=self.floor).float()

    def _along(self, axis: int) -> "Gaussian":
        return Gaussian(self.widths if len(self.widths) == 1 else self.widths[axis])

    def __call__(self, size: int) -> Tensor:
        """Give the weights along an axis, where all have one width."""
        if self.floor:
            raise ModeError(f"the weights of {self} are not made axis by axis, as is needed here: only predict can use them")
        if len(self.widths) > 1:
            raise ModeError(
                f"the Gaussian has the widths {self.widths}, one for each axis, so that it must be said which axis is meant"
            )
        return _gaussian(size, self.widths[0])

    def for_axis(self, axis: int) -> "Gaussian":
        """Give the window of one axis."""
        if len(self.widths) == 1:
            return self
        if axis >= len(self.widths):
            raise ModeError(f"the Gaussian has {len(self.widths)} widths, {self.widths}: give one, or one for each axis")
        return Gaussian(self.widths[axis], self.floor)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Gaussian) and (self.widths, self.floor) == (other.widths, other.floor)

    def __hash__(self) -> int:
        return hash((self.widths, self.floor))

    def __repr__(self) -> str:
        floor = f", floor={self.floor}" if self.floor else ""
        return f"Gaussian({self.widths[0] if len(self.widths) == 1 else self.widths}{floor})"


def for_axis(window: Window, axis: int) -> Window:
    """Give the window of one axis; most are the same for all."""
    own = getattr(window, "for_axis", None)
    return window if own is None else own(axis)


MONAI = Gaussian(1 / 8, floor=1e-3)
"""What `"monai"` stands for.

Source: MONAI Consortium, `compute_importance_map`, https://docs.monai.io/en/stable/data.html."""
WINDOWS: dict[str, Window] = {"average": average, "hann": hann, "gaussian": gaussian, "nnunet": nnunet}
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
            f"Overlap mode must be one of {', '.join(map(repr, MODES))}, or 'monai' in predictions, or a function that makes"
            f" a window of a size,"
            f" but overlap_mode is {mode!r}"
        ) from None


class _Checked:
    """A user's window, whose weights are checked each time."""

    def __init__(self, window: Window) -> None:
        self.window = window
        self.name = getattr(window, "__name__", repr(window))

    def for_axis(self, axis: int) -> "Window":
        """Give the window of one axis, where it has one for each."""
        own = for_axis(self.window, axis)
        return self if own is self.window else _Checked(own)

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
    """A window for some sizes of each axis only, so that it can be pickled whatever it was made of."""

    def __init__(self, weights: Sequence[dict[int, Tensor]]) -> None:
        self.weights = weights

    def for_axis(self, axis: int) -> "_Sampled":
        """Give the window of one axis."""
        return _Sampled([self.weights[axis]])

    def __call__(self, size: int) -> Tensor:
        return self.weights[0][size]


def sampled(window: Window, sizes: Sequence[Iterable[int]]) -> Window:
    """Work a window of the user's out for the sizes of each axis that are needed; those that have a name stay as they are."""
    if window in WINDOWS.values():
        return window
    windows = [for_axis(window, axis) for axis in range(len(sizes))]
    return _Sampled([{size: own(size) for size in needed} for own, needed in zip(windows, sizes, strict=True)])


def _extreme(weights: Tensor, which: str) -> float:
    return float(getattr(weights, which)()) if weights.numel() else float("nan")
