"""Processes that make patches ahead of their being needed."""

import atexit
import contextlib
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from multiprocessing import connection

from ..errors import WorkerError
from ..runtime.memory import BufferPool
from ..runtime.shared_memory import check_descriptors, explained_lack
from ..volumes.subject import Subject
from .messages import Failure, Message
from .patch_worker import PatchWorker
from .pool import Skipped, keep_enough
from .scheduler import TaskScheduler
from .worker_process import TASKS_AHEAD, WorkerProcess, end_all

__all__ = ["WorkerPool"]

# How long this process waits for a patch before it makes sure that the workers live, in seconds.
LIVENESS_SECONDS = 1.0
# Descriptors of this process: pipes, the process itself and blocks of shared memory; and what is opened beside, files among it.
DESCRIPTORS_PER_WORKER, DESCRIPTORS_BESIDE = 9, 12
# How long closing waits for the thread that ends the workers.
CLOSING_SECONDS = 30.0


class WorkerPool:
    """Lets worker processes make patches.

    The patches of a subject are all made by the worker that has loaded it. A thread of this process gives the workers their
    tasks, fetches their messages as they come, and copies the patches into memory of this process, as long as that holds no more
    than `max_length` of them. Otherwise messages stay where they are, and workers that have made their tasks wait.

    A patch is taken in if its sequence number is less than `max_length` ahead of the number that were yielded. That leaves room
    for those before it, whoever makes them, so that workers need not keep step; and each worker makes its patches in ascending
    order, so that none that is needed waits behind one that there is no room for.

    Args:
        worker: what the processes run.
        memory: where patches are buffered.
        max_length: patches that are buffered at most.
        skipped: where it is written down which subjects were skipped.
        num_workers: number of processes.
        context: start method of the workers; None takes the usual one.

    Raises:
        WorkerError: if a worker ends while it is being started.
    """

    def __init__(
        self, worker: PatchWorker, memory: BufferPool, max_length: int, skipped: Skipped, num_workers: int, context: str | None
    ) -> None:
        self.idle_seconds = 0.0
        self._skipped = skipped
        self._wanted = worker.wanted
        self._memory = memory
        self._max_length = max_length
        self._error: BaseException | None = None
        self._is_closed = False
        self._process = os.getpid()
        # What follows belongs to both threads, and is changed only by one that holds the lock.
        self._changed = threading.Condition()
        self._changes = 0
        self._is_asleep = self._needs_room = False
        self._woken, self._waker = multiprocessing.Pipe(duplex=False)
        self._scheduler: TaskScheduler | None = None
        self._errors_ahead: dict[int, Exception] = {}
        self._buffered: dict[int, Subject] = {}
        self._first_wanted = self._num_yielded = 0
        self._workers: list[WorkerProcess] = []
        check_descriptors(num_workers, DESCRIPTORS_PER_WORKER, DESCRIPTORS_BESIDE)
        try:
            for number in range(num_workers):
                with explained_lack():
                    self._workers.append(WorkerProcess(worker, number, context))
        except BaseException:
            self._end_workers()
            raise
        self._thread = threading.Thread(target=self._receive, name="voxloom queue", daemon=True)
        self._thread.start()

    # What the thread that trains does

    @property
    def num_buffered(self) -> int:
        """Patches that are buffered."""
        return len(self._buffered)

    @property
    def is_over(self) -> bool:
        """See `PatchPool`; a death is told where the next patch is asked for."""
        return self._error is not None and not isinstance(self._error, WorkerError)

    def restart(self, scheduler: TaskScheduler, num_yielded: int) -> None:
        """See `PatchPool`."""
        with self._change():
            # First what workers look at: a task of the new run that they met before would be dropped.
            self._wanted.begin(scheduler.run, scheduler.start[0])
            self._errors_ahead = {}
            self._buffered = {}
            self._first_wanted, self._num_yielded = 0, num_yielded
            self._scheduler = scheduler

    def go_to(self, epoch: int, sequence_number: int) -> None:
        """See `PatchPool`."""
        with self._change():
            self._wanted.go_to(epoch)
            self._error = self._error or self._errors_ahead.get(epoch)
            self._first_wanted = sequence_number
            self._num_yielded = max(self._num_yielded, sequence_number)
            self._buffered = {number: patch for number, patch in self._buffered.items() if number >= sequence_number}

    def take(self, sequence_number: int) -> Subject:
        """See `PatchPool`."""
        began = time.perf_counter()
        with self._change(only_room=True):
            while sequence_number not in self._buffered or self._error is not None:
                self._check()
                self._changed.wait(LIVENESS_SECONDS)
            patch = self._buffered.pop(sequence_number)
            self._num_yielded += 1
        self.idle_seconds += time.perf_counter() - began
        return patch

    def _check(self) -> None:
        """Raise the error that the thread has met, or that a worker has died."""
        if self._error is None:
            dead = (worker for worker in self._workers if not worker.process.is_alive())
            self._error = next((worker.death() for worker in dead), None)
        if self._error is not None:
            raise self._error

    @contextlib.contextmanager
    def _change(self, only_room: bool = False) -> Iterator[None]:
        """Change what belongs to both threads, and let the other one look at it; if there is more room only if it needs that."""
        with self._changed:
            yield
            if only_room and not self._needs_room:
                return
            self._changes += 1
            is_asleep, self._is_asleep = self._is_asleep, False
        if is_asleep:
            self._waker.send_bytes(b"!")

    def close(self, wait: bool = True) -> None:
        """See `PatchPool`."""
        if self._is_closed or os.getpid() != self._process:
            return  # in a forked process the workers belong to another
        with self._change():
            self._is_closed = True
            self._buffered = {}
            self._error = None  # its traceback refers to this
            self._wanted.end()
        _ending.add(self._thread)
        # The garbage collector may have called this from within the thread.
        if wait and threading.current_thread() is not self._thread:
            self._thread.join(CLOSING_SECONDS)

    # What the thread that receives does

    def _receive(self) -> None:
        try:
            with explained_lack():
                while not self._is_closed:
                    with self._changed:
                        changes, self._needs_room = self._changes, False
                    for worker in self._workers:
                        self._give_tasks(worker)
                        self._admit(worker)
                    for worker in self._wait(changes):
                        self._fetch(worker)
        except BaseException as error:  # noqa: BLE001 - it is raised again where patches are taken
            with self._changed:
                self._error = error.with_traceback(None)
                self._changed.notify_all()
        finally:
            self._end_workers()
            _ending.discard(self._thread)

    def _give_tasks(self, worker: WorkerProcess) -> None:
        """Keep a worker busy, as long as there are tasks."""
        while len(worker.tasks) < TASKS_AHEAD and self._scheduler is not None:
            task = self._scheduler.next_task(worker.number)
            if task is None:
                return
            worker.give(task)

    def _fetch(self, worker: WorkerProcess) -> None:
        """Fetch a message, and make the patches in it pending.

        An error that was met for an epoch that has been left since is of no interest; one for an epoch that is loaded ahead waits
        until that begins.
        """
        task = worker.tasks[0]
        message = worker.fetch()
        self._give_tasks(worker)
        with self._changed:
            if isinstance(message, Message):
                worker.unpack(message, self._memory.empty)
                if self._scheduler is not None and message.run == self._scheduler.run:
                    self._skipped.update({(skip.epoch, skip.place): skip for skip in message.skipped})
            elif self._wanted.includes(task):
                if task.epoch == self._wanted.epoch:
                    raise _as_from_here(message)
                self._errors_ahead.setdefault(task.epoch, _as_from_here(message))

    def _admit(self, worker: WorkerProcess) -> None:
        """Copy those patches of a worker that there is room for."""
        while worker.pending:
            run, sequence_number, make = worker.pending[0]
            with self._changed:
                is_wanted = self._is_wanted(run, sequence_number)
                has_room = sequence_number < self._num_yielded + self._max_length
                self._needs_room |= is_wanted and not has_room
            if is_wanted and not has_room:
                return
            worker.pending.popleft()
            if is_wanted:
                patch = make()
                keep_enough(self._memory, patch, self._max_length)
                with self._changed:
                    if self._is_wanted(run, sequence_number):
                        self._buffered[sequence_number] = patch
                        self._changed.notify_all()

    def _is_wanted(self, run: int, sequence_number: int) -> bool:
        is_of_this_run = self._scheduler is not None and run == self._scheduler.run
        return is_of_this_run and sequence_number >= self._first_wanted

    def _wait(self, changes: int) -> list[WorkerProcess]:
        """Wait until something has changed or a message is there; give the workers that have sent one."""
        readers = {worker.reader: worker for worker in self._workers if worker.tasks and not worker.pending}
        ends = {worker.process.sentinel: worker for worker in self._workers}
        with self._changed:
            if changes != self._changes or self._is_closed:
                return []
            self._is_asleep = True
        ready = connection.wait([*readers, *ends, self._woken])
        with self._changed:
            self._is_asleep = False
        if self._woken in ready:
            self._woken.recv_bytes()
        ended = [worker for end, worker in ends.items() if end in ready]
        if ended and not self._is_closed:
            raise ended[0].death()
        return [worker for reader, worker in readers.items() if reader in ready]

    def _end_workers(self) -> None:
        self._wanted.end()
        end_all(self._workers)


_ending: set[threading.Thread] = set()
"""Threads that end their workers."""


@atexit.register
def _wait_for_ends() -> None:
    """Let no thread be in the midst of PyTorch when the interpreter ends: the process would be aborted."""
    for thread in tuple(_ending):
        thread.join(CLOSING_SECONDS)


class _InWorkerError(Exception):
    """The traceback of an error in a worker, as text: shown above the error's own."""


def _as_from_here(failure: Failure) -> Exception:
    failure.error.__cause__ = _InWorkerError(f"in worker process:\n\n{failure.traceback}")
    return failure.error
