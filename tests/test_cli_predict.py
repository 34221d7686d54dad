"""voxloom predict, plan and info, as a person runs them: on files, folders and tables, with models of all kinds."""

import contextlib
import filecmp
import importlib
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pydicom.data
import pytest
import safetensors.torch
import SimpleITK
import torch
from torch import nn

import voxloom as vx
from slow import slow
from voxloom.io.nifti import store as nifti_store
from voxloom.models import program_check
from voxloom.models.loading import load_model
from voxloom.runs.log import RunLog
from voxloom.runtime import progress

VOXLOOM = (sys.executable, "-m", "voxloom")

MODULE = """
    import torch

    def negative(batch):
        return -batch

    def two_channels(batch):
        return torch.cat([batch[:, :1], 500 - batch[:, :1]], 1)

    def first_minus_second(batch):
        return batch[:, :1] - batch[:, 1:2]

    def network():
        torch.manual_seed(0)
        return torch.nn.Conv3d(1, 2, 3, padding=1)

    class Network(torch.nn.Conv3d):
        pass

    def fails_for_dark(batch):
        if batch.max() < 1 and batch.any():
            raise ValueError("too dark")
        return batch

    number = 5
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mymodels", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "mymodels.py").write_text(textwrap.dedent(MODULE))
    torch.manual_seed(1)
    (tmp_path / "scans" / "b").mkdir(parents=True)
    for name in ("a.nii.gz", "b/a.nii", "b/c.mha"):
        vx.ScalarImage((torch.rand(1, 20, 18, 17) * 1000).to(torch.int16)).save(tmp_path / "scans" / name)
    return tmp_path


def data_of(path):
    return vx.ScalarImage(path).data


# Images


def test_one_image_to_one_file(here, run):
    done = run("predict", "mymodels:negative", "scans/a.nii.gz", "-o", "out.nii.gz", "--patch-size", 8)
    torch.testing.assert_close(data_of("out.nii.gz"), -data_of("scans/a.nii.gz").float())
    assert done.out == "a.nii.gz: out.nii.gz\n"
    assert done.err == ""  # no bar where nobody looks
    assert json.loads(Path("out.json").read_text())["models"][0]["name"].startswith("mymodels:negative ")


def test_a_terminal_shows_a_bar(here, run, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    done = run("predict", "mymodels:negative", "scans/a.nii.gz", "-o", "out.nii.gz", "--patch-size", 8)
    assert "a.nii.gz: 100%" in done.err


def test_a_log_gets_a_line_now_and_then(monkeypatch, capsys):
    times = iter([0.0, 10.0, 40.0, 50.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(times))
    with progress.shown("a.nii.gz", 40, "patches") as add:
        for _ in range(3):
            add(5)
    assert capsys.readouterr().err == "a.nii.gz: 10 of 40 patches, about 120 s to go\n"


# What is said


@pytest.mark.slow
def test_verbose_says_the_plan_and_how_long_it_took(here):
    options = ["predict", "mymodels:negative", "scans/a.nii.gz", "-o", "out.nii.gz", "--patch-size", "8"]
    done = subprocess.run([*VOXLOOM, "--verbose", *options], capture_output=True, text=True, check=True)
    assert "patches: " in done.stderr
    assert "device:  cpu" in done.stderr
    assert re.search(r"scans/a\.nii\.gz\nvolume: ", done.stderr)
    assert re.search(r"time: +\d+\.\d s", done.stderr)
    assert "out.nii.gz" in done.stdout
    wrong = subprocess.run([*VOXLOOM, "--verbose", "--quiet", *options], capture_output=True, text=True, check=False)
    assert (wrong.returncode, wrong.stderr) == (1, "voxloom: of --quiet and --verbose only one can be given\n")


def test_quiet_says_nothing_but_errors(here, run):
    done = run("--quiet", "predict", "mymodels:negative", "scans/a.nii.gz", "-o", "out.nii.gz", "--patch-size", 8)
    assert (done.out, done.err) == ("", "")
    failed = run("-q", "predict", "mymodels:negative", "scans/none.nii.gz", "-o", "out", "--patch-size", 8, code=1)
    assert "none.nii.gz" in failed.err


def test_json_is_all_that_is_printed(here, run):
    (here / "scans" / "damaged.nii.gz").write_bytes(b"no image")
    arguments = ("mymodels:negative", "scans/a.nii.gz", "scans/damaged.nii.gz", "-o", "out", "--patch-size", 8, "--json")
    good, bad = json.loads(run("predict", *arguments, code=1).out)
    assert (good["case"], good["state"], good["target"]) == ("a.nii.gz", "done", "out/a.nii.gz")
    assert (bad["state"], bad["kind"]) == ("failed", "CorruptImageError")
    assert "damaged.nii.gz" in bad["error"]
    again = json.loads(run("predict", *arguments, code=1).out)
    assert [each["state"] for each in again] == ["complete", "failed"]
    (planned,) = json.loads(run("plan", "mymodels:negative", "scans/a.nii.gz", "--patch-size", 8, "--json").out)
    assert planned["patches"] > 1
    assert planned["peak_bytes"] > 0
    (info,) = json.loads(run("info", "scans/a.nii.gz", "--json").out)
    assert info["shape"] == "(20, 18, 17), 1 channel"


def test_a_dry_run_writes_nothing(here, run):
    arguments = ("mymodels:negative", "scans/a.nii.gz", "-o", "out.nii.gz", "--patch-size", 8)
    done = run("predict", *arguments, "--dry-run")
    assert done.out == run("plan", *arguments).out
    assert "patches:" in done.out
    assert not (here / "out.nii.gz").exists()


@pytest.mark.parametrize("names", [("a_0000", "a_0001", "b_0000", "b_0001"), ("s_T1w", "s_T2w", "t_T1w", "t_T2w")])
def test_channels_of_one_case_are_grouped_if_that_is_said(here, run, names):
    (here / "pairs").mkdir()
    for name in names:
        vx.ScalarImage(torch.rand(1, 9, 8, 7)).save(here / "pairs" / f"{name}.nii.gz")
    arguments = ("predict", "mymodels:negative", "pairs", "-o", "out", "--patch-size", 8)
    refused = run(*arguments, code=1).err
    assert f"{names[0]}.nii.gz, {names[1]}.nii.gz are named as channels of one case: give --group" in refused
    run(*arguments, "--no-group")
    assert len(list((here / "out").glob("*.nii.gz"))) == 4
    run(*arguments[:4], "grouped", *arguments[5:], "--group")
    found = data_of(here / "grouped" / f"{names[0][0]}.nii.gz")
    expected = [-data_of(here / "pairs" / f"{name}.nii.gz") for name in names[:2]]
    torch.testing.assert_close(found, torch.cat(expected))
    files = [f"pairs/{name}.nii.gz" for name in names]
    run("predict", "mymodels:negative", *files[:2], "-o", "one.nii.gz", "--patch-size", 8, "--group")
    torch.testing.assert_close(data_of(here / "one.nii.gz"), found)
    scores = ("predict", "mymodels:negative", files[0], "-o", "s.nii.gz", "--patch-size", 8, "--channels", 0, "--per-label")
    assert "--per-label is for label maps" in run(*scores, code=1).err
    several = ("predict", "mymodels:negative", *files, "-o", "two.nii.gz", "--patch-size", 8, "--group")
    assert "give the name of a folder" in run(*several, code=1).err
    (here / "pairs" / f"{names[1]}.nii.gz").unlink()
    assert (
        f"the case {names[0][0]} has no file of the channel"
        in run(*arguments[:4], "again", *arguments[5:], "--group", code=1).err
    )


def test_channels_on_other_grids_are_resampled_to_one_that_is_named(here, run):
    (here / "pair").mkdir()
    first, second = (
        vx.ScalarImage(torch.rand(1, 9, 8, 7)),
        vx.ScalarImage(torch.rand(1, 18, 16, 14), affine=np.diag([0.5, 0.5, 0.5, 1])),
    )
    for name, image in (("s_T1w", first), ("s_T2w", second)):
        image.save(here / "pair" / f"{name}.nii.gz")
    arguments = ("predict", "mymodels:negative", "pair", "-o", "out", "--patch-size", 8, "--group")
    assert "(--resample-to) one of 'T1w', 'T2w'" in run(*arguments, code=1).err
    run(*arguments, "--resample-to", "T1w")
    expected = torch.cat([first.data, second.resampled(like=first).data])
    torch.testing.assert_close(data_of(here / "out" / "s.nii.gz"), -expected)
    assert "is complete" in run(*arguments, "--resample-to", "T1w").out
    assert "exists, and is of something else" in run(*arguments, "--resample-to", "T2w", code=1).err


@pytest.mark.slow
def test_pages_are_written_beside_results(here, run):
    run("predict", "mymodels:negative", "scans", "-o", "out", "--patch-size", 8, "--report")
    assert (here / "out" / "a.html").exists()
    index = (here / "out" / "index.html").read_text()
    assert "href='a.html'" in index
    assert "href='b/c.html'" in index
    again = run("predict", "mymodels:negative", "scans", "-o", "out", "--patch-size", 8, "--report")
    assert "3 complete already" in again.out


def test_debug_shows_where_an_error_comes_from(here, run):
    arguments = ("predict", "mymodels:negative", "scans/a.nii.gz", "-o", "out.nii.gz", "--patch-size", "zzz")
    assert "Traceback" not in run(*arguments, code=1).err
    assert "Traceback" in run("--debug", *arguments, code=1).err


@pytest.mark.slow
def test_help_is_there_before_pytorch(run):
    for command in ([], ["predict"], ["plan"], ["info"], ["pack"], ["demo"]):
        code = f"""
