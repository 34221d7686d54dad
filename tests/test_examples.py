"""Examples do what they say, in a shorter form."""

import importlib.util
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


def test_a_network_learns_the_labels_of_heads_on_disk(train_unet, tmp_path):
    losses, dice = train_unet.main(["--folder", str(tmp_path), "--subjects", "6", "--epochs", "6", "--workers", "2"])
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.5 * losses[0]
    # With twelve heads and epochs the ventricles and the lesion are found as well.
    large = ("scalp", "skull", "cerebrospinal fluid", "grey matter", "white matter")
    assert min(dice[name] for name in large) > 0.8
    prediction, truth = vx.LabelMap(tmp_path / "prediction.nii.gz"), vx.LabelMap(tmp_path / "head06_labels.nii.gz")
    assert (prediction.affine == truth.affine).all()
    assert (prediction.data == truth.data).float().mean() > 0.95


def test_tissues_are_found_by_the_command_line_where_they_were_not_learned(tmp_path):
    segment = load("segment_mni152")
    scores = segment.main(["--folder", str(tmp_path), "--steps", "80"])
    assert min(scores["grey matter"], scores["white matter"]) > 0.6
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "t1.nii.gz",
        "tissue.json",
        "tissue.nii.gz",
        "tissue.png",
        "tissue.pt2",
        "tissue_truth.nii.gz",
    ]
    assert vx.LabelMap(tmp_path / "tissue.nii.gz").data.dtype == torch.uint8
    picture = matplotlib.image.imread(tmp_path / "tissue.png")[..., :3]
    coloured = (picture.max(axis=2) - picture.min(axis=2)) > 0.2
    assert 0.05 < coloured.mean() < 0.5


def test_a_training_that_is_taken_up_again_goes_on_as_it_would_have(train_unet, tmp_path):
    alone = ["--folder", str(tmp_path / "one"), "--subjects", "2", "--workers", "1"]
    other = ["--folder", str(tmp_path / "two"), "--subjects", "2", "--workers", "0"]
    torch.set_num_threads(2)
    losses, _ = train_unet.main([*alone, "--epochs", "2"])
    train_unet.main([*other, "--epochs", "1"])
    again, _ = train_unet.main([*other, "--epochs", "2"])
    assert again == pytest.approx(losses, rel=1e-4)
