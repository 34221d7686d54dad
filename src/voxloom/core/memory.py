"""Large tensors without the cost of a page fault for every four kilobytes.

Linux hands out fresh memory 4 KiB at a time, which for a tensor of hundreds of megabytes takes longer than the arithmetic
on it. Asked for it, it hands out 2 MiB at a time.
"""

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["empty", "zeros"]

HUGE_PAGE_BYTES = 2 * 1024**2
# Below this the allocator of the C library hands out memory again that it has had before.
LARGE_BYTES = 16 * HUGE_PAGE_BYTES


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Make a tensor whose values are not set; like `torch.empty`."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or num_bytes < LARGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    return _huge(shape, dtype, num_bytes)


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Make a tensor of zeros; like `torch.zeros`."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or num_bytes < LARGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(tuple(shape), dtype=dtype, device=device)
    return _huge(shape, dtype, num_bytes)


def _huge(shape: Sequence[int], dtype: torch.dtype, num_bytes: int) -> Tensor:
    try:
        pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no memory for a tensor of shape {tuple(shape)} and {num_bytes / 1e6:.0f} MB") from error
    try:
        pages.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        pass  # A kernel built without huge pages still gives the memory, only more slowly.
    return torch.frombuffer(pages, dtype=dtype).view(tuple(shape))