import sys
from voxloom.cli import main
sys.argv = ["voxloom", *{command}, "--help"]
try:
    main()
except SystemExit:
    print([name for name in ("torch", "nibabel", "SimpleITK", "monai") if name in sys.modules])
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "[]"
        assert "Usage" in done.stdout
    assert "voxloom predict model.pt2 scans/" in run("predict", "--help").out
    assert "--install-completion" in run("--help").out


def test_folders_keep_their_paths_and_stems(here, run):
    (here / "scans" / ".hidden.nii").write_text("x")
    (here / "scans" / "notes.txt").write_text("x")
    done = run(
        "predict", "mymodels:two_channels", "scans", "-o", "out", "--patch-size", "8,8,16", "--labels", "--overlap", "0,2,0.5"
    )
    for source, target in (("a.nii.gz", "a.nii.gz"), ("b/a.nii", "b/a.nii.gz"), ("b/c.mha", "b/c.nii.gz")):
        expected = (data_of(here / "scans" / source) < 250).to(torch.uint8)
        assert torch.equal(data_of(here / "out" / target), expected)
    assert done.out.endswith("3 done, 0 complete already, 0 failed\n")


def test_all_formats_of_a_folder_are_read_and_other_images_are_named(here, run):
    (here / "mixed").mkdir()
    volume = torch.randint(0, 255, (1, 9, 10, 11), dtype=torch.uint8)
    vx.ScalarImage(volume).save("mixed/a.nrrd")
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(volume[0].numpy()), "mixed/b.tif")
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(volume[0, 0].numpy()), "mixed/picture.png")
    (here / "mixed" / "notes.txt").write_text("no image")
    (here / "mixed" / "motion.par").write_text("0 0 0.1")  # of FSL, and no image either: there is no .rec beside it
    (here / "mixed" / os.fsdecode(b"odd_\xff.log")).write_text("")
    os.mkfifo(here / "mixed" / "pipe")
    done = run("predict", "mymodels:negative", "mixed", "-o", "results", "--patch-size", "8")
    assert sorted(path.name for path in (here / "results").iterdir()) == ["a.json", "a.nii.gz", "b.json", "b.nii.gz"]
    assert "mixed/picture.png: left out" in done.err
    assert "notes.txt" not in done.err


def test_several_files_go_to_a_folder(here, run):
    run("predict", "mymodels:negative", "scans/a.nii.gz", "scans/b/c.mha", "-o", "out", "--patch-size", 16, "--mode", "crop")
    assert sorted(os.listdir("out")) == ["a.json", "a.nii.gz", "c.json", "c.nii.gz"]


def test_a_table_of_cases_has_a_channel_in_each_column(here, run):
    (here / "scans" / "cases.csv").write_text("t1,t2\na.nii.gz,b/a.nii\nb/a.nii,b/c.mha\n")
    run("predict", "mymodels:first_minus_second", "--table", "scans/cases.csv", "-o", "out", "--patch-size", 8, "--mode", "crop")
    expected = data_of("scans/a.nii.gz").float() - data_of("scans/b/a.nii").float()
    assert torch.equal(data_of("out/a.nii.gz"), expected)
    assert os.path.exists("out/b/a.nii.gz")
    Path("named.tsv").write_text("t2\tcase\tt1\nscans/b/a.nii\tx/one\tscans/a.nii.gz\n")
    run("predict", "mymodels:first_minus_second", "--table", "named.tsv", "-o", "out", "--patch-size", 8, "--mode", "crop")
    assert torch.equal(data_of("out/x/one.nii.gz"), -expected)
    Path("headless.csv").write_text("scans/a.nii.gz,scans/b/a.nii\nscans/b/a.nii,scans/b/c.mha\n")
    told = run("predict", "mymodels:first_minus_second", "--table", "headless.csv", "-o", "none", "--patch-size", 8, code=1)
    assert "has 'scans/a.nii.gz', which is a file: it must name the columns" in told.err
    Path("dot.csv").write_text("case,t1,t2\n.,scans/a.nii.gz,scans/b/a.nii\n")
    told = run("predict", "mymodels:first_minus_second", "--table", "dot.csv", "-o", "none", "--patch-size", 8, code=1)
    assert "line 2 of dot.csv would put its result at ." in told.err


def test_what_is_complete_is_left_out_and_what_differs_is_kept(here, run):
    arguments = ["predict", "mymodels:negative", "scans", "-o", "out", "--patch-size", 8]
    run(*arguments)
    before = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*.nii.gz")}
    os.remove("out/b/a.nii.gz")
    os.remove("out/b/a.json")
    assert run(*arguments).out.endswith("1 done, 2 complete already, 0 failed\n")
    done = run(*arguments, "--mode", "hann", code=1)
    assert done.out.count("\n  ") == 3
    assert "options.overlap_mode was gaussian and is hann" in done.err
    vx.ScalarImage(data_of("scans/a.nii.gz") + 1).save("scans/a.nii.gz")
    assert "input.modified_ns was" in run(*arguments, code=1).err
    assert all(
        path.stat().st_mtime_ns == time for path, time in before.items() if path.name != "a.nii.gz" or "b" not in path.parts
    )
    assert run(*arguments, "--overwrite").out.endswith("3 done, 0 complete already, 0 failed\n")
    os.remove("out/a.json")
    assert "nothing beside it says how it was made" in run(*arguments, code=1).err


