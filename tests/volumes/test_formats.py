"""Reading: what SimpleITK, nibabel and pydicom write comes back with its values, and in its place."""

import gzip
import warnings

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch

import voxloom as vx
from voxloom.errors import CorruptImageError, ImageFileError, UnsupportedImageError
from voxloom.io.formats import FORMATS, stem_of

AFFINE = np.array([[-0.8, 0.1, 0, 12], [0.1, 0.9, 0.2, -30], [0, -0.2, 2.5, 7], [0, 0, 0, 1]])
STORED = ["uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float32", "float64"]


def nifti(array, path, dtype=None, big_endian=False, affine=AFFINE):
    header = nib.Nifti1Header(endianness=">" if big_endian else "<")
    header.set_data_dtype(dtype or array.dtype)
    kind = nib.Nifti1Pair if path.suffix == ".img" else nib.Nifti1Image
    nib.save(kind(array, affine, header), path)
    return path


def values(shape, dtype="float32"):
    return (np.random.default_rng(0).random(shape) * 100).astype(dtype)


def channels_first(array):
    """(I, J), (I, J, K) or (I, J, K, C) as (C, I, J, K)."""
    while array.ndim < 3:
        array = array[..., None]
    return array[None] if array.ndim == 3 else np.moveaxis(array, -1, 0)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".img", ".nii.bz2"])
@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("big_endian", [False, True])
def test_nifti_of_every_stored_type(tmp_path, ending, dtype, big_endian):
    array = values((5, 4, 21), dtype)
    image = vx.ScalarImage(nifti(array, tmp_path / f"x{ending}", big_endian=big_endian))
    assert not image.is_loaded
    assert image.shape == (1, 5, 4, 21)
    np.testing.assert_allclose(image.affine, AFFINE, atol=1e-6)
    part = image[:, 1:3, :2, 15:20]
    assert image.is_loaded == (ending in (".nii.gz", ".nii.bz2"))
    assert image.dtype == part.dtype == part.data.dtype
    np.testing.assert_array_equal(part.numpy(), array[None, 1:3, :2, 15:20].astype(part.numpy().dtype))
    np.testing.assert_array_equal(image.numpy(), array[None].astype(image.numpy().dtype))
    assert image.data.is_contiguous()
    expected = {"uint16": torch.int32, "uint32": torch.int64, "uint64": torch.int64}
    assert image.dtype == expected.get(dtype, getattr(torch, dtype))
    assert image.data.add(1).max() > 1


@pytest.mark.parametrize("shape", [(6,), (6, 5), (6, 5, 4), (6, 5, 40), (6, 5, 4, 3), (6, 5, 4, 1, 3), (6, 5, 4, 3, 1, 1)])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_nifti_of_every_number_of_dimensions(tmp_path, shape, ending):
    array = values(shape)
    image = vx.ScalarImage(nifti(array, tmp_path / f"x{ending}"))
    expected = channels_first(array.squeeze() if array.ndim > 4 else array)
    if array.ndim == 1:
        expected = array.reshape(1, 6, 1, 1)
    assert image.shape == expected.shape
    np.testing.assert_array_equal(image[..., :1].numpy(), expected[..., :1])
    np.testing.assert_array_equal(image.numpy(), expected)
    last = image.num_channels - 1
    np.testing.assert_array_equal(vx.ScalarImage(tmp_path / f"x{ending}")[last].numpy(), expected[last:])


def test_nifti_of_too_many_dimensions_is_refused(tmp_path):
    image = vx.ScalarImage(nifti(values((3, 3, 3, 3, 2)), tmp_path / "x.nii"))
    with pytest.raises(UnsupportedImageError, match=r"\(3, 3, 3, 3, 2\).*3D or 4D"):
        _ = image.shape
    with pytest.raises(ValueError, match="3D or 4D"):
        _ = image.data


