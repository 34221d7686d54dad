"""What a queue is made of, checked: each argument may be spelled as in either generation of the API."""

import multiprocessing
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import IterableDataset

from ..core.sizes import as_int
from ..errors import QueueError, SubjectError
from ..runtime.ranks import rank_and_size
from ..sampling.patches import PatchSource
from ..sampling.random import PatchSampler
from ..volumes.loading import SubjectsDataset, as_dataset
from ..volumes.subject import Subject

__all__ = ["as_context", "as_patch_source", "as_ranks", "as_seed", "as_subjects", "one_of"]


def one_of(**given: Any) -> Any:
    """Give the one of an argument's two names that was used."""
    used = {name: value for name, value in given.items() if value is not None}
    if len(used) > 1:
        raise QueueError(f"{' and '.join(used)} are names of the same thing: give one of them")
    return next(iter(used.values()), None)


def as_subjects(given: Any) -> Any:
    """Give a data set of subjects, which a list of them is turned into.

    Raises:
        SubjectError: if that is none, or has no subjects.
    """
    given = as_dataset(given)
    if given is None:
        raise SubjectError("a queue needs subjects: Queue(SubjectsDataset(subjects), ...)")
    if isinstance(given, Sequence) and not isinstance(given, str):
        given = SubjectsDataset(given)
    is_indexed = hasattr(given, "__len__") and hasattr(given, "__getitem__") and not isinstance(given, IterableDataset)
    if isinstance(given, Subject) or not is_indexed:
        raise SubjectError(
            f"a queue needs a data set of subjects with indices and a length, not something of type {type(given).__name__}"
        )
    if len(given) == 0:
        raise SubjectError("a queue needs at least one subject, but the data set is empty")
    return given


def as_patch_source(given: Any) -> PatchSource:
    """Check a sampler.

    Raises:
        QueueError: if it is none.
    """
    if given is None:
        raise QueueError("a queue needs a sampler: Queue(..., sampler=UniformSampler(patch_size=64))")
    if not isinstance(given, PatchSource):
        what = given.__name__ if isinstance(given, type) else f"something of type {type(given).__name__}"
        raise QueueError(
            f"the sampler of a queue is {what}: it must be one of voxloom's, made with a patch size, as UniformSampler(64)"
        )
    return given


def as_context(name: str | None) -> str | None:
    """Check the name of a start method.

    Raises:
        QueueError: if this system does not have it.
    """
    try:
        multiprocessing.get_context(name)
    except ValueError as error:
        methods = ", ".join(map(repr, multiprocessing.get_all_start_methods()))
        raise QueueError(f"multiprocessing_context is {name!r}: it must be one of {methods}") from error
    return name


def as_ranks(rank: int | None, world_size: int | None, subject_sampler: Any) -> tuple[int, int]:
    """Give the rank and the number of ranks: by default those of `torch.distributed`, unless a sampler shares the subjects."""
    if rank is None and world_size is None:
        return (0, 1) if subject_sampler is not None else rank_and_size()
    return as_int(0 if rank is None else rank, "rank", 0), as_int(1 if world_size is None else world_size, "world_size", 1)


def as_seed(seed: int | None, sampler: PatchSource, world_size: int) -> int:
    """Give the seed of everything random: by default that of the sampler, or else PyTorch's.

    Raises:
        QueueError: if ranks that share subjects were given none.
    """
    if seed is None and isinstance(sampler, PatchSampler) and sampler.seed_was_given:
        seed = sampler.seed
    if seed is None and world_size > 1:
        raise QueueError(
            f"the {world_size} ranks of this training share the subjects, and need the same seed to agree on who has which: give"
            " seed, the same on each, or world_size=1 for all subjects on each of them"
        )
    return as_int(torch.initial_seed() if seed is None else seed, "seed", -(2**63))
