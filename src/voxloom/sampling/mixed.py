"""Random patches, each drawn with one of several samplers."""

import copy
from collections.abc import Sequence
from typing import Any, overload

import numpy as np

from ..errors import SamplingError, SizeError, SubjectError
from ..volumes.subject import Subject
from .random import PatchSampler
from .shares import as_probabilities, pick_share
from .spelling import subject_may_be_left_out

__all__ = ["MixedSampler"]

Mixture = Sequence[tuple[float, PatchSampler]]


class MixedSampler(PatchSampler):
    """Draw each patch with one of several samplers, as nnU-Net mixes patches of the foreground with patches from anywhere.

    Source: Isensee et al., nnU-Net, Nature Methods 18, 203-211 (2021), https://doi.org/10.1038/s41592-020-01008-z.

    Args:
        subject: see `PatchSampler`; or, in its place, the samplers.
        samplers: pairs of how often a sampler is used, in any unit, and the sampler, made without a subject. All must have the
            same patch size. How the mixture is padded counts for all of them.
        num_patches: see `PatchSampler`.
        **more: see `PatchSampler`.

    Example:
        >>> import voxloom as vx
        >>> phantom = vx.datasets.HeadPhantom(32)
        >>> by_label, uniform = vx.LabelSampler(8, "labels", {7: 1}), vx.UniformSampler(8)
        >>> mixed = vx.MixedSampler(phantom, [(1 / 3, by_label), (2 / 3, uniform)], num_patches=6)
        >>> len(list(mixed))
        6
    """

    @overload
    def __init__(self, subject: Subject, samplers: Mixture, num_patches: int | None = None, **more: Any) -> None: ...
    @overload
    def __init__(self, subject: Mixture, **more: Any) -> None: ...
    @overload
    def __init__(self, *, samplers: Mixture, **more: Any) -> None: ...
    @subject_may_be_left_out()
    def __init__(self, subject: Any = None, samplers: Any = None, num_patches: Any = None, **more: Any) -> None:
        pairs = list(samplers or [])
        are_pairs = all(isinstance(pair, Sequence) and len(pair) == 2 for pair in pairs)
        if not pairs or not are_pairs or not all(isinstance(sampler, PatchSampler) for _, sampler in pairs):
            raise SubjectError(f"samplers is {samplers!r}: it must be a list of pairs of a number and a sampler")
        seeded = next((sampler for _, sampler in pairs if sampler.seed_was_given), None)
        if seeded is not None:
            raise SamplingError(
                f"{seeded!r} of the mixture has the seed {seeded.seed}, which would not be used: give the mixture a seed"
            )
        sizes = {sampler.patch_size for _, sampler in pairs}
        if len(sizes) > 1:
            raise SizeError(f"the samplers of a mixture must have one patch size, but they have {sorted(sizes)}")
        shares = as_probabilities(dict(enumerate(share for share, _ in pairs)), "the mixture")
        self.samplers = [(shares[number], sampler) for number, (_, sampler) in enumerate(pairs) if shares[number] > 0]
        if not self.samplers:
            raise SamplingError("all samplers of the mixture have probability 0")
        super().__init__(subject, patch_size=sizes.pop(), num_patches=num_patches, **more)
        self.samplers = [(share, self._padded_alike(sampler)) for share, sampler in self.samplers]
        if self._cutter is not None:
            self.prepare(self._cutter.subject)

    def _padded_alike(self, sampler: PatchSampler) -> PatchSampler:
        """Copy a sampler, so that it draws from what the mixture cuts from."""
        alike = copy.copy(sampler)
        alike._mode = self._mode
        if isinstance(alike, MixedSampler):
            alike.samplers = [(share, self._padded_alike(inner)) for share, inner in alike.samplers]
        return alike

    def prepare(self, subject: Subject) -> bool:
        """Prepare all samplers; those that skip the subject drop out."""
        return bool(self._usable(subject))

    def locate(self, subject: Subject, rng: np.random.Generator) -> Sequence[int]:
        """Draw the sampler, and let it locate the patch."""
        usable = self._usable(subject)
        number = pick_share({number: share for number, (share, _) in enumerate(usable)}, rng)
        return usable[number][1].locate(subject, rng)

    def _usable(self, subject: Subject) -> list[tuple[float, PatchSampler]]:
        return [(share, sampler) for share, sampler in self.samplers if sampler.prepare(subject)]
