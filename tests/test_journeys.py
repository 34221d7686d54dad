"""What newcomers tripped over: each is an error or a result that they understand now."""

import json
import sys

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import voxloom as vx
from voxloom.cli import commands as cli
from voxloom.errors import ModelFileError, SizeError, SpaceError, SubjectError


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "newcomer.py").write_text("import torch\ndef two(batch):\n    return torch.cat([0.5 - batch, batch], 1)\n")
    vx.ScalarImage(torch.rand(1, 24, 24, 24)).save("scan_0000.nii.gz")

    def call(*arguments):
        return CliRunner().invoke(cli.app, [str(each) for each in arguments])

    yield call
    sys.modules.pop("newcomer", None)


def test_a_mask_of_another_scan_is_an_error_and_an_empty_one_a_warning(tmp_path):
    image = vx.ScalarImage(torch.rand(1, 24, 24, 24))
    far = np.eye(4)
    far[0, 3] = 5000
    model = torch.nn.Identity()
    with pytest.raises(SpaceError, match=r"mask lies elsewhere.* 5000 mm apart"):
        vx.predict(model, image, patch_size=8, mask=vx.LabelMap(torch.ones(1, 24, 24, 24, dtype=torch.uint8), affine=far))
    beside = np.eye(4)
    beside[1, 3] = 24
    with pytest.raises(SpaceError, match="does not touch"):
        vx.predict(model, image, patch_size=8, mask=vx.LabelMap(torch.ones(1, 24, 24, 24, dtype=torch.uint8), affine=beside))
    with pytest.warns(RuntimeWarning, match="no voxel in the image: nothing is computed, and all of the result is 0"):
        made = vx.predict(model, image, patch_size=8, mask=torch.zeros(24, 24, 24), output=tmp_path / "out.nii")
    assert not made.data.any()
    assert "no voxel" in json.loads((tmp_path / "out.json").read_text())["warnings"][0]


def test_a_report_is_written_of_what_is_there_already(run, tmp_path):
    spec = vx.ModelSpec(labels=(vx.Label(1, "lung", color=(80, 180, 220)),))
    (tmp_path / "spec.json").write_text(str(json.dumps(spec.to_json())))
    options = ("--patch-size", 8, "--labels", "--spec", "spec.json", "-o", "out.nii")
    command = ("predict", "newcomer:two", "scan_0000.nii.gz", *options)
    run(*command)
    assert not (tmp_path / "out.html").exists()
    done = run(*command, "--report")
    assert "is complete; out.html" in done.output
    page = (tmp_path / "out.html").read_text()
    assert "rgb(80,180,220)" in page
    assert "It took" not in page


def test_a_folder_that_is_a_model_of_others_says_how_it_is_named(tmp_path):
    (tmp_path / "nn").mkdir()
    (tmp_path / "nn/plans.json").write_text("{}")
    (tmp_path / "bundle/configs").mkdir(parents=True)
    (tmp_path / "bundle/configs/metadata.json").write_text("{}")
    with pytest.raises(ModelFileError, match=rf"nnU-Net: write nnunet:{tmp_path}/nn"):
        vx.load_model(str(tmp_path / "nn"))
    with pytest.raises(ModelFileError, match=rf"MONAI: write monai:{tmp_path}/bundle"):
        vx.load_model(str(tmp_path / "bundle"))
    with pytest.raises(ModelFileError, match=rf"such as {tmp_path}/nn"):
        vx.integrations.nnunet.load(tmp_path)


def test_sizes_that_do_not_fit_the_model_are_named(run, tmp_path):
    program = torch.export.export(torch.nn.Conv3d(1, 2, 3, padding=1), (torch.zeros(1, 1, 16, 16, 16),))
    torch.export.save(program, tmp_path / "net.pt2")
    failed = run("predict", "net.pt2", "scan_0000.nii.gz", "--patch-size", "16,16", "-o", "out.nii")
    assert isinstance(failed.exception, SizeError)
    assert "--patch-size is 16,16: give one number, or 3" in str(failed.exception)


def test_dicts_of_paths_say_what_reads_them():
    with pytest.raises(SubjectError, match=r"give monai\.data\.Dataset\(files, transform\)"):
        vx.SubjectsDataset([{"image": "a.nii.gz", "label": "b.nii.gz"}])


def test_mirroring_is_turned_off(run):
    command = ("plan", "newcomer:two", "scan_0000.nii.gz", "--patch-size", 8, "--spec", "spec.json")
    with open("spec.json", "w") as file:
        json.dump(vx.ModelSpec(mirror_axes=(0, 1)).to_json(), file)
    assert "500 forward passes" in run(*command).output
    assert "125 forward passes" in run(*command, "--mirror", "none").output


def test_a_model_and_an_image_that_change_places_and_a_module_with_its_ending(tmp_path):
    vx.ScalarImage(torch.zeros(1, 8, 8, 8)).save(tmp_path / "scan.nii.gz")
    with pytest.raises(ModelFileError, match=r"scan\.nii\.gz is an image, and no model: name the model first"):
        vx.load_model(str(tmp_path / "scan.nii.gz"))
    with pytest.raises(ModelFileError, match=r"write mynet:Net, without \.py"):
        vx.load_model("mynet.py:Net")
