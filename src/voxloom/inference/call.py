"""One prediction, from the stores to what is returned: computed, or resumed, and published."""

import contextlib
import logging
import secrets
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..core.sizes import pretty_bytes
from ..errors import OutputError, RecordError, SaveError
from ..io.protocols import Json, VolumeSource, VolumeStore
from ..io.spooling import spooled
from ..io.writing.sinks import SinkStore
from ..io.writing.words import BEGIN_AGAIN
from ..runs.log import RunLog
from ..runtime.chunk_cache import CHUNKS
from ..runtime.progress import shown_if
from .destinations import Destinations, Stores
from .memory_sink import MemorySink, image_class
from .planning.plan import PredictionPlan
from .planning.settings import Input
from .preparing import Preparation
from .provenance import sidecar_of_run
from .runner import FirstBatch, Runner

__all__ = ["Call"]

_logger = logging.getLogger("voxloom.predict")


class Call:
    """Carries out one prediction.

    Args:
        preparation: the model, and how it is applied.
        given: the input.
        target: where results go, as the user said it.
        stores: the stores for that.
        log: the log of the run, where one of them has a path.
    """

    def __init__(self, preparation: Preparation, given: Input, target: Any, stores: Stores, log: RunLog | None) -> None:
        self._preparation, self._given, self._target = preparation, given, target
        self._asked_for, self._log = stores, log
        self._run_name = secrets.token_hex(8) if log is None else log.run
        self._notes: list[str] = []

    def run(self, resume: bool, progress: bool | str) -> Any:
        """Carry it out, and give what is returned."""
        log, fingerprint = self._log, None
        recorded: Json | None = None
        if log is not None:
            fingerprint = self._preparation.fingerprint(self._given)
            if resume:
                recorded = log.resume(fingerprint)
                self._run_name = log.run
            else:
                log.forget()
        if log is None or not log.is_whole:
            for store in self._asked_for.values():
                store.check()
        if recorded is not None and log is not None:
            plan, runner = self._resumed(recorded, log)
            first = None
        else:
            plan, runner, first = self._begun()
        stores = self._stores_of(plan)
        _logger.info("%s\ndevice:  %s", plan, self._preparation.models.device)
        began = time.monotonic()
        if log is None or not log.is_whole:
            self._execute(plan, runner, stores, first, fingerprint, progress)
            _logger.info("time:    %.1f s", time.monotonic() - began)
        return self._committed(plan, stores, fingerprint)

    @cached_property
    def _source(self) -> VolumeSource:
        """The input, with what lies around it; made when it is known whether its files are unpacked first."""
        return self._preparation.readable(self._given)

    def _begun(self) -> tuple[PredictionPlan, Runner, FirstBatch | None]:
        """Plan it from the start."""
        preparation, given, target = self._preparation, self._given, self._target
        was_known = preparation.known(given, target) is not None
        first = preparation.first_batch(given, target, lambda: self._source)
        seen = preparation.seen(given, target)
        plan = preparation.planned(given, seen, target, was_known)
        return plan, Runner(preparation.models, seen.requests, [result.reduction for result in seen.results]), first

    def _resumed(self, recorded: Json, log: RunLog) -> tuple[PredictionPlan, Runner]:
        """Make the plan of a run that was interrupted."""
        preparation = self._preparation
        plan = preparation.planner.restored(recorded, self._given, Destinations(self._target), str(log.path))
        if not plan.has_groups_of(recorded):
            raise RecordError(f"what {log.path} records was begun by another version of voxloom: {BEGIN_AGAIN}")
        sources = list(dict.fromkeys(spec.source for spec in plan.outputs))  # of which one may have several sums
        requests, results = preparation.options.resolve(sources, self._target)
        is_alike = len(requests) == len(plan.outputs) and [each.name for each in results] == [each.name for each in plan.results]
        if not is_alike or log.num_done > plan.num_slabs or (log.is_whole and log.num_done < plan.num_slabs):
            raise RecordError(f"what {log.path} records does not fit {self._given.name}: {BEGIN_AGAIN}")
        return plan, Runner(preparation.models, requests, [result.reduction for result in results])

    def _stores_of(self, plan: PredictionPlan) -> list[VolumeStore]:
        """Give the store of each result; what is not to go elsewhere stays in memory."""
        is_single = len(plan.results) == len(self._asked_for) == 1
        if list(self._asked_for) == [None] and not is_single:
            names = ", ".join(repr(result.name) for result in plan.results)
            raise OutputError(f"one output was given for {len(plan.results)} results: give a dict with one for each of {names}")
        if is_single:
            stores = list(self._asked_for.values())
        else:
            stores = [
                self._asked_for[result.name] if result.name in self._asked_for else SinkStore(MemorySink())
                for result in plan.results
            ]
        if self._log is not None and not all(store.supports_resume and store.path is not None for store in stores):
            self._log.is_recorded = False  # what is finished of the others would be gone
        return stores

    def _execute(
        self,
        plan: PredictionPlan,
        runner: Runner,
        stores: Sequence[VolumeStore],
        first: FirstBatch | None,
        fingerprint: Json,
        progress: bool | str,
    ) -> None:
        """Compute and write what is not there yet."""
        log = self._log
        start = 0 if log is None else log.num_done
        if plan.needed is not None and not plan.needed.any():
            self._warn(f"the mask has no voxel in {plan.name}: nothing is computed, and all of the result is {plan.fill:g}")
        if plan.num_blocks > 1:
            self._warn(
                f"the output of {plan.name} is computed in {plan.num_blocks} blocks, so that {pretty_bytes(plan.peak_bytes)} of"
                f" memory are enough: a patch is computed {plan.redundancy:.3g} times on average"
            )
        if start:
            self._warn(
                f"{stores[0].path}: an unfinished run is resumed, with {start} of {plan.num_slabs} slabs finished;"
                f" {plan.repeated_passes(start)} forward passes are made again"
            )
        with contextlib.ExitStack() as stack:
            if plan.memory.chunks:
                stack.enter_context(CHUNKS.at_most(plan.memory.chunks))
            if plan.spooled_bytes and self._given.unpacked is None:
                self._given = replace(self._given, unpacked=stack.enter_context(spooled(self._given.source)))
            opened: list[VolumeStore] = []
            try:
                if log is not None:
                    log.begin(fingerprint, plan.to_json())
                for store, result in zip(stores, plan.results, strict=True):
                    opened.append(store)
                    if not start and log is not None:
                        store.discard(self._run_name)  # of a run that was interrupted before any slab was finished
                    (store.reopen if start else store.create)(result.volume, self._run_name)
                self._notes += self._preparation.executor.run(
                    plan,
                    runner,
                    self._source,
                    stores,
                    start,
                    first=first,
                    slab_finished=_nothing if log is None else log.slab_finished,
                    progress=stack.enter_context(shown_if(progress, plan.name, plan.remaining_patches(start), "patches")),
                )
                for store in stores:
                    store.flush()
                if log is not None:
                    log.all_written()
            except BaseException as error:
                is_begun = log is not None and log.num_done > 0
                self._abort(opened, error, keeps=is_begun)
                if log is not None and not is_begun:
                    log.end()
                if log is not None and log.num_done and isinstance(error, SaveError):
                    raise type(error)(f"{error}. What is finished stays: the same call goes on from there") from error
                raise

    def _abort(self, stores: Sequence[VolumeStore], error: BaseException, keeps: bool) -> None:
        """Leave what can be resumed, or nothing where there is nothing to keep."""
        for store in stores:
            try:
                store.abort()
                if not keeps:
                    store.discard(self._run_name)
            except Exception as another:  # noqa: BLE001 - whatever a store of the user's raises must not hide the error itself
                error.add_note(f"{type(store).__name__} could not be aborted: {another!r}")

    def _committed(self, plan: PredictionPlan, stores: Sequence[VolumeStore], fingerprint: Json) -> Any:
        """Publish all results, and give them as the user gets them."""
        sidecar = {}
        if self._log is not None:
            sidecar = sidecar_of_run(fingerprint, self._given, plan, self._preparation.models, self._notes)
        made: list[Any] = []
        try:
            for store in stores:
                made.append(store.commit(sidecar, self._run_name))
        except BaseException as error:
            self._abort(stores[len(made) :], error, keeps=self._log is not None and self._log.is_recorded)
            raise
        if self._log is not None:
            self._log.end()
        images = [
            image_class(result.volume)(each) if isinstance(each, Path) else each
            for result, each in zip(plan.results, made, strict=True)
        ]
        by_name = {result.name: image for result, image in zip(plan.results, images, strict=True)}
        return by_name[None] if list(by_name) == [None] else by_name

    def _warn(self, text: str) -> None:
        self._notes.append(text)
        warnings.warn(text, RuntimeWarning, stacklevel=5)


def _nothing() -> None:
    """Record nothing."""
