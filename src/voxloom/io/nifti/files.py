"""NIfTI, Analyze and MGH through nibabel's headers: mapped where the file is not compressed, streamed where it is."""

import contextlib
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Self, cast

import nibabel as nib
import numpy as np
import torch
from nibabel.fileslice import fileslice
from torch import Tensor

from ...core.boxes import Box
from ...core.copying import copy_voxels
from ...core.geometry.affines import SPACE_TOLERANCE, Affine, corner_displacement, spacing_of
from ...core.sizes import pretty_mm
from ...errors import CorruptImageError, UnsupportedImageError, VoxloomError
from ...runtime import memory
from ..arrays.memory import torch_dtype, widest_unsigned
from ..compression import GREATEST_GZIP_RATIO, READ_ERRORS, is_compressed, open_compressed
from ..files import FileSource, explained
from ..protocols import MILLIMETRES, SpaceCodes, VolumeSpec

__all__ = ["NibabelFile"]

# Planes that are turned from the file's order (first axis fastest) into a tensor's at a time: as fast as it gets.
PLANES = 16


class _NoExtensions(nib.nifti1.Nifti1Extensions):
    """What may stand between header and voxels, up to 2 GB: nothing here needs it."""

    @classmethod
    def from_fileobj(cls, fileobj: Any, size: int, byteswap: bool) -> Self:
        return cls()


class _Nifti1Header(nib.Nifti1Header):
    exts_klass = _NoExtensions


class _Nifti2Header(nib.Nifti2Header):
    exts_klass = _NoExtensions


class _Nifti1Image(nib.Nifti1Image):
    header_class = _Nifti1Header


class _Nifti2Image(nib.Nifti2Image):
    header_class = _Nifti2Header


