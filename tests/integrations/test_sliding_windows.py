"""Sliding windows with MONAI's arguments give MONAI's results."""

import monai.inferers
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.data import MetaTensor

import voxloom as vx
from voxloom.errors import ModeError, OutputError
from voxloom.integrations.monai import VoxloomInferer, sliding_window_inference

from strategies import examples


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    layers = [torch.nn.Conv3d(2, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv3d(4, 3, 3, padding=1)]
    return torch.nn.Sequential(*layers).eval()


def inputs_of(*shape, seed=1):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def both(*arguments, **named):
    with torch.no_grad():
        return sliding_window_inference(*arguments, **named), monai.inferers.sliding_window_inference(*arguments, **named)


def assert_close(ours, theirs):
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("mode", ["constant", "gaussian"])
@pytest.mark.parametrize(
    ("shape", "roi", "overlap"),
    [
        ((1, 2, 20, 23, 17), 8, 0.25),
        ((2, 2, 20, 23, 17), (8, 9, 10), (0.5, 0.25, 0.7)),
        ((1, 2, 20, 6, 9), (8, 9, -1), 0.5),
        ((1, 2, 5, 6, 9), 10, 0.6),
        ((3, 2, 12, 12, 12), (12, 0, None), 0.0),
    ],
)
def test_three_axes(network, shape, roi, overlap, mode):
    assert_close(*both(inputs_of(*shape), roi, 3, network, overlap, mode))


@examples(30, deadline=None)
@given(st.data())
def test_all_grids(network, data):
    shape = data.draw(st.tuples(*[st.integers(3, 18)] * 3))
    roi = data.draw(st.tuples(*[st.integers(2, 12)] * 3))
    overlap = data.draw(st.floats(0, 0.9))
    mode = data.draw(st.sampled_from(["constant", "gaussian"]))
    padding = data.draw(st.sampled_from(["constant", "replicate"]))
    size = data.draw(st.integers(1, 5))
    scale = data.draw(st.sampled_from([0.125, 0.3]))
    assert_close(*both(inputs_of(1, 2, *shape), roi, size, network, overlap, mode, scale, padding, 0.7 * (padding == "constant")))


@pytest.mark.parametrize(("roi", "overlap"), [(10, 0.8), ((20, 12, 10), (0.9, 0.3, 0.8))])
def test_windows_begin_where_monais_rounding_has_them(network, roi, overlap):
    assert_close(*both(inputs_of(1, 2, 23, 14, 13), roi, 3, network, overlap))


def test_two_axes():
    torch.manual_seed(0)
    flat = torch.nn.Conv2d(1, 2, 3, padding=1).eval()
    for mode in ("constant", "gaussian"):
        assert_close(*both(inputs_of(2, 1, 20, 30), (8, 12), 4, flat, 0.5, mode))
        assert_close(*both(inputs_of(2, 1, 6, 30), 8, 4, flat, 0.5, mode))


@pytest.mark.parametrize("mode", ["constant", "gaussian"])
def test_tuples_and_dicts_of_outputs_of_other_sizes(network, mode):
    def pair(batch):
        scores = network(batch)
        return scores, torch.nn.functional.avg_pool3d(scores, 2)

    ours, theirs = both(inputs_of(2, 2, 16, 12, 20), 8, 3, pair, 0.5, mode)
    assert isinstance(ours, tuple)
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other)
    ours, theirs = both(inputs_of(1, 2, 16, 12, 20), 8, 3, lambda batch: {"b": network(batch), "a": -batch}, 0.5, mode)
    assert sorted(ours) == sorted(theirs) == ["a", "b"]
    for name in ours:
        assert_close(ours[name], theirs[name])


