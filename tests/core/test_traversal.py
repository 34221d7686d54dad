"""Traversals: every voxel is finished once, as soon as the last patch over it has been added, and little is open."""

import itertools
import math
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slow import slow
from voxloom.aggregation.streaming import StreamingAccumulator
from voxloom.aggregation.weights import PatchWeights
from voxloom.core.grid.grids import AxisGrid, PatchGrid
from voxloom.core.grid.joining import Joining
from voxloom.core.grid.openness import Openness
from voxloom.core.grid.traversal import AxisTraversal, Traversal
from voxloom.core.grid.windows import resolve_window
from voxloom.errors import SizeError

from strategies import geometries


@st.composite
def traversals(draw):
    shape, patch, overlap = draw(geometries(largest=9, may_exceed=True))
    padded = draw(st.booleans()) or any(map(int.__gt__, patch, shape))
    grid = PatchGrid.cover(shape, patch, overlap, padded=padded)
    axes, joined = draw(st.permutations(range(3)).map(tuple)), draw(st.tuples(st.booleans(), st.booleans()))
    return Traversal.of(grid, draw(st.booleans()), axes, joined)


@st.composite
def joinings(draw):
    traversal = draw(traversals())
    parts = [draw(st.integers(1, len(numbers))) for numbers in (traversal.whole.middle, traversal.whole.inner)]
    block = draw(st.sampled_from(traversal.split(*parts)))
    with mock.patch("voxloom.core.grid.joining.LEAST_PART", draw(st.sampled_from([1 / 64, 1 / 8, 1 / 2, 1]))):
        return traversal, block, Joining.of(traversal, block)


def patches_of(traversal, outer, block, needed=None):
    return [numbers for step in traversal.steps(outer, block) for numbers in traversal.patches(step, block, needed)]


@given(traversals())
def test_each_interval_is_finished_with_the_last_patch_that_adds_to_it(traversal):
    for axis in traversal.parts:
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


@given(traversals(), st.data())
def test_blocks_share_the_volume_out(traversal, data):
    parts = [data.draw(st.integers(1, len(numbers))) for numbers in (traversal.whole.middle, traversal.whole.inner)]
    blocks = traversal.split(*parts)
    assert len(blocks) <= parts[0] * parts[1]
    assert all(traversal.block_box(block).numel for block in blocks)
    covered = np.zeros(traversal.grid.spatial_shape, dtype=int)
    for block in blocks:
        covered[traversal.block_box(block).slices] += 1
        slabs = [traversal.block_box(block, outer).numel for outer in range(traversal.num_outer)]
        assert sum(slabs) == traversal.block_box(block).numel
        listed = [patches_of(traversal, outer, block) for outer in range(traversal.num_outer)]
        assert [len(patches) for patches in listed] == traversal.num_patches(block)
        touching = [
            numbers
            for numbers in np.ndindex(traversal.grid.counts)
            if (traversal.span(numbers) & traversal.block_box(block)).numel
        ]
        assert sorted(itertools.chain.from_iterable(listed)) == touching
        needed = data.draw(st.integers(0, 2**32).map(np.random.default_rng)).random(traversal.grid.counts) < 0.5
        some = [[numbers for numbers in patches if needed[numbers]] for patches in listed]
        assert [patches_of(traversal, outer, block, needed) for outer in range(traversal.num_outer)] == some
        assert list(traversal.patches_from(0, block, needed)) == [*itertools.chain(*some)]
        assert traversal.num_patches(block, needed) == list(map(len, some))
    assert (covered == 1).all()


def check_joining(traversal, block, joining):
    joined = joining.applied(traversal)
    assert joined.block_box(joining.block) == traversal.block_box(block)
    for outer in range(traversal.num_outer):
        steps = list(joining.steps(traversal, outer))
        assert [step for step, _ in steps] == list(joined.steps(outer, joining.block))
        assert [part for _, parts in steps for part in parts] == list(traversal.steps(outer, block))
        for step, parts in steps:
            gathered = [numbers for part in parts for numbers in traversal.patches(part, block)]
            assert sorted(gathered) == sorted(joined.patches(step, joining.block))


@given(joinings())
def test_steps_that_are_joined_gather_the_same_patches_in_the_same_order(found):
    check_joining(*found)


