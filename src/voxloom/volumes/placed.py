"""What follows from the shape, the type and the affine of a volume."""

from abc import ABC, abstractmethod

import nibabel as nib
import torch

from ..core.affines import Affine, spacing_of
from ..core.boxes import Box

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

    @property
    def orientation(self) -> tuple[str, str, str]:
        """Where each axis points to: one of R, L, A, P, S and I for each."""
        i, j, k = nib.aff2axcodes(self.affine)
        return i, j, k
