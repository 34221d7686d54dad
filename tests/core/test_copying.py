"""Copying voxels between arrays of another order in memory."""

import numpy as np
import pytest

import voxloom as vx
from voxloom.core.boxes import Box
from voxloom.core.copying import copy_voxels

SHAPES = [(1, 70, 66, 80), (3, 65, 2, 64), (2, 1, 80, 90), (1, 90, 80, 1), (1, 9, 8, 7), (70, 3, 80), (80, 90), (1, 70, 0, 80)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("orders", "types"), [("CF", "hh"), ("FC", "hf"), ("FF", "df"), ("CC", "fB")])
def test_any_order_and_type(shape, orders, types):
    drawn = np.random.default_rng(0)
    source = np.asarray((drawn.random(shape) * 100).astype(types[0]), order=orders[0])
    target = np.full(shape, 99, types[1], order=orders[1])
    copy_voxels(target, source)
    assert np.array_equal(target, source.astype(types[1]))


def test_parts_of_arrays_and_flipped_ones():
    source = np.arange(3 * 100 * 90 * 80).reshape(3, 100, 90, 80)
    whole = np.zeros((3, 100, 90, 80), order="F")
    part = (slice(1, 3), slice(10, 90), slice(5, 70), slice(4, 78))
    copy_voxels(whole[part], source[part][:, ::-1, :, ::-1])
    assert np.array_equal(whole[part], source[part][:, ::-1, :, ::-1])
    assert np.count_nonzero(whole) == whole[part].size


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_nothing_is_read_of_an_empty_box(tmp_path, ending):
    vx.ScalarImage(np.ones((1, 8, 7, 6), np.float32)).save(tmp_path / f"a{ending}")
    image = vx.ScalarImage(tmp_path / f"a{ending}")
    for stop in ((3, 3, 3), (5, 3, 5), (5, 5, 3)):
        assert image.read(Box((3, 3, 3), stop)).shape == (1, *(end - 3 for end in stop))
