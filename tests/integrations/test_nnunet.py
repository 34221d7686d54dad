"""Trained models of nnU-Net give the labels that nnU-Net's own predictor gives, from file to file."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunet_samples import configuration, write_case, write_folder

import voxloom as vx
from slow import slow
from voxloom import cli
from voxloom.core.boxes import Box
from voxloom.errors import ModelFileError, SpecError
from voxloom.integrations import nnunet

REGIONS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "active": 3}
# A name; the configuration; the rest of the folder; the scan.
RESAMPLED = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
CASES = {
    "full resolution": ({"spacing": (1.4, 1.2, 1.0), "patch": (16, 16, 16)}, {}, {}),
    "two dimensions": ({"spacing": (1.2, 1.0), "patch": (16, 24)}, {"mirrored": (0, 1)}, {}),
    "thick slices": ({"spacing": (4.0, 1.0, 1.0), "patch": (8, 16, 16)}, {}, {"shape": (30, 26, 16), "spacing": (0.8, 0.9, 5.0)}),
    "channels, mask, transposed": (
        {
            "spacing": (1.3, 1.1, 1.2),
            "patch": (16, 8, 16),
            "schemes": ("ZScoreNormalization", "ZScoreNormalization"),
            "masked": (True, False),
        },
        {"channels": ("T1", "T2"), "forward": (1, 0, 2), "mirrored": None},
        {"channels": 2},
    ),
    "regions, several folds": (
        {"spacing": (1.4, 1.2, 1.0), "patch": (16, 16, 16)},
        {"labels": REGIONS, "regions": (1, 2, 3), "folds": (0, 1, 3), "mirrored": (0,)},
        {},
    ),
    "residual encoder": (
        {"spacing": (1.4, 1.2, 1.0), "patch": (16, 16, 16), "kind": "ResidualEncoderUNet"},
        {"mirrored": None},
        {},
    ),
    "old plans": ({"spacing": (1.4, 1.2, 1.0), "patch": (16, 16, 16), "old": True}, {"mirrored": None}, {}),
    "other scalings": (
        {
            "spacing": (1.6, 1.1, 0.9),
            "patch": (16, 16, 16),
            "schemes": ("RescaleTo01Normalization", "NoNormalization", "ZScoreNormalization"),
            "masked": (False, False, False),
        },
        {"channels": ("a", "b", "c"), "mirrored": (1, 2)},
        {"channels": 3},
    ),
    "reoriented, smaller than a patch": (
        {"spacing": (2.5, 2.5, 2.5), "patch": (16, 16, 16)},
        {"reader": "NibabelIOWithReorient", "mirrored": None},
        {},
    ),
    "trained": ({"spacing": (1.4, 1.2, 1.0), "patch": (16, 16, 16)}, {"steps": 40, "folds": (0, 1)}, {}),
    "trained, two dimensions": ({"spacing": (1.2, 1.0), "patch": (16, 24)}, {"steps": 40, "mirrored": (0, 1)}, {}),
    "colours": (
        {"spacing": (1.4, 1.2, 1.0), "patch": (16, 16, 16), "schemes": ("RGBTo01Normalization",) * 3, "masked": (False,) * 3},
        {"channels": ("R", "G", "B"), "mirrored": None},
        {"channels": 3, "colours": True},
    ),
    "thick along another axis than the plans": (
        {"spacing": (4.0, 1.0, 1.0), "patch": (8, 16, 16)},
        {},
        {"shape": (16, 26, 30), "spacing": (5.0, 0.9, 0.8)},
    ),
    "thick from another ratio on": (
        {
            "spacing": (4.0, 1.0, 1.0),
            "patch": (8, 16, 16),
            "resampling_fn_data_kwargs": RESAMPLED | {"order": 1, "separate_z_anisotropy_threshold": 10},
            "resampling_fn_probabilities_kwargs": RESAMPLED | {"order": 1, "separate_z_anisotropy_threshold": 10},
        },
        {},
        {"shape": (30, 26, 16), "spacing": (0.9, 0.8, 5.0)},
    ),
    # In single precision the spacing of a matrix is above 3, or 4 mm along one axis only, or more than half a voxel is left.
    "oblique, all but thick": (
        {"spacing": (1.1, 1.2, 1.4), "patch": (16, 16, 16)},
        {"mirrored": None},
        {"shape": (31, 27, 20), "spacing": (1.0, 1.0, 3.0), "angles": (7, 13, -8)},
    ),
    "oblique, two thick axes": (
        {"spacing": (1.1, 1.2, 1.4), "patch": (16, 16, 16)},
        {"mirrored": None},
        {"shape": (20, 21, 30), "spacing": (4.0, 4.0, 1.0), "angles": (5, -9, 12)},
    ),
    "oblique, half a voxel": (
        {"spacing": (1.0, 1.0, 1.0), "patch": (16, 16, 16)},
        {"mirrored": None},
        {"shape": (47, 43, 30), "spacing": (0.5, 0.5, 1.0), "angles": (-11, 5, 17)},
    ),
    "resampled by torch": (
        {
            "spacing": (1.4, 1.2, 1.0),
            "patch": (16, 16, 16),
            **{f"resampling_fn_{of}": "resample_torch_fornnunet" for of in ("data", "seg", "probabilities")},
            "resampling_fn_data_kwargs": {"is_seg": False, "force_separate_z": False},
            "resampling_fn_probabilities_kwargs": {"is_seg": False, "force_separate_z": False},
            "resampling_fn_seg_kwargs": {"is_seg": True, "force_separate_z": False},
        },
        {"mirrored": None},
        {},
    ),
}


@pytest.fixture(scope="module")
def reference():
    """Their predictor, on the CPU, whose sums are in float32."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        os.environ.setdefault(name, str(Path.cwd()))
    with warnings.catch_warnings(action="ignore"):
        from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

        def predict(folder, cases, out, folds=None, half=False, previous=None):
            predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False, verbose=False)
            predictor.perform_everything_on_device = False
            predictor.initialize_from_trained_model_folder(str(folder), folds, "checkpoint_final.pth")
            with pytest.MonkeyPatch.context() as patch:
                if not half:
                    patch.setattr(torch, "half", torch.float32)
                    from nnunetv2.inference import predict_from_raw_data as module

                    own = module.compute_gaussian

                    def in_float32(*args, **options):
                        return own(*args, **{**options, "dtype": torch.float32})

                    in_float32.cache_clear = own.cache_clear
                    patch.setattr(module, "compute_gaussian", in_float32)
                predictor.predict_from_files_sequential(
                    [[str(file) for file in files] for files in cases],
                    [str(each) for each in out],
                    overwrite=True,
                    folder_with_segs_from_prev_stage=previous,
                )
            return [vx.LabelMap(f"{each}.nii.gz").data for each in out]

        yield lambda *args, **options: _quietly(predict, *args, **options)


