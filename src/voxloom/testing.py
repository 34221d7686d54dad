"""What every source, store and executor must do, as tests for those who write one of their own; and the simplest of each.

The simplest source is `ArraySource`; the simplest store that can be resumed, and the simplest executor, are here.
"""

import itertools
import json
import pickle
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._version import __version__
from .aggregation.accumulator import Accumulator
from .aggregation.streaming import FinishedTile
from .aggregation.tiles import ExtendedTile
from .core.boxes import Box
from .errors import OutputError, RecordError
from .inference.delivery import Delivery
from .inference.functions import predict
from .inference.inputs import read_batch
from .inference.planning.plan import PredictionPlan
from .inference.predictor import Predictor
from .inference.runner import Executor, FirstBatch, Runner
from .io.protocols import Json, SpaceCodes, VolumeSource, VolumeSpec, VolumeStore
from .sampling.grid import GridSampler
from .volumes.images.image import ScalarImage
from .volumes.subject import Subject

__all__ = ["MemoryStore", "SerialExecutor", "check_executor", "check_source", "check_store"]

AFFINE = np.array([[0.0, -2, 0, 7], [1.5, 0, 0, -3], [0, 0, 3, 11], [0, 0, 0, 1]])
SHAPE = (22, 20, 26)
SIDECAR = {"versions": {"voxloom": __version__}}


# Sources


def check_source(source: VolumeSource, values: Tensor, affine: Any) -> None:
    """Check a source: what it says of itself, what is read of it, and that samplers and `predict` take it.

    Args:
        source: the source.
        values: what it holds, `(C, I, J, K)`, in its type.
        affine: where that lies.

    Raises:
        AssertionError: if it does not hold that.

    Example:
        >>> import numpy as np, torch, voxloom as vx
        >>> from voxloom.testing import check_source
        >>> values = torch.rand(2, 20, 21, 22)
        >>> check_source(vx.ArraySource(values.numpy(), affine=np.eye(4)), values, np.eye(4))
    """
    _same(tuple(source.shape), tuple(values.shape), "the shape")
    _same(source.dtype, values.dtype, "the type")
    assert np.allclose(source.affine, affine, atol=1e-6), f"the affine is {source.affine}, not {affine}"
    assert all(isinstance(path, Path) for path in source.paths), f"paths are {source.paths}: they must be of pathlib"
    assert all(size >= 1 for size in source.chunks), f"chunks are {source.chunks}: no size may be less than 1"
    rng = np.random.default_rng(0)
    boxes = [Box.of_shape(values.shape[1:])]
    for _ in range(20):
        ends = [sorted(rng.choice(size + 1, 2, replace=False).tolist()) for size in values.shape[1:]]
        boxes.append(Box(tuple(start for start, _ in ends), tuple(stop for _, stop in ends)))
    for box in boxes:
        read = source.read(box)
        _same(tuple(read.shape), (len(values), *box.shape), f"the shape of {box}")
        assert torch.equal(read, values[(slice(None), *box.slices)]), f"other values were read of {box}"
    again = pickle.loads(pickle.dumps(source))  # noqa: S301 - just pickled here
    fingerprints = [json.dumps(each.fingerprint(), sort_keys=True) for each in (source, source, again)]
    assert len(set(fingerprints)) == 1, f"the fingerprint changes: {fingerprints}"
    sampler = GridSampler(Subject(image=ScalarImage(source)), patch_size=8, patch_overlap=4)
    for patch in sampler:
        box = patch.patch_location.box
        assert torch.equal(patch.get_image("image").data, values[(slice(None), *box.slices)]), f"the patch {box} is another"
    made = predict(_unchanged, source, patch_size=8, patch_overlap=4, overlap_mode="crop")
    assert torch.equal(made.data, values), "prediction with a model that changes nothing gave other values"
    assert np.allclose(made.affine, affine, atol=1e-6), "prediction lost the affine"


def _unchanged(batch: Tensor) -> Tensor:
    return batch


# Stores


