"""Compressed files that are too large for memory: unpacked once, to temporary files that can be read in parts."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..errors import SaveError
from ..sampling.padded import Voxels
from ..volumes.formats import READ_ERRORS, as_save_error, open_compressed
from ..volumes.image import Image

__all__ = ["can_be_spooled", "paths_of", "spooled"]

# Endings of compressed files, and of what is in them.
UNPACKED = {".nii.gz": ".nii", ".nii.bz2": ".nii", ".mgz": ".mgh"}
CHUNK_BYTES = 2**22


def can_be_spooled(volume: Voxels) -> bool:
    """Whether an image is of compressed files that need only be unpacked to be read in parts."""
    return (
        isinstance(volume, Image) and not volume.can_be_sliced and all(_ending_of(path) is not None for path in paths_of(volume))
    )


def paths_of(image: Image) -> list[Path]:
    """Files that an image is read from."""
    return image.path if isinstance(image.path, list) else [image.path] if image.path else []


def _ending_of(path: Path) -> str | None:
    return next((ending for ending in UNPACKED if path.name.lower().endswith(ending)), None)


@contextlib.contextmanager
def spooled(volumes: dict[str, Voxels]) -> Iterator[dict[str, Voxels]]:
    """Unpack the images that can be; the temporary files are removed in the end.

    Raises:
        SaveError: if there is no room for them.
    """
    with tempfile.TemporaryDirectory(prefix="voxloom-", ignore_cleanup_errors=True) as folder:
        yield {
            name: _unpacked(volume, Path(folder), number) if isinstance(volume, Image) and can_be_spooled(volume) else volume
            for number, (name, volume) in enumerate(volumes.items())
        }


def _unpacked(image: Image, folder: Path, number: int) -> Image:
    paths = []
    for part, path in enumerate(paths_of(image)):
        ending = _ending_of(path)
        assert ending is not None
        paths.append(folder / f"image{number}_{part}{UNPACKED[ending]}")
        try:
            with open_compressed(path) as stream, paths[-1].open("wb") as file:
                shutil.copyfileobj(stream, file, CHUNK_BYTES)
        except READ_ERRORS as error:
            if not isinstance(error, OSError) or error.errno is None:
                image.load()  # which says what is wrong with the file
                raise
            raise SaveError(f"{as_save_error(paths[-1], error)}. Set TMPDIR to a folder with more room") from error
    return type(image)(paths if isinstance(image.path, list) else paths[0], affine=image.affine)
