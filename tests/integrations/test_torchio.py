"""TorchIO's objects and transforms, of whichever generation is installed: `make test-torchio2` has the second."""

import copy
import importlib
import pickle

import numpy as np
import pytest
import torch
import torchio as tio

import voxloom as vx
from voxloom.integrations.torchio import HISTORY, as_torchio, from_torchio

IS_FIRST = issubclass(tio.Image, dict)
OBLIQUE = np.array([[1.2, 0.3, 0, -40], [-0.3, 1.1, 0.2, 12], [0, -0.2, 2.5, 7], [0, 0, 0, 1]])


def theirs(image_class, data, affine=OBLIQUE, **more):
    return image_class(tensor=data, affine=affine, **more) if IS_FIRST else image_class(data, affine=affine, **more)


def their_matrix(image):
    return np.asarray(image.affine if IS_FIRST else image.affine.data.numpy())


def subject_of(number, shape=(20, 24, 16)):
    rng = np.random.default_rng(number)
    data = torch.from_numpy(rng.normal(size=(1, *shape)).astype(np.float32))
    labels = (data > 0.5).to(torch.uint8)
    return tio.Subject(
        t1=theirs(tio.ScalarImage, data, protocol="MPRAGE"), seg=theirs(tio.LabelMap, labels), age=number, name=f"case {number}"
    )


def augmentation():
    if IS_FIRST:
        return tio.Compose(
            [
                tio.ToCanonical(),
                tio.RandomAffine(p=0.9),
                tio.OneOf([tio.RandomNoise(), tio.RandomFlip(axes=(0, 1, 2))]),
                tio.ZNormalization(),
            ]
        )
    return tio.Compose(
        [tio.Affine(degrees=(-10, 10)), tio.OneOf([tio.Noise(std=(0.1, 0.2)), tio.Flip(axes=(0, 1))]), tio.Standardize()]
    )


# Objects


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16, torch.uint8, torch.float64])
@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("image_class", [vx.ScalarImage, vx.LabelMap])
def test_an_image_goes_there_and_back_without_loss_or_copy(image_class, channels, dtype):
    data = torch.from_numpy(np.random.default_rng(0).integers(0, 99, (channels, 5, 6, 7))).to(dtype)
    image = image_class(data, affine=OBLIQUE, protocol="MPRAGE")
    there = as_torchio(image)
    assert isinstance(there, tio.ScalarImage if image_class is vx.ScalarImage else tio.LabelMap)
    assert np.array_equal(their_matrix(there), OBLIQUE)
    back = from_torchio(there)
    assert type(back) is image_class
    assert back.data.data_ptr() == there.data.data_ptr() == data.data_ptr()
    assert back.dtype == dtype
    assert np.array_equal(back.affine, OBLIQUE)
    assert back["protocol"] == "MPRAGE"


def test_maps_for_sampling_keep_their_type():
    back = from_torchio(as_torchio(vx.Image(torch.rand(1, 4, 4, 4), type="sampling_map")))
    assert back.type == ("sampling_map" if IS_FIRST else "intensity")  # the second generation has no such type


@pytest.mark.slow
def test_a_real_subject_goes_there_and_back(mni_subject):
    back = from_torchio(as_torchio(mni_subject))
    assert list(back) == list(mni_subject)
    for name, image in mni_subject.images.items():
        assert torch.equal(back[name].data, image.data)
        assert back[name].dtype == image.dtype
        assert np.array_equal(back[name].affine, image.affine)
        assert type(back[name]) is type(image)


@pytest.fixture(scope="module")
def mni_subject():
    from nilearn.datasets import load_mni152_brain_mask, load_mni152_template

    return vx.Subject(t1=vx.ScalarImage(load_mni152_template(2)), mask=vx.LabelMap(load_mni152_brain_mask(2)), site="Montreal")


def test_files_are_read_when_they_are_needed(tmp_path):
    path = tmp_path / "scan.nii.gz"
    data = torch.arange(5 * 6 * 7, dtype=torch.int16).view(1, 5, 6, 7)
    vx.ScalarImage(data, affine=OBLIQUE).save(path)
    mine = vx.ScalarImage(path)
    there = as_torchio(mine)
    ours = from_torchio(tio.ScalarImage(path))
    moved = path.with_name("moved.nii.gz")
    path.rename(moved)
    for read in (lambda: there.data, lambda: ours.data):
        with pytest.raises((OSError, vx.errors.VoxloomError, RuntimeError)):
            read()
    moved.rename(path)
    assert torch.equal(there.data, data)
    assert not mine.is_loaded  # it is not kept twice
    assert torch.equal(ours.data, data)
    assert np.allclose(ours.affine, OBLIQUE, atol=1e-5)
    assert ours.path == path


def test_readers_of_the_users_own_are_used(tmp_path):
    path = tmp_path / "scan.npy"
    np.save(path, np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4))
    image = from_torchio(tio.ScalarImage(path, reader=read_npy))
    assert image.data.sum() == sum(range(24))
    assert np.array_equal(image.affine, OBLIQUE)


