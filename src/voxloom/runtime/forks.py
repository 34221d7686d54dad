"""What has to be set right in a process that was forked, where no thread goes on but the one that forked it."""

import os
from collections.abc import Callable

__all__ = ["in_forked_process"]


def in_forked_process(function: Callable[[], None]) -> Callable[[], None]:
    """Have a function called first in each process that is forked from this one, where the system has such processes."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=function)
    return function