def _quietly(function, *args, **options):
    with warnings.catch_warnings(action="ignore"):
        return function(*args, **options)


@pytest.mark.parametrize("name", [slow(name) if "steps" in more else name for name, (_, more, _) in CASES.items()])
def test_labels_are_those_of_nnunet(name, tmp_path, reference, capsys):
    own, rest, scan = CASES[name]
    configurations = {"base": configuration(**own), "tiny": {"inherits_from": "base"}}
    folder = write_folder(tmp_path / "model__nnUNetPlans__tiny", configurations, "tiny", **rest)
    files = write_case(tmp_path / "scans", "case", **scan)
    (expected,) = reference(folder, [files], [tmp_path / "theirs"])
    model = nnunet.load(folder)
    subject = dict(zip(model.spec.channels, map(vx.ScalarImage, files), strict=True))
    made = vx.predict(model, subject, output=tmp_path / "ours.nii.gz")
    assert len(expected.unique()) > 2
    assert (made.data == expected).float().mean() >= 0.9999
    assert np.allclose(made.affine, vx.ScalarImage(tmp_path / "theirs.nii.gz").affine, atol=1e-4)
    (in_half,) = reference(folder, [files], [tmp_path / "half"], half=True)
    assert (made.data == in_half).float().mean() >= 0.998


def test_labels_of_a_cascade_lie_where_the_nearest_are_if_several_are_as_near(tmp_path, reference, capsys):
    low, high = cascade(tmp_path)
    files = write_case(tmp_path / "scans", "case")
    for name, folder, previous in (("low", low, None), ("high", high, str(tmp_path / "low"))):
        (tmp_path / name).mkdir()
        (expected,) = reference(folder, [files], [tmp_path / name / "case"], previous=previous)
    made = vx.predict(nnunet.load(high), files[0])
    assert (made.data == expected).float().mean() >= 0.9999


BY_TORCH = {
    "resampling_fn_seg": "resample_torch_fornnunet",
    "resampling_fn_seg_kwargs": {"is_seg": True, "force_separate_z": None},
}


