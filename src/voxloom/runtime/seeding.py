"""Random states for transforms: the same wherever a transform runs, and the user's own left alone."""

import contextlib
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

__all__ = ["reseed", "seeded"]

# How libraries name the method that seeds an object's own generator: MONAI, Albumentations, PyTorch.
METHODS = ("set_random_state", "set_random_seed", "manual_seed")
BITS_32 = 2**32 - 1


@contextlib.contextmanager
def seeded(words: Sequence[int], is_alone: bool = True) -> Iterator[None]:
    """Run a block with one thread of PyTorch, and with the random states of Python, NumPy and PyTorch (CPU) set.

    All are as they were afterwards, also after an error. One thread, because sums that several share differ in their last bits.

    Args:
        words: three numbers of 64 bits, one for each.
        is_alone: False to leave the number of threads as it is.
    """
    python, arrays, tensors = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    threads = torch.get_num_threads()
    try:
        random.seed(words[0])
        np.random.seed([words[1] & BITS_32, words[1] >> 32])
        torch.default_generator.manual_seed(words[2])
        if is_alone and threads != 1:
            torch.set_num_threads(1)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
        torch.default_generator.set_state(tensors)
        if is_alone and threads != 1:
            torch.set_num_threads(threads)


def reseed(transform: Any, seeds: Iterator[int]) -> None:
    """Seed the generator that a transform keeps for itself, where it has a method for that, or those that it consists of do.

    Args:
        transform: any callable; `set_random_state`, `set_random_seed` or `manual_seed` is called with a seed.
        seeds: of each 32 bits are used; every part takes the next one.
    """
    for name in METHODS:
        method = getattr(transform, name, None)
        if callable(method):
            method(next(seeds) & BITS_32)
            return
    parts = getattr(transform, "transforms", None)
    if isinstance(parts, Iterable):
        for part in parts:
            reseed(part, seeds)
