"""Results on another grid than the model's: the same whatever the memory, the executor and the interruptions are."""

import re
import time
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import voxloom as vx
from slow import slow
from voxloom.core.geometry import aligned, oblique
from voxloom.errors import ModeError, OutputError, RecordError, SaveError, SizeError, SpaceError, SubjectError, TargetExistsError
from voxloom.inference import delivery
from voxloom.inference.planning import planner
from voxloom.testing import SerialExecutor

SHAPE = (28, 26, 22)
AFFINE = np.array([[0, -1.5, 0, 7], [1.5, 0, 0, -3], [0, 0, -2.0, 11], [0, 0, 0, 1]])
TURNED = np.array([[-0.9, 0, 0, 2], [0, 0, 1.1, 5], [0, 1.3, 0, -35], [0, 0, 0, 1]])
C, S = np.cos(0.3), np.sin(0.3)
OBLIQUE = np.array([[C, -S, 0, 0], [S, C, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]) @ TURNED
LIKE = {"aligned": ((34, 30, 38), TURNED), "oblique": ((34, 30, 38), OBLIQUE)}
OPTIONS = {"patch_size": 12, "patch_overlap": 6}


@pytest.fixture
def image():
    return vx.ScalarImage(torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(5)), affine=AFFINE)


@pytest.fixture
def small_pieces(monkeypatch):
    """Let blocks matter in small volumes, too."""
    for module in (delivery, planner):
        monkeypatch.setattr(module, "PIECE_BYTES", 2**13)
    for module in (aligned, oblique):
        monkeypatch.setattr(module, "PART_VOXELS", 12)


def network(channels=6):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Conv3d(1, channels, 3, padding=1), nn.Conv3d(channels, channels, 1)).eval()


def by_hand(scores, like):
    """Interpolate the whole of the scores with SciPy; what lies outside is NaN."""
    from scipy.ndimage import map_coordinates

    shape, affine = like
    matrix = np.linalg.inv(scores.affine) @ affine
    places = np.moveaxis(
        np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1) @ matrix[:3, :3].T + matrix[:3, 3], -1, 0
    )
    inside = ((places >= -0.5) & (places <= np.array(scores.spatial_shape)[:, None, None, None] - 0.5)).all(0)
    found = np.stack([map_coordinates(each, places, order=1, mode="nearest") for each in scores.data.double().numpy()])
    return np.where(inside, found, np.nan)


@pytest.mark.parametrize("name", LIKE)
@pytest.mark.parametrize("mode", ["gaussian", "crop", slow("average")])
def test_scores_are_interpolated_and_then_reduced(image, name, mode):
    model = network()
    expected = by_hand(vx.predict(model, image, overlap_mode=mode, **OPTIONS), LIKE[name])
    made = vx.predict(model, image, overlap_mode=mode, like=LIKE[name], fill=-7, **OPTIONS)
    assert np.allclose(made.affine, LIKE[name][1])
    assert np.allclose(made.data.numpy(), np.nan_to_num(expected, nan=-7), atol=1e-4)
    labels = vx.predict(model, image, overlap_mode=mode, like=LIKE[name], reduce="argmax", fill=200, **OPTIONS)
    is_outside = torch.from_numpy(np.isnan(expected[0]))
    assert 0 < int(is_outside.sum()) < is_outside.numel()
    assert torch.equal(labels.data[0].long(), made.data.argmax(0).masked_fill(is_outside, 200))


def least_bytes(model, image, options):
    with pytest.raises(SizeError) as caught:
        vx.plan(model, image, memory_limit=1, **options)
    return int(re.search(r"\((\d+) bytes\)", str(caught.value)).group(1))


