"""Memory that processes share, and what to do where there is too little of it, or too few files may be open."""

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.multiprocessing
from torch import Tensor

from ..errors import WorkerError

__all__ = ["check_descriptors", "explained_lack", "remove_segments_of", "share", "shared_storage"]

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where Linux has it
DESCRIPTORS = Path("/proc/self/fd")
# How PyTorch and the system say that there are too few descriptors, or too little shared memory.
NO_DESCRIPTORS = ("too many open files", "items of ancdata", "unable to open file descriptor")
NO_MEMORY = ("unable to allocate shared memory", "unable to write to file", "no space left on device", "bus error")


def share(tensor: Tensor) -> Tensor:
    """Move a tensor into shared memory.

    Raises:
        WorkerError: if there is too little.
    """
    move: Callable[[], Tensor] = tensor.share_memory_
    with explained_lack():
        return move()


def shared_storage(num_bytes: int) -> torch.UntypedStorage:
    """Make shared memory; see `share`."""
    make: Callable[..., torch.UntypedStorage] = torch.UntypedStorage._new_shared
    with explained_lack():
        return make(num_bytes)


@contextmanager
def explained_lack() -> Iterator[None]:
    """Turn what PyTorch and the system raise for lack of shared memory or descriptors into an error that says what to do.

    Raises:
        WorkerError: in their place.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        text = str(error).lower()
        # What a data set or a transform of the user's has raised is the user's, even if it is of a full disk.
        if isinstance(error, WorkerError) or "in DataLoader worker process" in str(error) or getattr(error, "filename", None):
            raise
        if getattr(error, "errno", None) == errno.EMFILE or any(part in text for part in NO_DESCRIPTORS):
            raise WorkerError(_few_descriptors(str(error).splitlines()[0])) from error
        if any(part in text for part in NO_MEMORY):
            raise WorkerError(
                f"there is too little shared memory for patches on their way from workers{_of_it()}: give it more (start"
                f" containers with --shm-size=8g), use fewer workers or smaller batches, or num_workers=0. ({error})"
            ) from error
        raise


def check_descriptors(num_workers: int, for_each: int, beside: int) -> None:
    """Check that as many files can be opened as workers need: where they run out, processes wait for each other without an end.

    Args:
        num_workers: processes that are to be started.
        for_each: descriptors that this process holds for each of them.
        beside: descriptors that it needs for others things.

    Raises:
        WorkerError: says how to get more.
    """
    try:
        import resource
    except ImportError:
        return
    strategy: Callable[[], str] = torch.multiprocessing.get_sharing_strategy
    if strategy() == "file_system":
        return  # it needs hardly any
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError):
        free, needed = limit - len(list(DESCRIPTORS.iterdir())), num_workers * for_each + beside
        if limit != resource.RLIM_INFINITY and free < needed:
            raise WorkerError(_few_descriptors(f"{num_workers} workers need {needed}, and {free} are left"))


def _few_descriptors(what: str) -> str:
    return (
        f"too few files may be open at a time: {what}. Allow more (ulimit -n 4096 in the shell), use fewer workers, or"
        " torch.multiprocessing.set_sharing_strategy('file_system')"
    )


def _of_it() -> str:
    with suppress(OSError):
        usage = shutil.disk_usage(SHARED_MEMORY)
        return f" ({SHARED_MEMORY} has {usage.total / 2**20:.0f} MiB, of which {usage.free / 2**20:.0f} are free)"
    return ""


def remove_segments_of(pid: int) -> None:
    """Remove what a process that has ended has left: where memory cannot be had, PyTorch leaves what it began with."""
    for segment in SHARED_MEMORY.glob(f"torch_{pid}_*"):
        with suppress(OSError):
            segment.unlink()
