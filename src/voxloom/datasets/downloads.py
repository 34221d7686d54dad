"""Data sets that are downloaded on first use, into a cache that holds each of them whole or not at all."""

import hashlib
import json
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import DownloadError, ImageFileError, MissingDependencyError
from ..io.writing.saving import atomic_write

__all__ = ["SOURCES", "Source", "cached_archive"]

TRIES = 3


@dataclass(frozen=True)
class Source:
    """Where an archive is, and what must be in it."""

    url: str
    files: tuple[str, ...]
    """Names of the files that are kept, whatever folder of the archive they are in."""
    shape: tuple[int, int, int]
    """Voxels of every image."""


COLIN = "http://packages.bic.mni.mcgill.ca/mni-models/colin27/"
SOURCES = {
    "colin27-1998": Source(
        COLIN + "mni_colin27_1998_nifti.zip",
        ("colin27_t1_tal_lin.nii", "colin27_t1_tal_lin_headmask.nii", "colin27_t1_tal_lin_mask.nii"),
        (181, 217, 181),
    ),
    "colin27-2008": Source(
        COLIN + "mni_colin27_2008_nifti.zip",
        tuple(f"colin27_{name}_tal_hires.nii" for name in ("t1", "t2", "pd", "cls")),
        (362, 434, 362),
    ),
}


def cached_archive(name: str, finish: Callable[[Path], None]) -> Path:
    """Give the folder of a data set, downloaded and unpacked if that has not been done.

    The cache is in the user's cache folder, or where the environment variable `VOXLOOM_CACHE` says.

    Args:
        name: of an entry of `SOURCES`.
        finish: is given the unpacked folder before it is put in place, to check and complete it.

    Raises:
        DownloadError: if it cannot be had, or is not what it was when it was first downloaded. The cache is left as it was.
        MissingDependencyError: if pooch is not installed.
    """
    source = SOURCES[name]
    pooch = _pooch()
    cache = Path(os.environ.get("VOXLOOM_CACHE") or pooch.os_cache("voxloom"))
    folder = cache / name
    if folder.is_dir():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=cache) as unfinished:
            archive = _download(pooch, source, Path(unfinished), _recorded(cache).get(source.url))
            unpacked = Path(unfinished) / "unpacked"
            unpacked.mkdir()
            _unpack(archive, source, unpacked)
            finish(unpacked)
            _record(cache, source.url, hashlib.sha256(archive.read_bytes()).hexdigest())
            if not folder.is_dir():  # otherwise another process was quicker
                _put(unpacked, folder)
    except OSError as error:
        if isinstance(error, DownloadError):
            raise
        if isinstance(error, ImageFileError):
            raise DownloadError(f"{source.url} holds a file that cannot be read: {error}") from error
        raise DownloadError(f"{name} cannot be put into {cache}: {error}; set VOXLOOM_CACHE to another folder") from error
    return folder


def _pooch() -> Any:
    try:
        import pooch
    except ImportError as error:
        raise MissingDependencyError("downloads need pooch: pip install 'voxloom[datasets]'") from error
    return pooch


def _download(pooch: Any, source: Source, folder: Path, known_hash: str | None) -> Path:
    """Download an archive, trying again when it fails, and compare it with what was recorded the first time."""
    name = PurePosixPath(source.url).name
    registry, urls = {name: known_hash and f"sha256:{known_hash}"}, {name: source.url}
    store = pooch.create(path=folder, base_url="", registry=registry, urls=urls, retry_if_failed=TRIES - 1)
    try:
        return Path(store.fetch(name, progressbar=True))
    except ValueError as error:
        raise DownloadError(
            f"{source.url} is not the file that it was when it was first downloaded ({error}): if the change is known to be good,"
            " remove its line from hashes.json in the cache"
        ) from error
    except OSError as error:  # which those of requests are
        raise DownloadError(f"{source.url} cannot be downloaded, after {TRIES} tries: {error}") from error


def _unpack(archive: Path, source: Source, folder: Path) -> None:
    """Unpack the files that are wanted, by their last name alone, so that none can be written elsewhere."""
    try:
        with zipfile.ZipFile(archive) as content:
            members = {PurePosixPath(member.filename).name: member for member in content.infolist() if not member.is_dir()}
            for name in source.files:
                if name not in members:
                    raise DownloadError(f"{source.url} holds no {name}, only {', '.join(sorted(members))}")
                with content.open(members[name]) as packed, (folder / name).open("wb") as target:
                    shutil.copyfileobj(packed, target)
    except (zipfile.BadZipFile, EOFError, zlib.error, NotImplementedError, RuntimeError) as error:
        if isinstance(error, DownloadError):
            raise
        raise DownloadError(f"{source.url} is no archive that can be unpacked: {error}") from error


def _put(unpacked: Path, folder: Path) -> None:
    try:
        unpacked.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def _recorded(cache: Path) -> dict[str, str]:
    path = cache / "hashes.json"
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise DownloadError(f"{path} is damaged ({error}): remove it") from error


def _record(cache: Path, url: str, digest: str) -> None:
    """Keep the hash of the first download: nobody has published one."""
    known = _recorded(cache)
    if url not in known:
        text = json.dumps(known | {url: digest}, indent=1)
        atomic_write(cache / "hashes.json", lambda target: _write(target, text), ".json")


def _write(path: Path, text: str) -> None:
    path.write_text(text)
