"""What several tests use: real images that travel inside libraries, and files in formats of all kinds."""

import gc
import signal
import sys
from pathlib import Path

import nilearn
import pytest
import torch
from hypothesis import HealthCheck, settings

import voxloom as vx
from voxloom import cli

from strategies import MOST_EXAMPLES

# Examples that Hypothesis draws are the same in every run, so that a failure is a failure for everyone. Quick runs draw a quarter
# of them; `make test-examples` asks for all, by the name of the profile.
for profile, share in (("thorough", 1), ("quick", 4)):
    settings.register_profile(
        profile,
        max_examples=MOST_EXAMPLES // share,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow],
    )
settings.load_profile("quick")

# A shell lets what it runs in the background ignore Ctrl-C, and so would the processes that tests interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

NILEARN_DATA = Path(nilearn.__file__).parent / "datasets" / "data"


# Files with tests that take a minute: these are begun first, so that no process is left with them at the end.
LONG = ("test_examples.py", "test_predict_memory.py", "test_benchmarks.py", "test_fuzz.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("slow") is None or item.path.name not in LONG)


def pytest_collection_finish():
    # What libraries keep for good is a million objects, which every look for garbage would go through, and every process that is
    # forked would copy.
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def mni_path() -> Path:
    """MNI152 T1 at 1 mm, 197 × 233 × 189, as nilearn brings it."""
    return NILEARN_DATA / "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"


@pytest.fixture(scope="session")
def mni_grey_matter_path() -> Path:
    """Probability of grey matter on the same grid."""
    return NILEARN_DATA / "mni_icbm152_gm_tal_nlin_sym_09a_converted.nii.gz"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command in this process: as a person does, but without the seconds that a process takes to begin."""

    def run(*arguments, code=0):
        monkeypatch.setattr(sys, "argv", ["voxloom", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        assert (caught.value.code or 0) == code, captured.err
        return captured

    return run


@pytest.fixture
def subject() -> vx.Subject:
    """A small subject of two images and an age, every voxel of which differs."""
    shape = (10, 20, 30)
    data = torch.arange(6000, dtype=torch.float32).reshape(1, *shape)
    return vx.Subject(t1=vx.ScalarImage(data), seg=vx.LabelMap((data > 2000).to(torch.uint8)), age=45)


@pytest.fixture
def two_threads():
    """Two threads of PyTorch's, for as long as a test runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