@pytest.mark.parametrize("options", [{}, BY_TORCH], ids=["as usual", "by torch"])
def test_labels_of_a_cascade_count_where_the_image_is_empty(tmp_path, reference, capsys, monkeypatch, options):
    scaled = {"schemes": ("ZScoreNormalization",), "masked": (True,)}
    low, high = cascade(tmp_path, **scaled, **options)
    files = write_case(tmp_path / "scans", "case", shape=(33, 29, 25), empty=14)
    given = []
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(action="ignore"):
        from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

        own = nnUNetPredictor.predict_logits_from_preprocessed_data
        patch.setattr(
            nnUNetPredictor, "predict_logits_from_preprocessed_data", lambda self, data: given.append(data) or own(self, data)
        )
        for name, folder, previous in (("low", low, None), ("high", high, str(tmp_path / "low"))):
            (tmp_path / name).mkdir()
            (expected,) = reference(folder, [files], [tmp_path / name / "case"], previous=previous)
    outside = vx.ScalarImage(files[0]).data == 0
    assert vx.LabelMap(tmp_path / "low" / "case.nii.gz").data[outside].any()

    class Seen(type(nnunet.load(high).preceding)):
        def added(self, image, found, made):
            source = super().added(image, found, made)
            given.append(source.read(Box.of_shape(source.shape[1:])))
            return source

    monkeypatch.setattr("voxloom.integrations.nnunet.loading.Cascade", Seen)
    made = vx.predict(nnunet.load(high), files[0])
    *_, theirs, ours = given
    assert torch.allclose(ours[:1], theirs[:1], atol=1e-4)
    assert (ours[1:] == theirs[1:]).all()
    assert (made.data == expected).float().mean() >= 0.9999


def cascade(tmp_path, **options):
    """Write the folders of two stages."""
    configurations = {
        "3d_lowres": configuration((2.2, 2.0, 2.1), (8, 8, 8), next_stage="3d_cascade_fullres", **options),
        "3d_cascade_fullres": configuration((1.4, 1.2, 1.0), (16, 16, 16), previous_stage="3d_lowres", **options),
    }
    low = write_folder(tmp_path / "t__p__3d_lowres", configurations, "3d_lowres", mirrored=(0,))
    high = write_folder(
        tmp_path / "t__p__3d_cascade_fullres", configurations, "3d_cascade_fullres", extra_inputs=3, mirrored=(0,), seed=3
    )
    return low, high


@pytest.mark.slow
def test_a_cascade_runs_the_stage_before(tmp_path, reference, capsys, monkeypatch):
    low, high = cascade(tmp_path)
    files = write_case(tmp_path / "scans", "case", spacing=(0.9, 1.0, 1.3))
    (tmp_path / "low").mkdir()
    reference(low, [files], [tmp_path / "low" / "case"])
    (tmp_path / "high").mkdir()
    (expected,) = reference(high, [files], [tmp_path / "high" / "case"], previous=str(tmp_path / "low"))
    made = vx.predict(nnunet.load(high), files[0])
    assert (made.data == expected).float().mean() >= 0.9999
    again = vx.predict(nnunet.load(high, previous=low), files[0], memory_limit="40MiB")
    assert torch.equal(again.data, made.data)
    monkeypatch.setattr(
        "sys.argv", ["voxloom", "predict", f"nnunet:{high}", str(tmp_path / "scans"), "-o", str(tmp_path / "out")]
    )
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert not left.value.code
    assert torch.equal(vx.LabelMap(tmp_path / "out" / "case.nii.gz").data, made.data)
    low.rename(tmp_path / "elsewhere")
    with pytest.raises(ModelFileError, match="3d_lowres"):
        nnunet.load(high)


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "model", {"tiny": configuration((1.4, 1.2, 1.0), (16, 16, 16))}, "tiny", folds=(0, 2))


def test_the_spec_of_a_folder(folder):
    model = nnunet.load(folder, folds=0)
    assert model.spec.channels == ("CT",)
    assert [label.name for label in model.spec.labels] == ["liver", "tumour", "kidney"]
    assert model.spec.mirror_axes == (0, 1, 2)
    assert nnunet.load(folder, folds=[2], mirror=False).spec.mirror_axes == ()
    assert vx.ModelSpec.from_json(model.spec.to_json()) == model.spec
    assert len(nnunet.load(folder).model) == 2


def changed(path, **values):
    found = json.loads(path.read_text())
    found.update(values)
    path.write_text(json.dumps(found))


