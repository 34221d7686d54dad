"""Files: what each format's header says, reading the voxels of a box, and writing.

A stored type becomes the type of a tensor as follows. Numbers with a scale (NIfTI's `scl_slope`) become float32, or float64
where they are stored in more than 16 bits.

| stored                                | tensor                                               |
|---------------------------------------|------------------------------------------------------|
| uint8, RGB, RGBA                      | uint8 (colours are channels)                         |
| int8, int16, int32, int64             | the same                                             |
| uint16, uint32                        | int32, int64: PyTorch lacks arithmetic for the others |
| uint64                                | int64; an error if a value does not fit              |
| float32, float64                      | the same; longer floats become float64               |
| complex                               | an error                                             |
"""

from pathlib import Path

from ...errors import ImageNotFoundError, UnsupportedImageError
from .base import SpaceCodes, VolumeInfo, VolumeReader
from .itk_files import ItkFile, open_series
from .nibabel_files import READ_ERRORS, NibabelFile, open_compressed
from .saving import as_save_error, atomic_write, compressing, save_volume
from .streaming import NiftiWriter

__all__ = [
    "READ_ERRORS",
    "NiftiWriter",
    "SpaceCodes",
    "VolumeInfo",
    "VolumeReader",
    "as_save_error",
    "atomic_write",
    "compressing",
    "open_compressed",
    "open_volume",
    "save_volume",
    "stem_of",
]

BY_NIBABEL = (".nii", ".nii.gz", ".nii.bz2", ".hdr", ".img", ".img.gz", ".mgh", ".mgz")


def open_volume(path: Path) -> VolumeReader:
    """Open a file, or a folder that holds a DICOM series: only the header is read.

    Raises:
        ImageNotFoundError, CorruptImageError, UnsupportedImageError, SeriesError: see `voxloom.errors`.
    """
    if path.is_dir():
        return open_series(path)
    if not path.exists():
        raise ImageNotFoundError(f"there is no file {path}")
    if not path.is_file():
        raise UnsupportedImageError(f"{path} is neither a file nor a folder")
    if path.name.lower().endswith(BY_NIBABEL):
        return NibabelFile(path)
    return ItkFile([path], str(path))


def stem_of(path: Path) -> str:
    """Name of a file without what its format adds: both endings of `.nii.gz`."""
    name = path.name
    ending = next((ending for ending in sorted(BY_NIBABEL, key=len, reverse=True) if name.lower().endswith(ending)), path.suffix)
    return name[: len(name) - len(ending)] if ending else name
