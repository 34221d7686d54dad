"""Checks of sizes, overlaps and scales as users write them: one number for all axes, or one for each."""

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
    "as_scale",
    "as_shape",
    "as_sizes",
    "axis_name",
    "overlap_of",
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


def as_overlap(value: Any, patch_size: Ints, name: str = "patch_overlap") -> Ints:
    """Check an overlap: even, not negative and smaller than the patch, on every axis.

    Raises:
        SizeError: names the axis, the value and the nearest overlap that would do.
    """
    overlap = as_sizes(value, len(patch_size), name, minimum=0)
    for axis, (amount, patch) in enumerate(zip(overlap, patch_size, strict=True)):
        where = axis_name(axis, len(patch_size))
        if amount >= patch:
            largest = (patch - 1) // 2 * 2
            raise SizeError(
                f"{name} is {amount} on {where}, but must be smaller than the patch size, {patch}; the largest is {largest}"
            )
        if amount % 2:
            raise SizeError(
                f"{name} is {amount} on {where}, but must be even, because half of it belongs to each neighbour;"
                f" use {amount - 1}" + (f" or {amount + 1}" if amount + 1 < patch else "")
            )
    return overlap


def overlap_of(value: Any, patch_size: Ints) -> Ints:
    """Make an even number of voxels for each axis out of voxels or fractions of the patch, which are rounded down to even.

    A warning says so where that is not the fraction that was asked for.

    Raises:
        SizeError: if a fraction is not below 1, or a number of voxels cannot be used.
    """
    value = value.tolist() if hasattr(value, "tolist") else value
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value] * len(patch_size)
    if len(values) != len(patch_size):
        raise SizeError(f"patch_overlap is {tuple(values)}: give one number for all axes, or {len(patch_size)}, one for each")
    voxels = []
    for axis, (part, patch) in enumerate(zip(values, patch_size, strict=True)):
        if isinstance(part, float):
            if not 0 <= part < 1:
                raise SizeError(
                    f"patch_overlap is {part}: a fraction of the patch must be at least 0 and below 1, and voxels whole"
                )
            exact = part * patch + 1e-9  # 0.29 · 100 is a little less than 29
            part = int(exact) // 2 * 2
            if part + 1 <= exact:
                warnings.warn(
                    f"patch_overlap is {values[axis]:g} of {patch} voxels on {axis_name(axis, len(patch_size))}, which is"
                    f" {exact:.4g}: an overlap is even, so that it is {part}",
                    RuntimeWarning,
                    stacklevel=3,
                )
        voxels.append(part)
    return as_overlap(voxels, patch_size)


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
