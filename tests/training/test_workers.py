"""Queues with processes of their own, on files: the same patches for any number of them, and an error for every fault."""

import contextlib
import functools
import gc
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import fresh
import voxloom as vx
from slow import slow
from voxloom.errors import CorruptImageError, ImageFileError, QueueError, SubjectError, WorkerError
from voxloom.training.messages import Packer, Unpacker
from voxloom.training.patch_worker import MadePatch

PATCH = 8
SHAPES = [(20, 17, 23), (16, 24, 19), (25, 16, 18), (21, 21, 21), (18, 22, 16), (23, 19, 20), (17, 18, 26), (24, 16, 16)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scans")
    for number, shape in enumerate(SHAPES):
        rng = np.random.default_rng(number)
        affine = np.diag([1, 2, 3, 1])
        image = torch.from_numpy(rng.integers(-1000, 1000, (1, *shape)).astype(np.int16))
        vx.ScalarImage(image, affine=affine).save(folder / f"{number}_t1.nii.gz")
        vx.LabelMap((image > 500).to(torch.uint8), affine=affine).save(folder / f"{number}_seg.nii.gz")
    return folder


def subjects_in(folder):
    return [
        vx.Subject(
            t1=vx.ScalarImage(folder / f"{number}_t1.nii.gz"), seg=vx.LabelMap(folder / f"{number}_seg.nii.gz"), name=f"s{number}"
        )
        for number in range(len(SHAPES))
    ]


def make_queue(folder, num_workers=2, max_length=12, samples=7, **more):
    dataset = vx.SubjectsDataset(subjects_in(folder), transform=more.pop("own_transform", None))
    sampler = more.pop("sampler", vx.LabelSampler(PATCH, "seg"))
    return vx.Queue(dataset, max_length, samples, sampler, num_workers=num_workers, seed=11, **more)


def bits(patch):
    location = patch.patch_location
    data = patch.t1.data
    return location.subject_index, location.index, patch["name"], data.dtype, data.numpy().tobytes(), patch.seg.data.sum().item()


def of_torch(subject):
    sums = torch.rand(300_000).sum()
    return vx.Subject(dict(subject) | {"t1": subject.t1.new_like(subject.t1.data.float() * sums)})


def of_numpy_and_python(subject):
    return vx.Subject(
        dict(subject) | {"t1": subject.t1.new_like(subject.t1.data * np.float32(np.random.rand() + random.random()))}
    )


def of_a_patch(patch):
    value = torch.randn(1) + np.float32(np.random.randn() + random.gauss(0, 1))
    if random.random() < 0.5:
        patch.t1.set_data(patch.t1.data.flip(1))
    patch.t1.set_data(patch.t1.data + value)
    return patch


TRANSFORMS = {"own_transform": of_torch, "transform": of_numpy_and_python, "patch_transform": of_a_patch}


@pytest.fixture(scope="module")
def expected(folder):
    queue = make_queue(folder, num_workers=0, **TRANSFORMS)
    return [[bits(patch) for patch in queue] for _ in range(3)]


def workers():
    """Give the worker processes of all queues of this process."""
    return [child for child in multiprocessing.active_children() if child.name.startswith("voxloom queue worker")]


@pytest.fixture(autouse=True)
def no_worker_is_left():
    yield
    gc.collect()
    wait_until(lambda: workers() == [])


# The same for any number of workers


@pytest.mark.parametrize(
    ("num_workers", "context"),
    [(1, None), (2, None), (4, None), *(slow(2, context) for context in ("spawn", "forkserver"))],
)
def test_the_same_patches_bit_for_bit_for_every_number_of_workers(folder, expected, num_workers, context):
    queue = make_queue(folder, num_workers, multiprocessing_context=context, **TRANSFORMS)
    assert [[bits(patch) for patch in queue] for _ in range(3)] == expected
    queue.close()


@pytest.mark.parametrize(
    ("max_length", "samples"),
    [(1, 9), (2, 1), (5, 9), (100, 1)] + [slow(*each) for each in ((1, 1), (2, 9), (5, 1), (100, 9))],
)
def test_the_same_for_every_length(folder, max_length, samples):
    alone, shared = (make_queue(folder, number, max_length, samples) for number in (0, 3))
    for _ in range(2):
        assert [bits(patch) for patch in alone] == [bits(patch) for patch in shared]


def test_a_grid_in_workers(folder):
    alone, shared = (make_queue(folder, number, sampler=vx.GridSampler(patch_size=PATCH, patch_overlap=4)) for number in (0, 2))
    assert len(alone) == len(shared) > 200
    assert [bits(patch) for patch in alone] == [bits(patch) for patch in shared]


def test_a_block_whose_message_was_lost_comes_with_the_next_one():
    packer, unpacker = Packer(1), Unpacker()
    made = [MadePatch(3, vx.Subject(t1=vx.ScalarImage(torch.rand(1, 4, 4, 4))), None)]
    packer.begin(1)
    lost = packer.pack(0, made)
    packer.was_not_sent(lost)
    for _ in range(2):
        packer.begin(1)
        ((number, make),) = unpacker.unpack(packer.pack(0, made), lambda shape, dtype: torch.empty(shape, dtype=dtype))
        assert number == 3
        assert torch.equal(make().t1.data, made[0].patch.t1.data)


def test_messages_of_every_size(folder, monkeypatch):
    alone = [bits(patch) for patch in make_queue(folder, 0)]
    for num_bytes in (1, 5000, 10**9):
        monkeypatch.setattr("voxloom.training.patch_sizes.MESSAGE_BYTES", num_bytes)
        queue = make_queue(folder)
        assert queue.prefetch == 6 * {1: 1, 5000: 3, 10**9: 12}[num_bytes]
        assert [bits(patch) for patch in queue] == alone


def test_transforms_that_change_type_and_size(folder):
    """Nobody knows beforehand how large the patches will be."""

    def grow(subject):
        channels = 1 + subject.t1.data.shape[1] % 3
        t1 = subject.t1.new_like(subject.t1.data.double().repeat(channels, 1, 1, 1))
        return vx.Subject(dict(subject) | {"t1": t1, "more": vx.ScalarImage(t1.data[:1].half(), affine=t1.affine)})

    alone, shared = ([bits(patch) for patch in make_queue(folder, number, transform=grow)] for number in (0, 2))
    assert alone == shared
    assert alone[0][3] == torch.float64


def test_what_is_said_of_patches_arrives_too(folder):
    def describe(subject):
        subject["clinic"] = torch.arange(4)
        subject.t1["protocol"] = "mprage"
        return subject

    for patch in make_queue(folder, transform=describe):
        location = patch.patch_location
        assert torch.equal(patch["clinic"], torch.arange(4))
        assert patch.t1["protocol"] == "mprage"
        assert patch.t1.path == subjects_in(folder)[location.subject_index].t1.path
        assert np.array_equal(
            patch.t1.affine,
            [[1, 0, 0, location.index[0]], [0, 2, 0, 2 * location.index[1]], [0, 0, 3, 3 * location.index[2]], [0, 0, 0, 1]],
        )


def test_resumed_with_other_workers(folder, expected):
    queue = make_queue(folder, 2, **TRANSFORMS)
    for number, _ in enumerate(queue):
        if number == 29:
            break
    state = queue.state_dict()
    for num_workers in (0, 1, 3):
        resumed = make_queue(folder, num_workers, **TRANSFORMS)
        resumed.load_state_dict(state)
        assert [bits(patch) for patch in resumed] == expected[0][30:]
        assert [bits(patch) for patch in resumed] == expected[1]


def test_a_queue_is_rewound_while_its_workers_run(folder, expected):
    queue = make_queue(folder, 2, **TRANSFORMS)
    patches = iter(queue)
    states = []
    for _ in range(20):
        next(patches)
        states.append(queue.state_dict())
    for number in (15, 3, 3):
        queue.load_state_dict(states[number])
        assert [bits(patch) for patch in queue] == expected[0][number + 1 :]
    with pytest.raises(QueueError, match="another one has begun"):
        next(patches)


def test_a_started_queue_can_be_pickled(folder, expected):
    queue = make_queue(folder, 2, **TRANSFORMS)
    next(iter(queue))
    copy = pickle.loads(pickle.dumps(queue))
    assert [bits(patch) for patch in copy] == [bits(patch) for patch in queue] == expected[1]


# Ahead, but not too far


def test_no_more_patches_are_held_than_was_said(folder):
    queue = make_queue(folder, 3, max_length=5, samples=9)
    for number, _ in enumerate(queue):
        if number % 5 == 0:
            time.sleep(0.02)
        assert queue.num_patches <= 5


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_workers_begin_before_they_are_asked(folder):
    queue = make_queue(folder, 2, max_length=5)
    wait_until(lambda: queue.num_patches == 5)
    queue.close()
    idle = make_queue(folder, 2, start_background=False)
    assert workers() == []
    assert idle.num_patches == 0


def test_the_next_epoch_is_loaded_while_one_comes_to_its_end(folder, tmp_path):
    def note(subject):
        (tmp_path / f"{time.monotonic_ns()}_{os.getpid()}_{subject['name']}").touch()
        return subject

    queue = make_queue(folder, 2, max_length=10, transform=note)
    patches = iter(queue)
    for _ in range(len(queue)):
        next(patches)
    wait_until(lambda: len(list(tmp_path.iterdir())) > len(SHAPES))
    wait_until(lambda: queue.num_patches == 10)
    assert list(patches) == []
    assert queue.num_patches == 10


def test_leaving_an_epoch_does_not_wait_for_it(folder, tmp_path):
    """Each subject takes a while; after the first patch the rest of the epoch is not loaded any more."""

    def slow(subject):
        time.sleep(0.1)
        (tmp_path / f"{time.monotonic_ns()}").touch()
        return subject

    queue = make_queue(folder, 2, max_length=4, samples=8, transform=slow)
    for _ in range(3):
        next(iter(queue))
    loaded = len(list(tmp_path.iterdir()))
    assert loaded < 2 * len(SHAPES)  # of 24 in three epochs
    assert queue.state_dict()["epoch"] == 2


class Alternating:
    """A sampler of subjects that nobody can foresee."""

    def __init__(self):
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        return iter([self.passes % 8, 0, 3])

    def __len__(self):
        return 3


def test_an_order_that_cannot_be_foreseen(folder):
    queue = make_queue(folder, 2, subject_sampler=Alternating(), shuffle_subjects=False)
    for epoch in range(4):
        subjects = {patch.patch_location.subject_index for patch in queue}
        assert subjects == {(epoch + 1) % 8, 0, 3}


def notes_what_is_loaded(folder, subject):
    """The random number is another one in each epoch."""
    (folder / f"{subject['name']} {torch.rand(1, dtype=torch.float64).item()} {os.getpid()} {time.monotonic_ns()}").touch()
    return subject


@pytest.mark.slow
def test_a_distributed_sampler_is_foreseen(folder, tmp_path):
    sampler = torch.utils.data.DistributedSampler(SHAPES, num_replicas=2, rank=0, seed=3)
    alone = make_queue(folder, 0, subject_sampler=sampler, shuffle_subjects=False)
    note = functools.partial(notes_what_is_loaded, tmp_path)
    shared = make_queue(folder, 2, subject_sampler=sampler, shuffle_subjects=False, transform=note)
    for epoch in (0, 1, 2, 5, 5):
        sampler.set_epoch(epoch)
        assert [bits(patch) for patch in alone] == [bits(patch) for patch in shared]
        if epoch == 2:  # so far each subject was loaded once, also those that were loaded ahead of their epoch
            loaded = [file.name.split()[:2] for file in tmp_path.iterdir()]
            assert len(loaded) == len({tuple(load) for load in loaded}) >= 12


# Faults


def damage(folder, target, number, how):
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    path = target / f"{number}_t1.nii.gz"
    if how == "missing":
        return path
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("how", ["missing", "truncated"])
def test_a_file_that_cannot_be_read(folder, tmp_path, num_workers, how):
    path = damage(folder, tmp_path, 5, how)
    queue = make_queue(tmp_path, num_workers, start_background=False)
    if how == "missing":
        path.unlink()
    with pytest.raises(ImageFileError, match="subject 5") as caught:
        list(queue)
    assert str(path) in str(caught.value)
    assert isinstance(caught.value, CorruptImageError) == (how == "truncated")
    if num_workers:
        shown = "".join(traceback.format_exception(caught.value))
        assert "in worker process" in shown
        assert shown.count("Traceback") >= 2
    # The queue can be used again, once the file is there.
    path.write_bytes((folder / path.name).read_bytes())
    assert len(list(queue)) == len(queue)


def test_an_error_comes_at_once(folder):
    """Although there are patches that could be taken first."""

    def fail(subject):
        if subject["name"] == "s7":
            time.sleep(1)
            raise ValueError("no such luck")
        return subject

    queue = make_queue(folder, 2, max_length=1000, transform=fail, shuffle_subjects=False, shuffle_patches=False)
    taken = 0
    with pytest.raises(ValueError, match=r"(?s)no such luck.*This was subject 7 \(t1: .*7_t1.nii.gz"):  # noqa: PT012
        for _ in queue:
            taken += 1
            time.sleep(0.1)
    assert taken < 7 * 7 - 10


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_iteration_that_ends_within_a_transform_is_an_error_that_says_where(folder, num_workers):
    queue = make_queue(folder, num_workers, transform=lambda subject: next(iter([])))
    with pytest.raises(SubjectError, match=r"subject \d \(t1: .*raised StopIteration"):
        next(iter(queue))


@pytest.mark.parametrize("num_workers", [0, slow(1), 3])
def test_subjects_that_cannot_be_read_are_skipped(folder, tmp_path, num_workers):
    damage(folder, tmp_path, 5, "truncated")
    queue = make_queue(tmp_path, num_workers, on_error="skip", **TRANSFORMS)
    whole = make_queue(folder, 0, **TRANSFORMS)
    reference = make_queue(tmp_path, 0, on_error="skip", **TRANSFORMS)
    for _ in range(2):
        with pytest.warns(RuntimeWarning, match=r"1 of 8 subjects were skipped.*subject 5 .*5_t1.nii.gz"):
            patches = [bits(patch) for patch in queue]
        with pytest.warns(RuntimeWarning):
            assert patches == [bits(patch) for patch in reference]
        assert len(patches) == len(queue) == 8 * 7
        assert list(queue.skipped) == [5]
        assert "CorruptImageError" in queue.skipped[5]
        subjects = [patch[0] for patch in patches]
        assert 5 not in subjects
        # Those of the others are as without the fault, and one of them has made seven more, all different.
        wholes = [bits(patch) for patch in whole]
        others = [patch for patch in wholes if patch[0] != 5]
        assert set(others) < set(patches)
        assert len(set(patches)) == 56
        assert sorted(subjects.count(subject) for subject in set(subjects)) == [7] * 6 + [14]


def test_two_neighbours_are_skipped(folder, tmp_path):
    def fail(subject):
        if subject["name"] in ("s2", "s3", "s7"):
            raise ValueError(subject["name"])
        return subject

    settings = {"on_error": "skip", "transform": fail, "shuffle_subjects": False}
    with pytest.warns(RuntimeWarning, match="3 of 8 subjects"):
        patches = [bits(patch) for patch in make_queue(folder, 0, **settings)]
    with pytest.warns(RuntimeWarning):
        assert patches == [bits(patch) for patch in make_queue(folder, 2, **settings)]
    assert len(set(patches)) == 56
    subjects = [patch[0] for patch in patches]
    assert [subjects.count(number) for number in range(8)] == [14, 7, 0, 0, 21, 7, 7, 0]


@pytest.mark.filterwarnings("ignore:.*were skipped")
def test_a_run_with_skipped_subjects_is_resumed_as_it_was(folder):
    def fail(subject):
        if subject["name"] == "s2":
            raise ValueError("not readable")
        return subject

    queue = make_queue(folder, 2, on_error="skip", transform=fail)
    everything, states = [], []
    for patch in queue:
        everything.append(bits(patch))
        states.append(queue.state_dict())
    assert states[-1]["position"] == 0
    assert {skip[1:] for state in states for skip in state.get("skipped", ())} == {(2, 0)}
    for number in (3, 20, 40, 54):
        # Without the fault, too: what was skipped stays skipped for the rest of the epoch.
        for transform in (fail, None) if states[number]["skipped"] else (fail,):
            resumed = make_queue(folder, 1, on_error="skip", transform=transform)
            resumed.load_state_dict(states[number])
            assert resumed.state_dict() == states[number]
            assert [bits(patch) for patch in resumed] == everything[number + 1 :]


def fails_now_and_then(patch):
    if random.random() < 0.25:
        raise ValueError("now and then")
    return of_a_patch(patch)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*were skipped")
def test_a_subject_that_is_named_twice_is_skipped_by_place(folder):
    settings = {
        "subject_sampler": [4, 1, 4, 6, 1, 4, 0, 2, 3, 5],
        "shuffle_subjects": False,
        "on_error": "skip",
        "max_length": 40,
    }
    settings |= {"patch_transform": fails_now_and_then, "samples": 4}
    everything, states = [], []
    queue = make_queue(folder, 0, **settings)
    for patch in queue:
        everything.append(bits(patch))
        states.append(queue.state_dict())
    places = {(place, subject) for place, subject, _ in states[-2]["skipped"]}
    assert len(places) > len({subject for _, subject in places})
    for num_workers in (1, 2, 3):
        assert [bits(patch) for patch in make_queue(folder, num_workers, **settings)] == everything
    for number in (0, 9, 17):
        resumed = make_queue(folder, 2, **settings)
        resumed.load_state_dict(states[number])
        assert [bits(patch) for patch in resumed] == everything[number + 1 :]


def test_nothing_can_be_read(folder):
    def fail(subject):
        raise ValueError("never")

    for num_workers in (0, 2):
        queue = make_queue(folder, num_workers, on_error="skip", transform=fail)
        with pytest.raises(SubjectError, match=r"was skipped, and so were all 7 that could stand in for it.*ValueError: never"):
            list(queue)


def test_an_error_of_a_patch_transform(folder):
    def fail(patch):
        if patch.patch_location.subject_index == 4 and patch.patch_location.index[0] % 2:
            raise ZeroDivisionError("odd")
        return patch

    for num_workers in (0, 2):
        with pytest.raises(ZeroDivisionError, match="odd"):
            list(make_queue(folder, num_workers, patch_transform=fail))
    with pytest.warns(RuntimeWarning, match="1 of 8"):
        alone = [bits(patch) for patch in make_queue(folder, 0, patch_transform=fail, on_error="skip")]
    with pytest.warns(RuntimeWarning, match="1 of 8"):
        assert alone == [bits(patch) for patch in make_queue(folder, 2, patch_transform=fail, on_error="skip")]
    assert len(alone) == 56


def test_subjects_without_foreground_are_left_to_the_sampler(folder):
    def clear(subject):
        if subject["name"] == "s6":
            subject.seg.set_data(torch.zeros_like(subject.seg.data))
        return subject

    with pytest.raises(vx.errors.SamplingError, match=r"(?s)subject 6 .*nothing can be drawn"):
        list(make_queue(folder, 2, transform=clear))
    queue = make_queue(folder, 2, transform=clear, sampler=vx.LabelSampler(PATCH, "seg", on_empty="skip"))
    with pytest.warns(RuntimeWarning, match="subject 6 .*nothing to draw"):
        subjects = [bits(patch)[0] for patch in queue]
    assert len(subjects) == 56
    assert 6 not in subjects


def test_a_worker_that_is_killed_says_at_which_subject(folder):
    def end(subject):
        if subject["name"] == "s6":
            os.kill(os.getpid(), signal.SIGKILL)
        return subject

    with pytest.raises(WorkerError, match="was killed by SIGKILL while it was making patches of subject 6"):
        list(make_queue(folder, 2, transform=end))


KILLING = """
    import multiprocessing, os, signal, sys, threading, time
    import torch
    import voxloom as vx

    def slow(subject):
        time.sleep(float(sys.argv[1]))
        return subject

    if __name__ == "__main__":
        subjects = [vx.Subject(t1=vx.ScalarImage(torch.rand(1, 60, 60, 60))) for _ in range(20)]
        queue = vx.Queue(vx.SubjectsDataset(subjects), 4, 8, vx.UniformSampler(40), num_workers=2, transform=slow, seed=0)
        patches = iter(queue)
        next(patches)
        workers = multiprocessing.active_children()
        kill = threading.Timer(float(sys.argv[2]), os.kill, (workers[1].pid, signal.SIGKILL))
        kill.start()
        began = time.monotonic()
        try:
            while True:
                next(patches)
        except RuntimeError as error:
            print(type(error).__name__, time.monotonic() - began, workers[1].pid, error, sep="|")
        kill.join()
        while any(worker.is_alive() for worker in workers):
            time.sleep(0.01)
        # What had been reached is known, and new workers go on from there.
        state = queue.state_dict()
        queue.load_state_dict(state)
        print(state["position"], len(list(queue)))
"""


@pytest.mark.parametrize(("pause", "delay"), [(0.2, 0.5), *(slow(0.0, delay) for delay in (0.05, 0.0))])
def test_a_worker_that_is_killed(tmp_path, pause, delay):
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(KILLING))
    run = subprocess.run([sys.executable, str(script), str(pause), str(delay)], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    first, last = run.stdout.splitlines()
    kind, seconds, pid, message = first.split("|")
    assert float(seconds) < delay + 5
    assert pid in message
    assert kind == "WorkerError"
    assert f"worker process {pid} was killed by SIGKILL" in message
    position, rest = map(int, last.split())
    assert position + rest == 160


def test_loaders_with_workers_are_refused(folder):
    message = r"num_workers=0.*Queue\(\.\.\., num_workers=2\)"
    for num_workers in (0, 2):
        queue = make_queue(folder, num_workers)
        with pytest.raises(QueueError, match=message):
            vx.SubjectsLoader(queue, batch_size=4, num_workers=2)
        batches = iter(DataLoader(queue, batch_size=4, num_workers=2))
        with pytest.raises(QueueError, match=message):
            next(batches)
        batches._shutdown_workers()  # or PyTorch takes ten seconds for it, whenever it is collected
        # The queue has not been touched by that.
        assert len(list(queue)) == 56


def test_a_closed_queue_leaves_no_process_and_can_be_used_again(folder):
    queue = make_queue(folder, 2)
    first = [bits(patch) for patch in queue]
    assert len(workers()) == 2
    queue.close()
    wait_until(lambda: workers() == [])
    assert len([bits(patch) for patch in queue]) == len(first)
    del queue
    gc.collect()
    wait_until(lambda: workers() == [])


def test_a_transform_that_cannot_be_sent_to_a_process(folder):
    with pytest.raises(WorkerError, match="'spawn', which pickles .*local object.*num_workers=0"):
        make_queue(folder, 2, multiprocessing_context="spawn", transform=lambda subject: subject)
    wait_until(lambda: workers() == [])


SCRIPT = """
    import multiprocessing, sys, time
    import torch
    import voxloom as vx

    def slow(subject):
        time.sleep(float(sys.argv[2]))
        return subject

    if __name__ == "__main__":
        image = torch.rand(1, 16, 16, 16)
        subjects = [vx.Subject(t1=vx.ScalarImage(image)) for _ in range(50)]
        queue = vx.Queue(vx.SubjectsDataset(subjects), 10, 4, vx.UniformSampler(8), num_workers=2, transform=slow,
                         multiprocessing_context=sys.argv[3])
        pids = [str(worker.pid) for worker in multiprocessing.active_children()]
        for number, patch in enumerate(queue):
            if number == 0:
                print(*pids, flush=True)
            if sys.argv[1] == "end":
                break
            time.sleep(0.01)
"""


def descendants_of(pid):
    """Give the processes that were started by one, or by those."""
    found = set()
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, path.read_text().split()):
            found |= {child} | descendants_of(child)
    return found


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("how", "pause", "context"),
    [("Ctrl-C", 0.5, "fork"), ("SIGKILL", 0.5, "forkserver"), slow("end", 0.5, "fork")]
    + [slow(how, 0.5, "fork") for how in ("SIGINT", "SIGTERM")]
    + [slow("SIGKILL", 0.5, context) for context in ("fork", "spawn")]
    + [slow(how, 0.01, "fork") for how in ("end", "SIGKILL")]
    + [slow("Ctrl-C", 0.5, context) for context in ("spawn", "forkserver")],
)
def test_no_process_is_left_behind(tmp_path, how, pause, context):
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, "-W", "error", str(script), how, str(pause), context]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, start_new_session=True, **pipes) as process:
        pids = process.stdout.readline().split()
        assert len(pids) == 2
        family = descendants_of(process.pid)
        assert set(map(int, pids)) <= family
        if how == "Ctrl-C":  # a terminal tells the workers, too
            os.killpg(process.pid, signal.SIGINT)
        elif how != "end":
            process.send_signal(signal.Signals[how])
        stderr = process.communicate(timeout=30)[1]
        assert process.returncode == {"end": 0, "SIGTERM": -15, "SIGKILL": -9}.get(how, -2), stderr
    # No server of forks or of resources either.
    wait_until(lambda: not any(is_alive(pid) for pid in family), seconds=15)
    if how == "end":
        assert stderr == ""
    if how in ("SIGINT", "Ctrl-C"):
        assert stderr.count("KeyboardInterrupt") == stderr.count("Traceback") == 1


