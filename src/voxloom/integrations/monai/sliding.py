"""Sliding-window inference as MONAI calls it, by voxloom's engine."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...core.boxes import Box
from ...core.geometry.affines import Affine
from ...core.grid.windows import MONAI, Gaussian
from ...core.values import sum_dtype
from ...errors import ModeError, OutputError, SizeError
from ...inference.predictor import Predictor
from ...inference.reductions import AfterSum, as_reduction
from ...io.arrays.composed import StackedSource
from ...io.arrays.memory import ArraySource
from ...io.protocols import Json, SpaceCodes, VolumeSource
from ...volumes.libraries import imported
from .windows import WindowsNetwork

__all__ = ["shared", "sliding_window_inference"]

PADDING = ("constant", "reflect", "replicate", "circular")


def sliding_window_inference(
    inputs: Tensor,
    roi_size: Sequence[int] | int,
    sw_batch_size: int,
    predictor: Callable[..., Any],
    overlap: Sequence[float] | float = 0.25,
    mode: Any = "constant",
    sigma_scale: Sequence[float] | float = 0.125,
    padding_mode: str = "constant",
    cval: float = 0.0,
    sw_device: Any = None,
    device: Any = None,
    progress: bool = False,
    roi_weight_map: Tensor | None = None,
    process_fn: Callable[..., Any] | None = None,
    buffer_steps: int | None = None,
    buffer_dim: int = -1,
    with_coord: bool = False,
    *args: Any,
    reduce: Any = None,
    memory_limit: int | str | None = None,
    **kwargs: Any,
) -> Any:
    """Apply a network to a batch of volumes, window by window, as MONAI's function of this name does.

    Arguments, windows, padding, weights and results are MONAI's. The sum of the windows is gathered in order, so that it is never
    held twice; with `reduce`, scores are never held at all. There is no gradient through it.

    Args:
        inputs: batch `(B, C, I, J, K)`, or of slices `(B, C, I, J)`. A `MetaTensor` gives one back.
        roi_size: voxels of a window; -1, 0 or None is all of an axis.
        sw_batch_size: windows that the network is given at a time.
        predictor: the network, called with a batch of windows as `predictor(windows, *args, **kwargs)`. It is called as it is: in
            training mode, if that is what it is in.
        overlap: fraction of a window that neighbours share.
        mode: `"constant"` or `"gaussian"`, with MONAI's weights; or any `overlap_mode` of voxloom's.
        sigma_scale: width of the Gaussian, as a part of the window.
        padding_mode: how a volume that is smaller than a window is padded: a mode of `torch.nn.functional.pad`.
        cval: value of padding of the mode `"constant"`.
        sw_device: where the network runs; None for where the inputs are.
        device: where the result goes; None for where the inputs are. It is summed in the memory of the CPU in any case.
        progress: show how far it has come.
        roi_weight_map: weights of a window, in place of those of the mode.
        process_fn: called with the outputs, the windows and the weights, and returns outputs and weights.
        buffer_steps: accepted, and not needed.
        buffer_dim: likewise.
        with_coord: call the network as `predictor(windows, coordinates, ...)`, with a list of slices for each window.
        *args: further arguments of the network.
        reduce: see `Predictor`: `"argmax"` gives labels.
        memory_limit: see `Predictor`.
        **kwargs: further arguments of the network. `condition`, a batch of as many volumes of that size, whose channels may be
            others, is cut into windows with the inputs.

    Returns:
        What the network returns, for the whole volume: a tensor, a tuple or a dict.

    Raises:
        SizeError: if the window, its weights or the condition do not fit the inputs.
        ModeError: if there is no such padding mode.
        OutputError: if gradients of the inputs are asked for, or the network returns something else than tensors.

    Example:
        >>> import torch
        >>> from voxloom.integrations.monai import sliding_window_inference
        >>> network = torch.nn.Conv3d(1, 2, kernel_size=3, padding=1)
        >>> sliding_window_inference(torch.rand(1, 1, 40, 30, 20), 16, 4, network, overlap=0.5, mode="gaussian").shape
        torch.Size([1, 2, 40, 30, 20])
    """
    if torch.is_grad_enabled() and inputs.requires_grad:
        raise OutputError("there is no gradient through sliding windows: call it under torch.no_grad(), or detach the inputs")
    spatial = tuple(inputs.shape[2:])
    if len(spatial) not in (2, 3) or not len(inputs):
        raise SizeError(
            f"the inputs have shape {tuple(inputs.shape)}: they must be (B, C, I, J, K) or (B, C, I, J), and not empty"
        )
    shape = _window(roi_size, spatial)
    overlaps = _each(overlap, len(shape))
    if len(overlaps) != len(shape) or not all(0 <= part < 1 for part in overlaps):
        raise SizeError(
            f"overlap is {overlap}: it must be a fraction of the window, at least 0 and below 1, or one for each axis of voxels"
        )
    name = str(getattr(padding_mode, "value", padding_mode))
    if name not in PADDING:
        raise ModeError(f"padding_mode is {padding_mode!r}: it must be one of {', '.join(map(repr, PADDING))}")
    plain = inputs.as_subclass(Tensor) if type(inputs) is not Tensor else inputs
    condition = _as_condition(kwargs.pop("condition", None), plain)
    weights_dtype = sum_dtype(plain.dtype) if plain.is_floating_point() else torch.float32
    weights, overlap_mode = _weights(mode, shape, sigma_scale, roi_weight_map, process_fn is not None, weights_dtype)
    runs_on = torch.device(inputs.device if sw_device is None else sw_device)
    network = WindowsNetwork(predictor, args, kwargs, plain, condition, with_coord, weights, process_fn)
    make = partial(
        Predictor,
        network,
        list(shape),
        [shared(size, part) for size, part in zip(shape, overlaps, strict=True)],
        overlap_mode,
        slice_axis=2 if len(shape) == 2 else None,
        batch_size=sw_batch_size,
        device=runs_on,
        # As it is around this call.
        amp=torch.get_autocast_dtype(runs_on.type) if torch.is_autocast_enabled(runs_on.type) else False,
        reduce=_reduction(reduce, weights),
        memory_limit=memory_limit,
    )
    chosen, made = make(), []
    common = _common_dtype(plain, condition, with_coord)
    for number, volume in enumerate(plain):
        volume, cut = _padded(volume, shape, name, cval)
        also = None if condition is None else _padded(condition[number], shape, name, cval)[0]
        network.begin(number)
        source = _source(volume, also, with_coord, common)
        try:
            result = chosen(source, progress=progress)
        except OutputError:
            if number or not network.scales:
                raise
            # The sizes of its outputs show at which scale they are.
            chosen = make(output_scale=network.scales if len(network.scales) > 1 else next(iter(network.scales.values())))
            result = chosen(source, progress=progress)
        results = result if isinstance(result, dict) else {None: result}
        made.append({name: _cropped(image.data, cut, volume.shape[1:], len(spatial)) for name, image in results.items()})
    return network.restored({name: _stacked([each[name] for each in made], inputs, device) for name in made[0]})


def _window(roi_size: Any, spatial: tuple[int, ...]) -> tuple[int, ...]:
    sizes = _each(roi_size, len(spatial))
    if len(sizes) != len(spatial):
        raise SizeError(f"roi_size is {roi_size}, but the inputs have {len(spatial)} axes of voxels: (B, C, {spatial})")
    return tuple(whole if size is None or size <= 0 else int(size) for size, whole in zip(sizes, spatial, strict=True))


def _each(given: Any, count: int) -> list[Any]:
    """Give an argument that is a number, or one for each axis, as the latter."""
    return list(given) if isinstance(given, Iterable) else [given] * count


def shared(size: int, part: float) -> int:
    """Give the voxels that windows share, by MONAI's own arithmetic: 0.8 of 20 are 17, since `20 * (1 - 0.8)` is below 4.

    Source: MONAI Consortium, `sliding_window_inference`, https://docs.monai.io/en/stable/inferers.html.

    Example:
        >>> shared(20, 0.8), shared(20, 0.75), shared(4, 0.9)
        (17, 15, 3)
    """
    return size - max(1, int(size * (1 - part)))


def _as_condition(given: Any, inputs: Tensor) -> Tensor | None:
    if given is None:
        return None
    expected = (len(inputs), *inputs.shape[2:])
    if not isinstance(given, Tensor) or given.ndim != inputs.ndim or (len(given), *given.shape[2:]) != expected:
        what = f"of shape {tuple(given.shape)}" if isinstance(given, Tensor) else f"a {type(given).__name__}"
        raise SizeError(
            f"condition is {what}, but the inputs have shape {tuple(inputs.shape)}: it must be a tensor of as many volumes,"
            " and of the same size; its channels may be others"
        )
    return given.as_subclass(Tensor)


def _common_dtype(inputs: Tensor, condition: Tensor | None, with_coord: bool) -> torch.dtype | None:
    """Give a type that holds each value of both, where one is of whole numbers and the other is not; None where any does.

    Raises:
        ModeError: if there is none, since the whole numbers are too large.
    """
    if condition is None or inputs.is_floating_point() == condition.is_floating_point():
        return None
    whole, other = (condition, inputs) if inputs.is_floating_point() else (inputs, condition)
    if whole.dtype not in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        whole = whole.double()  # for which there is a least and a largest value
    largest = max(abs(int(value)) for value in whole.aminmax()) if whole.numel() else 0
    for dtype in (torch.float32 if with_coord else other.dtype, torch.float32, torch.float64):
        if largest <= 2 / torch.finfo(dtype).eps:
            return torch.promote_types(dtype, other.dtype)
    raise ModeError(
        f"of the condition and the inputs one has whole numbers of up to {largest}, and the other has not: above 2**53 both must"
        " have whole numbers"
    )


def _weights(
    mode: Any, shape: tuple[int, ...], sigma_scale: Any, given: Any, is_changed: bool, dtype: torch.dtype
) -> tuple[Any, Any]:
    """Give the weights of a window, and by which of voxloom's modes it is summed: where there are weights, all count alike."""
    if given is not None:
        weights = torch.as_tensor(given).to(dtype)
        if tuple(size for size in weights.shape if size != 1) != tuple(size for size in shape if size != 1):
            raise SizeError(f"roi_weight_map has shape {tuple(weights.shape)}, but a window has {shape} voxels")
        return weights.reshape(shape), "average"
    name = str(getattr(mode, "value", mode)) if not isinstance(mode, Gaussian) else mode
    if name == "constant":
        return (torch.ones(shape) if is_changed else None), "average"
    if name == "gaussian":
        scales = [float(scale) for scale in _each(sigma_scale, len(shape))]
        window = Gaussian(scales + [1.0] * (3 - len(shape)), floor=MONAI.floor)
        return (window.of_patch(shape), "average") if is_changed else (None, window)
    return (torch.ones(shape) if is_changed else None), name


