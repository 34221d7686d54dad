"""Cascades of nnU-Net's: a stage is given the labels of the one before."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...core.boxes import Box
from ...inference.predictor import Predictor
from ...inference.specified import ModelInput
from ...io.arrays.composed import StackedSource
from ...io.protocols import Json, Space, VolumeSource, read_checked
from ...models.loading import LoadedModel
from ...volumes.views.spatial import ResampledSource, View

__all__ = ["Cascade"]

# What interpolated indicators of labels differ by, at most, that are as large as one another.
TIE = 1e-6


@dataclass(frozen=True, eq=False)
class Cascade:
    """Gives a stage the labels of the one before as more channels."""

    model: LoadedModel
    labels: tuple[int, ...]

    def added(self, image: VolumeSource, made: ModelInput, like: Space, options: Mapping[str, Any]) -> VolumeSource:
        """See `Preceding`."""
        found = Predictor(self.model, **options)(image, like=(like.shape, like.affine))
        source = made.source
        indicators: VolumeSource = _Indicators(made.turned_and_cropped(found), self.labels)
        labels = _Largest(indicators, made.space, [min(order, 1) for order in made.orders])
        return StackedSource([source, labels], ["the image", "the labels of the stage before"], check_place=False)


class _Indicators(View):
    """For each label a channel that is 1 where it is, and one for all else, which comes first."""

    def __init__(self, of: VolumeSource, labels: Sequence[int]) -> None:
        super().__init__(of)
        self.labels = tuple(labels)
        self.shape = (len(self.labels) + 1, *of.shape[1:])
        self.dtype, self.affine, self.chunks = torch.float32, of.affine, of.chunks

    def read(self, box: Box) -> Tensor:
        """See `VolumeSource`."""
        values = read_checked(self.of, box)[0]
        found = torch.stack([values == label for label in self.labels]).float()
        return torch.cat([1 - found.sum(0, keepdim=True), found])

    def fingerprint(self) -> Json:
        """See `VolumeSource`."""
        return {"indicators": list(self.labels), "of": self.of.fingerprint()}

    def over(self, source: VolumeSource) -> "_Indicators":
        """See `View`."""
        return _Indicators(source, self.labels)


class _Largest(View):
    """1 where a channel is the largest on another grid, else 0; without the first one. Of several, the nearest voxel's is taken.

    Args:
        of: the channels.
        space: the grid; None for their own.
        orders: how they are interpolated to it.
    """

    def __init__(self, of: VolumeSource, space: Space | None, orders: Sequence[int]) -> None:
        super().__init__(of)
        self._space, self._orders = space, tuple(orders)
        self._interpolated = of if space is None else ResampledSource(of, space, self._orders)
        self._nearest = of if space is None else ResampledSource(of, space, 0)
        self.shape = (of.shape[0] - 1, *self._interpolated.shape[1:])
        self.dtype, self.affine, self.chunks = of.dtype, self._interpolated.affine, self._interpolated.chunks

    def read(self, box: Box) -> Tensor:
        """See `VolumeSource`."""
        values = read_checked(self._interpolated, box)
        is_largest = values >= values.amax(0) - TIE
        nearest = read_checked(self._nearest, box).argmax(0)
        is_nearest = is_largest.gather(0, nearest[None])[0]
        largest = torch.where(is_nearest, nearest, is_largest.to(torch.uint8).argmax(0))
        return torch.stack([largest == number for number in range(1, self.of.shape[0])]).to(self.dtype)

    def fingerprint(self) -> Json:
        """See `VolumeSource`."""
        return {"largest": True, "of": self._interpolated.fingerprint()}

    def over(self, source: VolumeSource) -> "_Largest":
        """See `View`."""
        return _Largest(source, self._space, self._orders)
