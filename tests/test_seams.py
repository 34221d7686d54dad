"""The seams: every implementation that comes with voxloom, put through the tests that others can put theirs through."""

import functools
import pickle
import subprocess
import sys
import textwrap
from dataclasses import replace

import numpy as np
import pytest
import torch

import voxloom as vx
from slow import slow
from voxloom.aggregation.accumulator import Accumulator
from voxloom.core.boxes import Box
from voxloom.errors import ImageError, TargetExistsError
from voxloom.inference import ThreadExecutor
from voxloom.io.arrays.composed import StackedSource
from voxloom.io.formats import open_volume
from voxloom.io.nifti.store import NiftiStore
from voxloom.io.writing.sinks import SinkStore
from voxloom.testing import MemoryStore, SerialExecutor, check_executor, check_source, check_store

AFFINE = np.array([[0.0, 2, 0, -30], [-1.5, 0, 0, 4], [0, 0, 3, 5], [0, 0, 0, 1]])
SHAPE = (20, 17, 23)


def values(channels=1, dtype=torch.float32):
    return (torch.rand(channels, *SHAPE, generator=torch.Generator().manual_seed(channels)) * 100).to(dtype)


def saved(folder, name, data):
    vx.ScalarImage(data, affine=AFFINE).save(folder / name)
    return folder / name


# Sources


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".nrrd", ".mha", ".mgz"])
def test_files(tmp_path, ending):
    data = values(dtype=torch.float32)
    path = saved(tmp_path, f"scan{ending}", data)
    check_source(vx.ScalarImage(path), data, AFFINE)
    check_source(open_volume(path), data, AFFINE)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float16, np.float64, ">i2"])
def test_arrays(dtype):
    data = (values(3).numpy() * 2).astype(dtype)
    held = torch.from_numpy(data.astype(np.int32 if data.dtype == np.uint16 else data.dtype.newbyteorder("=")))
    check_source(vx.ArraySource(data, affine=AFFINE), held, AFFINE)
    check_source(vx.ArraySource(data[0], affine=AFFINE), held[:1], AFFINE)


def test_images_in_memory():
    data = values(2)
    check_source(vx.ScalarImage(data, affine=AFFINE), data, AFFINE)
    check_source(vx.ScalarImage(vx.ArraySource(data.numpy(), affine=AFFINE)), data, AFFINE)


def test_several_as_channels(tmp_path):
    one, other = values(1), values(2)
    sources = [vx.ScalarImage(saved(tmp_path, "a.nii", one)), vx.ArraySource(other.numpy(), affine=AFFINE)]
    check_source(StackedSource(sources, ["one", "other"]), torch.cat([one, other]), AFFINE)
    paths = [saved(tmp_path, "a.nii.gz", one), saved(tmp_path, "b.nrrd", one + 1)]
    check_source(vx.ScalarImage(paths), torch.cat([one, one + 1]), AFFINE)


class Wrong(vx.ArraySource):
    def read(self, box):
        return super().read(box).flip(1)


def test_the_tests_of_sources_can_fail():
    data = values()
    with pytest.raises(AssertionError, match="other values were read"):
        check_source(Wrong(data.numpy(), affine=AFFINE), data, AFFINE)
    with pytest.raises(AssertionError, match="the affine is"):
        check_source(vx.ArraySource(data.numpy()), data, AFFINE)


class Opened(vx.ArraySource):
    """Notes the boxes that are read."""

    def __init__(self, array, **more):
        super().__init__(array, **more)
        self.boxes = []

    def read(self, box):
        self.boxes.append(box)
        return super().read(box)


def test_a_source_is_never_read_whole_for_what_needs_parts():
    source = Opened(np.random.default_rng(0).random((60, 60, 60), dtype=np.float32), affine=AFFINE)
    subject = vx.Subject(image=vx.ScalarImage(source))
    list(vx.UniformSampler(8, seed=0)(subject, num_patches=5))
    list(vx.GridSampler(subject, patch_size=20))
    vx.predict(torch.nn.Identity(), source, patch_size=20)
    vx.predict(torch.nn.Identity(), vx.ScalarImage(source), patch_size=20, mask=source._array > 0.999)
    assert len(source.boxes) > 30
    assert max(box.numel for box in source.boxes) <= 20**3