@pytest.mark.slow
def test_many_patches_do_not_use_up_the_open_files(folder):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 60, hard))
    try:
        queue = make_queue(folder, 2, max_length=500, samples=60)
        patches = list(queue)  # all are kept
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(patches) == 480
    assert len(os.listdir("/proc/self/fd")) < opened + 60


@pytest.mark.parametrize("num_workers", [slow(0), 2])
@pytest.mark.parametrize("kind", ["sequential", slow("distributed")])
def test_a_queue_with_a_subject_sampler_is_rewound(folder, num_workers, kind):
    """Whether or not its order can be foreseen; also twice to the same place."""
    sampler = (
        torch.utils.data.SequentialSampler(SHAPES)
        if kind == "sequential"
        else torch.utils.data.DistributedSampler(SHAPES, num_replicas=1, rank=0)
    )
    queue = make_queue(folder, num_workers, subject_sampler=sampler, shuffle_subjects=False)
    beginning, everything, states = queue.state_dict(), [], []
    for patch in queue:
        everything.append(bits(patch))
        states.append(queue.state_dict())
    queue.load_state_dict(beginning)
    assert [bits(patch) for patch in queue] == everything
    for _ in range(2):
        queue.load_state_dict(states[9])
        patches = iter(queue)
        assert [bits(next(patches)) for _ in range(3)] == everything[10:13]
        patches.close()
    queue.load_state_dict(states[9])
    assert [bits(patch) for patch in queue] == everything[10:]


