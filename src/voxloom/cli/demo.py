"""The main job, start to end, on one image: a network applied to the whole of it, patch by patch, and from file to file."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..core.grid.windows import OverlapMode
from ..core.sizes import as_overlap, as_sizes
from ..inference import GridAggregator, predict
from ..models.loading import load_model
from ..sampling.grid import GridSampler
from ..volumes.images.image import Image, ScalarImage
from ..volumes.loading import SubjectsLoader
from ..volumes.subject import Subject

__all__ = ["DemoResult", "FilterNetwork", "apply_by_patches", "run_demo"]

Progress = Callable[[Iterable], Iterable]


class FilterNetwork(nn.Module):
    """A small network of fixed 3-D filters: it smooths, and then shows how steeply the brightness changes.

    Each of its five layers is a 3 × 3 × 3 convolution that pads with zeros, so a voxel of the output depends on voxels of
    the input up to `receptive_radius` away.
    """

    receptive_radius = 5

    def __init__(self) -> None:
        super().__init__()
        smooth = torch.tensor([0.25, 0.5, 0.25])
        change = torch.tensor([-0.5, 0.0, 0.5])
        self.register_buffer("smoothing", _outer(smooth, smooth, smooth)[None, None])
        slopes = [_outer(change, smooth, smooth), _outer(smooth, change, smooth), _outer(smooth, smooth, change)]
        self.register_buffer("slopes", torch.stack([*slopes, *(-slope for slope in slopes)])[:, None])
        self.register_buffer("mixing", (torch.ones(1, 6, 1, 1, 1) / 6) * _outer(smooth, smooth, smooth))

    def forward(self, volume: Tensor) -> Tensor:
        """Filter a batch `(B, 1, I, J, K)` into one of the same shape."""
        convolve = nn.functional.conv3d
        for _ in range(3):
            volume = convolve(volume, self.get_buffer("smoothing"), padding=1)
        slopes = torch.relu(convolve(volume, self.get_buffer("slopes"), padding=1))
        return convolve(slopes, self.get_buffer("mixing"), padding=1)


def _outer(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return a[:, None, None] * b[:, None] * c


@dataclass(frozen=True)
class DemoResult:
    """What the demonstration made."""

    image: ScalarImage
    """The input, one channel of float32."""
    whole: Tensor
    """Output `(1, I, J, K)` of the network for the whole volume at once."""
    patched: Tensor
    """Output `(1, I, J, K)` that was aggregated from patches."""
    sampler: GridSampler
    image_file: Path
    """The input, as a file."""
    model_file: Path
    """The network, exported for the size of a patch."""
    result: Image
    """What `predict` made of both files."""

    @property
    def greatest_difference(self) -> float:
        """Greatest absolute difference of the whole and either of the others."""
        return max(float((self.whole - other).abs().max()) for other in (self.patched, self.result.data))

    @property
    def greatest_value(self) -> float:
        """Greatest absolute value of the output, to compare the difference with."""
        return float(self.whole.abs().max())


def apply_by_patches(
    model: nn.Module, sampler: GridSampler, overlap_mode: OverlapMode, batch_size: int, progress: Progress = iter
) -> Tensor:
    """Apply a model to the patches of a sampler's first image, and aggregate its outputs: `predict`, step by step.

    Args:
        model: takes and returns tensors `(B, C, I, J, K)`.
        sampler: cuts the patches.
        overlap_mode: how they are combined; see `GridAggregator`.
        batch_size: patches that the model is given at a time.
        progress: wraps the loader, to show how far it has come.

    Returns:
        Tensor `(C, I, J, K)`.
    """
    aggregator = GridAggregator(sampler, overlap_mode)
    with torch.inference_mode():
        for batch in progress(SubjectsLoader(sampler, batch_size=batch_size)):
            images = next(iter(batch.images.values()))
            aggregator.add_batch(model(images.data), batch)
    return aggregator.get_output()


def export(model: nn.Module, patch_size: Sequence[int], path: Path) -> None:
    """Export a model of one channel, for batches of one patch."""
    program = torch.export.export(model, (torch.zeros(1, 1, *patch_size),))
    torch.export.save(program, path)


def run_demo(
    image: Image, patch_size: int, patch_overlap: int, overlap_mode: OverlapMode, folder: Path, progress: Progress = iter
) -> DemoResult:
    """Apply the network to the first channel of an image: as a whole, patch by patch, and exported, from file to file.

    Args:
        image: the input; values are taken as float32, and NaN and infinity as 0.
        patch_size: voxels of a patch on each axis, or as many as the image has, where that is less.
        patch_overlap: voxels that neighbours share.
        overlap_mode: how patches are combined.
        folder: where the files are written.
        progress: wraps the loader, to show how far it has come.
    """
    data = torch.nan_to_num(image.data[:1].float(), nan=0.0, posinf=0.0, neginf=0.0)
    scan = ScalarImage(tensor=data, affine=image.affine)
    as_overlap(patch_overlap, as_sizes(patch_size, 3, "patch_size"))
    size = [min(patch_size, length) for length in scan.spatial_shape]
    # On an axis that a single patch covers nothing overlaps.
    overlap = [0 if length <= patch_size else patch_overlap for length in scan.spatial_shape]
    sampler = GridSampler(Subject(image=scan), size, overlap)
    model = FilterNetwork().eval()
    with torch.inference_mode():
        whole = model(scan.data[None])[0]
    patched = apply_by_patches(model, sampler, overlap_mode, batch_size=4, progress=progress)

    image_file, model_file = folder / "input.nii.gz", folder / "model.pt2"
    scan.save(image_file)
    export(model, size, model_file)
    result = predict(
        load_model(str(model_file)).model,
        image_file,
        size,
        overlap,
        overlap_mode,
        output=folder / "result.nii.gz",
        resume=False,
        overwrite=True,
    )
    return DemoResult(scan, whole, patched, sampler, image_file, model_file, result)
