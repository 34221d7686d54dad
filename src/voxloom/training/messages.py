"""What travels from a worker: several patches at a time, in one block of shared memory."""

import functools
import math
import pickle
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import memory
from ..sampling.patches import MakeEmpty
from ..volumes.batch import batch_memory
from ..volumes.image import Image
from ..volumes.subject import Subject
from .making import MadePatch, SkippedSubject

__all__ = ["Message", "Packer", "unpack"]

# Where a tensor begins in a block: numbers of every type may begin there.
ALIGNMENT = 64


class Message(NamedTuple):
    """Patches on their way to the queue."""

    run: int
    """Which run of the queue they are for."""
    block: Tensor
    """Data of all images, bytes."""
    contents: bytes
    """Everything else, pickled: so no tensor among the metadata becomes an open file of its own."""
    skipped: tuple[SkippedSubject, ...]


@dataclass(frozen=True, slots=True)
class _Part:
    """An image whose data are in the block."""

    template: Image
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class _Block:
    """Shared memory that tensors are laid into one after the other."""

    def __init__(self, num_bytes: int) -> None:
        self.data = batch_memory((num_bytes,), torch.uint8)
        self._used = 0
        self._offsets: dict[int, int] = {}

    def clear(self) -> None:
        self._used = 0
        self._offsets = {}

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Make a tensor in the block, or, where it has no room left, outside of it."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if self._used + num_bytes > len(self.data):
            return torch.empty(tuple(shape), dtype=dtype)
        part = self.data[self._used : self._used + num_bytes].view(dtype).view(tuple(shape))
        self._offsets[part.data_ptr()] = self._used
        self._used += _aligned(num_bytes)
        return part

    def offset_of(self, tensor: Tensor) -> int | None:
        """Say where in the block a tensor begins; None if it is not one that the block made."""
        is_here = tensor.is_contiguous() and tensor.untyped_storage().data_ptr() == self.data.untyped_storage().data_ptr()
        return self._offsets.get(tensor.data_ptr()) if is_here else None


class Packer:
    """Lays the patches of each message into one of a few blocks, which are used in turn: fresh memory takes time.

    Args:
        num_blocks: messages of which the receiver may not have copied the patches yet when the next one is begun, and one more.
    """

    def __init__(self, num_blocks: int) -> None:
        self._blocks: deque[_Block] = deque(_Block(0) for _ in range(num_blocks))
        self._bytes_per_patch = 0

    def begin(self, num_patches: int) -> MakeEmpty:
        """Begin a message; give the function that makes tensors where they need not be copied to."""
        self._blocks.rotate(-1)
        self._fit(num_patches * self._bytes_per_patch)
        return self._blocks[0].empty

    def _fit(self, num_bytes: int) -> None:
        """Empty the block of this message, and make it large enough."""
        self._blocks[0].clear()
        if len(self._blocks[0].data) < num_bytes:
            self._blocks[0] = _Block(num_bytes)

    def pack(self, run: int, made: Sequence[MadePatch]) -> Message:
        """End a message.

        Args:
            run: which run of the queue it is for.
            made: the patches; those whose data are not in the block, because nobody knew how large they would be, are copied.
        """
        tensors = [image.data for patch in made for image in patch.patch.images.values()]
        sizes = [_aligned(tensor.nbytes) for tensor in tensors]
        self._bytes_per_patch = max(self._bytes_per_patch, -(-sum(sizes) // max(1, len(made))))
        if any(self._blocks[0].offset_of(tensor) is None for tensor in tensors):
            copies = [tensor.clone() for tensor in tensors]
            self._fit(sum(sizes))
            tensors = [self._blocks[0].empty(copy.shape, copy.dtype).copy_(copy) for copy in copies]
        rest = iter(tensors)
        contents = [(patch.ticket, {name: self._stripped(value, rest) for name, value in patch.patch.items()}) for patch in made]
        skipped = tuple({patch.skipped for patch in made if patch.skipped is not None})
        return Message(run, self._blocks[0].data, pickle.dumps(contents), skipped)

    def _stripped(self, value: Any, tensors: Iterator[Tensor]) -> Any:
        if not isinstance(value, Image):
            return value
        template, data = value.without_data(), next(tensors)
        template.affine = value.affine
        offset = self._blocks[0].offset_of(data)
        assert offset is not None
        return _Part(template, offset, tuple(data.shape), data.dtype)


def unpack(message: Message, empty: MakeEmpty) -> Iterator[tuple[int, Callable[[], Subject]]]:
    """Give the ticket of each patch, and a function that makes it, in memory of its own."""
    for ticket, entries in pickle.loads(message.contents):  # noqa: S301 - a worker of this process has pickled it
        yield ticket, functools.partial(_restored, entries, message.block, empty)


def _restored(entries: dict[str, Any], block: Tensor, empty: MakeEmpty) -> Subject:
    return Subject({name: _filled(value, block, empty) for name, value in entries.items()})


def _filled(value: Any, block: Tensor, empty: MakeEmpty) -> Any:
    if not isinstance(value, _Part):
        return value
    target = empty(value.shape, value.dtype)
    source = block[value.offset : value.offset + target.nbytes].view(value.dtype).view(value.shape)
    memory.copy_alone(target, source)
    return value.template.part(target, (0, 0, 0))


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
