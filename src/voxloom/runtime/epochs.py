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
# Workers that a whole number has bits for.
MOST_BITS = 62


class EpochCounter:
    """Numbers the passes over a data set: 0, 1, 2, ... also where each pass is made by copies in several workers.

    The workers of one pass recognise one another by the seed that PyTorch's loader gives them, and by how many passes each
    has begun. The first of them to begin a pass takes the next number, and writes it into memory that they share.
    """

    def __init__(self, seed: int) -> None:
        self._lock = _lock_of_this_family()
        # Shared with processes that are forked, without an open file for each counter; PyTorch shares it with those that are
        # spawned. The first row is (next epoch, epoch that is resumed, its first draw, seed of the draws), the others are
        # (seed of the loader, pass, epoch, bits of the workers that have begun it).
        memory = mmap.mmap(-1, 8 * 4 * (REMEMBERED_PASSES + 1))
        self._table = torch.frombuffer(memory, dtype=torch.int64).view(-1, 4).fill_(-1)
        self._table[0] = torch.tensor([0, 0, 0, _signed(seed)])
        self._begun = 0

    @property
    def seed(self) -> int:
        """Seed of the draws."""
        return int(self._table[0, 3])

    @seed.setter
    def seed(self, seed: int) -> None:
        self._table[0, 3] = _signed(seed)

    @property
    def upcoming(self) -> int:
        """Number of the next pass."""
        return int(self._table[0, 0])

    @property
    def start(self) -> tuple[int, int]:
        """The epoch that is resumed, and its first draw."""
        return int(self._table[0, 1]), int(self._table[0, 2])

    def seek(self, epoch: int, draw: int) -> None:
        """Let the next pass be this epoch, and begin at this draw."""
        with self._lock:
            self._table[1:] = -1
            self._table[0, :3] = torch.tensor([epoch, epoch, draw])

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
            bit = 1 << worker.id if worker.num_workers <= MOST_BITS else 0
            if len(known) and not int(passes[known[0, 0], 3]) & bit:
                passes[known[0, 0], 3] |= bit
                return int(passes[known[0, 0], 2])
            # No worker has begun this pass; or this one has, so that it is a new pass with the old seed.
            epoch = self._take()
            row = int(known[0, 0]) if len(known) else epoch % REMEMBERED_PASSES
            passes[row] = torch.tensor([*key.tolist(), epoch, bit])
            return epoch

    def _take(self) -> int:
        epoch = self.upcoming
        self._table[0, 0] = epoch + 1
        return epoch

    def __getstate__(self) -> dict[str, Any]:
        if multiprocessing_context.get_spawning_popen() is not None:
            return self.__dict__  # on the way into a worker, which shares the memory and the lock
        return {"seed": self.seed, "upcoming": self.upcoming, "start": self.start}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "upcoming" in state:
            self.__init__(state["seed"])  # type: ignore[misc]
            self._table[0, :3] = torch.tensor([state["upcoming"], *state["start"]])
        else:
            self.__dict__.update(state)


def _signed(seed: int) -> int:
    """Give the seed as int64 holds it; draws use its bits."""
    return (seed + 2**63) % 2**64 - 2**63


@functools.cache
def _lock_of_this_family() -> Any:
    """One lock for all counters of this process and its workers: it is held for a moment only, and may be passed to all kinds."""
    return multiprocessing.get_context("spawn").RLock()
