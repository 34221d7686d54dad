"""Converting between formats: voxels and affine stay bit for bit, in memory that does not grow."""

import errno
import itertools
import os
import warnings

import numpy as np
import pytest
import torch
import zarr

import voxloom as vx
from voxloom.errors import SaveError, SpaceError, TargetExistsError, UnsupportedImageError
from zarr_samples import AFFINE, TENSOR

ENDINGS = [".nii", ".nii.gz", ".ome.zarr", ".nii.zarr", ".zarr", ".nrrd", ".mha"]
# Numbers that single precision holds, as NIfTI stores them.
OBLIQUE = np.float32([[1.2, 0.3, 0, -40], [-0.3, 1.1, 0.2, 12], [0, -0.2, 2.5, 7], [0, 0, 0, 1]]).astype(float)


@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(ENDINGS, 2)))
def test_round_trips(tmp_path, source, target):
    data = (TENSOR[:, :21, :18, :16] - 300).to(torch.int16)
    first = vx.convert(vx.ScalarImage(data, affine=OBLIQUE), tmp_path / f"a{source}")
    second = vx.convert(first.path, tmp_path / f"b{target}")
    third = vx.convert(second, tmp_path / f"c{source}")
    for made in (first, second, third):
        assert torch.equal(made.data, data)
        assert made.data.dtype == torch.int16
        assert np.allclose(made.affine, OBLIQUE, rtol=0, atol=1e-5)  # of ITK: spacing and directions are a matrix again
    if not {".nrrd", ".mha"} & {source, target}:
        assert np.array_equal(third.affine, OBLIQUE)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int8", "int64", "float32", "float64"])
def test_stored_types_stay(tmp_path, dtype):
    values = np.random.default_rng(0).integers(0, 120, (2, 9, 8, 7)).astype(dtype)
    made = vx.convert(vx.ArraySource(values, affine=AFFINE), tmp_path / "a.ome.zarr")
    back = vx.convert(vx.convert(made, tmp_path / "a.nii"), tmp_path / "b.zarr")
    for image in (made, back):
        assert image.stored_dtype == np.dtype(dtype)
        assert np.array_equal(image.data.numpy(), values.astype(image.data.numpy().dtype))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int16", "float64"])
@pytest.mark.parametrize("ending", [".mha", ".nrrd"])
def test_stored_types_stay_in_formats_of_itk(tmp_path, dtype, ending):
    values = (np.random.default_rng(0).random((1, 9, 8, 7)) * np.array(200).astype(dtype)).astype(dtype)
    made = vx.convert(vx.ArraySource(values, affine=AFFINE), tmp_path / f"a{ending}")
    back = vx.convert(made, tmp_path / "b.nii.gz")
    assert made.stored_dtype == back.stored_dtype == np.dtype(dtype)
    assert np.array_equal(back.data.numpy(), values)


def test_what_was_changed_in_place_is_stored_whole(tmp_path):
    first = vx.convert(vx.ArraySource(np.full((1, 9, 8, 7), 10, np.uint16), affine=AFFINE), tmp_path / "a.nii")
    first.data[0, 0] -= 50
    for ending in (".nii", ".mha", ".zarr"):
        assert vx.convert(first, tmp_path / f"b{ending}").data.unique().tolist() == [-40, 10]


def test_mgh_holds_no_large_unsigned_numbers(tmp_path):
    values = np.random.default_rng(0).integers(0, 60000, (1, 9, 8, 7)).astype(np.uint16)
    made = vx.convert(vx.ArraySource(values, affine=AFFINE), tmp_path / "a.mgz")
    assert made.stored_dtype == np.dtype("int32").newbyteorder(">")
    assert np.array_equal(made.data.numpy(), values)


def test_labels_have_the_label_of_most_at_coarser_levels(tmp_path):
    labels = torch.zeros(1, 16, 16, 16, dtype=torch.uint8)
    labels[:, ::2] = 200
    labels[:, :, ::2] = 3
    coarse = {}
    for name, image, more in (
        ("map", vx.LabelMap(labels), {}),
        ("said", vx.ScalarImage(labels), {"labels": True}),
        ("scan", vx.ScalarImage(labels), {}),
    ):
        vx.convert(image, tmp_path / f"{name}.ome.zarr", levels=2, **more)
        coarse[name] = vx.open_zarr(tmp_path / f"{name}.ome.zarr", level=1).read(vx.PatchLocation((0, 0, 0), (8, 8, 8)).box)
    assert coarse["map"].unique().tolist() == coarse["said"].unique().tolist() == [3]
    assert coarse["scan"].unique().tolist() == [52]


