"""Random numbers that depend on nothing but what they are for.

Whatever is random has a number, and its random numbers follow from the seed, the subject, the epoch and that number alone,
through the counter-based generator Philox. So each can be had at any time, in any process, without the ones before it.

Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC (2011), https://doi.org/10.1145/2063384.2063405.
"""

from enum import IntEnum

import numpy as np

__all__ = ["Purpose", "draw_generator", "seed_words", "shuffled", "uniform_numbers"]

MASK = 2**64 - 1
# What Philox makes of one count of its counter.
NUMBERS_PER_COUNT = 4


class Purpose(IntEnum):
    """What random numbers are for: those of two purposes have nothing to do with one another."""

    DRAW = 0
    """Where a patch lies."""
    SUBJECT_ORDER = 1
    """In what order subjects are loaded."""
    PATCH_ORDER = 2
    """In what order patches leave."""
    SUBJECT_TRANSFORM = 3
    """What a transform of a subject does."""
    PATCH_TRANSFORM = 4
    """What a transform of a patch does."""
    BATCH_TRANSFORM = 5
    """What a transform of a batch does."""


def draw_generator(seed: int, epoch: int, draw: int, subject: int = 0, purpose: Purpose = Purpose.DRAW) -> np.random.Generator:
    """Make the generator of one draw.

    Each has 2⁶⁴ blocks of random numbers before it would meet the next one's.

    Example:
        >>> one, again = draw_generator(42, epoch=0, draw=7), draw_generator(42, epoch=0, draw=7)
        >>> bool(one.integers(1000) == again.integers(1000))
        True
    """
    return np.random.Generator(_philox(seed, subject, 0, draw, epoch, purpose))


def seed_words(seed: int, epoch: int, draw: int, subject: int, purpose: Purpose) -> list[int]:
    """Give four numbers of 64 bits to seed generators of other kinds with."""
    return _philox(seed, subject, 0, draw, epoch, purpose).random_raw(4).tolist()


def uniform_numbers(seed: int, epoch: int, first: int, stop: int, purpose: Purpose) -> np.ndarray:
    """Give the random numbers `first` to `stop` of an endless row of them.

    Returns:
        float64, at least 0 and less than 1.
    """
    count, skipped = divmod(first, NUMBERS_PER_COUNT)
    generator = np.random.Generator(_philox(seed, 0, count, 0, epoch, purpose))
    return generator.random(skipped + stop - first)[skipped:]


def shuffled(values: np.ndarray, seed: int, epoch: int, purpose: Purpose) -> np.ndarray:
    """Give the values in random order, each order with the same probability."""
    return values[np.argsort(uniform_numbers(seed, epoch, 0, len(values), purpose), kind="stable")]


def _philox(seed: int, subject: int, *counter: int) -> np.random.Philox:
    key = np.array([seed & MASK, subject & MASK], dtype=np.uint64)
    return np.random.Philox(key=key, counter=np.array([word & MASK for word in counter], dtype=np.uint64))
