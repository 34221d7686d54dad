"""An image as a model expects it: turned, cropped, scaled and resampled, by its spec, when it is read."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from ..core.boxes import Box
from ..core.geometry.affines import scaled, spacing_of, stated_spacing
from ..core.geometry.interpolation import Interpolation
from ..core.sizes import pretty_mm, pretty_sizes
from ..core.walking import walk
from ..errors import MissingDependencyError, SpecError
from ..io.arrays.composed import StackedSource
from ..io.protocols import Space, VolumeSource, read_checked
from ..models.spec import NATIVE, ModelSpec
from ..volumes.libraries import found_subject
from ..volumes.subject import Subject
from ..volumes.views.intensities import Intensity, NormalizedSource, foreground_box
from ..volumes.views.spaces import at_spacing, at_spacing_of_monai
from ..volumes.views.spatial import CroppedSource, ResampledSource, TurnedSource
from .inputs import check_one_grid

__all__ = ["ModelInput", "filled_mask", "in_model_space", "looks_at_volume", "named_channels"]

View = Callable[[VolumeSource], VolumeSource]
"""Makes a view of a source."""

# Voxels that are looked at together.
CHUNK_VOXELS = 2**20


@dataclass(frozen=True, eq=False)
class ModelInput:
    """What a model is applied to."""

    source: VolumeSource
    steps: tuple[str, ...]
    """What was done to the image for it, in words."""
    orders: tuple[int, ...]
    """How the image was interpolated, along each axis of the model."""
    kinds: tuple[Interpolation, Interpolation, Interpolation]
    """How scores are interpolated back, along each axis of the model."""
    space: Space | None
    """The grid that it was resampled to; None where it was not."""
    turns_and_crops: tuple[View, ...]
    """What was done to the image before its values were scaled."""
    scales_and_resamples: tuple[View, ...]
    """What was done after that."""
    mask: np.ndarray | None = None
    """Which voxels counted as filled when values were scaled, where that mattered."""

    def over(self, source: VolumeSource) -> "ModelInput":
        """Give the same of another source of the same voxels."""
        return replace(self, source=_viewed(self.turned_and_cropped(source), self.scales_and_resamples))

    def turned_and_cropped(self, source: VolumeSource) -> VolumeSource:
        """Do with another source on the image's own grid what was done with the image before its values were scaled."""
        return _viewed(source, self.turns_and_crops)


def _viewed(source: VolumeSource, views: Sequence[View]) -> VolumeSource:
    for view in views:
        source = view(source)
    return source


def named_channels(image: Any, spec: ModelSpec, resample_to: str | None) -> Any:
    """Put the images of a subject in the order of the spec's channels.

    Args:
        image: what was given; all but a `Subject`, or a dict of images, stays as it is.
        spec: the spec.
        resample_to: name of the image on whose grid the others are resampled; None where all are on one grid.

    Raises:
        SpecError: if a channel is missing, or there is another one.
    """
    subject = found_subject(image)
    if subject is None or (not spec.channels and resample_to is None):
        return image if subject is None else subject
    images = dict(subject.images)
    if spec.channels:
        missing = [name for name in spec.channels if name not in images]
        if missing:
            raise SpecError(
                f"the model takes {', '.join(spec.channels)}, but the subject has {', '.join(images)}: {missing[0]!r} is missing"
            )
        images = {name: images[name] for name in spec.channels}
    if resample_to is not None:
        if resample_to not in images:
            raise SpecError(f"resample_to is {resample_to!r}, but the subject has {', '.join(images)}")
        target = images[resample_to]
        images = {name: each if each is target else each.resampled(like=target) for name, each in images.items()}
    check_one_grid(Subject(images))
    sources: Sequence[VolumeSource] = list(images.values())
    return sources[0] if len(sources) == 1 else StackedSource(sources, list(images), check_place=False)


def looks_at_volume(spec: ModelSpec) -> bool:
    """Whether a spec needs numbers that only the voxels say, before patches are read."""
    return spec.crop is not None or any(each.looks_at_volume for each in (*spec.intensity, *spec.then_intensity))