class NibabelFile(FileSource):
    """A volume in a file that nibabel can read.

    Args:
        file: a path, or a file object of an uncompressed file, of which only the bytes of a box are read.
        image_class: class of nibabel's that reads a file object.
    """

    def __init__(self, file: Path | IO[bytes], image_class: Any = nib.Nifti1Image) -> None:
        self.file = file
        self.image_class = image_class
        self._lock = threading.Lock()
        self.name = str(file) if isinstance(file, Path) else str(getattr(file, "name", "the file object"))
        try:
            self._read_header()
            self._check_size()
        except VoxloomError:
            raise
        except MemoryError:
            raise
        except Exception as error:  # whatever nibabel, or what it calls, stumbles over in a damaged header
            raise explained(error, self.name, "is not an image that can be read") from error
        self.remember()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.file, self.image_class)  # another process opens the file anew

    def read(self, box: Box) -> Tensor:
        """Read a box of voxels into a new tensor; see `VolumeSource`."""
        self.check_unchanged()
        out = memory.empty((self.shape[0], *box.shape), self.dtype)
        i, j, k = box.slices
        try:
            for volume, first, planes in self._planes(k, (i, j)):
                values = self._values(self._samples(planes))
                target = out[volume * self.samples : (volume + 1) * self.samples]
                copy_voxels(target.narrow(3, first - k.start, values.shape[3]).numpy(), values)
        except VoxloomError:
            raise
        except READ_ERRORS as error:
            raise explained(error, self.name, "cannot be read to its end") from error
        return out

    @property
    def loading_bytes(self) -> int:
        """A few planes: files are unpacked as they are read."""
        return 3 * PLANES * self.file_shape[0] * self.file_shape[1] * 8

    def _samples(self, planes: np.ndarray) -> np.ndarray:
        """Put the samples of a voxel, such as red, green and blue, on an axis of their own in front."""
        names = planes.dtype.names
        return planes[None] if names is None else np.stack([planes[name] for name in names])

    def _values(self, planes: np.ndarray) -> np.ndarray:
        """Turn stored numbers into the values they stand for."""
        widest_unsigned(planes, self.name)
        return planes.astype(np.float64) * self.slope + self.intercept if self._is_scaled else planes

    @property
    def _is_scaled(self) -> bool:
        return self.slope != 1 or self.intercept != 0

    def _planes(self, k: slice, ij: tuple[slice, slice]) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yield `(volume, first plane, planes)` of stored numbers, in the order of the file."""
        # What is copied from the mapped file as it is takes no memory of its own.
        is_direct = self.is_sliceable and self.data_path is not None and self.samples == 1 and not self._is_scaled
        size = max(1, k.stop - k.start) if is_direct else PLANES
        starts = range(k.start, k.stop, size)
        blocks = [(volume, start, min(start + size, k.stop)) for volume in range(self.file_shape[3]) for start in starts]
        if self.is_sliceable:
            stored = self._mapped()
            yield from ((volume, start, self._cut(stored, (*ij, slice(start, stop), volume))) for volume, start, stop in blocks)
            return
        assert self.data_path is not None
        rows, columns, depth, _ = self.file_shape
        plane_bytes = rows * columns * self.raw_dtype.itemsize
        with open_compressed(self.data_path) as stream:
            for volume, start, stop in blocks:
                stream.seek(self.offset + (volume * depth + start) * plane_bytes)
                block = np.empty((rows, columns, stop - start), dtype=self.raw_dtype, order="F")
                _fill(stream, block)
                yield volume, start, block[ij]
            if k.stop == depth:
                while stream.read(2**20):
                    pass  # The checksum stands at the end of the stream, and is compared when that is reached.

    def _mapped(self) -> np.ndarray | None:
        """The voxels in the file, of which the system reads those that are used; None for file objects.

        It is mapped for each box anew, because a mapping keeps the file open.
        """
        if self.data_path is None:
            return None
        return np.memmap(self.data_path, self.raw_dtype, "r", self.offset, self.file_shape, order="F")

    def _cut(self, mapped: np.ndarray | None, slicer: tuple[slice | int, ...]) -> np.ndarray:
        if mapped is not None:
            return np.asarray(mapped[slicer])
        with self._lock:
            return np.asarray(fileslice(self.file, slicer, self.file_shape, self.raw_dtype, self.offset, order="F"))

    def _read_header(self) -> None:
        image = self._load()
        proxy = image.dataobj
        self.stored_dtype = proxy.dtype if proxy.dtype.names is None else np.dtype("uint8")
        self.samples = len(proxy.dtype.names or "1")
        self.raw_dtype = proxy.dtype
        self.offset = int(proxy.offset)
        # Of colours a scale means nothing, as the standard says.
        self.slope, self.intercept = (float(proxy.slope), float(proxy.inter)) if self.samples == 1 else (1.0, 0.0)
        header = image.header
        if isinstance(self.file, Path) and getattr(header, "is_single", False) and self.offset < header.single_vox_offset:
            raise CorruptImageError(
                f"{self.name} says that its voxels begin at byte {self.offset}, which is within its header: write it again, with"
                f" vox_offset {header.single_vox_offset} if they follow the header"
            )
        self.file_shape = self._spatial_and_channels(proxy.shape)
        self.data_path = Path(image.file_map["image"].filename or self.file) if isinstance(self.file, Path) else None
        self.is_sliceable = self.data_path is None or not is_compressed(self.data_path)
        self.paths = () if self.data_path is None else tuple(dict.fromkeys((cast(Path, self.file), self.data_path)))
        i, j, k, volumes = self.file_shape
        self.spec = VolumeSpec((volumes * self.samples, i, j, k), self._tensor_dtype(), *space_of(image, self.name))

    def _load(self) -> Any:
        if not isinstance(self.file, Path):
            self.file.seek(0)
            return _from_stream(self.file, self.image_class)
        if self.file.suffix.lower() in (".hdr", ".img") or self.file.name.lower().endswith(".img.gz"):
            return nib.load(self.file)
        # nib.load goes by the ending alone, and leaves MGH files open until they are collected as garbage.
        with open_compressed(self.file) as stream:
            return _from_stream(stream, _class_of(self.file, stream))

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
        if not self._is_scaled or plain == torch.float64:
            return plain
        return torch.float64 if self.stored_dtype.kind in "iu" and self.stored_dtype.itemsize > 2 else torch.float32

    def _check_size(self) -> None:
        """Compare what the header promises with the size of the file, before memory is asked for."""
        if self.data_path is None or self.data_path.suffix.lower() == ".bz2":
            return
        claimed = self.offset + int(np.prod(self.file_shape, dtype=object)) * self.raw_dtype.itemsize
        size = self.data_path.stat().st_size
        most = size if self.is_sliceable else size * GREATEST_GZIP_RATIO
        if self.offset < 0 or claimed > most:
            raise CorruptImageError(
                f"{self.name} claims {self.shape} voxels, which take {claimed} bytes, but {self.data_path.name} has {size}"
                f"{'' if self.is_sliceable else ' compressed'}: it is truncated, or its header is damaged: copy it again"
            )


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


def _class_of(path: Path, stream: Any) -> Any:
    """Say which of nibabel's classes reads a file of a single part: NIfTI-1 and 2 begin with the size of their header."""
    if path.suffix.lower() in (".mgh", ".mgz"):
        return nib.MGHImage
    start = stream.read(4)
    stream.seek(0)
    is_second = 540 in (int.from_bytes(start, "little"), int.from_bytes(start, "big"))
    return _Nifti2Image if is_second else _Nifti1Image


