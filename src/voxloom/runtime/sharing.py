"""Work on large tensors, shared out among threads.

PyTorch gives an equal part to each of its threads, and waits for the slowest. Beside threads that read and write on the same
cores one of them always has to wait for its turn. Threads that take the next piece when they are done with one do not.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, wait
from dataclasses import dataclass

__all__ = ["Share", "SharedOut", "Work"]

Work = Callable[[], object]

Share = Callable[[Sequence[Work]], None]
"""Does pieces of work, in any order; comes back when all are done."""


@dataclass(frozen=True)
class SharedOut:
    """Lets threads take one piece of work after the other. After an error none is begun any more.

    Args:
        threads: executors of one thread each.
        takes_part: whether the thread that calls does some of it, too.

    Example:
        >>> from concurrent.futures import ThreadPoolExecutor
        >>> with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        ...     found = set()
        ...     SharedOut([first, second])([lambda: found.add(1), lambda: found.add(2), lambda: found.add(3)])
        >>> found
        {1, 2, 3}
    """

    threads: Sequence[Executor]
    takes_part: bool = False

    def __call__(self, work: Sequence[Work]) -> None:
        """Do all of it."""
        waiting = deque(work)
        taking = [thread.submit(_take, waiting) for thread in self.threads]
        try:
            if self.takes_part:
                _take(waiting)
            errors = [each.exception() for each in taking]
        finally:
            waiting.clear()  # after an interrupt, or an error
            wait(taking)
        for error in filter(None, errors):
            raise error


def _take(waiting: deque[Work]) -> None:
    try:
        while True:
            try:
                work = waiting.popleft()
            except IndexError:
                return
            work()
    except BaseException:
        waiting.clear()
        raise
