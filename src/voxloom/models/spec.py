"""What a trained model expects of an image, and what its outputs mean: its space, its intensities, its patches, its labels."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal

from ..errors import SpecError, VoxloomError
from ..io.labels import Label
from ..io.protocols import Json
from ..volumes.views.intensities import Intensity
from ..volumes.views.spaces import as_spacing
from ..volumes.views.spatial import as_orientation

__all__ = ["VERSION", "Crop", "ModelSpec", "spec_beside"]

VERSION = 1
NATIVE = "native"


@dataclass(frozen=True)
class Crop:
    """The part of an image that a model is given: the box of all voxels that count.

    Example:
        >>> Crop(above=-500, margin=(5, 5, 5)).above
        -500
    """

    above: float | None = None
    """What some channel must be above; None for all that are not 0."""
    margin: tuple[int, int, int] = (0, 0, 0)
    """Voxels of the image that are added on each side."""


@dataclass(frozen=True)
class ModelSpec:
    """What a trained model expects, and what its outputs mean. Everything has a default that changes nothing.

    An image is turned (`orientation`, then `axes`), cropped, scaled (`intensity`) and resampled (`spacing`), in this order,
    unless `scale_after` says otherwise.
    Scores are interpolated back to the grid of the image, and reduced there.

    Raises:
        SpecError: if a value cannot be used; names the key.

    Example:
        >>> spec = ModelSpec(channels=("CT",), orientation="RAS", spacing=(1.5, 1.5, 1.5), patch_size=96, reduce="argmax")
        >>> ModelSpec.from_json(spec.to_json()) == spec
        True
    """

    channels: tuple[str, ...] = ()
    """Names of the channels, in order; empty where the model takes whatever comes."""
    orientation: str = NATIVE
    """Where the axes point to, such as `"RAS"`; `"native"` leaves them."""
    axes: tuple[int, int, int] = (0, 1, 2)
    """Number of the image's axis for each axis of the model, once it has been turned."""
    crop: Crop | None = None
    intensity: tuple[Intensity, ...] = ()
    """What is done to each channel; one for all of them, or one for each."""
    spacing: tuple[float | None, float | None, float | None] = (None, None, None)
    """Millimetres along each axis of the model; None (`"native"`) leaves an axis as it is."""
    fits: Literal["spacing", "volume", "monai"] = "spacing"
    """Whether voxels have that spacing exactly, and the volume's corner stays (`"spacing"`) or the grid is that of MONAI's
    `Spacing` (`"monai"`); or whether they fill the volume, with as nearly that spacing as whole voxels allow."""
    then_intensity: tuple[Intensity, ...] = ()
    """What is done to each channel after that; its numbers are those of what `intensity` makes."""
    scale_after: Literal["cropping", "resampling"] = "cropping"
    """Whether intensities are scaled before or after the image is resampled."""
    order: int = 1
    """How the image is interpolated: 0, 1 or 3; cubic splines are kept within the range of the values, but where `fits` is
    `"monai"`."""
    interpolation: Literal["linear", "nearest"] = "linear"
    """How scores are interpolated back to the grid of the image."""
    thick_slices: float | None = None
    """Where the largest spacing of the image, or else of the model, is more than so many times the smallest, that axis alone is
    interpolated by the nearest, both ways."""
    patch_size: tuple[int, ...] | None = None
    patch_overlap: tuple[float, ...] | float = 0.5
    patch_spacing: Literal["fixed", "even"] = "fixed"
    overlap_mode: str = "gaussian"
    overlap_width: float | None = None
    """Standard deviation of a Gaussian as a part of the patch; None for an eighth."""
    context: tuple[int, int, int] = (0, 0, 0)
    slice_axis: int | None = None
    mirror_axes: tuple[int, ...] = ()
    padding_mode: str | float | None = None
    activation: Literal["softmax", "sigmoid"] | None = None
    activates: Literal["patches", "sums"] = "patches"
    """Whether the activation acts on each patch, before it is summed, or on the sums, before they are interpolated."""
    reduce: str | float | None = None
    """`"argmax"`, `"entropy"`, `"variance"`, `"scores"`, or a threshold; see `regions`."""
    regions: tuple[int, ...] = ()
    """Labels of channels that are regions, in order; later ones lie on top. `reduce` is then their threshold, by default 0.5."""
    labels: tuple[Label, ...] = ()

    def __post_init__(self) -> None:
        for each in fields(self):
            parse = PARSERS.get(each.name)
            if parse is not None:
                object.__setattr__(self, each.name, _parsed(each.name, getattr(self, each.name), parse, "the spec"))
        for name in ("intensity", "then_intensity"):
            count = len(getattr(self, name))
            if count and self.channels and count not in (1, len(self.channels)):
                raise SpecError(
                    f"{name} of the spec has {count} entries, but there are {len(self.channels)} channels: give one for all, or"
                    " one for each"
                )

    def to_json(self) -> Json:
        """Give it as JSON: what is as by default is left out."""
        result: dict[str, Json] = {"voxloom_spec": VERSION}
        for each in fields(self):
            value = getattr(self, each.name)
            if value != each.default:
                result[each.name] = _as_json(value)
        if "spacing" in result:
            result["spacing"] = [NATIVE if value is None else value for value in self.spacing]
        return result

    @classmethod
    def from_json(cls, given: Json, where: str = "the spec") -> "ModelSpec":
        """Make a spec of JSON.

        Args:
            given: the JSON, parsed or as a text.
            where: what messages call it.

        Raises:
            SpecError: if a key is unknown or a value cannot be used, or the version is a later one; names the key.
        """
        if isinstance(given, str | bytes):
            try:
                given = json.loads(given)
            except ValueError as error:
                raise SpecError(f"{where} is no JSON: {error}") from error
        if not isinstance(given, Mapping):
            raise SpecError(f'{where} is {type(given).__name__}: it must be an object, such as {{"voxloom_spec": 1}}')
        version = given.get("voxloom_spec")
        if version is None:
            raise SpecError(f'{where} has no key voxloom_spec, which says its version: add "voxloom_spec": {VERSION}')
        if version != VERSION:
            raise SpecError(f"{where} is of version {version!r}, and this voxloom knows version {VERSION}: install a newer one")
        known = {each.name for each in fields(cls)}
        unknown = [key for key in given if key not in known | {"voxloom_spec"}]
        if unknown:
            raise SpecError(f"{where} has an unknown key {unknown[0]!r}: it must be one of {', '.join(sorted(known))}")
        values = {key: _parsed(key, value, PARSERS[key], where) for key, value in given.items() if key in known}
        try:
            return cls(**values)
        except SpecError as error:
            raise SpecError(str(error).replace("the spec", where)) from None

    @classmethod
    def read(cls, path: Any) -> "ModelSpec":
        """Read a spec from a file of JSON.

        Raises:
            SpecError: if there is no such file, or it is no spec.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise SpecError(f"{path} cannot be read: {error}") from error

    def write(self, path: Any) -> None:
        """Write it to a file of JSON."""
        Path(path).write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")

    @property
    def changes_space(self) -> bool:
        """Whether an image is turned, cropped or resampled."""
        return (self.orientation, self.axes, self.crop, self.spacing) != (NATIVE, (0, 1, 2), None, (None, None, None))

    def __str__(self) -> str:
        return json.dumps(self.to_json(), indent=1)


def spec_beside(path: Path) -> ModelSpec | None:
    """Read the spec that lies beside a file of weights or a model, `NAME.json`; None if that is something else, or not there."""
    beside = path.with_suffix(".json")
    try:
        found = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return ModelSpec.from_json(found, str(beside)) if isinstance(found, Mapping) and "voxloom_spec" in found else None


def _as_json(value: Any) -> Json:
    if isinstance(value, tuple):
        return [_as_json(each) for each in value]
    if isinstance(value, Crop | Intensity | Label):
        return {
            each.name: _as_json(getattr(value, each.name)) for each in fields(value) if getattr(value, each.name) != each.default
        }
    return value


# What the values of keys may be


class _Wrong(Exception):  # noqa: N818 - it never leaves this file
    """Says what a value must be."""


def _parsed(key: str, value: Any, parse: Callable[[Any], Any], where: str) -> Any:
    try:
        return parse(value)
    except _Wrong as error:
        raise SpecError(f"{key} of {where} is {value!r}: it must be {error}") from None
    except VoxloomError as error:
        raise SpecError(f"{key} of {where} is {value!r}: {error}") from None


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or math.isnan(value):
        raise _Wrong("a number")
    return value if isinstance(value, int | float) else float(value)


def _deviation(value: Any) -> float:
    if _number(value) < 0:
        raise _Wrong("a number of at least 0")
    return _number(value)


def _whole(least: int) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
            raise _Wrong(f"a whole number of at least {least}")
        return int(value)

    return parse


def _listed(parse: Callable[[Any], Any], length: int | None = None) -> Callable[[Any], tuple[Any, ...]]:
    def parse_all(value: Any) -> tuple[Any, ...]:
        if isinstance(value, str) or not isinstance(value, Sequence) or length not in (None, len(value)):
            raise _Wrong("a list" + ("" if length is None else f" of {length}"))
        return tuple(map(parse, value))

    return parse_all


def _one_of(*values: Any) -> Callable[[Any], Any]:
    def parse(value: Any) -> Any:
        if not any(value == each and type(value) is type(each) for each in values):
            raise _Wrong(f"one of {', '.join(map(repr, values))}")
        return value

    return parse


def _or_none(parse: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else parse(value)


def _color(value: Any) -> int:
    if _whole(0)(value) > 255:
        raise _Wrong("three numbers from 0 to 255, red, green and blue")
    return int(value)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise _Wrong("a text")
    return value


def _object(kind: type, parsers: Mapping[str, Callable[[Any], Any]]) -> Callable[[Any], Any]:
    def parse(value: Any) -> Any:
        if isinstance(value, kind):
            value = {each.name: getattr(value, each.name) for each in fields(kind)}
        if not isinstance(value, Mapping):
            raise _Wrong(f"an object of {', '.join(parsers)}")
        unknown = [key for key in value if key not in parsers]
        if unknown:
            raise _Wrong(f"an object of {', '.join(parsers)}, and {unknown[0]!r} is none of them")
        needed = [each.name for each in fields(kind) if each.default is MISSING]
        if any(key not in value for key in needed):
            raise _Wrong(f"an object that has {' and '.join(needed)}")
        found = {}
        for key, each in value.items():
            try:
                found[key] = parsers[key](each)
            except _Wrong as error:
                raise _Wrong(f"an object of which {key}, here {each!r}, is {error}") from None
        return kind(**found)

    return parse


def _spacing(value: Any) -> Any:
    if value == NATIVE:
        return (None, None, None)
    values = [None if each == NATIVE else each for each in value] if isinstance(value, list | tuple) else value
    return as_spacing(values)


def _overlap(value: Any) -> Any:
    values = value if isinstance(value, list | tuple) else [value]
    for each in values:
        if _number(each) < 0 or (isinstance(each, float) and each >= 1):
            raise _Wrong("voxels, or a fraction below 1, or one for each axis")
    return tuple(value) if isinstance(value, list | tuple) else value


def _axes(value: Any) -> Any:
    found = _listed(_whole(0), 3)(value)
    if sorted(found) != [0, 1, 2]:
        raise _Wrong("0, 1 and 2 in some order")
    return found


def _size(value: Any) -> Any:
    values = [value] * 3 if isinstance(value, int) and not isinstance(value, bool) else value
    found = _listed(lambda each: -1 if each == -1 else _whole(1)(each))(values)
    if len(found) not in (2, 3):
        raise _Wrong("voxels of a patch along three axes, or two of slices")
    return found


def _increasing(value: Any) -> Any:
    low, high = _listed(_number, 2)(value)
    if not low < high:
        raise _Wrong("two numbers, the smaller one first")
    return low, high


def _percentiles(value: Any) -> Any:
    low, high = _increasing(value)
    if low < 0 or high > 100:
        raise _Wrong("two percentiles from 0 to 100, the smaller one first")
    return low, high


def _over(value: Any) -> Any:
    return value if value in ("all", "nonzero", "mask") else _number(value)


def _reduce(value: Any) -> Any:
    return _one_of("argmax", "entropy", "variance", "scores")(value) if isinstance(value, str) else _number(value)


INTENSITY: dict[str, Callable[[Any], Any]] = {
    "clip": _or_none(_increasing),
    "clip_percentiles": _or_none(_percentiles),
    "scale": _one_of("none", "z-score", "range", "percentiles"),
    "mean": _or_none(_number),
    "std": _or_none(_deviation),
    "low": _or_none(_number),
    "high": _or_none(_number),
    "onto": _listed(_number, 2),
    "over": _over,
}
LABEL: dict[str, Callable[[Any], Any]] = {
    "value": _whole(0),
    "name": _text,
    "color": _or_none(_listed(_color, 3)),
    "code": _or_none(_listed(_text, 3)),
}


def _intensities(value: Any) -> Any:
    return _listed(_object(Intensity, INTENSITY))([value] if isinstance(value, Mapping | Intensity) else value)


PARSERS: dict[str, Callable[[Any], Any]] = {
    "channels": _listed(_text),
    "orientation": lambda value: value if value == NATIVE else as_orientation(value),
    "axes": _axes,
    "crop": _or_none(_object(Crop, {"above": _or_none(_number), "margin": _listed(_whole(0), 3)})),
    "intensity": _intensities,
    "then_intensity": _intensities,
    "spacing": _spacing,
    "fits": _one_of("spacing", "volume", "monai"),
    "scale_after": _one_of("cropping", "resampling"),
    "order": _one_of(0, 1, 3),
    "interpolation": _one_of("linear", "nearest"),
    "thick_slices": _or_none(_number),
    "patch_size": _or_none(_size),
    "patch_overlap": _overlap,
    "patch_spacing": _one_of("fixed", "even"),
    "overlap_mode": _one_of("crop", "average", "hann", "gaussian", "nnunet", "monai"),
    "overlap_width": _or_none(_number),
    "context": _listed(_whole(0), 3),
    "slice_axis": _or_none(_one_of(0, 1, 2)),
    "mirror_axes": _listed(_one_of(0, 1, 2)),
    "padding_mode": _or_none(lambda value: value if isinstance(value, str) else _number(value)),
    "activation": _or_none(_one_of("softmax", "sigmoid")),
    "activates": _one_of("patches", "sums"),
    "reduce": _or_none(_reduce),
    "regions": _listed(_whole(0)),
    "labels": _listed(_object(Label, LABEL)),
}
