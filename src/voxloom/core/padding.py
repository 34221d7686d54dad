"""Padding without a padded copy: where each voxel around a volume takes its value from."""

from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Real
from typing import Any

from ..errors import ModeError

__all__ = ["CONSTANT_MODES", "PADDING_MODES", "Piece", "axis_pieces", "check_padding_mode", "ramp"]

MAPPED_MODES = ("edge", "reflect", "symmetric", "wrap", "linear_ramp")
STATISTIC_MODES = ("minimum", "maximum", "mean", "median")
CONSTANT_MODES = ("constant", *STATISTIC_MODES)
PADDING_MODES = (*CONSTANT_MODES, *MAPPED_MODES)


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of voxels along one axis that take their values from a run of the volume."""

    target: slice
    """Where the run lies in the patch."""
    source: slice
    """Where the values are in the volume: as many voxels, or one that is repeated."""
    step: int
    """1 for the same order, -1 for the reverse, 0 for one voxel repeated."""


def check_padding_mode(mode: Any, fill: float) -> str | float | int:
    """Check a padding mode and its fill value.

    Returns:
        The mode, or the number that it stands for.

    Raises:
        ModeError: if there is no such mode, or a fill value is given for a mode that has none.
    """
    is_number = isinstance(mode, Real) and not isinstance(mode, bool)
    if not is_number and mode not in PADDING_MODES:
        raise ModeError(f"padding_mode is {mode!r}: it must be a number or one of {', '.join(map(repr, PADDING_MODES))}")
    if not isinstance(fill, Real) or isinstance(fill, bool):
        raise ModeError(f"fill is {fill!r}: it must be a number")
    if fill != 0 and mode != "constant":
        raise ModeError(f"fill is {fill!r}, which only padding_mode='constant' uses, not {mode!r}")
    return fill if mode == "constant" else mode


def axis_pieces(start: int, stop: int, size: int, mode: str | float | int) -> list[Piece]:
    """Say where the voxels `[start, stop)` of a padded axis are in the `size` voxels of the volume.

    With a mode that pads with a constant, the voxels outside of the volume belong to no piece. The mapped modes mean what
    they mean to `numpy.pad`, at any distance from the volume; `linear_ramp` is mapped to the edge, to be scaled by `ramp`.

    Example:
        >>> for piece in axis_pieces(-2, 3, 4, "reflect"):
        ...     print(piece.target, piece.source, piece.step)
        slice(0, 2, None) slice(1, 3, None) -1
        slice(2, 5, None) slice(0, 3, None) 1
    """
    pieces = []
    for first, last, source, step in _runs(start, stop, size, mode):
        length = last - first
        low = source if step >= 0 else source - length + 1
        pieces.append(Piece(slice(first - start, last - start), slice(low, low + (length if step else 1)), step))
    return pieces


def _runs(start: int, stop: int, size: int, mode: str | float) -> Iterator[tuple[int, int, int, int]]:
    """Yield `(first, stop, source of first, step)` for each run of voxels."""
    if mode not in MAPPED_MODES or mode in ("edge", "linear_ramp"):
        is_edge = mode in MAPPED_MODES
        if is_edge and start < 0:
            yield start, min(stop, 0), 0, 0
        if max(start, 0) < min(stop, size):
            yield max(start, 0), min(stop, size), max(start, 0), 1
        if is_edge and stop > size:
            yield max(start, size), stop, size - 1, 0
        return
    # The volume repeats for ever, every second time mirrored; a mirror on the outer voxel does not show it twice.
    shared = mode == "reflect" and size > 1
    block = size - 1 if shared else size
    position = start
    while position < stop:
        number, offset = divmod(position, block)
        end = min(stop, (number + 1) * block)
        if mode == "wrap" or number % 2 == 0:
            yield position, end, offset, 1
        else:
            yield position, end, block - offset if shared else size - 1 - offset, -1
        position = end


def ramp(position: int, size: int, before: int, after: int) -> tuple[int, int]:
    """Say, as a fraction, by how much `linear_ramp` multiplies the value of the edge for a voxel of a padded axis.

    It is 1 in the volume and falls to 0 at the outermost of the `before` or `after` voxels of padding.
    """
    if position < 0:
        return position + before, before
    if position >= size:
        return size - 1 + after - position, after
    return 1, 1
