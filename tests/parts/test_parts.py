"""Predictions in parts: the same bytes, whoever computes them, in whatever order, however often they are killed."""

import errno
import itertools
import json
import multiprocessing
import pickle
import random
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import psutil
import pytest
import torch

import voxloom as vx
from parts_models import Hangs, Tells, three, two_outputs
from parts_runs import OPTIONS, hashes, leftovers, run_of, share, store
from slow import slow
from voxloom.cli import parts as cli_parts
from voxloom.cli import predicting
from voxloom.errors import ModeError, OutputError, RecordError, SaveError, ShardError, SizeError, TargetExistsError
from voxloom.inference import ProcessLauncher, SerialLauncher
from voxloom.inference import predictor as predictor_module
from voxloom.inference.parts.shard_plan import as_share
from voxloom.inference.planning.planner import Planner
from voxloom.inference.threads import ThreadExecutor
from voxloom.io.zarr import encoding, storage
from voxloom.runs.parts import forget_failures, records_of, status_of

AFFINE = np.array([[0.0, 2, 0, -30], [-1.5, 0, 0, 4], [0, 0, 3, 5], [0, 0, 0, 1]])
TURNED = np.array([[0.0, 0, 2.9, 9], [1.2, 0, 0, -2], [0, 2.4, 0, 10], [0, 0, 0, 1]])
OBLIQUE = TURNED @ np.array([[0.8, -0.6, 0, 4], [0.6, 0.8, 0, -3], [0, 0, 1, 0], [0, 0, 0, 1]])


@pytest.mark.parametrize("shard_size", [(16, 24, 8), None, *(slow(each) for each in (8, 40, -1))])
def test_parts_of_every_size_give_the_same_bytes(scan, tmp_path, shard_size):
    small = {"chunks": 8, "levels": 3}
    vx.predict(three, scan, output=store(tmp_path / "serial.ome.zarr", **small), **OPTIONS)
    run = run_of(scan, store(tmp_path / "parts.ome.zarr", **small), shard_size=shard_size)
    numbers = list(run.remaining())
    random.Random(0).shuffle(numbers)
    for number in numbers:
        assert run.plan.num_patches(number) > 0
        run.compute(number)
    assert run.is_whole()
    made = run.published()
    assert isinstance(made, vx.LabelMap)
    assert hashes(tmp_path / "parts.ome.zarr") == hashes(tmp_path / "serial.ome.zarr")
    assert leftovers(tmp_path) == []
    assert vx.Predictor(three, **OPTIONS).is_made(scan, output=tmp_path / "parts.ome.zarr")


CASES = {
    "crop": {"overlap_mode": "crop"},
    "padded": {"padding_mode": "reflect"},
    "monai": {"overlap_mode": "monai"},
    "batches": {"batch_size": 3, "full_batches": True},
    "mirrored": {"mirror_axes": (0,)},
    "scores": {"reduce": None},
    "masked": {"mask": 0.995, "fill": 7},
    "masked with zeros": {"mask": 0.9995},
    "on another grid": {"like": ((30, 33, 21), TURNED)},
    "at an angle": {"like": ((30, 33, 21), OBLIQUE)},
    "masked on another grid": {"like": ((30, 33, 21), OBLIQUE), "mask": 0.999, "fill": 3},
    "half the size": {"output_scale": 0.5},
}


QUICK = ("crop", "mirrored", "masked", "at an angle", "masked on another grid")


@pytest.mark.parametrize("case", [case if case in QUICK else slow(case) for case in CASES])
def test_parts_of_every_kind_of_prediction(scan, tmp_path, case):
    options = {**OPTIONS, "patch_overlap": 4, **CASES[case]}
    more = {name: options.pop(name) for name in ("mask", "like") if name in options}
    model = torch.nn.AvgPool3d(2) if "output_scale" in options else three
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        expected = vx.predict(model, scan, **more, **options).data
        made = vx.predict(model, scan, output=store(tmp_path / "parts.zarr"), executor=SerialLauncher(16), **more, **options)
    assert torch.equal(made.data, expected)


