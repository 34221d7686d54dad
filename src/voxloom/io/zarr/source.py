"""Volumes in Zarr as sources of voxels: OME-Zarr at some level, NIfTI-Zarr, and plain arrays."""

import io
import json
import math
import os
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core.affines import Affine, as_affine, spacing_of
from ...core.boxes import Box
from ...errors import (
    CorruptImageError,
    ImageError,
    ImageNotFoundError,
    ModeError,
    NoSuchIndexError,
    UnsupportedImageError,
    VoxloomError,
)
from ..arrays import as_tensor, hash_of, torch_dtype
from ..files import FOLDER_SIDECAR, FileSource, state_of_files
from ..protocols import Json, SpaceCodes, VolumeSpec
from .chunks import ChunkedArray
from .ngff import SPATIAL, Axis, Multiscales, axes_by_names, chosen_level, described
from .storage import Storage, is_url, storage_at, zarr_python

__all__ = ["OWN", "ZarrSource", "is_label_of_image", "is_zarr", "more_than_image", "open_zarr"]

# Name of the attribute in which voxloom keeps what OME-Zarr has no place for.
OWN = "voxloom"
# Files that tell a folder of Zarr.
MARKS = ("zarr.json", ".zgroup", ".zarray")
# How many folders above an array the group of its image may be.
DEEPEST = 3
# Seconds after which a URL that does not answer is given up.
TIMEOUT = 30.0


def is_zarr(path: Path) -> bool:
    """Whether a folder is a Zarr hierarchy, or a part of one."""
    return any((path / mark).is_file() for mark in MARKS)


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
        storage, inner = _storage_of(location, timeout)
        self.name = f"{storage.name}/{inner}" if inner else storage.name
        self.paths = () if storage.path is None else (storage.path,)
        found = _Found.of(storage, inner, level, spacing, axes, self.name)
        if found.multiscales is None and is_url(location) and not inner and axes is None:
            found, storage = _found_above(str(location), timeout) or (found, storage)
        if found.conflict and affine is None:
            raise UnsupportedImageError(found.conflict)
        self._metadata = found.metadata
        self.multiscales = found.multiscales
        """What OME-Zarr says of the image; None for a plain array."""
        self.array = ChunkedArray(storage, found.path, found.array, missing)
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


