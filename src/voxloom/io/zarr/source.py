"""Volumes in Zarr as sources of voxels: OME-Zarr at some level, NIfTI-Zarr, and plain arrays."""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core.boxes import Box
from ...core.geometry.affines import as_affine
from ...errors import (
    ImageError,
    ImageFileError,
    ModeError,
    NoSuchIndexError,
    UnsupportedImageError,
    VoxloomError,
)
from ..arrays.memory import as_tensor, hash_of, torch_dtype
from ..files import FOLDER_SIDECAR, FileSource, state_of_files
from ..protocols import Json, VolumeSpec
from .chunks import ChunkedArray
from .hierarchy import OWN, find, is_zarr
from .ngff import SPATIAL, Multiscales
from .storage import zarr_python

__all__ = ["OWN", "ZarrSource", "is_label_of_image", "is_zarr", "more_than_image", "open_zarr"]

# Files that say what an array is, in either version.
HEADERS = ("zarr.json", ".zarray")
# Seconds after which a URL that does not answer is given up.
TIMEOUT = 30.0


def is_label_of_image(path: Path) -> bool:
    """Whether a path is that of a label image of an OME-Zarr image, such as `scan.ome.zarr/labels/organs`."""
    return path.parent.name == "labels" and is_zarr(path.parent.parent)


def more_than_image(path: Path) -> list[str]:
    """Name what a store holds beside an image: whatever is none of its levels, of its chunks or of what is said of it."""
    zarr = zarr_python()
    try:
        node = zarr.open(store=zarr.storage.LocalStore(path, read_only=True), mode="r")
        multiscales = Multiscales.of(dict(node.attrs), str(path))
    except (VoxloomError, OSError, ValueError, KeyError, TypeError):
        return ["what cannot be read"]
    levels = {"nifti"} if multiscales is None else {"nifti", *(level.path.partition("/")[0] for level in multiscales.levels)}
    own = re.compile(rf"zarr\.json|\.z[a-z]+|{re.escape(FOLDER_SIDECAR)}|{'' if isinstance(node, zarr.Group) else r'c|[0-9./]+'}")
    more = (each for each in path.iterdir() if each.name not in levels and not own.fullmatch(each.name))
    return sorted(each.name for each in more if not _is_empty(each))


def _is_empty(path: Path) -> bool:
    """Whether it is a folder in which nothing is, as that of labels which could not be written."""
    return path.is_dir() and not any(path.iterdir())


