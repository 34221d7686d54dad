"""What a model is applied to: one volume, however it was given, read patch by patch."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core import memory
from ..core.boxes import Box
from ..core.grids import PatchGrid
from ..errors import ImageError, SubjectError
from ..sampling.padded import PaddedImage, Voxels
from ..volumes.formats.base import as_tensor
from ..volumes.image import Image, ScalarImage
from ..volumes.subject import Subject

__all__ = ["ArrayVoxels", "PatchReader", "volumes_of"]


class ArrayVoxels:
    """Something that is read by slices, such as an array of Zarr or HDF5, `(C, I, J, K)` or `(I, J, K)`.

    Args:
        array: has a `shape`, a `dtype` and slices, which NumPy can make arrays of.
    """

    def __init__(self, array: Any) -> None:
        self._array = array
        self._has_channels = len(array.shape) == 4
        if not self._has_channels and len(array.shape) != 3:
            raise ImageError(f"the array has shape {tuple(array.shape)}: it must be (I, J, K), or (C, I, J, K)")
        self.dtype = as_tensor(np.zeros(1, dtype=np.dtype(array.dtype))).dtype
        sizes = [int(size) for size in array.shape]
        if 0 in sizes:
            raise ImageError(f"the array has shape {tuple(sizes)}, which has no voxels")
        c, i, j, k = sizes if self._has_channels else [1, *sizes]
        self.shape = (c, i, j, k)
        self.spatial_shape = (i, j, k)
        self.num_channels = c

    def read(self, box: Box) -> Tensor:
        """Read all channels of a box of voxels `(I, J, K)`."""
        slices = (slice(None), *box.slices) if self._has_channels else box.slices
        values = as_tensor(np.asarray(self._array[slices]))
        return values if self._has_channels else values[None]


def volumes_of(image: Any, image_name: str | Sequence[str] | None = None) -> dict[str, Voxels]:
    """Find the volumes whose channels, one after the other, a model is applied to.

    Args:
        image: a path, an `Image`, a `Subject`, a tensor, or an array that is read by slices.
        image_name: which images of a subject; may be left out where there is only one.

    Raises:
        SubjectError: if it is none of these, or it is not clear which images of a subject are meant.
        SpaceError: if they do not lie on one another.
    """
    if isinstance(image, Subject):
        return dict(_chosen(image, image_name).images)
    if image_name is not None:
        raise SubjectError(f"image_name is {image_name!r}, but only a Subject has images with names")
    if isinstance(image, Image):
        return {"image": image}
    if isinstance(image, str | os.PathLike):
        return {"image": ScalarImage(image)}
    if isinstance(image, Tensor | np.ndarray):
        return {"image": ScalarImage(image[None] if image.ndim == 3 else image)}
    if all(hasattr(image, name) for name in ("shape", "dtype", "__getitem__")):
        return {"image": ArrayVoxels(image)}
    raise SubjectError(
        f"the image is of type {type(image).__name__}: give a path, an Image, a Subject, a tensor (C, I, J, K), or an array that"
        " is read by slices"
    )


def _chosen(subject: Subject, image_name: str | Sequence[str] | None) -> Subject:
    if image_name is None:
        if len(subject.images) > 1:
            raise SubjectError(f"the subject has {len(subject.images)} images: say which with image_name, {list(subject.images)}")
        return subject
    names = [image_name] if isinstance(image_name, str) else list(image_name)
    if not names:
        raise SubjectError("image_name names no image")
    chosen = Subject({name: subject.get_image(name) for name in names})
    chosen.check_space()
    return chosen


class PatchReader:
    """Cuts batches of patches out of volumes, in the type that a model takes.

    Args:
        volumes: whose channels are put one after the other.
        grid: the patches.
        padding_mode: what lies beyond the volume.
        dtype: type of the batches.
    """

    def __init__(
        self, volumes: dict[str, Voxels], grid: PatchGrid, padding_mode: str | float | int | None, dtype: torch.dtype
    ) -> None:
        self._padded = [PaddedImage(volume, grid.box, padding_mode, name) for name, volume in volumes.items()]
        self._grid = grid
        self._dtype = dtype
        self.num_channels = sum(volume.num_channels for volume in volumes.values())

    def read(self, batch: Sequence[tuple[int, ...]], batch_size: int, pinned: bool) -> Tensor:
        """Read patches, by their numbers on the axes.

        Args:
            batch: which patches.
            batch_size: patches in the result, of which the last one is repeated where there are fewer.
            pinned: let the memory be such as can be copied to a GPU while that computes.

        Returns:
            Tensor `(B, C, I, J, K)`.
        """
        shape = (batch_size, self.num_channels, *self._grid.patch_size)
        out = torch.empty(shape, dtype=self._dtype, pin_memory=True) if pinned else memory.empty(shape, self._dtype)
        for target, numbers in zip(out, batch, strict=False):
            box, first = self._grid.location(numbers).box, 0
            for padded in self._padded:
                count = padded.image.num_channels
                part = target[first : first + count]
                if padded.image.dtype == self._dtype:
                    padded.read_into(part, box)
                else:
                    values = torch.empty(part.shape, dtype=padded.image.dtype)
                    padded.read_into(values, box)
                    part.copy_(values)
                first += count
        for target in out[len(batch) :]:
            target.copy_(out[len(batch) - 1])
        return out