def in_model_space(source: VolumeSource, spec: ModelSpec, name: str, labels: VolumeSource | None = None) -> ModelInput:
    """Give a source as a model expects it.

    Args:
        source: the image.
        spec: what the model expects.
        name: what messages call the image.
        labels: a label map on the grid of the image, whose labels count as filled where a mask says what is scaled.

    Raises:
        SpecError: if the image is not such as the spec needs.
    """
    channels = source.shape[0]
    if spec.channels and channels != len(spec.channels):
        raise SpecError(
            f"{name} has {channels} channel{'s' if channels > 1 else ''}, but the model takes {len(spec.channels)},"
            f" {', '.join(spec.channels)}"
        )
    view: VolumeSource = source
    views: list[View] = []
    steps = [f"{_told(source)}"]
    if spec.orientation != NATIVE:
        if source.codes.qform == source.codes.sform == 0:
            raise SpecError(
                f"{name} does not say where its axes point, but the model takes {spec.orientation}: give it an affine, and codes"
                " that are not 0"
            )
        views.append(partial(TurnedSource.to, orientation=spec.orientation))
        view = views[-1](view)
        steps.append(f"turned to {spec.orientation}: {_told(view)}")
    if spec.axes != (0, 1, 2):
        views.append(partial(TurnedSource, order=spec.axes))
        view = views[-1](view)
        steps.append(f"axes in the order {spec.axes}: {pretty_sizes(view.shape[1:])} voxels")
    if spec.crop is not None:
        box = foreground_box(view, spec.crop.above, spec.crop.margin)
        if box is None:
            what = "not 0" if spec.crop.above is None else f"above {spec.crop.above:g}"
            warnings.warn(f"no voxel of {name} is {what}: it is not cropped", RuntimeWarning, stacklevel=2)
        elif box.shape != view.shape[1:]:
            views.append(partial(CroppedSource, box=box))
            view = views[-1](view)
            steps.append(f"cropped to the foreground: {pretty_sizes(box.shape)} voxels from {box.start}")
    others: list[View] = []
    orders: tuple[int, ...] = (spec.order,) * 3
    kinds: tuple[Interpolation, Interpolation, Interpolation] = (spec.interpolation,) * 3
    resampled: Space | None = None
    mask: np.ndarray | None = None

    def add(found: Sequence[View]) -> None:
        nonlocal view
        others.extend(found)
        view = _viewed(view, found)

    def scale() -> None:
        nonlocal mask
        for intensity in (spec.intensity, spec.then_intensity):
            if any(each.over == "mask" for each in intensity):
                mask = filled_mask(view, labels and _viewed(labels, (*views, *others)))
            if intensity:
                add(_scaled(view, intensity, mask, steps))

    if spec.scale_after == "cropping":
        scale()
    if spec.spacing != (None, None, None):
        space, orders, kinds = _resampling(view, spec)
        if space.shape != view.shape[1:] or not np.allclose(space.affine, view.affine):
            add([_to_space(view, spec, space, orders, name)])
            resampled = space
            steps.append(f"resampled (order {orders[0] if len(set(orders)) == 1 else orders}): {_told(view)}")
    if spec.scale_after == "resampling":
        scale()
    return ModelInput(view, tuple(steps), orders, kinds, resampled, tuple(views), tuple(others), mask)


def _resampling(
    view: VolumeSource, spec: ModelSpec
) -> tuple[Space, tuple[int, ...], tuple[Interpolation, Interpolation, Interpolation]]:
    """Say to which grid an image is resampled, with which order along each axis, and how scores are interpolated back."""
    space = GRIDS[spec.fits](view, spec.spacing)
    own = stated_spacing(view.affine)
    wanted = [before if new is None else new for before, new in zip(own, spec.spacing, strict=True)]
    # On either way, that axis which is the longest where it comes from, if it is long there.
    thick, thick_back = _thick_axis(spec, own, wanted), _thick_axis(spec, wanted, own)
    orders = tuple(0 if axis == thick else spec.order for axis in range(3))
    i, j, k = ("nearest" if axis == thick_back else spec.interpolation for axis in range(3))
    return space, orders, (i, j, k)


