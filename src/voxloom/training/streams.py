"""Where patches are made: in this process, or by workers that are ahead of it."""

import contextlib
import functools
import multiprocessing
import os
import pickle
import signal
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing import connection
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data._utils import signal_handling

from ..core.forks import in_forked_process
from ..core.memory import FreedMemory
from ..errors import SubjectError, VoxloomError, WorkerError
from ..volumes.subject import Subject
from .feeding import TaskFeed
from .making import MadePatch, PatchMaker, PatchTask, SkippedSubject, name_of
from .messages import Message, Packer, unpack

__all__ = ["TASKS_AHEAD", "LocalStream", "PatchStream", "WorkerStream"]

# Tasks that each worker has, so that it loads a subject while its last patches wait to be fetched.
TASKS_AHEAD = 2
# How long this process waits for a patch before it makes sure that the workers live, in seconds.
LIVENESS_SECONDS = 1.0
# What a worker has in hand when it has nothing to do.
NOTHING = -1
# How long a process that breaks off may take to end.
DYING_SECONDS = 0.5
# How long all workers together may take to end what they are making when the queue is closed, in seconds.
ENDING_SECONDS = 5.0
# How long closing waits for the thread that ends them.
CLOSING_SECONDS = 30.0


Skipped = dict[tuple[int, int], SkippedSubject]


class PatchStream(Protocol):
    """Makes the patches of a feed, and holds those that have not left yet."""

    idle_seconds: float
    """How long patches were waited for."""
    longest_wait: float
    """The longest of these times, in seconds."""

    @property
    def held(self) -> int:
        """Patches that are held."""
        ...

    @property
    def is_over(self) -> bool:
        """Whether it has ended, after an error or an interrupt in another pass, so that another one is needed."""
        ...

    was_interrupted: bool
    """Whether a worker was found to have ended by Ctrl-C, so that another stream can take up its work."""

    def run(self, feed: TaskFeed, left: int) -> None:
        """Begin with the tasks of a feed, and forget all that is held.

        Args:
            feed: the tasks.
            left: how many patches have left before.
        """
        ...

    def go_to(self, epoch: int, ticket: int) -> None:
        """Begin an epoch, whose first patch has this ticket, and forget what is held of those before it."""
        ...

    def take(self, ticket: int) -> Subject:
        """Give a patch, once it is there."""
        ...

    def close(self, wait: bool = True) -> None:
        """End all that runs, and wait until it has ended."""
        ...


class LocalStream:
    """Makes patches in the process that asks for them, in the order of loading, and none before it is needed."""

    def __init__(
        self, maker: PatchMaker, memory: FreedMemory, max_length: int, skipped: Skipped, feed: TaskFeed, left: int
    ) -> None:
        self.idle_seconds = 0.0
        self.longest_wait = 0.0
        self._skipped = skipped
        self._maker = maker
        self._memory = memory
        self._max_length = max_length
        self.run(feed, left)

    @property
    def held(self) -> int:
        """Patches that are held."""
        return len(self._held)

    def run(self, feed: TaskFeed, left: int) -> None:
        """See `PatchStream`."""
        self._held: dict[int, Subject] = {}
        self._floor = 0
        self._maker.wanted[0] = feed.run
        self._maker.wanted[1] = feed.start[0]
        self._made = self._make_all(feed)

    def _make_all(self, feed: TaskFeed) -> Iterator[MadePatch]:
        while (task := feed.next_task(0)) is not None:
            yield from self._maker.make(task, self._memory.empty)

    def go_to(self, epoch: int, ticket: int) -> None:
        """See `PatchStream`."""
        self._maker.wanted[1] = epoch
        self._maker.release()
        self._floor = ticket
        self._held = {number: patch for number, patch in self._held.items() if number >= ticket}

    def take(self, ticket: int) -> Subject:
        """See `PatchStream`."""
        began = time.perf_counter()
        while ticket not in self._held:
            made = next(self._made)
            if made.skipped is not None:
                self._skipped[made.skipped.epoch, made.skipped.place] = made.skipped
            if made.ticket >= self._floor:
                self._held[made.ticket] = made.patch
                _keep_enough(self._memory, made.patch, self._max_length)
        waited = time.perf_counter() - began
        self.idle_seconds += waited
        self.longest_wait = max(self.longest_wait, waited)
        return self._held.pop(ticket)

    is_over = False
    was_interrupted = False

    def close(self, wait: bool = True) -> None:
        """See `PatchStream`."""
        self._maker.release()
        self._held = {}
        self._made = iter(())


