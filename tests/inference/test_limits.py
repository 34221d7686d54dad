"""Sizes of memory, as users write and read them."""

import pytest

from voxloom.core.sizes import pretty_bytes
from voxloom.errors import SizeError
from voxloom.runtime import limits
from voxloom.runtime.limits import as_bytes, free_bytes


@pytest.mark.parametrize(
    ("text", "number"),
    [("2GiB", 2**31), ("2 gib", 2**31), ("1.5 MB", 1_500_000), ("500", 500), (1e6, 10**6), (7, 7), ("3KiB", 3072), ("4 B", 4)],
)
def test_numbers_of_bytes(text, number):
    assert as_bytes(text, "memory_limit") == number


@pytest.mark.parametrize("text", ["much", "2 GG", "-1", 0, -5, True, None, "0", float("nan"), float("inf"), "1e3"])
def test_what_is_no_number_of_bytes(text):
    with pytest.raises(SizeError, match="memory_limit is .*: it must be a positive number of bytes"):
        as_bytes(text, "memory_limit")


def test_bytes_for_people():
    assert [pretty_bytes(number) for number in (0, 1023, 1024, 2**20 * 1.25, 2**50)] == [
        "0 bytes",
        "1023 bytes",
        "1.0 KiB",
        "1.2 MiB",
        "1024.0 TiB",
    ]


def test_there_is_free_memory():
    free = free_bytes()
    assert free is None or 2**20 < free < 2**50


def test_what_is_kept_of_files_counts_as_free(tmp_path, monkeypatch):
    root = tmp_path / "cgroup"
    job = root / "jobs" / "mine"
    job.mkdir(parents=True)
    for folder, limit in ((root / "jobs", 10 * 2**30), (job, 2**30)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{900 * 2**20}\n")
        (folder / "memory.stat").write_text(f"anon 5\ninactive_file {500 * 2**20}\n")
    own = tmp_path / "own"
    own.write_text("0::/jobs/mine\n")
    monkeypatch.setattr(limits, "GROUPS", ((root, "memory.max", "memory.current", "inactive_file"),))
    monkeypatch.setattr(limits, "OWN_GROUPS", own)
    whole = free_bytes()
    assert whole <= 2**30 - 400 * 2**20
    (job / "memory.stat").write_text("anon 5\ninactive_file 0\n")
    assert free_bytes() == min(whole, 2**30 - 900 * 2**20)
    (root / "jobs" / "memory.max").write_text(f"{901 * 2**20}\n")
    (root / "jobs" / "memory.stat").write_text("anon 5\n")
    assert free_bytes() == 2**20