@pytest.mark.parametrize("name", ["aligned", slow("oblique")])
def test_the_bits_do_not_depend_on_memory(image, name, small_pieces):
    model, num_blocks = network(40), set()
    options = {"patch_size": 8, "patch_overlap": 4, "like": LIKE[name], "reduce": {"labels": "argmax", "some": [3, 1]}}
    peak = vx.plan(model, image, **options).peak_bytes
    expected = vx.predict(model, image, **options)
    for limit in np.linspace(least_bytes(model, image, options), peak, 2).astype(int).tolist():
        plan = vx.plan(model, image, memory_limit=limit, **options)
        num_blocks.add(plan.num_blocks)
        assert plan.peak_bytes <= limit
        with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
            made = vx.predict(model, image, memory_limit=limit, **options)
        assert all(torch.equal(made[each].data, expected[each].data) for each in made)
    assert len(num_blocks) >= 2


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, *map(slow, (torch.bool, torch.uint16, torch.int64))])
@pytest.mark.parametrize("interpolation", ["linear", "nearest"])
def test_scores_of_every_type(image, dtype, interpolation):
    def model(batch):
        return torch.cat([batch < 0.3, batch > 0.5, batch > 0.7, batch > 2], 1).to(dtype)

    options = {"patch_overlap": 0, "overlap_mode": "crop", "like": LIKE["oblique"], "interpolation": interpolation}
    scores = vx.predict(lambda batch: model(batch).double(), image, 8, **options).data
    labels = vx.predict(model, image, 8, reduce="argmax", **options).data
    assert torch.equal(labels.long(), scores.argmax(0, keepdim=True))