def _padded(volume: Tensor, shape: tuple[int, ...], mode: str, value: float) -> tuple[Tensor, tuple[slice, ...]]:
    """Pad a volume `(C, ...)` that is smaller than a window as MONAI does, and say where it lies in what comes of it."""
    missing = [max(size - length, 0) for size, length in zip(shape, volume.shape[1:], strict=True)]
    before = [count // 2 for count in missing]
    cut = tuple(slice(first, first + length) for first, length in zip(before, volume.shape[1:], strict=True))
    if not any(missing):
        return volume, cut
    pairs = [(first, count - first) for first, count in zip(before, missing, strict=True)]
    sides = [side for pair in reversed(pairs) for side in pair]
    return functional.pad(volume[None], sides, mode=mode, **({"value": value} if mode == "constant" else {}))[0], cut


def _source(volume: Tensor, condition: Tensor | None, with_coord: bool, common: torch.dtype | None) -> VolumeSource:
    volumes = [each if each.ndim == 4 else each[..., None] for each in (volume, condition) if each is not None]
    sources: list[VolumeSource] = [ArraySource(each) for each in volumes]
    if with_coord:
        sources.append(_Coordinates(sources[0]))
    if len(sources) == 1:
        return sources[0]
    return StackedSource(sources, [f"part {number}" for number in range(len(sources))], check_place=False, dtype=common)


class _Coordinates:
    """The indices `(I, J, K)` of each voxel, as three channels."""

    resident_bytes = 0
    paths = ()

    def __init__(self, of: VolumeSource) -> None:
        self.dtype = torch.float32 if of.dtype.is_floating_point else torch.int32  # either holds those of any volume
        self.shape = (3, *of.shape[1:])
        self.chunks = of.chunks
        self.affine: Affine = of.affine
        self.codes = SpaceCodes()

    def read(self, box: Box) -> Tensor:
        """See `VolumeSource`."""
        axes = [torch.arange(part.start, part.stop, dtype=self.dtype) for part in box.slices]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"))

    def fingerprint(self) -> Json:
        """See `VolumeSource`."""
        return {"coordinates": list(self.shape)}


def _reduction(reduce: Any, weights: Tensor | None) -> Any:
    return reduce if weights is None else AfterSum("divide_signed", as_reduction(reduce))


def _cropped(data: Tensor, cut: Sequence[slice], whole: Sequence[int], ndim: int) -> Tensor:
    """Cut out of a result what is not padding, and the axis that slices do not have."""
    data = data if ndim == 3 else data[..., 0]
    parts = []
    for part, given, made in zip(cut, whole, data.shape[1:], strict=True):
        scale = made / given
        parts.append(slice(round(part.start * scale), round(part.stop * scale)))
    return data[(slice(None), *parts)]


def _stacked(results: list[Tensor], inputs: Any, device: Any) -> Tensor:
    whole = results[0][None] if len(results) == 1 else torch.stack(results)
    is_score = whole.is_floating_point() and inputs.is_floating_point()
    whole = whole.to(inputs.device if device is None else device, inputs.dtype if is_score else whole.dtype)
    if not hasattr(inputs, "meta"):
        return whole
    convert: Any = imported("monai", "monai").data.MetaTensor
    return convert(whole).copy_meta_from(inputs, copy_attr=False)