def test_coordinates_conditions_and_arguments(network):
    seen = {"ours": [], "theirs": []}

    def network_of(which):
        def called(batch, coordinates, factor, condition=None, offset=0):
            for number, place in enumerate(coordinates):
                seen[which].append((tuple((part.start, part.stop) for part in place), batch[number].sum().item()))
            return network(batch) * factor + condition[:, :1] + offset

        return called

    inputs, condition = inputs_of(2, 2, 16, 12, 6), inputs_of(2, 2, 16, 12, 6, seed=5)
    more = {"condition": condition, "offset": 3}
    rest = (0.5, "gaussian", 0.125, "constant", 0.0, None, None, False, None, None, None, -1, True, 2)
    ours = sliding_window_inference(inputs, 8, 3, network_of("ours"), *rest, **more)
    with torch.no_grad():
        theirs = monai.inferers.sliding_window_inference(inputs, 8, 3, network_of("theirs"), *rest, **more)
    assert_close(ours, theirs)
    (places, sums), (their_places, their_sums) = (zip(*sorted(seen[which]), strict=True) for which in ("ours", "theirs"))
    assert places == their_places
    assert sums == pytest.approx(their_sums, rel=1e-4)


def test_conditions_have_channels_and_types_of_their_own():
    inputs, condition = inputs_of(2, 2, 16, 12, 6), inputs_of(2, 3, 16, 12, 6, seed=5)
    assert_close(*both(inputs, 8, 3, lambda batch, condition: batch + condition.mean(1, keepdim=True), 0.5, condition=condition))

    def placed(batch, coordinates, condition):
        return batch + condition

    rest = (0.5, "constant", 0.125, "constant", 0.0, None, None, False, None, None, None, -1, True)
    assert_close(*both(inputs, 8, 3, placed, *rest, condition=condition[:, :1]))
    classes = torch.nn.Embedding(4, 2)

    def embedded(batch, condition):
        return batch + classes(condition[:, 0]).movedim(-1, 1)

    assert_close(*both(inputs, 8, 3, embedded, 0.5, condition=torch.randint(0, 4, (2, 1, 16, 12, 6))))


@pytest.mark.parametrize(
    ("dtype", "number"),
    [(torch.bfloat16, 301), (torch.float16, 70_000), (torch.float32, 2**24 + 1), (torch.float32, 2**40 + 1)],
)
def test_whole_numbers_of_a_condition_are_kept(dtype, number):
    inputs, condition = inputs_of(1, 1, 8, 8, 8).to(dtype), torch.full((1, 1, 8, 8, 8), number)

    def network(windows, condition):
        assert (windows.dtype, condition.dtype) == (dtype, torch.int64)
        return (condition == number).to(dtype)

    assert bool((sliding_window_inference(inputs, 4, 1, network, 0.25, condition=condition) == 1).all())
    with pytest.raises(ModeError, match=r"9007199254740994.*above 2\*\*53"):
        sliding_window_inference(inputs, 4, 1, network, 0.25, condition=torch.full((1, 1, 8, 8, 8), 2**53 + 2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.int64, torch.uint8, torch.float16])
def test_windows_are_exact_where_coordinates_are_asked_for(dtype):
    inputs = (inputs_of(1, 1, 9, 8, 8).double() * (100 if dtype == torch.float16 else 2**28)).to(dtype)
    seen = []

    def network(windows, coordinates):
        seen.append([torch.equal(window[None], inputs[tuple(place)]) for window, place in zip(windows, coordinates, strict=True)])
        return windows.float()

    sliding_window_inference(inputs, 5, 2, network, 0.25, with_coord=True)
    assert len(seen) > 1
    assert all(map(all, seen))


@pytest.mark.parametrize(
    "change",
    [
        lambda outputs, windows, weights: ((outputs[0] * 1000, outputs[1]), weights),
        lambda outputs, windows, weights: (outputs, -weights),
        lambda outputs, windows, weights: (outputs, weights * 1e-30),
    ],
)
def test_processing_of_named_outputs_and_weights_of_any_sign(change):
    def network(windows):
        return {"z": windows * 1, "a": windows * 2}

    ours, theirs = both(inputs_of(1, 1, 9, 8, 8), 4, 1, network, 0.5, process_fn=change)
    assert list(ours) == list(theirs)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-4)


