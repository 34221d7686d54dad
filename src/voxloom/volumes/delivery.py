"""What happens to a batch between the loader and the training step: onto the device, one batch ahead, and transformed there."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..core.random_numbers import Purpose, seed_words
from ..errors import SubjectError
from ..runtime.devices import as_device
from ..runtime.ranks import rank_and_size
from ..runtime.seeding import reseed, seeded
from .batch import SubjectsBatch
from .transforms import as_batch_transform

__all__ = ["Delivery", "Fetched"]


@dataclass
class Fetched:
    """A batch, and what was known when it was fetched."""

    batch: Any
    key: tuple[int, int, int]
    """Seed, epoch, and the number of the batch in it: what its random numbers follow from."""
    state: Any = None
    """What the loader notes when the batch has been delivered."""


class Delivery:
    """Brings batches to a device, one ahead of the one that is worked on, and transforms them there.

    Args:
        device: where to; None leaves them where they are.
        batch_transform: function of a `SubjectsBatch` that returns one, or a transform of another library.

    Raises:
        ModeError: if there is no such device.
        SubjectError: if the transform cannot be called.
    """

    def __init__(self, device: Any, batch_transform: Any) -> None:
        self.device = None if device is None else as_device(device)
        self.transform = as_batch_transform(batch_transform, "batch_transform")
        self._stream: Any = None

    def of(self, fetched: Iterator[Fetched]) -> Iterator[Fetched]:
        """Give batches as they are delivered: while one is worked on, the next is on its way."""
        before: Fetched | None = None
        for each in fetched:
            each.batch = self._sent(each.batch)
            if before is not None:
                yield self._arrived(before)
            before = each
        if before is not None:
            yield self._arrived(before)

    def _sent(self, batch: Any) -> Any:
        if not isinstance(batch, SubjectsBatch):
            raise SubjectError(
                f"device= and batch_transform= are for batches of subjects, and the loader gave a {type(batch).__name__}: give it"
                " a batch_size"
            )
        if self.device is None:
            return batch
        if self.device.type != "cuda":
            return batch.to(self.device)
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            return batch.pin_memory().to(self.device, non_blocking=True)

    def _arrived(self, fetched: Fetched) -> Fetched:
        if self._stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self._stream)
            for images in fetched.batch.images.values():
                images.data.record_stream(current)
        if self.transform is not None:
            fetched.batch = self._transformed(fetched)
        return fetched

    def _transformed(self, fetched: Fetched) -> Any:
        """Transform a batch, with random numbers that follow from its number alone, on each rank other ones."""
        words = seed_words(*fetched.key, rank_and_size()[0], Purpose.BATCH_TRANSFORM)
        devices = [self.device] if self.device is not None and self.device.type == "cuda" else []
        with seeded(words, is_alone=False), torch.random.fork_rng(devices, enabled=bool(devices)):
            if devices:
                torch.cuda.manual_seed(words[2])
            reseed(self.transform, itertools.count(words[3]))
            made = self.transform(fetched.batch) if self.transform is not None else fetched.batch
        if not isinstance(made, SubjectsBatch):
            raise SubjectError(f"batch_transform returned something of type {type(made).__name__}, not a SubjectsBatch")
        return made