@pytest.mark.parametrize(("dtype", "becomes"), [("uint8", torch.float32), ("int16", torch.float32), ("int32", torch.float64)])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_scaled_nifti_becomes_floating_point(tmp_path, dtype, becomes, ending):
    array = values((4, 5, 6), dtype)
    header = nib.Nifti1Header()
    header.set_data_dtype(dtype)
    scaled = nib.Nifti1Image(array.astype(float) * 0.1 - 1000, AFFINE, header)
    scaled.header.set_slope_inter(0.1, -1000)
    nib.save(scaled, tmp_path / f"x{ending}")
    stored = nib.load(tmp_path / f"x{ending}").get_fdata()
    image = vx.ScalarImage(tmp_path / f"x{ending}")
    assert image.dtype == image.data.dtype == becomes
    np.testing.assert_array_equal(image.numpy()[0], stored.astype(image.numpy().dtype))


@pytest.mark.parametrize(("names", "count"), [(("R", "G", "B"), 3), (("R", "G", "B", "A"), 4)])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_colours_become_channels(tmp_path, names, count, ending):
    colours = np.random.default_rng(0).integers(0, 256, (4, 5, 6, count), dtype=np.uint8)
    structured = colours.copy().view([(name, "u1") for name in names]).reshape(4, 5, 6)
    nib.save(nib.Nifti1Image(structured, AFFINE), tmp_path / f"x{ending}")
    image = vx.ScalarImage(tmp_path / f"x{ending}")
    assert image.shape == (count, 4, 5, 6)
    np.testing.assert_array_equal(image[1:3, 2].numpy(), channels_first(colours)[1:3, 2:3])
    np.testing.assert_array_equal(image.numpy(), channels_first(colours))


def test_complex_numbers_are_refused(tmp_path):
    with pytest.raises(UnsupportedImageError, match="complex64.*magnitude and phase"):
        _ = vx.ScalarImage(nifti(values((2, 2, 2), "complex64"), tmp_path / "x.nii")).shape


def test_numbers_that_int64_cannot_hold_are_refused(tmp_path):
    image = vx.ScalarImage(nifti(np.full((2, 2, 2), 2**63, dtype=np.uint64), tmp_path / "x.nii"))
    with pytest.raises(UnsupportedImageError, match="more than int64"):
        image.load()


@pytest.mark.parametrize("ending", [".nrrd", ".mha", ".mhd", ".tif", ".nii", ".nii.gz"])
@pytest.mark.parametrize("components", [1, 3])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "float32"])
def test_what_simpleitk_writes_comes_back_in_its_place(tmp_path, ending, components, dtype):
    array = values((6, 5, 4, components) if components > 1 else (6, 5, 4), dtype)  # K, J, I, C
    written = SimpleITK.GetImageFromArray(array, isVector=components > 1)
    if ending != ".tif":
        written.SetSpacing((0.5, 0.75, 2.0))
        written.SetOrigin((10, -20, 30))
        written.SetDirection((0, -1, 0, 1, 0, 0, 0, 0, 1))
    SimpleITK.WriteImage(written, str(tmp_path / f"x{ending}"))
    image = vx.ScalarImage(tmp_path / f"x{ending}")
    assert image.shape == (components, 4, 5, 6)
    expected = array.transpose(3, 2, 1, 0) if components > 1 else array.transpose(2, 1, 0)[None]
    np.testing.assert_array_equal(image.numpy(), expected.astype(image.numpy().dtype))
    assert image.data.is_contiguous()
    for voxel in [(0, 0, 0), (3, 4, 5), (1, 2, 3)]:
        x, y, z = written.TransformContinuousIndexToPhysicalPoint([float(value) for value in voxel])
        np.testing.assert_allclose((image.affine @ [*voxel, 1])[:3], (-x, -y, z), atol=1e-4)


@pytest.mark.parametrize("ending", [".mgh", ".mgz"])
@pytest.mark.parametrize("shape", [(4, 5, 6), (4, 5, 6, 2)])
def test_what_nibabel_writes_as_mgh_comes_back(tmp_path, ending, shape):
    array = values(shape)
    nib.save(nib.MGHImage(array, np.diag([1, 2, 3, 1.0])), tmp_path / f"x{ending}")
    image = vx.ScalarImage(tmp_path / f"x{ending}")
    np.testing.assert_array_equal(image.numpy(), channels_first(array))
    np.testing.assert_allclose(image.affine, np.diag([1, 2, 3, 1.0]))


