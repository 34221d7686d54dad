"""The records of a prediction in parts: a folder beside its first result, with a file for each part. There are no locks.

What appears does so by renaming. The folder has another name while results are published, so that one process alone begins that;
it has it only when all parts are done. What the run is stands in a file that is there until all else is removed.
"""

import contextlib
import glob
import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.shards import ShardGrid
from ..core.sizes import Ints
from ..errors import RecordError
from ..io.formats import stem_of
from ..io.protocols import Json
from ..io.saving import write_safely

__all__ = [
    "DONE",
    "FAILED",
    "RUN",
    "ShardStatus",
    "beginning_of",
    "beginnings_of",
    "forget_failures",
    "heartbeat",
    "is_taken_over",
    "is_without_run",
    "numbers_in",
    "publishing_of",
    "put_record",
    "read_run",
    "records_of",
    "remove_records",
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


def beginning_of(records: Path, run: str) -> Path:
    """Name the folder in which records are until they are whole."""
    return records.with_name(f"{records.name}.{run}")


def beginnings_of(records: Path, before: Path) -> list[str]:
    """Give the names of runs whose records were never whole: who made them was killed, or was not the first.

    Args:
        records: the folder of whole records.
        before: the folder of a run that is published: what began later than that is not counted.
    """
    began, found = _last_heard(before), []
    for path in records.parent.glob(f"{glob.escape(records.name)}.{'[0-9a-f]' * 16}"):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime < began:
                found.append(path.suffix[1:])
    return found


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
    records, publishing = records_of(target), publishing_of(target)
    # In this order, which is that of their names: what is being renamed is found under one of them.
    status = _status_in(records, is_published=False) or _status_in(publishing, is_published=True)
    if status is None and is_without_run(records):
        raise RecordError(f"{records} has no {RUN}: remove it, and begin again")
    return status


def read_run(folder: Path) -> dict[str, Any] | None:
    """Give what is recorded of a run as a whole; None where there is nothing.

    Raises:
        RecordError: if it is damaged.
    """
    try:
        told = json.loads((folder / RUN).read_text())
        of_each: dict[str, Callable[[Any], Any]] = {
            "run": str,
            "fingerprint": dict,
            "shape": _sizes,
            "shard_size": _sizes,
            "began": float,
        }
        return {name: kind(told[name]) for name, kind in of_each.items()}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RecordError(f"{folder / RUN} is damaged: remove {folder}, and begin again") from error


def _sizes(told: list[int]) -> Ints:
    first, second, third = map(int, told)
    if min(first, second, third) < 1:
        raise ValueError(told)
    return first, second, third


def is_without_run(records: Path) -> bool:
    """Whether there are records that do not say of what they are."""
    # Asked twice, since they may be renamed between.
    return records.is_dir() and not (records / RUN).exists() and records.is_dir()


def remove_records(folder: Path) -> None:
    """Remove records; until the last step, whoever finds them can take up what was begun with them."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != RUN:
            path.unlink(missing_ok=True)
    (folder / RUN).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # a process that comes late may write into it still
        folder.rmdir()


def _status_in(folder: Path, is_published: bool) -> ShardStatus | None:
    told = read_run(folder)
    if told is None:
        return None
    boxes = ShardGrid(told["shape"], told["shard_size"])
    done = numbers_in(folder / DONE)
    failed = {number: traceback_in(folder / FAILED / f"{number}.json") for number in sorted(numbers_in(folder / FAILED) - done)}
    took, last = 0.0, told["began"]
    for number in done:
        path = folder / DONE / f"{number}.json"
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            took += float(json.loads(path.read_text())["seconds"])
            last = max(last, path.stat().st_mtime)
    if is_published:
        done, failed = set(range(len(boxes))), {}  # which is where publishing begins
    elif not (folder / RUN).exists():
        return None  # it has been put elsewhere meanwhile
    return ShardStatus(len(boxes), len(done), failed, is_published, last - told["began"], took, boxes, frozenset(done))


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
    except (FileExistsError, FileNotFoundError):
        return False  # another one has been quicker, or all is published


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
