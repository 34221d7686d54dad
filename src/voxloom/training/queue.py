"""A queue of random patches of many subjects, for training."""

import contextlib
import logging
import math
import multiprocessing
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from ..core.forks import in_forked_process
from ..core.memory import FreedMemory, pretty_bytes
from ..core.schedules import EpochSchedule
from ..core.sizes import as_int
from ..errors import QueueError, SizeError, SubjectError, VoxloomError, WorkerError
from ..sampling.patches import PatchSource
from ..sampling.random import PatchSampler
from ..volumes.loading import SubjectsDataset, Transform, one_reader
from ..volumes.subject import Subject
from .feeding import TaskFeed
from .making import NUM_SAMPLES, SKIPPED_BEFORE, STAND_IN, PatchMaker, PatchTask, SkippedSubject, name_of, transforms_of
from .planning import Planner, check_same_keys, headers_of
from .streams import TASKS_AHEAD, LocalStream, PatchStream, WorkerStream

__all__ = ["Queue"]

logger = logging.getLogger("voxloom.queue")
_handler = logging.StreamHandler()
"""Shows what is logged where nobody has set up logging."""

# Bytes of patches that travel in one message, or one patch if that is larger.
MESSAGE_BYTES = 2 * 2**20
# Subjects whose headers are read to find out how large a patch is, before that is given up.
MOST_HEADERS = 8
# How often a verbose queue says how far it is.
LOGS_PER_EPOCH = 10
ON_ERROR = ("raise", "skip")
# What is said when a queue is made, and stays so.
FIXED = frozenset(
    {"subjects_dataset", "sampler", "max_length", "samples_per_volume", "num_workers", "transform", "patch_transform", "on_error"}
)
Entries = tuple[tuple[str, ...], int]
"""Names of a patch's entries, and the index of its subject."""


