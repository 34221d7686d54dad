"""Cases of parametrised tests that are left to `make test-slow`."""

from typing import Any

import pytest

__all__ = ["slow"]


def slow(*values: Any) -> Any:
    """Mark one case."""
    return pytest.param(*values, marks=pytest.mark.slow)
