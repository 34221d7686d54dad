"""Images in another space: turned, or resampled, when they are read."""

from functools import cached_property
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from torch import Tensor

from ..core.affines import Affine
from ..core.aligned import AlignedMap
from ..core.boxes import Box
from ..core.interpolation import Interpolation, SpaceMap, interpolated_dtype
from ..core.resampling import space_map
from ..core.splines import cubic_matrix
from ..core.values import can_hold, sum_dtype
from ..errors import ImageError, ModeError
from ..io.protocols import Json, Space, SpaceCodes, VolumeSource, loading_bytes, read_checked
from ..io.spooling import Packed

__all__ = ["ReorientedSource", "ResampledSource", "as_orientation"]


def as_orientation(given: Any) -> str:
    """Check an orientation: where each axis points to.

    Raises:
        ModeError: if it does not name each pair of directions once.
    """
    text = "".join(given).upper() if isinstance(given, str | tuple | list) else ""
    pairs = [next((pair for pair in ("LR", "AP", "IS") if letter in pair), "") for letter in text]
    if len(text) != 3 or len({*pairs, ""}) != 4:
        raise ModeError(f"the orientation is {given!r}: give where the axes point to, such as 'RAS' or 'LPS'")
    return text


class _View:
    """What a view has in common with the source that it is of.

    Args:
        of: the source.
    """

    def __init__(self, of: VolumeSource) -> None:
        self.of = of

    @property
    def codes(self) -> SpaceCodes:
        """See `VolumeSource`."""
        return self.of.codes

    @property
    def paths(self) -> tuple[Path, ...]:
        """See `VolumeSource`."""
        return self.of.paths

    @property
    def resident_bytes(self) -> int:
        """See `VolumeSource`: what it is of is kept in memory where it can only be read whole."""
        return self.of.resident_bytes

    @property
    def loading_bytes(self) -> int:
        """See the function `loading_bytes`."""
        return loading_bytes(self.of)

    def prepare(self) -> None:
        """Load what can only be read whole."""
        prepare = getattr(self.of, "prepare", None)
        if prepare is not None:
            prepare()

    @property
    def packed_bytes(self) -> int:
        """See `Packed`."""
        return self.of.packed_bytes if isinstance(self.of, Packed) else 0

    def _unpacked(self, folder: Path) -> VolumeSource:
        assert isinstance(self.of, Packed)
        return self.of.unpacked(folder)


class ReorientedSource(_View):
    """A source whose axes are permuted and flipped, such that they point to other directions.

    Args:
        of: the source.
        orientation: where the axes are to point to, such as `"RAS"`.
    """

    def __init__(self, of: VolumeSource, orientation: Any) -> None:
        super().__init__(of)
        self.orientation = as_orientation(orientation)
        now = nib.io_orientation(of.affine)
        turn = nib.orientations.ornt_transform(now, nib.orientations.axcodes2ornt(self.orientation))
        # For each axis of the source where it goes to, and whether it is flipped.
        self._order = [int(np.flatnonzero(turn[:, 0] == axis)[0]) for axis in range(3)]
        self._flipped = [bool(turn[source, 1] < 0) for source in self._order]
        i, j, k = (of.shape[1 + source] for source in self._order)
        self.shape = (of.shape[0], i, j, k)
        self.dtype = of.dtype
        self.affine: Affine = of.affine @ nib.orientations.inv_ornt_aff(turn, of.shape[1:])

    @property
    def chunks(self) -> tuple[int, int, int]:
        """See `VolumeSource`."""
        i, j, k = (self.of.chunks[source] for source in self._order)
        return i, j, k

    def read(self, box: Box) -> Tensor:
        """See `VolumeSource`."""
        starts, stops = [0] * 3, [0] * 3
        for axis, (source, is_flipped) in enumerate(zip(self._order, self._flipped, strict=True)):
            start, stop, length = box.start[axis], box.stop[axis], self.shape[1 + axis]
            starts[source], stops[source] = (length - stop, length - start) if is_flipped else (start, stop)
        values = read_checked(self.of, Box(tuple(starts), tuple(stops))).permute(0, *(1 + source for source in self._order))
        flips = [1 + axis for axis, is_flipped in enumerate(self._flipped) if is_flipped]
        return values.flip(flips) if flips else values

    def fingerprint(self) -> Json:
        """See `VolumeSource`."""
        return {"reoriented": self.orientation, "of": self.of.fingerprint()}

    def unpacked(self, folder: Path) -> "ReorientedSource":
        """See `Packed`."""
        return ReorientedSource(self._unpacked(folder), self.orientation)


