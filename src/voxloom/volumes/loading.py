"""A data set of subjects, and a loader whose batches are `SubjectsBatch`."""

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from ..core.sizes import type_names
from ..errors import NoSuchIndexError, QueueError, SizeError, SubjectError
from ..runtime.seeding import reseed
from ..runtime.shared_memory import check_descriptors, explained_lack
from .batch import SubjectsBatch, collate_subjects, subjects_of_batch
from .contents import transforms_of
from .delivery import Delivery, Fetched
from .libraries import as_subject, library_of
from .subject import Subject
from .transforms import as_transform

__all__ = ["SubjectsDataset", "SubjectsLoader", "as_dataset"]

# What PyTorch's loader holds for each worker, and beside.
DESCRIPTORS_PER_WORKER, DESCRIPTORS_BESIDE = 6, 6


def as_dataset(given: Any) -> Any:
    """Give a data set of another library as one of voxloom's, if it is one; anything else as it is."""
    library = library_of(given)
    found = None if library is None else library.dataset_of(given)
    return given if found is None else found


class SubjectsDataset(Dataset[Subject]):
    """A map-style data set of subjects, of which each access gives a copy.

    Args:
        subjects: the subjects; those of TorchIO, and dicts of images, become voxloom's.
        transform: function that takes a subject and returns one; applied to the copy. Also a transform of TorchIO or MONAI, or a
            list of transforms.
        load_getitem: read the data of all images before the subject is given away.

    Raises:
        SubjectError: if there are no subjects, or something else is among them.

    Example:
        >>> import torch, voxloom as vx
        >>> subjects = [vx.Subject(t1=vx.ScalarImage(torch.rand(1, 8, 8, 8))) for _ in range(4)]
        >>> dataset = vx.SubjectsDataset(subjects)
        >>> len(dataset), next(iter(vx.SubjectsLoader(dataset, batch_size=2))).t1.data.shape
        (4, torch.Size([2, 1, 8, 8, 8]))
    """

    gives_copies = True
    """A transform may change what it is given."""

    def __init__(self, subjects: Sequence[Any], transform: Any = None, load_getitem: bool = True) -> None:
        if isinstance(subjects, Subject) or not isinstance(subjects, Sequence):
            raise SubjectError(f"a data set is made of a list of subjects, not of {type(subjects).__name__}")
        if not subjects:
            raise SubjectError("a data set needs at least one subject, but the list is empty")
        self._subjects = [as_subject(each, f"item {number} of a data set") for number, each in enumerate(subjects)]
        self.load_getitem = load_getitem
        self.set_transform(transform)

    @classmethod
    def from_batch(cls, batch: Any) -> Self:
        """Make a data set of the subjects of a batch: a `SubjectsBatch`, or a dict as TorchIO's loaders give it.

        Raises:
            SubjectError: if it is no batch.
        """
        return cls(subjects_of_batch(batch))

    def set_transform(self, transform: Any) -> None:
        """Set the function that is applied to each subject.

        Raises:
            SubjectError: if it cannot be called.
        """
        self.transform = as_transform(transform, "the transform")

    def dry_iter(self) -> list[Subject]:
        """Give the subjects themselves, neither copied nor loaded nor transformed."""
        return self._subjects

    def __len__(self) -> int:
        return len(self._subjects)

    def __repr__(self) -> str:
        how = "" if self.transform is None else f"; transform: {self.transform!r}"
        return f"{type(self).__name__}({len(self)} subjects{how})"

    def __getitem__(self, index: int) -> Subject:
        if not hasattr(index, "__index__"):
            raise SizeError(
                f"the index of a subject is {index!r}, {type_names.get(type(index), type(index).__name__)}, not a number"
            )
        if not -len(self) <= index < len(self):
            raise NoSuchIndexError(f"the data set has {len(self)} subjects, and none of index {index}")
        subject = copy.deepcopy(self._subjects[index])
        if self.load_getitem:
            subject.load()
        return subject if self.transform is None else self.transform(subject)

    def __iter__(self) -> Iterator[Subject]:
        return (self[index] for index in range(len(self)))


@runtime_checkable
class Drawable(Protocol):
    """A sampler of random patches, whose draws can be made in any order."""

    num_patches: int | None
    seed: int

    def begin_epoch(self) -> int:
        """Number a new pass."""
        ...

    def numbers(self, epoch: int) -> Iterator[int]:
        """Give the numbers of the draws of an epoch, from where it was left."""
        ...

    def indexed(self) -> Dataset[Subject]:
        """Give the draws as a map-style data set."""
        ...

    def seek(self, epoch: int, draw: int) -> None:
        """Let the next pass be this epoch, and begin at this draw."""
        ...

    def first(self, epoch: int) -> int:
        """Say at which draw an epoch begins."""
        ...

    @property
    def upcoming(self) -> tuple[int, int]:
        """Epoch and first draw of the next pass."""
        ...

    def __len__(self) -> int: ...


