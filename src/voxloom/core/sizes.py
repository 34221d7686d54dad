"""Checks of sizes, overlaps and scales as users write them: one number for all axes, or one for each."""

import math
import operator
import warnings
from collections.abc import Iterable, Sequence
from fractions import Fraction
from numbers import Rational, Real
from typing import Any

from ..errors import ScaleError, SizeError

__all__ = [
    "Ints",
    "Scale",
    "as_int",
    "as_overlap",
    "as_patch_size",
    "as_scale",
    "as_shape",
    "as_shares",
    "as_sizes",
    "axis_name",
    "checked_overlap",
    "filled_in",
    "pretty_bytes",
    "pretty_sizes",
]

type_names = {bool: "a bool", float: "a float", str: "a string"}

# Floats are taken for the nearest fraction with a denominator of at most this.
DENOMINATOR = 4096

Ints = tuple[int, ...]
Scale = tuple[Fraction, ...]


def axis_name(axis: int, ndim: int) -> str:
    """Name a spatial axis for a message: I, J and K in three dimensions, a number otherwise."""
    return f"axis {'IJK'[axis]}" if ndim <= 3 else f"axis {axis}"


def pretty_sizes(sizes: Iterable[int | None]) -> str:
    """Say sizes for people; None is any size.

    Example:
        >>> pretty_sizes((64, 64, None))
        '64 × 64 × any'
    """
    return " × ".join("any" if size is None else str(size) for size in sizes)


def pretty_mm(lengths: Iterable[float]) -> str:
    """Say lengths in millimetres for people.

    Example:
        >>> pretty_mm((0.5, 0.5, 3.00000002))
        '0.5 × 0.5 × 3 mm'
    """
    return f"{' × '.join(f'{each:.4g}' for each in lengths)} mm"


def pretty_bytes(num_bytes: float) -> str:
    """Say a number of bytes for people.

    Example:
        >>> pretty_bytes(1536 * 2**20)
        '1.5 GiB'
    """
    value, units = float(num_bytes), iter(("bytes", "KiB", "MiB", "GiB", "TiB"))
    unit = next(units)
    while value >= 1024 and unit != "TiB":
        value, unit = value / 1024, next(units)
    return f"{value:.1f} {unit}" if unit != "bytes" else f"{value:.0f} bytes"


def as_int(value: Any, name: str, minimum: int) -> int:
    """Check that a value is a whole number of a whole-number type, and at least `minimum`.

    Raises:
        SizeError: for bools, floats (also whole ones), strings and numbers that are too small.
    """
    rule = f"it must be a whole number of at least {minimum}"
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise SizeError(f"{name} is {value!r}, {type_names.get(type(value), f'of type {type(value).__name__}')}: {rule}")
    try:
        number = operator.index(value)
    except TypeError as error:
        raise SizeError(f"{name} is {value!r}, of type {type(value).__name__}: {rule}") from error
    if number < minimum:
        raise SizeError(f"{name} is {number}: {rule}")
    return number


def as_sizes(value: Any, ndim: int, name: str, minimum: int = 1) -> Ints:
    """Make one whole number per axis out of a number or a sequence of them.

    Raises:
        SizeError: if there are more or fewer than `ndim` numbers, or one of them is not allowed.
    """
    if type(value) is tuple and len(value) == ndim and {*map(type, value)} == {int} and min(value) >= minimum:
        return value  # as sizes mostly are: what follows takes some time for each patch
    if hasattr(value, "tolist") and getattr(value, "ndim", 0) == 1:
        value = value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        if len(value) != ndim:
            raise SizeError(f"{name} is {tuple(value)!r}: give one number for all axes, or {ndim}, one for each")
        return tuple(as_int(item, f"{name} on {axis_name(axis, ndim)}", minimum) for axis, item in enumerate(value))
    return (as_int(value, name, minimum),) * ndim


def as_shape(value: Any, name: str) -> Ints:
    """Make a tuple of the voxels along each axis; the number of axes is as many as there are numbers.

    Raises:
        SizeError: if it is no sequence, or one of the numbers is not allowed.
    """
    if not hasattr(value, "__len__") or isinstance(value, str) or len(value) == 0:
        raise SizeError(f"{name} is {value!r}: give one number for each axis")
    return as_sizes(value, len(value), name)


def as_patch_size(value: Any, ndim: int) -> Ints:
    """Make the voxels of a patch along each axis; -1 is all of an axis.

    Raises:
        SizeError: if there are more or fewer than `ndim` numbers, or one of them is not allowed.
    """
    if hasattr(value, "tolist") and getattr(value, "ndim", 0) == 1:
        value = value.tolist()
    values = value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value] * ndim
    is_whole = [isinstance(each, int) and each == -1 for each in values]
    sizes = as_sizes([1 if whole else each for each, whole in zip(values, is_whole, strict=True)], ndim, "patch_size")
    return tuple(-1 if whole else size for size, whole in zip(sizes, is_whole, strict=True))


