"""The main job on a real image: a convolutional network applied patch by patch, against the same applied to the whole."""

import pytest
import torch
from torch import nn

import voxloom as vx


def network(layers=3):
    """A small convolutional network of random weights; a voxel of its output sees `layers` voxels around it."""
    torch.manual_seed(0)
    convolutions = [nn.Conv3d(1 if number == 0 else 4, 4, 3, padding=1) for number in range(layers)]
    modules = [module for convolution in convolutions for module in (convolution, nn.ELU())]
    return nn.Sequential(*modules, nn.Conv3d(4, 2, 1)).eval()


@pytest.fixture(scope="module")
def scan(mni_path):
    image = vx.ScalarImage(mni_path)
    return vx.Subject(t1=image.new_like(image.data.float() / 255))


@pytest.fixture(scope="module")
def part(scan):
    """Half of the head along each axis, from its middle: of as many patches along each."""
    return scan[40:143, 60:181, 40:139]


@pytest.fixture(scope="module")
def whole(part):
    with torch.inference_mode():
        return network()(part.t1.data[None])[0]


@torch.inference_mode()
def by_patches(part, overlap, mode, padding=None):
    model = network()
    sampler = vx.GridSampler(part, patch_size=48, patch_overlap=overlap, padding_mode=padding)
    aggregator = vx.GridAggregator(sampler, overlap_mode=mode)
    for batch in vx.SubjectsLoader(sampler, batch_size=2):
        aggregator.add_batch(model(batch.t1.data), batch)
    return aggregator.get_output()


def test_with_an_overlap_of_twice_the_receptive_radius_cropping_gives_what_the_whole_gives(scan, part, whole):
    assert scan.spatial_shape == (197, 233, 189)
    assert part.spatial_shape == (103, 121, 99)
    output = by_patches(part, 6, "crop")
    assert (output - whole).abs().max() <= 1e-5
    assert whole.abs().max() > 0.1


def test_with_less_overlap_it_does_not(part, whole):
    assert (by_patches(part, 2, "crop") - whole).abs().max() > 1e-3


@pytest.mark.parametrize("mode", ["average", "hann", "gaussian"])
def test_blending_also_weighs_voxels_near_the_borders_of_patches(part, whole, mode, record_property):
    difference = (by_patches(part, 6, mode) - whole).abs()
    record_property("greatest difference", float(difference.max()))
    # Not zero, and not everywhere: away from the overlaps nothing is blended.
    assert 1e-3 < difference.max() < 1
    assert (difference < 1e-5).float().mean() > 0.5


def test_patches_of_grey_matter_have_grey_matter_at_their_centres(scan, mni_grey_matter_path):
    image = vx.ScalarImage(mni_grey_matter_path)
    probability = image.data.float() / image.data.max()
    subject = vx.Subject(
        t1=scan.t1,
        probability=vx.Image(probability, type=vx.SAMPLING_MAP, affine=image.affine),
        mask=vx.LabelMap((probability > 0.5).to(torch.uint8), affine=image.affine),
    )

    def at_centres(sampler):
        patches = sampler.numbered(subject, sampler.seed, 0, 0)
        indices = [patches.locate(number).index for number in range(2000)]
        return torch.stack([probability[(0, *(first + 16 for first in index))] for index in indices])

    assert at_centres(vx.LabelSampler(subject, 32, "mask", seed=0)).min() > 0.5
    drawn = at_centres(vx.WeightedSampler(subject, 32, "probability", seed=0))
    # Where a voxel is drawn in proportion to its probability p, the mean of p is the mean of p² over that of p.
    expected = float((probability**2).sum() / probability.sum())
    assert drawn.min() > 0
    assert abs(float(drawn.mean()) - expected) < 0.03
    assert float(at_centres(vx.UniformSampler(subject, 32, seed=0)).mean()) < 0.3
