"""The sink that keeps a result in memory."""

import torch
from torch import Tensor

from ..core.boxes import Box
from ..io.protocols import VolumeSpec
from ..runtime import memory
from ..volumes.images.image import Image, LabelMap, ScalarImage

__all__ = ["MemorySink", "image_class"]


def image_class(spec: VolumeSpec) -> type[Image]:
    """Class of images that hold such a result."""
    return LabelMap if spec.is_labels else ScalarImage


class MemorySink:
    """Keeps a result in memory, as an `Image` with the affine of the input; see `Sink`."""

    def __repr__(self) -> str:
        return "MemorySink()"

    def open(self, form: VolumeSpec) -> None:
        """See `Sink`."""
        self._spec = form
        with torch.inference_mode(False):  # blocks are written by a thread that is not in the mode of the caller's
            self._data: Tensor | None = memory.empty(form.shape, form.dtype)

    def write(self, box: Box, values: Tensor) -> None:
        """See `Sink`."""
        assert self._data is not None
        self._data[(slice(None), *box.slices)] = values

    def close(self) -> Image:
        """See `Sink`."""
        image = image_class(self._spec)(tensor=self._data, affine=self._spec.affine)
        image.codes = self._spec.codes
        return image

    def abort(self) -> None:
        """See `Sink`."""
        self._data = None
