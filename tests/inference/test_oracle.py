"""The aggregators against the slow reference, for a model whose output depends on the patch."""

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

import voxloom as vx
from voxloom.aggregation import accumulator

import reference
from strategies import WINDOWS, examples, geometries


def positional(patch, location):
    """A model that sees where in the patch a voxel is, so that patches disagree."""
    ramp = torch.arange(patch[0].numel(), dtype=torch.float32).reshape(patch.shape[1:])
    return patch + ramp + 10 * sum(location.index)


def lopsided(size):
    return torch.arange(1, size + 1)


def outputs(shape, patch, overlap, padding=None):
    subject = vx.Subject(t1=vx.ScalarImage(torch.rand(2, *shape)))
    sampler = vx.GridSampler(subject, patch, overlap, padding)
    return sampler, [(part.patch_location, positional(part.t1.data, part.patch_location)) for part in sampler]


def aggregate(aggregator, pairs):
    for location, output in pairs:
        aggregator.add_batch(output[None], [location])
    return aggregator


@pytest.fixture(autouse=True, params=["whole", "in small parts"])
def parts(request, monkeypatch):
    """What is done slab by slab in large volumes is done so in small ones too."""
    if request.param == "in small parts":
        monkeypatch.setattr(accumulator, "SLAB_VOXELS", 5)


@examples(60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(geometries(largest=6), st.sampled_from(["average", "hann", "gaussian", lopsided]), st.sampled_from([None, "reflect"]))
def test_both_aggregators_agree_with_the_reference(geometry, mode, padding):
    shape, patch, overlap = geometry
    sampler, pairs = outputs(shape, patch, overlap, padding)
    patches = [(location.index, output) for location, output in pairs]
    expected = reference.blend(shape, patches, mode).float()
    torch.testing.assert_close(aggregate(vx.GridAggregator(sampler, mode), pairs).get_output(), expected, rtol=2e-6, atol=1e-6)
    anywhere = aggregate(vx.PatchAggregator(shape, mode, overlap), pairs).get_output()
    torch.testing.assert_close(anywhere, expected, rtol=2e-6, atol=1e-6)


@examples(60)
@given(geometries(largest=7), st.sampled_from([None, "reflect"]))
def test_cropping_agrees_with_the_reference(geometry, padding):
    shape, patch, overlap = geometry
    sampler, pairs = outputs(shape, patch, overlap, padding)
    expected = reference.crop(shape, [(location.index, output) for location, output in pairs])
    assert torch.equal(aggregate(vx.GridAggregator(sampler), pairs).get_output(), expected)
    anywhere = vx.PatchAggregator(shape, "crop", overlap, padded=padding is not None)
    assert torch.equal(aggregate(anywhere, pairs).get_output(), expected)


@examples(60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(geometries(largest=6), st.sampled_from([*WINDOWS, lopsided]), st.data())
def test_subsets_repetitions_and_strays_are_weighed_as_the_reference_weighs_them(geometry, mode, data):
    shape, patch, overlap = geometry
    sampler, pairs = outputs(shape, patch, overlap)
    chosen = data.draw(st.lists(st.sampled_from(range(len(pairs))), min_size=1, max_size=8))
    added = [pairs[number] for number in chosen]
    for _ in range(data.draw(st.integers(0, 3))):
        size = tuple(data.draw(st.integers(1, 5)) for _ in range(3))
        index = tuple(data.draw(st.integers(max(-2, 1 - side), length - 1)) for side, length in zip(size, shape, strict=True))
        added.append((vx.PatchLocation(index, size), torch.rand(2, *size)))
    expected = reference.blend(shape, [(location.index, output) for location, output in added], mode, fill=-5.0).float()
    aggregators = [vx.PatchAggregator(shape, mode, overlap, fill=-5)]
    if all(location in sampler.grid for location, _ in added):
        aggregators.append(vx.GridAggregator(sampler, mode, fill=-5))
    for aggregator in aggregators:
        result = aggregate(aggregator, added).get_output(strict=False)
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
        assert aggregator.get_output(strict=False) is result


def test_patches_from_nowhere_in_particular_need_no_grid():
    data = torch.rand(1, 9, 8, 7)
    aggregator = vx.PatchAggregator((9, 8, 7), "gaussian")
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        index = tuple(int(torch.randint(-2, size - 2, (), generator=generator)) for size in data.shape[1:])
        padded = torch.nn.functional.pad(data, (4,) * 6)
        i, j, k = (value + 4 for value in index)
        aggregator.add_batch(padded[None, :, i : i + 4, j : j + 4, k : k + 4], [vx.PatchLocation(index, (4, 4, 4))])
    torch.testing.assert_close(aggregator.get_output(), data)
