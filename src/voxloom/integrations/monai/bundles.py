"""Bundles of MONAI: a trained network with what it expects, from the declared part of its configuration."""

import importlib
import inspect
import json
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import MissingDependencyError, ModelFileError
from ...inference.reductions import as_reduction
from ...io.files import hash_of_path
from ...io.labels import Label
from ...io.protocols import Json
from ...models.loading import LoadedModel, load_weights
from ...models.spec import Crop, ModelSpec
from ...volumes.intensities import Intensity
from ...volumes.libraries import imported
from .sliding import shared

__all__ = ["load"]

CONFIGURATIONS = ("inference.json", "inference.yaml", "inference.yml", "evaluate.json")
# Transforms that change nothing for a model here: images are read, have channels, and come as the type of the weights.
READING = ("LoadImage", "EnsureChannelFirst", "EnsureType", "ToTensor", "CastToType", "ToDevice")
WRITING = ("SaveImage", "EnsureType", "ToTensor", "CastToType", "ToDevice")
AXES = [["L", "R"], ["P", "A"], ["I", "S"]]
# What starts the name of another part: a reference, and a macro, which is a copy of it.
REFERENCES = ("@", "%")
PREDICTION = "pred"
"""What MONAI's evaluators call the output of the network."""
CODE = "which is code: allow_code=True (--allow-code) lets MONAI evaluate it, if you trust where the bundle is from"


def load(folder: Any, *, config: str | None = None, checkpoint: str = "model.pt", allow_code: bool = False) -> LoadedModel:
    """Load a bundle of MONAI's, with what it expects, for `Predictor` and `predict`.

    The network, the inferer and the usual transforms before and after it are read from the configuration, and become a
    `ModelSpec`. Expressions (`$`) in it are not evaluated, unless that is allowed; what is not understood is named. Scores are
    never held as a whole: they are brought to the grid of the image block by block, and reduced there.

    Args:
        folder: the folder that holds `configs` and `models`.
        config: name of the configuration in `configs`; by default `inference.json`.
        checkpoint: name of the file of weights in `models`.
        allow_code: let MONAI evaluate the expressions in the configuration, and networks be of any package.

    Raises:
        ModelFileError: if the folder is no such bundle, or its configuration is not understood; names the part.
        MissingDependencyError: if MONAI is not installed.
    """
    imported("monai", "monai")
    root = Path(folder).expanduser()
    configuration = _Configuration.read(root, config, allow_code)
    found = _Findings(configuration)
    image_key = found.before("preprocessing")
    found.inferer()
    found.after("postprocessing")
    network = _network(configuration)
    weights = root / "models" / checkpoint
    load_weights(network, weights, allow_pickle=False)
    labels, channels = _names(root, image_key)
    # Labels are named where the channels of the output are classes.
    is_classes = found.values.get("reduce") == "argmax"
    spec = ModelSpec(**found.values, channels=channels, labels=labels if is_classes else ())
    return LoadedModel(network.eval(), f"MONAI bundle {hash_of_path(weights)}", spec=spec, reduce=found.reduce)


