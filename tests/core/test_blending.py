import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from voxloom.core.grid.blending import AxisWeights
from voxloom.core.grid.grids import AxisGrid
from voxloom.core.grid.windows import resolve_window
from voxloom.errors import ModeError

from strategies import WINDOWS


@st.composite
def axis_grids(draw):
    patch = draw(st.integers(1, 40))
    start = draw(st.integers(-5, 0))
    return AxisGrid(start, start + patch + draw(st.integers(0, 60)), patch, draw(st.integers(1, patch)))


def lopsided(size):
    return torch.arange(1, size + 1)


@given(axis_grids(), st.sampled_from([*WINDOWS, lopsided]))
def test_the_weights_of_all_patches_sum_to_one_on_every_voxel(grid, mode):
    weights = AxisWeights(grid, resolve_window(mode))
    total = torch.zeros(grid.stop - grid.start, dtype=torch.float64)
    for number, start in enumerate(grid):
        own = weights.of(number)
        assert own.dtype == torch.float64
        assert (own >= 0).all()
        total[start - grid.start :][: grid.patch] += own
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-14, atol=0)


@given(axis_grids())
def test_cropping_keeps_the_patch_whose_centre_is_nearest(grid):
    weights = AxisWeights(grid, None)
    centres = [start + (grid.patch - 1) / 2 for start in grid]
    owners = {}
    for number in range(len(grid)):
        start, stop = weights.core(number)
        assert grid[number] <= start < stop <= grid[number] + grid.patch
        owners.update(dict.fromkeys(range(start, stop), number))
    assert sorted(owners) == list(range(grid.start, grid.stop))
    for voxel, owner in owners.items():
        assert abs(centres[owner] - voxel) == min(abs(centre - voxel) for centre in centres)


def test_windows_are_what_their_names_say():
    assert resolve_window("crop") is None
    hann = resolve_window("hann")(96)
    assert torch.equal(hann, torch.hann_window(98, periodic=False, dtype=torch.float64)[1:-1])
    gaussian = resolve_window("gaussian")(96)
    assert gaussian.min() > 0
    assert gaussian[47] / gaussian[35] == pytest.approx(torch.exp(torch.tensor((12.5**2 - 0.5**2) / 2 / 12**2)).item())


@pytest.mark.parametrize(
    "window",
    [
        lambda size: torch.ones(size + 1),
        lambda size: torch.zeros(size),
        lambda size: torch.full((size,), float("nan")),
        lambda size: -1,
        lambda size: torch.full((size,), float("inf")),
    ],
)
def test_a_window_that_is_none_is_refused_with_what_it_returned(window):
    with pytest.raises(ModeError, match="must return a 1-D tensor of 8 positive"):
        resolve_window(window)(8)


@pytest.mark.parametrize("mode", ["blend", "", None, 3])
def test_an_unknown_mode_is_refused_with_the_known_ones(mode):
    with pytest.raises(
        ModeError, match=r"Overlap mode must be one of 'crop', 'average', 'hann', 'gaussian'.*'monai'.*overlap_mode is"
    ):
        resolve_window(mode)


def test_a_window_that_returns_nothing_is_refused():
    with pytest.raises(ModeError, match="must return a 1-D tensor, but it returned None"):
        resolve_window(lambda size: None)(8)
