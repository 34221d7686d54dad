"""The command, as a person runs it."""

import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest
import torch

import voxloom as vx


def voxloom(*arguments, cwd=None, code=0):
    done = subprocess.run(
        [sys.executable, "-m", "voxloom", *map(str, arguments)], capture_output=True, text=True, cwd=cwd, check=False
    )
    assert done.returncode == code, done.stderr
    return done


def test_version_and_help():
    assert voxloom("--version").stdout.strip() == vx.__version__
    assert "patch by patch" in voxloom("demo", "--help").stdout


@pytest.mark.slow
def test_the_demonstration_writes_a_volume_and_a_picture_and_says_where(tmp_path):
    done = voxloom("demo", "--size", 48, "--patch-size", 24, "--steps", 2, cwd=tmp_path)
    lines = dict(line.split(":", 1) for line in done.stdout.splitlines() if ":" in line)
    assert float(lines["Greatest difference between the whole and the patches"].split("(")[0]) < 1e-4
    assert lines["Volume"].strip() == str(tmp_path / "demo" / "result.nii.gz")
    assert lines["Picture"].strip() == str(tmp_path / "demo" / "result.png")
    assert "Batches: 100%" in done.stderr
    labels, scan = (vx.LabelMap(tmp_path / "demo" / f"scan{ending}.nii.gz") for ending in ("_labels", ""))
    assert labels.spatial_shape == scan.spatial_shape
    assert scan.orientation == ("L", "P", "S")
    assert "grey matter" in (tmp_path / "demo" / "scan_labels.html").read_text()
    again = ("predict", "demo/trained.pt2", "demo/scan.nii.gz", "-o", "demo/again.nii.gz")
    voxloom(*again, cwd=tmp_path)
    assert torch.equal(vx.LabelMap(tmp_path / "demo" / "again.nii.gz").data, labels.data)
    volume = vx.ScalarImage(tmp_path / "demo" / "result.nii.gz")
    phantom = vx.datasets.HeadPhantom(48)
    assert volume.spatial_shape == (48, 48, 48)
    np.testing.assert_allclose(volume.affine, phantom.t1.affine, atol=1e-5)
    assert volume.data.max() > 1
    picture = matplotlib.image.imread(tmp_path / "demo" / "result.png")
    assert picture.shape[1] > 1000
    panels = np.array_split(picture[..., :3].mean(axis=2), 4, axis=1)
    assert all(panel.std() > 0.01 for panel in panels[:2] + panels[3:])


def test_the_demonstration_replaces_nothing_but_its_own(tmp_path, run):
    image = tmp_path / "scan.nii.gz"
    vx.ScalarImage(torch.rand(1, 16, 16, 16)).save(image)
    before = image.read_bytes()
    for output in (tmp_path, tmp_path / "demo"):
        (tmp_path / "demo").mkdir(exist_ok=True)
        (tmp_path / "demo" / "input.nii.gz").write_text("mine")
        done = run("demo", "--steps", 0, "--size", 16, "--patch-size", 8, "--output", output, code=1)
        assert "not of a demonstration before" in done.err
        done = run("demo", "--steps", 0, "--image", image, "--output", tmp_path, code=1)
        assert "whose files are replaced" in done.err
    assert image.read_bytes() == before
    assert (tmp_path / "demo" / "input.nii.gz").read_text() == "mine"
    for _ in range(2):
        run("demo", "--steps", 0, "--size", 16, "--patch-size", 12, "--output", tmp_path / "new")


@pytest.mark.skipif(sys.platform == "win32", reason="bash closes the streams")
def test_what_nobody_reads_is_no_error():
    said = "from voxloom.cli.reporting import Report; r = Report(); [r.say('x' * 4096) for _ in range(99)]; r.warn('done')"
    done = subprocess.run(
        ["bash", "-c", f'set -o pipefail; {sys.executable} -c "{said}" | true'], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "done\n")
    shown = "from voxloom.runtime.progress import shown\nwith shown('a', 2, 'parts') as told: told(1)"
    done = subprocess.run(["bash", "-c", f'{sys.executable} -c "{shown}" 2>&-'], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_an_image_of_ones_own(tmp_path, run):
    image = vx.ScalarImage(torch.rand(2, 30, 20, 1), affine=np.diag([1, 2, 3, 1]))
    image.save(tmp_path / "flat.nii.gz")
    output = tmp_path / "a" / "b"
    done = run("demo", "--steps", 0, "--image", tmp_path / "flat.nii.gz", "--output", output, "--overlap-mode", "hann")
    assert "Greatest difference" in done.out
    assert vx.ScalarImage(tmp_path / "a" / "b" / "result.nii.gz").shape == (1, 30, 20, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "missing.nii"], "voxloom: there is no file missing.nii"),
        (["--overlap-mode", "blend"], "voxloom: Overlap mode must be one of"),
        (["--patch-size", "0"], "voxloom: patch_size"),
        (["--patch-overlap", "64"], "smaller than the patch size"),
        (["--output", "file/sub"], "voxloom: the folder file/sub cannot be made"),
    ],
)
def test_mistakes_are_explained_without_a_traceback(tmp_path, monkeypatch, run, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    done = run("demo", "--size", 24, *arguments, code=1)
    assert message in done.err
    assert "Traceback" not in done.err


@pytest.mark.slow
def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = run("demo", "--size", 24, "--patch-size", 16, "--steps", 1)
    assert "Picture: none: pictures need matplotlib: pip install 'voxloom[plot]'" in done.out
    assert (tmp_path / "demo" / "result.nii.gz").exists()
    assert not (tmp_path / "demo" / "result.png").exists()
