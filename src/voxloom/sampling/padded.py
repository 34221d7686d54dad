"""Reading boxes that reach beyond a volume, without a padded copy of it."""

import itertools
import math
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from ..core.boxes import Box
from ..core.padding import CONSTANT_MODES, Piece, axis_pieces, ramp
from ..core.values import can_hold, limits_of
from ..errors import ModeError, SubjectError

__all__ = ["PaddedImage", "Voxels", "padding_constant"]

# Statistics of a volume are taken of this many voxels at a time.
CHUNK_VOXELS = 2**22


class Voxels(Protocol):
    """What can be read by boxes, as images are."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Channels and voxels `(C, I, J, K)`."""
        ...

    @property
    def spatial_shape(self) -> tuple[int, int, int]:
        """Voxels `(I, J, K)`."""
        ...

    @property
    def num_channels(self) -> int:
        """Number of channels."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Type of the values."""
        ...

    def read(self, box: Box) -> Tensor:
        """Read all channels of a box of voxels `(I, J, K)`."""
        ...


class PaddedImage:
    """An image that goes on beyond its borders.

    Args:
        image: the image; it is only read.
        domain: the voxels `(I, J, K)` that may be read, in the frame of the image, so that they begin at negative indices.
        mode: a number, or a padding mode; None where nothing is padded.
        name: what the subject calls the image.

    Raises:
        ModeError: if the type of the image cannot hold the number that it is to be padded with.
    """

    def __init__(self, image: Voxels, domain: Box, mode: str | float | int | None, name: str) -> None:
        self.image = image
        self.name = name
        self.domain = domain
        self.shape = image.spatial_shape
        self.volume = Box.of_shape(self.shape)
        is_padded = domain != self.volume
        self.mode: str | float | int = mode if is_padded and mode is not None else 0
        self.constant = padding_constant(image, self.mode, name)

    def read_into(self, out: Tensor, box: Box) -> None:
        """Read all channels of a box within the domain.

        Args:
            out: tensor `(C, *box.shape)` of the image's type, every voxel of which is set.
            box: voxels `(I, J, K)` in the frame of the image.
        """
        if self.image.spatial_shape != self.shape:
            raise SubjectError(
                f"the image {self.name!r} has {self.image.spatial_shape} voxels, but had {self.shape} when the sampler was made:"
                " make the sampler anew"
            )
        if box in self.volume:
            out.copy_(self.image.read(box))
            return
        axes = [axis_pieces(*ends, self.mode) for ends in zip(box.start, box.stop, self.shape, strict=True)]
        if self.constant is not None:
            out.fill_(self.constant)
        for pieces in itertools.product(*axes):
            self._copy(out, pieces)
        if self.mode == "linear_ramp":
            self._scale(out, box)

    def _copy(self, out: Tensor, pieces: tuple[Piece, ...]) -> None:
        source = Box(tuple(piece.source.start for piece in pieces), tuple(piece.source.stop for piece in pieces))
        values = self.image.read(source)
        reverse = [axis for axis, piece in enumerate(pieces, start=1) if piece.step < 0]
        target = out[(slice(None), *(piece.target for piece in pieces))]
        target.copy_(values.flip(reverse) if reverse else values)

    def _scale(self, out: Tensor, box: Box) -> None:
        """Let values fall to 0 from the edge outwards, axis after axis, rounding down for whole numbers."""
        for axis, (start, stop) in enumerate(zip(box.start, box.stop, strict=True)):
            size = self.shape[axis]
            before, after = -self.domain.start[axis], self.domain.stop[axis] - size
            for position in itertools.chain(range(start, min(stop, 0)), range(max(start, size), stop)):
                numerator, denominator = ramp(position, size, before, after)
                plane = out.select(axis + 1, position - start)
                if out.is_floating_point():
                    plane.copy_(plane.double() / denominator * numerator)
                else:
                    plane.copy_(torch.div(plane.long() * numerator, denominator, rounding_mode="floor"))