@dataclass(frozen=True)
class _Configuration:
    """What a bundle's configuration says, and where."""

    path: Path
    content: Mapping[str, Any]
    parser: Any
    """MONAI's own, where code may be run; None where it may not."""

    @classmethod
    def read(cls, root: Path, name: str | None, allow_code: bool) -> "_Configuration":
        folder = root / "configs"
        names = CONFIGURATIONS if name is None else (name,)
        path = next((folder / each for each in names if (folder / each).is_file()), None)
        if path is None:
            raise ModelFileError(f"there is no {folder / names[0]}: give the folder of a MONAI bundle, with configs and models")
        try:
            content = json.loads(path.read_text(encoding="utf-8")) if path.suffix == ".json" else _yaml(path)
        except (OSError, ValueError) as error:
            raise ModelFileError(f"{path} cannot be read: {error}") from error
        if not isinstance(content, Mapping):
            raise ModelFileError(f"{path} is no configuration: it must be an object with network_def, inferer and preprocessing")
        parser = None
        if allow_code:
            parser = importlib.import_module("monai.bundle").ConfigParser(dict(content))
            parser["bundle_root"] = str(root)
        return cls(path, content, parser)

    def get(self, name: str, above: tuple[str, ...] = ()) -> Any:
        """Give a part as it is written, by the names and numbers that lead there; None if there is none."""
        if name in above:
            raise ModelFileError(f"{name} in {self.path} refers to itself")
        found: Any = self.content
        for part in name.replace("::", "#").split("#"):
            if isinstance(found, list) and part.isdecimal() and int(part) < len(found):
                found = found[int(part)]
            elif isinstance(found, Mapping):
                found = found.get(part)
            else:
                return None
            if isinstance(found, str) and found.startswith(REFERENCES):
                reference, found = found, self.get(found[1:], (*above, name))
                if found is None:
                    raise ModelFileError(f"{name} in {self.path} refers to {reference!r}, which is not there")
        return found

    def value(self, name: str) -> Any:
        """Give a part as plain values: references are followed, and code is evaluated if that is allowed.

        Raises:
            ModelFileError: if it is code, or refers to what is not there.
        """
        return self._plain(self.get(name), name)

    def _plain(self, value: Any, name: str) -> Any:
        if isinstance(value, str) and value.startswith("$"):
            if self.parser is None:
                raise ModelFileError(f"{name} in {self.path} is {value!r}, {CODE}")
            return self.evaluated(name)
        if isinstance(value, str) and value.startswith(REFERENCES):
            return self.value(value[1:])
        if isinstance(value, Mapping):
            if "_target_" in value:
                raise ModelFileError(f"{name} in {self.path} is a {value['_target_']}, where a plain value is understood")
            return {key: self._plain(each, f"{name}#{key}") for key, each in value.items()}
        if isinstance(value, list):
            return [self._plain(each, f"{name}#{number}") for number, each in enumerate(value)]
        return value

    def evaluated(self, name: str) -> Any:
        """Let MONAI evaluate a part."""
        try:
            found = self.parser.get_parsed_content(name)
        except Exception as error:  # whatever the bundle's code raises
            raise ModelFileError(f"{name} in {self.path} cannot be evaluated: {type(error).__name__}: {error}") from error
        return found.tolist() if hasattr(found, "tolist") else found

    def component(self, name: str, needed: bool = True) -> "_Component | None":
        """Give a part that is a class with its arguments."""
        found = self.get(name)
        if isinstance(found, Mapping) and "_target_" in found:
            return _Component(self, name, str(found["_target_"]), [key for key in found if not key.startswith("_")])
        if needed:
            raise ModelFileError(f"{self.path} has no {name} with a _target_, as bundles of MONAI have it")
        return None

    def steps(self, name: str) -> list["_Component"]:
        """Give the transforms of a part, in order; none where there is no such part."""
        if self.get(name) is None:
            return []
        transforms = self.get(f"{name}#transforms")
        if not isinstance(transforms, list):
            raise ModelFileError(f"{name} in {self.path} is no Compose with a list of transforms")
        found = []
        for number, each in enumerate(transforms):
            if isinstance(each, Mapping) and self.value(f"{name}#transforms#{number}#_disabled_") in (True, "true", "True"):
                continue
            component = self.component(f"{name}#transforms#{number}")
            assert component is not None
            found.append(component)
        return found


def _yaml(path: Path) -> Any:
    try:
        yaml = importlib.import_module("yaml")
    except ImportError as error:
        raise MissingDependencyError(f"{path} needs PyYAML: pip install pyyaml") from error
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ModelFileError(f"{path} is damaged: {error}") from error


