"""predict, against the aggregator and against the formula, however it is run."""

import itertools
import multiprocessing
import os
import threading
import time
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import voxloom as vx
from slow import slow
from voxloom.aggregation.streaming import StreamingAccumulator
from voxloom.core.grid.blending import AxisWeights
from voxloom.core.grid.grids import PatchGrid
from voxloom.core.grid.traversal import Traversal
from voxloom.inference import threads
from voxloom.inference.planning import block_memory, planner
from voxloom.inference.planning.plan import BASE_BYTES, count_batches
from voxloom.models import modes
from voxloom.models.running import Models
from voxloom.runtime.memory import BufferPool

from strategies import FLOATS, INTEGERS, MODES, examples, geometries, random_values

SLOW = examples(40)


def aggregated(model, data, patch, overlap, mode, padding=None):
    sampler = vx.GridSampler(vx.Subject(image=vx.ScalarImage(data)), patch, overlap, padding_mode=padding)
    aggregator = vx.GridAggregator(sampler, mode)
    with torch.inference_mode():
        for batch in vx.SubjectsLoader(sampler, batch_size=1):
            aggregator.add_batch(model(batch.image.data), batch)
    return aggregator.get_output()


def network(channels_in=1, channels_out=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(channels_in, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, channels_out, 3, padding=1))


@SLOW
@given(geometries(largest=10), st.sampled_from(MODES), st.sampled_from([None, "reflect", "edge", 3]), st.integers(1, 5))
def test_a_network_gives_what_the_aggregator_gives(geometry, mode, padding, batch_size):
    shape, patch, overlap = geometry
    data = torch.rand(2, *shape, generator=torch.Generator().manual_seed(1))
    model = network(2)
    if padding == "reflect" and any(2 * size <= shared for size, shared in zip(shape, overlap, strict=True)):
        padding = "edge"
    result = vx.predict(model, data, patch, overlap, mode, padding_mode=padding, batch_size=batch_size)
    expected = aggregated(model, data, patch, overlap, mode, padding)
    # A batch of another size may take another path through the convolution, and sums are made in another order.
    torch.testing.assert_close(result.data, expected, atol=1e-5, rtol=1e-5)


@SLOW
@given(geometries(largest=10, may_exceed=True), st.sampled_from(FLOATS + INTEGERS), st.sampled_from(MODES), st.integers(1, 3))
def test_a_model_that_returns_its_input_gives_back_the_input(geometry, dtype, mode, batch_size):
    shape, patch, overlap = geometry
    data = random_values((1, *shape), dtype)
    result = vx.predict(lambda batch: batch, data, patch, overlap, mode, batch_size=batch_size).data
    if mode == "crop":
        assert result.dtype == dtype
        assert torch.equal(result, data)
    else:
        assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(result, data.to(result.dtype), atol=0, rtol=2**-20)


@SLOW
@given(geometries(largest=9), st.sampled_from(MODES), st.none() | st.integers(0, 2**32), st.data())
def test_the_same_bits_for_every_memory_limit(geometry, mode, mask_seed, data):
    shape, patch, overlap = geometry
    volume = random_values((1, *shape), torch.float32)
    volume[volume < 0.5] = -0.0
    mask = None
    if mask_seed is not None:
        mask = torch.zeros(shape, dtype=torch.bool)
        mask.view(-1)[torch.randint(mask.numel(), (4,), generator=torch.Generator().manual_seed(mask_seed))] = True
    model = data.draw(st.sampled_from([network(), nn.Identity()]))
    arguments, options = (model, volume, patch, overlap, mode), {"mask": mask}
    plan = vx.plan(*arguments, **options)
    whole = vx.predict(*arguments, **options).data
    least = least_memory(arguments, options)
    limit = data.draw(st.integers(least, plan.peak_bytes))
    split = vx.plan(*arguments, **options, memory_limit=limit)
    assert split.peak_bytes <= limit
    if split.num_blocks > 1:
        assert split.computed_patches >= split.num_patches
        with pytest.warns(RuntimeWarning, match="is computed in . blocks|is computed in .. blocks"):
            result = vx.predict(*arguments, **options, memory_limit=limit)
    else:
        result = vx.predict(*arguments, **options, memory_limit=limit)
    assert torch.equal(result.data.view(torch.int32), whole.view(torch.int32))  # also the signs of zeros


def test_the_same_bits_where_a_mask_leaves_out_patches_beside_those_that_are_there():
    data = torch.rand(1, 64, 64, 64)
    mask = torch.zeros(64, 64, 64, dtype=torch.bool)
    mask[:20, :20, :20] = mask[40:, 44:, 50:] = True
    arguments, options = (lambda batch: batch.repeat(1, 48, 1, 1, 1), data, 16), {"mask": mask}
    limit = least_memory(arguments, options)
    with pytest.warns(RuntimeWarning, match="blocks"):
        split = vx.predict(*arguments, **options, memory_limit=limit)
    assert torch.equal(split.data, vx.predict(*arguments, **options).data)


def least_memory(arguments, options):
    """What the message about an impossible limit says."""
    with pytest.raises(vx.errors.SizeError, match="memory_limit is 1 bytes, but at least") as caught:
        vx.plan(*arguments, **options, memory_limit=1)
    return int(str(caught.value).split("(")[1].split(" bytes)")[0])


@pytest.mark.filterwarnings("ignore:the mask has no voxel:RuntimeWarning")
@SLOW
@given(geometries(largest=9), st.sampled_from(MODES), st.integers(0, 2**32), st.booleans())
def test_a_mask_leaves_out_patches_and_nothing_else(geometry, mode, seed, is_dense):
    shape, patch, overlap = geometry
    data = torch.rand(1, *shape)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > (0.7 if is_dense else 0.98)
    calls = []

    def model(batch):
        calls.append(batch)
        return batch

    result = vx.predict(model, data, patch, overlap, mode, mask=mask, fill=-5).data
    grid = vx.PatchGrid.cover(shape, patch, overlap)
    needed = [location for location in grid if mask[location.box.slices].any()]
    assert len(calls) == max(1, len(needed))  # zeros, where nothing is needed, to see what the output looks like
    covered = torch.zeros(shape, dtype=torch.bool)
    for location in needed:
        if mode == "crop":
            numbers = grid.find(location)
            spans = [AxisWeights(axis, None).core(number) for axis, number in zip(grid.axes, numbers, strict=True)]
            covered[tuple(slice(*span) for span in spans)] = True
        else:
            covered[location.box.slices] = True
    torch.testing.assert_close(result, torch.where(covered, data, -5), atol=0, rtol=1e-5)
    assert bool(covered[mask].all())


