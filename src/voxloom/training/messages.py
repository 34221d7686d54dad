"""What travels from a worker: several patches at a time, in one block of shared memory."""

import functools
import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..runtime import memory
from ..runtime.shared_memory import share
from ..sampling.patches import MakeEmpty
from ..volumes.images.image import Image
from ..volumes.subject import Subject
from .patch_worker import MadePatch, SkippedSubject

__all__ = ["Failure", "Message", "Packer", "Unpacker"]

# Where a tensor begins in a block: numbers of every type may begin there.
ALIGNMENT = 64


class Message(NamedTuple):
    """Patches on their way to the queue."""

    run: int
    """Which run of the queue they are for."""
    slot: int
    """Which of the worker's blocks holds the data of all images."""
    block: Tensor | None
    """That block, bytes, if it is a new one: a process maps it once."""
    contents: bytes
    """Everything else, pickled: so no tensor among the metadata becomes an open file of its own."""
    skipped: tuple[SkippedSubject, ...]


class Failure(NamedTuple):
    """What making patches has raised in a worker."""

    error: Exception
    traceback: str


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
        self.data = share(torch.empty(num_bytes, dtype=torch.uint8))
        self.is_new = True
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
        self._blocks = [_Block(0) for _ in range(num_blocks)]
        self._slot = 0
        self._bytes_per_patch = 0

    def begin(self, num_patches: int) -> MakeEmpty:
        """Begin a message; give the function that makes tensors where they need not be copied to."""
        self._slot = (self._slot + 1) % len(self._blocks)
        return self._cleared(num_patches * self._bytes_per_patch).empty

    def _cleared(self, num_bytes: int) -> _Block:
        """Empty the block of this message, and make it large enough."""
        if len(self._blocks[self._slot].data) < num_bytes:
            self._blocks[self._slot] = _Block(num_bytes)
        block = self._blocks[self._slot]
        block.clear()
        return block

    def pack(self, run: int, made: Sequence[MadePatch]) -> Message:
        """End a message.

        Args:
            run: which run of the queue it is for.
            made: the patches; those whose data are not in the block, because nobody knew how large they would be, are copied.
        """
        tensors = [image.data for patch in made for image in patch.patch.images.values()]
        sizes = [_aligned(tensor.nbytes) for tensor in tensors]
        self._bytes_per_patch = max(self._bytes_per_patch, -(-sum(sizes) // max(1, len(made))))
        block = self._blocks[self._slot]
        if any(block.offset_of(tensor) is None for tensor in tensors):
            copies = [tensor.clone() for tensor in tensors]
            block = self._cleared(sum(sizes))
            tensors = [block.empty(copy.shape, copy.dtype).copy_(copy) for copy in copies]
        rest = iter(tensors)
        contents = [
            (patch.sequence_number, {name: _stripped(value, rest, block) for name, value in patch.patch.items()})
            for patch in made
        ]
        skipped = tuple({patch.skipped for patch in made if patch.skipped is not None})
        message = Message(run, self._slot, None, pickle.dumps(contents), skipped)
        if not block.is_new:
            return message
        block.is_new = False
        return message._replace(block=block.data)

    def was_not_sent(self, message: Message) -> None:
        """Let the next message in the same block bring it along, since this one never arrived."""
        self._blocks[message.slot].is_new |= message.block is not None


def _stripped(value: Any, tensors: Iterator[Tensor], block: _Block) -> Any:
    if not isinstance(value, Image):
        return value
    template, data = value.without_data(), next(tensors)
    template.affine = value.affine
    offset = block.offset_of(data)
    assert offset is not None
    return _Part(template, offset, tuple(data.shape), data.dtype)


class Unpacker:
    """Knows the blocks of one worker, and makes subjects of its messages."""

    def __init__(self) -> None:
        self._blocks: dict[int, Tensor] = {}

    def unpack(self, message: Message, empty: MakeEmpty) -> Iterator[tuple[int, Callable[[], Subject]]]:
        """Give the sequence number of each patch, and a function that makes it, in memory of its own."""
        if message.block is not None:
            self._blocks[message.slot] = message.block
        block = self._blocks[message.slot]
        for sequence_number, entries in pickle.loads(message.contents):  # noqa: S301 - a worker of this process pickled it
            yield sequence_number, functools.partial(_restored, entries, block, empty)


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
