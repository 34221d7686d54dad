"""Carrying out a plan in this process: reading, the model, the sum, and reducing and writing, side by side."""

import contextlib
import itertools
import math
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from ..aggregation.streaming import SHARED_BYTES, FinishedTile, StreamingAccumulator
from ..aggregation.weights import PatchWeights
from ..core.boxes import Box
from ..core.grid.joining import Joining
from ..core.grid.traversal import Block, Step, Traversal
from ..core.sizes import Ints
from ..core.values import is_finite
from ..errors import DeviceMemoryError, OutputError
from ..io.protocols import VolumeSource, VolumeStore
from ..models.outputs import called
from ..models.running import is_out_of_memory
from ..runtime.forks import in_forked_process
from ..runtime.kept_memory import Trimmer, allow
from ..runtime.limits import home_of_sums
from ..runtime.memory import BufferPool
from ..runtime.sharing import Share, SharedOut
from .delivery import Delivery
from .handing_over import MOST_WAITING, Reading, Writer
from .inputs import read_batch
from .planning.block_memory import open_bytes
from .planning.plan import BASE_BYTES, Batch, PredictionPlan
from .runner import FirstBatch, Runner

__all__ = ["ThreadExecutor"]

HOST = torch.device("cpu")
# Batches that are smaller are read together, and tiles handed over together, until they are as large.
TOGETHER_BYTES = 2**20
# Threads that add patches to sums, at most: more would not be faster, since memory is not.
MOST_ADDING = 16
SETTING_THREADS = threading.Lock()

Numbered = tuple[Batch, int]
"""A batch, and how many of its first patches are not wanted."""


class ThreadExecutor:
    """Carries out plans in threads of this process; see `Executor`.

    The model runs in the caller's thread; one thread reads the next batch, some add patches to sums, and another reduces and
    writes what is finished, as far behind as memory lets it be. An error in any of them stops the others. Memory for sums is kept
    from one plan to the next.
    """

    def __init__(self) -> None:
        self._pool = BufferPool(0)

    def __repr__(self) -> str:
        return f"ThreadExecutor({self.kept_bytes} bytes kept)"

    @property
    def kept_bytes(self) -> int:
        """See `Executor`."""
        return self._pool.num_bytes

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
        """See `Executor`."""
        allow(plan.peak_bytes)
        gathering = _Gathering(plan, runner, source, stores, self._pool, first, slab_finished, progress)
        gathering.run(start, plan.num_slabs if stop is None else stop)
        return gathering.warnings


class _NanFound(Exception):  # noqa: N818 - it never leaves this file
    """A finished tile holds NaN."""

    def __init__(self, output: int, voxel: Ints) -> None:
        super().__init__(output, voxel)
        self.output, self.voxel = output, voxel