@pytest.mark.parametrize("part", [1 / 64, 1 / 8, 1])
def test_steps_of_blocks_that_others_reach_into_are_joined_in_the_same_order(part, monkeypatch):
    monkeypatch.setattr("voxloom.core.grid.joining.LEAST_PART", part)
    traversal = Traversal.of(PatchGrid.cover((12, 14, 16), 4, 2), False, (0, 1, 2))
    for block in traversal.split(2, 2):
        check_joining(traversal, block, Joining.of(traversal, block))


@given(joinings())
def test_the_sum_of_all_patches_comes_out_and_never_is_more_open_than_was_said(found):
    unjoined, part, joining = found
    traversal, block = joining.applied(unjoined), joining.block
    window = None if traversal.is_cropped else resolve_window("hann")
    cpu = torch.device("cpu")
    weights = window and PatchWeights(traversal.grid, window, torch.float32, cpu)
    accumulator = StreamingAccumulator(traversal, block, 2, torch.float32, cpu, weights)
    result = torch.full((2, *traversal.grid.spatial_shape), torch.nan)
    patch = torch.tensor([1.0, -3.0]).view(2, 1, 1, 1).expand(2, *traversal.grid.patch_size)
    most = 0

    def finish(step):
        nonlocal most
        most = max(most, accumulator.num_bytes)
        for finished in accumulator.finish(step):
            assert finished.uncovered is None
            result[(slice(None), *finished.box.slices)] = finished.values

    for outer in range(traversal.num_outer):
        for step, steps in joining.steps(unjoined, outer):
            for numbers in itertools.chain.from_iterable(unjoined.patches(each, part) for each in steps):
                before = accumulator.num_bytes
                will_open = accumulator.bytes_to_open(numbers)
                accumulator.add(patch, numbers)
                assert accumulator.num_bytes == before + will_open
            finish(step)
    inside = result[(slice(None), *traversal.block_box(block).slices)]
    torch.testing.assert_close(inside, patch[:, :1, :1, :1].expand_as(inside), atol=0, rtol=1e-5)
    assert int(result.isnan().sum()) == result.numel() - inside.numel()
    assert accumulator.num_bytes == 0
    assert most <= traversal.open_voxels(block) * 2 * 4


def test_the_open_part_of_a_large_volume_is_some_planes_and_a_band():
    traversal = Traversal.smallest(PatchGrid.cover((528, 528, 1008), 96, 48), is_cropped=False)
    assert traversal.axes[0] == 2
    planes = 48 * 528 * 528
    assert traversal.open_voxels(traversal.whole) == pytest.approx(planes + 48 * 528 * 48, rel=0.05)