@runtime_checkable
class Resumable(Protocol):
    """A data set that knows by itself how far it has been read, and so can be read by one process only, as a queue is."""

    needs_one_reader: bool
    """True."""
    times_loaded: int
    """How often `load_state_dict` was called."""

    def __len__(self) -> int: ...

    def state_dict(self) -> dict[str, Any]:
        """Say how far."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from there."""
        ...


def state_of_draws(state: Mapping[str, Any]) -> tuple[int, int, int]:
    """Give seed, epoch and draw of the state of a sampler.

    Raises:
        SubjectError: if it is none.
    """
    if not isinstance(state, Mapping) or not all(isinstance(state.get(key), int) for key in ("seed", "epoch", "draw")):
        raise SubjectError(f"the state of a sampler has a seed, an epoch and a draw, which are whole numbers; it is {state!r}")
    if state["epoch"] < 0 or state["draw"] < 0:
        raise SubjectError(f"the epoch and the draw of a sampler's state are at least 0; it is {state!r}")
    return state["seed"], state["epoch"], state["draw"]


def one_reader(num_workers: int) -> str:
    """Say why a queue is not read by a loader's workers, and what to do."""
    return (
        "a queue cannot be read by the workers of a loader, because each would give all of its patches: use the loader with"
        f" num_workers=0, and let the queue have the workers: Queue(..., num_workers={num_workers})"
    )


class _DrawOrder(Sampler[tuple[int, int, int]]):
    """The draws of one epoch after the other, as indices: so they are the same for every number of workers."""

    def __init__(self, source: Drawable) -> None:
        self.source = source
        self.epoch = 0

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        self.epoch, seed = self.source.begin_epoch(), self.source.seed
        if len(self.source):
            yield from ((seed, self.epoch, number) for number in self.source.numbers(self.epoch))

    def __len__(self) -> int:
        return len(self.source)


class _WorkerSeeds:
    """Seeds the generators that transforms keep for themselves, of which each worker has a copy, by the seed of the worker.

    Args:
        then: what the user wants done in a worker, or None.
    """

    def __init__(self, then: Callable[[int], object] | None) -> None:
        self.then = then

    def __call__(self, worker: int) -> None:
        info = get_worker_info()
        if info is not None:
            seeds = itertools.count(info.seed)
            for transform in transforms_of(info.dataset):
                reseed(transform, seeds)
        if self.then is not None:
            self.then(worker)


