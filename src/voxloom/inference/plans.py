"""What a prediction will do, and how much memory it will take: worked out before it begins."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..core.accumulator import sum_dtype
from ..core.front import KEPT_WEIGHTS
from ..core.grids import PatchGrid
from ..core.memory import pretty_bytes
from ..core.sizes import Ints, Scale, pretty_sizes
from ..core.sweeps import AxisSweep, Column, Sweep
from ..errors import SizeError
from .outputs import Form

__all__ = ["Memory", "PredictionPlan", "ResultForm", "SumForm", "best_split", "open_bytes", "passes_of", "reduced_bytes"]

# What threads, buffers of files and the allocator take in addition.
BASE_BYTES = 16 * 2**20
# Finished sums that may wait for the writer beside all that is open, at most. Less would make small sums wait for one another.
WAITING_BYTES = 16 * 2**20


@dataclass(frozen=True)
class SumForm:
    """One sum of patches."""

    form: Form
    scale: Scale
    sweep: Sweep
    """The sweep in the frame of the output."""

    def dtype(self) -> torch.dtype:
        """Type of the sum."""
        return self.form.dtype if self.sweep.is_cropped else sum_dtype(self.form.dtype)

    def bytes_per_voxel(self, is_partial: bool) -> int:
        """Bytes of the sum, and of the weights where patches are left out."""
        return self.form.channels * self.dtype().itemsize + sum_dtype(self.dtype()).itemsize * is_partial


@dataclass(frozen=True)
class ResultForm:
    """One result, in the frame of its own."""

    name: str | None
    stream: int
    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    is_labels: bool
    scale: Scale
    needs_copy: bool
    """Whether it is made of a copy of the sum, because other results are made of the same."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole of it."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Memory:
    """What is needed at a time, in bytes."""

    volume: int
    """The input, where it can only be read whole."""
    batches: int
    """Patches on their way into the model, and its outputs."""
    front: int
    """The sum of patches, as far as it is open, and what is being reduced and written."""
    results: int
    """What is kept in memory in the end."""

    @property
    def peak(self) -> int:
        """All of it."""
        return self.volume + self.batches + self.front + self.results + BASE_BYTES


@dataclass(frozen=True)
class PredictionPlan:
    """What `predict` will do. It prints well.

    Example:
        >>> import torch, voxloom as vx
        >>> plan = vx.plan(torch.nn.Identity(), torch.zeros(1, 100, 100, 100), patch_size=64, batch_size=2)
        >>> plan.num_patches, plan.forward_passes, plan.num_blocks, plan.redundancy
        (27, 15, 1, 1.0)
    """

    grid: PatchGrid
    """The patches."""
    sweep: Sweep
    """In what order they are gathered."""
    columns: tuple[Column, ...]
    """Blocks of output that are gathered one after the other; patches that touch several are computed for each."""
    batch_size: int
    num_patches: int
    """Patches that are computed at least once."""
    computed_patches: int
    """Patches that are computed, those counted again that are computed again."""
    forward_passes: int
    """Calls of models. One of them finds out what the outputs look like, which a `Predictor` does once only."""
    restart_passes: int
    """Calls of models that are made again, at most, if a run is interrupted and taken up again."""
    bytes_read: int
    bytes_written: int
    memory: Memory
    spooled_bytes: int = 0
    """Size of the temporary file that a compressed input is unpacked to, where it is too large for memory."""

    @property
    def num_blocks(self) -> int:
        """Blocks of output, each gathered on its own from all patches that touch it."""
        return len(self.columns)

    @property
    def redundancy(self) -> float:
        """How many times a patch is computed, on average."""
        return self.computed_patches / max(1, self.num_patches)

    @property
    def peak_bytes(self) -> int:
        """Memory that is needed at most, beyond what the process has and what the model itself uses."""
        return self.memory.peak

    def to_json(self) -> dict[str, Any]:
        """Give what a run must have in common with one that it takes up again."""
        axes = [[axis.start, axis.stop, axis.patch, axis.stride] for axis in self.grid.axes]
        columns = [[part.rows.start, part.rows.stop, part.thirds.start, part.thirds.stop] for part in self.columns]
        return {"axes": axes, "sweep": list(self.sweep.axes), "columns": columns, "batch_size": self.batch_size}

    def __str__(self) -> str:
        memory, grid = self.memory, self.grid
        skipped = grid.num_patches - self.num_patches
        some = f", {skipped} of which the mask leaves out" if skipped else ""
        order = " then ".join("IJK"[axis] for axis in self.sweep.axes)
        parts = "one block" if self.num_blocks == 1 else f"{self.num_blocks} blocks"
        lines = {
            "volume": f"{pretty_sizes(grid.spatial_shape)} voxels",
            "patches": f"{grid.num_patches} of {pretty_sizes(grid.patch_size)}{some}, each computed {self.redundancy:.3g} times",
            "model": f"{self.forward_passes} forward passes of {self.batch_size}, one of them to see what the output looks like",
            "order": f"{parts}, along {order}; an interrupted run repeats at most {self.restart_passes} passes",
            "files": f"reads {pretty_bytes(self.bytes_read)}, writes {pretty_bytes(self.bytes_written)}",
            "memory": f"{pretty_bytes(memory.peak)} at most: input {pretty_bytes(memory.volume)}, batches"
            f" {pretty_bytes(memory.batches)}, open sums {pretty_bytes(memory.front)}, results {pretty_bytes(memory.results)}",
        }
        if self.spooled_bytes:
            lines["disk"] = f"{pretty_bytes(self.spooled_bytes)} for the unpacked input, in the folder for temporary files"
        return "\n".join(f"{name + ':':<9}{text}" for name, text in lines.items())