def test_files_and_several_results(scan, tmp_path):
    options = {"patch_size": 12, "patch_overlap": 6, "model_name": "two", "reduce": {"sum": None, "labels": "argmax"}}
    expected = vx.predict(two_outputs, scan, **options)
    output = {"sum": tmp_path / "sum.nii.gz", "labels": tmp_path / "labels.ome.zarr"}
    made = vx.predict(two_outputs, scan, output=output, executor=SerialLauncher(16), **options)
    for name, image in made.items():
        assert torch.equal(image.data, expected[name].data)
        assert np.allclose(image.affine, AFFINE)
    assert leftovers(tmp_path) == []
    assert json.loads((tmp_path / "sum.json").read_text())["options"]["patch_size"] == [12, 12, 12]


def test_labels_beside_an_image(scan, tmp_path):
    vx.convert(scan, tmp_path / "scan.ome.zarr", levels=2, chunks=8)
    made = vx.predict(three, scan, output=tmp_path / "scan.ome.zarr/labels/organs", executor=SerialLauncher(16), **OPTIONS)
    assert torch.equal(made.data, vx.predict(three, scan, **OPTIONS).data)
    assert leftovers(tmp_path / "scan.ome.zarr/labels") == []


# Many processes


def test_jobs_in_any_order_at_once_and_twice(scan, tmp_path):
    vx.predict(three, scan, output=store(tmp_path / "serial.ome.zarr"), **OPTIONS)
    target = tmp_path / "parts.ome.zarr"
    context = multiprocessing.get_context("fork")
    # Shares of three and of two, each twice at the same time.
    jobs = [context.Process(target=share, args=(scan, target, n, of, seed)) for of, n, seed in [(3, 0, 1), (3, 0, 2), (2, 1, 3)]]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(120)
        assert job.exitcode == 0
    assert not target.exists()
    status = status_of(target)
    assert 0 < status.done < status.total
    assert status.seconds_left > 0
    for number in range(3):
        share(scan, target, number, 3, number)
        if target.exists():
            break
    assert hashes(target) == hashes(tmp_path / "serial.ome.zarr")
    assert leftovers(tmp_path) == []
    assert status_of(target) is None


def test_devices_of_one_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert ProcessLauncher("all").devices == ["cuda:0", "cuda:1", "cuda:2"]
    assert ProcessLauncher("0, 2").devices == ProcessLauncher([0, "cuda:2"]).devices == ["cuda:0", "cuda:2"]
    assert ProcessLauncher([torch.device("cpu")] * 2).devices == ["cpu", "cpu"]
    assert len(ProcessLauncher(2).devices) == 2
    for wrong in ("", "0,,1", [], ["all"], "0,all"):
        with pytest.raises(ModeError, match="name at least one"):
            ProcessLauncher(wrong)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ModeError, match="no GPU"):
        ProcessLauncher("all")


def test_devices_in_place_of_an_executor(scan, tmp_path, monkeypatch):
    monkeypatch.setattr(predictor_module, "ProcessLauncher", lambda devices: asked.append(devices) or SerialLauncher(16))
    asked = []
    expected = vx.predict(three, scan, **OPTIONS).data
    made = vx.predict(three, scan, output=store(tmp_path / "parts.ome.zarr"), devices="cpu,cpu", **OPTIONS)
    assert torch.equal(made.data, expected)
    assert asked == ["cpu,cpu"]
    with pytest.raises(ModeError, match="leave one out"):
        vx.Predictor(three, 8, devices="cpu", executor=SerialLauncher())


