"""Writing files so that a crash leaves the old file or the new one."""

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from ...errors import SaveError, TargetExistsError, VoxloomError
from ...runtime.marks import left_by_dead, new_mark
from .words import OVERWRITE

__all__ = [
    "appeared",
    "as_save_error",
    "atomic_write",
    "bring_to_disk",
    "put",
    "put_new",
    "remove_unfinished",
    "reserve",
    "saving",
    "write_safely",
]

# What a file system answers that cannot reserve room.
NOT_OFFERED = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


def atomic_write(path: Path, write: Callable[[Path], None], ending: str, overwrite: bool = True) -> None:
    """Let `write` make a new file beside the target, bring it to the disk, and only then put it in the target's place.

    Args:
        path: the target; it keeps its old content unless everything goes well. A link goes on pointing where it points.
        write: writes to the path that it is given.
        ending: how the name of that path ends, for writers that go by it.
        overwrite: whether what is there by then may be replaced.

    Raises:
        TargetExistsError: if something is there, and may not be replaced.
        SaveError: if anything could not be written. The unfinished file is removed.
    """
    try:
        if path.is_dir():
            raise SaveError(f"{path} is a folder: give the name of a file in it")
        if not path.parent.is_dir():
            raise SaveError(f"{path} cannot be written: there is no folder {path.parent}; make it first")
        target = path.resolve()
        if target.exists() and not os.access(target, os.W_OK):
            raise SaveError(f"{path} is write-protected: save under another name, or make it writable")
        remove_unfinished(target, ending)
        unfinished = target.parent / f".{target.name[:40]}.{new_mark()}.unfinished{ending}"
        try:
            write(unfinished)
            with unfinished.open("rb+") as file:
                os.fsync(file.fileno())
            if not overwrite:
                if not put_new(unfinished, target):
                    raise appeared(target)
                return
            if target.exists():
                unfinished.chmod(target.stat().st_mode & 0o777)
            unfinished.replace(target)
        finally:
            unfinished.unlink(missing_ok=True)
    except VoxloomError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        raise as_save_error(path, error) from error


def remove_unfinished(target: Path, ending: str) -> None:
    """Remove what killed processes have left beside a target; see `atomic_write`."""
    for _, left in left_by_dead(target.parent, f".{target.name[:40]}.", re.escape(f".unfinished{ending}")):
        with contextlib.suppress(OSError):  # it may be another user's
            left.unlink()


def put_new(source: Path, target: Path) -> bool:
    """Put a file under a name, unless something else has it: then it stays where it is, and False is given."""
    try:
        os.link(source, target)  # unlike a renaming, this replaces nothing
    except OSError:  # something is there, or the file system has no links
        if os.path.lexists(target):
            if not (target.exists() and target.samefile(source)):  # as after an interruption
                return False
        else:
            source.replace(target)
    source.unlink(missing_ok=True)
    return True


def put(source: Path, target: Path, overwrite: bool) -> None:
    """Put a file under its name; what is there is only replaced if it may be."""
    if not source.exists():  # that was done before an interruption
        return
    if not overwrite:
        if put_new(source, target):
            return
        raise TargetExistsError(
            f"{target} has appeared while its result was made, and is kept. The result is in {source.name}: the same call"
            f" with {OVERWRITE} puts it there, and so does this one once the file is gone"
        )
    if target.exists():
        source.chmod(target.stat().st_mode & 0o777)
    source.replace(target)
    source.unlink(missing_ok=True)  # renaming does nothing where both are the same file


def appeared(path: Path, way: str = f"give {OVERWRITE}") -> TargetExistsError:
    """Say that something is there by now which was not when the writing began."""
    return TargetExistsError(f"{path} has appeared while it was written, and is kept: remove it, choose another name, or {way}")


def write_safely(path: Path, text: str, mark: str = "") -> None:
    """Write a small file such that it is there as a whole, and on the disk, or as it was.

    Args:
        path: the file.
        text: what it holds.
        mark: tells this writer from others, where several processes may write the file at once.
    """
    unfinished = path.with_name(f"{path.name}{mark}.unfinished")
    with saving(path):
        with unfinished.open("w", encoding="utf-8", errors="surrogateescape") as file:  # names of files may be of any bytes
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)


@contextlib.contextmanager
def saving(path: Path) -> Iterator[None]:
    """Let an error of the system say which target could not be written."""
    try:
        yield
    except VoxloomError:
        raise
    except OSError as error:
        raise as_save_error(path, error) from error


def bring_to_disk(path: Path) -> None:
    """Bring what was written to a file to where a power failure does not reach it."""
    file = os.open(path, os.O_RDWR)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def reserve(file: int, num_bytes: int) -> None:
    """Take the room that an open file will need, so that a full disk shows before anything is computed.

    Where a file is mapped it must show here: a full disk would end the process that writes to it.
    """
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file, 0, num_bytes)
            return
        except OSError as error:
            if error.errno not in NOT_OFFERED:
                raise
    os.ftruncate(file, num_bytes)


def as_save_error(path: Path, error: Exception) -> SaveError:
    """Say in one line what went wrong."""
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error).strip().rpartition("\n")[2]
    return SaveError(f"{path} could not be written, and was left as it was: {reason}")
