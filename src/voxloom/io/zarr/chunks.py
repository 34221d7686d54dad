"""An array of Zarr, read chunk by chunk: each is fetched and decoded once, for as long as it is kept.

Chunks are decoded here with numcodecs, so that each is kept, counted, and named where it is missing or damaged; and not by
tensorstore, which ends each process that is forked from one that has used it, as those of PyTorch's loaders are. What numcodecs
does not know, zarr-python decodes.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ...errors import CorruptImageError, ImageFileError, UnsupportedImageError, VoxloomError
from ...runtime.chunk_cache import CHUNKS
from .encoding import MISSING
from .storage import Storage

__all__ = ["ChunkedArray"]

BLOSC_HEADER_BYTES = 16

Decode = Callable[[bytes], np.ndarray]


@dataclass(frozen=True)
class Shards:
    """How chunks lie in the files that hold many."""

    shape: tuple[int, ...]
    """Elements of a shard."""
    index_at_end: bool
    index_is_checked: bool
    """Whether a checksum of four bytes follows the index."""
    index_dtype: str = "<u8"

    def index_bytes(self, num_chunks: int) -> int:
        """Bytes of the index."""
        return 16 * num_chunks + 4 * self.index_is_checked


class ChunkedArray:
    """An array in a store.

    Args:
        storage: where it lies.
        path: its path in the hierarchy; empty for the root.
        array: the array of zarr-python.
        missing: what a chunk is that is not there: `"fill"` for the array's fill value, `"error"` for an error.

    Raises:
        UnsupportedImageError: if its chunks are not all of one size.
    """

    def __init__(self, storage: Storage, path: str, array: Any, missing: str = "fill") -> None:
        self.storage, self.path, self.missing = storage, path.strip("/"), missing
        self._array = array
        self.name = f"{storage.name}/{self.path}" if self.path else storage.name
        self.zarr_format = str(array.metadata.zarr_format)
        self.shape = tuple(map(int, array.shape))
        self.dtype = np.dtype(array.dtype)
        chunks, shards = array.chunks, array.shards
        if not all(isinstance(size, int) for size in chunks):
            raise UnsupportedImageError(f"{self.name} has chunks of {chunks}: they must all be of one size")
        self.chunks = tuple(map(int, chunks))
        fill = array.fill_value
        self.fill = np.zeros((), self.dtype) if fill is None else np.asarray(fill, dtype=self.dtype)
        self._encode_key = array.metadata.encode_chunk_key
        self._shards, self._decode = _reading_of(array, self.chunks, shards)
        if shards and self._shards is None:  # zarr-python knows more codecs, and reads a shard at a time here
            self.chunks = tuple(map(int, shards))
            if missing == "error":
                raise UnsupportedImageError(
                    f"the shards of {self.name} are encoded such that zarr-python alone reads them, which does not say what is"
                    " missing: leave out missing='error'"
                )
        self._owner = CHUNKS.new_owner()
        self.bytes_read = 0
        """Bytes that were read of chunks until now."""

    def forget(self) -> None:
        """Read anew from now on: the files have changed."""
        self._owner = CHUNKS.new_owner()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("it is opened anew by another process")

    def read(self, start: Sequence[int], stop: Sequence[int]) -> np.ndarray:
        """Read a box of elements.

        Returns:
            A new array, in the order of the stored one.
        """
        start, stop = tuple(start), tuple(stop)
        out = np.empty([last - first for first, last in zip(start, stop, strict=True)], dtype=self.dtype.newbyteorder("="))
        spans = [range(first // size, -(-last // size)) for first, last, size in zip(start, stop, self.chunks, strict=True)]
        for place in itertools.product(*spans):
            origin = tuple(number * size for number, size in zip(place, self.chunks, strict=True))
            ends = zip(start, stop, origin, self.chunks, strict=True)
            inside = [(max(first, at), min(last, at + size)) for first, last, at, size in ends]
            target = tuple(slice(low - first, high - first) for (low, high), first in zip(inside, start, strict=True))
            chunk = self._chunk(place)
            if chunk is None:
                out[target] = self.fill
            else:
                out[target] = chunk[tuple(slice(low - at, high - at) for (low, high), at in zip(inside, origin, strict=True))]
        return out

    def _chunk(self, place: tuple[int, ...]) -> np.ndarray | None:
        """Give a decoded chunk; None for one that is not there."""
        found = CHUNKS.get((self._owner, place), lambda: self._made(place))
        return found if found.ndim else None

    def _made(self, place: tuple[int, ...]) -> np.ndarray:
        """Read and decode a chunk; what is not there is an array without axes."""
        if self._decode is None and self.missing == "fill":
            return self._decoded_by_zarr(place)
        raw, where = self._raw(place)
        if raw is None:
            if self.missing == "error":
                raise CorruptImageError(
                    f"{self.name} has no chunk {where}: some of the volume is missing; missing='fill' takes it for {self.fill}"
                )
            return self.fill
        try:
            return self._decoded_by_zarr(place) if self._decode is None else self._decode(raw).reshape(self.chunks)
        except (VoxloomError, MemoryError):
            raise
        except Exception as error:  # whatever a codec stumbles over
            raise self._damaged(where, error) from error

    def _decoded_by_zarr(self, place: tuple[int, ...]) -> np.ndarray:
        """Let zarr-python read a chunk: of missing ones it makes the fill value."""
        try:
            return np.asarray(
                self._array[tuple(slice(n * size, (n + 1) * size) for n, size in zip(place, self.chunks, strict=True))]
            )
        except (VoxloomError, MemoryError):
            raise
        except Exception as error:  # whatever a codec stumbles over
            raise self._damaged(self._encode_key(place), error) from error

    def _damaged(self, where: str, error: Exception) -> CorruptImageError:
        return CorruptImageError(
            f"the chunk {where} of {self.name} is damaged: {type(error).__name__}: {error}. Copy or make the store again"
        )

    def _raw(self, place: tuple[int, ...]) -> tuple[bytes | None, str]:
        """Give the bytes of a chunk as they are stored, and where that is."""
        if self._shards is None:
            key = self._encode_key(place)
            return self._get(key), key
        per_shard = [outer // inner for outer, inner in zip(self._shards.shape, self.chunks, strict=True)]
        shard = tuple(number // count for number, count in zip(place, per_shard, strict=True))
        within = tuple(number % count for number, count in zip(place, per_shard, strict=True))
        key = self._encode_key(shard)
        where = f"{key}, {within} in it"
        index = CHUNKS.get((self._owner, "index", shard), lambda: self._index(key, per_shard))
        if not index.size:
            return None, where
        offset, size = map(int, index[within])
        return (None if offset == MISSING else self._get(key, offset, offset + size)), where

    def _index(self, key: str, per_shard: Sequence[int]) -> np.ndarray:
        """Read where the chunks of a shard lie in it; empty where there is no shard."""
        assert self._shards is not None
        size = self._shards.index_bytes(math.prod(per_shard))
        found = self._get(key, *((-size, None) if self._shards.index_at_end else (0, size)))
        if found is None:
            return np.empty(0, dtype="<u8")
        if len(found) == size and self._shards.index_is_checked:
            found = _checked(found) or b""
        if len(found) != 16 * math.prod(per_shard):
            raise CorruptImageError(f"the index of the shard {key} of {self.name} is damaged: copy or make the store again")
        return np.frombuffer(found, dtype=self._shards.index_dtype).reshape(*per_shard, 2)

    def _get(self, key: str, start: int | None = None, stop: int | None = None) -> bytes | None:
        try:
            found = self.storage.get(f"{self.path}/{key}" if self.path else key, start, stop)
        except OSError as error:
            if isinstance(error, VoxloomError):
                raise
            raise ImageFileError(f"the chunk {key} of {self.name} cannot be read: {error.strerror}") from error
        self.bytes_read += len(found or b"")
        return found


def _reading_of(array: Any, chunks: tuple[int, ...], shards: Any) -> tuple[Shards | None, Decode | None]:
    """Say how the chunks of an array are found and decoded: neither for shards, nor a way to decode, where it is not known."""
    metadata = array.metadata
    dtype = np.dtype(array.dtype)
    if metadata.zarr_format == 2:
        return None, _decoder_of_v2(metadata, dtype, chunks)
    codecs = [each.to_dict() for each in metadata.codecs]
    if not shards:
        return None, _decoder(codecs, dtype, chunks)
    outer = codecs[0].get("configuration", {})
    index_codecs = [_plain(each) for each in outer.get("index_codecs", ())]
    index = [each["name"] for each in index_codecs]
    inner = _decoder([_plain(each) for each in outer.get("codecs", ())], dtype, chunks)
    is_known = len(codecs) == 1 and index in (["bytes"], ["bytes", "crc32c"]) and inner is not None
    if not is_known:
        return None, None
    place = outer.get("index_location", "end")
    at_end = str(getattr(place, "value", place)) == "end"
    return Shards(tuple(map(int, shards)), at_end, "crc32c" in index, f"{_order_of(index_codecs[0])}u8"), inner


def _plain(codec: Any) -> dict[str, Any]:
    found: dict[str, Any] = codec if isinstance(codec, dict) else codec.to_dict()
    return found


def _order_of(codec: dict[str, Any]) -> Literal["<", ">"]:
    """Give the order of bytes that a codec named `bytes` says, as NumPy writes it."""
    endian = (codec.get("configuration") or {}).get("endian")
    return ">" if str(getattr(endian, "value", endian)) == "big" else "<"


def _decoder_of_v2(metadata: Any, dtype: np.dtype, chunks: tuple[int, ...]) -> Decode | None:
    import numcodecs

    filters, compressor, order = metadata.filters or (), metadata.compressor, metadata.order
    steps = [each for each in (*filters, compressor) if each is not None]
    if not all(isinstance(each, numcodecs.abc.Codec) for each in steps):
        return None

    decoders = [_decoder_of(step) for step in steps]

    def decode(raw: bytes) -> np.ndarray:
        values: Any = raw
        for step in reversed(decoders):
            values = step(values)
        return np.frombuffer(values, dtype=dtype).reshape(chunks, order=order)

    return decode


def _decoder(codecs: Sequence[dict[str, Any]], dtype: np.dtype, chunks: tuple[int, ...]) -> Decode | None:
    """Make a function of the codecs of Zarr v3; None if there is one that is not known."""
    order: list[int] | None = None
    stored = dtype
    steps: list[Callable[[Any], Any]] = []
    for codec in codecs:
        name, options = str(codec["name"]), codec.get("configuration") or {}
        if name == "transpose" and order is None and not steps:
            order = [int(axis) for axis in options["order"]]
        elif name == "bytes":
            stored = dtype.newbyteorder(_order_of(codec))
        else:
            step = _step(name, options)
            if step is None:
                return None
            steps.append(step)

    def decode(raw: bytes) -> np.ndarray:
        values: Any = raw
        for step in reversed(steps):
            values = step(values)
        found = np.frombuffer(values, dtype=stored)
        if order is None:
            return found.reshape(chunks)
        return found.reshape([chunks[axis] for axis in order]).transpose(np.argsort(order))

    return decode


def _step(name: str, options: dict[str, Any]) -> Callable[[Any], Any] | None:
    import numcodecs
    from numcodecs.registry import get_codec

    if name == "crc32c":
        return _crc_checked
    if name in ("blosc", "zstd", "gzip"):
        codec = {"blosc": numcodecs.Blosc, "zstd": numcodecs.Zstd, "gzip": numcodecs.GZip}[name]()
    elif name.startswith("numcodecs.") and name.removeprefix("numcodecs.") in ("lz4", "zlib", "bz2", "lzma"):
        codec = get_codec({"id": name.removeprefix("numcodecs."), **options})
    else:
        return None
    return _decoder_of(codec)


def _decoder_of(codec: Any) -> Callable[[Any], Any]:
    """Give what decodes by a codec of numcodecs, which for Blosc does not look whether all bytes are there that it reads."""
    decode: Callable[[Any], Any] = codec.decode
    if codec.codec_id != "blosc":
        return decode

    def decode_whole(values: Any) -> Any:
        held = memoryview(values).nbytes
        said = int.from_bytes(bytes(memoryview(values)[12:16]), "little")
        if held < BLOSC_HEADER_BYTES or said != held:
            raise ValueError(f"it has {held} bytes, and says that it has {said}")
        return decode(values)

    return decode_whole


def _checked(values: bytes) -> bytes | None:
    """Give what stands before a checksum; None if that is another one."""
    from google_crc32c import value

    return values[:-4] if value(values[:-4]) == int.from_bytes(values[-4:], "little") else None


def _crc_checked(values: Any) -> bytes:
    found = _checked(bytes(values))
    if found is None:
        raise ValueError("its checksum is another one")
    return found
