"""What a plan's numbers stand for: the model, its activations, and the reductions of its results."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..errors import OutputError
from ..io.protocols import VolumeSource, VolumeStore
from ..models.outputs import Name, OutputRequest, called
from ..models.running import Models
from .planning.plan import Batch, PredictionPlan
from .reductions import Reduction

__all__ = ["Executor", "FirstBatch", "Runner"]


@dataclass(frozen=True, eq=False)
class Runner:
    """Computes what a plan asks for.

    Args:
        models: the model.
        requests: its outputs, in the order of the plan's.
        reductions: what the plan's results are made by.
    """

    models: Models
    requests: Sequence[OutputRequest]
    reductions: Sequence[Reduction]

    def run(self, batch: Tensor, read_again: Callable[[], Tensor], only: int | None = None) -> list[Tensor]:
        """Give the outputs for a batch: one tensor `(B, C, I, J, K)` for each, or for one alone."""
        requests = list(self.requests if only is None else self.requests[only : only + 1])

        def requests_for(names: list[Name]) -> list[OutputRequest]:
            return requests

        return self.models.run(batch, requests_for, read_again)

    def check(self, plan: PredictionPlan, outputs: Sequence[Tensor], batch_size: int) -> None:
        """Check that outputs are what the plan says.

        Raises:
            OutputError: says in what they differ.
        """
        for spec, output in zip(plan.outputs, outputs, strict=True):
            expected = (batch_size, spec.channels, *spec.size(plan.grid.patch_size))
            if tuple(output.shape) != expected or output.dtype != spec.dtype:
                raise OutputError(
                    f"{called(spec.source)} of the model changed: it was {spec.dtype} of shape {expected} at first, and is"
                    f" {output.dtype} of shape {tuple(output.shape)} now"
                )


@dataclass(eq=False)
class FirstBatch:
    """A batch that was run before there was a plan, to see what the outputs look like."""

    patches: Batch
    outputs: list[Tensor]

    def is_of(self, patches: Batch) -> bool:
        """Whether it is the batch of these patches."""
        return self.patches == patches

    def take(self) -> list[Tensor]:
        """Give the outputs, which are kept no longer."""
        outputs, self.outputs = self.outputs, []
        return outputs


class Executor(Protocol):
    """Carries out plans."""

    def run(
        self,
        plan: PredictionPlan,
        runner: Runner,
        source: VolumeSource,
        stores: Sequence[VolumeStore],
        start: int = 0,
        *,
        stop: int | None = None,
        first: FirstBatch | None = None,
        slab_finished: Callable[[], object] = lambda: None,
        progress: Callable[[int], object] = lambda patches: None,
    ) -> list[str]:
        """Compute what is left of a plan, and write it.

        Args:
            plan: the plan.
            runner: the model, and what is made of its outputs.
            source: the input; boxes of the plan's grid can be read from it, also where they reach beyond the volume.
            stores: where the plan's results go; they have been created or reopened, and are not committed here.
            start: slabs that were finished earlier, counted over all blocks.
            stop: the slab to end before; None for all. It is in the last block.
            first: the first batch, if it has been run already.
            slab_finished: called when all of a slab has been written.
            progress: is told of patches that have been computed.

        Returns:
            The warnings that were given.

        Raises:
            OutputError: if the model returns something else than it did, or NaN.
            Exception: whatever reading, the model, a reduction or a store raises.
        """
        ...

    @property
    def kept_bytes(self) -> int:
        """Memory that is kept for the next prediction."""
        ...
