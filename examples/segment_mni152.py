"""From training to a label map by the command line: grey and white matter of the MNI152 head, which comes with nilearn.

A small network learns the tissues from patches of the left half of the head. It is exported, and the command `voxloom predict`
applies it to the whole head, from file to file. How well the tissues of the right half were found is printed as Dice, and a
picture shows them on the scan.

    pip install 'voxloom[plot]' nilearn
    python examples/segment_mni152.py [--folder mni152] [--steps 80] [--resolution 1]
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from nilearn import datasets
from torch import Tensor, nn

import voxloom as vx

TISSUES = {1: "grey matter", 2: "white matter", 3: "fluid"}
PATCH, BATCH = 64, 2


class TissueNet(nn.Module):
    """Four convolutions from a scan `(B, 1, I, J, K)`, as it is in the file, to scores `(B, 4, I, J, K)`."""

    def __init__(self, mean: float, deviation: float, width: int = 16) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("deviation", torch.tensor(deviation))
        layers: list[nn.Module] = []
        for channels, dilation in ((1, 1), (width, 1), (width, 2)):
            layers += [nn.Conv3d(channels, width, 3, padding=dilation, dilation=dilation), nn.BatchNorm3d(width), nn.LeakyReLU()]
        self.layers = nn.Sequential(*layers, nn.Conv3d(width, 1 + len(TISSUES), 1))

    def forward(self, scan: Tensor) -> Tensor:
        """Say how well each tissue fits each voxel."""
        return self.layers((scan - self.mean) / self.deviation)


def write_head(folder: Path, resolution: int) -> vx.Subject:
    """Write the scan, and the likelier tissue where one is at least as likely as not; the rest is mostly fluid."""
    t1, grey, white = (
        vx.ScalarImage(torch.from_numpy(np.ascontiguousarray(image.get_fdata(dtype=np.float32)))[None], affine=image.affine)
        for image in (
            datasets.load_mni152_template(resolution=resolution),
            datasets.load_mni152_gm_template(resolution=resolution),
            datasets.load_mni152_wm_template(resolution=resolution),
        )
    )
    shares = torch.cat([torch.full_like(grey.data, 0.5), grey.data, white.data])
    truth = shares.argmax(0, keepdim=True)
    truth[(truth == 0) & (t1.data > 0.05 * t1.data.max())] = 3
    t1.save(folder / "t1.nii.gz")
    vx.LabelMap(truth.to(torch.uint8), affine=t1.affine).save(folder / "tissue_truth.nii.gz")
    return vx.Subject(t1=vx.ScalarImage(folder / "t1.nii.gz"), tissue=vx.LabelMap(folder / "tissue_truth.nii.gz"))


def train(subject: vx.Subject, steps: int) -> TissueNet:
    """Learn from patches of a subject."""
    data = subject.t1.data
    model = TissueNet(float(data.mean()), float(data.std()))
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    weights = torch.tensor([1.0, 1.0, 1.0, 3.0])  # fluid is rare
    sampler = vx.LabelSampler(subject, 32, "tissue", dict.fromkeys((0, *TISSUES), 1), num_patches=8 * steps)
    for step, batch in enumerate(vx.SubjectsLoader(sampler, batch_size=8), start=1):
        loss = nn.functional.cross_entropy(model(batch.t1.data), batch.tissue.data[:, 0].long(), weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 25 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    return model.eval()


def dice(found: Tensor, truth: Tensor) -> dict[str, float]:
    """Measure how well each tissue was found, from 0 to 1."""
    scores = {}
    for label, name in TISSUES.items():
        a, b = found == label, truth == label
        scores[name] = 2 * int((a & b).sum()) / max(1, int(a.sum()) + int(b.sum()))
    return scores


def draw(path: Path, scan: vx.Image, found: vx.Image, truth: vx.Image) -> None:
    """Draw a slice of the scan with the tissues that were found on it, and with those that are there."""
    k = scan.spatial_shape[2] // 2
    figure = Figure(figsize=(11, 5), layout="constrained", facecolor="#101418")
    colours = ListedColormap(["#f28e2b", "#59a9e6", "#7ad07a"])
    for axes, title, labels in zip(
        figure.subplots(1, 3), ("scan", "found by voxloom predict", "truth"), (None, found, truth), strict=True
    ):
        axes.imshow(scan.data[0, :, :, k].numpy().T, origin="lower", cmap="gray")
        if labels is not None:
            plane = labels.data[0, :, :, k].numpy().T
            axes.imshow(
                np.ma.masked_equal(plane, 0), origin="lower", cmap=colours, alpha=0.6, vmin=1, vmax=3, interpolation="nearest"
            )
            axes.axvline(scan.spatial_shape[0] / 2, color="white", linewidth=0.8, linestyle=":")
        axes.set_title(title, color="white")
        axes.set_axis_off()
    figure.suptitle(
        "MNI152: grey matter (orange), white matter (blue), fluid (green); learned left of the dotted line", color="white"
    )
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Run all of it; give the Dice of each tissue in the half that was not learned from."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("mni152"), help="where everything is written")
    parser.add_argument("--resolution", type=int, default=1, help="millimetres from voxel to voxel")
    parser.add_argument("--steps", type=int, default=80, help="batches to learn from")
    options = parser.parse_args(arguments)
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    head = write_head(folder, options.resolution)
    middle = head.spatial_shape[0] // 2
    model = train(head[:, :middle], options.steps)

    program = torch.export.export(model, (torch.zeros(BATCH, 1, PATCH, PATCH, PATCH),))
    torch.export.save(program, folder / "tissue.pt2")
    command = ["predict", folder / "tissue.pt2", folder / "t1.nii.gz", "-o", folder / "tissue.nii.gz", "--labels", "--overwrite"]
    print("voxloom", *command, flush=True)
    subprocess.run([sys.executable, "-m", "voxloom", *command], check=True)  # noqa: S603 - the command as it was printed

    found = vx.LabelMap(folder / "tissue.nii.gz")
    scores = dice(found.data[:, middle:], head.tissue.data[:, middle:])
    for name, score in scores.items():
        print(f"{name:14} Dice {score:.3f}")
    draw(folder / "tissue.png", head.t1, found, head.tissue)
    print(f"Picture: {(folder / 'tissue.png').resolve()}")
    return scores


if __name__ == "__main__":
    main()
