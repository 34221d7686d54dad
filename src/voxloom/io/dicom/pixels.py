"""Pixels of DICOM files: those that pydicom decodes, and frames that are put in order."""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import torch
from pydicom.pixels.processing import apply_color_lut
from pydicom.pixels.utils import pixel_array
from pydicom.uid import RLELossless
from torch import Tensor

from ...core.boxes import Box
from ...core.copying import copy_voxels
from ...core.geometry.affines import Affine
from ...errors import CorruptImageError, ImageNotFoundError, UnsupportedImageError
from ..arrays.memory import torch_dtype, widest_unsigned
from ..files import FileSource
from ..protocols import VolumeSpec, loading_bytes
from .frames import DAMAGE, EMPTY, DicomHeader, FrameTable, brief, frame_count, is_segmentation, place_of, scales_of

__all__ = ["DecodedFile", "DecodedSlices", "OrderedFrames", "RescaledFrames", "check_size"]

# Planes that are turned from the order of files into a tensor's at a time.
PLANES = 16
# The most that run lengths can have shrunk anything, and that pictures of one colour shrink.
RLE_RATIO, PICTURE_RATIO = 64, 20000


class DecodedFile(FileSource):
    """Frames of a DICOM file, as planes in the order of the file, decoded by pydicom.

    Args:
        opened: the header of the file, whose size was checked.
        is_stored: give what is stored: neither scaled, nor with MONOCHROME1 turned round, nor with a palette's colours.
        affine: RAS+, where the header of this file alone does not tell it.
    """

    is_sliceable = False

    def __init__(self, opened: DicomHeader, is_stored: bool = False, affine: Affine | None = None) -> None:
        path, header = opened.path, opened.data
        self.paths = (path,)
        self._is_stored = is_stored
        # pydicom does not inflate what it is given by its path, and does not guess how it is encoded.
        self._syntax = header.file_meta.TransferSyntaxUID
        self._is_read_first = self._syntax.is_deflated or not opened.has_mark
        count = frame_count(header, path)
        slopes, intercepts = scales_of(header, count)
        is_scaled = not is_stored and bool((slopes != 1).any() or intercepts.any())
        self._scale = (slopes, intercepts) if is_scaled else None
        self._photometric = str(header.get("PhotometricInterpretation", ""))
        is_palette = self._photometric == "PALETTE COLOR" and not is_stored and not is_segmentation(header)
        self._palette = header if is_palette else None
        self._bits = 0 if is_segmentation(header) else int(header.BitsStored) if "BitsStored" in header else 0
        samples = 3 if is_palette else int(header.get("SamplesPerPixel", 1))
        shape = (samples, int(header.Columns), int(header.Rows), count)
        if min(shape) < 1:
            raise CorruptImageError(f"{path} has shape {shape}, and so no voxels: its header is damaged")
        self.stored_dtype = self._stored_dtype(header)
        dtype = torch_dtype(self.stored_dtype, str(path))
        self.spec = VolumeSpec(shape, dtype, place_of(header) if affine is None else affine)

    def read(self, box: Box) -> Tensor:
        """Read a box of voxels into a new tensor; see `VolumeSource`."""
        out = torch.empty((self.shape[0], *box.shape), dtype=self.dtype)
        copy_voxels(out.numpy(), self.planes(box).transpose(3, 2, 1, 0))
        return out

    @property
    def loading_bytes(self) -> int:
        """What is decoded, and what it is scaled to."""
        return (8 + 8 * (self._scale is not None or self._photometric == "MONOCHROME1")) * math.prod(self.shape)

    def planes(self, box: Box) -> np.ndarray:
        """Decode the voxels of a box, in the order of the file: `(K, J, I, C)`."""
        (path,) = self.paths
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                decoded = pixel_array(self._read_first(path) if self._is_read_first else path, raw=self._is_stored)
            if self._palette is not None:
                decoded = apply_color_lut(decoded, self._palette)
        except FileNotFoundError as error:
            raise ImageNotFoundError(f"there is no file {path}") from error
        except DAMAGE as error:
            raise CorruptImageError(f"{path} cannot be decoded: {brief(error)}. Copy it again, or convert it") from error
        if decoded.size != math.prod(self.shape):
            raise CorruptImageError(f"{path} holds pixels of shape {decoded.shape}, and not {self.shape} as its header says")
        widest_unsigned(decoded, str(path))
        values = decoded.reshape(self.shape[::-1])[box.slices[::-1]]
        if self._photometric == "MONOCHROME1" and not self._is_stored and self._bits:
            values = (-1 if values.dtype.kind == "i" else 2**self._bits - 1) - values.astype(np.int64)
        target = torch.empty(0, dtype=self.dtype).numpy().dtype
        if self._scale is None:
            return values.astype(target, copy=False)
        slopes, intercepts = (numbers[box.slices[2]].reshape(-1, 1, 1, 1) for numbers in self._scale)
        if target.kind == "i" or target.kind == "u":  # whole numbers, of which none is larger than this type
            return values.astype(target) * slopes.astype(target) + intercepts.astype(target)
        return (values * slopes + intercepts).astype(target, copy=False)

    def _read_first(self, path: Path) -> Any:
        data = pydicom.dcmread(path, force=True)
        data.file_meta.TransferSyntaxUID = self._syntax
        return data

    def _stored_dtype(self, header: Any) -> np.dtype:
        bits = int(header.BitsAllocated)
        kind = "int" if header.get("PixelRepresentation") else "uint"
        if "PixelRepresentation" not in header and bits >= 32:
            kind = "float"
        if self._palette is not None:
            bits = int(header.RedPaletteColorLookupTableDescriptor[2])
        plain = np.dtype(f"{kind}{max(bits, 8)}")
        if self._scale is None or plain == np.float64:
            return plain
        return np.dtype("float32") if is_segmentation(header) else self._scaled_dtype(header)

    def _scaled_dtype(self, header: Any) -> np.dtype:
        """The least whole type that holds every value that could be stored, as ITK has it; doubles for other scales."""
        assert self._scale is not None
        slopes, intercepts = self._scale
        if (slopes != np.rint(slopes)).any() or (intercepts != np.rint(intercepts)).any():
            return np.dtype("float64")
        bits = int(header.BitsStored)
        least, most = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if header.get("PixelRepresentation") else (0, 2**bits - 1)
        ends = [slopes * least + intercepts, slopes * most + intercepts]
        low, high = min(map(np.min, ends)), max(map(np.max, ends))
        names = ("uint8", "uint16", "uint32") if low >= 0 else ("int8", "int16", "int32")
        fitting = (name for name in names if np.iinfo(name).min <= low and high <= np.iinfo(name).max)
        return np.dtype(next(fitting, "float64"))