def test_processes_of_one_machine(scan, tmp_path):
    vx.predict(three, scan, output=store(tmp_path / "serial.ome.zarr"), **OPTIONS)
    vx.predict(
        three, scan, output=store(tmp_path / "parts.ome.zarr"), executor=ProcessLauncher(["cpu", "cpu"], shard_size=16), **OPTIONS
    )
    assert hashes(tmp_path / "parts.ome.zarr") == hashes(tmp_path / "serial.ome.zarr")


@pytest.mark.slow
def test_a_process_that_hangs_is_given_up(scan, tmp_path):
    launcher = ProcessLauncher(1, timeout=20, shard_size=16)
    model = Hangs(str(tmp_path / "hung"))
    made = vx.predict(model, scan, output=store(tmp_path / "parts.zarr"), executor=launcher, **OPTIONS)
    assert torch.equal(made.data, vx.predict(three, scan, **OPTIONS).data)
    assert (tmp_path / "hung").exists()


# Failures


def fails(batch):
    if 0 < batch[0, 0, 0, 0, 0] < 0.021:
        raise ValueError("a voxel that the model does not like")
    return three(batch)


@pytest.mark.slow
def test_a_part_that_fails_is_named_and_the_others_finish(scan, tmp_path):
    target = tmp_path / "parts.ome.zarr"
    with pytest.raises(ShardError, match=r"parts of .*scan\.nii .* are missing: [\d, ]+") as raised:
        vx.predict(fails, scan, output=store(target), executor=SerialLauncher(16), **OPTIONS)
    assert "a voxel that the model does not like" in str(raised.value)
    assert "Traceback" in str(raised.value)
    status = status_of(target)
    assert set(status.failed) == set(range(status.total)) - set(status.numbers)
    assert 0 < len(status.failed) < status.total
    assert forget_failures(target) == len(status.failed)
    assert status_of(target).failed == {}
    # The same call goes on, of which only what is missing is computed.
    calls = []

    def counted(batch):
        calls.append(len(batch))
        return three(batch)

    made = vx.predict(counted, scan, output=store(target), executor=SerialLauncher(16), **OPTIONS)
    assert torch.equal(made.data, vx.predict(three, scan, **OPTIONS).data)
    missing = run_of(scan, store(tmp_path / "other.zarr")).plan
    assert sum(calls) == 1 + sum(map(missing.num_patches, status.failed))  # and one to see what the output looks like


