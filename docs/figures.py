"""The drawings of the documentation, made by voxloom itself."""

import tempfile

import torch

import voxloom as vx


def head(path):
    phantom = vx.datasets.HeadPhantom(96)
    phantom.t1.plot(phantom.labels, label=7, output=path)


def weights(path):
    vx.plot.weights(output=path)


def patches(path):
    vx.plot.grid(vx.GridSampler(vx.datasets.HeadPhantom(96), 40, 12), output=path)


def draws(path):
    phantom = vx.datasets.HeadPhantom(96)
    vx.plot.draws(vx.LabelSampler(phantom, 16, "labels", {5: 1, 7: 1}, seed=0), count=4000, output=path)


def mixing(path):
    heads = [vx.datasets.HeadPhantom(16, seed=number) for number in range(12)]
    vx.plot.queue(vx.Queue(heads, 48, 16, vx.UniformSampler(8), seed=0), output=path)


def levels(path):
    phantom = vx.datasets.HeadPhantom(192)
    with tempfile.TemporaryDirectory() as folder:
        vx.convert(phantom.t1, f"{folder}/head.ome.zarr", levels=4, chunks=64)
        vx.convert(phantom.labels, f"{folder}/head.ome.zarr/labels/tissue")
        vx.plot.levels(f"{folder}/head.ome.zarr", f"{folder}/head.ome.zarr/labels/tissue", output=path)


def plan(path):
    model = torch.nn.Conv3d(1, 4, 1)
    vx.plan(model, torch.zeros(1, 200, 160, 120), patch_size=64, reduce="argmax").plot(output=path)


def draw_all(folder):
    """Draw all that are not there yet."""
    folder.mkdir(exist_ok=True)
    for draw in (head, weights, patches, draws, mixing, levels, plan):
        path = folder / f"{draw.__name__}.png"
        if not path.exists():
            draw(path)
