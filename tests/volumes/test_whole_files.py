"""MINC, PAR/REC and AFNI: what nibabel reads comes back with its values, and in its place."""

import shutil
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import voxloom as vx
from voxloom.core.boxes import Box
from voxloom.errors import CorruptImageError, ImageNotFoundError, MissingDependencyError, UnsupportedImageError
from voxloom.testing import check_source

SAMPLES = Path(nib.__file__).parent / "tests" / "data"
WHOLE = [
    "small.mnc",
    "minc1_1_scale.mnc",
    "minc2_1_scale.mnc",
    "phantom_EPI_asc_CLEAR_2_1.PAR",
    "phantom_varscale.PAR",
    "example4d+orig.HEAD",
    "example4d+orig.BRIK.gz",
    "scaled+tlrc.HEAD",
    "scaled+tlrc.BRIK",
]


@pytest.mark.parametrize("name", WHOLE)
def test_values_and_places_are_those_of_nibabel(name):
    image = vx.ScalarImage(SAMPLES / name)
    expected = nib.load(SAMPLES / name)
    values = np.asanyarray(expected.dataobj)
    if name.endswith(".PAR"):
        expected.dataobj.file_like.close()
    values = values[None] if values.ndim == 3 else np.moveaxis(values, -1, 0)
    assert np.allclose(image.data.numpy(), values, rtol=1e-6)
    assert np.array_equal(image.affine, expected.affine)
    check_source(vx.ScalarImage(SAMPLES / name), image.data, expected.affine)


@pytest.mark.parametrize("name", ["small.mnc", "scaled+tlrc.HEAD", "phantom_varscale.PAR"])
def test_boxes_are_parts_of_the_whole(name):
    image = vx.ScalarImage(SAMPLES / name)
    part = image.read(Box((1, 2, 3), (9, 8, 7)))
    assert part.equal(vx.ScalarImage(SAMPLES / name).data[:, 1:9, 2:8, 3:7])


def test_volumes_of_minc_with_time_are_refused_since_no_one_says_which_axis_it_is():
    with pytest.raises(UnsupportedImageError, match=r"minc1_4d.mnc has 4 axes"):
        vx.ScalarImage(SAMPLES / "minc1_4d.mnc").load()


def test_minc_under_another_name_is_not_left_to_a_reader_that_turns_it(tmp_path):
    shutil.copy(SAMPLES / "small.mnc", tmp_path / "small.mnc2")
    with pytest.raises(UnsupportedImageError, match="rename it"):
        vx.ScalarImage(tmp_path / "small.mnc2").load()


def test_minc_2_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(MissingDependencyError, match=r"pip install voxloom\[minc\]"):
        vx.ScalarImage(SAMPLES / "minc2_1_scale.mnc").load()


@pytest.mark.parametrize("name", ["small.mnc", "minc2_1_scale.mnc", "phantom_varscale.PAR", "scaled+tlrc.HEAD"])
def test_what_ends_too_early_is_an_error(tmp_path, name):
    for path in SAMPLES.glob(f"{Path(name).stem}.*"):
        shutil.copy(path, tmp_path)
    data = next(tmp_path.glob("*.[BRm]*")) if name.endswith("mnc") else next(tmp_path.glob("*.[BR][RE][IC]*"))
    data.write_bytes(data.read_bytes()[: data.stat().st_size * 2 // 3])
    with pytest.raises(CorruptImageError, match=Path(name).stem.replace("+", r"\+")):
        vx.ScalarImage(tmp_path / name).load()


def test_a_header_without_its_data_is_an_error(tmp_path):
    shutil.copy(SAMPLES / "scaled+tlrc.HEAD", tmp_path)
    with pytest.raises(ImageNotFoundError, match=r"scaled\+tlrc.BRIK"):
        vx.ScalarImage(tmp_path / "scaled+tlrc.HEAD").load()
