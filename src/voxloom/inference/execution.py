"""Doing what a plan says: reading, the model, the sum, and reducing and writing, side by side."""

import contextlib
import itertools
import math
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.accumulator import sum_dtype
from ..core.boxes import Box
from ..core.forks import in_forked_process
from ..core.front import SHARED_BYTES, Allocate, Finished, Front, Share, WeightsOfPatches
from ..core.memory import Trimmer
from ..core.sizes import Ints
from ..core.sweeps import Column, Place
from ..core.windows import Window
from ..errors import DeviceMemoryError, OutputError
from .inputs import PatchReader
from .models import Models, is_out_of_memory
from .outputs import Result, Stream, called
from .plans import PredictionPlan, ResultForm, SumForm, open_bytes
from .reductions import Function
from .sharing import SharedOut
from .sinks import Sink

__all__ = ["Execution", "Progress"]

HOST = torch.device("cpu")
# Blocks that may wait for the writer, so that what has no size, such as blocks without patches, is bounded too.
MOST_WAITING = 32
# Threads that add patches to sums, at most: more would not be faster, since memory is not.
MOST_ADDING = 16
SETTING_THREADS = threading.Lock()

Progress = Callable[[int], object]
"""Is told of each batch how many patches it had."""


@dataclass(frozen=True)
class _Step:
    """A batch of patches of one layer."""

    column: int
    layer: int
    patches: tuple[Ints, ...]
    """Empty for a layer without any."""
    next_patch: Ints | None
    """The first patch of the layer that is not in the batch; None at the end of the layer."""
    begins_column: bool
    begins_layer: bool


class _NanFound(Exception):  # noqa: N818 - it never leaves this file
    """A finished block holds NaN."""

    def __init__(self, stream: int, voxel: Ints) -> None:
        super().__init__(stream, voxel)
        self.stream, self.voxel = stream, voxel


