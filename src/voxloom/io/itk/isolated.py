"""Files that only ITK knows: read in a process with a bound on its memory, so that none of them ends or fills this one."""

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import CorruptImageError, UnsupportedImageError
from ..compression import GREATEST_GZIP_RATIO
from .files import ItkFile, ItkHeader, check_name

__all__ = ["IsolatedFile"]

SCRIPT = Path(__file__).with_name("process.py")
SPARE_BYTES = 256 * 2**20
# A reader may hold the voxels as they are in the file, as they will be, and once more while it turns one into the other.
COPIES = 3
SECONDS, BYTES_PER_SECOND = 120, 2**20


class IsolatedFile(ItkFile):
    """A file of a format that is not in the table."""

    def header(self, path: Path) -> ItkHeader:
        """Read what the file says of its image."""
        said = _asked(path, SPARE_BYTES)
        if said["kind"] == "MINCImageIO":
            # ITK takes MINC's axes for those of DICOM, which turns left to right and front to back.
            raise UnsupportedImageError(f"{path} is MINC, which is read from files whose names end in .mnc: rename it")
        header = ItkHeader(**{name: said[name] for name in ItkHeader.__dataclass_fields__})
        values = math.prod(header.size) * header.components
        size = path.stat().st_size
        if values > size * GREATEST_GZIP_RATIO:
            raise CorruptImageError(f"{path} claims {values} values, but has {size} bytes: it is truncated, or damaged")
        return header

    def voxels(self) -> tuple[np.ndarray, Any]:
        """See `ItkFile`."""
        (path,) = self.paths
        held = math.prod(self.shape) * 8
        with tempfile.TemporaryDirectory(prefix="voxloom-") as folder:
            target = Path(folder) / "voxels"
            said = _asked(path, SPARE_BYTES + COPIES * held, target)
            return np.fromfile(target, said["dtype"]), None


def _asked(path: Path, spare: int, target: Path | None = None) -> dict[str, Any]:
    question = json.dumps({"path": str(path.absolute()), "spare": spare, "target": None if target is None else str(target)})
    size = path.stat().st_size
    check_name(path)
    if not sys.executable:
        raise UnsupportedImageError(
            f"{path} is read by a process of its own, and there is no sys.executable to start: convert it"
        )
    try:
        done = subprocess.run(  # noqa: S603 - a script of this package
            [sys.executable, str(SCRIPT)],
            input=question + "\n",
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=SECONDS + size / BYTES_PER_SECOND,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, map(str, sys.path))), "MALLOC_ARENA_MAX": "1"},
        )
    except subprocess.TimeoutExpired as error:
        raise CorruptImageError(f"{path} was not read within {error.timeout:.0f} s: it is damaged, or too large") from error
    except OSError as error:
        raise UnsupportedImageError(
            f"{path} is read by a process of its own, which cannot be started ({sys.executable}: {error.strerror}): convert it"
        ) from error
    try:
        said = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        # It ended in the middle, as damaged files make readers in C do.
        raise CorruptImageError(f"{path} ended the process that read it: it is damaged. Copy or download it again") from None
    if "error" in said:
        raise ItkFile.explained(path, said["error"])
    return said