@dataclass(frozen=True)
class _Component:
    """A class of a configuration, with the names of the arguments that it is given."""

    configuration: _Configuration
    place: str
    target: str
    arguments: list[str]

    @property
    def kind(self) -> str:
        """Name of the class, of a transform without what says that it takes a dictionary."""
        name = self.target.rpartition(".")[2]
        for ending in ("Dict", "d", "D"):
            if name.endswith(ending) and name not in ("Lambda",):
                return name.removesuffix(ending)
        return name

    def __getitem__(self, name: str) -> Any:
        if name not in self.arguments:
            self.refuse(f"its argument {name} is missing")
        return self.get(name)

    def get(self, name: str, default: Any = None) -> Any:
        """Give an argument as a plain value."""
        return self.configuration.value(f"{self.place}#{name}") if name in self.arguments else default

    def numbers(self, name: str, default: Any = None, may_be_none: bool = False) -> list[Any]:
        """Give an argument that is a number or a list of them, as a list."""
        found = _listed(self[name] if default is None else self.get(name, default))
        for each in found or [found]:
            if not (may_be_none and each is None) and (not isinstance(each, int | float) or isinstance(each, bool)):
                self.refuse(f"its {name} is {each!r}, which is no number")
        return found

    def number(self, name: str) -> Any:
        """Give an argument that is a number; None where it is left out or null."""
        if self.get(name) is None:
            return None
        found = self.numbers(name)
        if len(found) != 1:
            self.refuse(f"its {name} is {found!r}, where one number is understood")
        return found[0]

    def own(self, name: str, default: Any = None) -> Any:
        """Give an argument that may be a list with a value for each key: that of the prediction."""
        value, keys = self.get(name, default), _listed(self.get("keys", PREDICTION))
        if not isinstance(value, list):
            return value
        if len(value) != len(keys):
            self.refuse(f"its {name} has {len(value)} values for {len(keys)} keys")
        return value[keys.index(PREDICTION)]

    def only(self, *known: str) -> None:
        """Refuse arguments that are not understood.

        Raises:
            ModelFileError: names the first.
        """
        for name in self.arguments:
            if name not in (*known, "keys", "allow_missing_keys", "lazy"):
                self.refuse(f"its argument {name} is not understood")

    def refuse(self, why: str) -> None:
        """Say that it is not understood.

        Raises:
            ModelFileError: always.
        """
        raise ModelFileError(
            f"{self.place} in {self.configuration.path}, {self.target}: {why}. Write a spec for the network instead (ModelSpec),"
            " or run the bundle by MONAI, with VoxloomInferer in place of its inferer"
        )


