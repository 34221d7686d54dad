"""A data set of subjects, and a loader whose batches are `SubjectsBatch`."""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader, Dataset

from ..core.sizes import type_names
from ..errors import SizeError, SubjectError
from .batch import SubjectsBatch, collate_subjects
from .subject import Subject

__all__ = ["SubjectsDataset", "SubjectsLoader"]

Transform = Callable[[Subject], Subject]


class SubjectsDataset(Dataset[Subject]):
    """A map-style data set of subjects, of which each access gives a copy.

    Args:
        subjects: the subjects.
        transform: function that takes a subject and returns one; applied to the copy.
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

    def __init__(self, subjects: Sequence[Subject], transform: Transform | None = None, load_getitem: bool = True) -> None:
        if isinstance(subjects, Subject) or not isinstance(subjects, Sequence):
            raise SubjectError(f"a data set is made of a list of subjects, not of {type(subjects).__name__}")
        if not subjects:
            raise SubjectError("a data set needs at least one subject, but the list is empty")
        for number, subject in enumerate(subjects):
            if not isinstance(subject, Subject):
                raise SubjectError(f"item {number} of a data set is of type {type(subject).__name__}, not a subject")
        self._subjects = list(subjects)
        self.load_getitem = load_getitem
        self.set_transform(transform)

    def set_transform(self, transform: Transform | None) -> None:
        """Set the function that is applied to each subject.

        Raises:
            SubjectError: if it cannot be called.
        """
        if transform is not None and not callable(transform):
            raise SubjectError(f"the transform is of type {type(transform).__name__}, which cannot be called")
        self.transform = transform

    def dry_iter(self) -> list[Subject]:
        """Give the subjects themselves, neither copied nor loaded nor transformed."""
        return self._subjects

    def __len__(self) -> int:
        return len(self._subjects)

    def __getitem__(self, index: int) -> Subject:
        if not hasattr(index, "__index__"):
            raise SizeError(
                f"the index of a subject is {index!r}, {type_names.get(type(index), type(index).__name__)}, not a number"
            )
        subject = copy.deepcopy(self._subjects[index])
        if self.load_getitem:
            subject.load()
        return subject if self.transform is None else self.transform(subject)

    def __iter__(self) -> Iterator[Subject]:
        return (self[index] for index in range(len(self)))


class SubjectsLoader(DataLoader[Any]):
    """PyTorch's `DataLoader`, with batches of the type `SubjectsBatch`.

    Args:
        dataset: a `SubjectsDataset`, a sampler, or any other data set of subjects.
        batch_size: subjects in a batch.
        **kwargs: whatever else `DataLoader` takes.

    Example:
        >>> import torch, voxloom as vx
        >>> subject = vx.Subject(t1=vx.ScalarImage(torch.rand(1, 20, 20, 20)))
        >>> loader = vx.SubjectsLoader(vx.GridSampler(subject, patch_size=10), batch_size=4)
        >>> [batch.batch_size for batch in loader]
        [4, 4]
    """

    def __init__(self, dataset: Dataset[Any], batch_size: int | None = 1, **kwargs: Any) -> None:
        kwargs.setdefault("collate_fn", collate_subjects if batch_size is not None or "batch_sampler" in kwargs else None)
        super().__init__(dataset, batch_size=batch_size, **kwargs)

    def __iter__(self) -> Iterator[SubjectsBatch]:  # type: ignore[override]
        return super().__iter__()