def test_one_case_that_fails_does_not_stop_the_others(here, run):
    (here / "scans" / "b" / "a.nii").write_bytes((here / "scans" / "b" / "a.nii").read_bytes()[:-50])
    vx.ScalarImage(torch.rand(1, 9, 9, 9) * 0.5).save("scans/dark.nii")
    done = run("predict", "mymodels:fails_for_dark", "scans", "-o", "out", "--patch-size", 8, code=1)
    assert done.out.endswith("2 done, 0 complete already, 2 failed\n  b/a.nii\n  dark.nii\n")
    assert "voxloom: b/a.nii failed: scans/b/a.nii claims" in done.err
    assert "in fails_for_dark" in done.err  # an error that voxloom does not explain has its traceback
    assert "voxloom: dark.nii failed: too dark" in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["scans/a.nii.gz", "scans/b/a.nii"], "the results of scans/a.nii.gz and of scans/b/a.nii would both go to out/a.nii.gz"),
        (["scans/a.nii.gz", "scans"], "would both go to out/a.nii.gz"),
        (["scans/a.nii.gz", "-o", "scans/a.nii.gz"], "would replace the input scans/a.nii.gz"),
        (["scans", "-o", "scans"], "scans is the folder of the images"),
        (["scans/a.nii.gz", "scans/b/c.mha", "-o", "x.nii.gz"], "x.nii.gz is the name of a file"),
        (["scans", "-o", "x.nii"], "x.nii is the name of a file"),
        (["scans/a.nii.gz", "-o", "x.mha"], "x.mha is the name of a file"),
        (["--table", "two.csv", "-o", "x.nii.gz"], "x.nii.gz is the name of a file"),
        (["--table", "twice.csv"], "each must have a name of its own"),
        (["--table", "empty"], "the table empty cannot be read: Is a directory"),
        (["scans", "--batch-size", "0"], "batch_size is 0"),
        (["missing.nii"], "there is no file"),
        (["scans", "nothing"], "there is no file or folder nothing"),
        (["empty"], "the folder empty holds no image"),
        ([], "give either images or a --table"),
        (["scans", "--table", "t.csv"], "give either images or a --table"),
        (["--table", "t.csv"], "there is no table t.csv"),
        (["--table", "empty.csv"], "the table empty.csv is empty"),
        (["--table", "short.csv"], "line 3 of short.csv is ['x.nii']"),
        (["--table", "outside.csv"], "would put its result at ../x, outside of out"),
        (["scans", "--patch-size", "big"], "--patch-size is 'big'"),
        (["scans", "--overlap", "1.5"], "patch_overlap is 1.5"),
        (["scans", "--labels", "--threshold", "0.5"], "only one can be given"),
        (["scans", "--mask", "m.nii", "--mask-above", "0.5"], "only one can be given"),
    ],
)
def test_mistakes_are_explained_before_anything_starts(here, run, arguments, message):
    (here / "empty").mkdir()
    Path("empty.csv").write_text("")
    Path("short.csv").write_text("t1,t2\na.nii,b.nii\nx.nii\n")
    Path("outside.csv").write_text("t1\n../x.nii\n")
    Path("two.csv").write_text("t1\nscans/a.nii.gz\n")
    Path("twice.csv").write_text("t1,t1\na.nii,b.nii\n")
    output = [] if "-o" in arguments else ["-o", "out"]
    size = [] if "--patch-size" in arguments else ["--patch-size", 8]
    done = run("predict", "mymodels:negative", *arguments, *output, *size, code=1)
    assert message in done.err
    assert "Traceback" not in done.err
    assert not os.path.exists("out/a.nii.gz")


