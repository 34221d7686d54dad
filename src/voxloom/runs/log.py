"""The log of a run: what it is, and how far it has come, in one file beside the first of its results.

Its first line says what the run is; each line after that is a slab that all results have on the disk, and the last one that all
is whole and only need be published. A line counts when it has its end.
"""

import contextlib
import errno
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from ..errors import RecordError, SaveError
from ..io.fingerprints import differences
from ..io.formats import stem_of
from ..io.protocols import Json, VolumeStore
from ..io.writing.saving import as_save_error, write_safely
from ..io.writing.words import BEGIN_AGAIN

__all__ = ["RunLog", "is_to_be_published", "left_behind", "progress_of", "remove_leftovers", "targets_of_log"]

LOG = ".voxloom"
WHOLE = "whole"
# How long a lock is tried for: one that is just being removed is as good as free.
LOCK_SECONDS = 0.3
# What a file system answers that has no locks.
REFUSALS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def _log_of(target: Path) -> Path:
    return target.with_name(f".{stem_of(target)}{LOG}")


def _lock_of(target: Path) -> Path:
    return target.with_name(f".{stem_of(target)}.lock")


def left_behind(target: Path) -> Path | None:
    """Find the log of a run for a target that was interrupted."""
    log = _log_of(target)
    return log if log.exists() else None


def progress_of(target: Path) -> tuple[int, int] | None:
    """Say of an unfinished run for a target how many slabs are finished, and of how many; None where there is none.

    Raises:
        RecordError: if its log is damaged.
    """
    path = _log_of(target)
    lines = _lines_of(path)
    if not lines:
        return None
    try:
        total = int(json.loads(lines[0])["plan"]["slabs"])
    except (ValueError, LookupError, TypeError) as error:
        raise RecordError(f"{path} is damaged: {BEGIN_AGAIN}") from error
    return min(len(lines) - 1, total), total


