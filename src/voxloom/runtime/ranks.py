"""Which of several training processes this is, as `torch.distributed` says."""

import torch

__all__ = ["rank_and_size"]


def rank_and_size() -> tuple[int, int]:
    """Give the rank and the number of ranks: 0 and 1 where `torch.distributed` is not initialized."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