@dataclass
class Execution:
    """Carries out a plan.

    The model runs in the caller's thread; one thread reads the next batch, some add patches to sums, and another reduces and
    writes what is finished, as far behind as memory lets it be. An error in any of them stops the others.
    """

    plan: PredictionPlan
    models: Models
    streams: Sequence[Stream]
    sums: Sequence[SumForm]
    results: Sequence[tuple[Result, ResultForm, Sink]]
    needed: np.ndarray | None
    window: Window | None
    fill: float
    reader: PatchReader
    name: str
    """What messages call the input."""
    front_device: torch.device
    allocate: Allocate | None = None
    layer_finished: Callable[[], None] = lambda: None
    """Called when all of a layer's blocks have been written."""

    def __post_init__(self) -> None:
        self.warnings: list[str] = []
        self._fronts: list[Front] = []  # of the column that is at hand, one for each sum
        self._room = 0  # bytes for them and for what waits to be written
        self._unfinished: deque[Place] = deque()  # of the layer that is at hand
        # What the writer is at or has yet to do, and the bytes of the sums in each.
        self._writing: deque[tuple[Future, int]] = deque()
        self._has_ended = False
        self._share: Share | None = None
        self._weights = [
            None if self.window is None else WeightsOfPatches(each.sweep, self.window, each.dtype(), self.front_device)
            for each in self.sums
        ]

    def num_patches(self, layers_done: int) -> int:
        """Number of patches that are computed from a layer to the end."""
        return sum(len(step.patches) for step in self._steps(layers_done))

    def repeated_passes(self, layers_done: int) -> int:
        """Number of calls of models, when a run is taken up at a layer, that had been made before."""
        steps = itertools.takewhile(lambda step: not self._is_wanted(step, layers_done), self._steps(layers_done))
        return sum(bool(step.patches) for step in steps) * self.models.num_passes

    def _is_wanted(self, step: _Step, layers_done: int) -> bool:
        return step.column * self.plan.sweep.num_layers + step.layer >= layers_done

    def run(self, layers_done: int = 0, progress: Progress = lambda patches: None) -> None:
        """Run from a layer to the end.

        Args:
            layers_done: layers that were finished earlier, counted over all columns.
            progress: is told of patches that have been computed.
        """
        with contextlib.ExitStack() as stack:
            names = ["read", "write", *["add"] * self._num_adding()]
            threads = [stack.enter_context(ThreadPoolExecutor(1, f"voxloom-{name}")) for name in names]
            _use_one_thread(threads)
            self._reading, self._writer, *adding = threads
            self._share = SharedOut(adding) if adding else None
            try:
                with self.models.ready():
                    self._go(layers_done, progress)
                self._wait()
            except _NanFound as found:
                with self.models.ready():
                    raise self._explained(found) from None
            finally:
                self._has_ended = True
                self._reading.shutdown(cancel_futures=True)
                self._writer.shutdown(cancel_futures=True)

    def _num_adding(self) -> int:
        """Number of threads that add patches; none if the caller's does it."""
        largest = max(each.form.channels * math.prod(each.form.size) * each.dtype().itemsize for each in self.sums)
        if self.front_device != HOST or largest < SHARED_BYTES:
            return 0
        with SETTING_THREADS:  # in between it says something else
            threads = torch.get_num_threads()
        return min(threads, MOST_ADDING) if threads > 1 else 0

    def _go(self, layers_done: int, progress: Progress) -> None:
        trimmer = Trimmer(self.plan.peak_bytes - self.plan.memory.batches)
        for step, reading in self._with_batches(self._steps(layers_done)):
            column = self.plan.columns[step.column]
            if step.begins_column:
                self._fronts = [self._front(column, number) for number in range(len(self.sums))]
                self._room = open_bytes(self.sums, column, self.needed is not None)
            if step.begins_layer:
                self._unfinished.extend(self.plan.sweep.places(step.layer, column))
            is_wanted = self._is_wanted(step, layers_done)
            if reading is None:
                self._finish_before(None, is_wanted)
            else:
                batch = reading.result()
                outputs = self._outputs(batch, step)
                self._check_forms(outputs)
                if step.begins_layer:
                    self._wait()  # until the layer before is recorded, so that no more than one batch beyond it is ever lost
                    self._finish_before(step.patches[0], is_wanted)
                self._gather(outputs, step, is_wanted)
                del reading, batch, outputs  # before those of the next step are made
                trimmer.check()
                progress(len(step.patches))
            if step.next_patch is None and is_wanted:
                self._submit(self.layer_finished)

    def _gather(self, outputs: list[Tensor], step: _Step, is_wanted: bool) -> None:
        """Add a batch to the sums, and hand over what is finished with each of its patches."""
        following = (*step.patches[1:], step.next_patch)
        for number, (patch, next_patch) in enumerate(zip(step.patches, following, strict=True)):
            self._make_room(patch)
            for front, output in zip(self._fronts, outputs, strict=True):
                self._add(front, output[number], patch)
            self._finish_before(next_patch, is_wanted)

    def _front(self, column: Column, number: int) -> Front:
        each = self.sums[number]
        return Front(
            each.sweep,
            column,
            each.form.channels,
            each.form.dtype,
            self.front_device,
            self._weights[number],
            self.needed,
            self.allocate,
            self._share,
        )

    def _add(self, front: Front, patch: Tensor, numbers: Ints) -> None:
        try:
            front.add(patch, numbers)
        except RuntimeError as error:
            if not is_out_of_memory(error) or self.front_device == HOST:
                raise
            self._move_to_host()
            front.add(patch, numbers)

    def _outputs(self, batch: Tensor, step: _Step) -> list[Tensor]:
        def read_again() -> Tensor:
            return self._read_in_turn(step.patches)

        try:
            return self.models.run(batch, self.streams, read_again)
        except DeviceMemoryError:
            if self.front_device == HOST:
                raise
            self._move_to_host()
            return self.models.run(read_again(), self.streams, read_again)

    def _move_to_host(self) -> None:
        self._warn(
            f"there was too little memory on {self.front_device} for the sum of patches: the run goes on with it in the memory"
            " of the host, so that its last bits may differ from those of another run"
        )
        self.front_device = HOST
        for front in self._fronts:
            front.move_to(HOST)
        for weights in filter(None, self._weights):
            weights.move_to(HOST)
        self.models.free()

    def _warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)
            warnings.warn(text, RuntimeWarning, stacklevel=2)

    def _steps(self, layers_done: int) -> Iterator[_Step]:
        """Give all batches that are still needed, and the ends of layers."""
        sweep = self.plan.sweep
        for number, column in enumerate(self.plan.columns):
            first = layers_done - number * sweep.num_layers
            if first >= sweep.num_layers:
                continue
            # What is finished with the first layer that is wanted began to be summed some layers earlier.
            begin = sweep.parts[0].added_by(range(first, first + 1)).start if first > 0 else 0
            for layer in range(begin, sweep.num_layers):
                patches = sweep.patches(layer, column, self.needed)
                batches = iter(lambda: tuple(itertools.islice(patches, self.plan.batch_size)), ())  # noqa: B023 - used at once
                batch, is_first = next(batches, ()), True
                while is_first or batch:
                    following = next(batches, ())
                    yield _Step(number, layer, batch, following[0] if following else None, is_first and layer == begin, is_first)
                    batch, is_first = following, False

    def _with_batches(self, steps: Iterator[_Step]) -> Iterator[tuple[_Step, Future | None]]:
        """Read each batch while the one before it is in the model; there is none to be read for a layer without patches."""
        waiting: list[tuple[_Step, Future | None]] = []
        for step in steps:
            waiting.append((step, self._reading.submit(self._read, step.patches) if step.patches else None))
            while sum(future is not None for _, future in waiting) > 1:
                yield waiting.pop(0)
        while waiting:
            yield waiting.pop(0)

    def _read_in_turn(self, patches: tuple[Ints, ...]) -> Tensor:
        """Read in the thread that reads all else, since a file may not be read by two at a time."""
        return self._reading.submit(self._read, patches).result()

    def _read(self, patches: tuple[Ints, ...]) -> Tensor:
        """Read a batch, and bring it to the device while that computes."""
        device = self.models.device
        if device.type != "cuda":
            return self.reader.read(patches, self.plan.batch_size, False)
        batch = self.reader.read(patches, self.plan.batch_size, True)
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        try:
            with torch.cuda.stream(stream):
                copied = batch.to(device, non_blocking=True)
        except torch.cuda.OutOfMemoryError:
            return batch  # it is copied, in parts if need be, when its turn comes
        stream.synchronize()
        copied.record_stream(torch.cuda.default_stream(device))  # its memory is not reused before the model is done with it
        return copied

    def _check_forms(self, outputs: list[Tensor]) -> None:
        for stream, each, output in zip(self.streams, self.sums, outputs, strict=True):
            expected = (self.plan.batch_size, each.form.channels, *each.form.size)
            if tuple(output.shape) != expected or output.dtype != each.form.dtype:
                raise OutputError(
                    f"{called(stream.source)} of the model changed: it was {each.form.dtype} of shape {expected} at first, and is"
                    f" {output.dtype} of shape {tuple(output.shape)} now"
                )

    # What is finished

    def _finish_before(self, patch: Ints | None, is_wanted: bool) -> None:
        """Hand over what is finished with the steps before a patch, or with all of the layer, as far as that is not done yet."""
        place = None if patch is None else self.plan.sweep.place(patch)
        while self._unfinished and (place is None or self._unfinished[0] < place):
            done = self._unfinished.popleft()
            for number, front in enumerate(self._fronts):
                for finished in front.finish(done):
                    if is_wanted:
                        self._submit(self._deliver, number, [finished], num_bytes=finished.num_bytes)
                    del finished  # the writer alone holds it now

    def _make_room(self, patch: Ints) -> None:
        """Wait for the writer until there is room for what a patch adds to."""
        wanted = sum(front.num_bytes + front.bytes_to_open(patch) for front in self._fronts)
        while self._writing and wanted + sum(size for _, size in self._writing) > self._room:
            self._wait_for_one()

    def _submit(self, function: Callable, *arguments: object, num_bytes: int = 0) -> None:
        """Let the writer do something after what it was given before; waits only if too many things wait already."""
        while len(self._writing) >= MOST_WAITING or (self._writing and self._writing[0][0].done()):
            self._wait_for_one()
        self._writing.append((self._writer.submit(self._unless_failed, function, *arguments), num_bytes))

    def _unless_failed(self, function: Callable, *arguments: Any) -> None:
        """Do nothing after an error: a layer of which a block is missing must not be recorded."""
        if self._has_ended:
            return
        try:
            function(*arguments)
        except BaseException:
            self._has_ended = True
            raise

    def _wait(self) -> None:
        while self._writing:
            self._wait_for_one()

    def _wait_for_one(self) -> None:
        self._writing.popleft()[0].result()

    def _deliver(self, number: int, handed_over: list[Finished]) -> None:
        """Reduce and write a block, of which nothing is left when that is done: the writer keeps its arguments for longer."""
        finished = handed_over.pop()
        if finished.values is not None:
            self._check_values(number, finished)
        for result, form, sink in self.results:
            if result.stream == number:
                sink.write(finished.box, self._reduced(result, form, finished))

    @torch.no_grad()
    def _reduced(self, result: Result, form: ResultForm, finished: Finished) -> Tensor:
        shape = (form.shape[0], *finished.box.shape)
        if finished.values is None:
            return torch.full(shape, self.fill, dtype=form.dtype)
        try:
            block = result.reduction(finished.values.clone() if form.needs_copy else finished.values)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            block = result.reduction(finished.values.cpu())
        if tuple(block.shape) != shape or block.dtype != form.dtype:
            raise OutputError(
                f"reduce gave {block.dtype} of shape {tuple(block.shape)} for a block of shape {tuple(finished.values.shape)}; by"
                f" what it gave for a single voxel, {form.dtype} of shape {shape} was expected"
            )
        if isinstance(result.reduction, Function) and block.is_floating_point() and bool(block.isnan().any()):
            raise OutputError(f"the function that was given as reduce made NaN of a block of {self.name} without any")
        if finished.uncovered is not None:
            block = block.masked_fill(finished.uncovered.to(block.device), self.fill)
        return block.cpu()

    def _check_values(self, number: int, finished: Finished) -> None:
        values = finished.values
        assert values is not None
        # Channel by channel, since sums of another type are made of a copy; in half precision they would soon be infinite.
        if not values.is_floating_point() or math.isfinite(sum(float(each.sum(dtype=sum_dtype(each.dtype))) for each in values)):
            return
        nans = values.isnan().any(0)
        if bool(nans.any()):
            place = tuple(nans.nonzero()[0].tolist())
            raise _NanFound(number, tuple(map(int.__add__, finished.box.start, place)))
        if bool(values.isinf().any()):
            self._warn(f"{called(self.streams[number].source)} of the model for {self.name} holds infinity")

    def _explained(self, found: _NanFound) -> OutputError:
        """Find the patch that NaN came from, by running those that hold the voxel once more."""
        sweep = self.sums[found.stream].sweep
        box = Box(found.voxel, tuple(index + 1 for index in found.voxel))
        what = f"{called(self.streams[found.stream].source)} of the model for {self.name}"
        grid, has_infinity = sweep.grid, False
        for index in grid.touching(box):
            numbers = grid.unravel(index)
            if self.needed is not None and not self.needed[numbers]:
                continue

            def read(numbers: Ints = numbers) -> Tensor:
                return self._read_in_turn((numbers,))

            output = self.models.run(read(), [self.streams[found.stream]], read)[0][0]
            has_infinity = has_infinity or bool(output.isinf().any())
            if bool(output.isnan().any()):
                location = self.plan.grid.location(numbers)
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
