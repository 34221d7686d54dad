"""Random numbers that depend on nothing but what they are for.

A draw is numbered, and its random numbers follow from the seed, the subject, the epoch and that number alone, through the
counter-based generator Philox. So any draw can be made at any time, in any process, without the ones before it.

Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC (2011), https://doi.org/10.1145/2063384.2063405.
"""

import numpy as np

__all__ = ["draw_generator"]

MASK = 2**64 - 1


def draw_generator(seed: int, epoch: int, draw: int, subject: int = 0) -> np.random.Generator:
    """Make the generator of one draw.

    Each has 2⁶⁴ blocks of random numbers before it would meet the next one's.

    Example:
        >>> one, again = draw_generator(42, epoch=0, draw=7), draw_generator(42, epoch=0, draw=7)
        >>> bool(one.integers(1000) == again.integers(1000))
        True
    """
    key = np.array([seed & MASK, subject & MASK], dtype=np.uint64)
    counter = np.array([0, draw & MASK, epoch & MASK, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
