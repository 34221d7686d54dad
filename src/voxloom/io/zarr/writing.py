"""Writing arrays of Zarr shard by shard: what is written in parts waits in files until a shard is whole."""

import itertools
import json
import math
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from ...core.boxes import Box
from ...core.copying import copy_voxels
from ...core.pyramids import coarser
from ...core.sizes import Ints
from ...errors import RecordError
from ..protocols import Json
from ..writing.saving import bring_to_disk, write_safely

__all__ = ["PyramidWriter", "ShardWriter", "at_once", "chunks_for"]

# A chunk has about so many bytes before it is compressed, if nothing else is said.
CHUNK_BYTES = 2**20
# More chunks than these are put into shards, since each file costs a file system something.
MOST_FILES = 2048
# Chunks along each axis of a shard: a shard is in memory as a whole when it is written.
PER_SHARD = 2
# Small shards are compressed, and brought to the disk, several at once, as long as these have no more bytes in all.
MOST_AT_ONCE = 4
BYTES_AT_ONCE = 2**22


def chunks_for(shape: Sequence[int], itemsize: int, chunks: Sequence[int] | None = None) -> tuple[Ints, Ints]:
    """Choose chunks and shards of a volume.

    Args:
        shape: voxels `(I, J, K)`.
        itemsize: bytes of a voxel.
        chunks: the chunks, if they are given.

    Returns:
        Voxels of a chunk, and of a shard, which is one chunk where there are few.

    Example:
        >>> chunks_for((512, 512, 300), 1), chunks_for((2048, 2048, 2048), 1)
        (((128, 128, 128), (128, 128, 128)), ((128, 128, 128), (256, 256, 256)))
    """
    if chunks is None:
        edge = 2 ** math.ceil(math.log2(max(8.0, (CHUNK_BYTES / itemsize) ** (1 / 3)) - 1e-9))
        chunks = [edge] * 3
    inner = tuple(min(size, length) for size, length in zip(chunks, shape, strict=True))
    counts = [-(-length // size) for length, size in zip(shape, inner, strict=True)]
    if math.prod(counts) <= MOST_FILES:
        return inner, inner
    return inner, tuple(size * min(PER_SHARD, count) for size, count in zip(inner, counts, strict=True))


def at_once(shard_bytes: int) -> int:
    """Say how many shards of a size are written at once: one at least.

    Example:
        >>> at_once(2**20), at_once(2**21), at_once(2**30)
        (4, 2, 1)
    """
    return max(1, min(MOST_AT_ONCE, BYTES_AT_ONCE // max(1, shard_bytes)))


class ShardWriter:
    """Takes boxes of a volume in any order, and gives away whole shards.

    Of a shard that is not whole there is a file of its boxes, one after the other as they came. What has been given away since
    the last flush is known by name, since its boxes may come again after an interruption.

    Args:
        folder: for the files of parts.
        shape: `(C, I, J, K)`.
        dtype: type of the values.
        shard: voxels of a shard `(I, J, K)`; a shard holds all channels.
        put: takes the box of a whole shard, and its values `(C, *box.shape)`; may be called by several threads at once.
        written: is told of these as well, once they are written, by the caller's thread.
        most_at_once: shards that may be given away at once.
    """

    def __init__(
        self,
        folder: Path,
        shape: Sequence[int],
        dtype: np.dtype,
        shard: Ints,
        put: Callable[[Box, np.ndarray], object],
        written: Callable[[Box, np.ndarray], object] = lambda box, values: None,
        most_at_once: int = 1,
    ) -> None:
        self._folder, self._shape, self._dtype, self._shard = folder, tuple(shape), dtype, shard
        self._put, self._written, self._most_at_once = put, written, most_at_once
        # What is in each file: where a box begins in the shard, with its shape, and where it begins in the file.
        self._waiting: dict[str, dict[Ints, tuple[Ints, int]]] = {}
        self._given: set[str] = set()
        self._again: set[str] = set()

    def to_json(self) -> Json:
        """Give what must be known to go on."""
        waiting = {name: [(start, shape) for start, (shape, _) in boxes.items()] for name, boxes in self._waiting.items()}
        return {"shard": list(self._shard), "waiting": waiting, "given": sorted(self._given)}

    def restore(self, told: Json) -> None:
        """Go on with what is there.

        Raises:
            RecordError: if a file is gone or damaged.
            ValueError, LookupError, TypeError, AttributeError: if what is told is damaged.
        """
        if told["shard"] != list(self._shard):
            raise ValueError("shards of another size")
        self._waiting = {}
        for name, told_boxes in told["waiting"].items():
            boxes = self._waiting[str(name)] = {}
            for start, shape in told_boxes:
                size = tuple(map(int, shape))
                boxes[tuple(map(int, start))] = size, self._end_of(boxes)
        self._given = set(map(str, told["given"]))
        for name, boxes in self._waiting.items():
            part = self._part(name)
            if not part.exists() or part.stat().st_size < self._end_of(boxes):
                raise RecordError(f"the unfinished part {part} is gone or damaged")
        for part in self._folder.glob("*.raw"):
            if part.stem not in self._waiting:  # given away, and not removed; or begun, and not recorded
                part.unlink()

    def _box_of(self, name: str) -> Box:
        numbers = [int(part) for part in name.split(".")]
        start = tuple(number * size for number, size in zip(numbers, self._shard, strict=True))
        stop = tuple(min(at + size, length) for at, size, length in zip(start, self._shard, self._shape[1:], strict=True))
        return Box(start, stop)

    def _end_of(self, boxes: dict[Ints, tuple[Ints, int]]) -> int:
        """Where the file of some boxes ends: behind that which came last."""
        if not boxes:
            return 0
        shape, place = boxes[next(reversed(boxes))]
        return place + self._num_bytes(shape)

    def _num_bytes(self, shape: Ints) -> int:
        return self._shape[0] * math.prod(shape) * self._dtype.itemsize

    def _part(self, name: str) -> Path:
        return self._folder / f"{name}.raw"

    def write(self, box: Box, values: np.ndarray) -> None:
        """Take the values `(C, *box.shape)` of a box."""
        spans = [
            range(start // size, -(-stop // size)) for start, stop, size in zip(box.start, box.stop, self._shard, strict=True)
        ]
        for numbers in itertools.product(*spans):
            name = ".".join(map(str, numbers))
            if name in self._given:
                self._again.add(name)  # it comes again, after an interruption
                continue
            shard = self._box_of(name)
            inside = box & shard
            part = values[(slice(None), *inside.relative_to(box.start).slices)]
            if inside == shard:
                self._waiting.pop(name, None)
                self._again.add(name)
                self._put(shard, part)
                self._written(shard, part)
            else:
                self._keep(name, shard, inside, part)

    def _keep(self, name: str, shard: Box, inside: Box, part: np.ndarray) -> None:
        """Put a box behind what the file of its shard holds, or where it is if it comes again."""
        boxes = self._waiting.get(name, {})
        start = inside.relative_to(shard.start).start
        shape, place = boxes.get(start, (inside.shape, self._end_of(boxes)))
        if shape != inside.shape:
            raise RecordError(
                f"{self._part(name)} holds a box of {shape} voxels at {start}, which comes again with {inside.shape}"
            )
        with self._part(name).open("r+b" if boxes else "wb") as file:
            file.seek(place)
            file.write(np.ascontiguousarray(part, self._dtype).data)
        self._waiting.setdefault(name, boxes)[start] = shape, place

    def _put_together(self, name: str) -> np.ndarray:
        """Read the boxes of a whole shard.

        Raises:
            RecordError: if the file has been cut off.
        """
        shape = self._box_of(name).shape
        # With the first axis as the quickest, as arrays of Zarr hold it, so that they need no copy.
        values = np.empty((self._shape[0], *reversed(shape)), self._dtype).transpose(0, 3, 2, 1)
        with self._part(name).open("rb") as file:
            for start, (size, place) in self._waiting[name].items():
                box = Box.of_shape(size, start)
                file.seek(place)
                part = np.empty((self._shape[0], *size), self._dtype)
                if file.readinto(part.data) != part.nbytes:
                    raise RecordError(f"the unfinished part {self._part(name)} is damaged")
                copy_voxels(values[(slice(None), *box.slices)], part)
        return values

    def give_whole(self) -> list[Path]:
        """Give away what is whole, and bring the rest to the disk.

        Returns:
            Files that are of no more use once it is recorded what was given away.
        """
        whole = [
            name for name, boxes in self._waiting.items() if self._end_of(boxes) == self._num_bytes(self._box_of(name).shape)
        ]
        given = set(whole)
        with ThreadPoolExecutor(self._most_at_once, "voxloom-shards") as threads:
            begun: deque[tuple[Future[object], Box, np.ndarray]] = deque()
            for name in whole:
                if len(begun) == self._most_at_once:
                    self._finish(*begun.popleft())
                box = self._box_of(name)
                values = self._put_together(name)
                begun.append((threads.submit(self._put, box, values), box, values))
                del values  # or it is kept while the next one is read
            while begun:
                self._finish(*begun.popleft())
            rest = {name: boxes for name, boxes in self._waiting.items() if name not in given}
            for _ in threads.map(bring_to_disk, map(self._part, rest)):
                pass
        self._waiting = rest
        self._given, self._again = self._again | given, set()
        return [self._part(name) for name in whole]

    def _finish(self, put: Future[object], box: Box, values: np.ndarray) -> None:
        """Wait until a shard is written."""
        put.result()
        self._written(box, values)

    @property
    def num_unfinished(self) -> int:
        """Shards of which a part is missing."""
        return len(self._waiting)


class PyramidWriter:
    """Writes an image of several levels, each made of the one before as soon as a shard of that is whole.

    Args:
        folder: for the files of parts, and for what is recorded of them.
        levels: for each level what writes a whole shard of it.
        channels: number of channels.
        shapes: voxels of each level.
        dtype: type of the values.
        shards: voxels of a shard, for each level.
        factors: by which the axes of each level but the first are shorter than those of the level before.
        is_labels: whether a coarser voxel has the label of most, rather than the mean.
        is_new: begin anew; otherwise go on with what is there.

    Raises:
        RecordError: if what is there is gone or damaged.
    """

    def __init__(
        self,
        folder: Path,
        levels: Sequence[Callable[[Box, np.ndarray], object]],
        channels: int,
        shapes: Sequence[Ints],
        dtype: np.dtype,
        shards: Sequence[Ints],
        factors: Sequence[Ints],
        is_labels: bool,
        is_new: bool,
    ) -> None:
        self._folder, self._shapes, self._factors, self._is_labels = folder, shapes, factors, is_labels
        self._levels: list[ShardWriter] = []
        for number, (put, shape, shard) in enumerate(zip(levels, shapes, shards, strict=True)):
            part = folder / str(number)
            if is_new:
                part.mkdir(parents=True)
            most = at_once(channels * math.prod(map(min, shard, shape)) * dtype.itemsize)
            self._levels.append(ShardWriter(part, (channels, *shape), dtype, shard, put, partial(self._pass_on, number), most))
        if is_new:
            self._record()
        else:
            self._restore()

    @property
    def _state(self) -> Path:
        return self._folder / "parts.json"

    def _record(self) -> None:
        write_safely(self._state, json.dumps([each.to_json() for each in self._levels]))

    def _restore(self) -> None:
        try:
            for level, told in zip(self._levels, json.loads(self._state.read_text()), strict=True):
                level.restore(told)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            if isinstance(error, RecordError):
                raise
            raise RecordError(f"what {self._state} records of an unfinished run is gone or damaged") from error

    def _pass_on(self, number: int, box: Box, values: np.ndarray) -> None:
        """Write to the next level what it has of a shard."""
        if number == len(self._factors):
            return
        factors = self._factors[number]
        start = tuple(at // factor for at, factor in zip(box.start, factors, strict=True))
        made = coarser(values, factors, self._is_labels)
        # What is left over at the end of an axis may be no voxel of the next level.
        target = Box.of_shape(made.shape[1:], start) & Box.of_shape(self._shapes[number + 1])
        if target.numel:
            self._levels[number + 1].write(target, made[(slice(None), *target.relative_to(start).slices)])

    def write(self, box: Box, values: np.ndarray) -> None:
        """Take a box of the finest level, `(C, *box.shape)`."""
        self._levels[0].write(box, values)

    def flush(self) -> None:
        """Write what is whole, and record the rest, so that a crash does not reach it.

        All levels are recorded at once, and files of parts are removed last, so that nothing is lost in between.
        """
        files = [path for level in self._levels for path in level.give_whole()]
        self._record()
        for path in files:
            path.unlink(missing_ok=True)

    @property
    def num_unfinished(self) -> int:
        """Shards of which a part is missing."""
        return sum(level.num_unfinished for level in self._levels)
