"""NIfTI, Analyze and MGH through nibabel's headers: mapped where the file is not compressed, streamed where it is."""

import contextlib
import functools
import threading
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import nibabel as nib
import numpy as np
import torch
from isal import igzip
from nibabel.fileslice import fileslice
from nibabel.openers import Opener
from torch import Tensor

from ...core import memory
from ...core.boxes import Box
from ...errors import CorruptImageError, UnsupportedImageError, VoxloomError
from ..space import SPACE_TOLERANCE, Affine, corner_displacement, spacing_of
from .base import SpaceCodes, VolumeInfo, torch_dtype, widest_unsigned

__all__ = ["NibabelFile"]

COMPRESSED = (".gz", ".mgz", ".bz2", ".zst")
# Planes that are turned from the file's order (first axis fastest) into a tensor's at a time: as fast as it gets.
PLANES = 16
# The most that gzip can have shrunk anything.
GREATEST_GZIP_RATIO = 1032
READ_ERRORS = (OSError, EOFError, ValueError, zlib.error, igzip.BadGzipFile)
# What nibabel raises when the header itself is damaged.
HEADER_ERRORS = (
    *READ_ERRORS,
    nib.filebasedimages.ImageFileError,
    nib.spatialimages.HeaderDataError,
    nib.spatialimages.HeaderTypeError,
    nib.wrapstruct.WrapStructError,
    nib.freesurfer.mghformat.MGHError,
    ArithmeticError,
    LookupError,
    TypeError,
)


