"""Some of the damaged files of `make fuzz`: right data or a clear error, no crash, no hang, no boundless memory."""

from collections import Counter

from fuzz import fuzz

CASES = 120


def test_damaged_files_are_right_or_a_clear_error():
    results = list(fuzz(CASES, seed=0))
    faults = [f"{name}: {what}" for name, what in results if what.startswith("FAULT")]
    assert not faults, "\n".join(faults)
    kinds = Counter(what for _, what in results)
    assert len(results) == CASES
    assert kinds["data"] > CASES // 10  # damage that does not matter
    assert kinds["CorruptImageError"] > CASES // 3
