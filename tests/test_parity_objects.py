"""Parity with TorchIO 1.2.1 in what objects do: slices, lengths, types of errors and methods that are overridden."""

import gc
import warnings
import weakref

import pytest
import torch

import voxloom as vx
from voxloom.errors import SamplingError, VoxloomError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torchio as tio

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

DATA = torch.arange(2 * 20 * 30 * 40, dtype=torch.float32).reshape(2, 20, 30, 40)


def both(**labels):
    ours = {name: vx.LabelMap(tensor) for name, tensor in labels.items()}
    theirs = {name: tio.LabelMap(tensor=tensor) for name, tensor in labels.items()}
    return vx.Subject(t1=vx.ScalarImage(DATA), **ours), tio.Subject(t1=tio.ScalarImage(tensor=DATA), **theirs)


# Slices


@pytest.mark.parametrize(
    "key",
    [
        slice(0, 5),
        slice(5, 15),
        slice(-5, None),
        3,
        (slice(2, 8), slice(4, 9)),
        (slice(2, 8), slice(None), slice(30, 40)),
        (4, slice(0, 3), slice(35, None)),
    ],
)
def test_a_subject_is_sliced_along_its_voxels(key):
    one, other = both(seg=(DATA[:1] > 100).float())
    mine, theirs = one[key], other[key]
    assert mine.spatial_shape == theirs.spatial_shape
    for name in ("t1", "seg"):
        assert torch.equal(mine[name].data, theirs[name].data)
        assert torch.equal(torch.as_tensor(mine[name].affine), torch.as_tensor(theirs[name].affine))


def test_what_only_the_second_generation_can_slice():
    subject, _ = both()
    assert subject[..., 10:20].spatial_shape == (20, 30, 10)
    assert subject[::2, -1].spatial_shape == (10, 1, 40)
    assert subject[5:15].t1.shape == (2, 10, 30, 40)
    assert subject.t1[1:, 5:15].shape == (1, 10, 30, 40)  # an image counts its channels


@pytest.mark.parametrize("key", [(slice(None),) * 4, slice(25, 30), 20, "1", None, 1.5])
def test_slices_that_cannot_be(key):
    subject, _ = both()
    with pytest.raises((VoxloomError, IndexError)):
        subject[key]


# Batches, as in the second generation


def make_batch():
    subjects = [vx.Subject(t1=vx.ScalarImage(DATA + number), age=number) for number in range(3)]
    return vx.SubjectsBatch.from_subjects(subjects)


def test_lengths_and_items_of_batches():
    batch = make_batch()
    assert len(batch) == len(batch.t1) == 3
    assert torch.equal(batch.t1[1].data, DATA + 1)
    assert torch.equal(batch.t1[-1].data, DATA + 2)
    assert [type(image) for image in batch.t1] == [vx.ScalarImage] * 3
    batch.t1[0].data.zero_()
    assert torch.equal(batch.t1.data[0], DATA)  # an image owns its memory
    assert list(batch) == ["age", "t1"]
    assert dict(batch.t1.items()).keys() == {"data", "affine", "path", "stem", "type"}
    with pytest.raises(IndexError):
        batch.t1[3]


def test_a_batch_says_what_to_use():
    with pytest.raises(KeyError, match=r"batch\.unbatch\(\) gives the subjects"):
        make_batch()[0:2]
    assert torch.equal(make_batch()[1].t1.data, DATA + 1)
    with pytest.raises(VoxloomError, match="give a name, or the number of an image"):
        make_batch().t1[1:2]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (torch.zeros(2, 2, 20, 30, 40), r"\(3, C, I, J, K\)"),
        (torch.zeros(3, 20, 30, 40), r"\(3, C, I, J, K\)"),
        (DATA.numpy(), r"\(3, C, I, J, K\)"),
        (torch.zeros(3, 2, 20, 30, 39), "affines would be wrong"),
    ],
)
def test_data_of_another_shape(value, reason):
    batch = make_batch()
    with pytest.raises(VoxloomError, match=reason):
        batch.t1.data = value
    assert batch.t1.data.shape == (3, 2, 20, 30, 40)
    batch.t1.data = torch.ones(3, 5, 20, 30, 40)  # another number of channels is none of the affines' business
    assert batch.t1[0].shape == (5, 20, 30, 40)


# Errors


def raised(call):
    with pytest.raises(Exception) as caught:  # noqa: PT011 - which, is what is compared
        call()
    return caught.value


