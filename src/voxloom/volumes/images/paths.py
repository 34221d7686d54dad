"""Paths of images, as users write them."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...errors import ImageNotFoundError, SubjectError

__all__ = ["PathLike", "as_path", "is_path"]

PathLike = str | os.PathLike[str]


def as_path(path: Any, verify: bool) -> Path | list[Path]:
    """Make a path, or a list of paths, of what was given, and check that the files exist if asked to.

    Raises:
        SubjectError: if it is no path.
        ImageNotFoundError: if there is no such file.
    """
    if isinstance(path, Sequence) and not isinstance(path, str | bytes):
        if not path:
            raise SubjectError("an image was given an empty list of paths")
        return [_one_path(item, verify) for item in path]
    return _one_path(path, verify)


def is_path(thing: Any) -> bool:
    """Whether something is given as a path or several: what is neither an array nor an image."""
    return isinstance(thing, str | os.PathLike | Sequence)


def _one_path(path: Any, verify: bool) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise SubjectError(
            f"the path of an image is {path!r}, of type {type(path).__name__}: give a path, a tensor or an array; as_image makes"
            " one of an image of TorchIO or MONAI"
        )
    if not os.fspath(path):
        raise SubjectError("the path of an image is empty: give a path, a tensor or an array")
    try:
        result = Path(path).expanduser()
    except RuntimeError as error:
        raise ImageNotFoundError(f"there is no file {path}: {error}") from error
    if verify and not _exists(result):
        raise ImageNotFoundError(f"there is no file {result}" + ("" if result.is_absolute() else f" in {Path.cwd()}"))
    return result


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False  # a name that is too long, or that no file can have
