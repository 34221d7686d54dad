"""Finding out how the voxels of one grid lie to those of another."""

import itertools
from collections.abc import Sequence

import numpy as np

from .affines import Affine
from .aligned import AlignedMap, AxisMap
from .interpolation import Interpolation, SpaceMap
from .oblique import ObliqueMap

__all__ = ["space_map"]

# How far, in voxels of the source, any voxel may lie beside where its axis alone would have it.
SHEAR = 0.01


def space_map(
    source_shape: Sequence[int],
    source_affine: Affine,
    target_shape: Sequence[int],
    target_affine: Affine,
    kinds: Sequence[Interpolation] = ("linear",) * 3,
    extent: Sequence[tuple[float, float]] | None = None,
) -> SpaceMap:
    """Map the voxels of a target to a source.

    Args:
        source_shape: voxels of the source `(I, J, K)`.
        source_affine: where they lie.
        target_shape: voxels of the target.
        target_affine: where they lie.
        kinds: how to interpolate along each axis of the source.
        extent: where the source begins and ends along each axis; None for the edges of its voxels.
    """
    ends = tuple((-0.5, size - 0.5) for size in source_shape) if extent is None else tuple(extent)
    matrix = np.linalg.inv(source_affine) @ target_affine
    middle = (np.asarray(target_shape) - 1) / 2
    extents = abs(matrix[:3, :3]) * (middle + 0.5)
    # The axis of the target that belongs to each axis of the source: beside it, as little as possible is moved.
    columns = max(itertools.permutations(range(3)), key=lambda each: sum(extents[row, each[row]] for row in range(3)))
    axes: dict[int, AxisMap] = {}
    for row, column in enumerate(columns):
        others = [other for other in range(3) if other != column]
        if sum(abs(matrix[row, other]) * middle[other] for other in others) > SHEAR:
            return ObliqueMap(tuple(source_shape), tuple(target_shape), matrix, tuple(kinds), ends)
        offset = matrix[row, 3] + sum(matrix[row, other] * middle[other] for other in others)
        axes[column] = AxisMap.of(target_shape[column], matrix[row, column], offset, source_shape[row], kinds[row], ends[row])
    i, j, k = (columns.index(axis) for axis in range(3))
    return AlignedMap((axes[0], axes[1], axes[2]), (i, j, k), tuple(source_shape))
