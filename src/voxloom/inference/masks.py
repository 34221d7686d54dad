"""Which patches need be computed: those that hold a voxel of a mask."""

import math
import os
from collections.abc import Callable, Iterator
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.boxes import Box
from ..core.grids import PatchGrid
from ..errors import ImageError, SubjectError
from ..sampling.padded import Voxels
from ..volumes.image import Image, LabelMap
from ..volumes.space import Affine

__all__ = ["looks_at_volumes", "needed_patches"]

# Voxels that are looked at together.
CHUNK_VOXELS = 2**20

InBox = Callable[[Box], Tensor]
"""Gives the mask `(i, j, k)` of a box, as booleans."""


def looks_at_volumes(mask: Any) -> bool:
    """Whether a mask is made of the input: a threshold or a function."""
    return isinstance(mask, Real) or (callable(mask) and not isinstance(mask, Image))


def needed_patches(mask: Any, volumes: dict[str, Voxels], affine: Affine, grid: PatchGrid) -> np.ndarray | None:
    """Find the patches that hold a voxel of the mask.

    Args:
        mask: an image or its path, matched by affine; a tensor or array of the volume's shape; a threshold, which some channel
            must be above; or a function that makes a mask `(i, j, k)` of a part of the volume `(C, i, j, k)`. None for all.
        volumes: the input.
        affine: that of the input.
        grid: the patches.

    Returns:
        Booleans, as many along each axis as the grid has patches; None where all patches are needed.

    Raises:
        SubjectError: if the mask is something else.
        ImageError: if its shape, or what a function returned, does not fit.
    """
    if mask is None:
        return None
    in_box = _reader_of(mask, volumes, affine, grid.spatial_shape)
    needed = np.zeros(grid.counts, dtype=bool)
    for box in _chunks(grid.spatial_shape):
        inside = in_box(box)
        if not bool(inside.any()):
            continue
        counts = _counts(_counts(inside.cpu().numpy(), 0, grid), 1, grid)
        for plane in np.flatnonzero(counts.any((0, 1))).tolist():
            k = box.start[2] + plane
            touching = grid.axes[2].touching(k, k + 1)
            needed[:, :, touching.start : touching.stop] |= counts[:, :, plane, None] > 0
    return None if needed.all() else needed


def _counts(values: np.ndarray, axis: int, grid: PatchGrid) -> np.ndarray:
    """Count what is set in each patch along one axis, which the values hold in full."""
    size = grid.spatial_shape[axis]
    moved = np.moveaxis(values, axis, 0)
    sums = np.zeros((size + 1, *moved.shape[1:]), dtype=np.int64)
    np.cumsum(moved, axis=0, out=sums[1:])
    starts = np.clip(list(grid.axes[axis]), 0, size)
    stops = np.clip([start + grid.axes[axis].patch for start in grid.axes[axis]], 0, size)
    return np.moveaxis(sums[stops] - sums[starts], 0, axis)


def _chunks(shape: tuple[int, ...]) -> Iterator[Box]:
    planes = max(1, CHUNK_VOXELS // (shape[0] * shape[1]))
    for k in range(0, shape[2], planes):
        yield Box((0, 0, k), (shape[0], shape[1], min(k + planes, shape[2])))


def _reader_of(mask: Any, volumes: dict[str, Voxels], affine: Affine, shape: tuple[int, ...]) -> InBox:
    if isinstance(mask, str | os.PathLike):
        mask = LabelMap(mask)
    if isinstance(mask, Tensor | np.ndarray):
        mask = LabelMap(mask[None] if mask.ndim == 3 else mask, affine=affine)
        if mask.spatial_shape != shape:
            raise ImageError(f"the mask has shape {mask.spatial_shape}, but the volume {shape}: give an image to match by affine")
    if isinstance(mask, Image):
        return _of_image(mask, affine)
    if isinstance(mask, Real) and not isinstance(mask, bool):
        if math.isnan(mask):
            raise SubjectError("the mask is nan, which no voxel is above: give a number")
        return lambda box: torch.stack([(volume.read(box) > float(mask)).any(0) for volume in volumes.values()]).any(0)
    if callable(mask):
        return lambda box: _called(mask, torch.cat([volume.read(box) for volume in volumes.values()]))
    raise SubjectError(
        f"the mask is {mask!r}: it must be an image or its path, a tensor of the volume's shape, a threshold, or a function"
    )


def _called(function: Callable[[Tensor], Any], block: Tensor) -> Tensor:
    result = torch.as_tensor(function(block))
    if result.ndim == 4 and len(result) == 1:
        result = result[0]
    if result.shape != block.shape[1:]:
        raise ImageError(
            f"mask was called with a part of the volume of shape {tuple(block.shape)} and must return a mask of shape"
            f" {tuple(block.shape[1:])}, but it returned one of {tuple(result.shape)}"
        )
    return result.bool()


def _of_image(mask: Image, affine: Affine) -> InBox:
    """Read a mask by the place of its voxels: each voxel of the input takes the nearest one, and beyond it nothing is set."""
    to_mask = np.linalg.inv(mask.affine) @ affine
    shift = np.rint(to_mask[:3, 3]).astype(int)
    is_shifted = np.allclose(to_mask[:3, :3], np.eye(3), atol=1e-4) and np.abs(to_mask[:3, 3] - shift).max() < 0.1
    if is_shifted:
        return lambda box: _shifted(mask, box, shift)
    values = (mask.data != 0).any(0)
    return lambda box: _nearest(values, box, to_mask)


def _shifted(mask: Image, box: Box, shift: np.ndarray) -> Tensor:
    moved = box.shift(shift.tolist())
    there = moved & Box.of_shape(mask.spatial_shape)
    result = torch.zeros(box.shape, dtype=torch.bool)
    if there.numel:
        result[there.relative_to(moved.start).slices] = (mask.read(there) != 0).any(0)
    return result


def _nearest(values: Tensor, box: Box, to_mask: np.ndarray) -> Tensor:
    i, j, k = (np.arange(start, stop) for start, stop in zip(box.start, box.stop, strict=True))
    result = torch.zeros(box.shape, dtype=torch.bool)
    plane = np.stack(np.meshgrid(i, j, indexing="ij"), axis=-1) @ to_mask[:3, :2].T + to_mask[:3, 3]
    for number, third in enumerate(k):
        index = np.rint(plane + to_mask[:3, 2] * third).astype(int)
        inside = ((index >= 0) & (index < np.array(values.shape))).all(-1)
        found = torch.from_numpy(index[inside])
        result[:, :, number][torch.from_numpy(inside)] = values[found[:, 0], found[:, 1], found[:, 2]]
    return result
