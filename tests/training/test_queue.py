"""What a queue gives: each patch once, in an order of its own, from wherever it is resumed."""

import copy
import gc
import itertools
import logging
import pickle
import random
import re
import subprocess
import sys
import textwrap
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, IterableDataset

import voxloom as vx
from voxloom.core.random_numbers import draw_generator
from voxloom.errors import LocationError, QueueError, SizeError, SubjectError

from strategies import examples

SIZE = 12
PATCH = 5


def make_subject(number, **more):
    """No voxel of any subject is as another."""
    data = torch.arange(SIZE**3, dtype=torch.float32).reshape(1, SIZE, SIZE, SIZE) + number * SIZE**3
    return vx.Subject(t1=vx.ScalarImage(data), seg=vx.LabelMap((data % 7).to(torch.uint8)), **more)


def make_queue(num_subjects=4, max_length=6, samples=5, sampler=None, subjects=None, **more):
    subjects = [make_subject(number) for number in range(num_subjects)] if subjects is None else subjects
    more.setdefault("seed", 0)
    sampler = vx.UniformSampler(PATCH) if sampler is None else sampler
    return vx.Queue(subjects, max_length, samples, sampler, **more)


def place(patch):
    return patch.patch_location.subject_index, patch.patch_location.index


def bits(patch):
    return place(patch), patch.t1.data.numpy().tobytes(), patch.seg.data.numpy().tobytes()


class CountedSubjects(vx.SubjectsDataset):
    """Notes which subjects were asked for."""

    def __init__(self, *arguments, **more):
        super().__init__(*arguments, **more)
        self.asked = []

    def __getitem__(self, index):
        self.asked.append(index)
        return super().__getitem__(index)


# Order


def expected_draws(seed, epoch, counts):
    """Where the draws of all subjects lie, worked out from their numbers."""
    draws = []
    for subject, count in enumerate(counts):
        for number in range(count):
            rng = draw_generator(seed, epoch, number, subject)
            draws.append((subject, tuple(int(rng.integers(0, SIZE - PATCH, endpoint=True)) for _ in range(3))))
    return draws


@examples(25)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(any), st.integers(1, 30), st.booleans(), st.booleans())
def test_every_draw_of_every_subject_comes_once_in_every_epoch(counts, max_length, shuffle_subjects, shuffle_patches):
    subjects = [make_subject(number, num_samples=count) for number, count in enumerate(counts)]
    queue = make_queue(
        subjects=subjects, max_length=max_length, shuffle_subjects=shuffle_subjects, shuffle_patches=shuffle_patches
    )
    assert len(queue) == queue.iterations_per_epoch == queue.patches_per_epoch == sum(counts)
    for epoch in range(2):
        patches = [place(patch) for patch in queue]
        expected = expected_draws(0, epoch, counts)
        assert sorted(patches) == sorted(expected)
        if not shuffle_subjects and not shuffle_patches:
            assert patches == expected


def test_a_patch_is_what_its_location_says():
    subjects = [make_subject(number) for number in range(3)]
    for patch in make_queue(subjects=subjects):
        location = patch.patch_location
        source = subjects[location.subject_index]
        assert torch.equal(patch.t1.data, source.t1.data[(slice(None), *location.box.slices)])
        assert torch.equal(patch.seg.data, source.seg.data[(slice(None), *location.box.slices)])
        assert np.array_equal(patch.t1.affine[:3, 3], location.index)
        assert isinstance(patch.seg, vx.LabelMap)


def test_the_seed_is_that_of_the_queue_or_of_the_sampler_or_of_torch():
    torch.manual_seed(5)
    of_torch = [place(patch) for patch in make_queue(seed=None)]
    of_sampler = [place(patch) for patch in make_queue(seed=None, sampler=vx.UniformSampler(PATCH, seed=5))]
    of_queue = [place(patch) for patch in make_queue(seed=5, sampler=vx.UniformSampler(PATCH, seed=6))]
    assert of_torch == of_sampler == of_queue
    assert of_torch != [place(patch) for patch in make_queue(seed=6)]


