"""Predictions in parts, whoever is killed, comes late, twice, or at the same time: nothing false is said, and nothing left."""

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

import voxloom as vx
from ended import is_ended_at
from parts_models import three
from parts_runs import OPTIONS, dying, hashes, leftovers, run_of, share, store
from slow import slow
from voxloom.cli import parts as cli_parts
from voxloom.errors import RecordError, SaveError, TargetExistsError
from voxloom.inference import Predictor, SerialLauncher
from voxloom.inference.parts import shards
from voxloom.io.nifti.store import NiftiStore
from voxloom.runs import claim, parts
from voxloom.runs.claim import Claim
from voxloom.runs.parts import status_of
from voxloom.runtime import marks

FORK = multiprocessing.get_context("fork")


def expected_of(scan):
    return vx.predict(three, scan, **OPTIONS).data


def computed(run):
    for number in list(run.remaining()):
        run.compute(number)
    return run


def raising(error):
    """Give a function that fails."""

    def call(*_):
        raise error

    return call


@pytest.mark.slow
def test_jobs_that_are_killed_a_hundred_times(scan, tmp_path):
    vx.predict(three, scan, output=store(tmp_path / "serial.ome.zarr"), **OPTIONS)
    expected = hashes(tmp_path / "serial.ome.zarr")
    rng, kills, rounds = random.Random(0), 0, 0
    while kills < 100:
        target = tmp_path / f"{rounds}.ome.zarr"
        rounds += 1
        while not target.exists() or status_of(target) is not None:
            jobs = [FORK.Process(target=share, args=(scan, target, number, 2, kills, 8)) for number in range(2)]
            for job in jobs:
                job.start()
            time.sleep(rng.uniform(0.02, 0.6))
            before = status_of(target)
            for job in jobs:
                if job.is_alive() and kills < 100:
                    os.kill(job.pid, signal.SIGKILL)
                    kills += 1
            for job in jobs:
                job.join()
            after = status_of(target)
            if not target.exists() and before is not None:
                assert after.done >= before.done  # what was recorded is never lost
        assert hashes(target) == expected
        if leftovers(tmp_path):  # of who was killed in the last moment: the next run of the same name removes it
            computed(run_of(scan, store(target, overwrite=True))).publish()
            assert hashes(target) == expected
        assert leftovers(tmp_path) == []


# A process that is killed while it publishes


KINDS = ["parts.ome.zarr", "parts.zarr", "parts.nii.gz", "parts.nii", "scan.ome.zarr/labels/parts"]
SOME = [(KINDS[0], False, 5), (KINDS[2], True, 11)]
MORE = [
    slow(*each)
    for each in [(KINDS[0], True, 1), (KINDS[1], True, 11), (KINDS[2], True, 1), (KINDS[3], False, 11), (KINDS[4], False, 3)]
]


@pytest.mark.parametrize(("kind", "replaces", "every"), SOME + MORE)
def test_publishing_that_is_interrupted_anywhere_is_taken_up(tmp_path, kind, replaces, every):
    image = vx.ScalarImage(torch.rand(1, 20, 18, 16, generator=torch.Generator().manual_seed(0)))
    folder, kept = tmp_path / "folder", tmp_path / "kept"
    folder.mkdir()
    vx.convert(image, folder / "scan.ome.zarr", levels=2, chunks=8)
    path = folder / kind
    predictor = Predictor(three, **OPTIONS)

    def asked():
        target = path if ".nii" in path.name else vx.ZarrStore(path, overwrite=replaces, chunks=16)
        return predictor.shards(image, output=target, shard_size=16, overwrite=replaces)

    if replaces:
        vx.predict(lambda batch: three(batch).flip(1), image, 16, 8, reduce="argmax", model_name="another", output=path)
    computed(asked())
    folder.rename(kept)
    expected, ended = None, 0
    for step in range(1, 1000, every):
        shutil.copytree(kept, folder)
        if not is_ended_at(step, asked().published):
            break
        ended += 1
        status = status_of(path)
        assert status is None or status.done == status.total
        assert predictor.is_made(image, output=path) == (status is None)
        if status is not None:
            asked().publish()
        assert predictor.is_made(image, output=path)
        found = vx.LabelMap(path).data
        expected = found if expected is None else expected
        assert torch.equal(found, expected)
        assert [name for name in leftovers(path.parent) if not name.startswith(".parts.shards.")] == []
        if kind.startswith("scan"):
            assert "parts" in json.loads((path.parent / "zarr.json").read_text())["attributes"]["ome"]["labels"]
        shutil.rmtree(folder)
    assert ended > 3
    assert torch.equal(expected, vx.predict(three, image, **OPTIONS).data)
    assert leftovers(path.parent) == []


