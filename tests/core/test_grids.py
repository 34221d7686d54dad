import itertools
import re
import time
import warnings
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from voxloom.core.boxes import Box
from voxloom.core.grid.blending import AxisWeights
from voxloom.core.grid.grids import AxisGrid, PatchGrid
from voxloom.core.grid.windows import WINDOWS
from voxloom.core.locations import PatchLocation
from voxloom.errors import LocationError, ModeError, ScaleError, SizeError

from strategies import examples, geometries


def listed_starts(start, stop, patch, stride):
    """The starts as TorchIO lists them."""
    starts = list(range(start, stop - patch + 1, stride))
    return starts if starts[-1] == stop - patch else [*starts, stop - patch]


@st.composite
def axis_grids(draw):
    patch = draw(st.integers(1, 9))
    start = draw(st.integers(-5, 5))
    return AxisGrid(start, start + patch + draw(st.integers(0, 30)), patch, draw(st.integers(1, patch)))


@given(axis_grids(), st.integers(-15, 45), st.integers(0, 10))
def test_an_axis_answers_as_its_list_of_starts_would(grid, first, length):
    starts = listed_starts(grid.start, grid.stop, grid.patch, grid.stride)
    assert list(grid) == starts
    assert len(grid) == len(starts)
    touching = [number for number, s in enumerate(starts) if max(s, first) < min(s + grid.patch, first + length)]
    assert list(grid.touching(first, first + length)) == touching
    assert grid.find(first) == (starts.index(first) if first in starts else None)


