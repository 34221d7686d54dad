"""Drawing a voxel by its weight, from sums over rows instead of a list of all voxels.

A row is a run of voxels along the first axis. What is kept is one number per row: for a volume of 400³ voxels 160,000 numbers
instead of 64 million. A draw picks a plane by its sum, a row of the plane by its sum, and then looks at one row of the
volume to pick the voxel. Any voxel of any volume can be reached: positions are drawn as whole numbers, or as float64.
"""

from collections.abc import Callable

import numpy as np

from ..errors import SamplingError
from .sizes import Ints

__all__ = ["RowSums"]

ReadRow = Callable[[int, int], np.ndarray]
"""Takes the indices of a row along the second and third axis, and gives the weights of its voxels."""


class RowSums:
    """Sums of non-negative weights over the rows of a volume, whole numbers or float64.

    Args:
        rows: sum over each row, `(J, K)`.

    Example:
        >>> weights = np.zeros((4, 3, 2), dtype=np.int64)
        >>> weights[2, 1, 0] = 5
        >>> sums = RowSums(weights.sum(axis=0))
        >>> sums.draw(np.random.default_rng(0), lambda j, k: weights[:, j, k])
        (2, 1, 0)
    """

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows
        self._kind = np.dtype(np.float64 if rows.dtype.kind == "f" else np.int64)
        self._planes = np.cumsum(rows.sum(axis=0, dtype=self._kind))

    @property
    def total(self) -> float | int:
        """Sum over all voxels."""
        return self._planes[-1].item()

    def draw(self, generator: np.random.Generator, read_row: ReadRow) -> Ints:
        """Draw a voxel `(i, j, k)` with a probability in proportion to its weight. The total must not be 0."""
        target = generator.random() * self.total if self._kind.kind == "f" else int(generator.integers(int(self.total)))
        k, target = _pick(self._planes, target)
        j, target = _pick(np.cumsum(self.rows[:, k], dtype=self._kind), target)
        row = np.cumsum(read_row(j, k), dtype=self._kind)
        known = self.rows[j, k].item()
        if not abs(row[-1].item() - known) <= 1e-6 * abs(known):
            raise SamplingError(
                "the map has been changed since it was gone through, in a way that PyTorch does not notice (through NumPy, say):"
                " give it to the image again with set_data"
            )
        i, _ = _pick(row, target)
        return i, j, k


def _pick(cumulative: np.ndarray, target: float | int) -> tuple[int, float | int]:
    """Find the first entry whose cumulative sum exceeds the target, and what of the target is left within it.

    Sums of floats in another order can leave a target just beyond the end: it then falls on the last entry that has weight.
    """
    last = int(np.searchsorted(cumulative, cumulative[-1], side="left"))
    number = min(int(np.searchsorted(cumulative, target, side="right")), last)
    before = cumulative[number - 1].item() if number else 0
    return number, max(target - before, 0)