def test_what_is_wrong_with_a_folder_is_said(folder, tmp_path):
    with pytest.raises(ModelFileError, match="no fold 1 with a checkpoint_final.pth; there is 0, 2"):
        nnunet.load(folder, folds=1)
    with pytest.raises(ModelFileError, match="no fold with a checkpoint_best.pth"):
        nnunet.load(folder, checkpoint="checkpoint_best.pth")
    with pytest.raises(ModelFileError, match="plans.json: give the folder"):
        nnunet.load(tmp_path)
    (tmp_path / "plans.pkl").touch()
    with pytest.raises(ModelFileError, match="nnU-Net v1"):
        nnunet.load(tmp_path)
    files = write_case(tmp_path / "scans", "case", channels=2)
    with pytest.raises(SpecError, match="takes 1"):
        vx.predict(nnunet.load(folder), vx.Subject(CT=vx.ScalarImage(files)))
    good = (folder / "plans.json").read_text()
    for values, text in (
        ({"image_reader_writer": "NaturalImage2DIO"}, "NaturalImage2DIO"),
        ({"configurations": {"other": {}}}, "configuration tiny, but .* has other"),
        ({"configurations": {"tiny": configuration((1, 1, 1), (16, 16, 16), schemes=("Mine",))}}, "Mine"),
        ({"configurations": {"tiny": configuration((1, 1, 1), (16, 16, 16), kind="ResidualEncoderUNet")}}, "do not fit"),
    ):
        changed(folder / "plans.json", **values)
        with pytest.raises(ModelFileError, match=text):
            nnunet.load(folder)
        (folder / "plans.json").write_text(good)
    architecture = configuration((1, 1, 1), (16, 16, 16))
    architecture["architecture"]["network_class_name"] = "os.system"
    changed(folder / "plans.json", configurations={"tiny": architecture})
    with pytest.raises(ModelFileError, match="os.system, which is of none of the packages"):
        nnunet.load(folder)
    for key in ("patch_size", "spacing", "normalization_schemes"):
        without = configuration((1, 1, 1), (16, 16, 16))
        del without[key]
        changed(folder / "plans.json", configurations={"tiny": without})
        with pytest.raises(ModelFileError, match=key):
            nnunet.load(folder)
    (folder / "plans.json").write_text("{")
    with pytest.raises(ModelFileError, match="damaged"):
        nnunet.load(folder)


class Evil:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return (Path("/tmp/voxloom-was-here").touch, ())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"resampling_fn_probabilities_kwargs": RESAMPLED | {"order": 0}}, "resamples probabilities otherwise"),
        ({"resampling_fn_data_kwargs": RESAMPLED | {"force_separate_z": True}}, "resamples probabilities otherwise"),
        ({"resampling_fn_data_kwargs": RESAMPLED | {"order_z": 1}}, "order_z 1 in resampling_fn_data_kwargs"),
        ({"resampling_fn_data_kwargs": RESAMPLED | {"order": 2}}, "order 2 in resampling_fn_data_kwargs"),
        ({"resampling_fn_data_kwargs": RESAMPLED | {"order": "cubic"}}, "plans.json is not such as nnU-Net v2 writes"),
        ({"resampling_fn_data": "my_resampling"}, "resampling_fn_data 'my_resampling'"),
        ({"preprocessor_name": "Mine"}, "preprocessor_name 'Mine', and DefaultPreprocessor"),
        ({"normalization_schemes": []}, "0 normalization_schemes and 1 use_mask_for_norm for 1 channels"),
        ({"spacing": ["a", "b", "c"]}, "plans.json is not such as nnU-Net v2 writes"),
    ],
)
def test_plans_that_are_not_done_exactly_are_refused(folder, values, message):
    plans = json.loads((folder / "plans.json").read_text())
    plans["configurations"]["tiny"] |= values
    (folder / "plans.json").write_text(json.dumps(plans))
    with pytest.raises(ModelFileError, match=message):
        nnunet.load(folder)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("plans.json", {"label_manager": "Mine"}, "label_manager 'Mine', and LabelManager"),
        ("plans.json", {"transpose_forward": ["x", 1, 2]}, "plans.json is not such"),
        ("dataset.json", {"labels": {"0": "background", "1": "liver"}}, "dataset.json is not such"),
        ("dataset.json", [], "dataset.json is not such"),
        ("dataset.json", {"labels": None}, "dataset.json has no labels"),
    ],
)
def test_the_file_that_is_wrong_is_named(folder, name, value, message):
    if isinstance(value, dict):
        changed(folder / name, **value)
    else:
        (folder / name).write_text(json.dumps(value))
    with pytest.raises(ModelFileError, match=message):
        nnunet.load(folder)


