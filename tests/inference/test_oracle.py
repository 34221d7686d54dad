"""The aggregators against the slow reference, for a model whose output depends on the patch."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import voxloom as vx

import reference
from strategies import WINDOWS, geometries


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


@settings(max_examples=60)
@given(geometries(largest=6), st.sampled_from([*WINDOWS, lopsided, "crop"]), st.sampled_from([None, "reflect"]))
def test_both_aggregators_agree_with_the_reference(geometry, mode, padding):
    shape, patch, overlap = geometry
    sampler, pairs = outputs(shape, patch, overlap, padding)
    patches = [(location.index, output) for location, output in pairs]
    expected = reference.crop(shape, patches) if mode == "crop" else reference.blend(shape, patches, mode).float()
    torch.testing.assert_close(aggregate(vx.GridAggregator(sampler, mode), pairs).get_output(), expected, rtol=2e-6, atol=1e-6)
    anywhere = aggregate(vx.PatchAggregator(shape, mode, overlap), pairs).get_output()
    torch.testing.assert_close(anywhere, expected, rtol=2e-6, atol=1e-6)


@settings(max_examples=60)
@given(geometries(largest=6), st.sampled_from([*WINDOWS, lopsided]), st.data())
def test_subsets_repetitions_and_strays_are_weighed_as_the_reference_weighs_them(geometry, mode, data):
    shape, patch, overlap = geometry
    sampler, pairs = outputs(shape, patch, overlap)
    chosen = data.draw(st.lists(st.sampled_from(range(len(pairs))), min_size=1, max_size=8))
    added = [pairs[number] for number in chosen]
    for _ in range(data.draw(st.integers(0, 3))):
        size = tuple(data.draw(st.integers(1, 5)) for _ in range(3))
        index = tuple(data.draw(st.integers(-2, length - 1)) for length in shape)
        added.append((vx.PatchLocation(index, size), torch.rand(2, *size)))
    expected = reference.blend(shape, [(location.index, output) for location, output in added], mode, fill=-5.0).float()
    for aggregator in (vx.GridAggregator(sampler, mode, fill=-5), vx.PatchAggregator(shape, mode, overlap, fill=-5)):
        result = aggregate(aggregator, added).get_output(strict=False)
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


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
