"""Random patches: what all samplers of them share, and the uniform one."""

import functools
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, TypedDict, Unpack, overload

import numpy as np
import torch
import torch.distributed
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from ..core.arguments import known_arguments
from ..core.boxes import Box
from ..core.grid.grids import PatchGrid
from ..core.locations import PatchLocation
from ..core.padding import check_padding_mode
from ..core.random_numbers import draw_generator
from ..core.sizes import Ints, as_int, as_sizes
from ..errors import LocationError, SamplingError, SizeError, SubjectError
from ..runtime.epochs import EpochCounter
from ..runtime.ranks import check_ranks, rank_and_size
from ..volumes.libraries import as_subject
from ..volumes.loading import state_of_draws
from ..volumes.subject import Subject
from .patches import ExtractingCutter, NumberedPatches, PatchCutter, PatchSequence
from .spelling import subject_may_be_left_out

__all__ = ["PatchSampler", "Sizes", "UniformSampler"]

Sizes = int | Sequence[int]
Draw = tuple[int, int]
"""Epoch and number of a draw."""


class Options(TypedDict, total=False):
    """What all random samplers may be given by name; see `PatchSampler`."""

    seed: int | None
    padding_mode: str | float | None
    fill: float
    check_space: bool
    share_ranks: bool | None


# Asked for anew at every draw.
@functools.lru_cache(maxsize=256)
def _domain(spatial_shape: Ints, patch_size: Ints, is_padded: bool) -> Box:
    return PatchGrid.cover(spatial_shape, patch_size, padded=is_padded).box


