"""What the plans of nnU-Net's and its `dataset.json` say, as a spec."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ModelFileError
from ...io.labels import Label
from ...io.protocols import Json
from ...models.spec import Crop, ModelSpec
from ...volumes.views.intensities import Intensity

__all__ = ["Labels", "channel_names", "configuration_of", "resamples_labels_by_torch", "spec_of"]

# Where a separate interpolation of slices begins.
THICK = 3.0
READERS = {
    "SimpleITKIO": "native",
    "NibabelIO": "native",
    "SimpleITKIOWithReorient": "RAS",
    "NibabelIOWithReorient": "RAS",
}
# What functions of nnU-Net's that resample are given, beside what says which axis is resampled apart: name and value, if these
# are the only ones that are supported.
FOR_LABELS = "memefficient_seg_resampling"
USUAL = {"order_z": 0, "mode": "linear", "aniso_axis_mode": "nearest-exact", FOR_LABELS: False}
IGNORED = ("num_threads", "device")


def configuration_of(plans: Json, name: str, folder: Path, visited: tuple[str, ...] = ()) -> dict[str, Any]:
    """Give a configuration, with what it inherits from others.

    Raises:
        ModelFileError: if there is none of this name.
    """
    configurations = plans.get("configurations", {})
    if name not in configurations:
        there = ", ".join(configurations) or "none"
        raise ModelFileError(f"the checkpoint is of the configuration {name}, but {folder / 'plans.json'} has {there}")
    if name in visited:
        raise ModelFileError(f"configurations of {folder / 'plans.json'} inherit from one another in a circle: {visited}")
    own = dict(configurations[name])
    parent = own.pop("inherits_from", None)
    return own if parent is None else {**configuration_of(plans, parent, folder, (*visited, name)), **own}


def channel_names(dataset: Json, folder: Path) -> tuple[str, ...]:
    """Give the names of the input's channels, all different, in their order.

    Raises:
        ModelFileError: if the data set has none.
    """
    names = dataset.get("channel_names") or dataset.get("modality")
    if not isinstance(names, Mapping):
        raise ModelFileError(f"{folder / 'dataset.json'} has no channel_names")
    if not all(str(key).isdecimal() for key in names):  # the other way round, as some have it
        names = {number: name for name, number in names.items()}
    given = [str(names[key]) for key in sorted(names, key=int)]
    # Names need not differ there: what counts is the number.
    return tuple(given) if len(set(given)) == len(given) else tuple(f"{name}_{number:04d}" for number, name in enumerate(given))


@dataclass(frozen=True)
class Labels:
    """What the outputs mean."""

    names: tuple[Label, ...]
    regions: tuple[int, ...]
    foreground: tuple[int, ...]
    heads: int

    @classmethod
    def of(cls, dataset: Json, folder: Path) -> "Labels":
        """Read them from `dataset.json`.

        Raises:
            ModelFileError: if there are none, or regions without their order.
        """
        given = dataset.get("labels")
        if not isinstance(given, Mapping):
            raise ModelFileError(f"{folder / 'dataset.json'} has no labels")
        kept = {name: value for name, value in given.items() if name != "ignore"}
        has_regions = any(isinstance(value, list) and len(value) > 1 for value in kept.values())
        flat = {int(each) for value in kept.values() for each in (value if isinstance(value, list) else [value])}
        foreground = tuple(sorted(flat - {0}))
        if not has_regions:
            single = {name: int(value[0] if isinstance(value, list) else value) for name, value in kept.items()}
            names = tuple(Label(value, name) for name, value in sorted(single.items(), key=lambda item: item[1]) if value)
            return cls(names, (), foreground, len(flat | {0}))
        order = dataset.get("regions_class_order")
        regions = [
            name for name, value in kept.items() if {int(each) for each in (value if isinstance(value, list) else [value])} != {0}
        ]
        if not isinstance(order, list) or len(order) != len(regions):
            raise ModelFileError(f"{folder / 'dataset.json'} has {len(regions)} regions, and regions_class_order is {order!r}")
        names = tuple(Label(int(value), name) for name, value in zip(regions, order, strict=True))
        return cls(names, tuple(map(int, order)), foreground, len(regions))


def spec_of(
    plans: Json, channels: tuple[str, ...], configuration: Mapping[str, Any], labels: Labels, mirrored: Any, folder: Path
) -> ModelSpec:
    """Say what a model expects, and what is made of its scores.

    Args:
        plans: all that the plans say.
        channels: names of the input's channels.
        configuration: the part of the plans that the model was trained with.
        labels: what the outputs mean.
        mirrored: axes along which patches are mirrored, in the order of nnU-Net's arrays.
        folder: the model's, for errors.

    Raises:
        ModelFileError: if something is not supported; names it.
    """
    for place, name, known in (
        (configuration, "preprocessor_name", "DefaultPreprocessor"),
        (plans, "label_manager", "LabelManager"),
    ):
        if place.get(name, known) != known:
            raise _not_supported(folder, f"has {name} {place[name]!r}, and {known} is supported")
    reader = plans.get("image_reader_writer", "SimpleITKIO")
    if reader not in READERS:
        raise ModelFileError(f"{folder / 'plans.json'} reads images with {reader}, and {', '.join(READERS)} are supported")
    forward = [int(axis) for axis in plans.get("transpose_forward", (0, 1, 2))]
    size = [int(each) for each in configuration["patch_size"]]
    is_flat = len(size) == 2
    spacing = [*([None] if is_flat else []), *map(float, configuration["spacing"])]
    image = _Resampling.of(configuration, "data", folder)
    for name in ("probabilities", *(["seg"] if configuration.get("previous_stage") else [])):
        other = _Resampling.of(configuration, name, folder)
        if (image.thick, image.is_none) != (other.thick, other.is_none) or other.order != 1:
            how = "linearly, and with the same slices apart as the image"
            raise _not_supported(folder, f"resamples {name} otherwise than is supported: {how}")
    if image.is_none:
        spacing = [None] * 3
    axes = [int(axis) + is_flat for axis in mirrored or ()]
    return ModelSpec(
        channels=channels,
        orientation=READERS[reader],
        # Arrays of nnU-Net have their axes the other way round.
        axes=tuple(2 - axis for axis in forward),  # type: ignore[arg-type]
        crop=Crop(),
        intensity=tuple(_intensities(plans, configuration, len(channels), folder)),
        spacing=tuple(spacing),  # type: ignore[arg-type]
        fits="volume",
        order=image.order,
        thick_slices=image.thick,
        patch_size=tuple(size),
        patch_overlap=0.5,
        patch_spacing="even",
        overlap_mode="nnunet",
        slice_axis=0 if is_flat else None,
        mirror_axes=tuple(axes),
        reduce=0.0 if labels.regions else "argmax",
        regions=labels.regions,
        labels=labels.names,
    )


def resamples_labels_by_torch(configuration: Mapping[str, Any]) -> bool:
    """Whether the labels of a stage before are resampled by PyTorch."""
    return str(configuration.get("resampling_fn_seg", "")).startswith("resample_torch")


def _not_supported(folder: Path, what: str) -> ModelFileError:
    """Say what of the plans is not done here as nnU-Net does it, and what to do."""
    return ModelFileError(
        f"{folder / 'plans.json'} {what}. Predict with nnU-Net, or export the network with torch.export and give a spec for it"
    )


@dataclass(frozen=True)
class _Resampling:
    """How images, or scores, are resampled."""

    order: int
    thick: float | None
    is_none: bool

    @classmethod
    def of(cls, configuration: Mapping[str, Any], name: str, folder: Path) -> "_Resampling":
        """Read it from the plans.

        Raises:
            ModelFileError: if it is not supported; names what.
        """
        key = f"resampling_fn_{name}"
        function = str(configuration.get(key, "resample_data_or_seg_to_shape"))
        is_torch = function.startswith("resample_torch")
        usual = {"force_separate_z": None} if is_torch else {"order": 3 if name == "data" else 1, "force_separate_z": None}
        options = dict(configuration.get(f"{key}_kwargs", usual))
        if function == "no_resampling_data_or_seg_to_shape":
            return cls(1, None, True)
        if function not in ("resample_data_or_seg_to_shape", "resample_torch_fornnunet", "resample_torch_simple"):
            raise _not_supported(folder, f"has {key} {function!r}, which is not supported")
        is_labels = name == "seg"
        if options.pop("is_seg", is_labels) is not is_labels:
            raise _not_supported(folder, f"has another is_seg in {key}_kwargs than nnU-Net writes")
        order = 1 if is_torch else int(options.pop("order", 3))
        separate = options.pop("force_separate_z", None if is_torch else False)
        limit = float(options.pop("separate_z_anisotropy_threshold", THICK))
        for option, value in options.items():
            is_ignored = option in IGNORED or (option == FOR_LABELS and not is_labels)
            if not is_ignored and (option not in USUAL or value != USUAL[option]):
                raise _not_supported(folder, f"has {option} {value!r} in {key}_kwargs, which is not supported")
        if order not in (0, 1, 3):
            raise _not_supported(folder, f"has order {order} in {key}_kwargs: 0, 1 and 3 are supported")
        # Of torch's, one function leaves no axis apart.
        if function == "resample_torch_simple":
            separate = False
        return cls(order, limit if separate is None else 1.0 if separate else None, False)


def _intensities(plans: Json, configuration: Mapping[str, Any], count: int, folder: Path) -> list[Intensity]:
    properties = plans.get("foreground_intensity_properties_per_channel") or plans.get(
        "foreground_intensity_properties_by_modality", {}
    )
    made = []
    schemes = configuration["normalization_schemes"]
    masked = configuration.get("use_mask_for_norm", [False] * len(schemes))
    if not len(schemes) == len(masked) == count:
        raise ModelFileError(
            f"{folder / 'plans.json'} has {len(schemes)} normalization_schemes and {len(masked)} use_mask_for_norm for {count}"
            " channels"
        )
    for channel, (scheme, is_masked) in enumerate(zip(schemes, masked, strict=True)):
        if scheme == "CTNormalization":
            own = properties[str(channel)]
            clip = (float(own["percentile_00_5"]), float(own["percentile_99_5"]))
            made.append(Intensity(clip=clip, scale="z-score", mean=float(own["mean"]), std=float(own["std"])))
        elif scheme == "ZScoreNormalization":
            made.append(Intensity(scale="z-score", over="mask" if is_masked else "all"))
        elif scheme == "RescaleTo01Normalization":
            made.append(Intensity(scale="range"))
        elif scheme == "RGBTo01Normalization":
            made.append(Intensity(scale="range", low=0.0, high=255.0))
        elif scheme == "NoNormalization":
            made.append(Intensity())
        else:
            raise ModelFileError(f"{folder / 'plans.json'} normalises channel {channel} by {scheme}, which is not known")
    return made
