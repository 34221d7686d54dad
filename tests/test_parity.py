"""Parity with TorchIO 1.2.1 and MONAI 1.6.1, where they are right."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import voxloom as vx

from strategies import examples, geometries

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torchio as tio
    from monai.inferers import SlidingWindowInferer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning:monai")


class Positional(nn.Module):
    """A model whose output depends on where in the patch a voxel is, so that patches disagree."""

    def forward(self, batch):
        return batch * 2 + torch.arange(batch[0, 0].numel(), dtype=batch.dtype).reshape(batch.shape[2:]) / batch[0, 0].numel()


def ours(data, patch, overlap, mode, padding=None, model=None):
    sampler = vx.GridSampler(vx.Subject(t1=vx.ScalarImage(data)), patch, overlap, padding)
    aggregator = vx.GridAggregator(sampler, mode)
    for batch in vx.SubjectsLoader(sampler, batch_size=4):
        aggregator.add_batch((model or Positional())(batch.t1.data), batch[vx.LOCATION])
    return aggregator.get_output_tensor()


def torchios(data, patch, overlap, mode, padding=None, model=None):
    sampler = tio.GridSampler(tio.Subject(t1=tio.ScalarImage(tensor=data)), patch, overlap, padding)
    aggregator = tio.GridAggregator(sampler, overlap_mode=mode)
    for batch in tio.SubjectsLoader(sampler, batch_size=4):
        aggregator.add_batch((model or Positional())(batch["t1"][tio.DATA]), batch[tio.LOCATION])
    return aggregator.get_output_tensor()


@examples(60)
@given(geometries(largest=12))
def test_the_grid_is_torchios(geometry):
    shape, patch, overlap = geometry
    subject = tio.Subject(t1=tio.ScalarImage(tensor=torch.rand(1, *shape)))
    sampler = vx.GridSampler(vx.Subject(t1=vx.ScalarImage(subject.t1.data)), patch, overlap)
    theirs = tio.GridSampler(subject, patch, overlap)
    assert sampler.locations.tolist() == theirs.locations.tolist()
    assert torch.equal(sampler[len(sampler) // 2].t1.data, theirs[len(theirs) // 2].t1.data)


@examples(40)
@given(geometries(largest=12), st.sampled_from(["average", "hann"]))
def test_blending_is_torchios(geometry, mode):
    shape, patch, overlap = geometry
    data = torch.rand(2, *shape)
    torch.testing.assert_close(ours(data, patch, overlap, mode), torchios(data, patch, overlap, mode), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("shape", "patch", "overlap"), [((20, 18, 16), (8, 6, 4), (4, 2, 0)), ((16, 16, 16), 8, 0)])
def test_cropping_is_torchios_where_the_last_patch_keeps_to_the_stride(shape, patch, overlap):
    # Where it does not, TorchIO gives the last patch more than its half of the overlap.
    data = torch.rand(1, *shape)
    assert torch.equal(ours(data, patch, overlap, "crop"), torchios(data, patch, overlap, "crop"))


PADDED = ["edge", "reflect", "symmetric", "wrap", "constant", "minimum", "maximum", "mean", "median", 3]


@pytest.mark.parametrize("mode", PADDED)
def test_padding_is_torchios(mode):
    data = torch.rand(1, 17, 16, 15)
    sampler = vx.GridSampler(vx.Subject(t1=vx.ScalarImage(data)), 8, 4, mode)
    theirs = tio.GridSampler(tio.Subject(t1=tio.ScalarImage(tensor=data)), 8, 4, mode)
    border = np.array([2] * 6)
    assert (theirs.locations - border).tolist() == sampler.locations.tolist()
    for number in range(len(sampler)):
        torch.testing.assert_close(sampler[number].t1.data, theirs[number].t1.data)
        np.testing.assert_allclose(sampler[number].t1.affine, theirs[number].t1.affine)


def test_padded_aggregation_is_torchios():
    data = torch.rand(1, 16, 16, 16)  # 20 with padding: the last patch keeps to the stride
    for mode in ("average", "hann"):
        torch.testing.assert_close(ours(data, 8, 4, mode, "reflect"), torchios(data, 8, 4, mode, "reflect"))
    assert torch.equal(ours(data, 8, 4, "crop", "reflect"), torchios(data, 8, 4, "crop", "reflect"))


def broad_gaussian(size):
    """Half a patch wide, so that no weight falls below 0.001, to which MONAI raises those that do."""
    distance = torch.arange(size) - (size - 1) / 2
    return torch.exp(-0.5 * (distance / (0.5 * size)) ** 2)


@pytest.mark.parametrize(("mode", "theirs"), [("average", "constant"), (broad_gaussian, "gaussian")])
@pytest.mark.parametrize(
    ("shape", "patch", "overlap"), [((24, 20, 16), 8, 4), ((19, 23, 17), 8, 4), ((30, 17, 16), (10, 8, 6), 2)]
)
def test_blending_is_monais(mode, theirs, shape, patch, overlap):
    data = torch.rand(2, *shape)
    size = (patch,) * 3 if isinstance(patch, int) else patch
    inferer = SlidingWindowInferer(size, sw_batch_size=4, overlap=[overlap / side for side in size], mode=theirs, sigma_scale=0.5)
    expected = inferer(data[None].clone(), Positional())[0]
    torch.testing.assert_close(ours(data, patch, overlap, mode), expected, rtol=1e-4, atol=1e-4)


def test_where_they_are_wrong_we_are_not():
    """Traps that the peers fell into: sums in the type of the patch, and a last patch that takes too much."""
    data = torch.full((1, 8, 8, 8), 200, dtype=torch.uint8)
    assert ours(data, 4, 2, "average", model=nn.Identity()).unique().tolist() == [200.0]
    assert torchios(data, 4, 2, "average", model=nn.Identity()).min() < 200
    half = torch.full((1, 8, 8, 8), 30000.0).half()
    assert ours(half, 4, 2, "average", model=nn.Identity()).unique().tolist() == [30000.0]
    assert torchios(half, 4, 2, "average", model=nn.Identity()).isinf().any()
