"""The whole way in a minute: train a small network on patches, say what it expects, and predict a scan that it has not seen."""

import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..datasets import HeadPhantom
from ..inference import Predictor
from ..io.labels import Label
from ..models.loading import load_model
from ..models.packing import save_model
from ..models.spec import ModelSpec
from ..sampling.by_label import LabelSampler
from ..training.queue import Queue
from ..volumes.images.image import LabelMap
from ..volumes.loading import SubjectsDataset, SubjectsLoader
from ..volumes.subject import Subject
from ..volumes.views.intensities import Intensity

__all__ = ["WholeWay", "run_whole_way"]

Progress = Callable[[Iterable, int], Iterable]

NAMES = HeadPhantom.names
# Heads that are learned from, their voxels along an axis, and those of a patch.
HEADS, SIZE, PATCH, BATCH = 4, 64, 32, 4
# The unseen scan has smaller voxels, and axes that point the other way: the spec brings it to what the network knows.
UNSEEN_SIZE, UNSEEN_SEED = 96, 1000


class _Convolutions(nn.Sequential):
    def __init__(self, before: int, channels: int) -> None:
        layers: list[nn.Module] = []
        for given in (before, channels):
            layers += [nn.Conv3d(given, channels, 3, padding=1), nn.InstanceNorm3d(channels, affine=True), nn.ReLU()]
        super().__init__(*layers)


class SmallUNet(nn.Module):
    """Two levels, from `(B, 1, I, J, K)` to a score for each label; sides must be even."""

    def __init__(self, width: int = 10) -> None:
        super().__init__()
        self.first, self.deep = _Convolutions(1, width), _Convolutions(width, 2 * width)
        self.grow, self.last = nn.ConvTranspose3d(2 * width, width, 2, 2), _Convolutions(2 * width, width)
        self.scores = nn.Conv3d(width, len(NAMES), 1)

    def forward(self, volume: Tensor) -> Tensor:
        """Say how well each label fits each voxel."""
        fine = self.first(volume)
        coarse = self.grow(self.deep(nn.functional.max_pool3d(fine, 2)))
        return self.scores(self.last(torch.cat([fine, coarse], dim=1)))


@dataclass(frozen=True)
class WholeWay:
    """What was made on the way."""

    model_file: Path
    """The trained network, with its spec."""
    scan_file: Path
    label_file: Path
    scan: Subject
    """The unseen scan, with the truth."""
    labels: LabelMap
    plan: str
    losses: list[float]
    dice: dict[str, float]
    """How well each label was found, from 0 to 1."""
    seconds: float
    """What predicting took."""


def run_whole_way(folder: Path, steps: int, progress: Progress) -> WholeWay:
    """Train, export, and predict from file to file.

    Args:
        folder: where the files are written.
        steps: how many batches are learned from.
        progress: wraps the batches, to show how far it has come.
    """
    spec = ModelSpec(
        channels=("t1",),
        orientation="RAS",
        spacing=HeadPhantom(SIZE).t1.spacing,
        intensity=(Intensity(scale="z-score"),),
        patch_size=(PATCH,) * 3,
        reduce="argmax",
        labels=tuple(Label(value, name) for value, name in NAMES.items()),
    )
    network, losses = _trained(steps, progress)
    model_file, scan_file, label_file = folder / "trained.pt2", folder / "scan.nii.gz", folder / "scan_labels.nii.gz"
    save_model(network, model_file, spec, overwrite=True)

    head = HeadPhantom(UNSEEN_SIZE, seed=UNSEEN_SEED)
    unseen = Subject(t1=head.t1.reoriented("LPS"), labels=head.labels.reoriented("LPS"))
    unseen.t1.save(scan_file)
    loaded = load_model(str(model_file))
    predictor = Predictor(loaded.model, spec=loaded.spec, batch_size=BATCH)
    plan = str(predictor.plan(scan_file, output=label_file))
    began = time.monotonic()
    found = predictor(scan_file, output=label_file, resume=False, overwrite=True)
    seconds, dice = time.monotonic() - began, _dice(found.data, unseen.labels.data)
    return WholeWay(model_file, scan_file, label_file, unseen, found, plan, losses, dice, seconds)


def _trained(steps: int, progress: Progress) -> tuple[nn.Module, list[float]]:
    heads = SubjectsDataset([HeadPhantom(SIZE, seed=number) for number in range(HEADS)], transform=_standardised)
    sampler = LabelSampler(PATCH, "labels", dict.fromkeys(NAMES, 1), border="clamp")
    queue = Queue(heads, max_length=32, samples_per_volume=16, sampler=sampler, num_workers=0, seed=0)
    loader = SubjectsLoader(queue, batch_size=BATCH)

    def batches() -> Iterable:
        while True:
            yield from loader

    torch.manual_seed(0)
    network, losses = SmallUNet(), []
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    for batch in progress(itertools.islice(batches(), steps), steps):
        truth = batch.labels.data[:, 0].long()
        loss = _loss(network(batch.t1.data), truth)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    queue.close()
    return network, losses


def _loss(scores: Tensor, truth: Tensor) -> Tensor:
    """Add cross-entropy and one minus the soft Dice, in which small labels count as much as large ones.

    Source: Milletari et al., V-Net, 3DV (2016), https://doi.org/10.1109/3DV.2016.79; both together as nnU-Net adds them.
    """
    one_hot = nn.functional.one_hot(truth, len(NAMES)).movedim(-1, 1).float()
    found, axes = scores.softmax(1), (0, 2, 3, 4)
    dice = (2 * (found * one_hot).sum(axes) + 1) / (found.sum(axes) + one_hot.sum(axes) + 1)
    return nn.functional.cross_entropy(scores, truth) + 1 - dice.mean()


def _standardised(subject: Subject) -> Subject:
    """Bring a scan to mean 0 and standard deviation 1, as the spec says."""
    data = subject.t1.data
    subject.t1.set_data((data - data.mean()) / data.std(correction=0))
    return subject


def _dice(found: Tensor, truth: Tensor) -> dict[str, float]:
    """Measure how well each label but the background was found."""
    scores = {}
    for value, name in list(NAMES.items())[1:]:
        one, other = found == value, truth == value
        scores[name] = 2 * int((one & other).sum()) / max(1, int(one.sum()) + int(other.sum()))
    return scores
