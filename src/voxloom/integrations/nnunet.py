"""Trained models of nnU-Net v2, from their folders; nnU-Net itself is not needed.

Source: Isensee et al., nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation, Nature Methods
18, 203-211 (2021), https://doi.org/10.1038/s41592-020-01008-z.
"""

import contextlib
import importlib
import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.boxes import Box
from ..errors import MissingDependencyError, ModelFileError, VoxloomError
from ..inference.predictor import Predictor
from ..inference.specified import ModelInput
from ..io.composed import StackedSource
from ..io.files import hash_of_path
from ..io.labels import Label
from ..io.protocols import Json, Space, VolumeSource, read_checked
from ..models.loading import LoadedModel
from ..models.spec import Crop, ModelSpec
from ..volumes.intensities import Intensity
from ..volumes.views import ResampledSource, View

__all__ = ["cases_in", "json_of", "load"]

# Where a separate interpolation of slices begins.
THICK = 3.0
# What interpolated indicators of labels differ by, at most, that are as large as one another.
TIE = 1e-6
READERS = {
    "SimpleITKIO": "native",
    "NibabelIO": "native",
    "SimpleITKIOWithReorient": "RAS",
    "NibabelIOWithReorient": "RAS",
}
# Packages that networks and their layers may be of.
PACKAGES = ("dynamic_network_architectures.", "torch.nn.")
ARCHITECTURES = "dynamic_network_architectures.architectures"
EXTRA = "pip install 'voxloom[nnunet]'"


def load(
    folder: Any,
    folds: Sequence[int | str] | int | str | None = None,
    checkpoint: str = "checkpoint_final.pth",
    *,
    previous: Any = None,
    mirror: bool = True,
    allow_pickle: bool = False,
) -> LoadedModel:
    """Load a trained model of nnU-Net v2, with what it expects, for `Predictor` and `predict`.

    Its scores are made as nnU-Net makes them, in float32 where that sums in float16; they are interpolated back block by block,
    so that those of a whole volume are never held.

    Args:
        folder: the folder that holds `plans.json`, `dataset.json` and the folds.
        folds: numbers of the folds, or `"all"`; several are an ensemble. None takes all that are there.
        checkpoint: name of the file of weights in each fold.
        previous: of a cascade, the folder of the stage before; by default that beside this one. It runs first.
        mirror: whether patches are mirrored as well, along the axes that the training allows.
        allow_pickle: let checkpoints that hold more than weights and numbers run the code that they bring, and networks be of any
            package.

    Raises:
        ModelFileError: if the folder is no such model; says what is missing.
        MissingDependencyError: if the package of the networks is not installed.
    """
    folder = Path(folder).expanduser()
    plans, dataset = (json_of(folder, name) for name in ("plans.json", "dataset.json"))
    chosen = _folds_of(folder, folds, checkpoint)
    states = [_checkpoint(folder / f"fold_{fold}" / checkpoint, allow_pickle) for fold in chosen]
    names = {_configuration_name(state, folder, fold) for fold, state in zip(chosen, states, strict=True)}
    if len(names) > 1:
        raise ModelFileError(
            f"the folds of {folder} are of several configurations, {', '.join(sorted(names))}: give folds of one"
        )
    (name,) = names
    with _understood(folder / "dataset.json"):
        labels, names_of_channels = _Labels.of(dataset, folder), _channel_names(dataset, folder)
    axes = states[0].get("inference_allowed_mirroring_axes") if mirror else None
    with _understood(folder / "plans.json"):
        configuration = _configuration(plans, name, folder)
        stage = configuration.get("previous_stage")
        channels = len(names_of_channels) + (len(labels.foreground) if stage else 0)
        networks = [_network(configuration, channels, labels.heads, state, folder, allow_pickle) for state in states]
        spec = _spec(plans, names_of_channels, configuration, labels, axes, folder)
    identity = " ".join(hash_of_path(folder / f"fold_{fold}" / checkpoint) for fold in chosen)
    before = None
    if stage:
        beside = folder.with_name(folder.name.replace(name, str(stage)))
        before = _Cascade(
            load(previous or beside, folds, checkpoint, mirror=mirror, allow_pickle=allow_pickle), labels.foreground
        )
    return LoadedModel(networks if len(networks) > 1 else networks[0], f"nnU-Net {name} {identity}", spec=spec, preceding=before)


@contextlib.contextmanager
def _understood(path: Path) -> Iterator[None]:
    """Name the file of which something is missing, or of another kind than nnU-Net writes."""
    try:
        yield
    except VoxloomError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, AssertionError) as error:
        raise ModelFileError(f"{path} is not such as nnU-Net v2 writes: {error!r} is missing or wrong") from error