class MemoryStore:
    """Keeps results in a dict that outlives it, as files outlive a process.

    Args:
        disk: where what was flushed, and what is whole, is kept.
        path: what a file would be called; the log of a run is put beside it.
    """

    supports_resume = True
    chunk_shape: tuple[int, int, int] | None = None

    def __init__(self, disk: dict[Any, Any], path: Path) -> None:
        self.path = path
        self._disk = disk
        self._at: tuple[Path, str] | None = None
        self._waiting: list[tuple[Box, Tensor]] = []

    def __repr__(self) -> str:
        return f"MemoryStore({str(self.path)!r})"

    def check(self) -> None:
        """See `VolumeStore`."""

    def create(self, spec: VolumeSpec, run: str) -> None:
        """See `VolumeStore`."""
        self._at = (self.path, run)
        self._disk[self._at] = (spec, torch.empty(spec.shape, dtype=spec.dtype))

    def reopen(self, spec: VolumeSpec, run: str) -> None:
        """See `VolumeStore`."""
        self._at = (self.path, run)
        before = self._disk.get(self._at)
        if before is None or (before[0].shape, before[0].dtype) != (spec.shape, spec.dtype):
            raise RecordError(f"there is no unfinished run {run} of a volume of {spec.dtype} of shape {spec.shape}")

    def write(self, box: Box, values: Tensor) -> None:
        """See `VolumeStore`."""
        self._waiting.append((box, values))

    def flush(self) -> None:
        """See `VolumeStore`."""
        for box, values in self._waiting:
            self._disk[self._at][1][(slice(None), *box.slices)] = values
        self._waiting = []

    def commit(self, sidecar: Mapping[str, Json], run: str) -> ScalarImage:
        """See `VolumeStore`."""
        self.flush()
        if (self.path, run) in self._disk:
            self._disk[self.path] = self._disk.pop((self.path, run))
        spec, values = self._disk[self.path]
        return ScalarImage(values, affine=spec.affine)

    def abort(self) -> None:
        """See `VolumeStore`."""
        self._waiting = []

    def discard(self, run: str) -> None:
        """See `VolumeStore`."""
        self._disk.pop((self.path, run), None)


def check_store(make: Callable[[str], VolumeStore], read: Callable[[Any], Tensor]) -> None:
    """Check a store: that it holds what is written, and can be interrupted at any point, if it says so.

    Args:
        make: makes a store of a place with a name; of the same place as before, where the name is one that it has had.
        read: gives the values of what `commit` returned, `(C, I, J, K)`.

    Raises:
        AssertionError: if it does not hold that.

    Example:
        >>> import pathlib, tempfile
        >>> from voxloom.testing import MemoryStore, check_store
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     disk = {}
        ...     check_store(lambda name: MemoryStore(disk, pathlib.Path(folder) / name), lambda image: image.data)
    """
    for dtype in (torch.uint8, torch.int16, torch.float32):
        _check_parts(make, read, dtype)
    _check_prediction(make, read)


def _check_parts(make: Callable[[str], VolumeStore], read: Callable[[Any], Tensor], dtype: torch.dtype) -> None:
    values = (torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(0)) * 200).to(dtype)
    spec = VolumeSpec((2, *SHAPE), dtype, AFFINE, SpaceCodes(), is_labels=dtype == torch.uint8)
    name, run = f"parts-{str(dtype).removeprefix('torch.')}", "00ff"
    boxes = [
        Box((start, 0, half), (min(start + 5, SHAPE[0]), SHAPE[1], half + 13)) for start in range(0, 22, 5) for half in (0, 13)
    ]
    store = make(name)
    store.check()
    store.create(spec, run)
    store.write(boxes[0], values[(slice(None), *boxes[0].slices)])
    store.abort()
    store = make(name)
    store.discard(run)
    store.discard(run)  # there is nothing any more
    store.create(spec, run)
    for number, box in enumerate(boxes):
        store.write(box, values[(slice(None), *box.slices)].clone())
        if number in (3, 6):
            store.flush()
            if store.supports_resume:
                lost = boxes[number + 1]  # what comes after a flush comes again
                store.write(lost, values[(slice(None), *lost.slices)].clone())
                store.abort()
                store = make(name)
                store.reopen(spec, run)
    store.flush()
    if store.supports_resume:
        _raises(RecordError, lambda: make(name).reopen(spec, "another"))
        store = make(name)  # a process that finds that all is written, and only publishes it
        assert torch.equal(read(store.commit(SIDECAR, run)), values), f"the store holds other values of {dtype}"
        store = make(name)
    assert torch.equal(read(store.commit(SIDECAR, run)), values), f"the store holds other values of {dtype}"


