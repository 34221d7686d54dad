"""Models that come with what they expect: from a scan to labels on its own grid."""

import copy
import importlib.util
import itertools
import json
import math
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import voxloom as vx
from voxloom.errors import ModelFileError, SpaceError, SpecError, TargetExistsError
from voxloom.models.spec import Crop
from voxloom.volumes.views import cubic
from voxloom.volumes.views.intensities import Intensity, foreground_box

from strategies import examples

CT = np.array([[-0.8, 0, 0, 20], [0, -0.8, 0, 25], [0, 0, 2.5, -30], [0, 0, 0, 1]])


def scan(shape=(40, 36, 14), affine=CT, channels=1):
    generator = torch.Generator().manual_seed(6)
    noise = torch.randn((channels, *shape), generator=generator)
    smooth = nn.functional.avg_pool3d(noise, 3, 1, 1)
    return vx.ScalarImage((smooth * 800).round(), affine=affine)


def network(channels=1):
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return nn.Sequential(nn.Conv3d(channels, 4, 3, padding=1, bias=False), nn.Tanh(), nn.Conv3d(4, 3, 1, bias=False)).eval()


SPEC = vx.ModelSpec(
    channels=("CT",),
    orientation="RAS",
    spacing=(1.5, 1.5, 1.5),
    intensity=(Intensity(clip=(-300, 400), scale="z-score", mean=20, std=150),),
    patch_size=16,
    patch_overlap=0.5,
    reduce="argmax",
    labels=(vx.Label(1, "liver"), vx.Label(2, "tumour", (255, 0, 0))),
)


def by_hand(model, image):
    """The same with SimpleITK, on whole volumes."""
    array = image.data[0].numpy()
    given = SimpleITK.GetImageFromArray(array.T)
    spacing = np.linalg.norm(image.affine[:3, :3], axis=0)
    flip = np.diag([-1, -1, 1])
    given.SetSpacing(spacing.tolist())
    given.SetDirection((flip @ image.affine[:3, :3] / spacing).ravel().tolist())
    given.SetOrigin((flip @ image.affine[:3, 3]).tolist())
    turned = SimpleITK.DICOMOrient(given, "LPS")  # where its axes point to is called RAS+ by others
    turned = SimpleITK.Flip(turned, [True, True, False])
    clipped = SimpleITK.Clamp(turned, SimpleITK.sitkFloat32, -300, 400)
    scaled = (clipped - 20) / 150
    size = [int(np.floor(length * own / 1.5 + 0.5)) for length, own in zip(scaled.GetSize(), scaled.GetSpacing(), strict=True)]
    grid = SimpleITK.Image(size, SimpleITK.sitkFloat32)
    grid.SetSpacing([1.5] * 3)
    grid.SetDirection(scaled.GetDirection())
    offset = (1.5 - np.array(scaled.GetSpacing())) / 2
    direction = np.array(scaled.GetDirection()).reshape(3, 3)
    grid.SetOrigin((np.array(scaled.GetOrigin()) + direction @ offset).tolist())
    resample = SimpleITK.ResampleImageFilter()
    resample.SetReferenceImage(grid)
    resample.SetInterpolator(SimpleITK.sitkLinear)
    resample.SetUseNearestNeighborExtrapolator(True)
    fine = resample.Execute(scaled)
    with torch.inference_mode():
        scores = model(torch.from_numpy(SimpleITK.GetArrayFromImage(fine).T.copy()).float()[None, None])[0]
    back = SimpleITK.ResampleImageFilter()
    back.SetReferenceImage(given)
    back.SetInterpolator(SimpleITK.sitkLinear)
    back.SetUseNearestNeighborExtrapolator(True)
    found = []
    for channel in scores.numpy():
        image = SimpleITK.GetImageFromArray(channel.T)
        image.CopyInformation(fine)
        found.append(SimpleITK.GetArrayFromImage(back.Execute(image)).T)
    return np.stack(found).argmax(0)


