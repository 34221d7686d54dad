"""Affines: RAS+ matrices of 4 × 4 that turn voxel indices into millimetres."""

import itertools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import ImageError

__all__ = [
    "SPACE_TOLERANCE",
    "Affine",
    "as_affine",
    "corner_displacement",
    "lps_to_ras",
    "scaled",
    "shifted",
    "spacing_of",
    "stated_spacing",
]

Affine = NDArray[np.float64]

SPACE_TOLERANCE = 0.1
"""How far the corners of two images of one subject may lie apart: this part of the shortest side of a voxel.

A tenth of a voxel is more than what single precision makes of the same rotation stored as a matrix and as a quaternion
(up to 0.06 mm at 250 mm), and less than anyone can see."""

CLEARLY_SOLID = 1e-9
"""Above this part of the cube of its norm, the determinant of a 3 × 3 matrix leaves no doubt of its rank."""
LEAST_EXACT = 1e-250
"""Numbers far above those of which a float does not hold all digits."""

STATED_DIGITS = 6
"""Headers seldom state a spacing with more digits."""
SINGLE_NOISE, DOUBLE_NOISE = 2e-7, 1e-12
"""By what part of it a length differs at most that is computed from a matrix in single, and in double precision."""


def as_affine(matrix: Any, name: str = "the affine") -> Affine:
    """Check an affine, and copy it as float64.

    Raises:
        ImageError: if it is not 4 × 4, holds NaN or infinity, or squeezes the volume flat.
    """
    try:
        affine = np.array(matrix.tolist() if hasattr(matrix, "tolist") else matrix, dtype=np.float64)  # of tensors, too
    except (TypeError, ValueError) as error:
        raise ImageError(f"{name} is {matrix!r}: it must be a matrix of 4 × 4 numbers") from error
    if affine.shape != (4, 4):
        raise ImageError(f"{name} has shape {affine.shape}: it must be a matrix of 4 × 4 (4, 4)")
    if not all(map(math.isfinite, affine.ravel().tolist())):
        raise ImageError(f"{name} holds NaN or infinity, so that no voxel has a place:\n{affine}\nGive one with affine=")
    if affine[3].tolist() != [0, 0, 0, 1]:
        raise ImageError(f"the last row of {name} is {affine[3]}: it must be (0, 0, 0, 1)")
    if _is_flat(affine):
        raise ImageError(f"{name} squeezes the volume flat: spacing {spacing_of(affine)}\n{affine}\nGive one with affine=")
    return affine


def _is_flat(affine: Affine) -> bool:
    """Whether the axes of the voxels lie in a plane, as `matrix_rank` tells it, which takes much longer than all else here."""
    (a, b, c), (d, e, f), (g, h, i) = affine[:3, :3].tolist()
    volume = abs(a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g))
    # The least singular value is at least the volume over the square of the largest, which is at most the norm.
    norm = math.hypot(a, b, c, d, e, f, g, h, i)
    if math.isfinite(volume) and volume > max(CLEARLY_SOLID * norm * norm * norm, LEAST_EXACT):
        return False
    return bool(np.linalg.matrix_rank(affine[:3, :3]) < 3)


def spacing_of(affine: Affine) -> tuple[float, float, float]:
    """Millimetres from one voxel to the next along each axis."""
    i, j, k = np.sqrt((affine[:3, :3] ** 2).sum(axis=0)).tolist()
    return i, j, k


def stated_spacing(affine: Affine) -> tuple[float, float, float]:
    """Give the spacing as the header that an affine is from has most probably stated it, for what is decided by it.

    Of axes that lie along those of the world, that is the affine's own. Of others an affine in single precision has it up to its
    rounding: 3 mm may be 3.0000002. There it is the nearest number of few digits, as single precision has that, if it is so near.
    """
    i, j, k = (
        length if np.count_nonzero(column) == 1 else _stated(length)
        for length, column in zip(spacing_of(affine), affine[:3, :3].T, strict=True)
    )
    return i, j, k


def _stated(length: float) -> float:
    short = float(f"{length:.{STATED_DIGITS}g}")
    single = float(np.float32(short))
    for stated, noise in ((short, DOUBLE_NOISE), (single, SINGLE_NOISE)):
        if abs(length - stated) <= noise * stated:
            return stated
    # Sizes such as 0.48828125 have more digits, but few binary ones.
    binary = round(length * 2**12) / 2**12
    return binary if abs(length - binary) <= SINGLE_NOISE * length else length


def shifted(affine: Affine, index: tuple[int, ...], step: tuple[int, ...] = (1, 1, 1)) -> Affine:
    """Affine of the part of a volume that begins at a voxel and takes every `step`-th one."""
    result = affine.copy()
    result[:3, 3] += affine[:3, :3] @ np.asarray(index, dtype=np.float64)
    result[:3, :3] *= step
    return result


def scaled(affine: Affine, factors: tuple[float, ...]) -> Affine:
    """Affine of a volume that fills the same space with `factors` times as many voxels along each axis."""
    result = affine.copy()
    result[:3, :3] /= np.asarray(factors)
    # The outer corner of the first voxel stays where it is; its centre does not.
    result[:3, 3] += (result[:3, :3] - affine[:3, :3]) @ np.full(3, 0.5)
    return result


def corner_displacement(a: Affine, b: Affine, spatial_shape: tuple[int, ...]) -> float:
    """Millimetres between the two places that two affines give the same corner, where these are farthest apart."""
    ends = [(-0.5, size - 0.5) for size in spatial_shape]
    corners = np.array([(*corner, 1) for corner in itertools.product(*ends)]).T
    return float(np.sqrt((((a - b) @ corners)[:3] ** 2).sum(axis=0)).max())


def lps_to_ras(direction: Any, spacing: Any, origin: Any) -> Affine:
    """Make an affine of what ITK says of an image: directions as columns of an N × N matrix, in an LPS+ world."""
    ndim = min(3, len(spacing))
    columns = np.array(direction, dtype=np.float64).reshape(len(spacing), -1)[:ndim, :ndim]
    affine = np.eye(4)
    affine[:ndim, :ndim] = columns * np.array(spacing[:ndim], dtype=np.float64)
    affine[:ndim, 3] = origin[:ndim]
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