def test_flat_images_have_a_third_axis_of_one(tmp_path):
    picture = SimpleITK.GetImageFromArray(values((5, 4), "uint8"))
    SimpleITK.WriteImage(picture, str(tmp_path / "x.png"))
    image = vx.ScalarImage(tmp_path / "x.png")
    assert image.shape == (1, 4, 5, 1)
    assert image.spacing == (1, 1, 1)
    assert len(vx.GridSampler(vx.Subject(x=image), (2, 2, 1))) == 6


def test_the_real_template_is_read_as_nibabel_reads_it(mni_path):
    image = vx.ScalarImage(mni_path)
    reference = nib.load(mni_path)
    assert image.spatial_shape == (197, 233, 189)
    np.testing.assert_array_equal(image.numpy()[0], np.asarray(reference.dataobj))
    np.testing.assert_array_equal(image.affine, reference.affine)


def set_forms(path, sform, qform):
    image = nib.load(path, mmap=False)
    image.set_sform(sform, 1)
    image.set_qform(qform, 1)
    nib.save(image, path)


def test_where_sform_and_qform_disagree_the_sform_counts_and_a_warning_says_so(tmp_path):
    path = nifti(values((10, 10, 10)), tmp_path / "x.nii", affine=np.eye(4))
    moved = np.eye(4)
    moved[0, 3] = 5
    set_forms(path, moved, np.eye(4))
    with pytest.warns(RuntimeWarning, match=r"x\.nii: sform and qform disagree by up to 5 mm; the sform is used"):
        assert vx.ScalarImage(path).origin == (5, 0, 0)
    set_forms(path, np.eye(4), np.eye(4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert vx.ScalarImage(path).origin == (0, 0, 0)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".mgh", ".nrrd", ".mha"])
