"""Results that several processes make in parts: what a store must offer for that, and the coarser levels of a whole array."""

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from ...core.boxes import Box
from ...core.grid.shards import ShardGrid
from ..protocols import Json, VolumeSpec, VolumeStore
from .encoding import put_shard
from .layout import Layout
from .writing import PyramidWriter

__all__ = ["PartsStore", "make_coarser"]


@runtime_checkable
class PartsStore(VolumeStore, Protocol):
    """A store of a result that may be made in parts: each process writes whole shards of an array in a folder.

    When all parts are there, one process calls `complete`, `make_ready` and `commit`; each may be called again after an
    interruption.
    """

    @property
    def path(self) -> Path:
        """Where the result will be."""
        ...

    def layout(self, spec: VolumeSpec) -> Layout:
        """Say how the array lies in its folder.

        Raises:
            SpaceError, SizeError, ModeError: if it cannot.
        """
        ...

    def array(self, run: str) -> Path:
        """Name the folder of an array of which no part is missing."""
        ...

    def complete(self, spec: VolumeSpec, room: Path, run: str) -> None:
        """Make of that array all that the result lacks, but what is said of it.

        Args:
            spec: what the result is.
            room: a folder that may be made for the time being.
            run: name of the run.
        """
        ...

    def make_ready(self, sidecar: Mapping[str, Json], run: str) -> None:
        """Let nothing be missing but the name."""
        ...


def make_coarser(layout: Layout, folder: Path, room: Path) -> None:
    """Make the coarser levels of an array of which the finest is whole, shard by shard.

    Args:
        layout: of the array.
        folder: that it is in.
        room: a folder that is made for the time being.
    """
    if not layout.factors:
        return
    shutil.rmtree(room, ignore_errors=True)
    finest, *coarser = layout.arrays(folder)
    levels: list[Callable[[Box, np.ndarray], object]] = [lambda box, values: None]
    levels += [partial(put_shard, array, layout.has_channels) for array in coarser]
    writer = PyramidWriter(
        room,
        levels,
        layout.spec.shape[0],
        layout.shapes,
        layout.dtype,
        layout.units,
        layout.factors,
        layout.spec.is_labels,
        is_new=True,
    )
    boxes = ShardGrid(layout.spec.shape[1:], layout.units[0])
    for number in range(len(boxes)):
        box = boxes[number]
        slices = tuple(reversed(box.slices))
        values = np.asarray(finest[(slice(None), *slices) if layout.has_channels else slices])
        values = values if layout.has_channels else values[None]
        writer.write(box, values.transpose(0, 3, 2, 1))
    writer.flush()
    shutil.rmtree(room, ignore_errors=True)
