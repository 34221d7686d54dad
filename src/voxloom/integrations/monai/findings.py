"""What the configuration of a bundle of MONAI amounts to, as a spec: its transforms and its inferer."""

import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...inference.reductions import as_reduction
from ...models.spec import Crop
from ...volumes.views.intensities import Intensity
from .configuration import CODE, PREDICTION, Component, Configuration, listed
from .sliding import shared

__all__ = ["Findings"]

# Transforms that change nothing for a model here: images are read, have channels, and come as the type of the weights.
READING = ("LoadImage", "EnsureChannelFirst", "EnsureType", "ToTensor", "CastToType", "ToDevice")
WRITING = ("SaveImage", "EnsureType", "ToTensor", "CastToType", "ToDevice")
# Arguments of an inferer: those that are taken over, and those by which the labels do not change.
OF_WINDOWS = frozenset(
    [
        "roi_size",
        "overlap",
        "mode",
        "sigma_scale",
        "padding_mode",
        "cval",
        "with_coord",
        "memory_limit",
        "sw_batch_size",
        "sw_device",
        "device",
        "progress",
        "cache_roi_weight_map",
        "cpu_thresh",
        "buffer_steps",
        "buffer_dim",
    ]
)
# Types that hold what is read, however they are written.
FLOAT = re.compile(r"\$?(torch\.|numpy\.|np\.)?(float|float32|float64|double)")
AXES = [["L", "R"], ["P", "A"], ["I", "S"]]


