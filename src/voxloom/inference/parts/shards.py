"""A prediction in parts that are computed anywhere, in any order, by whoever sees the folder of its results."""

import json
import logging
import platform
import secrets
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core.boxes import Box
from ...core.grid.shards import ShardGrid
from ...core.grid.traversal import Block
from ...core.sizes import Ints, as_sizes
from ...errors import OutputError, RecordError, ShardError
from ...io.fingerprints import differences
from ...io.writing.saving import saving
from ...io.zarr.encoding import put_shard
from ...io.zarr.layout import Layout
from ...io.zarr.writing import ShardWriter
from ...runs.claim import Claim
from ...runs.parts import PartsRecords, PartsState, records_of
from ...runtime.kept_memory import kept_for_models
from ..destinations import Stores
from ..planning.plan import Memory, PredictionPlan
from ..planning.settings import Input
from ..preparing import Preparation
from ..provenance import sidecar_of_run
from ..runner import Runner
from .part_targets import PartTargets, as_parts_stores
from .publishing import put_in_place
from .shard_plan import ShardPlan

__all__ = ["ShardedRun"]

_logger = logging.getLogger("voxloom.predict")
# How often it is looked whether another process has put the results in their place.
WAIT_SECONDS = 1.0


class _Cut:
    """A store that takes what lies in a box, and leaves the rest to others."""

    def __init__(self, box: Box, writer: ShardWriter, dtype: np.dtype, path: Path) -> None:
        self._box, self._writer, self._dtype, self._path = box, writer, dtype, path

    def write(self, box: Box, values: Tensor) -> None:
        """Take a block."""
        inside = box & self._box
        if inside.numel:
            part = values[(slice(None), *inside.relative_to(box.start).slices)]
            part = part.float() if part.dtype == torch.bfloat16 else part
            with saving(self._path):
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
        SizeError: if no block of the prediction fits into the memory limit.
    """

    def __init__(
        self, preparation: Preparation, given: Input, target: Any, stores: Stores, shard_size: int | Sequence[int] | None = None
    ) -> None:
        self._preparation, self._given = preparation, given
        for_parts = as_parts_stores(stores)
        paths = {str(name): str(store.path.resolve()) for name, store in for_parts.items()}
        self._first_target = next(iter(for_parts.values())).path
        seen = preparation.seen(given, target)
        self._runner = Runner(preparation.models, seen.requests, [result.reduction for result in seen.results])
        plan = preparation.planned(given, seen, target, was_known=True)
        self._targets = PartTargets.of(for_parts, plan)
        self._whole = plan
        self.plan = ShardPlan(plan, self._fitting(shard_size))
        self._fingerprint = json.loads(json.dumps({"targets": paths} | preparation.fingerprint(given)))
        self._source = preparation.readable(given)
        self._records: PartsRecords | None = None

    def _fitting(self, size: int | Sequence[int] | None) -> ShardGrid:
        """Part the volume: if nothing is said, such that parts fit into the memory limit as a whole, if there is one."""
        shard, limit = self._targets.shard, self._memory_limit
        boxes = _boxes(self._whole, shard, size)
        while size is None and limit is not None and self._usual_peak(boxes) > limit:
            smaller = boxes.halved(shard)
            if smaller is None:
                break  # a part is computed in several blocks
            boxes = smaller
        return boxes

    @property
    def _memory_limit(self) -> int | None:
        return self._preparation.settings.memory_limit

    def _memory_of(self, block: Block) -> Memory:
        return self._preparation.planner.memory_of(self._given, self._whole, block)

    def _usual_peak(self, boxes: ShardGrid) -> int:
        parts = ShardPlan(self._whole, boxes)
        return max(self._memory_of(parts[number].block).peak for number in {0, boxes.middle})

    def __repr__(self) -> str:
        return f"ShardedRun({len(self)} parts of {str(self._first_target)!r})"

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
                f" with, give another output, or remove it, and {', '.join(self._targets.array_names(found.run))}"
            )
        if None in self._fingerprint["models"]:
            raise RecordError(f"{self.folder} was made by a function, which may have been another one: give model_name")
        if (found.told["shape"], found.told["shard_size"]) != (self.plan.boxes.shape, self.plan.boxes.size):
            # Whoever begins says how large parts are.
            self.plan = ShardPlan(self._whole, ShardGrid(self.plan.boxes.shape, found.told["shard_size"]))
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
        for target in self._targets:
            target.store.check()
        try:
            with saving(self.folder):
                made.begin(lambda: self._targets.create_arrays(made.run))
        finally:
            if made.state is PartsState.ENDED:
                self._forget_other(made, made.run)

    def _forget_other(self, records: PartsRecords, run: str) -> None:
        """Remove what was made for a run that was not begun, or is of no more use."""
        self._targets.remove_arrays(run)
        records.forget_other(run)

    def _is_open(self) -> bool:
        """Whether parts may be missing still.

        Raises:
            RecordError: if the records were removed, and the results are not there.
        """
        records = self._joined()
        state = records.state
        if state is PartsState.ENDED and not self._targets.are_in_place(records.run):
            raise RecordError(
                f"what {self.folder} recorded of this run is gone, and its results are not in their place: the same call begins"
                " anew, or goes on with what is there now"
            )
        return state is PartsState.OPEN

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
            records.put_done(number, {"seconds": time.time() - began, "patches": patches, "host": platform.node()})
        except Exception as error:
            if not self._is_open():
                return  # another process has computed it as well, and all is done
            self.record_failure(number, error)
            raise
        self._is_open()  # or the records were removed, which is an error

    def record_failure(self, number: int, error: BaseException) -> None:
        """Record why a part failed."""
        told = "".join(traceback.format_exception(error))
        record = {"error": f"{type(error).__name__}: {error}", "traceback": told, "host": platform.node()}
        self._joined().put_failed(number, record)

    def _computed(self, number: int, records: PartsRecords, progress: Callable[[int], object]) -> int:
        shard, parts = self.plan[number], self.plan
        patches = parts.num_patches(number)
        if not patches and parts.plan.fill == 0:
            return 0  # the array is 0 where nothing is written
        with (
            kept_for_models(self._preparation.models.device, self._memory_limit),
            tempfile.TemporaryDirectory(prefix=f".part-{number}-", dir=records.work) as folder,
        ):
            writers, cuts = [], []
            for result, target in enumerate(self._targets):
                layout = target.layout
                array = layout.arrays(target.array(records.run))[0]
                place = Path(folder) / str(result)
                place.mkdir()

                def put(box: Box, values: np.ndarray, array: Any = array, layout: Layout = layout) -> None:
                    put_shard(array, layout.has_channels, box, values)

                writer = ShardWriter(place, layout.spec.shape, layout.dtype, layout.shards[0], put)
                writers.append(writer)
                cuts.append(_Cut(shard.box, writer, layout.dtype, target.store.path))
            span = (shard.outer.start, shard.outer.stop)
            stores: Any = cuts  # of which only write and flush are asked for
            for plan in parts.of(shard, self._memory_of, self._memory_limit):
                self._preparation.executor.run(plan, self._runner, self._source, stores, span[0], stop=span[1], progress=progress)
            for writer in writers:
                with saving(self._first_target):
                    writer.give_whole()
                if writer.num_unfinished:
                    raise OutputError(
                        f"the part {number} of {parts.plan.name} ({shard.box.start} to {shard.box.stop}) was not written whole"
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
                return self._targets.images()
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
            return self._targets.images()

    def _put_in_place(self, records: PartsRecords, claim: Claim) -> None:
        """Put all results under their names, and remove the records."""
        fingerprint = {key: value for key, value in self._fingerprint.items() if key != "targets"}
        sidecar = sidecar_of_run(fingerprint, self._given, self.plan.plan, self._preparation.models, [])
        for number, target in enumerate(self._targets):
            array, levels = target.array(records.run), records.publishing / f"levels-{number}"
            put_in_place(target.store, target.layout.spec, array, levels, sidecar, records.run, claim)
        for other in records.others_that_began(before=claim.since):
            self._forget_other(records, other)
        records.end()

    def check_whole(self) -> None:
        """Raise an error where parts are missing."""
        missing = sorted(set(range(len(self.plan))) - self.done())
        if not missing:
            return
        failed = self.failed()
        listed = ", ".join(map(str, missing[:10])) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
        why = next((f"; part {number} ({self.plan[number].box}) failed:\n{text}" for number, text in failed.items()), "")
        raise ShardError(f"of {len(self.plan)} parts of {self.plan.plan.name} {len(missing)} are missing: {listed}{why}")


def _boxes(plan: PredictionPlan, shard: Ints, size: int | Sequence[int] | None) -> ShardGrid:
    """Part the volume; every part is made of whole shards."""
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
