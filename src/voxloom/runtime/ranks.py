"""Which of several training processes this is, as `torch.distributed` says."""

import os

import torch

from ..errors import QueueError

__all__ = ["check_ranks", "rank_and_size"]


def rank_and_size() -> tuple[int, int]:
    """Give the rank and the number of ranks: 0 and 1 where `torch.distributed` is not initialized."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def check_ranks() -> None:
    """Check, before patches are given away, that a process that was started as one of several knows which one it is.

    Raises:
        QueueError: if each would be given the patches of all.
    """
    started = os.environ.get("WORLD_SIZE", "1")
    if rank_and_size() == (0, 1) and "RANK" in os.environ and started.isdecimal() and int(started) > 1:
        raise QueueError(
            f"this is one of {started} processes (WORLD_SIZE), but torch.distributed is not initialized, so that each would train"
            " on the same patches: call torch.distributed.init_process_group first; or, if that is meant, give a queue rank=0 and"
            " world_size=1, and a sampler share_ranks=False"
        )
