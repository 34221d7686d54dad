"""An image as the objects of other libraries."""

import importlib
from abc import abstractmethod
from typing import Any

import numpy as np
from torch import Tensor

from ...errors import ImageError
from ...io.protocols import MILLIMETRES, SpaceCodes
from ...io.writing.whole_volumes import nifti_of, simpleitk_of, storable
from .placed import PlacedVolume

__all__ = ["Exchange", "pictures"]


def pictures(of: str = "planes") -> Any:
    """Give the module that draws images, or plans: it is imported when something is drawn, since it needs matplotlib."""
    return importlib.import_module(f"voxloom.plotting.{of}")


class Exchange(PlacedVolume):
    """Gives the data and the place of an image to others. The way back is the constructor of `Image`, or `as_image`."""

    @property
    @abstractmethod
    def data(self) -> Tensor:
        """Tensor `(C, I, J, K)`."""

    @property
    @abstractmethod
    def codes(self) -> SpaceCodes:
        """What NIfTI records of the space beside the affine."""

    def numpy(self) -> np.ndarray:
        """The data as an array `(C, I, J, K)`, which shares their memory.

        Raises:
            ImageError: if NumPy lacks their type, as it lacks bfloat16.
        """
        try:
            return self.data.numpy()
        except TypeError as error:
            raise ImageError(f"NumPy has no type for data of {self.dtype}: convert them, with image.data.float()") from error

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        values = self.numpy()
        # NumPy 1 knows no None.
        return np.asarray(values, dtype=dtype) if copy is None else np.array(values, dtype=dtype, copy=copy)

    def plot(
        self,
        labels: Any = None,
        *,
        at: Any = None,
        label: int | None = None,
        channel: int = 0,
        output: Any = None,
    ) -> Any:
        """Draw three planes of the image, as radiologists look at them: the patient's right is on the left.

        Only those planes are read, where the file allows it.

        Args:
            labels: a label map on the same grid, which is laid on top.
            at: the voxel `(I, J, K)` that the planes go through; by default the middle.
            label: the label through whose middle they go instead.
            channel: which channel is drawn.
            output: name of a picture to write, such as `"scan.png"`.

        Returns:
            Figure of matplotlib.

        Raises:
            MissingDependencyError: if matplotlib is not installed: `pip install voxloom[plot]`.

        Example:
            >>> import voxloom as vx
            >>> head = vx.datasets.HeadPhantom(32)
            >>> len(head.t1.plot(head.labels, label=7).axes)
            3
        """
        return pictures().plot_image(self, labels, at, label, channel, output)

    def _repr_html_(self) -> str:
        return pictures().html_of({"": self})

    def as_nibabel(self) -> Any:
        """Give an image of nibabel `(I, J, K)`, or `(I, J, K, C)` for several channels, as it would be saved.

        Example:
            >>> import torch, voxloom as vx
            >>> vx.ScalarImage(torch.zeros(2, 8, 9, 10)).as_nibabel().shape
            (8, 9, 10, 2)
        """
        image = nifti_of(storable(self.data), self.affine, self.codes)
        # The header has it in single precision, and nibabel keeps the one that it is given.
        scale = np.diag([*[1 / MILLIMETRES.get(self.codes.space_unit, 1.0)] * 3, 1.0])
        return type(image)(image.dataobj, scale @ self.affine, image.header)

    def as_sitk(self) -> Any:
        """Give an image of SimpleITK, in its LPS+ world; several channels become the components of its voxels.

        Example:
            >>> import torch, voxloom as vx
            >>> vx.ScalarImage(torch.zeros(2, 8, 9, 10)).as_sitk().GetSize()
            (8, 9, 10)
        """
        return simpleitk_of(storable(self.data), self.affine)