def test_a_full_store_keeps_what_is_done(scan, tmp_path, monkeypatch):
    target, count = tmp_path / "parts.ome.zarr", itertools.count()
    opened = Path.open

    def full(path, *arguments, **options):
        if path.suffix == ".raw" and next(count) > 60:
            raise OSError(28, "No space left on device")
        return opened(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(ShardError, match="No space left"):
            vx.predict(three, scan, output=store(target), executor=SerialLauncher(16), **OPTIONS)
    assert status_of(target).done > 0
    vx.predict(three, scan, output=store(target), executor=SerialLauncher(16), **OPTIONS)
    assert torch.equal(vx.LabelMap(target).data, vx.predict(three, scan, **OPTIONS).data)


def test_another_model_image_or_option_is_refused(scan, tmp_path):
    target = store(tmp_path / "parts.ome.zarr")
    run = run_of(scan, target)
    run.compute(next(run.remaining()))
    with pytest.raises(RecordError, match=r"options\.patch_overlap was \[8, 8, 8\] and is \[4, 4, 4\]"):
        list(run_of(scan, target, patch_overlap=4).remaining())
    with pytest.raises(RecordError, match="models"):
        list(run_of(scan, target, model_name="another").remaining())
    other = vx.ScalarImage(torch.rand(1, 44, 40, 36))
    with pytest.raises(RecordError, match="input"):
        list(run_of(other, target).remaining())
    (records_of(tmp_path / "parts.ome.zarr") / "run.json").write_text("{")
    with pytest.raises(RecordError, match="is damaged: remove"):
        list(run_of(scan, target).remaining())
    with pytest.raises(RecordError, match="is damaged"):
        status_of(tmp_path / "parts.ome.zarr")


def test_whoever_begins_says_how_large_parts_are(scan, tmp_path):
    first = run_of(scan, store(tmp_path / "parts.zarr"), shard_size=16)
    count = len(list(first.remaining()))
    second = run_of(scan, store(tmp_path / "parts.zarr"), shard_size=8)
    assert len(list(second.remaining())) == count == len(second)


def test_what_cannot_be_made_in_parts(scan, tmp_path):
    with pytest.raises(OutputError, match="needs an output"):
        vx.predict(three, scan, executor=SerialLauncher(16), **OPTIONS)
    vx.predict(three, scan, output=tmp_path / "there.nii", **OPTIONS)
    with pytest.raises(TargetExistsError):
        vx.predict(three, scan, output=tmp_path / "there.nii", executor=SerialLauncher(16), **OPTIONS)
    with pytest.raises(SaveError, match="replace the input"):
        vx.predict(three, scan, output=scan, executor=SerialLauncher(), overwrite=True, **OPTIONS)
    assert leftovers(tmp_path) == []


def test_shares_are_written_as_fractions():
    assert as_share("3/8") == (3, 8)
    for wrong in ("8/8", "-1/8", "3", "3/0", "a/b"):
        with pytest.raises(SizeError, match="such as 0/8"):
            as_share(wrong)


def test_nothing_is_read_of_parts_without_a_patch(scan, tmp_path):
    image = vx.convert(vx.ScalarImage(torch.rand(1, 48, 48, 48)), tmp_path / "scan.zarr", chunks=8)
    mask = torch.zeros(48, 48, 48)
    mask[4, 4, 4] = 1
    run = vx.Predictor(three, **OPTIONS).shards(image.path, output=store(tmp_path / "parts.zarr"), shard_size=16, mask=mask)
    far = len(run) - 1
    assert run.plan.num_patches(far) == 0
    before = storage.FolderStorage.get
    reads = []
    storage.FolderStorage.get = lambda self, *arguments: (reads.append(arguments), before(self, *arguments))[1]
    try:
        run.compute(far)
    finally:
        storage.FolderStorage.get = before
    assert reads == []
    assert json.loads(next(run.folder.glob(f"*/done/{far}.json")).read_text())["patches"] == 0


@pytest.mark.slow
def test_results_of_other_chunks_and_names_of_one_stem(scan, tmp_path):
    options = {"patch_size": 12, "patch_overlap": 6, "model_name": "two", "reduce": {"sum": None, "labels": "argmax"}}
    expected = vx.predict(two_outputs, scan, **options)
    output = {
        "sum": vx.ZarrStore(tmp_path / "sum.zarr", chunks=6),
        "labels": vx.ZarrStore(tmp_path / "labels.zarr", chunks=(8, 64, 16)),
    }
    made = vx.predict(two_outputs, scan, output=output, executor=SerialLauncher(8), **options)
    assert all(torch.equal(image.data, expected[name].data) for name, image in made.items())
    same = {"sum": tmp_path / "a.nii.gz", "labels": tmp_path / "a.ome.zarr"}
    with pytest.raises(SaveError, match="two results have one stem"):
        vx.predict(two_outputs, scan, output=same, executor=SerialLauncher(), **options)


@pytest.mark.slow
def test_records_without_their_beginning_and_jobs_that_come_late(scan, tmp_path):
    (tmp_path / ".parts.shards/done").mkdir(parents=True)
    with pytest.raises(RecordError, match=r"has no run\.json: remove it"):
        list(run_of(scan, store(tmp_path / "parts.zarr")).remaining())
    late = run_of(scan, store(tmp_path / "other.zarr"))
    share(scan, tmp_path / "other.zarr", 0, 1, 0)
    assert late.published() is None
    assert sorted(leftovers(tmp_path)) == [".parts.shards"]


# Many images


class Recording(SerialLauncher):
    """Notes what it is asked for, and computes it from what travels."""

    launches: ClassVar[list[int]] = []

    def __init__(self, devices, shard_size=None):
        super().__init__(shard_size)

    def launch(self, job, numbers, finished):
        numbers = list(numbers)
        self.launches.append(len(numbers))
        super().launch(pickle.loads(pickle.dumps(job)), numbers, finished)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Four scans, the third of which has a value above 1, and a file that is none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli_parts, "ProcessLauncher", Recording)
    monkeypatch.setattr(Recording, "launches", [])
    (tmp_path / "scans").mkdir()
    for number in range(4):
        data = torch.rand(1, 14, 12, 10 + number, generator=torch.Generator().manual_seed(number))
        data[0, 5, 5, 5] = 3 if number == 2 else 0
        vx.ScalarImage(data).save(tmp_path / "scans" / f"{number}.nii.gz")
    (tmp_path / "scans" / "bad.nii.gz").write_bytes(b"no image")
    return tmp_path