def space_of(image: Any, name: str) -> tuple[Affine, SpaceCodes]:
    """Give the affine of an image of nibabel's in mm, and what NIfTI records beside it."""
    affine, qform_world = _affine_of(image, name)
    return affine, _codes_of(image, qform_world)


def _affine_of(image: Any, name: str) -> tuple[Affine, tuple[tuple[float, ...], ...]]:
    """Give the affine in mm, and the matrix from its world to that of the qform.

    The sform counts where there is one, with a warning if the qform says otherwise; then what nibabel takes.
    """
    unit = MILLIMETRES.get(_units_of(image)[0], 1.0)
    scale = np.diag([*[unit] * 3, 1.0])
    affine = scale @ np.asarray(image.affine, dtype=np.float64)
    world = np.eye(4)
    with contextlib.suppress(AttributeError, nib.spatialimages.HeaderDataError, np.linalg.LinAlgError):
        sform, sform_code = image.get_sform(coded=True)
        qform, qform_code = image.get_qform(coded=True)
        if sform_code and qform_code and np.isfinite(sform).all() and np.isfinite(qform).all():
            qform = scale @ qform
            distance = corner_displacement(affine, qform, (*image.shape, 1, 1)[:3])
            if distance > SPACE_TOLERANCE * min(spacing_of(affine)):
                world = qform @ np.linalg.inv(affine)
                warnings.warn(
                    f"{name}: sform and qform disagree by up to {distance:.3g} mm; the sform is used",
                    RuntimeWarning,
                    stacklevel=7,
                )
        elif sform_code and np.isfinite(sform).all():
            own, stated = spacing_of(affine), [unit * float(size) for size in image.header.get_zooms()[:3]]
            sides = zip(own, stated, image.shape, strict=False)
            if any(abs(one - other) * size > SPACE_TOLERANCE * min(own) for one, other, size in sides):
                warnings.warn(
                    f"{name}: voxels are {pretty_mm(own)} by the sform, but {pretty_mm(stated)} by pixdim; the sform is used",
                    RuntimeWarning,
                    stacklevel=7,
                )
    return affine, tuple(map(tuple, world.tolist()))


def _units_of(image: Any) -> tuple[str, str]:
    try:
        space, time = image.header.get_xyzt_units()
    except (AttributeError, KeyError):
        return "unknown", "unknown"  # not NIfTI, or a code that means nothing
    return space, time


def _codes_of(image: Any, qform_world: tuple[tuple[float, ...], ...]) -> SpaceCodes:
    header = image.header
    if not isinstance(header, nib.Nifti1Header):
        return SpaceCodes()
    space_unit, time_unit = _units_of(image)
    zooms = header.get_zooms()
    time_step = float(zooms[3]) if len(zooms) > 3 else 1.0
    return SpaceCodes(int(header["qform_code"]), int(header["sform_code"]), qform_world, space_unit, time_unit, time_step)