def test_names_of_channels_may_stand_in_the_place_of_their_numbers(folder):
    changed(folder / "dataset.json", channel_names={"CT": "0"})
    assert nnunet.load(folder).spec.channels == ("CT",)


def test_checkpoints_that_bring_code_are_refused(folder):
    path = folder / "fold_0" / "checkpoint_final.pth"
    state = torch.load(path, weights_only=False)
    torch.save({**state, "logging": Evil()}, path)
    with pytest.raises(ModelFileError, match="allow_pickle=True"):
        nnunet.load(folder, folds=0)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelFileError, match="cannot be read"):
        nnunet.load(folder, folds=0)
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ModelFileError):
        nnunet.load(folder, folds=0)


def test_names_of_cases(tmp_path):
    for name in ("b_0001.nii.gz", "b_0000.nii.gz", "a_b_0000.nii.gz", "a_b_0001.nii.gz", "notes.txt"):
        (tmp_path / name).touch()
    found = nnunet.cases_in(tmp_path, {"file_ending": ".nii.gz"})
    assert {case: [path.name for path in files] for case, files in found.items()} == {
        "a_b": ["a_b_0000.nii.gz", "a_b_0001.nii.gz"],
        "b": ["b_0000.nii.gz", "b_0001.nii.gz"],
    }
    (tmp_path / "a_b_0000.nii.gz").unlink()
    with pytest.raises(ModelFileError, match="a_b in .* has no channel 0000"):
        nnunet.cases_in(tmp_path)


def test_the_command(folder, tmp_path, capsys, monkeypatch):
    from voxloom.cli import main

    def run(*words):
        monkeypatch.setattr("sys.argv", ["voxloom", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            main()
        return left.value.code or 0

    for name, seed in (("one", 1), ("two", 2)):
        write_case(tmp_path / "scans", name, seed=seed)
    assert run("predict", f"nnunet:{folder}", tmp_path / "scans", "-o", tmp_path / "out", "--folds", 0) == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("*.nii.gz")) == ["one.nii.gz", "two.nii.gz"]
    expected = vx.predict(nnunet.load(folder, folds=0), tmp_path / "scans" / "one_0000.nii.gz")
    assert torch.equal(vx.LabelMap(tmp_path / "out" / "one.nii.gz").data, expected.data)
    capsys.readouterr()
    (tmp_path / "scans" / "two_0000.nii.gz").rename(tmp_path / "scans" / "second.nii.gz")
    assert run("predict", f"nnunet:{folder}", tmp_path / "scans", "-o", tmp_path / "out", "--folds", 0) == 0
    assert "second.nii.gz: left out, since they are not named as nnU-Net names them" in capsys.readouterr().err
    (tmp_path / "others").mkdir()
    vx.ScalarImage(tmp_path / "scans" / "one_0000.nii.gz").save(tmp_path / "others" / "three_0000.mha")
    assert run("predict", f"nnunet:{folder}", tmp_path / "others", "-o", tmp_path / "out", "--folds", 0) == 0
    assert torch.equal(vx.LabelMap(tmp_path / "out" / "three.nii.gz").data, expected.data)
    capsys.readouterr()
    assert run("plan", f"nnunet:{folder}", tmp_path / "scans", "--folds", 1) == 1
    assert "no fold 1" in capsys.readouterr().err


SMALL_SHARED_MEMORY = """
mount -t tmpfs -o size=1m tmpfs /dev/shm || exit 77
"$@" &
while kill -0 $! 2>/dev/null; do
    ls /dev/shm
    pgrep -P $!
    sleep 0.02
done
wait $!
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("unshare") is None, reason="unshare, of Linux, makes a /dev/shm of one's own")
def test_a_container_with_little_shared_memory_is_enough(folder, tmp_path):
    """One process does it all: no workers, and not a byte of shared memory."""
    write_case(tmp_path / "scans", "case")
    options = ("--quiet", "predict", f"nnunet:{folder}", tmp_path / "scans", "-o", tmp_path / "out")
    command = [sys.executable, "-m", "voxloom", *options]
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "bash", "-c", SMALL_SHARED_MEMORY, "bash", *command],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode in (1, 77) and ("unshare" in done.stderr or "mount" in done.stderr):
        pytest.skip("this machine does not let a user have a /dev/shm of one's own")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "out" / "case.nii.gz").exists()
