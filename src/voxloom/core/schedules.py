"""In what order the patches of an epoch leave a queue."""

import heapq
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple, Self

import numpy as np

from ..errors import SizeError
from .random_numbers import Purpose, shuffled, uniform_numbers
from .sizes import as_int

__all__ = ["EpochSchedule", "RemainingPatches", "SubjectDraws"]

# The order is worked out for this many patches at a time, or for as many as are held if that is more.
BLOCK = 4096


class SubjectDraws(NamedTuple):
    """Draws of one subject that belong together, because it is loaded for them."""

    place: int
    """Its place in the order of subjects."""
    subject: int
    """Index of the subject in the data set."""
    patches: np.ndarray
    """Indices of the patches in the order of loading, ascending."""
    numbers: np.ndarray
    """Numbers of the draws, one for each patch."""


@dataclass(frozen=True, repr=False)
class EpochSchedule:
    """In what order which draw of which subject leaves a queue in one epoch, on one rank.

    Subjects are loaded one after the other. Their patches are numbered in that order, 0, 1, 2, ..., and patch *i* leaves in
    the order of the key *i + U(i) · max_length*, where *U(i)* is a random number from 0 to 1. So a patch is never more than
    `max_length - 1` places before or behind its turn, which mixes nearly as well as a buffer of that length that is filled,
    shuffled and emptied; and what left before any position is found from the keys around it, without replaying the epoch.

    Args:
        seed: what all random numbers follow from.
        epoch: number of the epoch.
        subjects: index of the subject at each place, in the order of loading.
        draws: number of patches at each place.
        max_length: patches that may be held at a time.
        shuffle_patches: let patches leave in random order; otherwise they leave in the order of loading.

    Example:
        >>> schedule = EpochSchedule.plan(seed=42, epoch=0, counts=[2, 3, 1], max_length=4)
        >>> schedule
        EpochSchedule(epoch 0: 6 patches of 3 subjects, 4 held at most)
        >>> sorted(schedule.leaving())
        [0, 1, 2, 3, 4, 5]
        >>> list(schedule.leaving(4)) == list(schedule.leaving())[4:]
        True
    """

    seed: int
    epoch: int
    subjects: tuple[int, ...]
    draws: tuple[int, ...]
    max_length: int
    shuffle_patches: bool = field(default=True, kw_only=True)
    of_all_ranks: int = field(default=0, kw_only=True)
    """Where ranks share the subjects: a number that tells the schedules of all of them from others."""

    def __post_init__(self) -> None:
        as_int(self.max_length, "max_length", 1)
        if len(self.subjects) != len(self.draws):
            raise SizeError(f"a schedule was given {len(self.subjects)} subjects, but {len(self.draws)} numbers of draws")

    @classmethod
    def plan(
        cls,
        seed: int,
        epoch: int,
        counts: Sequence[int],
        max_length: int,
        *,
        shuffle_subjects: bool = True,
        shuffle_patches: bool = True,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
    ) -> Self:
        """Plan an epoch of one rank, out of as many as share the subjects.

        Every subject belongs to one rank in each epoch. Ranks get nearly the same number of patches, and the same sums in
        every epoch. A rank with fewer than another makes further draws of its own subjects, or with `drop_last` all are cut
        to the shortest, so that all have the same length, in all epochs.

        Args:
            seed: what all random numbers follow from; ranks must have the same.
            epoch: number of the epoch.
            counts: number of draws of each subject.
            max_length: patches that may be held at a time.
            shuffle_subjects: load subjects in a random order; otherwise in that of their indices.
            shuffle_patches: let patches leave in random order.
            rank: which of the ranks.
            world_size: number of ranks.
            drop_last: cut all ranks to the shortest.

        Raises:
            SizeError: if there are fewer subjects with patches than ranks.
        """
        amounts = np.asarray(counts, dtype=np.int64)
        usable = np.flatnonzero(amounts)
        if len(usable) < world_size:
            raise SizeError(
                f"{len(usable)} subjects with patches cannot be shared among {world_size} ranks: each needs at least one"
            )
        order = shuffled(usable, seed, epoch, Purpose.SUBJECT_ORDER) if shuffle_subjects else usable
        # Where subjects differ in their number of draws, those of one number are dealt among themselves, so that no sum changes
        # from epoch to epoch; ranks change places instead.
        by_count = order[np.argsort(-amounts[order], kind="stable")]
        hands, sums = _deal(amounts[by_count], world_size)
        hand = (rank + epoch) % world_size if shuffle_subjects else rank
        mine = np.sort(by_count[hands == hand])
        if shuffle_subjects:
            mine = order[np.isin(order, mine)]
        length = min(sums) if drop_last else max(sums)
        own = cls.in_order(seed, epoch, counts, mine.tolist(), max_length, shuffle_patches=shuffle_patches, length=length)
        if world_size == 1:
            return own
        shared = repr((order.tolist(), amounts.tolist(), world_size, length, max_length, shuffle_patches))
        return replace(own, of_all_ranks=zlib.crc32(shared.encode()))

    @classmethod
    def in_order(
        cls,
        seed: int,
        epoch: int,
        counts: Sequence[int],
        order: Sequence[int],
        max_length: int,
        *,
        shuffle_patches: bool = True,
        length: int | None = None,
    ) -> Self:
        """Plan an epoch that loads given subjects in a given order, which may name one more than once.

        Args:
            seed: what all random numbers follow from.
            epoch: number of the epoch.
            counts: number of draws of each subject.
            order: indices of the subjects.
            max_length: patches that may be held at a time.
            shuffle_patches: let patches leave in random order.
            length: patches in the epoch: further draws of all subjects are added, or the last ones left out.
        """
        order = [subject for subject in order if counts[subject]]  # no further draws of one of which none are wanted
        draws = np.asarray([counts[subject] for subject in order], dtype=np.int64)
        more = 0 if length is None else length - int(draws.sum())
        if more > 0 and order:
            each, rest = divmod(more, len(draws))
            draws += each + (np.arange(len(draws)) < rest)
        elif more < 0:
            ends = np.minimum(np.cumsum(draws), int(draws.sum()) + more)
            draws = np.diff(ends, prepend=0)
        kept = [(subject, number) for subject, number in zip(order, draws.tolist(), strict=True) if number]
        subjects, numbers = tuple(subject for subject, _ in kept), tuple(number for _, number in kept)
        return cls(seed, epoch, subjects, numbers, max_length, shuffle_patches=shuffle_patches)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.draws else 0

    @cached_property
    def _ends(self) -> np.ndarray:
        """One past the last patch of each place."""
        return np.cumsum(self.draws, dtype=np.int64)

    @cached_property
    def _first_draws(self) -> np.ndarray:
        """Number of the first draw at each place: not 0 where the subject was there before."""
        made: dict[int, int] = {}
        firsts = []
        for subject, number in zip(self.subjects, self.draws, strict=True):
            firsts.append(made.get(subject, 0))
            made[subject] = firsts[-1] + number
        return np.asarray(firsts, dtype=np.int64)

    def _sorted(self, first: int, stop: int) -> np.ndarray:
        """Sort patches by their keys."""
        patches = np.arange(first, stop)
        if not self.shuffle_patches:
            return patches
        keys = patches + self.max_length * uniform_numbers(self.seed, self.epoch, first, stop, Purpose.PATCH_ORDER)
        return patches[np.argsort(keys, kind="stable")]

    def _around(self, position: int, stop: int) -> tuple[int, np.ndarray]:
        """Give the patches that may leave at positions from `position` to `stop`, sorted, and how many of them left before.

        A patch is less than `max_length` places from its turn, so that all before these have left, and none after these.
        """
        first = max(0, position - self.max_length + 1)
        return position - first, self._sorted(first, min(len(self), stop + self.max_length - 1))

    def leaving(self, position: int = 0) -> Iterator[int]:
        """Give the patches in the order in which they leave, from a position of that order on."""
        while position < len(self):
            stop = min(len(self), position + max(BLOCK, self.max_length))
            left, patches = self._around(position, stop)
            yield from patches[left : left + stop - position].tolist()
            position = stop

    def remaining(self, position: int = 0) -> "RemainingPatches":
        """Give the patches that have not left before a position, to be loaded subject by subject."""
        left, patches = self._around(position, min(len(self), position + 1))
        return RemainingPatches(self, int(patches.min()) if len(patches) else len(self), np.sort(patches[:left]))

    @property
    def fingerprint(self) -> int:
        """A number that tells this schedule from others, but for those of other ranks of the same."""
        return self.of_all_ranks or zlib.crc32(repr((self.subjects, self.draws, self.max_length, self.shuffle_patches)).encode())

    def __repr__(self) -> str:
        subjects = len(set(self.subjects))
        return f"EpochSchedule(epoch {self.epoch}: {len(self)} patches of {subjects} subjects, {self.max_length} held at most)"


