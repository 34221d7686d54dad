"""Which task comes next: an endless row, over all epochs."""

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from ..core.schedules import EpochSchedule, RemainingPatches, SubjectDraws
from .patch_worker import PatchTask

__all__ = ["TaskScheduler"]

# Subjects that are tried in the place of one that cannot be read.
MOST_REPLACEMENTS = 16


@dataclass
class _Epoch:
    """An epoch that is being loaded, or was."""

    schedule: EpochSchedule
    first_number: int
    remaining: RemainingPatches
    places: Iterator[int]
    skipped: Mapping[int, int]

    @property
    def stop_number(self) -> int:
        return self.first_number + len(self.schedule)


class TaskScheduler:
    """Gives workers the tasks of one run: all patches of an epoch in the order of loading, and then those of the next.

    A worker is given the tasks of one subject until that is done, and then those of the next subject that nobody has.
    Patches have sequence numbers, which go on over all epochs of the run. Any thread may call it.

    Args:
        run: number of the run.
        schedule: of the first epoch.
        position: patches of it that have left before.
        skipped: places of it whose subjects were skipped, and from which draw on.
        foresee: gives the schedule of a later epoch, or None if that cannot be known before it begins.
        most: patches in a task.
    """

    def __init__(
        self,
        run: int,
        schedule: EpochSchedule,
        position: int,
        skipped: Mapping[int, int],
        foresee: Callable[[int], EpochSchedule | None],
        most: int,
    ) -> None:
        self.run = run
        self.start = (schedule.epoch, position)
        """Epoch and position that the run begins at."""
        self._first_epoch = schedule.epoch
        """The first one that has not begun yet."""
        self._foresee = foresee
        self._most = most
        self._lock = threading.Lock()
        self._epochs: dict[int, _Epoch] = {}
        self._assigned: dict[int, tuple[_Epoch, Iterator[SubjectDraws]]] = {}
        self._latest = self._add(schedule, 0, position, skipped)

    def _add(
        self, schedule: EpochSchedule, first_number: int, position: int = 0, skipped: Mapping[int, int] | None = None
    ) -> _Epoch:
        remaining = schedule.remaining(position)
        epoch = _Epoch(schedule, first_number, remaining, iter(remaining.places), skipped or {})
        self._epochs[schedule.epoch] = epoch
        return epoch

    def begin(self, schedule: EpochSchedule) -> int | None:
        """Go to an epoch, and forget those before it.

        Returns:
            Sequence number of its first patch; None if this run cannot go on to it, because it has come further, or has begun
            another one in its place.
        """
        with self._lock:
            if schedule.epoch < self._first_epoch:
                return None
            self._first_epoch = schedule.epoch + 1
            self._drop_before(schedule.epoch)
            if schedule.epoch == self._latest.schedule.epoch + 1:
                self._latest = self._add(schedule, self._latest.stop_number)
            known = self._epochs.get(schedule.epoch)
            return known.first_number if known is not None and known.schedule == schedule else None

    def abandon(self, epoch: int) -> int:
        """Hand out no more tasks of an epoch; give the sequence_number of the first patch that is wanted after it."""
        with self._lock:
            stop = self._epochs[epoch].stop_number if epoch in self._epochs else 0
            self._drop_before(epoch + 1)
            return stop

    def _drop_before(self, number: int) -> None:
        for epoch in [epoch for epoch in self._epochs if epoch < number]:
            self._epochs[epoch].places = iter(())
            if self._epochs[epoch] is not self._latest:
                del self._epochs[epoch]
        self._assigned = {worker: given for worker, given in self._assigned.items() if given[0].schedule.epoch >= number}

    def _append_next(self) -> bool:
        """Add the epoch after the latest, if it can be foreseen."""
        latest = self._latest
        schedule = self._foresee(latest.schedule.epoch + 1)
        if schedule is None:
            return False
        self._latest = self._add(schedule, latest.stop_number)
        return True

    def next_task(self, worker: int) -> PatchTask | None:
        """Give the next task; None if there is none until an epoch begins that cannot be foreseen.

        Args:
            worker: number of the worker that will make it.
        """
        with self._lock:
            while True:
                if worker in self._assigned:
                    epoch, pieces = self._assigned[worker]
                    piece = next(pieces, None)
                    if piece is not None:
                        return self._task(epoch, piece)
                    del self._assigned[worker]
                epoch = self._latest
                place = next(epoch.places, None)
                if place is not None:
                    self._assigned[worker] = (epoch, epoch.remaining.pieces(place, self._most))
                elif not self._append_next():
                    return None

    def _task(self, epoch: _Epoch, piece: SubjectDraws) -> PatchTask:
        schedule = epoch.schedule
        return PatchTask(
            run=self.run,
            seed=schedule.seed,
            epoch=schedule.epoch,
            place=piece.place,
            subject=piece.subject,
            numbers=tuple(piece.numbers.tolist()),
            sequence_numbers=tuple((piece.patches + epoch.first_number).tolist()),
            replacements=_replacements(schedule, piece.place),
            skipped_from=epoch.skipped.get(piece.place),
        )


def _replacements(schedule: EpochSchedule, place: int) -> tuple[int, ...]:
    """Give the subjects that come after a place, and after the last those from the first, without the one at the place."""
    subjects, own = schedule.subjects, schedule.subjects[place]
    found: dict[int, None] = {}
    for distance in range(1, len(subjects)):
        subject = subjects[(place + distance) % len(subjects)]
        if subject != own:
            found[subject] = None
        if len(found) == MOST_REPLACEMENTS:
            break
    return tuple(found)
