"""A prediction in parts that are computed anywhere, in any order, by whoever sees the folder of its results."""

import contextlib
import errno
import json
import math
import platform
import secrets
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.boxes import Box
from ..core.shards import ShardGrid
from ..core.sizes import Ints, as_sizes
from ..errors import OutputError, RecordError, SaveError, ShardError, VoxloomError
from ..io.fingerprints import differences
from ..io.formats import stem_of
from ..io.protocols import Json, VolumeStore
from ..io.saving import saving, write_safely
from ..io.sidecars import read_sidecar, sidecar_of
from ..io.stores import NiftiStore
from ..io.zarr.layout import Layout, put_shard
from ..io.zarr.source import ZarrSource
from ..io.zarr.store import ZarrStore
from ..io.zarr.writing import PyramidWriter, ShardWriter
from ..models.outputs import Name
from ..runs.parts import (
    DONE,
    FAILED,
    RUN,
    beginning_of,
    beginnings_of,
    heartbeat,
    is_taken_over,
    is_without_run,
    numbers_in,
    publishing_of,
    put_record,
    read_run,
    records_of,
    remove_records,
    traceback_in,
)
from ..runtime.kept_memory import kept_for_models
from .call import Stores
from .plan import PredictionPlan
from .planner import Input
from .preparing import Preparation
from .provenance import sidecar_of_run
from .runner import Runner
from .shard_plan import ShardPlan
from .sinks import image_class

__all__ = ["ShardedRun"]


class _Cut:
    """A store that takes what lies in a box, and leaves the rest to others."""

    def __init__(self, box: Box, writer: ShardWriter, dtype: np.dtype) -> None:
        self._box, self._writer, self._dtype = box, writer, dtype

    def write(self, box: Box, values: Tensor) -> None:
        """Take a block."""
        inside = box & self._box
        if inside.numel:
            part = values[(slice(None), *inside.relative_to(box.start).slices)]
            part = part.float() if part.dtype == torch.bfloat16 else part
            self._writer.write(inside, part.numpy().astype(self._dtype, copy=False))

    def flush(self) -> None:
        """All of it is written in the end."""