def filled_in(patch_size: Ints, shape: Sequence[int]) -> Ints:
    """Put the voxels of a volume in place of -1.

    Example:
        >>> filled_in((-1, 64, 64), (30, 200, 200))
        (30, 64, 64)
    """
    return tuple(length if size == -1 else size for size, length in zip(patch_size, shape, strict=True))


def as_overlap(value: Any, patch_size: Ints, *, is_even: bool = False) -> Ints:
    """Make the voxels that neighbours share on each axis of voxels, or of fractions of the patch.

    A fraction makes the patches `patch · (1 - fraction)` voxels apart, rounded down, and at least one, as MONAI has it.

    Args:
        value: one number or one for each axis: an int, or a float below 1.
        patch_size: voxels of a patch.
        is_even: whether overlaps must be even, since half of each lies before the volume. Fractions are then rounded down, with a
            warning.

    Raises:
        SizeError: names the axis, the value and the nearest overlap that would do.
    """
    overlaps = []
    for axis, (amount, patch) in enumerate(zip(as_shares(value, len(patch_size)), patch_size, strict=True)):
        where = axis_name(axis, len(patch_size))
        if isinstance(amount, float):
            voxels = patch - max(1, math.floor(patch * (1 - amount) + 1e-9))
            if is_even and voxels % 2:
                warnings.warn(
                    f"patch_overlap is {amount:g} of {patch} voxels on {where}, which is {voxels}: an overlap of a padded volume"
                    f" is even, so that it is {voxels - 1}",
                    RuntimeWarning,
                    stacklevel=3,
                )
                voxels -= 1
            overlaps.append(voxels)
            continue
        if amount >= patch:
            largest = (patch - 1) // 2 * 2 if is_even else patch - 1
            raise SizeError(
                f"patch_overlap is {amount} on {where}, but must be smaller than the patch size, {patch}; the largest is"
                f" {largest}"
            )
        if is_even and amount % 2:
            raise SizeError(
                f"patch_overlap is {amount} on {where}, but must be even where the volume is padded, because half of it lies"
                f" outside; use {amount - 1}" + (f" or {amount + 1}" if amount + 1 < patch else "")
            )
        overlaps.append(amount)
    return tuple(overlaps)


def checked_overlap(value: Any, patch_size: Ints, *, is_even: bool = False) -> tuple[int | float, ...]:
    """Check an overlap as it is given, before a volume says how many voxels -1 is.

    Args:
        value: see `as_overlap`.
        patch_size: voxels of a patch, or -1.
        is_even: see `as_overlap`.

    Raises:
        SizeError: see `as_overlap`.
    """
    shares = tuple(0 if size == -1 else share for share, size in zip(as_shares(value, len(patch_size)), patch_size, strict=True))
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # which comes when it is used
        voxels = as_overlap(shares, filled_in(patch_size, [1] * len(patch_size)), is_even=is_even)
    return shares if any(isinstance(share, float) for share in shares) else voxels


def as_shares(value: Any, ndim: int) -> tuple[int | float, ...]:
    """Check overlaps as they are given: for each axis voxels, or a fraction below 1.

    Raises:
        SizeError: if one is neither, or there are more or fewer than `ndim`.
    """
    if hasattr(value, "tolist"):
        value = value.tolist()
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value] * ndim
    if len(values) != ndim:
        raise SizeError(f"patch_overlap is {tuple(values)}: give one number for all axes, or {ndim}, one for each")
    shares: list[int | float] = []
    for axis, each in enumerate(values):
        if isinstance(each, float):
            if not 0 <= each < 1:
                raise SizeError(
                    f"patch_overlap is {each}: a fraction of the patch must be at least 0 and below 1, and voxels whole"
                )
            shares.append(each)
        else:
            shares.append(as_int(each, f"patch_overlap on {axis_name(axis, ndim)}", 0))
    return tuple(shares)


def _as_fraction(item: Any) -> Fraction:
    if not isinstance(item, Real) or isinstance(item, bool):
        raise TypeError
    return Fraction(item) if isinstance(item, Rational) else Fraction(float(item)).limit_denominator(DENOMINATOR)


def as_scale(value: Any, ndim: int, name: str) -> Scale:
    """Make one positive fraction per axis out of a number or a sequence of them.

    Floats stand for the nearest fraction with a denominator of at most 4096, so that 1 / 3 is a third; whole numbers and
    fractions for themselves.

    Raises:
        ScaleError: if a number is not positive and finite, or there are more or fewer than `ndim`.
    """
    if hasattr(value, "tolist") and getattr(value, "ndim", 0) == 1:
        value = value.tolist()
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else (value,) * ndim
    if len(values) != ndim:
        raise ScaleError(f"{name} is {tuple(values)!r}: give one number for all axes, or {ndim}, one for each")
    rule = "it must be a positive number, or one for each axis"
    try:
        scale = tuple(_as_fraction(item) for item in values)
    except (TypeError, ValueError, OverflowError) as error:
        raise ScaleError(f"{name} is {value!r}: {rule}") from error
    if any(item <= 0 for item in scale):
        raise ScaleError(f"{name} is {value!r}: {rule}; what is smaller than 1 / {DENOMINATOR} must be a fractions.Fraction")
    return scale