def elsewhere(run):
    """Publish on what looks like another machine, and be killed."""
    marks._here = lambda: "e" * 12
    for kind in (vx.ZarrStore, NiftiStore):
        kind.complete = dying(kind.complete)
    run.published()


def killed_elsewhere(run):
    process = FORK.Process(target=elsewhere, args=(run,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.slow
def test_a_process_of_another_machine_is_waited_for_until_it_is_silent(scan, tmp_path, monkeypatch):
    path = tmp_path / "parts.ome.zarr"
    killed_elsewhere(computed(run_of(scan, store(path))))
    assert run_of(scan, store(path)).published() is None  # it may still be at it
    held = next(next((tmp_path / ".parts.shards").glob("*.publishing")).glob("held.eeee*"))
    os.utime(held, (time.time() + 1e6,) * 2)  # its clock is another one
    monkeypatch.setattr(claim, "SILENT_SECONDS", 1.5)
    monkeypatch.setattr(shards, "WAIT_SECONDS", 0.1)
    began = time.monotonic()
    vx.predict(three, scan, output=store(path), executor=SerialLauncher(16), **OPTIONS)
    assert time.monotonic() - began > 1.5
    assert torch.equal(vx.LabelMap(path).data, expected_of(scan))
    assert leftovers(tmp_path) == []


def test_what_has_been_silent_for_long_is_taken_up_at_once(scan, tmp_path):
    path = tmp_path / "parts.nii.gz"
    killed_elsewhere(computed(run_of(scan, path)))
    held = next(next((tmp_path / ".parts.shards").glob("*.publishing")).glob("held.*"))
    os.utime(held, (0, 0))
    assert run_of(scan, path).published() is not None
    assert torch.equal(vx.LabelMap(path).data, expected_of(scan))
    assert leftovers(tmp_path) == []


def test_publishing_that_fails_is_not_waited_for(scan, tmp_path, monkeypatch):
    path = tmp_path / "parts.ome.zarr"
    run = computed(run_of(scan, store(path)))
    with monkeypatch.context() as patch:
        patch.setattr(vx.ZarrStore, "complete", raising(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space left"):
            run.published()
    assert run_of(scan, store(path)).published() is not None
    assert torch.equal(vx.LabelMap(path).data, expected_of(scan))
    assert leftovers(tmp_path) == []


def test_a_result_that_appears_meanwhile_is_kept(scan, tmp_path):
    path = tmp_path / "parts.nii.gz"
    run = computed(run_of(scan, path))
    path.write_bytes(b"another")
    with pytest.raises(TargetExistsError, match="has appeared while its result was made"):
        run.publish()
    assert path.read_bytes() == b"another"
    path.unlink()
    run.publish()
    assert torch.equal(vx.LabelMap(path).data, expected_of(scan))
    assert leftovers(tmp_path) == []


def test_of_several_that_take_it_up_one_can(tmp_path):
    claim.make_free(tmp_path)
    first = Claim(tmp_path)
    assert first.lay()
    assert not Claim(tmp_path).lay()
    others = [Claim(tmp_path) for _ in range(3)]
    found = []
    rename = Path.rename

    def slowly(path, target):
        time.sleep(0.1)
        return rename(path, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", slowly)
        threads = [threading.Thread(target=lambda each=each: found.append(each.lay(at_once=True))) for each in others]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(found) == [False, False, True]
    assert [each.is_held for each in [first, *others]].count(True) == 1
    assert not first.is_held


@pytest.mark.slow
def test_a_process_that_was_taken_for_lost_leaves_the_rest_to_the_other(scan, tmp_path, monkeypatch):
    path = tmp_path / "parts.ome.zarr"
    first, second = computed(run_of(scan, store(path))), run_of(scan, store(path))
    coarser, found = vx.ZarrStore.complete, []

    def meanwhile(*arguments):
        monkeypatch.setattr(vx.ZarrStore, "complete", coarser)
        coarser(*arguments)
        found.append(second.published(take_over=True))

    monkeypatch.setattr(vx.ZarrStore, "complete", meanwhile)
    assert first.published() is None
    assert torch.equal(found[0].data, expected_of(scan))
    assert first.publish().path == path
    assert leftovers(tmp_path) == []


@pytest.mark.slow
def test_a_claim_that_someone_has_removed_is_made_anew(scan, tmp_path, monkeypatch):
    path = tmp_path / "parts.zarr"
    run = computed(run_of(scan, store(path)))
    next((tmp_path / ".parts.shards").glob("*.parts/free")).unlink()
    assert run.published() is None
    monkeypatch.setattr(claim, "SILENT_SECONDS", 1)
    monkeypatch.setattr(shards, "WAIT_SECONDS", 0.1)
    run.publish()
    assert leftovers(tmp_path) == []


def test_clocks_may_differ(tmp_path, monkeypatch):
    claim.make_free(tmp_path)
    first = Claim(tmp_path)
    assert first.lay()
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() + 1e6)
    monkeypatch.setattr(marks, "_here", lambda: "e" * 12)
    assert not Claim(tmp_path).lay()


def test_a_claim_is_kept_again(tmp_path, monkeypatch):
    monkeypatch.setattr(claim, "BEAT_SECONDS", 0.05)
    claim.make_free(tmp_path)
    one = Claim(tmp_path)
    for _ in range(2):
        assert one.lay()
        with contextlib.suppress(KeyError), one:
            (held,) = tmp_path.glob("held.*")
            os.utime(held, (0, 0))
            until = time.monotonic() + 20
            while held.stat().st_mtime == 0 and time.monotonic() < until:
                time.sleep(0.05)
            assert held.stat().st_mtime > 0
            raise KeyError


@pytest.mark.slow
def test_publishing_where_nothing_is_recorded_is_an_error(scan, tmp_path):
    path = tmp_path / "parts.zarr"
    late = run_of(scan, store(path))
    share(scan, path, 0, 1, 0)
    with pytest.raises(RecordError, match="the results have been published, or were not begun"):
        late.publish()


def test_a_slow_process_that_publishes_is_heard_of(scan, tmp_path, monkeypatch):
    monkeypatch.setattr(claim, "SILENT_SECONDS", 0.6)
    monkeypatch.setattr(claim, "BEAT_SECONDS", 0.05)
    slow = NiftiStore.complete
    first, second = (run_of(scan, tmp_path / "parts.nii") for _ in range(2))
    computed(first)
    found = []

    def meanwhile(*arguments):
        time.sleep(1.5)
        found.append(second.published())
        slow(*arguments)

    monkeypatch.setattr(NiftiStore, "complete", meanwhile)
    made = first.published()
    assert found == [None]
    assert torch.equal(made.data, expected_of(scan))


@pytest.mark.slow
def test_the_same_prediction_twice_at_once(scan, tmp_path, monkeypatch):
    path = tmp_path / "parts.ome.zarr"
    monkeypatch.setattr(shards, "WAIT_SECONDS", 0.05)
    coarser, found = vx.ZarrStore.complete, []

    def predicted():
        found.append(vx.predict(three, scan, output=store(path), executor=SerialLauncher(16), **OPTIONS).data)

    other = threading.Thread(target=predicted)

    def meanwhile(*arguments):
        monkeypatch.setattr(vx.ZarrStore, "complete", coarser)
        other.start()
        time.sleep(1)
        coarser(*arguments)

    monkeypatch.setattr(vx.ZarrStore, "complete", meanwhile)
    predicted()
    other.join(60)
    assert len(found) == 2
    assert torch.equal(found[0], found[1])


# Who asks, or comes late


@pytest.mark.slow
def test_who_asks_while_the_records_go_is_told_of_no_damage(scan, tmp_path, monkeypatch):
    target = store(tmp_path / "parts.ome.zarr")
    rmtree, seen = shutil.rmtree, []
    run, other = computed(run_of(scan, target)), run_of(scan, target)
    assert list(other.remaining()) == []

    def asking(path, *arguments, **more):
        rmtree(path, *arguments, **more)
        if target.path.exists():
            seen.append((status_of(target.path), other.is_whole(), other.published(), run_of(scan, target).published()))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", asking)
        assert run.published() is not None
    assert len(seen) > 3
    assert all(status is None or (status.is_published and not status.failed) for status, *_ in seen)
    assert all(each[1:] == (True, None, None) for each in seen)
    # A part that comes when all is in its place begins nothing anew.
    other.compute(0)
    assert list(other.remaining()) == []
    assert other.published() is None
    assert leftovers(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("place", ["put_shard", "ShardWriter"])
@pytest.mark.parametrize("ending", [".ome.zarr", ".nii.gz"])
def test_a_part_that_comes_late_leaves_nothing(scan, tmp_path, monkeypatch, place, ending):
    path = tmp_path / f"parts{ending}"
    target = store(path) if ending == ".ome.zarr" else path
    late, quick = run_of(scan, target), run_of(scan, target)
    assert late.run == quick.run
    function = getattr(shards, place)

    def after_all(*arguments, **more):
        monkeypatch.setattr(shards, place, function)
        computed(quick).publish()
        return function(*arguments, **more)

    monkeypatch.setattr(shards, place, after_all)
    late.compute(0)
    assert list(late.remaining()) == []
    assert torch.equal(vx.LabelMap(path).data, expected_of(scan))
    assert leftovers(tmp_path) == []


def test_a_part_that_is_done_is_not_computed_again(scan, tmp_path):
    calls = []

    def counted(batch):
        calls.append(len(batch))
        return three(batch)

    first, second = (run_of(scan, store(tmp_path / "parts.zarr"), counted) for _ in range(2))
    number = next(first.remaining())
    first.compute(number)
    del calls[:]
    second.compute(number)
    assert calls == []


@pytest.mark.slow
def test_a_job_of_a_run_whose_records_were_removed_does_nothing_to_the_new_one(scan, tmp_path):
    path = tmp_path / "parts.ome.zarr"
    old = run_of(scan, store(path), lambda batch: three(batch).flip(1), model_name="another")
    numbers = list(old.remaining())
    old.compute(numbers[0])
    shutil.rmtree(tmp_path / ".parts.shards")
    new = run_of(scan, store(path))
    new.compute(numbers[0])
    with pytest.raises(RecordError, match="recorded of this run is gone"):
        old.compute(numbers[1])
    with pytest.raises(RecordError, match="recorded of this run is gone"):
        old.publish()
    with pytest.raises(RecordError, match="recorded of this run is gone"):
        old.published()
    assert new.done() == {numbers[0]}
    computed(new).publish()
    assert torch.equal(vx.LabelMap(path).data, expected_of(scan))
    with pytest.raises(RecordError, match="recorded of this run is gone"):
        old.compute(numbers[1])
    shutil.rmtree(tmp_path / f".parts.{old.run}.parts.zarr")  # that the user was told of
    assert leftovers(tmp_path) == []


def test_records_of_something_else_are_named_with_their_voxels(scan, tmp_path):
    old = run_of(scan, store(tmp_path / "parts.ome.zarr"))
    with pytest.raises(RecordError, match=rf"or remove it, and \.parts\.{old.run}\.parts\.zarr"):
        run_of(scan, store(tmp_path / "parts.ome.zarr"), patch_overlap=4).join()


def test_a_file_in_place_of_the_records_is_named(scan, tmp_path):
    (tmp_path / ".parts.shards").write_text("of someone else")
    with pytest.raises(RecordError, match=r"\.parts\.shards/run\.json is damaged: remove"):
        run_of(scan, store(tmp_path / "parts.zarr")).join()
    assert leftovers(tmp_path) == [".parts.shards"]


@pytest.mark.slow
def test_arrays_that_are_gone_are_named(scan, tmp_path):
    run = computed(run_of(scan, store(tmp_path / "parts.ome.zarr")))
    shutil.rmtree(tmp_path / f".parts.{run.run}.parts.zarr")
    with pytest.raises(RecordError, match=r"parts\.zarr is gone: remove .*\.parts\.shards, and begin again"):
        run.publish()


# A process that is killed while it begins


def killed_at_the_beginning(scan, target, place):
    owner, name = {"folder": (parts, "make_free"), "array": (shards.Layout, "create"), "run": (parts, "write_safely")}[place]
    setattr(owner, name, dying(getattr(owner, name)))
    list(run_of(scan, target).remaining())


@pytest.mark.slow
@pytest.mark.parametrize("place", ["folder", "array", "run"])
def test_nothing_is_left_of_who_was_killed_while_it_began(scan, tmp_path, place):
    target = store(tmp_path / "parts.ome.zarr")
    process = FORK.Process(target=killed_at_the_beginning, args=(scan, target, place))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert len(leftovers(tmp_path)) == (1 if place == "folder" else 2)
    share(scan, target.path, 0, 1, 0)
    assert leftovers(tmp_path) == []
    assert torch.equal(vx.LabelMap(target.path).data, expected_of(scan))


@pytest.mark.slow
@pytest.mark.parametrize("place", ["folder", "array", "run"])
def test_who_begins_while_another_publishes_sees_what_there_is(scan, tmp_path, monkeypatch, place):
    target = store(tmp_path / "parts.ome.zarr")
    owner, name = {"folder": (parts, "make_free"), "array": (shards.Layout, "create"), "run": (parts, "write_safely")}[place]
    function, other = getattr(owner, name), run_of(scan, target)

    def late(*arguments):
        monkeypatch.setattr(owner, name, function)
        share(scan, target.path, 0, 1, 0)
        return function(*arguments)

    monkeypatch.setattr(owner, name, late)
    with pytest.raises(TargetExistsError):
        other.join()
    assert leftovers(tmp_path) == []


def test_a_beginning_that_fails_is_told_and_leaves_nothing(scan, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(parts, "make_free", raising(OSError(28, "No space left on device")))
        with pytest.raises(SaveError, match="No space left"):
            run_of(scan, store(tmp_path / "parts.zarr")).join()
    assert leftovers(tmp_path) == []
    tmp_path.chmod(0o500)
    try:
        if os.access(tmp_path, os.W_OK):
            pytest.skip("this user may write everywhere")
        with pytest.raises(SaveError, match="Permission denied"):
            run_of(scan, store(tmp_path / "parts.zarr")).join()
    finally:
        tmp_path.chmod(0o700)


# Many images, and jobs on the command line


@pytest.fixture
def scans(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli_parts, "ProcessLauncher", lambda devices, shard_size=None: SerialLauncher(shard_size))
    (tmp_path / "scans").mkdir()
    for number in range(4):
        data = torch.rand(1, 24, 12, 10 + number, generator=torch.Generator().manual_seed(number))
        vx.ScalarImage(data).save(tmp_path / "scans" / f"{number}.nii.gz")
    return tmp_path


COMMAND = ["predict", "--json", "parts_models:three", "scans", "--patch-size", 8, "-o", "out"]


def states(result):
    return [each["state"] for each in json.loads(result.out)]


def test_parts_of_another_size_are_gone_on_with(scan, tmp_path):
    targets = [vx.ZarrStore(tmp_path / f"{number}.zarr", chunks=8) for number in range(2)]
    begun = run_of(scan, targets[0], shard_size=16)
    begun.compute(3)
    predictor = Predictor(three, executor=SerialLauncher(), **OPTIONS)
    calls = [{"image": scan, "output": target} for target in targets]
    runs = [predictor.shards(**call) for call in calls]
    assert len(runs[0]) < len(begun)
    predictor.compute_parts(calls, runs)
    assert all(torch.equal(each.publish().data, expected_of(scan)) for each in runs)


def test_a_case_with_records_of_something_else_fails_alone(scans, run):
    predictor = Predictor(three, 4, model_name="another")
    (scans / "out").mkdir()
    for number in (0, 2):
        predictor.shards(scans / "scans" / f"{number}.nii.gz", output=scans / "out" / f"{number}.nii.gz").join()
    found = json.loads(run(*COMMAND, "--devices", "cpu,cpu", code=1).out)
    assert [each["state"] for each in found] == ["failed", "done", "failed", "done"]
    assert all(f".{number}.shards is of a prediction in parts of something else" in found[number]["error"] for number in (0, 2))


@pytest.mark.slow
def test_jobs_that_start_when_all_is_made_compute_nothing(scans, run):
    for number in range(3):
        run(*COMMAND, "--shard", f"{number}/3", "--overwrite")
    before = {path: path.stat().st_ino for path in (scans / "out").iterdir()}
    assert states(run(*COMMAND, "--shard", "1/3", "--overwrite")) == ["complete"] * 4
    assert {path: path.stat().st_ino for path in (scans / "out").iterdir()} == before
    # What is of something else is replaced.
    other = ["--overlap", 4, "--shard", "0/1", "--overwrite"]
    assert states(run(*COMMAND, *other)) == ["done"] * 4
    assert all(path.stat().st_ino != inode for path, inode in before.items())


def overtake(monkeypatch, run):
    """Let another job do everything as soon as the next one has planned its first case."""
    shards_of = Predictor.shards

    def overtaken(self, *arguments, **more):
        monkeypatch.setattr(Predictor, "shards", shards_of)
        made = shards_of(self, *arguments, **more)
        run(*COMMAND, "--shard", "0/1")
        return made

    monkeypatch.setattr(Predictor, "shards", overtaken)


@pytest.mark.slow
def test_a_job_that_another_one_overtakes_is_complete(scans, run, monkeypatch):
    overtake(monkeypatch, run)
    assert states(run(*COMMAND, "--shard", "0/1")) == ["complete"] * 4


def test_a_command_finds_that_another_has_ended_what_it_would_take_up(scans, run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(NiftiStore, "complete", raising(KeyboardInterrupt))
        run(*COMMAND, "--shard", "0/1", code=130)
    overtake(monkeypatch, run)
    assert states(run(*COMMAND)) == ["complete"] * 4


def test_a_job_waits_for_others_when_it_has_nothing_else_to_do(scans, run, monkeypatch):
    published, late = shards.ShardedRun.published, []

    def busy(self, *arguments):
        if "0.nii.gz" in repr(self):
            late.append(self)
            return None
        return published(self, *arguments)

    monkeypatch.setattr(shards.ShardedRun, "published", busy)
    found = json.loads(run(*COMMAND, "--shard", "0/1").out)
    assert [(each["case"][0], each["state"]) for each in found] == [(number, "done") for number in "1230"]
    assert len(late) == 1
    assert (scans / "out" / "0.nii.gz").exists()


@pytest.mark.slow
@pytest.mark.parametrize("way", [["--shard", "0/1"], ["--devices", "cpu,cpu"], []])
def test_a_command_takes_up_publishing(scans, run, monkeypatch, way):
    with monkeypatch.context() as patch:
        patch.setattr(NiftiStore, "complete", raising(KeyboardInterrupt))
        run(*COMMAND, "--shard", "0/1", code=130)
    assert json.loads(run("status", "--json", "out/0.nii.gz").out)[0]["state"] == "publishing"
    run(*COMMAND, *way)
    assert leftovers(scans / "out") == []
    assert torch.equal(vx.ScalarImage("out/0.nii.gz").data, vx.predict(three, "scans/0.nii.gz", 8, 4).data)
