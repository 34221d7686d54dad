"""Putting a folder in another's place: what was there is whole until the new one is in place, whenever a process is killed."""

import contextlib
import shutil
from pathlib import Path

__all__ = ["forget_old", "replace_folder", "restore_old"]


def replace_folder(whole: Path, target: Path, old: Path) -> None:
    """Put a folder under a name; what is there has another one meanwhile, and is to be forgotten then.

    Args:
        whole: the folder.
        target: its name.
        old: the other name; a folder of that name is always whole.
    """
    if target.exists():
        forget_old(old)
        target.rename(old)
    try:
        whole.rename(target)
    except BaseException:
        restore_old(old, target)
        raise


def restore_old(old: Path, target: Path) -> None:
    """After an interruption, put back what was there if nothing has taken its place; forget it otherwise."""
    if old.exists() and not target.exists():
        old.rename(target)
    forget_old(old)


def forget_old(old: Path) -> None:
    """Remove a folder, which has a third name from then on, by which nobody takes it for whole."""
    gone = old.with_name(f"{old.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        old.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)
