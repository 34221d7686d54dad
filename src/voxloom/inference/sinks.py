"""Where finished output goes: a protocol, and the sink that keeps it in memory."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..core import memory
from ..core.boxes import Box
from ..volumes.formats import SpaceCodes
from ..volumes.image import Image, LabelMap, ScalarImage
from ..volumes.space import Affine

__all__ = ["MemorySink", "Sink", "VolumeForm"]


@dataclass(frozen=True)
class VolumeForm:
    """What a result will be, before any of it is there."""

    shape: tuple[int, int, int, int]
    """Channels and voxels `(C, I, J, K)`."""
    dtype: torch.dtype
    affine: Affine
    """RAS+, in millimetres."""
    codes: SpaceCodes
    """What NIfTI records of the space beside the affine."""
    is_labels: bool

    @property
    def image_class(self) -> type[Image]:
        """Class of images that hold such a result."""
        return LabelMap if self.is_labels else ScalarImage


@runtime_checkable
class Sink(Protocol):
    """Takes finished output, block by block. Its methods are called one at a time, but not all from one thread.

    After `open` each voxel is written once, in blocks that do not overlap; then follows `close`, or, after an error, `abort`.
    """

    def open(self, form: VolumeForm) -> None:
        """Make ready for a result."""
        ...

    def write(self, box: Box, values: Tensor) -> None:
        """Take a block.

        Args:
            box: voxels `(I, J, K)`.
            values: tensor `(C, *box.shape)` on the CPU, which the sink may keep, but not change.
        """
        ...

    def close(self) -> Any:
        """All is written. What is returned is what `predict` returns."""
        ...

    def abort(self) -> None:
        """No more will come."""
        ...


class MemorySink:
    """Keeps a result in memory, as an `Image` with the affine of the input."""

    def open(self, form: VolumeForm) -> None:
        """See `Sink`."""
        self._form = form
        with torch.inference_mode(False):  # blocks are written by a thread that is not in the mode of the caller's
            self._data: Tensor | None = memory.empty(form.shape, form.dtype)

    def write(self, box: Box, values: Tensor) -> None:
        """See `Sink`."""
        assert self._data is not None
        self._data[(slice(None), *box.slices)] = values

    def close(self) -> Image:
        """See `Sink`."""
        image = self._form.image_class(tensor=self._data, affine=self._form.affine)
        image.codes = self._form.codes
        return image

    def abort(self) -> None:
        """See `Sink`."""
        self._data = None