@dataclass
class _Findings:
    """The spec that a configuration amounts to."""

    configuration: _Configuration
    values: dict[str, Any] = field(default_factory=dict)
    reduce: Any = None
    """What is made of scores, if a spec cannot say it."""
    _is_resampled: bool = False
    _changes_space: bool = False

    # Before the network

    def before(self, name: str) -> str:
        """Read the transforms before the network, and give the name of the image."""
        handlers: dict[str, Callable[[_Component], None]] = {
            "Orientation": self._orientation,
            "Spacing": self._spacing,
            "CropForeground": self._crop,
            "ScaleIntensityRange": self._range,
            "ScaleIntensity": self._extremes,
            "NormalizeIntensity": self._normalize,
        }
        key: str | None = None
        for step in self.configuration.steps(name):
            keys = _listed(step.get("keys", "image"))
            key = keys[0] if key is None else key
            if keys != [key]:
                step.refuse(f"it transforms {', '.join(map(str, keys))}, where one image, {key}, is understood")
            if step.kind in handlers:
                handlers[step.kind](step)
            elif step.kind not in READING:
                step.refuse("this transform is not understood")
        return "image" if key is None else key

    def _orientation(self, step: _Component) -> None:
        step.only("axcodes", "as_closest_canonical", "labels")
        if step.get("labels") not in (None, AXES):
            step.refuse(f"its labels are understood only as {AXES}")
        if self._changes_space or self.values.get("intensity"):
            step.refuse("an image can be turned only before anything else")
        self.values["orientation"] = "RAS" if step.get("as_closest_canonical") else "".join(step["axcodes"])
        self._changes_space = True

    def _spacing(self, step: _Component) -> None:
        step.only("pixdim", "mode", "padding_mode", "diagonal", "align_corners", "dtype", "scale_extent", "recompute_affine")
        if self._is_resampled:
            step.refuse("an image can be resampled only once")
        if step.get("diagonal") or step.get("scale_extent") or step.get("recompute_affine"):
            step.refuse("diagonal, scale_extent and recompute_affine are understood only where they are false")
        if step.get("padding_mode", "border") not in ("border", ["border"]):
            step.refuse("what lies beyond the image is understood only as what is at its border")
        mode = _listed(step.get("mode", "bilinear"))[0]
        orders = {"bilinear": 1, "nearest": 0, 0: 0, 1: 1, 3: 3}
        if mode not in orders:
            step.refuse(f"its mode {mode!r} is not understood")
        pixdim = step.numbers("pixdim", may_be_none=True)
        pixdim += pixdim[-1:] * (3 - len(pixdim))
        self.values |= {
            "spacing": tuple(None if each is None or each <= 0 else float(each) for each in pixdim),
            "fits": "monai",
            "order": orders[mode],
        }
        self._is_resampled = self._changes_space = True

    def _crop(self, step: _Component) -> None:
        step.only("source_key", "margin", "k_divisible", "allow_smaller", "mode", "start_coord_key", "end_coord_key")
        if self._is_resampled or self.values.get("intensity"):
            step.refuse("the foreground can be cut out only before anything is resampled or scaled")
        if step.get("k_divisible", 1) != 1 or (step.get("margin", 0) and not step.get("allow_smaller")):
            step.refuse("a margin is understood only with allow_smaller, and k_divisible only where it is 1")
        margin = _listed(step.get("margin", 0))
        self.values["crop"] = Crop(above=0, margin=tuple((margin * 3)[:3]))
        self._changes_space = True

    def _range(self, step: _Component) -> None:
        step.only("a_min", "a_max", "b_min", "b_max", "clip", "dtype")
        low, high = step.number("a_min"), step.number("a_max")
        onto = (step.number("b_min"), step.number("b_max"))
        if low is None or high is None or not low < high or (None not in onto and onto[0] == onto[1]):
            step.refuse("a_min must be less than a_max, and b_min and b_max must differ")
        if None in onto and (step.get("clip") or onto != (None, None)):
            step.refuse("b_min and b_max are understood only together, and clip only with them")
        self._scaled(
            step,
            Intensity(
                clip=(low, high) if step.get("clip") else None,
                scale="range",
                low=low,
                high=high,
                onto=(0.0, 1.0) if None in onto else onto,
            ),
        )

    def _extremes(self, step: _Component) -> None:
        step.only("minv", "maxv", "channel_wise", "dtype")
        self._needs_own_channels(step)
        self._scaled(step, Intensity(scale="range", onto=(step.get("minv", 0.0), step.get("maxv", 1.0))))

    def _normalize(self, step: _Component) -> None:
        step.only("subtrahend", "divisor", "nonzero", "channel_wise", "dtype")
        mean, std = _listed(step.get("subtrahend")), _listed(step.get("divisor"))
        over: Any = "nonzero" if step.get("nonzero") else "all"
        if mean == [None] or std == [None]:
            self._needs_own_channels(step)
        count = max(len(mean), len(std))
        pairs = zip((mean * count)[:count], (std * count)[:count], strict=True)
        self._scaled(step, *[Intensity(scale="z-score", mean=each, std=other, over=over) for each, other in pairs])

    def _needs_own_channels(self, step: _Component) -> None:
        """Refuse numbers that are those of all channels together."""
        network = self.configuration.component("network_def")
        if network is not None and network.get("in_channels", 1) != 1 and not step.get("channel_wise"):
            step.refuse("numbers of several channels together are not understood, only channel_wise")

    def _scaled(self, step: _Component, *intensities: Intensity) -> None:
        name = "then_intensity" if self.values.get("intensity") else "intensity"
        when = "resampling" if self._is_resampled else "cropping"
        if self.values.get("then_intensity") or self.values.get("scale_after", when) != when:
            step.refuse("intensities are scaled twice at most, and either before or after the image is resampled")
        self.values |= {name: intensities, "scale_after": when}

    # The network's windows

    def inferer(self) -> None:
        """Read how the network is applied."""
        inferer = self.configuration.component("inferer")
        assert inferer is not None
        kind = inferer.target.rpartition(".")[2]
        if kind == "SimpleInferer":
            self.values |= {"patch_size": (-1, -1, -1), "patch_overlap": 0.0, "overlap_mode": "average"}
            return
        if kind not in ("SlidingWindowInferer", "SlidingWindowInfererAdapt", "VoxloomInferer"):
            inferer.refuse("this inferer is not understood")
        padding = inferer.get("padding_mode", "constant")
        if padding != "constant" or inferer.get("cval", 0):
            warnings.warn(
                f"{self.configuration.path} pads volumes that are smaller than a window by {padding!r} (cval"
                f" {inferer.get('cval', 0)}), but here they are padded with zeros; others are not concerned",
                RuntimeWarning,
                stacklevel=3,
            )
        if inferer.get("with_coord"):
            inferer.refuse("with_coord is not understood")
        sizes = inferer.numbers("roi_size", may_be_none=True)
        sizes = sizes * 3 if len(sizes) == 1 else sizes
        if len(sizes) != 3:
            inferer.refuse("windows of volumes are understood, of three sizes")
        sizes = [-1 if size is None or size <= 0 else int(size) for size in sizes]
        overlaps = inferer.numbers("overlap", 0.25)
        overlaps = overlaps * 3 if len(overlaps) == 1 else overlaps
        if len(overlaps) != 3 or not all(0 <= each < 1 for each in overlaps):
            inferer.refuse("its overlap must be one fraction of a window or three, each from 0 to below 1")
        modes = {"constant": "average", "gaussian": "monai"}
        mode = str(inferer.get("mode", "constant"))
        self.values |= {
            "patch_size": tuple(sizes),
            "patch_overlap": tuple(0 if size == -1 else shared(size, part) for size, part in zip(sizes, overlaps, strict=True)),
            "overlap_mode": modes.get(mode, mode),
        }
        if mode == "gaussian" and inferer.get("sigma_scale", 0.125) != 0.125:
            self.values["overlap_width"] = inferer["sigma_scale"]

    # After the network

    def after(self, name: str) -> None:
        """Read what is made of the scores."""
        is_discrete, inverted, late = False, None, None
        for step in self.configuration.steps(name):
            kind = step.kind
            if kind not in WRITING and PREDICTION not in _listed(step.get("keys", PREDICTION)):
                step.refuse(f"what is understood is made of {PREDICTION!r}")
            if self.reduce is not None and kind in ("Activations", "AsDiscrete"):
                step.refuse("it comes after a function")
            if kind == "Activations":
                step.only("softmax", "sigmoid", "other")
                chosen = [each for each in ("softmax", "sigmoid") if step.own(each)]
                is_second = "activation" in self.values or late is not None
                if is_discrete or len(chosen) > 1 or step.own("other") is not None or is_second:
                    step.refuse("one activation, softmax or sigmoid, is understood, before AsDiscrete")
                # The nearest voxel has the same value before and after; what lies beside the foreground has not.
                if chosen and (inverted == "linear" or (inverted == "nearest" and "crop" in self.values)):
                    late = (step, chosen[0])
                elif chosen:
                    self.values |= {"activation": chosen[0], "activates": "sums"}
            elif kind == "Invert":
                nearest = bool(step.own("nearest_interp", True)) or is_discrete or self.values.get("order") == 0
                inverted = "nearest" if nearest else "linear"
                if not nearest and self.values.get("order", 1) == 3:
                    step.refuse("scores are interpolated back linearly or by the nearest voxel, not by splines as the image is")
            elif kind == "AsDiscrete":
                step.only("argmax", "threshold", "to_onehot", "rounding", "dim", "keepdim", "dtype")
                largest, threshold = step.own("argmax", False), step.own("threshold")
                if step.own("to_onehot") or step.own("rounding"):
                    step.refuse("to_onehot and rounding are not understood")
                if is_discrete or bool(largest) == (threshold is not None):
                    step.refuse("one of argmax and threshold is understood, once")
                if late is not None and not largest:
                    threshold = _before_activation(*late, threshold, least=0.5 if "crop" in self.values else 0.0)
                self.values["reduce"] = "argmax" if largest else threshold
                is_discrete, late = True, None  # the largest is so before an activation, too
            elif kind == "Lambda" and self.configuration.parser is not None:
                if late is not None:
                    step.refuse("it comes after an activation of what Invert has interpolated")
                self._function(step)
            elif kind not in WRITING:
                code = f"its function is code: {CODE}" if kind == "Lambda" else "this transform is not understood"
                step.refuse(code)
        if late is not None:
            late[0].refuse("after Invert, an activation is understood only before an AsDiscrete")
        # Without Invert, MONAI brings what it saves to the grid of the image by nearest neighbours.
        self.values["interpolation"] = inverted or "nearest"

    def _function(self, step: _Component) -> None:
        step.only("func", "overwrite", "inv_func", "track_meta")
        function = self.configuration.evaluated(f"{step.place}#func")
        before = self.reduce if self.reduce is not None else self.values.pop("reduce", None)
        self.reduce = _Then(before, function)


