"""Chunks and shards of results: encoded with numcodecs, and written as files.

A chunk has the bytes that zarr-python gives it, which takes half as long again, and keeps other threads waiting meanwhile.
"""

import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from ...core.boxes import Box
from ..writing.saving import bring_to_disk
from .writing import MOST_AT_ONCE, at_once

__all__ = ["COMPRESSION", "MISSING", "put_shard"]

# The level of compression at which labels and intensities take at most a tenth more than at the next ones, and far less time.
COMPRESSION = 1
# What the index of a shard says of a chunk that is not there.
MISSING = 2**64 - 1

Piece = tuple[tuple[int, ...], np.ndarray]
"""A chunk or a shard: its number along each axis, and its values, which are fewer where the array ends in it."""


def put_shard(array: Any, has_channels: bool, box: Box, values: np.ndarray) -> None:
    """Write whole shards, or whole chunks where there are no shards, and bring them to the disk.

    A chunk that is 0 bit by bit is not kept, nor is what was there before.

    Args:
        array: of zarr-python, in a folder, made for a result.
        has_channels: whether its first axis is that of channels.
        box: voxels of the shards.
        values: all channels `(C, I, J, K)` of the box.
    """
    turned = values.transpose(0, 3, 2, 1)
    pieces = _pieces(
        turned if has_channels else turned[0], (*[0] * has_channels, *reversed(box.start)), array.shards or array.chunks
    )
    num_threads = min(MOST_AT_ONCE, os.cpu_count() or 1) // at_once(values.nbytes)  # others write shards, too
    if num_threads < 2 or values.nbytes <= array.dtype.itemsize * math.prod(array.chunks):
        _put(array, pieces, map)
    else:
        with ThreadPoolExecutor(num_threads, "voxloom-chunks") as threads:
            _put(array, pieces, threads.map)


def _put(array: Any, pieces: Iterable[Piece], in_threads: Callable[..., Iterable[Any]]) -> None:
    root: Path = array.store.root
    if not root.exists():  # whoever comes late makes no folder anew which is gone
        raise FileNotFoundError(f"{root} is gone")
    encoding = _Encoding(array)

    def put(piece: Piece, each: Callable[..., Iterable[Any]] = map) -> None:
        place, values = piece
        encoded = encoding.shard(values, each) if array.shards else encoding.chunk(values)
        _write(root / array.path / array.metadata.encode_chunk_key(place), encoded)

    if array.shards:
        for piece in pieces:
            put(piece, in_threads)
    else:
        for _ in in_threads(put, pieces):
            pass


class _Encoding:
    """How chunks and shards of an array become bytes."""

    def __init__(self, array: Any) -> None:
        import numcodecs
        from google_crc32c import value

        self._chunk, self._shard, self._checksum = array.chunks, array.shards, value
        self._dtype = array.dtype.newbyteorder("<")
        self._codec = numcodecs.Blosc(cname="zstd", clevel=COMPRESSION, shuffle=int(self._dtype.itemsize > 1))
        self._is_checked = array.metadata.zarr_format == 3

    def chunk(self, values: np.ndarray) -> list[bytes]:
        """Encode a chunk, which is whole also where the array ends in it; of one that is 0 nothing is left."""
        whole = np.ascontiguousarray(values, self._dtype)
        if not whole.view(np.uint8).any():  # bit by bit, since -0.0 is not 0
            return []
        if whole.shape != self._chunk:
            whole = np.zeros(self._chunk, self._dtype)
            whole[tuple(map(slice, values.shape))] = values
        encoded = self._codec.encode(whole)
        return [encoded, self._check(encoded)] if self._is_checked else [encoded]

    def shard(self, values: np.ndarray, in_threads: Callable[..., Iterable[Any]]) -> list[bytes]:
        """Encode a shard: chunks, and where each begins with how many bytes it has."""
        counts = [size // part for size, part in zip(self._shard, self._chunk, strict=True)]
        index, parts, end = np.full((*counts, 2), MISSING, "<u8"), [], 0
        pieces = list(_pieces(values, [0] * values.ndim, self._chunk))
        for (place, _), chunk in zip(pieces, in_threads(lambda piece: self.chunk(piece[1]), pieces), strict=True):
            if chunk:
                parts += chunk
                index[place] = end, sum(map(len, chunk))
                end += int(index[place][1])
        return [*parts, index.tobytes(), self._check(index.tobytes())] if parts else []

    def _check(self, encoded: bytes) -> bytes:
        return int(self._checksum(encoded)).to_bytes(4, "little")


def _pieces(values: np.ndarray, start: Sequence[int], size: Sequence[int]) -> Iterator[Piece]:
    """Divide what begins with a whole piece into pieces of a size."""
    counts = [range(-(-length // each)) for length, each in zip(values.shape, size, strict=True)]
    for numbers in itertools.product(*counts):
        part = values[tuple(slice(number * each, (number + 1) * each) for number, each in zip(numbers, size, strict=True))]
        yield tuple(at // each + number for at, each, number in zip(start, size, numbers, strict=True)), part


def _write(path: Path, encoded: Sequence[bytes]) -> None:
    """Write a file and bring it to the disk; one of nothing is removed."""
    if not encoded:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid4().hex}.partial")
    try:
        with partial.open("wb") as file:
            file.writelines(encoded)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    bring_to_disk(path)  # what is recorded as written must be there after a power failure, too
