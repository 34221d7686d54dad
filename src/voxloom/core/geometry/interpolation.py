"""From the voxels of one grid to those of another: which voxels each is interpolated from, and the arithmetic.

A voxel of the target takes the values of the voxels of the source around its centre. Where the axes of both only permute, flip,
scale and shift, that is a matter of each axis alone, and a box of the target needs a box of the source. A source goes on as at
its border for half a voxel, to the edge of its voxels; what lies beyond is outside.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from ...errors import ModeError
from ..boxes import Box
from ..sizes import Ints
from ..values import sum_dtype

__all__ = ["PART_VOXELS", "ROUNDING", "Interpolation", "Part", "SpaceMap", "as_interpolation", "cut", "interpolated_dtype"]

Interpolation = Literal["linear", "nearest"]
INTERPOLATIONS: tuple[Interpolation, ...] = ("linear", "nearest")

# Parts of a voxel that are taken for rounding: affines come from files in single precision.
ROUNDING = 1e-4
# Voxels along an axis that are interpolated together, of the source and of the target: few enough to stay in the cache of a
# processor and to hold few classes, and enough to be worth a call.
PART_VOXELS = 32


def as_interpolation(given: object) -> tuple[Interpolation, Interpolation, Interpolation]:
    """Make one kind of interpolation for each axis of the source.

    Raises:
        ModeError: if there is none of that name.
    """
    kinds = (given,) * 3 if isinstance(given, str) else tuple(given) if isinstance(given, Sequence) else ()
    if len(kinds) != 3 or any(kind not in INTERPOLATIONS for kind in kinds):
        raise ModeError(f"interpolation is {given!r}: it must be 'linear' or 'nearest', or one of them for each axis (I, J, K)")
    return kinds


def interpolated_dtype(dtype: torch.dtype, kinds: Sequence[Interpolation]) -> torch.dtype:
    """Type of what is interpolated: that of the values where each is one of them, or else that in which they are summed."""
    return dtype if set(kinds) == {"nearest"} else sum_dtype(dtype)


class Part(Protocol):
    """Some voxels of a target that are interpolated together."""

    @property
    def support(self) -> Box:
        """Voxels of the source that they are interpolated from."""
        ...

    @property
    def shape(self) -> Ints:
        """Shape of what `apply` gives, without channels."""
        ...

    def apply(self, values: Tensor) -> Tensor:
        """Interpolate.

        Args:
            values: the source in the box that supports them, `(C, *support.shape)`, in the type of the result.

        Returns:
            Tensor `(C, *shape)`; it may be a view of what was given.
        """
        ...

    def put(self, piece: Tensor, origin: Ints, values: Tensor) -> None:
        """Put what was interpolated into a piece of the target, the first voxel of which is at an origin."""
        ...


class SpaceMap(Protocol):
    """What the voxels of a target are interpolated from."""

    @property
    def shape(self) -> Ints:
        """Voxels of the source."""
        ...

    @property
    def mixing_axes(self) -> Ints:
        """Axes of the source along which something between two voxels is interpolated from both."""
        ...

    @property
    def part_voxels(self) -> int:
        """How many values of a channel a part takes at a time, at most."""
        ...

    def pieces(self, own: Box, most: int) -> Iterator[Box]:
        """Give boxes of the target that hold all voxels whose last voxels of the source lie in a box.

        Args:
            own: the box of the source.
            most: voxels of each at most.
        """
        ...

    def boxes(self, piece: Box, own: Box) -> list[Box]:
        """Give the boxes of a piece of the target that hold those voxels and no others."""
        ...

    def parts(self, piece: Box, own: Box) -> Iterator[Part]:
        """Give those voxels of a piece that lie in the source, some at a time."""
        ...


def cut(box: Box, steps: Ints) -> Iterator[Box]:
    """Cut a box into boxes of so many voxels along each axis at most."""
    ranges = (
        [(first, min(first + step, stop)) for first in range(start, stop, step)]
        for start, stop, step in zip(box.start, box.stop, steps, strict=True)
    )
    for ends in itertools.product(*ranges):
        yield Box(*map(tuple, zip(*ends, strict=True)))