class SubjectsLoader(DataLoader[Any]):
    """PyTorch's `DataLoader`, with batches of the type `SubjectsBatch`.

    The batches of a sampler with a number of patches, and their order, are the same for every number of workers, and
    `state_dict` says how many have been delivered.

    Args:
        dataset: a `SubjectsDataset`, a sampler, or any other data set of subjects: of TorchIO, or of dicts as MONAI has
            them.
        batch_size: subjects in a batch.
        device: where batches are delivered; while one is worked on, the next is copied, through pinned memory.
        batch_transform: function that takes a `SubjectsBatch` on that device and returns one, for augmentation of whole batches;
            also a transform of TorchIO 2 or MONAI. Its random numbers are seeded by the number of the batch, as those of a
            queue's `transform` are by subject: the same after resuming, and others on each rank.
        **kwargs: whatever else `DataLoader` takes.

    Example:
        >>> import torch, voxloom as vx
        >>> subject = vx.Subject(t1=vx.ScalarImage(torch.rand(1, 20, 20, 20)))
        >>> loader = vx.SubjectsLoader(vx.GridSampler(subject, patch_size=10), batch_size=4)
        >>> [batch.batch_size for batch in loader]
        [4, 4]
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int | None = 1,
        *,
        device: Any = None,
        batch_transform: Any = None,
        **kwargs: Any,
    ) -> None:
        dataset = as_dataset(dataset)
        kwargs.setdefault("collate_fn", collate_subjects if batch_size is not None or "batch_sampler" in kwargs else None)
        self._source: Drawable | None = None
        if isinstance(dataset, Drawable) and dataset.num_patches is not None:
            if kwargs.get("shuffle") or kwargs.get("sampler") or kwargs.get("batch_sampler"):
                raise SubjectError("the patches of a sampler are in random order already: leave out shuffle and sampler")
            self._source = dataset
            kwargs["sampler"] = _DrawOrder(dataset)
            dataset = dataset.indexed()
        if isinstance(dataset, Resumable) and kwargs.get("num_workers"):
            raise QueueError(one_reader(kwargs["num_workers"]))
        kwargs["worker_init_fn"] = _WorkerSeeds(kwargs.get("worker_init_fn"))
        self._state: Any = None
        """After the batch that was delivered last: epoch and draw, or the data set's `times_loaded` and state."""
        # Under their names, by which Lightning makes a loader of this class anew for each rank.
        self.device, self.batch_transform = device, batch_transform
        self._delivers: tuple[Any, Any, Delivery | None] = (None, None, None)
        self._delivery()
        self._seed, self._passes = torch.initial_seed(), 0
        super().__init__(dataset, batch_size=batch_size, **kwargs)

    def __iter__(self) -> Iterator[SubjectsBatch]:  # type: ignore[override]
        batches = self._explained() if self.num_workers else super().__iter__()
        delivery = self._delivery()
        if isinstance(self.dataset, Resumable):
            fetched = self._followed(batches, self.dataset)
        elif self._source is not None:
            fetched = self._counted(batches, self._source)
        elif delivery is not None:
            fetched = self._numbered(batches)
        else:
            return batches
        return self._noted(fetched if delivery is None else delivery.of(fetched))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.dataset!r}; batch size: {self.batch_size}; {self.num_workers} workers)"

    def _delivery(self) -> Delivery | None:
        """Say how batches are delivered, which may be changed between epochs."""
        device, transform, delivery = self._delivers
        if device is not self.device or transform is not self.batch_transform:
            is_none = self.device is None and self.batch_transform is None
            delivery = None if is_none else Delivery(self.device, self.batch_transform)
            self._delivers = (self.device, self.batch_transform, delivery)
        return delivery

    def _explained(self) -> Iterator[SubjectsBatch]:
        check_descriptors(self.num_workers, DESCRIPTORS_PER_WORKER, DESCRIPTORS_BESIDE)
        with explained_lack():
            yield from super().__iter__()

    def _noted(self, fetched: Iterator[Fetched]) -> Iterator[SubjectsBatch]:
        """Note with each batch that is delivered how far the data set was read for it: an error may come in the next."""
        for each in fetched:
            self._state = each.state
            yield each.batch
        self._state = None if self._source is None else (self._order.epoch + 1, 0)

    def _followed(self, batches: Iterator[SubjectsBatch], dataset: Resumable) -> Iterator[Fetched]:
        for batch in batches:
            state = dataset.state_dict()
            if state["position"] and self._is_end(len(dataset) - state["position"]):
                state = {"seed": state["seed"], "epoch": state["epoch"] + 1, "position": 0}
            yield Fetched(batch, (state["seed"], state["epoch"], state["position"]), (dataset.times_loaded, state))

    def _counted(self, batches: Iterator[SubjectsBatch], source: Drawable) -> Iterator[Fetched]:
        for number, batch in enumerate(batches, start=1):
            epoch = self._order.epoch
            draw = source.first(epoch) + number * (self.batch_size or 1)
            state = (epoch + 1, 0) if self._is_end(len(source) - draw) else (epoch, draw)
            yield Fetched(batch, (source.seed, epoch, draw), state)

    def _is_end(self, remaining: int) -> bool:
        """Whether a pass gives no more batches: nobody may ask for the next one."""
        return remaining < ((self.batch_size or 1) if self.drop_last else 1)

    def _numbered(self, batches: Iterator[SubjectsBatch]) -> Iterator[Fetched]:
        self._passes += 1
        for number, batch in enumerate(batches):
            yield Fetched(batch, (self._seed, self._passes, number))

    @property
    def _order(self) -> _DrawOrder:
        assert isinstance(self.sampler, _DrawOrder)
        return self.sampler

    def state_dict(self) -> dict[str, Any]:
        """Say which patches of a queue, or how many draws of a sampler, have been delivered; what is prepared does not count.

        Raises:
            SubjectError: if the data set is neither a queue nor a sampler with a number of patches.
        """
        if self._source is None:
            dataset = self._resumable()
            times_loaded, state = self._state or (-1, {})
            return state if times_loaded == dataset.times_loaded else dataset.state_dict()
        epoch, draw = self._source.upcoming if self._state is None else self._state
        return {"seed": self._source.seed, "epoch": epoch, "draw": draw}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the batch that follows those that `state_dict` counted.

        Raises:
            SubjectError: if that is no state of such a loader.
        """
        if self._source is None:
            self._resumable().load_state_dict(state)
            self._state = None
            return
        seed, epoch, draw = state_of_draws(state)
        self._source.seed = seed
        self._source.seek(epoch, draw)
        self._state = (epoch, draw)

    def _resumable(self) -> Resumable:
        if not isinstance(self.dataset, Resumable):
            raise SubjectError("only a loader of a queue, or of a sampler with num_patches, can be resumed")
        return self.dataset
