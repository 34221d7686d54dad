"""Whole volumes, as the libraries that write files have them."""

import errno
import io
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from isal import isal_zlib
from torch import Tensor

from ...core.copying import copy_voxels
from ...core.geometry.affines import Affine
from ...errors import UnsupportedImageError
from ..compression import compressing
from ..protocols import MILLIMETRES, SpaceCodes

__all__ = [
    "Writer",
    "in_file_order",
    "nifti_header",
    "nifti_of",
    "simpleitk_of",
    "storable",
    "write_compressed_nifti",
    "write_itk",
    "write_mgh",
    "write_nifti",
]

Writer = Callable[[Path, np.ndarray, Affine, SpaceCodes], None]
"""Writes a volume `(C, I, J, K)` to a path."""

# About so many bytes of planes are put in the order of a file at once.
BLOCK_BYTES = 2**22
# NIfTI-1 keeps sizes in 16 bits.
LARGEST_NIFTI1_SIZE = 32767


def storable(data: Tensor, stored: str | None = None) -> np.ndarray:
    """Give the values in a type that files can hold, exactly.

    Booleans become uint8, half precision float32, and int64 int32 where every value fits, because few programs read int64;
    if it is said what they were stored in, such as `"uint16"`, they become that again.
    """
    if stored is not None:
        return data.detach().cpu().numpy().astype(stored)
    data = data.detach().cpu()
    if data.dtype == torch.bool:
        data = data.to(torch.uint8)
    elif data.is_floating_point() and data.dtype not in (torch.float32, torch.float64):
        data = data.to(torch.float32)
    elif data.dtype == torch.int64 and data.numel():
        low, high = (int(value) for value in data.aminmax())
        limits = torch.iinfo(torch.int32)
        if limits.min <= low and high <= limits.max:
            data = data.to(torch.int32)
    return data.numpy()


def write_nifti(path: Path, array: np.ndarray, affine: Affine, codes: SpaceCodes) -> None:
    """Write `.nii`."""
    with path.open("wb") as file:
        _write_nifti_to(file, array, affine, codes)


def write_compressed_nifti(path: Path, array: np.ndarray, affine: Affine, codes: SpaceCodes) -> None:
    """Write `.nii.gz`."""
    with path.open("wb") as file, compressing(file) as packed:
        _write_nifti_to(packed, array, affine, codes)


def _write_nifti_to(file: Any, array: np.ndarray, affine: Affine, codes: SpaceCodes) -> None:
    file.write(nifti_header(array.shape, array.dtype, affine, codes))
    for _, _, block in in_file_order(array):
        file.write(block.data)


def nifti_header(shape: Sequence[int], dtype: np.dtype, affine: Affine, codes: SpaceCodes) -> bytes:
    """Give everything before the first voxel of a NIfTI file."""
    image = nifti_of(np.broadcast_to(np.zeros((), dtype=dtype), shape), affine, codes)
    image.update_header()
    header = image.header
    header.set_slope_inter(1, 0)
    offset = header.single_vox_offset
    header.set_data_offset(offset)
    buffer = io.BytesIO()
    header.write_to(buffer)
    return buffer.getvalue().ljust(offset, b"\0")


