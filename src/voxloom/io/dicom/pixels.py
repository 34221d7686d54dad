"""Pixels of DICOM files: those that pydicom decodes, and frames that are put in order."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydicom.pixels.processing import apply_color_lut
from pydicom.pixels.utils import pixel_array
from torch import Tensor

from ...core.affines import Affine
from ...core.boxes import Box
from ...errors import CorruptImageError, ImageNotFoundError, UnsupportedImageError
from ..arrays import torch_dtype, widest_unsigned
from ..files import FileSource
from ..protocols import VolumeSpec
from .frames import DAMAGE, EMPTY, FrameTable, frame_count, is_segmentation, place_of, scales_of

__all__ = ["DecodedFile", "DecodedSlices", "OrderedFrames", "check_size"]

# The most that run lengths can have shrunk anything, and deflate.
GREATEST_RATIO = {"1.2.840.10008.1.2.5": 64, "1.2.840.10008.1.2.1.99": 1032}


class DecodedFile(FileSource):
    """Frames of a DICOM file, as planes in the order of the file, decoded by pydicom.

    Args:
        path: the file.
        header: its header.
        is_stored: give what is stored: neither scaled, nor with MONOCHROME1 turned round, nor with a palette's colours.
    """

    is_sliceable = False

    def __init__(self, path: Path, header: Any, is_stored: bool = False) -> None:
        self.paths = (path,)
        self._is_stored = is_stored
        count = frame_count(header, path)
        check_size(path, header)
        slopes, intercepts = scales_of(header, count)
        is_scaled = not is_stored and bool((slopes != 1).any() or intercepts.any())
        self._scale = (slopes, intercepts) if is_scaled else None
        self._photometric = str(header.get("PhotometricInterpretation", ""))
        is_palette = self._photometric == "PALETTE COLOR" and not is_stored
        self._palette = header if is_palette else None
        self._bits = 0 if is_segmentation(header) else int(header.BitsStored) if "BitsStored" in header else 0
        samples = 3 if is_palette else int(header.get("SamplesPerPixel", 1))
        shape = (samples, int(header.Columns), int(header.Rows), count)
        if min(shape) < 1:
            raise CorruptImageError(f"{path} has shape {shape}, and so no voxels: its header is damaged")
        self.spec = VolumeSpec(shape, self._dtype_of(header, path), place_of(header))

    def read(self, box: Box) -> Tensor:
        """Read a box of voxels into a new tensor; see `VolumeSource`."""
        (path,) = self.paths
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                planes = pixel_array(path, raw=self._is_stored)
            if self._palette is not None:
                planes = apply_color_lut(planes, self._palette)
        except FileNotFoundError as error:
            raise ImageNotFoundError(f"there is no file {path}") from error
        except DAMAGE as error:
            raise CorruptImageError(
                f"{path} cannot be decoded: {error}. Copy it again, or convert it with a DICOM tool"
            ) from error
        samples, columns, rows, count = self.shape
        if planes.size != samples * columns * rows * count:
            raise CorruptImageError(f"{path} holds pixels of shape {planes.shape}, and not {self.shape} as its header says")
        widest_unsigned(planes, str(path))
        channels = planes.reshape(count, rows, columns, samples).transpose(3, 2, 1, 0)[(slice(None), *box.slices)]
        if self._photometric == "MONOCHROME1" and not self._is_stored and self._bits:
            channels = (-1 if channels.dtype.kind == "i" else 2**self._bits - 1) - channels.astype(np.int64)
        if self._scale is not None:
            slopes, intercepts = (numbers[box.slices[2]] for numbers in self._scale)
            channels = channels * slopes + intercepts
        out = torch.empty((samples, *box.shape), dtype=self.dtype)
        np.copyto(out.numpy(), channels, casting="unsafe")
        return out

    def _dtype_of(self, header: Any, path: Path) -> torch.dtype:
        bits = int(header.BitsAllocated)
        kind = (
            "float"
            if "PixelRepresentation" not in header and bits >= 32
            else "int"
            if header.get("PixelRepresentation")
            else "uint"
        )
        if self._palette is not None:
            bits = int(header.RedPaletteColorLookupTableDescriptor[2])
        plain = torch_dtype(np.dtype(f"{kind}{max(bits, 8)}"), str(path))
        if self._scale is None or plain == torch.float64:
            return plain
        if all((numbers == np.rint(numbers)).all() for numbers in self._scale):
            return torch.int64 if bits > 16 else torch.int32
        return torch.float64 if bits > 16 else torch.float32


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
        types = {file.dtype for file in files}
        self.spec = VolumeSpec((samples, i, j, len(files)), types.pop() if len(types) == 1 else torch.float64, affine)

    def read(self, box: Box) -> Tensor:
        """Read a box of voxels into a new tensor; see `VolumeSource`."""
        out = torch.empty((self.shape[0], *box.shape), dtype=self.dtype)
        plane = Box((*box.start[:2], 0), (*box.stop[:2], 1))
        for number, file in enumerate(self._files[box.slices[2]]):
            out[..., number] = file.read(plane)[..., 0]
        return out


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


def check_size(path: Path, header: Any) -> None:
    """Compare what a header promises with the size of the file, before memory is asked for.

    Raises:
        CorruptImageError: if it promises more than there can be.
    """
    try:
        values = int(header.Rows) * int(header.Columns) * int(header.get("SamplesPerPixel", 1)) * frame_count(header, path)
        bits = int(header.BitsAllocated)
        syntax = header.file_meta.get("TransferSyntaxUID", "1.2.840.10008.1.2")
    except DAMAGE as error:
        raise CorruptImageError(f"{path} does not say how large its image is: {error}. Copy or download it again") from error
    if bits not in (1, 8, 16, 32, 64):
        raise CorruptImageError(f"{path} has pixels of {bits} bits (BitsAllocated): its header is damaged")
    size = path.stat().st_size
    is_plain = not syntax.is_encapsulated and not syntax.is_deflated
    # Colours of YBR_FULL_422 share their samples.
    shared = 1.5 if header.get("PhotometricInterpretation") == "YBR_FULL_422" else 1
    ratio = shared if is_plain else GREATEST_RATIO.get(str(syntax), 20000)
    if values * bits / 8 > size * ratio:
        raise CorruptImageError(
            f"{path} claims {values} values of {bits} bits, but has {size} bytes: it is truncated, or its header is damaged"
        )
