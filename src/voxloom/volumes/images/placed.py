"""What follows from the shape, the type and the affine of a volume."""

import itertools
from abc import ABC, abstractmethod

import numpy as np
import torch

from ...core.boxes import Box
from ...core.geometry.affines import Affine, spacing_of

__all__ = ["PlacedVolume"]


class PlacedVolume(ABC):
    """Anything of voxels `(C, I, J, K)` that lies somewhere in the world."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int, int]:
        """Channels and voxels `(C, I, J, K)`."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Type of the data."""

    affine: Affine
    """RAS+ matrix of 4 × 4 from voxels to millimetres, in float64."""

    @property
    def spatial_shape(self) -> tuple[int, int, int]:
        """Voxels `(I, J, K)`."""
        return self.shape[1:]

    @property
    def num_channels(self) -> int:
        """Number of channels."""
        return self.shape[0]

    @property
    def memory(self) -> int:
        """Bytes that the data take in memory."""
        return Box.of_shape(self.shape).numel * self.dtype.itemsize

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Millimetres from one voxel to the next along each axis."""
        return spacing_of(self.affine)

    @property
    def origin(self) -> tuple[float, float, float]:
        """Place of the first voxel's centre, in millimetres."""
        i, j, k = self.affine[:3, 3].tolist()
        return i, j, k

    def get_center(self, lps: bool = False) -> tuple[float, float, float]:
        """Give the place of the middle of the volume, in millimetres: RAS+, or LPS+."""
        middle = [(size - 1) / 2 for size in self.spatial_shape]
        x, y, z = (self.affine[:3, :3] @ middle + self.affine[:3, 3]).tolist()
        return (-x, -y, z) if lps else (x, y, z)

    def get_bounds(self) -> tuple[tuple[float, float], tuple[float, float], tuple[float, float]]:
        """Give the least and the largest coordinate of the volume along each axis of the world, in millimetres, RAS+.

        The outer corners of voxels count, also of an oblique volume.
        """
        corners = np.array([(*corner, 1) for corner in itertools.product(*((-0.5, size - 0.5) for size in self.spatial_shape))])
        places = corners @ self.affine[:3].T
        x, y, z = zip(places.min(0).tolist(), places.max(0).tolist(), strict=True)
        return x, y, z

    def is_2d(self) -> bool:
        """Whether it is a single slice: its last axis is one voxel long."""
        return self.spatial_shape[2] == 1

    @property
    def orientation(self) -> tuple[str, str, str]:
        """Where each axis points to: one of R, L, A, P, S and I for each."""
        import nibabel as nib

        i, j, k = nib.aff2axcodes(self.affine)
        return i, j, k
