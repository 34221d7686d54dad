"""The records of a prediction in parts: a folder beside its first result, with a file for each part. There are no locks.

    .STEM.shards/run.json         what the run is
    .STEM.shards/RUN.parts/       done/N.json and failed/N.json, and what is being computed
    .STEM.shards/RUN.publishing/  the same folder, once all parts are done

What appears does so by renaming, and goes so. All that is recorded has the name of its run in its path, so that a process of an
older run, whose records were removed, does nothing to those of a newer one.
"""

import contextlib
import glob
import json
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from ..core.grid.shards import ShardGrid
from ..core.sizes import Ints
from ..errors import RecordError, SaveError
from ..io.files import if_there
from ..io.formats import stem_of
from ..io.protocols import Json
from ..io.writing.saving import write_safely
from .claim import make_free

__all__ = [
    "PartsRecords",
    "PartsState",
    "ShardStatus",
    "forget_failures",
    "is_being_published",
    "records_of",
    "status_of",
    "targets_of_records",
]

RECORDS, RUN, DONE, FAILED = ".shards", "run.json", "done", "failed"


def _sizes(told: list[int]) -> Ints:
    first, second, third = map(int, told)
    if min(first, second, third) < 1:
        raise ValueError(told)
    return first, second, third


KINDS: dict[str, Callable[[Any], Any]] = {"fingerprint": dict, "shape": _sizes, "shard_size": _sizes, "began": float}
"""What is recorded of a run."""


def records_of(target: Path) -> Path:
    """Name the folder in which the records of a prediction in parts are, beside its first result."""
    return target.with_name(f".{stem_of(target)}{RECORDS}")


class PartsState(Enum):
    """How far a run is."""

    OPEN = "parts may be missing"
    PUBLISHING = "all are done, and the results are being put under their names, or were until an interruption"
    ENDED = "there are no records: the results are in place, or someone has removed the records"


