"""Which patches need be computed: those that hold a voxel of a mask."""

import itertools
import math
import os
from collections.abc import Callable
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.boxes import Box
from ..core.geometry.affines import Affine
from ..core.grid.grids import PatchGrid
from ..core.sizes import Ints
from ..core.walking import walk
from ..errors import ImageError, SpaceError, SubjectError
from ..io.protocols import Json, VolumeSource, is_source, read_checked
from ..volumes.images.image import LabelMap
from ..volumes.views.spatial import View

__all__ = ["looks_at_input", "needed_patches", "on_image"]

# Voxels that are looked at together.
CHUNK_VOXELS = 2**20

InBox = Callable[[Box], Tensor]
"""Gives the mask `(i, j, k)` of a box, as booleans."""


def looks_at_input(mask: Any) -> bool:
    """Whether a mask is made of the input: a threshold or a function."""
    return isinstance(mask, Real) or (callable(mask) and not is_source(mask))


def needed_patches(mask: Any, source: VolumeSource, grid: PatchGrid) -> np.ndarray | None:
    """Find the patches that hold a voxel of the mask.

    Args:
        mask: an image or its path, matched by affine; a tensor or array of the volume's shape; a threshold, which some channel
            must be above; or a function that makes a mask `(i, j, k)` of a part of the volume `(C, i, j, k)`. None for all.
        source: the input.
        grid: the patches.

    Returns:
        Booleans, as many along each axis as the grid has patches; None where all patches are needed.

    Raises:
        SubjectError: if the mask is something else.
        ImageError: if its shape, or what a function returned, does not fit.
    """
    if mask is None:
        return None
    in_box = _reader_of(mask, source)
    needed = np.zeros(grid.counts, dtype=bool)
    for box in walk(Box.of_shape(grid.spatial_shape), source.chunks, CHUNK_VOXELS):
        inside = in_box(box)
        if bool(inside.any()):
            needed |= _held_by_patches(inside.cpu().numpy(), box, grid)
    return None if needed.all() else needed


def on_image(mask: Any, image: VolumeSource) -> Any:
    """Place a mask on an image, for a model that is given the image turned, scaled or resampled.

    Args:
        mask: see `needed_patches`; what is of a place already stays as it is.
        image: the image.

    Raises:
        ImageError: if a tensor has another shape than the image.
    """
    if isinstance(mask, Tensor | np.ndarray) and not is_source(mask):
        placed = LabelMap(mask[None] if mask.ndim == 3 else mask, affine=image.affine)
        if placed.spatial_shape != image.shape[1:]:
            raise ImageError(
                f"the mask has shape {placed.spatial_shape}, but the image {tuple(image.shape[1:])}: give an image, to match by"
                " affine"
            )
        return placed
    return _MadeMask(image, mask) if mask is not None and looks_at_input(mask) else mask


class _MadeMask(View):
    """A mask that is made of an image: by a threshold, or by a function."""

    def __init__(self, of: VolumeSource, mask: Any) -> None:
        super().__init__(of)
        self.mask = mask
        self.shape = (1, *of.shape[1:])
        self.dtype, self.affine, self.chunks = torch.uint8, of.affine, of.chunks

    def read(self, box: Box) -> Tensor:
        """See `VolumeSource`."""
        return _reader_of(self.mask, self.of)(box)[None].to(torch.uint8)

    def fingerprint(self) -> Json:
        """See `VolumeSource`."""
        return {"mask": repr(self.mask), "of": self.of.fingerprint()}

    def over(self, source: VolumeSource) -> "_MadeMask":
        """See `View`."""
        return _MadeMask(source, self.mask)


def _held_by_patches(inside: np.ndarray, box: Box, grid: PatchGrid) -> np.ndarray:
    """Say which patches hold a voxel that is set, of those in a box."""
    for number, (axis, first) in enumerate(zip(grid.axes, box.start, strict=True)):
        moved = np.moveaxis(inside, number, 0)
        sums = np.zeros((len(moved) + 1, *moved.shape[1:]), dtype=np.int64)
        np.cumsum(moved, axis=0, out=sums[1:])
        starts = np.array(list(axis)) - first
        counts = sums[np.clip(starts + axis.patch, 0, len(moved))] - sums[np.clip(starts, 0, len(moved))]
        inside = np.moveaxis(counts > 0, 0, number)
    return inside