@pytest.mark.skipif(not IS_FIRST, reason="TorchIO 2 takes four axes from a reader")
@pytest.mark.parametrize("shape", [(5, 6, 3), (3, 5, 6), (5, 6, 7), (5, 6)])
def test_axes_of_what_a_reader_gives_are_as_torchio_takes_them(tmp_path, shape):
    path = tmp_path / "scan.npy"
    np.save(path, np.random.default_rng(0).random(shape))
    image = tio.ScalarImage(path, reader=read_npy)
    ours = from_torchio(image)
    assert torch.equal(ours.data, image.data)


def read_npy(path):
    return torch.from_numpy(np.load(path)), OBLIQUE


def test_wherever_a_subject_goes_theirs_does():
    subject = subject_of(1)
    assert vx.as_image(subject.t1).spatial_shape == (20, 24, 16)
    grid = vx.GridSampler(subject, 8, 4)
    ours = vx.GridSampler(from_torchio(subject), 8, 4)
    assert all(torch.equal(one.t1.data, other.t1.data) for one, other in zip(grid, ours, strict=True))
    drawn = next(iter(vx.UniformSampler(8)(subject)))
    assert torch.equal(drawn.t1.data, subject.t1.data[(slice(None), *drawn.patch_location.box.slices)])
    assert next(iter(vx.LabelSampler(8)(subject))).seg.data.any()
    made = vx.predict(torch.nn.Identity(), subject, 8, 0.5, "average", image_name="t1")
    assert torch.allclose(made.data, subject.t1.data, atol=1e-6)
    assert np.array_equal(made.affine, OBLIQUE)
    assert vx.SubjectsDataset([subject])[0].age == 1
    assert torch.equal(vx.SubjectsBatch.from_subjects([subject, subject]).t1.data[1], subject.t1.data)
    alone = vx.predict(torch.nn.Identity(), subject.t1, 8, 0.5, "crop")
    assert torch.equal(alone.data, subject.t1.data)
    assert np.array_equal(alone.affine, OBLIQUE)


def test_images_of_theirs_say_where_results_go_and_what_is_computed():
    subject = subject_of(1)
    other = theirs(tio.ScalarImage, torch.zeros(1, 10, 12, 8), affine=OBLIQUE @ np.diag([2.0, 2, 2, 1]))
    made = vx.predict(torch.nn.Identity(), subject, 8, 0.5, "average", image_name="t1", like=other)
    expected = vx.predict(torch.nn.Identity(), subject, 8, 0.5, "average", image_name="t1", like=from_torchio(other))
    assert torch.equal(made.data, expected.data)
    assert made.spatial_shape == (10, 12, 8)
    marked = torch.zeros(1, 20, 24, 16, dtype=torch.uint8)
    marked[0, :4, :4, :4] = 1
    masked = vx.predict(torch.nn.Identity(), subject.t1, 8, 0, "crop", mask=theirs(tio.LabelMap, marked))
    assert torch.equal(masked.data[:, :8, :8, :8], subject.t1.data[:, :8, :8, :8])
    assert not masked.data[:, 8:].any()


# Transforms


def test_a_transform_does_what_it_does_there():
    for number in range(4):
        torch.manual_seed(number)
        expected = augmentation()(subject_of(number))
        torch.manual_seed(number)
        made = vx.Compose([augmentation()])(from_torchio(subject_of(number)))
        assert torch.equal(made.t1.data, expected.t1.data)
        assert torch.equal(made.seg.data, expected.seg.data.to(torch.uint8))
        assert made.seg.dtype == torch.uint8
        assert np.array_equal(made.t1.affine, their_matrix(expected.t1))
        assert made.t1["protocol"] == "MPRAGE"
        assert (made.age, made["name"]) == (number, f"case {number}")
        assert len(made[HISTORY]) == len(expected.applied_transforms) > 0


def test_transforms_of_a_list_do_what_they_do_there_one_after_the_other():
    torch.manual_seed(3)
    expected = augmentation()(augmentation()(subject_of(0)))
    torch.manual_seed(3)
    made = vx.Compose([augmentation(), augmentation()])(from_torchio(subject_of(0)))
    assert torch.equal(made.t1.data, expected.t1.data)
    assert torch.equal(made.seg.data, expected.seg.data.to(torch.uint8))
    assert made.t1["protocol"] == "MPRAGE"
    assert len(made[HISTORY]) == len(expected.applied_transforms) > 0


def test_what_a_transform_does_can_be_undone():
    before = from_torchio(subject_of(0))
    flip = tio.RandomFlip(axes=(0, 1, 2), flip_probability=1) if IS_FIRST else tio.Flip(axes=(0, 1, 2))
    after = vx.Compose([flip])(copy.deepcopy(before))
    assert not torch.equal(after.t1.data, before.t1.data)
    undone = from_torchio(as_torchio(after).apply_inverse_transform())
    assert torch.equal(undone.t1.data, before.t1.data)