@pytest.mark.parametrize(
    "call",
    [
        lambda lib, subject: next(iter(lib.LabelSampler(patch_size=4)(subject))),
        lambda lib, subject: next(iter(lib.UniformSampler(64)(subject))),
        lambda lib, subject: next(iter(lib.WeightedSampler(4, "absent")(subject))),
        lambda lib, subject: subject.t1.unload(),
        lambda lib, subject: lib.GridSampler(subject, 64),
        lambda lib, subject: lib.ScalarImage("absent.nii").load(),
        lambda lib, subject: subject["absent"],
        lambda lib, subject: subject.absent,
        lambda lib, subject: lib.Subject(),
    ],
    ids=["no label map", "large patch", "no map", "unload", "large grid", "no file", "no entry", "no attribute", "empty"],
)
def test_errors_are_of_torchios_types_too(call):
    one, other = both()
    theirs, ours = raised(lambda: call(tio, other)), raised(lambda: call(vx, one))
    assert isinstance(ours, type(theirs)), (type(ours), theirs)


# Overridden methods


@pytest.mark.parametrize("base", ["WeightedSampler", "LabelSampler"])
def test_a_sampler_with_a_map_of_its_own(base):
    """As TorchIO's documentation shows it: the map says where centres are, whatever the named image holds."""

    def make(lib):
        class Bright(getattr(lib, base)):
            def get_probability_map(self, subject):
                return (subject["t1"].data[:1] > 12_000).float()

        return Bright(4, "seg")

    def centres(lib, subject):
        return {tuple(int(first) + 2 for first in patch["location"][:3]) for patch in make(lib)(subject, 300)}

    one, other = both(seg=torch.ones(1, 20, 30, 40))
    for found in (centres(vx, one), centres(tio, other)):
        assert len(found) > 50
        assert all(DATA[0][centre] > 12_000 for centre in found)


def test_a_map_of_ones_own_is_made_once_and_checked():
    made = []

    class Own(vx.WeightedSampler):
        def get_probability_map(self, subject):
            made.append(subject)
            return self.given

    subject, _ = both()
    sampler = Own(4, "absent")
    sampler.given = torch.ones(1, 20, 30, 40)
    assert len(list(sampler(subject, 5))) == 5
    assert len(made) == 1
    for given, reason in [
        (torch.ones(1, 20, 30), r"it must be a tensor \(1, 20, 30, 40\)"),
        (None, "returned a NoneType"),
        (-torch.ones(1, 20, 30, 40), "negative"),
        (torch.zeros(1, 20, 30, 40), "Own.get_probability_map is 0"),
    ]:
        another = Own(4, "absent")
        another.given = given
        with pytest.raises(SamplingError, match=reason):
            next(iter(another(subject, 5)))


@pytest.mark.parametrize("base", ["WeightedSampler", "LabelSampler"])
def test_a_sampler_with_an_image_of_its_own_for_a_map(base):
    made = []

    def make(lib):
        class Bright(getattr(lib, base)):
            def get_probability_map_image(self, subject):
                made.append(lib)
                return lib.LabelMap(tensor=(subject["t1"].data[:1] > 12_000).float())

        return Bright(4, "absent")

    one, other = both()
    for lib, subject in ((vx, one), (tio, other)):
        places = {tuple(int(first) + 2 for first in patch["location"][:3]) for patch in make(lib)(subject, 300)}
        assert len(places) > 50
        assert all(DATA[0][place] > 12_000 for place in places)
    assert made.count(vx) == 1
    assert make(vx).get_probability_map(one).sum().item() == pytest.approx(1)


def test_methods_of_samplers_take_torchios_subjects_too():
    one, other = both(seg=(DATA[:1] > 12_000).int())
    sampler = vx.LabelSampler(4, "seg")
    assert torch.equal(sampler.get_probability_map(other), sampler.get_probability_map(one))
    assert torch.equal(sampler.get_probability_map_image(other).data, sampler.get_probability_map_image(one).data)
    assert sampler.prepare(other)
    patches = [vx.UniformSampler(4).extract_patch(each, (1, 2, 3)) for each in (one, other)]
    assert torch.equal(patches[0].t1.data, patches[1].t1.data)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["get_probability_map_image", "get_probability_map"])
def test_maps_of_subjects_that_share_an_image(method):
    def give(self, subject):
        return subject["where"] if method.endswith("image") else subject["where"].data

    sampler = type("Own", (vx.WeightedSampler,), {method: give})(2, "absent")
    shared = vx.ScalarImage(torch.zeros(1, 8, 8, 8))
    for place in (3, 5, 3):
        weights = torch.zeros(1, 8, 8, 8)
        weights[0, place, place, place] = 1
        subject = vx.Subject(t1=shared, where=vx.ScalarImage(weights))
        assert next(iter(sampler(subject, 1))).patch_location.index == (place - 1,) * 3
        subject["where"] = vx.ScalarImage(weights.flip(1))
        assert next(iter(sampler(subject, 1))).patch_location.index == (6 - place, place - 1, place - 1)
        given = weakref.ref(subject["where"])
        subject["where"] = vx.ScalarImage(weights)
        next(iter(sampler(subject, 1)))
        gc.collect()
        assert given() is None  # no map is kept that has been replaced