class ShardedRun:
    """A prediction in parts, of which any process on any machine that sees the folder may compute any.

    What is recorded is a file for each part that is done, which appears by renaming. There are no locks: a part that two compute
    at once is written twice, with the same bytes.

    Args:
        preparation: the model, and how it is applied.
        given: the input.
        target: where results go, as the user said it.
        stores: the stores for that; files, or Zarr.
        shard_size: voxels of a part, which is made up to whole shards; by default four patches; -1 for all in one part.

    Raises:
        RecordError: if the records are of another image, model or option.
        OutputError: if results cannot be made in parts.
    """

    def __init__(
        self, preparation: Preparation, given: Input, target: Any, stores: Stores, shard_size: int | Sequence[int] | None = None
    ) -> None:
        self._preparation, self._given, self._target = preparation, given, target
        self._by_name = stores
        paths = {name: store.path for name, store in stores.items() if isinstance(store, ZarrStore | NiftiStore)}
        if not stores or len(paths) < len(stores):
            raise OutputError("a prediction in parts needs an output, or a dict of outputs: names of files or of Zarr stores")
        self._first_target: Path = next(iter(paths.values()))
        seen = preparation.seen(given, target)
        self._runner = Runner(preparation.models, seen.requests, [result.reduction for result in seen.results])
        plan = preparation.planned(given, seen, target, was_known=True)
        self._stores = [self._store_of(plan, result.name) for result in plan.results]
        self._layouts = [self._layout_of(store, number, plan) for number, store in enumerate(self._stores)]
        first = plan.results[0].volume
        if any(result.volume.shape[1:] != first.shape[1:] for result in plan.results):
            raise OutputError("results of several sizes cannot be made in parts: predict them one by one")
        # Whole shards of all results; along an axis that a shard spans, one part does.
        sizes = [[each.shards[0][axis] for each in self._layouts] for axis in range(3)]
        shape = first.shape[1:]
        shard = tuple(length if max(each) >= length else math.lcm(*each) for each, length in zip(sizes, shape, strict=True))
        if len({records_of(path) for path in paths.values()}) < len(paths):
            raise SaveError(f"two results have one stem: {', '.join(map(str, paths.values()))}: give each a name of its own")
        self.plan = ShardPlan(plan, self._boxes(plan, shard, shard_size))
        self._fingerprint = json.loads(
            json.dumps(
                {"targets": {str(name): str(path.resolve()) for name, path in paths.items()}} | preparation.fingerprint(given)
            )
        )
        self._source = preparation.readable(given)
        self._run: str | None = None

    def __repr__(self) -> str:
        return f"ShardedRun({len(self)} parts of {str(self._first_target)!r})"

    def _store_of(self, plan: PredictionPlan, name: Name) -> VolumeStore:
        found = next(iter(self._by_name.values())) if list(self._by_name) == [None] else self._by_name.get(name)
        if found is None or (list(self._by_name) == [None] and len(plan.results) > 1):
            raise OutputError(f"the result {name!r} has no output: a prediction in parts keeps none in memory")
        return found

    def _layout_of(self, store: VolumeStore, number: int, plan: PredictionPlan) -> Layout:
        spec = plan.results[number].volume
        assert store.path is not None
        if isinstance(store, ZarrStore):
            return store.layout(spec)
        # A file is made of a plain array in the end.
        return Layout.of(store.path.with_name(f"{stem_of(store.path)}.zarr"), spec, "0.5", None, None, None)

    def _boxes(self, plan: PredictionPlan, shard: Ints, size: int | Sequence[int] | None) -> ShardGrid:
        shape: Ints = plan.results[0].volume.shape[1:]
        if size is None:
            volume = plan.traversal.grid.spatial_shape
            scale = tuple(result / of for result, of in zip(shape, volume, strict=True))
            return ShardGrid.of(shape, shard, plan.grid.patch_size, scale)
        if size == -1:
            return ShardGrid(shape, shape)
        wanted = as_sizes(size, 3, "shard_size")
        sizes = (min(length, -(-each // part) * part) for length, each, part in zip(shape, wanted, shard, strict=True))
        return ShardGrid(shape, tuple(sizes))

    # Records

    @property
    def folder(self) -> Path:
        """Where the records are; under another name while results are published."""
        return self._publishing if (self._publishing / RUN).exists() else self._records

    @property
    def _records(self) -> Path:
        return records_of(self._first_target)

    @property
    def _publishing(self) -> Path:
        return publishing_of(self._first_target)

    @property
    def run(self) -> str:
        """Name of the run, which all that take part in it have in common; it is begun if it is not.

        Raises:
            RecordError: if the records are damaged, or of something else.
        """
        while not self._joined():
            if is_without_run(self._records):
                raise RecordError(f"{self._records} has no {RUN}: remove it, and begin again")
            self._begin()
        assert self._run is not None
        return self._run

    def _joined(self) -> bool:
        """Take part in a run that has been begun; whether there is one."""
        if self._run is not None:
            return True
        # In this order, since the one becomes the other.
        folder, told = next(
            ((each, told) for each in (self._records, self._publishing) if (told := read_run(each))), (None, None)
        )
        if told is None:
            return False
        if what := differences(told["fingerprint"], self._fingerprint):
            raise RecordError(
                f"{folder} is of a prediction in parts of something else: {'; '.join(what)}. Go on with what it was begun"
                " with, give another output, or remove it"
            )
        if None in self._fingerprint["models"]:
            raise RecordError(f"{folder} was made by a function, which may have been another one: give model_name")
        if told["shard_size"] != self.plan.boxes.size or told["shape"] != self.plan.boxes.shape:
            # Whoever begins says how large parts are.
            self.plan = replace(self.plan, boxes=ShardGrid(self.plan.boxes.shape, told["shard_size"]))
        self._run = told["run"]
        return True

    def _is_open(self) -> bool:
        """Whether parts of this run may be missing still: its records have another name once all are done, and then none."""
        told = read_run(self._records)
        return told is not None and told["run"] == self._run

    def _begin(self) -> None:
        """Make the records and the stores, beside where they will be, and put them there, unless another process was quicker."""
        name = secrets.token_hex(8)
        made = beginning_of(self._records, name)
        for store in self._stores:
            store.check()
        if not (self._publishing / RUN).exists():
            shutil.rmtree(self._publishing, ignore_errors=True)  # what a late part wrote into it while it was removed
        try:
            with saving(self._records):
                # First, as a sign of whose the arrays are.
                made.parent.mkdir(parents=True, exist_ok=True)
                for part in (made, made / DONE, made / FAILED):
                    part.mkdir()
                for number, layout in enumerate(self._layouts):
                    layout.create(self._array_folder(number, name))
                told = {
                    "run": name,
                    "fingerprint": self._fingerprint,
                    "shard_size": list(self.plan.boxes.size),
                    "shape": list(self.plan.boxes.shape),
                    "parts": len(self.plan),
                    "began": time.time(),
                }
                write_safely(made / RUN, json.dumps(told))
                try:
                    made.rename(self._records)
                except OSError as error:
                    if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOENT):
                        raise
                    # Another process has been quicker.
        finally:
            if made.exists():
                self._remove_beginning(name)

    def _remove_beginning(self, name: str) -> None:
        """Remove what was made for a run that was not begun."""
        for number in range(len(self._layouts)):
            shutil.rmtree(self._array_folder(number, name), ignore_errors=True)
        shutil.rmtree(beginning_of(self._records, name), ignore_errors=True)

    def _array_folder(self, number: int, run: str) -> Path:
        path = self._stores[number].path
        assert path is not None
        return path.with_name(f".{stem_of(path)}.{run}.zarr")

    def done(self) -> set[int]:
        """Numbers of the parts that are done."""
        numbers = numbers_in(self._records / DONE)
        return numbers if self._run is None or self._is_open() else set(range(len(self)))

    def failed(self) -> dict[int, str]:
        """Give the tracebacks of the parts that failed, by their numbers."""
        return {
            number: traceback_in(self.folder / FAILED / f"{number}.json") for number in sorted(numbers_in(self.folder / FAILED))
        }

    # Work

    def __len__(self) -> int:
        return len(self.plan)

    def remaining(self, share: tuple[int, int] = (0, 1)) -> Iterator[int]:
        """Give the numbers of the parts that are not done, of one share of several.

        Args:
            share: number of the share, from 0 on, and how many there are.
        """
        first, step = share
        _ = self.run  # whoever began says how many parts there are
        for number in range(first, len(self), step):
            if not (self._records / DONE / f"{number}.json").exists() and self._is_open():
                yield number

    def compute(self, number: int, progress: Callable[[int], object] = lambda patches: None) -> None:
        """Compute a part, and record that it is done; or record why it failed.

        Raises:
            Exception: whatever the model, reading or writing raises.
        """
        run = self.run
        began = time.time()
        try:
            patches = self._computed(number, run, progress)
        except Exception as error:
            if not self._is_open():
                return  # another process has computed it as well, and all is done
            self.record_failure(number, error)
            raise
        done = {"seconds": time.time() - began, "patches": patches, "host": platform.node()}
        try:
            put_record(self.folder / DONE / f"{number}.json", done)
            (self.folder / FAILED / f"{number}.json").unlink(missing_ok=True)
        except SaveError:
            if self._is_open():
                raise

    def record_failure(self, number: int, error: BaseException) -> None:
        """Record why a part failed."""
        told = "".join(traceback.format_exception(error))
        record = {"error": f"{type(error).__name__}: {error}", "traceback": told, "host": platform.node()}
        with contextlib.suppress(OSError, VoxloomError):
            put_record(self.folder / FAILED / f"{number}.json", record)

    def _computed(self, number: int, run: str, progress: Callable[[int], object]) -> int:
        shard, parts = self.plan[number], self.plan
        patches = parts.num_patches(number)
        plan = parts.of(shard)
        if not patches and plan.fill == 0:
            return 0  # the array is 0 where nothing is written
        with (
            kept_for_models(self._preparation.models.device),
            tempfile.TemporaryDirectory(prefix=f".part-{number}-", dir=self.folder) as folder,
        ):
            writers, cuts = [], []
            for result, layout in enumerate(self._layouts):
                array = layout.arrays(self._array_folder(result, run))[0]
                place = Path(folder) / str(result)
                place.mkdir()

                def put(box: Box, values: np.ndarray, array: Any = array, layout: Layout = layout) -> None:
                    put_shard(array, layout.has_channels, box, values)

                writer = ShardWriter(place, layout.spec.shape, layout.dtype, layout.shards[0], put)
                writers.append(writer)
                cuts.append(_Cut(shard.box, writer, layout.dtype))
            span = (shard.outer.start, shard.outer.stop)
            stores: Any = cuts  # of which only write and flush are asked for
            self._preparation.executor.run(plan, self._runner, self._source, stores, span[0], stop=span[1], progress=progress)
            for writer in writers:
                writer.give_whole()
                if writer.num_unfinished:
                    raise OutputError(
                        f"the part {number} of {plan.name} ({shard.box.start} to {shard.box.stop}) was not written whole"
                    )
        return patches

    def is_whole(self) -> bool:
        """Whether all parts are done."""
        return len(self.done()) == len(self.plan)

    def published(self, take_over: bool = False) -> Any:
        """Make the coarser levels, and put all results under their names.

        One process does that. Where it was interrupted, another one takes it up when nothing has been heard of it for a while.

        Args:
            take_over: take it up at once.

        Returns:
            The image, or a dict of images; None if another process was quicker.

        Raises:
            ShardError: if parts are missing; names them, and says why they failed.
        """
        if not self._joined():
            return None  # it has been published
        run, publishing = self.run, self._publishing
        if (publishing / RUN).exists():
            if not is_taken_over(publishing, at_once=take_over):
                return None
        else:
            self.check_whole()
            try:
                self._records.rename(publishing)  # one alone can do that
            except FileNotFoundError:
                return None
        with heartbeat(publishing):
            return self._put_in_place(run, publishing)

    def publish(self) -> Any:
        """Publish as `published` does, for one who is alone at it.

        Raises:
            ShardError: if parts are missing.
            RecordError: if another process is at it.
        """
        made = self.published()
        if made is None:
            raise RecordError(
                f"another process is publishing the result for {self.plan.plan.name}: wait for it; if it was interrupted, the"
                " same call takes it up in ten minutes"
            )
        return made

    def _put_in_place(self, run: str, publishing: Path) -> Any:
        fingerprint = {key: value for key, value in self._fingerprint.items() if key != "targets"}
        sidecar = sidecar_of_run(fingerprint, self._given, self.plan.plan, self._preparation.models, [])
        made = []
        for number, (store, layout) in enumerate(zip(self._stores, self._layouts, strict=True)):
            folder = self._array_folder(number, run)
            if folder.exists():
                _make_coarser(layout, folder, publishing / f"levels-{number}")
                if isinstance(store, NiftiStore):
                    _write_file(folder, store, layout, sidecar, run)
            if isinstance(store, ZarrStore):
                store.commit(sidecar, run)
            assert store.path is not None
            made.append(image_class(layout.spec)(store.path))
        for name in beginnings_of(self._records, before=publishing):
            self._remove_beginning(name)
        remove_records(publishing)
        by_name = {result.name: image for result, image in zip(self.plan.plan.results, made, strict=True)}
        return by_name[None] if list(by_name) == [None] else by_name

    def check_whole(self) -> None:
        """Raise an error where parts are missing."""
        missing = sorted(set(range(len(self.plan))) - self.done())
        if not missing:
            return
        failed = self.failed()
        listed = ", ".join(map(str, missing[:10])) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
        why = next((f"; part {number} ({self.plan[number].box}) failed:\n{text}" for number, text in failed.items()), "")
        raise ShardError(f"of {len(self.plan)} parts of {self.plan.plan.name} {len(missing)} are missing: {listed}{why}")


def _make_coarser(layout: Layout, folder: Path, parts: Path) -> None:
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


def _write_file(folder: Path, store: NiftiStore, layout: Layout, sidecar: Json, run: str) -> None:
    """Make a file of a whole array, and remove that; if it was interrupted, it is made anew unless it is there already."""
    if (read_sidecar(sidecar_of(store.path)) or {}).get("run") != run:
        store.discard(run)
        source = ZarrSource(folder)
        try:
            store.create(layout.spec, run)
            boxes = ShardGrid(layout.spec.shape[1:], layout.shards[0])
            for number in range(len(boxes)):
                store.write(boxes[number], source.read(boxes[number]).to(layout.spec.dtype))
            store.flush()
            store.commit(sidecar, run)
        except BaseException:
            store.abort()
            store.discard(run)
            raise
    shutil.rmtree(folder, ignore_errors=True)