class ZarrSource(FileSource):
    """A volume in Zarr, of which only the chunks are read that a box touches; see `open_zarr`."""

    is_sliceable = True

    def __init__(
        self,
        location: str | Path,
        level: int = 0,
        spacing: float | tuple[float, ...] | None = None,
        time: int | None = None,
        channel: int | str | tuple[int | str, ...] | None = None,
        axes: str | None = None,
        affine: Any = None,
        missing: str = "fill",
        timeout: float = TIMEOUT,
    ) -> None:
        self._arguments = (location, level, spacing, time, channel, axes, affine, missing, timeout)
        if missing not in ("fill", "error"):
            raise ModeError(f"missing is {missing!r}: it must be 'fill' or 'error'")
        found = find(location, level, spacing, axes, timeout)
        if found.conflict and affine is None:
            raise UnsupportedImageError(found.conflict)
        self.name = str(location).rstrip("/")
        self.paths = () if found.storage.path is None else (found.storage.path,)
        self._headers = [path / found.path / name for path in self.paths if path.is_dir() for name in HEADERS]
        self._array_told = self._tell_array()
        self.remember()
        self._metadata = found.metadata
        self.multiscales = found.multiscales
        """What OME-Zarr says of the image; None for a plain array."""
        self.array = ChunkedArray(found.storage, found.path, found.array, missing)
        self._axes = found.axes
        self._told: dict[str, Json] | None = None  # its last fingerprint
        self._select(time, channel, found.channels)
        self.slope, self.intercept = found.scaling
        stored = torch_dtype(self.array.dtype, self.name)
        dtype = stored if found.scaling == (1, 0) or stored == torch.float64 else torch.float32
        place = found.affine if affine is None else as_affine(affine)
        self.spec = VolumeSpec(self._shape(), dtype, place, found.codes)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments  # another process opens it anew

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}: {self.shape}, {self.dtype})"

    @property
    def watched(self) -> Sequence[Path]:
        """See `FileSource`: the array's own metadata too, which are written anew with an array that takes its place."""
        return (*self.paths, *self._headers)

    def check_unchanged(self) -> None:
        """See `FileSource`. Attributes of an array may change, and another one of the same make may take its place."""
        try:
            super().check_unchanged()
        except ImageFileError:
            if self._array_told is None or self._array_told != self._tell_array():
                raise
            self.array.forget()  # chunks that were kept may be of another one
            self.remember()

    def _tell_array(self) -> Json:
        """Say what an array in a folder is, and which folder it is in; None where it is in none, or cannot be read."""
        try:
            told = [json.loads(path.read_text()) for path in self._headers if path.exists()]
            folders = [path.stat().st_ino for path in self.paths]
        except (OSError, ValueError):
            return None
        return [folders, [{name: value for name, value in each.items() if name != "attributes"} for each in told]]

    @property
    def stored_dtype(self) -> np.dtype:
        """Type of the elements of the array."""
        return self.array.dtype

    @property
    def version(self) -> str:
        """Version of OME-Zarr, or of Zarr for a plain array."""
        return self.array.zarr_format if self.multiscales is None else self.multiscales.version

    @property
    def chunks(self) -> tuple[int, int, int]:
        """See `VolumeSource`."""
        sizes = dict(zip((axis.name for axis in self._axes), self.array.chunks, strict=True))
        i, j, k = (min(sizes.get(name, 1), size) for name, size in zip(SPATIAL, self.spec.shape[1:], strict=True))
        return i, j, k

    @property
    def chunk_bytes(self) -> int:
        """See the function `chunk_bytes`."""
        counts = [-(-size // chunk) * chunk for size, chunk in zip(self.array.shape, self.array.chunks, strict=True)]
        return math.prod(counts) * self.array.dtype.itemsize

    @property
    def bytes_read(self) -> int:
        """Bytes of chunks that were read until now."""
        return self.array.bytes_read

    def _select(self, time: int | None, channel: Any, names: Sequence[str]) -> None:
        """Say which elements of the axes of time and channels are taken, and which axis becomes that of the channels."""
        sizes = {axis.name: size for axis, size in zip(self._axes, self.array.shape, strict=True)}
        self._taken: dict[str, list[int]] = {name: list(range(sizes[name])) for name in ("t", "c") if name in sizes}
        if time is not None:
            self._taken["t"] = [_index(time, sizes.get("t", 1), "time", self.name)]
        if channel is not None:
            given = channel if isinstance(channel, list | tuple) else [channel]
            self._taken["c"] = [_channel(each, sizes.get("c", 1), names, self.name) for each in given]
        times, channels = (len(self._taken.get(name, [0])) for name in ("t", "c"))
        if times > 1 and channels > 1:
            raise ImageError(
                f"{self.name} has {times} times and {channels} channels: say which, as in"
                f" open_zarr({self.name!r}, time=0) or channel=0"
            )
        self._leading = "t" if times > 1 or "c" not in sizes else "c"

    def _shape(self) -> tuple[int, int, int, int]:
        sizes = {axis.name: size for axis, size in zip(self._axes, self.array.shape, strict=True)}
        x, y, z = (sizes.get(name, 1) for name in SPATIAL)
        if 0 in (x, y, z):
            raise ImageError(f"{self.name} has {x} × {y} × {z} voxels: it is empty")
        return len(self._taken.get(self._leading, [0])), x, y, z

    def read(self, box: Box) -> Tensor:
        """See `VolumeSource`."""
        self.check_unchanged()
        spatial = dict(zip(SPATIAL, zip(box.start, box.stop, strict=True), strict=True))
        parts = [self._run(first, last, spatial) for first, last in _runs(self._taken.get(self._leading, [0]))]
        values = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if (self.slope, self.intercept) != (1, 0):
            values = values.astype(np.float64) * self.slope + self.intercept
        tensor = as_tensor(values)
        return tensor if tensor.dtype == self.dtype else tensor.to(self.dtype)

    def _run(self, first: int, last: int, spatial: Mapping[str, tuple[int, int]]) -> np.ndarray:
        """Read some channels that follow one another, as `(C, I, J, K)`."""
        ends = []
        for axis in self._axes:
            if axis.name in spatial:
                ends.append(spatial[axis.name])
            elif axis.name == self._leading:
                ends.append((first, last))
            else:
                only = self._taken[axis.name][0]
                ends.append((only, only + 1))
        values = self.array.read(*zip(*ends, strict=True))
        names = [axis.name for axis in self._axes]
        for name in (self._leading, *SPATIAL):
            if name not in names:
                values, names = values[..., None], [*names, name]
        wanted = [names.index(name) for name in (self._leading, *SPATIAL)]
        rest = [number for number in range(len(names)) if number not in wanted]
        return (
            values.transpose(*rest, *wanted).reshape([values.shape[number] for number in wanted])
            if rest
            else values.transpose(wanted)
        )

    def fingerprint(self) -> Json:
        """See `VolumeSource`. Of a URL it is the address and the metadata alone."""
        header = [repr(self.shape), repr(self.dtype), self.affine.tobytes(), repr(self.codes), repr(self._taken), self._metadata]
        header += [os.fsencode(path.name) for path in self.paths] or [self.name.partition("?")[0]]
        told: dict[str, Json] = {"header_sha256": hash_of(header), "array": self.array.path}
        for path in self.paths:
            root = path / self.array.path if path.is_dir() else path
            files = [root] if root.is_file() else sorted(each for each in root.rglob("*") if each.is_file())
            told |= state_of_files(files)
        if told != self._told:
            self.array.forget()  # chunks that were kept are of another state
            self._told = told
        return told


def _index(given: int, size: int, what: str, name: str) -> int:
    if isinstance(given, bool) or not isinstance(given, int) or not -size <= given < size:
        raise NoSuchIndexError(f"{name} has no {what} {given!r}, only {size}, from 0 on")
    return given % size


def _channel(given: int | str, size: int, names: Sequence[str], name: str) -> int:
    if not isinstance(given, str):
        return _index(given, size, "channel", name)
    if given and list(names).count(given) > 1:
        raise NoSuchIndexError(f"{name} has several channels {given!r}: give the number of one, of {', '.join(map(repr, names))}")
    if not given or given not in names:
        raise NoSuchIndexError(f"{name} has no channel {given!r}, only {', '.join(map(repr, names)) or f'{size} without names'}")
    return list(names).index(given)


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Give numbers as ranges of those that follow one another."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
    return runs


def open_zarr(
    location: str | Path,
    *,
    level: int = 0,
    spacing: float | Sequence[float] | None = None,
    time: int | None = None,
    channel: int | str | Sequence[int | str] | None = None,
    axes: str | None = None,
    affine: Any = None,
    missing: str = "fill",
    timeout: float = TIMEOUT,
) -> ZarrSource:
    """Open a volume in Zarr v2 or v3, of which chunks are read when they are needed.

    OME-Zarr 0.4, 0.5 and 0.6 and NIfTI-Zarr say where voxels lie, and which axis is which. I, J, K are x, y, z. Of other arrays,
    the names of dimensions count if they are of `t`, `c`, `z`, `y`, `x`; otherwise they are `(I, J, K)` or `(C, I, J, K)`.

    Args:
        location: a folder, a zip file, or a URL; a path in the hierarchy may follow, as in `scan.ome.zarr/labels/organs`.
        level: which resolution, 0 being the finest.
        spacing: wanted instead, in mm: takes the coarsest level whose voxels are no larger along any axis.
        time: which point in time; needed where there are several, and several channels.
        channel: which channel, or several, by number or name.
        axes: names of the axes of a plain array, such as `"zyx"`.
        affine: RAS+ matrix of 4 × 4 from voxels to millimetres, in place of what the metadata say.
        missing: what becomes of chunks that are not there: `"fill"` takes them for the fill value, `"error"` does not.
        timeout: seconds after which a URL that does not answer is asked again, three times in all.

    Returns:
        A `VolumeSource`.

    Raises:
        ImageNotFoundError, CorruptImageError, UnsupportedImageError: see `voxloom.errors`.
        NoSuchIndexError: if there is no such level, time or channel.
        MissingDependencyError: if zarr-python, or what a URL needs, is not installed.

    Example:
        >>> import tempfile, torch, voxloom as vx
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     image = vx.ScalarImage(torch.rand(1, 40, 30, 20))
        ...     image.save(f"{folder}/scan.ome.zarr")
        ...     vx.ScalarImage(vx.open_zarr(f"{folder}/scan.ome.zarr", level=0)).shape
        (1, 40, 30, 20)
    """
    wanted = tuple(spacing) if isinstance(spacing, Sequence) else spacing
    channels = tuple(channel) if isinstance(channel, Sequence) and not isinstance(channel, str) else channel
    return ZarrSource(location, level, wanted, time, channels, axes, affine, missing, timeout)