class _Messages(Dataset[Message | None]):
    """What a worker runs: a task goes in, a message comes out."""

    def __init__(self, maker: PatchMaker, doing: Tensor) -> None:
        self._maker = maker
        self._doing = doing
        # The receiver has copied a message before it asks for the one after the next `TASKS_AHEAD`.
        self._packer = Packer(TASKS_AHEAD + 1)

    def __getitem__(self, task: PatchTask | None) -> Message | None:
        if task is None:
            return None
        self._doing[0] = task.subject
        try:
            empty = self._packer.begin(len(task.numbers))
            return self._pack(task, list(self._maker.make(task, empty)))
        except Exception as error:
            if _can_travel(error):
                raise
            # It would be lost on the way, and the queue would wait for ever.
            text = f"{type(error).__qualname__}: {error}"
            raise RuntimeError("\n".join([text, *getattr(error, "__notes__", ())])) from error
        finally:
            self._doing[0] = NOTHING

    def _pack(self, task: PatchTask, made: list[MadePatch]) -> Message:
        try:
            return self._packer.pack(task.run, made)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise SubjectError(
                f"patches of {name_of(self._maker.dataset, task.subject)} cannot leave the worker, because one of their entries"
                f" cannot be pickled ({error}): remove it with a transform, or use num_workers=0"
            ) from error


def _can_travel(error: Exception) -> bool:
    """Say whether an error can be sent to another process: by the name of its type."""
    try:
        pickle.dumps(type(error))
    except (pickle.PicklingError, AttributeError, TypeError):
        return False
    return True


def _as_it_is(message: Any) -> Any:
    return message


class _Worker:
    """One process, and what is known of it."""

    def __init__(self, messages: _Messages, next_task: Callable[[], PatchTask | None], context: str | None) -> None:
        self.tasks: deque[PatchTask] = deque()
        """What it is to do, the next one first."""
        self.pending: deque[tuple[int, int, Callable[[], Subject]]] = deque()
        """Run, ticket and maker of those patches of its last message that there was no room for yet."""
        self.is_resting = False
        """Whether there was no task for it; it then has nothing to send."""
        self.has_sent = False
        """Whether it has ever sent a message."""
        loader = DataLoader(
            messages,
            batch_size=None,
            sampler=_Tasks(next_task, self.tasks),
            num_workers=1,
            prefetch_factor=TASKS_AHEAD,
            collate_fn=_as_it_is,
            multiprocessing_context=context,
            generator=torch.Generator(),  # the user's is left alone
        )
        self._blocks: deque[Tensor] = deque(maxlen=TASKS_AHEAD + 1)
        iterator: Any = iter(loader)
        self._iterator = iterator
        # If the process dies, the queue says so where a patch is asked for. PyTorch would raise an error of its own wherever the
        # main thread happens to be.
        signal_handling._remove_worker_pids(id(self._iterator))  # type: ignore[attr-defined]
        self._iterator._worker_pids_set = False

    @property
    def process(self) -> Any:
        """The process."""
        return self._iterator._workers[0]

    @property
    def reader(self) -> Any:
        """What can be waited for until a message is there."""
        return self._iterator._worker_result_queue._reader

    def fetch(self) -> Message | None:
        """Fetch the next message; raises what the worker raised."""
        message: Message | None = next(self._iterator)
        if message is None:
            self.is_resting = not self.tasks
        else:
            self.tasks.popleft()
            self.has_sent = True
            self._blocks.append(message.block)  # mapped once, though it is sent again and again
        return message

    def ask_to_end(self) -> None:
        """Ask the process to end when it has made what it is making."""
        self._iterator._workers_done_event.set()
        self._iterator._mark_worker_as_unavailable(0, shutdown=True)

    def close(self) -> None:
        """End the process, also where a traceback still refers to the iterator, which would otherwise end it some time."""
        self._iterator._shutdown_workers()
        self._blocks.clear()
        self.pending.clear()

    def keep_iterator(self) -> None:
        """In a forked process: never let go of the iterator, because it would end a process that is its parent's."""
        _of_parents.append(self._iterator)


