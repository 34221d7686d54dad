"""Examples do what they say, in a shorter form."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
import torch

import voxloom as vx

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def train_unet():
    return load("train_unet")


WRITTEN = {"t1.nii.gz", "tissue.json", "tissue.nii.gz", "tissue.png", "tissue.pt2", "tissue_truth.nii.gz"}


def check_tissues(folder):
    assert {path.name for path in folder.iterdir()} == WRITTEN
    found, scan = vx.LabelMap(folder / "tissue.nii.gz"), vx.ScalarImage(folder / "t1.nii.gz")
    assert found.data.dtype == torch.uint8
    assert (found.affine == scan.affine).all()
    picture = matplotlib.image.imread(folder / "tissue.png")[..., :3]
    coloured = (picture.max(axis=2) - picture.min(axis=2)) > 0.2
    assert 0.05 < coloured.mean() < 0.5


@pytest.mark.slow
def test_tissues_are_found_by_the_command_line_where_they_were_not_learned(tmp_path):
    scores = load("segment_mni152").main(["--folder", str(tmp_path), "--resolution", "2", "--steps", "60"])
    assert min(scores["grey matter"], scores["white matter"]) > 0.7
    assert scores["fluid"] > 0.3
    check_tissues(tmp_path)


@pytest.mark.slow
def test_a_network_learns_the_labels_of_heads_on_disk(train_unet, tmp_path, monkeypatch):
    for name, size in (("HEAD", 40), ("FIELD", 48), ("PATCH", 24)):
        monkeypatch.setattr(train_unet, name, size)
    losses, dice = train_unet.main(["--folder", str(tmp_path), "--subjects", "4", "--epochs", "6", "--workers", "2"])
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.6 * losses[0]
    # With twelve heads and epochs the ventricles and the lesion are found as well.
    large = ("scalp", "skull", "cerebrospinal fluid", "grey matter", "white matter")
    assert min(dice[name] for name in large) > 0.7
    prediction, truth = vx.LabelMap(tmp_path / "prediction.nii.gz"), vx.LabelMap(tmp_path / "head04_labels.nii.gz")
    assert (prediction.affine == truth.affine).all()
    assert (prediction.data == truth.data).float().mean() > 0.95


@pytest.mark.slow
def test_a_training_that_is_resumed_goes_on_as_it_would_have(train_unet, tmp_path, monkeypatch):
    for name, size in (("HEAD", 24), ("FIELD", 32), ("PATCH", 16)):
        monkeypatch.setattr(train_unet, name, size)
    alone = ["--folder", str(tmp_path / "one"), "--subjects", "2", "--workers", "1"]
    other = ["--folder", str(tmp_path / "two"), "--subjects", "2", "--workers", "0"]
    losses, _ = train_unet.main([*alone, "--epochs", "2"])
    train_unet.main([*other, "--epochs", "1"])
    again, _ = train_unet.main([*other, "--epochs", "2"])
    assert again == pytest.approx(losses, rel=1e-4)
    assert vx.LabelMap(tmp_path / "two" / "prediction.nii.gz").spatial_shape == (32, 32, 32)


@pytest.mark.slow
def test_from_dicom_to_segments_of_a_model_that_knows_what_it_expects(tmp_path):
    dice = load("dicom_to_segments").main(tmp_path / "out", steps=30)
    assert dice > 0.7
    written = {"series", "tissue.dcm", "tissue.json", "tissue.png", "tissue.pt2", "tissue.seg.nrrd"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == written
    picture = matplotlib.image.imread(tmp_path / "out" / "tissue.png")[..., :3]
    assert 0.05 < ((picture.max(axis=2) - picture.min(axis=2)) > 0.1).mean() < 0.6


def train_ddp(folder, *more):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        EXAMPLES / "train_ddp.py",
        "--folder",
        folder,
    ]
    subprocess.run([*command, *more], check=True, timeout=240, capture_output=True)
    return [[json.loads(line) for line in (folder / f"losses_{rank}.jsonl").read_text().splitlines()] for rank in range(2)]


@pytest.mark.slow
def test_two_processes_train_on_patches_of_their_own_and_go_on_with_the_same_losses(tmp_path):
    whole = train_ddp(tmp_path / "whole")
    assert [len(each) for each in whole] == [12, 12]
    for steps in zip(*whole, strict=True):
        places = [{tuple(place) for place in step["patches"]} for step in steps]
        assert not places[0] & places[1]
        assert steps[0]["loss"] != steps[1]["loss"]
    train_ddp(tmp_path / "parts", "--stop-after", "5")  # in mid-epoch
    assert train_ddp(tmp_path / "parts") == whole
