"""What a Zarr hierarchy says of an array in it: which axis is which, and where its voxels lie."""

import contextlib
import io
import json
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...core.geometry.affines import Affine, as_affine, corner_displacement, spacing_of
from ...errors import CorruptImageError, ImageError, ImageFileError, ImageNotFoundError, UnsupportedImageError, VoxloomError
from ..protocols import Json, SpaceCodes
from .ngff import SPATIAL, Axis, Multiscales, axes_by_names, chosen_level, described
from .storage import Storage, is_url, storage_at, zarr_python

__all__ = ["OWN", "FoundVolume", "find", "is_zarr"]

# Name of the attribute in which voxloom keeps what OME-Zarr has no place for.
OWN = "voxloom"
# Files that tell a folder of Zarr.
MARKS = ("zarr.json", ".zgroup", ".zarray")
# How many folders above the root of an array the group of its image may be.
DEEPEST = 2
# By what part of a voxel two statements may differ, over so many voxels along each axis, that say the same.
TOLERANCE, EXTENT = 1e-3, (1024, 1024, 1024)

Exact = tuple[Affine, tuple[float, float], SpaceCodes]
"""Affine, slope and intercept, and codes of the finest level."""


def is_zarr(path: Path) -> bool:
    """Whether a folder is a Zarr hierarchy, or a part of one."""
    return any((path / mark).is_file() for mark in MARKS)


@dataclass(eq=False)
class FoundVolume:
    """An array, and what is said of it."""

    storage: Storage
    path: str
    """Of the array, in the storage."""
    array: Any
    axes: tuple[Axis, ...]
    affine: Affine
    codes: SpaceCodes
    metadata: str
    """All that is said, as text."""
    multiscales: Multiscales | None = None
    """What OME-Zarr says of the image; None for a plain array."""
    channels: Sequence[str] = ()
    scaling: tuple[float, float] = (1.0, 0.0)
    conflict: str = ""
    """What speaks against the affine, if anything."""


def find(location: str | Path, level: int, spacing: Any, axes: str | None, timeout: float) -> FoundVolume:
    """Find an array, or a level of an image.

    Args:
        location: a folder, a zip file, or a URL; a path in the hierarchy may follow.
        level: which level of an image.
        spacing: the spacing wanted, in place of a level.
        axes: names of the axes of a plain array.
        timeout: see `open_zarr`.

    Raises:
        ImageNotFoundError, CorruptImageError, UnsupportedImageError: if there is none, or it is not what it should be.
    """
    zarr = zarr_python()
    storage, inner = _storage_of(location, timeout)
    name = _name(storage, inner)
    node = _opened(storage, inner, name)
    if isinstance(node, zarr.Group):
        multiscales = Multiscales.of(dict(node.attrs), name)
        if multiscales is None:
            there = ", ".join(sorted(node.keys())[:10]) or "nothing"
            raise UnsupportedImageError(
                f"{name} is a group of Zarr that is no image (it has no multiscales): name an array or an image in it, as in"
                f" {name}/PATH; there is {there}"
            )
        number = chosen_level(multiscales, level, spacing, name)
        return _of_group(storage, inner, node, multiscales, number, name)
    for above, group_path, last in _above(location, storage, inner, timeout) if axes is None else ():
        group = _opened(above, group_path, name, is_needed=False)
        named = Multiscales.naming(last, dict(group.attrs), name) if isinstance(group, zarr.Group) else None
        if named is not None:
            return _of_group(above, group_path, group, *named, name)
    return _of_array(storage, inner, node, axes, name)


def _name(storage: Storage, inner: str) -> str:
    return f"{storage.name}/{inner}" if inner else storage.name


# Where it may lie


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
    root = whole = path.absolute()
    while is_zarr(root.parent) and root.parent != root:
        root = root.parent
    inner = whole.relative_to(root).as_posix()
    return storage_at(root, timeout), "" if inner == "." else inner


