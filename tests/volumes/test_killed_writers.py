"""Writing an image in a process that ends before any change of the file system: the next call removes what it left."""

import os
import shutil

import pytest
import torch

import voxloom as vx
from ended import is_ended_at
from voxloom.errors import TargetExistsError
from voxloom.runtime import marks
from voxloom.runtime.marks import is_of_dead, left_by_dead, new_mark

VALUES = torch.arange(20 * 9 * 8, dtype=torch.float32).reshape(1, 20, 9, 8)
WAYS = {
    "save": lambda path: vx.ScalarImage(VALUES).save(path),
    "convert": lambda path: vx.convert(vx.ScalarImage(VALUES), path, **({"chunks": 8} if "zarr" in path.name else {})),
    "split": lambda path: vx.split_labels(vx.LabelMap((VALUES % 3).to(torch.uint8)), path),
}
CASES = [
    ("save", "a.nii.gz", 1),
    ("save", "a.nii", 1),
    ("save", "a.nrrd", 1),
    ("save", "a.ome.zarr", 7),
    ("convert", "a.nii.gz", 1),
    ("convert", "a.mha", 1),
    ("convert", "a.ome.zarr", 7),
    ("convert", "a.zarr", 5),
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
