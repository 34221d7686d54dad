"""Some of the damaged files of `make fuzz`: right data or a clear error, no crash, no hang, no boundless memory."""

from collections import Counter

import pytest

from fuzz import fuzz
from slow import slow


@pytest.mark.parametrize(("seed", "cases"), [(0, 7), slow(1, 238)])
def test_damaged_files_are_right_or_a_clear_error(seed, cases):
    results = list(fuzz(cases, seed))
    faults = [f"{name}: {what}" for name, what in results if what.startswith("FAULT")]
    assert not faults, "\n".join(faults)
    kinds = Counter(what for _, what in results)
    assert len(results) == cases
    assert kinds["data"] > cases // 10  # damage that does not matter
    assert kinds["CorruptImageError"] > cases // 3
