"""A prediction, and its plan, in one call: functions beside `Predictor`."""

from collections.abc import Sequence
from typing import Any, TypedDict, Unpack

import torch

from ..core.grid.grids import PatchSpacing
from ..core.grid.windows import OverlapMode
from ..models.spec import ModelSpec
from .planning.plan import PredictionPlan
from .predictor import Predictor, Sizes

__all__ = ["PredictorOptions", "plan", "predict"]


class PredictorOptions(TypedDict, total=False):
    """What `Predictor`, `predict` and `plan` may be given by name; see `Predictor`."""

    spec: ModelSpec | None
    patch_spacing: PatchSpacing | None
    context: int | Sequence[int] | None
    slice_axis: int | None
    batch_size: int | None
    device: Any
    amp: bool | torch.dtype
    dtype: torch.dtype | None
    activation: Any
    reduce: Any
    output_scale: Any
    padding_mode: str | float | None
    mirror_axes: int | Sequence[int] | None
    fill: float
    interpolation: str | Sequence[str] | None
    memory_limit: int | str | None
    full_batches: bool
    model_name: str | None
    executor: Any
    devices: Any


def predict(
    model: Any,
    image: Any,
    patch_size: Sizes | None = None,
    patch_overlap: float | Sequence[float] | None = None,
    overlap_mode: OverlapMode | None = None,
    *,
    image_name: str | Sequence[str] | None = None,
    like: Any = None,
    resample_to: str | None = None,
    affine: Any = None,
    mask: Any = None,
    output: Any = None,
    resume: bool = True,
    overwrite: bool = False,
    progress: bool | str = False,
    **options: Unpack[PredictorOptions],
) -> Any:
    """Apply a model to a whole volume, patch by patch, in bounded memory.

    Args:
        model: see `Predictor`.
        image: see `Predictor.__call__`, also for all others that are not listed under `Predictor`.
        patch_size: voxels of a patch `(I, J, K)`, or one number for all axes; by default as the model's spec says.
        patch_overlap: what neighbours share: voxels, or a fraction of the patch; by default half.
        overlap_mode: how overlapping patches are combined; by default `"gaussian"`.
        image_name: which image of a subject.
        like: the grid that the result is to be on, if that is not the image's.
        resample_to: name of the image of a subject onto whose grid the others are resampled.
        affine: of an array, or in place of an image's own.
        mask: compute only patches that hold a voxel of it.
        output: where the result goes.
        resume: let a run that was interrupted be resumed.
        overwrite: replace a file that is there.
        progress: show how far it has come.
        **options: the keywords of `Predictor`.

    Returns:
        An `Image` with the shape and affine of the input, or what the store returns; a dict where there are several results.

    Example:
        >>> import torch, voxloom as vx
        >>> image = vx.ScalarImage(torch.rand(1, 40, 30, 20))
        >>> model = torch.nn.Conv3d(1, 3, kernel_size=3, padding=1)
        >>> labels = vx.predict(model, image, patch_size=16, patch_overlap=0.5, reduce="argmax")
        >>> labels.shape, labels.data.dtype
        ((1, 40, 30, 20), torch.uint8)
    """
    predictor = Predictor(model, patch_size, patch_overlap, overlap_mode, **options)
    return predictor(
        image,
        image_name=image_name,
        like=like,
        resample_to=resample_to,
        affine=affine,
        mask=mask,
        output=output,
        resume=resume,
        overwrite=overwrite,
        progress=progress,
    )


def plan(
    model: Any,
    image: Any,
    patch_size: Sizes | None = None,
    patch_overlap: float | Sequence[float] | None = None,
    overlap_mode: OverlapMode | None = None,
    *,
    image_name: str | Sequence[str] | None = None,
    like: Any = None,
    resample_to: str | None = None,
    affine: Any = None,
    mask: Any = None,
    output: Any = None,
    **options: Unpack[PredictorOptions],
) -> PredictionPlan:
    """Say what `predict` would do with the same arguments, and how much memory it would take.

    Args:
        model: see `predict`, also for all other arguments. It is called once, to see what its output looks like.
        image: of which only the header is read, unless there is a mask.
        patch_size: voxels of a patch.
        patch_overlap: what neighbours share.
        overlap_mode: how overlapping patches are combined.
        image_name: which image of a subject.
        like: the grid that the result is to be on, if that is not the image's.
        resample_to: name of the image of a subject onto whose grid the others are resampled.
        affine: of an array, or in place of an image's own.
        mask: compute only patches that hold a voxel of it.
        output: where the result would go.
        **options: the keywords of `Predictor`.

    Example:
        >>> import torch, voxloom as vx
        >>> print(vx.plan(torch.nn.Identity(), torch.zeros(1, 100, 100, 100), patch_size=64))
        volume:  100 × 100 × 100 voxels, raw intensities, native grid
        patches: 27 of 64 × 64 × 64, each computed once
        ...
    """
    predictor = Predictor(model, patch_size, patch_overlap, overlap_mode, **options)
    return predictor.plan(
        image, image_name=image_name, like=like, resample_to=resample_to, affine=affine, mask=mask, output=output
    )
