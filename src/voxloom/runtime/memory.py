"""Large tensors on the CPU, made without paying for fresh memory each time.

The system clears every page of fresh memory before it hands it out, and the C library gives large blocks back as soon as
they are freed. For the hundreds of megabytes of a batch that takes longer than the arithmetic on them. But a training or
inference loop needs the same few sizes over and over, so memory that was freed is kept and used again.
"""

import contextlib
import math
import mmap
import threading
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .forks import in_forked_process

__all__ = ["BufferPool", "copy_alone", "empty", "shared"]

# Larger blocks are asked of the system, each on its own. From the C library they would leave gaps when they are freed: PyTorch
# asks for memory at round addresses, for which a gap of the same size is often too small.
LARGE_BYTES = 2**20
# What is kept for the next tensor of the same size: room for the images of a usual batch.
KEPT_BYTES = 128 * 2**20


class BufferPool:
    """Memory that is used again when nobody can see it any more. Any thread may use it, also from within the garbage collector.

    Args:
        kept_bytes: what is kept at most.
        total_bytes: what is kept and in use at most, as far as keeping less can help; None for any amount.
    """

    def __init__(self, kept_bytes: int, total_bytes: int | None = None) -> None:
        self.kept_bytes, self.total_bytes = kept_bytes, total_bytes
        self._used_bytes = 0
        self._blocks: dict[int, list[np.ndarray]] = {}
        self.lock = threading.RLock()
        _all.add(self)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Make a tensor on the CPU whose values are not set."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes == 0:
            return torch.empty(tuple(shape), dtype=dtype)
        block = self._take(num_bytes)
        if block is None:
            with self.lock:
                self._used_bytes += num_bytes
                self._drop()
            block = _fresh(num_bytes)
        # The tensor and all its views hold the lease: when it dies, nobody can see the block any more.
        lease = block.view()
        weakref.finalize(lease, self._keep, block).atexit = False
        return torch.from_numpy(lease).view(dtype).view(tuple(shape))

    @property
    def num_bytes(self) -> int:
        """What is kept at present."""
        return sum(size * len(blocks) for size, blocks in tuple(self._blocks.items()))

    def clear(self) -> None:
        """Give back what is kept."""
        with self.lock:
            self._blocks = {}

    def _keep(self, block: np.ndarray) -> None:
        with self.lock:
            self._used_bytes -= block.nbytes
            if block.nbytes <= self.kept_bytes:  # a whole volume must not drive out the batches
                self._blocks.setdefault(block.nbytes, []).append(block)
                self._drop()

    def _drop(self) -> None:
        """Give back what is too much, the oldest first."""
        while (kept := self.num_bytes) and (
            kept > self.kept_bytes or (self.total_bytes is not None and kept + self._used_bytes > self.total_bytes)
        ):
            oldest = next(iter(self._blocks))
            del self._blocks[oldest][:1]
            if not self._blocks[oldest]:
                del self._blocks[oldest]

    def _take(self, num_bytes: int) -> np.ndarray | None:
        # The garbage collector may call `_keep` at any point, so that nothing that was looked up stays true.
        with self.lock, contextlib.suppress(KeyError, IndexError):
            block = self._blocks[num_bytes].pop()
            self._used_bytes += num_bytes
            return block
        return None


def _fresh(num_bytes: int) -> np.ndarray:
    """Ask the system for memory, rather than the C library: that would keep gaps between blocks when they are freed."""
    if num_bytes < LARGE_BYTES or not hasattr(mmap, "MAP_ANONYMOUS"):
        return np.empty(num_bytes, dtype=np.uint8)
    mapped = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system may not offer it
            mapped.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(mapped, dtype=np.uint8)


_all: weakref.WeakSet[BufferPool] = weakref.WeakSet()
shared = BufferPool(KEPT_BYTES)


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Make a tensor on the CPU whose values are not set; like `torch.empty`."""
    if math.prod(shape) * dtype.itemsize < LARGE_BYTES:
        return torch.empty(tuple(shape), dtype=dtype)
    return shared.empty(shape, dtype)


def copy_alone(target: Tensor, source: Tensor) -> None:
    """Copy one tensor into another of the same shape and type with this thread alone, where both are contiguous.

    PyTorch shares the work among threads that wait for one another by spinning. Beside busy worker processes that can take
    ten times as long as the copy.
    """
    if target.is_contiguous() and source.is_contiguous() and target.dtype == source.dtype and not source.requires_grad:
        target.view(-1).view(torch.uint8).numpy()[:] = source.view(-1).view(torch.uint8).numpy()
    else:
        target.copy_(source)


@in_forked_process
def _start_anew() -> None:
    """In a forked process: locks may have been held by a thread that is not there any more."""
    for freed in tuple(_all):
        freed.lock = threading.RLock()
        freed._blocks = {}
