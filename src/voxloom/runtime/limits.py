"""How much memory there is, and how much may be used."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import SizeError

__all__ = ["as_bytes", "free_bytes", "home_of_sums"]

UNITS = {"": 1, "B": 1, "KB": 1000, "MB": 1000**2, "GB": 1000**3, "TB": 1000**4}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
# Of the memory that a device has free, what sums may take: the model needs some, too.
DEVICE_PART = 0.7
OWN_GROUPS = Path("/proc/self/cgroup")
# Where control groups are, of the second and of the first version, and the files that say their limit, their use, and what of
# that is only kept from files, and given back when it is needed.
GROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def as_bytes(value: Any, name: str) -> int:
    """Make a number of bytes of a number, or of a text such as `"2GiB"` or `"500 MB"`.

    Raises:
        SizeError: if it is neither, or not positive.
    """
    rule = "it must be a positive number of bytes, or a text such as '2GiB' or '500 MB'"
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", value) if isinstance(value, str) else None
    if match and match[2].upper() in UNITS:
        number = float(match[1]) * UNITS[match[2].upper()]
    elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        number = float(value)
    else:
        raise SizeError(f"{name} is {value!r}: {rule}")
    if number < 1:
        raise SizeError(f"{name} is {value!r}: {rule}")
    return int(number)


def free_bytes() -> int | None:
    """Memory that this process may still use; None where the system does not say."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except OSError:
        return None
    return min([*found, *_free_in_groups()], default=None)


def _free_in_groups() -> Iterator[int]:
    """Give what is free in the control groups of this process, such as those of a container or of a job of a cluster."""
    try:
        own = [line.split(":", 2) for line in OWN_GROUPS.read_text().splitlines()]
    except OSError:
        return
    paths = {Path(path.lstrip("/")) for _, kinds, path in own if kinds in ("", "memory") or "memory" in kinds.split(",")}
    for root, limit, used, cache in GROUPS:
        for place in {Path(), *paths, *(parent for path in paths for parent in path.parents)}:
            folder = root / place
            try:
                statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                in_use = int((folder / used).read_text()) - int(statistics.get(cache, 0))
                yield max(0, int((folder / limit).read_text()) - in_use)
            except (OSError, ValueError):
                continue  # there is no such group, or it has no limit


def home_of_sums(device: torch.device, num_bytes: int) -> torch.device:
    """Say where sums are held: on the device while they fit into what it has free, otherwise on the CPU."""
    free = 0
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    elif device.type == "mps":
        free = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return device if num_bytes <= free * DEVICE_PART else torch.device("cpu")
