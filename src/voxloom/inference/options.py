"""How a model is applied, as the user asked for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..core.grids import PatchGrid
from ..core.sizes import Ints, as_overlap
from ..core.windows import OverlapMode, Window
from ..errors import SizeError
from .outputs import Wanted

__all__ = ["Options", "overlap_of"]


@dataclass(frozen=True)
class Options:
    """Everything but the model and the image."""

    patch_size: Ints
    patch_overlap: Ints
    overlap_mode: OverlapMode
    window: Window | None
    batch_size: int
    padding_mode: str | float | None
    fill: float
    memory_limit: int | None
    wanted: Wanted

    def grid_of(self, shape: Ints) -> PatchGrid:
        """Cover a volume with patches; an axis that is shorter than a patch is padded in any case."""
        if self.padding_mode is not None:
            return PatchGrid.cover(shape, self.patch_size, self.patch_overlap, padded=True)
        axes = [
            PatchGrid.cover((length,), patch, 0 if length < patch else shared, padded=length < patch).axes[0]
            for length, patch, shared in zip(shape, self.patch_size, self.patch_overlap, strict=True)
        ]
        return PatchGrid(tuple(axes), tuple(shape), any(map(int.__lt__, shape, self.patch_size)))


def overlap_of(value: Any, patch_size: Ints) -> Ints:
    """Make an even number of voxels for each axis out of voxels or fractions of the patch, which are rounded down to even.

    Raises:
        SizeError: if a fraction is not below 1, or a number of voxels cannot be used.
    """
    value = value.tolist() if hasattr(value, "tolist") else value
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value] * len(patch_size)
    if len(values) != len(patch_size):
        raise SizeError(f"patch_overlap is {tuple(values)}: give one number for all axes, or {len(patch_size)}, one for each")
    voxels = []
    for part, patch in zip(values, patch_size, strict=True):
        if isinstance(part, float):
            if not 0 <= part < 1:
                raise SizeError(
                    f"patch_overlap is {part}: a fraction of the patch must be at least 0 and below 1, and voxels whole"
                )
            part = int(part * patch + 1e-9) // 2 * 2  # 0.29 · 100 is a little less than 29
        voxels.append(part)
    return as_overlap(voxels, patch_size)
