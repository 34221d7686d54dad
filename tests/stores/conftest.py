import pytest

from voxloom.runtime.chunk_cache import CHUNKS
from zarr_samples import TENSOR, VOXELS


@pytest.fixture
def voxels():
    """Values `(I, J, K)`, as they are stored."""
    return VOXELS


@pytest.fixture
def tensor():
    """The same as a volume."""
    return TENSOR


@pytest.fixture
def small_cache():
    """An empty cache, which has its own limit again in the end."""
    CHUNKS.clear()
    before = CHUNKS.limit
    yield CHUNKS
    CHUNKS.limit = before
