"""Where a Zarr hierarchy lies: in a folder, in a zip file, or at a URL. Values are asked for by their keys."""

import lzma
import os
import re
import threading
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from ...errors import CorruptImageError, ImageFileError, ImageNotFoundError, MissingDependencyError

# What the members of a zip file are that cannot be unpacked: another checksum, an end too early, an unknown way.
DAMAGE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, RuntimeError)

__all__ = ["FolderStorage", "Storage", "is_url", "storage_at", "zarr_python"]

URL = re.compile(r"([a-z][a-z0-9+.-]+::)*[a-z][a-z0-9+.-]+://", re.IGNORECASE)


class Storage(Protocol):
    """Reads values by their keys, from any process."""

    name: str
    """What messages call it."""
    path: Path | None
    """The folder or file, if it is on this machine."""

    def get(self, key: str, start: int | None = None, stop: int | None = None) -> bytes | None:
        """Give a value, or its bytes from `start` to `stop`, or its last `-start` bytes; None where there is no such key."""
        ...

    def store(self) -> Any:
        """Give a store of zarr-python, for the metadata."""
        ...


def zarr_python() -> Any:
    """Import zarr-python.

    Raises:
        MissingDependencyError: if it is not installed.
    """
    try:
        import zarr
        import zarr.storage
    except ImportError as error:
        raise MissingDependencyError("Zarr needs zarr-python: pip install 'voxloom[zarr]'") from error
    return zarr


def is_url(location: Any) -> bool:
    """Whether something is given as a URL, such as `https://…` or `s3://…`, or several of fsspec, `simplecache::https://…`."""
    return isinstance(location, str) and URL.match(location) is not None


def storage_at(location: str | Path, timeout: float) -> Storage:
    """Say how values are read that lie at a location.

    Args:
        location: a folder, a zip file or a URL.
        timeout: seconds after which a URL that does not answer is given up.
    """
    if is_url(location):
        return RemoteStorage(str(location), timeout)
    path = Path(location)
    return FolderStorage(path) if path.is_dir() else ZipStorage(path)


class FolderStorage:
    """A folder, each value in a file of its own."""

    def __init__(self, path: Path) -> None:
        self.path: Path | None = path
        self._path, self.name = path, str(path)

    def get(self, key: str, start: int | None = None, stop: int | None = None) -> bytes | None:
        """See `Storage`."""
        try:
            file = os.open(self._path / key, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            size = os.fstat(file).st_size
            first, last = _span(size, start, stop)
            os.lseek(file, first, os.SEEK_SET)
            return _all_of(lambda count: os.read(file, count), last - first)
        finally:
            os.close(file)

    def store(self) -> Any:
        """See `Storage`."""
        return zarr_python().storage.LocalStore(self._path, read_only=True)


class ZipStorage:
    """A zip file, opened anew by each process, since a position in an open file is shared by those that are forked."""

    def __init__(self, path: Path) -> None:
        self.path: Path | None = path
        self._path, self.name = path, str(path)
        self._opened: tuple[int, zipfile.ZipFile] | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._path,)

    def _file(self) -> zipfile.ZipFile:
        if self._opened is None or self._opened[0] != os.getpid():
            try:
                self._opened = (os.getpid(), zipfile.ZipFile(self._path))
            except FileNotFoundError as error:
                raise ImageNotFoundError(f"there is no file {self.name}") from error
            except (OSError, zipfile.BadZipFile) as error:
                raise ImageFileError(f"{self.name} is no zip file that can be read: {error}") from error
            self._lock = threading.Lock()
        return self._opened[1]

    def get(self, key: str, start: int | None = None, stop: int | None = None) -> bytes | None:
        """See `Storage`."""
        opened = self._file()
        with self._lock:
            try:
                info = opened.getinfo(key)
            except KeyError:
                return None
            first, last = _span(info.file_size, start, stop)
            try:
                with opened.open(info) as member:
                    member.seek(first)
                    return _all_of(member.read, last - first)
            except DAMAGE as error:
                raise CorruptImageError(
                    f"{key} in {self.name} cannot be unpacked: {error}. Copy or make the file again"
                ) from error

    def store(self) -> Any:
        """See `Storage`."""
        self._file()  # which says what is wrong with it
        return zarr_python().storage.ZipStore(self._path, mode="r")


class RemoteStorage:
    """What a URL leads to, by fsspec."""

    path: Path | None = None

    def __init__(self, url: str, timeout: float) -> None:
        self.name = url.rstrip("/")
        self._timeout = timeout
        self._opened: tuple[int, Any] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name, self._timeout)

    def store(self) -> Any:
        """See `Storage`."""
        if self._opened is None or self._opened[0] != os.getpid():
            zarr = zarr_python()
            try:
                store = zarr.storage.FsspecStore.from_url(self.name, read_only=True)
            except (ImportError, ValueError) as error:  # fsspec, or what it needs for this kind of URL
                raise MissingDependencyError(f"{self.name} cannot be opened: {error}. pip install 'voxloom[remote]'") from error
            from .patient_store import PatientStore

            self._opened = (os.getpid(), PatientStore(store, self.name, self._timeout))
        return self._opened[1]

    def get(self, key: str, start: int | None = None, stop: int | None = None) -> bytes | None:
        """See `Storage`."""
        from zarr.abc.store import RangeByteRequest, SuffixByteRequest
        from zarr.core.buffer import default_buffer_prototype
        from zarr.core.sync import sync

        wanted: Any = None
        if start is not None and start < 0:
            wanted = SuffixByteRequest(-start)
        elif start is not None and stop is not None:
            wanted = RangeByteRequest(start, stop)
        found = sync(self.store().get(key, default_buffer_prototype(), wanted))
        return None if found is None else found.to_bytes()


def _span(size: int, start: int | None, stop: int | None) -> tuple[int, int]:
    if start is None:
        return 0, size
    return (max(0, size + start), size) if start < 0 else (min(start, size), min(size if stop is None else stop, size))


def _all_of(read: Callable[[int], bytes], size: int) -> bytes:
    """Read until there are so many bytes, or no more."""
    part = read(size)
    if len(part) == size:
        return part
    parts = [part]
    size -= len(part)
    while size and part:
        part = read(size)
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
