"""The drawings of the documentation, made by voxloom itself."""

import numpy as np
import torch
from matplotlib.figure import Figure

import voxloom as vx
from voxloom.core.blending import AxisWeights
from voxloom.core.windows import resolve_window


def _saved(figure, path):
    figure.savefig(path, dpi=110)


def head(folder):
    """A subject, with its labels on top."""
    phantom = vx.datasets.HeadPhantom(96)
    phantom.t1.plot(phantom.labels, label=7, output=folder / "head.png")


def weights(folder):
    """The weights of overlapping patches along an axis, which sum to 1 everywhere."""
    grid = vx.PatchGrid.cover((100,), (40,), (20,)).axes[0]
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    rows = figure.subplots(2, 2, sharex=True, sharey=True)
    for axes, mode in zip(rows.flat, ("crop", "average", "hann", "gaussian"), strict=True):
        own, total = AxisWeights(grid, resolve_window(mode)), np.zeros(100)
        for number, start in enumerate(grid):
            values = np.zeros(40)
            if mode == "crop":
                first, last = own.core(number)
                values[first - start : last - start] = 1
            else:
                values = own.of(number).numpy()
            axes.plot(np.arange(start, start + 40), values)
            total[start : start + 40] += values
        axes.plot(np.arange(100), total, color="black", linewidth=1, linestyle="--", label="sum of all")
        axes.set_title(mode)
        axes.set_ylim(0, 1.1)
    rows[0, 0].legend(loc="lower right")
    figure.supxlabel("voxel along an axis; patches of 40 voxels that share 20")
    _saved(figure, folder / "weights.png")


def draws(folder):
    """Where the centres of patches fall that a LabelSampler draws, on the labels."""
    phantom = vx.datasets.HeadPhantom(96)
    sampler = vx.LabelSampler(phantom, 16, "labels", {5: 1, 7: 1}, num_patches=4000, seed=0)
    centres = np.array([[first + 8 for first in patch.patch_location.index] for patch in sampler])
    middle = int(np.median(centres[:, 2]))
    near = centres[np.abs(centres[:, 2] - middle) <= 4]
    figure = Figure(figsize=(5, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.imshow(phantom.labels.data[0, :, :, middle].numpy().T, origin="lower", cmap="gray")
    axes.scatter(near[:, 0], near[:, 1], s=6, color="gold")
    axes.set_title("centres of patches: half of them in label 7")
    axes.set_axis_off()
    _saved(figure, folder / "draws.png")


def mixing(folder):
    """From which subject each patch of an epoch is, in the order in which they leave the queue."""
    subjects = [vx.Subject(t1=vx.ScalarImage(torch.zeros(1, 8, 8, 8)), number=number) for number in range(12)]
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots()
    for held in (1, 24, 96):
        queue = vx.Queue(subjects, held, 16, vx.UniformSampler(4), seed=0)
        order = [patch.patch_location.subject_index for patch in queue]
        axes.scatter(range(len(order)), order, s=8, label=f"max_length={held}", alpha=0.7)
    axes.set_xlabel("patch of the epoch")
    axes.set_ylabel("subject")
    axes.legend(loc="upper left", fontsize=8)
    _saved(figure, folder / "mixing.png")


def draw_all(folder):
    """Draw all that are not there yet."""
    folder.mkdir(exist_ok=True)
    for draw in (head, weights, draws, mixing):
        if not (folder / f"{draw.__name__}.png").exists():
            draw(folder)