KINDS: dict[int, Interpolation] = {0: "nearest", 1: "linear"}


class ResampledSource(_View):
    """A source on another grid of voxels.

    Args:
        of: the source.
        space: the grid.
        order: 0 takes the nearest voxel, 1 interpolates linearly, and both do so when a box is read; 3 fits cubic splines to the
            whole volume, and keeps the result.
        fill: value of voxels whose centres lie outside of the source, more than half a voxel beyond its outermost centres.

    Raises:
        ModeError: if there is no such order, or it is 3 and the axes of the grid are not those of the source.
        ImageError: if the result cannot hold the value.
    """

    def __init__(self, of: VolumeSource, space: Space, order: int, fill: float = 0) -> None:
        super().__init__(of)
        if order not in (0, 1, 3) or isinstance(order, bool):
            raise ModeError(f"order is {order!r}: it must be 0 for the nearest voxel, 1 for linear or 3 for cubic interpolation")
        self.space, self.order, self.fill = space, order, fill
        self.shape = (of.shape[0], *space.shape)
        self.affine: Affine = space.affine
        self.dtype = sum_dtype(of.dtype) if order == 3 else interpolated_dtype(of.dtype, [KINDS[order]])
        if not can_hold(self.dtype, fill):
            raise ImageError(f"fill is {fill}, which a volume of {self.dtype} cannot hold: choose another one")
        if order == 3 and not isinstance(self._map, AlignedMap):
            raise ModeError("order is 3, which is for axes that are only permuted, flipped, scaled and shifted: use order 1")
        self._whole: Tensor | None = None

    @cached_property
    def _map(self) -> SpaceMap:
        kind = KINDS.get(self.order, "linear")
        return space_map(self.of.shape[1:], self.of.affine, self.space.shape, self.affine, [kind] * 3)

    @property
    def codes(self) -> SpaceCodes:
        """See `VolumeSource`."""
        return self.space.codes

    @property
    def chunks(self) -> tuple[int, int, int]:
        """See `VolumeSource`: patches of any shape are as quick."""
        return (1, 1, 1) if self.order != 3 else (1, *self.shape[2:])

    @property
    def resident_bytes(self) -> int:
        """See `VolumeSource`."""
        whole = int(np.prod(self.shape)) * self.dtype.itemsize if self.order == 3 and self._whole is None else 0
        return super().resident_bytes + whole

    @property
    def loading_bytes(self) -> int:
        """See the function `loading_bytes`."""
        if self.order != 3:
            return super().loading_bytes
        return super().loading_bytes + 3 * max(int(np.prod(each)) for each in (self.shape, self.of.shape)) * self.dtype.itemsize

    def read(self, box: Box) -> Tensor:
        """See `VolumeSource`."""
        if self.order == 3:
            if self._whole is None:
                self._whole = self._cubic()
            return self._whole[(slice(None), *box.slices)]
        out = torch.full((self.shape[0], *box.shape), self.fill, dtype=self.dtype)
        own = Box.of_shape(self.of.shape[1:])
        for part in self._map.parts(box, own):
            values = read_checked(self.of, part.support).to(self.dtype).contiguous()
            part.put(out, box.start, part.apply(values))
        return out

    def _cubic(self) -> Tensor:
        """Resample the whole volume."""
        space = self._map
        assert isinstance(space, AlignedMap)
        whole = Box.of_shape(self.of.shape[1:])
        values = read_checked(self.of, whole).to(self.dtype)
        with torch.inference_mode(False), torch.no_grad():
            for axis in space.sequence:
                of = space.order[axis]
                matrix = torch.from_numpy(cubic_matrix(space.axes[axis].places, self.of.shape[1 + of])).to(self.dtype)
                values = torch.tensordot(matrix, values, dims=([1], [1 + of])).movedim(0, 1 + of)
            values = values.permute(0, *(1 + of for of in space.order)).contiguous()
            for axis, line in enumerate(space.axes):
                values[(slice(None),) * (1 + axis) + (torch.from_numpy(~line.is_inside),)] = self.fill
        return values

    def fingerprint(self) -> Json:
        """See `VolumeSource`."""
        return {"resampled": self.space.fingerprint(), "order": self.order, "fill": self.fill, "of": self.of.fingerprint()}

    def unpacked(self, folder: Path) -> "ResampledSource":
        """See `Packed`."""
        return ResampledSource(self._unpacked(folder), self.space, self.order, self.fill)
