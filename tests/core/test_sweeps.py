"""Sweeps: every voxel is finished once, as soon as the last patch over it has been added, and little is open."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from voxloom.core.front import Front, WeightsOfPatches
from voxloom.core.grids import AxisGrid, PatchGrid
from voxloom.core.sweeps import AxisSweep, Sweep
from voxloom.core.windows import resolve_window
from voxloom.errors import SizeError

from strategies import geometries


@st.composite
def sweeps(draw):
    shape, patch, overlap = draw(geometries(largest=9, may_exceed=True))
    padded = draw(st.booleans()) or any(map(int.__gt__, patch, shape))
    grid = PatchGrid.cover(shape, patch, overlap, padded=padded)
    return Sweep(grid, draw(st.booleans()), draw(st.permutations(range(3)).map(tuple)))


@given(sweeps())
def test_each_interval_is_finished_with_the_last_patch_that_adds_to_it(sweep):
    for axis in sweep.steps:
        finished = list(itertools.chain.from_iterable(axis.finished_with(number) for number in range(len(axis.grid))))
        assert finished == list(range(len(axis.intervals)))
        for number in range(len(axis.grid)):
            start, stop = axis.spans[number]
            covered = [axis.intervals[interval] for interval in axis.adds_to(number)]
            assert sum(end - begin for begin, end in covered) == stop - start
            later = [interval for other in range(number + 1, len(axis.grid)) for interval in axis.adds_to(other)]
            assert not set(axis.finished_with(number)) & set(later)
            first = axis.added_by(range(number, number + 1)).start
            adding = [other for other in range(len(axis.grid)) if set(axis.adds_to(other)) & set(axis.finished_with(number))]
            assert all(first <= other <= number for other in adding)


@given(sweeps(), st.data())
def test_columns_share_the_volume_out(sweep, data):
    parts = [data.draw(st.integers(1, len(numbers))) for numbers in (sweep.whole.rows, sweep.whole.thirds)]
    columns = sweep.split(*parts)
    assert len(columns) <= parts[0] * parts[1]
    assert all(sweep.column_box(column).numel for column in columns)
    covered = np.zeros(sweep.grid.spatial_shape, dtype=int)
    for column in columns:
        covered[sweep.column_box(column).slices] += 1
        layers = [sweep.column_box(column, layer).numel for layer in range(sweep.num_layers)]
        assert sum(layers) == sweep.column_box(column).numel
        listed = [
            len([numbers for row in sweep.rows_of(column) for numbers in sweep.patches(layer, row, column)])
            for layer in range(sweep.num_layers)
        ]
        assert listed == sweep.num_patches(column)
    assert (covered == 1).all()


@given(sweeps(), st.data())
def test_a_front_gives_the_sum_of_all_patches_and_never_holds_more_than_was_said(sweep, data):
    parts = [data.draw(st.integers(1, len(numbers))) for numbers in (sweep.whole.rows, sweep.whole.thirds)]
    column = data.draw(st.sampled_from(sweep.split(*parts)))
    window = None if sweep.is_cropped else resolve_window("hann")
    cpu = torch.device("cpu")
    weights = window and WeightsOfPatches(sweep, window, torch.float32, cpu)
    front = Front(sweep, column, 2, torch.float32, cpu, weights)
    result = torch.full((2, *sweep.grid.spatial_shape), torch.nan)
    patch = torch.tensor([1.0, -3.0]).view(2, 1, 1, 1).expand(2, *sweep.grid.patch_size)
    most = 0
    for layer in range(sweep.num_layers):
        for row in sweep.rows_of(column):
            for numbers in sweep.patches(layer, row, column):
                front.add(patch, numbers)
            most = max(most, sum(cell.box.numel for cell in front._cells.values()))
            for finished in front.finish(layer, row):
                assert finished.uncovered is None
                result[(slice(None), *finished.box.slices)] = finished.values
    inside = result[(slice(None), *sweep.column_box(column).slices)]
    torch.testing.assert_close(inside, patch[:, :1, :1, :1].expand_as(inside), atol=0, rtol=1e-5)
    assert int(result.isnan().sum()) == result.numel() - inside.numel()
    assert front._cells == {}
    assert most <= sweep.open_voxels(column)


def test_the_open_part_of_a_large_volume_is_some_planes_and_a_band():
    sweep = Sweep.smallest(PatchGrid.cover((528, 528, 1008), 96, 48), is_cropped=False)
    assert sweep.axes[0] == 2
    planes = 48 * 528 * 528
    assert sweep.open_voxels(sweep.whole) == pytest.approx(planes + 48 * 528 * 96, rel=0.1)


def test_open_voxels_are_not_overstated():
    sweep = Sweep.smallest(PatchGrid.cover((12, 40, 40), 8, 4), is_cropped=False)
    front = Front(sweep, sweep.whole, 1, torch.float32, torch.device("cpu"), None)
    most = 0
    for layer, row in itertools.product(range(sweep.num_layers), sweep.rows_of(sweep.whole)):
        for numbers in sweep.patches(layer, row, sweep.whole):
            front.add(torch.zeros(1, 8, 8, 8), numbers)
        most = max(most, sum(cell.box.numel for cell in front._cells.values()))
        for _ in front.finish(layer, row):
            pass
    assert most == sweep.open_voxels(sweep.whole)


def test_too_many_parts_are_an_error():
    sweep = Sweep.smallest(PatchGrid.cover((20, 20, 20), 10), is_cropped=False)
    with pytest.raises(SizeError, match="2 rows of patches cannot be cut into 3 parts"):
        sweep.split(3, 1)


def test_an_axis_of_a_single_patch():
    axis = AxisSweep(AxisGrid(start=0, stop=5, patch=5, stride=3), size=5, is_cropped=False)
    assert axis.intervals == [(0, 5)]
    assert axis.finished_with(0) == axis.adds_to(0) == range(1)