def test_processing_may_give_another_number_of_outputs():
    inputs = inputs_of(1, 1, 9, 8, 8)

    def one(windows):
        return windows * 1

    def two(windows):
        return windows * 1, windows * 2

    def named(windows):
        return {"a": windows * 1, "b": windows * 2}

    def first(outputs, windows, weights):
        return outputs[:1], weights

    ours, theirs = both(inputs, 4, 2, one, 0.5, process_fn=lambda outputs, windows, weights: (outputs * 2, weights))
    assert len(ours) == len(theirs) == 2
    for mine, expected in zip(ours, theirs, strict=True):
        assert_close(mine, expected)
    assert_close(*both(inputs, 4, 2, two, 0.5, process_fn=first))
    with pytest.raises(OutputError, match="process_fn returned 1 outputs for 2, a, b"):
        sliding_window_inference(inputs, 4, 2, named, process_fn=first)


def test_named_outputs_are_in_monais_order():
    ours, theirs = both(inputs_of(1, 1, 8, 8, 8), 4, 2, lambda windows: {"b": windows * 1, "a": windows * 2})
    assert list(ours) == list(theirs) == ["a", "b"]
    with pytest.raises(OutputError, match=r"keys \['b', 1\], which have no order"):
        sliding_window_inference(inputs_of(1, 1, 8, 8, 8), 4, 2, lambda windows: {"b": windows, 1: windows})


def test_weights_that_sum_to_nothing_are_not_taken_for_scores():
    nothing, inputs = torch.zeros(4, 4, 4), inputs_of(1, 2, 8, 8, 8)
    ours, theirs = both(inputs, 4, 2, lambda windows: windows * 1, 0.5, roi_weight_map=nothing)
    assert bool(ours.isnan().all())
    assert bool(theirs.isnan().all())
    with pytest.raises(OutputError, match="weights of the windows sum to 0"):
        sliding_window_inference(
            inputs_of(1, 2, 8, 8, 8), 4, 2, lambda windows: windows * 1, roi_weight_map=nothing, reduce="argmax"
        )


def test_numbers_may_be_numpys(network):
    assert_close(*both(inputs_of(1, 2, 9, 9, 9), np.int64(4), 2, network, np.float32(0.5), "gaussian", np.float32(0.125)))


def test_weights_of_ones_own_and_processing(network):
    inputs, weights = inputs_of(1, 2, 16, 12, 20), torch.rand(8, 8, 8) + 0.1
    assert_close(*both(inputs, 8, 3, network, 0.5, roi_weight_map=weights))
    of_either = [sliding_window_inference(inputs, 8, 3, network, roi_weight_map=each) for each in (weights, weights.numpy())]
    assert torch.equal(*of_either)

    def process(outputs, windows, importance):
        return tuple(output * 2 for output in outputs), importance * (1 + windows[:1, :1].abs())

    # Weights that differ between the windows of a batch are not what MONAI expects; one window at a time.
    ours = sliding_window_inference(inputs, 8, 1, network, 0.0, process_fn=process)
    with torch.no_grad():
        assert_close(ours, 2 * monai.inferers.sliding_window_inference(inputs, 8, 1, network, 0.0))


def test_metadata_types_and_precision(network):
    affine = torch.diag(torch.tensor([2.0, 1, 3, 1], dtype=torch.float64))
    inputs = MetaTensor(inputs_of(1, 2, 16, 12, 20), affine=affine, meta={"filename_or_obj": "scan.nii.gz"})
    ours, theirs = both(inputs, 8, 3, network, 0.5, "gaussian")
    assert type(ours) is MetaTensor
    assert torch.equal(ours.affine, affine)
    assert ours.meta["filename_or_obj"] == "scan.nii.gz"
    assert_close(ours.as_tensor(), theirs.as_tensor())
    with torch.autocast("cpu"):
        ours, theirs = both(inputs_of(1, 2, 16, 12, 20), 8, 3, network, 0.5, "gaussian")
    assert ours.dtype == theirs.dtype == torch.float32
    assert 1e-5 < (ours - theirs).abs().max() < 0.02  # sums of bfloat16 in another order
    ours += 1  # it is a tensor like any other


