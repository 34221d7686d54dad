"""Train a small U-Net on files: patches from a queue, and a whole volume through a grid to see what was learned.

Noisy heads at random places are written to a folder, as .nii.gz. A queue loads, normalises and cuts them in processes of its own
while the network learns their labels. After each epoch the network is applied to a head that it has not seen, patch by patch, and
in the end its labels are saved beside it. After each epoch everything is saved, so that the training can be interrupted and taken
up again with the same command: it goes on with the epoch that was interrupted.

    python examples/train_unet.py [--folder heads] [--subjects 12] [--epochs 12] [--workers 2]
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import voxloom as vx

HEAD, FIELD, PATCH = 56, 72, 32
CLASSES = len(vx.datasets.HeadPhantom.names)


class Block(nn.Sequential):
    """Two convolutions."""

    def __init__(self, channels: int, out_channels: int) -> None:
        layers = []
        for before in (channels, out_channels):
            layers += [nn.Conv3d(before, out_channels, 3, padding=1), nn.InstanceNorm3d(out_channels, affine=True), nn.ReLU()]
        super().__init__(*layers)


class UNet(nn.Module):
    """Three levels, from `(B, 1, I, J, K)` to `(B, CLASSES, I, J, K)`; sides must be multiples of four."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.down = nn.ModuleList([Block(1, width), Block(width, 2 * width), Block(2 * width, 4 * width)])
        self.grow = nn.ModuleList([nn.ConvTranspose3d(4 * width, 2 * width, 2, 2), nn.ConvTranspose3d(2 * width, width, 2, 2)])
        self.up = nn.ModuleList([Block(4 * width, 2 * width), Block(2 * width, width)])
        self.last = nn.Conv3d(width, CLASSES, 1)

    def forward(self, volume: Tensor) -> Tensor:
        """Say how well each class fits each voxel."""
        kept = []
        for number, block in enumerate(self.down):
            volume = block(volume if number == 0 else nn.functional.max_pool3d(volume, 2))
            kept.append(volume)
        for grow, block, wide in zip(self.grow, self.up, reversed(kept[:-1]), strict=True):
            volume = block(torch.cat([grow(volume), wide], dim=1))
        return self.last(volume)


def write_head(folder: Path, number: int) -> vx.Subject:
    """Write a head at a random place in a larger field, with more noise than usual, unless it is there already."""
    t1, labels = folder / f"head{number:02}_t1.nii.gz", folder / f"head{number:02}_labels.nii.gz"
    if not labels.exists():
        generator = torch.Generator().manual_seed(number)
        head = vx.datasets.HeadPhantom(HEAD, seed=number)
        start = torch.randint(FIELD - HEAD + 1, (3,), generator=generator).tolist()
        box = (slice(None), *(slice(first, first + HEAD) for first in start))
        scan = 30 * torch.randn(1, FIELD, FIELD, FIELD, generator=generator)
        truth = torch.zeros(1, FIELD, FIELD, FIELD, dtype=torch.uint8)
        scan[box] += head.t1.data
        truth[box] = head.labels.data
        vx.ScalarImage(scan, affine=head.t1.affine).save(t1)
        vx.LabelMap(truth, affine=head.t1.affine).save(labels)
    return vx.Subject(t1=vx.ScalarImage(t1), labels=vx.LabelMap(labels))


def normalise(subject: vx.Subject) -> vx.Subject:
    """Bring a scan to mean 0 and standard deviation 1."""
    data = subject.t1.data
    subject.t1.set_data((data - data.mean()) / data.std())
    return subject


def flip(patch: vx.Subject) -> vx.Subject:
    """Mirror a patch from left to right, or not."""
    if torch.rand(1) < 0.5:
        for image in patch.images.values():
            image.set_data(image.data.flip(1))
    return patch


def loss_of(scores: Tensor, labels: Tensor) -> Tensor:
    """Add cross-entropy and one minus the soft Dice, in which small classes count as much as large ones.

    Source: Milletari et al., V-Net, 3DV (2016), https://doi.org/10.1109/3DV.2016.79; both together as nnU-Net adds them.
    """
    truth = nn.functional.one_hot(labels, CLASSES).movedim(-1, 1).float()
    found, axes = scores.softmax(dim=1), (0, 2, 3, 4)
    overlap = 2 * (found * truth).sum(axes) + 1
    return nn.functional.cross_entropy(scores, labels) + 1 - (overlap / (found.sum(axes) + truth.sum(axes) + 1)).mean()


def dice(prediction: Tensor, truth: Tensor) -> dict[str, float]:
    """Measure how well each label but the background was found, from 0 to 1."""
    scores = {}
    for label, name in list(vx.datasets.HeadPhantom.names.items())[1:]:
        found, there = prediction == label, truth == label
        scores[name] = 2 * int((found & there).sum()) / max(1, int(found.sum()) + int(there.sum()))
    return scores


def train(
    model: UNet, subjects: list[vx.Subject], unseen: vx.Subject, checkpoint: Path, epochs: int, workers: int
) -> list[float]:
    """Train until so many epochs are done, from where the checkpoint says; give the mean loss of each."""
    sampler = vx.LabelSampler(PATCH, "labels", dict.fromkeys(range(CLASSES), 1), border="clamp")
    dataset = vx.SubjectsDataset(subjects, transform=normalise)
    queue = vx.Queue(
        dataset, max_length=48, samples_per_volume=16, sampler=sampler, num_workers=workers, patch_transform=flip, seed=0
    )
    loader = vx.SubjectsLoader(queue, batch_size=4)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses: list[float] = []
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        queue.load_state_dict(saved["queue"])
        losses = saved["losses"]
    while len(losses) < epochs:
        total = 0.0
        for batch in loader:
            loss = loss_of(model(batch.t1.data), batch.labels.data[:, 0].long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() / len(loader)
        losses.append(total)
        scores = dice(predict(model, unseen).data, unseen.labels.data)
        print(
            f"epoch {len(losses)}: loss {total:.3f}, Dice of the unseen head {sum(scores.values()) / len(scores):.3f}", flush=True
        )
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "queue": queue.state_dict(), "losses": losses}
        torch.save(state, checkpoint.with_suffix(".new"))
        checkpoint.with_suffix(".new").replace(checkpoint)
    queue.close()
    return losses


def predict(model: UNet, subject: vx.Subject) -> vx.LabelMap:
    """Apply the network to a whole volume, and give the likeliest labels; its mode is left as it was."""
    return vx.predict(
        model, normalise(subject), PATCH, 0.5, "hann", image_name="t1", batch_size=4, activation="softmax", reduce="argmax"
    )


def main(arguments: list[str] | None = None) -> tuple[list[float], dict[str, float]]:
    """Run all of it; give the losses, and the Dice of each label."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("heads"), help="where heads and results are written")
    parser.add_argument("--subjects", type=int, default=12, help="heads to learn from")
    parser.add_argument("--epochs", type=int, default=12, help="passes over their patches")
    parser.add_argument("--workers", type=int, default=2, help="processes that make patches")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    *subjects, unseen = [write_head(options.folder, number) for number in range(options.subjects + 1)]
    model = UNet()
    losses = train(model, subjects, unseen, options.folder / "checkpoint.pt", options.epochs, options.workers)
    prediction = predict(model, unseen)
    prediction.save(options.folder / "prediction.nii.gz")
    scores = dice(prediction.data, unseen.labels.data)
    for name, score in scores.items():
        print(f"{name:20} Dice {score:.3f}")
    print(f"{'mean':20} Dice {sum(scores.values()) / len(scores):.3f}")
    return losses, scores


if __name__ == "__main__":
    main()
