"""What several commands have in common: how a model is loaded, and how it is applied."""

import dataclasses
import enum
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import torch
import typer

from ..core.grids import check_patch_spacing
from ..core.sizes import pretty_sizes
from ..core.windows import Gaussian, OverlapMode
from ..errors import ModeError, SizeError
from ..inference import Predictor
from ..models.loading import LoadedModel, load_model
from ..models.spec import ModelSpec
from .others import LoadingOptions, other_model

__all__ = ["AllowPickle", "ModelOptions", "spread"]

Number = TypeVar("Number", int, float)


class Activation(enum.StrEnum):
    """Activations by name."""

    softmax = "softmax"
    sigmoid = "sigmoid"


AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Let files of models run the code that they bring.")]


@dataclass(frozen=True)
class ModelOptions:
    """A model, and how it is applied, as it was said on the command line."""

    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A .pt2 program, a TorchScript file, package.module:callable, or, with --weights, a factory; nnunet:FOLDER is a"
            " trained nnU-Net, and monai:FOLDER a bundle.",
        ),
    ]
    spec: Annotated[
        Path | None,
        typer.Option(help="What the model expects (.json).  \\[default: what is in or beside its file]", show_default=False),
    ] = None
    weights: Annotated[Path | None, typer.Option(help="Weights for a factory: .safetensors, or a checkpoint.")] = None
    allow_pickle: AllowPickle = False
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Let MONAI evaluate the expressions in a bundle's configuration.")
    ] = False
    folds: Annotated[str | None, typer.Option(help="Folds of a trained nnU-Net, such as 0,1.  \\[default: all]")] = None
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="File of weights of each fold of a nnU-Net, or of a bundle.  \\[default: checkpoint_final.pth, or model.pt]"
        ),
    ] = None
    patch_size: Annotated[
        str | None, typer.Option(help="Voxels of a patch: a number, or three such as 160,160,64; -1 is all of an axis.")
    ] = None
    overlap: Annotated[
        str | None, typer.Option(help="What neighbours share: a fraction of the patch, or a number of voxels.  \\[default: 0.5]")
    ] = None
    mode: Annotated[
        str | None,
        typer.Option(
            help="crop, average, hann or gaussian, or gaussian:0.25 for a standard deviation of that part of a patch."
            "  \\[default: gaussian]"
        ),
    ] = None
    context: Annotated[
        str | None, typer.Option(help="Voxels around each patch that the model is given and does not predict.  \\[default: 0]")
    ] = None
    slice_axis: Annotated[int | None, typer.Option(help="Axis of the slices, for a 2-D model; patches are height,width.")] = None
    patch_spacing: Annotated[
        str | None, typer.Option(help="fixed, or even to spread the patches evenly, as nnU-Net does.  \\[default: fixed]")
    ] = None
    labels: Annotated[bool, typer.Option("--labels", help="Write the number of the largest channel, not all channels.")] = False
    threshold: Annotated[float | None, typer.Option(help="Write 1 where a channel is larger, else 0.")] = None
    channels: Annotated[str | None, typer.Option(help="Write these channels alone, such as 0,2.")] = None
    activation: Annotated[Activation | None, typer.Option(help="Act on each patch before patches are summed.")] = None
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Patches that the model is given at a time, at most.  \\[default: 1, or what a .pt2 was exported for]",
            show_default=False,
        ),
    ] = None
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1 or mps.  \\[default: where the weights are]", show_default=False)
    ] = None
    amp: Annotated[bool, typer.Option("--amp", help="Run the model in mixed precision.")] = False
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Type that the model is given.  \\[default: that of its weights, or the image's if it has none]",
            show_default=False,
        ),
    ] = None
    padding: Annotated[str | None, typer.Option(help="Pad the volume by half the overlap: edge, reflect, 0 ...")] = None
    mirror: Annotated[str | None, typer.Option(help="Mirror patches along these axes too, such as 0,1,2, and average.")] = None
    interpolation: Annotated[
        str | None,
        typer.Option(
            help="How scores get to another grid: linear or nearest, or three with commas, for each axis.  \\[default: linear]"
        ),
    ] = None
    memory_limit: Annotated[
        str | None, typer.Option(help="Memory beside the model's own, such as 2GiB.  \\[default: what is free]")
    ] = None

    def predictor(self) -> tuple[Predictor, LoadedModel]:
        """Make a predictor, and give what is known of its model."""
        loaded = self._loaded()
        spec = loaded.spec if self.spec is None else ModelSpec.read(self.spec)
        given = ("argmax" if self.labels else None, self.threshold, _numbers(self.channels, int, "channels"))
        reductions = [value for value in given if value is not None]
        if len(reductions) > 1:
            raise ModeError("of --labels, --threshold and --channels only one can be given")
        size, number = self._sizes(loaded, spec)
        predictor = Predictor(
            replace(loaded, spec=spec),
            size,
            _one_or_all(_numbers(self.overlap, lambda text: int(text) if text.isdecimal() else float(text), "overlap")),
            _as_mode(self.mode),
            context=_one_or_all(_numbers(self.context, int, "context")),
            slice_axis=self.slice_axis,
            patch_spacing=None if self.patch_spacing is None else check_patch_spacing(self.patch_spacing),
            batch_size=number,
            device=self.device,
            amp=self.amp,
            dtype=_as_dtype(self.dtype),
            activation=None if self.activation is None else self.activation.value,
            reduce=reductions[0] if reductions else None,
            padding_mode=_number_or_text(self.padding),
            interpolation=None if self.interpolation is None else _one_or_all(self.interpolation.split(",")),
            mirror_axes=_numbers(self.mirror, int, "mirror"),
            memory_limit=self.memory_limit,
            full_batches=size is not None and -1 not in size and loaded.takes_full_batches(size),
        )
        return predictor, loaded

    def _loaded(self) -> LoadedModel:
        other = other_model(self.model)
        if other is not None:
            folds = None if self.folds is None else [fold.strip() for fold in self.folds.split(",")]
            return other[0].load(other[1], LoadingOptions(folds, self.checkpoint, self.allow_pickle, self.allow_code))
        return load_model(self.model, self.weights, self.allow_pickle)

    def _sizes(self, loaded: LoadedModel, spec: ModelSpec | None) -> tuple[list[int] | None, int | None]:
        """Give the sizes that are asked for, or else those that the model is fixed to; None for what its spec says."""
        asked = _numbers(self.patch_size, int, "patch-size")
        of_slices = self.slice_axis is not None or (spec is not None and spec.slice_axis is not None)
        if asked is not None and len(asked) == 1:
            asked *= 2 if of_slices else 3
        fixed = loaded.patch_size
        is_specified = spec is not None and spec.patch_size is not None
        if asked is None and is_specified:
            return None, self.batch_size
        if of_slices:
            if asked is None:
                raise SizeError("the patch size is missing: give --patch-size height,width of the slices")
            return asked, self.batch_size or 1
        if asked is not None and any(own not in (None, each) for own, each in zip(fixed, asked, strict=False)):
            raise SizeError(
                f"the patch size is {pretty_sizes(asked)}, but the model was exported for {pretty_sizes(fixed)}: ask for that,"
                " or export it anew"
            )
        if self.batch_size is not None and loaded.batch_size not in (None, self.batch_size):
            raise SizeError(
                f"the batch size is {self.batch_size}, but the model was exported for {loaded.batch_size}: leave out"
                " --batch-size, or export it anew"
            )
        size = asked or [each for each in fixed if each is not None]
        if len(size) < len(fixed):
            own = "has none of its own" if set(fixed) == {None} else f"was exported for {pretty_sizes(fixed)}"
            raise SizeError(f"the patch size is missing, and the model {own}: give --patch-size, such as --patch-size 128")
        number = loaded.least_batch_size(None if -1 in size else size) if self.batch_size is None else self.batch_size
        if -1 not in size:
            loaded.check_sizes(number, size)
        return size, number


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command whose first parameter is a dataclass take the fields of that, each as a parameter of its own."""
    first, kind = next((name, hint) for name, hint in get_type_hints(command).items() if dataclasses.is_dataclass(hint))
    made: Any = kind
    fields = {each.name: each for each in dataclasses.fields(kind)}
    hints = get_type_hints(kind, include_extras=True)
    model, *options = (
        inspect.Parameter(
            name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=inspect.Parameter.empty if each.default is dataclasses.MISSING else each.default,
            annotation=hints[name],
        )
        for name, each in fields.items()
    )
    own = [each for name, each in inspect.signature(command).parameters.items() if name != first]

    @functools.wraps(command)
    def taking_all(**given: Any) -> None:
        command(made(**{name: given[name] for name in fields}), **{each.name: given[each.name] for each in own})

    parameters = [model, *own, *options]
    taking_all.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    taking_all.__annotations__ = {each.name: each.annotation for each in parameters}
    return taking_all


def _numbers(text: str | None, convert: Callable[[str], Number], name: str) -> list[Number] | None:
    if text is None:
        return None
    try:
        return [convert(part.strip()) for part in text.split(",")]
    except ValueError as error:
        raise SizeError(f"--{name} is {text!r}: give a number, or several with commas between them") from error


def _one_or_all(values: list[Any] | None) -> Any:
    return values[0] if values is not None and len(values) == 1 else values


def _as_mode(text: str | None) -> OverlapMode | None:
    if text is None:
        return None
    name, colon, width = text.partition(":")
    if not colon:
        return text
    widths = _numbers(width, float, "mode") or []
    if name != "gaussian":
        raise ModeError(f"--mode is {text!r}: only gaussian has a width")
    return Gaussian(widths)


def _number_or_text(text: str | None) -> str | float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def _as_dtype(name: str | None) -> torch.dtype | None:
    found = None if name is None else getattr(torch, name, None)
    if name is not None and not isinstance(found, torch.dtype):
        raise ModeError(f"--dtype is {name!r}: it must be a type of PyTorch's, such as float32 or float64")
    return found
