"""Batches on their way to the training step: onto a device, one ahead, and transformed there, the same after resuming."""

import os

import pytest
import torch

import voxloom as vx
from voxloom.errors import ModeError, QueueError, SubjectError


def subjects():
    return [
        vx.Subject(t1=vx.ScalarImage(torch.arange(512.0).view(1, 8, 8, 8) + 1000 * number), number=number) for number in range(4)
    ]


def queue(workers=0, **more):
    return vx.Queue(subjects(), 6, 3, vx.UniformSampler(4), seed=1, num_workers=workers, **more)


def noise(batch):
    batch.t1.data = batch.t1.data + torch.rand(batch.t1.data.shape)
    return batch


def data_of(loader):
    return [batch.t1.data.clone() for batch in loader]


def assert_same(ones, others):
    assert len(ones) == len(others) > 0
    assert all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


def test_a_device_changes_nothing_but_where_batches_are():
    assert_same(
        data_of(vx.SubjectsLoader(queue(), batch_size=2)), data_of(vx.SubjectsLoader(queue(), batch_size=2, device="cpu"))
    )
    moved = list(vx.SubjectsLoader(queue(), batch_size=2, device="meta"))
    assert [batch.device.type for batch in moved] == ["meta"] * 6
    assert moved[0]["number"].device.type == "cpu"


def test_the_next_batch_is_on_its_way_while_one_is_worked_on():
    made = []

    def seen(subject):
        made.append(subject.number)
        return subject

    batches = iter(vx.SubjectsLoader(vx.SubjectsDataset(subjects(), seen), device="cpu"))
    for _ in range(3):
        number = int(next(batches)["number"])
        assert made == list(range(number + 2))
    assert int(next(batches)["number"]) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_on_its_way_does_not_count_as_delivered(workers):
    whole = data_of(vx.SubjectsLoader(queue(), batch_size=2, device="cpu", batch_transform=noise))
    loader = vx.SubjectsLoader(queue(workers), batch_size=2, device="cpu", batch_transform=noise)
    batches = iter(loader)
    begun = [next(batches).t1.data.clone() for _ in range(2)]
    state = loader.state_dict()
    loader.dataset.close()
    other = vx.SubjectsLoader(queue(workers, start_background=False), batch_size=2, device="cpu", batch_transform=noise)
    other.load_state_dict(state)
    assert_same(whole, begun + data_of(other))
    other.dataset.close()


def test_the_same_of_a_sampler():
    def loader():
        sampler = vx.UniformSampler(subjects()[0], 4, num_patches=10, seed=2)
        return vx.SubjectsLoader(sampler, batch_size=2, device="cpu", batch_transform=noise)

    whole = loader()
    first, second = data_of(whole), data_of(whole)
    assert not torch.equal(first[0], second[0])
    begun, batches = loader(), None
    batches = iter(begun)
    heads = [next(batches).t1.data.clone() for _ in range(3)]
    other = loader()
    other.load_state_dict(begun.state_dict())
    assert_same(first, heads + data_of(other))
    assert_same(second, data_of(other))


def test_batches_of_a_data_set_are_transformed_too_each_differently():
    torch.manual_seed(3)
    loader = vx.SubjectsLoader(vx.SubjectsDataset(subjects()[:1] * 4), batch_size=2, batch_transform=noise)
    torch.manual_seed(3)
    again = vx.SubjectsLoader(vx.SubjectsDataset(subjects()[:1] * 4), batch_size=2, batch_transform=noise)
    first, second = data_of(loader), data_of(loader)
    assert_same(first + second, data_of(again) + data_of(again))
    assert len({float(each.sum()) for each in first + second}) == 4


def test_delivery_may_change_between_epochs():
    loader = vx.SubjectsLoader(queue(), batch_size=2)
    data_of(loader)
    loader.batch_transform = noise
    always = vx.SubjectsLoader(queue(), batch_size=2, batch_transform=noise)
    data_of(always)
    assert_same(data_of(loader), data_of(always))


def test_the_users_random_numbers_and_threads_are_left_alone():
    threads, counted = torch.get_num_threads(), []

    def looking(batch):
        counted.append(torch.get_num_threads())
        return noise(batch)

    drawn = []
    for transform in (None, looking):
        torch.manual_seed(0)
        data_of(vx.SubjectsLoader(queue(), batch_size=2, batch_transform=transform))
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)
    assert set(counted) == {threads}


def test_transforms_one_after_the_other():
    loader = vx.SubjectsLoader(queue(), batch_size=2, batch_transform=[noise, lambda batch: batch])
    assert_same(data_of(loader), data_of(vx.SubjectsLoader(queue(), batch_size=2, batch_transform=noise)))


def test_errors_say_what_to_do():
    with pytest.raises(ModeError, match="device is 'gpu', which cannot be used here: PyTorch calls it 'cuda'"):
        vx.SubjectsLoader(queue(), device="gpu")
    with pytest.raises(SubjectError, match="batch_transform is of type int, which cannot be called"):
        vx.SubjectsLoader(queue(), batch_transform=5)
    with pytest.raises(SubjectError, match="batch_transform returned something of type NoneType"):
        data_of(vx.SubjectsLoader(queue(), batch_transform=lambda batch: None))


def test_processes_that_do_not_know_their_rank_are_refused(monkeypatch):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setitem(os.environ, name, value)
    with pytest.raises(QueueError, match="one of 2 processes .* not initialized"):
        next(iter(queue()))
    with pytest.raises(QueueError, match="share_ranks=False"):
        next(iter(vx.SubjectsLoader(vx.UniformSampler(subjects()[0], 4, num_patches=3))))
    assert len(list(queue(rank=0, world_size=1))) == 12
    assert len(list(vx.SubjectsLoader(vx.UniformSampler(subjects()[0], 4, num_patches=3, share_ranks=False)))) == 3
