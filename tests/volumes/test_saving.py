"""Writing keeps what an image is, and leaves the old file or the new one."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch

import fresh
import voxloom as vx
from slow import slow
from voxloom.errors import SaveError, UnsupportedImageError

AFFINE = np.array([[0, -2.0, 0, 12], [1.5, 0, 0, -30], [0, 0, 2.5, 7], [0, 0, 0, 1]])
ENDINGS = [".nii", ".nii.gz", ".nrrd", ".mha", ".mgh", ".mgz"]


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.float32])
def test_values_and_place_come_back(tmp_path, ending, channels, dtype):
    data = (torch.rand(channels, 4, 5, 6) * 100).to(dtype)
    path = tmp_path / f"x{ending}"
    vx.ScalarImage(data, affine=AFFINE).save(path)
    again = vx.ScalarImage(path)
    assert torch.equal(again.data, data)
    np.testing.assert_allclose(again.affine, AFFINE, atol=1e-5)
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (torch.bool, torch.uint8),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
        (torch.int64, torch.int32),
        (torch.int8, torch.int8),
    ],
)
def test_types_that_files_lack_are_stored_in_ones_that_hold_every_value(tmp_path, dtype, stored):
    data = (torch.rand(1, 4, 5, 6) * 200 - 100).to(dtype)
    vx.ScalarImage(data).save(tmp_path / "x.nii")
    again = vx.ScalarImage(tmp_path / "x.nii")
    assert again.dtype == stored
    assert torch.equal(again.data, data.to(stored))


def test_large_whole_numbers_stay_exact(tmp_path):
    data = torch.tensor([2**40, -(2**40), 2**53 + 1, 0]).reshape(1, 4, 1, 1)
    vx.LabelMap(data).save(tmp_path / "x.nii.gz")
    assert torch.equal(vx.LabelMap(tmp_path / "x.nii.gz").data, data)


def test_other_programs_see_the_same(tmp_path):
    data = torch.rand(1, 4, 5, 6)
    image = vx.ScalarImage(data, affine=AFFINE)
    for ending in (".nii.gz", ".nrrd", ".mha"):
        image.save(tmp_path / f"x{ending}")
        theirs = SimpleITK.ReadImage(str(tmp_path / f"x{ending}"))
        np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(theirs).transpose(2, 1, 0), data[0].numpy())
        x, y, z = theirs.TransformIndexToPhysicalPoint((3, 2, 1))
        np.testing.assert_allclose((-x, -y, z), (AFFINE @ [3, 2, 1, 1])[:3], atol=1e-5)
    np.testing.assert_array_equal(nib.load(tmp_path / "x.nii.gz").affine, AFFINE)


@pytest.mark.parametrize("codes", [(1, 1), (0, 4), (2, 0), (3, 4), (0, 0)])
def test_form_codes_and_units_are_kept(tmp_path, codes):
    original = nib.Nifti1Image(np.ones((3, 4, 5, 2), dtype=np.float32), AFFINE)
    original.set_qform(AFFINE, codes[0])
    original.set_sform(AFFINE, codes[1])
    original.header.set_xyzt_units("micron", "msec")
    original.header["pixdim"][4] = 2500
    nib.save(original, tmp_path / "a.nii")
    image = vx.ScalarImage(tmp_path / "a.nii")
    image.new_like(image.data * 2).save(tmp_path / "b.nii.gz")
    again = nib.load(tmp_path / "b.nii.gz")
    if any(codes):
        assert (int(again.header["qform_code"]), int(again.header["sform_code"])) == codes
    assert again.header.get_xyzt_units() == ("micron", "msec")
    assert again.header["pixdim"][4] == 2500
    np.testing.assert_allclose(again.affine, original.affine, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(vx.ScalarImage(tmp_path / "b.nii.gz").affine, image.affine, atol=1e-7)


@pytest.mark.parametrize(("unit", "factor"), [("mm", 1), ("micron", 0.001), ("meter", 1000), ("unknown", 1)])
def test_affines_are_in_millimetres_whatever_the_unit_of_the_file(tmp_path, unit, factor):
    original = nib.Nifti1Image(np.ones((3, 4, 5), dtype=np.float32), AFFINE)
    original.header.set_xyzt_units(unit)
    nib.save(original, tmp_path / "a.nii")
    image = vx.ScalarImage(tmp_path / "a.nii")
    np.testing.assert_allclose(image.spacing, np.array([1.5, 2.0, 2.5]) * factor)
    theirs = SimpleITK.ReadImage(str(tmp_path / "a.nii"))
    np.testing.assert_allclose(image.spacing, theirs.GetSpacing(), rtol=1e-6)
    image.save(tmp_path / "b.nrrd")
    np.testing.assert_allclose(SimpleITK.ReadImage(str(tmp_path / "b.nrrd")).GetSpacing(), theirs.GetSpacing(), rtol=1e-6)
    image.save(tmp_path / "c.nii")
    np.testing.assert_allclose(nib.load(tmp_path / "c.nii").affine, AFFINE, rtol=1e-6)


def test_a_qform_of_another_world_is_kept_in_it(tmp_path):
    """The scanner's space in the qform, and a template's in the sform: cropping moves both."""
    original = nib.Nifti1Image(np.random.rand(6, 5, 4).astype(np.float32), None)
    scanner = np.diag([2.0, 2, 2, 1])
    scanner[:3, 3] = 5, 6, 7
    template = np.diag([2.0, 2, 2, 1])
    template[:3, 3] = -90, -126, -72
    original.set_qform(scanner, 1)
    original.set_sform(template, 4)
    nib.save(original, tmp_path / "a.nii")
    image = vx.ScalarImage(tmp_path / "a.nii")
    with pytest.warns(RuntimeWarning, match="disagree"):
        image.load()
    image[:, 1:, 2:].save(tmp_path / "b.nii")
    again = nib.load(tmp_path / "b.nii")
    offset = np.eye(4)
    offset[:3, 3] = 1, 2, 0
    for (matrix, code), expected in [
        (again.get_qform(coded=True), (scanner @ offset, 1)),
        (again.get_sform(coded=True), (template @ offset, 4)),
    ]:
        np.testing.assert_allclose(matrix, expected[0], atol=1e-4)
        assert code == expected[1]


def test_a_shear_is_kept_although_a_quaternion_cannot_say_it(tmp_path):
    sheared = np.eye(4)
    sheared[0, 1] = 0.5
    vx.ScalarImage(torch.rand(1, 3, 3, 3), affine=sheared).save(tmp_path / "x.nii")
    np.testing.assert_array_equal(vx.ScalarImage(tmp_path / "x.nii").affine, sheared)
    assert int(nib.load(tmp_path / "x.nii").header["qform_code"]) == 0


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_name_that_was_given_says_the_format_and_not_where_a_link_points(tmp_path, ending):
    data = torch.rand(1, 3, 4, 5)
    (tmp_path / "blob").write_bytes(b"old")
    (tmp_path / f"x{ending}").symlink_to("blob")
    vx.ScalarImage(data).save(tmp_path / f"x{ending}")
    assert torch.equal(vx.ScalarImage(tmp_path / f"x{ending}").data, data)
    for name in (f"A{ending.upper()}", f"A{ending.title()}"):
        vx.ScalarImage(data).save(tmp_path / name)
        assert torch.equal(vx.ScalarImage(tmp_path / name).data, data)
    assert not [name for name in os.listdir(tmp_path) if "unfinished" in name]


def test_a_patch_overlays_its_volume(tmp_path):
    image = vx.ScalarImage(torch.rand(1, 9, 8, 7), affine=AFFINE)
    for number, patch in enumerate(vx.GridSampler(vx.Subject(t1=image), 4, 2, padding_mode="edge")):
        patch.t1.save(tmp_path / f"{number}.nii")
        saved = vx.ScalarImage(tmp_path / f"{number}.nii")
        first = (AFFINE @ [*patch.patch_location.index, 1])[:3]
        np.testing.assert_allclose(saved.origin, first, atol=1e-5)


@pytest.mark.parametrize("name", ["x.xyz", "x", "x.mhd", "x.img", "x.png", "x.tif"])
def test_unknown_formats_are_refused_with_the_known_ones(tmp_path, name):
    with pytest.raises(UnsupportedImageError, match=r"must end in \.nii, \.nii\.gz"):
        vx.ScalarImage(torch.rand(1, 2, 2, 2)).save(tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_types_that_a_format_lacks_are_refused(tmp_path):
    with pytest.raises(UnsupportedImageError, match="MGH holds uint8, int16, int32, float32, not float64"):
        vx.ScalarImage(torch.rand(1, 2, 2, 2).double()).save(tmp_path / "x.mgz")


def test_targets_that_cannot_be_written_are_named(tmp_path):
    image = vx.ScalarImage(torch.rand(1, 2, 2, 2))
    (tmp_path / "folder.nii").mkdir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(SaveError):
        image.save(tmp_path / f"{'x' * 300}.nii")
    with pytest.raises(SaveError):
        image.save(f"{tmp_path}/a\0.nii")
    image.save(tmp_path / f"{'x' * 250}.nii")
    for target, reason in [
        (tmp_path / "folder.nii", "is a folder"),
        (tmp_path / "missing" / "x.nii", "there is no folder"),
        (tmp_path / "file" / "x.nii", "there is no folder"),
    ]:
        with pytest.raises(SaveError, match=reason):
            image.save(target)
        with pytest.raises(OSError, match=reason):
            image.save(target)


def test_write_protected_targets_are_left_alone(tmp_path, monkeypatch):
    path = tmp_path / "x.nii"
    vx.ScalarImage(torch.zeros(1, 2, 2, 2)).save(path)
    # What the system answers to anyone but root, for whom nothing is protected.
    monkeypatch.setattr(os, "access", lambda target, mode: not (target == path and mode == os.W_OK))
    with pytest.raises(SaveError, match="write-protected"):
        vx.ScalarImage(torch.ones(1, 2, 2, 2)).save(path)
    assert vx.ScalarImage(path).data.sum() == 0


@pytest.mark.slow
@pytest.mark.parametrize("is_almost_enough", [False, True], ids=["much too little", "a byte too little"])
def test_a_full_disk_leaves_the_old_file(tmp_path, is_almost_enough):
    paths = [str(tmp_path / f"x{ending}") for ending in ENDINGS]
    (tmp_path / "whole").mkdir()
    for path in paths:
        vx.ScalarImage(torch.ones(1, 4, 4, 4)).save(path)
    script = f"""
        import os, resource, signal, torch, voxloom as vx
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        image = vx.ScalarImage(torch.rand(1, 40, 40, 40))
        for path in {paths!r}:
            whole = os.path.join(os.path.dirname(path), "whole", os.path.basename(path))
            image.save(whole)
            size = os.path.getsize(whole)
            # What a file may grow to.
            resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1 if {is_almost_enough} else size // 2, -1))
            try:
                image.save(path)
            except vx.errors.SaveError as error:
                print(error)
            resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    """
    assert fresh.printed(script).count("could not be written, and was left as it was") == len(paths)
    assert sorted(map(str, tmp_path.iterdir())) == sorted([*paths, str(tmp_path / "whole")])
    assert all(vx.ScalarImage(path).data.sum() == 64 for path in paths)


@pytest.mark.parametrize("ending", [slow(".nii"), ".nii.gz"])
def test_a_killed_process_leaves_the_old_file_or_the_new_one(tmp_path, ending):
    path = tmp_path / f"x{ending}"
    vx.ScalarImage(torch.zeros(1, 96, 96, 96)).save(path)
    script = f"""
        import torch, voxloom as vx
        images = [vx.ScalarImage(torch.full((1, 96, 96, 96), value)) for value in (0.0, 1.0)]
        print("ready", flush=True)
        while True:
            for image in images:
                image.save({str(path)!r})
    """
    for delay in (0.0, 0.06):
        process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"ready\n"
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert len(vx.ScalarImage(path).data.unique()) == 1


def test_saving_over_the_file_that_an_image_is_read_from(tmp_path):
    path = tmp_path / "x.nii"
    data = torch.rand(1, 4, 5, 6)
    vx.ScalarImage(data).save(path)
    loaded, lazy = vx.ScalarImage(path), vx.ScalarImage(path)
    _ = lazy[:, :2]
    loaded.new_like(loaded.data + 1).save(path)
    assert torch.equal(vx.ScalarImage(path).data, data + 1)
    assert torch.equal(loaded.data, data)
    # The header of one file must not be used to read another.
    with pytest.raises(vx.errors.ImageFileError, match="has been changed since its header was read"):
        lazy[:, 2:]


def test_a_link_goes_on_pointing_at_the_file(tmp_path):
    vx.ScalarImage(torch.zeros(1, 2, 2, 2)).save(tmp_path / "real.nii")
    (tmp_path / "link.nii").symlink_to("real.nii")
    vx.ScalarImage(torch.ones(1, 2, 2, 2)).save(tmp_path / "link.nii")
    assert (tmp_path / "link.nii").is_symlink()
    assert vx.ScalarImage(tmp_path / "real.nii").data.sum() == 8


def test_a_file_of_ones_own_that_shrinks_while_it_is_open_is_an_error_and_no_crash(tmp_path):
    path = tmp_path / "x.nii"
    vx.ScalarImage(torch.rand(1, 64, 64, 64)).save(path)
    image = vx.ScalarImage(path)
    _ = image[:, :2]
    os.truncate(path, 1000)
    with pytest.raises(vx.errors.ImageFileError, match="has been changed"):
        image[:, 40:]
