"""Boxes of whole shards: they cover a volume once, and what each is gathered from is counted right."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from voxloom.core.grid.grids import PatchGrid
from voxloom.core.grid.shards import ShardGrid

SIZES = st.tuples(*[st.integers(1, 23)] * 3)


@given(SIZES, SIZES)
def test_boxes_cover_a_volume_once(shape, size):
    boxes = ShardGrid(shape, size)
    count = np.zeros(shape, dtype=int)
    for number in range(len(boxes)):
        count[boxes[number].slices] += 1
    assert (count == 1).all()
    with pytest.raises(IndexError):
        boxes[len(boxes)]


@given(SIZES, SIZES, st.integers(1, 9), st.integers(0, 8), st.booleans())
def test_patches_of_all_boxes_are_counted(shape, size, patch, overlap, is_padded):
    if overlap >= patch or (not is_padded and patch > min(shape)) or (is_padded and overlap % 2):
        return
    grid = PatchGrid.cover(shape, (patch,) * 3, (overlap,) * 3, padded=is_padded)
    boxes = ShardGrid(shape, size)
    expected = 0
    for number, numbers in itertools.product(range(len(boxes)), np.ndindex(*grid.counts)):
        place = grid.location(numbers)
        box = boxes[number]
        ends = zip(place.index, place.index_fin, box.start, box.stop, strict=True)
        expected += all(first < high and last > low for first, last, low, high in ends)
    assert boxes.computed_patches(grid) == expected


def test_parts_are_whole_shards_of_a_few_patches():
    boxes = ShardGrid.of((1000, 1000, 90), (256, 256, 64), (96, 96, 96))
    assert boxes.size == (512, 512, 90)
    assert ShardGrid.of((1000, 1000, 90), (64, 64, 64), (96, 96, 96), (0.5, 0.5, 0.5)).size == (192, 192, 90)


def test_ten_million_parts_are_numbers():
    boxes = ShardGrid((2**16, 2**16, 2**16), (300, 300, 300))
    assert len(boxes) == 219**3
    assert boxes[len(boxes) - 1].stop == (2**16,) * 3
    grid = PatchGrid.cover((2**16,) * 3, (96,) * 3, (48,) * 3)
    assert 1 < boxes.computed_patches(grid) / grid.num_patches < 2.2
