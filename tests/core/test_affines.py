"""What may be an affine."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from voxloom.core.geometry.affines import as_affine
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
