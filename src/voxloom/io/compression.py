"""Files that are compressed as a whole: `.gz`, `.mgz` and `.bz2`."""

import bz2
import zlib
from pathlib import Path
from typing import IO, Any

from isal import igzip, igzip_lib

__all__ = ["GREATEST_GZIP_RATIO", "READ_ERRORS", "compressing", "is_compressed", "open_compressed"]

BY_GZIP = (".gz", ".mgz")
COMPRESSED = (*BY_GZIP, ".bz2")
GZIP_LEVEL = 1
# The most that gzip can have shrunk anything.
GREATEST_GZIP_RATIO = 1032
READ_ERRORS: tuple[Any, ...] = (OSError, EOFError, ValueError, zlib.error, igzip.BadGzipFile, igzip_lib.IsalError)


def is_compressed(path: Path) -> bool:
    """Whether a file must be unpacked before a part of it can be read, by its name."""
    return path.suffix.lower() in COMPRESSED


def open_compressed(path: Path) -> Any:
    """Open a file to read what it holds once it is unpacked; one that is not compressed is read as it is."""
    ending = path.suffix.lower()
    if ending in BY_GZIP:
        return igzip.open(path, "rb")
    return bz2.open(path, "rb") if ending in COMPRESSED else path.open("rb")


def compressing(file: IO[bytes]) -> Any:
    """Compress what is written into a file. Neither a time nor a name gets into it, so that equal images make equal files."""
    return igzip.IGzipFile(filename="", mode="wb", compresslevel=GZIP_LEVEL, fileobj=file, mtime=0)
