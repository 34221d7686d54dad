"""Interpolation from one grid to another, against other libraries, and cut into tiles in any way."""

import itertools

import numpy as np
import pytest
import SimpleITK
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates

from voxloom.aggregation.tiles import TileEdges
from voxloom.core.boxes import Box
from voxloom.core.geometry.aligned import AlignedMap, AxisMap
from voxloom.core.geometry.oblique import ObliqueMap, boxes_of
from voxloom.core.geometry.resampling import space_map

SHAPE = (11, 14, 9)


def turned(first, second):
    c, s = np.cos(first), np.sin(first)
    d, t = np.cos(second), np.sin(second)
    one = np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    return one @ np.array([[1, 0, 0, 0], [0, d, -t, 0], [0, t, d, 0], [0, 0, 0, 1]])


def in_the_middle(matrix, shape, target_shape):
    """Move a target so that its middle lies in that of the source."""
    result = np.eye(4)
    result[:3, :3] = matrix[:3, :3]
    result[:3, 3] = (np.array(shape) - 1) / 2 - matrix[:3, :3] @ ((np.array(target_shape) - 1) / 2)
    return result


def applied(space, values, own=None):
    """Interpolate a whole target at once, or what belongs to a box; what lies outside is NaN."""
    whole = Box.of_shape(values.shape[1:])
    own = whole if own is None else own
    target = torch.full((len(values), *target_shape_of(space)), torch.nan)
    for piece in space.pieces(own, 10_000):
        for part in space.parts(piece, own):
            part.put(target, (0, 0, 0), part.apply(values[(slice(None), *part.support.slices)]))
    return target


def target_shape_of(space):
    return space.target_shape if isinstance(space, ObliqueMap) else tuple(map(len, space.axes))


def by_scipy(values, matrix, target_shape, order=1):
    places = np.moveaxis(np.stack(np.meshgrid(*map(np.arange, target_shape), indexing="ij"), -1) @ matrix[:3, :3].T, -1, 0)
    places = places + matrix[:3, 3][:, None, None, None]
    found = [map_coordinates(channel, places, order=order, mode="nearest") for channel in values.double().numpy()]
    sizes = np.array(values.shape[1:])[:, None, None, None]
    inside = ((places >= -0.5) & (places <= sizes - 0.5)).all(0)
    return np.where(inside, np.stack(found), np.nan)


