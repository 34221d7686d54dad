"""A queue of random patches of many subjects, for training."""

import copy
import math
from collections.abc import Iterator, Mapping, Sized
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from ..core.arguments import known_arguments
from ..core.schedules import EpochSchedule
from ..core.sizes import as_int, pretty_bytes
from ..errors import QueueError, VoxloomError
from ..volumes.cache import SubjectsCache
from ..volumes.loading import one_reader
from ..volumes.subject import Subject
from ..volumes.transforms import as_transform
from .arguments import as_context, as_patch_source, as_ranks, as_seed, as_subjects, one_of
from .epoch_plans import EpochPlanner, check_same_keys
from .patch_sizes import PatchSizes
from .patch_worker import NUM_SAMPLES
from .progress import say
from .state import QueueState
from .supply import PatchSupply
from .worker_process import TASKS_AHEAD

__all__ = ["Queue"]

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
        samples_per_volume: patches of each subject that has no entry `num_samples` of its own, by default 10. A grid gives all of
            its own.
        sampler: a sampler of random patches, or a `GridSampler`, made with a patch size.
        num_workers: processes that make patches; 0 makes them in this one, when they are needed.
        shuffle_subjects: load subjects in another order in each epoch.
        shuffle_patches: let patches leave in random order, among `max_length`; otherwise they leave in that of loading.
        start_background: let workers begin at once, rather than with the first pass. Pass False if `load_state_dict` comes next:
            otherwise they first end the subjects that they have begun.
        verbose: log each epoch to the logger `voxloom.queue`, and show it if no logging is set up.
        subject_sampler: gives the indices of the subjects of an epoch, such as PyTorch's `DistributedSampler`; then
            `shuffle_subjects` must be False.
        transform: function that takes a subject and returns one, a transform of TorchIO or MONAI, or a list of these, beside
            the data set's own. Its random numbers from PyTorch,
            NumPy and Python are seeded by subject and epoch. If it keeps a generator of its own it is seeded too, by a method
            `set_random_state` (as MONAI has it), `set_random_seed` or `manual_seed`; if it has none of these it is
            not reproducible. A subject that a `subject_sampler` names twice is transformed the same way both times.
        patch_transform: the same for a patch, seeded by its draw.
        cache: folder in which subjects are kept as the data set's own transform leaves them, so that from then on only patches
            are read; see `SubjectsCache`, for which this is short. `transform` is not part of that, and reads whole subjects.
        seed: of everything random; by default that of the sampler if it was given one, or else `torch.initial_seed()` as it is
            now.
        on_error: `"raise"` what loading or a transform raises, or `"skip"` the subject: further draws of others stand in for its
            own, `skipped` names it, and a warning does at the end of the epoch.
        rank: which of several processes this is, of those that share the subjects; by default that of `torch.distributed`.
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

    @known_arguments
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
        transform: Any = None,
        patch_transform: Any = None,
        cache: Any = None,
        seed: int | None = None,
        on_error: str = "raise",
        rank: int | None = None,
        world_size: int | None = None,
        drop_last: bool = False,
        multiprocessing_context: str | None = None,
        subjects: Any = None,
        patch_sampler: Any = None,
        patches_per_volume: int | None = None,
    ) -> None:
        dataset = as_subjects(one_of(subjects_dataset=subjects_dataset, subjects=subjects))
        self.subjects_dataset = dataset if cache is None else SubjectsCache(dataset, cache)
        self.sampler = as_patch_source(one_of(sampler=sampler, patch_sampler=patch_sampler))
        self.max_length = as_int(max_length, "max_length", 1)
        samples = one_of(samples_per_volume=samples_per_volume, patches_per_volume=patches_per_volume)
        self.samples_per_volume = as_int(10 if samples is None else samples, "samples_per_volume", 1)
        self.num_workers = as_int(num_workers, "num_workers", 0)
        self.verbose = verbose
        self.transform = as_transform(transform, "transform")
        self.patch_transform = as_transform(patch_transform, "patch_transform")
        if on_error not in ON_ERROR:
            raise QueueError(f"on_error is {on_error!r}: it must be one of {', '.join(map(repr, ON_ERROR))}")
        self.on_error = on_error
        ranks = as_ranks(rank, world_size, subject_sampler)
        self._planner = EpochPlanner(
            dataset=self.subjects_dataset,
            sampler=self.sampler,
            samples_per_volume=self.samples_per_volume,
            max_length=self.max_length,
            subject_sampler=subject_sampler,
            shuffle_subjects=shuffle_subjects,
            shuffle_patches=shuffle_patches,
            rank=ranks[0],
            world_size=ranks[1],
            has_found_ranks=rank is None and world_size is None and subject_sampler is None,
            drop_last=drop_last,
            seed=as_seed(seed, self.sampler, ranks[1]),
        )
        self._sizes = PatchSizes(self._planner, on_error == "skip")
        making = (self.transform, self.patch_transform, on_error == "skip", self.num_workers, as_context(multiprocessing_context))
        self._supply = PatchSupply(self._planner, self._sizes, *making)
        self._upcoming = QueueState(self._planner.seed, 0, 0)
        """Where the next pass begins."""
        self._reached = (0, 0)
        """Epoch and position of the next patch of the present pass, or of the last one."""
        self._epoch = 0
        """Epoch of the present pass, or of the last one."""
        self._fingerprint = 0
        """What tells its schedule from others."""
        if not self._has_transforms:
            self._planner.check_keys()  # transforms may make entries the same
        # A subject_sampler that draws from the user's random numbers is asked when a pass begins, and not before.
        if start_background and self.num_workers and (subject_sampler is None or self._planner.has_epochs):
            self._supply.restart(self._planner.schedule(0), 0)

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
        return self._supply.num_buffered

    @property
    def prefetch(self) -> int:
        """Patches that may be on their way from the workers, beside those that are held."""
        return self.num_workers * (TASKS_AHEAD + 1) * self._sizes.num_per_message

    @property
    def max_memory(self) -> int:
        """Bytes of `max_length` patches, of the largest that any subject has, with their types and channels.

        Where there are transforms, these are not known from headers: then they are those of the patches so far, and if none has
        been made yet, one is.
        """
        if not self._has_transforms and self._planner.dry_subjects is not None:
            return self.max_length * self._sizes.largest
        if self._supply.bytes_so_far:
            return self._supply.bytes_so_far
        return self.max_length * sum(image.memory for image in self._supply.first_patch().images.values())

    @property
    def max_memory_pretty(self) -> str:
        """The same, for people."""
        return pretty_bytes(self.max_memory)

    def get_max_memory(self, subject: Subject | None = None) -> int:
        """Give the bytes of `max_length` patches, those of a given subject or of the data set."""
        return self.max_memory if subject is None else self.max_length * self._sizes.of(subject)

    def get_max_memory_pretty(self, subject: Subject | None = None) -> str:
        """Give the same, for people."""
        return pretty_bytes(self.get_max_memory(subject))

    @property
    def idle_seconds(self) -> float:
        """How long patches were waited for, since the queue began to make them."""
        return self._supply.idle_seconds

    @property
    def skipped(self) -> dict[int, str]:
        """Subjects that were skipped in the present epoch, or the last one, by their index, and why."""
        return self._supply.reasons_to_skip(self._epoch)

    @property
    def _has_transforms(self) -> bool:
        return any(transform is not None for transform in self._supply.transforms)

    # Passes

    def __len__(self) -> int:
        schedule = self._supply.schedule
        return self._planner.length(self._upcoming.epoch) if schedule is None else len(schedule)

    def __iter__(self) -> Iterator[Subject]:
        worker = get_worker_info()
        if worker is not None:
            raise QueueError(one_reader(worker.num_workers))
        return self._pass()

    def _pass(self) -> Iterator[Subject]:
        start = self._upcoming
        epoch, position = start.epoch, start.position
        schedule = self._planner.begin(epoch)
        if not start.is_of(schedule):
            raise start.other_order(self.subject_sampler)
        supply = self._supply
        first_number = supply.begin(schedule, position)
        self._epoch, self._fingerprint = epoch, schedule.fingerprint
        self._upcoming = QueueState(start.seed, epoch + 1, 0)
        self._log("epoch %d begins at patch %d of %d, with %d held", epoch, position, len(schedule), supply.num_buffered)
        waited = supply.idle_seconds
        first: Entries = ((), 0)
        try:
            for number in schedule.leaving(position):
                if supply.schedule is not schedule:
                    raise QueueError("this pass over the queue cannot go on: another one has begun, or the queue was closed")
                patch = supply.take(first_number + number)
                first = self._checked(patch, first)
                position += 1
                self._reached = (epoch, position) if position < len(schedule) else (epoch + 1, 0)
                if self.verbose and position % math.ceil(len(schedule) / LOGS_PER_EPOCH) == 0:
                    self._log("%s", self._progress())
                if position == len(schedule):  # a loader may ask for no more
                    self._log("epoch %d ends: %.3f s were waited for patches", epoch, supply.idle_seconds - waited)
                    supply.warn_of_skipped(epoch, self.num_subjects)
                yield patch
        except GeneratorExit:
            raise
        except BaseException:
            if supply.schedule is schedule:
                supply.stop(wait=False)
            raise
        finally:
            supply.leave(schedule)

    def _checked(self, patch: Subject, first: Entries) -> Entries:
        """Make sure that a patch can be in one batch with the first of the pass, and give the entries of that."""
        if not self._planner.all_have_num_samples:
            patch.pop(NUM_SAMPLES, None)
        own = (tuple(patch), patch.patch_location.subject_index)
        if first[0]:
            check_same_keys(*first, *own)
        return first if first[0] else own

    def close(self) -> None:
        """End the workers. A new pass starts new ones, and is the next epoch."""
        self._supply.stop()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in FIXED and name in self.__dict__:
            raise QueueError(f"{name} of a queue cannot be changed, because its workers would not know: make a new queue")
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what runs: a copy, also in another process, begins on its own, with the epoch that comes next here."""
        return self.__dict__ | {"_supply": copy.copy(self._supply)}

    # Resuming

    def state_dict(self) -> dict[str, Any]:
        """Say which patches have left, in a few whole numbers; what workers have prepared does not count.

        A pass that was left before its end is where it was left: once the state is loaded, it goes on from there. A patch has
        left when the loader has it; `SubjectsLoader.state_dict` counts those of batches that were delivered, which is what is
        wanted where an error, or the end of training, may come in the middle of a batch.
        """
        skipped = tuple(self._supply.skipped_in(self._reached[0]))
        return QueueState(self._planner.seed, *self._reached, self._fingerprint, skipped).to_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next pass continue with the patch after those that `state_dict` counted.

        Only subjects are loaded whose patches had not all left.

        Raises:
            QueueError: if that is not the state of a queue, or of one of other subjects, numbers of patches, `max_length`,
                shuffling or number of ranks; it may be that of another rank. Where there is a `subject_sampler`, that is found
                when the pass begins, and each rank needs a state of its own. A state between two epochs fits all queues: these
                may go on with other subjects.
        """
        given = QueueState.from_dict(state)
        seed_before, self._planner.seed = self._planner.seed, given.seed
        schedule = self._planner.schedule(given.epoch) if self.subject_sampler is None else None
        if schedule is not None and not given.is_of(schedule):
            self._planner.seed = seed_before
            raise given.other_order(self.subject_sampler)
        self._upcoming, self._fingerprint = given, given.fingerprint
        self._reached = (given.epoch, given.position)
        self._epoch = given.epoch
        self._supply.rewind(schedule, given.position, given.skipped_of(schedule))
        self.times_loaded += 1

    def __getitem__(self, index: Any) -> Subject:
        raise QueueError(
            f"a queue has no patch of index {index!r}, since it makes them as they are wanted: iterate it, or give it to a"
            " SubjectsLoader"
        )

    # What is shown

    def _progress(self) -> str:
        """Say how far the pass is, how full the queue is, and how long patches were waited for."""
        epoch, position = self._reached
        schedule: EpochSchedule | None = self._supply.schedule
        if schedule is None:
            done = f"epoch {epoch}, patch {position}"
        else:
            if epoch > schedule.epoch:
                epoch, position = schedule.epoch, len(schedule)
            subjects = schedule.remaining(position).places.start
            done = f"epoch {epoch}, patch {position} of {len(schedule)}, {subjects} subjects done"
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
            say(text, *values)
