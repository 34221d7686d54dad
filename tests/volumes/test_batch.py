import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import voxloom as vx
from voxloom.errors import NoSuchKeyError, SubjectError


def subjects(count=3, **entries):
    return [
        vx.Subject(
            t1=vx.ScalarImage(torch.full((1, 4, 5, 6), float(number)), scanner=f"s{number}"),
            seg=vx.LabelMap(torch.full((2, 4, 5, 6), number, dtype=torch.uint8)),
            age=40 + number,
            name=f"subject {number}",
            **entries,
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("make", [vx.SubjectsLoader, DataLoader])
@pytest.mark.parametrize("workers", [0, 2])
def test_both_loaders_give_the_same_batches(make, workers):
    loader = make(vx.SubjectsDataset(subjects()), batch_size=2, num_workers=workers)
    batches = list(loader)
    assert [type(batch) for batch in batches] == [vx.SubjectsBatch] * 2
    batch = batches[0]
    assert batch.batch_size == 2
    assert batch.t1.data is batch["t1"][vx.DATA]
    assert batch.t1.data.shape == (2, 1, 4, 5, 6)
    assert batch.t1.data[:, 0, 0, 0, 0].tolist() == [0, 1]
    assert batch.seg.data.dtype == torch.uint8
    assert batch["t1"][vx.AFFINE].shape == (2, 4, 4)
    assert batch.t1["scanner"] == ["s0", "s1"]
    assert batch["age"].tolist() == batch.get("age").tolist() == [40, 41]
    assert batch.get("weight", 7) == 7
    assert batch.metadata["age"] == [40, 41]
    assert batch.name == ["subject 0", "subject 1"]
    assert repr(batch) == "SubjectsBatch(Keys: ('age', 'name', 't1', 'seg'); images: 2; batch size: 2)"


def test_unbatching_gives_the_subjects_back():
    originals = subjects(scores=torch.tensor([1.0, 2.0]))
    for original, again in zip(originals, vx.SubjectsBatch.from_subjects(originals).unbatch(), strict=True):
        assert set(again) == set(original)
        assert type(again.seg) is vx.LabelMap
        assert torch.equal(again.t1.data, original.t1.data)
        assert (again.t1.affine == original.t1.affine).all()
        assert again.t1["scanner"] == original.t1["scanner"]
        assert again.age == original.age
        assert torch.equal(again.scores, original.scores)
    batch = vx.SubjectsBatch.from_subjects(originals)
    batch.unbatch()[0].t1.data.fill_(9)
    assert batch.t1.data[0].max() == 0


def test_to_moves_images_and_returns_the_batch():
    batch = vx.SubjectsBatch.from_subjects(subjects())
    assert batch.to(torch.float64) is batch
    assert batch.t1.data.dtype == batch.seg.data.dtype == torch.float64
    assert batch.to("meta").device.type == "meta"


def test_a_batch_keeps_what_it_knows_through_pickling_and_pinning():
    sampler = vx.GridSampler(subjects(1)[0], 2)
    batch = next(iter(vx.SubjectsLoader(sampler, batch_size=3)))
    again = pickle.loads(pickle.dumps(batch))
    assert again.metadata["patch_location"] == list(sampler.grid[:3])
    assert torch.equal(again[vx.LOCATION], batch[vx.LOCATION])
    import copy

    shallow = copy.copy(batch)
    shallow.update({"t1": batch.t1})
    assert shallow.patch_location == batch.patch_location


def test_a_batch_of_patches_has_locations_under_all_names():
    sampler = vx.GridSampler(subjects(1)[0], 2, padding_mode="edge", patch_overlap=0)
    batch = next(iter(vx.SubjectsLoader(sampler, batch_size=3)))
    assert batch.patch_location == batch.metadata["patch_location"] == sampler.grid[:3]
    assert batch[vx.LOCATION].tolist() == [location.tolist() for location in sampler.grid[:3]]
    assert batch["index_ini"].shape == (3, 3)
    assert batch[vx.LOCATION].dtype == torch.int64


def test_missing_entries_of_a_batch():
    batch = vx.SubjectsBatch.from_subjects(subjects())
    with pytest.raises(NoSuchKeyError, match="the batch has no entry 'location', only 'age'"):
        batch[vx.LOCATION]
    with pytest.raises(AttributeError, match="no entry 't2'"):
        _ = batch.t2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: s.update(t1=vx.ScalarImage(torch.zeros(1, 4, 5, 7))), r"the same shape.*item 1.*\(1, 4, 5, 7\).*item 0"),
        (lambda s: s.update(t1=vx.ScalarImage(torch.zeros(1, 4, 5, 6).half())), r"the same dtype.*item 1"),
        (lambda s: s.pop("age"), "item 1 of a batch has the entries t1, seg, name, but item 0 has t1, seg, age, name"),
    ],
)
def test_subjects_that_cannot_be_stacked_are_named(change, reason):
    items = subjects()
    change(items[1])
    with pytest.raises(SubjectError, match=reason):
        vx.SubjectsBatch.from_subjects(items)
    with pytest.raises(SubjectError, match="no subjects"):
        vx.SubjectsBatch.from_subjects([])
    with pytest.raises(SubjectError, match="item 1 of a batch is of type int"):
        vx.SubjectsBatch.from_subjects([items[0], 3])