MATRICES = {
    "half": np.diag([0.5, 0.5, 0.5, 1]),
    "twice": np.diag([2, 1.5, 3, 1]),
    "flipped": np.diag([-1, 0.7, -1.3, 1]),
    "permuted": np.array([[0, 0, -0.8, 0], [1.1, 0, 0, 0], [0, 0.6, 0, 0], [0, 0, 0, 1]]),
    "oblique": turned(0.3, -0.2) @ np.diag([0.9, 0.7, 0.8, 1]),
    "sheared": np.array([[1, 0.3, 0, 0], [0, 1, 0, 0], [0.1, 0, 1, 0], [0, 0, 0, 1]]),
}


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("kind", ["linear", "nearest"])
def test_it_is_what_scipy_makes(name, kind):
    values, target_shape = torch.randn(3, *SHAPE), (15, 12, 13)
    matrix = in_the_middle(MATRICES[name], SHAPE, target_shape)
    matrix[:3, 3] += 0.0317  # nothing is equally near to two voxels
    space = space_map(SHAPE, np.eye(4), target_shape, matrix, [kind] * 3)
    assert isinstance(space, ObliqueMap if name in ("oblique", "sheared") else AlignedMap)
    expected = by_scipy(values, matrix, target_shape, order=int(kind == "linear"))
    assert np.isfinite(expected).any()
    assert np.allclose(applied(space, values).numpy(), expected, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("factor", [0.5, 1.5, 2])
def test_it_is_what_pytorch_makes(factor):
    """Whose corners of voxels lie on one another, as ours do."""
    values = torch.randn(2, 12, 10, 14)
    target_shape = tuple(int(size * factor) for size in values.shape[1:])
    affine = np.diag([1 / factor] * 3 + [1])
    affine[:3, 3] = (1 / factor - 1) / 2
    space = space_map(values.shape[1:], np.eye(4), target_shape, affine)
    expected = torch.nn.functional.interpolate(values[None], size=target_shape, mode="trilinear")[0]
    assert torch.allclose(applied(space, values), expected, atol=1e-5)


def test_it_is_what_simpleitk_makes_of_oblique_images():
    values = torch.randn(1, *SHAPE)
    source = turned(0.2, 0.1) @ np.diag([0.8, 0.9, 2.5, 1])
    target_shape = (16, 17, 20)
    target = source @ in_the_middle(turned(-0.4, 0.3) @ np.diag([0.7, 0.6, 0.5, 1]), SHAPE, target_shape)
    images = []
    for affine, shape in ((source, SHAPE), (target, target_shape)):
        image = (
            SimpleITK.GetImageFromArray(values[0].numpy().T)
            if shape == SHAPE
            else SimpleITK.Image(target_shape, SimpleITK.sitkFloat32)
        )
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        image.SetSpacing(spacing.tolist())
        image.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
        image.SetOrigin(affine[:3, 3].tolist())
        images.append(image)
    expected = SimpleITK.GetArrayFromImage(
        SimpleITK.Resample(*images, SimpleITK.Transform(), SimpleITK.sitkLinear, float("nan"))
    ).T
    found = applied(space_map(SHAPE, source, target_shape, target), values)[0].numpy()
    # SimpleITK calls what lies on the outer half of a border voxel outside in part of its versions.
    both = np.isfinite(found) & np.isfinite(expected)
    assert both.mean() > 0.3
    assert np.allclose(found[both], expected[both], atol=1e-4)


@st.composite
def tilings(draw):
    """A source cut into tiles, and a target, all of it as it comes."""
    shape = tuple(draw(st.integers(1, 9)) for _ in range(3))
    cuts = [sorted({0, size, *draw(st.sets(st.integers(1, max(1, size - 1)), max_size=3))}) for size in shape]
    cuts = [[cut for cut in axis if cut <= size] for axis, size in zip(cuts, shape, strict=True)]
    target_shape = tuple(draw(st.integers(1, 9)) for _ in range(3))
    order = draw(st.permutations(range(3)))
    matrix = np.zeros((3, 3))
    for row, column in enumerate(order):
        matrix[row, column] = draw(st.sampled_from([-2, -1.0, -0.4, 0.3, 0.5, 1.0, 1.7]))
    if draw(st.booleans()):
        matrix = turned(draw(st.floats(-1, 1)), draw(st.floats(-1, 1)))[:3, :3] @ matrix
    affine = np.eye(4)
    affine[:3, :3] = matrix
    affine = in_the_middle(affine, shape, target_shape)
    affine[:3, 3] += [draw(st.floats(-3, 3)) for _ in range(3)]
    kinds = [draw(st.sampled_from(["linear", "nearest"])) for _ in range(3)]
    return shape, cuts, target_shape, affine, kinds


@given(tilings(), st.integers(1, 40))
def test_tiles_give_each_voxel_once_and_the_bits_of_the_whole(tiling, most):
    shape, cuts, target_shape, affine, kinds = tiling
    space = space_map(shape, np.eye(4), target_shape, affine, kinds)
    values = torch.randn(2, *shape)
    whole = applied(space, values)
    edges = TileEdges(shape, space.mixing_axes)
    found, times = torch.full_like(whole, torch.nan), torch.zeros(target_shape, dtype=torch.int)
    for i, j, k in itertools.product(*map(itertools.pairwise, cuts)):
        own = Box(*map(tuple, zip(i, j, k, strict=True)))
        tile = edges.extended(own, values[(slice(None), *own.slices)])
        for piece in space.pieces(own, most):
            assert piece.numel <= most
            made = torch.full((2, *piece.shape), torch.nan)
            for part in space.parts(piece, own):
                given = values[(slice(None), *part.support.slices)]
                assert torch.equal(tile.read(part.support), given)
                assert torch.equal(tile.read(part.support, [1]), given[1:])
                views = [view for _, view in tile.views(part.support)]
                assert torch.equal(torch.stack([view.amax((1, 2, 3)) for view in views]).amax(0), given.amax((1, 2, 3)))
                part.put(made, piece.start, part.apply(tile.read(part.support)))
            for box in space.boxes(piece, own):
                times[box.slices] += 1
                found[(slice(None), *box.slices)] = made[(slice(None), *box.relative_to(piece.start).slices)]
    assert bool((times == 1).all())
    assert torch.equal(found.nan_to_num(9), whole.nan_to_num(9))
    assert not edges._kept


def test_the_same_voxels_keep_their_bits():
    values = torch.randn(1, 6, 7, 8)
    space = space_map((6, 7, 8), np.diag([0.7, 0.9, 1.1, 1]), (6, 7, 8), np.diag([0.7, 0.9, 1.1, 1]).astype(np.float32))
    assert torch.equal(applied(space, values), values)
    assert space.mixing_axes == ()


def test_what_is_constant_stays_so():
    values = torch.full((1, 5, 6, 7), 0.1)
    for name in ("half", "oblique"):
        found = applied(space_map((5, 6, 7), np.eye(4), (9, 9, 9), in_the_middle(MATRICES[name], (5, 6, 7), (9, 9, 9))), values)
        assert set(found[found.isfinite()].tolist()) == {values[0, 0, 0, 0].item()}


def test_boxes_of_runs_cover_them_once():
    rng = np.random.default_rng(3)
    first, count = rng.integers(0, 4, (5, 6)), rng.integers(0, 3, (5, 6))
    chosen = (np.arange(8) >= first[..., None]) & (np.arange(8) < (first + count)[..., None])
    found = np.zeros(chosen.shape, dtype=int)
    for box in boxes_of(chosen, (0, 0, 0)):
        found[box.slices] += 1
    assert np.array_equal(found, chosen.astype(int))
    assert boxes_of(np.ones((3, 4, 5), dtype=bool), (1, 0, 0)) == [Box((1, 0, 0), (4, 4, 5))]


@pytest.mark.parametrize(("source", "target", "beside"), [(24, 94, 0), (20, 7, 3), (10, 35, 2), (64, 30, 0)])
def test_slices_that_are_as_near_as_the_next_are_decided_as_by_scipy(source, target, beside):
    """Whole volumes, and parts of which some voxels lie beside them."""
    places = source / target * (np.arange(target) + 0.5) - 0.5
    expected = map_coordinates(np.arange(source, dtype=float), [places], order=0, mode="nearest").astype(int)
    scale, length = np.float32(source / target), target + 2 * beside
    offset = np.float32(0.5 * scale - 0.5 - beside * scale)
    for sign in (1, -1):
        start = offset if sign > 0 else offset + scale * (length - 1)
        found = AxisMap.of(length, sign * float(scale), float(start), source, "nearest").lower[::sign]
        assert found[beside : beside + target].tolist() == expected.tolist()
        assert found[:beside].tolist() == [0] * beside
