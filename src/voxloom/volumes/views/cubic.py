"""Cubic interpolation of whole volumes, to grids whose axes lie along theirs or at any angle."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ...core.boxes import Box
from ...core.geometry.aligned import AlignedMap, AxisMap
from ...core.geometry.oblique import ObliqueMap
from ...core.geometry.splines import BORDER, cubic_matrix
from ...core.sizes import Ints
from ...io.protocols import VolumeSource, chunk_bytes, keeps_whole, read_checked

__all__ = ["bytes_along_axes", "bytes_at_angle", "cubic_along_axes", "cubic_at_angle"]

# Voxels of a channel that are interpolated at a time, and how many times these are in memory, at most: as they are read and
# scaled, turned for the product of matrices, and as its result.
SLAB_VOXELS, SLAB_COPIES = 2**22, 5
# How often slices that are read one by one are read at most, where slabs do not lie along them.
MOST_READS = 4


class _Line:
    """Interpolation along one axis of a volume `(C, I, J, K)`.

    Args:
        axis: what the voxels of the new grid are interpolated from.
        of: number of the volume's axis.
        order: 0, 1 or 3.
        length: voxels of the volume along it.
        dtype: type of the values.
    """

    def __init__(self, axis: AxisMap, of: int, order: int, length: int, dtype: torch.dtype) -> None:
        self.of, self.dim, self.order, self._axis = of, 1 + of, order, axis
        is_on_voxels = order != 3 or np.array_equal(axis.places, np.arange(length))
        self._matrix = None if is_on_voxels else torch.from_numpy(cubic_matrix(axis.places, length)).to(dtype)

    def __len__(self) -> int:
        return len(self._axis)

    def apply(self, values: Tensor) -> Tensor:
        """Interpolate all that lies along the axis."""
        if self.order != 3:
            return self._axis.apply(values, self.dim)
        if self._matrix is None:
            return values
        return torch.tensordot(self._matrix, values, dims=([1], [self.dim])).movedim(0, self.dim)


class _Clip:
    """Keeps what splines overshoot within the range of the values, channel by channel, and plane by plane along some axes.

    Args:
        orders: 0, 1 or 3 for each axis: where it is 0, each plane has a range of its own.
    """

    def __init__(self, orders: Sequence[int]) -> None:
        self._dims = tuple(1 + axis for axis, order in enumerate(orders) if order != 0)
        self._ends: tuple[Tensor, Tensor] | None = None

    def see(self, values: Tensor, is_alone: bool) -> None:
        """Take note of the range of values: alone, or with those that were seen before."""
        least, most = values.amin(self._dims, keepdim=True), values.amax(self._dims, keepdim=True)
        if self._ends is not None and not is_alone:
            least, most = torch.minimum(self._ends[0], least), torch.maximum(self._ends[1], most)
        self._ends = least, most

    def __call__(self, values: Tensor) -> Tensor:
        """Keep values within the range."""
        assert self._ends is not None
        return torch.clamp(values, *self._ends)


def cubic_along_axes(
    source: VolumeSource, space: AlignedMap, orders: Sequence[int], dtype: torch.dtype, is_clipped: bool, fill: float
) -> Tensor:
    """Interpolate a volume along one axis after the other: along the first two in slabs, so that little beside is held.

    Args:
        source: the volume, which is read slab by slab.
        space: from the new grid to the volume.
        orders: 0, 1 or 3 for each axis of the volume.
        dtype: type of the result.
        is_clipped: keep what splines overshoot within the range of the values; where an axis has order 0, of each of its planes.
        fill: value of voxels that lie outside of the volume.
    """
    sequence = _sequence(space, orders)
    *before, last = (_Line(space.axes[axis], of := space.order[axis], orders[of], space.shape[of], dtype) for axis in sequence)
    # What the nearest are taken of has been clipped before: by then the range of its planes is known.
    are_planes_alone = last.order == 0
    middle = torch.empty((source.shape[0], *_middle_shape(space, sequence)), dtype=dtype)
    clip = _Clip(orders) if is_clipped else None
    for start, read in _slabs(source, last.of, _slab_length(space, sequence)):
        values = read.to(dtype).contiguous()  # or else last bits depend on how it lies in memory
        del read
        if clip is not None:
            clip.see(values, is_alone=are_planes_alone)
        is_to_be_clipped = clip is not None and are_planes_alone
        for line in [*before, last]:
            if line.order == 0 and is_to_be_clipped and clip is not None:
                values, is_to_be_clipped = clip(values), False
            if line is not last:
                values = line.apply(values)
        middle.narrow(last.dim, start, values.shape[last.dim]).copy_(values)
        del values  # before the next one is read
    result = torch.empty((len(middle), *map(len, space.axes)), dtype=dtype)
    cut, of_cut = sequence[0], before[0]
    step, _ = _parts(middle.shape, len(last), last.dim, of_cut.dim)
    for start in range(0, len(of_cut), step):
        number = min(step, len(of_cut) - start)
        values = last.apply(middle.narrow(of_cut.dim, start, number))
        values = values if clip is None or are_planes_alone else clip(values)
        result.narrow(1 + cut, start, number).copy_(values.permute(0, *(1 + of for of in space.order)))
    for axis, places in enumerate(space.axes):
        result[(slice(None),) * (1 + axis) + (torch.from_numpy(~places.is_inside),)] = fill
    return result


def bytes_along_axes(source: VolumeSource, space: AlignedMap, orders: Sequence[int], itemsize: int) -> int:
    """Say what `cubic_along_axes` takes beside the result: what is made along two axes, copies of a slab, and what is read."""
    sequence = _sequence(space, orders)
    *_, last = sequence
    across, length = space.order[last], _slab_length(space, sequence)
    shape = (1, *_middle_shape(space, sequence))
    slab = length * _plane(space, sequence)
    step, row = _parts(shape, len(space.axes[last]), 1 + across, 1 + space.order[sequence[0]])
    made = (math.prod(shape) + SLAB_COPIES * max(slab, step * row)) * itemsize
    return source.shape[0] * made + _waiting_bytes(source, across, length)


def _sequence(space: AlignedMap, orders: Sequence[int]) -> list[int]:
    """Give the axes of the new grid in the order in which they are interpolated: those of order 0 come last.

    Or else that of the slices, which may be files, since slabs lie across the last; but not if twice as much were held. How a
    source is stored does not count, since the last bits depend on the order.
    """
    sequence = sorted(space.sequence, key=lambda axis: orders[space.order[axis]] == 0)
    slices = space.order.index(2)
    if orders[space.order[sequence[-1]]] == 0:
        return sequence
    other = [*(axis for axis in sequence if axis != slices), slices]
    is_small = math.prod(_middle_shape(space, other)) <= 2 * math.prod(_middle_shape(space, sequence))
    return other if is_small else sequence


def _middle_shape(space: AlignedMap, sequence: Sequence[int]) -> list[int]:
    """Give the shape `(I, J, K)` of what has been interpolated along all axes but the last of a sequence."""
    shape = list(space.shape)
    for axis in sequence[:-1]:
        shape[space.order[axis]] = len(space.axes[axis])
    return shape


def _plane(space: AlignedMap, sequence: Sequence[int]) -> int:
    """Voxels of a plane across the last axis of a sequence, at most, while it is interpolated along the others."""
    first, second, _ = sequence
    before = [space.shape[space.order[axis]] for axis in (first, second)]
    after = [len(space.axes[axis]) for axis in (first, second)]
    return max(before[0] * before[1], after[0] * before[1], after[0] * after[1])


def _slab_length(space: AlignedMap, sequence: Sequence[int]) -> int:
    """Say how much of the last axis of a sequence is interpolated at a time; how a source is stored does not count, either."""
    return max(1, min(SLAB_VOXELS // _plane(space, sequence), space.shape[space.order[sequence[-1]]]))


def _slabs(source: VolumeSource, across: int, length: int) -> Iterator[tuple[int, Tensor]]:
    """Read a volume along an axis in slabs of a length, with where each begins: in whole chunks, of which each is read once."""
    shape, dim = source.shape[1:], 1 + across
    size, depth = shape[across], _depth(source, across, length)
    begin, end = 0, 0  # of what has been read, and is still held
    held: Tensor | None = None
    for start in range(0, size, length):
        stop = min(start + length, size)
        if end < stop:
            left = held.narrow(dim, start - begin, end - start) if held is not None and start < end else None
            until = min(-(-stop // depth) * depth, size)
            starts, stops = [0, 0, 0], list(shape)
            starts[across], stops[across] = end, until
            held = None  # before more is read
            read = read_checked(source, Box(tuple(starts), tuple(stops)))
            held = read if left is None else torch.cat([left, read], dim)
            begin, end = start, until
            del left, read
        assert held is not None
        yield start, held.narrow(dim, start - begin, stop - start)


def _depth(source: VolumeSource, across: int, length: int) -> int:
    """Say how many planes across an axis are read at once, for slabs of a length."""
    size, depth = source.shape[1 + across], source.chunks[across]
    if source.resident_bytes and not keeps_whole(source):
        return size  # each box would read the whole of it
    if depth < size or chunk_bytes(source):
        return depth
    # It is in memory, or the file is mapped; but slices along another axis may as well be files, of which each box reads all.
    return min(-(-size // MOST_READS // length) * length, size)


def _waiting_bytes(source: VolumeSource, across: int, length: int) -> int:
    """Memory of what is read at once, and for a moment of its parts."""
    size, depth = source.shape[1 + across], _depth(source, across, length)
    held = min(length + depth, size)
    planes = depth if depth % length == 0 or depth == size else 2 * held
    return planes * math.prod(source.shape) // size * source.dtype.itemsize


def _parts(shape: Sequence[int], length: int, dim: int, of_cut: int) -> tuple[int, int]:
    """Say how much of an axis is interpolated at a time along another one, to a length, and how many voxels each of it takes."""
    row = math.prod(shape[1:]) // shape[of_cut] // shape[dim] * max(shape[dim], length)
    return max(1, min(SLAB_VOXELS // row, shape[of_cut])), row


def cubic_at_angle(values: Tensor, space: ObliqueMap, is_clipped: bool, fill: float) -> Tensor:
    """Interpolate a volume by cubic splines, one channel after the other, with the spline and the borders of `cubic_matrix`.

    Args:
        values: the volume `(C, I, J, K)`, in float32 or float64.
        space: from the new grid to the volume.
        is_clipped: keep what splines overshoot within the range of the values.
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
    if is_clipped:
        for channel, target in zip(values, result, strict=True):
            target.clamp_(channel.min(), channel.max())
    for plane in range(len(result[0])):  # one at a time, since places take much more memory than values
        box = Box((plane, 0, 0), (plane + 1, *space.target_shape[1:]))
        result[:, plane].masked_fill_(torch.from_numpy(~space.places(box)[1][0]), fill)
    return result


def bytes_at_angle(shape: Ints, target_shape: Ints, itemsize: int) -> int:
    """Say what `cubic_at_angle` takes beside the volume and the result: ITK fits splines in float64."""
    padded = math.prod(size + 2 * BORDER for size in shape)
    return padded * (2 * itemsize + 3 * 8) + 2 * math.prod(target_shape) * itemsize