class PartsRecords:
    """What is recorded of a run.

    Args:
        folder: where all is.
        run: name of the run.
        told: what the run is.
    """

    def __init__(self, folder: Path, run: str, told: Json) -> None:
        self.folder, self.run, self.told = folder, run, told

    @staticmethod
    def found(folder: Path) -> "PartsRecords | None":
        """Give the records in a folder; None if there is nothing.

        Raises:
            RecordError: if they are damaged.
        """
        try:
            with if_there():
                told = json.loads((folder / RUN).read_text())
                return PartsRecords(folder, str(told["run"]), {name: kind(told[name]) for name, kind in KINDS.items()})
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise RecordError(f"{folder / RUN} is damaged: remove {folder}, and begin again") from error
        # Asked twice, since they may go meanwhile.
        if _is_there(folder) and not _is_there(folder / RUN) and _is_there(folder):
            raise RecordError(f"{folder} has no {RUN}: remove it, and begin again")
        return None

    def begin(self, make: Callable[[], object]) -> None:
        """Make the records beside where they will be, and put them there, unless another process has been quicker.

        Args:
            make: makes the arrays, once there is a sign of whose they are.
        """
        made = self.folder.with_name(f"{self.folder.name}.{self.run}")
        made.parent.mkdir(parents=True, exist_ok=True)
        made.mkdir()
        parts = made / self._parts.name
        try:
            for each in (parts, parts / DONE, parts / FAILED):
                each.mkdir()
            make_free(parts)
            make()
            write_safely(made / RUN, json.dumps({"run": self.run, **self.told}))
            made.rename(self.folder)
        except Exception:
            # Unless another process has been quicker, or has ended meanwhile and removed what was of no more use.
            if made.exists() and not self.folder.exists():
                raise

    @property
    def _parts(self) -> Path:
        return self.folder / f"{self.run}.parts"

    @property
    def publishing(self) -> Path:
        """Where all is once all parts are done."""
        return self.folder / f"{self.run}.publishing"

    @property
    def state(self) -> PartsState:
        """How far the run is."""
        # In the order in which they come, so that a change in between is seen as one or the other.
        if _is_there(self._parts):
            return PartsState.OPEN
        return PartsState.PUBLISHING if _is_there(self.publishing) else PartsState.ENDED

    @property
    def work(self) -> Path:
        """Room for what is being computed. It has another path once all parts are done, so that what comes late has none."""
        return self._parts

    def done(self, total: int) -> set[int]:
        """Give the numbers of the parts that are done, of so many."""
        numbers = _numbers_in(self._parts / DONE)
        return numbers if self.state is PartsState.OPEN else set(range(total))

    def is_done(self, number: int) -> bool:
        """Whether a part is done."""
        return _is_there(self._parts / DONE / f"{number}.json") or self.state is not PartsState.OPEN

    def failed(self) -> dict[int, str]:
        """Give the tracebacks of the parts that failed, by their numbers."""
        folder = self._parts / FAILED
        return {number: _traceback_in(folder / f"{number}.json") for number in sorted(_numbers_in(folder))}

    def forget_failure(self, number: int) -> None:
        """A part is to be tried again."""
        (self._parts / FAILED / f"{number}.json").unlink(missing_ok=True)

    def put_done(self, number: int, told: Json) -> None:
        """Record that a part is done; nothing is recorded where all are.

        Raises:
            SaveError: if it cannot be recorded.
        """
        try:
            self._put(self._parts / DONE / f"{number}.json", told)
            self.forget_failure(number)
        except SaveError:
            if self.state is PartsState.OPEN:
                raise

    def put_failed(self, number: int, told: Json) -> None:
        """Record that a part failed, if that can be recorded."""
        with contextlib.suppress(OSError, SaveError):
            self._put(self._parts / FAILED / f"{number}.json", told)

    def _put(self, path: Path, told: Json) -> None:
        # As a whole, whoever else writes it at the same time.
        write_safely(path, json.dumps(told), f".{secrets.token_hex(4)}")

    def begin_publishing(self) -> None:
        """All parts are done."""
        with contextlib.suppress(FileNotFoundError):  # another process has been quicker
            self._parts.rename(self.publishing)

    def others_that_began(self, before: float) -> list[str]:
        """Give the names of other runs whose records were never whole, or no longer are: of a process that was killed meanwhile.

        Args:
            before: those of which something is newer than that are not counted.
        """
        found = []
        for path in self.folder.parent.glob(f"{glob.escape(self.folder.name)}.{'[0-9a-f]' * 16}"):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < before:
                    found.append(path.suffix[1:])
        return found

    def forget_other(self, run: str) -> None:
        """Remove what is left of such a run."""
        shutil.rmtree(self.folder.with_name(f"{self.folder.name}.{run}"), ignore_errors=True)

    def end(self) -> None:
        """Remove the records; until the last step, whoever finds them can take up what was begun with them."""
        for path in self.publishing.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
        gone = self.folder.with_name(f"{self.folder.name}.{self.run}")
        with contextlib.suppress(FileNotFoundError):
            self.folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def status(self) -> "ShardStatus":
        """Say how far it is."""
        boxes, began = ShardGrid(self.told["shape"], self.told["shard_size"]), self.told["began"]
        folder = self._parts if self.state is PartsState.OPEN else self.publishing
        took, last = 0.0, began
        for number in _numbers_in(folder / DONE):
            path = folder / DONE / f"{number}.json"
            with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
                took += float(json.loads(path.read_text())["seconds"])
                last = max(last, path.stat().st_mtime)
        failed = self.failed()
        done = self.done(len(boxes))  # last, since it is all of them as soon as all are done
        failed = {number: text for number, text in failed.items() if number not in done}
        is_published = self.state is not PartsState.OPEN
        return ShardStatus(len(boxes), len(done), failed, is_published, last - began, took, boxes, frozenset(done))


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
    records = PartsRecords.found(records_of(target))
    if records is None:
        return None
    if records.state is PartsState.ENDED:
        again = PartsRecords.found(records_of(target))
        if again is None or again.run != records.run:
            return None
        raise RecordError(f"{records.folder} is not whole: remove it, and begin again")
    return records.status()


def is_being_published(target: Path) -> bool:
    """Whether a prediction in parts is being put under its name, or was until an interruption."""
    return any(records_of(target).glob("*.publishing"))


def targets_of_records(folder: Path) -> list[Path]:
    """Give the results that records are of; none if they are damaged, or no records."""
    if folder.suffix != RECORDS:
        return []
    try:
        records = PartsRecords.found(folder)
        named = {} if records is None else records.told["fingerprint"]["targets"]
        return [folder.with_name(Path(name).name) for name in named.values()]
    except (RecordError, LookupError, TypeError, AttributeError):
        return []


def forget_failures(target: Path) -> int:
    """Forget which parts of a prediction failed, and say how many they were: the next process tries them again.

    Raises:
        RecordError: if the records are damaged.
    """
    records = PartsRecords.found(records_of(target))
    numbers = {} if records is None else records.failed()
    for number in numbers:
        assert records is not None
        records.forget_failure(number)
    return len(numbers)


def _numbers_in(folder: Path) -> set[int]:
    """Give the numbers of the parts that have a record in a folder; none where there is no folder."""
    with if_there():
        return {int(path.stem) for path in folder.iterdir() if path.suffix == ".json" and path.stem.isdecimal()}
    return set()


def _is_there(path: Path) -> bool:
    with if_there():
        return path.exists()
    return False


def _traceback_in(path: Path) -> str:
    """Give what a record of a failure tells; it may have been cut off by the failure itself."""
    try:
        return str(json.loads(path.read_text())["traceback"])
    except (OSError, ValueError, LookupError, TypeError):
        return "(its record is damaged)"