def _above(location: str | Path, storage: Storage, inner: str, timeout: float) -> Iterator[tuple[Storage, str, str]]:
    """Give the groups above an array, the nearest first: where each lies, its path there, and that of the array from it."""
    parts = inner.split("/") if inner else []
    for count in reversed(range(len(parts))):
        yield storage, "/".join(parts[:count]), "/".join(parts[count:])
    if inner:
        return
    # The name of a URL may not say what is Zarr, and folders between groups of Zarr v3 need not be groups.
    if is_url(location):
        address, question, more = str(location).rstrip("/").partition("?")
        parts = address.split("/")
        if "::" in address or parts[-1].endswith(".zarr"):
            return
        for count in range(1, DEEPEST + 1):
            address = "/".join(parts[:-count])
            if len(parts) - count > 3:  # which are the protocol and the server's name
                yield storage_at(f"{address}{question}{more}", timeout), "", "/".join(parts[-count:])
        return
    path = Path(location).absolute()
    for root in path.parents[:DEEPEST] if path.is_dir() else ():
        if is_zarr(root):
            yield storage_at(root, timeout), "", path.relative_to(root).as_posix()


def _opened(storage: Storage, inner: str, name: str, is_needed: bool = True) -> Any:
    store = storage.store()
    try:
        return zarr_python().open(store=store, path=inner, mode="r")
    except VoxloomError:
        raise
    except FileNotFoundError as error:
        if not is_needed:
            return None
        raise ImageNotFoundError(f"there is no array and no group of Zarr at {name}{_named_in(storage)}") from error
    except Exception as error:  # whatever zarr-python, or what it calls, stumbles over in damaged metadata
        # What is above an array may be anything, but not without an answer.
        if not is_needed and isinstance(error, ValueError | LookupError | TypeError | AttributeError):
            return None
        raise CorruptImageError(f"{name} cannot be opened as Zarr: {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def _said_of(what: str) -> Iterator[None]:
    """Let an error of zarr-python, or of what it calls, say what could not be read."""
    try:
        yield
    except (VoxloomError, MemoryError):
        raise
    except OSError as error:
        raise ImageFileError(f"{what} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # whatever they stumble over in damaged metadata
        reason = f"{type(error).__name__}: {error}"
        raise CorruptImageError(f"{what} is damaged: {reason}. Copy or make the store again") from error


def _member(group: Any, path: str, name: str) -> Any:
    """Give what lies in a group, of which there may be nothing."""
    with _said_of(f"{path} in {name}"):
        return group.get(path)


def _named_in(storage: Storage) -> str:
    """Say what there is at the top of a zip file."""
    if storage.path is None or not storage.path.is_file():
        return ""
    with zipfile.ZipFile(storage.path) as file:
        names = sorted({each.partition("/")[0] for each in file.namelist()})
    return f"; in it there is {', '.join(names[:10]) or 'nothing'}: name what is meant, as in {storage.path}/PATH"


# What is said of it


def _of_group(storage: Storage, inner: str, group: Any, multiscales: Multiscales, number: int, name: str) -> FoundVolume:
    level = multiscales.levels[number]
    array = _member(group, level.path, name)
    if not isinstance(array, zarr_python().Array):
        raise CorruptImageError(f"{name} has no array {level.path!r}, which its metadata name as level {number}: copy it again")
    if array.ndim != len(multiscales.axes):
        raise CorruptImageError(
            f"the array {level.path} of {name} has shape {array.shape}, but its metadata name {len(multiscales.axes)} axes"
        )
    _compare_dimensions(array, multiscales, f"the array {level.path} of {name}")
    path = f"{inner}/{level.path}" if inner else level.path
    metadata = json.dumps([dict(group.attrs), repr(array.metadata)], default=str, sort_keys=True)
    found = FoundVolume(storage, path, array, multiscales.axes, level.affine, SpaceCodes(), metadata, multiscales)
    if multiscales.number:  # all else that is said in the group is of the first image
        return found
    found.channels = multiscales.channels
    # What is said of the finest level, by a NIfTI header or by voxloom, is known more exactly than OME-Zarr can say it.
    header, own = _header_of(group, name), _own_of(group.attrs, name)
    exact = own if header is None or _are_of_one(header, own) else header
    if exact is None:
        return found
    if exact is own and not _agrees(own[0], multiscales, name):
        found.conflict = (
            f"the attribute {OWN!r} of {name} and its multiscales differ in where voxels lie: the latter have been changed since"
            f" voxloom wrote them, or the former was copied from another image. Remove the attribute {OWN!r}, and the"
            " multiscales count, or give affine="
        )
    whole, found.scaling, found.codes = exact
    found.affine = whole @ np.linalg.inv(multiscales.levels[0].affine) @ level.affine if number else whole
    return found


def _of_array(storage: Storage, inner: str, array: Any, axes: str | None, name: str) -> FoundVolume:
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
    metadata = json.dumps([dict(array.attrs), repr(array.metadata)], default=str, sort_keys=True)
    return FoundVolume(storage, inner, array, axes_by_names(names, name), affine, codes, metadata)


def _are_known(names: Sequence[str]) -> bool:
    return set(names) <= {"t", "c", *SPATIAL} and {"x", "y"} <= set(names) and len(set(names)) == len(names)


def _compare_dimensions(array: Any, multiscales: Multiscales, name: str) -> None:
    """Warn where the names of an array's dimensions are others than those of the image's axes, as they must not be."""
    names = list(getattr(array.metadata, "dimension_names", None) or ())
    axes = [axis.name for axis in multiscales.axes]
    if names != axes and all(names) and _are_known(names):
        warnings.warn(
            f"{name} has dimensions named {', '.join(names)}, but the axes of its multiscales are {', '.join(axes)}, which count",
            RuntimeWarning,
            stacklevel=2,
        )


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


def _agrees(affine: Affine, multiscales: Multiscales, name: str) -> bool:
    """Whether the multiscales of an image are what voxloom writes for an affine; they may lack the directions of axes."""
    has_channels = any(axis.name == "c" for axis in multiscales.axes)
    attributes = described(affine, (), has_channels, multiscales.version, "", False)
    if not any(axis.orientation for axis in multiscales.axes):
        (image,) = attributes.get("ome", attributes)["multiscales"]
        for axis in image.get("axes", ()):
            axis.pop("orientation", None)
    written = Multiscales.of(attributes, name)
    assert written is not None
    one, other = written.levels[0].affine, multiscales.levels[0].affine
    return bool(corner_displacement(one, other, EXTENT) <= TOLERANCE * min(spacing_of(one)))


def _are_of_one(header: Exact, own: Exact | None) -> bool:
    """Whether what voxloom has written is what the header says in single precision, and says it more exactly."""
    return own is not None and own[1:] == header[1:] and np.array_equal(np.float32(own[0]), np.float32(header[0]))


def _header_of(group: Any, name: str) -> Exact | None:
    """Give what the header of a NIfTI-Zarr says, if it is one."""
    found = _member(group, "nifti", name)
    if not isinstance(found, zarr_python().Array):
        return None
    import nibabel as nib

    from ..nifti.files import NibabelFile

    with _said_of(f"the NIfTI header of {name}"):
        raw = np.asarray(found[...]).tobytes()
    is_second = 540 in (int.from_bytes(raw[:4], "little"), int.from_bytes(raw[:4], "big"))
    whole, step = _of_three_axes(raw.ljust(544, b"\0"), is_second)
    try:
        header = NibabelFile(io.BytesIO(whole), nib.Nifti2Image if is_second else nib.Nifti1Image)
    except VoxloomError as error:
        raise CorruptImageError(f"the NIfTI header of {name} is damaged: {error}") from error
    codes = header.codes if step is None else replace(header.codes, time_step=step)
    return header.affine, (header.slope, header.intercept), codes


def _of_three_axes(raw: bytes, is_second: bool) -> tuple[bytes, float | None]:
    """Leave times and channels out of a NIfTI header: they are a matter of the array, of which some may be chosen.

    Returns:
        The header, and what it says of the time from one volume to the next.
    """
    order = "<" if raw[:4] in (size.to_bytes(4, "little") for size in (348, 540)) else ">"
    first, dtype = (16, f"{order}i8") if is_second else (40, f"{order}i2")
    sizes = np.frombuffer(raw, dtype, count=8, offset=first).copy()
    steps = np.frombuffer(raw, f"{order}{'f8' if is_second else 'f4'}", count=8, offset=104 if is_second else 76)
    if not 3 < sizes[0] <= 7:
        return raw, None
    sizes[0], sizes[4:] = 3, 1
    return raw[:first] + sizes.tobytes() + raw[first + sizes.nbytes :], float(steps[4])