@pytest.mark.parametrize("mode", MODES)
def test_mirrored_patches_are_averaged(mode):
    model = network()
    data = torch.rand(1, 20, 18, 17)

    def mirrored(batch):
        flips = [flip for count in range(3) for flip in itertools.combinations((2, 4), count)]
        return sum(model(batch.flip(flip)).flip(flip) for flip in flips) / len(flips)

    result = vx.predict(model, data, 8, 4, mode, mirror_axes=(0, 2), batch_size=2).data
    torch.testing.assert_close(result, aggregated(mirrored, data, 8, 4, mode), atol=1e-5, rtol=1e-5)


def test_an_ensemble_is_averaged_and_may_hold_models_that_write_to_their_input():
    first, second = network(), network()
    for weight in second.parameters():
        weight.data.mul_(0.5)

    def third(batch):
        return first(batch.mul_(2))

    data = torch.rand(1, 20, 18, 17)
    result = vx.predict([third, first, second], data, 8, 4).data
    expected = sum(vx.predict(model, data, 8, 4).data for model in (third, first, second)) / 3
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
    assert vx.plan([first, second], data, 8, 4, mirror_axes=[1]).forward_passes == 4 * 4 * 4 * 2 * 2


def test_several_outputs_of_one_pass_at_scales_of_their_own():
    data = torch.rand(1, 32, 24, 16)
    features = network()

    def model(batch):
        output = features(batch)
        return {"seg": output, "coarse": nn.functional.avg_pool3d(output, 4), "sum": output.sum(1, keepdim=True) > 0}

    result = vx.predict(model, data, 8, 4, output_scale={"coarse": 1 / 4}, overlap_mode="average")
    assert set(result) == {"seg", "coarse", "sum"}
    assert result["coarse"].shape == (3, 8, 6, 4)
    expected = aggregated(features, data, 8, 4, "average")
    torch.testing.assert_close(result["seg"].data, expected, atol=1e-5, rtol=1e-5)
    # A place of the coarse output is that of the voxels that it stands for.
    np.testing.assert_allclose(result["coarse"].affine @ [0, 0, 0, 1], [1.5, 1.5, 1.5, 1])
    np.testing.assert_allclose(result["coarse"].spacing, [4, 4, 4])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"reduce": {"labels": "argmax"}, "output": {"lables": "x.nii"}},
            "output names a result 'lables', and there is",
        ),
        ({"reduce": {"a": "entropy"}, "activation": {"b": "softmax"}}, "activation names a result 'b', and there is 'a'"),
        ({"reduce": {"a": "entropy"}, "output_scale": {"b": 2}}, "output_scale names a result 'b', and there is 'a'"),
        ({"output_scale": {"b": 2}}, "output_scale names a result 'b', and there is one, without a name"),
    ],
)
def test_what_is_said_of_no_result_is_an_error(options, message):
    output = options.pop("output", None)
    with pytest.raises(vx.errors.NoSuchKeyError, match=message):
        vx.predict(network(), torch.rand(1, 12, 12, 12), 8, output=output, **options)


def test_results_are_made_of_outputs_by_their_names():
    data = torch.rand(1, 20, 18, 17)
    model = network()
    result = vx.predict(
        model, data, 8, 4, activation={"labels": None, "doubt": "softmax"}, reduce={"labels": "argmax", "doubt": "entropy"}
    )
    scores = aggregated(model, data, 8, 4, "gaussian")
    assert torch.equal(result["labels"].data[0], scores.argmax(0).to(torch.uint8))
    assert isinstance(result["labels"], vx.LabelMap)
    shares = aggregated(lambda batch: model(batch).softmax(1), data, 8, 4, "gaussian")
    torch.testing.assert_close(result["doubt"].data[0], torch.special.entr(shares).sum(0), atol=1e-5, rtol=1e-5)

    pair = vx.predict(lambda batch: (batch, -batch), data, 8, reduce={"1": 0.5, "0": None})
    assert torch.equal(pair["1"].data, torch.zeros_like(data, dtype=torch.uint8))
    with pytest.raises(vx.errors.NoSuchKeyError, match="there is a result 'labels', but the model returns '0', '1'"):
        vx.predict(lambda batch: (batch, batch), data, 8, reduce={"labels": "argmax"})


@pytest.mark.parametrize(
    ("overlap", "expected"), [(0.5, 48), (0.29, 68), (0.0, 96), (0.99, 1), (10, 86), (11, 85), ((0.5, 10, 0.25), (48, 86, 72))]
)
def test_an_overlap_is_voxels_or_a_fraction_by_which_patches_are_apart(overlap, expected):
    plan = vx.plan(nn.Identity(), torch.zeros(1, 300, 300, 300), 96, overlap)
    assert tuple(axis.stride for axis in plan.grid.axes) == (expected if isinstance(expected, tuple) else (expected,) * 3)


# What runs, and how


