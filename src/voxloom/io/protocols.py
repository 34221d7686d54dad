"""The two seams for voxels: sources, which are read box by box, and stores, which results are written to."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor

from ..core.boxes import Box
from ..core.geometry.affines import Affine
from ..errors import ImageError

__all__ = [
    "MILLIMETRES",
    "Extent",
    "Json",
    "Space",
    "SpaceCodes",
    "VolumeSource",
    "VolumeSpec",
    "VolumeStore",
    "chunk_bytes",
    "extent_of",
    "is_source",
    "loading_bytes",
    "read_checked",
    "writing_bytes",
]

Json = Any
"""What can be written down as JSON."""

# NIfTI's units of length other than the millimetre.
MILLIMETRES = {"meter": 1000.0, "micron": 0.001}


@dataclass(frozen=True, slots=True)
class SpaceCodes:
    """What NIfTI records of a space beside the affine; kept from reading to saving.

    Example:
        >>> import torch, voxloom as vx
        >>> image = vx.ScalarImage(torch.zeros(1, 8, 8, 8))
        >>> image.codes = vx.SpaceCodes(qform=4, sform=4)  # MNI
    """

    qform: int = 1
    """What the world of the quaternion is: 1 the scanner, 2 another image, 3 Talairach, 4 MNI."""
    sform: int = 1
    """The same of the matrix."""
    qform_world: tuple[tuple[float, ...], ...] = ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1))
    """Matrix from the world of the affine to that of the quaternion, in mm: not the identity where the two forms differ."""
    space_unit: str = "mm"
    time_unit: str = "unknown"
    time_step: float = 1.0
    """Distance between volumes of a 4-D image, in `time_unit`."""


@dataclass(frozen=True, slots=True, eq=False)
class Space:
    """A grid of voxels in the world, whatever they hold.

    Example:
        >>> import numpy as np
        >>> Space((20, 30, 40), np.diag([1.5, 1.5, 3, 1])).fingerprint()["shape"]
        [20, 30, 40]
    """

    shape: tuple[int, int, int]
    """Voxels `(I, J, K)`."""
    affine: Affine
    """RAS+, in millimetres."""
    codes: SpaceCodes = field(default_factory=SpaceCodes)

    def fingerprint(self) -> Json:
        """Say what tells it from others."""
        return {"shape": list(self.shape), "affine": self.affine.tolist(), "codes": repr(self.codes)}


@dataclass(frozen=True, slots=True)
class VolumeSpec:
    """What a volume is, before any voxel of it is read or written.

    Example:
        >>> import numpy as np, torch, voxloom as vx
        >>> spec = vx.VolumeSpec((1, 20, 30, 40), torch.uint8, np.eye(4), is_labels=True)
        >>> spec.num_bytes, spec.box.shape
        (24000, (20, 30, 40))
    """

    shape: tuple[int, int, int, int]
    """Channels and voxels `(C, I, J, K)`."""
    dtype: torch.dtype
    """Type of the voxels, once they are a tensor."""
    affine: Affine
    """RAS+, in millimetres."""
    codes: SpaceCodes = field(default_factory=SpaceCodes)
    is_labels: bool = False
    """Whether the values are labels, rather than intensities or scores."""
    stored: str | None = None
    """Type that they are to be stored in, such as `"uint16"`, if that is another one which holds them all."""

    @property
    def box(self) -> Box:
        """All voxels `(I, J, K)`."""
        return Box.of_shape(self.shape[1:])

    @property
    def num_bytes(self) -> int:
        """Bytes of all voxels in memory."""
        return math.prod(self.shape) * self.dtype.itemsize


class VolumeSource(Protocol):
    """A volume that is read box by box: an image, a file, an array, or a view of another source.

    It may be read from any thread, by one at a time; pickled, it is read by another process too. `voxloom.testing.check_source`
    tests one of your own.

    Example:
        >>> import numpy as np, torch, voxloom as vx
        >>> class Distance:
        ...     # millimetres from the middle
        ...     shape, dtype, affine, codes = (1, 60, 60, 60), torch.float32, np.eye(4), vx.SpaceCodes()
        ...     chunks, resident_bytes, paths = (60, 60, 60), 0, ()
        ...     def read(self, box):
        ...         axes = [torch.arange(start, stop) - 29.5 for start, stop in zip(box.start, box.stop)]
        ...         return sum(axis**2 for axis in torch.meshgrid(*axes, indexing="ij")).sqrt()[None]
        ...     def fingerprint(self):
        ...         return "distance"
        >>> vx.ScalarImage(Distance()).shape
        (1, 60, 60, 60)
        >>> sphere = vx.predict(lambda batch: (batch < 20).float(), Distance(), patch_size=32)
        >>> int(sphere.data.round().sum())
        33552
    """

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Channels and voxels `(C, I, J, K)`."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Type of what is read."""
        ...

    @property
    def affine(self) -> Affine:
        """RAS+ matrix of 4 × 4 from voxels to millimetres, in float64."""
        ...

    @property
    def codes(self) -> SpaceCodes:
        """What NIfTI records of the space beside the affine: `SpaceCodes()` where there is nothing to say."""
        ...

    @property
    def chunks(self) -> tuple[int, int, int]:
        """Voxels that are read together: boxes of whole chunks are quickest."""
        ...

    @property
    def resident_bytes(self) -> int:
        """Memory that reading takes beside a box, since the whole volume is read for it; 0 if it can be read in parts."""
        ...

    @property
    def paths(self) -> tuple[Path, ...]:
        """Files and folders that it is read from."""
        ...

    def read(self, box: Box) -> Tensor:
        """Read all channels of a box of voxels `(I, J, K)`.

        Returns:
            Tensor `(C, *box.shape)`, which may be a view of memory that others see too: it must not be written to.
        """
        ...

    def fingerprint(self) -> Json:
        """Say what tells this volume from others: of files their names, size, time and header, of memory a hash of the values."""
        ...


