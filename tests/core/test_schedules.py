"""The order of an epoch: every patch once, few held at a time, and any position found without the ones before it."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from voxloom.core.random_numbers import Purpose, shuffled, uniform_numbers
from voxloom.core.schedules import EpochSchedule
from voxloom.errors import SizeError

COUNTS = st.lists(st.integers(0, 7), min_size=1, max_size=9).filter(any)
SEEDS = st.integers(-(2**63), 2**64 - 1)


@st.composite
def schedules(draw):
    return EpochSchedule.plan(
        draw(SEEDS),
        draw(st.integers(0, 3)),
        draw(COUNTS),
        draw(st.integers(1, 40)),
        shuffle_subjects=draw(st.booleans()),
        shuffle_patches=draw(st.booleans()),
    )


def draws_of(schedule):
    """Subject and number of every draw, in the order of loading."""
    remaining = schedule.remaining()
    pieces = [piece for place in remaining.places for piece in remaining.pieces(place, most=3)]
    return [(piece.subject, int(number)) for piece in pieces for number in piece.numbers]


@given(SEEDS, st.integers(0, 5), COUNTS, st.integers(1, 40), st.booleans(), st.booleans())
def test_every_patch_of_every_subject_leaves_once(seed, epoch, counts, max_length, shuffle_subjects, shuffle_patches):
    schedule = EpochSchedule.plan(
        seed, epoch, counts, max_length, shuffle_subjects=shuffle_subjects, shuffle_patches=shuffle_patches
    )
    everything = {(subject, number) for subject, count in enumerate(counts) for number in range(count)}
    assert len(schedule) == sum(counts)
    assert sorted(schedule.leaving()) == list(range(sum(counts)))
    assert sorted(draws_of(schedule)) == sorted(everything)
    if not shuffle_subjects:
        assert draws_of(schedule) == sorted(everything)
    if not shuffle_patches:
        assert list(schedule.leaving()) == list(range(sum(counts)))


@given(schedules())
def test_the_order_is_that_of_the_keys(schedule):
    """The definition, applied to the whole epoch at once."""
    keys = {patch: patch for patch in range(len(schedule))}
    if schedule.shuffle_patches:
        for patch in keys:
            number = uniform_numbers(schedule.seed, schedule.epoch, patch, patch + 1, Purpose.PATCH_ORDER)[0]
            assert 0 <= number < 1
            keys[patch] = patch + number * schedule.max_length
    assert list(schedule.leaving()) == sorted(keys, key=keys.get)


@given(schedules())
def test_no_more_than_max_length_are_held(schedule):
    loaded = 0
    for position, patch in enumerate(schedule.leaving()):
        loaded = max(loaded, patch + 1)  # in the order of loading, and no sooner than needed
        assert loaded - position <= schedule.max_length
        assert abs(patch - position) < schedule.max_length


@given(schedules(), st.integers(1, 5))
def test_every_position_can_be_resumed(schedule, most):
    order = list(schedule.leaving())
    numbers = dict(enumerate(draws_of(schedule)))
    for position in range(len(order) + 1):
        assert list(schedule.leaving(position)) == order[position:]
        remaining = schedule.remaining(position)
        pieces = [piece for place in remaining.places for piece in remaining.pieces(place, most)]
        left = [(int(patch), (piece.subject, int(number))) for piece in pieces for patch, number in zip(*piece[2:], strict=True)]
        assert left == [(patch, numbers[patch]) for patch in sorted(order[position:])]
        assert all(0 < len(piece.patches) <= most for piece in pieces)


@given(schedules(), st.integers(1, 5))
def test_pieces_end_where_they_would_without_a_resume(schedule, most):
    for position in range(len(schedule)):
        for place in schedule.remaining(position).places:
            for piece in schedule.remaining(position).pieces(place, most):
                assert len({number // most for number in piece.numbers.tolist()}) == 1


RANKS = st.integers(1, 4)


@given(SEEDS, st.lists(st.integers(0, 7), min_size=4, max_size=12), RANKS, st.booleans(), st.booleans())
def test_ranks_share_the_subjects_and_have_the_same_length(seed, counts, world_size, shuffle_subjects, drop_last):
    if np.count_nonzero(counts) < world_size:
        return
    lengths = set()
    for epoch in range(3):
        ranks = [
            EpochSchedule.plan(
                seed,
                epoch,
                counts,
                5,
                shuffle_subjects=shuffle_subjects,
                rank=rank,
                world_size=world_size,
                drop_last=drop_last,
            )
            for rank in range(world_size)
        ]
        lengths |= {len(schedule) for schedule in ranks}
        for one, other in itertools.combinations(ranks, 2):
            assert not set(one.subjects) & set(other.subjects)
        made = [draw for schedule in ranks for draw in draws_of(schedule)]
        assert len(made) == len(set(made))
        own = {(subject, number) for subject, count in enumerate(counts) for number in range(count)}
        if drop_last:
            assert set(made) <= own
        else:
            assert set(made) >= own
    assert len(lengths) == 1


def test_ranks_with_equal_subjects_differ_by_one_subject_at_most():
    lengths = [len(EpochSchedule.plan(0, 0, [5] * 7, 4, rank=rank, world_size=3)) for rank in range(3)]
    assert lengths == [15, 15, 15]
    assert len(EpochSchedule.plan(0, 0, [5] * 7, 4, rank=0, world_size=3, drop_last=True)) == 10
    assert EpochSchedule.plan(0, 0, [5] * 7, 4, rank=1, world_size=3, shuffle_subjects=False).subjects == (1, 4)


def test_further_draws_go_to_all_subjects_alike():
    schedule = EpochSchedule.in_order(0, 0, [2, 3], [1, 0], 4, length=8)
    assert schedule.draws == (5, 3)
    assert draws_of(schedule) == [(1, 0), (1, 1), (1, 2), (1, 3), (1, 4), (0, 0), (0, 1), (0, 2)]
    assert EpochSchedule.in_order(0, 0, [2, 3], [1, 0], 4, length=2).draws == (2,)
    assert EpochSchedule.in_order(0, 0, [0, 4], [0, 1], 4, length=6).subjects == (1,)
    assert len(EpochSchedule.in_order(0, 0, [0, 4], [0], 4, length=6)) == 0


def test_a_subject_that_is_named_twice_makes_other_draws_the_second_time():
    assert draws_of(EpochSchedule.in_order(0, 0, [2, 1], [0, 1, 0], 4)) == [(0, 0), (0, 1), (1, 0), (0, 2), (0, 3)]


def test_epochs_seeds_and_purposes_differ():
    orders = {
        tuple(EpochSchedule.plan(seed, epoch, [4] * 20, 30).leaving()) + EpochSchedule.plan(seed, epoch, [4] * 20, 30).subjects
        for seed in range(4)
        for epoch in range(4)
    }
    assert len(orders) == 16
    of_patches = uniform_numbers(0, 0, 0, 99, Purpose.PATCH_ORDER)
    assert not np.isin(of_patches, uniform_numbers(0, 0, 0, 99, Purpose.SUBJECT_ORDER)).any()


@given(SEEDS, st.integers(0, 30), st.integers(0, 30))
def test_random_numbers_can_be_had_from_anywhere(seed, first, more):
    everything = uniform_numbers(seed, 1, 0, 100, Purpose.PATCH_ORDER)
    assert np.array_equal(uniform_numbers(seed, 1, first, first + more, Purpose.PATCH_ORDER), everything[first : first + more])


def test_every_order_of_subjects_is_as_frequent():
    seen = np.zeros((4, 4))
    for epoch in range(2000):
        order = shuffled(np.arange(4), 1, epoch, Purpose.SUBJECT_ORDER)
        seen[np.arange(4), order] += 1
    assert np.abs(seen / 2000 - 0.25).max() < 0.05


def distinct_subjects(order, draws, batch_size=8):
    subjects = [draws[patch][0] for patch in order]
    batches = [subjects[first : first + batch_size] for first in range(0, len(subjects) - batch_size + 1, batch_size)]
    return np.mean([len(set(batch)) for batch in batches])


def test_patches_are_as_well_mixed_as_in_a_shuffled_buffer():
    """Distinct subjects in a batch of 8, of 50 subjects with 8 patches each, when a quarter of the patches is held."""
    schedule = EpochSchedule.plan(0, 0, [8] * 50, max_length=100)
    draws = draws_of(schedule)
    generator = np.random.default_rng(0)
    fully = np.mean([distinct_subjects(generator.permutation(400), draws) for _ in range(50)])
    buffer = np.arange(400).reshape(4, 100)
    shuffled_buffer = np.mean(
        [distinct_subjects(np.concatenate([generator.permutation(part) for part in buffer]), draws) for _ in range(50)]
    )
    ours = np.mean([distinct_subjects(EpochSchedule.plan(0, epoch, [8] * 50, 100).leaving(), draws) for epoch in range(50)])
    unmixed = distinct_subjects(range(400), draws)
    assert unmixed == 1
    assert fully > 7.2
    assert ours > 0.75 * fully
    assert ours > shuffled_buffer - 0.5


def test_a_plan_lists_nothing():
    """Ten thousand million patches, of which one position is looked at."""
    schedule = EpochSchedule.plan(0, 0, [10**7] * 1000, max_length=300)
    assert len(schedule) == 10**10
    position = 5 * 10**9
    patch = next(schedule.leaving(position))
    assert abs(patch - position) < 300
    remaining = schedule.remaining(position)
    piece = next(remaining.pieces(remaining.places[0], most=16))
    assert len(piece.patches) <= 16


@pytest.mark.parametrize("max_length", [0, -1, 2.5, True, "3"])
def test_a_length_that_cannot_be(max_length):
    with pytest.raises(SizeError, match="max_length"):
        EpochSchedule.plan(0, 0, [1], max_length)


def test_more_ranks_than_subjects():
    with pytest.raises(SizeError, match="2 subjects with patches cannot be shared among 3 ranks"):
        EpochSchedule.plan(0, 0, [1, 1, 0], 1, world_size=3)


def test_fingerprints_tell_schedules_apart():
    schedules = [
        EpochSchedule.plan(0, 0, [3, 3], 4, shuffle_subjects=False),
        EpochSchedule.plan(0, 0, [3, 3], 5, shuffle_subjects=False),
        EpochSchedule.plan(0, 0, [3, 4], 4, shuffle_subjects=False),
        EpochSchedule.plan(0, 0, [3, 3], 4, shuffle_subjects=False, shuffle_patches=False),
        EpochSchedule.in_order(0, 0, [3, 3], [1, 0], 4),
    ]
    assert len({schedule.fingerprint for schedule in schedules}) == 5
