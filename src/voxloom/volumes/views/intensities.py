"""Intensities as a model expects them: clipped, and scaled by numbers that are given or are those of the volume."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ...core.boxes import Box
from ...core.values import sum_dtype
from ...errors import SpecError
from ...io.protocols import Extent, Json, VolumeSource, read_checked
from .spatial import View

__all__ = ["Intensity", "NormalizedSource", "Region", "foreground_box"]

Region = Literal["all", "nonzero", "mask"] | float
"""Which voxels count: all, those of the channel that are not 0, those of a mask of the whole volume, or those above a number."""

# What a standard deviation or a range is at least, so that what is constant becomes 0.
LEAST = 1e-8
# Planes that are read together hold about as many voxels.
CHUNK_VOXELS = 2**22
# Values of a float32 in order are told apart by their first half, and then by their second.
HALF = 2**16


@dataclass(frozen=True)
class Intensity:
    """What is done to the values of a channel: clip, subtract, divide.

    Numbers that are not given are found in one pass over the volume, which gives the same for every size of block: sums are made
    plane by plane, and added exactly. Percentiles take two passes, and are exact too (NumPy's linear interpolation).

    Example:
        >>> Intensity(clip=(-1000, 1000), scale="z-score", mean=100, std=50).of_channel(None, 0).apply(torch.tensor([2000.0]))
        tensor([18.])
    """

    clip: tuple[float, float] | None = None
    """Least and greatest value."""
    clip_percentiles: tuple[float, float] | None = None
    """The same in percentiles of the voxels that count."""
    scale: Literal["none", "z-score", "range", "percentiles"] = "none"
    """`"z-score"` subtracts the mean and divides by the standard deviation; `"range"` brings `low` to 0 and `high` to 1, or to
    the numbers in `onto`; `"percentiles"` does so with percentiles."""
    mean: float | None = None
    """Those of the voxels that count, if they are not given."""
    std: float | None = None
    low: float | None = None
    """Least and greatest of the voxels that count, if they are not given; of `"percentiles"` they are from 0 to 100."""
    high: float | None = None
    onto: tuple[float, float] = (0.0, 1.0)
    """What `low` and `high` are brought to."""
    over: Region = "all"
    """Which voxels count; of `"nonzero"` and `"mask"` the others keep their value."""

    def __post_init__(self) -> None:
        if self.onto[0] == self.onto[1]:
            raise SpecError(f"onto is {self.onto}: low and high must be brought to two numbers that differ")
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise SpecError(f"low is {self.low}, and high is {self.high}: low must be less")

    @property
    def looks_at_volume(self) -> bool:
        """Whether the volume is looked at for numbers."""
        if self.clip_percentiles is not None or self.scale == "percentiles":
            return True
        if self.scale == "z-score":
            return self.mean is None or self.std is None
        return self.scale == "range" and (self.low is None or self.high is None)

    def of_channel(self, source: VolumeSource | None, channel: int, mask: np.ndarray | None = None) -> "Scaling":
        """Find the numbers for a channel of a volume.

        Args:
            source: the volume, which is read if that is needed.
            channel: number of the channel.
            mask: booleans of the volume's shape, for `over="mask"`.
        """
        values = _Values(source, channel, self.over, mask) if self.looks_at_volume and source is not None else None
        low, high = self.clip or (-math.inf, math.inf)
        if self.clip_percentiles is not None and values is not None:
            low, high = values.percentiles(self.clip_percentiles)
        shift, divisor = 0.0, 1.0
        if self.scale == "z-score":
            mean, std = self.mean, self.std
            if values is not None and (mean is None or std is None):
                found = values.mean_and_std(low, high)
                mean, std = found[0] if mean is None else mean, found[1] if std is None else std
            # What is constant stays as far from a given mean as it is.
            is_constant = std is not None and std < LEAST and self.std is None and self.mean is not None
            shift, divisor = mean or 0.0, 1.0 if std is None or is_constant else max(std, LEAST)
        elif self.scale != "none":
            ends = (self.low, self.high)
            if values is not None and self.scale == "percentiles":
                ends = values.percentiles((0.0 if self.low is None else self.low, 100.0 if self.high is None else self.high))
            elif values is not None:
                found = values.extremes(low, high)
                ends = (found[0] if self.low is None else self.low, found[1] if self.high is None else self.high)
            shift = ends[0] or 0.0
            width = (1.0 if ends[1] is None else ends[1]) - shift
            # What is constant becomes the low end.
            divisor = max(width, LEAST) / (self.onto[1] - self.onto[0]) if width else 1.0
            shift -= self.onto[0] * divisor
        return Scaling(low, high, shift, divisor, self.over in ("nonzero", "mask"), self.over == "mask")


@dataclass(frozen=True)
class Scaling:
    """What is done to the values of a channel, in numbers."""

    low: float
    high: float
    shift: float
    divisor: float
    is_within: bool
    """Whether voxels that do not count keep their value."""
    is_masked: bool = False
    """Whether a mask says which these are; else they are those that are 0."""

    @property
    def is_nothing(self) -> bool:
        """Whether no value changes."""
        return (self.low, self.high, self.shift, self.divisor) == (-math.inf, math.inf, 0.0, 1.0)

    def apply(self, values: Tensor) -> Tensor:
        """Give values as the model expects them."""
        clipped = values if self.low == -math.inf and self.high == math.inf else values.clamp(self.low, self.high)
        return (clipped - self.shift).div_(self.divisor)

    def __str__(self) -> str:
        parts = [] if self.low == -math.inf and self.high == math.inf else [f"clipped to {self.low:.5g} … {self.high:.5g}"]
        if (self.shift, self.divisor) != (0.0, 1.0):
            parts.append(f"minus {self.shift:.5g}, divided by {self.divisor:.5g}")
        return ", ".join(parts) or "as they are"


class _Values:
    """The voxels of a channel that count, plane by plane."""

    def __init__(self, source: VolumeSource, channel: int, over: Region, mask: np.ndarray | None) -> None:
        self._source, self._channel, self._over, self._mask = source, channel, over, mask

    def planes(self) -> Iterator[np.ndarray]:
        """Give the values of each plane along the first axis that count, whatever is read together."""
        for start, values in _planes(self._source):
            channel = values[self._channel]
            is_short = channel.dtype == torch.bfloat16  # which NumPy does not know
            for number, plane in enumerate((channel.float() if is_short else channel).numpy(), start):
                if self._over == "nonzero":
                    yield plane[plane != 0]
                elif self._over == "mask" and self._mask is not None:
                    yield plane[self._mask[number]]
                elif isinstance(self._over, int | float):
                    yield plane[plane > self._over]
                else:
                    yield plane.ravel()

    def mean_and_std(self, low: float, high: float) -> tuple[float, float]:
        """Mean and standard deviation of the clipped values; 0 and 0 if none counts."""
        counts, sums, squares = [], [], []
        for plane in self.planes():
            clipped = np.asarray(plane, dtype=np.float64).clip(low, high)
            # About the plane's own mean, since the difference of large squares would be lost.
            mean = clipped.mean() if len(clipped) else 0.0
            counts.append(len(clipped))
            sums.append(float(clipped.sum()))
            squares.append((mean, float(np.square(clipped - mean).sum())))
        count = sum(counts)
        if not count:
            return 0.0, 0.0
        mean = math.fsum(sums) / count
        total = math.fsum(square + number * (own - mean) ** 2 for number, (own, square) in zip(counts, squares, strict=True))
        return mean, math.sqrt(total / count)

    def extremes(self, low: float, high: float) -> tuple[float, float]:
        """Least and greatest of the clipped values; 0 and 0 if none counts."""
        ends = np.array([(plane.min(), plane.max()) for plane in self.planes() if len(plane)])
        if not len(ends):
            return 0.0, 0.0
        least, most = np.clip([ends[:, 0].min(), ends[:, 1].max()], low, high).tolist()  # NaN, wherever it lies
        return least, most

    def percentiles(self, wanted: Sequence[float]) -> tuple[float, float]:
        """Percentiles as NumPy's; 0 and 0 if none counts.

        One pass counts the first halves of the values' bits, and a second one the rest of those that begin as a wanted one does.
        """
        if not all(0 <= each <= 100 for each in wanted):
            raise SpecError(f"percentiles are {tuple(wanted)}: they must be from 0 to 100")
        firsts = np.zeros(HALF, dtype=np.int64)
        for plane in self.planes():
            firsts += np.bincount(_ordered(plane) >> 16, minlength=HALF)
        count = int(firsts.sum())
        if not count:
            return 0.0, 0.0
        places = [percentage / 100 * (count - 1) for percentage in wanted]
        ranks = sorted({rank for place in places for rank in (math.floor(place), math.ceil(place))})
        ends = np.cumsum(firsts)
        halves = {rank: int(np.searchsorted(ends, rank, side="right")) for rank in ranks}
        seconds = {half: np.zeros(HALF, dtype=np.int64) for half in set(halves.values())}
        for plane in self.planes():
            ordered = _ordered(plane)
            for half, counts in seconds.items():
                counts += np.bincount(ordered[ordered >> 16 == half] & (HALF - 1), minlength=HALF)
        found = {}
        for rank, half in halves.items():
            before = int(ends[half - 1]) if half else 0
            second = int(np.searchsorted(np.cumsum(seconds[half]), rank - before, side="right"))
            found[rank] = _value_of(half << 16 | second)
        low, high = (
            found[math.floor(place)] + (found[math.ceil(place)] - found[math.floor(place)]) * (place - math.floor(place))
            for place in places
        )
        return low, high


def _ordered(values: np.ndarray) -> np.ndarray:
    """Give whole numbers in the order of the values, which are taken as float32."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.int64)
    return np.where(bits >> 31, 0xFFFFFFFF - bits, bits + 0x80000000)


def _value_of(ordered: int) -> float:
    bits = ordered - 0x80000000 if ordered >= 0x80000000 else 0xFFFFFFFF - ordered
    return float(np.array(bits, dtype=np.uint32).view(np.float32))


def _planes(source: VolumeSource) -> Iterator[tuple[int, Tensor]]:
    """Read a volume, some planes along the first axis at a time."""
    length, *others = source.shape[1:]
    step = max(1, CHUNK_VOXELS // math.prod(others) // source.chunks[0] * source.chunks[0])
    for start in range(0, length, step):
        yield start, read_checked(source, Box((start, 0, 0), (min(length, start + step), *others)))


def foreground_box(source: VolumeSource, above: float | None = None, margin: Sequence[int] = (0, 0, 0)) -> Box | None:
    """Find the box that holds all voxels of which some channel is above a number; None if there are none.

    Args:
        source: the volume, which is read once.
        above: the number; None for all that are not 0.
        margin: voxels that are added on each side, as far as the volume goes.
    """
    shape = source.shape[1:]
    found = [np.zeros(size, dtype=bool) for size in shape]
    for start, values in _planes(source):
        inside = ((values != 0) if above is None else (values > above)).any(0).numpy()
        found[0][start : start + len(inside)] |= inside.any((1, 2))
        found[1] |= inside.any((0, 2))
        found[2] |= inside.any((0, 1))
    if not found[0].any():
        return None
    ends = [np.flatnonzero(axis)[[0, -1]].tolist() for axis in found]
    starts = tuple(max(0, first - around) for (first, _), around in zip(ends, margin, strict=True))
    stops = tuple(min(size, last + 1 + around) for (_, last), around, size in zip(ends, margin, shape, strict=True))
    return Box(starts, stops)


class NormalizedSource(View):
    """A source whose channels are clipped and scaled when they are read, in float32.

    Args:
        of: the source.
        scalings: what is done to each channel.
        mask: booleans of the volume's shape: which voxels count where a scaling leaves others as they are; None for those that
            are not 0.
    """

    def __init__(self, of: VolumeSource, scalings: Sequence[Scaling], mask: np.ndarray | None = None) -> None:
        super().__init__(of)
        self.scalings, self._mask = tuple(scalings), mask
        self.shape, self.affine, self.chunks = of.shape, of.affine, of.chunks
        self.dtype = sum_dtype(of.dtype)

    def read(self, box: Box) -> Tensor:
        """See `VolumeSource`."""
        values = read_checked(self.of, box).to(self.dtype)
        out = torch.empty_like(values)
        for target, channel, scaling in zip(out, values, self.scalings, strict=True):
            scaled = channel if scaling.is_nothing else scaling.apply(channel)
            if scaling.is_within:
                mask = self._mask if scaling.is_masked else None
                counts = channel != 0 if mask is None else torch.from_numpy(mask[box.slices])
                scaled = torch.where(counts, scaled, channel)
            target.copy_(scaled)
        return out

    def fingerprint(self) -> Json:
        """See `VolumeSource`."""
        return {"scaled": [repr(scaling) for scaling in self.scalings], "of": self.of.fingerprint()}

    @property
    def extent(self) -> Extent | None:
        """See `View`."""
        return getattr(self.of, "extent", None)

    def over(self, source: VolumeSource) -> "NormalizedSource":
        """See `View`."""
        return NormalizedSource(source, self.scalings, self._mask)
