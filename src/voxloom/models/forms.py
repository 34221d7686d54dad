"""In which form a model takes patches and gives its outputs: of a volume, of slices, or one value for each patch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..core.sizes import Ints, Scale, as_patch_size, as_sizes
from ..errors import OutputError, SizeError

__all__ = ["CallForm", "as_form", "overlap_of_slices", "size_of_slices"]


@dataclass(frozen=True)
class CallForm:
    """How a model is called.

    Args:
        context: voxels around a patch that it is given, and that it does not predict.
        slice_axis: axis along which patches are one voxel deep and which a 2-D model does not know; with context the slices are
            channels. None for a model of volumes.
    """

    context: Ints = (0, 0, 0)
    slice_axis: int | None = None

    def input_size(self, patch_size: Ints) -> Ints:
        """Voxels that the model is given for a patch."""
        return tuple(size + 2 * around for size, around in zip(patch_size, self.context, strict=True))

    def given(self, batch: Tensor) -> Tensor:
        """Give a batch `(B, C, I, J, K)` in the form that the model takes."""
        if self.slice_axis is None:
            return batch
        # All channels of a slice follow one another.
        return batch.movedim(2 + self.slice_axis, 1).flatten(1, 2)

    def returned(self, output: Tensor, batch: Tensor, scale: Scale) -> Tensor:
        """Give an output `(B, C, I, J, K)`, whatever form it came in.

        Raises:
            OutputError: if a model of slices returned something else than slices.
        """
        if output.ndim == 2:  # a value for the whole of each patch
            patch = (size - 2 * around for size, around in zip(batch.shape[2:], self.context, strict=True))
            sizes = [int(size * factor) for size, factor in zip(patch, scale, strict=True)]
            return output[:, :, None, None, None].expand(*output.shape, *sizes)
        if self.slice_axis is None:
            return output
        if output.ndim != 4:
            raise OutputError(
                f"the model returned shape {tuple(output.shape)} for slices of shape {tuple(self.given(batch).shape)}: with"
                " slice_axis it must return (B, C, height, width)"
            )
        return output.unsqueeze(2 + self.slice_axis)


def as_form(context: Any, slice_axis: Any) -> CallForm:
    """Check how a model is to be called.

    Raises:
        SizeError: if a number cannot be used.
    """
    if slice_axis is not None and (isinstance(slice_axis, bool) or slice_axis not in (0, 1, 2)):
        raise SizeError(f"slice_axis is {slice_axis!r}: it must be 0, 1 or 2, or None for a model of volumes")
    return CallForm(as_sizes(context, 3, "context", minimum=0), slice_axis)


def size_of_slices(patch_size: Any, slice_axis: int | None) -> Ints:
    """Check the size of patches; of slices it may be given as height and width.

    Raises:
        SizeError: if slices are more than one voxel deep.
    """
    if slice_axis is None:
        return as_patch_size(patch_size, 3)
    if not isinstance(patch_size, Sequence) or len(patch_size) == 2:
        size = list(as_patch_size(patch_size, 2))
        size.insert(slice_axis, 1)
        return tuple(size)
    whole = as_patch_size(patch_size, 3)
    if whole[slice_axis] != 1:
        raise SizeError(
            f"patch_size is {whole}, but slices along axis {slice_axis} are one voxel deep: give height and width, and with"
            " context= how many neighbours are given too"
        )
    return whole


def overlap_of_slices(overlap: Any, slice_axis: int | None) -> Any:
    """Give the overlap for each axis: along that of slices there is none, and it need not be given."""
    if slice_axis is None:
        return overlap
    values = list(overlap) if isinstance(overlap, Sequence) and not isinstance(overlap, str) else [overlap] * 2
    return [*values[:slice_axis], 0, *values[slice_axis:]] if len(values) == 2 else values
