"""NIfTI, Analyze and MGH through nibabel's headers: mapped where the file is not compressed, streamed where it is."""

import contextlib
import os
import threading
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import nibabel as nib
import numpy as np
import torch
from isal import igzip
from nibabel.fileslice import fileslice
from nibabel.openers import Opener
from torch import Tensor

from ...core import memory
from ...core.boxes import Box
from ...errors import CorruptImageError, UnsupportedImageError
from ..space import SPACE_TOLERANCE, Affine, corner_displacement, spacing_of
from .base import SpaceCodes, VolumeInfo, torch_dtype, widest_unsigned

__all__ = ["NibabelFile"]

COMPRESSED = (".gz", ".mgz", ".bz2", ".zst")
# Planes that are turned from the file's order (first axis fastest) into a tensor's at a time: as fast as it gets.
PLANES = 16
# The most that gzip can have shrunk anything.
GREATEST_GZIP_RATIO = 1032
READ_ERRORS = (OSError, EOFError, ValueError, zlib.error, igzip.BadGzipFile)


class NibabelFile:
    """A volume in a file that nibabel can read.

    Args:
        file: a path, or a file object of an uncompressed file, of which only the bytes of a box are read.
        image_class: class of nibabel's that reads a file object.
    """

    def __init__(self, file: Path | IO[bytes], image_class: type[nib.Nifti1Image] = nib.Nifti1Image) -> None:
        self.file = file
        self.image_class = image_class
        self._lock = threading.Lock()
        self.name = str(file) if isinstance(file, Path) else str(getattr(file, "name", "the file object"))
        image = self._load()
        proxy = image.dataobj
        self.stored_dtype = proxy.dtype if proxy.dtype.names is None else np.dtype("uint8")
        self.samples = len(proxy.dtype.names or "1")
        self.raw_dtype = proxy.dtype
        self.offset = int(proxy.offset)
        self.slope, self.intercept = float(proxy.slope), float(proxy.inter)
        self.file_shape = self._spatial_and_channels(proxy.shape)
        self.data_path = Path(image.file_map["image"].filename) if isinstance(file, Path) else None
        self.sliceable = self.data_path is None or self.data_path.suffix.lower() not in COMPRESSED
        *spatial, volumes = self.file_shape
        self.info = VolumeInfo(
            shape=(volumes * self.samples, *spatial),
            dtype=self._tensor_dtype(),
            affine=_affine_of(image, self.name),
            codes=_codes_of(image),
        )
        self._check_size()

    def __getstate__(self) -> dict[str, Any]:
        return {"file": self.file, "image_class": self.image_class}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["file"], state["image_class"])  # type: ignore[misc]

    def read(self, box: Box) -> Tensor:
        """Read a box `(C, I, J, K)` into a new tensor; see `VolumeReader`."""
        out = memory.empty(box.shape, self.info.dtype)
        channels = range(box.start[0], box.stop[0])
        volumes = sorted({channel // self.samples for channel in channels})
        i, j, _ = box.slices[1:]
        try:
            for volume, first, planes in self._planes(volumes, box.start[3], box.stop[3], (i, j)):
                if self.samples > 1:
                    planes = np.stack([planes[name] for name in planes.dtype.names])
                else:
                    planes = planes[None]
                wanted = [channel for channel in channels if channel // self.samples == volume]
                values = self._values(planes[[channel % self.samples for channel in wanted]])
                target = out[wanted[0] - box.start[0] : wanted[-1] + 1 - box.start[0]]
                target[..., first - box.start[3] : first - box.start[3] + values.shape[-1]] = values
        except READ_ERRORS as error:
            if isinstance(error, UnsupportedImageError):
                raise
            raise CorruptImageError(f"{self.name} cannot be read to its end: {error}. Copy or download it again") from error
        return out

    def _values(self, planes: np.ndarray) -> Tensor:
        """Turn stored numbers into a tensor of the values they stand for."""
        widest_unsigned(planes, self.name)
        if self.slope != 1 or self.intercept != 0:
            planes = planes.astype(np.float64) * self.slope + self.intercept
        native = np.array(planes, dtype=_numpy_dtype(self.info.dtype), order="F")
        return torch.from_numpy(native)

    def _planes(self, volumes: list[int], start: int, stop: int, ij: tuple[slice, slice]) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yield `(volume, first plane, planes)` of stored numbers, in the order of the file."""
        blocks = [(volume, k, min(k + PLANES, stop)) for volume in volumes for k in range(start, stop, PLANES)]
        if self.sliceable:
            yield from ((volume, k, self._cut((*ij, slice(k, end), volume))) for volume, k, end in blocks)
            return
        assert self.data_path is not None
        rows, columns, depth, count = self.file_shape
        plane_bytes = rows * columns * self.raw_dtype.itemsize
        with _open_compressed(self.data_path) as stream:
            for volume, k, end in blocks:
                stream.seek(self.offset + (volume * depth + k) * plane_bytes)
                block = np.empty((rows, columns, end - k), dtype=self.raw_dtype, order="F")
                _fill(stream, block)
                yield volume, k, block[ij]
            if blocks and blocks[-1][0] == count - 1 and blocks[-1][2] == depth:
                while stream.read(2**20):
                    pass  # The checksum stands at the end of the stream, and is compared when that is reached.

    def _cut(self, slicer: tuple[slice | int, ...]) -> np.ndarray:
        if self.data_path is not None:
            mapped = np.memmap(self.data_path, self.raw_dtype, "r", self.offset, self.file_shape, order="F")
            return np.asarray(mapped[slicer])
        with self._lock:
            part = fileslice(self.file, slicer, self.file_shape, self.raw_dtype, self.offset, order="F")
        return np.asarray(part)

    def _load(self) -> Any:
        try:
            if isinstance(self.file, Path):
                return nib.load(self.file)
            self.file.seek(0)
            holder = nib.fileholders.FileHolder(fileobj=self.file)
            return self.image_class.from_file_map({key: holder for key, _ in self.image_class.files_types}, mmap=False)
        except (nib.filebasedimages.ImageFileError, nib.spatialimages.HeaderDataError, *READ_ERRORS) as error:
            raise CorruptImageError(f"{self.name} is not an image that can be read: {error}") from error

    def _spatial_and_channels(self, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
        """Give `(I, J, K, volumes)`: volumes are the fourth axis, or the fifth where the fourth is 1 (vectors)."""
        if len(shape) >= 5 and shape[3] == 1:
            shape = shape[:3] + shape[4:]
        while len(shape) > 4 and shape[-1] == 1:
            shape = shape[:-1]
        if not 1 <= len(shape) <= 4:
            raise UnsupportedImageError(f"{self.name} has shape {shape}: an image must be 2-D, 3D or 4D; save its parts on their own")
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
        """Compare what the header promises with the size of the file, before memory is asked for."""
        if self.data_path is None:
            return
        claimed = self.offset + int(np.prod(self.file_shape, dtype=object)) * self.raw_dtype.itemsize
        size = os.path.getsize(self.data_path)
        most = size if self.sliceable else size * GREATEST_GZIP_RATIO
        if self.data_path.suffix.lower() in (".bz2", ".zst"):
            return
        if claimed > most:
            raise CorruptImageError(
                f"{self.name} claims {self.info.shape} voxels, which take {claimed} bytes, but {self.data_path.name} has {size}"
                f"{'' if self.sliceable else ' compressed'}: it is truncated, or its header is damaged. Copy or download it again"
            )


def _open_compressed(path: Path) -> Any:
    return igzip.open(path, "rb") if path.suffix.lower() in (".gz", ".mgz") else Opener(str(path))


def _fill(stream: Any, block: np.ndarray) -> None:
    """Read exactly as many bytes as an array in file order holds."""
    view = memoryview(block.reshape(-1, order="F").view(np.uint8))
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
