"""How far something is: a bar in a terminal or a notebook, and a line now and then where neither is looked at."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from tqdm.auto import tqdm

__all__ = ["shown", "shown_if"]

# Seconds between two lines in a log.
BETWEEN_LINES = 30.0


@contextlib.contextmanager
def shown(name: str, total: int, unit: str) -> Iterator[Callable[[int], object]]:
    """Give what is told of parts that are done, and shows it.

    Args:
        name: of what.
        total: number of parts.
        unit: what parts are called, in the plural.
    """
    if sys.stderr is None:  # it is closed
        yield _nothing
        return
    if sys.stderr.isatty() or "ipykernel" in sys.modules:
        with tqdm(total=total, unit=f" {unit}", unit_scale=True, desc=name) as bar:
            yield bar.update
        return
    yield _Lines(name, total, unit).add


@contextlib.contextmanager
def shown_if(wanted: bool | str, name: str, total: int, unit: str) -> Iterator[Callable[[int], object]]:
    """Show it if that is wanted, under the name that was given for it if there is one; see `shown`."""
    if not wanted:
        yield _nothing
        return
    with shown(wanted if isinstance(wanted, str) else name, total, unit) as told:
        yield told


def _nothing(parts: int) -> None:
    """Say nothing."""


class _Lines:
    """Says in a line now and then how far it is; nothing of what is over soon."""

    def __init__(self, name: str, total: int, unit: str) -> None:
        self._name, self._total, self._unit, self._count = name, total, unit, 0
        self._began = self._said = time.monotonic()

    def add(self, parts: int) -> None:
        """Count parts."""
        self._count += parts
        now = time.monotonic()
        if now - self._said >= BETWEEN_LINES:
            self._said = now
            left = (now - self._began) / self._count * (self._total - self._count)
            print(
                f"{self._name}: {self._count} of {self._total} {self._unit}, about {left:.0f} s to go",
                file=sys.stderr,
                flush=True,
            )