@given(geometries(may_exceed=True), st.booleans())
def test_a_grid_covers_every_voxel_and_finds_every_patch(geometry, padded):
    shape, patch, overlap = geometry
    if not padded and any(map(int.__gt__, patch, shape)):
        with pytest.raises(SizeError, match="padding_mode"):
            PatchGrid.cover(shape, patch, overlap)
        return
    grid = PatchGrid.cover(shape, patch, overlap, padded=padded)
    volume = Box.of_shape(shape)
    assert volume in grid.box
    assert padded or grid.box == volume
    locations = list(grid)
    assert len(set(locations)) == len(grid)
    assert [grid[number] for number in range(len(grid))] == locations
    assert [grid.ravel(grid.find(location)) for location in locations] == list(range(len(grid)))
    assert grid[-1] == locations[-1]
    probe = Box.of_shape([1] * len(shape), [size // 2 for size in shape])
    touching = [number for number, location in enumerate(locations) if (location.box & probe).numel]
    assert list(grid.touching(probe)) == touching
    assert touching


def test_padding_is_half_the_overlap_and_what_the_patch_lacks():
    assert PatchGrid.cover((10,), 4, 2, padded=True).box == Box((-1,), (11,))
    assert PatchGrid.cover((3,), 8, 2, padded=True).box == Box((-2,), (6,))
    assert PatchGrid.cover((2,), 9, 0, padded=True).box == Box((-3,), (6,))


def test_a_grid_of_a_trillion_patches_takes_no_time_and_no_memory():
    began = time.process_time()
    grid = PatchGrid.cover((640_000,) * 3, 64)
    assert len(grid) == 10**12
    assert grid[10**12 - 1].index == (639_936,) * 3
    assert len(list(grid.touching(Box.of_shape((65, 1, 1), (63, 0, 0))))) == 2
    assert grid.find(PatchLocation((64, 128, 0), (64,) * 3)) == (1, 2, 0)
    # Not a benchmark: listing them would take days.
    assert time.process_time() - began < 5


def test_a_grid_finds_a_patch_without_going_through_all():
    grid = PatchGrid.cover((640_000,) * 3, 64)
    assert grid.index(grid[-1]) == 10**12 - 1
    assert grid.count(grid[12345]) == 1
    assert grid.count(PatchLocation((1, 1, 1), (64,) * 3)) == 0
    assert PatchLocation((1, 1, 1), (64,) * 3) not in grid
    with pytest.raises(ValueError, match="not one of the grid's"):
        grid.index(PatchLocation((1, 1, 1), (64,) * 3))


def test_an_index_beyond_the_grid_is_an_index_error():
    grid = PatchGrid.cover((8,), 4)
    with pytest.raises(IndexError, match="patch 2 of a grid of 2"):
        grid[2]
    with pytest.raises(IndexError):
        grid[-3]


@given(geometries(), st.sampled_from([Fraction(1, 2), Fraction(2), Fraction(3, 2), Fraction(1, 3)]))
def test_a_scaled_grid_has_every_start_scaled_or_names_the_one_that_cannot_be(geometry, factor):
    shape, patch, overlap = geometry
    grid = PatchGrid.cover(shape, patch, overlap)
    exact = [[value * factor for value in row] for row in grid.tolist()]
    if all(value.denominator == 1 for row in exact for value in row):
        assert grid.scaled((factor,) * 3).tolist() == exact
    else:
        with pytest.raises(ScaleError, match="whole voxels"):
            grid.scaled((factor,) * 3)


@examples(300)
@given(geometries(ndim=1, largest=40, may_exceed=True), st.booleans(), st.sampled_from([2, 3, 4, 8]))
def test_the_way_out_that_an_error_suggests_is_one(geometry, padded, step):
    (length,), (patch,), (overlap,) = geometry
    factor = Fraction(1, step)
    if not padded and patch > length:
        return
    try:
        PatchGrid.cover((length,), patch, overlap, padded=padded).scaled((factor,))
    except ScaleError as error:
        numbers = [int(word) for word in re.findall(r"\d+", str(error).rpartition("multiples of")[2])]
        if "An overlap of" in str(error):
            PatchGrid.cover((length,), patch, numbers[1], padded=padded).scaled((factor,))
        elif "No overlap" in str(error):
            PatchGrid.cover((numbers[1],), patch, numbers[2], padded=padded).scaled((factor,))
        else:
            assert f"Use a patch size that is a multiple of {step}" in str(error)
            assert patch % step


def test_misaligned_starts_are_named_together_with_an_overlap_that_would_do():
    with pytest.raises(ScaleError, match=r"axis I, the patch that begins at voxel 54.*multiples of 4.*overlap of 12"):
        PatchGrid.cover((64 + 56 * 2, 64, 64), 64, 10).scaled((Fraction(1, 4),) * 3)


@pytest.mark.parametrize("value", [0, -2, 1.5, 64.0, True, "8", None, (4, 4), (4, 4, 4, 4), (4, True, 4)])
def test_sizes_that_are_none_are_refused_by_name(value):
    with pytest.raises(SizeError, match="patch_size"):
        PatchGrid.cover((16, 16, 16), value)
    with pytest.raises(ValueError, match="patch_size"):  # what code for other libraries expects
        PatchGrid.cover((16, 16, 16), value)


@pytest.mark.parametrize("value", [64, None, "abc", ()])
def test_shapes_that_are_none_are_refused(value):
    with pytest.raises(SizeError, match="spatial_shape"):
        PatchGrid.cover(value, 8)


@pytest.mark.parametrize("row", [[0, 0, 0, 4, 4], [0.5, 0, 0, 4, 4, 4], [], ["a", "b"]])
def test_rows_that_are_no_locations_are_refused(row):
    with pytest.raises(LocationError, match="is no location"):
        PatchLocation.from_row(row)
    with pytest.raises(LocationError):
        PatchLocation((1, 2, 3), 8)


@pytest.mark.parametrize(("overlap", "rule"), [(-2, "at least 0"), (8, "smaller than"), (10, "smaller than"), (1.0, "whole")])
def test_overlaps_that_cannot_be_are_refused_with_the_rule(overlap, rule):
    with pytest.raises(SizeError, match=f"patch_overlap.*{rule}"):
        PatchGrid.cover((16, 16, 16), 8, overlap)


def test_locations_scale_exactly_or_not_at_all():
    location = PatchLocation((10, 20, 30), (8, 8, 8), subject_index=3)
    assert location.scaled(0.5) == PatchLocation((5, 10, 15), (4, 4, 4), 3)
    assert location.scaled((2, 1, Fraction(1, 2))) == PatchLocation((20, 20, 15), (16, 8, 4), 3)
    with pytest.raises(ScaleError, match="voxel 10 on axis I"):
        location.scaled(Fraction(1, 4))
    assert PatchLocation.from_row(location.tolist()).box == location.box


@given(st.integers(1, 90), st.integers(1, 40), st.sampled_from([0.5, 0.2, 0.7, 0.75, 0.99, 1 / 3]))
@example(48, 12, 0.7)
def test_even_starts_are_those_of_nnunet(length, patch, overlap):
    """As their method is described: as many as are needed, as far apart as these allow, and rounded."""
    patch = min(patch, length)
    (axis,) = PatchGrid.cover((length,), (patch,), overlap, patch_spacing="even").axes
    step = patch * {0.5: 0.5, 0.2: 0.8, 0.7: 0.3, 0.75: 0.25, 0.99: 0.01, 1 / 3: 2 / 3}[overlap]
    if step >= 1:
        count = int(np.ceil((length - patch) / step)) + 1
        exact = (length - patch) / (count - 1) if count > 1 else 0
        assert list(axis) == [int(np.round(exact * number)) for number in range(count)]
    gaps = np.diff(list(axis))
    assert len(gaps) == 0 or (gaps.max() - gaps.min() <= 1 and gaps.min() >= 1)
    assert (axis[0], axis[len(axis) - 1]) == (0, length - patch)


@st.composite
def grids(draw):
    """Grids of one axis with any overlap, odd, even or a fraction, and either spacing."""
    length, patch = draw(st.integers(1, 40)), draw(st.integers(1, 20))
    padded = draw(st.booleans()) or patch > length
    share = draw(st.one_of(st.integers(0, patch - 1), st.sampled_from([0.25, 0.5, 0.6, 0.9])))
    if padded and isinstance(share, int):
        share -= share % 2
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        return PatchGrid.cover((length,), (patch,), share, padded=padded, patch_spacing=draw(st.sampled_from(["fixed", "even"])))


@given(grids())
def test_what_is_asked_of_a_grid_is_true_of_its_list(grid):
    (axis,) = grid.axes
    starts = list(axis)
    assert starts == sorted(set(starts))
    assert starts[0] <= 0
    assert starts[-1] + axis.patch >= grid.spatial_shape[0]
    assert all(later - earlier <= axis.patch for earlier, later in itertools.pairwise(starts))
    for voxel in range(axis.start - 2, axis.stop + 2):
        assert axis.find(voxel) == (starts.index(voxel) if voxel in starts else None)
        for end in (voxel + 1, voxel + 5):
            assert list(axis.touching(voxel, end)) == [
                number for number, start in enumerate(starts) if start < end and start + axis.patch > voxel
            ]
    for window in (None, *WINDOWS.values()):
        weights = AxisWeights(axis, window)
        total = np.zeros(axis.stop - axis.start)
        for number, start in enumerate(starts):
            first, last = (start, start + axis.patch) if window else weights.core(number)
            total[first - axis.start : last - axis.start] += weights.of(number).numpy() if window else 1
        assert np.allclose(total, 1)


def test_even_grids_scale_exactly_or_not_at_all():
    grid = PatchGrid.cover((20, 8, 8), 8, 0.5, patch_spacing="even")
    assert [list(axis) for axis in grid.scaled((2, 1, 1)).axes] == [[0, 8, 16, 24], [0], [0]]
    with pytest.raises(ScaleError, match="multiples of 8"):
        PatchGrid.cover((22, 8, 8), 8, 0.5, patch_spacing="even").scaled((Fraction(1, 8), 1, 1))
    assert PatchGrid.cover((22, 8, 8), 8, 0.5, patch_spacing="even") != PatchGrid.cover((22, 8, 8), 8, 0.5)


def test_a_size_of_minus_one_is_all_of_an_axis():
    grid = PatchGrid.cover((30, 70, 200), (-1, -1, 64), (0.5, 3, 32))
    assert grid.patch_size == (30, 70, 64)
    assert grid.counts == (1, 1, 6)


@pytest.mark.parametrize("value", ["odd", None, 1])
def test_spacings_that_are_none(value):
    with pytest.raises(ModeError, match="patch_spacing"):
        PatchGrid.cover((8, 8, 8), 4, patch_spacing=value)


def test_only_padding_needs_even_overlaps():
    assert PatchGrid.cover((20,), (8,), 3).axes[0].stride == 5
    with pytest.raises(SizeError, match="must be even where the volume is padded.*use 2 or 4"):
        PatchGrid.cover((20,), (8,), 3, padded=True)
