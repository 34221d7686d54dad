"""One process that makes patches, and the two pipes between it and the queue."""

import contextlib
import multiprocessing
import multiprocessing.util
import os
import pickle
import queue
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import connection, parent_process
from typing import Any

import torch
import torch.multiprocessing  # teaches pipes how tensors travel
from torch import Tensor

from ..errors import SubjectError, WorkerError
from ..runtime.shared_memory import explained_lack, remove_segments_of, share
from ..volumes.contents import name_of
from .messages import Failure, Message, Packer, Unpacker
from .patch_worker import MadePatch, PatchTask, PatchWorker

__all__ = ["TASKS_AHEAD", "WorkerProcess", "end_all"]

# Tasks that each worker has, so that it loads a subject while its last patches wait to be fetched.
TASKS_AHEAD = 2
# What a worker has in hand when it has nothing to do.
NOTHING = -1
# How often a worker makes sure that its parent lives, in seconds, where the system does not tell it.
WATCH_SECONDS = 1.0
# How long all workers together may take to end what they are making when the queue is closed, in seconds.
ENDING_SECONDS = 5.0
NOT_STARTED = (
    " before it had made anything; what it printed says why. Where workers are spawned, what a script does must stand below"
    " if __name__ == '__main__':"
)
# What sending raises where nobody reads any more.
GONE = (BrokenPipeError, ConnectionResetError)
# How long a process that has closed its pipe may take to end, in seconds.
DYING_SECONDS = 1.0


class WorkerProcess:
    """A process that makes patches, as the process that has started it sees it.

    Args:
        worker: what it runs.
        number: which of the workers it is.
        context: start method; None takes the usual one.

    Raises:
        WorkerError: if it ends while it is being started, or what it runs cannot be pickled where that is needed.
    """

    def __init__(self, worker: PatchWorker, number: int, context: str | None) -> None:
        self.number = number
        self.tasks: deque[PatchTask] = deque()
        """What it is to do; its next message is about the first."""
        self.pending: deque[tuple[int, int, Callable[[], Any]]] = deque()
        """Run, sequence number and maker of those patches of its last message that there was no room for yet."""
        self._has_sent = False
        self._unpacker = Unpacker()
        self._dataset = worker.dataset
        # The subject whose patches it makes, which tells those who look for the reason of a death.
        self._doing = share(torch.full((1,), NOTHING))
        processes: Any = multiprocessing.get_context(context)
        # That of this process, which is removed at its end, is then that of the workers: they could not remove theirs.
        multiprocessing.util.get_temp_dir()
        tasks, self._tasks = processes.Pipe(duplex=False)
        self.reader, messages = processes.Pipe(duplex=False)
        arguments = (worker, self._doing, tasks, messages)
        self.process = processes.Process(target=_work, args=arguments, name=f"voxloom queue worker {number}", daemon=True)
        method = processes.get_start_method()
        try:
            with _interrupts_wait(method):
                self.process.start()
        except BrokenPipeError as error:
            raise WorkerError(f"a worker process of the queue ended{NOT_STARTED}") from error
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise WorkerError(
                f"the queue's worker processes are started by {method!r}, which pickles the subjects, the sampler and the"
                f" transforms for them, and that failed ({error}): in place of a lambda, or a function within another, use one"
                " that stands in a module, or use num_workers=0"
            ) from error
        finally:
            # Where the only copies are the worker's, its end is seen.
            tasks.close()
            messages.close()

    def give(self, task: PatchTask) -> None:
        """Let it make the patches of a task, after those that it has already."""
        self.tasks.append(task)
        with contextlib.suppress(BrokenPipeError):  # its death is told where messages are waited for
            self._tasks.send(task)

    def fetch(self) -> Message | Failure:
        """Fetch its next message, and forget the task that this answers.

        Raises:
            WorkerError: if it died instead.
        """
        try:
            message: Message | Failure = self.reader.recv()
        except (EOFError, OSError, RuntimeError) as error:  # from the pipe, or for a block whose owner is gone
            if self._exit_code() is None:
                raise
            raise self.death() from error
        self.tasks.popleft()
        self._has_sent = True
        return message

    def unpack(self, message: Message, empty: Any) -> None:
        """Make the patches of a message pending."""
        contents = self._unpacker.unpack(message, empty)
        self.pending.extend((message.run, number, make) for number, make in contents)

    def ask_to_end(self) -> None:
        """Ask it to end when it has made what it is making."""
        with contextlib.suppress(OSError):
            self._tasks.send(None)

    def end(self, until: float) -> None:
        """Wait until it has ended, or a moment of `time.monotonic` has come, and then end it by force."""
        if self.process.pid is not None:
            self.process.join(max(0.0, until - time.monotonic()))
            self.process.kill()
            self.process.join()
            remove_segments_of(self.process.pid)
        self._tasks.close()
        self.reader.close()
        self.pending.clear()

    def death(self) -> WorkerError:
        """Say how it ended, and during what."""
        code = self._exit_code()
        how = f"was killed by {_signal_name(-code)}" if code is not None and code < 0 else f"ended with exit code {code}"
        doing = int(self._doing[0])
        at = "" if doing == NOTHING else f" while it was making patches of {name_of(self._dataset, doing)}"
        return WorkerError(f"the queue's worker process {self.process.pid} {how}{at}{self._hint(code)}")

    def _exit_code(self) -> int | None:
        """Give the exit code of a process that seems to have ended; None if it lives."""
        # It may have closed its pipes, but not ended yet; or another thread has just been told how, and not written it down yet.
        end = time.monotonic() + DYING_SECONDS
        while (code := self.process.exitcode) is None and time.monotonic() < end:
            time.sleep(0.01)
        return code

    def _hint(self, code: int | None) -> str:
        """Say what often is the reason."""
        if code == -signal.SIGKILL:
            return ". That often means that memory ran out: use fewer workers, or images that are smaller or not compressed"
        if code is not None and code > 0 and not self._has_sent:
            return NOT_STARTED
        return ""


