"""Reading boxes that reach beyond a volume, without a padded copy of it."""

import itertools
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..core.boxes import Box
from ..core.geometry.affines import Affine
from ..core.padding import CONSTANT_MODES, Piece, axis_pieces, ramp
from ..core.values import can_hold, limits_of
from ..core.walking import walk
from ..errors import ModeError, SubjectError
from ..io.arrays.composed import read_into
from ..io.protocols import Json, SpaceCodes, VolumeSource, chunk_bytes, loading_bytes, read_checked

__all__ = ["PaddedSource", "padding_constant"]

# Statistics of a volume are taken of this many values at a time.
CHUNK_VALUES = 2**22


class PaddedSource:
    """A source that goes on beyond its borders: boxes of it may begin at negative indices.

    Args:
        source: the source; it is only read.
        domain: the voxels `(I, J, K)` that may be read, in the frame of the source.
        mode: a number, or a padding mode; None where nothing is padded.
        name: what messages call it.

    Raises:
        ModeError: if the type of the source cannot hold the number that it is to be padded with.
    """

    def __init__(self, source: VolumeSource, domain: Box, mode: str | float | int | None, name: str) -> None:
        self.source = source
        self.name = name
        self.domain = domain
        self._size = source.shape[1:]
        self._volume = Box.of_shape(self._size)
        is_padded = domain != self._volume
        self.mode: str | float | int = mode if is_padded and mode is not None else 0
        self.constant = padding_constant(source, self.mode, name)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Channels and voxels `(C, I, J, K)` of the source, without padding."""
        return self.source.shape

    @property
    def dtype(self) -> torch.dtype:
        """See `VolumeSource`."""
        return self.source.dtype

    @property
    def affine(self) -> Affine:
        """See `VolumeSource`."""
        return self.source.affine

    @property
    def codes(self) -> SpaceCodes:
        """See `VolumeSource`."""
        return self.source.codes

    @property
    def chunks(self) -> tuple[int, int, int]:
        """See `VolumeSource`."""
        return self.source.chunks

    @property
    def resident_bytes(self) -> int:
        """See `VolumeSource`."""
        return self.source.resident_bytes

    @property
    def loading_bytes(self) -> int:
        """See the function `loading_bytes`."""
        return loading_bytes(self.source)

    @property
    def chunk_bytes(self) -> int:
        """See the function `chunk_bytes`."""
        return chunk_bytes(self.source)

    @property
    def paths(self) -> tuple[Path, ...]:
        """See `VolumeSource`."""
        return self.source.paths

    def fingerprint(self) -> Json:
        """See `VolumeSource`."""
        return self.source.fingerprint()

    def read(self, box: Box) -> Tensor:
        """Read all channels of a box within the domain."""
        out = torch.empty((self.shape[0], *box.shape), dtype=self.dtype)
        self.read_into(out, box)
        return out

    def read_into(self, out: Tensor, box: Box) -> None:
        """Read all channels of a box within the domain.

        Args:
            out: tensor `(C, *box.shape)`, every voxel of which is set.
            box: voxels `(I, J, K)` in the frame of the source.
        """
        if self.source.shape[1:] != self._size:
            raise SubjectError(
                f"the image {self.name!r} has {self.source.shape[1:]} voxels, but had {self._size} when the sampler was made:"
                " make the sampler anew"
            )
        if box in self._volume:
            read_into(self.source, out, box)
        elif out.dtype != self.dtype:
            out.copy_(self.read(box))
        else:
            self._read_padded(out, box)

    def _read_padded(self, out: Tensor, box: Box) -> None:
        axes = [axis_pieces(*ends, self.mode) for ends in zip(box.start, box.stop, self._size, strict=True)]
        if self.constant is not None:
            out.fill_(self.constant)
        for pieces in itertools.product(*axes):
            self._copy(out, pieces)
        if self.mode == "linear_ramp":
            self._scale(out, box)

    def _copy(self, out: Tensor, pieces: tuple[Piece, ...]) -> None:
        source = Box(tuple(piece.source.start for piece in pieces), tuple(piece.source.stop for piece in pieces))
        values = read_checked(self.source, source)
        reverse = [axis for axis, piece in enumerate(pieces, start=1) if piece.step < 0]
        target = out[(slice(None), *(piece.target for piece in pieces))]
        target.copy_(values.flip(reverse) if reverse else values)

    def _scale(self, out: Tensor, box: Box) -> None:
        """Let values fall to 0 from the edge outwards, axis after axis, rounding down for whole numbers."""
        for axis, (start, stop) in enumerate(zip(box.start, box.stop, strict=True)):
            size = self._size[axis]
            before, after = -self.domain.start[axis], self.domain.stop[axis] - size
            for position in itertools.chain(range(start, min(stop, 0)), range(max(start, size), stop)):
                numerator, denominator = ramp(position, size, before, after)
                plane = out.select(axis + 1, position - start)
                if out.is_floating_point():
                    plane.copy_(plane.double() / denominator * numerator)
                else:
                    plane.copy_(torch.div(plane.long() * numerator, denominator, rounding_mode="floor"))


def padding_constant(source: VolumeSource, mode: str | float | int, name: str) -> float | int | None:
    """Find the number that a mode pads an image with, or None for modes that pad with values from the volume.

    `minimum`, `maximum`, `mean` and `median` are of the whole volume, all channels. For images of whole numbers the last two
    are rounded to the nearest, to the even one between two.

    Raises:
        ModeError: if the type of the image cannot hold the number.
    """
    if isinstance(mode, str) and mode not in CONSTANT_MODES:
        return None
    value = _statistic(source, mode) if isinstance(mode, str) else mode
    if isinstance(mode, str) and not source.dtype.is_floating_point and math.isfinite(value):
        value = round(value)
    if not can_hold(source.dtype, value):
        low, high = limits_of(source.dtype)
        raise ModeError(
            f"the image {name!r} of type {source.dtype} cannot be padded with {value:g}, only with"
            f" {'' if source.dtype.is_floating_point else 'whole '}numbers from {low:g} to {high:g}: choose another number"
            " or mode, such as 'edge', or convert the image"
        )
    return value if source.dtype.is_floating_point else int(value)


def _statistic(source: VolumeSource, mode: str) -> float:
    if mode == "median":
        return float(np.median(_as_array(read_checked(source, Box.of_shape(source.shape[1:])))))
    most = max(1, CHUNK_VALUES // source.shape[0])
    chunks = (read_checked(source, box) for box in walk(Box.of_shape(source.shape[1:]), source.chunks, most))
    if mode == "mean":
        return sum(float(chunk.sum(dtype=torch.float64)) for chunk in chunks) / math.prod(source.shape)
    ends = np.array([[float(value) for value in chunk.aminmax()] for chunk in chunks])
    return float(ends.min() if mode == "minimum" else ends.max())  # NaN, where there is any


def _as_array(values: Tensor) -> np.ndarray:
    is_half = values.is_floating_point() and values.dtype.itemsize < torch.float32.itemsize  # which NumPy lacks, or rounds to
    return (values.float() if is_half else values).numpy()
