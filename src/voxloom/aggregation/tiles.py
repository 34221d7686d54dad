"""Tiles with what lies before them: a voxel between two tiles is interpolated from both."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.boxes import Box
from ..core.sizes import Ints

__all__ = ["ExtendedTile", "TileEdges", "joined"]


@dataclass(frozen=True, eq=False)
class _Face:
    """The last voxels of a tile along an axis, one voxel deep."""

    box: Box
    values: Tensor


@dataclass(frozen=True, eq=False)
class ExtendedTile:
    """A tile, and the voxels before it along each axis, as far as there are any."""

    tile: Box
    values: Tensor
    """`(C, *tile.shape)`."""
    faces: Mapping[int, _Face]
    """By their axis."""

    @property
    def box(self) -> Box:
        """All voxels that can be read."""
        return Box(tuple(start - (axis in self.faces) for axis, start in enumerate(self.tile.start)), self.tile.stop)

    def views(self, box: Box) -> list[tuple[Box, Tensor]]:
        """Give what a box of voxels consists of, without a copy; what it has twice is the same."""
        faces = [each for axis, each in self.faces.items() if box.start[axis] < self.tile.start[axis]]
        views = []
        for each in (_Face(self.tile, self.values), *faces):
            part = box & each.box
            if part.numel:
                views.append((part, each.values[(slice(None), *part.relative_to(each.box.start).slices)]))
        return views

    def read(self, box: Box, channels: Sequence[int] | None = None) -> Tensor:
        """Give some channels of a box of voxels, or all: a view of the tile, if they are all, and in it."""
        return joined(self.views(box), box, channels)

    def face(self, axis: int) -> _Face:
        """Copy the last voxels along an axis, with what lies before them along the others."""
        start = tuple(self.tile.stop[axis] - 1 if axis == other else first for other, first in enumerate(self.box.start))
        box = Box(start, self.tile.stop)
        return _Face(box, self.read(box).clone())


def joined(views: Sequence[tuple[Box, Tensor]], box: Box, channels: Sequence[int] | None = None) -> Tensor:
    """Put a box of voxels together, of some channels or of all: the view itself, where all channels are in one."""
    first, values = views[0]
    chosen = None if channels is None else torch.tensor(channels, device=values.device)
    if first == box:
        return values if chosen is None else values.index_select(0, chosen)
    out = values.new_empty((len(values) if channels is None else len(channels), *box.shape))
    for part, each in views:
        out[(slice(None), *part.relative_to(box.start).slices)] = each if chosen is None else each.index_select(0, chosen)
    return out


class TileEdges:
    """Keeps the last voxels of tiles for those that come behind them, which take them.

    Tiles may come in any order in which each comes after those before it on every axis.

    Args:
        shape: voxels of the volume.
        axes: those along which something between two tiles is interpolated.

    Example:
        >>> edges = TileEdges((4, 1, 1), axes=(0,))
        >>> first = edges.extended(Box((0, 0, 0), (2, 1, 1)), torch.tensor([1.0, 2.0]).view(1, 2, 1, 1))
        >>> second = edges.extended(Box((2, 0, 0), (4, 1, 1)), torch.tensor([3.0, 4.0]).view(1, 2, 1, 1))
        >>> second.read(second.box).flatten().tolist()
        [2.0, 3.0, 4.0]
    """

    def __init__(self, shape: Ints, axes: tuple[int, ...] = (0, 1, 2)) -> None:
        self._shape, self._axes = shape, axes
        self._kept: dict[tuple[int, Ints], _Face] = {}

    @torch.no_grad()
    def extended(self, box: Box, values: Tensor) -> ExtendedTile:
        """Put a tile together with what lies before it, and keep what those behind it will need."""
        found = {axis: self._kept.pop((axis, box.start), None) for axis in self._axes}
        tile = ExtendedTile(box, values, {axis: face for axis, face in found.items() if face is not None})
        for axis in self._axes:
            if box.stop[axis] < self._shape[axis]:
                behind = tuple(box.stop[axis] if axis == other else start for other, start in enumerate(box.start))
                self._kept[axis, behind] = tile.face(axis)
        return tile
