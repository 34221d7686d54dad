"""Marks in the names of unfinished files: which process made them, so that another one can tell what is left of a dead one."""

import functools
import hashlib
import os
import platform
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = ["is_of_dead", "left_by_dead", "new_mark"]

LENGTH = 28
# A folder in which looking takes longer is looked through again when that is no more than this share of the time.
SHORT_SECONDS, SHARE = 0.02, 0.005
_not_before: dict[str, float] = {}


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
    if os.name != "posix" or not mark.startswith(_here()):
        return False  # elsewhere than on POSIX, asking after a process would end it
    number = int(mark[12:20], 16)
    try:
        os.kill(number, 0)
        # One that nobody has waited for is there still, but does nothing any more.
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except ProcessLookupError:
        return True
    except (OSError, IndexError):
        return False


def left_by_dead(folder: Path, before: str, after: str = "") -> Iterator[tuple[str, Path]]:
    """Find what dead processes have left in a folder; not at every call where that takes long, since the folder is large.

    Args:
        folder: the folder.
        before: how the names begin, up to the mark.
        after: a regular expression for what follows the mark.

    Yields:
        Marks, and what bears them.
    """
    began = time.monotonic()
    if began < _not_before.get(str(folder), 0):
        return
    pattern = re.compile(rf"{re.escape(before)}([0-9a-f]{{{LENGTH}}}){after}")
    try:
        names = [entry.name for entry in os.scandir(folder)]
    except OSError:
        return
    took = time.monotonic() - began
    if took > SHORT_SECONDS:
        _not_before[str(folder)] = time.monotonic() + took / SHARE
    for name in names:
        found = pattern.fullmatch(name)
        if found is not None and is_of_dead(found[1]):
            yield found[1], folder / name


@functools.cache
def _here() -> str:
    """Name what the numbers of processes are of: a machine, from when it was started, and its part that this process sees.

    Where the system does not say that, it is a name that no other process has, of which then nothing is known.
    """
    try:
        boot, part = Path("/proc/sys/kernel/random/boot_id").read_text(), Path("/proc/self/ns/pid").readlink()
    except OSError:
        return secrets.token_hex(6)
    return hashlib.sha256(f"{platform.node()} {boot} {part}".encode()).hexdigest()[:12]