def passes_of(sweep: Sweep, columns: Sequence[Column], batch_size: int, needed: np.ndarray | None) -> tuple[int, int]:
    """Count the batches and the patches of some columns; a batch never crosses a layer."""
    layers = [count for column in columns for count in sweep.num_patches(column, needed)]
    return sum(-(-count // batch_size) for count in layers), sum(layers)


def repeated_passes(sweep: Sweep, columns: Sequence[Column], batch_size: int, needed: np.ndarray | None) -> int:
    """Count the batches that are computed again if a run ends at the worst moment.

    That is after the first batch of a layer, when the layer before it has not been recorded yet.
    """
    worst = 0
    for column in columns:
        batches = [-(-count // batch_size) for count in sweep.num_patches(column, needed)]
        for layer in range(sweep.num_layers):
            again = sweep.parts[0].added_by(range(layer, layer + 1))
            worst = max(worst, sum(batches[again.start : again.stop]) + 1)
    return worst


def open_bytes(sums: Sequence[SumForm], column: Column, is_partial: bool) -> int:
    """Bytes of the open sums of all outputs while a column is swept, and of what waits to be reduced and written."""
    size = sum(each.sweep.open_voxels(column) * each.bytes_per_voxel(is_partial) for each in sums)
    return size + min(size // 8, WAITING_BYTES)


def reduced_bytes(sums: Sequence[SumForm], results: Sequence[ResultForm], is_partial: bool) -> int:
    """Bytes of what is made of the sums that are finished together: the most that one cell comes to."""
    most = 0
    for number, each in enumerate(sums):
        cell = math.prod(max(stop - start for start, stop in part.intervals) for part in each.sweep.parts)
        made = [result for result in results if result.stream == number]
        # Twice the result, as reduced and as it is stored.
        size = sum(2 * result.shape[0] * result.dtype.itemsize for result in made)
        size += each.bytes_per_voxel(is_partial) * any(result.needs_copy for result in made)
        most = max(most, cell * size)
    return most


def batch_bytes(
    patch_size: Ints, batch_size: int, channels: int, dtype: torch.dtype, sums: Sequence[SumForm], num_passes: int
) -> int:
    """Bytes of batches on their way into a model, of its outputs, and of the weights of patches."""
    # One is read, one waits, one is in the model, and where it is used more than once, a copy of it.
    total = (3 + int(num_passes > 1)) * batch_size * channels * math.prod(patch_size) * dtype.itemsize
    for each in sums:
        voxels = math.prod(each.form.size)
        total += voxels * batch_size * each.form.channels * each.form.dtype.itemsize * each.form.copies
        total += voxels * (KEPT_WEIGHTS + 1) * each.dtype().itemsize
        if each.dtype() != each.form.dtype:
            total += voxels * each.form.channels * each.dtype().itemsize  # a patch in the type of the sum
    return total


def best_split(
    sweep: Sweep, memory_of: Callable[[Column], int], limit: int | None, is_given: bool, batch_size: int
) -> list[Column]:
    """Cut the volume into as many columns as are needed for each to fit, such that the fewest passes are made.

    Raises:
        SizeError: if no cut fits; says the least that would do.
    """
    whole = sweep.whole
    if limit is None or memory_of(whole) <= limit:
        return [whole]
    best: tuple[int, list[Column]] | None = None
    _, of_rows, of_thirds = (_counts_of_parts(part) for part in sweep.parts)
    for rows in of_rows:
        fitting = next((thirds for thirds in of_thirds if _peak(sweep, rows, thirds, memory_of) <= limit), None)
        if fitting is not None:
            columns = sweep.split(rows, fitting)
            passes = passes_of(sweep, columns, batch_size, None)[0]
            if best is None or passes < best[0]:
                best = passes, columns
            if fitting == 1:
                break  # more rows only cost more
    if best is None:
        least = _peak(sweep, len(whole.rows), len(whole.thirds), memory_of)
        raise SizeError(
            f"{'memory_limit is' if is_given else 'the memory that is free comes to'} {pretty_bytes(limit)}, but at least"
            f" {pretty_bytes(least)} ({least} bytes) are needed: {'allow that, or ' if is_given else ''}use smaller patches, a"
            " smaller batch_size, or a reduction that keeps less"
        )
    return best[1]


def _peak(sweep: Sweep, rows: int, thirds: int, memory_of: Callable[[Column], int]) -> int:
    """Give the memory for the largest of the columns; only those that differ are looked at."""
    whole = sweep.whole
    kinds = {}
    for column in sweep.split(rows, thirds):
        shape = sweep.column_box(column).shape
        ends = [
            (part.start == 0, part.stop == len(of)) for part, of in ((column.rows, whole.rows), (column.thirds, whole.thirds))
        ]
        kinds[shape, *ends] = column
    return max(map(memory_of, kinds.values()))


def _counts_of_parts(part: AxisSweep) -> list[int]:
    """Numbers of parts that an axis can be cut into, such that each makes the longest of them shorter."""
    return sorted({len(part.cut(count)) for count in range(1, len(part.groups) + 1)})