def is_source(thing: Any) -> TypeGuard[VolumeSource]:
    """Whether something is a source of voxels, by what it offers."""
    return all(hasattr(thing, name) for name in ("shape", "dtype", "affine", "read", "fingerprint"))


def loading_bytes(source: VolumeSource, is_unpacked: bool = False) -> int:
    """Memory that reading takes beside the resident bytes, for a moment, such as a decoder's copy; 0 if a source states none.

    Args:
        source: the source.
        is_unpacked: whether its files are unpacked to the disk; see `Packed`.
    """
    saved = int(getattr(source, "packed_loading_bytes", 0)) if is_unpacked else 0
    return int(getattr(source, "loading_bytes", 0)) - saved


def keeps_whole(source: VolumeSource) -> bool:
    """Whether a source that can only be read whole keeps what it has read, so that the next box costs nothing."""
    return bool(getattr(source, "keeps_whole", False))


def chunk_bytes(source: VolumeSource) -> int:
    """Memory that all chunks of a source would take in the cache of decoded chunks; 0 if it puts none there."""
    return int(getattr(source, "chunk_bytes", 0))


def writing_bytes(store: "VolumeStore", spec: "VolumeSpec") -> int:
    """Memory that a store takes while it writes a result, beside what it is given: that of its method `writing_bytes`, or 0."""
    method = getattr(store, "writing_bytes", None)
    return 0 if method is None else int(method(spec))


Extent = tuple[tuple[float, float], ...]
"""Where a volume begins and ends along each axis, in voxels: at -0.5 and at their number less 0.5, if it is a stored one."""


def extent_of(source: VolumeSource) -> Extent:
    """Say where a volume begins and ends: one that was resampled stands for the volume that it is of, to less than a voxel."""
    given: Extent | None = getattr(source, "extent", None)
    return tuple((-0.5, size - 0.5) for size in source.shape[1:]) if given is None else given


