"""What metadata of OME-Zarr say: axes, units, transforms and levels, and what they must not say."""

import numpy as np
import pytest

from voxloom.core.geometry.affines import spacing_of
from voxloom.core.pyramids import factors_of_levels
from voxloom.errors import CorruptImageError, NoSuchIndexError, SizeError, UnsupportedImageError
from voxloom.io.zarr.ngff import Multiscales, chosen_level, described

ALIGNED = np.array([[0.0, 2, 0, -30], [-1.5, 0, 0, 4], [0, 0, 3, 5], [0, 0, 0, 1]])
TURNED = np.array([[0.9, -0.4, 0, 5], [0.4, 0.9, 0, -3], [0, 0, 3, 11], [0, 0, 0, 1.0]])


def axes(names="zyx", unit="millimeter", **more):
    kinds = {"t": "time", "c": "channel"}
    return [
        {"name": name, "type": kinds.get(name, "space"), **({} if name in kinds or not unit else {"unit": unit}), **more}
        for name in names
    ]


def image(*levels, names="zyx", **more):
    datasets = [{"path": str(number), "coordinateTransformations": steps} for number, steps in enumerate(levels)]
    return {"axes": axes(names), "datasets": datasets, **more}


def scale(*values):
    return {"type": "scale", "scale": list(values)}


def translation(*values):
    return {"type": "translation", "translation": list(values)}


def read(multiscales, **ome):
    return Multiscales.of({"multiscales": [multiscales], **ome}, "scan.zarr")


@pytest.mark.parametrize("version", ["0.4", "0.5", "0.6"])
@pytest.mark.parametrize("has_channels", [False, True])
def test_what_is_described_is_read_again(version, has_channels):
    factors = [(2, 2, 1), (2, 2, 2)]
    attributes = described(ALIGNED, factors, has_channels, version, "scan", is_labels=False)
    found = Multiscales.of(attributes, "scan")
    assert [axis.name for axis in found.axes] == [*["c"] * has_channels, "z", "y", "x"]
    assert np.allclose(found.levels[0].affine, ALIGNED)
    # The corner where a volume begins is the same at each level.
    for level, whole in zip(found.levels, ([1, 1, 1], [2, 2, 1], [4, 4, 2]), strict=True):
        assert np.allclose(spacing_of(level.affine), np.array(spacing_of(ALIGNED)) * whole)
        assert np.allclose(level.affine @ [-0.5, -0.5, -0.5, 1], ALIGNED @ [-0.5, -0.5, -0.5, 1])
    assert found.version == version


def test_oblique_axes_are_exact_in_version_06_and_nearest_before():
    assert np.allclose(Multiscales.of(described(TURNED, [], False, "0.6", "scan", False), "scan").levels[0].affine, TURNED)
    nearest = Multiscales.of(described(TURNED, [], False, "0.5", "scan", False), "scan").levels[0].affine
    assert np.allclose(nearest[:3, :3], np.diag(spacing_of(TURNED)))


def test_scale_translation_and_units():
    found = read(image([scale(4, 2, 1), translation(40, 20, 10)], names="zyx", coordinateTransformations=[scale(2, 2, 2)]))
    assert np.array_equal(found.levels[0].affine, [[2, 0, 0, 20], [0, 4, 0, 40], [0, 0, 8, 80], [0, 0, 0, 1]])
    micro = read({**image([scale(4, 2, 1)]), "axes": axes(unit="micrometer")})
    assert np.allclose(micro.levels[0].affine, np.diag([0.001, 0.002, 0.004, 1]))
    bare = read({**image([scale(4, 2, 1)]), "axes": axes(unit=None)})
    assert np.allclose(bare.levels[0].affine, np.diag([1, 2, 4, 1]))
    flat = read(image([scale(3, 2)], names="yx"))
    assert np.allclose(flat.levels[0].affine, np.diag([2, 3, 1, 1]))
    five = read(image([scale(9, 9, 4, 2, 1)], names="tczyx"), omero={"channels": [{"label": "DAPI"}, {}]})
    assert np.allclose(five.levels[0].affine, np.diag([1, 2, 4, 1]))
    assert five.channels == ("DAPI", "")


