"""Promise 1: a model that returns its input gives back the input, and one that returns a constant the constant."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import voxloom as vx

from strategies import FLOATS, INTEGERS, MODES, PADDING, WINDOWS, examples, geometries, random_values


def weave(subject, patch, overlap, mode, padding=None, model=lambda x: x, batch_size=3, order=None, **kwargs):
    """Cut a subject, apply a model and aggregate its outputs with both aggregators."""
    sampler = vx.GridSampler(subject, patch, overlap, padding)
    by_grid = vx.GridAggregator(sampler, mode, **kwargs)
    anywhere = vx.PatchAggregator(subject.spatial_shape, mode, overlap, padded=padding is not None)
    loader = vx.SubjectsLoader(sampler, batch_size=batch_size, sampler=order(len(sampler)) if order else None)
    for batch in loader:
        output = model(batch.t1.data)
        by_grid.add_batch(output, batch[vx.LOCATION])
        anywhere.add_batch(output, batch.metadata["patch_location"])
    first, second = by_grid.get_output(), anywhere.get_output()
    assert torch.equal(first, second)
    return first, sampler


def coverage(sampler):
    """Number of patches over each voxel."""
    counts = torch.zeros(sampler.subject.spatial_shape)
    for location in sampler.locations:
        box = location.box & vx.data.PatchLocation((0,) * counts.ndim, tuple(counts.shape)).box
        counts[box.slices] += 1
    return counts


def assert_woven(output, expected, sampler, mode):
    if mode == "crop":
        assert output.dtype == expected.dtype
        assert torch.equal(output, expected)
        return
    assert output.dtype == (torch.float64 if expected.dtype == torch.float64 else torch.float32)
    bound = (coverage(sampler) + 2) * 2**-23 * expected.double().abs()
    assert ((output.double() - expected.double()).abs() <= bound).all()


@examples(150)
@given(geometries(), st.sampled_from([*FLOATS, *INTEGERS]), st.sampled_from(MODES), st.integers(0, 5))
def test_identity_gives_back_the_input(geometry, dtype, mode, seed):
    shape, patch, overlap = geometry
    data = random_values((2, *shape), dtype, seed)
    original = data.clone()
    output, sampler = weave(vx.Subject(t1=vx.ScalarImage(data)), patch, overlap, mode)
    assert_woven(output, original, sampler, mode)
    assert torch.equal(data, original)


@examples(150)
@given(
    geometries(largest=9, may_exceed=True),
    st.sampled_from([torch.float32, torch.float64, torch.int16, torch.uint8]),
    st.sampled_from(MODES),
    st.sampled_from(PADDING[1:]),
)
def test_identity_gives_back_the_input_whatever_it_was_padded_with(geometry, dtype, mode, padding):
    shape, patch, overlap = geometry
    data = random_values((1, *shape), dtype)
    output, sampler = weave(vx.Subject(t1=vx.ScalarImage(data)), patch, overlap, mode, padding)
    assert output.shape == data.shape
    assert_woven(output, data, sampler, mode)


@given(geometries(), st.sampled_from(MODES), st.floats(1e-30, 1e30))
def test_a_constant_comes_back_in_every_corner(geometry, mode, value):
    shape, patch, overlap = geometry
    subject = vx.Subject(t1=vx.ScalarImage(torch.zeros(1, *shape)))
    output, sampler = weave(subject, patch, overlap, mode, model=lambda x: torch.full_like(x, value))
    assert_woven(output, torch.full((1, *shape), value), sampler, mode)


@given(geometries(), st.sampled_from(MODES))
def test_the_order_of_patches_changes_no_more_than_rounding(geometry, mode):
    shape, patch, overlap = geometry
    data = random_values((1, *shape), torch.float32)

    def backwards(length):
        return list(reversed(range(length)))

    output, sampler = weave(vx.Subject(t1=vx.ScalarImage(data)), patch, overlap, mode, order=backwards, batch_size=2)
    assert_woven(output, data, sampler, mode)


@given(geometries(), st.sampled_from(MODES))
def test_the_largest_values_do_not_overflow(geometry, mode):
    shape, patch, overlap = geometry
    data = torch.full((1, *shape), torch.finfo(torch.float32).max * 0.49)
    output, sampler = weave(vx.Subject(t1=vx.ScalarImage(data)), patch, overlap, mode)
    assert_woven(output, data, sampler, mode)


@pytest.mark.slow
@pytest.mark.parametrize("mode", WINDOWS)
def test_high_overlap_of_many_patches_keeps_to_the_bound(mode):
    data = random_values((1, 20, 20, 20), torch.float32)
    output, sampler = weave(vx.Subject(t1=vx.ScalarImage(data)), 9, 8, mode, batch_size=64)
    assert coverage(sampler).max() == 9**3
    assert_woven(output, data, sampler, mode)


@pytest.mark.parametrize("ndim", [1, 2, 4])
@pytest.mark.parametrize("mode", MODES)
def test_volumes_of_any_number_of_axes_can_be_aggregated(ndim, mode):
    data = torch.rand(3, *(7,) * ndim)
    grid = vx.PatchGrid.cover((7,) * ndim, 4, 2)
    aggregator = vx.PatchAggregator((7,) * ndim, mode, 2)
    for location in grid:
        aggregator.add_batch(data[(slice(None), *location.to_slices())][None], [location])
    torch.testing.assert_close(aggregator.get_output(), data)