def _check_prediction(make: Callable[[str], VolumeStore], read: Callable[[Any], Tensor]) -> None:
    image = ScalarImage(torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(1)), affine=AFFINE)
    predictor = Predictor(_two_channels, 8, patch_overlap=4, batch_size=2)
    expected = predictor(image).data
    assert torch.equal(read(predictor(image, output=make("whole"))), expected), "the store holds another prediction"
    several = Predictor(_two_channels, 8, patch_overlap=4, batch_size=2, reduce={"whole": None, "labels": "argmax"})
    made = several(image, output={"whole": make("one of two")})["whole"]
    assert torch.equal(read(made), expected), "the store holds another prediction, as one of two"
    store = make("interrupted")
    stopping = Predictor(_Stopping(40), 8, patch_overlap=4, batch_size=2, model_name="two")
    _raises(_StoppedError, lambda: stopping(image, output=store))
    going_on = Predictor(_two_channels, 8, patch_overlap=4, batch_size=2, model_name="two")
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        assert torch.equal(read(going_on(image, output=make("interrupted"))), expected), "what was resumed is another prediction"


def _two_channels(batch: Tensor) -> Tensor:
    return torch.cat([batch, batch * batch], 1)


class _StoppedError(Exception):
    """A run that was interrupted."""


class _Stopping:
    """Stops after some calls."""

    def __init__(self, calls: int) -> None:
        self._calls = calls

    def __call__(self, batch: Tensor) -> Tensor:
        self._calls -= 1
        if self._calls < 0:
            raise _StoppedError
        return _two_channels(batch)


# Executors


class SerialExecutor:
    """Carries out plans in the plainest way: patch by patch, with whole sums in memory; see `Executor`."""

    kept_bytes = 0

    def __repr__(self) -> str:
        return "SerialExecutor()"

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
        sums = [Accumulator(each.grid, plan.window, torch.device("cpu"), plan.fill) for each in plan.traversals]
        size = plan.batch_size if plan.has_full_batches else 1
        with runner.models.ready():
            for patch in plan.traversal.patches_from(0, plan.traversal.whole, plan.needed):

                def read(patch: tuple[int, ...] = patch) -> Tensor:
                    return read_batch(source, plan.grid, (patch,), size, plan.dtype, False, plan.context)

                outputs = runner.run(read(), read)
                runner.check(plan, outputs, size)
                if any(bool(output[0].isnan().any()) for output in outputs):
                    raise OutputError(f"the model returned NaN for the patch {patch} of {plan.name}")
                for total, output in zip(sums, outputs, strict=True):
                    total.add(output[0].cpu(), total.grid.location(patch))
                progress(1)
        delivery = Delivery(plan, runner.reductions, stores)
        for number in range(start, plan.num_slabs if stop is None else stop):
            block, outer = divmod(number, plan.traversal.num_outer)
            for of, summed in enumerate(sums):
                box = plan.traversals[of].block_box(plan.blocks[block].own, outer)
                if box.numel:
                    self._deliver(plan, delivery, of, box, summed)
            slab_finished()
        return []

    def _deliver(self, plan: PredictionPlan, delivery: Delivery, output: int, box: Box, total: Accumulator) -> None:
        """Write what is finished of an output in a box."""
        traversal, spec = plan.traversals[output], plan.outputs[output]
        whole = Box.of_shape(traversal.grid.spatial_shape)
        covered = torch.zeros((1, *whole.shape))
        for numbers in np.ndindex(*traversal.grid.counts) if plan.needed is None else np.argwhere(plan.needed).tolist():
            covered[(slice(None), *traversal.span(tuple(numbers)).slices)] = 1
        if total.is_empty:
            values = torch.zeros((spec.channels, *whole.shape), dtype=spec.held_dtype(plan.window is None))
        else:
            values = total.result(strict=False).clone().mul_(covered)
        if plan.maps is None:
            part = (slice(None), *box.slices)
            delivery(output, FinishedTile(box, None if total.is_empty else values[part], covered[0][box.slices] == 0))
        else:
            coverage = None if plan.needed is None else ExtendedTile(whole, covered, {})
            delivery.write_interpolated(output, box, ExtendedTile(whole, values, {}), coverage, plan.maps[output])