@pytest.mark.slow
def test_a_queue_that_is_rewound_again_and_again_never_stops(folder):
    """Workers must not drop what the new run wants."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        queue = make_queue(folder, 2, max_length=4, samples=3)
        expected = [bits(patch) for patch in queue]
        queue.load_state_dict({"seed": 11, "epoch": 0, "position": 0})
        for number in range(60):
            patches = iter(queue)
            count = number % 23 + 1
            assert [bits(next(patches)) for _ in range(count)] == expected[:count]
            queue.load_state_dict({"seed": 11, "epoch": 0, "position": 0})
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.slow
def test_closing_and_beginning_again_uses_up_nothing(folder):
    def opened():
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    def fail(subject):
        raise ValueError("no")

    queue = make_queue(folder, 2)
    list(queue)
    queue.close()
    before = opened()
    for _ in range(4):
        list(queue)
        queue.close()
        failing = make_queue(folder, 2, transform=fail)
        with pytest.raises(ValueError, match="no"):
            list(failing)
        failing.close()
        del failing
    wait_until(lambda: opened() <= before + 2)


def fails_once(flag, subject):
    if subject["name"] == "s1" and flag.exists():
        raise ValueError("a hiccup")
    return subject


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.filterwarnings("ignore:.*were skipped")
def test_what_failed_in_another_pass_is_tried_again(folder, tmp_path, num_workers):
    flag = tmp_path / "flag"
    whole = [bits(patch) for patch in make_queue(folder, 0)]
    for on_error in ("raise", "skip"):
        flag.touch()
        queue = make_queue(folder, num_workers, on_error=on_error, transform=functools.partial(fails_once, flag))
        beginning = queue.state_dict()
        with contextlib.suppress(ValueError):
            list(queue)
        flag.unlink()
        queue.load_state_dict(beginning)
        assert [bits(patch) for patch in queue] == whole
        assert queue.skipped == {}


def test_an_error_of_a_type_that_other_processes_do_not_know(folder):
    def fail(subject):
        class OwnError(Exception):
            pass

        raise OwnError("deep down")

    with pytest.raises(RuntimeError, match=r"(?s)OwnError: deep down.*This was subject \d \(t1: "):
        list(make_queue(folder, 2, transform=fail))


def test_entries_that_cannot_leave_a_worker(folder):
    def add(subject):
        subject["function"] = lambda: 3
        return subject

    assert len(list(make_queue(folder, 0, transform=add))) == 56
    with pytest.raises(SubjectError, match=r"patches of subject \d \(t1: .*cannot be pickled.*num_workers=0"):
        list(make_queue(folder, 2, transform=add))


def test_tensors_that_need_a_gradient(folder):
    def scale(subject):
        return vx.Subject(dict(subject) | {"t1": subject.t1.new_like(subject.t1.data * torch.ones(1, requires_grad=True))})

    alone, shared = ([patch.t1.data.detach() for patch in make_queue(folder, number, transform=scale)] for number in (0, 2))
    assert all(torch.equal(one, other) for one, other in zip(alone, shared, strict=True))


def test_a_forked_process_leaves_the_queue_of_its_parent_alone(folder):
    queue = make_queue(folder, 2)
    everything = [bits(patch) for patch in make_queue(folder, 0)]
    patches = iter(queue)
    begun = [bits(next(patches)) for _ in range(5)]
    for use in (list, len, repr, vx.Queue.close, lambda copy: copy.load_state_dict({"seed": 11, "epoch": 0, "position": 0})):
        child = multiprocessing.get_context("fork").Process(target=use, args=(queue,))
        child.start()
        child.join(30)
        assert child.exitcode == 0
    assert begun + [bits(patch) for patch in patches] == everything


def test_a_subject_that_stands_in_is_loaded_once(folder):
    loaded = []

    def clear(subject):
        loaded.append(subject["name"])
        if subject["name"] in ("s1", "s2", "s3"):
            subject.seg.set_data(torch.zeros_like(subject.seg.data))
        return subject

    sampler = vx.LabelSampler(PATCH, "seg", on_empty="skip")
    queue = make_queue(folder, 0, sampler=sampler, transform=clear, shuffle_subjects=False, max_length=100)
    with pytest.warns(RuntimeWarning, match="3 of 8"):
        assert len(list(queue)) == 56
    assert len(loaded) <= 8 + 3


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_without_patches(num_workers):
    data = torch.rand(1, 8, 8, 8)
    subjects = [vx.Subject(t1=vx.ScalarImage(data), num_samples=number) for number in (0, 4, 0, 4)]
    sampler = torch.utils.data.DistributedSampler(subjects, num_replicas=2, rank=0, shuffle=False)
    with pytest.raises(SubjectError, match="no subjects with patches"):
        len(
            vx.Queue(
                subjects, 4, 2, vx.UniformSampler(4), num_workers, subject_sampler=sampler, shuffle_subjects=False, drop_last=True
            )
        )


def fails_when_seen_before(folder, subject):
    seen = folder / f"seen {subject['name']}"
    if subject["name"] == "s3" and seen.exists():
        (folder / "failed").touch()
        raise ValueError("seen before")
    seen.touch()
    return subject


@pytest.mark.parametrize("position", [0, 20])
def test_an_error_in_an_epoch_that_is_loaded_ahead_waits_for_it(folder, tmp_path, position):
    whole = [bits(patch) for patch in make_queue(folder, 0, max_length=200)]
    earlier = make_queue(folder, 0, max_length=200)
    for _ in zip(range(position), earlier, strict=False):
        pass
    transform = functools.partial(fails_when_seen_before, tmp_path)
    queue = make_queue(folder, 2, max_length=200, transform=transform, start_background=False)
    queue.load_state_dict(earlier.state_dict())
    patches = iter(queue)
    begun = [bits(next(patches))]
    wait_until((tmp_path / "failed").exists)
    time.sleep(0.2)  # until the queue knows
    assert begun + [bits(patch) for patch in patches] == whole[position:]
    with pytest.raises(ValueError, match="seen before"):
        list(queue)


def adds_to_metadata(patch):
    patch["history"].append(random.random())
    patch.t1.metadata["history"].append(len(patch["history"]))
    patch["sums"] += 1
    return patch


@pytest.mark.parametrize("num_workers", [0, 2])
def test_metadata_that_is_changed_in_place_belongs_to_one_patch(folder, num_workers):
    subjects = subjects_in(folder)
    for subject in subjects:
        subject["history"], subject["sums"] = [], torch.zeros(2)
        subject.t1.metadata["history"] = []
    sampler = vx.UniformSampler(PATCH)
    queue = vx.Queue(subjects, 8, 5, sampler, num_workers, seed=3, patch_transform=adds_to_metadata)
    for patch in queue:
        assert len(patch["history"]) == 1
        assert patch.t1.metadata["history"] == [1]
        assert patch["sums"].tolist() == [1, 1]
        patch["history"].append("of the training loop")
    assert all(subject["history"] == subject.t1.metadata["history"] == [] for subject in subjects)


class Volume:
    """Something that is only in memory as long as somebody refers to it."""


@pytest.mark.parametrize("on_error", ["skip", "raise"])
def test_an_error_keeps_nothing_in_memory(folder, on_error):
    volumes = []

    def fail(subject):
        if subject["name"] not in ("s2", "s5"):
            return subject
        volume = Volume()
        volumes.append(weakref.ref(volume))
        try:
            raise KeyError("the cause")
        except KeyError as error:
            raise ValueError("the error") from error

    gc.collect()
    gc.disable()  # what is only found by the garbage collector is kept for too long
    try:
        queue = make_queue(folder, 0, on_error=on_error, transform=fail, shuffle_subjects=False)
        patches = iter(queue)
        with contextlib.suppress(ValueError):
            for _ in range(40):
                next(patches)
        assert volumes
        assert all(volume() is None for volume in volumes)
    finally:
        gc.enable()


def test_an_error_that_was_caught_keeps_nothing_of_the_training_loop(folder):
    volumes = []

    def fail(subject):
        raise ValueError("no such luck")

    def train(queue):
        volume = Volume()
        volumes.append(weakref.ref(volume))
        list(queue)

    gc.collect()
    gc.disable()
    try:
        queue = make_queue(folder, 2, transform=fail)
        with contextlib.suppress(ValueError):
            train(queue)
        assert volumes[0]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("between", [True, False])
@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_death_is_told_once_where_the_next_patch_is_asked_for(folder, num_workers, between):
    queue = make_queue(folder, num_workers, max_length=4)
    patches = iter(queue)
    next(patches)
    if between:
        patches.close()
        patches = iter(queue)
    victim = workers()[0]
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    time.sleep(0.1)  # nothing is raised here
    with pytest.raises(WorkerError, match=f"{victim.pid} was killed by SIGKILL.*memory"):
        list(patches)
    assert len(list(queue)) == 56


def test_a_worker_that_exits(folder):
    def leave(subject):
        if subject["name"] == "s4":
            os._exit(3)
        return subject

    with pytest.raises(
        WorkerError, match=r"ended with exit code 3 while it was making patches of subject 4 \(t1: [^)]*\)"
    ) as caught:
        list(make_queue(folder, 1, transform=leave, shuffle_subjects=False))
    assert "memory" not in str(caught.value)


TEMPORARY = """
    import sys, tempfile, torch, voxloom as vx
    tempfile.tempdir = sys.argv[1]
    subjects = [vx.Subject(t1=vx.ScalarImage(torch.rand(1, 8, 8, 8))) for _ in range(2)]
    for _ in range(2):
        queue = vx.Queue(subjects, 8, 4, vx.UniformSampler(4), num_workers=2, seed=0)
        try:
            print(sum(1 for _ in queue))
        except vx.errors.WorkerError as error:
            print(error)
        queue.close()
