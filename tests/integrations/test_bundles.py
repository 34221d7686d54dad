"""Bundles of MONAI give the labels that MONAI's own `bundle run` gives, and what is not understood is named."""

import copy
import json

import monai.bundle
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from typer.testing import CliRunner

import voxloom as vx
from slow import slow
from voxloom.cli import main as _  # noqa: F401 - the command is imported once
from voxloom.cli.commands import app
from voxloom.errors import ModelFileError
from voxloom.integrations.monai import load

# Spacings at which no voxel lies just between two of the model's, where the nearest is a matter of the last bit.
LPS = np.array([[-0.8, 0, 0, 30], [0, -0.93, 0, 20], [0, 0, 2.13, -15], [0, 0, 0, 1]])
TURNED = np.eye(4)
TURNED[:3, :3] = Rotation.from_euler("xyz", [2, 3, 1.5], degrees=True).as_matrix()
# Thick slices at an angle: in the single precision of a header the axes of scan and model are not quite parallel.
THICK = np.eye(4)
THICK[:3, :3] = Rotation.from_euler("xyz", [8, 3, -2], degrees=True).as_matrix() @ np.diag([1, 1, 2.2])
BEFORE = [
    {"_target_": "LoadImaged", "keys": "@image_key"},
    {"_target_": "EnsureChannelFirstd", "keys": "@image_key"},
    {"_target_": "Orientationd", "keys": "@image_key", "axcodes": "RAS"},
    {"_target_": "Spacingd", "keys": "@image_key", "pixdim": [1.1, 1.0, 1.6], "mode": "bilinear"},
    {"_target_": "ScaleIntensityRanged", "keys": "image", "a_min": -57, "a_max": 164, "b_min": 0, "b_max": 1, "clip": True},
    {"_target_": "EnsureTyped", "keys": "image"},
]
SOFTMAX = {"_target_": "Activationsd", "keys": "pred", "softmax": True}
INVERT = {"_target_": "Invertd", "keys": "pred", "transform": "@preprocessing", "orig_keys": "image", "nearest_interp": False}
SIGMOID = {"_target_": "Activationsd", "keys": "pred", "sigmoid": True}
THRESHOLD = {"_target_": "AsDiscreted", "keys": "pred", "threshold": 0.5}
ARGMAX = {"_target_": "AsDiscreted", "keys": "pred", "argmax": True}
CROP = {"_target_": "CropForegroundd", "keys": "image", "source_key": "image"}
SAVE = {
    "_target_": "SaveImaged",
    "keys": "pred",
    "output_dir": "$@bundle_root + '/eval'",
    "output_dtype": "$numpy.int16",
    "separate_folder": False,
    "print_log": False,
}
SLIDING = {"_target_": "SlidingWindowInferer", "roi_size": [16, 16, 12], "sw_batch_size": 2, "overlap": 0.5}
BRATS = "$lambda x: torch.where(x[[2]] > 0, 4, torch.where(x[[0]] > 0, 1, torch.where(x[[1]] > 0, 2, 0)))"


def of(**changes):
    """A configuration as bundles have it."""
    return {
        "imports": ["$import glob", "$import numpy"],
        "bundle_root": ".",
        "image_key": "image",
        "datalist": "$list(sorted(glob.glob(@bundle_root + '/scans/*.nii.gz')))",
        "device": "$torch.device('cpu')",
        "network_def": {
            "_target_": "UNet",
            "spatial_dims": 3,
            "in_channels": 1,
            "out_channels": 3,
            "channels": [8, 16],
            "strides": [2],
            "num_res_units": 1,
            "norm": "batch",
        },
        "network": "$@network_def.to(@device)",
        "preprocessing": {"_target_": "Compose", "transforms": BEFORE},
        "dataset": {"_target_": "Dataset", "data": "$[{'image': i} for i in @datalist]", "transform": "@preprocessing"},
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1},
        "inferer": SLIDING,
        "postprocessing": {"_target_": "Compose", "transforms": [SOFTMAX, INVERT, ARGMAX, SAVE]},
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
        },
        "checkpointloader": {
            "_target_": "CheckpointLoader",
            "load_path": "$@bundle_root + '/models/model.pt'",
            "load_dict": {"model": "@network"},
        },
        "initialize": ["$@checkpointloader(@evaluator)"],
        "run": ["$@evaluator.run()"],
    } | changes