def _to_space(view: VolumeSource, spec: ModelSpec, space: Space, orders: tuple[int, ...], name: str) -> View:
    """Say how an image is brought to the grid of the model."""
    if spec.fits != "monai":
        return partial(ResampledSource, space=space, order=orders, fill=0, is_clipped=spec.order == 3)
    # MONAI's grid may go on beyond the volume, where it takes what is at the border; and it clips nothing.
    found = partial(ResampledSource, space=space, order=orders, fill=None, is_clipped=False)
    if found(view).extent is None:
        warnings.warn(
            f"the axes of {name} are not at right angles to one another: at its border scores are 0, where MONAI has those of the"
            " last voxels",
            RuntimeWarning,
            stacklevel=3,
        )
    return found


def _scaled(view: VolumeSource, intensity: Sequence[Intensity], mask: np.ndarray | None, steps: list[str]) -> list[View]:
    each = list(intensity) * (view.shape[0] if len(intensity) == 1 else 1)
    if len(each) != view.shape[0]:
        raise SpecError(f"intensity of the spec has {len(each)} entries, but there are {view.shape[0]} channels")
    scalings = [one.of_channel(view, channel, mask) for channel, one in enumerate(each)]
    if all(scaling.is_nothing for scaling in scalings):
        return []
    steps.append("intensities " + "; ".join(dict.fromkeys(map(str, scalings))))
    return [partial(NormalizedSource, scalings=scalings, mask=mask)]


def filled_mask(view: VolumeSource, labels: VolumeSource | None = None) -> np.ndarray:
    """Say which voxels have a channel that is not 0, or are enclosed by such; or have a label.

    Raises:
        MissingDependencyError: if SciPy is not installed.
    """
    try:
        from scipy.ndimage import binary_fill_holes
    except ImportError as error:
        raise MissingDependencyError("a spec whose intensities are over a mask needs SciPy: pip install scipy") from error
    mask = np.asarray(binary_fill_holes(_where_not_0(view)))
    return mask if labels is None else mask | _where_not_0(labels)


def _where_not_0(view: VolumeSource) -> np.ndarray:
    mask = np.empty(view.shape[1:], dtype=bool)
    for box in walk(Box.of_shape(view.shape[1:]), view.chunks, CHUNK_VOXELS):
        mask[box.slices] = (read_checked(view, box) != 0).any(0).numpy()
    return mask


def _filling(source: VolumeSource, spacing: Sequence[float | None]) -> Space:
    """Give the grid of as nearly a spacing as whole voxels allow that fills the volume exactly."""
    old = stated_spacing(source.affine)
    shape = [
        length if new is None else max(1, round(before / new * length))
        for before, new, length in zip(old, spacing, source.shape[1:], strict=True)
    ]
    i, j, k = shape
    factors = tuple(size / length for size, length in zip(shape, source.shape[1:], strict=True))
    return Space((i, j, k), scaled(source.affine, factors), source.codes)


GRIDS = {"spacing": at_spacing, "volume": _filling, "monai": at_spacing_of_monai}
"""How a grid of a spacing is made, by what it fits."""


def _thick_axis(spec: ModelSpec, *spacings: Sequence[float]) -> int | None:
    """Say which axis, if any, is to be interpolated on its own: the longest in the first of some spacings that is much longer."""
    if spec.thick_slices is None:
        return None
    for spacing in spacings:
        longest = max(spacing)
        if longest / min(spacing) > spec.thick_slices:
            axes = [axis for axis, each in enumerate(spacing) if longest / each == 1]
            return axes[0] if len(axes) == 1 else None
    return None


def _told(source: VolumeSource) -> str:
    return f"{pretty_sizes(source.shape[1:])} voxels of {pretty_mm(spacing_of(source.affine))}"