def test_a_scan_becomes_labels_on_its_own_grid(tmp_path):
    image = scan()
    image.save(tmp_path / "ct.nii.gz")
    made = vx.predict(network(), tmp_path / "ct.nii.gz", spec=SPEC, output=tmp_path / "labels.nii.gz", patch_size=32)
    assert made.spatial_shape == image.spatial_shape
    assert np.allclose(made.affine, image.affine, atol=1e-5)
    expected = by_hand(network(), image)
    is_equal = made.data[0].numpy() == expected
    # The first plane lies 0.1 mm beyond the model's grid, where SimpleITK takes the nearest voxel.
    assert is_equal[1:].mean() > 0.9999
    assert is_equal[0].mean() > 0.8
    assert (by_hand(network(), scan()) != 0).mean() > 0.2
    raw = vx.predict(network(), image, patch_size=20, reduce="argmax")
    assert (raw.data[0].numpy() == expected).mean() < 0.9  # so that it matters


def test_a_dicom_series_becomes_labels_on_its_own_grid(tmp_path):
    path = Path(__file__).parents[2] / "examples" / "dicom_to_segments.py"
    loader = importlib.util.spec_from_file_location("example", path)
    example = importlib.util.module_from_spec(loader)
    loader.loader.exec_module(example)
    example.write_series(scan((40, 36, 36), np.diag([1.0, 1, 1, 1])), tmp_path / "series")
    series = vx.ScalarImage(tmp_path / "series")
    assert (series.orientation, series.spacing) == (("L", "P", "S"), (1, 1, 3))
    made = vx.predict(network(), tmp_path / "series", spec=SPEC, patch_size=32, output=tmp_path / "labels.nii.gz")
    is_equal = made.data[0].numpy() == by_hand(network(), series)
    assert is_equal[2:, 2:, 1:-1].mean() > 0.9999
    assert len(made.data.unique()) == 3


def test_the_plan_shows_each_step():
    plan = str(vx.plan(network(), scan(), spec=SPEC))
    for part in (
        "turned to RAS",
        "clipped to -300 … 400",
        "minus 20, divided by 150",
        "resampled (order 1): 21 × 19 × 23",
        "40 × 36 × 14",
    ):
        assert part in plan
    assert "raw intensities, native grid" in str(vx.plan(network(), scan(), patch_size=16))


def test_arguments_count_before_the_spec():
    image = scan()
    predictor = vx.Predictor(network(), spec=SPEC, patch_size=8, patch_overlap=2, overlap_mode="hann", reduce="scores")
    plan = predictor.plan(image)
    assert (plan.grid.patch_size, plan.grid.axes[0].stride) == ((8, 8, 8), 6)
    assert predictor(image).shape == (3, 40, 36, 14)
    assert predictor(image, like=((10, 10, 10), image.affine)).spatial_shape == (10, 10, 10)


def test_channels_go_in_the_order_of_their_names():
    spec = vx.ModelSpec(channels=("T1", "FLAIR"), patch_size=16)
    one, other = scan(), scan().new_like(scan().data * 2)
    expected = torch.cat([one.data, other.data])
    for given_images in (vx.Subject(FLAIR=other, T1=one), {"FLAIR": other, "T1": one}, vx.Subject(T1=one, FLAIR=other, seg=one)):
        assert torch.allclose(vx.predict(nn.Identity(), given_images, spec=spec).data, expected, atol=1e-3)
    with pytest.raises(SpecError, match="'FLAIR' is missing"):
        vx.predict(nn.Identity(), vx.Subject(T1=one, T2=other), spec=spec)
    with pytest.raises(SpecError, match="1 channel, but the model takes 2"):
        vx.predict(nn.Identity(), one, spec=spec)
    elsewhere = other.resampled(2)
    with pytest.raises(SpaceError, match=r"resample_to= \(--resample-to\) one of 'T1', 'FLAIR'"):
        vx.predict(nn.Identity(), vx.Subject(T1=one, FLAIR=elsewhere), spec=spec)
    made = vx.predict(nn.Identity(), vx.Subject(T1=one, FLAIR=elsewhere), spec=spec, resample_to="T1")
    assert torch.allclose(made.data[1:], elsewhere.resampled(like=one).data, atol=1e-3)
    with pytest.raises(SpecError, match="resample_to is 'T3'"):
        vx.predict(nn.Identity(), vx.Subject(T1=one, FLAIR=elsewhere), spec=spec, resample_to="T3")