class DecodedSlices(FileSource):
    """A series of which each file, decoded by pydicom, holds a slice.

    Args:
        files: the slices, in order.
        affine: RAS+, of all.
    """

    is_sliceable = False

    def __init__(self, files: Sequence[DecodedFile], affine: Affine) -> None:
        self.paths = tuple(path for file in files for path in file.paths)
        self._files = files
        samples, i, j, _ = files[0].shape
        stored, types = {file.stored_dtype for file in files}, {file.dtype for file in files}
        self.stored_dtype = stored.pop() if len(stored) == 1 else None
        self.spec = VolumeSpec((samples, i, j, len(files)), types.pop() if len(types) == 1 else torch.float64, affine)

    @property
    def loading_bytes(self) -> int:
        """Those of some planes."""
        return 2 * PLANES * max(file.loading_bytes for file in self._files)

    def read(self, box: Box) -> Tensor:
        """Read a box of voxels into a new tensor; see `VolumeSource`."""
        out = torch.empty((self.shape[0], *box.shape), dtype=self.dtype)
        plane = Box((*box.start[:2], 0), (*box.stop[:2], 1))
        files = self._files[box.slices[2]]
        for first in range(0, len(files), PLANES):
            planes = np.concatenate([file.planes(plane) for file in files[first : first + PLANES]])
            copy_voxels(out[..., first : first + len(planes)].numpy(), planes.transpose(3, 2, 1, 0))
        return out


