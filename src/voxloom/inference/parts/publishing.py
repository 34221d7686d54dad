"""Putting a result of a prediction in parts under its name, from an array of which all but the coarser levels is there."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ...core.boxes import Box
from ...core.shards import ShardGrid
from ...errors import RecordError
from ...io.files import sidecar_in
from ...io.formats import stem_of
from ...io.protocols import Json
from ...io.sidecars import run_of
from ...io.stores import NiftiStore
from ...io.zarr.layout import Layout, put_shard
from ...io.zarr.source import ZarrSource
from ...io.zarr.store import ZarrStore
from ...io.zarr.writing import PyramidWriter
from ...runs.claim import Claim

__all__ = ["make_coarser", "put_in_place", "write_file"]


def put_in_place(
    store: ZarrStore | NiftiStore, layout: Layout, parts: Path, levels: Path, sidecar: dict[str, Json], run: str, claim: Claim
) -> None:
    """Put a result under its name; whatever has been done of that is not done again.

    Args:
        store: where it goes.
        layout: of the array.
        parts: the array that parts are written to.
        levels: room for what is needed to make the coarser levels.
        sidecar: how the result was made.
        run: name of the run.
        claim: what this process must hold.

    Raises:
        RecordError: if the array is gone, or another process has taken the claim.
    """
    whole = store.path.with_name(f".{stem_of(store.path)}.{run}.zarr")
    if run_of(store.path) != run:
        if not whole.exists():
            try:
                parts.rename(whole)  # so that a part that comes late finds nothing to write into
            except FileNotFoundError:
                raise RecordError(f"{parts} is gone: remove {levels.parent.parent}, and begin again") from None
        if not sidecar_in(whole).exists():
            make_coarser(layout, whole, levels)
        if isinstance(store, NiftiStore) and not store.is_ready(run):
            write_file(whole, store, layout, run)
        store.make_ready(sidecar, run)
        if not claim.is_held:
            raise RecordError(f"another process puts {store.path} in its place, since nothing was heard of this one")
    store.commit(sidecar, run)
    for path in (whole, parts):
        shutil.rmtree(path, ignore_errors=True)


def make_coarser(layout: Layout, folder: Path, parts: Path) -> None:
    """Make the coarser levels of an array of which the finest is whole, shard by shard."""
    if not layout.factors:
        return
    shutil.rmtree(parts, ignore_errors=True)
    finest, *coarser = layout.arrays(folder)

    def into(array: Any) -> Callable[[Box, np.ndarray], object]:
        return lambda box, values: put_shard(array, layout.has_channels, box, values)

    levels: list[Callable[[Box, np.ndarray], object]] = [lambda box, values: None, *map(into, coarser)]
    writer = PyramidWriter(
        parts,
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
    shutil.rmtree(parts, ignore_errors=True)


def write_file(folder: Path, store: NiftiStore, layout: Layout, run: str) -> None:
    """Make a file of a whole array."""
    store.discard(run)
    source = ZarrSource(folder)
    try:
        store.create(layout.spec, run)
        boxes = ShardGrid(layout.spec.shape[1:], layout.shards[0])
        for number in range(len(boxes)):
            store.write(boxes[number], source.read(boxes[number]).to(layout.spec.dtype))
        store.flush()
    except BaseException:
        store.discard(run)
        raise
