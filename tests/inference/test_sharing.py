"""Work that is shared out among threads: all of it is done, by any of them, and what cannot be done is told."""

import threading
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from voxloom.aggregation import streaming
from voxloom.aggregation.streaming import StreamingAccumulator
from voxloom.aggregation.weights import PatchWeights
from voxloom.core.grid.grids import PatchGrid
from voxloom.core.grid.traversal import Traversal
from voxloom.core.grid.windows import resolve_window
from voxloom.runtime.sharing import SharedOut


@pytest.fixture
def threads():
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        yield [first, second]


def test_a_thread_that_is_held_up_holds_up_no_other(threads):
    rest = threading.Semaphore(0)

    def wait_for_the_rest():
        for _ in range(5):
            assert rest.acquire(timeout=20)

    SharedOut(threads)([wait_for_the_rest, *[rest.release] * 5])


def test_an_error_arrives_and_nothing_is_begun_after_it(threads):
    has_begun, done = threading.Event(), []

    def fail():
        assert has_begun.wait(20)
        raise ValueError("no more")

    def outlast_the_other():
        has_begun.set()
        futures.wait([thread.submit(int) for thread in threads], 20, futures.FIRST_COMPLETED)  # the other's, which has ended

    with pytest.raises(ValueError, match="no more"):
        SharedOut(threads)([fail, outlast_the_other, lambda: done.append("something")])
    assert done == []
    SharedOut(threads)([lambda: done.append("more")])
    assert done == ["more"]


@pytest.mark.parametrize("is_cropped", [False, True])
def test_a_sum_has_the_same_bits_however_it_is_shared_out(threads, monkeypatch, is_cropped):
    monkeypatch.setattr(streaming, "SHARED_BYTES", 0)
    monkeypatch.setattr(streaming, "PIECE_BYTES", 2**12)
    traversal = Traversal.smallest(PatchGrid.cover((30, 41, 29), 16, 6), is_cropped)
    window = None if is_cropped else resolve_window("gaussian")
    cpu = torch.device("cpu")
    weights = window and PatchWeights(traversal.grid, window, torch.float32, cpu)
    shared = []

    def share(work):
        shared.append(len(work))
        SharedOut(threads)(work)

    def add_up(share):
        accumulator = StreamingAccumulator(traversal, traversal.whole, 5, torch.float32, cpu, weights, share=share)
        generator = torch.Generator().manual_seed(0)
        result = torch.full((5, *traversal.grid.spatial_shape), torch.nan)
        for outer in range(traversal.num_outer):
            for step in traversal.steps(outer, traversal.whole):
                for numbers in traversal.patches(step, traversal.whole):
                    with torch.inference_mode():
                        patch = torch.randn(5, 16, 16, 16, generator=generator)
                    accumulator.add(patch, numbers)
                for finished in accumulator.finish(step):
                    result[(slice(None), *finished.box.slices)] = finished.values
        return result

    assert torch.equal(add_up(share), add_up(None))
    assert max(shared) >= 5