def test_cropping_leaves_the_rest_as_background():
    data = torch.zeros(1, 30, 30, 30)
    data[0, 8:20, 9:21, 10:22] = 5
    image = vx.ScalarImage(data, affine=CT)
    spec = vx.ModelSpec(crop=vx.Crop(margin=(1, 2, 3)), patch_size=8, reduce="argmax")
    model = lambda batch: torch.cat([batch * 0, torch.ones_like(batch)], 1)  # noqa: E731
    made = vx.predict(model, image, spec=spec)
    expected = torch.zeros_like(data, dtype=torch.uint8)
    expected[0, 7:21, 7:23, 7:25] = 1
    assert torch.equal(made.data, expected)
    with pytest.warns(RuntimeWarning, match="is not cropped"):
        empty = vx.predict(model, image.new_like(data * 0), spec=spec)
    assert bool(empty.data.all())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float32])
@pytest.mark.parametrize("over", ["all", "nonzero", 60.0])
def test_numbers_of_the_volume_are_exact(dtype, over):
    values = (torch.rand(1, 17, 13, 11, generator=torch.Generator().manual_seed(1)) * 250 - 100).clamp(min=0).to(dtype)
    image = vx.ScalarImage(values)
    counted = values[values != 0] if over == "nonzero" else values[values > over] if over != "all" else values.flatten()
    array = counted.double().numpy()
    z = Intensity(scale="z-score", over=over).of_channel(image, 0)
    assert (z.shift, z.divisor) == pytest.approx((array.mean(), array.std()), rel=1e-12)
    ends = Intensity(scale="percentiles", low=0.5, high=99.5, over=over).of_channel(image, 0)
    low, high = np.percentile(array, (0.5, 99.5))
    assert (ends.shift, ends.divisor) == pytest.approx((low, high - low), rel=1e-6)
    clipped = Intensity(clip_percentiles=(5, 95), scale="range", over=over).of_channel(image, 0)
    assert (clipped.low, clipped.high) == pytest.approx(tuple(np.percentile(array, (5, 95))), rel=1e-6)