def in_file_order(values: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
    """Give blocks of planes of a volume `(C, I, J, K)` in the order of a file.

    Yields:
        The channel, the first plane `k`, and the planes `(K, J, I)`.
    """
    planes = max(1, BLOCK_BYTES // max(1, math.prod(values.shape[1:3]) * values.dtype.itemsize))
    for channel, first in itertools.product(range(len(values)), range(0, values.shape[3], planes)):
        part = values[channel, :, :, first : first + planes]
        block = np.empty(part.shape[::-1], values.dtype)
        copy_voxels(block.transpose(2, 1, 0), part)
        yield channel, first, block


def nifti_of(array: np.ndarray, affine: Affine, codes: SpaceCodes) -> Any:
    """Make an image of nibabel's, with both forms in the unit that the original had."""
    import nibabel as nib

    volume = _channels_last(array)
    image_class: Any = nib.Nifti2Image if max(volume.shape) > LARGEST_NIFTI1_SIZE else nib.Nifti1Image
    to_unit = np.diag([*[1 / MILLIMETRES.get(codes.space_unit, 1.0)] * 3, 1.0])
    sform, qform = to_unit @ affine, to_unit @ np.array(codes.qform_world) @ affine
    image = image_class(volume, sform, dtype=volume.dtype)
    # A quaternion cannot say every matrix; and without a form that is valid the affine would not be written at all.
    qform_code = codes.qform if _is_rigid(qform) else 0
    image.set_qform(qform, qform_code, strip_shears=True)
    image.set_sform(sform, codes.sform or int(not qform_code))
    image.header.set_xyzt_units(codes.space_unit, codes.time_unit)
    if volume.ndim == 4:
        image.header["pixdim"][4] = codes.time_step
    return image


def write_mgh(path: Path, array: np.ndarray, affine: Affine, codes: SpaceCodes) -> None:
    """Write `.mgh` or `.mgz`."""
    import nibabel as nib

    known = ("uint8", "int16", "int32", "float32")
    if array.dtype.kind == "u" and array.dtype.itemsize > 1 and array.max(initial=0) <= np.iinfo(np.int32).max:
        array = array.astype(np.int32)
    if array.dtype.name not in known:
        raise UnsupportedImageError(
            f"MGH holds {', '.join(known)}, not {array.dtype.name}: convert the image, or save it as .nii.gz"
        )
    # Unlike NIfTI, nibabel writes MGH only to a path, and picks compression by its ending.
    nib.MGHImage(_channels_last(array), affine).to_filename(path)


def write_itk(path: Path, array: np.ndarray, affine: Affine, codes: SpaceCodes) -> None:
    """Write what SimpleITK writes by the ending of the name."""
    import SimpleITK

    from ..itk.files import check_name

    check_name(path)

    image = simpleitk_of(array, affine)
    SimpleITK.WriteImage(image, str(path), useCompression=True)
    if path.suffix == ".nrrd":
        _check_end(path, SimpleITK.GetArrayViewFromImage(image))


def _check_end(path: Path, written: np.ndarray) -> None:
    """See that gzip's last bytes are there: where the disk is full, or a file may not be so long, NRRD's writer says nothing."""
    values = np.ascontiguousarray(written).reshape(-1).view(np.uint8)
    expected = isal_zlib.crc32(values.data).to_bytes(4, "little") + (values.nbytes % 2**32).to_bytes(4, "little")
    with path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(-min(file.tell(), len(expected)), os.SEEK_END)
        if file.read() != expected:
            raise OSError(errno.ENOSPC, "it ends too early: the disk is full, or files may not be so long")


def simpleitk_of(array: np.ndarray, affine: Affine) -> Any:
    """Make an image of SimpleITK's; channels become the components of its voxels."""
    import SimpleITK

    is_vector = len(array) > 1
    turned = array.transpose(3, 2, 1, 0) if is_vector else array[0].transpose(2, 1, 0)
    planes = np.empty(turned.shape, array.dtype)
    copy_voxels(planes, turned)
    image = SimpleITK.GetImageFromArray(planes, isVector=is_vector)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    spacing = np.sqrt((lps[:3, :3] ** 2).sum(axis=0))
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    return image


def _channels_last(array: np.ndarray) -> np.ndarray:
    return array[0] if len(array) == 1 else np.moveaxis(array, 0, -1)


def _is_rigid(affine: Affine) -> bool:
    """Whether a quaternion and a spacing can say the same as the matrix."""
    axes = affine[:3, :3] / np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    return bool(np.allclose(axes.T @ axes, np.eye(3), atol=1e-6))
