"""A scan that predictions in parts are made of."""

import numpy as np
import pytest
import torch

import voxloom as vx

AFFINE = np.array([[0.0, 2, 0, -30], [-1.5, 0, 0, 4], [0, 0, 3, 5], [0, 0, 0, 1]])


@pytest.fixture
def scan(tmp_path):
    data = torch.rand(1, 34, 30, 28, generator=torch.Generator().manual_seed(0))
    image = vx.ScalarImage(data, affine=AFFINE)
    image.save(tmp_path / "scan.nii")
    return tmp_path / "scan.nii"
