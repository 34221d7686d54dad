"""Writing an image in a process that ends before any change of the file system: the next call removes what it left."""

import os
import shutil
import subprocess
import sys
import time

import pytest
import torch

import voxloom as vx
from ended import is_ended_at
from slow import slow
from voxloom.errors import TargetExistsError
from voxloom.runtime import marks
from voxloom.runtime.marks import is_of_dead, left_by_dead, new_mark


@pytest.fixture(autouse=True)
def always_looks(monkeypatch):
    """However busy the machine is."""
    monkeypatch.setattr(marks, "SHORT_SECONDS", 3600)


VALUES = torch.arange(20 * 9 * 8, dtype=torch.float32).reshape(1, 20, 9, 8)
WAYS = {
    "save": lambda path: vx.ScalarImage(VALUES).save(path),
    "convert": lambda path: vx.convert(vx.ScalarImage(VALUES), path, **({"chunks": 8} if "zarr" in path.name else {})),
    "split": lambda path: vx.split_labels(vx.LabelMap((VALUES % 3).to(torch.uint8)), path, overwrite=True),
}
CASES = [
    ("save", "a.nii.gz", 1),
    ("save", "a.nii", 1),
    ("save", "a.nrrd", 1),
    ("save", "a.ome.zarr", 7),
    ("convert", "a.nii.gz", 1),
    ("convert", "a.ome.zarr", 7),
    slow("convert", "a.mha", 1),
    slow("convert", "a.zarr", 5),
    ("split", "parts", 2),
]


@pytest.mark.parametrize(("way", "name", "every"), CASES)
def test_the_next_call_leaves_nothing(tmp_path, way, name, every):
    write, folder = WAYS[way], tmp_path / "folder"
    for step in range(0, 1000, every):
        folder.mkdir()
        (folder / ".other.unfinished").touch()
        if not is_ended_at(step, lambda: write(folder / name)):
            break
        try:
            write(folder / name)
        except (TargetExistsError, vx.errors.SaveError):
            assert (folder / name).exists()  # the process had put it there
        if way != "split":
            assert torch.equal(vx.ScalarImage(folder / name).data, VALUES)
        assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == [".other.unfinished"]
        shutil.rmtree(folder)
    assert step > 2
    assert name in os.listdir(folder)


KEPT = VALUES + 1000


@pytest.mark.parametrize("other", ["a.zarr", slow("a.ome.zarr")])
def test_what_is_replaced_is_whole_until_the_new_one_is_in_place(tmp_path, other):
    """Whenever a process is killed, and whatever of the same stem is written afterwards."""
    folder = tmp_path / "folder"
    for step in range(40, 1000, 3):
        folder.mkdir()
        vx.convert(vx.ScalarImage(KEPT), folder / "a.zarr", chunks=8)
        if not is_ended_at(step, lambda: vx.convert(vx.ScalarImage(VALUES), folder / "a.zarr", chunks=8, overwrite=True)):
            break
        was_there = (folder / "a.zarr").exists()
        try:
            vx.convert(vx.ScalarImage(VALUES - 1), folder / other, chunks=8)
        except TargetExistsError:
            assert other == "a.zarr"
        if other == "a.ome.zarr":
            assert torch.equal(vx.ScalarImage(folder / other).data, VALUES - 1)
            if not was_there:  # it has another name until it is asked for again
                with pytest.raises(TargetExistsError):
                    vx.convert(vx.ScalarImage(VALUES - 1), folder / "a.zarr", chunks=8)
        found = vx.ScalarImage(folder / "a.zarr").data
        assert torch.equal(found, KEPT) or torch.equal(found, VALUES)
        shutil.rmtree(folder)
    assert step > 60