@pytest.mark.parametrize(
    ("shape", "patch", "overlap"), [slow((12, 40, 40), 8, 4), slow((26, 26, 26), 10, 4), ((9, 21, 30), 8, 6)]
)
@pytest.mark.parametrize("joined", [(False, False), (False, True), (True, False), (True, True)])
def test_open_voxels_are_not_overstated(shape, patch, overlap, joined):
    traversal = Traversal.of(PatchGrid.cover(shape, patch, overlap), False, (0, 1, 2), joined)
    for block in [traversal.whole, *traversal.split(2, 2)]:
        accumulator = StreamingAccumulator(traversal, block, 1, torch.float32, torch.device("cpu"), None)
        opened = []
        for outer in range(traversal.num_outer):
            for step in traversal.steps(outer, block):
                for numbers in traversal.patches(step, block):
                    accumulator.add(torch.zeros(1, patch, patch, patch), numbers)
                opened.append(accumulator.num_bytes // 4)
                for _ in accumulator.finish(step):
                    pass
        assert max(opened) == traversal.open_voxels(block)
        assert opened == Openness(traversal, block).voxels.tolist()


@pytest.mark.parametrize(("shape", "patch", "overlap"), [((96, 96, 96), 16, 8), ((128, 128, 128), 32, 8), ((500, 400, 40), 8, 4)])
def test_small_patches_are_added_to_few_tiles(shape, patch, overlap):
    traversal = Traversal.smallest(PatchGrid.cover(shape, patch, overlap), is_cropped=False)
    joining = Joining.of(traversal, traversal.whole)
    joined = joining.applied(traversal)
    _, middle, inner = (max(map(len, map(part.adds_to, range(len(part.grid))))) for part in joined.parts)
    assert middle <= 2
    assert inner <= 2
    most = math.prod(shape) // 16
    assert joined.open_voxels(joining.block) <= traversal.open_voxels(traversal.whole) + most


def test_steps_of_large_patches_are_not_joined():
    traversal = Traversal.smallest(PatchGrid.cover((512, 512, 512), 96, 48), is_cropped=False)
    assert Joining.of(traversal, traversal.whole).applied(traversal) is traversal


def test_the_last_two_groups_are_joined_where_that_keeps_less_open():
    grid = PatchGrid.cover((256, 256, 256), 96, 48)  # patches begin at 0, 48, 96, 144 and 160
    traversal = Traversal.smallest(grid, is_cropped=False)
    assert traversal.parts[0].groups[-1] == range(3, 5)
    assert traversal.open_voxels(traversal.whole) == 48 * 256 * 256 + 64 * 96 * 256 - 112 * 48 * 96
    alone = Traversal.of(grid, False, traversal.axes)
    assert alone.open_voxels(alone.whole) > 1.1 * traversal.open_voxels(traversal.whole)


def test_steps_are_half_a_patch_long_at_least():
    inner = AxisTraversal.in_long_steps(AxisGrid(start=0, stop=50, patch=20, stride=4), size=50, is_cropped=False)
    assert list(inner.grid) == [0, 4, 8, 12, 16, 20, 24, 28, 30]
    assert inner.groups == (range(3), range(3, 6), range(6, 9))
    assert inner.intervals == [(0, 12), (12, 24), (24, 50)]
    assert inner.adds_to(2) == range(3)


def test_patches_that_begin_at_nearly_every_voxel_are_not_cut_into_as_many_pieces():
    steep = AxisTraversal.of(AxisGrid(start=0, stop=60, patch=20, stride=1), size=60, is_cropped=False)
    assert max(len(steep.adds_to(patch)) for patch in range(len(steep.grid))) <= 8
    usual = AxisTraversal.of(AxisGrid(start=0, stop=102, patch=24, stride=6), size=102, is_cropped=False)
    assert all(len(group) == 1 for group in usual.groups)


@pytest.mark.parametrize("joined", [(False, False), (True, True)])
def test_sums_of_patches_that_begin_at_nearly_every_voxel_come_out(joined):
    grid = PatchGrid.cover((14, 13, 12), 10, 9)
    traversal = Traversal.of(grid, False, (0, 1, 2), joined)
    rng, expected, cpu = np.random.default_rng(0), np.zeros(grid.spatial_shape), torch.device("cpu")
    accumulator = StreamingAccumulator(
        traversal, traversal.whole, 1, torch.float64, cpu, PatchWeights(grid, resolve_window("average"), torch.float64, cpu)
    )
    made, most = np.zeros_like(expected), 0
    for outer in range(traversal.num_outer):
        for step in traversal.steps(outer, traversal.whole):
            for numbers in traversal.patches(step, traversal.whole):
                patch = rng.normal(size=(10, 10, 10))
                box = traversal.span(numbers)
                expected[box.slices] += patch
                accumulator.add(torch.from_numpy(patch)[None], numbers)
            most = max(most, accumulator.num_bytes // 8)
            for finished in accumulator.finish(step):
                made[finished.box.slices] = finished.values[0].numpy()
    counts = np.zeros_like(expected)
    for numbers in traversal.patches_from(0, traversal.whole):
        counts[traversal.span(numbers).slices] += 1
    assert np.allclose(made, expected / counts)
    assert most == traversal.open_voxels(traversal.whole)


def test_blocks_are_as_even_as_the_patches_let_them_be():
    inner = AxisTraversal.in_long_steps(AxisGrid(start=0, stop=200, patch=64, stride=32), size=200, is_cropped=False)
    assert [inner.ends(range(number, number + 1)) for number in range(5)] == [(0, 32), (32, 64), (64, 96), (96, 128), (128, 200)]
    assert inner.cut(3) == inner.cut(4) == [range(2), range(2, 4), range(4, 5)]


@given(traversals(), st.data())
def test_no_way_to_cut_an_axis_has_a_shorter_longest_part(traversal, data):
    part = data.draw(st.sampled_from(traversal.parts))
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
    traversal = Traversal.smallest(PatchGrid.cover((20, 20, 20), 10), is_cropped=False)
    with pytest.raises(SizeError, match="2 groups of patches cannot be cut into 3 parts"):
        traversal.split(3, 1)


def test_an_axis_of_a_single_patch():
    axis = AxisTraversal.of(AxisGrid(start=0, stop=5, patch=5, stride=3), size=5, is_cropped=False)
    assert axis.intervals == [(0, 5)]
    assert axis.finished_with(0) == axis.adds_to(0) == range(1)