def transforms(*steps):
    return {"_target_": "Compose", "transforms": list(steps)}


def write_bundle(folder, configuration, channels=1, affine=LPS, shape=(40, 36, 22)):
    for name in ("configs", "models", "scans"):
        (folder / name).mkdir()
    (folder / "configs" / "inference.json").write_text(json.dumps(configuration))
    metadata = {
        "version": "0.1",
        "network_data_format": {
            "inputs": {"image": {"channel_def": {str(number): f"c{number}" for number in range(channels)}}},
            "outputs": {"pred": {"channel_def": {"0": "background", "1": "spleen", "2": "liver"}}},
        },
    }
    (folder / "configs" / "metadata.json").write_text(json.dumps(metadata))
    torch.manual_seed(0)
    network = monai.bundle.ConfigParser(configuration).get_parsed_content("network_def")
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    torch.save(network.state_dict(), folder / "models" / "model.pt")
    rng = np.random.default_rng(3)
    smooth = torch.from_numpy(rng.normal(size=(1, channels, *(size // 3 + 2 for size in shape)))).float()
    data = torch.nn.functional.interpolate(smooth, shape, mode="trilinear")[0] * 150 + 40
    data[:, :3] = 0
    vx.ScalarImage(data, affine=affine).save(folder / "scans" / "case.nii.gz")


def run_by_monai(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monai.bundle.run(config_file=str(folder / "configs" / "inference.json"), bundle_root=str(folder))
    return vx.LabelMap(next((folder / "eval").glob("*.nii.gz")))


NORMALIZED = [
    *BEFORE[:4],
    {"_target_": "NormalizeIntensityd", "keys": "image", "nonzero": True},
    {"_target_": "ScaleIntensityd", "keys": "image", "minv": -1.0, "maxv": 1.0},
]
FOUR = {"_target_": "SegResNet", "in_channels": 4, "out_channels": 3, "init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]}
CASES = {
    "spleen": of(),
    "oblique": of(),
    "oblique, thick slices": of(preprocessing=transforms(*BEFORE[:3], BEFORE[3] | {"pixdim": [1, 1, 1]}, *BEFORE[4:])),
    "gaussian": of(inferer=SLIDING | {"mode": "gaussian"}),
    "whole body": of(
        inferer=SLIDING | {"mode": "gaussian", "overlap": 0.25},
        preprocessing=transforms(*NORMALIZED),
        postprocessing=transforms(SOFTMAX, ARGMAX, INVERT | {"nearest_interp": True}, SAVE),
    ),
    "native": of(
        preprocessing=transforms(*BEFORE[:2], {"_target_": "NormalizeIntensityd", "keys": "image"}),
        postprocessing=transforms(ARGMAX, SAVE),
    ),
    "foreground": of(
        preprocessing=transforms(
            *BEFORE[:3], {"_target_": "CropForegroundd", "keys": "image", "source_key": "image"}, *BEFORE[4:]
        ),
    ),
    "thresholds": of(
        postprocessing=transforms(
            {"_target_": "Activationsd", "keys": "pred", "sigmoid": True},
            INVERT,
            {"_target_": "AsDiscreted", "keys": "pred", "threshold": 0.5},
            SAVE,
        )
    ),
    "four channels": of(
        network_def=FOUR,
        preprocessing=transforms(
            *BEFORE[:2], {"_target_": "NormalizeIntensityd", "keys": "image", "nonzero": True, "channel_wise": True}
        ),
    ),
    "code": of(
        network_def=FOUR,
        preprocessing=transforms(
            *BEFORE[:3],
            BEFORE[3] | {"pixdim": "$[1.1 + 0.0, 1.0, 1.6]"},
            {"_target_": "NormalizeIntensityd", "keys": "image", "nonzero": True, "channel_wise": True},
        ),
        postprocessing=transforms(
            {"_target_": "Activationsd", "keys": "pred", "sigmoid": True},
            INVERT,
            {"_target_": "AsDiscreted", "keys": "pred", "threshold": 0.5},
            {"_target_": "Lambdad", "keys": "pred", "func": BRATS},
            SAVE,
        ),
    ),
}
CASES |= {
    # The grid goes on beyond the last voxels, and windows begin where MONAI's rounding has them.
    "beyond the border": of(
        roi=[10, 10, 10],
        inferer=SLIDING | {"roi_size": "%roi", "overlap": 0.8},
        preprocessing=transforms(*BEFORE[:3], BEFORE[3] | {"pixdim": [1.77, 2.03, 2.41]}, *BEFORE[4:]),
    ),
    "softmax after all": of(postprocessing=transforms(INVERT, SOFTMAX, ARGMAX, SAVE)),
    "sigmoid after all": of(
        postprocessing=transforms(
            INVERT,
            {"_target_": "Activationsd", "keys": "pred", "sigmoid": True},
            {"_target_": "AsDiscreted", "keys": "pred", "threshold": 0.6},
            SAVE,
        )
    ),
    "sigmoid after all, with a foreground": of(
        preprocessing=transforms(*BEFORE[:3], CROP, *BEFORE[4:]),
        postprocessing=transforms(INVERT, SIGMOID, THRESHOLD | {"threshold": 0.6}, SAVE),
    ),
    "nearest": of(
        preprocessing=transforms(*BEFORE[:3], BEFORE[3] | {"pixdim": [1.13, 1.0, 1.6], "mode": "nearest"}, *BEFORE[4:])
    ),
    "splines": of(
        preprocessing=transforms(*BEFORE[:3], BEFORE[3] | {"mode": 3}, *BEFORE[4:]),
        postprocessing=transforms(SOFTMAX, INVERT | {"nearest_interp": True}, ARGMAX, SAVE),
    ),
}
OF_FOUR_CHANNELS = ("four channels", "code")


@pytest.mark.filterwarnings("ignore")  # of MONAI's own
@pytest.mark.parametrize("name", [slow(name) if name in OF_FOUR_CHANNELS else name for name in CASES])
def test_labels_are_those_of_bundle_run(name, tmp_path, monkeypatch):
    channels = 4 if name in OF_FOUR_CHANNELS else 1
    write_bundle(tmp_path, CASES[name], channels, {"oblique": TURNED, "oblique, thick slices": THICK}.get(name, np.eye(4)) @ LPS)
    theirs = run_by_monai(tmp_path, monkeypatch)
    model = load(tmp_path, allow_code=name == "code")
    ours = vx.predict(model, tmp_path / "scans" / "case.nii.gz", output=tmp_path / "ours.nii.gz")
    assert np.allclose(ours.affine, theirs.affine, atol=1e-4)
    assert ours.shape == theirs.shape
    assert len(ours.data.unique()) > 1
    assert (ours.data != theirs.data).float().mean() <= 1e-4
    again = vx.predict(model, tmp_path / "scans" / "case.nii.gz", memory_limit="40MiB")
    assert torch.equal(again.data, ours.data)


def test_a_bundle_says_what_it_expects(tmp_path):
    write_bundle(tmp_path, of())
    spec = load(tmp_path).spec
    assert (spec.orientation, spec.spacing, spec.fits, spec.order) == ("RAS", (1.1, 1.0, 1.6), "monai", 1)
    assert (spec.patch_size, spec.patch_overlap, spec.overlap_mode) == ((16, 16, 12), (8, 8, 6), "average")
    assert (spec.activation, spec.activates, spec.reduce, spec.interpolation) == ("softmax", "sums", "argmax", "linear")
    assert [label.name for label in spec.labels] == ["spleen", "liver"]
    assert vx.ModelSpec.from_json(spec.to_json()) == spec


@pytest.mark.filterwarnings("ignore")
def test_the_command_runs_a_bundle(tmp_path):
    write_bundle(tmp_path, of())
    arguments = ["predict", f"monai:{tmp_path}", str(tmp_path / "scans"), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    expected = vx.predict(load(tmp_path), tmp_path / "scans" / "case.nii.gz")
    assert torch.equal(vx.LabelMap(tmp_path / "out" / "case.nii.gz").data, expected.data)
    sidecar = json.loads((tmp_path / "out" / "case.json").read_text())
    assert [label["name"] for label in sidecar["labels"]] == ["spleen", "liver"]


def changed(place, value):
    configuration = copy.deepcopy(of())
    *parts, last = place
    part = configuration
    for each in parts:
        part = part[each]
    part[last] = value
    return configuration


@pytest.mark.parametrize(
    ("configuration", "message"),
    [
        (
            changed(["network_def", "out_channels"], "$1 + 2"),
            r"network_def#out_channels in .* '\$1 \+ 2', which is code: allow_code",
        ),
        (changed(["network_def", "_target_"], "os.system"), "os.system, of a package that is not MONAI's, which is code"),
        (changed(["network_def", "_target_"], "NoNet"), "NoNet in .* cannot be found"),
        (changed(["network_def", "nonsense"], 5), "UNet in .* cannot be made"),
        (changed(["network_def"], 5), "has no network with a _target_"),
        (changed(["inferer", "_target_"], "SliceInferer"), "inferer in .*SliceInferer: this inferer is not understood"),
        (changed(["inferer", "reduce"], "argmax"), "its argument reduce is not understood"),
        (
            of(
                preprocessing=transforms(*BEFORE[:3], CROP, *BEFORE[4:]),
                postprocessing=transforms(INVERT, ARGMAX | {"argmax": False, "threshold": 0.0}, SAVE),
            ),
            "a threshold above 0 is understood",
        ),
        (changed(["preprocessing", "transforms", 5, "_target_"], "RandFlipd"), "transforms#5 .*RandFlipd: this transform is not"),
        (changed(["preprocessing", "transforms", 3, "keys"], ["image", "label"]), "transforms image, label, where one image"),
        (changed(["preprocessing", "transforms", 3, "diagonal"], True), "diagonal, scale_extent"),
        (changed(["preprocessing", "transforms", 4, "surprise"], 1), "its argument surprise is not understood"),
        (changed(["preprocessing", "transforms", 3, "pixdim"], "@nowhere"), "refers to '@nowhere', which is not there"),
        (changed(["preprocessing"], {"_target_": "Compose"}), "preprocessing in .* no Compose with a list"),
        (changed(["postprocessing", "transforms", 2, "to_onehot"], 3), "to_onehot and rounding"),
        (changed(["postprocessing", "transforms", 2, "threshold"], 0.5), "one of argmax and threshold is understood, once"),
        (changed(["postprocessing", "transforms", 3], {"_target_": "AsDiscreted", "keys": "pred", "threshold": 1}), "once"),
        (changed(["postprocessing", "transforms", 2, "keys"], "label"), "what is understood is made of 'pred'"),
        (changed(["preprocessing", "transforms", 4, "a_min"], 500), "a_min must be less than a_max"),
        (
            changed(["preprocessing", "transforms", 2], {"_target_": "Orientationd", "keys": "image"}),
            "argument axcodes is missing",
        ),
        (changed(["inferer"], {"_target_": "SlidingWindowInferer"}), "its argument roi_size is missing"),
        (changed(["inferer", "overlap"], "@inferer#overlap"), "refers to itself"),
        (changed(["inferer", "overlap"], "half"), "its overlap is 'half', which is no number"),
        (changed(["inferer", "overlap"], 1.5), "overlap must be one fraction"),
        (changed(["preprocessing", "transforms", 3, "padding_mode"], "zeros"), "only as what is at its border"),
        (changed(["preprocessing", "transforms", 3, "mode"], 3), "not by splines"),
        (
            changed(["preprocessing", "transforms", 2, "labels"], [["R", "L"], ["A", "P"], ["S", "I"]]),
            "its labels are understood",
        ),
        (changed(["preprocessing", "transforms", 4, "b_min"], None), "understood only together"),
        (changed(["preprocessing", "transforms", 4, "b_min"], "low"), "its b_min is 'low', which is no number"),
        (changed(["preprocessing", "transforms", 4, "a_max"], [1, 2]), "where one number is understood"),
        (changed(["preprocessing", "transforms", 3, "pixdim"], []), "which is no number"),
        (changed(["inferer", "overlap"], [0.5, None, 0.5]), "its overlap is None, which is no number"),
        (changed(["postprocessing"], transforms(INVERT, SIGMOID, SIGMOID, THRESHOLD)), "one activation, softmax or sigmoid"),
        (
            of(preprocessing=transforms(*BEFORE[:3], CROP, *BEFORE[4:]), postprocessing=transforms(INVERT, SIGMOID, THRESHOLD)),
            "threshold above 0.5",
        ),
        (
            of(
                preprocessing=transforms(*BEFORE[:3], CROP, *BEFORE[4:]),
                postprocessing=transforms(INVERT | {"nearest_interp": True}, SIGMOID, THRESHOLD),
            ),
            "threshold above 0.5",
        ),
        (changed(["preprocessing", "transforms", 4, "a_min"], None), "a_min must be less than a_max"),
        (changed(["preprocessing", "transforms", 0, "as_closest_canonical"], True), "as_closest_canonical is not understood"),
        (changed(["preprocessing", "transforms", 0, "dtype"], "$numpy.uint8"), "its dtype is '.numpy.uint8', and float32"),
        (changed(["preprocessing", "transforms", 5, "dtype"], "torch.int16"), "its dtype is 'torch.int16'"),
        (changed(["postprocessing", "transforms", 2, "dim"], 1), "with dim 0"),
        (changed(["postprocessing", "transforms", 3, "scale"], 255), "scale is not understood"),
        (
            changed(["postprocessing"], transforms({"_target_": "CastToTyped", "keys": "pred", "dtype": "$torch.uint8"}, ARGMAX)),
            "its dtype is '.torch.uint8'",
        ),
        (changed(["postprocessing"], transforms(INVERT, SOFTMAX, SAVE)), "only before an AsDiscrete"),
        (
            changed(["postprocessing"], transforms(INVERT, SOFTMAX, ARGMAX | {"argmax": False, "threshold": 0.5}, SAVE)),
            "only before argmax, or as sigmoid before a threshold",
        ),
        (changed(["postprocessing", "transforms", 2], {"_target_": "Lambdad", "keys": "pred", "func": BRATS}), "allow_code=True"),
    ],
)
def test_what_is_not_understood_is_named(configuration, message, tmp_path):
    write_bundle(tmp_path, of())
    (tmp_path / "configs" / "inference.json").write_text(json.dumps(configuration))
    with pytest.raises(ModelFileError, match=message):
        load(tmp_path)


def test_disabled_steps_and_lists_with_a_value_for_each_key_are_followed(tmp_path):
    scaled = BEFORE[4] | {"_disabled_": "@skipped"}
    listed = {"_target_": "AsDiscreted", "keys": ["label", "pred"], "argmax": [False, True], "to_onehot": [None, None]}
    configuration = of(
        skipped=True,
        preprocessing=transforms(*BEFORE[:4], scaled),
        postprocessing=transforms(SOFTMAX | {"softmax": [False]}, INVERT, listed, SAVE),
    )
    write_bundle(tmp_path, configuration)
    spec = load(tmp_path).spec
    assert (spec.intensity, spec.activation, spec.reduce) == ((), None, "argmax")


@pytest.mark.parametrize("metadata", [[], {"network_data_format": None}, {"network_data_format": {"outputs": {"pred": None}}}])
def test_metadata_that_are_not_as_they_should_be_do_no_harm(metadata, tmp_path):
    write_bundle(tmp_path, of())
    (tmp_path / "configs" / "metadata.json").write_text(json.dumps(metadata))
    assert load(tmp_path).spec.labels == ()


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((SOFTMAX, ARGMAX, INVERT, SAVE), "interpolates labels between one another"),
        ((ARGMAX, SAVE), "has no Invertd, so that MONAI may save labels on the grid of the model"),
        (
            (INVERT, ARGMAX, {"_target_": "Lambdad", "keys": "pred", "func": "$lambda x: x"}, SAVE),
            "a block of the volume at a time",
        ),
    ],
)
def test_what_is_done_otherwise_than_by_monai_is_said(steps, message, tmp_path):
    write_bundle(tmp_path, of(postprocessing=transforms(*steps)))
    with pytest.warns(RuntimeWarning, match=message):
        load(tmp_path, allow_code=True)


@pytest.mark.filterwarnings("ignore:.*a block of the volume at a time:RuntimeWarning")
def test_a_function_is_followed_by_nothing_that_would_be_lost(tmp_path):
    flip = {"_target_": "Lambdad", "keys": "pred", "func": "$lambda x: x.flip(0)"}
    write_bundle(tmp_path, of(postprocessing=transforms(SOFTMAX, flip, ARGMAX)))
    with pytest.raises(ModelFileError, match="it comes after a function"):
        load(tmp_path, allow_code=True)


@pytest.mark.parametrize(("option", "value"), [("--folds", "0"), ("--weights", "w.pt")])
def test_options_that_a_bundle_does_not_have_are_refused(option, value, tmp_path):
    write_bundle(tmp_path, of())
    arguments = ["predict", f"monai:{tmp_path}", str(tmp_path / "scans"), "-o", str(tmp_path / "out"), option, value]
    result = CliRunner().invoke(app, arguments)
    assert f"{option} was given, which is not for a bundle" in str(result.exception)


def test_folders_that_are_no_bundles_are_named(tmp_path):
    with pytest.raises(ModelFileError, match=r"inference.json: give the folder of a MONAI bundle"):
        load(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "inference.json").write_text("{")
    with pytest.raises(ModelFileError, match="cannot be read"):
        load(tmp_path)
    (tmp_path / "configs" / "inference.json").write_text(json.dumps(of()))
    with pytest.raises(ModelFileError, match=r"no file of weights .*model.pt"):
        load(tmp_path)


def test_code_is_not_run_unless_that_is_allowed(tmp_path):
    write_bundle(tmp_path, of(imports=[f"$open({str(tmp_path / 'ran')!r}, 'w').close()"]))
    load(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore")
def test_the_inferer_takes_the_place_of_monais_in_a_configuration(tmp_path, monkeypatch):
    ours = of(inferer=SLIDING | {"_target_": "voxloom.integrations.monai.VoxloomInferer", "mode": "gaussian"})
    found = []
    for name, configuration in (("ours", ours), ("theirs", of(inferer=SLIDING | {"mode": "gaussian"}))):
        (tmp_path / name).mkdir()
        write_bundle(tmp_path / name, configuration)
        found.append(run_by_monai(tmp_path / name, monkeypatch).data)
    assert (found[0] != found[1]).float().mean() <= 1e-4
    assert len(found[0].unique()) > 1
