"""Slow and obvious: what aggregation means, voxel by voxel, in float64. The oracle of the tests."""

import itertools

import numpy as np
import torch


def window_of(mode, size):
    """The window of a mode, from its formula."""
    position = np.arange(size)
    if mode == "average":
        return np.ones(size)
    if mode == "hann":
        return np.sin(np.pi * (position + 1) / (size + 1)) ** 2
    if mode == "gaussian":
        return np.exp(-0.5 * ((position - (size - 1) / 2) / (size / 8)) ** 2)
    return mode(size).double().numpy()


def blend(shape, patches, mode, fill=0.0):
    """Weighted mean, at each voxel, of the patches that cover it, and `fill` where none does.

    Args:
        shape: voxels of the volume.
        patches: pairs of the first index of a patch, which may be negative, and its tensor (C, ...).
        mode: name of a window, or a window.
    """
    channels = patches[0][1].shape[0]
    total, weights = np.zeros((channels, *shape)), np.zeros(shape)
    for index, patch in patches:
        windows = [window_of(mode, size) for size in patch.shape[1:]]
        values = patch.double().numpy()
        for offset in itertools.product(*(range(size) for size in patch.shape[1:])):
            voxel = tuple(first + step for first, step in zip(index, offset, strict=True))
            if all(0 <= position < size for position, size in zip(voxel, shape, strict=True)):
                weight = np.prod([window[step] for window, step in zip(windows, offset, strict=True)])
                total[(slice(None), *voxel)] += weight * values[(slice(None), *offset)]
                weights[voxel] += weight
    return torch.from_numpy(np.where(weights > 0, total / np.where(weights > 0, weights, 1), fill))


def crop(shape, patches):
    """At each voxel, the value of the patch whose centre is nearest on every axis; the later one of two equally near."""
    size = patches[0][1].shape[1:]
    starts = [sorted({index[axis] for index, _ in patches}) for axis in range(len(shape))]
    by_index = dict(patches)
    result = torch.zeros((len(patches[0][1]), *shape), dtype=patches[0][1].dtype)
    for voxel in itertools.product(*map(range, shape)):
        nearest = tuple(
            min(
                (start for start in starts[axis] if start <= voxel[axis] < start + size[axis]),
                key=lambda start, axis=axis: (abs(start + (size[axis] - 1) / 2 - voxel[axis]), -start),
            )
            for axis in range(len(shape))
        )
        offset = tuple(position - start for position, start in zip(voxel, nearest, strict=True))
        result[(slice(None), *voxel)] = by_index[nearest][(slice(None), *offset)]
    return result