@given(st.integers(1, 60), st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40))
@examples(40)
def test_percentiles_are_those_of_numpy(chunk, numbers):
    values = torch.tensor(numbers, dtype=torch.float32).reshape(1, -1, 1, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("voxloom.volumes.views.intensities.CHUNK_VOXELS", chunk)
        found = Intensity(clip_percentiles=(12.5, 80)).of_channel(vx.ScalarImage(values), 0)
        z = Intensity(scale="z-score").of_channel(vx.ScalarImage(values), 0)
    assert (found.low, found.high) == pytest.approx(
        tuple(np.percentile(np.array(numbers, dtype=np.float64), (12.5, 80))), rel=1e-5
    )
    whole = Intensity(scale="z-score").of_channel(vx.ScalarImage(values), 0)
    assert z == whole  # to the bit, whatever is read together


def test_what_is_constant_stays_as_far_from_a_given_mean_as_it_is():
    image = vx.ScalarImage(torch.full((1, 4, 4, 4), 7.0))
    for intensity, expected in ((Intensity(scale="z-score", mean=5.0), 2), (Intensity(scale="z-score"), 0)):
        assert intensity.of_channel(image, 0).apply(image.data).unique().tolist() == [expected]


def test_what_is_constant_becomes_nothing():
    spec = vx.ModelSpec(intensity=(Intensity(scale="z-score"),), patch_size=8)
    made = vx.predict(nn.Identity(), vx.ScalarImage(torch.full((1, 9, 9, 9), 7.0)), spec=spec)
    assert not bool(made.data.any())
    for scale in ("range", "percentiles"):
        spec = vx.ModelSpec(intensity=(Intensity(scale=scale),), patch_size=8)
        assert not bool(vx.predict(nn.Identity(), vx.ScalarImage(torch.full((1, 9, 9, 9), 7.0)), spec=spec).data.any())


@pytest.mark.parametrize("scale", ["range", "percentiles"])
@pytest.mark.parametrize("onto", [(-1, 1), (2, -1)])
def test_what_is_constant_becomes_the_low_end(scale, onto):
    spec = vx.ModelSpec(intensity=(Intensity(scale=scale, onto=onto),), patch_size=8)
    made = vx.predict(nn.Identity(), vx.ScalarImage(torch.full((1, 9, 9, 9), 7.0)), spec=spec, overlap_mode="crop")
    assert bool((made.data == onto[0]).all())


@pytest.mark.parametrize("plane", [0, 5])
def test_nan_shows_wherever_it_lies(plane):
    data = torch.rand(1, 9, 9, 9)
    data[0, plane, 0, 0] = float("nan")
    scaling = Intensity(scale="range").of_channel(vx.ScalarImage(data), 0)
    assert math.isnan(scaling.shift)
    assert math.isnan(scaling.divisor)


def test_channels_have_masks_of_their_own():
    data = torch.rand(2, 9, 9, 9) + 1
    data[0, 4, 4, 4] = 0  # a hole, which a mask fills
    over = (Intensity(scale="z-score", over="nonzero"), Intensity(scale="z-score", over="mask"))
    made = vx.predict(nn.Identity(), vx.ScalarImage(data), spec=vx.ModelSpec(intensity=over, patch_size=8, channels=("a", "b")))
    assert made.data[0, 4, 4, 4] == 0


def test_the_box_of_the_foreground():
    data = torch.zeros(2, 9, 9, 9)
    data[1, 2, 3, 4] = -1
    image = vx.ScalarImage(data)
    assert foreground_box(image).start == (2, 3, 4)
    assert foreground_box(image, margin=(3, 3, 9)).stop == (6, 7, 9)
    assert foreground_box(image, above=0) is None


def test_an_image_without_orientation(tmp_path):
    image = scan()
    image.codes = vx.SpaceCodes(qform=0, sform=0)
    with pytest.raises(SpecError, match="does not say where its axes point"):
        vx.predict(network(), image, spec=SPEC)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"voxloom_spec": 2}, "version 2"),
        ({"voxloom_spec": None}, "no key voxloom_spec"),
        ({"colour": 1}, "unknown key 'colour'"),
        ({"spacing": [1, 2]}, "spacing"),
        ({"spacing": [0, 1, 1]}, "spacing"),
        ({"orientation": "RAR"}, "orientation"),
        ({"patch_size": 0}, "patch_size"),
        ({"patch_overlap": 1.5}, "patch_overlap"),
        ({"intensity": [{"clip": [5, 1]}]}, "intensity"),
        ({"intensity": [{"scale": "z"}]}, "intensity"),
        ({"intensity": [{"mode": 1}]}, "'mode' is none of them"),
        ({"channels": ["A", "B"], "intensity": [{}, {}, {}]}, "3 entries"),
        ({"channels": "CT"}, "channels"),
        ({"crop": 5}, "crop"),
        ({"labels": [{"value": -1, "name": "x"}]}, "labels"),
        ({"labels": [{"value": 1, "name": "x", "color": [1, 2, 300]}]}, "labels"),
        ({"mirror_axes": [3]}, "mirror_axes"),
        ({"axes": [0, 0, 1]}, "axes"),
        ({"order": 2}, "order"),
        ({"reduce": "max"}, "reduce"),
        ({"activation": "relu"}, "activation"),
        ({"overlap_mode": "blend"}, "overlap_mode"),
        ({"regions": [-1]}, "regions"),
        ({"labels": [{"value": 1}]}, "labels"),
        ({"labels": [{"name": "x"}]}, "labels"),
        ({"orientation": ["R", "A", 5]}, "orientation"),
        ({"intensity": [{"clip_percentiles": [5, 150]}]}, "intensity"),
    ],
)
def test_specs_that_are_none(change, text):
    given_json = {"voxloom_spec": 1, **change}
    if change.get("voxloom_spec", 1) is None:
        del given_json["voxloom_spec"]
    with pytest.raises(SpecError, match=text) as caught:
        vx.ModelSpec.from_json(json.dumps(given_json), "model.json")
    assert "model.json" in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", "3", '"x"'])
def test_what_is_no_spec(text):
    with pytest.raises(SpecError, match="the spec is"):
        vx.ModelSpec.from_json(text)


def test_specs_survive_json():
    full = vx.ModelSpec(
        channels=("a", "b"),
        orientation="LPS",
        axes=(2, 1, 0),
        crop=vx.Crop(above=-500, margin=(1, 2, 3)),
        intensity=(Intensity(clip=(0, 1), over="nonzero"), Intensity(clip_percentiles=(0.5, 99.5), scale="range")),
        spacing=(1, None, 2.5),
        fits="volume",
        order=3,
        thick_slices=3,
        patch_size=(32, 16, -1),
        patch_overlap=(0.5, 3, 0.25),
        patch_spacing="even",
        overlap_width=0.2,
        context=(1, 1, 0),
        mirror_axes=(0, 2),
        padding_mode="edge",
        activation="sigmoid",
        regions=(2, 1),
        labels=(vx.Label(1, "x", (1, 2, 3), ("SCT", "1", "X")),),
    )
    assert vx.ModelSpec.from_json(json.loads(json.dumps(full.to_json()))) == full
    assert vx.ModelSpec.from_json({"voxloom_spec": 1}) == vx.ModelSpec()
    assert full.to_json()["spacing"] == [1, "native", 2.5]


