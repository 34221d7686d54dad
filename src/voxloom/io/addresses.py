"""Images that are named by more than a path: a URL, a data set in an HDF5 file, an array in a zip file of Zarr."""

import re
from pathlib import Path
from typing import Any

from .arrays.hdf5 import Hdf5Source
from .protocols import VolumeSource
from .zarr.source import ZarrSource
from .zarr.storage import is_url

__all__ = ["source_at"]

HDF5 = re.compile(r"(.+\.(?:h5|hdf5|hdf|nwb|he5)):(/?.+)", re.IGNORECASE)


def source_at(address: Any) -> VolumeSource | None:
    """Open what an address names; None if it is a plain path, or no address at all.

    Args:
        address: `https://host/scan.ome.zarr` or another URL, `scan.h5:/data`, or `scan.zarr.zip/0`.

    Raises:
        ImageFileError: if there is nothing that can be read; see `voxloom.errors`.
    """
    text = str(address) if isinstance(address, str | Path) else ""
    if is_url(text):
        return ZarrSource(text)
    found = HDF5.fullmatch(text)
    if found is not None and not Path(text).exists():
        return Hdf5Source(Path(found[1]).expanduser(), found[2])
    if any(part.lower().endswith((".zip", ".ozx")) for part in Path(text).parts[:-1]) and any(
        map(Path.is_file, Path(text).parents)
    ):
        return ZarrSource(Path(text).expanduser())
    return None