class _Found:
    """What was found in a hierarchy."""

    def __init__(self, path: str, array: Any, axes: Sequence[Axis], affine: Affine, codes: SpaceCodes) -> None:
        self.path, self.array, self.axes, self.affine, self.codes = path, array, tuple(axes), affine, codes
        self.channels: Sequence[str] = ()
        self.conflict = ""
        """What speaks against the affine, if anything."""
        self.multiscales: Multiscales | None = None
        self.scaling = (1.0, 0.0)
        self.metadata = ""

    @classmethod
    def of(cls, storage: Storage, inner: str, level: int, spacing: Any, axes: str | None, name: str) -> "_Found":
        zarr = zarr_python()
        node = _opened(zarr, storage, inner, name)
        if not isinstance(node, zarr.Group):
            parts = inner.split("/") if inner and axes is None else []
            for count in reversed(range(len(parts))):
                above, last = "/".join(parts[:count]), "/".join(parts[count:])
                group = _opened(zarr, storage, above, name, is_needed=False)
                named = Multiscales.naming(last, dict(group.attrs), name) if isinstance(group, zarr.Group) else None
                if named is not None:
                    return cls._of_group(zarr, group, *named, above, name)
            return cls._of_array(inner, node, axes, name)
        multiscales = Multiscales.of(dict(node.attrs), name)
        if multiscales is None:
            there = ", ".join(sorted(node.keys())[:10]) or "nothing"
            raise UnsupportedImageError(
                f"{name} is a group of Zarr that is no image (it has no multiscales): name an array or an image in it, as in"
                f" {name}/PATH; there is {there}"
            )
        return cls._of_group(zarr, node, multiscales, chosen_level(multiscales, level, spacing, name), inner, name)

    @classmethod
    def _of_group(cls, zarr: Any, group: Any, multiscales: Multiscales, number: int, inner: str, name: str) -> "_Found":
        level = multiscales.levels[number]
        array = group.get(level.path)
        if not isinstance(array, zarr.Array):
            raise CorruptImageError(
                f"{name} has no array {level.path!r}, which its metadata name as level {number}: copy it again"
            )
        if array.ndim != len(multiscales.axes):
            raise CorruptImageError(
                f"the array {level.path} of {name} has shape {array.shape}, but its metadata name {len(multiscales.axes)} axes"
            )
        path = f"{inner}/{level.path}" if inner else level.path
        found = cls(path, array, multiscales.axes, level.affine, SpaceCodes())
        found.channels, found.multiscales = multiscales.channels, multiscales
        found.metadata = json.dumps([dict(group.attrs), repr(array.metadata)], default=str, sort_keys=True)
        # What is said of the finest level, by a NIfTI header or by voxloom, is known more exactly than OME-Zarr can say it.
        header, own = _header_of(group, zarr, name), _own_of(group.attrs, name)
        exact = own if header is None or _are_of_one(header, own) else header
        if own is not None and exact is own and not _agrees(own[0], multiscales, name):
            found.conflict = (
                f"the attribute {OWN!r} of {name} and its multiscales differ in where voxels lie: the latter have been changed"
                f" since voxloom wrote them, or the former was copied from another image. Remove the attribute {OWN!r}, and the"
                " multiscales count, or give affine="
            )
        names = getattr(array.metadata, "dimension_names", None) or ()
        if names and [each.name for each in multiscales.axes] != list(names) and set(names) == {"t", "c", *SPATIAL} & set(names):
            warnings.warn(
                f"the array {level.path} of {name} has dimensions named {', '.join(names)}, but the axes of its multiscales are"
                f" {', '.join(each.name for each in multiscales.axes)}, which count",
                RuntimeWarning,
                stacklevel=2,
            )
        if exact is not None:
            whole, scaling, codes = exact
            found.affine = whole @ np.linalg.inv(multiscales.levels[0].affine) @ level.affine if number else whole
            found.scaling, found.codes = scaling, codes
        return found

    @classmethod
    def _of_array(cls, inner: str, array: Any, axes: str | None, name: str) -> "_Found":
        names = [each for each in getattr(array.metadata, "dimension_names", None) or () if each]
        names = list(names or array.attrs.get("_ARRAY_DIMENSIONS", ()))
        if axes is not None:
            names = list(axes)
        elif not _are_known(names) or len(names) != array.ndim:
            names = list("xyz" if array.ndim == 3 else "cxyz")  # as of any other array that can be sliced
        if len(names) != array.ndim:
            raise ImageError(f"{name} has shape {array.shape}: say what its axes are, as in axes='tczyx'")
        exact = _own_of(array.attrs, name)
        affine, _, codes = (np.eye(4), (1.0, 0.0), SpaceCodes()) if exact is None else exact
        found = cls(inner, array, axes_by_names(names, name), affine, codes)
        found.metadata = json.dumps([dict(array.attrs), repr(array.metadata)], default=str, sort_keys=True)
        return found


def _agrees(affine: Affine, multiscales: Multiscales, name: str) -> bool:
    """Whether what voxloom has written of an image fits its multiscales, but for directions, which not all versions can say."""
    has_channels = any(axis.name == "c" for axis in multiscales.axes)
    written = Multiscales.of(described(affine, (), has_channels, multiscales.version, "", False), name)
    assert written is not None
    one, other = written.levels[0].affine, multiscales.levels[0].affine
    place, other_place = (np.sort(np.abs(each[:3, 3])) for each in (one, other))
    is_near = np.allclose(place, other_place, rtol=1e-5, atol=1e-4)
    return is_near and np.allclose(spacing_of(one), spacing_of(other), rtol=1e-5)


def _are_known(names: Sequence[str]) -> bool:
    return set(names) <= {"t", "c", *SPATIAL} and {"x", "y"} <= set(names) and len(set(names)) == len(names)


Exact = tuple[Affine, tuple[float, float], SpaceCodes]


def _own_of(attributes: Mapping[str, Json], name: str) -> Exact | None:
    """Give what voxloom has written of the finest level, if it has."""
    told = attributes.get(OWN)
    if not isinstance(told, Mapping) or "affine" not in told:
        return None
    try:
        codes = dict(told["codes"])
        world = tuple(tuple(map(float, row)) for row in codes.pop("qform_world"))
        return as_affine(told["affine"]), (1.0, 0.0), SpaceCodes(**codes, qform_world=world)
    except (LookupError, TypeError, ValueError, ImageError) as error:
        raise CorruptImageError(
            f"the attribute {OWN!r} of {name} is damaged: {error}. Remove it, or make the store again"
        ) from error


def _are_of_one(header: Exact, own: Exact | None) -> bool:
    """Whether what voxloom has written is what the header says in single precision, and says it more exactly."""
    return own is not None and own[1:] == header[1:] and np.array_equal(np.float32(own[0]), np.float32(header[0]))


