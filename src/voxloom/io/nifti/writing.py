"""Writing a NIfTI file block by block, so that it need never be in memory as a whole."""

import io
import math
import os
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ...core.boxes import Box
from ...core.geometry.affines import Affine
from ...errors import RecordError
from ..protocols import SpaceCodes
from ..writing.saving import reserve
from ..writing.whole_volumes import nifti_of

__all__ = ["NiftiWriter"]


class NiftiWriter:
    """An uncompressed NIfTI file of known size, into which blocks are written in any order.

    Args:
        path: the file.
        shape: channels and voxels `(C, I, J, K)`.
        dtype: type of the values; booleans are stored as uint8, and halves as float32. Int64 stays, since what comes later may
            not fit into less.
        affine: RAS+, in millimetres.
        codes: what NIfTI records beside it.
        is_new: make the file, with room for everything; otherwise go on with one that is there.
        stored: type that the values are stored in, if that is another one.

    Raises:
        OSError: if it cannot be written, or there is no room for it.
        RecordError: if the file that is there is not of that size and header.
    """

    def __init__(
        self,
        path: Path,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        affine: Affine,
        codes: SpaceCodes,
        is_new: bool,
        stored: str | None = None,
    ) -> None:
        self.shape = shape
        self.dtype = _stored_as(dtype) if stored is None else np.dtype(stored)
        header = _header(shape, self.dtype, affine, codes)
        self.offset = len(header)
        self.num_bytes = self.offset + math.prod(shape) * self.dtype.itemsize
        if not is_new:
            _check_begin(path, header, self.num_bytes)
        flags = os.O_RDWR | getattr(os, "O_BINARY", 0) | (os.O_CREAT | os.O_TRUNC if is_new else 0)
        self._file = os.open(path, flags, 0o666)
        try:
            if is_new:
                reserve(self._file, self.num_bytes)
                _write_at(self._file, header, 0)
        except BaseException:
            os.close(self._file)
            raise

    def write(self, box: Box, values: Tensor) -> None:
        """Write the values `(C, *box.shape)` of a box of voxels."""
        stored = self._storable(values)
        (i, j, k), (rows, columns, planes, _) = box.slices, (*self.shape[1:], 0)
        size = self.dtype.itemsize
        for channel, k_index in np.ndindex(self.shape[0], box.shape[2]):
            # Rows that follow one another in a plane are one run of the file; beside the box it is read and written back.
            start = self.offset + (((channel * planes + k.start + k_index) * columns + j.start) * rows) * size
            block = stored[channel, :, :, k_index].T
            if block.shape[1] < rows:
                run = np.frombuffer(bytearray(_read_at(self._file, block.shape[0] * rows * size, start)), dtype=self.dtype)
                run = run.reshape(block.shape[0], rows)
                run[:, i] = block
                block = run
            _write_at(self._file, np.ascontiguousarray(block), start)

    def _storable(self, values: Tensor) -> np.ndarray:
        if values.dtype in (torch.bfloat16, torch.float16):
            values = values.float()
        return values.numpy().astype(self.dtype, copy=False)

    def flush(self) -> None:
        """Bring to the disk what was written."""
        os.fsync(self._file)

    def close(self) -> None:
        """Close the file. It may be closed again."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _stored_as(dtype: torch.dtype) -> np.dtype:
    stored = {torch.bool: np.uint8, torch.float16: np.float32, torch.bfloat16: np.float32}
    return np.dtype(stored.get(dtype) or torch.empty(0, dtype=dtype).numpy().dtype)


def _header(shape: tuple[int, int, int, int], dtype: np.dtype, affine: Affine, codes: SpaceCodes) -> bytes:
    """Everything before the first voxel, as `Image.save` writes it."""
    image = nifti_of(np.broadcast_to(np.zeros((), dtype=dtype), shape), affine, codes)
    image.update_header()
    header = image.header
    header.set_slope_inter(1, 0)
    offset = header.single_vox_offset
    header.set_data_offset(offset)
    buffer = io.BytesIO()
    header.write_to(buffer)
    return buffer.getvalue().ljust(offset, b"\0")


def _check_begin(path: Path, header: bytes, num_bytes: int) -> None:
    with path.open("rb") as file:
        found, size = file.read(len(header)), path.stat().st_size
    if size != num_bytes or found != header:
        what = f"has {size} bytes in place of {num_bytes}" if size != num_bytes else "has another header than it was given"
        raise RecordError(f"the unfinished file {path} is damaged: it {what}")


def _write_at(file: int, data: bytes | np.ndarray, start: int) -> None:
    view = memoryview(cast(Any, data)).cast("B")
    while view:
        os.lseek(file, start, os.SEEK_SET)
        count = os.write(file, view)
        view, start = view[count:], start + count


def _read_at(file: int, size: int, start: int) -> bytes:
    os.lseek(file, start, os.SEEK_SET)
    parts = []
    while size:
        part = os.read(file, size)
        if not part:
            raise OSError("the unfinished file is shorter than it was made")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
