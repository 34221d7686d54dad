"""A file for each label, and the table of what they mean."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import voxloom as vx
from voxloom.cli import main
from voxloom.errors import ModeError, SaveError

AFFINE = np.array([[1.2, 0.3, 0, -40], [-0.3, 1.1, 0.2, 12], [0, -0.2, 2.5, 7], [0, 0, 0, 1]])


@pytest.fixture
def organs(tmp_path):
    data = torch.randint(0, 4, (1, 9, 8, 7), dtype=torch.int16)
    data[0, 0, 0] = torch.tensor([0, 1, 2, 3, 700, -2, 0])
    image = vx.LabelMap(data, affine=AFFINE)
    image.save(tmp_path / "organs.nii.gz")
    return image


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".ome.zarr"])
def test_each_label_has_a_file_on_the_same_grid(organs, tmp_path, ending):
    made = vx.split_labels(tmp_path / "organs.nii.gz", tmp_path / "parts", ending=ending)
    assert sorted(made) == sorted(["label-1", "label-2", "label-3", "label-700", "label--2"])
    for name, image in made.items():
        assert image.path == tmp_path / "parts" / f"{name}{ending}"
        assert image.dtype == torch.uint8
        assert torch.equal(image.data, (organs.data == int(name.removeprefix("label-"))).to(torch.uint8))
        assert np.allclose(image.affine, AFFINE, atol=1e-5)


def test_names_are_given_or_known(organs, tmp_path):
    labels = [vx.Label(0, "background"), vx.Label(2, "liver", (1, 2, 255)), vx.Label(9, "a/b: c")]
    made = vx.split_labels(organs, tmp_path / "parts", labels=labels)
    assert list(made) == ["liver", "a/b: c"]
    assert made["a/b: c"].path.name == "a_b_ c.nii.gz"
    assert not made["a/b: c"].data.any()
    assert torch.equal(made["liver"].data, (organs.data == 2).to(torch.uint8))
    rows = list(csv.reader((tmp_path / "parts" / "labels.tsv").read_text().splitlines(), dialect="excel-tab"))
    assert rows[:2] == [["index", "name", "color"], ["2", "liver", "#0102ff"]]
    with pytest.raises(ModeError, match="'liver'.*'Liver'.*would both be the file"):
        vx.split_labels(organs, tmp_path / "others", labels={"liver": 1, "Liver": 2})
    assert not list(tmp_path.glob(".others*"))


def test_labels_without_a_name_are_written_too(organs, tmp_path):
    told = {"versions": {"voxloom": "1"}, "labels": [{"value": 2, "name": "liver"}]}
    (tmp_path / "organs.json").write_text(json.dumps(told))
    made = vx.split_labels(tmp_path / "organs.nii.gz", tmp_path / "parts")
    others = [f"label-{value}" for value in organs.data.unique().tolist() if value not in (0, 2)]
    assert others
    assert list(made) == ["liver", *others]


def test_what_is_there_is_kept(organs, tmp_path):
    folder = tmp_path / "parts"
    vx.split_labels(organs, folder)
    with pytest.raises(SaveError, match="exists, and is kept"):
        vx.split_labels(organs, folder)
    assert list(vx.split_labels(organs, folder, labels={"one": 1}, overwrite=True)) == ["one"]
    assert sorted(path.name for path in folder.iterdir()) == ["labels.json", "labels.tsv", "one.nii.gz"]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("kept")
    with pytest.raises(SaveError, match="choose another name"):
        vx.split_labels(organs, mine, overwrite=True)
    assert (mine / "notes.txt").read_text() == "kept"
    with pytest.raises(SaveError, match=r"one\.nii\.gz is in .*parts, which would be replaced"):
        vx.split_labels(folder / "one.nii.gz", folder, overwrite=True)
    (folder / "notes.txt").write_text("kept")
    with pytest.raises(SaveError, match="choose another name"):
        vx.split_labels(organs, folder, overwrite=True)
    assert (folder / "notes.txt").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "organs.nii.gz", "parts"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_appears_meanwhile_is_kept(organs, tmp_path, monkeypatch, overwrite):
    def table(labels, path):
        path.write_text("")
        (tmp_path / "parts").mkdir()
        (tmp_path / "parts/notes.txt").write_text("mine")

    monkeypatch.setattr("voxloom.volumes.label_files.write_label_table", table)
    with pytest.raises(SaveError, match="has appeared while it was written, and is kept"):
        vx.split_labels(organs, tmp_path / "parts", overwrite=overwrite)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["notes.txt", "organs.nii.gz", "parts"]


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int64])
def test_labels_of_every_type(tmp_path, dtype):
    data = (torch.arange(64).reshape(1, 4, 4, 4) % 2).to(dtype)
    made = vx.split_labels(vx.LabelMap(data), tmp_path / "parts")
    assert list(made) == ["label-1"]
    assert torch.equal(made["label-1"].data, data.to(torch.uint8))


def test_what_is_no_label_map_is_refused(tmp_path):
    for data, message in [
        (torch.rand(1, 4, 4, 4), "this has the value 0."),
        (torch.full((1, 4, 4, 4), torch.nan), "this has the value nan"),
        (torch.full((1, 4, 4, 4), torch.inf), "this has the value inf"),
        (torch.ones(2, 4, 4, 4), "this has 2"),
    ]:
        for labels in (None, {"one": 1}):
            with pytest.raises(ModeError, match=message):
                vx.split_labels(vx.ScalarImage(data), tmp_path / "parts", labels=labels)
    for labels in ([1, 2], {"one": "1"}, {1: 1}):
        with pytest.raises(ModeError, match="give names and whole numbers"):
            vx.split_labels(vx.LabelMap(torch.ones(1, 4, 4, 4, dtype=torch.uint8)), tmp_path / "parts", labels=labels)
    with pytest.raises(ModeError, match="ending is '.png'"):
        vx.split_labels(vx.LabelMap(torch.ones(1, 4, 4, 4, dtype=torch.uint8)), tmp_path / "parts", ending=".png")


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)

    def run(*arguments, code=0):
        monkeypatch.setattr(sys, "argv", ["voxloom", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        assert (caught.value.code or 0) == code, captured.err
        return captured.err

    return run


PREDICT = ["predict", "model.pt2", "scan.nii.gz", "-o", "out/scan_dseg.nii.gz", "--spec", "spec.json", "--patch-size", "8"]


class Bands(torch.nn.Module):
    """Three classes, by value."""

    def forward(self, batch):
        return torch.cat([0.3 - batch, 0.1 - (batch - 0.5).abs(), batch - 0.7], 1)


def make_case(first="middle", second="top"):
    program = torch.export.export(Bands(), (torch.rand(1, 1, 8, 8, 8),))
    torch.export.save(program, "model.pt2")
    vx.ScalarImage(torch.rand(1, 12, 10, 9)).save("scan.nii.gz")
    write_spec(first, second)


def write_spec(first, second):
    labels = [{"value": 1, "name": first}, {"value": 2, "name": second, "color": [255, 0, 0]}]
    Path("spec.json").write_text(json.dumps({"voxloom_spec": 1, "reduce": "argmax", "labels": labels}))


def test_files_of_labels_follow_their_names(tmp_path, run):
    make_case("liver", "spleen")
    run(*PREDICT, "--per-label")
    write_spec("spleen", "liver")
    assert "labels" in run(*PREDICT, "--per-label", code=1)
    run(*PREDICT, "--per-label", "--overwrite")
    whole = vx.LabelMap("out/scan_dseg.nii.gz").data
    for value, name in ((1, "spleen"), (2, "liver")):
        assert torch.equal(vx.LabelMap(f"out/scan_dseg_labels/{name}.nii.gz").data, (whole == value).to(torch.uint8))


def test_files_of_labels_that_were_changed_by_hand_are_kept(tmp_path, run):
    make_case()
    run(*PREDICT, "--per-label")
    vx.LabelMap(torch.zeros(1, 12, 10, 9, dtype=torch.uint8)).save("out/scan_dseg_labels/top.nii.gz")
    run(*PREDICT, "--per-label")
    for name in ("scan_dseg.nii.gz", "scan_dseg.json"):
        (tmp_path / "out" / name).unlink()
    assert "or was changed since" in run(*PREDICT, "--per-label", "--mode", "crop", code=1)
    assert not (tmp_path / "out/scan_dseg.nii.gz").exists()
    assert int(vx.LabelMap("out/scan_dseg_labels/top.nii.gz").data.sum()) == 0
    run(*PREDICT, "--per-label", "--mode", "crop", "--overwrite")
    assert int(vx.LabelMap("out/scan_dseg_labels/top.nii.gz").data.sum()) > 0


def test_a_file_of_a_label_that_is_missing_is_made_anew(tmp_path, run):
    make_case()
    run(*PREDICT, "--per-label")
    (tmp_path / "out/scan_dseg_labels/top.nii.gz").unlink()
    assert "or was changed since" in run(*PREDICT, "--per-label", code=1)
    run(*PREDICT, "--per-label", "--overwrite")
    assert (tmp_path / "out/scan_dseg_labels/top.nii.gz").exists()


def test_numbers_may_be_of_numpy(tmp_path):
    data = torch.ones(1, 4, 4, 4, dtype=torch.uint8)
    labels = [vx.Label(np.int64(1), "liver", (np.uint8(9), 9, 9))]
    assert list(vx.split_labels(vx.LabelMap(data), tmp_path / "parts", labels=labels)) == ["liver"]


def test_a_number_has_one_name(tmp_path):
    data = torch.ones(1, 4, 4, 4, dtype=torch.uint8)
    with pytest.raises(vx.errors.ModeError, match="two names for 1, 'liver' and 'organ'"):
        vx.split_labels(vx.LabelMap(data), tmp_path / "parts", labels={"liver": 1, "organ": 1})


def test_the_command_writes_both(tmp_path, run):
    make_case()
    run(*PREDICT, "--per-label", "--label-table")
    whole = vx.LabelMap("out/scan_dseg.nii.gz").data
    for value, name in ((1, "middle"), (2, "top")):
        assert torch.equal(vx.LabelMap(f"out/scan_dseg_labels/{name}.nii.gz").data, (whole == value).to(torch.uint8))
    assert "2\ttop\t#ff0000" in (tmp_path / "out/scan_dseg.tsv").read_text()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/scan_dseg_labels").iterdir()}
    run(*PREDICT, "--per-label", "--label-table")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out/scan_dseg_labels").iterdir()}

    # What another model made takes the place of what this one made; a table of the user's own is kept.
    (tmp_path / "out/scan_dseg.tsv").write_text("mine\n")
    assert "is another table" in run(*PREDICT, "--label-table", code=1)
    run(*PREDICT, "--per-label", "--mode", "crop", "--overwrite")
    whole = vx.LabelMap("out/scan_dseg.nii.gz").data
    assert torch.equal(vx.LabelMap("out/scan_dseg_labels/top.nii.gz").data, (whole == 2).to(torch.uint8))
    assert (tmp_path / "out/scan_dseg.tsv").read_text() == "mine\n"

    # What cannot be is said before anything is computed.
    assert "--per-label is not for one share" in run(*PREDICT, "--per-label", "--shard", "0/2", code=1)
    (tmp_path / "spec.json").write_text(json.dumps({"voxloom_spec": 1, "reduce": "argmax"}))
    nameless = [*PREDICT[:4], "none.nii.gz", *PREDICT[5:]]
    assert "--label-table: the model's spec names no labels" in run(*nameless, "--label-table", code=1)
    assert not (tmp_path / "none.nii.gz").exists()

    # The command of its own knows the names by the sidecar.
    run("split", "out/scan_dseg.nii.gz", "-o", "parts")
    assert sorted(path.name for path in (tmp_path / "parts").glob("*.nii.gz")) == ["middle.nii.gz", "top.nii.gz"]
