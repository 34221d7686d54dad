import gc
import multiprocessing
import threading

import pytest
import torch

from voxloom.runtime import memory

LARGE = (memory.LARGE_BYTES // 4 + 1000,)


@pytest.fixture(autouse=True)
def nothing_kept():
    gc.collect()
    memory.shared.clear()


def test_freed_memory_is_used_again_only_when_no_view_of_it_is_left():
    first = memory.empty(LARGE, torch.float32)
    view, place = first[10:20].fill_(7), first.data_ptr()
    del first
    gc.collect()
    assert memory.shared.num_bytes == 0
    second = memory.empty(LARGE, torch.float32).fill_(1)
    assert (view == 7).all()
    del view
    gc.collect()
    assert memory.shared.num_bytes == LARGE[0] * 4
    third = memory.empty(LARGE, torch.float32)
    assert third.data_ptr() == place
    assert memory.shared.num_bytes == 0
    assert (second == 1).all()


def test_a_forked_process_starts_anew():
    memory.empty(LARGE, torch.float32)
    assert memory.shared.num_bytes
    with memory.shared.lock:
        worker = multiprocessing.get_context("fork").Process(target=memory.empty, args=(LARGE, torch.float32))
        worker.start()
    worker.join(30)
    assert worker.exitcode == 0


def free_and_leave(tensors):
    tensors.clear()
    gc.collect()


def test_what_was_there_before_a_fork_can_be_freed_after_it():
    tensors = [memory.empty(LARGE, torch.float32)]
    with memory.shared.lock:
        worker = multiprocessing.get_context("fork").Process(target=free_and_leave, args=(tensors,))
        thread = threading.Thread(target=worker.start)
        thread.start()
        thread.join()
    worker.join(30)
    assert worker.exitcode == 0


def test_no_more_is_kept_than_was_said():
    for _ in range(3):
        memory.empty((memory.KEPT_BYTES // 3,), torch.uint8)
    tensors = [memory.empty((memory.KEPT_BYTES // 2 + 1,), torch.uint8) for _ in range(4)]
    del tensors
    assert memory.shared.num_bytes <= memory.KEPT_BYTES


def test_a_volume_does_not_drive_out_the_batches():
    batch = memory.empty(LARGE, torch.float32)
    volume = memory.empty((memory.KEPT_BYTES + 1,), torch.uint8)
    del batch, volume
    gc.collect()
    assert memory.shared.num_bytes == LARGE[0] * 4


def test_large_and_small_tensors_have_the_shape_and_type_that_were_asked_for():
    for shape in ((2, 3), (9, *LARGE)):
        tensor = memory.empty(shape, torch.int16)
        assert tensor.shape == shape
        assert tensor.dtype == torch.int16
        assert tensor.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64, torch.uint16])
@pytest.mark.parametrize("turn", [lambda tensor: tensor, lambda tensor: tensor.transpose(0, 1)])
def test_copies_are_equal_whatever_the_type_and_order(dtype, turn):
    source = turn(torch.arange(12).reshape(3, 4).to(dtype))
    for target in (torch.zeros(source.shape, dtype=dtype), torch.zeros(source.shape[::-1], dtype=dtype).transpose(0, 1)):
        memory.copy_alone(target, source)
        assert torch.equal(target, source)


def test_what_needs_a_gradient_can_be_copied():
    source, target = torch.ones(3, requires_grad=True), torch.zeros(3)
    memory.copy_alone(target, source)
    assert torch.equal(target.detach(), torch.ones(3))
