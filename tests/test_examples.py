"""Examples do what they say, in a shorter form."""

import importlib.util
from pathlib import Path

import pytest
import torch

import voxloom as vx

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def train_unet():
    spec = importlib.util.spec_from_file_location("train_unet", EXAMPLES / "train_unet.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


def test_a_training_that_is_taken_up_again_goes_on_as_it_would_have(train_unet, tmp_path):
    alone = ["--folder", str(tmp_path / "one"), "--subjects", "2", "--workers", "1"]
    other = ["--folder", str(tmp_path / "two"), "--subjects", "2", "--workers", "0"]
    torch.set_num_threads(2)
    losses, _ = train_unet.main([*alone, "--epochs", "2"])
    train_unet.main([*other, "--epochs", "1"])
    again, _ = train_unet.main([*other, "--epochs", "2"])
    assert again == pytest.approx(losses, rel=1e-4)
