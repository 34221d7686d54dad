"""The records of a prediction in parts: a folder beside its first result, with a file for each part. There are no locks.

What appears does so by renaming. The folder has another name while results are published, so that one process alone begins that.
"""

import contextlib
import json
import os
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..core.shards import ShardGrid
from ..errors import RecordError
from ..io.formats import stem_of
from ..io.protocols import Json
from ..io.saving import write_safely

__all__ = [
    "DONE",
    "FAILED",
    "RUN",
    "ShardStatus",
    "forget_failures",
    "heartbeat",
    "is_taken_over",
    "numbers_in",
    "publishing_of",
    "put_record",
    "records_of",
    "status_of",
    "traceback_in",
]

RUN, DONE, FAILED, ALIVE = "run.json", "done", "failed", "alive"
# A process that publishes is taken for lost when nothing has been heard of it for so long.
SILENT_SECONDS, BEAT_SECONDS = 600.0, 20.0


def records_of(target: Path) -> Path:
    """Name the folder in which the records of a prediction in parts are, beside its first result."""
    return target.with_name(f".{stem_of(target)}.shards")


def publishing_of(target: Path) -> Path:
    """Name that folder while a process puts the results under their names."""
    return target.with_name(f".{stem_of(target)}.publishing")


@dataclass(frozen=True)
class ShardStatus:
    """How far a prediction in parts is."""

    total: int
    done: int
    failed: dict[int, str]
    """Tracebacks, by the number of the part."""
    is_published: bool
    """Whether all is done, and a process is putting it under its name, or was interrupted while it did."""
    seconds: float
    """Since it was begun."""
    seconds_of_parts: float
    """That the parts took, each on its own."""
    boxes: ShardGrid
    numbers: frozenset[int]
    """The parts that are done."""

    @property
    def seconds_left(self) -> float | None:
        """At the rate until now; None while nothing is done."""
        return self.seconds / self.done * (self.total - self.done) if self.done else None


def status_of(target: Path) -> ShardStatus | None:
    """Say how far a prediction in parts is, from its records; None where there is none.

    Raises:
        RecordError: if they are damaged.
    """
    folder = next((each for each in (publishing_of(target), records_of(target)) if each.is_dir()), None)
    if folder is None:
        return None
    try:
        return _status_in(folder, is_published=folder == publishing_of(target))
    except FileNotFoundError:
        if folder.is_dir():
            raise RecordError(f"{folder} is not whole: remove it, and begin again") from None
        return status_of(target)  # it has been put elsewhere meanwhile


def _status_in(folder: Path, is_published: bool) -> ShardStatus:
    try:
        told = json.loads((folder / RUN).read_text())
        boxes = ShardGrid(tuple(told["shape"]), tuple(told["shard_size"]))
        began = float(told["began"])
    except FileNotFoundError:
        raise
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RecordError(f"{folder / RUN} is damaged: remove {folder}, and begin again") from error
    done = numbers_in(folder / DONE)
    failed = {number: traceback_in(folder / FAILED / f"{number}.json") for number in sorted(numbers_in(folder / FAILED) - done)}
    took = 0.0
    for number in done:
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            took += float(json.loads((folder / DONE / f"{number}.json").read_text())["seconds"])
    last = max(((folder / DONE / f"{number}.json").stat().st_mtime for number in done), default=began)
    return ShardStatus(len(boxes), len(done), failed, is_published, last - began, took, boxes, frozenset(done))


def forget_failures(target: Path) -> int:
    """Forget which parts of a prediction failed, and say how many they were: the next process tries them again."""
    folder = records_of(target) / FAILED
    numbers = numbers_in(folder)
    for number in numbers:
        (folder / f"{number}.json").unlink(missing_ok=True)
    return len(numbers)


def is_taken_over(publishing: Path, at_once: bool) -> bool:
    """Take over what another process has left, if nothing has been heard of it for a while; of several that try, one can.

    Args:
        publishing: the folder.
        at_once: do not wait.
    """
    if not at_once and time.time() - _last_heard(publishing) < SILENT_SECONDS:
        return False
    alive = publishing / ALIVE
    try:
        alive.rename(alive.with_name(f"{ALIVE}.{secrets.token_hex(4)}"))
        return True
    except FileNotFoundError:
        pass
    try:
        alive.touch(exist_ok=False)  # it was lost before it made a sign
        return True
    except FileExistsError:
        return False


@contextlib.contextmanager
def heartbeat(publishing: Path) -> Iterator[None]:
    """Let others see that this process is at it, however long a step takes."""
    path, stopping = publishing / ALIVE, threading.Event()

    def beat() -> None:
        while not stopping.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(path)

    path.touch()
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()


def _last_heard(publishing: Path) -> float:
    """Say when the process that publishes was heard of last."""
    for path in (publishing / ALIVE, publishing):
        with contextlib.suppress(OSError):
            return path.stat().st_mtime
    return 0.0


def numbers_in(folder: Path) -> set[int]:
    """Give the numbers of the parts that have a record in a folder; none where there is no folder."""
    try:
        return {int(path.stem) for path in folder.iterdir() if path.suffix == ".json" and path.stem.isdecimal()}
    except FileNotFoundError:
        return set()


def traceback_in(path: Path) -> str:
    """Give what a record of a failure tells; it may have been cut off by the failure itself."""
    try:
        return str(json.loads(path.read_text())["traceback"])
    except (OSError, ValueError, LookupError, TypeError):
        return "(its record is damaged)"


def put_record(path: Path, told: Json) -> None:
    """Let a record appear as a whole, whoever else writes it at the same time."""
    write_safely(path, json.dumps(told), f".{secrets.token_hex(4)}")
