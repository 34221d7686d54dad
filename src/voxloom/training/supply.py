"""Patches of one epoch after the other, made by a pool that is started when they are wanted."""

import warnings
import weakref
from collections.abc import Sequence
from typing import Any

from ..core.schedules import EpochSchedule
from ..runtime.forks import in_forked_process
from ..runtime.memory import BufferPool
from ..volumes.contents import name_of, transforms_of
from ..volumes.libraries import Transform
from ..volumes.subject import Subject
from .epoch_plans import EpochPlanner
from .patch_sizes import PatchSizes
from .patch_worker import PatchTask, PatchWorker, SkippedSubject, Wanted
from .pool import LocalPool, PatchPool, Skipped
from .scheduler import TaskScheduler
from .worker_pool import WorkerPool

__all__ = ["PatchSupply"]


class PatchSupply:
    """Has patches made, and yields them in the order of a schedule. A copy has nothing of what runs.

    Args:
        planner: makes the schedules of later epochs, which are made while one comes to its end.
        sizes: says how many patches travel at once.
        transform: applied to each subject.
        patch_transform: applied to each patch.
        skip_errors: replace subjects that raise an error.
        num_workers: processes that make patches; 0 makes them in this one.
        context: start method of the processes.
    """

    _end: weakref.finalize | None = None

    def __init__(
        self,
        planner: EpochPlanner,
        sizes: PatchSizes,
        transform: Transform | None,
        patch_transform: Transform | None,
        skip_errors: bool,
        num_workers: int,
        context: str | None,
    ) -> None:
        self._planner = planner
        self._sizes = sizes
        self._transform = transform
        self._patch_transform = patch_transform
        self._skip_errors = skip_errors
        self._num_workers = num_workers
        self._context = context
        self._skipped: Skipped = {}
        self._reset()

    def _reset(self) -> None:
        self.schedule: EpochSchedule | None = None
        """Schedule of the present pass."""
        self._pool: PatchPool | None = None
        self._scheduler: TaskScheduler | None = None
        self._run = 0
        self._memory = BufferPool(0)
        self._started_with: list[Any] = []
        _supplies.add(self)

    def __getstate__(self) -> dict[str, Any]:
        running = ("schedule", "_pool", "_scheduler", "_run", "_memory", "_started_with", "_end")
        state = {name: value for name, value in self.__dict__.items() if name not in running}
        return state | {"_skipped": dict(self._skipped)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    @property
    def transforms(self) -> list[Any]:
        """All that is done to subjects and patches, also by the data set."""
        return [self._transform, self._patch_transform, *transforms_of(self._planner.dataset)]

    @property
    def num_buffered(self) -> int:
        """Patches that are buffered."""
        return 0 if self._pool is None else self._pool.num_buffered

    @property
    def bytes_so_far(self) -> int:
        """Bytes of as many patches as may be buffered, of the largest that was made so far; 0 if none was."""
        return self._memory.kept_bytes

    @property
    def idle_seconds(self) -> float:
        """How long patches were waited for."""
        return 0.0 if self._pool is None else self._pool.idle_seconds

    def skipped_in(self, epoch: int) -> list[SkippedSubject]:
        """Give the subjects that were skipped in an epoch."""
        return [skip for skip in tuple(self._skipped.values()) if skip.epoch == epoch]

    def reasons_to_skip(self, epoch: int) -> dict[int, str]:
        """Say why subjects were skipped in an epoch, by their index."""
        return {skip.subject: skip.reason for skip in self.skipped_in(epoch)}

    def warn_of_skipped(self, epoch: int, num_subjects: int) -> None:
        """Warn of the subjects that were skipped in an epoch of so many, if any were."""
        skipped = self.reasons_to_skip(epoch)
        if skipped:
            listed = "; ".join(f"{name_of(self._planner.dataset, index)}: {why}" for index, why in skipped.items())
            warnings.warn(
                f"{len(skipped)} of {num_subjects} subjects were skipped in epoch {epoch}, and further patches of others stood in"
                f" for theirs: {listed}",
                RuntimeWarning,
                stacklevel=2,
            )

    # Passes

    def begin(self, schedule: EpochSchedule, position: int) -> int:
        """Begin a pass, at a position; give the sequence number of the first patch of the epoch."""
        for key in [key for key in tuple(self._skipped) if key[0] < schedule.epoch]:
            del self._skipped[key]
        if self._pool is not None and (self._pool.is_over or self._started_with != self.transforms):
            self.stop()
        number = None
        if self._pool is not None and self._scheduler is not None:
            is_next = position == 0 or self._scheduler.start == (schedule.epoch, position)
            number = self._scheduler.begin(schedule) if is_next else None
            if number is not None:
                self._pool.go_to(schedule.epoch, number)
        if number is None:
            self.restart(schedule, position)
        self.schedule = schedule
        return number or 0

    def take(self, sequence_number: int) -> Subject:
        """Give a patch of the present pass."""
        assert self._pool is not None
        return self._pool.take(sequence_number)

    def leave(self, schedule: EpochSchedule) -> None:
        """End a pass: have no more patches of its epoch made, and go on with the next."""
        if self.schedule is schedule:
            assert self._pool is not None
            assert self._scheduler is not None
            self.schedule = None
            self._pool.go_to(schedule.epoch + 1, self._scheduler.abandon(schedule.epoch))

    def restart(self, schedule: EpochSchedule, position: int) -> None:
        """Have patches made from a position on; whatever else is being made is dropped."""
        self._run += 1
        skipped = {skip.place: skip.first for skip in self.skipped_in(schedule.epoch)}
        most = self._sizes.num_per_message
        self._scheduler = TaskScheduler(self._run, schedule, position, skipped, self._planner.foresee, most)
        if self._pool is None:
            self._pool = self._started_pool()
        self._pool.restart(self._scheduler, position)

    def rewind(self, schedule: EpochSchedule | None, position: int, skipped: Sequence[SkippedSubject]) -> None:
        """Let the next pass begin elsewhere, with subjects that had been skipped.

        Args:
            schedule: of that pass; None if it is not known yet.
            position: its first patch.
            skipped: the subjects.
        """
        self._skipped.clear()
        self._skipped.update({(skip.epoch, skip.place): skip for skip in skipped})
        self.schedule = self._scheduler = None
        if self._pool is not None and schedule is not None:
            self.restart(schedule, position)

    def _started_pool(self) -> PatchPool:
        worker = self._worker(Wanted(is_shared=self._num_workers > 0))
        parts = (worker, self._memory, self._planner.max_length, self._skipped)
        pool: PatchPool = WorkerPool(*parts, self._num_workers, self._context) if self._num_workers else LocalPool(*parts)
        self._started_with = self.transforms
        self._end = weakref.finalize(self, pool.close)
        return pool

    def _worker(self, wanted: Wanted) -> PatchWorker:
        planner = self._planner
        transforms = (self._transform, self._patch_transform)
        return PatchWorker(
            planner.dataset, planner.sampler, *transforms, planner.grids, planner.counted, self._skip_errors, wanted
        )

    def first_patch(self) -> Subject:
        """Make a patch of the first subject that has any, beside all others."""
        first, *others = [index for index, count in enumerate(self._planner.counts) if count]
        task = PatchTask(0, self._planner.seed, 0, 0, first, (0,), (0,), replacements=tuple(others), skipped_from=None)
        return next(self._worker(Wanted()).make(task)).patch

    # The end

    def stop(self, wait: bool = True) -> None:
        """End what runs. After an error nobody waits for that."""
        pool = self._pool
        self.forget()
        if pool is not None:
            pool.close(wait)

    def forget(self) -> None:
        """Leave what runs to whom it belongs: in a forked process, to the parent."""
        if self._end is not None:
            self._end.detach()
            self._end = None
        self._reset()


_supplies: weakref.WeakSet[PatchSupply] = weakref.WeakSet()


@in_forked_process
def _forget_pools() -> None:
    for supply in tuple(_supplies):
        supply.forget()