@pytest.mark.parametrize(
    ("name", "in_blocks"),
    [
        ("aligned", True),
        *(slow(*each) for each in (("aligned", False), ("oblique", False), ("oblique", True))),
    ],
)
def test_what_is_interrupted_is_resumed(image, name, in_blocks, tmp_path, small_pieces):
    """Wherever a run stops, and however many blocks it has."""
    model = network(40)
    options = {"patch_size": 8, "patch_overlap": 4, "reduce": "argmax", "model_name": "network", "like": LIKE[name]}
    options["output"] = tmp_path / "a.nii"
    expected = vx.predict(model, image, **{**options, "output": None})
    options["memory_limit"] = least_bytes(model, image, options) if in_blocks else None
    plan = vx.plan(model, image, **options)
    assert (plan.num_blocks > 1) == in_blocks
    for calls in range(5, plan.forward_passes, plan.forward_passes // 2):
        left = [calls]

        def stopping(batch, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return model(batch)

        with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
            with pytest.raises(KeyboardInterrupt):
                vx.predict(stopping, image, **options)
            made = vx.predict(model, image, **options)
        assert torch.equal(made.data, expected.data)
        made.path.unlink()
        made.path.with_suffix(".json").unlink()


@pytest.mark.parametrize("name", LIKE)
def test_a_mask_leaves_out_what_lies_nearer_to_patches_that_were_not_computed(image, name):
    mask = torch.zeros(SHAPE)
    mask[3:9, 20:25, 4:9] = 1
    scores = vx.predict(nn.Identity(), image, mask=mask, fill=-1, **OPTIONS)
    is_computed = scores.new_like((scores.data >= 0).float())
    share = by_hand(is_computed, LIKE[name])[0]
    made = vx.predict(nn.Identity(), image, mask=mask, fill=-1, like=LIKE[name], **OPTIONS).data[0].numpy()
    assert ((made == -1) == ~(share >= 0.5))[abs(share - 0.5) > 1e-4].all()
    sums = by_hand(scores.new_like(scores.data.clamp(min=0)), LIKE[name])[0]
    is_there = np.nan_to_num(share) > 0.5001
    assert is_there.any()
    assert np.allclose(made[is_there], sums[is_there] / share[is_there], atol=1e-4)


def test_several_outputs_of_several_scales(image):
    class Two(nn.Module):
        def forward(self, batch):
            return {"fine": batch, "coarse": nn.functional.avg_pool3d(batch, 2)}

    options = {**OPTIONS, "output_scale": {"coarse": 0.5}}
    plain = vx.predict(Two(), image, **options)
    made = vx.predict(Two(), image, like=LIKE["aligned"], fill=np.nan, **options)
    assert plain["coarse"].spatial_shape == (14, 13, 11)
    for each in plain:
        assert np.allclose(made[each].data.numpy(), by_hand(plain[each], LIKE["aligned"]), atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("kinds", ["nearest", ("linear", "nearest", "nearest")])
def test_kinds_of_interpolation(image, kinds):
    made = vx.predict(nn.Identity(), image, like=LIKE["aligned"], interpolation=kinds, **OPTIONS)
    serial = vx.predict(nn.Identity(), image, like=LIKE["aligned"], interpolation=kinds, executor=SerialExecutor(), **OPTIONS)
    assert torch.allclose(made.data, serial.data, atol=1e-6)
    values = set(vx.predict(nn.Identity(), image, **OPTIONS).data.flatten().tolist())
    assert (
        set(made.data.flatten().tolist()) <= {*values, 0.0}
        if kinds == "nearest"
        else not set(made.data.flatten().tolist()) <= values
    )


def test_whole_numbers_are_kept_by_the_nearest(image):
    def model(batch):
        return (batch * 100).to(torch.int16)

    made = vx.predict(model, image, like=LIKE["aligned"], interpolation="nearest", overlap_mode="crop", **OPTIONS)
    assert (made.dtype, type(made)) == (torch.int16, vx.LabelMap)
    linear = vx.predict(model, image, like=LIKE["aligned"], overlap_mode="crop", **OPTIONS)
    assert (linear.dtype, type(linear)) == (torch.float32, vx.ScalarImage)


def test_infinite_scores_do_not_become_nan(image):
    def model(batch):
        return torch.cat([torch.full_like(batch, -torch.inf), batch], 1)

    with pytest.warns(RuntimeWarning, match="infinity"):
        labels = vx.predict(model, image, like=LIKE["oblique"], reduce="argmax", overlap_mode="crop", **OPTIONS)
    assert set(labels.data.unique().tolist()) == {0, 1}


def test_the_same_grid_gives_the_same_bits(image):
    expected = vx.predict(network(), image, **OPTIONS)
    assert torch.equal(vx.predict(network(), image, like=image, **OPTIONS).data, expected.data)


def test_what_like_may_be(image, tmp_path):
    other = vx.LabelMap(torch.zeros(1, 20, 21, 22), affine=TURNED)
    other.codes = vx.SpaceCodes(qform=4, sform=4)
    other.save(tmp_path / "other.nii.gz")
    expected = vx.predict(nn.Identity(), image, like=((20, 21, 22), TURNED), **OPTIONS)
    for like in (other, tmp_path / "other.nii.gz", str(tmp_path / "other.nii.gz"), vx.Subject(other=other)):
        made = vx.predict(nn.Identity(), image, like=like, **OPTIONS)
        assert torch.allclose(made.data, expected.data, atol=1e-5)
        assert made.codes.sform == 4
    assert "result:  20 × 21 × 22 voxels" in str(vx.plan(nn.Identity(), image, like=other, **OPTIONS))


@pytest.mark.parametrize(
    ("like", "error", "text"),
    [
        (((20, 20, 20), np.diag([1, 1, 1, 1]) + np.eye(4, k=3) * 900), SpaceError, "lies beside the image"),
        (((20, 20, 20), np.zeros((4, 4))), Exception, "affine in like"),
        (((20, 20), np.eye(4)), SizeError, "shape in like"),
        (((20, 0, 20), np.eye(4)), SizeError, "shape in like"),
        (7, SubjectError, "like is of type int"),
        (torch.zeros(1, 3, 3, 3), SubjectError, "like is of type Tensor"),
        ("there/is/none.nii", vx.errors.ImageNotFoundError, "none.nii"),
    ],
)
def test_what_like_may_not_be(image, like, error, text):
    with pytest.raises(error, match=text):
        vx.predict(nn.Identity(), image, like=like, **OPTIONS)


def test_interpolation_must_have_a_name(image):
    with pytest.raises(ModeError, match="interpolation is 'cubic'"):
        vx.Predictor(nn.Identity(), 8, interpolation="cubic")


def test_files_know_what_they_were_made_like(image, tmp_path):
    other = vx.ScalarImage(torch.zeros(1, 20, 21, 22), affine=TURNED)
    other.save(tmp_path / "other.nii")
    predictor = vx.Predictor(nn.Identity(), model_name="none", **OPTIONS)
    made = predictor(image, like=tmp_path / "other.nii", output=tmp_path / "made.nii.gz")
    assert made.spatial_shape == (20, 21, 22)
    assert predictor.is_made(image, like=tmp_path / "other.nii", output=tmp_path / "made.nii.gz")
    with pytest.raises(TargetExistsError, match="like"):
        predictor.is_made(image, output=tmp_path / "made.nii.gz")
    with pytest.raises(SaveError, match="would replace the input"):
        predictor(image, like=tmp_path / "other.nii", output=tmp_path / "other.nii", overwrite=True)


def test_another_like_is_another_run(image, tmp_path):
    def stopping(batch):
        calls.append(1)
        if len(calls) > 30:
            raise KeyboardInterrupt
        return batch

    calls = []
    options = {**OPTIONS, "model_name": "none", "output": tmp_path / "made.nii"}
    with pytest.raises(KeyboardInterrupt):
        vx.predict(stopping, image, like=LIKE["aligned"], **options)
    with pytest.raises(RecordError, match="like"):
        vx.predict(nn.Identity(), image, like=LIKE["oblique"], **options)
    with pytest.raises(RecordError, match="like"):
        vx.predict(nn.Identity(), image, **options)


def test_a_function_of_the_users_is_given_interpolated_scores(image):
    shapes = []

    def largest(block):
        shapes.append(block.shape)
        return block.amax(0, keepdim=True)

    made = vx.predict(network(), image, like=LIKE["aligned"], reduce=largest, **OPTIONS)
    scores = vx.predict(network(), image, like=LIKE["aligned"], fill=-torch.inf, **OPTIONS)
    assert torch.equal(made.data, scores.data.amax(0, keepdim=True).nan_to_num(neginf=0))
    with pytest.raises(OutputError, match="reduce was called"):
        vx.predict(network(), image, like=LIKE["aligned"], reduce=lambda block: block[..., :1], **OPTIONS)


def test_functions_are_called_by_one_thread_at_a_time(image, small_pieces):
    at_work, most = [], []

    def slow(block):
        at_work.append(1)
        most.append(len(at_work))
        time.sleep(0.002)
        at_work.pop()
        return block

    vx.predict(nn.Identity(), image, SHAPE, 0, reduce=slow, like=LIKE["aligned"])
    assert len(most) > 20
    assert max(most) == 1


def test_a_function_may_write_to_what_it_is_given(image):
    def spoiled(block):
        return block.mul_(0)

    options = {"overlap_mode": "average", "patch_size": SHAPE, "patch_overlap": 0, "like": image}
    made = vx.predict(nn.Identity(), image, reduce={"a": spoiled, "b": "scores"}, **options)
    assert torch.equal(made["b"].data, image.data)


def test_small_whole_numbers_win_where_they_are_largest(image):
    def model(batch):
        first = torch.full_like(batch, -100)
        first[:, :, 0] = -80
        last = torch.full_like(batch, -120)
        last[:, :, 0] = 100
        return torch.cat([first, first, torch.full_like(batch, -90), last], 1).to(torch.int8)

    options = {**OPTIONS, "patch_overlap": 0, "overlap_mode": "crop", "reduce": "argmax"}
    expected = vx.predict(model, image, **options)
    assert torch.equal(vx.predict(model, image, like=image, interpolation="nearest", **options).data, expected.data)


def test_infinities_of_both_signs(image):
    def model(batch):
        return torch.where(batch > 0.5, torch.inf, -torch.inf)

    with pytest.warns(RuntimeWarning, match="infinity"):
        made = vx.predict(model, image, like=LIKE["aligned"], overlap_mode="crop", **OPTIONS)
    assert not bool(made.data.isnan().any())


def test_an_affine_is_given_with_an_array_or_in_place_of_an_images_own(tmp_path):
    array, affine = np.random.default_rng(0).normal(size=(9, 8, 7)).astype(np.float32), np.diag([2.0, 3, 4, 1])
    for image in (array, torch.from_numpy(array), vx.ScalarImage(array), vx.ArraySource(array)):
        made = vx.predict(torch.nn.Identity(), image, 4, 0, "crop", affine=affine)
        assert np.array_equal(made.affine, affine)
        assert torch.equal(made.data[0], torch.from_numpy(array))
    image = vx.ScalarImage(array)
    vx.predict(torch.nn.Identity(), image, 4, affine=affine)
    assert np.array_equal(image.affine, np.eye(4))  # it is the user's
    image.save(tmp_path / "a.nii")
    for each in (affine, np.diag([5.0, 3, 4, 1])):
        made = vx.predict(torch.nn.Identity(), tmp_path / "a.nii", 4, output=tmp_path / "b.nii", affine=each, overwrite=True)
        assert np.allclose(vx.ScalarImage(tmp_path / "b.nii").affine, each)
    predictor = vx.Predictor(torch.nn.Conv3d(1, 1, 1), 4)
    predictor(tmp_path / "a.nii", output=tmp_path / "c.nii", affine=affine)
    assert predictor.is_made(tmp_path / "a.nii", output=tmp_path / "c.nii", affine=affine)
    with pytest.raises(vx.errors.TargetExistsError):
        predictor.is_made(tmp_path / "a.nii", output=tmp_path / "c.nii")
    with pytest.raises(vx.errors.SubjectError, match="affine= is for an array or an image"):
        vx.predict(torch.nn.Identity(), vx.Subject(a=image), 4, affine=affine)