def targets_of_log(path: Path) -> list[Path]:
    """Give the results that the log of a run is of; none if it is damaged, or no log."""
    if path.suffix != LOG:
        return []
    try:
        return [path.with_name(Path(name).name) for name in json.loads(_lines_of(path)[0])["targets"].values()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return []


def is_to_be_published(target: Path) -> bool:
    """Whether a run for a target was interrupted while it was published."""
    lines = _lines_of(_log_of(target))
    return len(lines) > 1 and WHOLE in lines[-1]


def remove_leftovers(target: Path) -> None:
    """Remove the lock of a process that was killed when its run had ended."""
    path = _lock_of(target)
    if path.exists() and left_behind(target) is None:
        lock = FileLock(path, timeout=0)
        with contextlib.suppress(Timeout, OSError):
            lock.acquire()
            _release(lock)


class RunLog:
    """What is recorded of one run, and the locks by which no other process writes the same results.

    Args:
        stores: the results, by name; those that have a path.

    Raises:
        RecordError: if another process is at one of them.
        SaveError: if two have one path.
    """

    def __init__(self, stores: Mapping[str | None, VolumeStore]) -> None:
        paths = {str(name): store.path.resolve() for name, store in stores.items() if store.path is not None}
        self.stores = dict(stores)
        self.targets = {name: str(path) for name, path in paths.items()}
        self.path, *self._others = (_log_of(path) for path in paths.values())
        self.run = secrets.token_hex(8)
        self.num_done = 0
        """Slabs that are finished, counted over all blocks."""
        self.is_whole = False
        """Whether everything is there, and need only be published."""
        self.is_recorded = True
        """Whether the run is written down; not if some of its results could not be resumed."""
        self.locks: list[BaseFileLock] = []
        if len({_log_of(path) for path in paths.values()}) < len(paths):
            raise SaveError(
                f"two results are to be written to the same file, or have one stem: {', '.join(self.targets.values())}"
            )
        try:
            for path in sorted(paths.values()):
                self.locks.append(_locked(path))
        except BaseException:
            self.close()
            raise

    def resume(self, fingerprint: Json) -> Json | None:
        """Look for a run that was interrupted.

        Args:
            fingerprint: what tells this run from others.

        Returns:
            Its plan, or None where there is no such run.

        Raises:
            RecordError: if the unfinished run is another one; says in what.
        """
        for other in self._others:
            if other.exists():
                raise RecordError(
                    f"{other} is of an unfinished run of which the first result is another one: go on with that one, or"
                    f" {BEGIN_AGAIN}"
                )
        if not self.path.exists():
            return None
        try:
            first, *rest = [json.loads(line) for line in _lines_of(self.path)]
            recorded, plan = {"targets": first["targets"]} | first["fingerprint"], first["plan"]
            self.run = str(first["run"])
            self.is_whole = bool(rest) and rest[-1] == {WHOLE: True}
            self.num_done = len(rest) - self.is_whole
            if rest[: self.num_done] != list(range(self.num_done)) or not self.run.isalnum():
                raise ValueError
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise RecordError(f"{self.path} is damaged: {BEGIN_AGAIN}") from error
        now = {"targets": self.targets} | fingerprint
        if what := differences(recorded, now):
            raise RecordError(
                f"{self.path} is of an unfinished run of something else: {'; '.join(what)}. Go on with what it was begun with,"
                f" give another output, or {BEGIN_AGAIN}"
            )
        if None in now["models"]:
            raise RecordError(
                f"{self.path} is of an unfinished run of a model that is a function, which may have been another one: give"
                f" model_name, or {BEGIN_AGAIN}"
            )
        return plan

    def forget(self) -> None:
        """Remove what an unfinished run has left, so that another one can begin."""
        for path in (self.path, *self._others):
            with contextlib.suppress(IndexError, ValueError, LookupError, TypeError, RecursionError):
                run = str(json.loads(_lines_of(path)[0])["run"])
                for store in self.stores.values() if run.isalnum() else ():
                    store.discard(run)
            path.unlink(missing_ok=True)

    def begin(self, fingerprint: Json, plan: Json) -> None:
        """Record a run, before anything is made for its results; or, if it has begun already, leave out a line without an end."""
        if not self.is_recorded:
            return
        if self.num_done or self.is_whole:
            lines = _lines_of(self.path)
        else:
            lines = [json.dumps({"run": self.run, "targets": self.targets, "fingerprint": fingerprint, "plan": plan})]
        write_safely(self.path, "".join(f"{line}\n" for line in lines))

    def slab_finished(self) -> None:
        """Record that all results have a slab more, once it is on the disk."""
        if not self.is_recorded:
            return
        for store in self.stores.values():
            store.flush()
        self._add(self.num_done)
        self.num_done += 1

    def all_written(self) -> None:
        """Record that all results are whole, and on the disk."""
        if not self.is_recorded:
            return
        self._add({WHOLE: True})
        self.is_whole = True

    def _add(self, line: Json) -> None:
        try:
            with self.path.open("a") as file:
                file.write(f"{json.dumps(line)}\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise as_save_error(self.path, error) from error

    def end(self) -> None:
        """Remove the log, once all is published, or nothing is to be kept."""
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let others at the results."""
        for lock in self.locks:
            _release(lock)
        self.locks = []


def _lines_of(path: Path) -> Sequence[str]:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").split("\n")[:-1]
    except FileNotFoundError:
        return []


def _locked(target: Path) -> BaseFileLock:
    path = _lock_of(target)
    try:
        try:
            return _acquired(FileLock(path, timeout=LOCK_SECONDS))
        except OSError as error:
            if isinstance(error, Timeout) or error.errno not in REFUSALS:
                raise
            # Some file systems of clusters refuse locks. Then the file itself is the lock, which a process that is killed leaves.
            with contextlib.suppress(FileNotFoundError):
                if not path.stat().st_size:
                    path.unlink()  # of the attempt
            return _acquired(SoftFileLock(path, timeout=LOCK_SECONDS))
    except Timeout:
        raise RecordError(
            f"another process is writing {target}: wait for it, or choose another name. If there is none, remove {path}"
        ) from None
    except OSError as error:
        raise as_save_error(target, error) from error


def _acquired(lock: BaseFileLock) -> BaseFileLock:
    lock.acquire()
    return lock


def _release(lock: BaseFileLock) -> None:
    """Remove the file of a lock, and let go of it: whoever has opened it meanwhile finds out, and makes another."""
    path = Path(lock.lock_file)
    if os.name == "posix":
        path.unlink(missing_ok=True)
        lock.release(force=True)
    else:  # what is open cannot be removed
        lock.release(force=True)
        with contextlib.suppress(OSError):
            path.unlink()
