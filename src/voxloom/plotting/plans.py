"""Drawings of what is open while a prediction runs."""

import base64
import html
import io
import math
from typing import Any

import numpy as np

from ..core.grid.openness import Openness
from ..core.sizes import pretty_bytes
from ..errors import ModeError, VoxloomError
from ..inference.planning.plan import PredictionPlan
from .comparison import require_matplotlib

__all__ = ["html_of_plan", "plot_plan"]

STATES = ("finished", "open", "not begun")
COLOURS = ("#4c9f70", "#e6a53c", "#e9e9e9")
# Points of a curve at most: each is the most of the steps that it stands for.
POINTS = 2000


def plot_plan(plan: PredictionPlan, at: float, output: Any) -> Any:
    """Draw how much of the sum is open over a prediction, and what is finished, open and not begun at one moment."""
    require_matplotlib()
    if not 0 <= at <= 1:
        raise ModeError(f"at is {at!r}: it must be between 0, the beginning, and 1, the end")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    curve, state = figure.subplots(1, 2, width_ratios=(1.4, 1))
    joinings = map(plan.joining, plan.blocks)
    blocks = [Openness(joining.applied(plan.traversal), joining.block) for joining in joinings]
    _draw_curve(curve, plan, blocks, at)
    _draw_state(state, plan, blocks, at)
    if output is not None:
        figure.savefig(output, dpi=110)
    return figure


def html_of_plan(plan: PredictionPlan) -> str:
    """Show a plan in a notebook: what is open while it runs, where matplotlib is installed, and its table."""
    try:
        buffer = io.BytesIO()
        plot_plan(plan, 0.5, None).savefig(buffer, format="png", dpi=60)
        picture = f'<img src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"/>'
    except VoxloomError:  # there is no matplotlib
        picture = ""
    return f"<div>{picture}<pre>{html.escape(str(plan))}</pre></div>"


def _draw_curve(axes: Any, plan: PredictionPlan, blocks: list[Openness], at: float) -> None:
    is_partial = plan.needed is not None
    per_voxel = sum(
        output.bytes_per_voxel(plan.traversal.is_cropped, is_partial) * math.prod(output.scale) for output in plan.outputs
    )
    opened = np.concatenate([block.voxels for block in blocks]) * float(per_voxel) / 2**20
    step = -(-len(opened) // POINTS)
    most = np.maximum.reduceat(opened, np.arange(0, len(opened), step))
    place = np.linspace(0, 100, len(most))
    axes.fill_between(place, most, step="mid", color=COLOURS[1], alpha=0.6)
    axes.axhline(opened.max(), color="0.3", linewidth=1, linestyle="--")
    axes.axvline(100 * at, color="0.3", linewidth=1)
    ends = np.cumsum([block.num_steps for block in blocks])[:-1]
    for end in ends:
        axes.axvline(100 * end / len(opened), color="0.7", linewidth=0.8, linestyle=":")
    axes.set_ylim(0, 1.12 * opened.max())
    axes.set_xlim(0, 100)
    axes.set_xlabel("steps that are done, %" + (f" ({len(blocks)} blocks)" if len(blocks) > 1 else ""))
    axes.set_ylabel("open sums, MiB")
    axes.set_title(
        f"at most {pretty_bytes(int(opened.max() * 2**20))} open, of {pretty_bytes(plan.peak_bytes)} in all", fontsize=10
    )


def _draw_state(axes: Any, plan: PredictionPlan, blocks: list[Openness], at: float) -> None:
    """Draw a plane along the two axes on which a traversal moves least often, through the middle of the third."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    up, right, _ = plan.traversal.axes
    size = plan.grid.spatial_shape
    total = sum(block.num_steps for block in blocks)
    now = min(int(at * total), total - 1)
    begun = 0
    for block in blocks:
        starts, lengths = block.tiles
        middle = size[plan.traversal.axes[2]] // 2
        inner = np.flatnonzero((starts[2] <= middle) & (middle < starts[2] + lengths[2]))
        if len(inner):
            opened, finished = (ends[:, :, inner[0]] + begun for ends in block.ends)
            values = np.where(finished < now, 0, np.where(opened <= now, 1, 2))
            edges = [np.append(starts[axis], starts[axis][-1] + lengths[axis][-1]) for axis in (1, 0)]
            axes.pcolormesh(*edges, values, cmap=ListedColormap(COLOURS), vmin=-0.5, vmax=2.5, edgecolors="white", linewidth=0.3)
        begun += block.num_steps
    axes.set_xlim(0, size[right])
    axes.set_ylim(0, size[up])
    axes.set_aspect("equal")
    axes.set_xlabel(f"{'IJK'[right]}, voxels")
    axes.set_ylabel(f"{'IJK'[up]}, voxels")
    axes.set_title(f"a plane after {100 * at:.0f} % of the steps", fontsize=10)
    handles = [Patch(color=colour, label=name) for colour, name in zip(COLOURS, STATES, strict=True)]
    axes.legend(handles=handles, loc="upper right", fontsize=8, framealpha=0.9)