"""


def test_workers_leave_nothing_in_the_temporary_folder(tmp_path):
    with tempfile.TemporaryDirectory() as folder:
        assert fresh.printed(TEMPORARY, folder).split() == ["8", "8"]
        assert list(Path(folder).iterdir()) == []


def test_a_worker_that_cannot_send_says_so(tmp_path):
    folder = tmp_path / ("x" * 100)  # too long for the name of a socket
    folder.mkdir()
    for line in fresh.printed(TEMPORARY, folder).splitlines():
        assert "patches cannot leave a worker" in line
        assert "let TMPDIR be a folder with a shorter name" in line


@pytest.mark.slow
def test_a_script_without_a_guard_is_told_so(folder, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(f"""
            import voxloom as vx
            subjects = [vx.Subject(t1=vx.ScalarImage("{folder}/0_t1.nii.gz"))]
            queue = vx.Queue(subjects, 4, 2, vx.UniformSampler(4), num_workers=1, multiprocessing_context="spawn")
            list(queue)
        """)
    )
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    assert "must stand below if __name__ == '__main__':" in run.stderr.splitlines()[-1]


INTERRUPTED = """
    import os, signal, sys, time, torch
    import voxloom as vx

    def slow(subject):
        time.sleep(0.2)
        return subject

    def train(loader):
        for batch in loader:
            os.killpg(0, signal.SIGINT)
            time.sleep(20)

    if __name__ == "__main__":
        subjects = [vx.Subject(t1=vx.ScalarImage(torch.rand(1, 16, 16, 16))) for _ in range(12)]
        queue = vx.Queue(subjects, 10, 5, vx.UniformSampler(8), num_workers=2, seed=0, transform=slow)
        loader = vx.SubjectsLoader(queue, batch_size=4)
        try:
            train(loader)
        except KeyboardInterrupt:
            pass
        if sys.argv[1] == "load":
            loader.load_state_dict(loader.state_dict())
        print(sum(batch.batch_size for batch in loader))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("then", "patches"), [("load", 56), ("go on", 60)])