@pytest.mark.slow
def test_many_images_are_computed_together(folder, run, monkeypatch):
    command = ["predict", "--json", "parts_models:three", "scans", "--patch-size", 8]
    run(*command, "-o", "one", code=1)
    states = json.loads(run(*command, "-o", "together", "--devices", "cpu,cpu", code=1).out)
    assert [(each["case"], each["state"]) for each in states] == [
        ("0.nii.gz", "done"),
        ("1.nii.gz", "done"),
        ("2.nii.gz", "done"),
        ("3.nii.gz", "done"),
        ("bad.nii.gz", "failed"),
    ]
    assert Recording.launches == [4]  # small images, each a part
    for number in range(4):
        made, expected = (vx.ScalarImage(folder / name / f"{number}.nii.gz") for name in ("together", "one"))
        assert torch.equal(made.data, expected.data)
        assert np.array_equal(made.affine, expected.affine)
    assert leftovers(folder / "together") == []
    again = json.loads(run(*command, "-o", "together", "--devices", "cpu,cpu", code=1).out)
    assert [each["state"] for each in again] == ["complete"] * 4 + ["failed"]
    assert Recording.launches == [4]
    # As many at a time as are held on the disk; and what is there is replaced if that is asked for.
    monkeypatch.setattr(predicting, "TOGETHER", 2)
    run(*command, "-o", "together", "--devices", "cpu,cpu", "--overwrite", code=1)
    assert Recording.launches == [4, 2, 2]


def test_an_image_that_fails_does_not_stop_the_others(folder, run):
    command = ["predict", "--json", "parts_models:fails_where_large", "scans", "--patch-size", 8, "-o", "out"]
    found = json.loads(run(*command, "--devices", "cpu,cpu", code=1).out)
    assert [each["state"] for each in found] == ["done", "done", "failed", "done", "failed"]
    assert "too large" in found[2]["error"]
    assert sorted(path.name for path in (folder / "out").glob("*.nii.gz")) == ["0.nii.gz", "1.nii.gz", "3.nii.gz"]
    assert Recording.launches == [4]


