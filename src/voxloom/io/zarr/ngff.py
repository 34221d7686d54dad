"""What the metadata of OME-Zarr 0.4, 0.5 and 0.6 say of an image: its axes, its levels, and where voxels lie.

Nothing is read here. The order of the axes of a volume is that of a NIfTI file: I, J, K are x, y, z. Where nothing is said of
anatomy, x goes to the right, y to the front and z up.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral

import numpy as np

from ...core.geometry.affines import Affine, spacing_of
from ...core.pyramids import coarser_affine
from ...errors import CorruptImageError, NoSuchIndexError, SizeError, UnsupportedImageError, VoxloomError
from ..protocols import Json

__all__ = ["SPATIAL", "VERSIONS", "Axis", "Level", "Multiscales", "axes_by_names", "chosen_level", "described"]

# How an array is opened whose metadata are of no use.
WAY = "open_zarr('scan.zarr/0', axes='tczyx', affine=...)"
# Versions whose metadata do not say where voxels lie.
OLD = ("0.1", "0.2", "0.3")
SPATIAL = ("x", "y", "z")
VERSIONS = ("0.4", "0.5", "0.6")

# Millimetres in a unit of length, by the names of UDUNITS-2 that OME-Zarr recommends.
MILLIMETRES_IN = {
    "angstrom": 1e-7,
    "picometer": 1e-9,
    "nanometer": 1e-6,
    "micrometer": 1e-3,
    "millimeter": 1.0,
    "centimeter": 10.0,
    "decimeter": 100.0,
    "meter": 1e3,
    "kilometer": 1e6,
    "inch": 25.4,
    "foot": 304.8,
}

# Axis of RAS+, and direction along it, of each way that an axis may go.
DIRECTIONS = {
    "left-to-right": (0, 1),
    "right-to-left": (0, -1),
    "posterior-to-anterior": (1, 1),
    "anterior-to-posterior": (1, -1),
    "inferior-to-superior": (2, 1),
    "superior-to-inferior": (2, -1),
}


@dataclass(frozen=True)
class Axis:
    """An axis of an array."""

    name: str
    """`t`, `c`, `z`, `y` or `x`."""
    millimetres: float = 1.0
    """Of a unit along it."""
    orientation: str | None = None
    """Which way it goes, such as `"left-to-right"`."""


@dataclass(frozen=True, eq=False)
class Level:
    """One resolution."""

    path: str
    """Of its array, in the group."""
    affine: Affine
    """RAS+ matrix of 4 × 4 from voxels `(x, y, z)` to millimetres."""


@dataclass(frozen=True, eq=False)
class Multiscales:
    """An image of several resolutions.

    Example:
        >>> scale = {"type": "scale", "scale": [5, 0.5, 0.5]}
        >>> axes = [{"name": name, "type": "space", "unit": "micrometer"} for name in "zyx"]
        >>> found = Multiscales.of({"multiscales": [{"axes": axes, "datasets": [
        ...     {"path": "0", "coordinateTransformations": [scale]}]}]}, "scan.zarr")
        >>> found.levels[0].affine.diagonal().tolist()
        [0.0005, 0.0005, 0.005, 1.0]
    """

    axes: tuple[Axis, ...]
    levels: tuple[Level, ...]
    channels: tuple[str, ...] = ()
    """Names of the channels, as far as there are any."""
    version: str = "0.4"
    """The version of OME-Zarr that new parts are written in."""
    number: int = 0
    """Which of several images in its group it is."""

    @classmethod
    def naming(cls, path: str, attributes: Mapping[str, Json], name: str) -> "tuple[Multiscales, int] | None":
        """Find the image of a group that has an array as one of its levels, and say as which; None if none has."""
        ome = attributes.get("ome", attributes)
        images = ome.get("multiscales") if isinstance(ome, Mapping) else None
        for number in range(len(images) if isinstance(images, list) and images else 1):
            found = cls.of(attributes, name, number)
            levels = [level for level, each in enumerate(found.levels) if each.path == path] if found else []
            if found is not None and levels:
                return found, levels[0]
        return None

    @classmethod
    def of(cls, attributes: Mapping[str, Json], name: str, number: int = 0) -> "Multiscales | None":
        """Read the attributes of a group; None if it is no image.

        Args:
            attributes: the attributes.
            name: what messages call the image.
            number: which one, of several images in the group.

        Raises:
            CorruptImageError: if they are not what they should be.
            UnsupportedImageError: if they say something that an image here cannot be; names it.
        """
        ome = attributes.get("ome", attributes)
        if not isinstance(ome, Mapping) or "multiscales" not in ome:
            return None
        try:
            return replace(_read(ome["multiscales"][number], ome, name), number=number)
        except VoxloomError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            version = _version_of(ome, number)
            if version in OLD:
                raise UnsupportedImageError(
                    f"{name} is of OME-Zarr {version}, which does not say where voxels lie. Open one of its arrays,"
                    f" and say it: {WAY}"
                ) from error
            raise CorruptImageError(
                f"the metadata of {name} are no multiscales of OME-Zarr 0.4, 0.5 or 0.6: {type(error).__name__}: {error}. Mend"
                f" them, or open one of its arrays, and say where its voxels lie: {WAY}"
            ) from error


def _version_of(ome: Mapping[str, Json], number: int) -> Json:
    try:
        return ome.get("version", ome["multiscales"][number].get("version"))
    except (LookupError, TypeError, AttributeError):
        return None


def _read(found: Json, ome: Mapping[str, Json], name: str) -> Multiscales:
    systems = {str(each["name"]): each["axes"] for each in found.get("coordinateSystems", ())}
    if not found["datasets"]:
        raise CorruptImageError(f"the multiscales of {name} have no datasets")
    if not systems:
        axes = _axes(found["axes"], name)
        world, after = axes, found.get("coordinateTransformations", ())
    else:
        outputs = [_named(each["coordinateTransformations"][-1]["output"]) for each in found["datasets"]]
        own = outputs[0]
        if set(outputs) != {own}:
            raise UnsupportedImageError(
                f"the levels of {name} lie in several coordinate systems, {', '.join(dict.fromkeys(outputs))}: open one of its"
                f" arrays, and say where its voxels lie: {WAY}"
            )
        axes = _axes(systems[own], name)
        world_name, after = _way(own, found.get("coordinateTransformations", ()))
        world = _axes(systems[world_name], name)
        if sorted(each.name for each in world) != sorted(each.name for each in axes):
            raise UnsupportedImageError(
                f"{name} has the axes {_names(axes)}, but its coordinate system {world_name!r} has {_names(world)}"
            )
    outer = _matrix(after, len(axes), name)
    levels = tuple(
        Level(str(each["path"]), _spatial(outer @ _matrix(each["coordinateTransformations"], len(axes), name), axes, world, name))
        for each in found["datasets"]
    )
    sizes = [np.prod(spacing_of(level.affine)) for level in levels]
    if any(later < before * (1 - 1e-6) for before, later in itertools.pairwise(sizes)):
        raise CorruptImageError(
            f"the levels of {name} are out of order: the finest must come first, and voxels measure"
            f" {', '.join(f'{size:.4g}' for size in sizes)} mm³. Open one of its arrays, and say where its"
            f" voxels lie: {WAY}"
        )
    omero = ome.get("omero")
    labels = [str(each.get("label", "")) for each in omero.get("channels", ())] if isinstance(omero, Mapping) else []
    version = "0.6" if systems else "0.5" if "version" in ome else "0.4"
    return Multiscales(axes, levels, tuple(labels), version)


def _named(reference: Json) -> str:
    return str(reference["name"] if isinstance(reference, Mapping) else reference)


def _names(axes: Sequence[Axis]) -> str:
    return "".join(each.name for each in axes)


def _way(start: str, transforms: Sequence[Json]) -> tuple[str, list[Json]]:
    """Follow transforms from one coordinate system to the next, for as long as there is one way to go."""
    way: list[Json] = []
    seen = {start}
    while True:
        onward = [each for each in transforms if _named(each["input"]) == start and _named(each["output"]) not in seen]
        if len(onward) != 1:
            return start, way
        way.append(onward[0])
        start = _named(onward[0]["output"])
        seen.add(start)


def axes_by_names(names: Sequence[str], what: str) -> tuple[Axis, ...]:
    """Make axes of their names alone.

    Raises:
        UnsupportedImageError: if there is one that an image here cannot have, or that is there twice.
    """
    return _axes([{"name": name} for name in names], what)


def _axes(given: Sequence[Json], name: str) -> tuple[Axis, ...]:
    axes = []
    for each in given:
        each = {"name": each} if isinstance(each, str) else each  # as OME-Zarr 0.3 has it
        kind, axis = each.get("type"), str(each["name"]).lower()
        axis = {"time": "t", "channel": "c"}.get(str(kind), axis)
        if axis not in ("t", "c", *SPATIAL) or kind not in (None, "time", "channel", "space"):
            raise UnsupportedImageError(
                f"{name} has an axis {each['name']!r} of type {kind!r}: axes must be of time, of channels, or x, y and z"
            )
        unit = each.get("unit")
        if axis in SPATIAL and unit is not None and unit not in MILLIMETRES_IN:
            raise UnsupportedImageError(
                f"{name} has an axis {axis!r} in the unit {unit!r}: it must be one of {', '.join(MILLIMETRES_IN)}"
            )
        orientation = each.get("orientation")
        value = orientation.get("value") if isinstance(orientation, Mapping) else None
        if value is not None and value not in DIRECTIONS:
            raise UnsupportedImageError(f"the axis {axis!r} of {name} goes {value!r}: it must be one of {', '.join(DIRECTIONS)}")
        axes.append(Axis(axis, MILLIMETRES_IN[unit] if axis in SPATIAL and unit is not None else 1.0, value))
    names = [each.name for each in axes]
    if len(set(names)) < len(names) or not {"x", "y"} <= set(names):
        raise UnsupportedImageError(
            f"{name} has the axes {', '.join(names)}: it must have x and y, may have t, c and z, and each once"
        )
    return tuple(axes)


def _matrix(transforms: Sequence[Json], size: int, name: str) -> np.ndarray:
    """Give one matrix for what some transforms do, one after the other."""
    result = np.eye(size + 1)
    for each in transforms:
        result = _one_matrix(each, size, name) @ result
    return result


def _one_matrix(transform: Json, size: int, name: str) -> np.ndarray:
    kind = transform["type"]
    result = np.eye(size + 1)
    if kind == "identity":
        return result
    if kind == "sequence":
        return _matrix(transform["transformations"], size, name)
    if kind not in ("scale", "translation", "affine", "rotation", "mapAxis"):
        raise UnsupportedImageError(
            f"{name} has a transform of type {kind!r}: it must be a scale, translation, rotation or affine"
        )
    if transform.get(kind) is None:
        raise UnsupportedImageError(
            f"the {kind} of {name} is in another file ({transform.get('path')}): it must be in the metadata"
        )
    values = np.asarray(transform[kind], dtype=np.float64)
    rows = {"scale": (size,), "translation": (size,), "mapAxis": (size,), "rotation": (size, size), "affine": (size, size + 1)}[
        kind
    ]
    if values.shape != rows or not np.isfinite(values).all():
        raise CorruptImageError(f"the {kind} of {name} is {transform[kind]}: it must hold {' × '.join(map(str, rows))} numbers")
    if kind == "scale":
        np.fill_diagonal(result, [*values, 1])
    elif kind == "translation":
        result[:size, size] = values
    elif kind == "rotation":
        result[:size, :size] = values
    elif kind == "affine":
        result[:size] = values
    else:
        result[:size] = result[values.astype(int)]
    return result


def _spatial(matrix: np.ndarray, axes: Sequence[Axis], world: Sequence[Axis], name: str) -> Affine:
    """Give the part of a matrix that is of x, y and z, in millimetres of RAS+."""
    columns = {each.name: number for number, each in enumerate(axes)}
    rows = {each.name: number for number, each in enumerate(world)}
    others = [columns[of] for of in columns if of not in SPATIAL]
    if matrix[np.ix_([rows[to] for to in SPATIAL if to in rows], others)].any():
        raise UnsupportedImageError(
            f"{name} has other places for each time or channel: open one of its arrays, and say where its voxels lie: {WAY}"
        )
    physical = np.eye(4)
    for row, to in enumerate(SPATIAL):
        for column, of in enumerate(SPATIAL):
            if to in rows and of in columns:
                physical[row, column] = matrix[rows[to], columns[of]] * world[rows[to]].millimetres
        if to in rows:
            physical[row, 3] = matrix[rows[to], -1] * world[rows[to]].millimetres
    turned = np.zeros((4, 4))
    turned[3, 3] = 1
    said = {to: world[rows[to]].orientation for to in SPATIAL if to in rows}
    known = {to: (SPATIAL.index(to), 1) if value is None else DIRECTIONS[value] for to, value in said.items()}
    left = [axis for axis in range(3) if axis not in {axis for axis, _ in known.values()}]
    for row, to in enumerate(SPATIAL):
        # An axis that the image lacks goes where no other one does, its own direction first.
        axis, sign = known[to] if to in known else (row if row in left else left[0], 1)
        turned[axis, row] = sign
        left = [each for each in left if each != axis]
    affine: Affine = turned @ physical
    if np.linalg.matrix_rank(affine[:3, :3]) < 3:
        raise CorruptImageError(f"{name} is squeezed flat by what its metadata say of its voxels:\n{affine}")
    return affine


def chosen_level(multiscales: Multiscales, level: int, spacing: float | Sequence[float] | None, name: str) -> int:
    """Choose a level by its number, or the coarsest one whose voxels are no larger than wanted.

    Raises:
        NoSuchIndexError: if there is no level of that number.
        SizeError: if the spacing is none.
    """
    levels = multiscales.levels
    if spacing is None:
        if isinstance(level, bool) or not isinstance(level, Integral):
            raise NoSuchIndexError(f"level is {level!r}: it must be a whole number, of which 0 is the finest")
        if not -len(levels) <= level < len(levels):
            raise NoSuchIndexError(f"{name} has no level {level}, only {len(levels)}: 0 is the finest")
        return level % len(levels)
    try:
        wanted = np.broadcast_to(np.asarray(spacing, dtype=np.float64), (3,))
    except (TypeError, ValueError):
        wanted = np.zeros(3)
    if not (wanted > 0).all():
        raise SizeError(f"spacing is {spacing!r}: give positive millimetres, one number or three, one for each axis")
    fitting = [number for number, each in enumerate(levels) if (np.array(spacing_of(each.affine)) <= wanted * 1.001).all()]
    return max(fitting, default=0)


def described(
    affine: Affine,
    factors: Sequence[Sequence[int]],
    has_channels: bool,
    version: str,
    name: str,
    is_labels: bool,
) -> dict[str, Json]:
    """Say in metadata of OME-Zarr what an image is whose levels are called 0, 1, 2 and so on.

    What OME-Zarr 0.4 and 0.5 cannot say is the direction of oblique axes: then voxels have the nearest orientation.

    Args:
        affine: of the finest level.
        factors: of the levels behind it.
        has_channels: whether the first axis of arrays is of channels.
        version: `"0.4"`, `"0.5"` or `"0.6"`.
        name: of the image.
        is_labels: whether it holds labels.

    Returns:
        The attributes of the group.
    """
    spacing = spacing_of(affine)
    directions = affine[:3, :3] / np.array(spacing)
    is_oblique = bool((np.abs(directions) > 1e-6).sum() > 3)
    has_world = version == "0.6" and is_oblique
    axes: list[dict[str, Json]] = [{"name": "c", "type": "channel"}] if has_channels else []
    for number in (2, 1, 0):
        axis: dict[str, Json] = {"name": SPATIAL[number], "type": "space", "unit": "millimeter"}
        if not has_world:
            axis["orientation"] = {"type": "anatomical", "value": _orientations(directions)[number]}
        axes.append(axis)
    lead = [1.0] * has_channels
    datasets = []
    level = affine
    for number in range(len(factors) + 1):
        if number:
            level = coarser_affine(level, factors[number - 1])
        scale = [*lead, *reversed(spacing_of(level))]
        place = [*([0.0] * has_channels), *reversed((directions.T @ level[:3, 3]).tolist())]
        steps: list[dict[str, Json]] = [{"type": "scale", "scale": scale}, {"type": "translation", "translation": place}]
        if version == "0.6":
            steps = [
                {"type": "sequence", "transformations": steps, "input": {"path": str(number)}, "output": {"name": "intrinsic"}}
            ]
        datasets.append({"path": str(number), "coordinateTransformations": steps})
    image: dict[str, Json] = {"name": name, "datasets": datasets}
    if factors:
        image["type"] = "mode" if is_labels else "mean"
    if version == "0.6":
        image["coordinateSystems"] = [{"name": "intrinsic", "axes": axes}]
        if has_world:
            image["coordinateSystems"].append({"name": "world", "axes": axes})
            size = len(axes)
            turn = np.eye(size, size + 1)
            turn[has_channels:, has_channels:size] = directions[::-1, ::-1]
            image["coordinateTransformations"] = [
                {"type": "affine", "affine": turn.tolist(), "input": {"name": "intrinsic"}, "output": {"name": "world"}}
            ]
    else:
        image["axes"] = axes
    if version == "0.4":
        image["version"] = version
        return {"multiscales": [image]}
    return {"ome": {"version": version, "multiscales": [image]}}


def _orientations(directions: np.ndarray) -> list[str]:
    """Name the ways that axes go, each the nearest that is left."""
    names = {axis: name for name, axis in DIRECTIONS.items()}
    found = [""] * 3
    left = np.abs(directions)
    for _ in range(3):
        world, column = np.unravel_index(int(left.argmax()), left.shape)
        found[int(column)] = names[int(world), 1 if directions[world, column] > 0 else -1]
        left[world], left[:, column] = -1, -1
    return found