@pytest.mark.parametrize("content", [b"", b"not an image, but text", bytes(100), bytes(range(256)) * 40])
def test_files_that_are_no_images_are_refused_by_name(tmp_path, ending, content):
    path = tmp_path / f"x{ending}"
    path.write_bytes(content)
    with pytest.raises(CorruptImageError, match=r"x\.(nii|mgh|nrrd|mha)"):
        _ = vx.ScalarImage(path).shape


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".mgh", ".mgz", ".nrrd", ".mha", ".nii.bz2"])
def test_truncated_files_are_refused_by_name(tmp_path, ending):
    path = tmp_path / f"x{ending}"
    if ending in (".nrrd", ".mha"):
        vx.ScalarImage(torch.rand(1, 20, 20, 20)).save(path)
    elif ending.startswith(".mg"):
        nib.save(nib.MGHImage(values((20, 20, 20)), np.eye(4)), path)
    else:
        nifti(values((20, 20, 20)), path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(CorruptImageError, match=r"x\."):
        vx.ScalarImage(path).load()


def test_a_damaged_byte_in_a_compressed_file_is_noticed(tmp_path):
    path = nifti(values((20, 20, 20), "uint8"), tmp_path / "x.nii.gz")
    content = bytearray(path.read_bytes())
    content[-6] ^= 1  # in the checksum
    path.write_bytes(content)
    with pytest.raises(CorruptImageError, match=r"x\.nii\.gz cannot be read to its end"):
        vx.ScalarImage(path).load()


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_a_header_that_claims_more_than_the_file_holds_is_refused_before_memory_is_asked_for(tmp_path, ending):
    path = nifti(values((4, 4, 4)), tmp_path / "x.nii")
    content = bytearray(path.read_bytes())
    content[42:48] = np.array([30000] * 3, dtype="<i2").tobytes()
    path = tmp_path / f"y{ending}"
    path.write_bytes(gzip.compress(content) if ending == ".nii.gz" else content)
    with pytest.raises(CorruptImageError, match=r"claims \(1, 30000, 30000, 30000\) voxels, which take 108000000000352 bytes"):
        _ = vx.ScalarImage(path).shape


def test_folders_and_other_things_that_are_no_files(tmp_path):
    with pytest.raises(ImageFileError, match="without DICOM files"):
        _ = vx.ScalarImage(tmp_path).shape
    (tmp_path / "x.txt").write_text("hello")
    with pytest.raises(CorruptImageError, match=r"x\.txt is not an image"):
        _ = vx.ScalarImage(tmp_path / "x.txt").shape
    with pytest.raises(UnsupportedImageError, match="neither a file nor a folder"):
        _ = vx.ScalarImage("/dev/null").shape


def test_stems():
    from pathlib import Path

    names = {"t1.nii.gz": "t1", "a.b.nii": "a.b", "x.mgz": "x", "y.nrrd": "y", "z": "z", "T1.NII.GZ": "T1"}
    assert {name: stem_of(Path(name)) for name in names} == names


def test_parts_that_are_missing_and_codes_that_mean_nothing(tmp_path):
    path = nifti(values((3, 4, 5)), tmp_path / "x.img")
    (tmp_path / "x.img").unlink()
    with pytest.raises(FileNotFoundError, match=r"x\.hdr"):
        _ = vx.ScalarImage(tmp_path / "x.hdr").shape
    path = nifti(values((3, 4, 5)), tmp_path / "y.nii")
    content = bytearray(path.read_bytes())
    content[123] = 7  # where NIfTI-1 keeps its units
    path.write_bytes(content)
    assert vx.ScalarImage(path).shape == (1, 3, 4, 5)


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    path = nifti(values((3, 4, 5)), tmp_path / "x.nii")
    image = vx.ScalarImage(path)
    _ = image.shape

    def refuse(*arguments, **named):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(np, "memmap", refuse)
    with pytest.raises(ImageFileError, match="Too many open files") as caught:
        image.load()
    assert not isinstance(caught.value, CorruptImageError)


def test_nifti_2_is_read(tmp_path):
    array = values((3, 4, 5))
    nib.save(nib.Nifti2Image(array, AFFINE), tmp_path / "x.nii.gz")
    np.testing.assert_array_equal(vx.ScalarImage(tmp_path / "x.nii.gz").numpy()[0], array)


@pytest.mark.parametrize("known", FORMATS, ids=lambda known: known.ending)
def test_what_opens_a_format_is_where_the_table_says(known):
    assert callable(known.open.imported())


def test_voxels_do_not_begin_within_a_header(tmp_path):
    path = nifti(values((4, 4, 4)), tmp_path / "x.nii")
    raw = bytearray(path.read_bytes())
    raw[108:112] = np.float32(0).tobytes()
    path.write_bytes(raw)
    with pytest.raises(CorruptImageError, match=r"x\.nii says that its voxels begin at byte 0, .* vox_offset 352"):
        vx.ScalarImage(path).load()


def test_colours_have_no_scale(tmp_path):
    colours = np.zeros((3, 4, 5), [(name, "u1") for name in "RGB"])
    colours["G"] = 200
    image = nib.Nifti1Image(colours, np.eye(4))
    image.header.set_slope_inter(0.5, 3)
    nib.save(image, tmp_path / "x.nii")
    raw = bytearray((tmp_path / "x.nii").read_bytes())
    raw[112:120] = np.float32([0.5, 3]).tobytes()
    (tmp_path / "x.nii").write_bytes(raw)
    read = vx.ScalarImage(tmp_path / "x.nii")
    assert (read.dtype, read.data[:, 0, 0, 0].tolist()) == (torch.uint8, [0, 200, 0])


def test_where_the_sform_has_other_voxels_than_pixdim_a_warning_says_so(tmp_path):
    path = nifti(values((10, 10, 10)), tmp_path / "x.nii", affine=np.diag([1.0, 1, 2, 1]))
    raw = bytearray(path.read_bytes())
    raw[252:254] = np.int16(0).tobytes()
    raw[80:92] = np.float32([1, 1, 3]).tobytes()
    path.write_bytes(raw)
    with pytest.warns(RuntimeWarning, match=r"x\.nii: voxels are 1 × 1 × 2 mm by the sform, but 1 × 1 × 3 mm by pixdim"):
        assert vx.ScalarImage(path).spacing == (1, 1, 2)


def test_arrays_of_objects_are_no_numbers(tmp_path):
    np.save(tmp_path / "x.npy", np.array([[[None]]]), allow_pickle=True)
    with pytest.raises(UnsupportedImageError, match=r"x\.npy holds objects of Python"):
        vx.ScalarImage(tmp_path / "x.npy").load()