def test_labels_beside_an_image(tmp_path):
    vx.convert(vx.ScalarImage(TENSOR, affine=AFFINE), tmp_path / "scan.ome.zarr", levels=2)
    labels = vx.LabelMap((TENSOR > 500).to(torch.uint8), affine=AFFINE)
    made = vx.convert(labels, tmp_path / "scan.ome.zarr/labels/bright")
    assert torch.equal(made.data, labels.data)
    with pytest.raises(SpaceError):
        vx.convert(labels[:, :8], tmp_path / "scan.ome.zarr/labels/part")


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_labels_are_found_by_those_who_read_all_metadata_in_one(tmp_path, version):
    path = tmp_path / "scan.ome.zarr"
    vx.convert(vx.ScalarImage(TENSOR, affine=AFFINE), path, levels=2, version=version)
    vx.convert(vx.LabelMap((TENSOR > 500).to(torch.uint8), affine=AFFINE), path / "labels/bright")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that Zarr v3 does not say what these are
        zarr.consolidate_metadata(path)
    for least in (200, 100):
        vx.convert(vx.LabelMap((least < TENSOR).to(torch.uint8), affine=AFFINE), path / "labels/most", overwrite=True)
    group = zarr.open_group(path, mode="r")
    assert list((path / "labels").glob(".*.lock")) == []
    assert group.metadata.consolidated_metadata is not None
    assert sorted(group["labels"].keys()) == ["bright", "most"]
    attributes = dict(group["labels"].attrs)
    assert attributes.get("ome", attributes)["labels"] == ["bright", "most"]
    next((path / "labels/bright").glob("*z*")).write_text("{")
    with pytest.warns(RuntimeWarning, match="the copy of all metadata in .* could not be renewed"):
        made = vx.convert(vx.LabelMap((TENSOR > 10).to(torch.uint8), affine=AFFINE), path / "labels/nearly")
    assert made.data.any()
    assert list((path / "labels").glob(".*")) == [] or version == "0.4"


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha", ".mgz"])
def test_an_image_is_not_written_over_itself(tmp_path, ending):
    path = tmp_path / f"scan{ending}"
    vx.convert(vx.ScalarImage(TENSOR.float(), affine=AFFINE), path)
    before = path.read_bytes()
    with pytest.raises(SaveError, match="would be written over itself"):
        vx.convert(path, path, overwrite=True)
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["scan.foo", "scan.mhd", "scan.dcm", "scan"])
def test_an_ending_that_cannot_be_written_is_said_with_those_that_can(tmp_path, name):
    with pytest.raises(UnsupportedImageError, match=rf"{name} cannot be written: its name must end in .*\.nrrd"):
        vx.convert(vx.ScalarImage(TENSOR), tmp_path / name)


def test_what_is_there_is_replaced_by_a_store_too_if_asked(tmp_path):
    path = tmp_path / "a.ome.zarr"
    for value in (1.0, 2.0):
        made = vx.predict(
            lambda batch, value=value: batch * 0 + value, TENSOR.float(), 8, output=vx.ZarrStore(path), overwrite=True
        )
    assert made.data.mean() == pytest.approx(2)


def test_chunks_and_levels_are_chosen(tmp_path):
    import zarr

    vx.convert(vx.ScalarImage(TENSOR), tmp_path / "a.ome.zarr", chunks=(16, 8, 4), shards=(32, 16, 8), levels=2, version="0.6")
    array = zarr.open_group(tmp_path / "a.ome.zarr", mode="r")["0"]
    assert (array.chunks, array.shards) == ((4, 8, 16), (8, 16, 32))


def test_bad_input(tmp_path):
    image = vx.ScalarImage(TENSOR)
    vx.convert(image, tmp_path / "a.nrrd")
    with pytest.raises(SaveError, match="exists, and is kept"):
        vx.convert(image, tmp_path / "a.nrrd")
    vx.convert(image, tmp_path / "a.nii")
    with pytest.raises(TargetExistsError):
        vx.convert(image, tmp_path / "a.nii")
    with pytest.raises(UnsupportedImageError, match="must end in"):
        vx.convert(image, tmp_path / "a.png")
    with pytest.raises(SaveError, match="no folder"):
        vx.convert(image, tmp_path / "nowhere/a.zarr")


@pytest.mark.parametrize(
    ("name", "has_links"),
    [("b.nrrd", True), ("b.nrrd", False), ("b.nii.gz", True), ("b.nii.gz", False), ("b.ome.zarr", True)],
)
def test_what_appears_meanwhile_is_kept(tmp_path, name, has_links, monkeypatch):
    def link(*paths):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    if not has_links:
        monkeypatch.setattr(os, "link", link)

    class Slow(vx.ArraySource):
        def read(self, box):
            (tmp_path / name).write_text("mine")
            return super().read(box)

    with pytest.raises(TargetExistsError, match="has appeared while it was written, and is kept: remove it"):
        vx.convert(Slow(TENSOR.numpy()), tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_an_input_that_breaks_off_leaves_nothing(tmp_path):
    image = vx.convert(vx.ScalarImage(TENSOR), tmp_path / "a.nii")
    content = image.path.read_bytes()

    class Broken(vx.ArraySource):
        def read(self, box):
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        vx.convert(Broken(TENSOR.numpy()), tmp_path / "b.ome.zarr")
    assert [path.name for path in tmp_path.iterdir()] == ["a.nii"]
    assert image.path.read_bytes() == content