def test_an_image_of_a_source_is_an_image_like_others():
    data = values()
    image = vx.ScalarImage(vx.ArraySource(data.numpy(), affine=AFFINE))
    assert not image.is_loaded
    assert image.spacing == pytest.approx((1.5, 2, 3))
    assert torch.equal(image[:, 3:5].data, data[:, 3:5])
    assert not image.is_loaded
    copy = pickle.loads(pickle.dumps(image))
    assert torch.equal(copy.data, data)
    copy.unload()
    assert torch.equal(copy.data, data)
    loader = vx.SubjectsLoader(vx.Queue([vx.Subject(image=image)], 4, 6, vx.UniformSampler(8), num_workers=1, seed=0), 3)
    for batch in loader:
        for patch, location in zip(batch.image.data, batch.patch_location, strict=True):
            assert torch.equal(patch, data[(slice(None), *location.box.slices)])


# Stores


def test_files_as_stores(tmp_path):
    for ending in (".nii", ".nii.gz"):
        (tmp_path / ending).mkdir()

        def make(name, ending=ending):
            return NiftiStore(tmp_path / ending / f"{name}{ending}")

        check_store(make, lambda made: (made if isinstance(made, vx.Image) else vx.ScalarImage(made)).data)
        assert not [path.name for path in (tmp_path / ending).iterdir() if path.name.startswith(".")]


def test_memory_as_store(tmp_path):
    disk = {}
    check_store(lambda name: MemoryStore(disk, tmp_path / name), lambda image: image.data)
    check_store(lambda _: SinkStore(vx.inference.MemorySink()), lambda image: image.data)
    assert [key for key in disk if isinstance(key, tuple)] == []  # nothing unfinished is left
    assert list(tmp_path.iterdir()) == []


class Forgetful(MemoryStore):
    def flush(self):
        self._waiting = self._waiting[1:]
        super().flush()


def test_the_tests_of_stores_can_fail(tmp_path):
    disk = {}
    with pytest.raises(AssertionError, match="holds other values"):
        check_store(lambda name: Forgetful(disk, tmp_path / name), lambda image: image.data)


@pytest.mark.parametrize("stop", [2, 23, 44, *map(slow, (9, 16, 30, 37, 51, 58))])
def test_a_store_of_the_users_own_is_resumed_wherever_a_run_stops(tmp_path, stop):
    image = vx.ScalarImage(values(), affine=AFFINE)
    calls = []

    def model(batch):
        calls.append(len(batch))
        if len(calls) == stop:
            raise KeyboardInterrupt
        return batch * 2

    options = {"patch_size": 8, "patch_overlap": 4, "model_name": "doubling"}
    disk = {}
    with pytest.raises(KeyboardInterrupt):
        vx.predict(model, image, output=MemoryStore(disk, tmp_path / "result"), **options)
    with_log = (tmp_path / ".result.voxloom").exists()
    total = len(calls)
    made = vx.predict(model, image, output=MemoryStore(disk, tmp_path / "result"), **options) if not with_log else None
    if with_log:
        with pytest.warns(RuntimeWarning, match="an unfinished run is resumed"):
            made = vx.predict(model, image, output=MemoryStore(disk, tmp_path / "result"), **options)
        assert len(calls) - total <= len(vx.plan(torch.nn.Identity(), image, 8, patch_overlap=4).grid)
    assert torch.allclose(made.data, image.data * 2)
    assert list(tmp_path.iterdir()) == []


# Executors and plans


@pytest.mark.parametrize("executor", [ThreadExecutor(), SerialExecutor()], ids=["threads", "serial"])
def test_executors(executor):
    check_executor(executor)


class Skipping(SerialExecutor):
    def run(self, plan, runner, source, stores, start=0, **more):
        return super().run(plan, runner, source, stores, start + 1, **more)


class Unmasked(SerialExecutor):
    def run(self, plan, *others, **more):
        return super().run(replace(plan, needed=None), *others, **more)


class Empty(SerialExecutor):
    """Writes nothing but zeros where a result is on another grid."""

    def _deliver(self, plan, delivery, of, box, total):
        if plan.maps is None or total.is_empty:
            return super()._deliver(plan, delivery, of, box, total)
        empty = Accumulator(total.grid, plan.window, torch.device("cpu"), plan.fill)
        return super()._deliver(plan, delivery, of, box, empty)