@pytest.mark.parametrize("make_loader", [DataLoader, vx.SubjectsLoader])
@pytest.mark.parametrize("batch_size", [1, 4, 5, 20, 33])
def test_loaders_have_the_right_length(make_loader, batch_size):
    loader = make_loader(make_queue(), batch_size=batch_size)
    for _ in range(2):
        batches = list(loader)
        assert len(batches) == len(loader) == -(-20 // batch_size)
        assert sum(len(batch.t1.data) for batch in batches) == 20
        assert all(batch[vx.LOCATION].shape == (len(batch.t1.data), 6) for batch in batches)


def test_a_whole_grid_of_each_subject():
    subjects = [make_subject(0), make_subject(1)[:, :9]]
    sampler = vx.GridSampler(patch_size=PATCH, patch_overlap=2, padding_mode="reflect")
    grids = [sampler.grid_of(subject) for subject in subjects]
    queue = make_queue(subjects=subjects, sampler=sampler, samples=1)
    assert len(queue) == sum(map(len, grids))
    for _ in range(2):
        expected = [(number, location.index) for number, grid in enumerate(grids) for location in grid]
        assert sorted(place(patch) for patch in queue) == sorted(expected)


def test_a_transform_that_changes_the_shape_does_not_fit_a_grid():
    queue = make_queue(sampler=vx.GridSampler(patch_size=PATCH), transform=lambda subject: subject[2:])
    with pytest.raises(SubjectError, match=r"subject \d.*changed its shape to \(10, 12, 12\).*\(12, 12, 12\).*random sampler"):
        list(queue)


def test_a_grid_of_subjects_that_are_not_known_before_they_are_loaded():
    class Bare(Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return make_subject(index)

    with pytest.raises(QueueError, match="use a SubjectsDataset"):
        len(vx.Queue(Bare(), 4, 2, vx.GridSampler(patch_size=PATCH)))
    assert len(list(vx.Queue(Bare(), 4, 2, vx.UniformSampler(PATCH)))) == 4


def test_names_of_both_generations():
    subjects = [make_subject(number) for number in range(3)]
    newer = vx.Queue(
        subjects=subjects, patch_sampler=vx.UniformSampler(subjects[0], PATCH), max_length=6, patches_per_volume=5, seed=0
    )
    older = vx.Queue(vx.SubjectsDataset(subjects), 6, 5, vx.UniformSampler(PATCH), 0, True, True, False, False, seed=0)
    assert [bits(patch) for patch in newer] == [bits(patch) for patch in older]
    assert vx.data.Queue is vx.Queue
    with pytest.raises(QueueError, match="sampler and patch_sampler are names of the same thing"):
        vx.Queue(subjects, sampler=vx.UniformSampler(PATCH), patch_sampler=vx.UniformSampler(PATCH))


# Memory


@examples(20)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 12))
def test_no_more_patches_are_held_than_was_said(num_subjects, samples, max_length):
    queue = make_queue(num_subjects, max_length, samples)
    for _ in range(2):
        for _ in queue:
            assert queue.num_patches < max_length  # the one that has just left is not held any more


class Streamed(IterableDataset):
    """Has a length, and no indices but for those that PyTorch's classes refuse."""

    def __len__(self):
        return 3

    def __iter__(self):
        return iter([])


class Weak(np.ndarray):
    """Memory that can be kept in a weak set."""

    def __hash__(self):
        return id(self)

    def __eq__(self, other):
        return self is other


@pytest.mark.slow
def test_one_subject_is_in_memory_at_a_time():
    alive = weakref.WeakSet()

    def load(subject):
        gc.collect()
        assert len(alive) == 0
        memory = np.random.rand(1, SIZE, SIZE, SIZE).view(Weak)
        alive.add(memory)
        return vx.Subject(t1=vx.ScalarImage(torch.from_numpy(memory)), seg=subject.seg)

    queue = make_queue(transform=load, samples=3)
    patches = list(queue)
    assert len(patches) == 12
    del queue
    gc.collect()
    assert len(alive) == 0


def test_a_patch_owns_its_memory():
    queue = make_queue(max_length=3)
    patches = []
    for patch in queue:
        patches.append((bits(patch), patch))
    for expected, patch in patches:
        assert bits(patch) == expected
        assert patch.t1.data.untyped_storage().nbytes() == PATCH**3 * 4
    pointers = {patch.t1.data.data_ptr() for _, patch in patches}
    assert len(pointers) == len(patches)


def test_memory_of_patches_that_are_gone_is_used_again():
    queue = make_queue(max_length=3, num_subjects=6)
    pointers = {patch.t1.data.data_ptr() for patch in queue}
    assert len(pointers) <= 5


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.uint8, 1), (torch.int16, 2), (torch.bool, 1), (torch.float32, 4), (torch.float64, 8), (torch.int64, 8)],
)
def test_memory_is_true_for_every_type(dtype, size):
    data = torch.ones(3, SIZE, SIZE, SIZE)
    subjects = [vx.Subject(t1=vx.ScalarImage(data.to(dtype)), seg=vx.LabelMap(data[:1].to(torch.uint8)))] * 2
    expected = 7 * PATCH**3 * (3 * size + 1)
    queue = make_queue(subjects=subjects, max_length=7)
    assert queue.max_memory == queue.get_max_memory() == queue.get_max_memory(subjects[0]) == expected
    patches = list(queue)
    assert queue.max_memory == expected
    assert sum(image.memory for image in patches[0].images.values()) * 7 == expected
    converted = make_queue(
        subjects=subjects, max_length=7, transform=lambda subject: vx.Subject(t1=subject.t1.new_like(data.double()))
    )
    assert converted.max_memory == 7 * PATCH**3 * 3 * 8
    assert re.fullmatch(r"[\d.]+ (bytes|KiB)", queue.max_memory_pretty)
    assert queue.get_max_memory_pretty() == queue.max_memory_pretty


# Transforms and random states


def test_memory_is_that_of_the_largest_type(tmp_path):
    types = (torch.uint8, torch.float64, torch.int16)
    subjects = [vx.Subject(t1=vx.ScalarImage(torch.ones(1, 16, 16, 16, dtype=dtype))) for dtype in types]
    queue = make_queue(subjects=subjects, sampler=vx.UniformSampler(PATCH))
    assert queue.max_memory == 6 * PATCH**3 * 8
    missing = vx.Subject(t1=vx.ScalarImage(tmp_path / "missing.nii", verify_path=False))
    for transform in (None, noisy_if_possible):
        queue = make_queue(
            subjects=[missing, subjects[2]], sampler=vx.UniformSampler(PATCH), on_error="skip", transform=transform
        )
        assert queue.max_memory == 6 * PATCH**3 * 2
        with pytest.raises(vx.errors.ImageFileError, match=r"missing\.nii"):
            _ = make_queue(subjects=[missing, subjects[2]], sampler=vx.UniformSampler(PATCH), transform=transform).max_memory