def test_an_error_in_a_worker_keeps_its_type_and_message():
    items = subjects()
    items[1].pop("age")
    loader = vx.SubjectsLoader(vx.SubjectsDataset(items), batch_size=2, num_workers=1)
    with pytest.raises(SubjectError, match="item 1 of a batch"):
        list(loader)


def test_subjects_within_tuples_are_collated_by_pytorch():
    class Pairs(Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return subjects()[index], index

    batch, targets = next(iter(DataLoader(Pairs(), batch_size=2)))
    assert isinstance(batch, vx.SubjectsBatch)
    assert targets.tolist() == [0, 1]


def test_a_data_set_gives_copies_and_applies_the_transform():
    originals = subjects()

    def transform(subject):
        subject.t1.data.add_(100)
        return subject

    dataset = vx.SubjectsDataset(originals, transform)
    assert dataset[1].t1.data.max() == 101
    assert originals[1].t1.data.max() == 1
    assert dataset[-1].age == 42
    assert len(list(dataset)) == 3
    assert dataset.dry_iter() == originals


def test_a_data_set_loads_its_copies_only(tmp_path):
    subjects()[0].t1.save(tmp_path / "x.nii")
    original = vx.Subject(t1=vx.ScalarImage(tmp_path / "x.nii"))
    assert vx.SubjectsDataset([original])[0].t1.is_loaded
    assert not vx.SubjectsDataset([original], load_getitem=False)[0].t1.is_loaded
    assert not original.t1.is_loaded


@pytest.mark.parametrize("items", [[], None, 3, [1], "ab"])
def test_data_sets_of_something_else(items):
    with pytest.raises(SubjectError, match=r"data set"):
        vx.SubjectsDataset(items)
    with pytest.raises(SubjectError, match="transform is of type int"):
        vx.SubjectsDataset(subjects(), transform=3)


def test_a_batch_without_batching_and_a_collate_function_of_ones_own():
    dataset = vx.SubjectsDataset(subjects())
    assert isinstance(next(iter(vx.SubjectsLoader(dataset, batch_size=None))), vx.Subject)
    loader = vx.SubjectsLoader(dataset, batch_size=2, collate_fn=lambda items: len(items))
    assert list(loader) == [2, 1]
    sampler = vx.GridSampler(subjects(1)[0], 2)
    counts = list(vx.SubjectsLoader(sampler, batch_size=5, collate_fn=lambda items: [item.t1.shape for item in items]))
    assert counts[0] == [(1, 2, 2, 2)] * 5


@pytest.mark.parametrize("order", [1, -1])
def test_entries_that_only_some_images_have(order):
    images = [vx.ScalarImage(torch.full((1, 4, 4, 4), 1.0), meta={"unit": "HU"}), vx.ScalarImage(torch.zeros(1, 4, 4, 4))][
        ::order
    ]
    subjects = [vx.Subject(t1=image) for image in images]
    batch = vx.SubjectsBatch.from_subjects(subjects)
    assert batch.t1["meta"] == [{"unit": "HU"}, None][::order]
    assert [list(each.t1.metadata) for each in batch.unbatch()] == [["meta"], []][::order]


def test_metadata_have_one_home():
    batch = vx.SubjectsBatch.from_subjects(subjects(2))
    batch["age"] = torch.tensor([7, 8])
    batch.site = ["a", "b"]
    batch.pop("name")
    assert batch.site == batch.metadata["site"] == ["a", "b"]
    first = batch.unbatch()[0]
    assert (first.age, first.site) == (7, "a")
    assert "name" not in first
    with pytest.raises(TypeError):
        batch.metadata["more"] = [1, 2]  # a copy of the batch's entries, which says so
    with pytest.raises(AttributeError, match="'images' is an attribute that every batch has"):
        batch.images = 3


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([np.float32(1.5), np.float32(2.5)], torch.tensor([1.5, 2.5])),
        ([np.array([1, 2]), np.array([3, 4])], torch.tensor([[1, 2], [3, 4]])),
        ([2**70, 1], [2**70, 1]),
        ([None, 1], [None, 1]),
        ([torch.zeros(2), torch.zeros(3)], None),
    ],
)
def test_metadata_are_collated_where_they_can_be(values, expected):
    items = subjects(2)
    for item, value in zip(items, values, strict=True):
        item["extra"] = value
    batch = vx.SubjectsBatch.from_subjects(items)
    if isinstance(expected, torch.Tensor):
        assert torch.equal(batch["extra"], expected)
    elif expected is not None:
        assert batch["extra"] == expected
    assert batch.metadata["extra"] is not None
    assert isinstance(batch.metadata["extra"], list)


def test_copies_of_subjects_are_subjects():
    subject = subjects(1)[0]
    assert type(subject.copy()) is vx.Subject
    both = subject | {"more": 1}
    assert type(both) is vx.Subject
    assert both.more == 1
    assert "more" not in subject
