"""What may be an affine."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.transform import Rotation

from voxloom.core.geometry.affines import as_affine, spacing_of, stated_spacing
from voxloom.errors import ImageError

FLATTENING = st.sampled_from([0, 1e-17, 1e-15, 1e-13, 1e-10, 1e-6, 1])
SCALES = st.sampled_from([1e-150, 1e-107, 1e-90, 1e-6, 1, 1e3, 1e150])


@given(
    arrays(float, (3, 3), elements=st.floats(-9, 9)), FLATTENING, st.sampled_from([1e-150, 1e-107, 1e-90, 1e-6, 1, 1e3, 1e150])
)
def test_an_affine_is_refused_exactly_where_the_rank_of_its_axes_says_so(axes, flattening, scale):
    axes[:, 2] = axes[:, 0] + axes[:, 1] + flattening * axes[:, 2]
    affine = np.eye(4)
    affine[:3, :3] = axes * scale
    if np.linalg.matrix_rank(affine[:3, :3]) < 3:
        with pytest.raises(ImageError, match="flat"):
            as_affine(affine)
    else:
        assert np.array_equal(as_affine(affine), affine)


@pytest.mark.parametrize("sizes", [(1, 1, 3), (0.7, 0.7, 2.5), (0.48828125, 0.9765625, 1.25), (0.429688, 0.859375, 5)])
@pytest.mark.parametrize("angles", [(0, 0, 0), (0, 0, 30), (7, 13, -8), (-11, 5, 17), (45, 45, 45)])
def test_the_spacing_of_an_oblique_affine_is_what_its_header_stated(sizes, angles):
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() * np.float32(sizes)
    in_single = affine.astype("float32").astype(float)
    assert stated_spacing(in_single) == tuple(np.float32(sizes).tolist())
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() * sizes
    assert stated_spacing(affine) == pytest.approx(sizes, rel=0, abs=0) or angles == (0, 0, 0)


def test_a_spacing_that_nobody_states_stays():
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", (7, 13, -8), degrees=True).as_matrix() * (1.2345678, math.pi, 0.1234567)
    assert stated_spacing(affine) == spacing_of(affine)
