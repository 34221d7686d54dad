"""Drawings, for which matplotlib is needed (`pip install voxloom[plot]`): `vx.plot.weights()`.

Images and subjects draw themselves: `image.plot()`.
"""

from .plotting.drawings import compare, draws, grid, levels, queue, weights

__all__ = ["compare", "draws", "grid", "levels", "queue", "weights"]