def check_executor(executor: Executor) -> None:
    """Check an executor: that it gives what the plainest one does, to rounding, and passes errors on.

    Args:
        executor: the executor.

    Raises:
        AssertionError: if it does not.

    Example:
        >>> from voxloom.testing import SerialExecutor, check_executor
        >>> check_executor(SerialExecutor())
    """
    generator = torch.Generator().manual_seed(2)
    image = ScalarImage(torch.rand(1, *SHAPE, generator=generator), affine=AFFINE)
    small = image[:, :12, :14, :16]
    mask = torch.zeros(small.spatial_shape, dtype=torch.bool)
    mask[:3, :3, 2:7] = True
    turned = small.affine @ np.array([[0, 0, 0.8, -1], [-0.9, 0, 0, 13], [0, 1.1, 0, -2], [0, 0, 0, 1]])
    oblique = turned @ np.array([[0.8, -0.6, 0, 4], [0.6, 0.8, 0, -3], [0, 0, 1, 0], [0, 0, 0, 1]])
    reflected: dict[str, Any] = {"padding_mode": "reflect"}
    whole = plan = Predictor(_two_channels, 8, patch_overlap=4, **reflected).plan(small)
    in_blocks = reflected
    while plan.num_blocks == 1:  # which takes less memory at first, and is in blocks then
        in_blocks = reflected | {"memory_limit": plan.peak_bytes - 1}
        plan = Predictor(_two_channels, 8, patch_overlap=4, **in_blocks).plan(small)
    cases: list[tuple[Any, dict[str, Any]]] = [
        (_two_channels, {}),
        (_two_channels, {"overlap_mode": "crop", "batch_size": 3}),
        (_two_channels, {"mirror_axes": (0, 2), "batch_size": 2, "overlap_mode": "gaussian"}),
        (_two_outputs, {"reduce": {"sum": None, "labels": "argmax"}, "full_batches": True, "batch_size": 4}),
        (torch.nn.MaxPool3d(2), {"output_scale": 0.5}),
        (_two_channels, reflected),
    ]
    likes = (None, ((16, 15, 17), turned), ((16, 15, 17), oblique))
    # Another grid with each kind of model; what else is asked for makes no difference there.
    kinds = itertools.product([cases[0], cases[3], cases[4]], (None, mask), likes[1:])
    asked = [*itertools.product(cases, (None, mask), likes[:1]), *kinds, ((_two_channels, in_blocks), None, None)]
    assert Predictor(_two_channels, 8, patch_overlap=4).plan(small, mask=mask).num_patches < whole.num_patches
    for (model, options), given, like in asked:
        with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # of blocks
            made, expected = (
                Predictor(model, 8, patch_overlap=4, executor=each, **options)(small, mask=given, like=like)
                for each in (executor, SerialExecutor())
            )
        assert all(each.any() for each in _values_of(expected))
        for one, other in zip(_values_of(made), _values_of(expected), strict=True):
            assert one.shape == other.shape
            assert torch.allclose(one, other, rtol=1e-5, atol=1e-6), f"other values for {options}"
    _raises(_StoppedError, lambda: Predictor(_Stopping(5), 8, executor=executor)(image))
    _raises(OutputError, lambda: Predictor(_not_a_number, 8, executor=executor)(image))
    _check_resuming(executor, image)


def _check_resuming(executor: Executor, image: ScalarImage) -> None:
    options: dict[str, Any] = {"patch_overlap": 4, "batch_size": 2, "model_name": "two"}
    expected = Predictor(_two_channels, 8, executor=SerialExecutor(), **options)(image).data
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        store = MemoryStore({}, Path(folder) / "interrupted")
        _raises(_StoppedError, lambda: Predictor(_Stopping(45), 8, executor=executor, **options)(image, output=store))
        made = Predictor(_two_channels, 8, executor=executor, **options)(image, output=store)
    assert torch.allclose(made.data, expected, rtol=1e-5, atol=1e-6), "what was resumed is another prediction"


def _not_a_number(batch: Tensor) -> Tensor:
    return batch.sqrt() - batch.sqrt() * float("nan")


def _two_outputs(batch: Tensor) -> dict[str, Tensor]:
    return {"sum": batch + 1, "labels": torch.cat([batch, 1 - batch], 1)}


def _values_of(made: Any) -> list[Tensor]:
    return [image.data for image in made.values()] if isinstance(made, dict) else [made.data]


def _same(found: object, expected: object, what: str) -> None:
    assert found == expected, f"{what} is {found}, not {expected}"


def _raises(kind: type[Exception], call: Callable[[], object]) -> None:
    try:
        call()
    except kind:
        return
    raise AssertionError(f"{kind.__name__} was not raised")
