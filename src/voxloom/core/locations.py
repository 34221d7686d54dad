"""Where a patch lies in its volume."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ..errors import LocationError, ScaleError
from .boxes import Box
from .sizes import Ints, Scale, as_scale, as_sizes, axis_name

__all__ = ["PatchLocation"]


@dataclass(frozen=True, slots=True)
class PatchLocation:
    """First voxel and size of a patch, in the frame of the original volume.

    The index is negative where the patch begins in the padding.

    Example:
        >>> location = PatchLocation(index=(10, 20, 30), size=(8, 8, 8))
        >>> location.index_fin
        (18, 28, 38)
        >>> location.scaled(0.5)
        PatchLocation(index=(5, 10, 15), size=(4, 4, 4), subject_index=None)
    """

    index: Ints
    """Index of the first voxel on each axis."""
    size: Ints
    """Voxels along each axis."""
    subject_index: int | None = None
    """Which subject the patch is from, where a batch mixes several."""

    def __post_init__(self) -> None:
        if not hasattr(self.size, "__len__") or len(self.size) == 0:
            raise LocationError(f"the size of a patch location is {self.size!r}: give one number for each axis")
        size = as_sizes(self.size, len(self.size), "the size of a patch location")
        object.__setattr__(self, "size", size)
        lowest = -(2**62)  # a start may be negative, in the padding
        object.__setattr__(self, "index", as_sizes(self.index, len(size), "the index of a patch location", lowest))

    @property
    def index_ini(self) -> Ints:
        """Index of the first voxel: the same as `index`."""
        return self.index

    @property
    def index_fin(self) -> Ints:
        """One past the last index on each axis."""
        return self.box.stop

    @property
    def box(self) -> Box:
        """The voxels of the patch."""
        return Box.of_shape(self.size, self.index)

    def to_slices(self) -> tuple[slice, ...]:
        """Slices that cut the patch out of an array of the volume."""
        return self.box.slices

    def tolist(self) -> list[int]:
        """List `index_ini` and then `index_fin`, as in one row of `batch[LOCATION]`."""
        return [*self.index_ini, *self.index_fin]

    def scaled(self, factor: Fraction | float | Sequence[Fraction | float]) -> "PatchLocation":
        """Express the location in a volume whose sides are `factor` times as long.

        Raises:
            ScaleError: if the patch would not begin and end on whole voxels; nothing is rounded.
        """
        scale: Scale = as_scale(factor, len(self.size), "the factor of a location")
        ini, fin = (self._times(corner, scale) for corner in (self.index_ini, self.index_fin))
        return PatchLocation(ini, tuple(b - a for a, b in zip(ini, fin, strict=True)), self.subject_index)

    def _times(self, corner: Ints, scale: Scale) -> Ints:
        exact = [value * factor for value, factor in zip(corner, scale, strict=True)]
        for axis, value in enumerate(exact):
            if value.denominator != 1:
                raise ScaleError(
                    f"voxel {corner[axis]} on {axis_name(axis, len(corner))} of the patch {self.box.start} to {self.box.stop}"
                    f" times {scale[axis]} is {float(value):g}, which is no whole voxel; starts and sizes must be multiples"
                    f" of {scale[axis].denominator}"
                )
        return tuple(int(value) for value in exact)

    @classmethod
    def from_row(cls, row: Any) -> "PatchLocation":
        """Make a location from one row of `batch[LOCATION]`: `index_ini` and then `index_fin`."""
        try:
            values = [operator.index(value) for value in row]
        except TypeError as error:
            raise LocationError(f"{row!r} is no location: it must be whole numbers, first and last corner") from error
        half, rest = divmod(len(values), 2)
        if rest or not half:
            raise LocationError(f"{row!r} is no location: it must be as many numbers for the first corner as for the last")
        ini, fin = values[:half], values[half:]
        return cls(tuple(ini), tuple(b - a for a, b in zip(ini, fin, strict=True)))
