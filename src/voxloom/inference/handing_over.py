"""What the threads of a prediction hand to one another: batches that were read, and tiles that are to be written."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

__all__ = ["MOST_WAITING", "Reading", "Writer"]

# Tiles that may wait for the writer, so that what has no size, such as tiles without patches, is bounded too.
MOST_WAITING = 32


class Reading:
    """Batches that are read together, of which none is held once it is taken."""

    def __init__(self, future: Future[list[Tensor | BaseException]]) -> None:
        self._future: Future[list[Tensor | BaseException]] | None = future
        self._values: deque[Tensor | BaseException] = deque()

    def take(self) -> Tensor:
        """Give the next batch when it has been read, or raise why it cannot be."""
        if self._future is not None:
            self._values.extend(self._future.result())
            self._future = None
        value = self._values.popleft()
        if isinstance(value, BaseException):
            raise value
        return value


class Writer:
    """A thread that does one thing after the other, and what it is given that it has yet to do."""

    def __init__(self, thread: ThreadPoolExecutor) -> None:
        self._thread = thread
        self._waiting: deque[tuple[Future[None], int]] = deque()  # what it is at or has yet to do, and the bytes of each
        self._has_ended = False

    def submit(self, function: Callable[..., object], *arguments: object, num_bytes: int = 0) -> Future[None]:
        """Let something be done after what was given before; waits only if too many things wait already."""
        while len(self._waiting) >= MOST_WAITING or (self._waiting and self._waiting[0][0].done()):
            self._wait_for_one()
        future = self._thread.submit(self._unless_failed, function, *arguments)
        self._waiting.append((future, num_bytes))
        return future

    def _unless_failed(self, function: Callable[..., object], *arguments: object) -> None:
        """Do nothing after an error: a slab of which a tile is missing must not be recorded."""
        if self._has_ended:
            return
        try:
            function(*arguments)
        except BaseException:
            self._has_ended = True
            raise

    def wait(self) -> None:
        """Wait until all is done, and raise what was raised."""
        while self._waiting:
            self._wait_for_one()

    def wait_for_room(self, num_bytes: int) -> None:
        """Wait until no more bytes than these wait."""
        while self._waiting and self.num_bytes > num_bytes:
            self._wait_for_one()

    @property
    def num_bytes(self) -> int:
        """Bytes that wait, or are at hand."""
        return sum(size for _, size in self._waiting)

    def _wait_for_one(self) -> None:
        self._waiting.popleft()[0].result()

    def stop(self) -> None:
        """Do nothing any more."""
        self._has_ended = True
        self._thread.shutdown(cancel_futures=True)
