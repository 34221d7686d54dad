"""Outputs that are smaller or larger than the input, per axis and per output."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import voxloom as vx
from voxloom.errors import NoSuchKeyError, ScaleError

from strategies import examples


def resized(volume, scale):
    """Nearest neighbour: keep every n-th voxel, or repeat each n times. Exact on aligned patches."""
    for axis, factor in enumerate(scale, start=2):
        if factor < 1:
            step = [slice(None)] * volume.ndim
            step[axis] = slice(None, None, int(1 / factor))
            volume = volume[tuple(step)]
        else:
            volume = volume.repeat_interleave(int(factor), dim=axis)
    return volume


@examples(80)
@given(
    st.tuples(*[st.sampled_from([Fraction(1, 4), Fraction(1, 2), Fraction(1), Fraction(2), Fraction(3)])] * 3),
    st.tuples(*[st.integers(2, 5)] * 3),
    st.tuples(*[st.integers(0, 6)] * 3),
    st.sampled_from(["crop", "average", "hann", "gaussian"]),
    st.sampled_from([None, "edge"]),
)
def test_a_resizing_model_gives_the_resized_volume(scale, quarters, extra, mode, padding):
    patch = tuple(4 * value for value in quarters)
    shape = tuple(size + 4 * more for size, more in zip(patch, extra, strict=True))
    overlap = 8 if padding or min(patch) > 8 else 4
    overlap = tuple(min(overlap, size - 4) // 8 * 8 if padding else min(overlap, size - 4) for size in patch)
    data = torch.rand(1, *shape)
    sampler = vx.GridSampler(vx.Subject(t1=vx.ScalarImage(data)), patch, overlap, padding)
    expected = resized(data[None], scale)[0]
    by_scale = vx.GridAggregator(sampler, mode, scale=scale)
    by_factor = vx.GridAggregator(sampler, mode, downsampling_factor=[1 / factor for factor in scale])
    by_shape = vx.PatchAggregator(shape, mode, overlap, output_shape=expected.shape[1:])
    for batch in vx.SubjectsLoader(sampler, batch_size=3):
        output = resized(batch.t1.data, scale)
        for aggregator in (by_scale, by_factor, by_shape):
            aggregator.add_batch(output, batch)
    for aggregator in (by_scale, by_factor, by_shape):
        torch.testing.assert_close(aggregator.get_output(), expected)


def test_outputs_of_different_scale_channels_and_type_in_one_batch():
    data = torch.rand(1, 24, 16, 16)
    sampler = vx.GridSampler(vx.Subject(t1=vx.ScalarImage(data)), 8, 4)
    scales = {"labels": 1, "embedding": Fraction(1, 4), "fine": (2, 1, 1)}
    shapes = {"labels": (24, 16, 16), "embedding": (6, 4, 4), "fine": (48, 16, 16)}
    aggregators = [
        vx.GridAggregator(sampler, "crop", scale=scales),
        vx.PatchAggregator((24, 16, 16), "crop", 4, output_shape=shapes),
    ]
    for batch in vx.SubjectsLoader(sampler, batch_size=4):
        volume = batch.t1.data
        outputs = {
            "labels": (volume > 0.5),
            "embedding": resized(volume, (Fraction(1, 4),) * 3).repeat(1, 5, 1, 1, 1).double(),
            "fine": resized(volume, (2, 1, 1)).half(),
        }
        for aggregator in aggregators:
            aggregator.add_batch(outputs, batch[vx.LOCATION])
    for aggregator in aggregators:
        assert torch.equal(aggregator.get_output("labels"), data > 0.5)
        assert torch.equal(
            aggregator.get_output("embedding"), resized(data[None], (Fraction(1, 4),) * 3)[0].repeat(5, 1, 1, 1).double()
        )
        assert torch.equal(aggregator.get_output("fine"), resized(data[None], (2, 1, 1))[0].half())


def test_a_start_between_two_voxels_is_refused_before_anything_is_computed():
    sampler = vx.GridSampler(vx.Subject(t1=vx.ScalarImage(torch.rand(1, 64, 32, 32))), 32, 6)
    with pytest.raises(ScaleError, match="on axis I, the patch that begins at voxel 26.*overlap of 8 would align"):
        vx.GridAggregator(sampler, downsampling_factor=4)


def test_a_volume_whose_last_patch_cannot_be_aligned_says_what_size_would_do():
    sampler = vx.GridSampler(vx.Subject(t1=vx.ScalarImage(torch.rand(1, 45, 32, 32))), 32, 8)
    with pytest.raises(ScaleError, match="pad or crop the volume to 48 voxels, with an overlap of 8"):
        vx.GridAggregator(sampler, downsampling_factor=4)


def test_a_location_between_two_voxels_of_the_output_is_refused():
    aggregator = vx.PatchAggregator((8, 8, 8), "average", output_shape=(4, 4, 4))
    with pytest.raises(ScaleError, match="voxel 1 on axis J"):
        aggregator.add_batch(torch.rand(1, 1, 2, 2, 2), [vx.PatchLocation((0, 1, 0), (4, 4, 4))])


@pytest.mark.parametrize("scale", [0, -1, float("nan"), float("inf"), "2", True, (1, 1), 0.0001])
def test_scales_that_are_none_are_refused(scale):
    sampler = vx.GridSampler(vx.Subject(t1=vx.ScalarImage(torch.rand(1, 8, 8, 8))), 4)
    with pytest.raises(ScaleError, match="scale is"):
        vx.GridAggregator(sampler, scale=scale)
    with pytest.raises(ScaleError, match="downsampling_factor is"):
        vx.GridAggregator(sampler, downsampling_factor=scale)


def test_an_output_whose_scale_was_not_said_is_refused():
    sampler = vx.GridSampler(vx.Subject(t1=vx.ScalarImage(torch.rand(1, 8, 8, 8))), 4)
    aggregator = vx.GridAggregator(sampler, scale={"seg": 1})
    with pytest.raises(NoSuchKeyError, match="scale says nothing of the output 'other', only of 'seg'"):
        aggregator.add_batch({"other": torch.rand(1, 1, 4, 4, 4)}, [sampler.grid[0]])


def test_numbers_of_all_kinds_are_scales():
    sampler = vx.GridSampler(vx.Subject(t1=vx.ScalarImage(torch.rand(1, 8, 8, 8))), 4)
    for half in (0.5, Fraction(1, 2), np.float32(0.5), (0.5, Fraction(1, 2), np.float64(0.5)), np.array([0.5, 0.5, 0.5])):
        assert vx.GridAggregator(sampler, scale=half)._scaled_grid(None, sampler.grid)[0].spatial_shape == (4, 4, 4)
    with pytest.raises(ScaleError, match="give one of them"):
        vx.GridAggregator(sampler, downsampling_factor=2, scale=2)
    large = vx.PatchAggregator((5000,), "average", output_shape=(1,))
    large.add_batch(torch.ones(1, 1, 1), [vx.PatchLocation((0,), (5000,))])
    assert large.get_output().tolist() == [[1]]
