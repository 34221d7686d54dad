"""What all sources of files have in common."""

import contextlib
import errno
import hashlib
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.boxes import Box
from ..core.geometry.affines import Affine
from ..errors import CorruptImageError, ImageFileError, ImageNotFoundError
from .arrays.memory import hash_of
from .protocols import Json, SpaceCodes, VolumeSource, VolumeSpec

__all__ = [
    "FOLDER_SIDECAR",
    "FileSource",
    "changed",
    "explained",
    "files_in",
    "fingerprint_of_files",
    "hash_of_path",
    "if_there",
    "sidecar_in",
    "size_of_path",
    "state_of_files",
    "states_of",
]

# How a result that is a folder was made is said in a file of this name in it.
FOLDER_SIDECAR = "voxloom.json"
# So many files, and places in each, are looked into to tell files apart, and so many bytes of each place.
MOST_SAMPLED, SAMPLE_BYTES = 8, 4096


class FileSource(ABC):
    """The part of `VolumeSource` that follows from a header: readers of formats add `read`."""

    spec: VolumeSpec
    """What the header says."""
    is_sliceable: bool
    """Whether a box can be read without the whole."""
    paths: tuple[Path, ...]
    name: str
    """What messages call it."""
    is_of_many = False
    """Whether the file holds other things, which may be written while this is read."""
    _states: tuple[tuple[int, ...] | None, ...] = ()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._states:
            self.remember()  # another machine may have files of its own

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """See `VolumeSource`."""
        return self.spec.shape

    @property
    def dtype(self) -> torch.dtype:
        """See `VolumeSource`."""
        return self.spec.dtype

    @property
    def affine(self) -> Affine:
        """See `VolumeSource`."""
        return self.spec.affine

    @property
    def codes(self) -> SpaceCodes:
        """See `VolumeSource`."""
        return self.spec.codes

    @property
    def chunks(self) -> tuple[int, int, int]:
        """Planes of the last axis: files have their first axis fastest."""
        return (*self.shape[1:3], 1)

    @property
    def resident_bytes(self) -> int:
        """See `VolumeSource`."""
        return 0 if self.is_sliceable else self.spec.num_bytes

    @property
    def loading_bytes(self) -> int:
        """See the function `loading_bytes`: the file's own bytes, and what is decoded, before it is a tensor."""
        return self.resident_bytes + sum(path.stat().st_size for path in self.paths) if self.resident_bytes else 0

    @property
    def watched(self) -> Sequence[Path]:
        """Files and folders that must stay as they are."""
        return self.paths

    def remember(self) -> None:
        """Note the state of the files, now that the header has been read."""
        self._states = states_of(self.watched, not self.is_of_many)

    def check_unchanged(self) -> None:
        """Refuse to read voxels of one file by the header of another, or some of one and some of the other.

        Raises:
            ImageFileError: if the files are no longer those of which the header was read.
        """
        states = states_of(self.watched, not self.is_of_many)
        if states == self._states:
            return
        for path in self.paths:
            try:
                path.stat()
            except OSError as error:
                raise explained(error, self.name, "cannot be read") from error
        raise changed(self.name)

    @abstractmethod
    def read(self, box: Box) -> Tensor:
        """See `VolumeSource`."""

    def fingerprint(self) -> Json:
        """See `VolumeSource`."""
        return fingerprint_of_files(self)


def states_of(paths: Sequence[Path], with_contents: bool = True) -> tuple[tuple[int, ...] | None, ...]:
    """Say what changes with files; of folders only whether they are replaced, and None for what is not there.

    Args:
        paths: the files and folders.
        with_contents: whether files that are written to are others.
    """
    return tuple(_state_of(path, with_contents) for path in paths)


def _state_of(path: Path, with_contents: bool) -> tuple[int, ...] | None:
    try:
        state = path.stat()
    except OSError:
        return None
    is_whole = with_contents and not stat.S_ISDIR(state.st_mode)
    return (state.st_ino, state.st_size, state.st_mtime_ns) if is_whole else (state.st_ino,)


def changed(name: str) -> ImageFileError:
    """Say that files are others than they were."""
    return ImageFileError(f"{name} has been changed since its header was read: make the image anew")


def fingerprint_of_files(source: VolumeSource) -> Json:
    """Know a source by the names, sizes and times of its files, by samples of what is in them, and by its header."""
    header: list[Any] = [repr(source.shape), repr(source.dtype), source.affine.tobytes(), repr(source.codes)]
    return {**state_of_files(files_in(source.paths)), "header_sha256": hash_of(header)}


def state_of_files(files: Sequence[Path]) -> dict[str, Json]:
    """Say what tells files from others that have their size and time: those that were unpacked together may have the same."""
    states, names = [path.stat() for path in files], [path.name for path in files]
    return {
        "bytes": sum(state.st_size for state in states),
        "modified_ns": max((state.st_mtime_ns for state in states), default=0),
        "names": names if len(names) <= MOST_SAMPLED else hash_of(os.fsencode(f"{name}\n") for name in names),
        "samples_sha256": hash_of(_samples_of(files)),
    }


def _samples_of(files: Sequence[Path]) -> Iterator[bytes]:
    """Give some of what is in files: of some of them, where they are many, and of each in some places."""
    for path in files[:: -(-len(files) // MOST_SAMPLED) or 1]:
        with path.open("rb", buffering=0) as file:
            step = max(SAMPLE_BYTES, path.stat().st_size // MOST_SAMPLED)
            for number in range(MOST_SAMPLED):
                file.seek(number * step)
                yield file.read(SAMPLE_BYTES)


def files_in(paths: tuple[Path, ...]) -> list[Path]:
    """Give files, and those in folders."""
    files: list[Path] = []
    for path in paths:
        files += sorted(part for part in path.iterdir() if part.is_file()) if path.is_dir() else [path]
    return list(dict.fromkeys(files))


@contextlib.contextmanager
def if_there() -> Iterator[None]:
    """Pass over what another process has removed or renamed meanwhile, which network file systems say in a way of their own."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESTALE):
            raise


def sidecar_in(folder: Path) -> Path:
    """Name the file in a result's own folder that says how it was made: in that of its finest level, if it has levels.

    zarr-python would warn of a file that is no member beside members.
    """
    level = folder / "0"
    return (level if level.is_dir() else folder) / FOLDER_SIDECAR


def size_of_path(path: Path) -> int:
    """Bytes of a file, or of all files in a folder and below it."""
    return sum(each.stat().st_size for each in _parts_of(path))


def hash_of_path(path: Path) -> str:
    """Hash all that is in a file, or in a folder: the names and contents of the files in it (SHA-256)."""
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return hash_of(f"{each.relative_to(path).as_posix()} {hash_of_path(each)}\n" for each in _parts_of(path))


def _parts_of(path: Path) -> list[Path]:
    """Give the files that a result consists of: not what is said of it in its own folder."""
    if not path.is_dir():
        return [path]
    return sorted(each for each in path.rglob("*") if each.is_file() and each != sidecar_in(path))


def explained(error: Exception, name: str, what: str, way_out: str = "copy or download it again") -> ImageFileError:
    """Tell a file that the system would not read from one that is damaged."""
    if isinstance(error, FileNotFoundError):
        return ImageNotFoundError(f"{name} {what}: there is no file {error.filename or name}")
    if isinstance(error, OSError) and error.errno is not None:
        return ImageFileError(f"{name} {what}: {error.strerror}")
    return CorruptImageError(f"{name} {what}: {_text(error)}. It is damaged or truncated: {way_out}")


def _text(error: Exception) -> str:
    return type(error).__name__ if str(error) in ("", "None") else str(error)