def test_a_reader_of_ones_own_keeps_nothing_once_the_grid_is_known():
    subjects = [vx.Subject(t1=vx.ScalarImage(__file__, reader=lambda path: (torch.ones(1, 9, 9, 9), np.eye(4)))) for _ in "ab"]
    queue = make_queue(subjects=subjects, sampler=vx.GridSampler(patch_size=3))
    assert len(queue) == 54
    assert not any(subject.t1.is_loaded for subject in subjects)


def noisy_if_possible(subject):
    return subject


def noisy(subject):
    """Uses all three kinds of randomness, and a sum, whose last bits depend on the number of threads."""
    t1 = subject.t1.data + torch.rand(1) + np.random.rand() + random.random()
    big = torch.rand(300_000)
    return vx.Subject(t1=subject.t1.new_like((t1 * (1 + big.sum())).float()), seg=subject.seg)


def jittered(patch):
    patch.t1.set_data((patch.t1.data + torch.randn(1) + np.random.randn() + random.gauss(0, 1)).float())
    return patch


@pytest.mark.usefixtures("two_threads")
def test_transforms_are_seeded_and_leave_the_random_states_alone():
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    one = [bits(patch) for patch in make_queue(transform=noisy, patch_transform=jittered)]
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert torch.get_num_threads() == 2
    random.seed(99)
    np.random.seed(99)
    torch.rand(3)
    again = [bits(patch) for patch in make_queue(transform=noisy, patch_transform=jittered)]
    assert one == again
    assert one != [bits(patch) for patch in make_queue(transform=noisy, patch_transform=jittered, seed=1)]


def test_the_randomness_of_a_patch_is_that_of_its_draw_and_of_a_subject_that_of_its_epoch():
    noise = {}

    def remember(patch):
        value = float(torch.rand(1)), np.random.rand(), random.random()
        noise.setdefault(patch.patch_location.subject_index, []).append(value)
        return patch

    queue = make_queue(patch_transform=remember)
    list(queue)
    list(queue)
    values = [value for part in noise.values() for value in part]
    assert len(values) == len(set(values)) == 40
    assert len({word for value in values for word in value}) == 120


class Own:
    """Keeps a generator of its own."""

    def __init__(self, name):
        self.rng = np.random.default_rng(0)
        setattr(self, name, self._seed)

    def _seed(self, seed):
        assert 0 <= seed < 2**32
        self.rng = np.random.default_rng(seed)

    def __call__(self, subject):
        subject.t1.set_data(subject.t1.data + self.rng.standard_normal(dtype=np.float32))
        return subject


class Compose:
    def __init__(self, *transforms):
        self.transforms = transforms

    def __call__(self, subject):
        for transform in self.transforms:
            subject = transform(subject)
        return subject


@pytest.mark.parametrize("name", ["set_random_state", "set_random_seed", "manual_seed"])
@pytest.mark.parametrize("wrap", [lambda own: own, lambda own: Compose(abs_of, own)])
def test_a_generator_of_a_transform_is_seeded_where_it_has_a_method_for_that(name, wrap):
    def run(shift):
        transform = wrap(Own(name))
        dataset = vx.SubjectsDataset([make_subject(number) for number in range(3)], transform=transform)
        for _ in range(shift):
            dataset[0]
        return [bits(patch) for patch in vx.Queue(dataset, 4, 2, vx.UniformSampler(PATCH), seed=0)]

    assert run(0) == run(3)


def abs_of(subject):
    return subject


def test_two_parts_of_a_transform_are_seeded_differently():
    both = Compose(Own("manual_seed"), Own("manual_seed"))
    list(make_queue(num_subjects=1, transform=both))
    one, other = both.transforms
    assert one.rng.bit_generator.state != other.rng.bit_generator.state


def test_monai_transforms_are_seeded():
    from monai.transforms import Compose as MonaiCompose
    from monai.transforms import RandGaussianNoise

    noise = MonaiCompose([RandGaussianNoise(prob=1.0)])

    def transform(subject):
        return vx.Subject(t1=subject.t1.new_like(torch.as_tensor(noise(subject.t1.data))), seg=subject.seg)

    transform.transforms = [noise]
    one = [bits(patch) for patch in make_queue(transform=transform)]
    noise(torch.zeros(1, 2, 2, 2))
    assert one == [bits(patch) for patch in make_queue(transform=transform)]


# Resuming


