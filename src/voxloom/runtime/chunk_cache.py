"""Chunks of volumes that have been decoded, kept for the next read: one bound for the whole process."""

import contextlib
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Protocol, TypeVar, cast

from .forks import in_forked_process
from .limits import as_bytes

__all__ = ["CHUNKS", "ChunkCache", "Sized", "set_chunk_cache"]

DEFAULT_BYTES = 256 * 2**20


class Sized(Protocol):
    """Something whose size in memory is known, such as an array."""

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        ...


Held = TypeVar("Held", bound=Sized)


class ChunkCache:
    """Keeps what was used last, up to a number of bytes.

    Args:
        limit: bytes that it may hold.
    """

    def __init__(self, limit: int = DEFAULT_BYTES) -> None:
        self._limit = limit
        self._bounds: list[int] = []  # of those that run with less
        self._held: OrderedDict[Hashable, Sized] = OrderedDict()
        self._num_bytes = 0
        self._lock = threading.Lock()
        self._owners = itertools.count()

    def new_owner(self) -> int:
        """Give a number for a file that has just been opened: what was kept of another one is not taken for its own."""
        return next(self._owners)

    @property
    def limit(self) -> int:
        """Bytes that it may hold."""
        return self._limit

    @limit.setter
    def limit(self, limit: int) -> None:
        with self._lock:
            self._limit = limit
            self._shrink()

    @property
    def num_bytes(self) -> int:
        """Bytes that it holds."""
        return self._num_bytes

    def get(self, key: Hashable, make: Callable[[], Held]) -> Held:
        """Give what is kept under a key, or make it."""
        with self._lock:
            found = self._held.get(key)
            if found is not None:
                self._held.move_to_end(key)
                return cast(Held, found)
        made = make()
        with self._lock:
            if key not in self._held:
                self._held[key] = made
                self._num_bytes += made.nbytes
            self._shrink()
        return made

    def _shrink(self) -> None:
        limit = min(self._limit, *self._bounds) if self._bounds else self._limit
        while self._num_bytes > limit and self._held:
            _, oldest = self._held.popitem(last=False)
            self._num_bytes -= oldest.nbytes

    @contextlib.contextmanager
    def at_most(self, limit: int) -> Iterator[None]:
        """Hold no more than so much for a while, even if more is allowed."""
        with self._lock:
            self._bounds.append(limit)
            self._shrink()
        try:
            yield
        finally:
            with self._lock:
                self._bounds.remove(limit)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._held.clear()
            self._num_bytes = 0

    def unlocked(self) -> None:
        """In a forked process: the lock may have been held by a thread that is not there any more."""
        self._lock = threading.Lock()


CHUNKS = ChunkCache()


@in_forked_process
def _start_anew() -> None:
    CHUNKS.unlocked()


def set_chunk_cache(size: int | str) -> None:
    """Say how much memory decoded chunks may take, in this process and each that is started from it; 256 MiB if nothing is said.

    Args:
        size: bytes, as a number or a text such as `"2 GiB"`; 0 keeps nothing.

    Raises:
        SizeError: if it is neither.

    Example:
        >>> import voxloom as vx
        >>> vx.set_chunk_cache("256 MiB")
    """
    CHUNKS.limit = 0 if size == 0 and not isinstance(size, bool) else as_bytes(size, "size")
