"""What comes before a prediction: the input, the patches that are needed, what the model gives, and the plan."""

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..core.grid.grids import PatchGrid
from ..io.fingerprints import state_of_model
from ..io.protocols import Json, VolumeSource
from ..io.spooling import spooled
from ..models.running import Models
from .destinations import Destinations
from .inputs import padded, read_batch, widened
from .masks import looks_at_input, needed_patches
from .planning.outlook import Outlook, Seen
from .planning.plan import Batch, PredictionPlan
from .planning.planner import Planner
from .planning.results import ResultOptions, result_specs
from .planning.settings import Input, Settings
from .provenance import fingerprint_of_models, fingerprint_of_run
from .runner import Executor, FirstBatch

__all__ = ["Preparation"]


@dataclass(eq=False)
class Preparation:
    """Prepares predictions of one model; what is learnt about its outputs is kept from one to the next.

    Args:
        models: the model.
        settings: how it is applied.
        options: which results are wanted.
        executor: what carries plans out.
        model_name: what stands for the model in records; None for a hash.
    """

    models: Models
    settings: Settings
    options: ResultOptions
    executor: Executor
    model_name: str | None

    def __post_init__(self) -> None:
        self._fingerprint: tuple[Json, Json] = (None, None)

    @cached_property
    def planner(self) -> Planner:
        """Makes plans."""
        return Planner(self.settings, self.models.num_passes, lambda: self.executor.kept_bytes)

    @cached_property
    def _outlook(self) -> Outlook:
        return Outlook(self.models, self.settings, self.options)

    def input(self, source: VolumeSource, name: str) -> Input:
        """Say what is to be known of an input before it is read.

        Args:
            source: the input.
            name: what messages call it.
        """
        return self.planner.input(source, name, self.settings.dtype or self.models.weights_dtype or source.dtype)

    def grid(self, given: Input) -> PatchGrid:
        """Say which patches cover an input."""
        return self.settings.grid_of(given.source.shape[1:])

    def masked(self, given: Input, mask: Any, target: Any, stack: contextlib.ExitStack) -> Input:
        """Find the patches that a mask needs; an input that is too large for memory is unpacked for it, until the stack ends."""
        if mask is None:
            return given
        if looks_at_input(mask) and given.packed_bytes:
            plan = self.planned(given, self.seen(given, target), target, was_known=True)
            if plan.spooled_bytes:
                given = replace(given, unpacked=stack.enter_context(spooled(given.source)))
        return replace(given, needed=needed_patches(mask, given.readable, self.grid(given)))

    def readable(self, given: Input) -> VolumeSource:
        """Give an input with what lies around it: boxes of the grid can be read."""
        mode = self.settings.padding_mode
        return padded(given.readable, widened(self.grid(given).box, self.settings.context), 0 if mode is None else mode)

    # What the model gives

    def known(self, given: Input, target: Any) -> Seen | None:
        """Say what is known of the outputs; None if they must be looked at first."""
        return self._outlook.known(given.source.shape[0], given.dtype, target)

    def seen(self, given: Input, target: Any) -> Seen:
        """Say what the outputs look like; if that is not known yet, by a batch of zeros."""
        seen = self.known(given, target)
        if seen is None:
            shape = (self._num_zeros, given.source.shape[0], *self.settings.input_size)
            batch = torch.zeros(shape, dtype=given.dtype)
            with self.models.ready():
                self._outlook.look(batch, target, lambda: torch.zeros_like(batch), given.name, is_real=False)
            seen = self.known(given, target)
            assert seen is not None
        return seen

    @property
    def _num_zeros(self) -> int:
        return self.settings.batch_size if self.settings.full_batches else 1

    def first_batch(self, given: Input, target: Any, readable: Callable[[], VolumeSource]) -> FirstBatch | None:
        """Run the first batch, to see what the outputs look like, if that is not known yet and there is one.

        Args:
            given: the input.
            target: where results go: a dict, if that is by name.
            readable: gives the input with what lies around it.
        """
        patches = () if self.known(given, target) is not None else self._first_patches(given)
        if not patches:
            return None
        grid, size = self.grid(given), self.settings.batch_size if self.settings.full_batches else len(patches)

        def read() -> Tensor:
            return read_batch(readable(), grid, patches, size, given.dtype, False, self.settings.context)

        with self.models.ready():
            return FirstBatch(patches, self._outlook.look(read(), target, read, given.name, is_real=True))

    def _first_patches(self, given: Input) -> Batch:
        """Give the first batch of a plan in one block; empty if it must not be read before there is a plan."""
        if given.packed_bytes:
            return ()  # the input may be too large to be read whole
        traversal = self.planner.traversal(self.grid(given))
        return tuple(itertools.islice(traversal.patches_from(0, traversal.whole, given.needed), self.settings.batch_size))

    # The plan, and what tells it from others

    def planned(self, given: Input, seen: Seen, target: Any, was_known: bool) -> PredictionPlan:
        """Plan a prediction.

        Args:
            given: the input.
            seen: what the outputs look like.
            target: where results go.
            was_known: whether that was known before, so that no batch is run to find it out.
        """
        results = result_specs(
            seen.results,
            seen.outputs,
            seen.samples,
            self.grid(given),
            given.source,
            self.settings.fill,
            given.like,
            given.kinds,
        )
        plan = self.planner.plan(given, seen.outputs, results, Destinations(target))
        patches = self._first_patches(given)
        if was_known or patches == next(plan.batches(plan.blocks[0]), ((), 0))[0] != ():
            return plan
        return replace(plan, trial_patches=len(patches) or self._num_zeros)

    def fingerprint(self, given: Input) -> Json:
        """Say what tells a run from others; that of the models is worked out once for the same weights."""
        state = [state_of_model(model) for model in self.models.models]
        if self._fingerprint[0] != state:
            self._fingerprint = state, fingerprint_of_models(self.models, self.model_name)
        return fingerprint_of_run(self._fingerprint[1], self.models, self.settings, self.options, given)
