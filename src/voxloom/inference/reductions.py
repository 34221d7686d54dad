"""What is made of a sum of patches, once a voxel is complete."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from ..core.sizes import Ints, as_int
from ..core.values import as_number, sum_dtype
from ..errors import ModeError, OutputError, SizeError
from ..models.outputs import ACTIVATIONS

__all__ = ["AfterSum", "AfterSumStep", "Function", "Reduction", "Regions", "Surroundings", "as_reduction"]

# Voxels of a channel that are compared at a time: few enough to stay in the processor's cache, and enough for the thread to be
# left alone by others, with which it shares Python's lock between one step and the next.
CHUNK_VOXELS = 2**18
# Channels whose mean is looked at to find those that may be the largest: more than meet in most places.
MOST_CONTENDING = 4


@dataclass(frozen=True, eq=False)
class Surroundings:
    """What some voxels of another grid are interpolated from, of which a reduction reads the channels that it needs."""

    views: Sequence[Tensor]
    """Tensors `(C, ...)` that hold all of it, which are not to be written to."""
    read: Callable[[Sequence[int] | None], Tensor]
    """Gives some channels, or all, as `(c, i, j, k)`; it may be a view, which is not to be written to."""
    interpolate: Callable[[Tensor], Tensor]
    """Makes `(c, *shape)` of any of these; it may be a view of them."""
    shape: Ints
    """Voxels of the result."""


class Reduction(Protocol):
    """Makes the result out of the sum of a model's outputs, once a voxel is complete."""

    @property
    def is_labels(self) -> bool:
        """Whether the result is a label map."""
        ...

    @property
    def needs_squares(self) -> bool:
        """Whether the means of the squares of all channels follow the channels."""
        ...

    @property
    def is_shared(self) -> bool:
        """Whether several threads may call it at a time."""
        ...

    def __call__(self, block: Tensor) -> Tensor:
        """Reduce a tensor `(C, i, j, k)` to one `(C', i, j, k)`."""
        ...

    def of_interpolated(self, around: Surroundings) -> Tensor:
        """Reduce what is interpolated to `(C', *around.shape)`."""
        ...


class _OfAll:
    """A reduction that needs all channels."""

    def __call__(self, block: Tensor) -> Tensor:
        """See `Reduction`."""
        raise NotImplementedError

    def of_interpolated(self, around: Surroundings) -> Tensor:
        """See `Reduction`."""
        return self(around.interpolate(around.read(None)))


@dataclass(frozen=True)
class Everything(_OfAll):
    """Keeps all channels."""

    is_labels = False
    needs_squares = False
    is_shared = True

    def __call__(self, block: Tensor) -> Tensor:
        """See `Reduction`."""
        return block


@dataclass(frozen=True)
class ArgMax:
    """The channel with the largest value; of those that are equal, the first."""

    is_labels = True
    needs_squares = False
    is_shared = True

    def __call__(self, block: Tensor) -> Tensor:
        """See `Reduction`."""
        return _largest(block, range(len(block)), label_dtype(len(block) - 1))

    def of_interpolated(self, around: Surroundings) -> Tensor:
        """See `Reduction`: channels that are the largest nowhere between the voxels are left out."""
        first = around.views[0]
        chosen, dtype = _contending(around.views), label_dtype(len(first) - 1)
        if len(chosen) == 1:
            return torch.full((1, *around.shape), chosen[0], dtype=dtype, device=first.device)
        values = around.read(None if len(chosen) == len(first) else chosen)
        return _largest(around.interpolate(values), chosen, dtype)


