"""Regular grids of patches that cover a volume, computed rather than listed."""

import bisect
import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, overload

from ...errors import LocationError, ModeError, NoSuchIndexError, ScaleError, SizeError
from ..boxes import Box
from ..locations import PatchLocation
from ..sizes import Ints, Scale, as_overlap, as_patch_size, as_shape, as_shares, axis_name, filled_in

__all__ = ["AxisGrid", "EvenAxisGrid", "PatchGrid", "PatchSpacing", "check_patch_spacing"]

PatchSpacing = Literal["fixed", "even"]


def check_patch_spacing(given: object) -> PatchSpacing:
    """Check how patches are spaced.

    Raises:
        ModeError: if there is no such way.
    """
    if given == "fixed" or given == "even":
        return given
    raise ModeError(f"patch_spacing is {given!r}: it must be 'fixed' or 'even'")


@dataclass(frozen=True, slots=True)
class AxisGrid:
    """The starts of the patches along one axis.

    They are `stride` apart, but for the last patch, which ends where the axis ends and so may overlap its
    neighbour by more.

    Example:
        >>> list(AxisGrid(start=0, stop=10, patch=5, stride=3))
        [0, 3, 5]
    """

    start: int
    """First voxel that is covered."""
    stop: int
    """One past the last voxel that is covered."""
    patch: int
    """Voxels per patch, at most `stop - start`."""
    stride: int
    """Voxels from one start to the next, at least 1."""

    @property
    def last(self) -> int:
        """Start of the last patch."""
        return self.stop - self.patch

    def __len__(self) -> int:
        return -((self.start - self.last) // self.stride) + 1

    def __getitem__(self, number: int) -> int:
        """First voxel of a patch."""
        return min(self.start + number * self.stride, self.last)

    def __iter__(self) -> Iterator[int]:
        return (self[number] for number in range(len(self)))

    def find(self, start: int) -> int | None:
        """Number of the patch that begins at a voxel, or None where none does."""
        if start == self.last:
            return len(self) - 1
        number, rest = divmod(start - self.start, self.stride)
        return number if rest == 0 and 0 <= number < len(self) - 1 else None

    def touching(self, start: int, stop: int) -> range:
        """Numbers of the patches that hold a voxel of `[start, stop)`."""
        if stop <= max(start, self.start) or start >= self.stop:
            return range(0)
        first = max(0, (start - self.patch - self.start) // self.stride + 1)
        end = min(len(self) - 1, -((self.start - stop) // self.stride))
        # The last patch does not keep to the stride: it reaches back further than its number tells.
        return range(min(first, len(self) - 1), end + 1 if self.last < stop else end)

    def to_json(self) -> list[int]:
        """Give the numbers that it is made of."""
        return [self.start, self.stop, self.patch, self.stride]

    def scaled(self, factor: Fraction) -> "AxisGrid":
        """Express the grid on an axis that is `factor` times as long.

        Raises:
            ScaleError: if a start or size would not be whole; says which.
        """
        count = len(self)
        stride = (self.last - self.start) if count == 2 else self.stride if count > 2 else 1 / factor
        exact = [value * factor for value in (self.start, self.stop, self.patch, stride)]
        if all(value.denominator == 1 for value in exact):
            return AxisGrid(*map(int, exact))
        if (self.patch * factor).denominator != 1:
            raise ScaleError(f"a patch of {self.patch} voxels")
        wrong = next((start for start in self if (start * factor).denominator != 1), self.stop)
        raise ScaleError(f"the patch that begins at voxel {wrong}")


@dataclass(frozen=True, slots=True)
class EvenAxisGrid(AxisGrid):
    """The starts of patches that are spread as evenly as whole voxels allow.

    Example:
        >>> list(EvenAxisGrid.spread(start=0, stop=10, patch=4, step=2.5))
        [0, 2, 4, 6]
    """

    starts: tuple[int, ...]
    """All of them."""

    @classmethod
    def spread(cls, start: int, stop: int, patch: int, step: float) -> "EvenAxisGrid":
        """Spread patches over an axis, as many as are needed for them to be no more than `step` voxels apart before rounding.

        Args:
            start: first voxel that is covered.
            stop: one past the last.
            patch: voxels per patch.
            step: voxels from one start to the next at most; it need not be whole.
        """
        room = stop - start - patch
        intervals = min(room, math.ceil(room / step))
        exact = room / intervals if intervals else 0
        starts = tuple(start + round(exact * number) for number in range(intervals + 1))
        return cls(start, stop, patch, max(1, math.ceil(exact)), starts)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, number: int) -> int:
        """First voxel of a patch."""
        return self.starts[number]

    def find(self, start: int) -> int | None:
        """Number of the patch that begins at a voxel, or None where none does."""
        number = bisect.bisect_left(self.starts, start)
        return number if number < len(self.starts) and self.starts[number] == start else None

    def touching(self, start: int, stop: int) -> range:
        """Numbers of the patches that hold a voxel of `[start, stop)`."""
        if stop <= max(start, self.start) or start >= self.stop:
            return range(0)
        return range(bisect.bisect_right(self.starts, start - self.patch), bisect.bisect_left(self.starts, stop))

    def to_json(self) -> list[int]:
        """Give the numbers that it is made of."""
        return [self.start, self.stop, self.patch, self.stride, *self.starts]

    def scaled(self, factor: Fraction) -> "EvenAxisGrid":
        """Express the grid on an axis that is `factor` times as long.

        Raises:
            ScaleError: if a start or size would not be whole; says which.
        """
        if (self.patch * factor).denominator != 1:
            raise ScaleError(f"a patch of {self.patch} voxels")
        for voxel in (*self.starts, self.stop):
            if (voxel * factor).denominator != 1:
                raise ScaleError(f"the patch that begins at voxel {voxel}")
        start, stop, patch = (int(value * factor) for value in (self.start, self.stop, self.patch))
        return EvenAxisGrid(
            start, stop, patch, max(1, math.ceil(self.stride * factor)), tuple(int(each * factor) for each in self.starts)
        )


@dataclass(frozen=True, slots=True)
class PatchGrid(Sequence[PatchLocation]):
    """All patches of a regular grid, last axis fastest: a sequence of `PatchLocation`.

    Nothing is listed: the length, any patch, and the patches that touch a box are computed when asked for.

    Example:
        >>> grid = PatchGrid.cover((10, 20, 30), patch_size=(5, 20, 20), patch_overlap=(2, 4, 6))
        >>> len(grid), grid[1].index
        (6, (0, 0, 10))
        >>> len(PatchGrid.cover((640_000,) * 3, patch_size=64))
        1000000000000
    """

    axes: tuple[AxisGrid, ...]
    """The starts along each axis."""
    spatial_shape: Ints
    """Voxels of the volume, without padding."""
    padded: bool = False
    """Whether the grid may reach beyond the volume."""

    @classmethod
    def cover(
        cls,
        spatial_shape: Sequence[int],
        patch_size: int | Sequence[int],
        patch_overlap: float | Sequence[float] = 0,
        *,
        padded: bool = False,
        patch_spacing: PatchSpacing = "fixed",
    ) -> "PatchGrid":
        """Cover a volume with patches.

        Args:
            spatial_shape: voxels along each axis.
            patch_size: voxels of a patch along each axis; -1 is all of an axis.
            patch_overlap: voxels that neighbours share on each axis, or the fraction of a patch: a float below 1, with which
                they are `patch · (1 - fraction)` voxels apart, rounded down. Even, if the grid is padded.
            padded: let the grid begin half an overlap before the volume and end half an overlap behind it; an axis
                that is still shorter than a patch is padded on both sides until the patch fits.
            patch_spacing: `"fixed"` lets the last patch on each axis overlap its neighbour by more than the others do; `"even"`
                spreads as many patches evenly, as nnU-Net does.

        Raises:
            SizeError: if a size or overlap cannot be used, or a patch does not fit and the grid is not padded.
        """
        shape = as_shape(spatial_shape, "spatial_shape")
        ndim = len(shape)
        check_patch_spacing(patch_spacing)
        asked = as_patch_size(patch_size, ndim)
        size = filled_in(asked, shape)
        given = as_shares(patch_overlap, ndim)
        shares = tuple(0 if each == -1 else share for each, share in zip(asked, given, strict=True))
        overlap = as_overlap(shares, size, is_even=padded)
        axes: list[AxisGrid] = []
        for axis, (length, patch, shared, share) in enumerate(zip(shape, size, overlap, shares, strict=True)):
            if patch > length and not padded:
                raise SizeError(
                    f"the patch size is {patch} on {axis_name(axis, ndim)}, but the volume has only {length} voxels there:"
                    f" use a patch of at most {length}, or a padding_mode such as 'edge'"
                )
            missing = max(0, patch - length - shared) if padded else 0
            before = shared // 2 + missing // 2 if padded else 0
            after = shared // 2 + missing - missing // 2 if padded else 0
            if patch_spacing == "even":
                # As a number of floating point, 1 - 0.7 is a little more than 0.3, by which nnU-Net would multiply.
                step = patch * float(1 - Fraction(str(share))) if isinstance(share, float) else patch - share
                axes.append(EvenAxisGrid.spread(-before, length + after, patch, step))
            else:
                axes.append(AxisGrid(-before, length + after, patch, patch - shared))
        return cls(tuple(axes), shape, padded)

    @property
    def box(self) -> Box:
        """What the patches cover, padding included."""
        return Box(tuple(axis.start for axis in self.axes), tuple(axis.stop for axis in self.axes))

    @property
    def patch_size(self) -> Ints:
        """Voxels of a patch along each axis."""
        return tuple(axis.patch for axis in self.axes)

    @property
    def counts(self) -> Ints:
        """Number of patches along each axis."""
        return tuple(map(len, self.axes))

    @property
    def num_patches(self) -> int:
        """Number of patches, also where there are more than `len` can say (2⁶³)."""
        return math.prod(self.counts)

    def __len__(self) -> int:
        return self.num_patches

    @overload
    def __getitem__(self, index: int) -> PatchLocation: ...
    @overload
    def __getitem__(self, index: slice) -> list[PatchLocation]: ...
    def __getitem__(self, index: int | slice) -> PatchLocation | list[PatchLocation]:
        if isinstance(index, slice):
            return [self.location(self.unravel(number)) for number in range(self.num_patches)[index]]
        return self.location(self.unravel(index))

    def __iter__(self) -> Iterator[PatchLocation]:
        return map(self.location, itertools.product(*(range(count) for count in self.counts)))

    def unravel(self, index: int) -> Ints:
        """Number of a patch on each axis; negative indices count from the end.

        Raises:
            NoSuchIndexError: if there are not that many patches.
        """
        try:
            number = operator.index(index)
        except TypeError as error:
            raise SizeError(f"the index of a patch is {index!r}: it must be a whole number") from error
        if not -self.num_patches <= number < self.num_patches:
            raise NoSuchIndexError(f"patch {number} of a grid of {self.num_patches} patches")
        number %= self.num_patches
        numbers = []
        for count in reversed(self.counts):
            number, rest = divmod(number, count)
            numbers.append(rest)
        return tuple(reversed(numbers))

    def ravel(self, numbers: Ints) -> int:
        """Index of the patch that has these numbers on the axes."""
        index = 0
        for number, count in zip(numbers, self.counts, strict=True):
            index = index * count + number
        return index

    def location(self, numbers: Ints) -> PatchLocation:
        """Location of the patch that has these numbers on the axes."""
        return PatchLocation(tuple([axis[number] for axis, number in zip(self.axes, numbers, strict=True)]), self.patch_size)

    def box_of(self, numbers: Ints) -> Box:
        """Voxels of the patch that has these numbers on the axes."""
        starts = [axis[number] for axis, number in zip(self.axes, numbers, strict=True)]
        return Box(tuple(starts), tuple([start + axis.patch for start, axis in zip(starts, self.axes, strict=True)]))

    def find(self, location: PatchLocation) -> Ints | None:
        """Numbers of the patch at a location, or None where the location is not one of the grid's."""
        if location.size != self.patch_size:
            return None
        numbers = tuple(axis.find(start) for axis, start in zip(self.axes, location.index, strict=True))
        return numbers if None not in numbers else None  # type: ignore[return-value]

    def touching(self, box: Box) -> Iterator[int]:
        """Indices of the patches that hold a voxel of a box, in the order of the grid."""
        ranges = (axis.touching(*ends) for axis, *ends in zip(self.axes, box.start, box.stop, strict=True))
        return map(self.ravel, itertools.product(*ranges))

    def scaled(self, scale: Scale) -> "PatchGrid":
        """Express the grid in a volume whose sides are `scale` times as long.

        Raises:
            ScaleError: if a start or size is not whole there; names an overlap that would align them.
        """
        axes = []
        for number, (axis, factor) in enumerate(zip(self.axes, scale, strict=True)):
            try:
                axes.append(axis.scaled(factor))
                if (self.spatial_shape[number] * factor).denominator != 1:
                    raise ScaleError(f"a volume of {self.spatial_shape[number]} voxels")
            except ScaleError as error:
                raise ScaleError(
                    f"on {axis_name(number, len(scale))}, {error} does not lie on whole voxels of an output scaled by {factor}:"
                    f" starts and sizes must be multiples of {factor.denominator}. {self._way_out(number, factor)}"
                ) from None
        shape = tuple(int(length * factor) for length, factor in zip(self.spatial_shape, scale, strict=True))
        return PatchGrid(tuple(axes), shape, self.padded)

    def _way_out(self, number: int, factor: Fraction) -> str:
        """Look for the overlap, or else for the size of the volume, next to the present one at which the axis is aligned."""
        length, patch, stride = self.spatial_shape[number], self.axes[number].patch, self.axes[number].stride
        step = factor.denominator
        if patch % step:
            return f"Use a patch size that is a multiple of {step}"

        def is_aligned(length: int, overlap: int) -> bool:
            grid = PatchGrid.cover((length,), patch, overlap, padded=self.padded)
            values = (value for axis in grid.axes for value in (axis.start, axis.stop, *axis, length))
            return not any((value * factor).denominator != 1 for value in values)

        now = patch - stride
        step_of_overlaps = 2 if self.padded else 1
        overlaps = [overlap for overlap in range(0, patch, step_of_overlaps) if is_aligned(length, overlap)]
        if overlaps:
            return f"An overlap of {min(overlaps, key=lambda overlap: (abs(overlap - now), -overlap))} would align them"
        enough = math.ceil(length / step) * step
        pairs = ((size, overlap) for size in (enough, enough + step) for overlap in range(now, -1, -2))
        size, overlap = next((pair for pair in pairs if is_aligned(*pair)), (enough, 0))
        return f"No overlap alone aligns them: pad or crop the volume to {size} voxels, with an overlap of {overlap}"

    def index(self, location: Any, start: int = 0, stop: int | None = None) -> int:
        """Index of the patch at a location.

        Raises:
            LocationError: if there is none.
        """
        numbers = self.find(location) if isinstance(location, PatchLocation) else None
        if numbers is None or self.ravel(numbers) not in range(self.num_patches)[start:stop]:
            raise LocationError(f"{location} is not one of the grid's {self.num_patches} patches")
        return self.ravel(numbers)

    def count(self, location: Any) -> int:
        """How many patches are at a location: one or none."""
        return int(location in self)

    def tolist(self) -> list[list[int]]:
        """List all locations as rows of `index_ini` and `index_fin`."""
        return [location.tolist() for location in self]

    def __contains__(self, location: Any) -> bool:
        return isinstance(location, PatchLocation) and self.find(location) is not None
