"""A prediction in parts that are computed anywhere, in any order, by whoever sees the folder of its results."""

import json
import logging
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
from ..errors import OutputError, RecordError, SaveError, ShardError
from ..io.fingerprints import differences
from ..io.formats import stem_of
from ..io.protocols import VolumeStore
from ..io.saving import saving
from ..io.sidecars import run_of
from ..io.stores import NiftiStore
from ..io.zarr.layout import Layout, put_shard
from ..io.zarr.store import ZarrStore
from ..io.zarr.writing import ShardWriter
from ..models.outputs import Name
from ..runs.claim import Claim
from ..runs.parts import PartsRecords, PartsState, records_of
from ..runtime.kept_memory import kept_for_models
from .call import Stores
from .plan import PredictionPlan
from .planner import Input
from .preparing import Preparation
from .provenance import sidecar_of_run
from .publishing import put_in_place
from .runner import Runner
from .shard_plan import ShardPlan
from .sinks import image_class

__all__ = ["ShardedRun"]

_logger = logging.getLogger("voxloom.predict")
# How often it is looked whether another process has put the results in their place.
WAIT_SECONDS = 1.0


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
        self._records: PartsRecords | None = None

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
        """Where the records are."""
        return records_of(self._first_target)

    @property
    def run(self) -> str:
        """Name of the run, which all that take part in it have in common; see `join`."""
        return self._joined().run

    def join(self) -> None:
        """Take part in the run, which is begun if it is not; whoever begins says how large parts are.

        Raises:
            RecordError: if the records are damaged, or of something else.
            TargetExistsError: if the run is to be begun, and there is a result that is not to be replaced.
        """
        self._joined()

    def _joined(self) -> PartsRecords:
        while self._records is None and not self._has_joined():
            self._begin()
        assert self._records is not None
        return self._records

    def _has_joined(self) -> bool:
        """Take part in a run if one has been begun; whether that is so."""
        if self._records is not None:
            return True
        found = PartsRecords.found(self.folder)
        if found is None:
            return False
        if what := differences(found.told["fingerprint"], self._fingerprint):
            raise RecordError(
                f"{self.folder} is of a prediction in parts of something else: {'; '.join(what)}. Go on with what it was begun"
                f" with, give another output, or remove it, and {', '.join(each.name for each in self._arrays(found.run))}"
            )
        if None in self._fingerprint["models"]:
            raise RecordError(f"{self.folder} was made by a function, which may have been another one: give model_name")
        if (found.told["shape"], found.told["shard_size"]) != (self.plan.boxes.shape, self.plan.boxes.size):
            # Whoever begins says how large parts are.
            self.plan = replace(self.plan, boxes=ShardGrid(self.plan.boxes.shape, found.told["shard_size"]))
        self._records = found
        return True

    def _begin(self) -> None:
        told = {
            "fingerprint": self._fingerprint,
            "shard_size": list(self.plan.boxes.size),
            "shape": list(self.plan.boxes.shape),
            "parts": len(self.plan),
            "began": time.time(),
        }
        made = PartsRecords(self.folder, secrets.token_hex(8), told)
        for store in self._stores:
            store.check()

        def make_arrays() -> None:
            for array, layout in zip(self._arrays(made.run), self._layouts, strict=True):
                layout.create(array)

        try:
            with saving(self.folder):
                made.begin(make_arrays)
        finally:
            if made.state is PartsState.ENDED:
                self._forget_other(made, made.run)

    def _forget_other(self, records: PartsRecords, run: str) -> None:
        """Remove what was made for a run that was not begun, or is of no more use."""
        for array in self._arrays(run):
            shutil.rmtree(array, ignore_errors=True)
        records.forget_other(run)

    def _arrays(self, run: str) -> list[Path]:
        """Name where the voxels are until all parts are done."""
        paths = [store.path for store in self._stores]
        return [path.with_name(f".{stem_of(path)}.{run}.parts.zarr") for path in paths if path is not None]

    def _is_open(self) -> bool:
        """Whether parts may be missing still.

        Raises:
            RecordError: if the records were removed, and the results are not there.
        """
        records = self._joined()
        state = records.state
        if state is PartsState.ENDED and not self._is_in_place():
            raise RecordError(
                f"what {self.folder} recorded of this run is gone, and its results are not in their place: the same call begins"
                " anew, or goes on with what is there now"
            )
        return state is PartsState.OPEN

    def _is_in_place(self) -> bool:
        """Whether all results of the run are under their names."""
        return all(store.path is not None and run_of(store.path) == self.run for store in self._stores)

    def done(self) -> set[int]:
        """Numbers of the parts that are done."""
        return self._joined().done(len(self)) if self._has_joined() else set()

    def failed(self) -> dict[int, str]:
        """Give the tracebacks of the parts that failed, by their numbers."""
        return self._joined().failed() if self._has_joined() else {}

    # Work

    def __len__(self) -> int:
        return len(self.plan)

    def remaining(self, share: tuple[int, int] = (0, 1)) -> Iterator[int]:
        """Give the numbers of the parts that are not done, of one share of several.

        Args:
            share: number of the share, from 0 on, and how many there are.

        Raises:
            RecordError: if the records are damaged, of something else, or were removed while there is no result.
        """
        first, step = share
        self._is_open()  # whoever began says how many parts there are
        done = self.done()
        yield from (number for number in range(first, len(self), step) if number not in done)

    def compute(self, number: int, progress: Callable[[int], object] = lambda patches: None) -> None:
        """Compute a part, and record that it is done; or record why it failed. Nothing is computed if it is done.

        Raises:
            Exception: whatever the model, reading or writing raises.
        """
        records = self._joined()
        if not self._is_open() or records.is_done(number):
            return
        began = time.time()
        try:
            patches = self._computed(number, records, progress)
        except Exception as error:
            if not self._is_open():
                return  # another process has computed it as well, and all is done
            self.record_failure(number, error)
            raise
        records.put_done(number, {"seconds": time.time() - began, "patches": patches, "host": platform.node()})
        self._is_open()  # or the records were removed, which is an error

    def record_failure(self, number: int, error: BaseException) -> None:
        """Record why a part failed."""
        told = "".join(traceback.format_exception(error))
        record = {"error": f"{type(error).__name__}: {error}", "traceback": told, "host": platform.node()}
        self._joined().put_failed(number, record)

    def _computed(self, number: int, records: PartsRecords, progress: Callable[[int], object]) -> int:
        shard, parts = self.plan[number], self.plan
        patches = parts.num_patches(number)
        plan = parts.of(shard)
        if not patches and plan.fill == 0:
            return 0  # the array is 0 where nothing is written
        with (
            kept_for_models(self._preparation.models.device),
            tempfile.TemporaryDirectory(prefix=f".part-{number}-", dir=records.work) as folder,
        ):
            writers, cuts = [], []
            for result, (layout, whole) in enumerate(zip(self._layouts, self._arrays(records.run), strict=True)):
                array = layout.arrays(whole)[0]
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

    # Publishing

    def published(self, take_over: bool = False) -> Any:
        """Make the coarser levels, and put all results under their names, unless another process is at it, or has done it.

        One process does that. Where it was interrupted, another one takes it up: at once if it was of this machine, or when
        nothing has been heard of it for three minutes.

        Args:
            take_over: take it up at once, whoever is at it.

        Returns:
            The image, or a dict of images; None if another process is at it, or was quicker.

        Raises:
            ShardError: if parts are missing; names them, and says why they failed.
            RecordError: if the records were removed, and the results are not there.
        """
        if not self._has_joined():
            return None  # it has been published
        self._is_open()  # or the records were removed, which is an error
        self.check_whole()
        records = self._joined()
        records.begin_publishing()
        return self._published(records, Claim(records.publishing), take_over)

    def publish(self) -> Any:
        """Publish as `published` does; where another process is at it, wait until the results are there.

        Raises:
            ShardError: if parts are missing.
            RecordError: if the records were removed, and the results are not there.
        """
        if not self._has_joined():
            raise RecordError(f"there is no {self.folder}: the results have been published, or were not begun")
        self.check_whole()
        records = self._joined()
        records.begin_publishing()
        claim, is_told = Claim(records.publishing), False
        while True:
            made = self._published(records, claim, at_once=False)
            if made is not None:
                return made
            if not self._is_open() and records.state is PartsState.ENDED:
                return self._images()
            if not is_told:
                is_told = True
                _logger.info("another process is publishing the result for %s: waiting for it", self.plan.plan.name)
            time.sleep(WAIT_SECONDS)

    def _published(self, records: PartsRecords, claim: Claim, at_once: bool) -> Any:
        if not claim.lay(at_once):
            return None
        with claim:
            try:
                self._put_in_place(records, claim)
            except Exception:
                if claim.is_held:
                    raise
                return None  # it was taken for lost, and another process is at it
            return self._images()

    def _put_in_place(self, records: PartsRecords, claim: Claim) -> None:
        """Put all results under their names, and remove the records."""
        fingerprint = {key: value for key, value in self._fingerprint.items() if key != "targets"}
        sidecar = sidecar_of_run(fingerprint, self._given, self.plan.plan, self._preparation.models, [])
        for number, (store, layout, parts) in enumerate(zip(self._stores, self._layouts, self._arrays(records.run), strict=True)):
            assert isinstance(store, ZarrStore | NiftiStore)
            put_in_place(store, layout, parts, records.publishing / f"levels-{number}", sidecar, records.run, claim)
        for other in records.others_that_began(before=claim.since):
            self._forget_other(records, other)
        records.end()

    def _images(self) -> Any:
        by_name = {}
        for result, store, layout in zip(self.plan.plan.results, self._stores, self._layouts, strict=True):
            assert store.path is not None
            by_name[result.name] = image_class(layout.spec)(store.path)
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