@pytest.mark.parametrize(
    ("given", "reason"), [(torch.ones(1, 2, 2, 2), "a Tensor"), (vx.LabelMap(torch.ones(1, 4, 4, 4)), r"an image of \(4, 4, 4\)")]
)
def test_an_image_of_ones_own_for_a_map_is_checked(given, reason):
    class Own(vx.LabelSampler):
        def get_probability_map_image(self, subject):
            return given

    with pytest.raises(SamplingError, match=f"Own.get_probability_map_image returned {reason}.*must be an image of"):
        next(iter(Own(4)(both()[0], 5)))


def test_the_map_that_a_sampler_gives_is_what_it_draws_by():
    labels = torch.zeros(1, 20, 30, 40)
    labels[0, 5:8], labels[0, 15] = 1, 3
    subject, _ = both(seg=labels)
    sampler = vx.LabelSampler(4, "seg", {1: 1, 3: 3})
    given = sampler.get_probability_map(subject)
    assert given.shape == (1, 20, 30, 40)
    assert given.sum().item() == pytest.approx(1)
    assert given[0, 15].sum().item() == pytest.approx(0.75)
    weights = vx.Subject(t1=vx.ScalarImage(DATA), where=vx.ScalarImage(labels))
    made = vx.WeightedSampler(4, "where", border="clamp").get_probability_map(weights)
    assert torch.allclose(made, labels.double() / labels.double().sum())
    # Of voxels near the border there are no patches, unless these are moved.
    assert given[0, :, 1].sum() == given[0, :, :, -1].sum() == 0
    centres = [tuple(at + 2 for at in patch.patch_location.index) for patch in sampler(subject, 200)]
    assert all(given[0][centre] > 0 for centre in centres)


# Gradients


def test_that_gradients_are_dropped_is_said():
    model = torch.nn.Conv3d(2, 1, 1)
    sampler = vx.GridSampler(both()[0], 20)
    aggregator = vx.GridAggregator(sampler)
    first, *others = vx.SubjectsLoader(sampler, batch_size=2)
    with pytest.warns(RuntimeWarning, match="inference_mode"):
        aggregator.add_batch(model(first.t1.data), first[vx.LOCATION])
    with warnings.catch_warnings(action="error"):  # once is enough
        for batch in others:
            aggregator.add_batch(model(batch.t1.data), batch[vx.LOCATION])
    quiet = vx.GridAggregator(sampler)
    with warnings.catch_warnings(action="error"), torch.no_grad():
        for batch in vx.SubjectsLoader(sampler, batch_size=2):
            quiet.add_batch(model(batch.t1.data), batch[vx.LOCATION])
    assert torch.equal(aggregator.get_output_tensor(), quiet.get_output_tensor())


def test_extract_patch_is_honoured():
    class Marked(vx.UniformSampler):
        def extract_patch(self, subject, index_ini):
            patch = super().extract_patch(subject, index_ini)
            patch["corner"] = tuple(index_ini)
            patch.t1.data.mul_(-1)
            return patch

    class Theirs(tio.UniformSampler):
        def extract_patch(self, subject, index_ini):
            patch = super().extract_patch(subject, index_ini)
            patch["corner"] = tuple(index_ini)
            return patch

    one, other = both()
    (theirs,) = Theirs(4)(other, 1)
    assert theirs["corner"] == tuple(theirs["location"][:3].tolist())
    loader = vx.SubjectsLoader(Marked(one, 4, num_patches=3, seed=0), batch_size=1, num_workers=1)
    queue = vx.Queue([one], samples_per_volume=3, sampler=Marked(4, seed=0), num_workers=1)
    patches = [*Marked(4, seed=0)(one, 3), *Marked(one, 4, num_patches=3, seed=0), *queue]
    for patch in patches:
        location = patch.patch_location
        assert patch["corner"] == location.index
        assert patch.t1.data.equal(-one.t1.data[(slice(None), *location.to_slices())])
    for batch in loader:
        assert batch.t1.data[0].equal(-one.t1.data[(slice(None), *batch.metadata["patch_location"][0].to_slices())])
    assert one.t1.data.min() == 0


def test_extract_patch_must_give_a_subject():
    class Wrong(vx.UniformSampler):
        def extract_patch(self, subject, index_ini):
            return subject.t1.data

    with pytest.raises(SamplingError, match="extract_patch returned Tensor: it must return a Subject"):
        next(Wrong(4)(both()[0], 1))


@pytest.mark.parametrize("index", [20, -21])
def test_an_index_beyond_an_axis_is_an_index_error_of_ours(index):
    image = both()[0].t1
    for act in (lambda: image[:, index], lambda: vx.PatchGrid.cover((20, 30, 40), 10)[12345]):
        with pytest.raises(IndexError) as caught:
            act()
        assert isinstance(caught.value, VoxloomError)
