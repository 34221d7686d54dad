"""Models that take more than they predict, slices, or give one value for each patch; and the variance of what is averaged."""

import numpy as np
import pytest
import torch
from torch import nn

import voxloom as vx
from slow import slow
from voxloom.errors import OutputError, SizeError
from voxloom.testing import SerialExecutor

SHAPE = (20, 22, 18)


@pytest.fixture
def data():
    return torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(8))


@pytest.mark.parametrize("overlap", [0, 3, 0.5])
@pytest.mark.parametrize("batch_size", [slow(1), 3])
def test_valid_convolutions_give_what_they_give_of_the_whole(data, overlap, batch_size):
    model = nn.Sequential(nn.Conv3d(2, 4, 3), nn.ReLU(), nn.Conv3d(4, 3, (3, 5, 1)))
    with torch.inference_mode():
        expected = model(nn.functional.pad(data[None], (1, 1, 3, 3, 2, 2)))[0]
    made = vx.predict(model, data, 8, overlap, context=(2, 3, 1), batch_size=batch_size)
    assert made.shape == (3, *SHAPE)
    assert torch.allclose(made.data, expected, atol=1e-6)
    serial = vx.predict(model, data, 8, overlap, context=(2, 3, 1), executor=SerialExecutor())
    assert torch.allclose(serial.data, expected, atol=1e-6)
    reflected = vx.predict(model, data, 8, 4, context=(2, 3, 1), padding_mode="reflect")
    with torch.inference_mode():
        expected = model(nn.functional.pad(data[None], (1, 1, 3, 3, 2, 2), mode="reflect"))[0]
    assert torch.allclose(reflected.data, expected, atol=1e-6)


def test_a_small_object_is_not_lost_by_valid_convolutions():
    """Following the advice of the error must not lose anything."""
    data = torch.zeros(1, 60, 60, 60)
    data[0, 31:35, 31:35, 31:35] = 1

    def model(batch):
        return batch[:, :, 2:-2, 2:-2, 2:-2]

    with pytest.raises(OutputError, match=r"context=\(2, 2, 2\)"):
        vx.predict(model, data, 32, 0)
    assert torch.equal(vx.predict(model, data, 32, 0, "crop", context=(2, 2, 2)).data, data)
    with pytest.raises(OutputError, match=r"context=\(2, 2, 2\)"):
        vx.predict(model, data, 32, 0, context=1)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_models_of_slices(data, axis):
    model = nn.Conv2d(2, 3, 3, padding=1)
    with torch.inference_mode():
        expected = torch.stack([model(each[None])[0] for each in data.unbind(1 + axis)], 1 + axis)
    for size in ((-1, -1), [-1] * axis + [1] + [-1] * (2 - axis)):
        made = vx.predict(model, data, size, slice_axis=axis, batch_size=4)
        assert torch.allclose(made.data, expected, atol=1e-6)
    patches = vx.predict(lambda batch: batch.amax(1, keepdim=True), data, (8, 9), (3, 0.5), slice_axis=axis)
    assert torch.allclose(patches.data, data.amax(0, keepdim=True), atol=1e-6)


def test_slices_with_their_neighbours(data):
    """As 2.5-D models take them: the channels of each slice, slice by slice."""
    context = [0, 0, 1]
    seen = []

    def model(batch):
        seen.append(batch.shape)
        return batch[:, 4:6] - batch[:, 0:2]

    made = vx.predict(model, data, (-1, -1), slice_axis=2, context=context, padding_mode=None)
    assert seen[0] == (1, 6, 20, 22)
    padded = nn.functional.pad(data, (1, 1))
    assert torch.allclose(made.data, padded[..., 2:] - padded[..., :-2], atol=1e-6)


def test_mirrored_slices(data):
    model = nn.Conv2d(2, 3, 3, padding=1)
    made = vx.predict(model, data, (-1, -1), slice_axis=0, mirror_axes=(1, 2)).data
    with torch.inference_mode():
        expected = sum(model(data.movedim(1, 0).flip(flip)).flip(flip) for flip in ((), (2,), (3,), (2, 3))).movedim(0, 1) / 4
    assert torch.allclose(made, expected, atol=1e-6)


