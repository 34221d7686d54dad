"""Arrays are read into a batch as they are read by themselves."""

import numpy as np
import pytest
import torch

import voxloom as vx
from voxloom.core.boxes import Box

BOX = Box((1, 0, 2), (5, 6, 7))


@pytest.mark.parametrize("into", [torch.float32, torch.float64, torch.float16, torch.int16, torch.uint8])
@pytest.mark.parametrize("dtype", ["f4", ">f4", "f8", "u1", "i2", "u2", "i8", "?"])
@pytest.mark.parametrize("kind", ["array", "mapped", "turned", "one channel"])
def test_reading_into_a_tensor_gives_what_reading_gives(tmp_path, kind, dtype, into):
    array = np.random.default_rng(0).integers(0, 2 if dtype == "?" else 200, (3, 6, 7, 8)).astype(dtype)
    if kind == "mapped":
        np.save(tmp_path / "a.npy", array)
        array = np.load(tmp_path / "a.npy", mmap_mode="r")
    elif kind == "turned":
        array = array[:, ::-1, :, ::-1].transpose(0, 2, 1, 3)
    elif kind == "one channel":
        array = array[0]
    source = vx.ArraySource(array)
    channels = source.shape[0]
    batch = torch.full((2, channels + 1, 4, 6, 5), 99).to(into)
    source.read_into(batch[1, 1:], BOX)
    assert torch.equal(batch[1, 1:], source.read(BOX).to(into))
    assert (batch[0] == 99).all()
    assert (batch[1, 0] == 99).all()
    expected = array[BOX.slices][None] if array.ndim == 3 else array[(slice(None), *BOX.slices)]
    assert np.array_equal(source.read(BOX).numpy(), expected.astype(source.read(BOX).numpy().dtype))


def test_a_read_of_ones_own_counts():
    class Doubled(vx.ArraySource):
        def read(self, box):
            return super().read(box) * 2

    array = np.random.default_rng(0).random((1, 12, 10, 8), dtype=np.float32)
    made = vx.predict(torch.nn.Identity(), Doubled(array, affine=np.eye(4)), patch_size=8, overlap_mode="crop")
    assert torch.equal(made.data, torch.from_numpy(array) * 2)
