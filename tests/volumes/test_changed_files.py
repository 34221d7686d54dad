"""Files that are changed while they are in use: never voxels of one under the name of another, nor some of each."""

import contextlib
import json
import os
import pickle
import shutil

import blosc2
import h5py
import numpy as np
import pytest
import torch
import zarr

import voxloom as vx
from slow import slow
from voxloom.core.boxes import Box
from voxloom.errors import ImageFileError, TargetExistsError

SHAPE = (24, 20, 16)
BOX = Box((0, 0, 0), (4, 4, 4))


def write(path, value):
    """Write a volume that is of one value."""
    values = np.full(SHAPE, value, np.float32)
    if path.suffix == ".npy":
        np.save(path, values)
    elif path.suffix == ".h5":
        with h5py.File(path, "w") as file:
            file["data"] = values
    elif path.suffix == ".b2nd":
        blosc2.asarray(values, urlpath=str(path), mode="w", chunks=(8, 8, 8))
    else:
        options = {"chunks": 8} if path.suffix == ".zarr" else {}
        vx.convert(vx.ScalarImage(torch.from_numpy(values[None])), path, overwrite=True, **options)
    return f"{path}:/data" if path.suffix == ".h5" else path


KINDS = [".nii", slow(".npy"), ".h5", slow(".b2nd"), ".ome.zarr"]


@pytest.mark.parametrize("ending", KINDS)
def test_patches_of_a_file_that_was_replaced_are_not_read(tmp_path, ending):
    image = vx.ScalarImage(write(tmp_path / f"x{ending}", 1))
    assert (image.read(BOX) == 1).all()
    write(tmp_path / f"y{ending}", 2)
    (tmp_path / f"x{ending}").rename(tmp_path / f"old{ending}")
    (tmp_path / f"y{ending}").rename(tmp_path / f"x{ending}")
    with pytest.raises(ImageFileError, match=rf"x{ending}.* has been changed since its header was read: make the image anew"):
        image.read(BOX)


@pytest.mark.parametrize("ending", [*KINDS, ".nii.gz", ".nrrd"])
def test_what_is_in_memory_is_not_taken_for_a_file_that_came_later(tmp_path, ending):
    place = write(tmp_path / f"x{ending}", 1)
    image = vx.ScalarImage(place)
    image.load()
    before = vx.ScalarImage(place).fingerprint()
    write(tmp_path / f"y{ending}", 2)
    (tmp_path / f"x{ending}").rename(tmp_path / f"old{ending}")
    (tmp_path / f"y{ending}").rename(tmp_path / f"x{ending}")
    _ = image.stored_dtype  # which opens what is there now
    assert image.fingerprint() not in (before, vx.ScalarImage(place).fingerprint())
    predictor = vx.Predictor(torch.nn.Identity(), 8, overlap_mode="crop")
    predictor(image, output=tmp_path / "out.nii")
    assert (vx.ScalarImage(tmp_path / "out.nii").data == 1).all()
    with pytest.raises(TargetExistsError, match="is of something else"):
        predictor.is_made(place, output=tmp_path / "out.nii")


@pytest.mark.parametrize("ending", [".nii.gz", ".ome.zarr"])
def test_an_image_that_is_saved_in_its_own_place_goes_on(tmp_path, ending):
    image = vx.ScalarImage(write(tmp_path / f"x{ending}", 1))
    image.load()
    image.data.mul_(3)
    if ending == ".ome.zarr":
        vx.convert(image, tmp_path / f"y{ending}")
        shutil.rmtree(tmp_path / f"x{ending}")
        (tmp_path / f"y{ending}").rename(tmp_path / f"x{ending}")
    else:
        image.save(tmp_path / f"x{ending}")
    image.unload()
    assert (image.data == 3).all()


def test_copies_with_the_same_times_are_the_same_on_another_machine(tmp_path):
    image = vx.ScalarImage(write(tmp_path / "x.nii.gz", 1))
    image.load()
    packed = pickle.dumps(image)
    shutil.copy2(tmp_path / "x.nii.gz", tmp_path / "copy.nii.gz")
    (tmp_path / "copy.nii.gz").rename(tmp_path / "x.nii.gz")
    again = pickle.loads(packed)
    assert again.fingerprint() == vx.ScalarImage(tmp_path / "x.nii.gz").fingerprint()
    again.unload()
    assert (again.data == 1).all()