@pytest.mark.slow
def test_labels_that_were_being_replaced_come_back_and_are_kept(tmp_path):
    """A process was killed that might replace them; the next call may not."""
    folder = tmp_path / "folder"
    labels = vx.LabelMap((VALUES % 3).to(torch.uint8))
    for step in range(200):
        folder.mkdir()
        vx.split_labels(labels, folder / "parts")
        before = (folder / "parts" / "labels.json").stat().st_ino
        if not is_ended_at(step, lambda: vx.split_labels(labels, folder / "parts", overwrite=True)):
            break
        is_replaced = (folder / "parts").exists() and (folder / "parts" / "labels.json").stat().st_ino != before
        with pytest.raises(vx.errors.SaveError, match="exists, and is kept"):
            vx.split_labels(labels, folder / "parts")
        assert is_replaced or (folder / "parts" / "labels.json").stat().st_ino == before
        assert [path.name for path in folder.iterdir()] == ["parts"]
        shutil.rmtree(folder)
    assert step > 10


def test_what_cannot_be_removed_does_not_stop_a_save(tmp_path):
    mark = new_mark()
    dead = f"{mark[:12]}{2**31 - 1:08x}{mark[20:]}"
    (tmp_path / f".a.nii.{dead}.unfinished.nii").mkdir()
    vx.ScalarImage(VALUES).save(tmp_path / "a.nii")
    assert torch.equal(vx.ScalarImage(tmp_path / "a.nii").data, VALUES)


def test_a_large_folder_is_not_looked_through_at_every_save(tmp_path, monkeypatch):
    looked = []
    scandir = os.scandir

    def slow(folder):
        looked.append(folder)
        time.sleep(0.05)
        return scandir(folder)

    monkeypatch.setattr(marks, "SHORT_SECONDS", 0.02)
    monkeypatch.setattr(marks.os, "scandir", slow)
    for _ in range(5):
        assert list(left_by_dead(tmp_path, ".a.")) == []
    assert len(looked) == 1


def test_a_process_that_nobody_has_waited_for_is_dead(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    mark = new_mark()
    other = f"{mark[:12]}{process.pid:08x}{mark[20:]}"
    assert not is_of_dead(other)
    process.stdin.close()
    until = time.monotonic() + 20
    while not is_of_dead(other) and time.monotonic() < until:
        time.sleep(0.05)
    assert is_of_dead(other)  # though its number is not free yet
    process.wait()
    assert is_of_dead(other)


def test_where_the_system_says_nothing_nothing_is_known(monkeypatch):
    mark = new_mark()
    dead = f"{mark[:12]}{2**31 - 1:08x}{mark[20:]}"
    monkeypatch.setattr(marks.os, "name", "nt")
    assert not is_of_dead(dead)


def test_a_cache_forgets_what_a_killed_process_was_writing(tmp_path):
    vx.ScalarImage(VALUES).save(tmp_path / "scan.nii")
    dataset = vx.SubjectsDataset([vx.Subject(scan=vx.ScalarImage(tmp_path / "scan.nii"))])
    found = 0
    for step in range(100):
        if not is_ended_at(step, lambda: vx.SubjectsCache(dataset, tmp_path / "cache")[0]):
            break
        found += len(list((tmp_path / "cache").glob(".*.unfinished"))) if (tmp_path / "cache").exists() else 0
        assert torch.equal(vx.SubjectsCache(dataset, tmp_path / "cache")[0]["scan"].data, VALUES)
        assert list((tmp_path / "cache").glob(".*.unfinished")) == []
        shutil.rmtree(tmp_path / "cache")
    assert found > 2


def test_marks_say_whose_they_are(tmp_path, monkeypatch):
    own, other = new_mark(), new_mark()
    assert own != other
    assert not is_of_dead(own)
    dead = f"{own[:12]}{2**31 - 1:08x}{own[20:]}"
    assert is_of_dead(dead)
    for mark in (own, dead):
        (tmp_path / f".a.b.{mark}.unfinished").touch()
    (tmp_path / f".a.{dead}.unfinished").touch()
    assert [path.name for _, path in left_by_dead(tmp_path, ".a.b.", r"\.unfinished")] == [f".a.b.{dead}.unfinished"]
    assert list(left_by_dead(tmp_path / "none", ".a.")) == []
    monkeypatch.setattr(marks, "_here", lambda: "0" * 12)  # on another machine, of which nothing is known
    assert not is_of_dead(dead)
