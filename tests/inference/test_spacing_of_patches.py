"""Patches that are spread evenly, or share an odd number of voxels, or all of an axis: promises hold for them too."""

import itertools
import warnings

import pytest
import torch
from torch import nn

import voxloom as vx
from slow import slow
from voxloom.core.grid import traversal
from voxloom.core.grid.windows import gaussian
from voxloom.errors import ModeError
from voxloom.testing import SerialExecutor

CASES = {
    "even": {"patch_size": 8, "patch_overlap": 0.5, "patch_spacing": "even"},
    "even, fraction": {"patch_size": (9, 8, 7), "patch_overlap": 0.3, "patch_spacing": "even"},
    "odd": {"patch_size": 8, "patch_overlap": (3, 1, 5)},
    "fraction": {"patch_size": 7, "patch_overlap": 0.25},
    "whole axes": {"patch_size": (-1, 8, -1), "patch_overlap": (4, 0.5, 0.5)},
}
SHAPE = (21, 23, 19)


def image(channels=1):
    return vx.ScalarImage(torch.rand(channels, *SHAPE, generator=torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("mode", ["crop", "average", "hann", "gaussian"])
def test_what_goes_in_comes_out(name, mode):
    made = vx.predict(nn.Identity(), image(), overlap_mode=mode, **CASES[name])
    assert torch.allclose(made.data, image().data, atol=1e-6)
    if mode == "crop":
        assert torch.equal(made.data, image().data)


@pytest.mark.parametrize("name", [name if name == "odd" else slow(name) for name in CASES])
def test_bits_do_not_depend_on_memory_nor_on_the_executor(name):
    model = nn.Conv3d(1, 60, 3, padding=1)
    options = {**CASES[name], "reduce": "argmax"}
    expected = vx.predict(model, image(), **options)
    assert torch.equal(vx.predict(model, image(), executor=SerialExecutor(), **options).data, expected.data)
    plan = vx.plan(model, image(), **options)
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        try:
            made = vx.predict(model, image(), memory_limit=plan.peak_bytes - plan.memory.front // 3, **options)
        except vx.errors.SizeError:
            assert name == "whole axes"
            return
    assert torch.equal(made.data, expected.data)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("mode", ["crop", "hann"])
def test_samplers_and_aggregators(name, mode):
    subject = vx.Subject(t1=image())
    sampler = vx.GridSampler(subject, **CASES[name])
    aggregator = vx.GridAggregator(sampler, mode)
    for batch in vx.SubjectsLoader(sampler, batch_size=3):
        aggregator.add_batch(batch.t1.data, batch)
    assert torch.allclose(aggregator.get_output(), image().data, atol=1e-6)


def test_padded_and_even():
    made = vx.predict(nn.Identity(), image(), 8, 4, "hann", padding_mode="reflect", patch_spacing="even")
    assert torch.allclose(made.data, image().data, atol=1e-6)


def test_even_spacing_resumes_as_itself(tmp_path):
    calls = []

    def stopping(batch):
        calls.append(1)
        if len(calls) == 80:
            raise KeyboardInterrupt
        return batch

    options = {"patch_size": 8, "output": tmp_path / "a.nii", "model_name": "none"}
    with pytest.raises(KeyboardInterrupt):
        vx.predict(stopping, image(), patch_spacing="even", **options)
    with pytest.raises(vx.errors.RecordError, match="patch_spacing"):
        vx.predict(nn.Identity(), image(), **options)
    with pytest.warns(RuntimeWarning, match="is resumed"):
        made = vx.predict(nn.Identity(), image(), patch_spacing="even", **options)
    assert torch.allclose(made.data, image().data, atol=1e-6)


def test_a_run_of_a_version_that_groups_patches_otherwise_is_not_gone_on_with(tmp_path, monkeypatch):
    """Slabs are counted by groups: gone on with by others, voxels would be left out."""
    volume, count = torch.rand(1, 17, 52, 19), itertools.count()

    def stopping(batch):
        if next(count) == 60:
            raise KeyboardInterrupt
        return batch

    options = {"patch_size": 16, "patch_overlap": (0, 15, 0), "output": tmp_path / "a.nii", "model_name": "none"}
    with monkeypatch.context() as patch:
        patch.setattr(traversal, "MOST_STEPS", 1000)
        forget_traversals()
        with pytest.raises(KeyboardInterrupt):
            vx.predict(stopping, volume, **options)
    forget_traversals()
    with pytest.raises(vx.errors.RecordError, match=r"another version of voxloom.*resume=False"):
        vx.predict(nn.Identity(), volume, **options)
    made = vx.predict(nn.Identity(), volume, resume=False, **options)
    assert torch.allclose(made.data, volume, atol=1e-6)


def forget_traversals():
    for each in (traversal.AxisTraversal.of, traversal.Traversal.smallest):
        each.cache_clear()


def test_all_of_an_axis_follows_the_image():
    predictor = vx.Predictor(nn.Identity(), (-1, 16, 16))
    for length in (5, 40):
        data = torch.rand(1, length, 20, 20)
        plan = predictor.plan(data)
        assert plan.grid.patch_size == (length, 16, 16)
        assert torch.allclose(predictor(data).data, data, atol=1e-6)


def test_widths_of_gaussians():
    assert torch.equal(vx.Gaussian()(16), gaussian(16))
    expected = vx.predict(torch.square, image(), 8, 4, lambda size: vx.Gaussian(0.3)(size))
    assert torch.equal(vx.predict(torch.square, image(), 8, 4, vx.Gaussian(0.3)).data, expected.data)
    each = vx.Gaussian((0.3, 0.1, 0.2))
    assert [each.for_axis(axis).widths for axis in range(3)] == [(0.3,), (0.1,), (0.2,)]
    model = nn.Conv3d(1, 2, 3, padding=1)
    made = vx.predict(model, image(), 8, 4, each).data
    assert not torch.equal(made, vx.predict(model, image(), 8, 4, vx.Gaussian(0.3)).data)
    flipped = vx.predict(lambda batch: model(batch.transpose(2, 3)).transpose(2, 3), image().data.transpose(1, 2), 8, 4,
                         vx.Gaussian((0.1, 0.3, 0.2)))  # fmt: skip
    assert torch.allclose(flipped.data.transpose(1, 2), made, atol=1e-6)


@pytest.mark.parametrize("width", [0, -1, "wide", True, float("inf"), (0.1, 0)])
def test_widths_that_are_none(width):
    with pytest.raises(ModeError, match="width of a Gaussian"):
        vx.Gaussian(width)


def test_a_width_for_each_axis_needs_as_many():
    with pytest.raises(ModeError, match="2 widths"):
        vx.predict(nn.Identity(), image(), 8, 4, vx.Gaussian((0.1, 0.2)))