class Blind(SerialExecutor):
    """Forgets what is computed after the first of several blocks."""

    def _deliver(self, plan, delivery, of, box, total):
        if plan.num_blocks == 1 or box.start == (0, 0, 0):
            super()._deliver(plan, delivery, of, box, total)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Skipping, Unmasked, Empty, Blind])
def test_the_tests_of_executors_can_fail(kind):
    with pytest.raises(AssertionError, match="other values"):
        check_executor(kind())


def test_an_executor_of_the_users_own_resumes_a_run(tmp_path):
    image = vx.ScalarImage(values(), affine=AFFINE)
    options = {"patch_size": 8, "patch_overlap": 4, "model_name": "same"}

    def stop(batch):
        calls.append(1)
        if len(calls) > 30:
            raise KeyboardInterrupt
        return batch

    calls = []
    with pytest.raises(KeyboardInterrupt):
        vx.predict(stop, image, output=tmp_path / "o.nii", **options)
    with pytest.warns(RuntimeWarning, match="resumed"):
        made = vx.predict(torch.nn.Identity(), image, output=tmp_path / "o.nii", executor=SerialExecutor(), **options)
    assert torch.allclose(made.data, image.data)


@pytest.mark.slow
def test_a_plan_travels(tmp_path):
    """Whole and frozen, to a process that knows only its file."""
    plan = vx.plan(
        torch.nn.MaxPool3d(2), torch.rand(1, 40, 48, 56), 16, output_scale=0.5, batch_size=3, mask=torch.ones(40, 48, 56)
    )
    with pytest.raises(AttributeError):
        plan.batch_size = 2
    (tmp_path / "plan").write_bytes(pickle.dumps(plan))
    script = """
        import pathlib, pickle
        plan = pickle.loads(pathlib.Path("plan").read_bytes())
        print(plan)
        print([list(plan.batches(block)) for block in plan.blocks])
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    assert run.stdout == f"{plan}\n{[list(plan.batches(block)) for block in plan.blocks]}\n"


def test_boxes_of_a_plan_are_those_that_are_written():
    written = []

    class Sink(vx.inference.MemorySink):
        def write(self, box, block):
            written.append(box)
            super().write(box, block)

    image = torch.rand(1, 40, 41, 42)
    vx.predict(torch.nn.Identity(), image, 16, output=Sink())
    plan = vx.plan(torch.nn.Identity(), image, 16)
    slabs = [plan.traversal.block_box(block, outer) for block in plan.blocks for outer in range(plan.traversal.num_outer)]
    assert sum(box.numel for box in written) == sum(box.numel for box in slabs) == 40 * 41 * 42
    assert all(any(Box.__and__(box, slab) == box for slab in slabs) for box in written)


def test_any_function_that_reads_boxes_is_enough():
    """The protocol is all that is needed: no class of voxloom's."""

    class Formula:
        shape, dtype, affine, codes = (1, 30, 30, 30), torch.float32, AFFINE, vx.SpaceCodes()
        chunks, resident_bytes, paths = (30, 30, 30), 0, ()

        def read(self, box):
            axes = [torch.arange(start, stop) for start, stop in zip(box.start, box.stop, strict=True)]
            return functools.reduce(torch.add, torch.meshgrid(*axes, indexing="ij"))[None].float()

        def fingerprint(self):
            return "i + j + k"

    made = vx.predict(torch.nn.Identity(), Formula(), patch_size=16, overlap_mode="crop")
    assert torch.equal(made.data, Formula().read(Box.of_shape((30, 30, 30))))
    assert np.array_equal(made.affine, AFFINE)


class Untrue(vx.ArraySource):
    """Returns something else than it says."""

    def __init__(self, change):
        super().__init__(values(3).numpy(), affine=AFFINE)
        self.change = change

    def read(self, box):
        return self.change(super().read(box))


@pytest.mark.parametrize(
    "change", [lambda read: read[0], lambda read: read[:1], lambda read: read.double(), lambda read: read[:, 1:]]
)
def test_a_source_that_returns_something_else_than_it_says_is_refused(change):
    """It would be broadcast, or rounded where a patch reaches beyond the border and not elsewhere."""
    source = Untrue(change)
    with pytest.raises(ImageError, match=r"Untrue\.read returned .* it must be torch\.float32 of shape \(3, "):
        vx.predict(torch.nn.Identity(), source, patch_size=8, patch_overlap=4, padding_mode="reflect")
    with pytest.raises(ImageError, match="Untrue"):
        vx.ScalarImage(source).load()
    with pytest.raises(ImageError, match="Untrue"):
        vx.predict(torch.nn.Identity(), values(3), patch_size=8, mask=source)


