"""Sizes of memory, as users write and read them."""

import re
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

import voxloom as vx
from voxloom.core.sizes import pretty_bytes
from voxloom.errors import SizeError
from voxloom.io.spooling import spooled
from voxloom.runtime import limits
from voxloom.runtime.limits import as_bytes, free_bytes


@pytest.mark.parametrize(
    ("text", "number"),
    [("2GiB", 2**31), ("2 gib", 2**31), ("1.5 MB", 1_500_000), ("500", 500), (1e6, 10**6), (7, 7), ("3KiB", 3072), ("4 B", 4)],
)
def test_numbers_of_bytes(text, number):
    assert as_bytes(text, "memory_limit") == number


@pytest.mark.parametrize("text", ["much", "2 GG", "-1", 0, -5, True, None, "0", float("nan"), float("inf"), "1e3"])
def test_what_is_no_number_of_bytes(text):
    with pytest.raises(SizeError, match="memory_limit is .*: it must be a positive number of bytes"):
        as_bytes(text, "memory_limit")


def test_bytes_for_people():
    assert [pretty_bytes(number) for number in (0, 1023, 1024, 2**20 * 1.25, 2**50)] == [
        "0 bytes",
        "1023 bytes",
        "1.0 KiB",
        "1.2 MiB",
        "1024.0 TiB",
    ]


def test_there_is_free_memory():
    free = free_bytes()
    assert free is None or 2**20 < free < 2**50


def test_what_is_kept_of_files_counts_as_free(tmp_path, monkeypatch):
    root = tmp_path / "cgroup"
    job = root / "jobs" / "mine"
    job.mkdir(parents=True)
    for folder, limit in ((root / "jobs", 10 * 2**30), (job, 2**30)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{900 * 2**20}\n")
        (folder / "memory.stat").write_text(f"anon 5\ninactive_file {500 * 2**20}\n")
    own = tmp_path / "own"
    own.write_text("0::/jobs/mine\n")
    monkeypatch.setattr(limits, "GROUPS", ((root, "memory.max", "memory.current", "inactive_file"),))
    monkeypatch.setattr(limits, "OWN_GROUPS", own)
    whole = free_bytes()
    assert whole <= 2**30 - 400 * 2**20
    (job / "memory.stat").write_text("anon 5\ninactive_file 0\n")
    assert free_bytes() == min(whole, 2**30 - 900 * 2**20)
    (root / "jobs" / "memory.max").write_text(f"{901 * 2**20}\n")
    (root / "jobs" / "memory.stat").write_text("anon 5\n")
    assert free_bytes() == 2**20


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_least_limit_that_is_named_is_enough(tmp_path):
    """Decoded chunks of the input have a share of it, which grows with it."""
    vx.convert(vx.ScalarImage(torch.rand(1, 200, 160, 120)), tmp_path / "scan.ome.zarr", chunks=80)
    options = {"patch_size": 32, "output": tmp_path / "out.nii"}
    with pytest.raises(SizeError) as refused:
        vx.predict(torch.nn.Identity(), tmp_path / "scan.ome.zarr", memory_limit=1, **options)
    least = int(re.search(r"\((\d+) bytes\) are needed", str(refused.value))[1])
    with pytest.raises(SizeError, match=rf"\({least} bytes\) are needed"):
        vx.predict(torch.nn.Identity(), tmp_path / "scan.ome.zarr", memory_limit=least - 1, **options)
    vx.predict(torch.nn.Identity(), tmp_path / "scan.ome.zarr", memory_limit=least, **options)


def test_unpacked_files_of_killed_processes_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    vx.ScalarImage(torch.rand(1, 16, 16, 12)).save(tmp_path / "x.nii.gz")
    script = f"""
        import os, signal, tempfile, voxloom as vx
        from voxloom.io.spooling import spooled
        tempfile.tempdir = {str(tmp_path)!r}
        with spooled(vx.ScalarImage("x.nii.gz")):
            os.kill(os.getpid(), signal.SIGKILL)
    """
    process = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=tmp_path, check=False)
    assert process.returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob("voxloom-*"))) == 1
    with spooled(vx.ScalarImage(tmp_path / "x.nii.gz")) as source:
        assert len(list(tmp_path.glob("voxloom-*"))) == 1
        assert source.shape == (1, 16, 16, 12)
    assert not list(tmp_path.glob("voxloom-*"))