def test_regions_of_a_spec():
    spec = vx.ModelSpec(regions=(2, 1), patch_size=8, activation="sigmoid")
    data = torch.randn(2, 9, 9, 9)
    made = vx.predict(nn.Identity(), data, spec=spec)
    expected = torch.where(data[1] > 0, 1, torch.where(data[0] > 0, 2, 0))
    assert torch.equal(made.data[0].long(), expected)


def test_a_model_file_brings_its_spec(tmp_path):
    model = network()
    program = torch.export.export(model, (torch.zeros(2, 1, 16, 16, 16),), dynamic_shapes=({0: torch.export.Dim("b", min=1)},))
    torch.export.save(program, tmp_path / "with.pt2", extra_files={"voxloom.json": str(SPEC)})
    torch.export.save(program, tmp_path / "beside.pt2")
    SPEC.write(tmp_path / "beside.json")
    torch.export.save(program, tmp_path / "alone.pt2")
    image = scan()
    expected = vx.predict(model, image, spec=SPEC)
    for name in ("with", "beside"):
        assert vx.load_model(str(tmp_path / f"{name}.pt2")).spec == SPEC
        assert torch.equal(vx.predict(tmp_path / f"{name}.pt2", image).data, expected.data)
    assert vx.load_model(str(tmp_path / "alone.pt2")).spec is None
    (tmp_path / "beside.json").write_text('{"voxloom_spec": 1, "spaceing": 3}')
    with pytest.raises(SpecError, match="beside.json has an unknown key 'spaceing'"):
        vx.predict(tmp_path / "beside.pt2", image)


@pytest.mark.parametrize("angle", [0.05, 0.06, 0.07])
def test_scores_end_where_an_oblique_scan_or_its_foreground_does(tmp_path, angle):
    """Its header has single precision, in which the axes of scan and model are not quite parallel."""
    (a, b), (c, d) = np.cos([0.14, angle]), np.sin([0.14, angle])
    affine = np.eye(4)
    affine[:3, :3] = np.array([[b, 0, d], [c * d, a, -c * b], [-a * d, c, a * b]]) @ np.diag([-0.9, -0.9, 5])
    scan = torch.zeros(1, 24, 26, 14)
    scan[:, 4:20, 5:21, 3:11] = torch.rand(1, 16, 16, 8) + 0.1
    vx.ScalarImage(scan, affine=affine).save(tmp_path / "scan.nii.gz")
    for crop, image in itertools.product((None, Crop(above=0)), (tmp_path / "scan.nii.gz", vx.ScalarImage(scan, affine=affine))):
        spec = vx.ModelSpec(orientation="RAS", spacing=(1.0, 1.0, 1.0), fits="monai", patch_size=16, crop=crop)
        made = vx.predict(lambda batch: batch * 0 + 7, image, spec=spec).data
        torch.testing.assert_close(made, torch.full_like(made, 7) if crop is None else (scan > 0) * 7.0)


def test_what_monai_does_at_the_border_of_a_sheared_scan_is_said():
    affine = np.array([[1, 0, 0.3, 0], [0, 1, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1.0]])
    spec = vx.ModelSpec(orientation="RAS", spacing=(1.3, 1.0, 1.0), fits="monai", patch_size=16)
    with pytest.warns(RuntimeWarning, match="not at right angles"):
        vx.predict(lambda batch: batch, vx.ScalarImage(torch.rand(1, 20, 20, 12), affine=affine), spec=spec)


def test_thick_slices_are_interpolated_by_the_nearest_both_ways():
    spec = vx.ModelSpec(spacing=(1, 1, 1), thick_slices=3, fits="volume", patch_size=16)
    image = scan((20, 20, 6), np.diag([0.8, 0.8, 4, 1]))
    plan = vx.plan(nn.Identity(), image, spec=spec)
    assert plan.kinds == ("linear", "linear", "nearest")
    assert plan.grid.spatial_shape == (16, 16, 24)
    made = vx.predict(nn.Identity(), image, spec=spec)
    in_plane = image.resampled(
        like=((16, 16, 6), np.diag([1, 1, 4, 1]) + np.eye(4, k=3) * 0.1 + np.array([[0] * 4, [0, 0, 0, 0.1], [0] * 4, [0] * 4]))
    )
    back = in_plane.resampled(like=image)
    assert torch.allclose(made.data, back.data, atol=1e-2)