@pytest.mark.parametrize("max_length", [1, 3, 8, 40])
def test_every_position_can_be_resumed(max_length):
    subjects = [make_subject(number, num_samples=count) for number, count in enumerate((3, 1, 4, 2))]
    queue = make_queue(subjects=subjects, max_length=max_length)
    everything = [bits(patch) for _ in range(2) for patch in queue]
    queue = make_queue(subjects=subjects, max_length=max_length)
    states = [queue.state_dict()]
    for _ in range(2):
        for _ in queue:
            states.append(queue.state_dict())
    assert len(states) == len(everything) + 1
    for number, state in enumerate(states[:-1]):
        state = pickle.loads(pickle.dumps(state))
        resumed = make_queue(subjects=subjects, max_length=max_length, seed=99)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        epochs = 2 if number < 10 else 1
        assert [bits(patch) for _ in range(epochs) for patch in resumed] == everything[number:]


def test_only_subjects_are_loaded_whose_patches_had_not_all_left():
    subjects = [make_subject(number) for number in range(8)]
    queue = make_queue(subjects=subjects, max_length=6, samples=4)
    patches = list(queue)
    by_subject = [patch.patch_location.subject_index for patch in patches]
    for position in range(len(patches)):
        dataset = CountedSubjects(subjects)
        resumed = vx.Queue(dataset, 6, 4, vx.UniformSampler(PATCH), seed=0)
        fresh = make_queue(subjects=subjects, max_length=6, samples=4)
        left = iter(fresh)
        for _ in range(position):
            next(left)
        resumed.load_state_dict(fresh.state_dict())
        list(resumed)
        assert sorted(dataset.asked) == sorted(set(by_subject[position:]))


def test_a_state_is_a_few_whole_numbers():
    queue = make_queue()
    next(iter(queue))
    state = queue.state_dict()
    assert all(isinstance(state[name], int) for name in ("seed", "epoch", "position", "schedule"))
    assert state["skipped"] == []
    assert len(state) == 5


def test_a_loader_can_be_resumed_with_the_state_of_the_queue():
    loader = vx.SubjectsLoader(make_queue(), batch_size=3)
    batches = iter(loader)
    for _ in range(2):
        next(batches)
    state = loader.state_dict()
    rest = [batch.t1.data for batch in batches]
    again = vx.SubjectsLoader(make_queue(seed=7), batch_size=3)
    again.load_state_dict(state)
    for one, other in zip(rest, again, strict=True):
        assert torch.equal(one, other.t1.data)


