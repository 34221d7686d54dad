"""Who of several processes does what one alone may do.

A file in a folder says who by its name, and by its time when that was last heard of. It changes hands by renaming, which one
process alone can do. There are no locks.
"""

import contextlib
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Self

from ..io.files import if_there
from ..runtime.marks import is_of_dead, new_mark

__all__ = ["Claim", "make_free"]

FREE, HELD = "free", "held"
# A process is taken for lost when nothing has been heard of it for so long.
SILENT_SECONDS, BEAT_SECONDS = 180.0, 20.0


def make_free(folder: Path) -> None:
    """Let a claim be laid on a folder, which is new."""
    (folder / FREE).touch()


class Claim:
    """The claim on a folder, which one process alone holds.

    While it is kept, a thread lets others see that this process is at it, however long a step takes. It is given back after an
    error.

    Args:
        folder: where its file is.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / f"{HELD}.{new_mark()}"
        self._watched: tuple[Path, float, float] | None = None
        self.since = 0.0
        """When it was laid, by the clock of the file system."""

    def lay(self, at_once: bool = False) -> bool:
        """Take the folder, if it is free, or if whoever holds it is gone or has been silent for long; whether that was so.

        Args:
            at_once: take it, whoever holds it.
        """
        free = self._folder / FREE
        with if_there():  # or another one was quicker
            found = [path for path in self._folder.iterdir() if path == free or path.name.startswith(f"{HELD}.")]
            if not found and (at_once or self._is_silent(self._folder)):
                free.touch()  # someone has removed it
                found = [free]
            for path in found:
                if path == free or at_once or is_of_dead(path.suffix[1:]) or self._is_silent(path):
                    os.utime(path)
                    path.rename(self._path)
                    self.since = self._path.stat().st_mtime
                    return True
        return False

    def _is_silent(self, path: Path) -> bool:
        """Whether nothing is heard: by the clock of the file system, and for as long as this object has been looking."""
        heard, now = path.stat().st_mtime, time.monotonic()
        if self._watched is None or self._watched[:2] != (path, heard):
            self._watched = (path, heard, now)
        if now - self._watched[2] >= SILENT_SECONDS:
            return True
        with tempfile.TemporaryFile(dir=self._folder.parent) as file:
            return os.fstat(file.fileno()).st_mtime - heard >= SILENT_SECONDS

    @property
    def is_held(self) -> bool:
        """Whether it is this process's still, and no other's that took it for lost."""
        return self._path.exists()

    def __enter__(self) -> Self:
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()
        return self

    def _beat(self) -> None:
        while not self._stopping.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self._path)

    def __exit__(self, kind: object, *_: object) -> None:
        self._stopping.set()
        self._thread.join()
        if kind is not None:
            with contextlib.suppress(OSError):
                self._path.rename(self._folder / FREE)