def test_a_part_that_cannot_be_written_says_which_result(scan, tmp_path, monkeypatch):
    def refuse(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    run = run_of(scan, store(tmp_path / "out.ome.zarr"))
    run.join()
    with monkeypatch.context() as patched:
        patched.setattr(encoding, "bring_to_disk", refuse)
        with pytest.raises(SaveError, match=r"out\.ome\.zarr.*No space left"):
            run.compute(0)
    run.compute(0)
    assert run.done() == {0}


def predict_by_processes(scan, target, folder):
    options = {**OPTIONS, "executor": ProcessLauncher(["cpu", "cpu"], shard_size=16)}
    vx.Predictor(Tells(folder), **options)(scan, output=store(target))


@pytest.mark.slow
def test_processes_end_with_the_one_that_started_them(scan, tmp_path):
    (tmp_path / "told").mkdir()
    arguments = (scan, tmp_path / "out.ome.zarr", tmp_path / "told")
    parent = multiprocessing.get_context("spawn").Process(target=predict_by_processes, args=arguments)
    parent.start()
    for _ in range(600):
        time.sleep(0.1)
        if len(list((tmp_path / "told").iterdir())) == 2:
            break
    workers = [psutil.Process(int(path.name)) for path in (tmp_path / "told").iterdir()]
    assert len(workers) == 2
    assert parent.pid not in [each.pid for each in workers]
    parent.kill()
    parent.join()
    gone, alive = psutil.wait_procs(workers, timeout=30)
    for each in alive:
        each.kill()
    assert len(gone) == len(workers)


class Many(torch.nn.Module):
    def forward(self, batch):
        return torch.cat([three(batch)] * 100, 1)


@pytest.mark.parametrize(("name", "shard_size"), [("out.zarr", None), ("out.zarr", -1), ("out.nii.gz", None)])
def test_parts_fit_into_a_memory_limit(scan, tmp_path, monkeypatch, name, shard_size):
    peaks = []

    def noted(self, plan, *arguments, run=ThreadExecutor.run, **more):
        peaks.append(plan.peak_bytes)
        return run(self, plan, *arguments, **more)

    monkeypatch.setattr(ThreadExecutor, "run", noted)

    def run_within(limit):
        predictor = vx.Predictor(Many(), 8, 4, reduce="argmax", memory_limit=limit, model_name="many")
        target = vx.ZarrStore(tmp_path / name, chunks=8, overwrite=True) if name == "out.zarr" else tmp_path / name
        return predictor.shards(scan, output=target, shard_size=shard_size)

    usual = run_within("1GiB")
    whole = usual.plan.plan.peak_bytes
    limit = whole - usual.plan.plan.memory.front // 2
    small = run_within(limit)
    if (name, shard_size) == ("out.zarr", None):
        assert len(small.plan) > len(usual.plan)
    else:
        assert len(small.plan) == len(usual.plan)
    usual.join()
    usual.compute(0)
    assert max(peaks) <= whole
    del peaks[:]
    other = run_within(limit)  # goes on, with parts as large as they were
    for number in other.remaining():
        other.compute(number)
    assert len(other.plan) == len(usual.plan)
    assert peaks == [] or max(peaks) <= limit
    other.publish()
    expected = vx.predict(Many(), scan, patch_size=8, patch_overlap=4, reduce="argmax")
    assert torch.equal(vx.LabelMap(tmp_path / name).data, expected.data)


@pytest.mark.parametrize("angle", [0, 0.3])
def test_a_part_on_another_grid_is_computed_in_blocks(scan, tmp_path, monkeypatch, angle):
    blocks = []

    def memory_of(self, given, plan, block, function=Planner.memory_of):
        is_small = len(block.own.middle) * len(block.own.inner) <= 2
        memory = function(self, given, plan, block)
        blocks.append(block) if is_small else None
        return memory if is_small else replace(memory, front=2**40)

    monkeypatch.setattr(Planner, "memory_of", memory_of)
    affine = np.diag([1.3, 1.2, 1.1, 1])
    affine[:2, :2] = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ affine[:2, :2]
    like = vx.ScalarImage(torch.zeros(1, 31, 25, 28), affine=affine)
    predictor = vx.Predictor(three, 8, 4, reduce="argmax", memory_limit="1GiB", model_name="three")
    run = predictor.shards(scan, like=like, output=vx.ZarrStore(tmp_path / "out.zarr", chunks=8))
    for number in run.remaining():
        run.compute(number)
    run.publish()
    assert len(blocks) > 1.5 * len(run.plan)
    expected = vx.predict(three, scan, patch_size=8, patch_overlap=4, reduce="argmax", like=like)
    assert torch.equal(vx.LabelMap(tmp_path / "out.zarr").data, expected.data)