class PatchSampler(IterableDataset[Subject]):
    """Base of all samplers of random patches, to be extended with one method, `locate`.

    Draw *n* of an epoch is a pure function of the seed, the epoch and *n*: it does not depend on workers, ranks, or other
    draws, and leaves the random states of Python, NumPy and PyTorch alone. Every new pass is a new epoch.

    Args:
        subject: the subject that patches are drawn from: the sampler is then an `IterableDataset`, whose draws a loader's
            workers share. Or, in its place, the patch size: the sampler is then called with a subject.
        patch_size: voxels of a patch `(I, J, K)`, or one number for all axes.
        num_patches: patches in an epoch, 0 for none, None for no end.
        seed: of the draws; by default `torch.initial_seed()` as it is now, so that `torch.manual_seed` reproduces a run.
        padding_mode: what to pad an axis with that is shorter than a patch; None makes that an error. See `GridSampler`.
        fill: what `"constant"` pads with.
        check_space: check that all images of the subject lie on one another.
        share_ranks: let each rank of `torch.distributed` make its share of the draws, all as many, instead of all of them; by
            default they do where it is initialized.

    Raises:
        SizeError, ModeError, SpaceError: see `GridSampler`; `num_patches` must not be negative.

    Example:
        >>> import torch, voxloom as vx
        >>> class CornerSampler(vx.PatchSampler):
        ...     def locate(self, subject, rng):
        ...         return [int(rng.integers(2)) * (size - 4) for size in subject.spatial_shape]
        >>> subject = vx.Subject(t1=vx.ScalarImage(torch.rand(1, 8, 8, 8)))
        >>> [patch.t1.spatial_shape for patch in CornerSampler(subject, 4, num_patches=2)]
        [(4, 4, 4), (4, 4, 4)]
    """

    @overload
    def __init__(self, subject: Subject, patch_size: Sizes, num_patches: int | None = None, **more: Unpack[Options]) -> None: ...
    @overload
    def __init__(
        self, subject: Sizes, patch_size: int | None = None, num_patches: int | None = None, **more: Unpack[Options]
    ) -> None: ...
    @overload
    def __init__(self, *, patch_size: Sizes, num_patches: int | None = None, **more: Unpack[Options]) -> None: ...
    @subject_may_be_left_out()
    @known_arguments
    def __init__(
        self,
        subject: Any = None,
        patch_size: Any = None,
        num_patches: Any = None,
        *,
        seed: int | None = None,
        padding_mode: str | float | None = None,
        fill: float = 0,
        check_space: bool = True,
        share_ranks: bool | None = None,
    ) -> None:
        if patch_size is None:
            raise SizeError(f"the patch size is missing: {type(self).__name__}(subject, patch_size)")
        self.patch_size = as_sizes(patch_size, 3, "patch_size")
        self.num_patches = None if num_patches is None else as_int(num_patches, "num_patches", 0)
        self.padding_mode = padding_mode
        self.check_space = check_space
        self.share_ranks = share_ranks
        self._ranks: tuple[int, int] | None = None
        """Rank and number of ranks where this was made, if that was another process."""
        self._mode = None if padding_mode is None else check_padding_mode(padding_mode, fill)
        self.seed_was_given = seed is not None
        self._epochs = EpochCounter(torch.initial_seed() if seed is None else as_int(seed, "seed", -(2**63)))
        self._position: Draw = (0, 0)
        self.subject: Subject | None = subject
        self._cutter = None if subject is None else self._bind(subject)

    @property
    def seed(self) -> int:
        """What all draws follow from; workers see it change."""
        return self._epochs.seed

    @seed.setter
    def seed(self, seed: int) -> None:
        self._epochs.seed = as_int(seed, "seed", -(2**63))

    @abstractmethod
    def locate(self, subject: Subject, rng: np.random.Generator) -> Sequence[int]:
        """Say where a patch begins.

        Args:
            subject: the subject that the patch is cut from.
            rng: random numbers of this draw alone; no others should be used.

        Returns:
            Index of the first voxel `(I, J, K)`, in the frame of the volume. The patch must lie in `self.domain(subject)`.
        """
        raise NotImplementedError

    def prepare(self, subject: Subject) -> bool:
        """Do what need be done once for a subject, before workers start, and say whether it has any patches."""
        return True

    def domain(self, subject: Subject) -> Box:
        """Voxels from which patches may be cut: the volume, and more of an axis that is shorter than a patch and padded.

        Raises:
            SizeError: if the volume is smaller than a patch, and not padded.
        """
        return _domain(subject.spatial_shape, tuple(self.patch_size), self._mode is not None)

    def _bind(self, subject: Subject) -> PatchCutter:
        if self.check_space:
            subject.check_space()
        domain = self.domain(subject)
        if type(self).extract_patch is PatchSampler.extract_patch:
            return PatchCutter(subject, domain, self._mode)
        return ExtractingCutter(subject, domain, self._mode, self.extract_patch)

    def extract_patch(self, subject: Subject, index_ini: Sequence[int]) -> Subject:
        """Cut a patch out of a subject; a sampler of one's own may do it in another way, or do more to it.

        Args:
            subject: the subject.
            index_ini: where the patch begins `(I, J, K)`, in the frame of the volume.
        """
        subject = as_subject(subject, "the subject")
        location = PatchLocation(tuple(int(value) for value in index_ini), self.patch_size)
        return PatchCutter(subject, self.domain(subject), self._mode).cut(location)

    def _draw(self, cutter: PatchCutter, draw: Draw, seed: int | None = None, subject_index: int = 0) -> PatchLocation:
        """Find the location of a draw."""
        epoch, number = draw
        rng = draw_generator(self.seed if seed is None else seed, epoch, number, subject_index)
        index = self.locate(cutter.subject, rng)
        location = PatchLocation(tuple(int(value) for value in index), self.patch_size)
        if location.box not in cutter.domain:
            raise LocationError(
                f"{type(self).__name__}.locate returned {location.index}, where a patch of {self.patch_size} would not lie in"
                f" the voxels {cutter.domain.start} to {cutter.domain.stop}"
            )
        return location

    # A data set that is bound to a subject

    def _parts(self) -> PatchCutter:
        if self._cutter is None:
            raise SubjectError(
                f"the sampler has no subject: make {type(self).__name__}(subject, patch_size), or call it with one"
            )
        return self._cutter

    def _rank(self) -> tuple[int, int]:
        return (0, 1) if self.share_ranks is False else self._ranks or rank_and_size()

    def __getstate__(self) -> dict[str, Any]:
        # A loader's worker is not one of the ranks; what is sent before there are any may go to a process that becomes one.
        found = rank_and_size()
        return self.__dict__ | {"_ranks": self._ranks or (found if found != (0, 1) else None)}

    def first(self, epoch: int) -> int:
        """Say at which draw of the rank's share an epoch begins: not at 0 where it is resumed."""
        started, draw = self._epochs.start
        return draw if started == epoch else 0

    def numbers(self, epoch: int, worker: int = 0, workers: int = 1) -> Iterator[int]:
        """Give the numbers of the draws that a worker of this rank makes in an epoch, from where it was left."""
        if self.share_ranks is None and self._ranks is None:
            check_ranks()
        rank, ranks = self._rank()
        share = self.first(epoch) + worker
        while self.num_patches is None or share * ranks < self.num_patches:
            yield share * ranks + rank
            share += workers

    def __len__(self) -> int:
        if self.num_patches is None:
            raise TypeError("the sampler has no end, and so no length: give num_patches")
        _, ranks = self._rank()
        return -(-self.num_patches // ranks) if self._cutter is None or self.prepare(self._parts().subject) else 0

    def __iter__(self) -> Iterator[Subject]:
        cutter = self._parts()
        worker = get_worker_info()
        epoch = self._epochs.begin()
        if not self.prepare(cutter.subject):
            return
        first = self.first(epoch)
        shares = self.numbers(epoch, *((0, 1) if worker is None else (worker.id, worker.num_workers)))
        for done, number in enumerate(shares, start=first + 1):
            self._position = (epoch, done)
            yield cutter.cut(self._draw(cutter, (epoch, number)))
        self._position = (epoch + 1, 0)

    def __call__(self, subject: Subject | None = None, num_patches: int | None = None) -> Iterator[Subject]:
        """Give patches of a subject, or of the sampler's own, one by one: a new epoch each time.

        Args:
            subject: the subject.
            num_patches: how many; by default as many as the sampler was made with, and if that said nothing, without end.
        """
        cutter = self._parts() if subject is None else self._bind(as_subject(subject, "the subject"))
        limit = self.num_patches if num_patches is None else as_int(num_patches, "num_patches", 0)
        return self._patches(cutter, limit)

    def _patches(self, cutter: PatchCutter, limit: int | None) -> Iterator[Subject]:
        if not self.prepare(cutter.subject):
            return
        epoch, number = self._epochs.begin(), 0
        self._position = (epoch + 1, 0)
        while limit is None or number < limit:
            yield cutter.cut(self._draw(cutter, (epoch, number)))
            number += 1

    def state_dict(self) -> dict[str, int]:
        """Say where a pass in this process has come to: with it, `load_state_dict` continues with the very next draw.

        Raises:
            SamplingError: in one of several workers of a loader, since each makes a part of the draws.
        """
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise SamplingError(
                f"how far a sampler is cannot be said in one of {worker.num_workers} workers, since each makes a part of the"
                " draws: take the state of a SubjectsLoader"
            )
        epoch, draw = self._position
        return {"seed": self.seed, "epoch": epoch, "draw": draw}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            SubjectError: if that is no state of a sampler.
        """
        self.seed, epoch, draw = state_of_draws(state)
        self.seek(epoch, draw)

    def seek(self, epoch: int, draw: int) -> None:
        """Let the next pass be this epoch, and begin at this draw of the rank's share."""
        self._epochs.seek(epoch, draw)
        self._position = (epoch, draw)

    # What a queue makes of it

    def grid_of(self, subject: Subject) -> None:
        """Say that patches may lie anywhere."""

    def numbered(self, subject: Subject, seed: int, epoch: int, subject_index: int) -> NumberedPatches | None:
        """Give the draws from a subject by their numbers, in one epoch; None if nothing can be drawn from it."""
        cutter = self._bind(subject)
        if not self.prepare(cutter.subject):
            return None
        return NumberedPatches(cutter, subject_index, lambda number: self._draw(cutter, (epoch, number), seed, subject_index))

    # What a loader makes of it

    def begin_epoch(self) -> int:
        """Number a new pass."""
        return self._epochs.begin()

    @property
    def upcoming(self) -> Draw:
        """Epoch and first draw of the next pass."""
        epoch = self._epochs.upcoming
        return epoch, self.first(epoch)

    def indexed(self) -> "IndexedDraws":
        """Give the draws as a map-style data set, whose indices are seed, epoch and number."""
        return IndexedDraws(self, self._parts())

    def __repr__(self) -> str:
        number = "endless" if self.num_patches is None else str(self.num_patches)
        return f"{type(self).__name__}({number} patches of {self.patch_size})"


class IndexedDraws(Dataset[Subject]):
    """The draws of a sampler, any of which can be made at any time."""

    def __init__(self, sampler: PatchSampler, cutter: PatchCutter) -> None:
        self.sampler = sampler
        self.cutter = cutter
        sampler.prepare(cutter.subject)

    def __getitem__(self, index: tuple[int, int, int]) -> Subject:
        return self.cutter.cut(self._locate(index))

    def __getitems__(self, indices: Sequence[tuple[int, int, int]]) -> PatchSequence:
        return PatchSequence(self.cutter, [self._locate(index) for index in indices])

    def _locate(self, index: tuple[int, int, int]) -> PatchLocation:
        seed, epoch, number = index
        return self.sampler._draw(self.cutter, (epoch, number), seed)

    def __len__(self) -> int:
        return len(self.sampler)


class UniformSampler(PatchSampler):
    """Draw patches from anywhere, each place with the same probability. See `PatchSampler` for the arguments.

    Example:
        >>> import torch, voxloom as vx
        >>> subject = vx.Subject(t1=vx.ScalarImage(torch.rand(1, 8, 8, 8)))
        >>> [patch.t1.shape for patch in vx.UniformSampler(4)(subject, num_patches=2)]
        [(1, 4, 4, 4), (1, 4, 4, 4)]
        >>> len(vx.UniformSampler(subject, patch_size=4, num_patches=200))
        200
    """

    def locate(self, subject: Subject, rng: np.random.Generator) -> Ints:
        """Draw the start on each axis."""
        domain = self.domain(subject)
        return tuple(
            int(rng.integers(first, last - size, endpoint=True))
            for first, last, size in zip(domain.start, domain.stop, self.patch_size, strict=True)
        )
