"""Reductions, against the formula; and the types of labels, which follow from the number of classes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import voxloom as vx
from voxloom.inference.reductions import as_reduction, label_dtype
from voxloom.models.outputs import as_activation


def blocks(channels, seed=0, shape=(5, 6, 7)):
    return torch.randn(channels, *shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 300), st.integers(0, 99), st.integers(1, 4))
def test_argmax_takes_the_first_of_the_largest(channels, seed, levels):
    block = (blocks(channels, seed) * levels).round()  # with many that are equal
    labels = as_reduction("argmax")(block)
    assert labels.dtype == (torch.uint8 if channels <= 256 else torch.int16)
    best = block.max(0).values
    first = torch.stack([(channel == best) for channel in block]).to(torch.uint8).argmax(0)
    assert torch.equal(labels[0].long(), first)


def test_argmax_of_a_block_that_is_larger_than_a_chunk():
    block = blocks(3, shape=(90, 50, 70))
    assert torch.equal(as_reduction("argmax")(block)[0].long(), block.argmax(0))


def test_a_threshold_is_for_each_channel():
    block = blocks(3)
    result = as_reduction(0.5)(block)
    assert torch.equal(result, (block > 0.5).to(torch.uint8))
    assert as_reduction(0.5).is_labels


def test_later_regions_lie_on_top():
    block = blocks(3)
    expected = torch.zeros(5, 6, 7)
    for label, channel in zip((1, 700, 2), block, strict=True):
        expected[channel > 0.25] = label
    result = vx.Regions((1, 700, 2), threshold=0.25)(block)
    assert result.dtype == torch.int16
    assert torch.equal(result[0].float(), expected)


def test_entropy_of_probabilities():
    shares = blocks(4).softmax(0)
    expected = -(shares * shares.log()).sum(0, keepdim=True)
    torch.testing.assert_close(as_reduction("entropy")(shares), expected)
    # A sum of patches may be a little below 0.
    assert as_reduction("entropy")(torch.tensor([1.0, -1e-9]).view(2, 1, 1, 1)).item() == 0


def test_chosen_channels_and_functions():
    block = blocks(4)
    assert torch.equal(as_reduction([2, 0])(block), block[[2, 0]])
    assert torch.equal(as_reduction(lambda given: given[:2] * 2)(block), block[:2] * 2)
    assert torch.equal(as_reduction(None)(block), block)


@pytest.mark.parametrize(
    ("largest", "dtype"), [(0, torch.uint8), (255, torch.uint8), (256, torch.int16), (32768, torch.int32), (2**31, torch.int64)]
)
def test_the_type_of_labels_holds_the_largest(largest, dtype):
    assert label_dtype(largest) == dtype


def test_activations_are_made_in_float32():
    batch = torch.randn(2, 3, 4, 4, 4).half()
    assert as_activation("softmax")(batch).dtype == torch.float32
    torch.testing.assert_close(as_activation("softmax")(batch), batch.float().softmax(1))
    torch.testing.assert_close(as_activation("sigmoid")(batch), batch.float().sigmoid())
    assert as_activation("sigmoid")(batch.double()).dtype == torch.float64
