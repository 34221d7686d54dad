"""Files with damaged headers: whatever the damage, an image or an error that names the file."""

import warnings

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import voxloom as vx
from voxloom.errors import VoxloomError

HEADERS = {".nii": 352, ".mgh": 120, ".nrrd": 300, ".mha": 300}


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("intact")
    array = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    nib.save(nib.Nifti1Image(array, np.eye(4)), folder / "x.nii")
    nib.save(nib.MGHImage(array, np.eye(4)), folder / "x.mgh")
    for ending in (".nrrd", ".mha"):
        vx.ScalarImage(torch.from_numpy(array)[None]).save(folder / f"x{ending}")
    return {ending: (folder / f"x{ending}").read_bytes() for ending in HEADERS}


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(HEADERS)), st.data())
def test_damaged_headers_never_surprise(intact, tmp_path, ending, data):
    content = bytearray(intact[ending])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(HEADERS[ending], len(content)) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / f"x{ending}"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of nibabel's: it mends what it can, and says so
        try:
            image = vx.ScalarImage(path)
            shape = image.shape
            repr(image)
            if np.prod(shape, dtype=object) < 10**6:
                assert image.data.shape == shape
                image[:, :1].data.sum()
        except VoxloomError as error:
            assert "x." in str(error) or "affine" in str(error)


@pytest.mark.parametrize("ending", [".nii.gz", ".mgz", ".mha", ".nrrd"])
def test_damaged_compressed_data_are_never_taken_for_values(tmp_path, ending):
    path = tmp_path / f"x{ending}"
    data = torch.from_numpy(np.random.default_rng(0).integers(0, 50, (1, 16, 16, 16), dtype=np.int16))
    vx.ScalarImage(data).save(path)
    intact = path.read_bytes()
    noticed = 0
    for number in range(60):
        content = bytearray(intact)
        place = len(content) // 3 + number * (len(content) // 2 // 60)
        content[place] ^= 0x5A
        path.write_bytes(content)
        try:
            assert torch.equal(vx.ScalarImage(path).data, data)
        except VoxloomError as error:
            noticed += 1
            assert path.name in str(error)
    assert noticed >= 55  # a few bytes of a compressed stream mean nothing


def test_a_truncated_stack_of_pages_is_noticed(tmp_path):
    path = tmp_path / "x.tif"
    pages = np.random.default_rng(0).integers(0, 255, (20, 30, 40), dtype=np.uint8)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(pages), str(path))
    assert vx.ScalarImage(path).shape == (1, 40, 30, 20)
    assert torch.equal(vx.ScalarImage(path).data[0], torch.from_numpy(pages.transpose(2, 1, 0).copy()))
    intact = path.read_bytes()
    noticed = 0
    for length in range(len(intact) // 10, len(intact) - 1, len(intact) // 10):
        path.write_bytes(intact[:length])
        try:
            # What the end of a file holds may be a remark.
            assert torch.equal(vx.ScalarImage(path).data[0], torch.from_numpy(pages.transpose(2, 1, 0).copy()))
        except VoxloomError as error:
            noticed += 1
            assert "x.tif" in str(error)
    assert noticed >= 9