class _Gathering:
    """One run of a plan."""

    def __init__(
        self,
        plan: PredictionPlan,
        runner: Runner,
        source: VolumeSource,
        stores: Sequence[VolumeStore],
        pool: BufferPool,
        first: FirstBatch | None,
        slab_finished: Callable[[], object],
        progress: Callable[[int], object],
    ) -> None:
        self.plan, self.runner, self.source, self.stores = plan, runner, source, stores
        self.warnings: list[str] = []
        self._delivery = Delivery(plan, runner.reductions, stores)
        self._pool, self._first = pool, first
        self._slab_finished, self._progress = slab_finished, progress
        self._home = home_of_sums(runner.models.device, plan.memory.front)
        self._weights = [self._weights_of(number) for number in range(len(plan.outputs))]
        self._sums: list[StreamingAccumulator] = []  # of the block that is at hand, one for each output
        self._room = 0  # bytes for them and for what waits to be written
        self._finished: deque[tuple[int, FinishedTile]] = deque()  # what the writer has not been given yet, with its output
        self._finished_bytes = 0
        self._share: Share | None = None
        self._recorded: deque[Future[None]] = deque()  # slabs that are recorded, or will be when their turn comes

    def _weights_of(self, number: int) -> PatchWeights | None:
        window = self.plan.window
        if window is None:
            return None
        return PatchWeights(self.plan.traversals[number].grid, window, self.plan.outputs[number].held_dtype(False), self._home)

    def run(self, start: int, stop: int) -> None:
        """Run from a slab to another one."""
        with contextlib.ExitStack() as stack:
            names = ["read", "write", "interpolate", *["add"] * self._num_adding()]
            threads = [stack.enter_context(ThreadPoolExecutor(1, f"voxloom-{name}")) for name in names]
            _use_one_thread(threads)
            self._reading, writing, interpolating, *adding = threads
            self._delivery.share = SharedOut([interpolating], takes_part=True)
            self._writer = Writer(writing)
            self._share = SharedOut(adding) if adding else None
            try:
                with self.runner.models.ready():
                    self._gather_all(start, stop)
                self._writer.wait()
            except _NanFound as found:
                with self.runner.models.ready():
                    raise self._explained(found) from None
            finally:
                self._writer.stop()
                self._reading.shutdown(cancel_futures=True)

    def _num_adding(self) -> int:
        """Number of threads that add patches; none if the caller's does it."""
        plan = self.plan
        largest = max(
            each.channels * math.prod(each.size(plan.grid.patch_size)) * each.held_dtype(plan.window is None).itemsize
            for each in plan.outputs
        )
        if self._home != HOST or largest < SHARED_BYTES:
            return 0
        with SETTING_THREADS:  # in between it says something else
            threads = torch.get_num_threads()
        return min(threads, MOST_ADDING) if threads > 1 else 0

    # Patches

    def _gather_all(self, start: int, stop: int) -> None:
        plan = self.plan
        # Half of what is spare is left for what cannot be foreseen.
        self._trimmer = Trimmer(plan.peak_bytes - plan.memory.batches - BASE_BYTES // 2)
        self._ahead = self._read_ahead(self._batches(start, stop))
        self._outputs: list[Tensor] = []
        self._unused: deque[Ints] = deque()  # patches that the outputs at hand are of, and that have not been added yet
        for number, block in enumerate(plan.blocks):
            first, last = self._span(number, start, stop)
            if first >= last:
                continue
            joining = plan.joining(block)
            traversals = list(map(joining.applied, plan.traversals))
            self._sums = [self._sum(output, each, joining.block) for output, each in enumerate(traversals)]
            self._room = open_bytes(plan.outputs, traversals, joining.block, plan.needed is not None)
            self._pool.kept_bytes = self._pool.total_bytes = self._room
            self._writer.submit(self._delivery.begin, block)
            for outer in range(self._begin(first), last):
                self._gather_slab(outer, block, joining, is_wanted=outer >= first)
        self._outputs = []

    def _gather_slab(self, outer: int, block: Block, joining: Joining, is_wanted: bool) -> None:
        traversal = self.plan.traversal
        is_first = True
        for step, parts in joining.steps(traversal, outer):
            for patch in itertools.chain.from_iterable(traversal.patches(part, block, self.plan.needed) for part in parts):
                values = self._take(patch)
                if is_first:
                    self._wait_for_records()
                    is_first = False
                self._make_room(patch, is_wanted)
                for number, output in enumerate(values):
                    self._add(number, output, patch)
                del values, output  # before the next batch is in the model
            self._finish(step, is_wanted)
        self._hand_over(is_wanted)
        if is_wanted:
            self._recorded.append(self._writer.submit(self._slab_finished))

    def _wait_for_records(self) -> None:
        """Wait until no more than one slab is still to be recorded: what lies beyond is lost in a crash."""
        while len(self._recorded) > 1:
            self._recorded.popleft().result()

    def _begin(self, outer: int) -> int:
        """Say with which group of the outer axis to begin: what is finished with one began to be summed some groups earlier."""
        return self.plan.begin(outer) if outer > 0 else 0

    def _take(self, patch: Ints) -> list[Tensor]:
        """Give the outputs for the next patch, for which the model is run when those of the batch before have been used up."""
        if not self._unused:
            self._run_next()
        assert self._unused[0] == patch
        self._unused.popleft()
        return [output[-1 - len(self._unused)] for output in self._outputs]

    def _run_next(self) -> None:
        if self._outputs:
            self._outputs = []  # before those of the next batch are made
            self._trimmer.check(max(0, self.plan.memory.front - sum(total.num_bytes for total in self._sums)))
        (batch, skipped), reading = next(self._ahead)
        if reading is None:
            assert self._first is not None
            outputs = self._first.take()
        else:
            outputs = self._run(reading.take(), batch)
        del reading
        self.runner.check(self.plan, outputs, self._size_of(batch))
        self._outputs, self._unused = [output[: len(batch)] for output in outputs], deque(batch[skipped:])
        self._progress(len(batch) - skipped)

    def _batches(self, start: int, stop: int) -> Iterator[Numbered]:
        for number, block in enumerate(self.plan.blocks):
            first, last = self._span(number, start, stop)
            if first < last:
                yield from self.plan.batches(block, self._begin(first), last)

    def _span(self, number: int, start: int, stop: int) -> tuple[int, int]:
        """Say which slabs of a block lie between two slabs: the first may be one before the block, which then is begun anew."""
        count = self.plan.traversal.num_outer
        return start - number * count, min(count, stop - number * count)

    def _read_ahead(self, batches: Iterator[Numbered]) -> Iterator[tuple[Numbered, Reading | None]]:
        """Read each batch while the one before it is in the model, but for one that has been run already.

        Small ones are read together, since another thread's turn takes longer than they do.
        """
        waiting: deque[tuple[list[Numbered], Reading | None]] = deque()
        if self._first is not None and (one := next(batches, None)) is not None:
            if self._first.is_of(one[0]):
                waiting.append(([one], None))
            else:
                self._first.take()  # which was of no use
                self._first = None
                batches = itertools.chain([one], batches)
        # The first ones are read alone, so that the model need not wait for many.
        most, count = self._num_together(), 1
        while group := list(itertools.islice(batches, count)):
            count = min(2 * count, most)
            waiting.append((group, Reading(self._reading.submit(self._read_all, [batch for batch, _ in group]))))
            if len(waiting) > 1:
                given, reading = waiting.popleft()
                yield from ((batch, reading) for batch in given)
        for given, reading in waiting:
            yield from ((batch, reading) for batch in given)

    def _num_together(self) -> int:
        """Number of batches that are read together."""
        plan = self.plan
        voxels = math.prod(size + 2 * around for size, around in zip(plan.grid.patch_size, plan.context, strict=True))
        return max(1, TOGETHER_BYTES // (voxels * plan.batch_size * self.source.shape[0] * plan.dtype.itemsize))

    def _read_all(self, batches: Sequence[Batch]) -> list[Tensor | BaseException]:
        """Read batches, up to one that cannot be: why is said in its place, when its turn comes."""
        read: list[Tensor | BaseException] = []
        try:
            for batch in batches:
                read.append(self._read(batch))
        except BaseException as error:  # noqa: BLE001 - it is raised later
            read.append(error)
        return read

    def _size_of(self, batch: Batch) -> int:
        return self.plan.batch_size if self.plan.has_full_batches else len(batch)

    def _read_in_turn(self, batch: Batch) -> Tensor:
        """Read in the thread that reads all else, since a source may not be read by two at a time."""
        return self._reading.submit(self._read, batch).result()

    def _read(self, patches: Batch) -> Tensor:
        """Read a batch, and bring it to the device while that computes."""
        device, size = self.runner.models.device, self._size_of(patches)
        plan = self.plan
        batch = read_batch(self.source, plan.grid, patches, size, plan.dtype, device.type == "cuda", plan.context)
        if device.type != "cuda":
            return batch
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        try:
            with torch.cuda.stream(stream):
                copied = batch.to(device, non_blocking=True)
        except torch.cuda.OutOfMemoryError:
            return batch  # it is copied, in parts if need be, when its turn comes
        stream.synchronize()
        copied.record_stream(torch.cuda.default_stream(device))  # its memory is not reused before the model is done with it
        return copied

    def _run(self, batch: Tensor, patches: Batch) -> list[Tensor]:
        def read_again() -> Tensor:
            return self._read_in_turn(patches)

        try:
            return self.runner.run(batch, read_again)
        except DeviceMemoryError:
            if self._home == HOST:
                raise
            self._move_to_host()
            return self.runner.run(read_again(), read_again)

    # Sums

    def _sum(self, number: int, traversal: Traversal, block: Block) -> StreamingAccumulator:
        spec, weights, needed = self.plan.outputs[number], self._weights[number], self.plan.needed
        share, allocate = self._share, self._pool.empty
        return StreamingAccumulator(traversal, block, spec.channels, spec.dtype, self._home, weights, needed, allocate, share)

    def _add(self, number: int, patch: Tensor, numbers: Ints) -> None:
        try:
            self._sums[number].add(patch, numbers)
        except RuntimeError as error:
            if not is_out_of_memory(error) or self._home == HOST:
                raise
            self._move_to_host()
            self._sums[number].add(patch, numbers)

    def _move_to_host(self) -> None:
        self._warn(
            f"there was too little memory on {self._home} for the sum of patches: the run goes on with it in the memory of the"
            " host, so that its last bits may differ from those of another run"
        )
        self._home = HOST
        for total in self._sums:
            total.move_to(HOST)
        for weights in filter(None, self._weights):
            weights.move_to(HOST)
        self.runner.models.free()

    def _make_room(self, patch: Ints, is_wanted: bool) -> None:
        """Wait for the writer until there is room for what a patch adds to."""
        room = self._room - sum(total.num_bytes + total.bytes_to_open(patch) for total in self._sums)
        if self._finished_bytes + self._writer.num_bytes > room:
            self._hand_over(is_wanted)
            self._writer.wait_for_room(room)

    def _warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)
            warnings.warn(text, RuntimeWarning, stacklevel=2)

    # What is finished

    def _finish(self, step: Step, is_wanted: bool) -> None:
        """Hand over what is finished with a step."""
        for number, total in enumerate(self._sums):
            for finished in total.finish(step):
                if is_wanted or self.plan.maps is not None:
                    self._finished.append((number, finished))
                    self._finished_bytes += finished.num_bytes
                del finished  # the writer alone holds it soon
                if len(self._finished) == MOST_WAITING or self._finished_bytes >= TOGETHER_BYTES:
                    self._hand_over(is_wanted)

    def _hand_over(self, is_wanted: bool) -> None:
        """Give the writer what is finished: small tiles together, since another thread's turn takes longer than they do."""
        if self._finished:
            handed_over, num_bytes = self._finished, self._finished_bytes
            self._finished, self._finished_bytes = deque(), 0
            self._writer.submit(self._deliver, handed_over, is_wanted, num_bytes=num_bytes)

    def _deliver(self, handed_over: deque[tuple[int, FinishedTile]], is_wanted: bool) -> None:
        """Reduce and write tiles, of which nothing is left when that is done: the writer keeps its arguments for longer."""
        while handed_over:
            number, finished = handed_over.popleft()
            finite = None
            if is_wanted and finished.values is not None:
                finite = self._check_values(number, finished)
            self._delivery(number, finished, is_wanted, finite)
            del finished

    def _check_values(self, number: int, finished: FinishedTile) -> bool:
        """Look for NaN, and say whether all values are finite."""
        values = finished.values
        assert values is not None
        if is_finite(values):
            return True
        nans = values.isnan().any(0)
        if bool(nans.any()):
            place = tuple(nans.nonzero()[0].tolist())
            raise _NanFound(number, tuple(map(int.__add__, finished.box.start, place)))
        self._warn(f"{called(self.plan.outputs[number].source)} of the model for {self.plan.name} holds infinity")
        return False

    def _explained(self, found: _NanFound) -> OutputError:
        """Find the patch that NaN came from, by running those that hold the voxel once more."""
        plan, grid = self.plan, self.plan.traversals[found.output].grid
        box = Box(found.voxel, tuple(index + 1 for index in found.voxel))
        what = f"{called(plan.outputs[found.output].source)} of the model for {plan.name}"
        has_infinity = False
        for index in grid.touching(box):
            numbers = grid.unravel(index)
            if plan.needed is not None and not plan.needed[numbers]:
                continue

            def read(numbers: Ints = numbers) -> Tensor:
                return self._read_in_turn((numbers,))

            output = self.runner.run(read(), read, only=found.output)[0][0]
            has_infinity = has_infinity or bool(output.isinf().any())
            if bool(output.isnan().any()):
                location = plan.grid.location(numbers)
                of_input = "; the patch itself holds NaN" if bool(read()[0].isnan().any()) else ""
                return OutputError(f"{what} holds NaN for the patch {location.index} to {location.index_fin}{of_input}")
        if has_infinity:
            return OutputError(f"{what} holds infinities of both signs, or one too large to sum, at voxel {found.voxel}")
        return OutputError(f"{what} held NaN at voxel {found.voxel}, but not when its patches were computed once more")


def _use_one_thread(helpers: Sequence[ThreadPoolExecutor]) -> None:
    """Let PyTorch not share out work of helpers: its threads wait by spinning, and would be in the way of the model's."""
    with SETTING_THREADS:
        threads = torch.get_num_threads()
        try:
            for helper in helpers:
                helper.submit(torch.set_num_threads, 1).result()
        finally:
            torch.set_num_threads(threads)  # it is a matter of each thread, but new ones begin with what was set last


@in_forked_process
def _start_anew() -> None:
    """In a forked process: a lock may have been held by a thread that is not there any more."""
    global SETTING_THREADS
    SETTING_THREADS = threading.Lock()