def _header_of(group: Any, zarr: Any, name: str) -> Exact | None:
    """Give what the header of a NIfTI-Zarr says, if it is one."""
    found = group.get("nifti")
    if not isinstance(found, zarr.Array):
        return None
    import nibabel as nib

    from ..nifti import NibabelFile

    raw = np.asarray(found[...]).tobytes()
    is_second = 540 in (int.from_bytes(raw[:4], "little"), int.from_bytes(raw[:4], "big"))
    whole = _of_three_axes(raw.ljust(544, b"\0"), is_second)
    try:
        header = NibabelFile(io.BytesIO(whole), nib.Nifti2Image if is_second else nib.Nifti1Image)
    except VoxloomError as error:
        raise CorruptImageError(f"the NIfTI header of {name} is damaged: {error}") from error
    return header.affine, (header.slope, header.intercept), header.codes


def _of_three_axes(raw: bytes, is_second: bool) -> bytes:
    """Leave times and channels out of a NIfTI header: they are a matter of the array, of which some may be chosen."""
    order = "<" if raw[:4] in (size.to_bytes(4, "little") for size in (348, 540)) else ">"
    first, dtype = (16, f"{order}i8") if is_second else (40, f"{order}i2")
    sizes = np.frombuffer(raw, dtype, count=8, offset=first).copy()
    if sizes[0] > 3:
        sizes[0], sizes[4:] = 3, 1
    return raw[:first] + sizes.tobytes() + raw[first + sizes.nbytes :]


def _named_in(storage: Storage) -> str:
    """Say what there is at the top of a zip file."""
    if storage.path is None or not storage.path.is_file():
        return ""
    with zipfile.ZipFile(storage.path) as file:
        names = sorted({each.partition("/")[0] for each in file.namelist()})
    return f"; in it there is {', '.join(names[:10]) or 'nothing'}: name what is meant, as in {storage.path}/PATH"


def _opened(zarr: Any, storage: Storage, inner: str, name: str, is_needed: bool = True) -> Any:
    store = storage.store()
    try:
        return zarr.open(store=store, path=inner, mode="r")
    except VoxloomError:
        raise
    except FileNotFoundError as error:
        if not is_needed:
            return None
        raise ImageNotFoundError(f"there is no array and no group of Zarr at {name}{_named_in(storage)}") from error
    except Exception as error:  # whatever zarr-python, or what it calls, stumbles over in damaged metadata
        if not is_needed:
            return None
        raise CorruptImageError(f"{name} cannot be opened as Zarr: {type(error).__name__}: {error}") from error


def _found_above(url: str, timeout: float) -> "tuple[_Found, Storage] | None":
    """Find the image of which an array at a URL is a level, where its name does not say where the hierarchy begins."""
    address, question, more = url.rstrip("/").partition("?")
    inner: list[str] = []
    for _ in range(DEEPEST):
        address, _, last = address.rpartition("/")
        inner.insert(0, last)
        if address.endswith(("/", ":")) or not address:
            return None
        storage = storage_at(f"{address}{question}{more}", timeout)
        group = _opened(zarr_python(), storage, "", url, is_needed=False)
        named = Multiscales.naming("/".join(inner), dict(group.attrs), url) if hasattr(group, "keys") else None
        if named is not None:
            return _Found._of_group(zarr_python(), group, *named, "", url), storage
    return None


def _storage_of(location: str | Path, timeout: float) -> tuple[Storage, str]:
    """Split a location into where the hierarchy lies, and the path in it."""
    if is_url(location):
        # In a chain such as `zip://scan.zarr::https://…`, the path is not at the end.
        is_chain = "://" in str(location).rpartition("::")[0]
        found = None if is_chain else re.match(r"(.*\.(?:zarr|zip|ozx))/(.+)", str(location).rstrip("/"))
        root, inner = (str(location), "") if found is None else found.groups()
        return storage_at(root, timeout), inner
    path = Path(location)
    if path.is_file():
        return storage_at(path, timeout), ""
    above = [each for each in path.parents if each.is_file()]
    if above:  # a path in a zip file
        return storage_at(above[0], timeout), path.relative_to(above[0]).as_posix()
    if not path.is_dir():
        raise ImageNotFoundError(f"there is no folder {path}")
    whole = path.resolve() if ".." in path.parts else path.absolute()
    # Groups of Zarr v3 need not be written down, so that a folder in between may look like any other.
    root = next((each for each in reversed(whole.parents) if is_zarr(each)), whole)
    inner = whole.relative_to(root).as_posix()
    return storage_at(root, timeout), "" if inner == "." else inner


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
