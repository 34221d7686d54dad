"""Writing a NIfTI file block by block, so that it need never be in memory as a whole."""

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
from ..writing.whole_volumes import in_file_order, nifti_header

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
        header = nifti_header(shape, self.dtype, affine, codes)
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
        (i, j, k), (_, rows, columns, planes) = box.slices, self.shape
        for channel, first, block in in_file_order(stored):
            plane = channel * planes + k.start + first
            if block.shape[1:] == (columns, rows):  # planes follow one another
                self._write_run(plane, 0, block)
                continue
            for number, rows_of_plane in enumerate(block):
                self._write_rows(plane + number, j.start, i, rows_of_plane)

    def _write_rows(self, plane: int, row: int, i: slice, values: np.ndarray) -> None:
        """Write rows of a plane, which follow one another in the file; what is beside them is read and written back."""
        num_rows, length = len(values), self.shape[1]
        if values.shape[1] < length:
            run = bytearray(_read_at(self._file, num_rows * length * self.dtype.itemsize, self._place(plane, row)))
            whole = np.frombuffer(run, dtype=self.dtype).reshape(num_rows, length)
            whole[:, i] = values
            values = whole
        self._write_run(plane, row, values)

    def _write_run(self, plane: int, row: int, values: np.ndarray) -> None:
        _write_at(self._file, values, self._place(plane, row))

    def _place(self, plane: int, row: int) -> int:
        """Where a row begins in the file."""
        return self.offset + (plane * self.shape[2] + row) * self.shape[1] * self.dtype.itemsize

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
