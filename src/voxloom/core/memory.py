"""Large tensors on the CPU, made without paying for fresh memory each time.

The system clears every page of fresh memory before it hands it out, and the C library gives large blocks back as soon as
they are freed. For the hundreds of megabytes of a batch that takes longer than the arithmetic on them. But a training or
inference loop needs the same few sizes over and over, so memory that was freed is kept and used again.
"""

import math
import os
import threading
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["empty"]

# Smaller blocks the C library keeps and hands out again by itself.
LARGE_BYTES = 32 * 2**20
# What is kept for the next tensor of the same size: room for the images of a usual batch.
KEPT_BYTES = 128 * 2**20


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Make a tensor on the CPU whose values are not set; like `torch.empty`."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < LARGE_BYTES:
        return torch.empty(tuple(shape), dtype=dtype)
    block = _freed.take(num_bytes)
    if block is None:
        block = np.empty(num_bytes, dtype=np.uint8)
    # The tensor and all its views hold the lease: when it dies, nobody can see the block any more.
    lease = block.view()
    weakref.finalize(lease, _freed.keep, block).atexit = False
    return torch.from_numpy(lease).view(dtype).view(tuple(shape))


class _FreedBlocks:
    """Memory that nobody uses at present. Any thread may call it, also from within the garbage collector."""

    def __init__(self) -> None:
        self._blocks: list[np.ndarray] = []
        self._lock = threading.RLock()

    def keep(self, block: np.ndarray) -> None:
        if block.nbytes > KEPT_BYTES:
            return  # a whole volume must not drive out the batches
        with self._lock:
            self._blocks.append(block)
            while self.num_bytes > KEPT_BYTES:
                del self._blocks[0]

    def take(self, num_bytes: int) -> np.ndarray | None:
        with self._lock:
            # The garbage collector may call `keep` at any point, so that no index stays true.
            found = next((block for block in tuple(self._blocks) if block.nbytes == num_bytes), None)
            self._blocks = [block for block in self._blocks if block is not found]
        return found

    @property
    def num_bytes(self) -> int:
        return sum(block.nbytes for block in self._blocks)


_freed = _FreedBlocks()


def _start_anew() -> None:
    """In a forked process: the lock may have been held by a thread that is not there any more."""
    global _freed
    _freed = _FreedBlocks()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)
