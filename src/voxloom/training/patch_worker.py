"""What a worker does: load a subject, transform it, and cut patches out of it."""

import contextlib
import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..core.grid.grids import PatchGrid
from ..core.random_numbers import Purpose, seed_words
from ..errors import SamplingError, SubjectError, VoxloomError
from ..runtime import memory
from ..runtime.seeding import reseed, seeded
from ..runtime.shared_memory import share
from ..sampling.patches import MakeEmpty, NumberedPatches, PatchSource
from ..volumes.constants import PATCH_LOCATION
from ..volumes.contents import gives_copies, name_of, transforms_of
from ..volumes.libraries import Transform, as_subject
from ..volumes.subject import Subject

__all__ = [
    "NUM_SAMPLES",
    "SKIPPED_BEFORE",
    "MadePatch",
    "PatchTask",
    "PatchWorker",
    "SkippedSubject",
    "Wanted",
]

_Key = tuple[int, int, int]  # run, epoch and subject, or place of a subject
# Draws that replace those of a subject that was skipped have numbers beyond all others.
FIRST_REPLACEMENT = 2**32
NUM_SAMPLES = "num_samples"
"""Entry of a subject that says how many patches of it are wanted."""
SKIPPED_BEFORE = "it had been skipped when the state was taken"


@dataclass(frozen=True, slots=True)
class PatchTask:
    """Patches that are to be made of one subject."""

    run: int
    """Which run of the queue they are for: a new one begins where it is resumed."""
    seed: int
    epoch: int
    place: int
    """Its place in the order of the epoch."""
    subject: int
    """Index in the data set."""
    numbers: tuple[int, ...]
    """Numbers of the draws."""
    sequence_numbers: tuple[int, ...]
    """Place of each patch in the row of all that are made in this run."""
    replacements: tuple[int, ...]
    """Subjects to draw from instead, one after the other, if this one cannot be read."""
    skipped_from: int | None
    """The draw from which on the subject was skipped before the queue was resumed."""


class SkippedSubject(NamedTuple):
    """A subject whose patches are replaced by those of others."""

    epoch: int
    place: int
    """Its place in the order of the epoch, in which a `subject_sampler` may name a subject twice."""
    subject: int
    first: int
    """The first of its draws that was replaced."""
    reason: str


class MadePatch(NamedTuple):
    """A patch, or the news that a subject is skipped."""

    sequence_number: int
    patch: Subject
    skipped: SkippedSubject | None


class Wanted:
    """Which patches somebody waits for: said by the queue, and seen at once by all who make them.

    Args:
        is_shared: let other processes see it, to which it is given when they start.
    """

    def __init__(self, is_shared: bool = False) -> None:
        numbers = torch.zeros(2, dtype=torch.int64)  # run and epoch
        self._numbers = share(numbers) if is_shared else numbers

    @property
    def epoch(self) -> int:
        """The epoch that is being yielded, or will be next."""
        return int(self._numbers[1])

    def begin(self, run: int, epoch: int) -> None:
        """Want the patches of a run, from an epoch on."""
        # In this order: a worker that sees the new run must not take its tasks for those of an epoch that is over.
        self._numbers[1] = epoch
        self._numbers[0] = run

    def go_to(self, epoch: int) -> None:
        """Want no patches of the epochs before one."""
        self._numbers[1] = epoch

    def end(self) -> None:
        """Want nothing more."""
        self._numbers[0] = -1

    def includes(self, task: PatchTask) -> bool:
        """Say whether somebody waits for the patches of a task."""
        run, epoch = self._numbers.tolist()
        return bool(task.run == run and task.epoch >= epoch)