class Nested(nn.Module):
    """Keeps some of its parts in another mode than the rest."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm3d(1), nn.Dropout3d(0.5)
        self.norm.eval()
        self.seen = []
        self.fails = False

    def forward(self, batch):
        self.seen.append((self.training, self.norm.training, self.drop.training, torch.is_grad_enabled(), threading.get_ident()))
        if self.fails:
            raise KeyError("from the model")
        return self.drop(self.norm(batch))


@pytest.mark.parametrize("fails", [False, True])
def test_a_module_runs_in_evaluation_mode_and_is_left_as_it_was(fails):
    model = Nested()
    model.fails = fails
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    if fails:
        with pytest.raises(KeyError, match="from the model"):
            vx.predict(model, torch.rand(1, 9, 9, 9), 4)
    else:
        vx.predict(model, torch.rand(1, 9, 9, 9), 4)
    assert set(model.seen) == {(False, False, False, False, threading.get_ident())}
    assert (model.training, model.norm.training, model.drop.training) == (True, False, True)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_an_activation_may_write_to_what_a_model_in_inference_mode_gives():
    @torch.inference_mode()
    def model(batch):
        return batch - 0.5

    made = vx.predict(model, torch.rand(1, 9, 9, 9), 4, activation=lambda scores: scores.relu_())
    assert float(made.data.min()) == 0


def test_a_module_can_be_trained_that_keeps_what_a_forward_pass_makes():
    """As layers do whose sizes are known with the first batch only."""
    model = nn.LazyConv3d(1, 3, padding=1)
    vx.predict(model, torch.rand(1, 9, 9, 9), 4)
    model(torch.rand(2, 1, 4, 4, 4)).sum().backward()
    assert model.weight.grad.shape == (1, 1, 3, 3, 3)


@pytest.mark.parametrize("shape", [(30, 30, 30), slow((64, 64, 40)), (20, 41, 33), (9, 5, 50)])
@pytest.mark.parametrize("mask", [None, 0.999])
@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_the_model_is_given_each_patch_of_the_grid_once(shape, mask, batch_size):
    data, seen = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0)), []
    grid = vx.plan(nn.Identity(), data, 16, 8).grid

    def model(batch):
        seen.append(batch.clone())
        return batch

    predictor = vx.Predictor(model, 16, 8, batch_size=batch_size)
    for _ in range(2):  # what its outputs look like is known the second time
        seen.clear()
        predictor(data, mask=mask)
        given = {tuple(patch.flatten().tolist()) for batch in seen for patch in batch}
        assert len(given) == sum(map(len, seen))
        assert mask is not None or len(given) == len(grid)
        assert all(len(batch) == batch_size for batch in seen[:-1])
        number = len(seen)
        plan = predictor.plan(data, mask=mask)
        assert (plan.given_patches, plan.forward_passes) == (len(given), number)


def test_a_model_of_one_batch_size_is_given_full_batches():
    sizes = []

    def model(batch):
        sizes.append(len(batch))
        return batch

    data = torch.rand(1, 30, 30, 20)
    result = vx.predict(model, data, 16, 8, "crop", batch_size=4, full_batches=True)
    plan = vx.plan(model, data, 16, 8, "crop", batch_size=4, full_batches=True)
    assert set(sizes) == {4}
    assert torch.equal(result.data, data)
    assert "copies fill up batches" in str(plan)
    assert plan.given_patches == 4 * plan.forward_passes > plan.num_patches == 18


def test_the_input_reaches_the_model_in_the_type_of_its_weights_or_its_own():
    seen = []
    model = network().double()
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    image = torch.randint(0, 100, (1, 12, 12, 12), dtype=torch.int16)
    assert vx.predict(model, image, 8).data.dtype == torch.float64
    vx.predict(lambda batch: (seen.append(batch.dtype), batch)[1], image, 8)
    assert set(seen[:8]) == {torch.float64}
    assert seen[-1] == torch.int16
    vx.predict(lambda batch: (seen.append(batch.dtype), batch)[1], image, 8, dtype=torch.float32)
    assert seen[-1] == torch.float32
    with pytest.raises(RuntimeError) as caught:
        vx.predict(lambda batch: network()(batch), image, 8)
    assert "the type of the input, torch.int16: dtype=torch.float32 (--dtype float32) converts it" in str(caught.value.__notes__)
    with pytest.raises(vx.errors.ModeError, match="dtype is 'half'"):
        vx.Predictor(model, 8, dtype="half")


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS])
def test_a_model_that_returns_its_input_gives_back_every_bit_of_it(dtype):
    data = random_values((1, 12, 10, 9), dtype)
    if dtype in (torch.int32, torch.int64, torch.float64):
        data[0, 3, 3, 3] = 2**24 + 1
    result = vx.predict(lambda batch: batch, data, 4, 2, "crop")
    assert result.data.dtype == dtype
    assert torch.equal(result.data, data)


def test_a_fraction_of_a_padded_volume_is_rounded_and_says_so():
    data = torch.rand(1, 20, 20, 20)
    with pytest.warns(RuntimeWarning, match="0.3 of 10 voxels on axis I, which is 3: .* it is 2"):
        plan = vx.plan(nn.Identity(), data, (10, 8, 8), (0.3, 2, 2), padding_mode="edge")
    assert plan.grid.axes[0].stride == 8
    assert vx.plan(nn.Identity(), data, 10, 0.3).grid.axes[0].stride == 7


def test_mixed_precision_is_summed_in_float32():
    data = torch.rand(1, 20, 20, 20)
    model = network()
    result = vx.predict(model, data, 8, 4, amp=torch.bfloat16)
    assert result.data.dtype == torch.float32
    torch.testing.assert_close(result.data, vx.predict(model, data, 8, 4).data, atol=0.05, rtol=0.05)
    assert vx.predict(model, data, 8, 4, "crop", amp=True).data.dtype == torch.bfloat16


class Sliced:
    """An array that is read by slices alone, and remembers how much."""

    def __init__(self, array):
        self.array, self.shape, self.dtype, self.most = array, array.shape, array.dtype, 0

    def __getitem__(self, key):
        part = self.array[key]
        self.most = max(self.most, part.size)
        return part


def test_images_of_all_kinds(tmp_path, subject):
    model = network()
    data = subject.t1.data
    expected = vx.predict(model, data, 8, 4).data
    image = vx.ScalarImage(data, affine=np.diag([1, 2, 3, 1]))
    image.save(tmp_path / "t1.nii")
    image.save(tmp_path / "t1.nii.gz")
    for source in (tmp_path / "t1.nii", str(tmp_path / "t1.nii.gz"), image):
        result = vx.predict(model, source, 8, 4)
        assert torch.equal(result.data, expected)
        np.testing.assert_allclose(result.affine, image.affine)
    array = Sliced(data[0].numpy())
    assert torch.equal(vx.predict(model, array, 8, 4).data, expected)
    assert array.most <= 8**3
    assert torch.equal(vx.predict(model, Sliced(data.numpy()), 8, 4).data, expected)
    assert torch.equal(vx.predict(model, data.numpy(), 8, 4).data, expected)
    assert torch.equal(vx.predict(model, data[0], 8, 4).data, expected)
    assert torch.equal(vx.predict(model, subject, 8, 4, image_name="t1").data, expected)
    both = vx.predict(lambda batch: batch, subject, 8, 4, "crop", image_name=["seg", "t1"])
    assert torch.equal(both.data, torch.cat([subject.seg.data.float(), data]))


def test_a_predictor_is_used_for_many_images_and_looks_at_the_model_once():
    calls = []

    def model(batch):
        calls.append(len(batch))
        return batch

    predictor = vx.Predictor(model, 8, 4)
    for size in (8, 12, 20):
        data = torch.rand(1, size, size, size)
        torch.testing.assert_close(predictor(data).data, data)
    assert len(calls) == 1 + 8 + 64
    predictor.plan(data)
    assert len(calls) == 1 + 8 + 64
    vx.Predictor(model, 8, 4).plan(data)
    assert len(calls) == 1 + 8 + 64 + 1


# Masks


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the mask has no voxel:RuntimeWarning")
def test_masks_of_all_kinds_leave_out_the_same(tmp_path):
    data = torch.zeros(1, 24, 20, 16)
    data[0, 15:18, 3:7, 9:12] = 5
    image = vx.ScalarImage(data, affine=np.diag([2, 2, 2, 1]))
    mask = vx.LabelMap((data > 0).to(torch.uint8), affine=image.affine)
    mask.save(tmp_path / "mask.nii.gz")
    # The same place in a smaller, turned image of finer voxels.
    finer = np.array([[0, -1.0, 0, 40], [1, 0, 0, 0], [0, 0, 1, 10], [0, 0, 0, 1]])
    turned = torch.zeros(1, 40, 40, 30, dtype=torch.uint8)
    for voxel in itertools.product(range(turned.shape[1]), range(turned.shape[2]), range(turned.shape[3])):
        place = finer @ [*voxel, 1]
        index = np.rint(np.linalg.inv(image.affine) @ place)[:3].astype(int)
        if (index >= 0).all() and (index < (24, 20, 16)).all() and data[(0, *index)] > 0:
            turned[(0, *voxel)] = 1
    expected = None
    kinds = [
        mask,
        tmp_path / "mask.nii.gz",
        data[0] > 0,
        (data > 0).numpy(),
        1,
        lambda block: block[0] > 4,
        vx.LabelMap(turned, affine=finer),
        mask[:, 10:20, 2:8, 8:14],
    ]
    for kind in kinds:
        plan = vx.plan(nn.Identity(), image, 8, 4, mask=kind)
        result = vx.predict(nn.Identity(), image, 8, 4, mask=kind, fill=-1).data
        assert 0 < plan.num_patches < 20
        expected = result if expected is None else expected
        assert torch.equal(result, expected)
    assert torch.equal(vx.predict(nn.Identity(), image, 8, 4, mask=100, fill=2).data, torch.full_like(data, 2))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(3, 3, 3), "the mask has shape (3, 3, 3), but the volume (10, 10, 10)"),
        (lambda block: block[0, 0], "must return a mask of shape (10, 10, 10), but it returned one of (10, 10)"),
        ({}, "the mask is {}"),
    ],
)
def test_masks_that_do_not_fit(mask, message):
    with pytest.raises(vx.errors.VoxloomError, match=None) as caught:
        vx.predict(nn.Identity(), torch.rand(1, 10, 10, 10), 4, mask=mask)
    assert message in str(caught.value)


# What is given to users' functions, and what may change between calls


def test_functions_may_write_to_what_they_are_given():
    data = torch.rand(1, 20, 20, 20)
    result = vx.predict(nn.Identity(), data, 8, 4, activation={"a": lambda batch: batch.mul_(0), "raw": None, "b": torch.neg})
    assert not result["a"].data.any()
    torch.testing.assert_close(result["raw"].data, data)
    torch.testing.assert_close(result["b"].data, -data)
    result = vx.predict(nn.Identity(), data, 8, 4, reduce={"a": lambda block: block.mul_(0), "raw": None})
    torch.testing.assert_close(result["raw"].data, data)
    given = data.clone()
    vx.predict(lambda batch: batch.mul_(2), data, 8, 4)
    assert torch.equal(given, data)


def test_within_inference_mode():
    data = torch.rand(1, 12, 12, 12)
    with torch.inference_mode():
        result = vx.predict(nn.Identity(), data, 8).data
    assert not result.is_inference()
    torch.testing.assert_close(result, data)


def test_a_model_that_makes_nan_of_nothing_may_be_reduced_by_a_function():
    data = torch.rand(1, 12, 12, 12)
    result = vx.predict(lambda batch: (batch - batch.mean()) / batch.std(), data, 12, reduce=lambda block: block * 2)
    torch.testing.assert_close(result.data, 2 * (data - data.mean()) / data.std())
    with pytest.raises(vx.errors.OutputError, match="the function that was given as reduce made NaN"):
        vx.predict(nn.Identity(), data, 8, reduce=lambda block: block / 0 * 0)


def test_outputs_of_two_names_may_be_one_tensor():
    data = torch.rand(1, 12, 12, 12)
    activation = {"first": lambda output: output.mul_(2), "second": lambda output: output.add_(1)}
    result = vx.predict(lambda batch: {"first": batch, "second": batch}, data, 8, activation=activation)
    torch.testing.assert_close(result["first"].data, 2 * data)
    torch.testing.assert_close(result["second"].data, data + 1)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int32, torch.float16])
def test_the_entropy_of_outputs_of_any_type(dtype):
    result = vx.predict(lambda batch: (batch > 0).to(dtype), torch.ones(1, 12, 12, 12), 8, 0, "crop", reduce="entropy")
    assert result.data.dtype == torch.float32
    assert not result.data.any()


def test_sinks_are_closed_or_aborted():
    class Noting:
        def __init__(self, fails=False):
            self.calls, self.fails = [], fails

        def open(self, form):
            self.calls.append("open")

        def write(self, box, values):
            pass

        def close(self):
            self.calls.append("close")
            if self.fails:
                raise OSError("it cannot be closed")

        def abort(self):
            self.calls.append("abort")

    sinks = {"a": Noting(), "b": Noting(fails=True), "c": Noting()}
    with pytest.raises(OSError, match="it cannot be closed"):
        vx.predict(nn.Identity(), torch.rand(1, 8, 8, 8), 8, output=sinks)
    assert [sink.calls for sink in sinks.values()] == [["open", "close"], ["open", "close", "abort"], ["open", "abort"]]


def test_nan_that_does_not_come_again_is_not_explained_away():
    calls = []

    def model(batch):
        calls.append(1)
        return batch / 0 * 0 if len(calls) == 3 else batch

    with pytest.raises(vx.errors.OutputError, match=r"held NaN at voxel .*, but not when its patches were computed once more"):
        vx.predict(model, torch.rand(1, 16, 16, 16), 8, 0)


def test_a_predictor_follows_its_model_to_another_type():
    model = network()
    predictor = vx.Predictor(model, 8, 4)
    data = torch.rand(1, 12, 12, 12)
    assert predictor(data).data.dtype == torch.float32
    model.double()
    assert predictor(data).data.dtype == torch.float64
    model.bfloat16()
    assert predictor(data).data.dtype == torch.float32


def test_outputs_that_nothing_is_made_of_may_be_anything():
    data = torch.rand(1, 12, 12, 12)
    result = vx.predict(lambda batch: {"out": batch, "aux": None}, data, 8, reduce={"out": None})
    torch.testing.assert_close(result["out"].data, data)


@pytest.mark.slow
def test_padding_that_holds_patches_of_its_own_can_be_split():
    data = torch.rand(1, 12, 13, 9)
    arguments = (lambda batch: batch.repeat(1, 64, 1, 1, 1), data, 8, 6, "gaussian")
    options = {"padding_mode": 0, "reduce": [0]}
    plan = vx.plan(*arguments, **options)
    with pytest.warns(RuntimeWarning, match="blocks"):
        result = vx.predict(*arguments, **options, memory_limit=plan.peak_bytes - 100_000)
    assert torch.equal(result.data, vx.predict(*arguments, **options).data)


def test_numbers_of_numpy_are_numbers():
    data = torch.rand(1, 12, 12, 12)
    plain = vx.predict(nn.Identity(), data, 8, (2, 2, 2), reduce=0.5, mask=0.5, mirror_axes=[1])
    options = {"reduce": np.float32(0.5), "mask": np.float32(0.5), "mirror_axes": 1}
    assert torch.equal(vx.predict(nn.Identity(), data, np.array([8, 8, 8]), np.array([2, 2, 2]), **options).data, plain.data)
    assert torch.equal(
        vx.predict(nn.Identity(), data, 8, np.float64(0.25), reduce=np.array([0]), mirror_axes=None).data.round(), data.round()
    )


# Bad input


def test_models_of_an_ensemble_must_be_alike():
    with pytest.raises(vx.errors.OutputError, match="of one model has shape .1, 3, 8, 8, 8., and of another .1, 1, 8, 8, 8."):
        vx.predict([lambda batch: batch.repeat(1, 3, 1, 1, 1), lambda batch: batch], torch.rand(1, 20, 20, 20), 8)


def test_one_sink_is_for_one_result():
    with pytest.raises(vx.errors.OutputError, match="one output was given for 2 results"):
        vx.predict(lambda batch: {"a": batch, "b": batch}, torch.rand(1, 9, 9, 9), 8, output=vx.inference.MemorySink())


def only_later(change):
    """A model whose outputs change after the first three."""
    calls = []

    def model(batch):
        calls.append(1)
        return change(batch) if len(calls) > 3 else batch

    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda batch: None, "the output of the model is of type NoneType"),
        (lambda batch: {"a": 3}, "the output 'a' of the model is of type int"),
        (lambda batch: {}, "the model returned an empty dict"),
        (lambda batch: batch[:0], "its first size must be 2"),
        (lambda batch: batch[0], "it must have 5 dimensions"),
        (lambda batch: batch * 1j, "return its real and imaginary parts"),
        (lambda batch: batch[:, :0], "has shape (2, 0, 8, 8, 8), which holds nothing"),
        (lambda batch: batch.to_sparse(), "torch.sparse_coo on cpu, which cannot be summed"),
        (lambda batch: batch.to("meta"), "on meta, which cannot be summed"),
        (lambda batch: batch.to(torch.float8_e5m2), "a tensor of torch.float8_e5m2"),
        (lambda batch: batch[..., :4], "spatial shape (8, 8, 4) for a patch of (8, 8, 8)"),
        (only_later(lambda batch: batch[:, :, :4]), "of the model changed: it was torch.float32 of shape (2, 1, 8, 8, 8)"),
        (only_later(lambda batch: batch.repeat(1, 2, 1, 1, 1)), "of the model changed"),
        (only_later(lambda batch: batch.double()), "of the model changed"),
        (only_later(lambda batch: {"a": batch}), "the output of the model is missing"),
    ],
)
def test_models_that_return_something_else(model, message):
    with pytest.raises(vx.errors.OutputError) as caught:
        vx.predict(model, torch.rand(1, 20, 20, 20), 8, batch_size=2)
    assert message in str(caught.value)


def test_an_output_of_the_wrong_size_is_refused_each_time():
    predictor = vx.Predictor(nn.MaxPool3d(2), 8)
    for _ in range(2):
        with pytest.raises(vx.errors.OutputError, match=r"spatial shape \(4, 4, 4\) for a patch of \(8, 8, 8\)"):
            predictor(torch.rand(1, 16, 16, 16))


@pytest.mark.parametrize("mode", ["crop", "gaussian"])
def test_nan_is_traced_to_its_patch(mode):
    data = torch.rand(1, 40, 40, 40)
    data[0, 21, 5, 30] = torch.nan
    with pytest.raises(vx.errors.OutputError, match="holds NaN for the patch .*; the patch itself holds NaN") as caught:
        vx.predict(nn.Identity(), data, 16, 8, mode)
    index = [int(number) for number in str(caught.value).split("patch (")[1].split(")")[0].split(",")]
    assert all(first <= place < first + 16 for first, place in zip(index, (21, 5, 30), strict=True))

    def model(batch):
        return torch.where(batch == 7, torch.nan, batch)

    data[0, 21, 5, 30] = 7
    with pytest.raises(vx.errors.OutputError, match=r"holds NaN for the patch \(\d+, \d+, \d+\) to \(\d+, \d+, \d+\)$"):
        vx.predict(model, data, 16, 8, mode)


def test_infinity_is_a_warning():
    data = torch.rand(1, 20, 20, 20)
    data[0, 3, 3, 3] = torch.inf
    with pytest.warns(RuntimeWarning, match="holds infinity") as caught:
        result = vx.predict(nn.Identity(), data, 8, 4)
    assert len(caught) == 1
    assert torch.isinf(result.data).sum() == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_overlap": 1.0}, "patch_overlap is 1.0"),
        ({"patch_overlap": 3, "padding_mode": 0}, "must be even"),
        ({"patch_overlap": (0.5, 0.5)}, "give one number for all axes"),
        ({"overlap_mode": "blend"}, "Overlap mode must be one of"),
        ({"activation": "tanh"}, "activation is 'tanh'"),
        ({"reduce": "max"}, "reduce is 'max'"),
        ({"reduce": {"a": "max"}}, "reduce is 'max'"),
        ({"reduce": [5]}, "channel 5 was chosen, but the output has 1 channels"),
        ({"reduce": vx.Regions((1, 2))}, "Regions has 2 labels"),
        ({"reduce": lambda block: block[0]}, "must return a tensor with the same last three sizes"),
        ({"reduce": lambda block: block * torch.nan}, "given as reduce made NaN"),
        ({"reduce": {}}, "the dict of results is empty"),
        ({"mirror_axes": 3}, "mirror_axes is 3"),
        ({"mirror_axes": True}, "mirror_axes is True"),
        ({"mirror_axes": (3,)}, "mirror_axes is (3,)"),
        ({"mirror_axes": (1, 1)}, "mirror_axes is (1, 1)"),
        ({"device": "nowhere"}, "device is 'nowhere'"),
        ({"amp": "half"}, "amp is 'half'"),
        ({"memory_limit": "much"}, "memory_limit is 'much'"),
        ({"memory_limit": 1000}, "memory_limit is 1000 bytes, but at least"),
        ({"output_scale": 0}, "output_scale is 0"),
        ({"output_scale": 1 / 2}, "at output_scale ('1/2', '1/2', '1/2') it must be"),
        ({"fill": "x"}, "fill is 'x'"),
        ({"fill": 300, "reduce": "argmax"}, "fill is 300, which a result of torch.uint8 cannot hold"),
        ({"output": 5}, "output is 5"),
        ({"image_name": "t1"}, "only a Subject has images with names"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"padding_mode": "mirror"}, "adding"),
    ],
)
def test_arguments_that_cannot_be_used(options, message):
    with pytest.raises(vx.errors.VoxloomError) as caught:
        vx.predict(nn.Identity(), torch.rand(1, 20, 20, 20), 8, **options)
    assert message in str(caught.value)


def test_images_that_cannot_be_used(subject):
    for image, message in (
        (5, "something of type int is no image"),
        (subject, "the subject has 2 images: say which with image_name"),
        (torch.rand(5, 5), "4D"),
        (Sliced(np.zeros((2, 2))), "the array has shape (2, 2)"),
        ("missing.nii.gz", "there is no file missing.nii.gz"),
    ):
        with pytest.raises(vx.errors.VoxloomError) as caught:
            vx.predict(nn.Identity(), image, 4)
        assert message in str(caught.value)
    with pytest.raises(vx.errors.ModeError, match="cannot be called"):
        vx.Predictor(5, 4)
    with pytest.raises(vx.errors.ModeError, match="list of models is empty"):
        vx.Predictor([], 4)


# Errors and other threads


class SlowSink(vx.inference.MemorySink):
    """Takes its time."""

    def write(self, box, values):
        time.sleep(0.002)
        super().write(box, values)


@examples(30)
@given(geometries(largest=24, may_exceed=False), st.floats(0, 1))
def test_blocks_are_cut_such_that_the_fewest_passes_are_made(geometry, room):
    traversal = Traversal.smallest(PatchGrid.cover(*geometry), is_cropped=False)
    counts = (range(1, len(groups) + 1) for groups in (traversal.whole.middle, traversal.whole.inner))
    splits = [traversal.split(*each) for each in itertools.product(*counts)]
    least = max(map(traversal.open_voxels, splits[-1]))
    limit = int(least + (traversal.open_voxels(traversal.whole) - least) * room)
    found = block_memory.best_split(traversal, lambda block, limit: traversal.open_voxels(block), limit, True, 1)
    fitting = [blocks for blocks in splits if max(map(traversal.open_voxels, blocks)) <= limit]
    assert found in fitting
    assert count_batches(traversal, found, 1, None) == min(count_batches(traversal, blocks, 1, None) for blocks in fitting)


@pytest.fixture
def sums(monkeypatch):
    """Bytes of all sums together, whenever one is made."""
    monkeypatch.setattr(block_memory, "WAITING_BYTES", 0)
    used, alive, empty = [], weakref.WeakSet(), BufferPool.empty

    def counting(self, shape, dtype):
        tensor = empty(self, shape, dtype)
        alive.add(tensor)
        used.append(sum(tensor.nbytes for tensor in alive))
        return tensor

    monkeypatch.setattr(BufferPool, "empty", counting)
    return used


def test_what_waits_to_be_written_counts_as_memory(sums):
    arguments = (lambda batch: batch.repeat(1, 5, 1, 1, 1), torch.rand(1, 30, 30, 30), 12, 6)
    vx.predict(*arguments, reduce="argmax", output=SlowSink())
    plan = vx.plan(*arguments, reduce="argmax")
    joining = plan.joining(plan.traversal.whole)
    assert max(sums) == joining.applied(plan.traversal).open_voxels(joining.block) * 5 * 4


def test_what_is_finished_before_the_first_patch_of_a_mask_is_not_open(sums):
    mask = torch.zeros(5, 18, 10, dtype=torch.bool)
    mask[[2, 4, 1, 0, 0, 4], [4, 10, 8, 2, 0, 12], [1, 9, 2, 2, 1, 7]] = True
    arguments = (lambda batch: batch.repeat(1, 20, 1, 1, 1), torch.rand(1, 5, 18, 10), 6, (4, 2, 2), "average")
    vx.predict(*arguments, padding_mode=0, mask=mask)
    plan = vx.plan(*arguments, padding_mode=0, mask=mask)
    assert max(sums) <= plan.traversal.open_voxels(plan.traversal.whole) * 20 * 4


def test_memory_that_is_kept_counts_as_free(monkeypatch):
    data = torch.rand(1, 40, 40, 40)
    executor = threads.ThreadExecutor()
    predictor = vx.Predictor(lambda batch: batch.repeat(1, 30, 1, 1, 1), 16, 0.5, reduce="argmax", executor=executor)
    room = predictor.plan(data).peak_bytes
    monkeypatch.setattr(planner, "free_bytes", lambda: int(room / 0.9) + 1000 - executor.kept_bytes)
    for _ in range(3):
        assert predictor.plan(data).num_blocks == 1
        predictor(data)
    assert executor.kept_bytes > 2**20


def test_threads_may_share_modules_and_parts_of_them():
    dropout = nn.Dropout(0.5)
    models = [nn.Sequential(dropout, nn.Identity()).train(), nn.Sequential(nn.Sequential(dropout).eval(), nn.BatchNorm3d(1))]
    dropout.train()
    data = torch.ones(1, 24, 24, 24)
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda number: vx.predict(models[number % 2], data, 8, 4).data, range(8)))
    for result in results:
        torch.testing.assert_close(result, data, atol=1e-4, rtol=0)
    assert [part.training for part in models[0].modules()] == [True, True, True]
    assert [part.training for part in models[1].modules()] == [True, False, True, True]
    assert models[1][1].num_batches_tracked == 0


class Moved(nn.Module):
    """Is moved between the CPU and the device of tensors without values; the last layer fails to arrive there."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv3d(1, 1, 1), nn.Conv3d(1, 1, 1)

    def to(self, device):
        if device.type != "cpu":
            self.first.to(device)
            raise RuntimeError("no room")
        self.first = nn.Conv3d(1, 1, 1)
        return self


