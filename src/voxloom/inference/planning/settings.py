"""How a model is applied, and what to."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from ...core.geometry.interpolation import Interpolation
from ...core.grid.grids import PatchGrid, PatchSpacing
from ...core.grid.windows import OverlapMode, Window
from ...core.sizes import Ints, filled_in
from ...io.labels import Label
from ...io.protocols import Space, VolumeSource
from ...models.forms import CallForm

__all__ = ["Input", "Settings"]


@dataclass(frozen=True)
class Settings:
    """How a model is applied, whatever it is applied to."""

    patch_size: Ints
    """-1 stands for all of an axis."""
    patch_overlap: tuple[int | float, ...]
    """Voxels, or fractions of the patch."""
    patch_spacing: PatchSpacing
    overlap_mode: OverlapMode
    window: Window | None
    batch_size: int
    full_batches: bool
    padding_mode: str | float | None
    fill: float
    memory_limit: int | None
    dtype: torch.dtype | None
    form: CallForm = CallForm()  # noqa: RUF009 - it is frozen

    @property
    def context(self) -> Ints:
        """Voxels around a patch that the model is given, and that it does not predict."""
        return self.form.context

    @property
    def input_size(self) -> Ints:
        """Voxels that the model is given for a patch."""
        return self.form.input_size(self.patch_size)

    def for_shape(self, shape: Ints) -> "Settings":
        """Give the settings for a volume, whose axes are in place of -1."""
        return replace(self, patch_size=filled_in(self.patch_size, shape))

    def grid_of(self, shape: Ints) -> PatchGrid:
        """Cover a volume with patches; an axis that is shorter than a patch is padded in any case."""
        spacing = self.patch_spacing
        if self.padding_mode is not None:
            return PatchGrid.cover(shape, self.patch_size, self.patch_overlap, padded=True, patch_spacing=spacing)
        axes = [
            PatchGrid.cover(
                (length,), (patch,), 0 if length < patch else shared, padded=length < patch, patch_spacing=spacing
            ).axes[0]
            for length, patch, shared in zip(shape, self.patch_size, self.patch_overlap, strict=True)
        ]
        return PatchGrid(tuple(axes), tuple(shape), any(map(int.__lt__, shape, self.patch_size)))


@dataclass(frozen=True, eq=False)
class Input:
    """What a plan is made for."""

    source: VolumeSource
    name: str
    """What messages call it."""
    dtype: torch.dtype
    """Type of the batches that are made of it."""
    resident_bytes: int
    """Memory that it takes because it cannot be read in parts, before anything of it has been read."""
    packed_bytes: int
    """How much of this unpacking its files to the disk would save, where that may be done."""
    needed: np.ndarray | None = None
    """Which patches are computed, by their numbers; None for all."""
    like: Space | None = None
    """The grid that results are interpolated to; None for that of each output."""
    kinds: tuple[Interpolation, Interpolation, Interpolation] = ("linear", "linear", "linear")
    """How scores are interpolated to it, along each axis of the input."""
    steps: tuple[str, ...] = ()
    """What was done to an image for the input, in words."""
    labels: tuple[Label, ...] = ()
    """What the numbers of label maps mean."""
    unpacked: VolumeSource | None = None
    """What is read in place of the source, if its files have been unpacked."""

    @property
    def readable(self) -> VolumeSource:
        """What is read."""
        return self.source if self.unpacked is None else self.unpacked
