"""What images give of themselves in other spaces."""

from abc import abstractmethod
from typing import Any, Self

from ...errors import SizeError
from ...io.protocols import VolumeSource
from ..constants import LABEL
from ..views.spaces import as_spacing, at_spacing, space_of
from ..views.spatial import ResampledSource, TurnedSource

__all__ = ["Views"]


class Views:
    """An image that can be turned and resampled; nothing is read before it is needed."""

    type: str

    @abstractmethod
    def as_source(self) -> VolumeSource:
        """Give the image as a source of voxels, which it is."""

    @abstractmethod
    def of_source(self, source: VolumeSource) -> Self:
        """Make an image of the same class, type and metadata whose voxels come from a source."""

    def reoriented(self, orientation: Any) -> Self:
        """Give the image with axes that point to other directions: no value and no place changes, and nothing is read.

        Args:
            orientation: where the axes are to point to: `"RAS"`, `"LPS"` and so on. Of axes that are oblique, the nearest.

        Raises:
            ModeError: if that is no orientation.

        Example:
            >>> import torch, voxloom as vx
            >>> image = vx.ScalarImage(torch.rand(1, 20, 30, 40)).reoriented("SLP")
            >>> image.shape, image.orientation
            ((1, 40, 20, 30), ('S', 'L', 'P'))
        """
        return self.of_source(TurnedSource.to(self.as_source(), orientation))

    def resampled(self, spacing: Any = None, *, like: Any = None, order: int | None = None, fill: float = 0) -> Self:
        """Give the image on another grid; voxels are interpolated when they are read.

        With a spacing, the outer corner and the directions stay, and there are `size · old / new` voxels along each axis,
        rounded. A voxel whose centre is in the outer half of a border voxel takes values as at the border. There is no smoothing
        before.

        Args:
            spacing: millimetres, one number or one for each axis; None keeps that of an axis.
            like: the grid, in place of a spacing: another image or its path, or a shape `(I, J, K)` and an affine.
            order: 0 for the nearest voxel, 1 for linear interpolation, in float32; 3 for cubic splines, for which the whole
                volume is read and resampled at once. By default 0 for labels, else 1.
            fill: value of voxels of `like` whose centres lie outside of the image.

        Raises:
            SizeError, ModeError, SubjectError, SpaceError: if an argument cannot be used.

        Example:
            >>> import torch, voxloom as vx
            >>> image = vx.ScalarImage(torch.rand(1, 20, 30, 40)).resampled(1.5)
            >>> image.spatial_shape, image.spacing
            ((13, 20, 27), (1.5, 1.5, 1.5))
        """
        if (spacing is None) == (like is None):
            raise SizeError("give either a spacing, or a grid with like=")
        source = self.as_source()
        space = at_spacing(source, as_spacing(spacing)) if like is None else space_of(like, source)
        usual = 0 if self.type == LABEL else 1
        return self.of_source(ResampledSource(source, space, usual if order is None else order, fill))