def test_what_else_is_written_to_a_file_of_hdf5_does_not_matter(tmp_path):
    image = vx.ScalarImage(write(tmp_path / "x.h5", 1))
    assert (image.read(BOX) == 1).all()
    with h5py.File(tmp_path / "x.h5", "a") as file:
        file["labels"] = np.zeros(3)
    assert (image.read(BOX) == 1).all()


@pytest.mark.parametrize("is_loaded", [True, False])
def test_a_file_that_is_touched_costs_no_result(tmp_path, is_loaded):
    place = write(tmp_path / "x.nii.gz", 1)
    image = vx.ScalarImage(place)
    if is_loaded:
        image.load()

    def model(batch):
        os.utime(place)
        return batch

    vx.predict(model, image, patch_size=8, overlap_mode="crop", output=tmp_path / "out.nii", model_name="x")
    assert (vx.ScalarImage(tmp_path / "out.nii").data == 1).all()


def test_a_store_that_was_written_to_while_it_was_read_is_named(tmp_path):
    place = write(tmp_path / "x.ome.zarr", 1)
    calls = []

    def model(batch):
        calls.append(1)
        if len(calls) == 3:
            zarr.open(place, mode="r+")["0"][...] = 2
        return batch

    vx.predict(model, place, patch_size=8, overlap_mode="crop", output=tmp_path / "out.nii", model_name="x")
    told = json.loads((tmp_path / "out.json").read_text())
    assert "x.ome.zarr was changed, or touched, while or after it was read" in told["warnings"][-1]


@pytest.mark.parametrize("change", ["removed", "replaced"])
def test_a_record_names_no_file_that_was_not_read(tmp_path, change):
    place = write(tmp_path / "x.nii.gz", 1)
    write(tmp_path / "y.nii.gz", 2)

    def model(batch):
        place.unlink(missing_ok=True)
        if change == "replaced" and (tmp_path / "y.nii.gz").exists():
            (tmp_path / "y.nii.gz").rename(place)
        return batch

    vx.predict(model, place, patch_size=8, overlap_mode="crop", output=tmp_path / "out.nii", model_name="x")
    assert (vx.ScalarImage(tmp_path / "out.nii").data == 1).all()
    told = json.loads((tmp_path / "out.json").read_text())
    assert told["files"] == {}
    assert "ash is left out" in told["warnings"][-1]


def test_what_another_function_reads_is_another_image(tmp_path):
    place = write(tmp_path / "x.nii", 1)

    def one(path):
        return np.ones(SHAPE), np.eye(4)

    def two(path):
        return np.full(SHAPE, 2), np.eye(4)

    images = [vx.ScalarImage(place, reader=reader) for reader in (one, two)]
    assert images[0].fingerprint() != images[1].fingerprint()
    assert images[0].fingerprint() == vx.ScalarImage(place, reader=one).fingerprint()

    class Counting:
        calls = 0

        def __call__(self, path):
            self.calls += 1
            return one(path)

    reader = Counting()
    assert vx.ScalarImage(place, reader=reader).fingerprint() == vx.ScalarImage(place, reader=reader).fingerprint()


@pytest.mark.parametrize("version", [2, 3])
def test_an_array_of_zarr_that_took_the_place_of_another_is_not_mixed_with_it(tmp_path, version):
    zarr = pytest.importorskip("zarr")

    def make(value, dtype):
        options = {"shape": (16, 16, 16), "chunks": (8, 8, 8), "dtype": dtype, "zarr_format": version, "overwrite": True}
        zarr.create_array(tmp_path / "a.zarr", **options)[...] = value

    def opened():
        image = vx.ScalarImage(vx.open_zarr(tmp_path / "a.zarr", axes="zyx"))
        assert image[:, :8].data.unique().tolist() == [1]
        return image

    make(1, "<i2")
    image = opened()
    make(2, "<i4")
    with pytest.raises(ImageFileError, match=r"a\.zarr has been changed since its header was read"):
        image[:, :12].data  # noqa: B018 - it is read
    make(1, "<i2")
    image = opened()
    zarr.open_array(tmp_path / "a.zarr").attrs["of"] = "someone"
    assert image[:, :12].data.unique().tolist() == [1]
    make(2, "<i2")
    with contextlib.suppress(ImageFileError):  # which depends on whether the folder is the same for the file system
        assert image[:, :12].data.unique().tolist() == [2]
