"""How far a prediction is: a bar in a terminal or a notebook, and a line now and then where neither is looked at."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from tqdm.auto import tqdm

__all__ = ["shown"]

# Seconds between two lines in a log.
BETWEEN_LINES = 30.0


@contextlib.contextmanager
def shown(name: str, total: int) -> Iterator[Callable[[int], object]]:
    """Give what is told of patches that have been computed, and shows it.

    Args:
        name: of what.
        total: number of patches.
    """
    if sys.stderr.isatty() or "ipykernel" in sys.modules:
        with tqdm(total=total, unit="patch", desc=name) as bar:
            yield bar.update
        return
    yield _Lines(name, total).add


class _Lines:
    """Says in a line now and then how far it is; nothing of what is over soon."""

    def __init__(self, name: str, total: int) -> None:
        self._name, self._total, self._count = name, total, 0
        self._began = self._said = time.monotonic()

    def add(self, patches: int) -> None:
        """Count patches."""
        self._count += patches
        now = time.monotonic()
        if now - self._said >= BETWEEN_LINES:
            self._said = now
            left = (now - self._began) / self._count * (self._total - self._count)
            print(f"{self._name}: {self._count} of {self._total} patches, about {left:.0f} s to go", file=sys.stderr, flush=True)
