"""Writing volumes so that a crash leaves the old file or the new one."""

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.affines import Affine
from ..errors import SaveError, TargetExistsError, UnsupportedImageError, VoxloomError
from ..runtime.marks import left_by_dead, new_mark
from .compression import compressing
from .protocols import MILLIMETRES, SpaceCodes

__all__ = [
    "Writer",
    "appeared",
    "as_save_error",
    "atomic_write",
    "bring_to_disk",
    "nifti_of",
    "put_new",
    "remove_unfinished",
    "reserve",
    "saving",
    "simpleitk_of",
    "storable",
    "write_compressed_nifti",
    "write_itk",
    "write_mgh",
    "write_nifti",
    "write_safely",
]

Writer = Callable[[Path, np.ndarray, Affine, SpaceCodes], None]
"""Writes a volume `(C, I, J, K)` to a path."""

# NIfTI-1 keeps sizes in 16 bits.
LARGEST_NIFTI1_SIZE = 32767
# What a file system answers that cannot reserve room.
NOT_OFFERED = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


def atomic_write(path: Path, write: Callable[[Path], None], ending: str, overwrite: bool = True) -> None:
    """Let `write` make a new file beside the target, bring it to the disk, and only then put it in the target's place.

    Args:
        path: the target; it keeps its old content unless everything goes well. A link goes on pointing where it points.
        write: writes to the path that it is given.
        ending: how the name of that path ends, for writers that go by it.
        overwrite: whether what is there by then may be replaced.

    Raises:
        TargetExistsError: if something is there, and may not be replaced.
        SaveError: if anything could not be written. The unfinished file is removed.
    """
    try:
        if path.is_dir():
            raise SaveError(f"{path} is a folder: give the name of a file in it")
        if not path.parent.is_dir():
            raise SaveError(f"{path} cannot be written: there is no folder {path.parent}; make it first")
        target = path.resolve()
        if target.exists() and not os.access(target, os.W_OK):
            raise SaveError(f"{path} is write-protected: save under another name, or make it writable")
        remove_unfinished(target, ending)
        unfinished = target.parent / f".{target.name[:40]}.{new_mark()}.unfinished{ending}"
        try:
            write(unfinished)
            with unfinished.open("rb+") as file:
                os.fsync(file.fileno())
            if not overwrite:
                if not put_new(unfinished, target):
                    raise appeared(target)
                return
            if target.exists():
                unfinished.chmod(target.stat().st_mode & 0o777)
            unfinished.replace(target)
        finally:
            unfinished.unlink(missing_ok=True)
    except VoxloomError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        raise as_save_error(path, error) from error


def remove_unfinished(target: Path, ending: str) -> None:
    """Remove what killed processes have left beside a target; see `atomic_write`."""
    for _, left in left_by_dead(target.parent, f".{target.name[:40]}.", re.escape(f".unfinished{ending}")):
        with contextlib.suppress(OSError):  # it may be another user's
            left.unlink()


def put_new(source: Path, target: Path) -> bool:
    """Put a file under a name, unless something else has it: then it stays where it is, and False is given."""
    try:
        os.link(source, target)  # unlike a renaming, this replaces nothing
    except OSError:  # something is there, or the file system has no links
        if os.path.lexists(target):
            if not (target.exists() and target.samefile(source)):  # as after an interruption
                return False
        else:
            source.replace(target)
    source.unlink(missing_ok=True)
    return True


def appeared(path: Path, way: str = "give overwrite=True (--overwrite)") -> TargetExistsError:
    """Say that something is there by now which was not when the writing began."""
    return TargetExistsError(f"{path} has appeared while it was written, and is kept: remove it, choose another name, or {way}")


def write_safely(path: Path, text: str, mark: str = "") -> None:
    """Write a small file such that it is there as a whole, and on the disk, or as it was.

    Args:
        path: the file.
        text: what it holds.
        mark: tells this writer from others, where several processes may write the file at once.
    """
    unfinished = path.with_name(f"{path.name}{mark}.unfinished")
    with saving(path):
        with unfinished.open("w", encoding="utf-8", errors="surrogateescape") as file:  # names of files may be of any bytes
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)


@contextlib.contextmanager
def saving(path: Path) -> Iterator[None]:
    """Let an error of the system say which target could not be written."""
    try:
        yield
    except VoxloomError:
        raise
    except OSError as error:
        raise as_save_error(path, error) from error


def bring_to_disk(path: Path) -> None:
    """Bring what was written to a file to where a power failure does not reach it."""
    file = os.open(path, os.O_RDWR)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def reserve(file: int, num_bytes: int) -> None:
    """Take the room that an open file will need, so that a full disk shows before anything is computed.

    Where a file is mapped it must show here: a full disk would end the process that writes to it.
    """
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file, 0, num_bytes)
            return
        except OSError as error:
            if error.errno not in NOT_OFFERED:
                raise
    os.ftruncate(file, num_bytes)


def as_save_error(path: Path, error: Exception) -> SaveError:
    """Say in one line what went wrong."""
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error).strip().rpartition("\n")[2]
    return SaveError(f"{path} could not be written, and was left as it was: {reason}")


def storable(data: Tensor) -> np.ndarray:
    """Give the values in a type that files can hold, exactly.

    Booleans become uint8, half precision float32, and int64 int32 where every value fits, because few programs read int64.
    """
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
    image = nifti_of(array, affine, codes)
    with path.open("wb") as file:
        image.to_stream(file)


def write_compressed_nifti(path: Path, array: np.ndarray, affine: Affine, codes: SpaceCodes) -> None:
    """Write `.nii.gz`."""
    image = nifti_of(array, affine, codes)
    with path.open("wb") as file, compressing(file) as packed:
        image.to_stream(packed)


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
    if array.dtype.name not in known:
        raise UnsupportedImageError(
            f"MGH holds {', '.join(known)}, not {array.dtype.name}: convert the image, or save it as .nii.gz"
        )
    # Unlike NIfTI, nibabel writes MGH only to a path, and picks compression by its ending.
    nib.MGHImage(_channels_last(array), affine).to_filename(path)


def write_itk(path: Path, array: np.ndarray, affine: Affine, codes: SpaceCodes) -> None:
    """Write what SimpleITK writes by the ending of the name."""
    import SimpleITK

    from .itk.files import check_name

    check_name(path)

    SimpleITK.WriteImage(simpleitk_of(array, affine), str(path), useCompression=True)


def simpleitk_of(array: np.ndarray, affine: Affine) -> Any:
    """Make an image of SimpleITK's; channels become the components of its voxels."""
    import SimpleITK

    is_vector = len(array) > 1
    planes = np.ascontiguousarray(array.transpose(3, 2, 1, 0) if is_vector else array[0].transpose(2, 1, 0))
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