class RescaledFrames(FileSource):
    """Frames of which each has a scale of its own.

    Args:
        frames: gives the frames as planes.
        slopes: what the values of each are multiplied by.
        intercepts: and what is added.
    """

    is_sliceable = False

    def __init__(self, frames: FileSource, slopes: np.ndarray, intercepts: np.ndarray) -> None:
        self.paths = frames.paths
        self._frames, self._slopes, self._intercepts = frames, torch.from_numpy(slopes), torch.from_numpy(intercepts)
        # Parts of 1, as of segments, are small numbers; others may be of any size.
        dtype = torch.float32 if frames.dtype == torch.uint8 else torch.float64
        self.spec = VolumeSpec(frames.shape, dtype, frames.affine)

    @property
    def loading_bytes(self) -> int:
        """Doubles, beside what is decoded."""
        return 8 * math.prod(self.shape) + self._frames.resident_bytes + loading_bytes(self._frames)

    def read(self, box: Box) -> Tensor:
        """Read a box of voxels into a new tensor; see `VolumeSource`."""
        k = box.slices[2]
        return (self._frames.read(box).double() * self._slopes[k] + self._intercepts[k]).to(self.dtype)


class OrderedFrames(FileSource):
    """A volume of frames that lie in any order in a file.

    Args:
        frames: gives the frames as planes, in the order of the file.
        table: which of them makes which plane.
    """

    is_sliceable = False

    def __init__(self, frames: FileSource, table: FrameTable) -> None:
        self.paths = frames.paths
        self._frames, self._table = frames, table
        samples, i, j, _ = frames.shape
        channels, planes = table.numbers.shape
        if samples > 1 and channels > 1:
            raise UnsupportedImageError(f"{self.paths[0]} holds {channels} volumes in colours: split it into one file for each")
        self.spec = VolumeSpec((samples * channels, i, j, planes), frames.dtype, table.affine)

    @property
    def resident_bytes(self) -> int:
        """See `VolumeSource`."""
        return self._frames.resident_bytes

    @property
    def loading_bytes(self) -> int:
        """All frames, whichever are wanted."""
        return self._frames.resident_bytes + loading_bytes(self._frames)

    def read(self, box: Box) -> Tensor:
        """Read a box of voxels into a new tensor; see `VolumeSource`."""
        i, j, k = box.slices
        planes = self._frames.read(Box((i.start, j.start, 0), (i.stop, j.stop, self._frames.shape[3])))
        out = planes.new_zeros((self.shape[0], *box.shape))
        for channel, numbers in enumerate(self._table.numbers[:, k]):
            held = numbers != EMPTY
            # Samples are channels of a volume that is alone, and each of several volumes is a channel.
            target = out if len(self._table.numbers) == 1 else out[channel : channel + 1]
            target[..., torch.from_numpy(held)] = planes[..., torch.from_numpy(numbers[held])]
        return out


def check_values(header: DicomHeader) -> None:
    """Refuse what says of its stored numbers what is not done here.

    Raises:
        UnsupportedImageError: names it.
    """
    path, data = header.path, header.data
    if data.get("ModalityLUTSequence"):
        raise UnsupportedImageError(
            f"{path} has a table of what its stored numbers mean (ModalityLUTSequence), which is not applied: take the stored"
            " numbers, voxloom.stored_dicom, or convert it"
        )
    stored, highest = data.get("BitsStored"), data.get("HighBit")
    if stored is not None and highest is not None and int(highest) >= int(stored):
        raise UnsupportedImageError(
            f"{path} keeps {stored} bits below bit {highest} (BitsStored, HighBit), and not the lowest ones, as DICOM has it now:"
            " convert it"
        )


def check_size(header: DicomHeader) -> None:
    """Compare what a header promises with the size of the file, before memory is asked for.

    Raises:
        CorruptImageError: if it promises more than there can be.
    """
    path, data, held = header.path, header.data, header.pixel_bytes or 0
    try:
        values = int(data.Rows) * int(data.Columns) * int(data.get("SamplesPerPixel", 1)) * frame_count(data, path)
        bits = int(data.BitsAllocated)
        syntax = data.file_meta.TransferSyntaxUID
    except DAMAGE as error:
        raise CorruptImageError(f"{path} does not say how large its image is: {brief(error)}. Copy it again") from error
    if bits not in (1, 8, 16, 32, 64):
        raise CorruptImageError(f"{path} has pixels of {bits} bits (BitsAllocated): its header is damaged")
    ratio = RLE_RATIO if syntax == RLELossless else PICTURE_RATIO if syntax.is_encapsulated else 1.0
    if data.get("PhotometricInterpretation") == "YBR_FULL_422":
        ratio *= 1.5  # colours share their samples
    if values * bits / 8 > held * ratio:
        raise CorruptImageError(
            f"{path} claims {values} values of {bits} bits, but has {held} bytes of them: it is damaged; copy it again"
        )
