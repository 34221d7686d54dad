"""Several predictions in parts as one, so that many small images are spread over workers as well as one that is large."""

import bisect
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from .shards import ShardedRun

__all__ = ["ManyRuns"]


class _Opens(Protocol):
    def shards(self, image: Any, *, output: Any) -> ShardedRun: ...


class ManyRuns:
    """Parts of several predictions, numbered one prediction after the other; each is opened when a part of it is asked for.

    Args:
        predictor: opens them.
        calls: what each is asked for; see `Predictor.shards`.
        counts: how many parts each has.
    """

    def __init__(self, predictor: _Opens, calls: Sequence[Mapping[str, Any]], counts: Sequence[int]) -> None:
        self._predictor, self._calls = predictor, calls
        self._starts = [0, *itertools.accumulate(counts)]
        self._opened: dict[int, ShardedRun] = {}

    def of(self, which: int) -> ShardedRun:
        """Give one of the predictions."""
        if which not in self._opened:
            self._opened[which] = self._predictor.shards(**self._calls[which])
        return self._opened[which]

    @property
    def folder(self) -> Path:
        """Where the records of the first are, and room for what all have in common."""
        return self.of(0).folder

    @property
    def run(self) -> str:
        """Tells this run of the first from others."""
        return self.of(0).run

    def __len__(self) -> int:
        return self._starts[-1]

    def done(self) -> set[int]:
        """Parts that are recorded as done."""
        return {start + number for which, start in enumerate(self._starts[:-1]) for number in self.of(which).done()}

    def record_failure(self, number: int, error: BaseException) -> None:
        """Record why a part failed."""
        which, own = self._place(number)
        self.of(which).record_failure(own, error)

    def compute(self, number: int, progress: Callable[[int], object] = lambda patches: None) -> None:
        """Compute a part; see `ShardedRun.compute`."""
        which, own = self._place(number)
        self.of(which).compute(own, progress)

    def _place(self, number: int) -> tuple[int, int]:
        which = bisect.bisect_right(self._starts, number) - 1
        return which, number - self._starts[which]
