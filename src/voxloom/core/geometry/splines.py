"""Cubic interpolation along an axis, as a matrix.

Source: Unser, Splines: a perfect fit for signal and image processing (1999), https://doi.org/10.1109/79.799930.
"""

import numpy as np

__all__ = ["BEYOND", "BORDER", "cubic_matrix"]

# Voxels by which an axis goes on as at its border before the spline is fitted: what lies beyond does not show in float32.
BORDER = 12
# Of these, where values can be asked for.
BEYOND = 9


def cubic_matrix(places: np.ndarray, length: int) -> np.ndarray:
    """Give the matrix that makes values at places along an axis of those of its voxels, by a cubic spline through these.

    Beyond its ends the axis goes on as at its border.

    Args:
        places: indices, which need not be whole, from `BEYOND` voxels before the first to as many behind the last.
        length: voxels along the axis.

    Returns:
        Matrix of as many rows as places, and as many columns as voxels, in float64.

    Example:
        >>> cubic_matrix(np.array([1.5]), 4).round(2).tolist()
        [[-0.1, 0.6, 0.6, -0.1]]
    """
    size = length + 2 * BORDER
    spline = (4 * np.eye(size) + np.eye(size, k=1) + np.eye(size, k=-1)) / 6
    spline[0, 1] = spline[-1, -2] = 1 / 3  # mirrored at its ends
    first = np.floor(places).astype(int)
    part = places - first
    weights = np.stack([(1 - part) ** 3, 3 * part**3 - 6 * part**2 + 4, -3 * part**3 + 3 * part**2 + 3 * part + 1, part**3]) / 6
    taken = np.zeros((len(places), size))
    for offset, weight in enumerate(weights, start=BORDER - 1):
        taken[np.arange(len(places)), first + offset] = weight
    fitted = np.linalg.solve(spline.T, taken.T).T
    result = fitted[:, BORDER : size - BORDER].copy()
    result[:, 0] += fitted[:, :BORDER].sum(1)
    result[:, -1] += fitted[:, size - BORDER :].sum(1)
    return result