class PatchWorker:
    """Makes the patches of tasks, in any process, with one subject in memory at a time.

    Args:
        dataset: gives a subject for an index.
        sampler: says where its patches lie.
        transform: applied to each subject, seeded by subject and epoch.
        patch_transform: applied to each patch, seeded by its draw.
        grids: for each subject the grid that its patches were counted by; None where they may lie anywhere.
        counted: patches that were counted for each subject, where nobody could know how many it wants itself.
        skip_errors: replace the patches of a subject that raises an error by those of others.
        wanted: what somebody waits for; nothing else is made any more.
    """

    def __init__(
        self,
        dataset: Any,
        sampler: PatchSource,
        transform: Transform | None,
        patch_transform: Transform | None,
        grids: list[PatchGrid] | None,
        counted: int | None,
        skip_errors: bool,
        wanted: Wanted,
    ) -> None:
        self.dataset = dataset
        self.sampler = sampler
        self.transform = transform
        self.patch_transform = patch_transform
        self.grids = grids
        self.counted = counted
        self.skip_errors = skip_errors
        self.wanted = wanted
        self._open: tuple[_Key, NumberedPatches] | None = None
        self._unreadable: dict[_Key, tuple[type[VoxloomError], str]] = {}
        self._skipped: tuple[_Key, SkippedSubject] | None = None

    def release(self) -> None:
        """Let go of the subject in memory."""
        self._open = None

    def make(self, task: PatchTask, empty: MakeEmpty = memory.empty) -> Iterator[MadePatch]:
        """Make patches one by one, until all are there or nobody wants them any more.

        Raises:
            Exception: whatever loading or a transform raised; it names the subject.
        """
        if task.skipped_from is not None and self._skipped_of(task) is None:
            self._skip(task, task.skipped_from, SKIPPED_BEFORE)
        for number, sequence_number in zip(task.numbers, task.sequence_numbers, strict=True):
            if not self.wanted.includes(task):
                return
            skipped = self._skipped_of(task)
            patch = None
            if skipped is None or number < skipped.first:
                try:
                    patch = self._cut(task, task.subject, number, empty)
                except _AbandonedError:
                    return
                except Exception as error:
                    if not self.wanted.includes(task):
                        return
                    if not task.replacements or not self._may_skip(error):
                        raise
                    skipped = self._skip(task, number, f"{type(error).__name__}: {error}")
            if patch is None:
                try:
                    patch = self._replace(task, number, empty)
                except _AbandonedError:
                    return
            yield MadePatch(sequence_number, patch, skipped)

    def _may_skip(self, error: Exception) -> bool:
        is_allowed = self.skip_errors or isinstance(error, _NothingToDrawError)
        return is_allowed and not isinstance(error, _AbandonedError)

    def _skip(self, task: PatchTask, first: int, reason: str) -> SkippedSubject:
        skipped = SkippedSubject(task.epoch, task.place, task.subject, first, reason)
        self._skipped = ((task.run, task.epoch, task.place), skipped)
        return skipped

    def _skipped_of(self, task: PatchTask) -> SkippedSubject | None:
        key = (task.run, task.epoch, task.place)
        return self._skipped[1] if self._skipped is not None and self._skipped[0] == key else None

    def _replace(self, task: PatchTask, number: int, empty: MakeEmpty) -> Subject:
        """Make a further draw of the next subject that can be read."""
        errors = []
        for distance, subject in enumerate(task.replacements, start=1):
            try:
                return self._cut(task, subject, distance * FIRST_REPLACEMENT + number, empty)
            except _AbandonedError:
                raise
            except Exception as error:
                if not self._may_skip(error):
                    raise
                errors.append(error)
        raise SubjectError(
            f"{self._name(task.subject)} was skipped, and so were all {len(errors)} that could stand in for it, the last because"
            f" of {type(errors[-1]).__name__}: {errors[-1]}"
        ) from errors[-1]

    def _cut(self, task: PatchTask, subject: int, number: int, empty: MakeEmpty) -> Subject:
        with self._named(subject, task.epoch):
            patches = self._patches_of(task, subject)
            if self.patch_transform is None:
                return patches.cut(number, empty)
            words = seed_words(task.seed, task.epoch, number, subject, Purpose.PATCH_TRANSFORM)
            with seeded(words):
                reseed(self.patch_transform, itertools.count(words[3]))
                patch = patches.cut(number)
                location = patch.patch_location
                patch = as_subject(self.patch_transform(patch), "what patch_transform returned")
                patch.setdefault(PATCH_LOCATION, location)  # it may have made a new subject of the images alone
                return patch

    def _patches_of(self, task: PatchTask, subject: int) -> NumberedPatches:
        """Open a subject, unless it is open already; the one that was open before is released first."""
        key = (task.run, task.epoch, subject)
        if key in self._unreadable:
            kind, text = self._unreadable[key]
            raise kind(text)
        if self._open is None or self._open[0] != key:
            self._open = None
            self._open = (key, self._load_once(key, task, subject))
        return self._open[1]

    def _load_once(self, key: _Key, task: PatchTask, index: int) -> NumberedPatches:
        """Load a subject; one that may be skipped is not tried again in this epoch."""
        self._unreadable = {known: error for known, error in self._unreadable.items() if known[:2] == key[:2]}
        try:
            patches = self._load(task, index)
            if patches is None:
                raise _NothingToDrawError("there is nothing to draw from it")
        except Exception as error:
            if self._may_skip(error):
                # Not the error itself: it would keep all that was in memory when it was raised.
                if isinstance(error, VoxloomError):
                    self._unreadable[key] = type(error), str(error)
                else:
                    self._unreadable[key] = SubjectError, f"{type(error).__name__}: {error}"
            raise
        return patches

    def _load(self, task: PatchTask, index: int) -> NumberedPatches | None:
        words = seed_words(task.seed, task.epoch, 0, index, Purpose.SUBJECT_TRANSFORM)
        with seeded(words):
            seeds = itertools.count(words[3])
            for transform in (*transforms_of(self.dataset), self.transform):
                reseed(transform, seeds)
            subject = as_subject(self.dataset[index], "what the data set gave")
            if self.transform is not None and not gives_copies(self.dataset):
                subject = copy.deepcopy(subject)  # it may be what the data set keeps
            if not self.wanted.includes(task):
                raise _AbandonedError
            if self.transform is not None:
                subject = as_subject(self.transform(subject), "what transform returned")
            if self.counted is not None and subject.get(NUM_SAMPLES, self.counted) != self.counted:
                raise SubjectError(
                    f"its {NUM_SAMPLES} is {subject[NUM_SAMPLES]}, but {self.counted} patches were counted, because the data set,"
                    f" of type {type(self.dataset).__name__}, does not say what its subjects are before it loads them: use a"
                    " SubjectsDataset, or give the data set a method dry_iter that returns the subjects, not loaded yet"
                )
            if self.grids is not None and self.sampler.grid_of(subject) != self.grids[index]:
                raise SubjectError(
                    f"a transform changed its shape to {subject.spatial_shape}, but its grid was counted for"
                    f" {self.grids[index].spatial_shape}, which its files say: change shapes before the queue is made, or use a"
                    " random sampler"
                )
            return self.sampler.numbered(subject, task.seed, task.epoch, index)

    def _name(self, subject: int) -> str:
        return name_of(self.dataset, subject)

    @contextlib.contextmanager
    def _named(self, subject: int, epoch: int) -> Iterator[None]:
        """Let an error say which subject it was."""
        try:
            yield
        except Exception as error:
            where = f"{self._name(subject)}, in epoch {epoch}"
            if isinstance(error, VoxloomError):
                raise type(error)(f"{where}: {error}") from error
            if isinstance(error, StopIteration):  # a generator would make an error of it that does not say where it was
                # With a cause, `contextmanager` would raise that in its place, since it takes this error for one of a generator.
                raise SubjectError(f"{where}: the data set or a transform raised StopIteration")  # noqa: B904
            error.add_note(f"This was {where}")
            raise


class _AbandonedError(Exception):
    """Nobody wants the patches of a task any more."""


class _NothingToDrawError(SamplingError):
    """A sampler that was told to skip subjects without foreground has met one."""
