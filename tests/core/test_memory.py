import gc

import torch

from voxloom.core import memory

LARGE = (memory.LARGE_BYTES // 4 + 1000,)


def test_freed_memory_is_used_again_only_when_no_view_of_it_is_left():
    first = memory.empty(LARGE, torch.float32)
    address = first.data_ptr()
    view = first[10:20].fill_(7)
    del first
    gc.collect()
    second = memory.empty(LARGE, torch.float32).fill_(1)
    assert second.data_ptr() != address
    assert (view == 7).all()
    del view
    third = memory.empty(LARGE, torch.float32)
    assert third.data_ptr() == address


def test_zeros_are_zero_also_after_memory_was_freed():
    memory.empty(LARGE, torch.float32).fill_(3)
    assert not memory.zeros(LARGE, torch.float32).any()


def test_no_more_is_kept_than_was_said():
    for _ in range(3):
        memory.empty((memory.KEPT_BYTES // 3,), torch.uint8)
    tensors = [memory.empty((memory.KEPT_BYTES // 2 + 1,), torch.uint8) for _ in range(4)]
    del tensors
    assert sum(map(len, memory._freed._pages)) <= memory.KEPT_BYTES


def test_large_and_small_tensors_have_the_shape_and_type_that_were_asked_for():
    for shape in ((2, 3), (9, *LARGE)):
        for make in (memory.empty, memory.zeros):
            tensor = make(shape, torch.int16)
            assert tensor.shape == shape
            assert tensor.dtype == torch.int16
            assert tensor.is_contiguous()