# Masks are matched to the image, whatever a model is given of it


def ones(batch):
    return torch.ones_like(batch[:, :1])


@pytest.mark.parametrize("kind", ["tensor", "array", "image", "finer image"])
@pytest.mark.parametrize("change", [{"orientation": "RAS"}, {"spacing": (2, 2, 2)}, {"spacing": (3, 3, 3), "orientation": "SPL"}])
def test_masks_lie_on_the_image(kind, change):
    affine = np.array([[-1.0, 0, 0, 15], [0, -1, 0, 15], [0, 0, 1, 0], [0, 0, 0, 1]])
    image = vx.ScalarImage(torch.rand(1, 16, 16, 16), affine=affine)
    values = torch.zeros(1, 16, 16, 16, dtype=torch.uint8)
    values[0, 2, 3, 1] = 1
    given_mask = {
        "tensor": values,
        "array": values[0].numpy(),
        "image": vx.LabelMap(values, affine=affine),
        "finer image": vx.LabelMap(values, affine=affine).resampled(0.5),
    }[kind]
    made = vx.predict(ones, image, 2, 0, "average", mask=given_mask, fill=-9, spec=vx.ModelSpec(**change))
    assert float(made.data[0, 2, 3, 1]) == 1
    assert bool((made.data[0, 12:, 12:] == -9).all())
    with pytest.raises(vx.errors.ImageError, match="the mask has shape"):
        vx.predict(ones, image, 4, mask=values[:, 1:], spec=vx.ModelSpec(**change))


def test_thresholds_are_of_the_image_itself():
    data = torch.full((1, 12, 12, 12), -500.0)
    data[0, :4, :4, :4] = 500
    spec = vx.ModelSpec(intensity=(Intensity(scale="z-score"),))
    made = vx.predict(ones, vx.ScalarImage(data), 4, 0, mask=100, fill=-9, spec=spec)
    assert torch.equal(made.data > 0, data > 0)
    made = vx.predict(ones, vx.ScalarImage(data), 4, 0, mask=lambda block: block > 100, fill=-9, spec=spec)
    assert torch.equal(made.data > 0, data > 0)


def test_a_network_is_saved_with_what_it_expects(tmp_path):
    spec = vx.ModelSpec(channels=("t1",), patch_size=8, reduce="argmax", labels=(vx.Label(1, "bright"),))
    model = nn.Sequential(nn.Conv3d(1, 2, 3, padding=1), nn.Dropout(0.9)).train()
    vx.save_model(model, tmp_path / "m.pt2", spec)
    assert model.training
    assert model[1].training
    loaded = vx.load_model(str(tmp_path / "m.pt2"))
    assert loaded.spec == spec
    data = torch.rand(1, 12, 11, 10)
    made = [vx.predict(each, data, spec=spec).data for each in (model, loaded)]
    assert torch.equal(*made)
    before = (tmp_path / "m.pt2").read_bytes()
    with pytest.raises(TargetExistsError, match="overwrite=True"):
        vx.save_model(nn.Identity(), tmp_path / "m.pt2", spec)
    assert (tmp_path / "m.pt2").read_bytes() == before
    for arguments, error, message in [
        ((lambda batch: batch, "a.pt2", spec), ModelFileError, "a torch.nn.Module"),
        ((model, "a.pt", spec), ModelFileError, "must end in .pt2"),
        ((model, "a.pt2", None), SpecError, "give a vx.ModelSpec"),
        ((model, "a.pt2", vx.ModelSpec(patch_size=8)), SpecError, "must say its channels"),
    ]:
        with pytest.raises(error, match=message):
            vx.save_model(arguments[0], tmp_path / arguments[1], arguments[2])
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt2"]


@pytest.mark.slow
def test_what_is_packed_is_not_held_to_find_its_numbers(tmp_path):
    image = scan((160, 150, 140))
    image.save(tmp_path / "a.nii.gz")
    spec = vx.ModelSpec(
        intensity=(Intensity(scale="z-score", over="nonzero"),), crop=vx.Crop(margin=(1, 1, 1)), patch_size=40, orientation="RAS"
    )
    expected = vx.predict(nn.Identity(), image, spec=spec)
    given_image = vx.ScalarImage(tmp_path / "a.nii.gz")
    predictor = vx.Predictor(nn.Identity(), spec=spec, memory_limit="72MiB", model_name="none")
    assert predictor.plan(given_image).spooled_bytes
    made = predictor(given_image, output=tmp_path / "out.nii.gz")
    assert not given_image.is_loaded
    assert torch.allclose(made.data, expected.data, atol=1e-5)
    assert predictor.is_made(vx.ScalarImage(tmp_path / "a.nii.gz"), output=tmp_path / "out.nii.gz")