@pytest.mark.parametrize("is_queue", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
def test_after_the_last_batch_the_state_is_that_of_the_next_epoch(is_queue, drop_last):
    """A program that counts the batches of an epoch, as Lightning does, never asks for one more."""

    def make():
        subject = vx.Subject(t1=vx.ScalarImage(torch.rand(1, 12, 12, 12, generator=torch.Generator().manual_seed(0))))
        sampler = vx.UniformSampler(5) if is_queue else vx.UniformSampler(subject, 5, num_patches=8, seed=0)
        return vx.SubjectsLoader(
            vx.Queue([subject], 8, 8, sampler, seed=0) if is_queue else sampler, batch_size=3, drop_last=drop_last
        )

    loader, number = make(), 2 if drop_last else 3
    for _, _batch in zip(range(number), loader, strict=False):
        state = loader.state_dict()
    following = [batch.t1.data for batch in loader]
    again = make()
    again.load_state_dict(state)
    assert state["epoch"] == 1
    for _ in range(2):
        made = [batch.t1.data for batch in again]
        assert len(made) == number
        if following:
            assert all(map(torch.equal, made, following))
        following = []


def test_a_pass_that_was_left_is_resumed_where_it_was_left_and_a_new_one_is_a_new_epoch():
    queue = make_queue()
    for number, _ in enumerate(queue):
        if number == 6:
            break
    assert queue.state_dict()["position"] == 7
    resumed = make_queue()
    resumed.load_state_dict(queue.state_dict())
    assert len(list(resumed)) == 13
    assert sorted(place(patch) for patch in queue) == sorted(expected_draws(0, 1, [5] * 4))


@pytest.mark.parametrize("change", [{"max_length": 7}, {"samples": 6}, {"num_subjects": 5}, {"shuffle_patches": False}])
def test_a_state_of_another_order_is_refused(change):
    queue = make_queue()
    next(iter(queue))
    with pytest.raises(QueueError, match="cannot be resumed at patch 1.*max_length"):
        make_queue(**change).load_state_dict(queue.state_dict())


@pytest.mark.parametrize(
    "state", [{}, {"seed": 1}, {"seed": "a", "epoch": 0, "position": 0}, {"seed": 0, "epoch": 0, "position": 3}]
)
def test_what_is_no_state_is_refused(state):
    with pytest.raises(QueueError, match="is no state of a queue"):
        make_queue().load_state_dict(state)


def test_two_passes_at_once():
    queue = make_queue()
    first, second = iter(queue), iter(queue)
    next(first)
    next(second)
    with pytest.raises(QueueError, match="another one has begun"):
        next(first)
    assert len(list(second)) == 19


def test_a_queue_that_has_begun_can_be_pickled():
    queue = make_queue()
    patches = iter(queue)
    next(patches)
    copy = pickle.loads(pickle.dumps(queue))
    assert [bits(patch) for patch in copy] == [bits(patch) for patch in queue]
    # How long each waited is a matter of its own.
    assert repr(copy).rpartition(";")[0] == repr(queue).rpartition(";")[0]


# Ranks


@pytest.mark.parametrize("drop_last", [False, True])
def test_ranks_share_the_subjects_and_have_as_many_batches(drop_last):
    subjects = [make_subject(number, num_samples=count) for number, count in enumerate((1, 7, 2, 4, 4))]
    for world_size in (2, 3, 5):
        ranks = [
            make_queue(subjects=subjects, rank=rank, world_size=world_size, drop_last=drop_last) for rank in range(world_size)
        ]
        for epoch in range(3):
            made = [[place(patch) for patch in queue] for queue in ranks]
            assert len({len(patches) for patches in made}) == 1
            assert {len(queue) for queue in ranks} == {len(made[0])}
            owners = [{subject for subject, _ in patches} for patches in made]
            assert sum(map(len, owners)) == len(set().union(*owners))
            own = expected_draws(0, epoch, (1, 7, 2, 4, 4))
            everything = [patch for patches in made for patch in patches]
            if drop_last:
                assert set(everything) <= set(own)
            else:
                assert set(everything) >= set(own)


def test_a_rank_can_be_resumed_on_its_own():
    queue = make_queue(rank=1, world_size=2)
    patches = iter(queue)
    next(patches)
    state = queue.state_dict()
    resumed = make_queue(rank=1, world_size=2)
    resumed.load_state_dict(state)
    assert [bits(patch) for patch in resumed] == [bits(patch) for patch in patches]
    with pytest.raises(QueueError, match="cannot be resumed.*world_size"):
        make_queue(rank=1, world_size=3).load_state_dict(state)


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_rank_can_be_resumed_by_the_state_of_another(shuffle):
    """Trainers save that of one rank alone; all of them are as far."""
    first, second = (iter(make_queue(rank=rank, world_size=2, shuffle_subjects=shuffle)) for rank in range(2))
    queue = make_queue(rank=0, world_size=2, shuffle_subjects=shuffle)
    patches = iter(queue)
    for each in (first, second, patches):
        next(each)
    for rank, rest in enumerate((first, second)):
        resumed = make_queue(rank=rank, world_size=2, shuffle_subjects=shuffle)
        resumed.load_state_dict(queue.state_dict())
        assert [bits(patch) for patch in resumed] == [bits(patch) for patch in rest]


@pytest.mark.parametrize("drop_last", [False, True])
def test_a_distributed_sampler(drop_last):
    counts = (1, 7, 2, 4, 4, 3)
    subjects = [make_subject(number, num_samples=count) for number, count in enumerate(counts)]
    dataset = vx.SubjectsDataset(subjects)
    samplers = [torch.utils.data.DistributedSampler(dataset, num_replicas=2, rank=rank) for rank in range(2)]
    queues = [
        vx.Queue(
            dataset, 4, 3, vx.UniformSampler(PATCH), subject_sampler=sampler, shuffle_subjects=False, drop_last=drop_last, seed=0
        )
        for sampler in samplers
    ]
    orders = set()
    for epoch in range(3):
        made = []
        for sampler, queue in zip(samplers, queues, strict=True):
            sampler.set_epoch(epoch)
            made.append([place(patch) for patch in queue])
        assert len(made[0]) == len(made[1])
        owners = [{subject for subject, _ in patches} for patches in made]
        assert not owners[0] & owners[1]
        everything = {patch for patches in made for patch in patches}
        own = set(expected_draws(0, epoch, counts))
        assert (everything <= own) if drop_last else (everything >= own)
        orders.add(tuple(sorted(owners[0])))
    assert len(orders) > 1


def test_a_changed_order_of_a_subject_sampler_is_noticed():
    sampler = torch.utils.data.DistributedSampler([0] * 6, num_replicas=2, rank=0)

    def make():
        return make_queue(6, subject_sampler=sampler, shuffle_subjects=False)

    queue = make()
    sampler.set_epoch(3)
    patches = iter(queue)
    next(patches)
    state, rest = queue.state_dict(), [bits(patch) for patch in patches]
    resumed = make()
    resumed.load_state_dict(state)
    assert [bits(patch) for patch in resumed] == rest
    sampler.set_epoch(4)
    resumed = make()
    resumed.load_state_dict(state)
    with pytest.raises(QueueError, match="cannot be resumed.*set_epoch"):
        next(iter(resumed))


def test_any_subject_sampler_is_asked_once_for_each_epoch():
    asked = []

    class Some:
        def __iter__(self):
            asked.append(1)
            return iter([len(asked) % 4, 0])

        def __len__(self):
            return 2

    queue = make_queue(subject_sampler=Some(), shuffle_subjects=False, shuffle_patches=False)
    for epoch in range(3):
        assert len(queue) == 10
        subjects = [patch.patch_location.subject_index for patch in queue]
        assert subjects == [(epoch + 1) % 4] * 5 + [0] * 5
    assert len(asked) == 3
    assert queue.num_subjects == 2


# Arguments


@pytest.mark.parametrize("value", [0, -1, 2.5, "3", True])
@pytest.mark.parametrize("name", ["max_length", "samples_per_volume"])
def test_numbers_that_cannot_be(name, value):
    arguments = {"max_length": 4, "samples_per_volume": 2, "sampler": vx.UniformSampler(PATCH)} | {name: value}
    with pytest.raises(SizeError, match=f"{name} is .*at least 1"):
        vx.Queue([make_subject(0)], **arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"subjects_dataset": []}, SubjectError, "at least one subject"),
        ({"subjects_dataset": None}, SubjectError, "needs subjects"),
        ({"subjects_dataset": make_subject(0)}, SubjectError, "not something of type Subject"),
        ({"subjects_dataset": 3}, SubjectError, "of type int"),
        ({"subjects_dataset": Streamed()}, SubjectError, "with indices and a length, not something of type Streamed"),
        ({"sampler": None}, QueueError, "needs a sampler"),
        ({"sampler": vx.UniformSampler}, QueueError, "is UniformSampler.*made with a patch size"),
        ({"sampler": 64}, QueueError, "of type int"),
        ({"num_workers": -1}, SizeError, "num_workers"),
        ({"samples_per_volume": 10**30}, SizeError, "must be less than"),
        ({"multiprocessing_context": "nope"}, QueueError, "'nope': it must be one of 'fork'"),
        ({"on_error": "ignore"}, QueueError, "on_error is 'ignore'.*'raise', 'skip'"),
        ({"transform": 3}, SubjectError, "transform is of type int"),
        ({"patch_transform": 3}, SubjectError, "patch_transform is of type int"),
        ({"rank": 2, "world_size": 2, "seed": 0}, SizeError, "rank is 2"),
        ({"rank": 0, "world_size": 2}, QueueError, "give seed"),
        ({"subject_sampler": [0, 1]}, QueueError, "shuffle_subjects cannot be set"),
        (
            {"subject_sampler": [0], "shuffle_subjects": False, "world_size": 2, "seed": 0},
            QueueError,
            "but not both",
        ),
        ({"subjects_dataset": [make_subject(0, num_samples=0)]}, SizeError, "there are no patches"),
        ({"subjects_dataset": [make_subject(0, num_samples=-1)]}, SizeError, "num_samples of subject 0"),
    ],
)
def test_arguments_that_cannot_be(change, error, message):
    arguments = {"subjects_dataset": [make_subject(0), make_subject(1)], "max_length": 4, "sampler": vx.UniformSampler(PATCH)}
    with pytest.raises(error, match=message):
        len(vx.Queue(**arguments | change))


