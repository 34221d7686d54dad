"""Marks in the names of unfinished files: which process made them, so that another one can tell what is left of a dead one."""

import contextlib
import functools
import hashlib
import os
import platform
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

__all__ = ["is_of_dead", "left_by_dead", "new_mark"]

LENGTH = 28


def new_mark() -> str:
    """Make a mark of this process, unlike any other: letters and digits.

    Example:
        >>> mark = new_mark()
        >>> mark != new_mark(), is_of_dead(mark)
        (True, False)
    """
    return f"{_here()}{os.getpid():08x}{secrets.token_hex(4)}"


def is_of_dead(mark: str) -> bool:
    """Whether a process of this machine made a mark, and has ended. Of other machines' nothing is known."""
    if not mark.startswith(_here()):
        return False
    try:
        os.kill(int(mark[12:20], 16), 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False


def left_by_dead(folder: Path, before: str, after: str = "") -> Iterator[tuple[str, Path]]:
    """Find what dead processes have left in a folder.

    Args:
        folder: the folder.
        before: how the names begin, up to the mark.
        after: a regular expression for what follows the mark.

    Yields:
        Marks, and what bears them.
    """
    pattern = re.compile(rf"{re.escape(before)}([0-9a-f]{{{LENGTH}}}){after}")
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            found = pattern.fullmatch(entry.name)
            if found is not None and is_of_dead(found[1]):
                yield found[1], Path(entry.path)


@functools.cache
def _here() -> str:
    """Name what the numbers of processes are of: a machine, from when it was started, and its part that this process sees."""
    seen = platform.node()
    with contextlib.suppress(OSError):
        seen += Path("/proc/sys/kernel/random/boot_id").read_text() + str(Path("/proc/self/ns/pid").readlink())
    return hashlib.sha256(seen.encode()).hexdigest()[:12]