def test_one_value_for_each_patch(data):
    made = vx.predict(lambda batch: batch.mean((2, 3, 4)), data, (10, 11, 9), 0, "average").data
    expected = (
        nn.functional.avg_pool3d(data, (10, 11, 9)).repeat_interleave(10, 1).repeat_interleave(11, 2).repeat_interleave(9, 3)
    )
    assert torch.allclose(made, expected, atol=1e-6)
    coarse = vx.predict(lambda batch: batch.mean((2, 3, 4)), data, (10, 11, 9), 0, output_scale=(1 / 10, 1 / 11, 1 / 9)).data
    assert torch.allclose(coarse, nn.functional.avg_pool3d(data, (10, 11, 9)), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"patch_size": 8, "context": -1}, SizeError, "context"),
        ({"patch_size": 8, "context": 1.5}, SizeError, "context"),
        ({"patch_size": 8, "slice_axis": 3}, SizeError, "slice_axis is 3"),
        ({"patch_size": (8, 8), "slice_axis": 3}, SizeError, "slice_axis is 3"),
        ({"patch_size": (8, 8, 1), "slice_axis": 5}, SizeError, "slice_axis is 5"),
        ({"patch_size": (8, 8), "slice_axis": 1.5}, SizeError, "slice_axis is 1.5"),
        ({"patch_size": (8, 8, 2), "slice_axis": 2}, SizeError, "one voxel deep"),
        ({"patch_size": (8, 8), "slice_axis": 2}, OutputError, "height, width"),
        ({"patch_size": (8, 8)}, SizeError, "patch_size"),
    ],
)
def test_wrong_forms(data, options, error, text):
    with pytest.raises(error, match=text):
        vx.predict(lambda batch: batch.unsqueeze(2), data, **options)


def test_variance_of_an_ensemble(data):
    models = [nn.Conv3d(2, 3, 1) for _ in range(4)]
    made = vx.predict(models, data, 8, 0, activation="softmax", reduce={"labels": "argmax", "doubt": "variance"})
    with torch.inference_mode():
        each = torch.stack([model(data[None])[0].softmax(0) for model in models])
    assert made["doubt"].shape == (1, *SHAPE)
    assert torch.allclose(made["doubt"].data, each.var(0, correction=0).sum(0, keepdim=True), atol=1e-6)
    assert torch.equal(made["labels"].data[0].long(), each.mean(0).argmax(0))
    again = vx.predict(models, data, 8, 0, activation="softmax", reduce={"doubt": "variance"}, memory_limit="33MiB")
    assert torch.allclose(again["doubt"].data, made["doubt"].data, atol=1e-6)


def test_variance_of_mirrored_patches_and_of_one_model(data):
    model = nn.Conv3d(2, 3, 3, padding=1)
    made = vx.predict(model, data, SHAPE, 0, mirror_axes=0, reduce="variance").data
    with torch.inference_mode():
        each = torch.stack([model(data[None])[0], model(data[None].flip(2)).flip(2)[0]])
    assert torch.allclose(made, each.var(0, correction=0).sum(0, keepdim=True), atol=1e-5)
    alone = vx.predict(model, data, SHAPE, 0, reduce="variance").data
    assert float(alone.max()) < 1e-6


def test_variance_on_another_grid(data):
    models = [nn.Conv3d(2, 3, 1) for _ in range(2)]
    image = vx.ScalarImage(data)
    like = ((10, 11, 9), np.diag([2.0, 2, 2, 1]) + np.eye(4, k=3) * 0.5)
    made = vx.predict(models, image, 8, 0, activation="softmax", reduce="variance", like=like)
    plain = vx.predict(models, image, 8, 0, activation="softmax", reduce="variance")
    assert torch.allclose(made.data, plain.resampled(like=like).data, atol=1e-7)


def test_scores_are_a_reduction_too(data):
    assert torch.allclose(vx.predict(nn.Identity(), data, 8, reduce="scores").data, data, atol=1e-6)


def test_variance_of_large_numbers_and_of_slopes(data):
    alone = vx.predict(lambda batch: batch + 4000, data, 6, 3, reduce="variance")
    assert float(alone.data.max()) < 1e-6
    pair = vx.predict([lambda batch: batch + 1000, lambda batch: batch + 1000.1], data, 6, 0, reduce="variance")
    assert torch.allclose(pair.data, torch.full_like(pair.data, 2 * 0.0025), rtol=0.02)
    fine = ((40, 44, 36), np.diag([0.5, 0.5, 0.5, 1]))
    assert float(vx.predict(nn.Identity(), vx.ScalarImage(data), 6, 0, reduce="variance", like=fine).data.max()) < 1e-6
