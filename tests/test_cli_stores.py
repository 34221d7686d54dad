"""voxloom convert, index, cache and status, and predict on Zarr, as a person runs them."""

import json
import sys

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import voxloom as vx
from voxloom.cli import commands as cli
from voxloom.errors import VoxloomError
from zarr_samples import AFFINE, TENSOR

LABELS = (TENSOR > 500).to(torch.uint8)
MODULE = """
import torch
import voxloom as vx

def two(batch):
    return torch.cat([batch, 1000 - batch], 1)

class Fails:
    calls = 0
    def __call__(self, batch):
        self.calls += 1
        if self.calls > 14:
            raise RuntimeError("the cable was pulled")
        return two(batch)

fails = Fails()

def dataset():
    return vx.SubjectsDataset([vx.Subject(seg=vx.LabelMap("seg.nii"), case=n) for n in range(2)])
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mymodel", raising=False)
    (tmp_path / "mymodel.py").write_text(MODULE)
    vx.ScalarImage(TENSOR.float(), affine=AFFINE).save("scan.nii.gz")
    vx.LabelMap(LABELS, affine=AFFINE).save("seg.nii")
    yield tmp_path
    sys.modules.pop("mymodel", None)


def run(*arguments, code=0):
    result = CliRunner().invoke(cli.app, [str(each) for each in arguments])
    if isinstance(result.exception, VoxloomError):
        return str(result.exception)
    assert result.exit_code == code, result.output + str(result.exception)
    return result.output


PREDICT = ("mymodel:two", "--patch-size", "16", "--labels", "--dtype", "float32")


def test_the_whole_way(folder):
    assert "scan.ome.zarr" in run("convert", "scan.nii.gz", "-o", "scan.ome.zarr", "--chunks", "16,16,8", "--levels", 2)
    image = vx.ScalarImage("scan.ome.zarr")
    assert torch.equal(image.data, TENSOR.float())
    assert np.allclose(image.affine, AFFINE)
    assert vx.open_zarr("scan.ome.zarr").chunks == (16, 16, 8)
    run("predict", *PREDICT[:1], "scan.ome.zarr", *PREDICT[1:], "-o", "scan.ome.zarr/labels/organs")
    run("predict", *PREDICT[:1], "scan.nii.gz", *PREDICT[1:], "-o", "organs.nii.gz")
    assert torch.equal(vx.LabelMap("scan.ome.zarr/labels/organs").data, vx.LabelMap("organs.nii.gz").data)
    assert "is complete" in run("predict", *PREDICT[:1], "scan.ome.zarr", *PREDICT[1:], "-o", "scan.ome.zarr/labels/organs")
    run("predict", *PREDICT[:1], "scan.ome.zarr", *PREDICT[1:], "-o", "scan.ome.zarr/labels/organs", "--report")
    assert (folder / "scan-organs.html").exists()
    assert "organs: complete" in run("status", "scan.ome.zarr/labels/organs")
    assert "40, 30, 20" in run("info", "scan.ome.zarr/labels/organs")


def test_a_folder_of_images_of_which_some_are_folders(folder):
    (folder / "images").mkdir()
    run("convert", "scan.nii.gz", "seg.nii", "-o", "images")
    assert sorted(path.name for path in (folder / "images").iterdir()) == ["scan.ome.zarr", "seg.ome.zarr"]
    run("predict", *PREDICT[:1], "images", *PREDICT[1:], "-o", "out", "--format", "zarr")
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["scan.zarr", "seg.zarr"]
    run("convert", "out", "-o", "nifti", "--format", ".nii.gz")
    assert torch.equal(vx.LabelMap("nifti/scan.nii.gz").data, vx.LabelMap("out/scan.zarr").data)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("target", ["out.nii.gz", "out.ome.zarr"])
def test_status(folder, target):
    assert "not begun" in run("status", target)
    output = run("predict", "mymodel:fails", "scan.nii.gz", *PREDICT[1:], "--overlap", 0.5, "-o", target, code=1)
    assert "the cable was pulled" in output
    (told,) = json.loads(run("status", target, "--json"))
    assert told["state"] == "unfinished"
    assert 0 < told["done"] < told["total"]
    assert f"{told['done']} of {told['total']} slabs" in run("status", target)
    (folder / ".out.voxloom").write_text("{}\n")
    assert "is damaged" in run("status", target)


def test_status_of_a_folder(folder):
    command = ("predict", "mymodel:two", "scan.nii.gz", *PREDICT[1:])
    (folder / "out" / "sub").mkdir(parents=True)
    run(*command, "-o", "out/sub/done.v1.nii.gz")
    store = vx.ZarrStore("out/parts.v1.ome.zarr", chunks=8)
    parts = vx.Predictor(lambda batch: batch, 8, model_name="same").shards("scan.nii.gz", output=store, shard_size=8)
    parts.compute(0)
    run("predict", "mymodel:fails", "scan.nii.gz", *PREDICT[1:], "--overlap", 0.5, "-o", "out/begun.v1.nii.gz", code=1)
    told = {each["target"]: each["state"] for each in json.loads(run("status", "out", "--json"))}
    expected = {"begun.v1.nii.gz": "unfinished", "parts.v1.ome.zarr": "in parts", "sub/done.v1.nii.gz": "complete"}
    assert told == {f"out/{name}": state for name, state in expected.items()}
    assert run("retry", "out").count("0 parts that failed") == 3
    (folder / "out" / "sub" / "up").symlink_to(folder / "out")
    (folder / "out" / ".dangling.voxloom").symlink_to("nowhere")
    assert run("status", "out").count("out/") == 3
    (folder / "empty").mkdir()
    assert "no prediction has been begun" in run("status", "empty", code=2)


def test_index(folder):
    assert ".seg.index" in run("index", "seg.nii", "--patch-size", 8, "--classes", "0,1")
    assert ".seg.index" in run("index", "seg.nii", "--patch-size", "8,8,4", "--weighted", "--border", "clamp")
    assert len(list((folder / ".seg.index").iterdir())) == 2
    assert "--patch-size is 'x'" in run("index", "seg.nii", "--patch-size", "x")


def test_cache(folder):
    assert "2 subjects" in run("cache", "mymodel:dataset", "-o", "cache", "--prune")
    assert len(list((folder / "cache").iterdir())) == 2
    assert ": 0 subjects, 0 bytes; 2 are not kept" in run("cache", "mymodel:dataset", "-o", "small", "--size-limit", "1KiB")
    assert "package.module:name" in run("cache", "mymodel", "-o", "cache")
    assert "there is no data set mymodel:nothing" in run("cache", "mymodel:nothing", "-o", "cache")


def test_modules_of_the_present_folder_are_found(folder, monkeypatch):
    (folder / "my").mkdir()
    (folder / "my/project.py").write_text(MODULE)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(folder))])
    assert "2 subjects" in run("cache", "my.project:dataset", "-o", "cache")


def test_bad_input(folder):
    assert "chunks was given for out.nii, which is no Zarr" in run(
        "convert", "scan.nii.gz", "-o", "out.nii", "--chunks", 8, code=1
    )
    assert "levels is 0" in run("convert", "scan.nii.gz", "-o", "out.ome.zarr", "--levels", 0, code=1)
    for option in (("--folds", "0"), ("--checkpoint", "a.pth"), ("--allow-code",)):
        told = run("predict", *PREDICT[:1], "scan.nii.gz", *PREDICT[1:], "-o", "out.nii", *option, code=2)
        assert f"{option[0]} was given, which is not for a model of one's own" in told
    assert "--format is 'png'" in run("convert", "scan.nii.gz", "-o", "out", "--format", "png")
    assert "out.nii is a file, whose name says it" in run("convert", "scan.nii.gz", "-o", "out.nii", "--format", "zarr", code=1)
    assert "out.nii is a file" in run("predict", *PREDICT[:1], "scan.nii.gz", *PREDICT[1:], "-o", "out.nii", "--format", "nii.gz")
    assert "is a file, whose name says it" in run("convert", "scan.nii.gz", "-o", "seg.ome.zarr", "--format", "nii", code=1)
    assert "out.png is the name of a file" in run("convert", "scan.nii.gz", "-o", "out.png")
    assert "exists, and is kept" in run("convert", "scan.nii.gz", "-o", "seg.nii", code=1)
    for name in ("seg.dcm", "seg.png", "seg.mha"):
        assert f"{name} is the name of a file" in run("predict", *PREDICT[:1], "scan.nii.gz", *PREDICT[1:], "-o", name)
    assert not (folder / "seg.dcm").exists()


def test_shares_of_a_job_array(folder):
    command = ("predict", "mymodel:two", "scan.nii.gz", *PREDICT[1:], "--shard-size", 16)
    expected = vx.LabelMap(folder / "whole.nii.gz") if run(*command[:-2], "-o", "whole.nii.gz") else None
    # A file's parts are as large as the chunks that it is gathered in, so that there is one alone.
    assert ": done" in run(*command, "-o", "out.nii.gz", "--shard", "0/2")
    assert torch.equal(vx.LabelMap("out.nii.gz").data, expected.data)
    assert "is complete" in run(*command, "-o", "out.nii.gz", "--shard", "1/2")
    vx.convert("scan.nii.gz", "scan.ome.zarr", chunks=8, levels=1)
    assert "such as 0/8" in run(*command, "-o", "out2.nii.gz", "--shard", "2/2", code=1)
    assert "only one can be given" in run(*command, "-o", "out2.nii.gz", "--shard", "0/2", "--devices", "cpu")
    assert "no GPU" in run(*command, "-o", "out2.nii.gz", "--devices", "all") or torch.cuda.is_available()


def test_cases_are_spread_over_shares(folder):
    (folder / "images").mkdir()
    for number in range(4):
        vx.ScalarImage(TENSOR.float() + number).save(f"images/{number}.nii")
    command = ("predict", "mymodel:two", "images", *PREDICT[1:], "-o", "out")
    first = run(*command, "--shard", "0/2")
    assert sorted(path.name for path in (folder / "out").glob("*.nii.gz")) == ["0.nii.gz", "2.nii.gz"]
    assert "0 parts computed" in first
    run(*command, "--shard", "1/2")
    assert len(list((folder / "out").glob("*.nii.gz"))) == 4
    assert "not begun" not in run("status", *sorted((folder / "out").glob("*.nii.gz")))


@pytest.mark.slow
def test_status_and_retry_of_parts(folder):
    (folder / "mymodel.py").write_text(
        MODULE.replace("class Fails", "def dark(batch):\n    if 0 < batch.min() < 1:\n        raise ValueError('too dark')\n"
        "    return two(batch)\n\nclass Fails")
    )  # fmt: skip
    vx.ScalarImage(torch.arange(40 * 30 * 20.0).reshape(1, 40, 30, 20) / 100).save("ramp.nii")
    vx.convert("ramp.nii", "ramp.ome.zarr", chunks=10, levels=1)
    command = ("predict", "mymodel:dark", "ramp.ome.zarr", "--patch-size", 10, "--labels", "--dtype", "float32")
    target = "ramp.ome.zarr/labels/found"
    output = run(*command, "-o", target, "--shard", "0/1", "--shard-size", 10, code=1)
    assert "ValueError: too dark" in output
    (told,) = json.loads(run("status", target, "--json", "--picture", "parts.png"))
    assert told["state"] == "in parts"
    assert told["failed"]
    assert "too dark" in next(iter(told["failed"].values()))
    assert (folder / "parts.png").stat().st_size > 1000
    assert f"{len(told['failed'])} parts that failed" in run("retry", target)
    assert json.loads(run("status", target, "--json"))[0]["failed"] == {}


def test_labels_that_do_not_fit_leave_nothing_that_is_in_the_way(folder):
    run("convert", "scan.nii.gz", "-o", "scan.ome.zarr")
    vx.LabelMap(LABELS[:, :5]).save("other.nii")
    assert "must be on its grid" in run("convert", "other.nii", "-o", "scan.ome.zarr/labels/organs", "--labels", code=1)
    run("convert", "scan.nii.gz", "-o", "scan.ome.zarr", "--overwrite")


def test_what_would_be_ignored_is_refused(folder):
    assert "either that or --weighted" in run("index", "seg.nii", "--patch-size", 8, "--weighted", "--classes", 1)
    assert "no result in parts" in run("retry", "nowhere.nii")
    assert "not begun, and not in parts" in run("status", "nowhere.nii", "--picture", "parts.png")
    assert "package.module:name" in run("cache", ":dataset", "-o", "kept")


def test_a_file_that_fails_has_an_entry_and_does_not_stop_the_others(folder):
    for arguments in (("index", "nowhere.nii", "seg.nii", "--patch-size", 8), ("info", "nowhere.nii", "seg.nii")):
        result = CliRunner().invoke(cli.app, [*map(str, arguments), "--json"])
        assert result.exit_code == 1
        failed, done = json.loads(result.stdout)
        assert (failed["file"], failed["kind"], done["file"]) == ("nowhere.nii", "ImageNotFoundError", "seg.nii")


def test_pages_of_others_are_kept(folder):
    (folder / "organs.html").write_text("mine")
    arguments = ("predict", *PREDICT[:1], "scan.nii.gz", *PREDICT[1:], "-o", "organs.nii.gz", "--report")
    assert "is no page of voxloom's" in run(*arguments, code=1)
    assert (folder / "organs.html").read_text() == "mine"
    run(*arguments, "--overwrite")
    run(*arguments)
    assert "organs" in (folder / "organs.html").read_text()


@pytest.mark.skipif(sys.platform == "win32", reason="names of files are text there")
def test_names_that_are_no_text_do_not_end_the_process(folder):
    run("convert", "seg.nii", "-o", "seg.mha")
    (folder / "seg.mha").rename(folder / "seg\udcff.mha")
    assert "not UTF-8" in run("info", "seg\udcff.mha", code=1)
    assert "not UTF-8" in run("convert", "seg.nii", "-o", "other\udcff.mha", code=1)