def test_a_subject_sampler_without_a_length():
    queue = make_queue(subject_sampler=iter([0, 1]), shuffle_subjects=False, start_background=False)
    with pytest.raises(ValueError, match="__len__ method"):
        _ = queue.num_subjects
    assert repr(queue).startswith("Queue(10 patches; ")


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([0, 9], "index 9, but there are 4"),
        ([], "no subjects"),
        ([0.5, 1.9], r"\[0.5, 1.9\]: it must give whole numbers"),
        (["a"], "whole numbers"),
    ],
)
def test_a_subject_sampler_of_other_subjects(order, message):
    with pytest.raises(SubjectError, match=message):
        list(make_queue(subject_sampler=order, shuffle_subjects=False))


def test_subjects_with_other_entries():
    with pytest.raises(SubjectError, match="subjects 0 and 2 .*'age'.*one batch"):
        make_queue(subjects=[make_subject(0), make_subject(1), make_subject(2, age=3)])
    # A transform may make them the same, or not.
    subjects = [make_subject(0), make_subject(1, age=3)]
    assert len(list(make_queue(subjects=subjects, transform=lambda subject: vx.Subject(subject.images)))) == 10
    with pytest.raises(SubjectError, match="subjects . and . .*'age'"):
        list(make_queue(subjects=subjects, transform=lambda subject: subject))


def test_only_some_subjects_say_how_many_patches():
    queue = make_queue(subjects=[make_subject(0), make_subject(1, num_samples=2)])
    (batch,) = vx.SubjectsLoader(queue, batch_size=20)
    assert sorted(location.subject_index for location in batch.patch_location) == [0] * 5 + [1] * 2


def test_a_sampler_that_leaves_its_domain():
    class Outside(vx.PatchSampler):
        def locate(self, subject, rng):
            return 10, 10, 10

    with pytest.raises(LocationError, match=r"subject \d, in epoch 0: Outside.locate returned \(10, 10, 10\)"):
        list(make_queue(sampler=Outside(PATCH)))


@pytest.mark.parametrize("name", ["transform", "patch_transform"])
def test_a_transform_that_gives_no_subject(name):
    with pytest.raises(SubjectError, match=rf"subject \d.*: what {name} returned is of type NoneType"):
        list(make_queue(**{name: lambda subject: None}))


# What is shown


def test_what_a_queue_shows(caplog):
    queue = make_queue(verbose=True, max_length=1)
    assert repr(queue) == "Queue(20 patches of 4 subjects; 0 workers; epoch 0, patch 0; 0 of 1 held; 0.0 s idle)"
    with caplog.at_level(logging.INFO, logger="voxloom.queue"):
        for number, _ in enumerate(queue):
            if number == 5:
                assert "epoch 0, patch 6 of 20, 1 subjects done; 0 of 1 held" in repr(queue)
    assert "epoch 0 begins at patch 0 of 20, with 0 held" in caplog.text
    assert "epoch 0, patch 10 of 20, 2 subjects done" in caplog.text
    assert "epoch 0, patch 20 of 20, 4 subjects done" in caplog.text
    assert "epoch 0 ends" in caplog.text
    assert queue.idle_seconds > 0