def test_a_missing_image_among_others_is_found_before_anything_starts(here, run):
    done = run("predict", "mymodels:negative", "scans/a.nii.gz", "scans/x.nii", "-o", "out", "--patch-size", 8, code=1)
    assert done.err == "voxloom: there is no file or folder scans/x.nii\n"
    assert not os.path.exists("out")


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on_and_the_same_command_does(here):
    Path("slow.py").write_text(
        "import time\n\ndef model(batch):\n    time.sleep(0.04)\n    print('.', flush=True)\n    return batch\n"
    )
    command = [
        sys.executable,
        "-m",
        "voxloom",
        *["predict", "slow:model", "scans/a.nii.gz", "-o", "out.nii.gz", "--patch-size", "8"],
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(52):
        assert process.stdout.readline() == ".\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 130
    assert "interrupted; the same command goes on" in error
    assert "Traceback" not in error
    assert not Path("out.nii.gz").exists()
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "is resumed" in again.stderr
    assert again.stdout.count(".\n") < 64
    torch.testing.assert_close(data_of("out.nii.gz"), data_of("scans/a.nii.gz").float())


# Models


def exported(path, batch=1, size=8, dynamic=None):
    torch.manual_seed(0)
    network = nn.Conv3d(1, 2, 3, padding=1).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(network, (torch.zeros(batch, 1, size, size, size),), dynamic_shapes=dynamic)
        torch.export.save(program, path)
    return network


def reference(here, run, *options):
    run(
        "predict", "mymodels:network", "scans/a.nii.gz", "-o", "expected.nii.gz", "--weights", "w.pt", "--patch-size", 8, *options
    )


@pytest.mark.slow
def test_models_of_all_kinds_give_the_same(here, run):
    network = exported("model.pt2")
    torch.save(network.state_dict(), "w.pt")
    reference(here, run)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(network).save("script.pt")
        torch.jit.trace(network, torch.zeros(1, 1, 8, 8, 8)).save("trace.ts")
    safetensors.torch.save_file(network.state_dict(), "w.safetensors")
    torch.save({"epoch": 3, "state_dict": {f"module.{name}": value for name, value in network.state_dict().items()}}, "c.ckpt")
    for number, arguments in enumerate(
        (
            ["model.pt2"],
            ["script.pt", "--patch-size", 8, "--allow-pickle"],
            ["trace.ts", "--patch-size", 8, "--allow-pickle"],
            ["mymodels:network", "--weights", "w.safetensors", "--patch-size", 8],
            ["mymodels:network", "--weights", "c.ckpt", "--patch-size", 8],
        )
    ):
        run("predict", arguments[0], "scans/a.nii.gz", "-o", f"{number}.nii.gz", *arguments[1:])
        torch.testing.assert_close(data_of(f"{number}.nii.gz"), data_of("expected.nii.gz"), atol=1e-4, rtol=1e-4)


def test_a_program_fixes_its_sizes(here, run):
    exported("model.pt2", batch=3)
    done = run("plan", "model.pt2", "scans/a.nii.gz", "--overlap", 4)
    assert "of 8 × 8 × 8" in done.out
    assert "forward passes of 3" in done.out
    assert "exported for 8 × 8 × 8: ask for that" in run("plan", "model.pt2", "scans", "--patch-size", 16, code=1).err
    assert "exported for 3: leave out --batch-size" in run("plan", "model.pt2", "scans", "--batch-size", 1, code=1).err
    run("plan", "model.pt2", "scans", "--patch-size", "8,8,8", "--batch-size", 3)
    exported("free.pt2", batch=2, dynamic=({0: torch.export.Dim("batch")},))
    assert "forward passes of 5" in run("plan", "free.pt2", "scans/a.nii.gz", "--batch-size", 5).out
    assert "batch size:  any\n  patch size:  8 × 8 × 8" in run("info", "free.pt2").out


@pytest.mark.parametrize(
    ("batch", "least"),
    [
        (torch.export.Dim("batch", min=2), 2),
        (torch.export.Dim("batch", min=3, max=6), 3),
        (2 * torch.export.Dim("half"), 4),
        (torch.export.Dim.AUTO, 2),
    ],
)
def test_a_program_with_a_smallest_batch_is_given_that(here, run, batch, least):
    class Pairs(nn.Module):
        def forward(self, batch):
            pairs = batch.reshape(2, -1, *batch.shape[2:]) if batch.shape[0] % 2 == 0 else batch
            return pairs.reshape(batch.shape)

    network = Pairs() if least == 4 else nn.Conv3d(1, 2, 3, padding=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(network.eval(), (torch.zeros(4, 1, 8, 8, 8),), dynamic_shapes=({0: batch},))
        torch.export.save(program, "model.pt2")
    assert f"batch size:  {least} or more" in run("info", "model.pt2").out
    assert f"forward passes of {least}" in run("plan", "model.pt2", "scans/a.nii.gz").out
    run("predict", "model.pt2", "scans/a.nii.gz", "-o", "out.nii.gz")
    if least > 2:
        error = run("predict", "model.pt2", "scans/a.nii.gz", "-o", "one.nii.gz", "--batch-size", 1, code=1).err
        assert "other sizes than a batch (B, C, I, J, K) of (1, 1, 8, 8, 8)" in error


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
def test_a_program_is_given_the_smallest_batch_that_its_checks_allow(here, run, strict):
    class Halves(nn.Module):
        def forward(self, batch):
            half = batch[: batch.shape[0] // 2]
            return torch.cat([half, half, batch[: batch.shape[0] - 2 * half.shape[0]]])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            Halves(), (torch.zeros(6, 1, 8, 8, 8),), dynamic_shapes=({0: torch.export.Dim.AUTO},), strict=strict
        )
        torch.export.save(program, "model.pt2")
    plan = run("plan", "model.pt2", "scans/a.nii.gz").out
    assert re.search(r"forward passes of [2-6]\b", plan)
    run("predict", "model.pt2", "scans/a.nii.gz", "-o", "out.nii.gz")
    replaced("model.pt2", "odd.pt2", *graph(lambda tree: tree.update(guards_code=["Mod(L['batch'].size()[0], 2) == 0"])))
    error = run("plan", "odd.pt2", "scans/a.nii.gz", code=1).err
    assert "calls Mod, which is not known here. Give --allow-pickle" in error


def test_a_sidecar_that_names_another_file_is_only_asked_about_results(here, run):
    Path("out.json").write_text(json.dumps({"versions": {"voxloom": "1"}, "written": {"name": "../other/file"}}))
    run("predict", "mymodels:negative", "scans/a.nii.gz", "-o", "out.nii.gz", "--patch-size", 8)
    assert json.loads(Path("out.json").read_text())["written"]["name"] == "out.nii.gz"


def test_a_program_may_fix_some_of_its_sizes_or_what_they_may_be(here, run):
    exported("model.pt2", batch=2, dynamic=({0: torch.export.Dim("batch", max=4), 2: torch.export.Dim("size", max=10)},))
    assert "patch size:  any × 8 × 8" in run("info", "model.pt2").out
    plan = ("plan", "model.pt2", "scans/a.nii.gz")
    assert "of 6 × 8 × 8" in run(*plan, "--patch-size", "6,8,8", "--overlap", "2,4,4").out
    assert "missing, and the model was exported for any × 8 × 8" in run(*plan, code=1).err
    assert "is 8 × 8 × 6, but the model was exported for any × 8 × 8" in run(*plan, "--patch-size", "8,8,6", code=1).err
    assert "other sizes than a batch (B, C, I, J, K) of (1, 1, 12, 8, 8)" in run(*plan, "--patch-size", "12,8,8", code=1).err
    run(*plan, "--patch-size", 8, "--batch-size", 4)
    assert (
        "other sizes than a batch (B, C, I, J, K) of (5, 1, 8, 8, 8)"
        in run(*plan, "--patch-size", 8, "--batch-size", 5, code=1).err
    )


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch ran",)


def replaced(source, target, entry, content):
    """Copy an archive, with the entries that end in a name replaced or added."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
        root = old.namelist()[0].split("/")[0]
        names = old.namelist()
        for name in names:
            if not name.endswith(entry):
                new.writestr(name, old.read(name))
        found = [name for name in names if name.endswith(entry)]
        old_content = old.read(found[0]) if found else None
        new.writestr(found[0] if found else f"{root}/{entry}", content(old_content) if callable(content) else content)


def edited(change):
    def apply(content):
        tree = json.loads(content)
        change(tree)
        return json.dumps(tree)

    return apply


def pickled_constant(tree):
    tree["config"]["x"] = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}


DEFAULTDICT = json.dumps(
    [1, {"type": "collections.defaultdict", "context": '{"default_factory_module": "os"}', "children_spec": []}]
)


def graph(change):
    return "models/model.json", edited(change)


def calling(target):
    return graph(lambda tree: tree["graph_module"]["graph"]["nodes"][0].update(target=target))


EVIL_KEY = json.dumps(
    [
        1,
        {
            "type": "builtins.tuple",
            "context": "null",
            "children_spec": [
                {"type": "builtins.tuple", "context": "null", "children_spec": []},
                {
                    "type": "builtins.dict",
                    "context": json.dumps(["a=__import__('os').system('touch ran')"]),
                    "children_spec": [{"type": None, "context": None, "children_spec": []}],
                },
            ],
        },
    ]
)


def saved(value):
    buffer = io.BytesIO()
    torch.save((value, {}), buffer)
    return buffer.getvalue()


MALICIOUS = {
    "sample": ("data/sample_inputs/model.pt", pickle.dumps(RunsCode())),
    "constant": ("model_constants_config.json", edited(pickled_constant)),
    "weights": ("model_weights_config.json", edited(lambda tree: next(iter(tree["config"].values())).update(use_pickle=True))),
    "target": calling("torch.os.system"),
    "operator": calling("_operator.attrgetter"),
    "file": calling("torch.ops.aten.from_file.default"),
    "foreign": calling("torch.ops.mylib.run.default"),
    "key of a check": graph(
        lambda tree: tree.update(
            guards_code=["""1 == 1 or L['" + str(__import__("os").system("touch ran")) + "'].size()[0] == 1"""]
        )
    ),
    "key of a sample": (
        "data/sample_inputs/model.pt",
        saved(({"a\" + str(__import__('os').system('touch ran')) + \"": torch.ones(1)},)),
    ),
    "text for an input": graph(lambda tree: tree["graph_module"]["graph"]["inputs"].append({"as_string": "'"})),
    "guard": graph(lambda tree: tree.update(guards_code=["__import__('os').system('touch ran')"])),
    "expression": graph(lambda tree: tree.update(x={"expr_str": "__import__('os').system('touch ran')"})),
    "structure": graph(lambda tree: tree["graph_module"]["module_call_graph"][0]["signature"].update(out_spec=DEFAULTDICT)),
    "value": graph(lambda tree: tree.update(x={"as_operator": "torch.serialization.os.system"})),
    # Names become part of the source of a function.
    "name": (
        "models/model.json",
        lambda content: content.replace(b'"p_weight"', b"\"p_weight=__import__('os').system('touch ran'),*\""),
    ),
    "ending": ("models/evil.JSON", b"{}"),
    "another graph": (
        "models/evil_config.json",
        json.dumps({"x": {"expr_str": "__import__('os').system('touch ran')"}}).encode(),
    ),
    "called of a tuple": graph(lambda tree: tree.update(guards_code=["(eval,)[0]('1') == 1"])),
    "sympify": graph(lambda tree: tree.update(x={"expr_str": "S('eval')('1')"})),
    "parameter": graph(lambda tree: tree["graph_module"]["module_call_graph"][0]["signature"].update(in_spec=EVIL_KEY)),
    "range": graph(lambda tree: tree.update(range_constraints={"__import__('os').system('touch ran')": {}})),
    "library": ("data/aotinductor/model/x.so", b"\x7fELF"),
}


def test_a_program_is_looked_into_whatever_its_folder_is_called(here, run):
    exported("model.pt2")
    replaced("model.pt2", "bad.pt2", *MALICIOUS["guard"])
    with zipfile.ZipFile("bad.pt2") as old, zipfile.ZipFile("moved.pt2", "w", zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            new.writestr(f"extra_files/{name.partition('/')[2]}", old.read(name))
    assert "holds the check" in run("predict", "moved.pt2", "scans/a.nii.gz", code=1).err


@pytest.mark.parametrize("strict", [False, slow(True)])
@pytest.mark.parametrize("dynamic", [{2: 4 * torch.export.Dim("k", max=4)}, {2: torch.export.Dim.AUTO}])
def test_ordinary_programs_are_not_refused(here, run, dynamic, strict):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module("größe-1", nn.Conv3d(1, 2, 3, padding=1))
            self.add_module("the second", nn.Conv3d(2, 2, 1))

        def forward(self, batch):
            found = getattr(self, "the second")(getattr(self, "größe-1")(batch))
            pooled = nn.functional.interpolate(nn.functional.max_pool3d(found, 2), size=batch.shape[2:])
            larger = nn.functional.interpolate(found, scale_factor=1.5)[..., : batch.shape[-1]]
            return OrderedDict({"scores/all": found, "pooled": pooled, "larger": larger})

    network = Network().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(
            torch.export.export(network, (torch.zeros(1, 1, 8, 8, 8),), dynamic_shapes=(dynamic,), strict=strict), "model.pt2"
        )
    batch = torch.rand(1, 1, 12, 8, 8)
    torch.testing.assert_close(load_model("model.pt2").model(batch), network(batch))


@pytest.mark.parametrize("kind", MALICIOUS)
def test_a_program_that_would_run_code_is_refused(here, run, kind):
    exported("model.pt2")
    replaced("model.pt2", "bad.pt2", *MALICIOUS[kind])
    done = run("predict", "bad.pt2", "scans/a.nii.gz", "-o", "out.nii.gz", code=1)
    assert "it would run code from the file: give --allow-pickle" in done.err
    assert not Path("ran").exists()


def test_two_entries_of_one_name_are_refused(here, run):
    exported("model.pt2")
    with warnings.catch_warnings(), zipfile.ZipFile("model.pt2", "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr(archive.namelist()[0], b"")
    assert "it holds two entries of one name" in run("predict", "model.pt2", "scans/a.nii.gz", code=1).err


def test_only_what_was_looked_into_is_loaded(here, run):
    """Two directories in one archive: one reader takes the one at the end, another that at the place that is written there."""
    exported("model.pt2")
    replaced("model.pt2", "evil.pt2", *MALICIOUS["target"])
    evil, plain = Path("evil.pt2").read_bytes(), Path("model.pt2").read_bytes()
    start = plain.rindex(b"PK\x05\x06")
    end_of_evil = evil.rindex(b"PK\x05\x06")
    Path("both.pt2").write_bytes(
        evil[:end_of_evil]
        + plain[:start]
        + evil[end_of_evil : end_of_evil + 12]
        + plain[start + 12 : start + 16]
        + evil[end_of_evil + 16 :]
    )
    run("predict", "model.pt2", "scans/a.nii.gz", "-o", "expected.nii.gz")
    run("predict", "both.pt2", "scans/a.nii.gz", "-o", "out.nii.gz")
    assert filecmp.cmp("expected.nii.gz", "out.nii.gz", shallow=False)


def test_a_damaged_program_is_an_error(here, run):
    exported("model.pt2")
    content = Path("model.pt2").read_bytes()
    Path("cut.pt2").write_bytes(content[: len(content) // 2])
    assert "cut.pt2 is damaged or truncated" in run("predict", "cut.pt2", "scans/a.nii.gz", code=1).err
    for number in range(30):
        damaged = bytearray(content)
        place = len(content) * (number + 1) // 32
        damaged[place : place + 40] = b"x" * 40
        Path("damaged.pt2").write_bytes(damaged)
        with contextlib.suppress(vx.errors.ModelFileError):
            load_model("damaged.pt2")


def test_results_beside_their_inputs_are_not_taken_for_inputs(here, run):
    for _ in range(2):
        done = run("predict", "mymodels:negative", ".", "-o", "results", "--patch-size", 8)
    assert done.out.endswith("0 done, 3 complete already, 0 failed\n")


def test_a_network_is_known_by_its_weights_and_not_by_its_name(here, run):
    network = exported("model.pt2")
    Path("c:").mkdir()
    os.rename("model.pt2", "c:/model.pt2")
    run("predict", "c:/model.pt2", "scans/a.nii.gz", "-o", "out.nii.gz")
    assert json.loads(Path("out.json").read_text())["models"][0]["name"].startswith("sha256 ")
    torch.save(network.state_dict(), "w.pt")
    arguments = ["predict", "mymodels:network", "scans/a.nii.gz", "-o", "n.nii.gz", "--patch-size", 8, "--weights", "w.pt"]
    run(*arguments)
    network.bias.data += 1
    torch.save(network.state_dict(), "w.pt")
    assert "models was" in run(*arguments, code=1).err


class Shifted(nn.Module):
    """Keeps a number where no checkpoint has it."""

    def __init__(self, shift):
        super().__init__()
        self.shift = torch.tensor(float(shift))

    def forward(self, batch):
        return batch + self.shift


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of TorchScript as such
@pytest.mark.parametrize("kind", [slow("program"), "script", "function"])
def test_another_model_of_the_same_name_is_another_model(here, run, kind):
    example = torch.zeros(1, 1, 8, 8, 8)

    def make(shift):
        if kind == "program":
            torch.export.save(torch.export.export(Shifted(shift), (example,)), "model.pt2")
        elif kind == "script":
            torch.jit.trace(Shifted(shift), example).save("model.ts")
        else:
            Path("mymodels.py").write_text(f"def model(batch):\n    return batch + {shift}\n")
            sys.modules.pop("mymodels", None)
            importlib.invalidate_caches()

    name = {"program": "model.pt2", "script": "model.ts", "function": "mymodels:model"}[kind]
    arguments = ["predict", name, "scans/a.nii.gz", "-o", "out.nii.gz", "--patch-size", 8]
    if kind == "script":
        arguments.append("--allow-pickle")
    make(1)
    run(*arguments)
    assert "is complete" in run(*arguments).out
    make(100)
    assert "is of something else: models was" in run(*arguments, code=1).err


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of TorchScript as such
@pytest.mark.parametrize("name", ["model.pt2", "model.ts", "model.pt"])
def test_torchscript_is_known_by_its_content_and_runs_only_if_that_is_allowed(here, run, name):
    torch.jit.trace(Shifted(1), torch.zeros(1, 1, 8, 8, 8)).save(name)
    arguments = ["predict", name, "scans/a.nii.gz", "-o", "out.nii.gz", "--patch-size", 8]
    assert f"{name} is TorchScript, whatever it is called, and it would run code" in run(*arguments, code=1).err
    assert "give --allow-pickle" in run("info", name, code=1).err
    assert "batch size" in run("info", name, "--allow-pickle").out
    run(*arguments, "--allow-pickle")
    torch.testing.assert_close(data_of("out.nii.gz"), data_of("scans/a.nii.gz").float() + 1, atol=1e-3, rtol=1e-4)


def test_compressed_entries_of_a_program_are_refused(here, run):
    exported("model.pt2")
    with zipfile.ZipFile("model.pt2") as archive, zipfile.ZipFile("packed.pt2", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in archive.namelist():
            packed.writestr(name, archive.read(name) + bytes(2**20))
    assert "is compressed, as torch.export leaves none" in run("info", "packed.pt2", code=1).err


@pytest.mark.parametrize(
    ("expression", "is_plain"),
    [
        ("s0**2 <= 8", True),
        ("Pow(s0, Rational(1, 2))", True),
        ("s0**(-1)", True),
        ("Mod(s0, 8) - 2**3", True),
        ("2**2**2**2**2**2", False),
        ("Pow(Integer(3), Integer(2000000000), True)", False),
        ("Integer(3)**Rational(64, 0.0000001)", False),
        ("LShift(1, 99999999999, 1)", False),
        ("Float('1.5', precision=99999999)", False),
        ("(2**64)**64", False),
        ("1 << 10**9", False),
        ("Pow(2, Pow(2, 100))", False),
        ("s0**s1", False),
        ("+".join(["s0"] * 10_000), False),
    ],
)
def test_checks_of_a_program_come_to_an_end(expression, is_plain):
    assert program_check.is_plain(expression) is is_plain


def test_folders_of_dicom_files(here, run):
    dicom = pydicom.data.get_testdata_file("CT_small.dcm")
    for name in ("1.2.840.1", "1.2.840.2"):
        (here / "dicom" / name).mkdir(parents=True)
        shutil.copy(dicom, here / "dicom" / name / "1.3.6.1.4")
    run("predict", "mymodels:negative", "dicom", "-o", "out", "--patch-size", "32,32,1", "--overlap", 0)
    assert sorted(os.listdir("out")) == ["1.2.840.1.json", "1.2.840.1.nii.gz", "1.2.840.2.json", "1.2.840.2.nii.gz"]
    shutil.copy("scans/a.nii.gz", "dicom/1.2.840.1")
    done = run("predict", "mymodels:negative", "dicom/1.2.840.1", "-o", "more", "--patch-size", 8, code=1)
    assert "holds DICOM files and a.nii.gz" in done.err


def test_links_that_lead_back_are_followed_once(here, run):
    os.symlink(here / "scans", here / "scans" / "b" / "loop")
    done = run("predict", "mymodels:negative", "scans", "-o", "out", "--patch-size", 16)
    assert done.out.endswith("3 done, 0 complete already, 0 failed\n")


def test_what_help_says_in_brackets(here, run):
    text = " ".join(run("predict", "--help").out.replace("│", " ").split())
    assert "[default: where the weights are]" in text
    assert "[default: what is free]" in text


def test_a_batch_that_the_model_cannot_take_is_explained(here, run):
    exported("model.pt2")
    vx.ScalarImage(torch.rand(3, 10, 10, 10)).save("three.nii")
    done = run("predict", "model.pt2", "three.nii", "-o", "out.nii", code=1)
    assert "three.nii has 3 channels, but the model takes 1: give as many" in done.err
    assert "Traceback" not in done.err
    torch.save(nn.Conv3d(1, 2, 3, padding=1).state_dict(), "w.pt")
    arguments = ["mymodels:network", "three.nii", "-o", "out.nii", "--patch-size", 8]
    assert "3 channels as the subject has" in run("predict", *arguments, "--weights", "w.pt", code=1).err
    assert "mymodels:network takes no batch, and so is no model" in run("predict", *arguments, code=1).err


@pytest.mark.parametrize("content", [b"", b"x", b"PK\x03\x04", b"PK\x05\x06" + bytes(18)])
def test_damaged_weights_and_models_are_explained(here, run, content):
    for name in ("bad.pt", "bad.pt2", "bad.ts", "bad.safetensors"):
        Path(name).write_bytes(content)
        given = [name] if name != "bad.safetensors" else ["mymodels:network", "--weights", name]
        for arguments in (given, ["mymodels:network", "--weights", name]):
            done = run("predict", *arguments, "scans/a.nii.gz", "-o", "out.nii", "--patch-size", 8, code=1)
            assert name in done.err
            assert "Traceback" not in done.err


def test_names_of_any_bytes(here, run):
    name = os.fsdecode(b"bad_\xfc.nii")
    shutil.copy("scans/b/a.nii", name)
    run("predict", "mymodels:negative", name, "-o", "out", "--patch-size", 16)
    assert sorted(os.listdir(b"out")) == [b"bad_\xfc.json", b"bad_\xfc.nii.gz"]


@pytest.mark.slow
def test_a_command_that_is_ended_removes_what_it_unpacked(here):
    vx.ScalarImage(torch.rand(1, 24, 24, 20000)).save("long.nii.gz")
    Path("slow.py").write_text("import time\ndef model(batch):\n    time.sleep(0.05)\n    return batch\n")
    (here / "spool").mkdir()
    command = [
        sys.executable,
        "-m",
        "voxloom",
        *["predict", "slow:model", "long.nii.gz", "-o", "out.nii", "--patch-size", "24,24,40"],
    ]
    command += ["--overlap", "0", "--memory-limit", "40MiB"]
    with subprocess.Popen(command, env=os.environ | {"TMPDIR": str(here / "spool")}, stderr=subprocess.PIPE) as process:
        while process.poll() is None and not list((here / "spool").rglob("*.nii")):
            time.sleep(0.01)
        assert process.poll() is None
        time.sleep(1)
        process.terminate()
        process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert os.listdir("spool") == []


def test_a_result_that_was_interrupted_while_it_was_published_is_published(here, run, monkeypatch):
    arguments = ["predict", "mymodels:negative", "scans/a.nii.gz", "-o", "out.nii.gz", "--patch-size", 8]
    put = nifti_store.put

    def killed(source, target, overwrite):
        if target.suffix == ".json":
            raise KeyboardInterrupt
        put(source, target, overwrite)

    with monkeypatch.context() as patch:
        patch.setattr(nifti_store, "put", killed)
        run(*arguments, code=130)
    assert not Path("out.json").exists()
    run(*arguments)
    assert Path("out.json").exists()
    assert run(*arguments).out == "a.nii.gz: out.nii.gz is complete\n"
    assert not Path(".out.voxloom").exists()


@pytest.mark.parametrize(
    ("text", "is_plain"),
    [
        ("Symbol('s77', positive=True, integer=True)", True),
        ("Max(1, 2*s0 + FloorDiv(s1, 2))", True),
        ("s0 <= 10 and Eq(Mod(s0, 4), 0)", True),
        ("exit()", False),
        ("eval('1')", False),
        ("Symbol('a b')", False),
        ("s0.real", False),
        ("(lambda: 0)()", False),
        ("[s0 for s0 in s1]", False),
        ("1 +", False),
        ("L['x'].size()[0] == 2", True),
        ("x.shape[1] % 4 == 0", True),
        ("max(1, L['x'].size()[3] // 2)*max(1, (1 + L['x'].size()[2]) // 2) > 1", True),
        ("Float('0.5', precision=53)", True),
        ("open('x')", False),
        ("open('x').size()", False),
        ("x.__class__", False),
        ("x.size.__class__", False),
        ("__builtins__['exec']", False),
        ("(eval,)[0]('1')", False),
        ("L['x'].size(eval)", False),
        ("L['x'](1)", False),
        ("max(*x)", False),
        ("S('eval')('1')", False),
        ("Symbol(S('1'))", False),
        ("Max('1')", False),
        ("sympify('1')", False),
        ("x.size()['a']", False),
        ("f'{s0}'", False),
        ("(s0 := 1)", False),
        ("s0 if s1 else s2", False),
        ("lambda: 0", False),
    ],
)
def test_expressions_of_sizes_are_told_from_code(text, is_plain):
    assert program_check.is_plain(text) is is_plain


def test_pickled_models_and_weights_run_only_if_that_is_allowed(here, run):
    torch.save(nn.Conv3d(1, 2, 3, padding=1), "whole.pt")
    with open("bad.pt", "wb") as file:
        pickle.dump(RunsCode(), file)
    torch.save({"state_dict": {}, "hook": RunsCode()}, "bad.ckpt")
    for arguments in (["whole.pt"], ["bad.pt"], ["mymodels:network", "--weights", "bad.ckpt"]):
        done = run("predict", arguments[0], "scans/a.nii.gz", "-o", "out.nii.gz", "--patch-size", 8, *arguments[1:], code=1)
        assert "it would run code from the file: give --allow-pickle" in done.err
    assert not Path("ran").exists()
    run("predict", "whole.pt", "scans/a.nii.gz", "-o", "out.nii.gz", "--patch-size", 8, "--allow-pickle")
    assert data_of("out.nii.gz").shape == (2, 20, 18, 17)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("missing.pt2", [], "there is no file missing.pt2"),
        ("missing", [], "a model is a .pt2 or TorchScript file, or package.module:callable"),
        ("nomodule:x", [], "nomodule:x cannot be imported: No module named 'nomodule'"),
        ("mymodels:x", [], "has no attribute 'x'"),
        (":x", [], ":x cannot be imported"),
        (".a:x", [], ".a:x cannot be imported"),
        ("scans", [], "scans is a folder: a model is"),
        ("mymodels:negative", ["--weights", "other.pt"], "cannot make a network"),
        ("mymodels:number", [], "is of type int, which cannot be called"),
        ("mymodels:Network", [], "is a class, which makes networks: give its weights"),
        ("mymodels:network", ["--weights", "none.pt"], "there is no file of weights none.pt"),
        ("mymodels:network", ["--weights", "other.pt"], "the weights in other.pt do not fit Conv3d"),
        ("mymodels:network", ["--weights", "text.safetensors"], "text.safetensors is not a file of safetensors"),
        ("mymodels:network", ["--weights", "text.pt"], "text.pt"),
        ("mymodels:network", ["--weights", "list.pt"], "list.pt holds no weights by name"),
        ("text.pt", [], "text.pt is no torch.export program"),
        ("mymodels:negative", ["--device", "tpu"], "device is 'tpu'"),
        ("script.pt", ["--weights", "other.pt"], "holds its weights itself"),
    ],
)
def test_models_that_cannot_be_had(here, run, model, options, message):
    torch.save(nn.Conv3d(1, 5, 3).state_dict(), "other.pt")
    torch.save([1], "list.pt")
    for name in ("text.pt", "text.safetensors", "script.pt"):
        Path(name).write_text("not a model")
    done = run("predict", model, "scans/a.nii.gz", "-o", "out.nii.gz", "--patch-size", 8, *options, code=1)
    assert message in done.err
    assert "Traceback" not in done.err


EDITED = """
import torch
from torch import nn

THRESHOLD = 0.5
network = nn.Conv3d(1, 1, 1)
with torch.no_grad():
    network.weight.fill_(1)
    network.bias.fill_(0)

def model(batch):
    return (network(batch) > THRESHOLD).float()

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls, self.last = 0, None
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, batch):
        self.calls += 1
        self.last = batch
        return (batch * self.weight) ** 2
"""


@pytest.mark.parametrize("name", ["model", "Net"])
def test_code_that_was_edited_is_another_model(here, run, name):
    module = f"edited_{name}"
    Path(f"{module}.py").write_text(EDITED)
    torch.save({"weight": torch.ones(1)}, "w.pt")
    given = ["--weights", "w.pt"] if name == "Net" else []
    arguments = ["predict", f"{module}:{name}", "scans", "-o", "o", "--patch-size", "8", "--dtype", "float32", *given]
    run(*arguments)
    assert "0 done, 3 complete already, 0 failed" in run(*arguments).out
    Path(f"{module}.py").write_text(EDITED.replace("0.5", "0.25"))
    again = run(*arguments, code=1)
    assert again.err.count("exists, and is of something else: models was") == 3
    Path(f"{module}.py").write_text(EDITED)
    assert "0 done, 3 complete already, 0 failed" in run(*arguments).out
    if name == "Net":
        torch.save({"weight": torch.zeros(1)}, "w.pt")
        assert run(*arguments, code=1).err.count("exists, and is of something else: models was") == 3


def test_weights_of_wrapped_networks(here):
    Path("wrapped.py").write_text(
        "from collections import OrderedDict\nfrom torch import nn\n"
        "def network():\n    return nn.Sequential(OrderedDict(module=nn.Conv3d(1, 2, 1)))\n"
    )
    state = nn.Sequential(OrderedDict(module=nn.Conv3d(1, 2, 1))).state_dict()
    wrapped = {f"_orig_mod.module.{name}": value for name, value in state.items()}
    for number, content in enumerate((state, wrapped, {"model": {"state_dict": wrapped}})):
        torch.save(content, f"{number}.pt")
        loaded = load_model("wrapped:network", Path(f"{number}.pt"))
        assert torch.equal(loaded.model.module.weight, state["module.weight"])
    torch.save({1: torch.ones(1)}, "numbers.pt")
    with pytest.raises(vx.errors.ModelFileError, match="holds no weights by name"):
        load_model("wrapped:network", Path("numbers.pt"))


def test_a_module_that_fails_when_it_is_imported(here, run):
    Path("fails.py").write_text("1 / 0")
    done = run("predict", "fails:model", "scans/a.nii.gz", "--patch-size", 8, code=1)
    assert "fails:model cannot be imported, for it fails with ZeroDivisionError" in done.err


def test_a_result_of_another_image_is_not_taken_for_complete(here, run):
    vx.ScalarImage(torch.rand(1, 20, 18, 17)).save("other.nii")
    arguments = ["predict", "mymodels:negative", "other.nii", "-o", "out/other.nii", "--patch-size", 8]
    Path("out").mkdir()
    run(*arguments)
    run("predict", "mymodels:negative", "scans/b/a.nii", "-o", "out/a.nii", "--patch-size", 8)
    Path("out/a.nii").replace("out/other.nii")
    assert "other.json is not of it as it is now" in run(*arguments, code=1).err


def test_overwriting_leaves_the_record_of_a_result_of_another_ending(here, run):
    arguments = ["predict", "mymodels:negative", "scans/b/a.nii", "--patch-size", 8]
    run(*arguments, "-o", "a.nii.gz")
    before = Path("a.json").read_text()
    assert "says how a.nii.gz was made" in run(*arguments, "-o", "a.nii", "--overwrite", code=1).err
    assert Path("a.json").read_text() == before
    assert "is complete" in run(*arguments, "-o", "a.nii.gz").out


@pytest.mark.filterwarnings("ignore:.*is resumed")
def test_what_an_interrupted_overwriting_left_is_named(here, run, monkeypatch):
    arguments = ["predict", "mymodels:negative", "scans/a.nii.gz", "-o", "out.nii", "--patch-size", 8]
    run(*arguments)
    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "all_written", lambda log: (_ for _ in ()).throw(KeyboardInterrupt))
        run(*arguments, "--overwrite", code=130)
    assert "is complete; .out.voxloom is left of a run that was interrupted: --overwrite resumes it" in run(*arguments).out
    run(*arguments, "--overwrite")
    assert run(*arguments).out.endswith("is complete\n")


def test_results_among_the_inputs_are_refused_before_anything_starts(here, run):
    assert "is the folder of the images" in run("predict", "mymodels:negative", "scans", "-o", "scans", code=1).err
    Path("plain").write_text("mine")
    done = run("predict", "mymodels:negative", "scans", "-o", "plain", "--patch-size", 8, code=1)
    assert "plain is a file: give the name of a folder" in done.err


@pytest.mark.parametrize("option", ["--threshold", "--mask-above"])
def test_numbers_that_are_none_are_refused(here, run, option):
    assert "is nan" in run("predict", "mymodels:negative", "scans/a.nii.gz", "--patch-size", 8, option, "nan", code=1).err


def test_a_model_without_a_patch_size_needs_one(here, run):
    assert "give --patch-size" in run("predict", "mymodels:negative", "scans/a.nii.gz", code=1).err


# Plan and info


def test_plan_says_what_predict_would_do(here, run):
    done = run("plan", "mymodels:two_channels", "scans", "--patch-size", 8, "--labels", "--memory-limit", "1GiB")
    assert done.out.count("patches: ") == 3
    assert done.out.count("memory: ") == 3
    assert not Path("predictions").exists()
    Path("scans/a.nii.gz").write_bytes(b"damaged")
    done = run("plan", "mymodels:two_channels", "scans", "--patch-size", 8, code=1)
    assert done.out.count("patches: ") == 2
    assert "voxloom: a.nii.gz failed: " in done.err


def test_info_says_what_a_file_is(here, run):
    image = vx.ScalarImage(torch.rand(3, 5, 6, 7), affine=np.diag([-1, -2, 3.5, 1]))
    image.save("x.nii.gz")
    done = run("info", "x.nii.gz", "scans/b/c.mha")
    assert "shape:       (5, 6, 7), 3 channels" in done.out
    assert "type:        float32, 0.0 MiB in memory" in done.out
    assert "spacing:     (1, 2, 3.5) mm" in done.out
    assert "orientation: LPS+" in done.out
    assert "read:        as a whole" in done.out
    assert "there is no file y.nii" in run("info", "y.nii", "x.nii.gz", code=1).err


@pytest.mark.filterwarnings("ignore:the mask has no voxel:RuntimeWarning")
def test_masks_thresholds_and_other_options_reach_predict(here, run):
    image = data_of("scans/a.nii.gz")
    run("predict", "mymodels:two_channels", "scans/a.nii.gz", "-o", "t.nii", "--patch-size", 8, "--threshold", 300.5)
    assert torch.equal(data_of("t.nii"), (torch.cat([image.float(), 500 - image.float()]) > 300.5).to(torch.uint8))
    run(
        "predict", "mymodels:two_channels", "scans/a.nii.gz", "-o", "c.nii", "--patch-size", 8, "--channels", 1, "--mirror", "0,2"
    )
    torch.testing.assert_close(data_of("c.nii"), 500 - image.float())
    mask = torch.zeros(1, 20, 18, 17, dtype=torch.uint8)
    mask[0, 2, 2, 2] = 1
    vx.LabelMap(mask).save("mask.nii.gz")
    run(
        "predict",
        "mymodels:negative",
        "scans/a.nii.gz",
        "-o",
        "m.nii",
        "--patch-size",
        8,
        "--overlap",
        0,
        "--mask",
        "mask.nii.gz",
    )
    inside = torch.zeros_like(mask, dtype=torch.bool)
    inside[:, :8, :8, :8] = True
    torch.testing.assert_close(data_of("m.nii"), torch.where(inside, -image.float(), 0))
    run("predict", "mymodels:negative", "scans/a.nii.gz", "-o", "n.nii", "--patch-size", 8, "--mask-above", 5000)
    assert not data_of("n.nii").any()
    options = ["--activation", "softmax", "--padding", "edge", "--amp", "--device", "cpu", "--batch-size", 2]
    run("predict", "mymodels:two_channels", "scans/a.nii.gz", "-o", "s.nii", "--patch-size", 8, *options)
    torch.testing.assert_close(data_of("s.nii").sum(0), torch.ones(20, 18, 17))


def test_results_on_another_grid(here, run):
    vx.ScalarImage(torch.zeros(1, 9, 8, 7), affine=np.diag([2.3, 1.7, 2.9, 1])).save("native.nii")
    run("predict", "mymodels:negative", "scans/a.nii.gz", "-o", "out.nii.gz", "--patch-size", 8, "--like", "native.nii")
    expected = vx.predict(torch.neg, vx.ScalarImage("scans/a.nii.gz"), 8, like="native.nii", dtype=torch.float32)
    made = vx.ScalarImage("out.nii.gz")
    assert np.array_equal(made.affine, vx.ScalarImage("native.nii").affine)
    torch.testing.assert_close(made.data, expected.data)
    run("predict", "mymodels:negative", "scans/a.nii.gz", "-o", "near.nii", "--patch-size", 8, "--like", "native.nii",
        "--interpolation", "nearest,nearest,linear")  # fmt: skip
    assert not torch.equal(data_of("near.nii"), data_of("out.nii.gz"))
    plan = run("plan", "mymodels:negative", "scans/a.nii.gz", "--patch-size", 8, "--like", "native.nii")
    assert "result:  9 × 8 × 7 voxels" in plan.out


def test_how_patches_lie_on_the_command_line(here, run):
    command = ["predict", "mymodels:two_channels", "scans/a.nii.gz", "--dtype", "float32"]
    run(
        *command,
        "-o",
        "e.nii",
        "--patch-size",
        "8,-1,8",
        "--patch-spacing",
        "even",
        "--overlap",
        0.3,
        "--mode",
        "gaussian:0.2,0.3,0.4",
    )
    made = vx.ScalarImage("e.nii")
    assert made.data.shape[0] == 2
    image = vx.ScalarImage("scans/a.nii.gz").data.float()
    torch.testing.assert_close(made.data[0], image[0])
    for options, text in (
        (["--mode", "hann:0.2"], "only gaussian has a width"),
        (["--mode", "hanning"], "--mode is 'hanning': it must be one of crop, average, hann, gaussian, nnunet and monai"),
        (["--mode", "gaussian:wide"], "give a number"),
        (["--mode", "gaussian:-1"], "width of a Gaussian"),
        (["--patch-spacing", "odd"], "patch_spacing is 'odd'"),
    ):
        assert text in run(*command, "-o", "f.nii", "--patch-size", 8, *options, code=1).err


def test_a_run_of_the_command_equals_the_call(here, run):
    exported("model.pt2")
    run("predict", "model.pt2", "scans/a.nii.gz", "-o", "out.nii.gz", "--labels")
    model = torch.export.load("model.pt2").module()
    vx.predict(model, "scans/a.nii.gz", 8, reduce="argmax", output="call.nii.gz")
    assert filecmp.cmp("out.nii.gz", "call.nii.gz", shallow=False)


def test_models_of_slices_on_the_command_line(here, run):
    (here / "flat.py").write_text("def first(batch):\n    assert batch.ndim == 4\n    return batch[:, :1].float() * 2\n")
    sys.path.insert(0, str(here))
    command = ["predict", "flat:first", "scans/a.nii.gz", "--slice-axis", 2, "-o"]
    run(*command, "a.nii", "--patch-size", "8,8")
    torch.testing.assert_close(data_of("a.nii"), vx.ScalarImage("scans/a.nii.gz").data.float() * 2)
    run(*command, "b.nii", "--patch-size", 8, "--context", "0,0,1")
    assert "height,width" in run(*command, "c.nii", code=1).err


@pytest.mark.slow
def test_a_model_is_packed_with_what_it_expects(here, run):
    (here / "nets.py").write_text("import torch\n\ndef net():\n    return torch.nn.Conv3d(2, 3, 1)\n")
    sys.path.insert(0, str(here))
    torch.save(torch.nn.Conv3d(2, 3, 1).state_dict(), here / "w.pth")
    spec = vx.ModelSpec(
        channels=("T1", "T2"), spacing=(2, 2, 2), intensity=(vx.Intensity(scale="z-score"),), patch_size=8, reduce="argmax"
    )
    spec.write(here / "expects.json")
    run("pack", "nets:net", "--weights", "w.pth", "--spec", "expects.json", "-o", "packed.pt2")
    assert '"T2"' in run("info", "packed.pt2").out
    assert "exists" in run("pack", "packed.pt2", "--spec", "expects.json", "-o", "packed.pt2", code=1).err
    run("pack", "packed.pt2", "--spec", "expects.json", "-o", "again.pt2")
    for name in ("T2", "T1"):
        vx.ScalarImage(torch.rand(1, 20, 18, 17), affine=np.diag([1, 1, 3, 1])).save(f"{name}.nii.gz")
    (here / "cases.csv").write_text("case,T2,T1\nfirst,T2.nii.gz,T1.nii.gz\n")
    run("predict", "again.pt2", "--table", "cases.csv", "-o", "out")
    made = vx.LabelMap("out/first.nii.gz")
    assert made.spatial_shape == (20, 18, 17)
    expected = vx.predict("packed.pt2", vx.Subject(T1=vx.ScalarImage("T1.nii.gz"), T2=vx.ScalarImage("T2.nii.gz")))
    assert torch.equal(made.data, expected.data)
    (here / "other.csv").write_text("case,T2,FLAIR\nfirst,T2.nii.gz,T1.nii.gz\n")
    assert "'T1' is missing" in run("predict", "again.pt2", "--table", "other.csv", "-o", "else", code=1).err
    spec = vx.ModelSpec(patch_size=8)
    spec.write(here / "plain.json")
    run("predict", "again.pt2", "--table", "cases.csv", "-o", "raw", "--spec", "plain.json")
    assert vx.ScalarImage("raw/first.nii.gz").num_channels == 3
    for wrong, text in (("w.pth", "no torch.export program"), ("nets:net", "makes a network")):
        assert text in run("pack", wrong, "--spec", "plain.json", "-o", "no.pt2", code=1).err
    assert "must say its channels" in run(
        "pack", "nets:net", "--weights", "w.pth", "--spec", "plain.json", "-o", "no.pt2", code=1
    ).err  # fmt: skip