def test_other_files_beside_a_model_are_no_specs(tmp_path):
    program = torch.export.export(network(), (torch.zeros(1, 1, 16, 16, 16),))
    torch.export.save(program, tmp_path / "m.pt2")
    for text in ('{"epochs": 3}', "no JSON", "[1]"):
        (tmp_path / "m.json").write_text(text)
        assert vx.load_model(str(tmp_path / "m.pt2")).spec is None


def test_resample_to_with_names():
    one = scan()
    subject = vx.Subject(a=one, b=one.resampled(2), c=one)
    made = vx.predict(nn.Identity(), subject, 16, image_name=["a", "b"], resample_to="a")
    expected = torch.cat([one.data, one.resampled(2).resampled(like=one).data])
    assert torch.allclose(made.data, expected, atol=1e-2)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_models_of_slices_are_packed(axis, tmp_path, monkeypatch):
    from voxloom.models.packing import pack_model

    (tmp_path / "flat_nets.py").write_text("import torch\n\ndef net():\n    return torch.nn.Conv2d(1, 2, 3, padding=1)\n")
    monkeypatch.chdir(tmp_path)
    torch.save(nn.Conv2d(1, 2, 3, padding=1).state_dict(), "w.pth")
    spec = vx.ModelSpec(channels=("CT",), patch_size=(8, 6), slice_axis=axis)
    pack_model("flat_nets:net", spec, tmp_path / "m.pt2", tmp_path / "w.pth")
    network_of_slices = nn.Conv2d(1, 2, 3, padding=1)
    network_of_slices.load_state_dict(torch.load("w.pth"))
    made, expected = (vx.predict(model, scan((12, 10, 9)), spec=spec) for model in ("m.pt2", network_of_slices))
    assert torch.allclose(made.data, expected.data, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": "zscore"}, "an object of which scale, here 'zscore', is one of 'none', 'z-score'"),
        ({"clip": (50, 10)}, r"clip, here \(50, 10\), is two numbers, the smaller one first"),
        ({"scale": "z-score", "over": "foreground"}, "over, here 'foreground', is a number"),
        ({"scale": "z-score", "mean": 0, "std": -5}, "std, here -5, is a number of at least 0"),
        ({"clip_percentiles": (1, 120)}, "percentiles from 0 to 100"),
        ({"mean": float("nan")}, "mean, here nan, is a number"),
    ],
)
def test_intensities_are_checked_however_they_are_given(options, message):
    with pytest.raises(SpecError, match=message):
        vx.ModelSpec(channels=("CT",), intensity=Intensity(**options))
    with pytest.raises(SpecError, match=message):
        vx.ModelSpec(channels=("CT",), intensity=[options])


def test_numbers_of_numpy_are_numbers():
    spec = vx.ModelSpec(channels=("CT",), intensity=Intensity(scale="z-score", mean=np.float32(0.5), std=np.int64(2)))
    assert vx.ModelSpec.from_json(json.dumps(spec.to_json())) == spec


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # PyTorch's own, where it copies a program
def test_a_program_is_loaded_again_where_it_is_brought_to(tmp_path):
    spec = vx.ModelSpec(channels=("t1",), patch_size=8)
    vx.save_model(nn.Conv3d(1, 2, 3, padding=1), tmp_path / "m.pt2", spec)
    loaded = vx.load_model(str(tmp_path / "m.pt2"))
    again = pickle.loads(pickle.dumps(loaded))
    batch = torch.rand(1, 1, 8, 8, 8)
    assert torch.equal(again.model(batch), loaded.model(batch))
    assert (again.spec, again.patch_size, again.name) == (spec, loaded.patch_size, loaded.name)
    with pytest.raises(vx.errors.ModeError, match="cannot be sent to other processes: give a model by the name of its file"):
        vx.predict(loaded.model, torch.rand(1, 8, 8, 8), 8, output=tmp_path / "a.zarr", devices="cpu")
    packed = pickle.dumps(loaded)
    changed = copy.deepcopy(loaded)
    with torch.no_grad():
        next(changed.model.parameters()).zero_()
    assert torch.equal(copy.copy(changed).model(batch), changed.model(batch))  # as it is, and not as it is in the file
    with pytest.raises(ModelFileError, match="has other weights than its file"):
        pickle.dumps(replace(loaded, model=changed.model, program=replace(loaded.program, module=changed.model)))
    assert pickle.loads(pickle.dumps(replace(loaded, model=nn.Identity()))).model(batch) is batch
    vx.save_model(nn.Conv3d(1, 2, 3, padding=1), tmp_path / "m.pt2", spec, overwrite=True)
    with pytest.raises(ModelFileError, match="has been changed since it was loaded"):
        pickle.loads(packed)


