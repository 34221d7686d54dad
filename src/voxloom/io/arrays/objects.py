"""Volumes that other libraries hold, as sources of voxels: of nibabel, of SimpleITK, and whatever can be sliced."""

import sys
from typing import Any

import numpy as np

from ...core.geometry.affines import lps_to_ras
from ..protocols import VolumeSource
from .memory import ArraySource

__all__ = ["image_source_of", "source_of"]


def source_of(thing: Any, affine: Any = None) -> VolumeSource | None:
    """Give an object of another library as a source, which is read by slices where the library does that.

    Args:
        thing: an image of nibabel `(I, J, K)` or `(I, J, K, C)`, one of SimpleITK, or anything with a `shape`, a `dtype` and
            slices that NumPy makes arrays of, `(I, J, K)` or `(C, I, J, K)`.
        affine: in place of its own.

    Returns:
        The source; None if it is nothing of these.

    Raises:
        ImageError: if it has another number of axes, or no voxels.
    """
    # Whoever has an image of nibabel's has imported it, which takes its time; another thread may be about to.
    image_class = getattr(sys.modules.get("nibabel.spatialimages"), "SpatialImage", None)
    if image_class is not None and isinstance(thing, image_class):
        return _of_nibabel(thing, affine)
    if type(thing).__module__.startswith("SimpleITK") and hasattr(thing, "GetDirection"):
        return _of_simpleitk(thing, affine)
    if all(hasattr(thing, name) for name in ("shape", "dtype", "__getitem__")):
        return ArraySource(thing, affine)
    return None


def image_source_of(thing: Any) -> VolumeSource | None:
    """Give an image of nibabel or SimpleITK as a source; None for anything else, even if it can be sliced."""
    is_array = type(thing).__module__.partition(".")[0] not in ("nibabel", "SimpleITK")
    return None if is_array else source_of(thing)


def _of_nibabel(image: Any, affine: Any) -> VolumeSource:
    if image.affine is None:
        return ArraySource(_ChannelsFirst(image.dataobj), affine)
    from ..nifti.files import space_of

    # As in files: in millimetres, with what NIfTI records beside it.
    own, codes = space_of(image, "the image of nibabel")
    source = ArraySource(_ChannelsFirst(image.dataobj), own if affine is None else affine)
    source.codes = codes
    return source


class _ChannelsFirst:
    """Voxels `(I, J, K, C)` that are read as `(C, I, J, K)`."""

    def __init__(self, voxels: Any) -> None:
        self._voxels = voxels
        self._has_channels = len(voxels.shape) == 4
        self.shape = (voxels.shape[3], *voxels.shape[:3]) if self._has_channels else tuple(voxels.shape)
        # What is stored may be scaled when it is read.
        self.dtype = np.asarray(voxels[tuple(slice(0, 1) for _ in voxels.shape)]).dtype

    def __getitem__(self, slices: tuple[slice, ...]) -> np.ndarray:
        if not self._has_channels:
            return np.asarray(self._voxels[slices])
        channels, *spatial = slices
        return np.moveaxis(np.asarray(self._voxels[(*spatial, channels)]), 3, 0)


def _of_simpleitk(image: Any, affine: Any) -> VolumeSource:
    import SimpleITK

    values = SimpleITK.GetArrayFromImage(image)
    if image.GetNumberOfComponentsPerPixel() > 1:
        values = np.moveaxis(values, -1, 0)
        values = values.transpose(0, *range(values.ndim - 1, 0, -1))
    elif image.GetDimension() == 4:  # times, as in files
        values = values.transpose(0, 3, 2, 1)
    else:
        values = values.T
    if image.GetDimension() == 2:
        values = values[..., None]
    own = lps_to_ras(image.GetDirection(), image.GetSpacing(), image.GetOrigin())
    return ArraySource(values, own if affine is None else affine)
