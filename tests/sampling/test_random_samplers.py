"""Random samplers: the right distribution, and the same draws however they are made."""

import itertools
import pickle
import random

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.data import DataLoader

import voxloom as vx
from slow import slow
from voxloom.errors import LocationError, ModeError, NoSuchKeyError, SamplingError, SizeError, SpaceError, SubjectError

DRAWS = 2500
# Seeds are fixed, so that these tests never fail by chance; a wrong distribution gives a far smaller probability.
LEAST_PROBABILITY = 1e-3


def subject_of(shape=(7, 6, 5), **images):
    return vx.Subject(t1=vx.ScalarImage(torch.arange(float(np.prod(shape))).reshape(1, *shape)), **images)


def locations(patches):
    return [patch.patch_location.index for patch in patches]


def places(sampler, draws):
    """Where the first draws of epoch 0 lie, without cutting patches."""
    patches = sampler.numbered(sampler.subject, sampler.seed, 0, 0)
    return [patches.locate(number).index for number in range(draws)]


def centres(sampler, draws=DRAWS):
    """How often each voxel was the centre of a patch."""
    counts = np.zeros(sampler.subject.spatial_shape, dtype=int)
    for index in places(sampler, draws):
        counts[tuple(first + size // 2 for first, size in zip(index, sampler.patch_size, strict=True))] += 1
    return counts


def valid(shape, patch):
    """Voxels that can be the centre of a patch that lies in the volume, found by trying."""
    mask = np.zeros(shape, dtype=bool)
    for start in itertools.product(*(range(size - side + 1) for size, side in zip(shape, patch, strict=True))):
        mask[tuple(first + side // 2 for first, side in zip(start, patch, strict=True))] = True
    return mask


def assert_distributed(counts, weights):
    """Chi-square test of counts against exact weights; voxels of weight 0 must never be drawn."""
    assert counts[weights == 0].sum() == 0
    expected = weights[weights > 0] / weights.sum() * counts.sum()
    assert expected.min() >= 5
    if len(expected) > 1:
        assert stats.chisquare(counts[weights > 0], expected).pvalue > LEAST_PROBABILITY


PATCHES = [(1, 1, 1), (2, 2, 2), (3, 3, 3), (4, 3, 2), (7, 6, 5), (6, 2, 5)]


@pytest.mark.parametrize("patch", PATCHES)
def test_uniform_draws_are_uniform_over_all_places(patch):
    sampler = vx.UniformSampler(subject_of(), patch, seed=1)
    assert_distributed(centres(sampler), valid((7, 6, 5), patch).astype(float))


@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.parametrize("dtype", [torch.float32, slow(torch.uint8)])
def test_weighted_draws_follow_the_map_and_keep_to_the_border_exactly(patch, dtype):
    weights = torch.randint(0, 4, (1, 7, 6, 5), generator=torch.Generator().manual_seed(0)).to(dtype)
    if dtype.is_floating_point:
        weights *= 0.37
    subject = subject_of(where=vx.Image(weights, type=vx.SAMPLING_MAP))
    expected = weights[0].double().numpy() * valid((7, 6, 5), patch)
    if not expected.any():
        weights += 1
        expected = weights[0].double().numpy() * valid((7, 6, 5), patch)
    assert_distributed(centres(vx.WeightedSampler(subject, patch, "where", seed=2)), expected)


@pytest.mark.parametrize(("patch", "dtype"), [((1, 1, 1), torch.uint8), ((2, 3, 2), torch.float32), ((3, 3, 3), torch.int64)])
def test_label_draws_pick_the_class_first_and_then_any_of_its_voxels(patch, dtype):
    labels = torch.randint(0, 4, (1, 7, 6, 5), generator=torch.Generator().manual_seed(3))
    subject = subject_of(seg=vx.LabelMap(labels.to(dtype)))
    probabilities = {0: 0, 1: 2, 2: 1, 3: 1, 9: 5}  # 9 is absent, and drops out
    sampler = vx.LabelSampler(subject, patch, "seg", probabilities, seed=4)
    mask = valid((7, 6, 5), patch)
    expected = np.zeros((7, 6, 5))
    for label, share in ((1, 0.5), (2, 0.25), (3, 0.25)):
        members = (labels[0].numpy() == label) & mask
        expected[members] = share / members.sum()
    assert_distributed(centres(sampler), expected)


def test_class_shares_keep_to_their_binomial_bounds():
    labels = torch.zeros(1, 7, 6, 5, dtype=torch.uint8)
    labels[0, 1, 1, 1], labels[0, 3:6, 2:5, 1:4] = 1, 2  # 1 voxel against 27
    sampler = vx.LabelSampler(subject_of(seg=vx.LabelMap(labels)), 1, "seg", {1: 3, 2: 1}, seed=4)
    counts = centres(sampler)
    for label, share in ((1, 0.75), (2, 0.25)):
        drawn = int(counts[labels[0].numpy() == label].sum())
        assert stats.binomtest(drawn, DRAWS, share).pvalue > LEAST_PROBABILITY


@pytest.mark.slow
def test_without_probabilities_all_foreground_is_alike():
    labels = torch.randint(0, 4, (1, 7, 6, 5), generator=torch.Generator().manual_seed(3))
    subject = subject_of(seg=vx.LabelMap(labels))
    assert_distributed(
        centres(vx.LabelSampler(subject, 3, seed=5)), ((labels[0] > 0).numpy() & valid((7, 6, 5), (3, 3, 3))) * 1.0
    )
    ignoring = vx.LabelSampler(subject, 1, "seg", ignore_label=2, seed=5)
    assert_distributed(centres(ignoring), ((labels[0] > 0) & (labels[0] != 2)).numpy() * 1.0)
    never = vx.LabelSampler(subject, 1, "seg", {1: 1, 2: 1}, ignore_label=2, seed=5)
    assert_distributed(centres(never), (labels[0] == 1).numpy() * 1.0)


def test_of_several_channels_the_channel_is_the_class():
    channels = torch.rand(4, 7, 6, 5, generator=torch.Generator().manual_seed(6)) > 0.6
    subject = subject_of(seg=vx.LabelMap(channels.to(torch.uint8) * 3))
    foreground = vx.LabelSampler(subject, (2, 2, 2), seed=7)
    mask = valid((7, 6, 5), (2, 2, 2))
    assert_distributed(centres(foreground), (channels[1:].any(dim=0).numpy() & mask) * 1.0)
    by_class = vx.LabelSampler(subject, (2, 2, 2), "seg", {0: 0, 1: 2, 2: 1, 3: 1}, seed=8)
    expected = np.zeros((7, 6, 5))
    for channel, share in ((1, 0.5), (2, 0.25), (3, 0.25)):
        members = channels[channel].numpy() & mask
        expected += members * (share / members.sum())
    assert_distributed(centres(by_class), expected)


def test_clamping_allows_every_centre_and_shifts_the_patch_inwards():
    labels = torch.zeros(1, 7, 6, 5, dtype=torch.uint8)
    labels[0, 0, 0, 0], labels[0, 6, 5, 4] = 1, 1
    subject = subject_of(seg=vx.LabelMap(labels))
    with pytest.raises(SamplingError, match=r"only near the border.*use border='clamp'.*pad the images by 2 voxels"):
        vx.LabelSampler(subject, 4)
    sampler = vx.LabelSampler(subject, 4, border="clamp", num_patches=200, seed=1)
    counts = {index: locations(sampler).count(index) for index in set(locations(sampler))}
    assert set(counts) == {(0, 0, 0), (3, 2, 1)}
    assert min(counts.values()) > 60


def test_a_mixture_draws_from_each_of_its_samplers_as_often_as_was_said():
    labels = torch.zeros(1, 7, 6, 5, dtype=torch.uint8)
    labels[0, 3, 3, 2] = 1
    subject = subject_of(seg=vx.LabelMap(labels))
    mixed = vx.MixedSampler(subject, [(1, vx.LabelSampler(1)), (2, vx.UniformSampler(1))], seed=9)
    expected = np.full((7, 6, 5), 2 / 3 / 210)
    expected[3, 3, 2] += 1 / 3
    assert_distributed(centres(mixed), expected)
    unbound = vx.MixedSampler([(1 / 3, vx.LabelSampler(1)), (2 / 3, vx.UniformSampler(1))], seed=9)
    assert locations(unbound(subject, 5)) == places(mixed, 5)


def test_every_voxel_of_a_large_volume_can_be_reached():
    weights = torch.ones(1, 512, 256, 256, dtype=torch.uint8)  # 2²⁵ voxels
    subject = vx.Subject(where=vx.Image(weights, type=vx.SAMPLING_MAP))
    for sampler in (vx.WeightedSampler(subject, 1, "where", seed=1), vx.LabelSampler(subject, 1, "where", seed=1)):
        flat = np.array([(i * 256 + j) * 256 + k for i, j, k in places(sampler, 400)])
        for bit in range(25):
            assert 130 < ((flat >> bit) & 1).sum() < 270


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize(
    ("workers", "start"),
    [(0, None), (1, "fork"), (4, "fork"), slow(2, "spawn")],
)
def test_the_same_draws_for_every_number_of_workers(start, workers):
    def make():
        return vx.UniformSampler(subject_of(), 3, num_patches=20, seed=3)

    # Processes that are spawned take seconds to begin.
    context = {"num_workers": workers, "multiprocessing_context": start, "persistent_workers": start == "spawn"}
    alone = make()
    expected = [locations(alone), locations(alone)]
    assert expected[0] != expected[1]
    plain = DataLoader(make(), batch_size=3, **context)
    for epoch in expected:
        assert sorted(location.index for batch in plain for location in batch.patch_location) == sorted(epoch)
    loader = vx.SubjectsLoader(make(), batch_size=3, **context)
    assert len(loader) == 7
    for epoch in expected:
        assert [location.index for batch in loader for location in batch.patch_location] == epoch


@pytest.mark.parametrize("make", [DataLoader, vx.SubjectsLoader])
def test_workers_that_stay_go_on_to_the_next_epoch(make):
    alone = vx.UniformSampler(subject_of(), 3, num_patches=9, seed=3)
    expected = [sorted(locations(alone)) for _ in range(3)]
    loader = make(vx.UniformSampler(subject_of(), 3, num_patches=9, seed=3), batch_size=2, num_workers=2, persistent_workers=True)
    for epoch in expected:
        assert sorted(location.index for batch in loader for location in batch.patch_location) == epoch


@pytest.mark.parametrize("stop", [0, 1, 7, 12])
def test_a_sampler_continues_with_the_very_next_draw(stop):
    def make():
        return vx.UniformSampler(subject_of(), 3, num_patches=12, seed=5)

    whole = make()
    expected = [*locations(whole), *locations(whole)]
    first = make()
    begun = [patch.patch_location.index for patch in itertools.islice(first, stop)]
    resumed = make()
    resumed.seed = 0
    resumed.load_state_dict(first.state_dict())
    rest = locations(resumed)
    if stop == 12:  # islice stops before the pass knows that it has ended
        assert rest == []
        rest = locations(resumed)
        assert [*begun, *rest] == expected
        return
    assert [*begun, *rest, *locations(resumed)] == expected


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [0, 3, 6, *(slow(each) for each in (1, 5))])
def test_a_loader_continues_with_the_very_next_batch(workers, stop):
    def make():
        return vx.SubjectsLoader(vx.UniformSampler(subject_of(), 3, num_patches=14, seed=5), batch_size=3, num_workers=workers)

    def run(loader, passes=1):
        return [tuple(location.index for location in batch.patch_location) for _ in range(passes) for batch in loader]

    expected = run(make(), passes=3)
    first = make()
    begun = []
    while len(begun) < stop:
        for batch in first:
            begun.append(tuple(location.index for location in batch.patch_location))
            if len(begun) == stop:
                break
    state = first.state_dict()
    resumed = make()
    resumed.load_state_dict(state)
    rest = run(resumed, passes=3)
    assert (begun + rest)[: len(expected)] == expected


def test_draws_leave_the_random_states_alone_and_follow_the_seed_of_torch():
    def make():
        torch.manual_seed(11)
        return vx.UniformSampler(subject_of(), 3, num_patches=5)

    first = make()
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    drawn = locations(first)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == np.random.get_state()[1].tolist()
    assert states[2] == random.getstate()
    assert locations(make()) == drawn
    torch.manual_seed(12)
    assert locations(vx.UniformSampler(subject_of(), 3, num_patches=5)) != drawn


def test_how_many_patches():
    subject = subject_of()
    assert locations(vx.UniformSampler(subject, 3, num_patches=0)) == []
    endless = vx.UniformSampler(subject, 3)
    assert len(list(itertools.islice(endless, 50))) == 50
    assert len(list(itertools.islice(vx.UniformSampler(3)(subject), 50))) == 50
    assert len(list(vx.UniformSampler(3, num_patches=4)(subject))) == 4
    assert len(list(vx.UniformSampler(3, 4)(subject))) == 4
    assert len(list(vx.UniformSampler(subject, 3, 4)(num_patches=2))) == 2
    with pytest.raises(TypeError, match="no end"):
        len(endless)
    for number in (-1, 1.5, True, "3"):
        with pytest.raises(SizeError, match="num_patches"):
            vx.UniformSampler(subject, 3, num_patches=number)
        with pytest.raises(SizeError, match="num_patches"):
            vx.UniformSampler(3)(subject, num_patches=number)


def test_patches_own_their_memory_and_agree_on_where_they_are():
    subject = subject_of()
    for patch in vx.UniformSampler(subject, 3, num_patches=5):
        assert patch[vx.LOCATION].tolist() == patch.patch_location.tolist()
        assert patch["index_ini"].tolist() == list(patch.patch_location.index)
        assert torch.equal(patch.t1.data, subject.t1.data[(slice(None), *patch.patch_location.to_slices())])
        patch.t1.data.zero_()
    assert subject.t1.data[0].flatten()[1:].all()


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("share_ranks", [None, True])
def test_ranks_share_the_draws_and_have_as_many(rank, share_ranks, monkeypatch):
    everything = locations(vx.UniformSampler(subject_of(), 3, num_patches=12, seed=1))
    for name, value in (("is_initialized", True), ("get_rank", rank), ("get_world_size", 3)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    for asked in (10, 11, 12):
        sampler = vx.UniformSampler(subject_of(), 3, num_patches=asked, seed=1, share_ranks=share_ranks)
        assert len(sampler) == 4
        assert locations(sampler) == everything[rank::3]
    assert locations(vx.UniformSampler(subject_of(), 3, num_patches=12, seed=1, share_ranks=False)) == everything


def test_a_sampler_in_another_process_is_of_the_rank_that_sent_it(monkeypatch):
    everything = locations(vx.UniformSampler(subject_of(), 3, num_patches=12, seed=1))
    for name, value in (("is_initialized", True), ("get_rank", 1), ("get_world_size", 3)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    sent = pickle.dumps(vx.UniformSampler(subject_of(), 3, num_patches=12, seed=1))
    monkeypatch.undo()
    assert locations(pickle.loads(sent)) == everything[1::3]
    # Sent before there were ranks, it finds out which it is.
    sent = pickle.dumps(vx.UniformSampler(subject_of(), 3, num_patches=12, seed=1))
    for name, value in (("is_initialized", True), ("get_rank", 2), ("get_world_size", 3)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    assert locations(pickle.loads(sent)) == everything[2::3]


def test_a_sampler_of_ones_own():
    class Corners(vx.PatchSampler):
        def locate(self, subject, rng):
            return [int(rng.integers(2)) * (size - 3) for size in subject.spatial_shape]

    drawn = locations(Corners(subject_of(), 3, num_patches=50, seed=0))
    assert set(drawn) == set(itertools.product((0, 4), (0, 3), (0, 2)))

    class Beyond(vx.PatchSampler):
        def locate(self, subject, rng):
            return 5, 0, 0

    with pytest.raises(LocationError, match=r"Beyond.locate returned \(5, 0, 0\)"):
        next(Beyond(3)(subject_of()))
    with pytest.raises(TypeError, match="abstract method '?locate"):
        vx.PatchSampler(3)


def test_a_volume_that_is_smaller_than_the_patch():
    labels = torch.zeros(1, 7, 6, 5, dtype=torch.uint8)
    labels[0, 3, 3, 2] = 1
    subject = subject_of(seg=vx.LabelMap(labels))
    for make in (vx.UniformSampler, vx.LabelSampler):
        with pytest.raises(SizeError, match="padding_mode"):
            make(subject, 8)
        patch = next(iter(make(subject, 8, padding_mode="edge")))
        assert patch.t1.spatial_shape == (8, 8, 8)
    mixed = vx.MixedSampler(subject, [(1, vx.LabelSampler(8)), (1, vx.UniformSampler(8))], padding_mode=0, num_patches=3)
    assert len(list(mixed)) == 3


class WatchedMap(vx.LabelMap):
    """Counts the voxels that are read."""

    voxels_read = 0

    def read(self, box):
        self.voxels_read += box.numel
        return super().read(box)


def test_the_pass_over_the_map_is_made_once_and_again_when_the_data_change():
    labels = torch.zeros(1, 7, 6, 5, dtype=torch.uint8)
    labels[0, 3, 3, 2] = 1
    subject = subject_of(seg=WatchedMap(labels))

    def drawn():
        """Where a patch is drawn, and whether the whole map was read for it."""
        before = subject.seg.voxels_read
        index = next(vx.LabelSampler(1)(subject)).patch_location.index
        return index, subject.seg.voxels_read - before >= labels.numel()

    assert [drawn() for _ in range(3)] == [((3, 3, 2), True), ((3, 3, 2), False), ((3, 3, 2), False)]
    subject.seg.data.zero_()
    subject.seg.data[0, 1, 1, 1] = 1
    assert [drawn() for _ in range(2)] == [((1, 1, 1), True), ((1, 1, 1), False)]
    subject.seg.set_data(labels.roll(1, dims=1))
    assert [drawn() for _ in range(2)] == [((2, 1, 1), True), ((2, 1, 1), False)]


def test_a_map_on_disk_is_not_loaded(tmp_path):
    labels = np.zeros((40, 30, 20), dtype=np.int16)
    labels[25, 11, 7] = 3
    nib.save(nib.Nifti1Image(labels, np.eye(4)), tmp_path / "seg.nii")
    subject = vx.Subject(seg=vx.LabelMap(tmp_path / "seg.nii"))
    sampler = vx.LabelSampler(subject, 5, "seg", {3: 1}, num_patches=3)
    assert locations(sampler) == [(23, 9, 5)] * 3
    assert not subject.seg.is_loaded
    subject.seg.load()
    assert locations(vx.LabelSampler(subject, 5, "seg", {3: 1}, num_patches=1)) == [(23, 9, 5)]


def test_subjects_without_what_is_looked_for():
    subject = subject_of(seg=vx.LabelMap(torch.zeros(1, 7, 6, 5, dtype=torch.uint8)))
    with pytest.raises(RuntimeError, match="the map 'seg' does not have foreground"):
        vx.LabelSampler(subject, 3)
    with pytest.raises(SamplingError, match="does not have any of the labels 1, 2"):
        next(vx.LabelSampler(3, "seg", {1: 1, 2: 1})(subject))
    with pytest.raises(RuntimeError, match="all zeros"):
        vx.WeightedSampler(subject, 3, "seg")
    assert len(set(locations(vx.LabelSampler(subject, 3, on_empty="uniform", num_patches=30)))) > 10
    skipping = vx.LabelSampler(subject, 3, on_empty="skip", num_patches=30)
    assert locations(skipping) == []
    assert len(skipping) == 0
    assert list(vx.SubjectsLoader(skipping)) == []
    mixed = vx.MixedSampler(subject, [(1, vx.LabelSampler(3, on_empty="skip")), (1, vx.UniformSampler(3))], num_patches=4)
    assert len(list(mixed)) == 4


@pytest.mark.parametrize(
    ("value", "rule"), [(-1.0, "negative"), (float("nan"), "NaN or infinity"), (float("inf"), "NaN or infinity")]
)
def test_maps_that_are_no_probabilities(value, rule):
    weights = torch.ones(1, 7, 6, 5)
    weights[0, 3, 3, 2] = value
    subject = subject_of(where=vx.ScalarImage(weights))
    with pytest.raises(SamplingError, match=rule):
        vx.WeightedSampler(subject, 3, "where")


@pytest.mark.parametrize(
    ("probabilities", "rule"),
    [
        ({1.5: 1}, "whole numbers"),
        ({"a": 1}, "whole numbers"),
        ({1: -1}, "at least 0"),
        ({1: float("nan")}, "finite"),
        ({}, "dict"),
        (3, "dict"),
    ],
)
def test_probabilities_that_are_none(probabilities, rule):
    with pytest.raises(SamplingError, match=rule):
        vx.LabelSampler(3, "seg", probabilities)


def test_other_mistakes():
    seg = vx.LabelMap(torch.ones(1, 7, 6, 5))
    subject = subject_of(seg=seg)
    with pytest.raises(NoSuchKeyError, match="no image 'missing', only 't1', 'seg'"):
        vx.WeightedSampler(subject, 3, "missing")
    with pytest.raises(NoSuchKeyError, match="no image 'missing'"):
        vx.LabelSampler(subject, 3, "missing")
    with pytest.raises(SubjectError, match="no label map, only 't1'"):
        vx.LabelSampler(subject_of(), 3)
    with pytest.raises(SubjectError, match="name of an image"):
        vx.WeightedSampler(3)
    with pytest.raises(SubjectError, match="2 channels"):
        vx.WeightedSampler(subject_of(two=vx.ScalarImage(torch.ones(2, 7, 6, 5))), 3, "two")
    with pytest.raises(SamplingError, match="names class 5, but the map 'two' has only 2 channels"):
        vx.LabelSampler(subject_of(two=vx.LabelMap(torch.ones(2, 7, 6, 5))), 3, "two", {5: 1})
    with pytest.raises(SpaceError, match="Inconsistent"):
        vx.LabelSampler(subject_of(seg=vx.LabelMap(torch.ones(1, 7, 6, 4))), 3)
    with pytest.raises(ModeError, match="border is 'x'"):
        vx.LabelSampler(subject, 3, border="x")
    with pytest.raises(ModeError, match="on_empty is 'x'"):
        vx.LabelSampler(subject, 3, on_empty="x")
    with pytest.raises(SizeError, match="patch size is missing"):
        vx.UniformSampler(subject)
    with pytest.raises(SubjectError, match="one argument too many"):
        vx.UniformSampler(3, 4, 5)
    with pytest.raises(SubjectError, match="has no subject"):
        next(iter(vx.UniformSampler(3)))
    with pytest.raises(SizeError, match="one patch size"):
        vx.MixedSampler([(1, vx.UniformSampler(3)), (1, vx.UniformSampler(4))])
    for nonsense in (None, [], [3], [(1, 2)]):
        with pytest.raises(SubjectError, match="list of pairs"):
            vx.MixedSampler(subject, nonsense)
    with pytest.raises(SubjectError, match="leave out shuffle"):
        vx.SubjectsLoader(vx.UniformSampler(subject, 3, num_patches=3), shuffle=True)
    with pytest.raises(SubjectError, match="can be resumed"):
        vx.SubjectsLoader(vx.GridSampler(subject, 3)).state_dict()


class Asking(torch.utils.data.IterableDataset):
    """Asks a sampler in a worker how far it is, as other loaders do."""

    def __init__(self, sampler):
        self.sampler = sampler

    def __iter__(self):
        for _ in self.sampler:
            yield self.sampler.state_dict()["draw"]


def test_how_far_a_sampler_is_cannot_be_said_in_one_of_several_workers():
    sampler = vx.UniformSampler(vx.Subject(t1=vx.ScalarImage(torch.rand(1, 8, 8, 8))), 4, num_patches=4)
    assert [int(draw) for draw in torch.utils.data.DataLoader(Asking(sampler), num_workers=1)] == [1, 2, 3, 4]
    with pytest.raises(SamplingError, match="one of 2 workers.*take the state of a SubjectsLoader"):
        next(iter(torch.utils.data.DataLoader(Asking(sampler), num_workers=2)))


def test_labels_that_the_type_cannot_hold_are_nowhere():
    labels = torch.zeros(1, 7, 6, 5, dtype=torch.uint8)
    labels[0, 1, 1, 1], labels[0, 2, 2, 2], labels[0, 3, 3, 3] = 1, 44, 255
    subject = subject_of(seg=vx.LabelMap(labels))
    for absent in (-1, 300, 2**40):
        assert set(locations(vx.LabelSampler(subject, 1, "seg", {absent: 1, 1: 1}, num_patches=30))) == {(1, 1, 1)}
    everything = {(1, 1, 1), (2, 2, 2), (3, 3, 3)}
    assert set(locations(vx.LabelSampler(subject, 1, ignore_label=-1, num_patches=60))) == everything
    floats = subject_of(seg=vx.LabelMap(labels.float().where(labels != 44, torch.tensor(2.0**24))))
    with pytest.raises(SamplingError, match="does not have"):
        vx.LabelSampler(floats, 1, "seg", {2**24 + 1: 1})


def test_an_ignored_channel_is_no_foreground():
    channels = torch.zeros(3, 7, 6, 5, dtype=torch.uint8)
    channels[1, 2, 2, 1], channels[2] = 1, 1
    subject = subject_of(seg=vx.LabelMap(channels))
    assert set(locations(vx.LabelSampler(subject, 1, ignore_label=2, num_patches=20))) == {(2, 2, 1)}


def test_a_loader_knows_where_its_sampler_has_been():
    def make():
        return vx.UniformSampler(subject_of(), 3, num_patches=8, seed=5)

    used = make()
    expected = [locations(used) for _ in range(3)]
    resumed = make()
    resumed.load_state_dict({"seed": 5, "epoch": 1, "draw": 4})
    loader = vx.SubjectsLoader(resumed, batch_size=2)
    assert loader.state_dict() == {"seed": 5, "epoch": 1, "draw": 4}
    first = next(iter(loader))
    assert [location.index for location in first.patch_location] == expected[1][4:6]
    again = vx.SubjectsLoader(make(), batch_size=1)  # of another size
    again.load_state_dict(loader.state_dict())
    assert [batch.patch_location[0].index for batch in again] == expected[1][6:]


@pytest.mark.parametrize("make", [DataLoader, vx.SubjectsLoader])
def test_workers_that_stay_follow_a_state_that_is_loaded(make):
    expected = [locations(sampler) for sampler in [vx.UniformSampler(subject_of(), 3, num_patches=8, seed=9)] for _ in range(2)]
    sampler = vx.UniformSampler(subject_of(), 3, num_patches=8, seed=5)
    loader = make(sampler, batch_size=2, num_workers=2, persistent_workers=True)
    list(loader)
    (loader if make is vx.SubjectsLoader else sampler).load_state_dict({"seed": 9, "epoch": 1, "draw": 4})
    assert sorted(location.index for batch in loader for location in batch.patch_location) == sorted(expected[1][4:])


def test_epochs_differ_also_where_the_seed_of_torch_is_set_before_each():
    loader = DataLoader(vx.UniformSampler(subject_of(), 3, num_patches=8, seed=5), batch_size=2, num_workers=2)
    epochs = []
    for _ in range(2):
        torch.manual_seed(0)
        epochs.append(sorted(location.index for batch in loader for location in batch.patch_location))
    alone = vx.UniformSampler(subject_of(), 3, num_patches=8, seed=5)
    assert epochs == [sorted(locations(alone)), sorted(locations(alone))]


def test_none_may_be_given_by_position():
    labels = torch.zeros(1, 7, 6, 5, dtype=torch.uint8)
    labels[0, 1, 1, 1] = 1
    subject = subject_of(seg=vx.LabelMap(labels))
    assert next(vx.LabelSampler(1, None, {1: 1})(subject)).patch_location.index == (1, 1, 1)
    assert len(list(vx.LabelSampler(1, "seg", None, 2)(subject))) == 2


def test_a_change_that_pytorch_does_not_notice_is_an_error_and_no_wrong_draw():
    labels = torch.zeros(1, 7, 6, 5, dtype=torch.uint8)
    labels[0, 1, 1, 1] = 1
    subject = subject_of(seg=vx.LabelMap(labels))
    sampler = vx.LabelSampler(subject, 1)
    labels.numpy()[:] = 0
    with pytest.raises(SamplingError, match="has been changed since it was gone through"):
        next(iter(sampler))


@pytest.mark.parametrize("label", [[1], "a", 1.5, True])
def test_ignored_labels_that_are_none(label):
    with pytest.raises(SizeError, match="ignore_label"):
        vx.LabelSampler(3, ignore_label=label)


def test_a_seed_within_a_mixture_would_not_be_used():
    with pytest.raises(SamplingError, match="seed 3, which would not be used"):
        vx.MixedSampler([(1, vx.UniformSampler(9)), (1, vx.UniformSampler(9, seed=3))])


def test_mixtures_of_mixtures_are_padded_alike():
    inner = vx.MixedSampler([(1, vx.UniformSampler(9))])
    assert len(list(vx.MixedSampler(subject_of(), [(1, inner)], padding_mode=0, num_patches=2))) == 2


# What is not modified, and what is refused


def test_patches_have_metadata_of_their_own():
    image = vx.ScalarImage(torch.rand(1, 8, 8, 8), site=["north"])
    subject = vx.Subject(t1=image, box=np.array([1.0, 2, 3]), info={"age": 4})
    batch = next(iter(vx.SubjectsLoader(vx.UniformSampler(subject, 4, 3, seed=0), batch_size=3)))
    every = [
        *vx.UniformSampler(subject, 4, 3, seed=0),
        *vx.GridSampler(subject, 4),
        *vx.SubjectsBatch.from_subjects([subject, subject]).unbatch(),
        batch[0],
        *batch.unbatch(),
    ]
    for patch in every:
        assert (patch["box"].tolist(), patch["info"], patch["t1"]["site"]) == ([1, 2, 3], {"age": 4}, ["north"])
        patch["box"] *= 2
        patch["info"]["age"] += 1
        patch["t1"]["site"].append("south")
    assert (subject["box"].tolist(), subject["info"], image["site"]) == ([1, 2, 3], {"age": 4}, ["north"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("channels", [1, 3])
def test_labels_that_are_no_numbers_are_refused(value, channels):
    labels = torch.zeros(channels, 8, 8, 8)
    labels[-1, 4, 4, 4], labels[0, 2, 2, 2] = 1, value
    for probabilities in (None, {0: 1, 1: 1}):
        with pytest.raises(SamplingError, match="the label map 'seg' holds .*, which is no whole number"):
            next(vx.LabelSampler(3, "seg", probabilities)(vx.Subject(seg=vx.LabelMap(labels))))


@pytest.mark.parametrize("given", [{0: 1e308, 1: 1e308}, {0: 5e-324, 1: 5e-324}])
def test_probabilities_that_cannot_be_added_are_refused(given):
    with pytest.raises(SamplingError, match="0 or at least 1e-300, and have a finite sum"):
        vx.LabelSampler(3, "seg", given)


@pytest.mark.parametrize("state", [(0, -3), (-5, 0)])
def test_states_that_cannot_be_are_refused(state):
    sampler = vx.UniformSampler(vx.Subject(t1=vx.ScalarImage(torch.rand(1, 8, 8, 8))), 3, 3, seed=0)
    with pytest.raises(SubjectError, match="at least 0"):
        sampler.load_state_dict({"seed": 0, "epoch": state[0], "draw": state[1]})


def test_a_map_whose_sum_no_number_can_hold_is_refused():
    subject = vx.Subject(map=vx.ScalarImage(torch.full((1, 5, 4, 6), 1e307, dtype=torch.float64)))
    with pytest.raises(SamplingError, match="the values of the map 'map' sum to more than a number can hold"):
        next(vx.WeightedSampler(1, "map")(subject, 1))