@pytest.mark.slow
def test_a_program_is_run_by_other_processes(tmp_path):
    vx.save_model(nn.Conv3d(1, 3, 3, padding=1), tmp_path / "m.pt2", vx.ModelSpec(("t1",), patch_size=8, reduce="argmax"))
    vx.ScalarImage(torch.rand(1, 20, 18, 16)).save(tmp_path / "scan.nii")
    expected = vx.predict(str(tmp_path / "m.pt2"), tmp_path / "scan.nii").data
    for number, model in enumerate((str(tmp_path / "m.pt2"), vx.load_model(str(tmp_path / "m.pt2")))):
        made = vx.predict(model, tmp_path / "scan.nii", output=tmp_path / f"{number}.zarr", devices="cpu")
        assert torch.equal(made.data, expected)


def test_an_ensemble_of_packed_models_expects_what_they_do(tmp_path):
    spec = vx.ModelSpec(channels=("t1",), intensity=(Intensity(scale="z-score"),), patch_size=8, activation="softmax")
    networks = [nn.Conv3d(1, 2, 3, padding=1) for _ in range(2)]
    for number, each in enumerate(networks):
        vx.save_model(each, tmp_path / f"{number}.pt2", spec)
    paths = [str(tmp_path / f"{number}.pt2") for number in range(2)]
    data = torch.rand(1, 12, 11, 10)
    expected = vx.predict(networks, data, spec=spec).data
    for models in (paths, [vx.load_model(path) for path in paths], tuple(paths)):
        assert torch.allclose(vx.predict(models, data).data, expected, atol=1e-6)
    vx.save_model(networks[0], tmp_path / "other.pt2", replace(spec, patch_size=(16, 16, 16)))
    with pytest.raises(ModelFileError, match="ensemble must expect the same, but these differ in spec"):
        vx.predict([paths[0], str(tmp_path / "other.pt2")], data)


def test_a_compressed_scan_is_resampled_within_a_limit_far_below_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr(cubic, "SLAB_VOXELS", 2**14)
    rows = (torch.arange(256.0) % 7 + 1).expand(1, 256, 300, 256)  # 79 MB
    vx.ScalarImage(rows, affine=np.diag([0.8, 0.8, 1, 1])).save(tmp_path / "scan.nii.gz")
    spec = vx.ModelSpec(spacing=(4, 4, 4), order=3, crop=vx.Crop(), patch_size=16, reduce="argmax")
    limited = vx.Predictor(nn.Identity(), spec=spec, memory_limit="60MB", model_name="identity")
    plan = limited.plan(tmp_path / "scan.nii.gz", output=tmp_path / "out.nii.gz")
    assert plan.spooled_bytes == 256 * 300 * 256 * 4
    assert 0 < plan.memory.loading < 20e6
    made = limited(tmp_path / "scan.nii.gz", output=tmp_path / "out.nii.gz")
    assert torch.equal(made.data, vx.predict(nn.Identity(), tmp_path / "scan.nii.gz", spec=spec).data)


def test_what_is_loaded_for_a_look_at_the_volume_is_in_the_plan(tmp_path):
    vx.ScalarImage(torch.rand(1, 64, 64, 64)).save(tmp_path / "scan.nii.gz")
    spec = vx.ModelSpec(crop=vx.Crop(), patch_size=16)
    image = vx.ScalarImage(tmp_path / "scan.nii.gz")
    predictor = vx.Predictor(nn.Identity(), spec=spec)
    assert [predictor.plan(image).memory.volume for _ in range(2)] == [64**3 * 4, 0]  # by then it is in memory