_of_parents: list[Any] = []
_streams: weakref.WeakSet["WorkerStream"] = weakref.WeakSet()


@in_forked_process
def _keep_iterators() -> None:
    for stream in tuple(_streams):
        for worker in stream.workers:
            worker.keep_iterator()


class _Tasks(Sampler[PatchTask | None]):
    """The endless row of tasks of one worker; None where there is nothing to do."""

    def __init__(self, next_task: Callable[[], PatchTask | None], given: deque[PatchTask]) -> None:
        self._next_task = next_task
        self._given = given

    def __iter__(self) -> Iterator[PatchTask | None]:
        while True:
            task = self._next_task()
            if task is not None:
                self._given.append(task)
            yield task


class WorkerStream:
    """Lets worker processes make patches, ahead of their being needed.

    Each worker is a data loader of PyTorch's with one process, because the patches of a subject must all be made by the worker
    that has loaded it. A thread fetches their messages as they come, and copies the patches into memory of this process, as
    long as that holds no more than `max_length` of them. Otherwise messages stay where they are, and workers that have made
    their tasks wait.

    A patch is taken in if its ticket is less than `max_length` ahead of the number that have left. That leaves room for those
    before it, whoever makes them, so that workers need not keep step; and each worker makes its patches in ascending order,
    so that none that is needed waits behind one that there is no room for.

    Args:
        maker: what the workers run.
        memory: where patches are held.
        max_length: patches that are held at most.
        skipped: where it is written down which subjects were skipped, by epoch and place.
        feed: the first tasks.
        left: how many patches have left before.
        num_workers: number of processes.
        context: start method of the workers; None takes the usual one.
    """

    def __init__(
        self,
        maker: PatchMaker,
        memory: FreedMemory,
        max_length: int,
        skipped: Skipped,
        feed: TaskFeed,
        left: int,
        num_workers: int,
        context: str | None,
    ) -> None:
        self.idle_seconds = 0.0
        self.longest_wait = 0.0
        self._skipped = skipped
        self._maker = maker
        self._memory = memory
        self._max_length = max_length
        self._error: BaseException | None = None
        self.was_interrupted = False
        self._is_closed = False
        self._process = os.getpid()
        # What follows belongs to both threads, and is changed only by one that holds the lock.
        self._changed = threading.Condition()
        self._changes = 0
        self._is_asleep = self._needs_room = False
        self._woken, self._waker = multiprocessing.Pipe(duplex=False)
        self._set_out(feed, left)
        self._doing = torch.full((num_workers,), NOTHING)
        self._doing.share_memory_()  # type: ignore[no-untyped-call]
        self.workers: list[_Worker] = []
        _streams.add(self)
        try:
            for number in range(num_workers):
                messages = _Messages(maker, self._doing[number : number + 1])
                self.workers.append(_Worker(messages, functools.partial(self._next_task, number), context))
        except BaseException:
            self._close_workers()
            raise
        self._thread = threading.Thread(target=self._receive, name="voxloom queue", daemon=True)
        self._thread.start()

    def _next_task(self, worker: int) -> PatchTask | None:
        return self._feed.next_task(worker)

    # What the thread that trains does

    @property
    def held(self) -> int:
        """Patches that are held."""
        return len(self._held)

    def run(self, feed: TaskFeed, left: int) -> None:
        """See `PatchStream`."""
        with self._change():
            self._set_out(feed, left)

    def _set_out(self, feed: TaskFeed, left: int) -> None:
        # First what workers look at: a task of the new run that they met before would be dropped.
        self._maker.wanted[1] = feed.start[0]
        self._maker.wanted[0] = feed.run
        self._errors_ahead: dict[int, Exception] = {}
        self._held: dict[int, Subject] = {}
        self._floor, self._left = 0, left
        self._feed = feed
        self._has_set_out = True

    def go_to(self, epoch: int, ticket: int) -> None:
        """See `PatchStream`."""
        with self._change():
            self._has_set_out = True
            self._maker.wanted[1] = epoch
            self._error = self._error or self._errors_ahead.get(epoch)
            self._floor = ticket
            self._left = max(self._left, ticket)
            self._held = {number: patch for number, patch in self._held.items() if number >= ticket}

    def take(self, ticket: int) -> Subject:
        """See `PatchStream`."""
        began = time.perf_counter()
        with self._change(only_room=True):
            while ticket not in self._held or self._error is not None:
                self._check()
                self._changed.wait(LIVENESS_SECONDS)
            patch = self._held.pop(ticket)
            self._left += 1
        waited = time.perf_counter() - began
        self.idle_seconds += waited
        self.longest_wait = max(self.longest_wait, waited)
        return patch

    def _check(self) -> None:
        """Raise the error that the thread has met, or that a worker has died."""
        if self._error is not None:
            raise self._error
        for worker in self.workers:
            if not worker.process.is_alive():
                self._error = self._death_of(worker)
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

    @property
    def is_over(self) -> bool:
        """See `PatchStream`."""
        if isinstance(self._error, WorkerError):
            return self.was_interrupted  # another death is told where the next patch is asked for
        return self._error is not None or any(_was_interrupted(worker.process.exitcode) for worker in self.workers)

    def close(self, wait: bool = True) -> None:
        """See `PatchStream`."""
        if self._is_closed or os.getpid() != self._process:
            return  # in a forked process the workers belong to another
        with self._change():
            self._is_closed = True
            self._held = {}
            self._error = None  # its traceback refers to this
            self._maker.wanted[0] = -1
        # The garbage collector may have called this from within the thread.
        if wait and threading.current_thread() is not self._thread:
            self._thread.join(CLOSING_SECONDS)

    # What the thread that receives does

    def _receive(self) -> None:
        try:
            while not self._is_closed:
                with self._changed:
                    changes, self._needs_room = self._changes, False
                    has_set_out, self._has_set_out = self._has_set_out, False
                for worker in self.workers:
                    worker.is_resting &= not has_set_out
                    self._admit(worker)
                for worker in self._wait(changes):
                    message = self._fetch(worker)
                    if message is not None:
                        contents = unpack(message, self._memory.empty)
                        worker.pending.extend((message.run, ticket, make) for ticket, make in contents)
                        with self._changed:
                            if message.run == self._feed.run:
                                self._skipped.update({(skip.epoch, skip.place): skip for skip in message.skipped})
        except BaseException as error:  # noqa: BLE001 - it is raised again where patches are taken
            death = self._death_behind(error)
            with self._changed:
                self._error = error.with_traceback(None) if death is None else death
                self._changed.notify_all()
        finally:
            self._close_workers()

    def _fetch(self, worker: _Worker) -> Message | None:
        """Fetch a message.

        An error that was met for an epoch that has been left since is of no interest; one for an epoch that is loaded ahead waits
        until that begins.
        """
        try:
            return worker.fetch()
        except Exception as error:
            task = worker.tasks.popleft() if worker.tasks else None
            if task is None or not worker.process.is_alive():
                raise
            with self._changed:
                if self._maker.is_wanted(task):
                    if task.epoch == self._maker.wanted[1]:
                        raise
                    self._errors_ahead.setdefault(task.epoch, error.with_traceback(None))
            return None

    def _admit(self, worker: _Worker) -> None:
        """Copy those patches of a worker that there is room for."""
        while worker.pending:
            run, ticket, make = worker.pending[0]
            with self._changed:
                is_wanted = run == self._feed.run and ticket >= self._floor
                has_room = ticket < self._left + self._max_length
                self._needs_room |= is_wanted and not has_room
            if is_wanted and not has_room:
                return
            worker.pending.popleft()
            if is_wanted:
                patch = make()
                _keep_enough(self._memory, patch, self._max_length)
                with self._changed:
                    if run == self._feed.run and ticket >= self._floor:
                        self._held[ticket] = patch
                        self._changed.notify_all()

    def _wait(self, changes: int) -> list[_Worker]:
        """Wait until something has changed or a message is there; give the workers that have sent one."""
        awake = {worker.reader: worker for worker in self.workers if not worker.pending and not worker.is_resting}
        ends = {worker.process.sentinel: worker for worker in self.workers}
        with self._changed:
            if changes != self._changes or self._is_closed:
                return []
            self._is_asleep = True
        ready = connection.wait([*awake, *ends, self._woken])
        with self._changed:
            self._is_asleep = False
        if self._woken in ready:
            self._woken.recv_bytes()
        ended = [worker for end, worker in ends.items() if end in ready]
        if ended and not self._is_closed:
            raise self._death_of(ended[0])
        return [worker for reader, worker in awake.items() if reader in ready]

    def _death_behind(self, error: BaseException) -> WorkerError | None:
        """Say which worker has died, if that is why an error was met: PyTorch notices it too, but says less of it."""
        if isinstance(error, WorkerError):
            return error
        is_own = isinstance(error, VoxloomError) or not isinstance(error, OSError | EOFError | RuntimeError)
        ends = {worker.process.sentinel: worker for worker in self.workers}
        # What it was sending breaks off a moment before it has ended.
        dead = connection.wait(list(ends), timeout=0 if is_own else DYING_SECONDS)
        return self._death_of(ends[dead[0]]) if dead else None

    def _close_workers(self) -> None:
        self._maker.wanted[0] = -1
        for worker in self.workers:
            worker.ask_to_end()
        end = time.monotonic() + ENDING_SECONDS
        for worker in self.workers:
            worker.process.join(max(0.0, end - time.monotonic()))
            worker.process.terminate()
            worker.close()

    def _death_of(self, worker: _Worker) -> WorkerError:
        # It may have closed its pipes, but not ended yet; or another thread has just been told how, and has not written it down.
        end = time.monotonic() + LIVENESS_SECONDS
        while (code := worker.process.exitcode) is None and time.monotonic() < end:
            time.sleep(0.01)
        if _was_interrupted(code):
            self.was_interrupted = True
            return WorkerError(f"the queue's worker process {worker.process.pid} ended early, as after Ctrl-C or sys.exit")
        how = f"was killed by {_signal_name(-code)}" if code is not None and code < 0 else f"ended with exit code {code}"
        doing = int(self._doing[self.workers.index(worker)])
        at = "" if doing == NOTHING else f" while it was making patches of {name_of(self._maker.dataset, doing)}"
        return WorkerError(f"the queue's worker process {worker.process.pid} {how}{at}{_hint(code, worker.has_sent)}")


def _was_interrupted(code: int | None) -> bool:
    """Say whether a process ended because of Ctrl-C, which PyTorch's workers end without an error for."""
    return code in (0, -signal.SIGINT)


def _hint(code: int | None, has_sent: bool) -> str:
    """Say what often is the reason."""
    if code == -signal.SIGKILL:
        return ". That often means that memory ran out: use fewer workers, or images that are smaller or not compressed"
    if code is not None and code > 0 and not has_sent:
        return (
            " before it had made anything; what it printed says why. Where workers are spawned, what a script does must stand"
            " below if __name__ == '__main__':"
        )
    return ""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _keep_enough(memory: FreedMemory, patch: Subject, max_length: int) -> None:
    """Let the memory of as many patches as may be held be used again."""
    size = sum(image.memory for image in patch.images.values())
    memory.kept_bytes = max(memory.kept_bytes, size * max_length)