def test_a_module_that_could_not_be_moved_is_brought_back():
    model = Moved().train()
    with pytest.raises(RuntimeError, match="no room"), Models((model,), device="meta").ready():
        pass
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    with pytest.raises(RuntimeError, match="no room"), Models((model,), device="meta").ready():  # nobody counts as using it
        pass


def test_a_module_is_not_moved_while_a_part_of_it_is_in_use():
    part = nn.Conv3d(1, 1, 1)
    with (
        Models((part,)).ready(),
        pytest.raises(vx.errors.ModeError, match="is being used on cpu by another thread"),
        Models((nn.Sequential(part),), device="meta").ready(),
    ):
        pass
    with pytest.raises(NotImplementedError), Models((nn.Sequential(part),), device="meta").ready():  # nobody uses it any more
        pass


@pytest.mark.usefixtures("two_threads")
def test_threads_keep_their_number_of_torch_threads():
    counts = []

    def run(_):
        vx.predict(lambda batch: batch, torch.ones(1, 12, 12, 12), 8)
        counts.append(torch.get_num_threads())

    for _ in range(2):
        running = [threading.Thread(target=run, args=(number,)) for number in range(6)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
    assert set(counts) == {2}


def test_a_reduction_may_make_a_prediction_with_the_same_model():
    model = nn.Sequential(nn.Identity())

    def twice(block):
        return block + vx.predict(model, block, 8).data

    result = vx.predict(model, torch.ones(1, 12, 12, 12), 8, reduce=twice)
    torch.testing.assert_close(result.data, torch.full((1, 12, 12, 12), 2.0))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_fork_during_a_prediction_can_make_one_too():
    context = multiprocessing.get_context("fork")
    process = context.Process(target=vx.predict, args=(nn.Identity(), torch.ones(1, 8, 8, 8), 8))
    with modes.lock, threads.SETTING_THREADS:  # as another thread might hold them
        process.start()
    process.join(60)
    alive = process.is_alive()
    process.kill()
    assert not alive
    assert process.exitcode == 0


def test_what_was_read_before_an_error_is_computed():
    class Ends:
        shape, dtype, calls = (32, 32, 32), np.dtype(np.float32), 0

        def __getitem__(self, key):
            self.calls += threading.current_thread().name.startswith("voxloom-read")
            if self.calls > 40:
                raise OSError("the disk is gone")
            return np.zeros(self.shape, dtype=self.dtype)[key]

    given = []
    with pytest.raises(OSError, match="the disk is gone"):
        vx.predict(lambda batch: given.append(len(batch)) or batch, Ends(), 8, batch_size=1)
    assert sum(given) >= 40


def test_an_error_of_the_reader_arrives_as_it_is():
    class Ends:
        shape, dtype = (16, 8, 8), np.dtype(np.float32)

        def __getitem__(self, key):
            if threading.current_thread().name.startswith("voxloom-read"):
                raise StopIteration("no more slices")
            return np.zeros(self.shape, dtype=self.dtype)[key]

    with pytest.raises(StopIteration, match="no more slices"):
        vx.predict(lambda batch: batch, Ends(), 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_without_becoming_infinite(dtype):
    data = torch.full((1, 16, 16, 16), 300.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = vx.predict(lambda batch: batch.repeat(1, 3, 1, 1, 1).to(dtype), data, 8, overlap_mode="crop", reduce="argmax")
    assert not result.data.any()


class ReadByOne:
    """An array that two threads must not read at a time."""

    shape, dtype = (64, 24, 24), np.dtype(np.float32)

    def __init__(self):
        self.lock = threading.Lock()

    def __getitem__(self, key):
        assert self.lock.acquire(blocking=False), "two threads read at a time"
        time.sleep(0.002)
        self.lock.release()
        return np.zeros(self.shape, dtype=self.dtype)[key]


def test_an_input_is_read_by_one_thread_also_when_nan_is_traced():
    with pytest.raises(vx.errors.OutputError, match="holds NaN for the patch"):
        vx.predict(lambda batch: batch + torch.nan, ReadByOne(), 8, 4)


class FailingSink(vx.inference.MemorySink):
    def __init__(self):
        self.calls, self.was_aborted = 0, False

    def write(self, box, values):
        self.calls += 1
        if self.calls > 2:
            raise OSError("the sink is full")
        super().write(box, values)

    def abort(self):
        self.was_aborted = True


def test_an_error_in_the_sink_stops_the_run_and_arrives_with_its_traceback():
    sink, calls = FailingSink(), []

    def model(batch):
        calls.append(1)
        return batch

    before = threading.active_count()
    with pytest.raises(OSError, match="the sink is full") as caught:
        vx.predict(model, torch.rand(1, 64, 64, 64), 8, 4, output=sink)
    assert any(entry.name == "write" for entry in caught.traceback)
    assert sink.was_aborted
    assert len(calls) < 15**3 / 2
    assert threading.active_count() == before


def test_an_error_in_reading_stops_the_run_and_arrives_with_its_traceback():
    class Damaged(Sliced):
        def __getitem__(self, key):
            if key[0].start > 8:
                raise OSError("the disk is broken")
            return super().__getitem__(key)

    sink = FailingSink()
    sink.calls = -1000  # it never fails
    with pytest.raises(OSError, match="the disk is broken") as caught:
        vx.predict(nn.Identity(), Damaged(np.zeros((64, 16, 16), np.float32)), 8, output=sink)
    assert any(entry.name == "__getitem__" for entry in caught.traceback)
    assert sink.was_aborted


def test_a_sink_gets_each_voxel_once():
    class Counting:
        def open(self, form):
            self.counts = torch.zeros(form.shape)

        def write(self, box, values):
            self.counts[(slice(None), *box.slices)] += 1 + values

        def close(self):
            return self.counts

        def abort(self):
            raise AssertionError

    result = vx.predict(nn.Identity(), torch.zeros(1, 30, 20, 20), 8, 4, output=Counting())
    assert torch.equal(result, torch.ones(1, 30, 20, 20))


# Out of memory on a device


def test_a_batch_that_the_device_has_no_room_for_is_made_smaller():
    sizes = []

    def model(batch):
        sizes.append(len(batch))
        if len(batch) > 2 and len(sizes) > 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return batch

    data = torch.rand(1, 24, 24, 24)
    with pytest.warns(RuntimeWarning, match="too little memory on cpu for a batch of 5: the run goes on with batches of 2"):
        result = vx.predict(model, data, 8, 0, "crop", batch_size=5)
    assert torch.equal(result.data, data)
    # 27 patches; the fourth batch is run again in parts, and so are those that follow.
    assert sizes == [5, 5, 5, 5, *[2, 2, 1] * 2, 2]


@pytest.mark.parametrize("kind", ["writes to its input", "returns the same memory each time"])
def test_a_batch_that_is_made_smaller_is_computed_from_what_it_was(kind):
    calls, kept = [], torch.empty(2, 1, 8, 8, 8)

    def model(batch):
        calls.append(len(batch))
        if kind == "writes to its input":
            batch.sub_(1)
        if len(calls) == 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return batch if kind == "writes to its input" else kept[: len(batch)].copy_(batch.sub(1))

    data = torch.rand(1, 16, 16, 16)
    with pytest.warns(RuntimeWarning, match="the run goes on with batches of 1"):
        result = vx.predict(model, data, 8, 0, batch_size=2)
    assert calls[:4] == [2, 2, 1, 1]
    torch.testing.assert_close(result.data, data - 1)


def test_a_device_without_room_for_one_patch_is_an_error():
    def model(batch):
        if batch.any():
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return batch

    with pytest.warns(RuntimeWarning), pytest.raises(vx.errors.DeviceMemoryError, match="for a single patch of"):
        vx.predict(model, torch.rand(1, 24, 24, 24), 8, batch_size=2)


def test_a_sum_that_the_device_has_no_room_for_goes_on_in_the_memory_of_the_host(monkeypatch):
    # "cpu:0" stands for a device: it is another one than "cpu", where tensors lie all the same.
    monkeypatch.setattr("voxloom.inference.threads.home_of_sums", lambda device, num_bytes: torch.device("cpu", 0))
    opened = []
    open_tile = StreamingAccumulator._open

    def full(accumulator, tile):
        opened.append(tile)
        if len(opened) == 11:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return open_tile(accumulator, tile)

    data = torch.rand(1, 24, 24, 24)
    expected = vx.predict(network(), data, 8, 4).data
    monkeypatch.setattr(StreamingAccumulator, "_open", full)
    with pytest.warns(RuntimeWarning, match="the run goes on with it in the memory of the host") as caught:
        result = vx.predict(network(), data, 8, 4)
    assert len(caught) == 1
    assert torch.equal(result.data, expected)


def test_a_sum_makes_room_for_the_model(monkeypatch):
    monkeypatch.setattr("voxloom.inference.threads.home_of_sums", lambda device, num_bytes: torch.device("cpu", 0))
    calls = []

    def model(batch):
        calls.append(1)
        if len(calls) == 20:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return batch

    data = torch.rand(1, 24, 24, 24)
    with pytest.warns(RuntimeWarning, match="the run goes on with it in the memory of the host"):
        result = vx.predict(model, data, 8, 4)
    assert torch.equal(result.data, vx.predict(lambda batch: batch, data, 8, 4).data)


def test_a_reduction_that_the_device_has_no_room_for_is_made_on_the_host():
    calls = []

    def reduce(block):
        calls.append(1)
        if len(calls) == 5:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return block * 2

    data = torch.rand(1, 24, 24, 24)
    torch.testing.assert_close(vx.predict(nn.Identity(), data, 8, 4, reduce=reduce).data, data * 2)
    calls.clear()
    options = {"like": ((30, 20, 24), np.diag([0.8, 1.2, 1, 1])), "mask": data[0] > 0.9}
    found = vx.predict(nn.Identity(), data, 8, 4, reduce=reduce, **options).data
    assert len(calls) > 5
    torch.testing.assert_close(found, vx.predict(nn.Identity(), data, 8, 4, reduce=lambda block: block * 2, **options).data)


# The plan


def test_a_plan_says_what_will_happen():
    plan = vx.plan(network(1, 4), torch.zeros(1, 100, 100, 100), 32, 0.5, reduce="argmax", batch_size=2)
    assert plan.grid.num_patches == plan.num_patches == plan.computed_patches == 6**3
    assert plan.forward_passes == 6 * 18
    assert plan.given_patches == 6**3
    assert plan.restart_passes == 4 * 18  # a slab takes patches of three layers, and the next one may be computed too
    assert plan.memory.results == 100**3
    text = str(plan)
    assert "216 of 32 × 32 × 32" in text
    assert "108 forward passes of 2 patches at most" in text
    assert "one block" in text
    assert plan.peak_bytes > plan.memory.front + BASE_BYTES


# Networks of valid convolutions


class Valid(nn.Module):
    """Finds bright voxels by two convolutions without padding."""

    def forward(self, batch):
        return nn.functional.avg_pool3d(nn.functional.avg_pool3d(batch, 3, stride=1), 3, stride=1)


def test_the_advice_for_valid_convolutions_is_right():
    data = torch.zeros(1, 40, 40, 40)
    data[:, 14:18, 15:19, 16:20] = 1
    with pytest.raises(vx.errors.OutputError) as caught:
        vx.predict(Valid(), data, 32, 4)
    message = str(caught.value)
    assert "28/32" not in message
    assert "7/8" not in message
    assert "give context=(2, 2, 2)" in message
    found = vx.predict(Valid(), data, 12, 0, context=(2, 2, 2))
    whole = Valid()(nn.functional.pad(data, [2] * 6)[None])[0]
    torch.testing.assert_close(found.data, whole, atol=1e-6, rtol=1e-5)
    assert found.data.argmax() == whole.argmax()


@pytest.mark.parametrize(
    ("size", "says", "does_not_say"),
    [
        ((16, 16, 16), "output_scale=(1/2, 1/2, 1/2)", "pad or crop"),
        ((64, 32, 16), "output_scale=(2, 1, 1/2)", "valid"),
        ((31, 31, 31), "pad or crop its output to that size", "output_scale=("),
        ((24, 24, 24), "give context=(4, 4, 4)", "output_scale=("),
    ],
)
def test_a_scale_is_only_advised_where_it_is_one(size, says, does_not_say):
    model = lambda batch: batch.new_zeros(len(batch), 1, *size)  # noqa: E731
    with pytest.raises(vx.errors.OutputError) as caught:
        vx.predict(model, torch.zeros(1, 40, 40, 40), 32)
    assert says in str(caught.value)
    assert does_not_say not in str(caught.value)
