"""What is in a data set, as far as it can be known without loading anything."""

import bisect
from collections.abc import Sequence
from typing import Any

from torch.utils.data import ConcatDataset, Subset

from .libraries import as_subject
from .subject import Subject

__all__ = ["TRANSFORMS", "dry_subjects_of", "gives_copies", "leaf_at", "leaves_of", "name_of", "transforms_of"]

TRANSFORMS = ("transform", "_transform")
"""Attributes in which data sets keep their transform; TorchIO 1 has it under the second name."""


def dry_subjects_of(dataset: Any) -> Sequence[Subject] | None:
    """Give the subjects of a data set, or of a part of one, neither loaded nor transformed; None if it does not have them."""
    if isinstance(dataset, Subset):
        whole = dry_subjects_of(dataset.dataset)
        return None if whole is None else [whole[index] for index in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        parts = [dry_subjects_of(part) for part in dataset.datasets]
        return None if None in parts else [subject for part in parts if part is not None for subject in part]
    if not hasattr(dataset, "dry_iter"):
        return None
    return [as_subject(subject, f"item {number} of the data set") for number, subject in enumerate(dataset.dry_iter())]


def transforms_of(dataset: Any) -> list[Any]:
    """Give the transforms of a data set, of the one that it is a part of, or of those that it consists of."""
    own = [getattr(leaf, name, None) for leaf in leaves_of(dataset) for name in TRANSFORMS]
    return [each for each in own if each is not None]


def leaves_of(dataset: Any) -> list[Any]:
    """Give the data sets that one consists of, or is a part of: itself, if neither."""
    if _is_part(dataset):
        return leaves_of(dataset.dataset)
    if _is_sum(dataset):
        return [leaf for part in dataset.datasets for leaf in leaves_of(part)]
    return [dataset]


def _is_part(dataset: Any) -> bool:
    """Whether a data set gives what another one gives; a class of the user's may do more."""
    return isinstance(dataset, Subset) and type(dataset).__getitem__ is Subset.__getitem__


def _is_sum(dataset: Any) -> bool:
    return isinstance(dataset, ConcatDataset) and type(dataset).__getitem__ is ConcatDataset.__getitem__


def leaf_at(dataset: Any, index: int) -> int:
    """Say which of its `leaves_of` gives the subject of an index."""
    if _is_part(dataset):
        return leaf_at(dataset.dataset, int(dataset.indices[index]))
    if _is_sum(dataset):
        index %= len(dataset)  # those of a `Subset` may count from the end
        number = bisect.bisect_right(dataset.cumulative_sizes, index)
        first = dataset.cumulative_sizes[number - 1] if number else 0
        before = sum(len(leaves_of(part)) for part in dataset.datasets[:number])
        return before + leaf_at(dataset.datasets[number], index - first)
    return 0


def gives_copies(dataset: Any) -> bool:
    """Whether a transform may change in place what a data set gives, as it may what a `SubjectsDataset` gives."""
    if isinstance(dataset, Subset):
        return gives_copies(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        return all(map(gives_copies, dataset.datasets))
    return bool(getattr(dataset, "gives_copies", False))


def name_of(dataset: Any, index: int) -> str:
    """Name a subject of a data set, with the files that it is made of."""
    subjects = dry_subjects_of(dataset)
    images = {} if subjects is None else subjects[index].images
    paths = [f"{name}: {image.path}" for name, image in images.items() if image.path is not None]
    return f"subject {index}" + (f" ({', '.join(paths)})" if paths else "")