def _before_activation(step: _Component, activation: str, threshold: Any, least: float) -> float:
    """Give the threshold for scores that is this one for what an activation makes of them.

    Where a foreground is cut out, MONAI has scores of 0 beside it, of which a sigmoid makes 0.5.
    """
    if activation != "sigmoid" or not isinstance(threshold, float) or not least < threshold < 1:
        step.refuse(
            f"after Invert, an activation is understood only before argmax, or as sigmoid before a threshold above {least:g} and"
            " below 1"
        )
    return math.log(threshold / (1 - threshold))


@dataclass(frozen=True)
class _Then:
    """Reduces a block, and gives that to a function of the bundle's."""

    reduce: Any
    function: Callable[[Tensor], Any]

    def __call__(self, block: Tensor) -> Tensor:
        made = self.reduce(block) if isinstance(self.reduce, _Then) else as_reduction(self.reduce)(block)
        given = made if made.is_floating_point() else made.float()  # as MONAI has labels
        found = torch.as_tensor(self.function(given))
        return found if found.is_floating_point() else found.to(torch.int32)


def _network(configuration: _Configuration) -> nn.Module:
    """Make the network."""
    component = configuration.component("network_def", needed=False) or configuration.component("network")
    assert component is not None
    module, _, name = component.target.rpartition(".")
    allowed = configuration.parser is not None
    if module and not allowed and not module.startswith("monai.networks."):
        raise ModelFileError(
            f"{component.place} in {configuration.path} is {component.target}, of a package that is not MONAI's, {CODE}"
        )
    try:
        found = getattr(importlib.import_module(module or "monai.networks.nets"), name)
    except (ImportError, AttributeError) as error:
        raise ModelFileError(f"{component.target} in {configuration.path} cannot be found: {error}") from error
    if not inspect.isclass(found) or not issubclass(found, nn.Module):
        raise ModelFileError(f"{component.target} in {configuration.path} is no network")
    arguments = {argument: component[argument] for argument in component.arguments}
    try:
        return found(**arguments)
    except (TypeError, ValueError) as error:
        raise ModelFileError(f"{component.target} in {configuration.path} cannot be made: {error}") from error


def _names(root: Path, image_key: str) -> tuple[tuple[Label, ...], tuple[str, ...]]:
    """Give names of labels and of channels, as far as the metadata have them."""
    try:
        metadata = json.loads((root / "configs" / "metadata.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return (), ()
    data = _part(metadata, "network_data_format")
    outputs, inputs = _part(data, "outputs"), _part(data, "inputs")
    output = _part(outputs, PREDICTION) or _part(outputs, next(iter(outputs), ""))
    classes, channels = _part(output, "channel_def"), _part(_part(inputs, image_key), "channel_def")
    labels = tuple(Label(int(number), str(name)) for number, name in classes.items() if str(number).isdecimal() and int(number))
    if len(channels) < 2 or not all(str(each).isdecimal() for each in channels):
        return labels, ()
    return labels, tuple(str(channels[each]) for each in sorted(channels, key=int))


def _part(of: Any, name: str) -> Mapping[str, Any]:
    """Give a part of the metadata; nothing where they are not as they should be, since nothing depends on them."""
    found = of.get(name) if isinstance(of, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _listed(value: Json) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