@dataclass(frozen=True)
class RemainingPatches:
    """What of an epoch has not left a queue yet, at some position.

    Example:
        >>> remaining = EpochSchedule.plan(42, 0, counts=[2, 3, 1], max_length=4).remaining(4)
        >>> [(piece.subject, piece.numbers.tolist()) for place in remaining.places for piece in remaining.pieces(place, most=8)]
        [(1, [1, 2])]
    """

    schedule: EpochSchedule
    first: int
    """All patches before this one have left."""
    gone: np.ndarray
    """Others that have left."""

    @property
    def places(self) -> range:
        """Places of the schedule that have patches left, and perhaps some that do not."""
        ends = self.schedule._ends
        return range(int(np.searchsorted(ends, self.first, side="right")), len(ends))

    def pieces(self, place: int, most: int) -> Iterator[SubjectDraws]:
        """Give the patches of one place in pieces of at most so many, which end at the same draws whatever has left."""
        stop = int(self.schedule._ends[place])
        begin = stop - self.schedule.draws[place]
        skipped = max(0, self.first - begin) // most * most
        for start in range(begin + skipped, stop, most):
            patches = np.arange(max(start, self.first), min(start + most, stop))
            patches = patches[~np.isin(patches, self.gone)]
            if len(patches):
                numbers = patches - begin + self.schedule._first_draws[place]
                yield SubjectDraws(place, self.schedule.subjects[place], patches, numbers)


def _deal(counts: np.ndarray, hands: int) -> tuple[np.ndarray, list[int]]:
    """Deal numbers, the largest first, each to the hand with the smallest sum; give the hand of each, and the sums.

    Source: Graham, Bounds on multiprocessing timing anomalies, SIAM J. Appl. Math. 17 (1969), https://doi.org/10.1137/0117039:
    the largest sum is at most a third larger than need be.
    """
    sums = [(0, hand) for hand in range(hands)]
    dealt = []
    for count in counts.tolist():
        total, hand = sums[0]
        dealt.append(hand)
        heapq.heapreplace(sums, (total + count, hand))
    totals = {hand: total for total, hand in sums}
    return np.asarray(dealt), [totals[hand] for hand in range(hands)]
