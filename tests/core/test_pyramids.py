"""Coarser levels: means and modes, also where voxels are left over."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from voxloom.core.pyramids import coarser, coarser_affine, coarser_shape

SHAPES = st.tuples(*[st.integers(1, 7)] * 3)
FACTORS = st.tuples(*[st.integers(1, 2)] * 3)


def cells(values, factors):
    """Give the voxels of each cell, one after the other."""
    shape = coarser_shape(values.shape, factors)
    for place in np.ndindex(*shape):
        yield place, values[tuple(slice(n * step, (n + 1) * step) for n, step in zip(place, factors, strict=True))]


@given(SHAPES, FACTORS, st.integers(0, 9), st.sampled_from(["uint8", "int16", "int32", "int64"]))
def test_labels_are_those_of_most(shape, factors, seed, dtype):
    values = np.random.default_rng(seed).integers(0, 4, shape).astype(dtype)
    made = coarser(values[None], factors, is_labels=True)
    assert made.dtype == values.dtype
    for place, cell in cells(values, factors):
        found, counts = np.unique(cell, return_counts=True)
        assert made[(0, *place)] == found[counts == counts.max()].max()


@given(SHAPES, FACTORS, st.integers(0, 9), st.sampled_from(["uint8", "int16", "uint16", "float32", "float64"]))
def test_intensities_are_means(shape, factors, seed, dtype):
    values = (np.random.default_rng(seed).random(shape) * 250).astype(dtype)
    made = coarser(values[None], factors, is_labels=False)
    assert made.dtype == values.dtype
    for place, cell in cells(values, factors):
        mean = cell.astype(np.float64).mean()
        # Voxels that are left over at the end are all there is, so that their mean is of them alone.
        assert made[(0, *place)] == pytest.approx(mean, abs=1e-4 if values.dtype.kind == "f" else 0.5 + 1e-9)


def test_extremes_do_not_overflow():
    for dtype in (np.uint8, np.int16, np.uint16, np.int32):
        values = np.full((1, 2, 2, 2), np.iinfo(dtype).max, dtype)
        assert coarser(values, (2, 2, 2), is_labels=False).item() == np.iinfo(dtype).max


def test_a_level_fills_the_space_of_the_one_before():
    affine = np.array([[0.0, 2, 0, -30], [-1.5, 0, 0, 4], [0, 0, 3, 5], [0, 0, 0, 1]])
    made = coarser_affine(affine, (2, 1, 2))
    assert np.allclose(made @ [-0.5, -0.5, -0.5, 1], affine @ [-0.5, -0.5, -0.5, 1])
    assert np.allclose(made @ [9.5, 9.5, 9.5, 1], affine @ [19.5, 9.5, 19.5, 1])


def test_of_many_voxels_most_are_counted():
    values = np.repeat(np.array([1, 2, 0], dtype=np.uint8), (300, 200, 12)).reshape(1, 8, 8, 8)
    assert coarser(values, (8, 8, 8), is_labels=True).tolist() == [[[[1]]]]