def cases_in(folder: Any, dataset: Json | None = None) -> dict[str, list[Path]]:
    """Find the cases in a folder of images that are named as nnU-Net names them, `CASE_0000.nii.gz`, in order of their channels.

    Args:
        folder: the folder.
        dataset: `dataset.json`, which may say the ending; None for any.

    Raises:
        ModelFileError: if a case lacks a channel that others have.
    """
    ending = None if dataset is None else dataset.get("file_ending")
    found: dict[str, dict[int, Path]] = {}
    for path in sorted(Path(folder).iterdir()):
        stem = path.name[: -len(ending)] if ending and path.name.endswith(ending) else path.name.partition(".")[0]
        if ending and not path.name.endswith(ending):
            continue
        case, underscore, number = stem.rpartition("_")
        if underscore and len(number) == 4 and number.isdecimal():
            found.setdefault(case, {})[int(number)] = path
    count = max((len(each) for each in found.values()), default=0)
    for case, files in found.items():
        if sorted(files) != list(range(count)):
            missing = next(number for number in range(count) if number not in files)
            raise ModelFileError(f"the case {case} in {folder} has no channel {missing:04d}, which others have")
    return {case: [files[number] for number in range(count)] for case, files in found.items()}


# What the folder says


def json_of(folder: Path, name: str) -> Json:
    """Read a file of a trained model's folder.

    Raises:
        ModelFileError: if it is not there, or damaged.
    """
    path = folder / name
    if not path.is_file():
        old = "; plans.pkl is of nnU-Net v1, which is not supported" if list(folder.glob("plans*.pkl")) else ""
        raise ModelFileError(
            f"there is no {path}: give the folder of a trained nnU-Net v2, such as"
            f" {_inner(folder) or 'nnUNetTrainer__nnUNetPlans__3d_fullres'}{old}"
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelFileError(f"{path} is damaged: {error}") from error
    if not isinstance(found, Mapping):
        raise ModelFileError(f"{path} is not such as nnU-Net v2 writes: it holds no object with names")
    return found


def _inner(folder: Path) -> Path | None:
    """Find the folder of a trained model in that of its data set."""
    return next((path.parent for path in sorted(folder.glob("*/plans.json"))), None) if folder.is_dir() else None


def _folds_of(folder: Path, folds: Any, checkpoint: str) -> list[str]:
    there = sorted(path.parent.name.removeprefix("fold_") for path in folder.glob(f"fold_*/{checkpoint}"))
    if folds is None or (folds in ("all", ["all"]) and "all" not in there):
        numbered = [fold for fold in there if fold != "all"]
        if not there:
            raise ModelFileError(f"{folder} has no fold with a {checkpoint}")
        return numbered or there
    wanted = [str(fold) for fold in ([folds] if isinstance(folds, int | str) else folds)]
    missing = [fold for fold in wanted if fold not in there]
    if missing or not wanted:
        listed = ", ".join(there) or "none"
        raise ModelFileError(f"{folder} has no fold {', '.join(missing)} with a {checkpoint}; there is {listed}")
    return wanted


def _checkpoint(path: Path, allow_pickle: bool) -> Mapping[str, Any]:
    from numpy import dtypes

    try:  # what the numbers of a training are, beside tensors
        from numpy._core.multiarray import scalar
    except ImportError:
        from numpy.core.multiarray import scalar  # type: ignore[no-redef]

    kinds = [np.dtype, *(getattr(dtypes, name) for name in ("Float64DType", "Float32DType", "Int64DType", "BoolDType"))]
    # Written by other versions of NumPy under another name.
    known = [scalar, (scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar"), *kinds]
    try:
        with torch.serialization.safe_globals(known):
            found = torch.load(path, map_location="cpu", weights_only=not allow_pickle)
    except pickle.UnpicklingError as error:
        raise ModelFileError(
            f"{path} holds more than weights and numbers: it would run code from the file, so give allow_pickle=True"
            f" (--allow-pickle) if you trust where it is from. ({str(error).splitlines()[0]})"
        ) from error
    except Exception as error:  # whatever a damaged file makes torch stumble over
        raise ModelFileError(f"{path} cannot be read: {str(error).splitlines()[0] if str(error) else error!r}") from error
    if not isinstance(found, Mapping) or not isinstance(found.get("network_weights"), Mapping):
        raise ModelFileError(f"{path} is no checkpoint of nnU-Net v2: it has no network_weights")
    return found


def _configuration_name(state: Mapping[str, Any], folder: Path, fold: str) -> str:
    try:
        return str(state["init_args"]["configuration"])
    except (KeyError, TypeError) as error:
        raise ModelFileError(f"the checkpoint of fold {fold} in {folder} does not say of which configuration it is") from error


def _configuration(plans: Json, name: str, folder: Path, visited: tuple[str, ...] = ()) -> dict[str, Any]:
    configurations = plans.get("configurations", {})
    if name not in configurations:
        there = ", ".join(configurations) or "none"
        raise ModelFileError(f"the checkpoint is of the configuration {name}, but {folder / 'plans.json'} has {there}")
    if name in visited:
        raise ModelFileError(f"configurations of {folder / 'plans.json'} inherit from one another in a circle: {visited}")
    own = dict(configurations[name])
    parent = own.pop("inherits_from", None)
    return own if parent is None else {**_configuration(plans, parent, folder, (*visited, name)), **own}


def _channel_names(dataset: Json, folder: Path) -> tuple[str, ...]:
    names = dataset.get("channel_names") or dataset.get("modality")
    if not isinstance(names, Mapping):
        raise ModelFileError(f"{folder / 'dataset.json'} has no channel_names")
    if not all(str(key).isdecimal() for key in names):  # the other way round, as some have it
        names = {number: name for name, number in names.items()}
    given = [str(names[key]) for key in sorted(names, key=int)]
    # Names need not differ there: what counts is the number.
    return tuple(given) if len(set(given)) == len(given) else tuple(f"{name}_{number:04d}" for number, name in enumerate(given))


@dataclass(frozen=True)
class _Labels:
    """What the outputs mean."""

    names: tuple[Label, ...]
    regions: tuple[int, ...]
    foreground: tuple[int, ...]
    heads: int

    @classmethod
    def of(cls, dataset: Json, folder: Path) -> "_Labels":
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


# The network


def _network(
    configuration: Mapping[str, Any], channels: int, heads: int, state: Mapping[str, Any], folder: Path, allow_pickle: bool
) -> nn.Module:
    architecture = configuration.get("architecture") or _old_architecture(configuration, folder)
    name, arguments = architecture["network_class_name"], dict(architecture["arch_kwargs"])
    for key in architecture.get("_kw_requires_import", ()):
        if arguments.get(key) is not None:
            arguments[key] = _imported(arguments[key], allow_pickle)
    kind = _imported(name, allow_pickle)
    try:
        network = kind(input_channels=channels, num_classes=heads, deep_supervision=False, **arguments)
    except TypeError as error:
        raise ModelFileError(f"{name} cannot be made of the plans in {folder}: {error}") from error
    weights = {key.removeprefix("module.").removeprefix("_orig_mod."): value for key, value in state["network_weights"].items()}
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise ModelFileError(
            f"the weights in {folder} do not fit the network of its plans, {name}. The trainer {state.get('trainer_name')} may"
            f" build another one: export that with torch.export, and give a spec. ({str(error).splitlines()[0]})"
        ) from error
    return network.eval()


def _imported(name: str, allow_pickle: bool) -> Any:
    if not allow_pickle and not name.startswith(PACKAGES):
        raise ModelFileError(
            f"the plans name {name}, which is of none of the packages {', '.join(each[:-1] for each in PACKAGES)}: give"
            " allow_pickle=True (--allow-pickle) if you trust where the model is from"
        )
    module, _, attribute = name.rpartition(".")
    if module.startswith(ARCHITECTURES) and attribute.endswith("UNet"):
        module = f"{ARCHITECTURES}.unet"  # where all of them are now, and were not always
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise MissingDependencyError(f"{name} is not installed ({error}): {EXTRA}") from error
    except AttributeError as error:
        raise ModelFileError(f"there is no {attribute} in {module}, which the plans name") from error


def _old_architecture(configuration: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Say what plans mean that were written before they named the network."""
    kinds = {
        "PlainConvUNet": ("dynamic_network_architectures.architectures.unet.PlainConvUNet", "n_conv_per_stage"),
        "ResidualEncoderUNet": ("dynamic_network_architectures.architectures.unet.ResidualEncoderUNet", "n_blocks_per_stage"),
    }
    kind = configuration.get("UNet_class_name")
    if kind not in kinds:
        raise ModelFileError(f"the plans in {folder} name no architecture that is known: UNet_class_name is {kind!r}")
    name, stages = kinds[kind]
    dimensions, count = len(configuration["patch_size"]), len(configuration["n_conv_per_stage_encoder"])
    most, base = configuration["unet_max_num_features"], configuration["UNet_base_num_features"]
    return {
        "network_class_name": name,
        "arch_kwargs": {
            "n_stages": count,
            "features_per_stage": [min(base * 2**stage, most) for stage in range(count)],
            "conv_op": f"torch.nn.modules.conv.Conv{dimensions}d",
            "kernel_sizes": configuration["conv_kernel_sizes"],
            "strides": configuration["pool_op_kernel_sizes"],
            stages: configuration["n_conv_per_stage_encoder"],
            "n_conv_per_stage_decoder": configuration["n_conv_per_stage_decoder"],
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dimensions}d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


# The spec


def _spec(
    plans: Json, channels: tuple[str, ...], configuration: Mapping[str, Any], labels: _Labels, mirrored: Any, folder: Path
) -> ModelSpec:
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


def _not_supported(folder: Path, what: str) -> ModelFileError:
    """Say what of the plans is not done here as nnU-Net does it, and what to do."""
    return ModelFileError(
        f"{folder / 'plans.json'} {what}. Predict with nnU-Net, or export the network with torch.export and give a spec for it"
    )


# What functions of nnU-Net's that resample are given, beside what says which axis is resampled apart: name and value, if these
# are the only ones that are supported.
USUAL = {"order_z": 0, "mode": "linear", "aniso_axis_mode": "nearest-exact"}
IGNORED = ("num_threads", "device", "memefficient_seg_resampling")


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
            if option not in IGNORED and (option not in USUAL or value != USUAL[option]):
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


# Cascades


@dataclass(frozen=True, eq=False)
class _Cascade:
    """Gives a stage the labels of the one before as more channels."""

    model: LoadedModel
    labels: tuple[int, ...]

    def added(self, image: VolumeSource, made: ModelInput, like: Space, options: Mapping[str, Any]) -> VolumeSource:
        """See `Preceding`."""
        found = Predictor(self.model, **options)(image, like=(like.shape, like.affine))
        source = made.source
        indicators: VolumeSource = _Indicators(made.turned_and_cropped(found), self.labels)
        labels = _Largest(indicators, made.space, [min(order, 1) for order in made.orders])
        return StackedSource([source, labels], ["the image", "the labels of the stage before"], check_place=False)


class _Indicators(View):
    """For each label a channel that is 1 where it is, and one for all else, which comes first."""

    def __init__(self, of: VolumeSource, labels: Sequence[int]) -> None:
        super().__init__(of)
        self.labels = tuple(labels)
        self.shape = (len(self.labels) + 1, *of.shape[1:])
        self.dtype, self.affine, self.chunks = torch.float32, of.affine, of.chunks

    def read(self, box: Box) -> Tensor:
        """See `VolumeSource`."""
        values = read_checked(self.of, box)[0]
        found = torch.stack([values == label for label in self.labels]).float()
        return torch.cat([1 - found.sum(0, keepdim=True), found])

    def fingerprint(self) -> Json:
        """See `VolumeSource`."""
        return {"indicators": list(self.labels), "of": self.of.fingerprint()}

    def over(self, source: VolumeSource) -> "_Indicators":
        """See `View`."""
        return _Indicators(source, self.labels)


class _Largest(View):
    """1 where a channel is the largest on another grid, else 0; without the first one. Of several, the nearest voxel's is taken.

    Args:
        of: the channels.
        space: the grid; None for their own.
        orders: how they are interpolated to it.
    """

    def __init__(self, of: VolumeSource, space: Space | None, orders: Sequence[int]) -> None:
        super().__init__(of)
        self._space, self._orders = space, tuple(orders)
        self._interpolated = of if space is None else ResampledSource(of, space, self._orders)
        self._nearest = of if space is None else ResampledSource(of, space, 0)
        self.shape = (of.shape[0] - 1, *self._interpolated.shape[1:])
        self.dtype, self.affine, self.chunks = of.dtype, self._interpolated.affine, self._interpolated.chunks

    def read(self, box: Box) -> Tensor:
        """See `VolumeSource`."""
        values = read_checked(self._interpolated, box)
        is_largest = values >= values.amax(0) - TIE
        nearest = read_checked(self._nearest, box).argmax(0)
        is_nearest = is_largest.gather(0, nearest[None])[0]
        largest = torch.where(is_nearest, nearest, is_largest.to(torch.uint8).argmax(0))
        return torch.stack([largest == number for number in range(1, self.of.shape[0])]).to(self.dtype)

    def fingerprint(self) -> Json:
        """See `VolumeSource`."""
        return {"largest": True, "of": self._interpolated.fingerprint()}

    def over(self, source: VolumeSource) -> "_Largest":
        """See `View`."""
        return _Largest(source, self._space, self._orders)
