"""MONAI's dictionaries, data sets and transforms, with MONAI itself."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai import transforms as mt
from monai.data import CacheDataset, DataLoader, Dataset, MetaTensor, PersistentDataset, decollate_batch

import voxloom as vx
from voxloom.integrations.monai import Labelled, as_dict, from_dict

AFFINE = torch.tensor([[-1.2, 0.3, 0, 40], [0.3, 1.1, 0.2, 12], [0, -0.2, 2.5, 7], [0, 0, 0, 1]], dtype=torch.float64)


def item_of(number, channels=1):
    rng = np.random.default_rng(number)
    data = torch.from_numpy(rng.normal(size=(channels, 20, 24, 16)).astype(np.float32))
    return {
        "image": MetaTensor(data, affine=AFFINE, meta={"filename_or_obj": f"{number}.nii.gz"}),
        "label": MetaTensor((data[:1] > 0.5).to(torch.uint8), affine=AFFINE),
        "age": number,
    }


def random_transform():
    return mt.Compose(
        [
            mt.RandAffined(["image", "label"], prob=1, rotate_range=0.3, mode=("bilinear", "nearest"), padding_mode="zeros"),
            mt.RandFlipd(["image", "label"], prob=0.5, spatial_axis=0),
            mt.RandGaussianNoised("image", prob=1),
        ]
    )


# Objects


@pytest.mark.parametrize("channels", [1, 4])
def test_a_dictionary_goes_there_and_back_without_loss_or_copy(channels):
    item = item_of(0, channels)
    flip = mt.Flip(spatial_axis=1)
    item["image"] = flip(item["image"])
    subject = from_dict(item)
    assert (subject["image"].type, subject.label.type, subject.age) == ("intensity", "label", 0)
    back = as_dict(subject)
    assert list(back) == list(item)
    for name in ("image", "label"):
        assert type(back[name]) is MetaTensor
        assert back[name].data_ptr() == item[name].data_ptr()
        assert torch.equal(back[name].as_tensor(), item[name].as_tensor())
        assert torch.equal(back[name].affine, item[name].affine)
        assert back[name].dtype == item[name].dtype
    assert back["image"].meta["filename_or_obj"] == "0.nii.gz"
    assert len(back["image"].applied_operations) == 1
    undone = flip.inverse(back["image"])
    assert torch.equal(undone.as_tensor(), item_of(0, channels)["image"].as_tensor())


def test_names_or_the_user_say_what_labels_are():
    item = {name: torch.zeros(1, 4, 4, 4) for name in ("ct", "tumor_seg", "mask", "masked_ct", "truth")}
    assert {name for name, image in from_dict(item).images.items() if image.type == "label"} == {"tumor_seg", "mask"}
    chosen = from_dict(item, labels=["truth"])
    assert {name for name, image in chosen.images.items() if image.type == "label"} == {"truth"}
    with pytest.raises(vx.errors.SubjectError, match="no image 'teeth'"):
        from_dict(item, labels=["teeth"])


def test_volumes_without_channels_are_images_where_another_has_them():
    subject = from_dict({"image": torch.zeros(1, 4, 5, 6), "label": torch.zeros(4, 5, 6), "matrix": torch.zeros(3, 3, 3)})
    assert subject.label.shape == (1, 4, 5, 6)
    assert list(subject.metadata) == ["matrix"]
    assert from_dict({"image": torch.zeros(4, 5, 6), "seg2": torch.zeros(4, 5, 6)}).seg2.type == "label"


def test_subjects_of_the_users_own_are_left_as_they_are(tmp_path):
    vx.LabelMap(torch.zeros(1, 4, 5, 6)).save(tmp_path / "truth.nii")
    subject = vx.Subject(image=vx.ScalarImage(torch.zeros(1, 4, 5, 6)), truth=vx.ScalarImage(tmp_path / "truth.nii"))
    found = Labelled([subject], ["truth"])[0]
    assert found.truth.type == "label"
    assert not found.truth.is_loaded
    assert found.truth.path == tmp_path / "truth.nii"
    assert (subject.truth.type, subject.truth.is_loaded) == ("intensity", False)


def test_a_batch_becomes_a_dictionary_of_batched_tensors():
    subjects = [from_dict(item_of(number)) for number in range(3)]
    batch = as_dict(vx.SubjectsBatch.from_subjects(subjects))
    assert batch["image"].shape == (3, 1, 20, 24, 16)
    assert batch["image"].is_batch
    assert torch.equal(batch["image"].affine, AFFINE.expand(3, 4, 4))
    assert batch["age"].tolist() == [0, 1, 2]
    parts = decollate_batch(batch["image"])
    assert [torch.equal(part.as_tensor(), item_of(number)["image"].as_tensor()) for number, part in enumerate(parts)] == [
        True
    ] * 3
    assert torch.equal(parts[1].affine, AFFINE)


def test_a_batch_of_patches_is_decollated_as_it_is():
    subjects = vx.SubjectsDataset([from_dict(item_of(number)) for number in range(2)])
    queue = vx.Queue(subjects, max_length=8, samples_per_volume=4, sampler=vx.UniformSampler(8), seed=0)
    batch = next(iter(vx.SubjectsLoader(queue, batch_size=3)))
    parts = decollate_batch(as_dict(batch))
    assert len(parts) == 3
    for part, one in zip(parts, batch.unbatch(), strict=True):
        assert part.keys() == one.keys()
        assert torch.equal(part["image"].as_tensor(), one.image.data)
        assert torch.equal(part["image"].affine, torch.from_numpy(one.image.affine))
        assert part["patch_location"].tolist() == one.patch_location.tolist()


def test_what_subjects_say_of_themselves_is_parted_with_their_batch():
    own = [
        {"list": [number, 5], "dict": {"a": number, "b": str(number)}, "path": Path(f"/{number}"), "none": None}
        for number in range(3)
    ]
    subjects = [vx.Subject(image=vx.ScalarImage(torch.rand(1, 4, 4, 4)), **each) for each in own]
    parts = decollate_batch(as_dict(next(iter(vx.SubjectsLoader(subjects, batch_size=3)))))
    expected = [each | {"path": str(each["path"])} for each in own]
    assert [{name: part[name] for name in own[0]} for part in parts] == expected
    subjects[1]["list"] = [1, 2, 3]
    with pytest.warns(RuntimeWarning, match="'list' of the subjects of a batch cannot be collated as MONAI's loader does"):
        batch = as_dict(vx.SubjectsBatch.from_subjects(subjects))
    assert batch["list"] == [[0, 5], [1, 2, 3], [2, 5]]
    for values in ([{"a": 1}, {"a": 2, "b": 3}], [[1], [0.1234567890123]]):
        unlike = [vx.Subject(image=subjects[0].image, v=value) for value in values]
        with pytest.warns(RuntimeWarning, match="they are not all of one form"):
            assert as_dict(vx.SubjectsBatch.from_subjects(unlike))["v"] == values


@pytest.mark.filterwarnings("ignore:NvImgCodecPydicomReader")
def test_metadata_of_images_are_those_of_monais_loader(tmp_path):
    for number in range(2):
        vx.ScalarImage(torch.rand(1, 4, 5, 6), affine=np.diag([1, 2, 3.0 + number, 1])).save(tmp_path / f"{number}.nii.gz")
    items = [{"image": tmp_path / f"{number}.nii.gz"} for number in range(2)]
    data = Dataset(items, mt.Compose([mt.LoadImaged("image"), mt.EnsureChannelFirstd("image")]))
    ours = decollate_batch(as_dict(next(iter(vx.SubjectsLoader(data, batch_size=2)))))
    theirs = decollate_batch(next(iter(DataLoader(data, batch_size=2))))
    for one, other in zip(ours, theirs, strict=True):
        mine, expected = one["image"].meta, other["image"].meta
        assert mine.keys() == expected.keys()
        for name in mine:
            np.testing.assert_array_equal(np.asarray(mine[name]), np.asarray(expected[name]))
    assert [one["image"].meta["filename_or_obj"] for one in ours] == [str(item["image"]) for item in items]


# Data sets


@pytest.fixture(params=["Dataset", "CacheDataset", "PersistentDataset", "list"])
def dataset(request, tmp_path):
    items = [item_of(number) for number in range(3)]
    steps = mt.Compose([mt.ScaleIntensityd("image"), mt.EnsureTyped(["image", "label"])])
    if request.param == "list":
        return [steps(item) for item in items]
    if request.param == "CacheDataset":
        return CacheDataset(items, steps, progress=False)
    if request.param == "PersistentDataset":
        return PersistentDataset(items, steps, tmp_path)
    return Dataset(items, steps)


def test_a_data_set_that_is_half_filled(tmp_path):
    """What is made anew is a `MetaTensor`; what was kept, as MONAI keeps it unless asked for more, a plain tensor."""
    data = PersistentDataset([item_of(number) for number in range(2)], mt.ScaleIntensityd("image"), tmp_path)
    data[1]  # of an earlier run, which was interrupted
    batch = next(iter(vx.SubjectsLoader(vx.SubjectsDataset([data[0], data[1]]), batch_size=2)))
    assert [each is None for each in batch.image["applied_operations"]] == [False, True]
    assert type(as_dict(batch)["image"]) is MetaTensor
    assert torch.equal(batch.image.data[1], data[1]["image"])


def test_what_a_data_set_keeps_is_not_changed():
    def brighter(subject):
        subject["image"].data.add_(1)
        return subject

    kept = CacheDataset([{"image": torch.zeros(1, 8, 8, 8)}], mt.EnsureTyped("image"), progress=False)
    for data in (kept, Labelled(kept, [])):
        queue = vx.Queue(data, 4, 2, vx.UniformSampler(4), seed=0, transform=brighter)
        assert {float(patch["image"].data.max()) for _ in range(3) for patch in queue} == {1}


def test_data_sets_feed_a_queue(dataset):
    runs = []
    for workers in (0, 2):
        queue = vx.Queue(dataset, 8, 4, vx.LabelSampler(8), seed=1, num_workers=workers, transform=random_transform())
        runs.append([(batch["image"].data, batch.label.data, batch["age"]) for batch in vx.SubjectsLoader(queue, batch_size=4)])
        queue.close()
    assert len(runs[0]) == 3
    assert len({float(image.sum()) for image, _, _ in runs[0]}) == 3
    for one, other in zip(*runs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_volumes_of_a_data_set_are_those_of_the_patches():
    patches = list(vx.Queue([item_of(0)], 100, 4, vx.GridSampler(8), seed=1))
    assert len(patches) == 18
    for patch in patches:
        expected = item_of(0)["image"].as_tensor()[(slice(None), *patch.patch_location.box.slices)]
        assert torch.equal(patch["image"].data, expected)


def test_a_data_set_whose_names_do_not_say_what_labels_are():
    items = [{"scan": item["image"], "truth": item["label"]} for item in map(item_of, range(2))]
    queue = vx.Queue(Labelled(Dataset(items), ["truth"]), 8, 4, vx.LabelSampler(8, "truth"), seed=1)
    patches = list(queue)
    assert len(patches) == 8
    assert all(patch.truth.type == "label" and patch.truth.data[:, 4, 4, 4].all() for patch in patches)


def test_patches_that_monai_cuts_are_refused_with_the_way_out():
    crop = mt.RandCropByPosNegLabeld(["image", "label"], "label", (8, 8, 8), num_samples=2)
    with pytest.raises(vx.errors.SubjectError, match=r"list of 2 dicts.*leave that one out"):
        list(vx.Queue(Dataset([item_of(0)], crop), 8, 4, vx.UniformSampler(8), seed=0))
    with pytest.raises(vx.errors.SubjectError, match=r"list of 2 dicts.*leave that one out"):
        vx.Compose([crop, mt.ScaleIntensityd("image")])(from_dict(item_of(0)))


# Transforms


def test_a_transform_does_what_it_does_there():
    theirs = random_transform().set_random_state(seed=5)
    ours = vx.Compose([random_transform().set_random_state(seed=5)])
    expected, made = theirs(item_of(0)), ours(from_dict(item_of(0)))
    assert torch.equal(made["image"].data, expected["image"].as_tensor())
    assert torch.equal(made.label.data, expected["label"].as_tensor().to(torch.uint8))
    assert made.label.dtype == torch.uint8
    assert made.label.type == "label"
    assert torch.allclose(torch.from_numpy(made["image"].affine), expected["image"].affine)
    assert len(as_dict(made)["image"].applied_operations) == len(expected["image"].applied_operations) > 0


LAZY = {
    "alone": [mt.Flipd(["image", "label"], 0, lazy=True)],
    "before another": [mt.Flipd(["image", "label"], 0, lazy=True), mt.ScaleIntensityd("image", minv=0, maxv=7)],
    "several": [
        mt.Spacingd(["image", "label"], (0.8, 1, 1), mode=("bilinear", "nearest"), lazy=True),
        mt.Flipd("image", 1, lazy=True),
        mt.ShiftIntensityd("label", offset=0),
        mt.Rotate90d("image", lazy=True),
    ],
}


@pytest.mark.parametrize("name", LAZY)
def test_what_lazy_transforms_leave_to_be_done_is_done(name):
    expected = mt.Compose(LAZY[name])(item_of(0))
    for ours in (vx.Compose(LAZY[name]), *(LAZY[name] if name == "alone" else ())):
        made = vx.SubjectsDataset([from_dict(item_of(0))], transform=ours)[0]
        assert torch.equal(made["image"].data, expected["image"].as_tensor())
        assert torch.equal(made.label.data.float(), expected["label"].as_tensor().float())
        assert np.allclose(made["image"].affine, expected["image"].affine)
    (one,) = LAZY["alone"]
    waiting = one(item_of(0))["image"]
    assert waiting.has_pending_operations
    for _ in range(2):  # and nothing is changed of what was given
        assert torch.equal(vx.as_image(waiting).data, waiting.as_tensor().flip(1))
    assert waiting.has_pending_operations


@pytest.mark.filterwarnings("ignore:NvImgCodecPydicomReader")
def test_planes_of_monai_have_a_channel(tmp_path):
    nib.save(nib.Nifti1Image(np.arange(30, dtype="float32").reshape(5, 6), np.diag([2.0, 3, 4, 1])), tmp_path / "x.nii")
    read = mt.LoadImage(image_only=True, ensure_channel_first=True, reader="NibabelReader")(tmp_path / "x.nii")
    assert read.ndim == 3
    made, expected = vx.as_image(read), vx.ScalarImage(tmp_path / "x.nii")
    assert made.shape == expected.shape == (1, 5, 6, 1)
    assert torch.equal(made.data, expected.data)
    assert np.array_equal(made.affine, expected.affine)
    waiting, done = (vx.as_image(mt.Flip(0, lazy=lazy)(read)) for lazy in (True, False))
    assert torch.equal(waiting.data, done.data)
    assert np.allclose(waiting.affine[:2], done.affine[:2])


def test_transforms_of_a_list_see_of_each_other_what_they_see_there():
    seen = []
    halved = [mt.Lambdad("label", lambda label: label / 2), mt.Lambdad("label", lambda label: seen.append(label) or label * 2)]
    expected = mt.Compose(halved)(item_of(0))
    made = vx.Compose(halved)(from_dict(item_of(0)))
    assert seen[1].dtype == seen[0].dtype == torch.float32
    assert type(seen[1]) is MetaTensor
    assert torch.equal(made.label.data, expected["label"].as_tensor().to(torch.uint8))
    assert made.label.dtype == torch.uint8


@pytest.mark.parametrize("first", [mt.ToNumpyd("image"), mt.ToTensord("image", track_meta=False)], ids=["array", "tensor"])
def test_an_image_that_loses_its_place_within_a_list_gets_it_back(first):
    image = vx.ScalarImage(torch.rand(1, 8, 8, 8), affine=np.diag([-2, 2, 2, 1]))
    made = vx.Compose([first, mt.Spacingd("image", (1, 1, 1)), mt.Flipd("image", 0)])(vx.Subject(image=image))
    assert made["image"].shape == (1, 15, 15, 15)
    assert np.allclose(made["image"].spacing, 1)
    assert made["image"].affine[0].tolist() == pytest.approx([1, 0, 0, -14])


@pytest.mark.parametrize("dtype", [torch.long, torch.int16, torch.bool])
def test_labels_of_floats_are_cast_to_whole_numbers_where_that_is_asked_for(dtype):
    item = {"image": torch.rand(1, 8, 8, 8), "label": torch.ones(1, 8, 8, 8)}
    cast = mt.CastToTyped("label", dtype)
    for transform in (cast, vx.Compose([mt.Flipd(["image", "label"], 0), cast])):
        queue = vx.Queue([item], 2, 2, vx.UniformSampler(4), transform=transform, seed=0)
        assert next(iter(queue)).label.dtype == dtype
        queue.close()


def test_labels_that_are_made_within_a_list_keep_their_type():
    made = vx.Compose([mt.CopyItemsd("label", names="label2"), mt.Lambdad(["label", "label2"], lambda x: x * 1.0)])(
        from_dict(item_of(0))
    )
    assert made.label.dtype == made.label2.dtype == torch.uint8


def test_what_a_user_calls_then_is_not_called():
    class Chain:
        def then(self, following):
            raise AssertionError

        def __call__(self, subject):
            return subject

    transform = vx.Compose([Chain(), mt.Flipd("image", 0), mt.Flipd("image", 0), Chain()])
    assert len(transform.transforms) == 4
    assert torch.equal(transform(from_dict(item_of(0)))["image"].data, from_dict(item_of(0))["image"].data)


def test_a_function_of_the_users_own_between_transforms_changes_no_draw():
    def untouched(subject):
        return subject

    batches = []
    for between in ([], [untouched]):
        parts = [mt.RandFlipd(["image", "label"], prob=0.5), *between, mt.RandGaussianNoised("image", prob=1)]
        queue = vx.Queue(Dataset([item_of(0), item_of(1)]), 8, 4, vx.UniformSampler(8), seed=1, patch_transform=parts)
        batches.append([patch["image"].data for patch in queue])
    assert len(batches[0]) == 8
    assert all(torch.equal(one, other) for one, other in zip(*batches, strict=True))


def test_images_may_be_added_and_removed():
    made = vx.Compose([mt.CopyItemsd("image", names="second"), mt.DeleteItemsd("label")])(from_dict(item_of(0)))
    assert list(made.images) == ["image", "second"]
    assert torch.equal(made.second.data, made["image"].data)


def test_spacing_moves_the_affine():
    made = vx.Compose([mt.Spacingd(["image", "label"], (2, 2, 2), mode=("bilinear", "nearest"))])(from_dict(item_of(0)))
    assert np.allclose(made.spacing, 2)
    made.check_space()


def test_transforms_of_arrays_need_a_single_image():
    alone = vx.Subject(image=vx.ScalarImage(torch.arange(64.0).view(1, 4, 4, 4)))
    assert vx.Compose([mt.ScaleIntensity()])(alone)["image"].data.max() == 1
    assert vx.Compose([mt.Compose([mt.ScaleIntensity(), mt.Flip(0)])])(alone)["image"].data[0, 0].min() > 0.7
    with pytest.raises(vx.errors.SubjectError, match=r"RandFlip transforms one array.*RandFlipd\(keys"):
        vx.Compose([mt.RandFlip()])(from_dict(item_of(0)))


def test_generators_of_transforms_are_seeded_by_subject_and_epoch_in_a_loader_with_workers_too():
    noise = mt.RandGaussianNoised("image", prob=1)
    subjects = [vx.Subject(image=vx.ScalarImage(torch.zeros(1, 4, 4, 4))) for _ in range(6)]
    loader = vx.SubjectsLoader(vx.SubjectsDataset(subjects, transform=noise), batch_size=1, num_workers=2)
    drawn = {float(batch["image"].data.sum()) for _ in range(2) for batch in loader}
    assert len(drawn) == 12  # a copy of one generator in each worker would give each number twice


def test_batches_are_transformed_one_subject_after_the_other():
    from voxloom.volumes.transforms import as_batch_transform

    batch = vx.SubjectsBatch.from_subjects([from_dict(item_of(number)) for number in range(2)])
    before = batch["image"].data.clone()
    made = as_batch_transform(mt.Flipd(["image", "label"], spatial_axis=0), "batch_transform")(batch)
    assert torch.equal(made["image"].data, before.flip(2))
    assert torch.equal(made.label.data, (before > 0.5).to(torch.uint8).flip(2))
    assert made["image"].affine[0, 0, 0] == -AFFINE[0, 0]


def test_batches_keep_what_a_transform_adds():
    from voxloom.volumes.transforms import as_batch_transform

    batch = vx.SubjectsBatch.from_subjects([from_dict(item_of(number)) for number in range(2)])
    steps = mt.Compose([mt.CopyItemsd("image", names="second"), mt.Lambdad("age", lambda age: age * 10), mt.Flipd("image", 0)])
    made = as_batch_transform(steps, "batch_transform")(batch)
    assert set(made.images) == {"image", "label", "second"}
    assert made.metadata["age"] == [0, 10]
    assert [len(each) for each in as_dict(made)["image"].applied_operations] == [1, 1]


def test_batches_say_what_cannot_transform_them():
    import torchio as tio

    dataset = vx.SubjectsDataset([from_dict(item_of(0))])
    with pytest.raises(vx.errors.SubjectError, match=r"transforms subjects, and no batches: give it as a queue's transform"):
        vx.SubjectsLoader(dataset, batch_transform=tio.RandomFlip())
    with pytest.raises(vx.errors.SubjectError, match="the loader gave a Subject: give it a batch_size"):
        next(iter(vx.SubjectsLoader(dataset, batch_size=None, batch_transform=lambda batch: batch)))
    (batch,) = vx.SubjectsLoader(dataset, batch_transform=vx.Compose([mt.Flipd("image", 0)]))
    assert torch.equal(batch["image"].data[0], item_of(0)["image"].as_tensor().flip(1))
