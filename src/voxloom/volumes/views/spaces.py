"""Grids of voxels, as users say which one they mean."""

import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...core.geometry.affines import as_affine
from ...core.sizes import as_sizes
from ...errors import SizeError, SpaceError, SubjectError
from ...io.arrays.memory import affine_of
from ...io.arrays.objects import source_of
from ...io.protocols import Space, VolumeSource, is_source
from ..images.origins import FileOrigin

# Voxels along an axis that no volume has.
MOST_VOXELS = 2**31

__all__ = ["as_spacing", "at_spacing", "at_spacing_of_monai", "space_of"]


def space_of(like: Any, source: VolumeSource) -> Space:
    """Give the grid that results are interpolated to.

    Args:
        like: an image or its path, or a shape `(I, J, K)` and an affine.
        source: the input.

    Raises:
        SubjectError: if it is none of these.
        SpaceError: if it lies beside the input.
    """
    if isinstance(like, str | os.PathLike):
        like = FileOrigin((Path(like).expanduser(),), None, is_placed=False).source
    images = getattr(like, "images", None)
    if isinstance(images, Mapping) and images:  # a subject
        like = next(iter(images.values()))
    if (not is_source(like) and affine_of(like) is not None) or type(like).__module__.startswith("SimpleITK"):
        like = source_of(like)
    if is_source(like):
        space = Space(like.shape[1:], like.affine, like.codes)
    elif isinstance(like, Sequence) and len(like) == 2:
        i, j, k = as_sizes(like[0], 3, "the shape in like")
        space = Space((i, j, k), as_affine(like[1], "the affine in like"), source.codes)
    else:
        raise SubjectError(
            f"like is of type {type(like).__name__}: it must be an image, the name of one, or a shape (I, J, K) and an affine"
        )
    _check_overlap(space, source)
    return space


def _check_overlap(space: Space, source: VolumeSource) -> None:
    """Check that some voxel of a grid may lie in an image."""
    corners = np.array([(*corner, 1) for corner in itertools.product(*((-0.5, size - 0.5) for size in space.shape))])
    places = corners @ (np.linalg.inv(source.affine) @ space.affine).T[:, :3]
    ends = zip(places.min(0), places.max(0), source.shape[1:], strict=True)
    if any(last <= -0.5 or first >= size - 0.5 for first, last, size in ends):
        raise SpaceError(
            f"the grid of like, {space.shape} voxels from {np.round(space.affine[:3, 3], 3).tolist()} mm, lies beside the image,"
            f" {tuple(source.shape[1:])} voxels from {np.round(source.affine[:3, 3], 3).tolist()} mm: check both affines"
        )


def as_spacing(given: Any) -> tuple[float | None, float | None, float | None]:
    """Make a spacing for each axis; None keeps that of the image.

    Raises:
        SizeError: if it is not a positive number, or three.
    """
    values = given if isinstance(given, Sequence | np.ndarray) and not isinstance(given, str) else (given,) * 3
    if len(values) != 3:
        raise SizeError(f"spacing is {given!r}: give one number of millimetres, or three, one for each axis")
    for value in values:
        is_number = isinstance(value, int | float | np.floating | np.integer) and not isinstance(value, bool)
        if value is not None and not (is_number and 0 < value < float("inf")):
            raise SizeError(f"spacing is {given!r}: it must be positive millimetres, or None for an axis that is kept")
    i, j, k = (None if value is None else float(value) for value in values)
    return i, j, k


def at_spacing(source: VolumeSource, spacing: Sequence[float | None]) -> Space:
    """Give the grid of a volume at another spacing.

    Its outer corner stays where it is, and so do its directions. It has `size · old spacing / new spacing` voxels along each
    axis, rounded (halves up). Where that is none there is one, whose centre is that of the volume: so every centre lies in it.
    """
    old = np.sqrt((source.affine[:3, :3] ** 2).sum(axis=0))
    new = np.array([before if each is None else each for each, before in zip(spacing, old.tolist(), strict=True)])
    sizes = np.array(source.shape[1:])
    counts = np.floor(sizes * old / new + 0.5)
    i, j, k = _counted(np.maximum(1, counts), spacing)
    affine = source.affine.copy()
    affine[:3, :3] *= new / old
    # In voxels of the volume, where the centre of the first voxel lies.
    first = np.where(counts == 0, (sizes - 1) / 2, (new / old - 1) / 2)
    affine[:3, 3] += source.affine[:3, :3] @ first
    return Space((i, j, k), affine, source.codes)


def at_spacing_of_monai(source: VolumeSource, spacing: Sequence[float | None]) -> Space:
    """Give the grid that MONAI's `Spacing` resamples a volume to.

    The centre of the first voxel stays where it is, and between the first and the last there are `(size - 1) · old spacing / new
    spacing` steps, rounded (halves to the even number). A shear is removed. Where the old and the new axes are not parallel to
    within 1e-8 voxels, as the single precision of an oblique file's header makes it, the points `size / 2` coincide instead.

    Source: MONAI Consortium, `compute_shape_offset` and `zoom_affine`, https://docs.monai.io/en/stable/data.html.
    """
    shape, linear = np.array(source.shape[1:]), source.affine[:3, :3]
    scales = np.linalg.cholesky(linear.T @ linear).T
    own = np.sqrt((linear**2).sum(axis=0)).tolist()
    new = np.array([before if each is None else each for each, before in zip(spacing, own, strict=True)])
    affine = np.eye(4)
    affine[:3, :3] = linear @ np.linalg.inv(scales) * (np.sign(np.diag(scales)) * new)
    corners = np.array(list(itertools.product(*((0.0, size - 1.0) for size in shape))))
    places = corners @ np.linalg.solve(affine[:3, :3], linear).T
    i, j, k = _counted(np.round(np.ptp(places, axis=0) + 1), spacing)
    first = [corner for corner, place in zip(corners, places, strict=True) if np.abs((places - place).min(0)).max() <= 1e-8]
    if first:
        affine[:3, 3] = linear @ first[0] + source.affine[:3, 3]
    else:
        affine[:3, 3] = linear @ (shape / 2) + source.affine[:3, 3] - affine[:3, :3] @ (np.array((i, j, k)) / 2)
    return Space((i, j, k), affine, source.codes)


def _counted(sizes: np.ndarray, spacing: Sequence[float | None]) -> list[int]:
    """Check numbers of voxels."""
    if sizes.max() > MOST_VOXELS:
        raise SizeError(f"spacing is {tuple(spacing)}, with which an axis would have {sizes.max():.3g} voxels: give millimetres")
    return sizes.astype(int).tolist()
