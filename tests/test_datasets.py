import pytest
import torch

import voxloom as vx
from voxloom.errors import SizeError


def test_the_phantom_is_the_same_every_time_and_depends_on_the_seed():
    first, again, other = (vx.datasets.HeadPhantom(32, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.t1.data, again.t1.data)
    assert not torch.equal(first.t1.data, other.t1.data)
    assert torch.equal(first.labels.data, other.labels.data)


@pytest.mark.parametrize("size", [1, 16, (20, 30, 40), (97, 3, 50)])
def test_the_phantom_has_any_size_and_shows_the_same_head(size):
    phantom = vx.datasets.HeadPhantom(size)
    shape = (size,) * 3 if isinstance(size, int) else size
    assert phantom.spatial_shape == shape
    assert [round(side * voxels) for side, voxels in zip(phantom.spacing, shape, strict=True)] == [220] * 3
    phantom.check_space()
    assert phantom.t1.data.isfinite().all()


def test_every_tissue_is_there_and_looks_different():
    phantom = vx.datasets.HeadPhantom(64)
    means = [phantom.t1.data[phantom.labels.data == label].mean().item() for label in phantom.names]
    assert sorted(phantom.labels.data.unique().tolist()) == sorted(phantom.names)
    assert means[5] > means[4] > means[3] > means[0]


def test_sizes_that_are_none():
    with pytest.raises(SizeError, match="size"):
        vx.datasets.HeadPhantom(0)
