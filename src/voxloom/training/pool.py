"""Who makes patches: what a queue asks of it, and the simplest one, which makes them in the process that asks."""

import time
from collections.abc import Iterator
from typing import Protocol

from ..runtime.memory import BufferPool
from ..volumes.subject import Subject
from .patch_worker import MadePatch, PatchWorker, SkippedSubject
from .scheduler import TaskScheduler

__all__ = ["LocalPool", "PatchPool", "Skipped", "keep_enough"]

Skipped = dict[tuple[int, int], SkippedSubject]
"""Subjects that were skipped, by epoch and place."""


class PatchPool(Protocol):
    """Makes the patches of a scheduler's tasks, and buffers those that have not been yielded yet."""

    idle_seconds: float
    """How long patches were waited for."""

    @property
    def num_buffered(self) -> int:
        """Patches that are buffered."""
        ...

    @property
    def is_over(self) -> bool:
        """Whether an error of another pass has ended it, so that another one is needed."""
        ...

    def restart(self, scheduler: TaskScheduler, num_yielded: int) -> None:
        """Begin with the tasks of a scheduler, and forget all that is buffered.

        Args:
            scheduler: gives the tasks.
            num_yielded: how many patches were yielded before.
        """
        ...

    def go_to(self, epoch: int, sequence_number: int) -> None:
        """Begin an epoch, whose first patch has this sequence number, and forget what is buffered of those before it."""
        ...

    def take(self, sequence_number: int) -> Subject:
        """Give a patch, once it is there."""
        ...

    def close(self, wait: bool = True) -> None:
        """End all that runs, and wait until it has ended."""
        ...


class LocalPool:
    """Makes patches in the process that asks for them, in the order of loading, and none before it is needed."""

    is_over = False

    def __init__(self, worker: PatchWorker, memory: BufferPool, max_length: int, skipped: Skipped) -> None:
        self.idle_seconds = 0.0
        self._skipped = skipped
        self._worker = worker
        self._memory = memory
        self._max_length = max_length
        self._buffered: dict[int, Subject] = {}
        self._first_wanted = 0
        self._made: Iterator[MadePatch] = iter(())

    @property
    def num_buffered(self) -> int:
        """Patches that are buffered."""
        return len(self._buffered)

    def restart(self, scheduler: TaskScheduler, num_yielded: int) -> None:
        """See `PatchPool`."""
        self._buffered = {}
        self._first_wanted = 0
        self._worker.wanted.begin(scheduler.run, scheduler.start[0])
        self._made = self._make_all(scheduler)

    def _make_all(self, scheduler: TaskScheduler) -> Iterator[MadePatch]:
        while (task := scheduler.next_task(0)) is not None:
            yield from self._worker.make(task, self._memory.empty)

    def go_to(self, epoch: int, sequence_number: int) -> None:
        """See `PatchPool`."""
        self._worker.wanted.go_to(epoch)
        self._worker.release()
        self._first_wanted = sequence_number
        self._buffered = {number: patch for number, patch in self._buffered.items() if number >= sequence_number}

    def take(self, sequence_number: int) -> Subject:
        """See `PatchPool`."""
        began = time.perf_counter()
        while sequence_number not in self._buffered:
            made = next(self._made)
            if made.skipped is not None:
                self._skipped[made.skipped.epoch, made.skipped.place] = made.skipped
            if made.sequence_number >= self._first_wanted:
                self._buffered[made.sequence_number] = made.patch
                keep_enough(self._memory, made.patch, self._max_length)
        self.idle_seconds += time.perf_counter() - began
        return self._buffered.pop(sequence_number)

    def close(self, wait: bool = True) -> None:
        """See `PatchPool`."""
        self._worker.release()
        self._buffered = {}
        self._made = iter(())


def keep_enough(memory: BufferPool, patch: Subject, max_length: int) -> None:
    """Let the memory of as many patches as may be buffered be used again."""
    size = sum(image.memory for image in patch.images.values())
    memory.kept_bytes = max(memory.kept_bytes, size * max_length)