def test_orientation():
    lps = [
        {"name": name, "type": "space", "unit": "millimeter", "orientation": {"type": "anatomical", "value": way}}
        for name, way in zip("zyx", ("inferior-to-superior", "anterior-to-posterior", "right-to-left"), strict=True)
    ]
    found = read({**image([scale(3, 2, 1), translation(5, 6, 7)]), "axes": lps})
    assert np.array_equal(found.levels[0].affine, [[-1, 0, 0, -7], [0, -2, 0, -6], [0, 0, 3, 5], [0, 0, 0, 1]])


def in_systems(dataset, after=(), systems=("intrinsic",)):
    steps = {"path": "s0", "coordinateTransformations": [{**dataset, "input": {"path": "s0"}, "output": {"name": "intrinsic"}}]}
    return {
        "coordinateSystems": [{"name": name, "axes": axes()} for name in systems],
        "datasets": [steps],
        "coordinateTransformations": list(after),
    }


def test_coordinate_systems_of_version_06():
    turn = [[0, 1, 0], [-1, 0, 0], [0, 0, 1]]
    onward = {"type": "rotation", "rotation": turn, "input": {"name": "intrinsic"}, "output": {"name": "physical"}}
    found = read(in_systems(scale(4, 2, 1), [onward], ("physical", "intrinsic")))
    assert np.allclose(found.levels[0].affine, [[1, 0, 0, 0], [0, 0, -4, 0], [0, 2, 0, 0], [0, 0, 0, 1]])
    sequence = {"type": "sequence", "transformations": [scale(4, 2, 1), translation(3, 2, 1)]}
    assert np.allclose(read(in_systems(sequence)).levels[0].affine[:3, 3], [1, 2, 3])
    affine = {"type": "affine", "affine": [[4, 0, 0, 9], [0, 2, 0.5, 8], [0, 0, 1, 7]]}
    assert np.allclose(read(in_systems(affine)).levels[0].affine, [[1, 0, 0, 7], [0.5, 2, 0, 8], [0, 0, 4, 9], [0, 0, 0, 1]])
    swapped = {"type": "mapAxis", "mapAxis": [0, 2, 1]}
    assert np.allclose(read(in_systems(swapped)).levels[0].affine[:3, :3], [[0, 1, 0], [1, 0, 0], [0, 0, 1]])
    named = {**in_systems(scale(4, 2, 1)), "datasets": [{"path": "0", "coordinateTransformations": [
        {**scale(4, 2, 1), "input": "0", "output": "intrinsic"}]}]}  # fmt: skip
    assert np.allclose(read(named).levels[0].affine, np.diag([1, 2, 4, 1]))


def test_levels_in_several_coordinate_systems_are_refused():
    found = in_systems(scale(1, 1, 1), systems=("intrinsic", "other"))
    found["datasets"] += [{"path": "s1", "coordinateTransformations": [
        {**scale(2, 2, 2), "input": {"path": "s1"}, "output": {"name": "other"}}]}]  # fmt: skip
    with pytest.raises(UnsupportedImageError, match="several coordinate systems, intrinsic, other"):
        read(found)


def test_places_that_differ_from_time_to_time_are_refused():
    moving = np.eye(4, 5)
    moving[3, 0] = 7
    found = image([{"type": "affine", "affine": moving.tolist()}], names="tzyx")
    with pytest.raises(UnsupportedImageError, match="other places for each time or channel"):
        read(found)


