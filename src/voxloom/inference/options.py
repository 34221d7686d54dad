"""How a model is applied where the user does not say otherwise."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from ..core.grid.grids import PatchSpacing, check_patch_spacing
from ..core.grid.windows import MONAI, Gaussian, OverlapMode, resolve_window
from ..core.padding import check_padding_mode
from ..core.sizes import as_int, checked_overlap
from ..errors import SizeError
from ..models.forms import as_form, overlap_of_slices, size_of_slices
from ..models.loading import LoadedModel
from ..models.spec import ModelSpec
from .planning.results import ResultOptions
from .planning.settings import Settings
from .reductions import AfterSumStep, Regions

__all__ = ["UsualOptions", "settings_of", "usual_options"]


@dataclass(frozen=True)
class UsualOptions:
    """How a model is applied: as its spec says, or else as is usual."""

    patch_size: Any
    patch_overlap: Any
    overlap_mode: OverlapMode
    patch_spacing: PatchSpacing
    context: Any
    slice_axis: int | None
    mirror_axes: Any
    padding_mode: str | float | None
    activation: Any
    reduce: Any
    after: tuple[AfterSumStep, ...] = ()
    """What is done with the sums first."""

    @property
    def weights(self) -> Gaussian | None:
        """Weights of the voxels of a patch, where these are no product of one for each axis."""
        mode = MONAI if self.overlap_mode == "monai" else self.overlap_mode
        return mode if isinstance(mode, Gaussian) and mode.floor else None

    def result_options(self, output_scale: Any) -> ResultOptions:
        """Give what is wanted of the outputs."""
        after: tuple[AfterSumStep, ...] = self.after if self.weights is None else ("divide", *self.after)
        return ResultOptions(self.activation, self.reduce, output_scale, after)

    def unless(self, **given: Any) -> "UsualOptions":
        """Put what is given, and not None, in place of what is usual."""
        return replace(self, **{name: value for name, value in given.items() if value is not None})


def usual_options(spec: ModelSpec) -> UsualOptions:
    """Say what a spec asks for."""
    mode: OverlapMode = spec.overlap_mode
    if spec.overlap_width is not None and mode in ("gaussian", "monai"):
        mode = Gaussian(spec.overlap_width, floor=0 if mode == "gaussian" else MONAI.floor)
    reduce: Any = spec.reduce
    if spec.regions:
        threshold = spec.reduce if isinstance(spec.reduce, int | float) else 0.5
        reduce = Regions(spec.regions, threshold)
    return UsualOptions(
        patch_size=spec.patch_size,
        patch_overlap=spec.patch_overlap,
        overlap_mode=mode,
        patch_spacing=spec.patch_spacing,
        context=spec.context,
        slice_axis=spec.slice_axis,
        mirror_axes=spec.mirror_axes,
        padding_mode=spec.padding_mode,
        activation=spec.activation if spec.activates == "patches" else None,
        reduce=reduce,
        after=(spec.activation,) if spec.activates == "sums" and spec.activation is not None else (),
    )


def settings_of(
    own: UsualOptions,
    loaded: LoadedModel,
    *,
    batch_size: int | None,
    full_batches: bool,
    fill: float,
    memory_limit: int | None,
    dtype: torch.dtype | None,
) -> Settings:
    """Check how a model is to be applied.

    Args:
        own: how, as far as it is a matter of its spec.
        loaded: the model, which may be fixed to sizes.
        batch_size: patches at a time; None for the fewest that the model takes.
        full_batches: fill the last batch up, even if the model does not ask for it.
        fill: see `Settings`, as for the others.
        memory_limit: see there.
        dtype: see there.

    Raises:
        SizeError, ModeError: if something cannot be used.
    """
    form = as_form(own.context, own.slice_axis)
    patch_size = own.patch_size
    if patch_size is None and None not in loaded.patch_size:
        patch_size = loaded.patch_size
    if patch_size is None:
        raise SizeError("the patch size is missing: give patch_size, or a spec that says it")
    size = size_of_slices(patch_size, own.slice_axis)
    is_padded = own.padding_mode is not None
    of_model = None if -1 in size else size  # which a model may be asked about
    return Settings(
        patch_size=size,
        patch_overlap=checked_overlap(overlap_of_slices(own.patch_overlap, own.slice_axis), size, is_even=is_padded),
        patch_spacing=check_patch_spacing(own.patch_spacing),
        overlap_mode=own.overlap_mode if own.weights is None else str(own.overlap_mode),
        window=resolve_window(own.overlap_mode if own.weights is None else "average"),
        batch_size=loaded.least_batch_size(of_model) if batch_size is None else as_int(batch_size, "batch_size", 1),
        full_batches=full_batches or loaded.takes_full_batches(of_model),
        padding_mode=None if own.padding_mode is None else check_padding_mode(own.padding_mode, 0),
        fill=fill,
        memory_limit=memory_limit,
        dtype=dtype,
        form=form,
    )
