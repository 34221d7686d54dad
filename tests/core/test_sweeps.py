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
    axes, joined = draw(st.permutations(range(3)).map(tuple)), draw(st.tuples(st.booleans(), st.booleans()))
    return Sweep.of(grid, draw(st.booleans()), axes, joined)


@given(sweeps())
def test_each_interval_is_finished_with_the_last_patch_that_adds_to_it(sweep):
    for axis in sweep.parts:
        finished = list(itertools.chain.from_iterable(axis.finished_with(group) for group in range(len(axis.groups))))
        assert finished == list(range(len(axis.intervals)))
        for number in range(len(axis.grid)):
            start, stop = axis.spans[number]
            covered = [axis.intervals[interval] for interval in axis.adds_to(number)]
            assert sum(max(0, min(end, stop) - max(begin, start)) for begin, end in covered) == stop - start
            assert all(min(end, stop) > max(begin, start) for begin, end in covered)
        added = [{interval for number in group for interval in axis.adds_to(number)} for group in axis.groups]
        for group in range(len(axis.groups)):
            own = set(axis.finished_with(group))
            assert not own & set().union(*added[group + 1 :])
            first = axis.added_by(range(group, group + 1)).start
            assert all(first <= other <= group for other in range(len(added)) if added[other] & own)


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
        listed = [list(sweep.patches(layer, column)) for layer in range(sweep.num_layers)]
        assert [len(patches) for patches in listed] == sweep.num_patches(column)
        touching = [
            numbers for numbers in np.ndindex(sweep.grid.counts) if (sweep.span(numbers) & sweep.column_box(column)).numel
        ]
        assert sorted(itertools.chain.from_iterable(listed)) == touching
        needed = data.draw(st.integers(0, 2**32).map(np.random.default_rng)).random(sweep.grid.counts) < 0.5
        some = [[numbers for numbers in patches if needed[numbers]] for patches in listed]
        assert [list(sweep.patches(layer, column, needed)) for layer in range(sweep.num_layers)] == some
        assert sweep.num_patches(column, needed) == list(map(len, some))
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

    def finish(place):
        nonlocal most
        most = max(most, sum(cell.box.numel for cell in front._cells.values()))
        for finished in front.finish(place):
            assert finished.uncovered is None
            result[(slice(None), *finished.box.slices)] = finished.values

    for layer in range(sweep.num_layers):
        patches = list(sweep.patches(layer, column))
        for place in sweep.places(layer, column):
            while patches and sweep.place(patches[0]) == place:
                before = front.num_bytes
                will_open = front.bytes_to_open(patches[0])
                front.add(patch, patches.pop(0))
                assert front.num_bytes == before + will_open
            finish(place)
        assert patches == []
    inside = result[(slice(None), *sweep.column_box(column).slices)]
    torch.testing.assert_close(inside, patch[:, :1, :1, :1].expand_as(inside), atol=0, rtol=1e-5)
    assert int(result.isnan().sum()) == result.numel() - inside.numel()
    assert front._cells == {}
    assert most <= sweep.open_voxels(column)


def test_the_open_part_of_a_large_volume_is_some_planes_and_a_band():
    sweep = Sweep.smallest(PatchGrid.cover((528, 528, 1008), 96, 48), is_cropped=False)
    assert sweep.axes[0] == 2
    planes = 48 * 528 * 528
    assert sweep.open_voxels(sweep.whole) == pytest.approx(planes + 48 * 528 * 48, rel=0.05)


@pytest.mark.parametrize(("shape", "patch", "overlap"), [((12, 40, 40), 8, 4), ((26, 26, 26), 10, 4), ((9, 21, 30), 8, 6)])
@pytest.mark.parametrize("joined", [(False, False), (False, True), (True, False), (True, True)])
def test_open_voxels_are_not_overstated(shape, patch, overlap, joined):
    sweep = Sweep.of(PatchGrid.cover(shape, patch, overlap), False, (0, 1, 2), joined)
    for column in [sweep.whole, *sweep.split(2, 2)]:
        front = Front(sweep, column, 1, torch.float32, torch.device("cpu"), None)
        most = 0
        for layer in range(sweep.num_layers):
            patches = list(sweep.patches(layer, column))
            for place in sweep.places(layer, column):
                for numbers in [each for each in patches if sweep.place(each) == place]:
                    front.add(torch.zeros(1, patch, patch, patch), numbers)
                most = max(most, sum(cell.box.numel for cell in front._cells.values()))
                for _ in front.finish(place):
                    pass
        assert most == sweep.open_voxels(column)


def test_the_last_two_layers_are_joined_where_that_keeps_less_open():
    grid = PatchGrid.cover((256, 256, 256), 96, 48)  # patches begin at 0, 48, 96, 144 and 160
    sweep = Sweep.smallest(grid, is_cropped=False)
    assert sweep.parts[0].groups[-1] == range(3, 5)
    assert sweep.open_voxels(sweep.whole) == 48 * 256 * 256 + 64 * 96 * 256 - 112 * 48 * 96
    alone = Sweep.of(grid, False, sweep.axes)
    assert alone.open_voxels(alone.whole) > 1.1 * sweep.open_voxels(sweep.whole)


def test_steps_are_half_a_patch_long_at_least():
    third = AxisSweep.in_long_steps(AxisGrid(start=0, stop=50, patch=20, stride=4), size=50, is_cropped=False)
    assert list(third.grid) == [0, 4, 8, 12, 16, 20, 24, 28, 30]
    assert third.groups == (range(3), range(3, 6), range(6, 9))
    assert third.intervals == [(0, 12), (12, 24), (24, 50)]
    assert third.adds_to(2) == range(3)


def test_columns_are_as_even_as_the_patches_let_them_be():
    third = AxisSweep.in_long_steps(AxisGrid(start=0, stop=200, patch=64, stride=32), size=200, is_cropped=False)
    assert [third.ends(range(number, number + 1)) for number in range(5)] == [(0, 32), (32, 64), (64, 96), (96, 128), (128, 200)]
    assert third.cut(3) == third.cut(4) == [range(2), range(2, 4), range(4, 5)]


@given(sweeps(), st.data())
def test_no_way_to_cut_an_axis_has_a_shorter_longest_part(sweep, data):
    part = data.draw(st.sampled_from(sweep.parts))
    count = data.draw(st.integers(1, len(part.groups)))

    def longest(ends):
        return max(stop - start for start, stop in (part.ends(range(*pair)) for pair in itertools.pairwise(ends)))

    found = part.cut(count)
    ends = [0, *(numbers.stop for numbers in found)]
    assert len(found) <= count
    assert [numbers.start for numbers in found] == ends[:-1]
    cuts = itertools.combinations(range(1, len(part.groups)), count - 1)
    assert longest(ends) == min(longest([0, *chosen, len(part.groups)]) for chosen in cuts)


def test_too_many_parts_are_an_error():
    sweep = Sweep.smallest(PatchGrid.cover((20, 20, 20), 10), is_cropped=False)
    with pytest.raises(SizeError, match="2 rows of patches cannot be cut into 3 parts"):
        sweep.split(3, 1)


def test_an_axis_of_a_single_patch():
    axis = AxisSweep.of(AxisGrid(start=0, stop=5, patch=5, stride=3), size=5, is_cropped=False)
    assert axis.intervals == [(0, 5)]
    assert axis.finished_with(0) == axis.adds_to(0) == range(1)
