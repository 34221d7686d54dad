"""Cutting patches out of a subject."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, overload, runtime_checkable

import torch
from torch import Tensor

from ..core.boxes import Box
from ..core.grid.grids import PatchGrid
from ..core.locations import PatchLocation
from ..core.sizes import Ints
from ..errors import SamplingError
from ..runtime import memory
from ..volumes.batch import ImagesBatch, SubjectsBatch, batch_memory
from ..volumes.constants import PATCH_LOCATION
from ..volumes.images.copies import own
from ..volumes.subject import Subject
from .padded import PaddedSource

__all__ = ["ExtractingCutter", "MakeEmpty", "NumberedPatches", "PatchCutter", "PatchSequence", "PatchSource"]

MakeEmpty = Callable[[Sequence[int], torch.dtype], Tensor]
"""Makes a tensor whose values are not set."""


class PatchCutter:
    """Cuts patches out of one subject, which it only reads.

    Args:
        subject: the subject; files that cannot be read in parts are read whole, once, before any worker is started.
        domain: voxels from which patches may be cut; it reaches beyond the volume where that is padded.
        padding_mode: a number, or a mode; None where nothing is padded.
    """

    def __init__(self, subject: Subject, domain: Box, padding_mode: str | float | int | None) -> None:
        self.domain = domain
        self.subject = copy.copy(subject)  # entries that are added or replaced later belong to no patch
        for image in subject.images.values():
            image.prepare()
        self._padded: Mapping[str, PaddedSource] = {
            name: PaddedSource(image, domain, padding_mode, name) for name, image in subject.images.items()
        }

    def cut(self, location: PatchLocation, empty: MakeEmpty = memory.empty) -> Subject:
        """Cut out one patch, which owns its memory, and its metadata."""
        entries = dict(self.subject)
        for name in entries:
            if name in self._padded:
                padded = self._padded[name]
                data = empty((padded.shape[0], *location.size), padded.dtype)
                padded.read_into(data, location.box)
                entries[name] = entries[name].part(data, location.index)
            else:
                entries[name] = own(entries[name])
        return Subject(entries | {PATCH_LOCATION: location})

    def cut_batch(self, locations: Sequence[PatchLocation]) -> SubjectsBatch:
        """Cut patches of one size straight into the memory of a batch."""
        batches = {}
        for name, padded in self._padded.items():
            shape = (len(locations), padded.shape[0], *locations[0].size)
            data = batch_memory(shape, padded.dtype)
            for target, location in zip(data, locations, strict=True):
                padded.read_into(target, location.box)
            image = self.subject.images[name]
            images = [image.part(target, location.index) for target, location in zip(data, locations, strict=True)]
            batches[name] = ImagesBatch(data, images)
        metadata = {name: [own(value) for _ in locations] for name, value in self.subject.metadata.items()}
        return SubjectsBatch(batches, metadata | {PATCH_LOCATION: list(locations)})


class ExtractingCutter(PatchCutter):
    """Cuts patches out by a function of the user's.

    Args:
        subject: see `PatchCutter`, also for what follows.
        domain: voxels from which patches may be cut.
        padding_mode: a number, or a mode.
        extract: takes the subject and where a patch begins, and returns it.
    """

    def __init__(
        self,
        subject: Subject,
        domain: Box,
        padding_mode: str | float | int | None,
        extract: Callable[[Subject, Ints], Subject],
    ) -> None:
        super().__init__(subject, domain, padding_mode)
        self._extract = extract

    def cut(self, location: PatchLocation, empty: MakeEmpty = memory.empty) -> Subject:
        """See `PatchCutter`."""
        patch = self._extract(self.subject, location.index)
        if not isinstance(patch, Subject):
            raise SamplingError(f"extract_patch returned {type(patch).__name__}: it must return a Subject")
        patch = copy.copy(patch)  # it may be the subject itself
        for name, value in patch.metadata.items():
            patch[name] = own(value)
        for name, image in patch.images.items():
            patch[name] = copy.copy(image)
            patch[name].metadata = own(image.metadata)
        patch[PATCH_LOCATION] = location
        return patch

    def cut_batch(self, locations: Sequence[PatchLocation]) -> SubjectsBatch:
        """See `PatchCutter`."""
        return SubjectsBatch.from_subjects([self.cut(location) for location in locations])


class PatchSequence(Sequence[Subject]):
    """Patches that are cut when they are asked for, or all at once into a batch."""

    def __init__(self, cutter: PatchCutter, locations: Sequence[PatchLocation]) -> None:
        self.cutter = cutter
        self.locations = locations

    def __len__(self) -> int:
        return len(self.locations)

    @overload
    def __getitem__(self, index: int) -> Subject: ...
    @overload
    def __getitem__(self, index: slice) -> "PatchSequence": ...
    def __getitem__(self, index: int | slice) -> "Subject | PatchSequence":
        if isinstance(index, slice):
            return PatchSequence(self.cutter, self.locations[index])
        return self.cutter.cut(self.locations[index])

    def __iter__(self) -> Iterator[Subject]:
        return map(self.cutter.cut, self.locations)

    def to_batch(self) -> SubjectsBatch:
        """Make a batch of all patches."""
        return self.cutter.cut_batch(self.locations)


@dataclass(frozen=True)
class NumberedPatches:
    """The patches of one subject, each of which has a number and can be made at any time."""

    cutter: PatchCutter
    subject_index: int
    """Index of the subject in its data set."""
    locate: Callable[[int], PatchLocation]
    """Says where the patch of a number lies."""

    def cut(self, number: int, empty: MakeEmpty = memory.empty) -> Subject:
        """Cut out one patch, which knows which subject it is from."""
        return self.cutter.cut(replace(self.locate(number), subject_index=self.subject_index), empty)


@runtime_checkable
class PatchSource(Protocol):
    """A sampler, as a queue of patches of many subjects uses it."""

    patch_size: Ints

    def grid_of(self, subject: Subject) -> PatchGrid | None:
        """Give the grid that all patches of a subject are from, as its headers say; None where they may lie anywhere."""
        ...

    def numbered(self, subject: Subject, seed: int, epoch: int, subject_index: int) -> NumberedPatches | None:
        """Give the patches of a subject by their numbers, in one epoch; None if it has none."""
        ...
