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


def test_no_more_is_kept_than_was_said():
    for _ in range(3):
        memory.empty((memory.KEPT_BYTES // 3,), torch.uint8)
    tensors = [memory.empty((memory.KEPT_BYTES // 2 + 1,), torch.uint8) for _ in range(4)]
    del tensors
    assert memory._freed.num_bytes <= memory.KEPT_BYTES


def test_a_volume_does_not_drive_out_the_batches():
    batch = memory.empty(LARGE, torch.float32)
    address = batch.data_ptr()
    volume = memory.empty((memory.KEPT_BYTES + 1,), torch.uint8)
    del batch
    del volume
    assert memory.empty(LARGE, torch.float32).data_ptr() == address


def test_large_and_small_tensors_have_the_shape_and_type_that_were_asked_for():
    for shape in ((2, 3), (9, *LARGE)):
        tensor = memory.empty(shape, torch.int16)
        assert tensor.shape == shape
        assert tensor.dtype == torch.int16
        assert tensor.is_contiguous()