@pytest.mark.slow
def test_a_verbose_queue_is_heard_where_no_logging_is_set_up():
    code = """
import torch, voxloom as vx
subject = vx.Subject(t1=vx.ScalarImage(torch.rand(1, 8, 8, 8)))
list(vx.Queue([subject], 4, 2, vx.UniformSampler(4), verbose=True))
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "epoch 0 begins at patch 0 of 2" in shown.stderr
    assert shown.stdout == ""


def test_nothing_is_logged_unless_asked_for(caplog):
    with caplog.at_level(logging.DEBUG):
        list(make_queue())
    assert not caplog.records


def test_a_refused_state_changes_nothing():
    queue, other = make_queue(), make_queue(max_length=7)
    next(iter(queue))
    before = other.state_dict()
    with pytest.raises(QueueError, match="cannot be resumed"):
        other.load_state_dict(queue.state_dict() | {"seed": 5, "position": 1, "schedule": 1})
    assert other.state_dict() == before
    assert [bits(patch) for patch in other] == [bits(patch) for patch in make_queue(max_length=7)]


def test_a_part_of_a_data_set():
    dataset = vx.SubjectsDataset([make_subject(number, num_samples=number + 1) for number in range(4)])
    queue = vx.Queue(torch.utils.data.Subset(dataset, [3, 1]), 6, 5, vx.UniformSampler(PATCH), seed=0)
    assert len(queue) == 6
    assert sorted(place(patch)[0] for patch in queue) == [0, 0, 0, 0, 1, 1]
    grid = vx.GridSampler(patch_size=PATCH)
    assert len(vx.Queue(torch.utils.data.Subset(dataset, [0]), 6, 5, grid)) == len(grid.grid_of(dataset[0]))


def test_a_loader_counts_batches_that_were_delivered():
    """An error in the middle of a batch loses the patches that were taken for it."""
    is_broken = [True]

    def fail(subject):
        if is_broken[0] and subject["rank"] == 3:
            raise ValueError("a hiccup")
        return subject

    def make():
        subjects = [make_subject(number, rank=number) for number in range(5)]
        return vx.SubjectsLoader(
            make_queue(subjects=subjects, transform=fail, shuffle_subjects=False, max_length=1), batch_size=4
        )

    loader, delivered = make(), []
    with pytest.raises(ValueError, match="a hiccup"):
        delivered.extend(batch.t1.data for batch in loader)
    is_broken[0] = False
    resumed = make()
    resumed.load_state_dict(loader.state_dict())
    delivered.extend(batch.t1.data for batch in resumed)
    expected = [batch.t1.data for batch in make()]
    assert all(torch.equal(one, other) for one, other in zip(delivered, expected, strict=True))


def test_a_patch_transform_may_make_a_new_subject():
    patches = list(make_queue(patch_transform=lambda patch: vx.Subject(t1=patch.t1)))
    assert sorted(place(patch) for patch in patches) == sorted(expected_draws(0, 0, [5] * 4))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_random_sampler_of_subjects_is_asked_when_a_pass_begins(num_workers):
    torch.manual_seed(3)
    expected = list(torch.utils.data.RandomSampler(range(4)))
    torch.manual_seed(3)
    sampler = torch.utils.data.RandomSampler(range(4))
    queue = make_queue(subject_sampler=sampler, shuffle_subjects=False, shuffle_patches=False, num_workers=num_workers, samples=1)
    assert [place(patch)[0] for patch in queue] == expected


class OwnDataset(torch.utils.data.Dataset):
    """Says nothing of its subjects before it loads them."""

    def __init__(self, subjects):
        self.subjects = subjects

    def __len__(self):
        return len(self.subjects)

    def __getitem__(self, index):
        return self.subjects[index]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_wishes_that_nobody_could_know_of_are_no_secret(num_workers):
    subjects = OwnDataset([make_subject(number, num_samples=number + 1) for number in range(3)])
    queue = make_queue(subjects=subjects, samples=2, num_workers=num_workers, shuffle_subjects=False)
    # Subjects 0 and 2 both want another number: with workers, either may be met first.
    with pytest.raises(
        SubjectError, match=r"subject [02], in epoch 0: its num_samples is [13], but 2 patches were counted.*dry_iter"
    ):
        list(queue)
    subjects = OwnDataset([make_subject(0), make_subject(1, num_samples=2)])
    loader = vx.SubjectsLoader(make_queue(subjects=subjects, samples=2, num_workers=num_workers), batch_size=4)
    assert [batch.batch_size for batch in loader] == [4]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_data_sets_that_were_put_together(num_workers):
    """Their transforms are seeded too, and one that is changed between epochs counts from the next on."""
    first = vx.SubjectsDataset([make_subject(0, num_samples=3), make_subject(1, num_samples=1)], transform=abs_of)
    second = vx.SubjectsDataset([make_subject(2, num_samples=2)], transform=noisy)
    whole = torch.utils.data.ConcatDataset([first, second])
    queue = make_queue(subjects=whole, num_workers=num_workers)
    begun = [bits(patch) for patch in queue]
    assert sorted(patch[0][0] for patch in begun) == [0, 0, 0, 1, 2, 2]
    assert begun == [bits(patch) for patch in make_queue(subjects=whole)]
    second.set_transform(below_zero)
    assert {patch.patch_location.subject_index for patch in queue if patch.t1.data.max() < 0} == {2}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_state_of_a_loader_that_drops_its_last_batch(num_workers):
    queue = make_queue(num_subjects=3, samples=5, num_workers=num_workers)
    loader = vx.SubjectsLoader(queue, batch_size=4, drop_last=True)
    assert len(list(loader)) == 3
    assert loader.state_dict() == queue.state_dict() == {"seed": queue.state_dict()["seed"], "epoch": 1, "position": 0}
    loader.load_state_dict(loader.state_dict())
    assert len(list(loader)) == 3


def test_a_loader_notices_that_its_queue_was_set_elsewhere():
    queue = make_queue()
    loader = vx.SubjectsLoader(queue, batch_size=4)
    batches = iter(loader)
    next(batches)
    state = queue.state_dict()
    assert loader.state_dict() == state
    list(loader)
    list(itertools.islice(loader, 2))
    queue.load_state_dict(state)
    assert loader.state_dict() == state


class Seeded:
    def __init__(self):
        self.seeds = []

    def set_random_seed(self, seed):
        self.seeds.append(seed)

    def __call__(self, subject):
        return subject


class Composed:
    def __init__(self, *transforms):
        self.transforms = transforms

    def __call__(self, subject):
        for transform in self.transforms:
            subject = transform(subject)
        return subject


def test_all_parts_of_transforms_have_seeds_of_their_own():
    parts = [Seeded() for _ in range(6)]
    nested = Composed(Composed(parts[0], parts[1]), Composed(parts[2], parts[3]))
    dataset = vx.SubjectsDataset([make_subject(0)], transform=nested)
    list(make_queue(subjects=dataset, transform=Composed(parts[4], parts[5])))
    assert all(len(part.seeds) == 1 for part in parts)
    assert len({part.seeds[0] for part in parts}) == 6


def test_an_order_that_is_set_after_the_length_was_asked_for():
    class Epochs:
        start = 0

        def set_epoch(self, epoch):
            self.start = epoch

        def __iter__(self):
            return iter(range(self.start, self.start + 2))

        def __len__(self):
            return 2

    order = Epochs()
    subjects = [make_subject(number, num_samples=2 + number % 2) for number in range(4)]
    for chosen in (subjects, None):
        queue = make_queue(subjects=chosen, subject_sampler=order, shuffle_subjects=False)
        for epoch in range(3):
            len(queue)
            order.set_epoch(epoch)
            assert {patch.patch_location.subject_index for patch in queue} == {epoch, epoch + 1}


def test_the_length_draws_nothing_where_all_subjects_have_as_many_patches():
    queue = make_queue(subject_sampler=torch.utils.data.RandomSampler(range(4)), shuffle_subjects=False)
    before = torch.random.get_rng_state()
    assert len(queue) == len(vx.SubjectsLoader(queue)) == 20
    repr(queue)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_skipped_subjects_are_reported_to_whoever_takes_exactly_one_epoch():
    def fail(subject):
        if subject["name"] == "s1":
            raise ValueError("never")
        return subject

    subjects = [make_subject(number, name=f"s{number}") for number in range(4)]
    loader = vx.SubjectsLoader(make_queue(subjects=subjects, transform=fail, on_error="skip"), batch_size=4)
    with pytest.warns(RuntimeWarning, match="1 of 4 subjects"):
        assert len(list(itertools.islice(loader, len(loader)))) == len(loader)


def test_ranks_may_have_the_seed_of_the_sampler():
    queues = [make_queue(sampler=vx.UniformSampler(PATCH, seed=3), rank=rank, world_size=2, seed=None) for rank in range(2)]
    assert [queue.state_dict()["seed"] for queue in queues] == [3, 3]


def test_what_a_queue_was_made_with_stays():
    queue = make_queue()
    for name, value in (("max_length", 3), ("transform", noisy), ("sampler", vx.UniformSampler(2)), ("num_workers", 2)):
        with pytest.raises(QueueError, match=f"{name} of a queue cannot be changed.*make a new queue"):
            setattr(queue, name, value)
    copy.deepcopy(queue)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_transform_that_the_data_set_is_given_later(num_workers):
    dataset = vx.SubjectsDataset([make_subject(number) for number in range(3)])
    queue = make_queue(subjects=dataset, num_workers=num_workers)
    plain = [patch.t1.data.clone() for patch in queue]
    dataset.set_transform(below_zero)
    assert all((patch.t1.data < 0).all() for patch in queue)
    assert not any((data < 0).all() for data in plain)


def below_zero(subject):
    subject.t1.set_data(-subject.t1.data.abs() - 1)
    return subject


@pytest.mark.slow
def test_a_verbose_queue_is_heard_once():
    script = """
        import logging, torch, voxloom as vx
        queue = vx.Queue([vx.Subject(t1=vx.ScalarImage(torch.rand(1, 8, 8, 8)))], 4, 2, vx.UniformSampler(4), verbose=True)
        list(queue)
        logging.basicConfig(level="INFO")
        list(queue)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60)
    assert run.stderr.count("epoch 0 begins") == run.stderr.count("epoch 1 begins") == 1