@pytest.mark.parametrize(
    ("found", "error", "says"),
    [
        ({**image([scale(1, 1, 1)]), "axes": axes("zyq")}, UnsupportedImageError, "axis 'q'"),
        ({**image([scale(1, 1, 1)]), "axes": axes("zyy")}, UnsupportedImageError, "each once"),
        ({**image([scale(1, 1, 1)]), "axes": axes(unit="parsec")}, UnsupportedImageError, "parsec"),
        ({**image([scale(1, 1)]), "axes": axes("zx")}, UnsupportedImageError, "must have x and y"),
        (image([{"type": "displacements", "path": "d"}]), UnsupportedImageError, "displacements"),
        (image([{"type": "scale", "path": "s"}]), UnsupportedImageError, "another file"),
        (image([scale(1, 1)]), CorruptImageError, "must hold 3 numbers"),
        (image([scale(1, 1, 0)]), CorruptImageError, "flat"),
        (image([scale(1, 1, float("nan"))]), CorruptImageError, "scale"),
        (image([scale(2, 2, 2)], [scale(1, 1, 1)]), CorruptImageError, "out of order"),
        (image(), CorruptImageError, "no datasets"),
        ({"axes": axes()}, CorruptImageError, "datasets"),
        ([], CorruptImageError, "multiscales"),
        (in_systems({"type": "scale", "scale": [1, 1, 1]}, systems=("other",)), CorruptImageError, "intrinsic"),
    ],
)
def test_what_cannot_be_read_is_named(found, error, says):
    with pytest.raises(error, match=says) as raised:
        read(found)
    assert "scan.zarr" in str(raised.value)


def test_a_group_that_is_no_image():
    assert Multiscales.of({}, "scan") is None
    assert Multiscales.of({"ome": {"labels": ["a"]}}, "scan") is None


def test_levels_are_chosen_by_number_or_spacing():
    found = read(image([scale(1, 1, 1)], [scale(2, 2, 2)], [scale(4, 4, 4)]))
    assert chosen_level(found, -1, None, "scan") == 2
    assert [chosen_level(found, 0, wanted, "scan") for wanted in (0.5, 1, 3, 2, 9, (4, 4, 2))] == [0, 0, 1, 1, 2, 1]
    with pytest.raises(NoSuchIndexError, match="no level 3, only 3"):
        chosen_level(found, 3, None, "scan")
    for level in (None, 1.5, "x", True):
        with pytest.raises(NoSuchIndexError, match="level is .*: it must be a whole number"):
            chosen_level(found, level, None, "scan")
    for spacing in ((1, 2), "x", 0, -1, float("nan"), (1, None, 1)):
        with pytest.raises(SizeError, match="spacing is .*: give positive millimetres"):
            chosen_level(found, 0, spacing, "scan")


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        ("right-to-left", "superior-to-inferior", [[-0.5, 0, 0], [0, 0, 1], [0, -0.5, 0]]),
        ("posterior-to-anterior", "inferior-to-superior", [[0, 0, 1], [0.5, 0, 0], [0, 0.5, 0]]),
        ("left-to-right", "posterior-to-anterior", [[0.5, 0, 0], [0, 0.5, 0], [0, 0, 1]]),
    ],
)
def test_an_axis_that_is_missing_goes_where_no_other_one_does(x, y, expected):
    flat = image([scale(0.5, 0.5)], names="yx")
    for axis, way in zip(flat["axes"], (y, x), strict=True):
        axis["orientation"] = {"type": "anatomical", "value": way}
    assert read(flat).levels[0].affine[:3, :3].tolist() == expected


def test_axes_are_halved_until_voxels_are_as_long_as_they_are_wide():
    assert factors_of_levels((512, 512, 100), np.diag([0.7, 0.7, 5, 1])) == [(2, 2, 1), (2, 2, 1)]
    assert factors_of_levels((100, 100, 100), np.eye(4)) == []
    assert factors_of_levels((100, 100, 1), np.eye(4), 3) == [(2, 2, 1), (2, 2, 1)]
    assert factors_of_levels((2, 1, 1), np.eye(4), 9) == [(2, 1, 1)]
