"""Cubic interpolation of whole volumes, to grids whose axes lie along theirs or at any angle."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ...core.boxes import Box
from ...core.geometry.aligned import AlignedMap
from ...core.geometry.oblique import ObliqueMap
from ...core.geometry.splines import BORDER, cubic_matrix
from ...core.sizes import Ints

__all__ = ["bytes_at_angle", "cubic_along_axes", "cubic_at_angle"]


def cubic_along_axes(
    values: Tensor, space: AlignedMap, orders: Sequence[int], clip: Callable[[Tensor], Tensor], fill: float
) -> Tensor:
    """Interpolate a volume along one axis after the other.

    Args:
        values: the volume `(C, I, J, K)`.
        space: from the new grid to the volume.
        orders: 0, 1 or 3 for each axis of the volume.
        clip: keeps what splines overshoot within the range of the values.
        fill: value of voxels that lie outside of the volume.
    """
    # What the nearest are taken of comes last, after all else has been clipped.
    for axis in sorted(space.sequence, key=lambda axis: orders[space.order[axis]] == 0):
        of, line = space.order[axis], space.axes[axis]
        if orders[of] == 0:
            values = line.apply(clip(values), 1 + of)
        elif orders[of] == 1:
            values = line.apply(values, 1 + of)
        elif not np.array_equal(line.places, np.arange(values.shape[1 + of])):
            matrix = torch.from_numpy(cubic_matrix(line.places, values.shape[1 + of])).to(values.dtype)
            values = torch.tensordot(matrix, values, dims=([1], [1 + of])).movedim(0, 1 + of)
    if 0 not in orders:
        values = clip(values)
    values = values.permute(0, *(1 + of for of in space.order)).contiguous()
    for axis, line in enumerate(space.axes):
        values[(slice(None),) * (1 + axis) + (torch.from_numpy(~line.is_inside),)] = fill
    return values


def cubic_at_angle(values: Tensor, space: ObliqueMap, clip: Callable[[Tensor], Tensor], fill: float) -> Tensor:
    """Interpolate a volume by cubic splines, one channel after the other, with the spline and the borders of `cubic_matrix`.

    Args:
        values: the volume `(C, I, J, K)`, in float32 or float64.
        space: from the new grid to the volume.
        clip: keeps what splines overshoot within the range of the values.
        fill: value of voxels that lie outside of the volume.
    """
    import SimpleITK

    # ITK names axes in the reverse order of the array's, as it is given here.
    matrix = space.matrix[2::-1, [2, 1, 0, 3]]
    resample = SimpleITK.ResampleImageFilter()
    resample.SetTransform(SimpleITK.AffineTransform(matrix[:, :3].ravel().tolist(), matrix[:, 3].tolist()))
    resample.SetSize(space.target_shape[::-1])
    resample.SetInterpolator(SimpleITK.sitkBSpline3)
    resample.SetUseNearestNeighborExtrapolator(True)
    resample.SetOutputOrigin((0.0, 0.0, 0.0))
    resample.SetOutputSpacing((1.0, 1.0, 1.0))
    result = torch.empty((len(values), *space.target_shape), dtype=values.dtype)
    for channel, target in zip(values.numpy(), result.numpy(), strict=True):
        image = SimpleITK.GetImageFromArray(np.pad(channel, BORDER, mode="edge"))
        image.SetOrigin((-BORDER,) * 3)
        made = resample.Execute(image)  # a view of it does not keep it alive
        target[...] = SimpleITK.GetArrayViewFromImage(made)
        del image, made
    result = clip(result)
    for plane in range(len(result[0])):  # one at a time, since places take much more memory than values
        box = Box((plane, 0, 0), (plane + 1, *space.target_shape[1:]))
        result[:, plane].masked_fill_(torch.from_numpy(~space.places(box)[1][0]), fill)
    return result


def bytes_at_angle(shape: Ints, target_shape: Ints, itemsize: int) -> int:
    """Say what `cubic_at_angle` takes beside the volume and the result: ITK fits splines in float64."""
    padded = math.prod(size + 2 * BORDER for size in shape)
    return padded * (2 * itemsize + 3 * 8) + 2 * math.prod(target_shape) * itemsize
