"""Large tensors on the CPU, made without paying for fresh memory each time.

Linux hands out fresh memory in pages of 4 KiB, each of which it clears first: for the hundreds of megabytes of a batch or a
volume that takes longer than the arithmetic on them. Asked for it, it hands out pages of 2 MiB. And memory that was freed
can be used again: a training or inference loop needs the same few sizes over and over.
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

__all__ = ["empty", "zeros"]

# Below this the allocator of the C library hands out memory again that it has had before.
LARGE_BYTES = 32 * 2**20
# Freed memory that is kept for the next tensor of the same size: room for the images of a usual batch.
KEPT_BYTES = 128 * 2**20


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Make a tensor whose values are not set; like `torch.empty`."""
    if not _is_worth_it(shape, dtype, device):
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    return _tensor_of(_freed.take(num_bytes) or _fresh_pages(num_bytes), shape, dtype)


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Make a tensor of zeros; like `torch.zeros`."""
    if not _is_worth_it(shape, dtype, device):
        return torch.zeros(tuple(shape), dtype=dtype, device=device)
    return _tensor_of(_fresh_pages(math.prod(shape) * dtype.itemsize), shape, dtype)


def _is_worth_it(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> bool:
    is_large = math.prod(shape) * dtype.itemsize >= LARGE_BYTES
    return is_large and torch.device(device).type == "cpu" and hasattr(mmap, "MADV_HUGEPAGE")


def _fresh_pages(num_bytes: int) -> mmap.mmap:
    """Map zeroed memory that belongs to no file."""
    try:
        pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"there is no memory for a tensor of {num_bytes / 1e6:.0f} MB") from error
    with contextlib.suppress(OSError):  # a kernel without huge pages still gives the memory, only more slowly
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def _tensor_of(pages: mmap.mmap, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Make a tensor of mapped memory, which goes back to be used again when the tensor and all its views are gone."""
    lease = np.frombuffer(pages, dtype=np.uint8)
    weakref.finalize(lease, _freed.keep, pages).atexit = False
    return torch.from_numpy(lease).view(dtype).view(tuple(shape))


class _FreedPages:
    """Memory that nobody uses at present. Any thread may call it, also from within the garbage collector."""

    def __init__(self) -> None:
        self._pages: list[mmap.mmap] = []
        self._lock = threading.RLock()

    def keep(self, pages: mmap.mmap) -> None:
        with self._lock:
            self._pages.append(pages)
            while sum(map(len, self._pages)) > KEPT_BYTES:
                del self._pages[0]

    def take(self, num_bytes: int) -> mmap.mmap | None:
        with self._lock:
            for number, pages in enumerate(self._pages):
                if len(pages) == num_bytes:
                    return self._pages.pop(number)
        return None


_freed = _FreedPages()