class Queue(IterableDataset[Subject]):
    """Patches of many subjects in random order, made by workers ahead of the training step.

    A worker loads a subject, transforms it, and cuts its patches; only these travel to the queue, which holds `max_length` of
    them at most. Every pass is an epoch: each patch of each subject once, in an order that follows from the seed and the epoch
    alone. So the same patches come in the same order, bit for bit, for every number of workers, and `state_dict` continues
    with the very next patch. While one epoch comes to its end, the first subjects of the next are loaded.

    Give it to a `SubjectsLoader` or PyTorch's `DataLoader` without workers: the queue has its own.

    Args:
        subjects_dataset: a `SubjectsDataset`, a list of subjects, or any map-style data set of subjects that has a length.
        max_length: patches that are held at most. More mix better; the first patch comes as soon either way.
        samples_per_volume: patches of each subject that has no entry `num_samples` of its own. A grid gives all of its own.
        sampler: a sampler of random patches, or a `GridSampler`, made with a patch size.
        num_workers: processes that make patches; 0 makes them in this one, when they are needed.
        shuffle_subjects: load subjects in another order in each epoch.
        shuffle_patches: let patches leave in random order, among `max_length`; otherwise they leave in that of loading.
        start_background: let workers begin at once, rather than with the first pass. Pass False if `load_state_dict` comes next:
            otherwise they first end the subjects that they have begun.
        verbose: log each epoch to the logger `voxloom.queue`, and show it if no logging is set up.
        subject_sampler: gives the indices of the subjects of an epoch, such as PyTorch's `DistributedSampler`; then
            `shuffle_subjects` must be False.
        transform: function that takes a subject and returns one, beside the data set's own. Its random numbers from PyTorch,
            NumPy and Python are seeded by subject and epoch. If it keeps a generator of its own it is seeded too, by a method
            `set_random_state` (as MONAI has it), `set_random_seed` or `manual_seed`; if it has none of these it is
            not reproducible. A subject that a `subject_sampler` names twice is transformed the same way both times.
        patch_transform: the same for a patch, seeded by its draw.
        seed: of everything random; by default that of the sampler if it was given one, or else `torch.initial_seed()` as it is
            now.
        on_error: `"raise"` what loading or a transform raises, or `"skip"` the subject: further draws of others stand in for its
            own, `skipped` names it, and a warning does at the end of the epoch.
        rank: which of several processes this is, of those that share the subjects.
        world_size: number of these. Each subject belongs to one of them in each epoch, and all have the same number of patches:
            ranks with fewer than another make further draws.
        drop_last: cut all ranks to the shortest instead.
        multiprocessing_context: start method of the workers, such as `"spawn"`; by default PyTorch's.
        subjects: newer name of `subjects_dataset`.
        patch_sampler: newer name of `sampler`.
        patches_per_volume: newer name of `samples_per_volume`.

    Raises:
        SizeError: if a number cannot be used.
        SubjectError: if there are no subjects, or they do not have the same entries.
        QueueError: if arguments contradict each other.

    Passes raise what loading and transforms raise, with the subject and its files named; `WorkerError` if a worker dies.

    Example:
        >>> import voxloom as vx
        >>> subjects = [vx.datasets.HeadPhantom(32, seed=number) for number in range(4)]
        >>> sampler = vx.LabelSampler(16, "labels")
        >>> queue = vx.Queue(vx.SubjectsDataset(subjects), max_length=8, samples_per_volume=3, sampler=sampler, seed=0)
        >>> loader = vx.SubjectsLoader(queue, batch_size=4)
        >>> [tuple(batch.t1.data.shape) for batch in loader]
        [(4, 1, 16, 16, 16), (4, 1, 16, 16, 16), (4, 1, 16, 16, 16)]
    """

    needs_one_reader = True
    times_loaded = 0

    # What runs; a copy in another process has none of it.
    _stream: PatchStream | None
    _feed: TaskFeed | None
    _schedule: EpochSchedule | None
    _memory: FreedMemory
    _end: weakref.finalize | None

    def __init__(
        self,
        subjects_dataset: Any = None,
        max_length: Any = 300,
        samples_per_volume: int | None = None,
        sampler: Any = None,
        num_workers: int = 0,
        shuffle_subjects: bool = True,
        shuffle_patches: bool = True,
        start_background: bool = True,
        verbose: bool = False,
        subject_sampler: Any = None,
        *,
        transform: Transform | None = None,
        patch_transform: Transform | None = None,
        seed: int | None = None,
        on_error: str = "raise",
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        multiprocessing_context: str | None = None,
        subjects: Any = None,
        patch_sampler: Any = None,
        patches_per_volume: int | None = None,
    ) -> None:
        self.subjects_dataset = _as_dataset(_one_of(subjects_dataset=subjects_dataset, subjects=subjects))
        self.sampler = _as_source(_one_of(sampler=sampler, patch_sampler=patch_sampler))
        self.max_length = as_int(max_length, "max_length", 1)
        samples = _one_of(samples_per_volume=samples_per_volume, patches_per_volume=patches_per_volume)
        self.samples_per_volume = as_int(10 if samples is None else samples, "samples_per_volume", 1)
        if self.samples_per_volume >= STAND_IN:
            raise SizeError(f"samples_per_volume is {self.samples_per_volume}: it must be less than {STAND_IN}")
        self.num_workers = as_int(num_workers, "num_workers", 0)
        self.verbose = verbose
        self.transform = _as_transform(transform, "transform")
        self.patch_transform = _as_transform(patch_transform, "patch_transform")
        if on_error not in ON_ERROR:
            raise QueueError(f"on_error is {on_error!r}: it must be one of {', '.join(map(repr, ON_ERROR))}")
        self.on_error = on_error
        self._context = _as_context(multiprocessing_context)
        if seed is None and isinstance(self.sampler, PatchSampler) and self.sampler.seed_was_given:
            seed = self.sampler.seed
        world_size = as_int(world_size, "world_size", 1)
        if not 0 <= as_int(rank, "rank", 0) < world_size:
            raise SizeError(f"rank is {rank}: it must be less than world_size, {world_size}")
        if world_size > 1 and seed is None:
            raise QueueError("ranks that share subjects need the same seed, or they would not agree on who has which: give seed")
        if subject_sampler is not None and shuffle_subjects:
            raise QueueError(
                "shuffle_subjects cannot be set when a subject_sampler is given, because that says the order: pass"
                " shuffle_subjects=False"
            )
        if subject_sampler is not None and world_size > 1:
            raise QueueError(
                "give a subject_sampler, or rank and world_size, but not both: each says which subjects are this rank's"
            )
        self._planner = Planner(
            self.subjects_dataset,
            self.sampler,
            self.samples_per_volume,
            subject_sampler,
            self.max_length,
            shuffle_subjects,
            shuffle_patches,
            rank,
            world_size,
            drop_last,
        )
        self._planner.seed = as_int(torch.initial_seed() if seed is None else seed, "seed", -(2**63))
        if not self._has_transforms:
            self._planner.check_keys()  # transforms may make entries the same
        self._upcoming = (0, 0)
        """Epoch and position that the next pass begins at."""
        self._reached = (0, 0)
        """Epoch and position of the next patch of the present pass, or of the last one."""
        self._epoch = 0
        """Epoch of the present pass, or of the last one."""
        self._fingerprint = 0
        """What tells its schedule from others."""
        self._skipped: dict[tuple[int, int], SkippedSubject] = {}
        """Subjects that were skipped, by epoch and place."""
        self._started_with: list[Any] = []
        """The transforms that workers know."""
        self._stop()
        _queues.add(self)
        # A subject_sampler that draws from the user's random numbers is asked when a pass begins, and not before.
        if start_background and self.num_workers and (subject_sampler is None or self._planner.has_epochs):
            self._set_out(self._planner.schedule(0), 0)

    # What users of both generations of TorchIO ask for

    @property
    def subject_sampler(self) -> Any:
        """Gives the indices of the subjects of an epoch."""
        return self._planner.subject_sampler

    @property
    def num_subjects(self) -> int:
        """Subjects of an epoch, on this rank."""
        return self._planner.num_subjects

    @property
    def iterations_per_epoch(self) -> int:
        """Patches of an epoch."""
        return len(self)

    @property
    def patches_per_epoch(self) -> int:
        """Patches of an epoch."""
        return len(self)

    @property
    def num_patches(self) -> int:
        """Patches that are held at present."""
        return 0 if self._stream is None else self._stream.held

    @property
    def prefetch(self) -> int:
        """Patches that may be on their way from the workers, beside those that are held."""
        return self.num_workers * (TASKS_AHEAD + 1) * self._patches_per_message

    @property
    def max_memory(self) -> int:
        """Bytes of `max_length` patches, of the largest that any subject has, with their types and channels.

        Where there are transforms, these are not known from headers: then they are those of the patches so far, and if none has
        been made yet, one is.
        """
        if self._has_transforms or self._planner.dry_subjects is None:
            return self._memory.kept_bytes or self.max_length * self._bytes_of_first_patch()
        return self.max_length * self._bytes_of_largest_patch

    @property
    def max_memory_pretty(self) -> str:
        """The same, for people."""
        return pretty_bytes(self.max_memory)

    def get_max_memory(self, subject: Subject | None = None) -> int:
        """Give the bytes of `max_length` patches, those of a given subject or of the data set."""
        return self.max_memory if subject is None else self.max_length * self._bytes_by_headers(subject)

    def get_max_memory_pretty(self, subject: Subject | None = None) -> str:
        """Give the same, for people."""
        return pretty_bytes(self.get_max_memory(subject))

    @property
    def idle_seconds(self) -> float:
        """How long patches were waited for, since the queue began to make them."""
        return 0.0 if self._stream is None else self._stream.idle_seconds

    @property
    def skipped(self) -> dict[int, str]:
        """Subjects that were skipped in the present epoch, or the last one, by their index, and why."""
        return {skip.subject: skip.reason for skip in self._skipped_in(self._epoch)}

    def _skipped_in(self, epoch: int) -> list[SkippedSubject]:
        return [skip for skip in tuple(self._skipped.values()) if skip.epoch == epoch]

    # Passes

    def __len__(self) -> int:
        return self._planner.length(self._upcoming[0]) if self._schedule is None else len(self._schedule)

    def __iter__(self) -> Iterator[Subject]:
        worker = get_worker_info()
        if worker is not None:
            raise QueueError(one_reader(worker.num_workers))
        return self._pass()

    def _pass(self) -> Iterator[Subject]:
        epoch, position = self._upcoming
        schedule = self._planner.begin(epoch)
        if position and not _is_of(schedule, self._fingerprint, position):
            raise self._other_order(epoch, position)
        for key in [key for key in tuple(self._skipped) if key[0] < epoch]:
            del self._skipped[key]
        stream, ticket = self._begin(schedule, position)
        self._schedule, self._fingerprint = schedule, schedule.fingerprint
        self._epoch, self._upcoming = epoch, (epoch + 1, 0)
        self._log("epoch %d begins at patch %d of %d, with %d held", epoch, position, len(schedule), stream.held)
        waited = stream.idle_seconds
        first: Entries = ((), 0)
        begun_at = -1
        try:
            for number in schedule.leaving(position):
                if self._schedule is not schedule:
                    raise QueueError("this pass over the queue cannot go on: another one has begun, or the queue was closed")
                try:
                    patch = stream.take(ticket + number)
                except WorkerError:
                    # After a Ctrl-C that was caught in the training step the workers are gone; but not twice at one place.
                    if not stream.was_interrupted or begun_at == position:
                        raise
                    self._stop(wait=False)
                    (stream, ticket), self._schedule, begun_at = self._begin(schedule, position), schedule, position
                    patch = stream.take(ticket + number)
                first = self._checked(patch, first)
                position += 1
                self._reached = (epoch, position) if position < len(schedule) else (epoch + 1, 0)
                if self.verbose and position % math.ceil(len(schedule) / LOGS_PER_EPOCH) == 0:
                    self._log("%s", self._progress())
                if position == len(schedule):  # a loader may ask for no more
                    self._log("epoch %d ends: %.3f s were waited for patches", epoch, stream.idle_seconds - waited)
                    self._report_skipped()
                yield patch
        except GeneratorExit:
            raise
        except BaseException:
            if self._schedule is schedule:
                self._stop(wait=False)
            raise
        finally:
            if self._schedule is schedule:
                self._schedule = None
                self._leave(epoch)

    def _begin(self, schedule: EpochSchedule, position: int) -> tuple[PatchStream, int]:
        """Let an epoch be made, from a position on; give the ticket of its first patch."""
        if self._stream is not None and (self._stream.is_over or self._started_with != self._transforms):
            self._stop()
        if self._stream is not None and self._feed is not None:
            is_next = position == 0 or self._feed.start == (schedule.epoch, position)
            ticket = self._feed.begin(schedule) if is_next else None
            if ticket is not None:
                self._stream.go_to(schedule.epoch, ticket)
                return self._stream, ticket
        return self._set_out(schedule, position), 0

    def _set_out(self, schedule: EpochSchedule, position: int) -> PatchStream:
        """Begin a new run; whatever else is being made is dropped."""
        self._run += 1
        skipped = {skip.place: skip.first for skip in self._skipped_in(schedule.epoch)}
        most = self._patches_per_message
        self._feed = TaskFeed(self._run, schedule, position, skipped, self._planner.foresee, most)
        if self._stream is not None:
            self._stream.run(self._feed, position)
            return self._stream
        self._started_with = self._transforms
        wanted = torch.zeros(2, dtype=torch.int64)
        parts = (self._memory, self.max_length, self._skipped, self._feed, position)
        stream: PatchStream
        if self.num_workers:
            stream = WorkerStream(self._maker(_shared(wanted)), *parts, self.num_workers, self._context)
        else:
            stream = LocalStream(self._maker(wanted), *parts)
        self._stream, self._end = stream, weakref.finalize(self, stream.close)
        return stream

    def _maker(self, wanted: Tensor) -> PatchMaker:
        skips = self.on_error == "skip"
        transforms = (self.transform, self.patch_transform)
        grids = self._planner.grids
        counted = self.samples_per_volume if grids is None and self._planner.dry_subjects is None else None
        return PatchMaker(self.subjects_dataset, self.sampler, *transforms, grids, counted, skips, wanted)

    def _leave(self, epoch: int) -> None:
        """Make no more patches of an epoch, and go on with the next."""
        assert self._feed is not None
        assert self._stream is not None
        self._stream.go_to(epoch + 1, self._feed.abandon(epoch))

    def _checked(self, patch: Subject, first: Entries) -> Entries:
        """Make sure that a patch can be in one batch with the first of the pass, and give the entries of that."""
        if not self._planner.all_have_num_samples:
            patch.pop(NUM_SAMPLES, None)
        own = (tuple(patch), patch.patch_location.subject_index)
        if first[0]:
            check_same_keys(*first, *own)
        return first if first[0] else own

    def _report_skipped(self) -> None:
        if self.skipped:
            listed = "; ".join(f"{name_of(self.subjects_dataset, index)}: {why}" for index, why in self.skipped.items())
            warnings.warn(
                f"{len(self.skipped)} of {self.num_subjects} subjects were skipped in epoch {self._epoch}, and further patches of"
                f" others stood in for theirs: {listed}",
                RuntimeWarning,
                stacklevel=2,
            )

    def close(self) -> None:
        """End the workers. A new pass starts new ones, and is the next epoch."""
        self._stop()

    def _stop(self, wait: bool = True) -> None:
        """End what runs. After an error nobody waits for that."""
        stream, end = self.__dict__.get("_stream"), self.__dict__.get("_end")
        self._stream = self._feed = self._schedule = self._end = None
        self._run = 0
        self._memory = FreedMemory(0)
        if stream is not None and end is not None:
            end.detach()
            stream.close(wait)

    def forget_stream(self) -> None:
        """In a forked process: leave what runs to the process that it belongs to."""
        if self._end is not None:
            self._end.detach()
        self._stream = None
        self._stop()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in FIXED and name in self.__dict__:
            raise QueueError(f"{name} of a queue cannot be changed, because its workers would not know: make a new queue")
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what runs: a copy in another process begins on its own, with the epoch that comes next here."""
        running = dict.fromkeys(("_stream", "_feed", "_schedule", "_memory", "_end"))
        return self.__dict__ | running

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._stop()
        _queues.add(self)

    # Resuming

    def state_dict(self) -> dict[str, Any]:
        """Say which patches have left, in a few whole numbers; what workers have prepared does not count.

        A pass that was left before its end is where it was left: once the state is loaded, it goes on from there. A patch has
        left when the loader has it; `SubjectsLoader.state_dict` counts those of batches that were delivered, which is what is
        wanted where an error, or the end of training, may come in the middle of a batch.
        """
        epoch, position = self._reached
        state: dict[str, Any] = {"seed": self._planner.seed, "epoch": epoch, "position": position}
        if position:
            skipped = sorted((skip.place, skip.subject, skip.first) for skip in self._skipped_in(epoch))
            state |= {"schedule": self._fingerprint, "skipped": skipped}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next pass continue with the patch after those that `state_dict` counted.

        Only subjects are loaded whose patches had not all left.

        Raises:
            QueueError: if that is not the state of a queue, or of one of other subjects, numbers of patches, `max_length`,
                shuffling or rank. Where there is a `subject_sampler`, that is found when the pass begins. A state between two
                epochs fits all queues: these may go on with other subjects.
        """
        try:
            seed = as_int(state["seed"], "seed", -(2**63))
            epoch, position = (as_int(state[name], name, 0) for name in ("epoch", "position"))
            fingerprint = int(state["schedule"]) if position else 0
            skipped = [(int(place), int(subject), int(first)) for place, subject, first in state.get("skipped", ())]
        except (KeyError, TypeError, ValueError) as error:
            raise QueueError(f"{state!r} is no state of a queue: it must be what state_dict returned") from error
        seed_before, self._planner.seed = self._planner.seed, seed
        schedule = self._planner.schedule(epoch) if self.subject_sampler is None else None
        if position and schedule is not None and not _is_of(schedule, fingerprint, position):
            self._planner.seed = seed_before
            raise self._other_order(epoch, position)
        self._fingerprint = fingerprint
        self._skipped.clear()
        for place, subject, first in skipped:
            self._skipped[epoch, place] = SkippedSubject(epoch, place, subject, first, SKIPPED_BEFORE)
        self.times_loaded += 1
        self._upcoming = self._reached = (epoch, position)
        self._epoch, self._schedule = epoch, None
        self._feed = None  # whatever is being made is of no use
        if self._stream is not None and schedule is not None:
            self._set_out(schedule, position)

    def _other_order(self, epoch: int, position: int) -> QueueError:
        hint = "the subjects, their order or numbers of patches, max_length, shuffle_patches, rank or world_size differ"
        if self.subject_sampler is not None:
            hint += "; a DistributedSampler needs the set_epoch that it had"
        return QueueError(
            f"epoch {epoch} cannot be resumed at patch {position}, because it has another order than when the state was"
            f" taken: {hint}"
        )

    # Sizes, and what is shown

    @cached_property
    def _patches_per_message(self) -> int:
        subjects = (self._planner.dry_subjects or ())[:MOST_HEADERS]
        for subject in subjects:
            with contextlib.suppress(VoxloomError):  # an error that counts is raised when the subject is loaded
                return max(1, min(MESSAGE_BYTES // self._bytes_by_headers(subject), self.max_length))
        return 1

    def _bytes_by_headers(self, subject: Subject) -> int:
        values = sum(image.num_channels * image.dtype.itemsize for image in headers_of(subject).images.values())
        return values * math.prod(self.sampler.patch_size)

    @cached_property
    def _bytes_of_largest_patch(self) -> int:
        """Bytes of the largest patch, as headers say."""
        subjects = self._planner.dry_subjects or ()
        sizes, errors = [], []
        for subject, count in zip(subjects, self._planner.counts, strict=True):
            try:
                sizes += [self._bytes_by_headers(subject)] if count else []
            except VoxloomError as error:
                if self.on_error == "raise":
                    raise
                errors.append(error)
        if not sizes:
            raise errors[0]
        return max(sizes)

    def _bytes_of_first_patch(self) -> int:
        """Bytes of a patch of the first subject that has any, which is made for this."""
        maker = self._maker(torch.zeros(2, dtype=torch.int64))
        first, *others = [index for index, count in enumerate(self._planner.counts) if count]
        task = PatchTask(0, self._planner.seed, 0, 0, first, (0,), (0,), stand_ins=tuple(others), skipped_from=None)
        return sum(image.memory for made in maker.make(task) for image in made.patch.images.values())

    @property
    def _has_transforms(self) -> bool:
        return any(transform is not None for transform in self._transforms)

    @property
    def _transforms(self) -> list[Any]:
        return [self.transform, self.patch_transform, *transforms_of(self.subjects_dataset)]

    def _progress(self) -> str:
        """Say how far the pass is, how full the queue is, and how long patches were waited for."""
        epoch, position = self._reached
        if self._schedule is None:
            done = f"epoch {epoch}, patch {position}"
        else:
            if epoch > self._schedule.epoch:
                epoch, position = self._schedule.epoch, len(self._schedule)
            subjects = self._schedule.remaining(position).places.start
            done = f"epoch {epoch}, patch {position} of {len(self._schedule)}, {subjects} subjects done"
        return f"{done}; {self.num_patches} of {self.max_length} held; {self.idle_seconds:.1f} s idle"

    def __repr__(self) -> str:
        try:
            length = f"{len(self)} patches"
            if self.subject_sampler is None or isinstance(self.subject_sampler, Sized):
                length += f" of {self.num_subjects} subjects"
        except VoxloomError as error:
            length = f"no epoch: {error}"
        return f"{type(self).__name__}({length}; {self.num_workers} workers; {self._progress()})"

    def _log(self, text: str, *values: Any) -> None:
        if self.verbose:
            logger.removeHandler(_handler)
            if not logger.hasHandlers():
                logger.addHandler(_handler)
            if logger.getEffectiveLevel() > logging.INFO:
                logger.setLevel(logging.INFO)
            logger.info(text, *values)


_queues: weakref.WeakSet[Queue] = weakref.WeakSet()


@in_forked_process
def _forget_streams() -> None:
    for queue in tuple(_queues):
        queue.forget_stream()


def _is_of(schedule: EpochSchedule, fingerprint: int, position: int) -> bool:
    """Say whether a state was taken of a schedule."""
    return schedule.fingerprint == fingerprint and position < len(schedule)


def _one_of(**given: Any) -> Any:
    """Give the one of an argument's two names that was used."""
    used = {name: value for name, value in given.items() if value is not None}
    if len(used) > 1:
        raise QueueError(f"{' and '.join(used)} are names of the same thing: give one of them")
    return next(iter(used.values()), None)


def _as_dataset(given: Any) -> Any:
    if given is None:
        raise SubjectError("a queue needs subjects: Queue(SubjectsDataset(subjects), ...)")
    if isinstance(given, Sequence) and not isinstance(given, str):
        given = SubjectsDataset(given)
    if isinstance(given, Subject) or not hasattr(given, "__len__") or not hasattr(given, "__getitem__"):
        raise SubjectError(
            f"a queue needs a data set of subjects with indices and a length, not something of type {type(given).__name__}"
        )
    if len(given) == 0:
        raise SubjectError("a queue needs at least one subject, but the data set is empty")
    return given


def _as_source(given: Any) -> PatchSource:
    if given is None:
        raise QueueError("a queue needs a sampler: Queue(..., sampler=UniformSampler(patch_size=64))")
    if not isinstance(given, PatchSource):
        what = given.__name__ if isinstance(given, type) else f"something of type {type(given).__name__}"
        raise QueueError(
            f"the sampler of a queue is {what}: it must be one of voxloom's, made with a patch size, as UniformSampler(64)"
        )
    return given


def _as_context(name: str | None) -> str | None:
    try:
        multiprocessing.get_context(name)
    except ValueError as error:
        methods = ", ".join(map(repr, multiprocessing.get_all_start_methods()))
        raise QueueError(f"multiprocessing_context is {name!r}: it must be one of {methods}") from error
    return name


def _as_transform(given: Any, name: str) -> Transform | None:
    if given is not None and not callable(given):
        raise SubjectError(f"{name} is of type {type(given).__name__}, which cannot be called")
    return given


def _shared(tensor: Tensor) -> Tensor:
    share: Callable[[], Tensor] = tensor.share_memory_
    return share()
