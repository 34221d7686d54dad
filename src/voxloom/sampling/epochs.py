"""Counting epochs where a data set is copied into workers, which know nothing of one another."""

import functools
import mmap
import multiprocessing
from multiprocessing import context as multiprocessing_context
from typing import Any

import torch
from torch.utils.data import get_worker_info

__all__ = ["EpochCounter"]

# Passes that are remembered: the present one, and earlier ones that a slow worker has yet to begin.
REMEMBERED_PASSES = 8


class EpochCounter:
    """Numbers the passes over a data set: 0, 1, 2, ... also where each pass is made by copies in several workers.

    The workers of one pass recognise one another by the seed that PyTorch's loader gives them, and by how many passes each
    has begun. The first of them to begin a pass takes the next number, and writes it into memory that they share.
    """

    def __init__(self, start: int = 0) -> None:
        self._lock = _lock_of_this_family()
        # Shared with processes that are forked, without an open file for each counter; PyTorch shares it with those that are
        # spawned. The first row is the next epoch, the others are (seed, pass, epoch).
        memory = mmap.mmap(-1, 8 * 3 * (REMEMBERED_PASSES + 1))
        self._table = torch.frombuffer(memory, dtype=torch.int64).view(-1, 3).fill_(-1)
        self._table[0] = start
        self._begun = 0

    @property
    def upcoming(self) -> int:
        """Number of the next pass."""
        return int(self._table[0, 0])

    @upcoming.setter
    def upcoming(self, epoch: int) -> None:
        with self._lock:
            self._table.fill_(-1)
            self._table[0] = epoch

    def begin(self) -> int:
        """Begin a pass, and give its number: the same to all workers of a loader."""
        worker = get_worker_info()
        with self._lock:
            if worker is None:
                return self._take()
            key = torch.tensor([(worker.seed - worker.id) % 2**63, self._begun])
            self._begun += 1
            passes = self._table[1:]
            known = (passes[:, :2] == key).all(dim=1).nonzero()
            if len(known):
                return int(passes[known[0, 0], 2])
            epoch = self._take()
            passes[epoch % REMEMBERED_PASSES] = torch.tensor([*key.tolist(), epoch])
            return epoch

    def _take(self) -> int:
        epoch = self.upcoming
        self._table[0] = epoch + 1
        return epoch

    def __getstate__(self) -> dict[str, Any]:
        if multiprocessing_context.get_spawning_popen() is not None:
            return self.__dict__  # on the way into a worker, which shares the memory and the lock
        return {"epoch": self.upcoming}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "epoch" in state:
            self.__init__(state["epoch"])  # type: ignore[misc]
        else:
            self.__dict__.update(state)


@functools.cache
def _lock_of_this_family() -> Any:
    """One lock for all counters of this process and its workers: it is held for a moment only, and may be passed to all kinds."""
    return multiprocessing.get_context("spawn").RLock()
