"""Cascades of nnU-Net's: a stage is given the labels of the one before."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core.boxes import Box
from ...inference.predictor import Predictor
from ...inference.specified import ModelInput, filled_mask
from ...io.arrays.composed import StackedSource
from ...io.protocols import Json, Space, VolumeSource, read_checked
from ...models.loading import LoadedModel
from ...volumes.views.spatial import ResampledSource, View

__all__ = ["Cascade"]

# What interpolated indicators of labels differ by, at most, that are as large as one another.
TIE = 1e-6
# What nnU-Net multiplies indicators by before they are rounded to half precision.
HALF_SCALE = 1000


@dataclass(frozen=True, eq=False)
class Cascade:
    """Gives a stage the labels of the one before as more channels."""

    model: LoadedModel
    labels: tuple[int, ...]
    """Those of the model that follows, in ascending order."""
    is_torch: bool
    """Whether labels are resampled by PyTorch, which has another way with those that are as near as others."""

    def found(self, image: VolumeSource, options: Mapping[str, Any]) -> VolumeSource:
        """See `Preceding`."""
        labels: VolumeSource = Predictor(self.model, **options)(image, like=(image.shape[1:], image.affine))
        return labels

    def added(self, image: VolumeSource, found: VolumeSource, made: ModelInput) -> VolumeSource:
        """See `Preceding`."""
        # Where values were scaled by a mask, labels are in it; but here it is asked of voxels without one.
        filled = filled_mask(made.turned_and_cropped(image)) if made.mask is None else made.mask
        indicators: VolumeSource = _Indicators(made.turned_and_cropped(found), self.labels, filled)
        labels = _Largest(indicators, made.space, [min(order, 1) for order in made.orders], self.is_torch)
        return StackedSource([made.source, labels], ["the image", "the labels of the stage before"], check_place=False)


class _Indicators(View):
    """For each label a channel that is 1 where it is; before these two for all else, outside of what is filled and within it."""

    def __init__(self, of: VolumeSource, labels: Sequence[int], filled: np.ndarray) -> None:
        super().__init__(of)
        self.labels, self._filled = tuple(labels), filled
        self.shape = (len(self.labels) + 2, *of.shape[1:])
        self.dtype, self.affine, self.chunks = torch.float32, of.affine, of.chunks

    def read(self, box: Box) -> Tensor:
        """See `VolumeSource`."""
        values = read_checked(self.of, box)[0]
        found = [values == label for label in self.labels]
        rest, filled = ~torch.stack(found).any(0), torch.from_numpy(self._filled[box.slices])
        return torch.stack([rest & ~filled, rest & filled, *found]).float()

    def fingerprint(self) -> Json:
        """See `VolumeSource`."""
        return {"indicators": list(self.labels), "of": self.of.fingerprint()}

    def over(self, source: VolumeSource) -> "_Indicators":
        """See `View`."""
        return _Indicators(source, self.labels, self._filled)


class _Largest(View):
    """1 where a channel is the largest on another grid, else 0; without the first two.

    Of several the nearest voxel's is taken, or, as nnU-Net has it where PyTorch resamples labels, the first of those that are as
    large in half precision.

    Args:
        of: the channels.
        space: the grid; None for their own.
        orders: how they are interpolated to it.
        is_torch: which of these is meant.
    """

    def __init__(self, of: VolumeSource, space: Space | None, orders: Sequence[int], is_torch: bool) -> None:
        super().__init__(of)
        self._space, self._orders, self._is_torch = space, tuple(orders), is_torch
        self._interpolated = of if space is None else ResampledSource(of, space, self._orders)
        self._nearest = of if space is None else ResampledSource(of, space, 0)
        self.shape = (of.shape[0] - 2, *self._interpolated.shape[1:])
        self.dtype, self.affine, self.chunks = of.dtype, self._interpolated.affine, self._interpolated.chunks

    def read(self, box: Box) -> Tensor:
        """See `VolumeSource`."""
        values = read_checked(self._interpolated, box)
        if self._is_torch:
            largest = (values * HALF_SCALE).half().argmax(0)
        else:
            is_largest = values >= values.amax(0) - TIE
            nearest = read_checked(self._nearest, box).argmax(0)
            is_nearest = is_largest.gather(0, nearest[None])[0]
            largest = torch.where(is_nearest, nearest, is_largest.to(torch.uint8).argmax(0))
        return torch.stack([largest == number for number in range(2, self.of.shape[0])]).to(self.dtype)

    def fingerprint(self) -> Json:
        """See `VolumeSource`."""
        return {"largest": "first" if self._is_torch else "nearest", "of": self._interpolated.fingerprint()}

    def over(self, source: VolumeSource) -> "_Largest":
        """See `View`."""
        return _Largest(source, self._space, self._orders, self._is_torch)
