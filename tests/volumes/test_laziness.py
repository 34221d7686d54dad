"""A patch of an uncompressed file reads about its own size; other files are read once, before workers start."""

import io
import os
import pickle

import nibabel as nib
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import voxloom as vx
from voxloom.core.boxes import Box
from voxloom.io.nifti.files import NibabelFile


class CountingFile(io.BytesIO):
    """A file that counts the bytes that were read from it."""

    def __init__(self, content):
        super().__init__(content)
        self.bytes_read = 0

    def read(self, size=-1):
        data = super().read(size)
        self.bytes_read += len(data)
        return data

    def readinto(self, buffer):
        count = super().readinto(buffer)
        self.bytes_read += count
        return count


@pytest.fixture(scope="module")
def large_path(tmp_path_factory):
    """64 MB, uncompressed."""
    path = tmp_path_factory.mktemp("large") / "large.nii"
    array = np.arange(256 * 256 * 512, dtype=np.int16).reshape(256, 256, 512)
    nib.save(nib.Nifti1Image(array, np.eye(4)), path)
    return path


def test_the_header_alone_is_read_for_shape_and_place(large_path):
    file = CountingFile(large_path.read_bytes())
    reader = NibabelFile(file)
    assert reader.shape == (1, 256, 256, 512)
    assert file.bytes_read < 2000


@pytest.mark.parametrize("size", [16, 64])
def test_a_patch_of_a_file_object_reads_about_its_own_size(large_path, size):
    file = CountingFile(large_path.read_bytes())
    reader = NibabelFile(file)
    file.bytes_read = 0
    box = Box.of_shape((size, size, size), (100, 50, 200))
    patch = reader.read(box)
    expected = np.asarray(nib.load(large_path).dataobj)[box.slices]
    np.testing.assert_array_equal(patch.numpy()[0], expected)
    assert size**3 * 2 <= file.bytes_read <= 8 * size**3 * 2  # rows of the volume are read whole where that is quicker
    assert file.bytes_read < 64e6 / 25


def resident_bytes(path):
    """Bytes of a mapped file that this process has touched."""
    total, inside = 0, False
    with open("/proc/self/smaps") as lines:
        for line in lines:
            if "-" in line.split()[0] and line.split()[0][0] in "0123456789abcdef":
                inside = line.rstrip().endswith(str(path))
            elif inside and line.startswith("Rss:"):
                total += int(line.split()[1]) * 1024
    return total


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="the system does not tell which pages were touched")
def test_a_patch_of_a_mapped_file_touches_a_small_part_of_it(large_path, monkeypatch):
    mapped, memmap = [], np.memmap
    monkeypatch.setattr(np, "memmap", lambda *arguments, **named: mapped.append(memmap(*arguments, **named)) or mapped[-1])
    image = vx.ScalarImage(large_path)
    patch = image[:, 100:132, 50:82, 200:232]
    assert patch.data.numel() == 32**3
    assert not image.is_loaded
    assert len(mapped) == 1
    assert 0 < resident_bytes(large_path) < 64e6 / 8


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="the system does not tell which files are open")
def test_images_keep_no_files_open(tmp_path):
    vx.ScalarImage(torch.rand(1, 8, 8, 8)).save(tmp_path / "x.nii")
    before = len(os.listdir("/proc/self/fd"))
    images = [vx.ScalarImage(tmp_path / "x.nii") for _ in range(20)]
    parts = [image[:, :2] for image in images]
    for image in images[:10]:
        image.load()
    assert len(parts) == 20
    assert len(os.listdir("/proc/self/fd")) == before


def test_patches_of_an_uncompressed_file_leave_it_unloaded(large_path):
    subject = vx.Subject(t1=vx.ScalarImage(large_path))
    sampler = vx.GridSampler(subject, (100, 100, 100), (20, 20, 20), padding_mode="reflect")
    for index in (0, len(sampler) - 1):
        assert sampler[index].t1.data.shape == (1, 100, 100, 100)
    assert not subject.t1.is_loaded


@pytest.mark.slow
def test_a_compressed_file_is_read_before_any_worker_starts(tmp_path):
    data = torch.rand(1, 12, 12, 12)
    vx.ScalarImage(data).save(tmp_path / "x.nii.gz")
    subject = vx.Subject(t1=vx.ScalarImage(tmp_path / "x.nii.gz"))
    sampler = vx.GridSampler(subject, 6)
    assert subject.t1.is_loaded
    (tmp_path / "x.nii.gz").unlink()  # so that a worker that read it again would fail
    for context in ("fork", "spawn"):
        aggregator = vx.GridAggregator(sampler)
        for batch in DataLoader(sampler, batch_size=2, num_workers=2, multiprocessing_context=context):
            aggregator.add_batch(batch.t1.data, batch)
        assert torch.equal(aggregator.get_output(), data)


def test_workers_open_a_mapped_file_anew_instead_of_carrying_it(large_path):
    image = vx.ScalarImage(large_path)
    _ = image[:, :4]
    assert len(pickle.dumps(image)) < 10_000
    again = pickle.loads(pickle.dumps(image))
    assert torch.equal(again[:, :4, :4, :4].data, image[:, :4, :4, :4].data)