def read_checked(source: VolumeSource, box: Box) -> Tensor:
    """Read a box, and check that what comes is what the source says of itself: it would be broadcast, or rounded, in silence.

    Raises:
        ImageError: if it has another shape or type.
    """
    values = source.read(box)
    shape = (source.shape[0], *box.shape)
    if tuple(values.shape) != shape or values.dtype != source.dtype:
        raise ImageError(
            f"{type(source).__name__}.read returned {values.dtype} of shape {tuple(values.shape)} for the voxels {box.start} to"
            f" {box.stop}: it must be {source.dtype} of shape {shape}, as its dtype and shape say"
        )
    return values


@runtime_checkable
class VolumeStore(Protocol):
    """Takes a result, and publishes it when it is whole. Its methods are called one at a time, though not all from one thread.

    First comes `check`; then `create`, or `reopen` for a run that was interrupted; then `write`, once for each voxel, in boxes
    that do not overlap, with `flush` in between and at the end; and last `commit`, or after an error `abort`. After `reopen` come
    those boxes again that were written since the last `flush`. A store that takes memory while it writes, beside what it is
    given, has a method `writing_bytes(spec)` that says how much, for the plan. `voxloom.testing.check_store` tests one of your
    own, and `voxloom.testing.MemoryStore` shows how little there is to it.

    Example:
        >>> import pathlib, tempfile, torch, voxloom as vx
        >>> from voxloom.testing import MemoryStore
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = MemoryStore({}, pathlib.Path(folder) / "result")
        ...     vx.predict(torch.nn.Identity(), torch.rand(1, 32, 32, 32), patch_size=16, output=store).shape
        (1, 32, 32, 32)
    """

    @property
    def supports_resume(self) -> bool:
        """Whether what was flushed can be reopened by another process."""
        ...

    @property
    def path(self) -> Path | None:
        """Where the result will be: a run keeps its log beside it, and no two runs have one path at a time.

        A store that is elsewhere may name a place for the log; None for one without a log, which cannot be resumed.
        """
        ...

    @property
    def chunk_shape(self) -> tuple[int, int, int] | None:
        """Voxels that are stored together, so that boxes of whole chunks are quickest to write; None for any.

        It is for plans of later versions: those of this one do not look at it.
        """
        ...

    def check(self) -> None:
        """Check, before anything is computed, that nothing would be replaced that must not be.

        Raises:
            TargetExistsError: says what is there.
        """
        ...

    def create(self, spec: VolumeSpec, run: str) -> None:
        """Make ready for a result. What other runs have left, or have published, stays as it is.

        Args:
            spec: what the result will be.
            run: name of the run, of letters and digits; what is not whole yet goes by it.
        """
        ...

    def reopen(self, spec: VolumeSpec, run: str) -> None:
        """Go on with what a run has flushed.

        Raises:
            RecordError: if it is gone, damaged, or was created for something else.
        """
        ...

    def write(self, box: Box, values: Tensor) -> None:
        """Take a block.

        Args:
            box: voxels `(I, J, K)`.
            values: tensor `(C, *box.shape)` on the CPU, which the store may keep, but not change.
        """
        ...

    def flush(self) -> None:
        """Bring what was written to where a crash does not reach it."""
        ...

    def commit(self, sidecar: Mapping[str, Json], run: str) -> Any:
        """Publish the result.

        After an interruption it is called again, by a process that has not opened the store: then it does what is missing.

        Args:
            sidecar: how the result was made; empty if nothing is to be said of that.
            run: name of the run.

        Returns:
            What `predict` returns; a path becomes the image of that file.

        Raises:
            TargetExistsError: if something has appeared there meanwhile that must not be replaced; a later call may publish it.
        """
        ...

    def abort(self) -> None:
        """No more will come. What was flushed stays, if the store can be resumed."""
        ...

    def discard(self, run: str) -> None:
        """Remove what an unfinished run has left, if there is anything."""
        ...