def test_the_inferer_stands_in_for_monais(network):
    arguments = {"roi_size": (8, 8, 8), "sw_batch_size": 2, "overlap": 0.5, "mode": "gaussian", "cache_roi_weight_map": True}
    inputs = inputs_of(1, 2, 16, 12, 20)
    inferer = VoxloomInferer(**arguments)
    assert isinstance(inferer, monai.inferers.Inferer)
    with torch.no_grad():
        theirs = monai.inferers.SlidingWindowInferer(**arguments)(inputs, network)
    assert_close(inferer(inputs, network), theirs)
    labels = VoxloomInferer(**arguments, reduce="argmax")(inputs, network)
    top = theirs.topk(2, dim=1).values
    is_clear = (top[:, 0] - top[:, 1] > 1e-5)[:, None]
    assert torch.equal(labels[is_clear].long(), theirs.argmax(1, keepdim=True)[is_clear])
    assert is_clear.float().mean() > 0.99


def test_modes_of_voxlooms_own(network):
    inputs = inputs_of(1, 2, 16, 12, 20)
    ours = sliding_window_inference(inputs, 8, 3, network, 0.5, vx.Gaussian(2.0))
    expected = vx.predict(network, inputs[0], 8, 0.5, vx.Gaussian(2.0))
    assert torch.allclose(ours[0], expected.data, atol=1e-6)
    average = sliding_window_inference(inputs, 8, 3, network, 0.5, "average")
    assert (ours - average).abs().max() > 1e-3


def test_what_cannot_be_is_said(network):
    inputs = inputs_of(1, 2, 16, 12, 20)
    with pytest.raises(vx.errors.OutputError, match="no gradient"):
        sliding_window_inference(inputs.requires_grad_(), 8, 3, network)
    with pytest.raises(vx.errors.SizeError, match="roi_size"):
        sliding_window_inference(inputs.detach(), (8, 8), 3, network)
    with pytest.raises(vx.errors.SizeError, match="overlap"):
        sliding_window_inference(inputs.detach(), 8, 3, network, 1.0)
    with pytest.raises(vx.errors.SizeError, match="shape"):
        sliding_window_inference(torch.zeros(2, 2, 3), 8, 3, network)
    with pytest.raises(vx.errors.OutputError, match="type str"):
        sliding_window_inference(inputs.detach(), 8, 3, lambda batch: "scores")
    for network_of_other_form, message in (
        (lambda batch: (batch, None), "of type NoneType"),
        (lambda batch: (batch, [batch]), "of type list"),
        (lambda batch: batch.mean((2, 3, 4)), r"of shape \(3, 2\): it must be tensors \(B, C, I, J, K\)"),
    ):
        with pytest.raises(vx.errors.OutputError, match=message):
            sliding_window_inference(inputs.detach(), 8, 3, network_of_other_form)
    with pytest.raises(vx.errors.ModeError, match="padding_mode is 'edge'"):
        sliding_window_inference(inputs.detach(), 8, 3, network, padding_mode="edge")
    with pytest.raises(vx.errors.SizeError, match=r"roi_weight_map has shape \(5, 8, 8\)"):
        sliding_window_inference(inputs.detach(), 8, 3, network, roi_weight_map=torch.ones(5, 8, 8))
    for condition in (torch.zeros(2, 2, 16, 12, 20), torch.zeros(1, 2, 16, 12, 19), 3):
        with pytest.raises(vx.errors.SizeError, match="condition is"):
            sliding_window_inference(inputs.detach(), 8, 3, network, condition=condition)
