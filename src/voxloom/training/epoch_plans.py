"""Which subjects an epoch has, and how many patches of each."""

import copy
import operator
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..core.grid.grids import PatchGrid
from ..core.schedules import EpochSchedule
from ..core.sizes import as_int
from ..errors import QueueError, SizeError, SubjectError
from ..runtime.ranks import check_ranks, rank_and_size
from ..sampling.grid import GridSampler
from ..sampling.patches import PatchSource
from ..volumes.contents import dry_subjects_of
from ..volumes.subject import Subject
from .patch_worker import FIRST_REPLACEMENT, NUM_SAMPLES

__all__ = ["EpochPlanner", "check_same_keys", "headers_of"]


@dataclass
class EpochPlanner:
    """Makes the schedule of each epoch.

    Raises:
        SizeError: if a number cannot be used.
        QueueError: if two settings contradict each other.
    """

    dataset: Any
    """The subjects."""
    sampler: PatchSource
    """Cuts the patches."""
    samples_per_volume: int
    """Patches of each subject that does not say how many."""
    max_length: int
    """Patches that may be buffered."""
    subject_sampler: Any
    """Gives the indices of an epoch's subjects; None takes all."""
    shuffle_subjects: bool
    """Load subjects in random order."""
    shuffle_patches: bool
    """Yield patches in random order."""
    rank: int
    """Which of the ranks this is."""
    world_size: int
    """Number of ranks."""
    has_found_ranks: bool
    """Whether these are those of `torch.distributed`, and were not given."""
    drop_last: bool
    """Cut all ranks to the shortest."""
    seed: int
    """Of everything random."""

    def __post_init__(self) -> None:
        if self.samples_per_volume >= FIRST_REPLACEMENT:
            raise SizeError(f"samples_per_volume is {self.samples_per_volume}: it must be less than {FIRST_REPLACEMENT}")
        if not 0 <= self.rank < self.world_size:
            raise SizeError(f"rank is {self.rank}: it must be less than world_size, {self.world_size}")
        if self.subject_sampler is not None and self.shuffle_subjects:
            raise QueueError(
                "shuffle_subjects cannot be set when a subject_sampler is given, because that says the order: pass"
                " shuffle_subjects=False"
            )
        if self.subject_sampler is not None and self.world_size > 1:
            raise QueueError(
                "give a subject_sampler, or rank and world_size, but not both: each says which subjects are this rank's"
            )
        self._drawn: tuple[int, list[int]] | None = None
        self._begun: tuple[int, int] | None = None
        self._step = 1

    # Subjects

    @cached_property
    def dry_subjects(self) -> Sequence[Subject] | None:
        """The subjects, neither loaded nor transformed; None where the data set does not give them."""
        return dry_subjects_of(self.dataset)

    @cached_property
    def grids(self) -> list[PatchGrid] | None:
        """The grid of each subject, as its headers say; None for a sampler whose patches may lie anywhere."""
        subjects = self.dry_subjects
        if subjects is None:
            if isinstance(self.sampler, GridSampler):
                raise QueueError(
                    f"{type(self.dataset).__name__} does not say what its subjects are before it loads them, so that their grids"
                    " cannot be counted: use a SubjectsDataset"
                )
            return None
        grids = [self.sampler.grid_of(headers_of(subject)) for subject in subjects]
        return None if any(grid is None for grid in grids) else [grid for grid in grids if grid is not None]

    @cached_property
    def counts(self) -> list[int]:
        """Patches of each subject."""
        if self.grids is not None:
            return [len(grid) for grid in self.grids]
        subjects = self.dry_subjects
        if subjects is None:
            return [self.samples_per_volume] * len(self.dataset)
        counts = [
            as_int(subject.get(NUM_SAMPLES, self.samples_per_volume), f"num_samples of subject {index}", 0)
            for index, subject in enumerate(subjects)
        ]
        if not any(counts):
            raise SizeError("num_samples is 0 in all subjects: there are no patches")
        if max(counts) >= FIRST_REPLACEMENT:
            raise SizeError(f"{max(counts)} patches of one subject are too many: there must be less than {FIRST_REPLACEMENT}")
        return counts

    @property
    def counted(self) -> int | None:
        """Patches of each subject, where nobody can know how many it wants itself before it is loaded."""
        return self.samples_per_volume if self.grids is None and self.dry_subjects is None else None

    @property
    def num_subjects(self) -> int:
        """Subjects of an epoch."""
        sampler = self.subject_sampler
        if sampler is None:
            return len(set(self.schedule(0).subjects)) if self.world_size > 1 else len(self.dataset)
        if not isinstance(sampler, Sized):
            raise SubjectError(
                f"the subject_sampler, of type {type(sampler).__name__}, has no __len__ method: it must say how many subjects an"
                " epoch has"
            )
        return len(sampler)

    # Schedules

    def length(self, epoch: int) -> int:
        """Patches of an epoch that is about to begin; the subject_sampler is not asked for its order unless that matters."""
        if self.subject_sampler is not None and isinstance(self.subject_sampler, Sized) and len(set(self.counts)) == 1:
            return len(self.subject_sampler) * self.counts[0]
        return len(self.schedule(epoch))

    @property
    def has_epochs(self) -> bool:
        """Whether the subject_sampler gives an order that follows from an epoch, as PyTorch's `DistributedSampler` does."""
        return hasattr(self.subject_sampler, "set_epoch") and hasattr(self.subject_sampler, "epoch")

    def schedule(self, epoch: int) -> EpochSchedule:
        """Make the schedule of an epoch that is about to begin, or of any where there is no subject_sampler."""
        if self.subject_sampler is None:
            return EpochSchedule.plan(
                self.seed,
                epoch,
                self.counts,
                self.max_length,
                shuffle_subjects=self.shuffle_subjects,
                shuffle_patches=self.shuffle_patches,
                rank=self.rank,
                world_size=self.world_size,
                drop_last=self.drop_last,
            )
        schedule = self._in_order(epoch, self._draw_order(epoch), self.subject_sampler)
        if len(schedule) == 0:
            raise SubjectError("the subject_sampler gave no subjects with patches for this epoch, or for one of the ranks")
        return schedule

    def foresee(self, epoch: int) -> EpochSchedule | None:
        """Make the schedule of an epoch before its time; None if the subject_sampler cannot say what will come."""
        if self.subject_sampler is None:
            return self.schedule(epoch)
        if not self.has_epochs:
            return None
        twin = copy.copy(self.subject_sampler)
        begun, of_sampler = self._begun or (0, twin.epoch)
        twin.set_epoch(of_sampler + self._step * (epoch - begun))
        schedule = self._in_order(epoch, list(twin), twin)
        return schedule if len(schedule) else None

    def begin(self, epoch: int) -> EpochSchedule:
        """Make the schedule of an epoch that begins now.

        Raises:
            QueueError: if each rank would give the patches of all.
        """
        found = rank_and_size()
        if self.has_found_ranks:
            check_ranks()
        if self.has_found_ranks and found != (self.rank, self.world_size):
            raise QueueError(
                f"this queue was made as rank {self.rank} of {self.world_size}, and torch.distributed says rank {found[0]} of"
                f" {found[1]}: make the queue after init_process_group, or give rank and world_size"
            )
        if self.has_epochs:
            own = self.subject_sampler.epoch
            if self._begun is not None and self._begun[0] != epoch:
                # Where nobody calls `set_epoch`, the next epoch will be as this one.
                self._step = (own - self._begun[1]) // (epoch - self._begun[0])
            self._begun = (epoch, own)
        schedule = self.schedule(epoch)
        self._drawn = None
        return schedule

    def _draw_order(self, epoch: int) -> list[int]:
        """Ask the subject_sampler once for each epoch, unless it draws the same each time."""
        if hasattr(self.subject_sampler, "set_epoch"):
            return list(self.subject_sampler)
        if self._drawn is None or self._drawn[0] != epoch:
            self._drawn = (epoch, list(self.subject_sampler))
        return self._drawn[1]

    def _in_order(self, epoch: int, order: list[int], sampler: Any) -> EpochSchedule:
        if not order:
            raise SubjectError("the subject_sampler gave no subjects for this epoch")
        try:
            order = [operator.index(index) for index in order]
        except TypeError as error:
            raise SubjectError(f"the subject_sampler gave {order!r}: it must give whole numbers, indices of subjects") from error
        for index in order:
            if not -len(self.counts) <= index < len(self.counts):
                raise SubjectError(f"the subject_sampler gave index {index}, but there are {len(self.counts)} subjects")
        indices = [index % len(self.counts) for index in order]
        return EpochSchedule.in_order(
            self.seed,
            epoch,
            self.counts,
            indices,
            self.max_length,
            shuffle_patches=self.shuffle_patches,
            length=self._common_length(sampler),
        )

    def _common_length(self, sampler: Any) -> int | None:
        """Patches of each rank that shares a `DistributedSampler`, or one like it; None where there is nothing to share."""
        is_shared = hasattr(sampler, "num_replicas") and hasattr(sampler, "rank")
        if not is_shared or len(set(self.counts)) == 1:
            return None
        lengths = []
        for rank in range(sampler.num_replicas):
            twin = copy.copy(sampler)
            twin.rank = rank
            lengths.append(sum(self.counts[index] for index in twin))
        return min(lengths) if self.drop_last else max(lengths)

    # Checks

    def check_keys(self) -> None:
        """Check that all subjects have the same entries, as far as that can be seen before they are loaded.

        Raises:
            SubjectError: names two that differ.
        """
        subjects = self.dry_subjects or []
        for index, subject in enumerate(subjects):
            check_same_keys(tuple(subjects[0]), 0, tuple(subject), index)

    @cached_property
    def all_have_num_samples(self) -> bool:
        """Whether the entry can be kept in patches, so that they still stack."""
        subjects = self.dry_subjects
        return subjects is not None and all(NUM_SAMPLES in subject for subject in subjects)


def headers_of(subject: Subject) -> Subject:
    """Copy a subject, so that what is read to know its headers is not kept with it."""
    return Subject(dict(subject) | {name: copy.copy(image) for name, image in subject.images.items()})


def check_same_keys(one: Sequence[str], first: int, other: Sequence[str], second: int) -> None:
    """Check by the entries of two subjects that patches of both could be in one batch.

    Raises:
        SubjectError: names both, and their entries.
    """
    differing = () if one == other else (set(one) ^ set(other)) - {NUM_SAMPLES}
    if differing:
        listed = ", ".join(map(repr, sorted(differing)))
        raise SubjectError(
            f"subjects {first} and {second} do not have the same entries: {listed} is in one of them only (subject {first}:"
            f" {', '.join(one)}; subject {second}: {', '.join(other)}). Patches of both could not be in one batch"
        )
