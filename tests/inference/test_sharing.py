"""Work that is shared out among threads: all of it is done, by any of them, and what cannot be done is told."""

import threading
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from voxloom.core import front as fronts
from voxloom.core.front import Front, WeightsOfPatches
from voxloom.core.grids import PatchGrid
from voxloom.core.sweeps import Sweep
from voxloom.core.windows import resolve_window
from voxloom.inference.sharing import SharedOut


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
    monkeypatch.setattr(fronts, "SHARED_BYTES", 0)
    monkeypatch.setattr(fronts, "PIECE_BYTES", 2**12)
    sweep = Sweep.smallest(PatchGrid.cover((30, 41, 29), 16, 6), is_cropped)
    window = None if is_cropped else resolve_window("gaussian")
    cpu = torch.device("cpu")
    weights = window and WeightsOfPatches(sweep, window, torch.float32, cpu)
    shared = []

    def share(work):
        shared.append(len(work))
        SharedOut(threads)(work)

    def add_up(share):
        front = Front(sweep, sweep.whole, 5, torch.float32, cpu, weights, share=share)
        generator = torch.Generator().manual_seed(0)
        result = torch.full((5, *sweep.grid.spatial_shape), torch.nan)
        for layer in range(sweep.num_layers):
            for numbers in sweep.patches(layer, sweep.whole):
                with torch.inference_mode():
                    patch = torch.randn(5, 16, 16, 16, generator=generator)
                front.add(patch, numbers)
            for place in sweep.places(layer, sweep.whole):
                for finished in front.finish(place):
                    result[(slice(None), *finished.box.slices)] = finished.values
        return result

    assert torch.equal(add_up(share), add_up(None))
    assert max(shared) >= 5