class NibabelFile:
    """A volume in a file that nibabel can read.

    Args:
        file: a path, or a file object of an uncompressed file, of which only the bytes of a box are read.
        image_class: class of nibabel's that reads a file object.
    """

    def __init__(self, file: Path | IO[bytes], image_class: Any = nib.Nifti1Image) -> None:
        self.file = file
        self.image_class = image_class
        self._lock = threading.Lock()
        self._file_number: int | None = None
        self.name = str(file) if isinstance(file, Path) else str(getattr(file, "name", "the file object"))
        try:
            self._read_header()
        except VoxloomError:
            raise
        except HEADER_ERRORS as error:
            raise CorruptImageError(f"{self.name} is not an image that can be read: {error}") from error
        self._check_size()

    def read(self, box: Box) -> Tensor:
        """Read a box `(C, I, J, K)` into a new tensor; see `VolumeReader`."""
        out = memory.empty(box.shape, self.info.dtype)
        wanted = self._wanted(box)
        parts = out.split_with_sizes([len(samples) for samples in wanted.values()])
        targets = dict(zip(wanted, parts, strict=True))
        i, j, k = box.slices[1:]
        try:
            for volume, first, planes in self._planes(list(wanted), k, (i, j)):
                values = self._values(self._samples(planes)[wanted[volume]])
                targets[volume].narrow(3, first - k.start, values.shape[3]).copy_(values)
        except UnsupportedImageError:
            raise
        except READ_ERRORS as error:
            raise CorruptImageError(f"{self.name} cannot be read to its end: {error}. Copy or download it again") from error
        return out

    def _wanted(self, box: Box) -> dict[int, list[int]]:
        """Say which volumes the channels of a box are in, and which samples of each: only colours have more than one."""
        wanted: dict[int, list[int]] = {}
        for channel in range(box.start[0], box.stop[0]):
            wanted.setdefault(channel // self.samples, []).append(channel % self.samples)
        return wanted

    def _samples(self, planes: np.ndarray) -> np.ndarray:
        """Put the samples of a voxel, such as red, green and blue, on an axis of their own in front."""
        names = planes.dtype.names
        return planes[None] if names is None else np.stack([planes[name] for name in names])

    def _values(self, planes: np.ndarray) -> Tensor:
        """Turn stored numbers into a tensor of the values they stand for."""
        widest_unsigned(planes, self.name)
        if self.slope != 1 or self.intercept != 0:
            planes = planes.astype(np.float64) * self.slope + self.intercept
        native = np.array(planes, dtype=_numpy_dtype(self.info.dtype), order="F")
        return torch.from_numpy(native)

    def _planes(self, volumes: list[int], k: slice, ij: tuple[slice, slice]) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yield `(volume, first plane, planes)` of stored numbers, in the order of the file."""
        starts = range(k.start, k.stop, PLANES)
        blocks = [(volume, start, min(start + PLANES, k.stop)) for volume in volumes for start in starts]
        if self.sliceable:
            yield from ((volume, start, self._cut((*ij, slice(start, stop), volume))) for volume, start, stop in blocks)
            return
        assert self.data_path is not None
        rows, columns, depth, count = self.file_shape
        plane_bytes = rows * columns * self.raw_dtype.itemsize
        with _open_plain_or_compressed(self.data_path) as stream:
            for volume, start, stop in blocks:
                stream.seek(self.offset + (volume * depth + start) * plane_bytes)
                block = np.empty((rows, columns, stop - start), dtype=self.raw_dtype, order="F")
                _fill(stream, block)
                yield volume, start, block[ij]
            if blocks and blocks[-1][0] == count - 1 and blocks[-1][2] == depth:
                while stream.read(2**20):
                    pass  # The checksum stands at the end of the stream, and is compared when that is reached.

    def _cut(self, slicer: tuple[slice | int, ...]) -> np.ndarray:
        if self._mapped is not None:
            self._check_size()  # to touch a mapped page that was cut off since would end the process
            return np.asarray(self._mapped[slicer])
        with self._lock:
            return np.asarray(fileslice(self.file, slicer, self.file_shape, self.raw_dtype, self.offset, order="F"))

    @functools.cached_property
    def _mapped(self) -> np.ndarray | None:
        """The voxels in the file, of which the system reads those that are used; None for file objects."""
        if self.data_path is None:
            return None
        return np.memmap(self.data_path, self.raw_dtype, "r", self.offset, self.file_shape, order="F")

    def _read_header(self) -> None:
        image = self._load()
        proxy = image.dataobj
        self.stored_dtype = proxy.dtype if proxy.dtype.names is None else np.dtype("uint8")
        self.samples = len(proxy.dtype.names or "1")
        self.raw_dtype = proxy.dtype
        self.offset = int(proxy.offset)
        self.slope, self.intercept = float(proxy.slope), float(proxy.inter)
        self.file_shape = self._spatial_and_channels(proxy.shape)
        self.data_path = Path(image.file_map["image"].filename or self.file) if isinstance(self.file, Path) else None
        self.sliceable = self.data_path is None or self.data_path.suffix.lower() not in COMPRESSED
        i, j, k, volumes = self.file_shape
        self.info = VolumeInfo(
            shape=(volumes * self.samples, i, j, k),
            dtype=self._tensor_dtype(),
            affine=_affine_of(image, self.name),
            codes=_codes_of(image),
        )

    def _load(self) -> Any:
        if not isinstance(self.file, Path):
            self.file.seek(0)
            return _from_stream(self.file, self.image_class)
        if self.file.suffix.lower() in (".mgh", ".mgz"):
            # nib.load would leave the file open until it is collected as garbage.
            with _open_plain_or_compressed(self.file) as stream:
                return _from_stream(stream, nib.MGHImage)
        return nib.load(self.file)

    def _spatial_and_channels(self, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
        """Give `(I, J, K, volumes)`: volumes are the fourth axis, or the fifth where the fourth is 1 (vectors)."""
        if len(shape) >= 5 and shape[3] == 1:
            shape = shape[:3] + shape[4:]
        while len(shape) > 4 and shape[-1] == 1:
            shape = shape[:-1]
        if not 1 <= len(shape) <= 4:
            raise UnsupportedImageError(
                f"{self.name} has shape {shape}: an image must be 2-D, 3D or 4D; save its parts on their own"
            )
        if min(shape) < 1:
            raise CorruptImageError(f"{self.name} has shape {shape}, and so no voxels: its header is damaged")
        i, j, k, volumes = (*shape, 1, 1, 1)[:4]
        return int(i), int(j), int(k), int(volumes)

    def _tensor_dtype(self) -> torch.dtype:
        plain = torch_dtype(self.stored_dtype, self.name)
        if (self.slope == 1 and self.intercept == 0) or plain == torch.float64:
            return plain
        return torch.float64 if self.stored_dtype.kind in "iu" and self.stored_dtype.itemsize > 2 else torch.float32

    def _check_size(self) -> None:
        """Compare what the header promises with the size of the file, before memory is asked for.

        A file of this name that has taken the place of the one that is mapped does not matter.
        """
        if self.data_path is None or self.data_path.suffix.lower() in (".bz2", ".zst"):
            return
        status = self.data_path.stat()
        if self._file_number not in (None, status.st_ino):
            return
        self._file_number = status.st_ino
        claimed = self.offset + int(np.prod(self.file_shape, dtype=object)) * self.raw_dtype.itemsize
        size = status.st_size
        most = size if self.sliceable else size * GREATEST_GZIP_RATIO
        if self.offset < 0 or claimed > most:
            raise CorruptImageError(
                f"{self.name} claims {self.info.shape} voxels, which take {claimed} bytes, but {self.data_path.name} has {size}"
                f"{'' if self.sliceable else ' compressed'}: it is truncated, or its header is damaged. Copy or download it again"
            )


def _open_plain_or_compressed(path: Path) -> Any:
    return igzip.open(path, "rb") if path.suffix.lower() in (".gz", ".mgz") else Opener(str(path))


def _from_stream(stream: Any, image_class: Any) -> Any:
    """Read a header from a file object; the object is used no more once this has returned."""
    holder = nib.fileholders.FileHolder(fileobj=stream)
    return image_class.from_file_map({key: holder for key, _ in image_class.files_types}, mmap=False)


def _fill(stream: Any, block: np.ndarray) -> None:
    """Read exactly as many bytes as an array in file order holds."""
    view = memoryview(cast(Any, block.reshape(-1, order="F").view(np.uint8)))
    done = 0
    while done < len(view):
        count = stream.readinto(view[done:])
        if not count:
            raise EOFError(f"it ends {len(view) - done} bytes before the last voxel that was asked for")
        done += count


def _numpy_dtype(dtype: torch.dtype) -> np.dtype:
    return torch.empty(0, dtype=dtype).numpy().dtype


def _affine_of(image: Any, name: str) -> Affine:
    """Take the sform where there is one, and warn if the qform says otherwise; otherwise what nibabel takes."""
    with contextlib.suppress(AttributeError, nib.spatialimages.HeaderDataError):
        sform, sform_code = image.get_sform(coded=True)
        qform, qform_code = image.get_qform(coded=True)
        if sform_code and qform_code and np.isfinite(sform).all() and np.isfinite(qform).all():
            shape = (*image.shape, 1, 1)[:3]
            distance = corner_displacement(sform, qform, shape)
            if distance > SPACE_TOLERANCE * min(spacing_of(sform)):
                warnings.warn(
                    f"{name}: sform and qform disagree by up to {distance:.3g} mm; the sform is used",
                    RuntimeWarning,
                    stacklevel=6,
                )
    return np.asarray(image.affine, dtype=np.float64)


def _codes_of(image: Any) -> SpaceCodes:
    header = image.header
    if not isinstance(header, nib.Nifti1Header):
        return SpaceCodes()
    space_unit, time_unit = header.get_xyzt_units()
    zooms = header.get_zooms()
    time_step = float(zooms[3]) if len(zooms) > 3 else 1.0
    return SpaceCodes(int(header["qform_code"]), int(header["sform_code"]), space_unit, time_unit, time_step)
