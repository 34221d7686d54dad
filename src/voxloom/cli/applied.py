"""From options of the command to a model that can be applied."""

from dataclasses import replace
from typing import Any

import torch

from ..core.grid.grids import check_patch_spacing
from ..core.grid.windows import MODES, Gaussian, OverlapMode
from ..core.sizes import pretty_sizes
from ..errors import ModeError, SizeError
from ..inference import Predictor
from ..models.loading import LoadedModel, load_model
from ..models.spec import ModelSpec
from .options import ModelOptions, numbers
from .others import LoadingOptions, other_model

__all__ = ["predictor_of"]


def predictor_of(options: ModelOptions, executor: Any = None) -> tuple[Predictor, LoadedModel]:
    """Make a predictor, whose parts may be computed elsewhere, and give what is known of its model."""
    loaded = _loaded(options)
    spec = loaded.spec if options.spec is None else ModelSpec.read(options.spec)
    given = ("argmax" if options.labels else None, options.threshold, numbers(options.channels, int, "channels"))
    reductions = [value for value in given if value is not None]
    if len(reductions) > 1:
        raise ModeError("of --labels, --threshold and --channels only one can be given")
    size, number = _sizes(options, loaded, spec)
    predictor = Predictor(
        replace(loaded, spec=spec),
        size,
        _one_or_all(numbers(options.overlap, lambda text: int(text) if text.isdecimal() else float(text), "overlap")),
        _as_mode(options.mode),
        context=_one_or_all(numbers(options.context, int, "context")),
        slice_axis=options.slice_axis,
        patch_spacing=None if options.patch_spacing is None else check_patch_spacing(options.patch_spacing),
        batch_size=number,
        device=options.device,
        amp=options.amp,
        dtype=_as_dtype(options.dtype),
        activation=None if options.activation is None else options.activation.value,
        reduce=reductions[0] if reductions else None,
        padding_mode=_number_or_text(options.padding),
        interpolation=None if options.interpolation is None else _one_or_all(options.interpolation.split(",")),
        mirror_axes=() if options.mirror == "none" else numbers(options.mirror, int, "mirror"),
        memory_limit=options.memory_limit,
        executor=executor,
        full_batches=size is not None and -1 not in size and loaded.takes_full_batches(size),
    )
    return predictor, loaded


def _loaded(options: ModelOptions) -> LoadedModel:
    other = other_model(options.model)
    if other is not None:
        folds = None if options.folds is None else [fold.strip() for fold in options.folds.split(",")]
        given = LoadingOptions(options.weights, folds, options.checkpoint, options.allow_pickle, options.allow_code)
        return other[0].load(other[1], given)
    given = LoadingOptions(options.weights, None, None, options.allow_pickle, options.allow_code)
    given.refuse("a model of one's own", folds=options.folds, checkpoint=options.checkpoint, allow_code=options.allow_code)
    return load_model(options.model, options.weights, options.allow_pickle)


def _sizes(options: ModelOptions, loaded: LoadedModel, spec: ModelSpec | None) -> tuple[list[int] | None, int | None]:
    """Give the sizes that are asked for, or else those that the model is fixed to; None for what its spec says."""
    asked = numbers(options.patch_size, int, "patch-size")
    of_slices = options.slice_axis is not None or (spec is not None and spec.slice_axis is not None)
    if asked is not None and len(asked) == 1:
        asked *= 2 if of_slices else 3
    fixed = loaded.patch_size
    is_specified = spec is not None and spec.patch_size is not None
    if asked is None and is_specified:
        return None, options.batch_size
    if of_slices:
        if asked is None:
            raise SizeError("the patch size is missing: give --patch-size height,width of the slices")
        return asked, options.batch_size or 1
    if asked is not None and any(own not in (None, each) for own, each in zip(fixed, asked, strict=False)):
        raise SizeError(
            f"the patch size is {pretty_sizes(asked)}, but the model was exported for {pretty_sizes(fixed)}: ask for that,"
            " or export it anew"
        )
    if options.batch_size is not None and loaded.batch_size not in (None, options.batch_size):
        raise SizeError(
            f"the batch size is {options.batch_size}, but the model was exported for {loaded.batch_size}: leave out"
            " --batch-size, or export it anew"
        )
    size = asked or [each for each in fixed if each is not None]
    if asked is not None and len(asked) != len(fixed):
        raise SizeError(f"--patch-size is {options.patch_size}: give one number, or {len(fixed)} with commas between them")
    if len(size) < len(fixed):
        own = "has none of its own" if set(fixed) == {None} else f"was exported for {pretty_sizes(fixed)}"
        raise SizeError(f"the patch size is missing, and the model {own}: give --patch-size, such as --patch-size 128")
    number = loaded.least_batch_size(None if -1 in size else size) if options.batch_size is None else options.batch_size
    if -1 not in size:
        loaded.check_sizes(number, size)
    return size, number


def _one_or_all(values: list[Any] | None) -> Any:
    return values[0] if values is not None and len(values) == 1 else values


def _as_mode(text: str | None) -> OverlapMode | None:
    if text is None:
        return None
    name, colon, width = text.partition(":")
    if not colon and name not in (*MODES, "monai"):
        raise ModeError(f"--mode is {text!r}: it must be one of {', '.join(MODES)} and monai, or such as gaussian:0.25")
    if not colon:
        return text
    widths = numbers(width, float, "mode") or []
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