def end_all(workers: Iterable[WorkerProcess]) -> None:
    """End processes, all at once, by force where they take long."""
    workers = tuple(workers)
    for worker in workers:
        worker.ask_to_end()
    until = time.monotonic() + ENDING_SECONDS
    for worker in workers:
        worker.end(until)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


@contextlib.contextmanager
def _interrupts_wait(method: str) -> Iterator[None]:
    """Hold Ctrl-C back for a moment in which a new process would take it for its own."""
    # A fork server would keep that for all that it ever forks.
    if method == "forkserver" or not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# What runs in the process


def _work(worker: PatchWorker, doing: Tensor, tasks: connection.Connection, messages: connection.Connection) -> None:
    """Make patches until there is nothing more to do: in the end, or when the parent is gone."""
    # A terminal sends Ctrl-C to all processes; what becomes of the workers is for the parent to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    torch.set_num_threads(1)
    received: queue.SimpleQueue[PatchTask | None] = queue.SimpleQueue()
    made: queue.SimpleQueue[Message | Failure] = queue.SimpleQueue()
    # The parent has copied a message before it asks for the one after the next `TASKS_AHEAD`.
    packer = Packer(TASKS_AHEAD + 1)
    # Pipes hold little. So that nobody waits for the other to read, threads do nothing else.
    threading.Thread(target=_receive, args=(tasks, received), daemon=True).start()
    threading.Thread(target=_send, args=(messages, made, packer), daemon=True).start()
    while (task := received.get()) is not None:
        doing[0] = task.subject
        made.put(_answer(worker, packer, task))
        doing[0] = NOTHING
    # Not by way of the interpreter's end, which would abort the process if the other thread is in the midst of PyTorch.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _receive(tasks: connection.Connection, received: "queue.SimpleQueue[PatchTask | None]") -> None:
    """Receive tasks, and end the process at once when its parent is gone, whatever it is doing."""
    parent = parent_process()
    assert parent is not None
    forked_by = os.getppid()
    with contextlib.suppress(EOFError, OSError):
        while True:
            ready = connection.wait([tasks, parent.sentinel], timeout=WATCH_SECONDS)
            # Processes that were forked from the parent may hold open what would tell of its end.
            if parent.sentinel in ready or os.getppid() != forked_by:
                break
            if tasks in ready:
                received.put(tasks.recv())
    os._exit(1)


def _send(messages: connection.Connection, made: "queue.SimpleQueue[Message | Failure]", packer: Packer) -> None:
    try:
        while True:
            message = made.get()
            try:
                with explained_lack():
                    messages.send(message)
            except GONE:
                raise
            except (OSError, WorkerError) as error:  # nothing has been sent of what could not be shared
                if isinstance(message, Message):
                    packer.was_not_sent(message)
                messages.send(Failure(_cannot_send(error), traceback.format_exc()))
    except GONE:  # nobody reads any more
        pass
    except BaseException:  # noqa: BLE001 - nobody else would see it
        traceback.print_exc(file=sys.stderr)
        os._exit(1)


def _cannot_send(error: Exception) -> WorkerError:
    """Say why patches cannot leave a worker."""
    if isinstance(error, WorkerError):
        return error
    is_long = "path too long" in str(error)
    way = "let TMPDIR be a folder with a shorter name" if is_long else "see to the cause, or use num_workers=0"
    return WorkerError(f"patches cannot leave a worker, which makes a socket in the temporary folder ({error}): {way}")


def _answer(worker: PatchWorker, packer: Packer, task: PatchTask) -> Message | Failure:
    """Make the patches of a task, or say why they cannot be made."""
    try:
        empty = packer.begin(len(task.numbers))
        return _packed(worker, packer, task, list(worker.make(task, empty)))
    except Exception as error:  # noqa: BLE001 - it is raised again in the process that asked
        return Failure(_as_it_can_travel(error).with_traceback(None), traceback.format_exc())


def _packed(worker: PatchWorker, packer: Packer, task: PatchTask, made: list[MadePatch]) -> Message:
    try:
        return packer.pack(task.run, made)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise SubjectError(
            f"patches of {name_of(worker.dataset, task.subject)} cannot leave the worker, because one of their entries"
            f" cannot be pickled ({error}): remove it with a transform, or use num_workers=0"
        ) from error


def _as_it_can_travel(error: Exception) -> Exception:
    """Give an error, or one that says the same if other processes cannot make it from what pickle keeps of it."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - just pickled here
    except Exception:  # noqa: BLE001 - whatever its own methods raise
        text = f"{type(error).__qualname__}: {error}"
        return RuntimeError("\n".join([text, *getattr(error, "__notes__", ())]))
    return error
