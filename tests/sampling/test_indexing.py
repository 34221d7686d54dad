"""Sums of maps beside their files: found again, the same draws, and never those of another state of the file."""

import errno
import os

import numpy as np
import pytest
import torch

import voxloom as vx
from voxloom.errors import ImageError, SaveError
from voxloom.runtime.marks import new_mark
from voxloom.sampling import indexing


@pytest.fixture(params=[".nii", ".ome.zarr"])
def path(tmp_path, request):
    labels = (torch.rand(1, 30, 20, 25, generator=torch.Generator().manual_seed(0)) * 4).to(torch.uint8)
    vx.LabelMap(labels).save(tmp_path / f"seg{request.param}")
    return tmp_path / f"seg{request.param}"


def subject(path):
    return vx.Subject(seg=vx.LabelMap(path))


SAMPLERS = {
    "label": lambda seed: vx.LabelSampler(8, "seg", {1: 1, 2: 3}, seed=seed),
    "weighted": lambda seed: vx.WeightedSampler(8, "seg", seed=seed),
    "mixed": lambda seed: vx.MixedSampler(
        samplers=[(1, vx.LabelSampler(8, "seg", {3: 1})), (1, vx.UniformSampler(8))], seed=seed
    ),
}


def drawn(sampler, path):
    return [patch.patch_location for patch in sampler(subject(path), num_patches=20)]


@pytest.mark.parametrize("kind", SAMPLERS)
def test_draws_are_the_same_and_the_map_is_not_gone_through_again(path, kind, monkeypatch):
    expected = drawn(SAMPLERS[kind](3), path)
    assert vx.build_index(SAMPLERS[kind](0), subject(path)) == [path.with_name(".seg.index")]

    def never(*arguments):
        raise AssertionError("the map is gone through again")

    with monkeypatch.context() as patch:
        for cls in (vx.LabelSampler, vx.WeightedSampler):
            patch.setattr(cls, "_sums", never)
        assert drawn(SAMPLERS[kind](3), path) == expected
    monkeypatch.setattr(vx.LabelSampler, "_sums", never)
    with pytest.raises(AssertionError, match="gone through again"):
        drawn(vx.LabelSampler(8, "seg", {0: 1}), path)  # of other classes


def test_another_state_of_the_file_has_other_sums(path):
    vx.build_index(SAMPLERS["label"](0), subject(path))
    labels = torch.zeros(1, 30, 20, 25, dtype=torch.uint8)
    labels[0, 15, 10, 12] = 2
    vx.LabelMap(labels).save(path)
    assert {location.index for location in drawn(SAMPLERS["label"](0), path)} == {(11, 6, 8)}
    assert len(list(path.with_name(".seg.index").iterdir())) == 2


def test_what_cannot_be_kept_is_said_where_it_was_asked_for(path, monkeypatch):
    class Full:
        def savez(self, *arguments, **arrays):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def __getattr__(self, name):
            return getattr(np, name)

    path.with_name(".seg.index").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(indexing, "np", Full())
        with pytest.raises(SaveError, match=r"seg\.index.*No space left on device"):
            vx.build_index(SAMPLERS["label"](0), subject(path))
        drawn(SAMPLERS["label"](0), path)  # which needs none
    assert not list(path.with_name(".seg.index").iterdir())


def test_what_a_killed_process_has_left_goes_away(path, monkeypatch):
    vx.build_index(SAMPLERS["label"](0), subject(path))
    left = path.with_name(".seg.index") / f".{new_mark()}.unfinished"
    left.write_bytes(b"half")
    monkeypatch.setattr("voxloom.runtime.marks.is_of_dead", lambda mark: True)
    vx.build_index(SAMPLERS["weighted"](0), subject(path))
    assert not left.exists()


def test_without_a_folder_nothing_is_kept(path, tmp_path):
    drawn(SAMPLERS["label"](0), path)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_a_damaged_file_is_made_anew(path):
    expected = drawn(SAMPLERS["label"](3), path)
    vx.build_index(SAMPLERS["label"](0), subject(path))
    (file,) = path.with_name(".seg.index").iterdir()
    whole = file.read_bytes()
    for damage in (b"", whole[: len(whole) // 2], b"no zip"):
        file.write_bytes(damage)
        assert drawn(SAMPLERS["label"](3), path) == expected
        with np.load(file) as found:
            assert sorted(found.files) == ["1", "2", "labels"]


@pytest.mark.slow
def test_no_bit_of_the_table_of_contents_changes_what_is_drawn(path):
    expected = drawn(SAMPLERS["label"](3), path)
    vx.build_index(SAMPLERS["label"](0), subject(path))
    (file,) = path.with_name(".seg.index").iterdir()
    whole = file.read_bytes()
    for place in range(8 * (len(whole) - 260), 8 * len(whole), 5):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        file.write_bytes(damaged)
        assert drawn(SAMPLERS["label"](3), path) == expected


def test_data_that_were_changed_in_memory_are_not_those_of_the_file(path):
    vx.build_index(SAMPLERS["label"](0), subject(path))
    changed = subject(path)
    data = torch.zeros_like(changed.seg.data)
    data[0, 15, 10, 12] = 1
    changed.seg.set_data(data)
    assert {patch.patch_location.index for patch in SAMPLERS["label"](0)(changed, num_patches=5)} == {(11, 6, 8)}


def test_bad_input(path, tmp_path, monkeypatch):
    with pytest.raises(ImageError, match="no image that is in a file"):
        vx.build_index(SAMPLERS["label"](0), vx.Subject(seg=vx.LabelMap(torch.ones(1, 20, 20, 20))))
    with pytest.raises(SaveError, match="goes through no map"):
        vx.build_index(vx.UniformSampler(8), subject(path))
    assert not path.with_name(".seg.index").exists()
    closed = tmp_path / "closed"
    closed.write_text("")
    monkeypatch.setattr(indexing, "index_folder", lambda image: closed / ".seg.index")  # in what is no folder
    with pytest.raises(SaveError, match="Not a directory"):
        vx.build_index(SAMPLERS["label"](0), subject(path))