def _reader_of(mask: Any, source: VolumeSource) -> InBox:
    shape = source.shape[1:]
    if isinstance(mask, str | os.PathLike):
        mask = LabelMap(mask)
    if isinstance(mask, Tensor | np.ndarray):
        mask = LabelMap(mask[None] if mask.ndim == 3 else mask, affine=source.affine)
        if mask.spatial_shape != shape:
            raise ImageError(f"the mask has shape {mask.spatial_shape}, but the volume {shape}: give an image to match by affine")
    if is_source(mask):
        return _of_source(mask, source.affine, shape)
    if isinstance(mask, Real) and not isinstance(mask, bool):
        if math.isnan(mask):
            raise SubjectError("the mask is nan, which no voxel is above: give a number")
        return lambda box: (read_checked(source, box) > float(mask)).any(0)
    if callable(mask):
        return lambda box: _called(mask, read_checked(source, box))
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


def _of_source(mask: VolumeSource, affine: Affine, shape: Ints) -> InBox:
    """Read a mask by the place of its voxels; beyond it nothing is set.

    A voxel of the input is set if the nearest one of the mask is, or if it is the nearest to one that is: a mask may be finer
    than the input, and none of its voxels must be lost.
    """
    to_mask = np.linalg.inv(mask.affine) @ affine
    _check_near(mask, to_mask, affine, shape)
    shift = np.rint(to_mask[:3, 3]).astype(int)
    is_shifted = np.allclose(to_mask[:3, :3], np.eye(3), atol=1e-4) and np.abs(to_mask[:3, 3] - shift).max() < 0.1
    if is_shifted:
        return lambda box: _shifted(mask, box, shift)
    values = (read_checked(mask, Box.of_shape(mask.shape[1:])) != 0).any(0)
    from_mask = np.linalg.inv(to_mask)
    places = np.argwhere(values.numpy()) @ from_mask[:3, :3].T + from_mask[:3, 3]
    nearest = np.rint(places).astype(int)
    inside = nearest[((nearest >= 0) & (nearest < np.array(shape))).all(1)]
    hit = torch.zeros(shape, dtype=torch.bool)
    hit[tuple(torch.from_numpy(inside).T)] = True
    return lambda box: _nearest(values, box, to_mask) | hit[box.slices]


def _check_near(mask: VolumeSource, to_mask: Affine, affine: Affine, shape: Ints) -> None:
    """Refuse a mask of another place: nothing of the volume would be computed.

    Raises:
        SpaceError: says how far apart the two lie.
    """
    ends = [(-0.5, size - 0.5) for size in shape]
    corners = np.array(list(itertools.product(*ends))) @ to_mask[:3, :3].T + to_mask[:3, 3]
    if (corners.max(0) > -0.5).all() and (corners.min(0) < np.array(mask.shape[1:]) - 0.5).all():
        return
    middles = [
        place[:3, :3] @ ((np.array(sizes) - 1) / 2) + place[:3, 3]
        for place, sizes in ((affine, shape), (mask.affine, mask.shape[1:]))
    ]
    distance = float(np.linalg.norm(middles[0] - middles[1]))
    raise SpaceError(
        f"the mask lies elsewhere: it does not touch the volume, and their middles are {distance:.4g} mm apart. Is it of another"
        " scan? If its affine is wrong, give a mask with the right one, or a tensor of the volume's shape"
    )


def _shifted(mask: VolumeSource, box: Box, shift: np.ndarray) -> Tensor:
    moved = box.shift(shift.tolist())
    there = moved & Box.of_shape(mask.shape[1:])
    result = torch.zeros(box.shape, dtype=torch.bool)
    if there.numel:
        result[there.relative_to(moved.start).slices] = (read_checked(mask, there) != 0).any(0)
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
