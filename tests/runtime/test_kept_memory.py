"""Memory that is kept for a while: seen by what a process holds after a large block was freed, in processes of their own."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch

import fresh
import voxloom as vx
from slow import slow

BEGINNING = '''
    import ctypes, json, os, sys, threading
    import torch
    import voxloom as vx

    for name in vx.__all__:
        getattr(vx, name)  # imported now, which takes memory too
    BLOCK = 20 * 2**20

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    torch.ones(2**20).sum()  # what is made once
    ctypes.CDLL(None).malloc_trim(0)  # what importing has left, tens of MiB where Python had to compile, would be used again
    at_rest = resident()

    def keeps():
        """Whether a block is kept when it is freed: no gap that those before have left is large enough."""
        global BLOCK
        BLOCK *= 2
        torch.ones(BLOCK, dtype=torch.uint8)
        return holds_it()

    def holds_it():
        return resident() - at_rest > BLOCK // 2
'''

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux")
    or not hasattr(os, "confstr")
    or "glibc" not in (os.confstr("CS_GNU_LIBC_VERSION") or ""),
    reason="only the GNU C library can be told to keep memory",
)


def found(script, **environment):
    if not environment:
        return json.loads(fresh.printed(textwrap.dedent(BEGINNING) + textwrap.dedent(script)))
    command = [sys.executable, "-c", textwrap.dedent(BEGINNING) + textwrap.dedent(script)]
    # Dask leaves a variable of this kind behind where it has started a cluster.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, env=inherited | environment)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_memory_is_kept_until_the_end():
    script = """
        seen = [keeps()]
        with vx.kept_memory():
            seen += [keeps(), keeps()]
        seen += [holds_it(), keeps()]
        print(json.dumps(seen))
    """
    assert found(script) == [False, True, True, False, False]


def test_nested_and_after_errors():
    script = """
        seen = []
        with vx.kept_memory():
            try:
                with vx.kept_memory():
                    raise ValueError
            except ValueError:
                seen.append(keeps())
        seen.append(keeps())
        print(json.dumps(seen))
    """
    assert found(script) == [True, False]


@pytest.mark.slow
def test_several_threads():
    """The last to leave ends it."""
    script = """
        inside, leave = threading.Event(), threading.Event()

        def hold():
            with vx.kept_memory():
                inside.set()
                leave.wait()

        thread = threading.Thread(target=hold)
        thread.start()
        inside.wait()
        with vx.kept_memory():
            seen = [keeps()]
        seen.append(keeps())
        leave.set()
        thread.join()
        seen.append(keeps())
        print(json.dumps(seen))
    """
    assert found(script) == [True, True, False]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_forked_process_does_not_keep_memory():
    script = """
        with vx.kept_memory():
            child = os.fork()
            if not child:
                at_rest = resident()
                os._exit(keeps())
            seen = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), keeps()]
        print(json.dumps(seen))
    """
    assert found(script) == [0, True]


@pytest.mark.slow
def test_what_the_user_has_chosen_comes_back():
    script = """
        with vx.kept_memory():
            pass
        print(json.dumps(keeps()))
    """
    assert found(script, MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_=str(2**40)) is True
    tunables = f"glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold={2**40}"
    assert found(script, GLIBC_TUNABLES=tunables) is True
    assert found(script, GLIBC_TUNABLES=tunables, MALLOC_TRIM_THRESHOLD_="65536") is True  # of the two, these count


@pytest.mark.parametrize("in_parts", [False, slow(True)])
def test_a_prediction_keeps_what_its_model_uses_and_gives_it_back(in_parts, tmp_path):
    """In parts, too, as workers of Dask compute them: Dask sets a variable by which memory is given back at once."""
    script = f"""
        sizes = []
        parts = {{"executor": vx.inference.SerialLauncher(-1), "output": {str(tmp_path / "o.zarr")!r}}} if {in_parts} else {{}}

        class Wide(torch.nn.Conv3d):
            '''Uses far more than it returns.'''

            def forward(self, batch):
                sizes.append(resident() - at_rest)
                return super().forward(batch).mean(1, keepdim=True)

        vx.predict(Wide(1, 96, 1), torch.rand(1, 64, 64, 128), patch_size=64, **parts)
        print(json.dumps([*sizes, resident() - at_rest]))
    """
    *_, first, second, _, after = found(script, **({"MALLOC_TRIM_THRESHOLD_": "65536"} if in_parts else {}))
    block = 96 * 64**3 * 4
    assert first < block / 2 < second
    assert after < block / 2


@pytest.mark.parametrize(("limit", "is_kept"), [("80MiB", False), ("4GiB", True)])
def test_with_a_limit_memory_is_kept_where_it_leaves_room(limit, is_kept):
    script = f"""
        sizes = []

        class Wide(torch.nn.Conv3d):
            def forward(self, batch):
                sizes.append(resident() - at_rest)
                return super().forward(batch).mean(1, keepdim=True)

        vx.predict(Wide(1, 96, 1), torch.rand(1, 64, 64, 256), patch_size=64, memory_limit={limit!r})
        print(json.dumps([*sizes, resident() - at_rest]))
    """
    *during, after = found(script)
    block = 96 * 64**3 * 4
    assert (max(during) > block / 2) is is_kept
    assert after < block / 2


def test_what_is_read_before_the_first_forward_pass_is_not_kept():
    script = """
        import numpy as np
        seen = []

        class Source:
            shape, dtype, affine, codes = (1, 32, 32, 32), torch.float32, np.eye(4), vx.SpaceCodes()
            chunks, resident_bytes, paths = (32, 32, 32), 0, ()

            def read(self, box):
                seen.append(keeps())
                return torch.ones(1, *box.shape)

            def fingerprint(self):
                return "ones"

        vx.predict(torch.nn.Identity(), Source(), patch_size=32)
        print(json.dumps(seen))
    """
    assert found(script) == [False]


def test_bits_do_not_depend_on_it():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv3d(1, 48, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv3d(48, 2, 3, padding=1))
    batch = torch.rand(1, 1, 64, 64, 64)
    with torch.inference_mode():
        expected = network(batch)
        with vx.kept_memory():
            assert all(torch.equal(network(batch), expected) for _ in range(3))


def test_a_prediction_that_fails_keeps_nothing():
    script = """
        def fail(batch):
            torch.ones(BLOCK, dtype=torch.uint8)
            raise ValueError

        try:
            vx.predict(fail, torch.rand(1, 16, 16, 16), patch_size=8)
        except ValueError:
            pass
        print(json.dumps(keeps()))
    """
    assert found(script) is False


MAPPED = '''
    import ctypes

    class Info(ctypes.Structure):
        _fields_ = [(str(number), ctypes.c_size_t) for number in range(10)]

    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Info

    def is_mapped(num_bytes):
        """Whether such a block comes from the system by itself."""
        before = getattr(mallinfo(), "3")
        block = bytearray(num_bytes)
        return getattr(mallinfo(), "3") > before
'''


@pytest.mark.parametrize("channels", [1, 64])
def test_a_small_prediction_leaves_small_blocks_as_quick_as_before(channels):
    script = f"""
        small, usual = is_mapped(50_000), is_mapped(40 * 2**20)
        seen = []

        def model(batch):
            seen.append(is_mapped(50_000))
            return batch.expand(-1, {channels}, -1, -1, -1).clone()

        vx.predict(model, torch.rand(1, 20, 20, 20), patch_size=12)
        print(json.dumps([small, usual, any(seen), is_mapped(50_000), is_mapped(2**20), is_mapped(40 * 2**20)]))
    """
    assert found(textwrap.dedent(MAPPED) + textwrap.dedent(script)) == [False, True, False, False, False, True]


@pytest.mark.slow
def test_a_small_prediction_does_not_end_what_the_user_asked_for():
    script = """
        with vx.kept_memory():
            vx.predict(torch.nn.Identity(), torch.rand(1, 20, 20, 20), patch_size=12)
            seen = [keeps()]
        print(json.dumps([*seen, keeps()]))
    """
    assert found(script) == [True, False]


def test_outputs_of_an_ensemble_do_not_stay_in_the_gap_that_the_first_has_left():
    """Where memory is not kept, what was made before that turned out is a gap in the heap, which later outputs may lie in."""
    script = """
        from voxloom.runtime.kept_memory import begin_model, judge, kept_for_models

        SIZE = 40 * 2**20
        seen, sums = [], []
        with kept_for_models(torch.device('cpu')):
            for number in range(5):
                begin_model(has_freed=number > 0)
                seen.append(resident() - at_rest > SIZE // 2)
                output = torch.ones(SIZE, dtype=torch.uint8)
                sums.append(torch.ones(2**20))  # above the gap in the heap
                judge(SIZE)
                del output
        print(json.dumps(seen))
    """
    assert found(script) == [False] * 5