def test_tensors_as_arrays():
    for data in (
        values(2),
        values(2, torch.int16),
        values(1).to(torch.bfloat16),
        values(1).transpose(1, 3).contiguous().transpose(1, 3),
    ):
        check_source(vx.ArraySource(data, affine=AFFINE), data, AFFINE)


class Exclusive(MemoryStore):
    """Fails where something is there already, says that it is empty, and keeps what was flushed alone."""

    def __len__(self):
        return 0

    def create(self, spec, run):
        assert (self.path, run) not in self._disk
        super().create(spec, run)

    def commit(self, sidecar, run):
        self._waiting = []
        return super().commit(sidecar, run)


def test_a_store_that_relies_on_all_that_is_promised(tmp_path):
    disk = {}
    check_store(lambda name: Exclusive(disk, tmp_path / name), lambda image: image.data)


def test_a_store_without_a_path(tmp_path):
    store = Exclusive({}, tmp_path / "none")
    store.path = None
    made = vx.predict(torch.nn.Identity(), values(), patch_size=8, overlap_mode="crop", output=store)
    assert torch.equal(made.data, values())


def test_a_run_that_was_killed_before_anything_was_finished(tmp_path):
    """Its log is there, and what the store has made: the next run makes it anew."""
    disk = {}
    predictor = vx.Predictor(torch.nn.Identity(), 8, overlap_mode="crop")

    def stop(self, box, values):
        raise KeyboardInterrupt

    class Killed(Exclusive):
        write = stop

        def abort(self):
            raise SystemExit  # as good as gone: nothing more is done

    with pytest.raises(SystemExit):
        predictor(values(), output=Killed(disk, tmp_path / "killed"))
    assert [key for key in disk if isinstance(key, tuple)]
    assert list(tmp_path.glob(".killed.voxloom"))
    assert torch.equal(predictor(values(), output=Exclusive(disk, tmp_path / "killed")).data, values())
    assert list(disk) == [tmp_path / "killed"]


def test_a_store_that_cannot_be_resumed_is_begun_anew(tmp_path):
    class Forgetful(MemoryStore):
        supports_resume = False

        def reopen(self, spec, run):
            raise AssertionError

    disk = {}
    check_store(lambda name: Forgetful(disk, tmp_path / name), lambda image: image.data)
    assert not [key for key in disk if isinstance(key, tuple)]
    assert not list(tmp_path.glob(".*"))


def test_an_error_in_ending_a_store_does_not_hide_the_error_itself():
    class Full:
        def open(self, spec):
            raise OSError("no room")

        def write(self, box, values): ...

        def close(self): ...

        def abort(self):
            raise AttributeError("never opened")

    class Other(Full):
        aborted = False

        def abort(self):
            Other.aborted = True

    def model(batch):
        return {"a": batch, "b": batch}

    with pytest.raises(OSError, match="no room") as caught:
        vx.predict(model, values(), patch_size=8, output={"a": Full(), "b": Other()})
    assert "could not be aborted: AttributeError('never opened')" in caught.value.__notes__[0]
    assert not Other.aborted


def test_a_fingerprint_that_json_writes_in_another_way(tmp_path):
    class Tuples(vx.ArraySource):
        def fingerprint(self):
            return {"v": (1, 2), 3: "three"}

    source = Tuples(values().numpy())
    predictor = vx.Predictor(torch.nn.Identity(), 8, overlap_mode="crop")
    predictor(source, output=tmp_path / "made.nii")
    assert predictor.is_made(source, output=tmp_path / "made.nii")


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.weight.data.mul_(5),
        lambda model: model.weight.data.copy_(model.weight.data.flip(0)),
        lambda model: setattr(model, "stride", (2, 1, 1)),
        lambda model: model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()}),
    ],
)
def test_a_changed_model_is_another_one_to_the_same_predictor(tmp_path, change):
    model = torch.nn.Conv3d(1, 4, 3, padding=1)
    predictor = vx.Predictor(model, 8)
    predictor(values(), output=tmp_path / "made.nii")
    assert predictor.is_made(values(), output=tmp_path / "made.nii")
    change(model)
    with pytest.raises(TargetExistsError, match="models"):
        predictor.is_made(values(), output=tmp_path / "made.nii")