def test_an_interrupt_that_was_caught_in_the_training_step(tmp_path, then, patches):
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(INTERRUPTED))
    command = [sys.executable, str(script), then]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, start_new_session=True)
    assert run.stdout.strip() == str(patches), run.stderr


# Little shared memory, and few descriptors


LITTLE = """
import sys
import torch
import voxloom as vx

if __name__ == "__main__":
    subjects = [vx.Subject(t1=vx.ScalarImage(torch.rand(1, 64, 64, 64))) for _ in range(4)]
    if sys.argv[1] == "descriptors":
        import os, resource
        limit = len(os.listdir("/proc/self/fd")) + int(sys.argv[3])
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    else:
        def refused(*_):
            raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")
        torch.Tensor.share_memory_ = torch.UntypedStorage._new_shared = refused
    sampler = vx.UniformSampler(48, num_patches=8)
    if sys.argv[2] == "queue":
        loader = vx.SubjectsLoader(vx.Queue(subjects, samples_per_volume=4, sampler=sampler, num_workers=2, seed=0), batch_size=4)
    else:
        loader = vx.SubjectsLoader(vx.SubjectsDataset(subjects), batch_size=2, num_workers=2)
    print(len(list(loader)))
"""


@pytest.mark.parametrize(
    ("what", "number", "kind"),
    [("descriptors", 3, "queue"), slow("memory", 0, "loader")]
    + [
        slow(*each)
        for each in (
            ("descriptors", 3, "loader"),
            ("memory", 0, "queue"),
            ("descriptors", 10, "queue"),
            ("descriptors", 10, "loader"),
        )
    ],
)
def test_what_lacks_is_said_with_a_way_out(tmp_path, kind, what, number):
    (tmp_path / "little.py").write_text(LITTLE)
    done = subprocess.run(
        [sys.executable, tmp_path / "little.py", what, kind, str(number)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    error = done.stderr[done.stderr.rindex("WorkerError") :]
    if what == "memory":
        assert "there is too little shared memory" in error
        assert "--shm-size" in error
    else:
        assert "too few files may be open at a time: " in error
        assert "ulimit -n 4096" in error


class FullDisk(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        raise OSError(28, "No space left on device", "/data/cache/x.npy")


def test_what_a_data_set_of_the_users_raises_stays_the_users():
    with pytest.raises(OSError, match="No space left on device") as caught:
        list(vx.SubjectsLoader(FullDisk(), batch_size=2, num_workers=1))
    assert not isinstance(caught.value, WorkerError)


TINY = """
import voxloom as vx

heads = [vx.datasets.HeadPhantom(48, seed=number) for number in range(4)]
options = {"sampler": vx.UniformSampler(40), "num_workers": 2, "multiprocessing_context": "fork", "seed": 0}
try:
    list(vx.SubjectsLoader(vx.Queue(heads, samples_per_volume=6, **options), batch_size=4))
except vx.errors.WorkerError as error:
    print(str(error).partition(" for ")[0])
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("unshare") is None, reason="unshare, of Linux, makes a /dev/shm of one's own")
def test_workers_leave_nothing_in_a_shared_memory_that_is_too_small(tmp_path):
    (tmp_path / "tiny.py").write_text(TINY)
    own = f"mount -t tmpfs -o size=1m none /dev/shm && {sys.executable} {tmp_path / 'tiny.py'} && ls -A /dev/shm"
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c", own]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip(f"no namespaces here: {done.stderr.strip()}")
    assert done.stdout == "there is too little shared memory\n"
