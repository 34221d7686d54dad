"""Slices of an image, in whatever form they stand between brackets."""

import operator
from typing import Any

from ...core.sizes import as_sizes
from ...errors import NoSuchIndexError, SizeError

__all__ = ["as_slices"]


def as_slices(key: Any, shape: tuple[int, ...]) -> list[slice]:
    """Make one slice per axis, with start, stop and step, of what stands between brackets; for `(C, I, J, K)` or `(I, J, K)`."""
    items = list(key) if isinstance(key, tuple) else [key]
    places = [place for place, item in enumerate(items) if item is Ellipsis]
    if len(places) > 1:
        raise SizeError("an image was sliced with more than one '...'")
    for place in places:
        items[place : place + 1] = [slice(None)] * (len(shape) - len(items) + 1)
    if len(items) > len(shape):
        raise SizeError(
            f"an image of shape {shape} was sliced along {len(items)} axes: there are {len(shape)}, ({', '.join(_axes(shape))})"
        )
    items += [slice(None)] * (len(shape) - len(items))
    return [_as_slice(item, size, axis) for axis, item, size in zip(_axes(shape), items, shape, strict=True)]


def _axes(shape: tuple[int, ...]) -> str:
    return "CIJK"[4 - len(shape) :]


def _as_slice(item: Any, size: int, axis: str) -> slice:
    name = f"axis {axis} of an image"
    if not isinstance(item, slice):
        try:
            index = operator.index(item)
        except TypeError as error:
            raise SizeError(f"{name} was sliced with {item!r}: use numbers and slices") from error
        if not -size <= index < size:
            raise NoSuchIndexError(f"{name} was sliced with {index}, but it has {size} voxels")
        index %= size
        return slice(index, index + 1, 1)
    if item.step is not None:
        as_sizes(item.step, 1, f"the step along {name}")
    try:
        start, stop, step = item.indices(size)
    except TypeError as error:
        raise SizeError(f"{name} was sliced with {item}: use whole numbers") from error
    if stop <= start:
        raise SizeError(f"{name} was sliced from {item.start} to {item.stop}, which holds none of its {size} voxels")
    return slice(start, stop, step)