def padding_constant(image: Voxels, mode: str | float | int, name: str) -> float | int | None:
    """Find the number that a mode pads an image with, or None for modes that pad with values from the volume.

    `minimum`, `maximum`, `mean` and `median` are of the whole volume, all channels. For images of whole numbers the last two
    are rounded to the nearest, to the even one between two.

    Raises:
        ModeError: if the type of the image cannot hold the number.
    """
    if isinstance(mode, str) and mode not in CONSTANT_MODES:
        return None
    value = _statistic(image, mode) if isinstance(mode, str) else mode
    if isinstance(mode, str) and not image.dtype.is_floating_point and math.isfinite(value):
        value = round(value)
    if not can_hold(image.dtype, value):
        low, high = limits_of(image.dtype)
        raise ModeError(
            f"the image {name!r} of type {image.dtype} cannot be padded with {value:g}, only with"
            f" {'' if image.dtype.is_floating_point else 'whole '}numbers from {low:g} to {high:g}: choose another number"
            " or mode, such as 'edge', or convert the image"
        )
    return value if image.dtype.is_floating_point else int(value)


def _statistic(image: Voxels, mode: str) -> float:
    count = Box.of_shape(image.shape).numel
    if mode == "mean":
        return sum(float(chunk.sum(dtype=torch.float64)) for chunk in _chunks(image)) / count
    if mode == "median":
        return _median(image, count)
    low, high = float("inf"), float("-inf")
    for chunk in _chunks(image):
        least, most = (float(value) for value in chunk.aminmax())
        if least != least:
            return least
        low, high = min(low, least), max(high, most)
    return low if mode == "minimum" else high


def _chunks(image: Voxels) -> Iterator[Tensor]:
    """Yield all voxels, some planes at a time, so that a file that is larger than memory can be gone through."""
    shape = image.spatial_shape
    per_plane = image.num_channels * shape[0] * shape[1]
    planes = max(1, CHUNK_VOXELS // per_plane)
    for k in range(0, shape[2], planes):
        yield image.read(Box((0, 0, k), (shape[0], shape[1], min(k + planes, shape[2]))))


def _median(image: Voxels, count: int) -> float:
    if image.dtype.is_floating_point and any(bool(chunk.isnan().any()) for chunk in _chunks(image)):
        return float("nan")
    low = _ranked(image, (count - 1) // 2)
    high = low if count % 2 else _ranked(image, count // 2)
    return low + (high - low) / 2


def _ranked(image: Voxels, rank: int) -> float:
    """Find the value that has `rank` values before it in order, exactly, without sorting or a copy.

    Values are mapped to whole numbers of the same order, and these found 16 bits at a time from histograms.
    """
    bits = 64 if image.dtype in (torch.int64, torch.float64) else 32
    prefix: int | None = None
    for shift in range(bits - 16, -1, -16):
        histogram = torch.zeros(2**16, dtype=torch.int64)
        for chunk in _chunks(image):
            keys = _sortable(chunk).flatten() >> shift
            if prefix is None:
                keys += 2**15  # the first 16 bits hold the sign: from -2¹⁵
            else:
                keys = keys[(keys >> 16) == prefix] & 0xFFFF
            histogram += torch.bincount(keys, minlength=2**16)
        cumulative = histogram.cumsum(0)
        digit = int(torch.searchsorted(cumulative, rank, right=True))
        rank -= int(cumulative[digit - 1]) if digit else 0
        prefix = digit - 2**15 if prefix is None else (prefix << 16) | digit
    assert prefix is not None
    return _from_sortable(prefix, image.dtype)


def _sortable(values: Tensor) -> Tensor:
    """Map numbers to int64 in the same order."""
    if not values.is_floating_point():
        return values.long()
    if values.dtype == torch.float64:
        bits = values.contiguous().view(torch.int64)
        return torch.where(bits < 0, bits ^ 0x7FFFFFFFFFFFFFFF, bits)
    bits = values.float().contiguous().view(torch.int32).long()
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _from_sortable(key: int, dtype: torch.dtype) -> float:
    if not dtype.is_floating_point:
        return key
    if dtype == torch.float64:
        bits = key ^ 0x7FFFFFFFFFFFFFFF if key < 0 else key
        return float(torch.tensor(bits, dtype=torch.int64).view(torch.float64))
    bits = key ^ 0x7FFFFFFF if key < 0 else key
    return float(torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32))
