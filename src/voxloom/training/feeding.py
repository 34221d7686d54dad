"""Which task comes next: an endless row, over all epochs."""

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from ..core.schedules import EpochSchedule, RemainingPatches, SubjectDraws
from .making import PatchTask

__all__ = ["TaskFeed"]

# Subjects that are tried in the place of one that cannot be read.
MOST_STAND_INS = 16


@dataclass
class _Epoch:
    """An epoch that is being loaded, or was."""

    schedule: EpochSchedule
    first_ticket: int
    remaining: RemainingPatches
    places: Iterator[int]
    skipped: Mapping[int, int]

    @property
    def stop_ticket(self) -> int:
        return self.first_ticket + len(self.schedule)


class TaskFeed:
    """Hands out the tasks of one run: all patches of an epoch in the order of loading, and then those of the next.

    Whoever asks for tasks is given those of one subject until that is done, and then those of the next subject that nobody has.
    Patches carry tickets, which number them over all epochs of the run. Any thread may call it.

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
        self._at_hand: dict[int, tuple[_Epoch, Iterator[SubjectDraws]]] = {}
        self._latest = self._add(schedule, 0, position, skipped)

    def _add(
        self, schedule: EpochSchedule, first_ticket: int, position: int = 0, skipped: Mapping[int, int] | None = None
    ) -> _Epoch:
        remaining = schedule.remaining(position)
        epoch = _Epoch(schedule, first_ticket, remaining, iter(remaining.places), skipped or {})
        self._epochs[schedule.epoch] = epoch
        return epoch

    def begin(self, schedule: EpochSchedule) -> int | None:
        """Go to an epoch, and forget those before it.

        Returns:
            Ticket of its first patch; None if this run cannot go on to it, because it has come further, or has begun another one
            in its place.
        """
        with self._lock:
            if schedule.epoch < self._first_epoch:
                return None
            self._first_epoch = schedule.epoch + 1
            self._drop_before(schedule.epoch)
            if schedule.epoch == self._latest.schedule.epoch + 1:
                self._latest = self._add(schedule, self._latest.stop_ticket)
            known = self._epochs.get(schedule.epoch)
            return known.first_ticket if known is not None and known.schedule == schedule else None

    def abandon(self, epoch: int) -> int:
        """Hand out no more tasks of an epoch; give the ticket of the first patch that is wanted after it."""
        with self._lock:
            stop = self._epochs[epoch].stop_ticket if epoch in self._epochs else 0
            self._drop_before(epoch + 1)
            return stop

    def _drop_before(self, number: int) -> None:
        for epoch in [epoch for epoch in self._epochs if epoch < number]:
            self._epochs[epoch].places = iter(())
            if self._epochs[epoch] is not self._latest:
                del self._epochs[epoch]
        self._at_hand = {asker: hand for asker, hand in self._at_hand.items() if hand[0].schedule.epoch >= number}

    def _append_next(self) -> bool:
        """Add the epoch after the latest, if it can be foreseen."""
        latest = self._latest
        schedule = self._foresee(latest.schedule.epoch + 1)
        if schedule is None:
            return False
        self._latest = self._add(schedule, latest.stop_ticket)
        return True

    def next_task(self, asker: int) -> PatchTask | None:
        """Give the next task; None if there is none until an epoch begins that cannot be foreseen.

        Args:
            asker: number of the worker that will make it.
        """
        with self._lock:
            while True:
                if asker in self._at_hand:
                    epoch, pieces = self._at_hand[asker]
                    piece = next(pieces, None)
                    if piece is not None:
                        return self._task(epoch, piece)
                    del self._at_hand[asker]
                epoch = self._latest
                place = next(epoch.places, None)
                if place is not None:
                    self._at_hand[asker] = (epoch, epoch.remaining.pieces(place, self._most))
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
            tickets=tuple((piece.patches + epoch.first_ticket).tolist()),
            stand_ins=_stand_ins(schedule, piece.place),
            skipped_from=epoch.skipped.get(piece.place),
        )


def _stand_ins(schedule: EpochSchedule, place: int) -> tuple[int, ...]:
    """Give the subjects that come after a place, and after the last those from the first, without the one at the place."""
    subjects, own = schedule.subjects, schedule.subjects[place]
    found: dict[int, None] = {}
    for distance in range(1, len(subjects)):
        subject = subjects[(place + distance) % len(subjects)]
        if subject != own:
            found[subject] = None
        if len(found) == MOST_STAND_INS:
            break
    return tuple(found)