def _largest(block: Tensor, names: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Say which channel is the largest, by names that rise from channel to channel."""
    flat = block.reshape(len(block), -1)
    labels = torch.full(flat.shape[1:], names[0], dtype=dtype, device=block.device)
    numbers = torch.tensor(names, device=block.device)
    for start in range(0, len(labels), CHUNK_VOXELS):
        part, found = flat[:, start : start + CHUNK_VOXELS], labels[start : start + CHUNK_VOXELS]
        if block.device.type == "cpu":
            _find_largest(map(_as_array, part), names, found.numpy())
        else:
            found.copy_(numbers[part.argmax(0)])
    return labels.view(1, *block.shape[1:])


def _contending(views: Sequence[Tensor]) -> list[int]:
    """Give the channels that may be the largest somewhere between the voxels of tensors `(C, i, j, k)`.

    At each place the largest is at least the mean of some channels, whichever these are. What is interpolated of a channel is not
    above its largest value, and of the mean not below its least.
    """
    views = [view if view.is_floating_point() else view.to(sum_dtype(view.dtype)) for view in views]
    # Plane by plane first, since the rows of a view are short: with 118 classes a whole prediction takes a sixth less.
    most = torch.stack([view.amax(1).flatten(1).amax(1) for view in views]).amax(0)
    ranked = most.topk(min(MOST_CONTENDING, len(most)))[1].tolist()
    sums = [view[ranked[0]].to(sum_dtype(view.dtype), copy=True) for view in views]
    means = [[float(each.min()) for each in sums]]
    for count, channel in enumerate(ranked[1:], start=2):
        means.append([float(each.add_(view[channel]).min()) / count for each, view in zip(sums, views, strict=True)])
    least = max(map(min, means))
    rounding = 8 * torch.finfo(torch.float32).eps * max(1.0, float(most.abs().max()), abs(least))
    return torch.nonzero(most >= least - rounding).flatten().tolist() or ranked[:1]


def _as_array(values: Tensor) -> np.ndarray:
    """Half precision is not known to NumPy, or slow."""
    is_half = values.is_floating_point() and values.dtype.itemsize < torch.float32.itemsize
    return (values.float() if is_half else values).numpy()


def _find_largest(channels: Iterator[np.ndarray], names: Sequence[int], labels: np.ndarray) -> None:
    """Set labels, which are the first name, to that of the first channel with the largest value.

    One pass over the channels with what was best so far takes an eighth of the time of NumPy's `argmax`, and in one thread a
    twelfth of PyTorch's. NumPy does it in this thread alone: others would be in the way of the model's.
    """
    best = next(channels).copy()
    is_better = np.empty(best.shape, dtype=bool)
    label = np.empty_like(labels)
    for name, channel in zip(names[1:], channels, strict=True):
        np.greater(channel, best, out=is_better)
        np.multiply(is_better, labels.dtype.type(name), out=label)
        np.maximum(labels, label, out=labels)  # names rise, so the last one that was better is the largest
        np.maximum(best, channel, out=best)


@dataclass(frozen=True)
class Threshold(_OfAll):
    """1 where a channel is larger than a number, else 0; for each channel."""

    value: float
    is_labels = True
    needs_squares = False
    is_shared = True

    def __call__(self, block: Tensor) -> Tensor:
        """See `Reduction`."""
        return (block > self.value).view(torch.uint8)


@dataclass(frozen=True)
class Regions(_OfAll):
    """One label map out of channels that stand for regions, of which later ones lie on top of earlier ones.

    Source: Isensee et al., nnU-Net for Brain Tumor Segmentation (2020), https://doi.org/10.1007/978-3-030-72087-2_11.

    Args:
        labels: label of each channel's region, in the order of the channels.
        threshold: a voxel belongs to a region where its channel is larger.

    Example:
        >>> regions = Regions(labels=(2, 1))
        >>> regions(torch.tensor([0.9, 0.8]).view(2, 1, 1, 1)).item(), regions(torch.tensor([0.9, 0.1]).view(2, 1, 1, 1)).item()
        (1, 2)
    """

    labels: tuple[int, ...]
    threshold: float = 0.5
    is_labels = True
    needs_squares = False
    is_shared = True

    def __post_init__(self) -> None:
        if not isinstance(self.labels, Sequence):
            raise SizeError(f"the labels of Regions are {self.labels!r}: give one for each channel, such as (1, 2)")
        object.__setattr__(self, "labels", tuple(as_int(label, "a label of Regions", 0) for label in self.labels))
        as_number(self.threshold, "threshold")

    def __call__(self, block: Tensor) -> Tensor:
        """See `Reduction`."""
        if len(block) != len(self.labels):
            raise OutputError(f"the output has {len(block)} channels, but Regions has {len(self.labels)} labels")
        labels = torch.zeros(block.shape[1:], dtype=label_dtype(max(self.labels)), device=block.device)
        for label, channel in zip(self.labels, block, strict=True):
            labels.masked_fill_(channel > self.threshold, label)
        return labels[None]


@dataclass(frozen=True)
class Entropy(_OfAll):
    """Entropy of the channels, which are probabilities, in nats: a measure of uncertainty."""

    is_labels = False
    needs_squares = False
    is_shared = True

    def __call__(self, block: Tensor) -> Tensor:
        """See `Reduction`."""
        total = torch.zeros(block.shape[1:], dtype=sum_dtype(block.dtype), device=block.device)
        for channel in block:
            total += torch.special.entr(channel.to(total.dtype).clamp(min=0))  # sums of rounded numbers may be less than 0
        return total[None]


@dataclass(frozen=True)
class Variance(_OfAll):
    """Variance of what is averaged, summed over the channels: of an ensemble, of mirrored patches and of those that overlap."""

    is_labels = False
    needs_squares = True
    is_shared = True

    def __call__(self, block: Tensor) -> Tensor:
        """See `Reduction`."""
        mean, squares = block.tensor_split(2)
        # Rounding may make it less than 0.
        return (squares - mean.square()).clamp_(min=0).sum(0, keepdim=True).float()

    def of_interpolated(self, around: Surroundings) -> Tensor:
        """See `Reduction`: the variance itself is interpolated, since a slope of the mean is none."""
        return around.interpolate(self(around.read(None)))


@dataclass(frozen=True)
class Channels:
    """Some of the channels."""

    indices: tuple[int, ...]
    is_labels = False
    needs_squares = False
    is_shared = True

    def __call__(self, block: Tensor) -> Tensor:
        """See `Reduction`."""
        self._check(len(block))
        return block[list(self.indices)]

    def _check(self, channels: int) -> None:
        wrong = [index for index in self.indices if index >= channels]
        if wrong:
            raise OutputError(f"channel {wrong[0]} was chosen, but the output has {channels} channels")

    def of_interpolated(self, around: Surroundings) -> Tensor:
        """See `Reduction`."""
        self._check(len(around.views[0]))
        return around.interpolate(around.read(self.indices))


@dataclass(frozen=True)
class Function(_OfAll):
    """A user's function."""

    function: Callable[[Tensor], Tensor]
    is_labels = False
    needs_squares = False
    is_shared = False

    def __call__(self, block: Tensor) -> Tensor:
        """See `Reduction`."""
        result = self.function(block)
        if not isinstance(result, Tensor) or result.ndim != 4 or result.shape[1:] != block.shape[1:]:
            what = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else f"type {type(result).__name__}"
            raise OutputError(
                f"reduce was called with a block of shape {tuple(block.shape)} and must return a tensor with the same last three"
                f" sizes, but it returned one of {what}"
            )
        return result

    def of_interpolated(self, around: Surroundings) -> Tensor:
        """See `Reduction`: a copy, since it may write to what it is given."""
        return self(around.interpolate(around.read(None)).clone())


AfterSumStep = Literal["softmax", "sigmoid", "divide", "divide_signed"]


@dataclass(frozen=True)
class AfterSum:
    """First turns the sums of a voxel into something else, and then reduces that.

    Args:
        first: what is done: `"softmax"`, `"sigmoid"`, or `"divide"` by the last channel, which is the sum of weights, and is 0
            only where nothing was computed. With `"divide_signed"` weights are the user's, and where they sum to 0 there is NaN.
        reduction: what is done then, also between voxels.
    """

    first: AfterSumStep
    reduction: Reduction

    @property
    def is_labels(self) -> bool:
        """See `Reduction`."""
        return self.reduction.is_labels

    @property
    def needs_squares(self) -> bool:
        """See `Reduction`."""
        return self.reduction.needs_squares

    @property
    def is_shared(self) -> bool:
        """See `Reduction`."""
        return self.reduction.is_shared

    def _turned(self, block: Tensor) -> Tensor:
        if self.first == "divide":
            # Where nothing was computed, both are 0.
            return block[:-1] / block[-1:].clamp(min=torch.finfo(block.dtype).tiny)
        if self.first == "divide_signed":
            if self.is_labels and not bool(block[-1].all()):
                raise OutputError("the weights of the windows sum to 0 at some voxel, which so has no label: give other weights")
            return block[:-1] / block[-1:]
        return ACTIVATIONS[self.first](block[None])[0]

    def __call__(self, block: Tensor) -> Tensor:
        """See `Reduction`."""
        return self.reduction(self._turned(block))

    def of_interpolated(self, around: Surroundings) -> Tensor:
        """See `Reduction`: what comes of the sums is interpolated, and not the sums."""
        turned = self._turned(around.read(None))

        def read(channels: Sequence[int] | None) -> Tensor:
            return turned if channels is None else turned[list(channels)]

        return self.reduction.of_interpolated(replace(around, views=[turned], read=read))


NAMED: dict[str, Reduction] = {"argmax": ArgMax(), "entropy": Entropy(), "variance": Variance(), "scores": Everything()}


def as_reduction(given: Any) -> Reduction:
    """Find a reduction.

    Args:
        given: None or `"scores"` for all channels; `"argmax"`, `"entropy"` or `"variance"`; a number, which each channel is
            compared with; `Regions`; indices of channels; or a function of blocks `(C, i, j, k)`.

    Raises:
        ModeError: if there is none of that name.
    """
    if given is None:
        return Everything()
    if isinstance(given, str) and given in NAMED:
        return NAMED[given]
    if isinstance(given, Regions | AfterSum):
        return given
    if isinstance(given, Real) and not isinstance(given, bool):
        if math.isnan(given):
            raise ModeError("reduce is nan, which nothing is larger than: give a number")
        return Threshold(float(given))
    if isinstance(given, np.ndarray | Tensor) and given.ndim == 1:
        given = given.tolist()
    if isinstance(given, Sequence) and not isinstance(given, str) and given:
        return Channels(tuple(as_int(index, "a channel of reduce", 0) for index in given))
    if callable(given):
        return Function(given)
    raise ModeError(
        f"reduce is {given!r}: it must be None, {', '.join(map(repr, NAMED))}, a threshold, Regions(labels), indices of channels,"
        " or a function of finished blocks"
    )


def label_dtype(largest: int) -> torch.dtype:
    """Say which type holds labels up to a number, whichever occur."""
    return next(dtype for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64) if largest <= torch.iinfo(dtype).max)