@dataclass
class Findings:
    """The spec that a configuration amounts to."""

    configuration: Configuration
    values: dict[str, Any] = field(default_factory=dict)
    reduce: Any = None
    """What is made of scores, if a spec cannot say it."""
    _is_resampled: bool = False
    _changes_space: bool = False
    _is_discrete: bool = False
    """Whether scores are labels by now."""
    _inverted: str | None = None
    """How they have been brought back to the grid of the image, if they have."""
    _late: tuple[Component, str] | None = None
    """An activation of what was interpolated, of which it turns out with the next step whether it can be done."""

    # Before the network

    def before(self, name: str) -> str:
        """Read the transforms before the network, and give the name of the image."""
        handlers: dict[str, Callable[[Component], None]] = {
            "Orientation": self._orientation,
            "Spacing": self._spacing,
            "CropForeground": self._crop,
            "ScaleIntensityRange": self._range,
            "ScaleIntensity": self._extremes,
            "NormalizeIntensity": self._normalize,
        }
        key: str | None = None
        for step in self.configuration.steps(name):
            keys = listed(step.get("keys", "image"))
            key = keys[0] if key is None else key
            if keys != [key]:
                step.refuse(f"it transforms {', '.join(map(str, keys))}, where one image, {key}, is understood")
            if step.kind in handlers:
                handlers[step.kind](step)
            elif step.kind in READING:
                self._reading(step)
            else:
                step.refuse("this transform is not understood")
        return "image" if key is None else key

    def _reading(self, step: Component) -> None:
        """Refuse what turns an image as it is read, or changes its values."""
        for name in ("as_closest_canonical", "reverse_indexing"):
            if step.written(name) not in ("", "False"):
                step.refuse(f"{name} is not understood: turn the image by Orientation")
        self._stays_float(step)

    def _stays_float(self, step: Component) -> None:
        if step.written("dtype") and FLOAT.fullmatch(step.written("dtype")) is None:
            step.refuse(f"its dtype is {step.written('dtype')!r}, and float32 and float64 are understood, which change nothing")

    def _orientation(self, step: Component) -> None:
        step.only("axcodes", "as_closest_canonical", "labels")
        if step.get("labels") not in (None, AXES):
            step.refuse(f"its labels are understood only as {AXES}")
        if self._changes_space or self.values.get("intensity"):
            step.refuse("an image can be turned only before anything else")
        self.values["orientation"] = "RAS" if step.get("as_closest_canonical") else "".join(step["axcodes"])
        self._changes_space = True

    def _spacing(self, step: Component) -> None:
        step.only("pixdim", "mode", "padding_mode", "diagonal", "align_corners", "dtype", "scale_extent", "recompute_affine")
        if self._is_resampled:
            step.refuse("an image can be resampled only once")
        if step.get("diagonal") or step.get("scale_extent") or step.get("recompute_affine"):
            step.refuse("diagonal, scale_extent and recompute_affine are understood only where they are false")
        if step.get("padding_mode", "border") not in ("border", ["border"]):
            step.refuse("what lies beyond the image is understood only as what is at its border")
        mode = listed(step.get("mode", "bilinear"))[0]
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

    def _crop(self, step: Component) -> None:
        step.only("source_key", "margin", "k_divisible", "allow_smaller", "mode", "start_coord_key", "end_coord_key")
        if self._is_resampled or self.values.get("intensity"):
            step.refuse("the foreground can be cut out only before anything is resampled or scaled")
        if step.get("k_divisible", 1) != 1 or (step.get("margin", 0) and not step.get("allow_smaller")):
            step.refuse("a margin is understood only with allow_smaller, and k_divisible only where it is 1")
        margin = listed(step.get("margin", 0))
        self.values["crop"] = Crop(above=0, margin=tuple((margin * 3)[:3]))
        self._changes_space = True

    def _range(self, step: Component) -> None:
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

    def _extremes(self, step: Component) -> None:
        step.only("minv", "maxv", "channel_wise", "dtype")
        self._needs_own_channels(step)
        self._scaled(step, Intensity(scale="range", onto=(step.get("minv", 0.0), step.get("maxv", 1.0))))

    def _normalize(self, step: Component) -> None:
        step.only("subtrahend", "divisor", "nonzero", "channel_wise", "dtype")
        mean, std = listed(step.get("subtrahend")), listed(step.get("divisor"))
        over: Any = "nonzero" if step.get("nonzero") else "all"
        if mean == [None] or std == [None]:
            self._needs_own_channels(step)
        count = max(len(mean), len(std))
        pairs = zip((mean * count)[:count], (std * count)[:count], strict=True)
        self._scaled(step, *[Intensity(scale="z-score", mean=each, std=other, over=over) for each, other in pairs])

    def _needs_own_channels(self, step: Component) -> None:
        """Refuse numbers that are those of all channels together."""
        network = self.configuration.component("network_def")
        if network is not None and network.get("in_channels", 1) != 1 and not step.get("channel_wise"):
            step.refuse("numbers of several channels together are not understood, only channel_wise")

    def _scaled(self, step: Component, *intensities: Intensity) -> None:
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
        if inferer.written("memory_limit"):
            inferer.warn("its memory_limit is not taken over: give one to predict (--memory-limit)")
        for name in inferer.arguments:
            if name not in OF_WINDOWS and inferer.written(name):
                inferer.refuse(f"its argument {name} is not understood")
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
        handlers: dict[str, Callable[[Component], None]] = {
            "Activations": self._activation,
            "Invert": self._invert,
            "AsDiscrete": self._discrete,
        }
        for step in self.configuration.steps(name):
            if step.kind not in WRITING and PREDICTION not in listed(step.get("keys", PREDICTION)):
                step.refuse(f"what is understood is made of {PREDICTION!r}")
            if step.kind in handlers:
                handlers[step.kind](step)
            elif step.kind in WRITING:
                self._writing(step)
            elif step.kind == "Lambda":
                self._function(step)
            else:
                step.refuse("this transform is not understood")
        if self._late is not None:
            self._late[0].refuse("after Invert, an activation is understood only before an AsDiscrete")
        if self._inverted is None and self._is_resampled:
            warnings.warn(
                f"{name} in {self.configuration.path} has no Invertd, so that MONAI may save labels on the grid of the model;"
                " here they are on that of the image, by the nearest voxels",
                RuntimeWarning,
                stacklevel=3,
            )
        self.values["interpolation"] = self._inverted or "nearest"

    def _activation(self, step: Component) -> None:
        self._is_before_functions(step)
        step.only("softmax", "sigmoid", "other")
        chosen = [each for each in ("softmax", "sigmoid") if step.own(each)]
        is_second = "activation" in self.values or self._late is not None
        if self._is_discrete or len(chosen) > 1 or step.own("other") is not None or is_second:
            step.refuse("one activation, softmax or sigmoid, is understood, before AsDiscrete")
        # The nearest voxel has the same value before and after; what lies beside the foreground has not.
        if chosen and (self._inverted == "linear" or (self._inverted == "nearest" and "crop" in self.values)):
            self._late = (step, chosen[0])
        elif chosen:
            self.values |= {"activation": chosen[0], "activates": "sums"}

    def _invert(self, step: Component) -> None:
        asked = bool(step.own("nearest_interp", True))
        nearest = asked or self._is_discrete or self.values.get("order") == 0
        self._inverted = "nearest" if nearest else "linear"
        if not nearest and self.values.get("order", 1) == 3:
            step.refuse("scores are interpolated back linearly or by the nearest voxel, not by splines as the image is")
        if self._is_discrete and not asked:
            step.warn("MONAI interpolates labels between one another here; they are those of the nearest voxels instead")

    def _discrete(self, step: Component) -> None:
        self._is_before_functions(step)
        step.only("argmax", "threshold", "to_onehot", "rounding", "dim", "keepdim", "dtype")
        if step.own("dim") not in (None, 0):
            step.refuse("labels are understood only as the largest of the channels, with dim 0")
        largest, threshold = step.own("argmax", False), step.own("threshold")
        if step.own("to_onehot") or step.own("rounding"):
            step.refuse("to_onehot and rounding are not understood")
        if self._is_discrete or bool(largest) == (threshold is not None):
            step.refuse("one of argmax and threshold is understood, once")
        if self._late is not None and not largest:
            threshold = _before_activation(*self._late, threshold, least=0.5 if "crop" in self.values else 0.0)
        elif not largest and "crop" in self.values and threshold <= 0:
            step.refuse("beside a foreground that is cut out, scores of MONAI's are 0: a threshold above 0 is understood")
        self.values["reduce"] = "argmax" if largest else threshold
        self._is_discrete, self._late = True, None  # the largest is so before an activation, too

    def _is_before_functions(self, step: Component) -> None:
        if self.reduce is not None:
            step.refuse("it comes after a function")

    def _writing(self, step: Component) -> None:
        if step.written("scale"):
            step.refuse("scale is not understood")
        if not self._is_discrete:
            self._stays_float(step)

    def _function(self, step: Component) -> None:
        if self.configuration.parser is None:
            step.refuse(f"its function is code: {CODE}")
        if self._late is not None:
            step.refuse("it comes after an activation of what Invert has interpolated")
        step.only("func", "overwrite", "inv_func", "track_meta")
        function = self.configuration.evaluated(f"{step.place}#func")
        step.warn("its function is called with a block of the volume at a time: what looks at neighbours gives something else")
        before = self.reduce if self.reduce is not None else self.values.pop("reduce", None)
        self.reduce = _Then(before, function)


def _before_activation(step: Component, activation: str, threshold: Any, least: float) -> float:
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
