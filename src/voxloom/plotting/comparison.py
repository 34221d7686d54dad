"""Pictures, for which matplotlib is needed."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ..core.grid.grids import PatchGrid
from ..errors import MissingDependencyError
from ..io.writing.saving import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["require_matplotlib", "save_comparison"]

BACKGROUND = "#101418"
GRID_COLOUR = "#ffb000"


def require_matplotlib() -> None:
    """Check that pictures can be drawn.

    Raises:
        MissingDependencyError: if matplotlib is not installed; says how to install it.
    """
    try:
        import matplotlib.figure  # noqa: F401 - only whether it is there
    except ImportError as error:
        raise MissingDependencyError("pictures need matplotlib: pip install 'voxloom[plot]'") from error


def save_comparison(
    path: Path, image: Tensor, expected: Tensor, result: Tensor, grid: PatchGrid, spacing: tuple[float, float, float], title: str
) -> None:
    """Draw the middle slice of an input, a result, its difference from what was expected, and the grid of patches.

    Args:
        path: where the PNG is written; see `atomic_write`.
        image: input `(1, I, J, K)`.
        expected: output for the whole volume, `(1, I, J, K)`.
        result: output aggregated from patches, `(1, I, J, K)`.
        grid: the patches.
        spacing: millimetres between voxels `(I, J, K)`.
        title: stands above the picture.

    Raises:
        MissingDependencyError: if matplotlib is not installed.
        SaveError: if the file could not be written.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    k = image.shape[3] // 2
    scan, patched, whole = (volume[0, :, :, k].numpy() for volume in (image, result, expected))
    difference = np.abs(patched - whole)
    figure = Figure(figsize=(16, 5.6), facecolor=BACKGROUND, layout="constrained")
    figure.suptitle(title, color="white", fontsize=13, parse_math=False)
    axes = figure.subplots(1, 4)
    aspect = spacing[1] / spacing[0]
    _show(axes[0], scan, aspect, "Input", "gray")
    _show(axes[1], patched, aspect, "Result, woven from patches", "magma")
    heading = f"Difference from the whole: at most {difference.max():.2g} in this slice"
    # With nothing to show, the scale would be stretched until it shows rounding errors, or negative numbers.
    top = max(float(difference.max()), 1e-6 * float(np.abs(whole).max()), 1e-30)
    shown = _show(axes[2], difference, aspect, heading, "viridis", top)
    bar = figure.colorbar(shown, cax=axes[2].inset_axes((0.05, -0.09, 0.9, 0.04)), orientation="horizontal")
    bar.ax.tick_params(colors="white", labelsize=8)
    bar.ax.xaxis.get_offset_text().set_color("white")
    columns, rows, _ = grid.counts
    _show(axes[3], scan, aspect, f"Grid: {len(grid)} patches of {' × '.join(map(str, grid.patch_size))}", "gray")
    _draw_grid(axes[3], grid)
    axes[3].set_xlabel(f"{columns} × {rows} in this plane; one is filled", color="white", fontsize=9)
    atomic_write(path, lambda target: figure.savefig(target, dpi=110, facecolor=BACKGROUND), ".png")


def _show(axes: "Axes", plane: np.ndarray, aspect: float, title: str, colours: str, top: float | None = None) -> Any:
    axes.set_title(title, color="white", fontsize=10)
    axes.set_xticks([])
    axes.set_yticks([])
    bottom = None if top is None else 0.0
    return axes.imshow(plane.T, origin="lower", cmap=colours, aspect=aspect, interpolation="nearest", vmin=bottom, vmax=top)


def _draw_grid(axes: "Axes", grid: PatchGrid) -> None:
    """Outline the patches of one layer, and fill the one in the middle, so that overlaps are seen."""
    from matplotlib.patches import Rectangle

    first, second, _ = grid.axes
    middle = (len(first) // 2, len(second) // 2)
    for number, i in enumerate(first):
        for other, j in enumerate(second):
            is_middle = (number, other) == middle
            axes.add_patch(
                Rectangle(
                    (i - 0.5, j - 0.5),
                    first.patch,
                    second.patch,
                    facecolor=(1, 0.69, 0, 0.35) if is_middle else "none",
                    edgecolor=GRID_COLOUR,
                    linewidth=1.6 if is_middle else 0.7,
                )
            )