def test_images_may_be_added_and_removed():
    if IS_FIRST:
        transform = tio.Compose([tio.RandomNoise(keep={"t1": "clean"})])
        made = vx.Compose([transform])(from_torchio(subject_of(0)))
        assert torch.equal(made.clean.data, subject_of(0).t1.data)
        assert not torch.equal(made.t1.data, made.clean.data)

    def without(subject):
        subject.remove_image("seg")
        return subject

    assert list(vx.Compose([without, augmentation()])(from_torchio(subject_of(0))).images) == ["t1"]


@pytest.mark.skipif(not IS_FIRST, reason="the Lambda of the second generation keeps the type itself")
def test_labels_that_do_not_fit_their_type_keep_that_of_the_transform():
    transform = tio.Lambda(lambda image: image.float() + 0.5)
    made = vx.Compose([transform])(from_torchio(subject_of(0)))
    assert made.seg.dtype == torch.float32
    assert set(made.seg.data.unique().tolist()) == {0.5, 1.5}


def dataset(subjects):
    if IS_FIRST:
        return tio.SubjectsDataset(subjects, transform=augmentation())
    return vx.SubjectsDataset(subjects, transform=augmentation())


@pytest.mark.parametrize("sampler", [vx.LabelSampler(8), vx.GridSampler(8)], ids=["labels", "grid"])
def test_batches_are_the_same_for_every_number_of_workers(sampler):
    runs = []
    for workers in (0, 1, 2):
        queue = vx.Queue(dataset([subject_of(n) for n in range(3)]), 8, 4, sampler, seed=3, num_workers=workers)
        runs.append([(batch.t1.data, batch.seg.data, batch["age"]) for batch in vx.SubjectsLoader(queue, batch_size=4)])
        queue.close()
    assert all(batch[1].dtype == torch.uint8 for batch in runs[0])
    assert len({float(batch[0].sum()) for batch in runs[0]}) == len(runs[0]) > 2
    for other in runs[1:]:
        for one, same in zip(runs[0], other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))


def test_patches_are_transformed_too():
    queue = vx.Queue([subject_of(0)], 8, 4, vx.UniformSampler(8), seed=3, patch_transform=[augmentation(), lambda patch: patch])
    patches = list(queue)
    assert len(patches) == 4
    for patch in patches:
        assert patch.patch_location.size == (8, 8, 8)
        assert len(patch[HISTORY]) >= 2
        assert abs(float(patch.t1.data.mean())) < 1e-5  # normalised after all else
    assert len({float(patch.t1.data.sum()) for patch in patches}) == 4


@pytest.mark.skipif(not IS_FIRST, reason="the second generation has no SubjectsDataset")
def test_their_data_set_is_not_opened_where_a_class_of_the_users_own_does_more():
    class Doubled(tio.SubjectsDataset):
        def __getitem__(self, index):
            subject = super().__getitem__(index)
            subject.t1.set_data(2 * subject.t1.data)
            return subject

    queue = vx.Queue(Doubled([subject_of(0)]), 8, 1, vx.GridSampler(16), seed=0)
    sampler = vx.GridSampler(subject_of(0), 16)
    batch = next(iter(vx.SubjectsLoader(queue, batch_size=len(sampler))))
    locations = {location.index: number for number, location in enumerate(batch.patch_location)}
    assert len(locations) == len(sampler) == 4
    for patch in sampler:
        assert torch.equal(batch.t1.data[locations[patch.patch_location.index]], 2 * patch.t1.data)


@pytest.mark.skipif(IS_FIRST, reason="the first generation transforms no batches")
def test_a_batch_is_transformed_as_a_whole():
    from voxloom.volumes.transforms import as_batch_transform

    batch = vx.SubjectsBatch.from_subjects([subject_of(0), subject_of(1)])
    before = batch.t1.data.clone()
    made = as_batch_transform(tio.Flip(axes=(0,)), "batch_transform")(batch)
    assert torch.equal(made.t1.data, before.flip(2))
    made = as_batch_transform([tio.Flip(axes=(0,)), tio.Flip(axes=(1,))], "batch_transform")(made)
    assert torch.equal(made.t1.data, before.flip(3))
    assert [len(history) for history in made[HISTORY]] == [3, 3]
    assert made.seg.data.dtype == torch.uint8


def test_what_travels_to_workers_can_be_pickled():
    transform = vx.Compose([augmentation()])
    torch.manual_seed(0)
    one = transform(from_torchio(subject_of(0)))
    torch.manual_seed(0)
    other = pickle.loads(pickle.dumps(transform))(from_torchio(subject_of(0)))
    assert torch.equal(one.t1.data, other.t1.data)


def test_a_class_is_no_transform():
    noise = tio.RandomNoise if IS_FIRST else tio.Noise
    with pytest.raises(vx.errors.SubjectError, match=rf"is the class {noise.__name__}: make a transform of it"):
        vx.Compose([noise])


def test_what_is_missing_is_said_with_the_command(monkeypatch):
    def missing(name, package=None):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(vx.errors.MissingDependencyError, match=r"pip install 'voxloom\[torchio\]'"):
        as_torchio(vx.ScalarImage(torch.zeros(1, 2, 2, 2)))
