"""Files with damaged headers: whatever the damage, an image or an error that names the file."""

import warnings

import nibabel as nib
import numpy as np
import pytest
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
