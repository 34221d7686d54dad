import pytest
from hypothesis import given
from hypothesis import strategies as st

from voxloom.core.boxes import Box
from voxloom.errors import SizeError


@st.composite
def boxes(draw, ndim):
    starts = [draw(st.integers(-5, 5)) for _ in range(ndim)]
    return Box(tuple(starts), tuple(start + draw(st.integers(0, 6)) for start in starts))


def voxels(box):
    import itertools

    return set(itertools.product(*(range(a, b) for a, b in zip(box.start, box.stop, strict=True))))


@given(st.integers(1, 3).flatmap(lambda ndim: st.tuples(boxes(ndim), boxes(ndim))))
def test_boxes_are_the_sets_of_their_voxels(pair):
    a, b = pair
    assert voxels(a & b) == voxels(a) & voxels(b)
    assert a.numel == len(voxels(a))
    assert (b in a) == (voxels(b) <= voxels(a)) or b.numel == 0
    assert voxels(a.shift(b.start)) == {tuple(map(int.__add__, voxel, b.start)) for voxel in voxels(a)}
    assert a.relative_to(a.start) == Box.of_shape(a.shape)


def test_only_boxes_are_inside_of_boxes():
    assert 1 not in Box((0,), (2,))
    with pytest.raises(SizeError, match="of 1 and of 2 axes"):
        Box((0,), (5,)) & Box((0, 0), (3, 3))


def test_a_box_must_not_stop_before_it_starts():
    with pytest.raises(SizeError, match=r"\(2,\) to \(1,\)"):
        Box((2,), (1,))


def test_slices_refuse_negative_indices_because_python_would_count_from_the_end():
    with pytest.raises(SizeError, match="clip it first"):
        _ = Box((-1, 0), (2, 2)).slices
