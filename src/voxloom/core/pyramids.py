"""Levels of an image of several resolutions: how large they are, and how the voxels of one become those of the next."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from .geometry.affines import Affine, spacing_of
from .sizes import Ints

__all__ = ["coarser", "coarser_affine", "coarser_shape", "factors_of_levels"]

# The last level is no larger than this along any axis.
SMALLEST = 128


def factors_of_levels(shape: Sequence[int], affine: Affine, count: int | None = None) -> list[Ints]:
    """Say by which factor each axis of each level is smaller than that of the level before.

    An axis is halved, unless its voxels are long already: until then the others catch up.

    Args:
        shape: voxels `(I, J, K)` of the finest level.
        affine: of the finest level.
        count: number of levels, with the finest; by default so many that the last has no more than 128 voxels along any axis.

    Example:
        >>> factors_of_levels((512, 512, 100), np.diag([0.7, 0.7, 2.5, 1]))
        [(2, 2, 1), (2, 2, 1)]
    """
    factors: list[Ints] = []
    sizes, spacing = list(shape), list(spacing_of(affine))
    while len(factors) + 1 < count if count is not None else max(sizes) > SMALLEST:
        shortest = min((each for each, size in zip(spacing, sizes, strict=True) if size > 1), default=0.0)
        step = tuple(2 if size > 1 and each < 1.5 * shortest else 1 for each, size in zip(spacing, sizes, strict=True))
        if set(step) == {1}:
            break  # a single voxel is left
        factors.append(step)
        sizes = list(coarser_shape(sizes, step))
        spacing = [each * factor for each, factor in zip(spacing, step, strict=True)]
    return factors


def coarser_shape(shape: Sequence[int], factors: Sequence[int]) -> Ints:
    """Voxels of the next level; what is left over at the end of an axis is a voxel too."""
    return tuple(-(-size // factor) for size, factor in zip(shape, factors, strict=True))


def coarser_affine(affine: Affine, factors: Sequence[int]) -> Affine:
    """Affine of the next level: the first voxel lies in the middle of those that it is made of."""
    result = affine.copy()
    result[:3, 3] += affine[:3, :3] @ ((np.asarray(factors) - 1) / 2)
    result[:3, :3] *= np.asarray(factors)
    return result


def coarser(values: np.ndarray, factors: Sequence[int], is_labels: bool) -> np.ndarray:
    """Make the voxels of the next level.

    Args:
        values: `(C, I, J, K)`; a voxel that lacks neighbours at the end of an axis is made of those that there are.
        factors: by which each axis becomes shorter.
        is_labels: take the label that most of the voxels have, and of several the greatest; otherwise their mean, rounded to the
            nearest for whole numbers.

    Example:
        >>> coarser(np.array([[[[1, 1, 2, 3, 4]]]]), (1, 1, 2), is_labels=True).tolist()
        [[[[1, 3, 4]]]]
    """
    if set(factors) == {1}:
        return values
    missing = [-size % factor for size, factor in zip(values.shape[1:], factors, strict=True)]
    if any(missing):
        # A voxel that is repeated counts as often as those that it is put beside: the mean and the mode of what is there stay.
        values = np.pad(values, [(0, 0), *((0, count) for count in missing)], mode="edge")
    starts = itertools.product(*(range(factor) for factor in factors))
    parts = [
        values[(slice(None), *(slice(start, None, step) for start, step in zip(first, factors, strict=True)))] for first in starts
    ]
    return _mode(parts) if is_labels else _mean(parts)


def _mean(parts: Sequence[np.ndarray]) -> np.ndarray:
    dtype = parts[0].dtype
    is_float, is_long = dtype.kind == "f", dtype.itemsize > (4 if dtype.kind == "f" else 2)
    wide: Any = (np.float64 if is_long else np.float32) if is_float else (np.int64 if is_long else np.int32)
    total = parts[0].astype(wide)
    for part in parts[1:]:
        np.add(total, part, out=total, casting="unsafe")
    mean = total / len(parts) if is_float else (total + len(parts) // 2) // len(parts)
    return np.asarray(mean).astype(dtype)


def _mode(parts: Sequence[np.ndarray]) -> np.ndarray:
    result = parts[0].copy()
    differ = np.zeros(result.shape, dtype=bool)
    for part in parts[1:]:
        differ |= part != result
    if not differ.any():
        return result
    # Most voxels are of one label alone, so that few are left to be counted.
    found = np.sort(np.stack([part[differ] for part in parts]), axis=0)
    best, count = found[0].copy(), np.zeros(found.shape[1], dtype=np.int32)
    run = np.zeros(found.shape[1], dtype=np.int32)
    for number, value in enumerate(found):
        run = np.where(value == found[number - 1], run + 1, 1) if number else np.ones_like(run)
        is_better = run >= count
        best[is_better], count[is_better] = value[is_better], run[is_better]
    result[differ] = best
    return result
