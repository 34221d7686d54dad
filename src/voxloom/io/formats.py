"""Formats of files: one table of what can be read and written, by the endings of names.

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

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ImageNotFoundError, UnsupportedImageError
from .dicom import is_dicom
from .files import FileSource
from .itk.integrity import METAIMAGE, NRRD, TIFF, Integrity
from .writing.whole_volumes import Writer, write_compressed_nifti, write_itk, write_mgh, write_nifti
from .zarr.source import ZarrSource, is_label_of_image, is_zarr

__all__ = [
    "FORMATS",
    "Format",
    "endings",
    "format_of",
    "import_for",
    "is_folder_target",
    "is_image",
    "is_other_image",
    "open_volume",
    "stem_of",
]


@dataclass(frozen=True)
class Reader:
    """Opens files by a module that is imported when the first of them is named, since the libraries behind it take their time.

    That is then, and not when a file is opened, so that processes which are forked later need not import them each.
    """

    module: str
    name: str
    """What the module has for it, a class or a function."""
    integrity: Integrity | None = None
    """What is checked before the library sees the file."""
    more: tuple[str, ...] = ()
    """Modules that are imported as well: what only some files of the kind need."""

    def imported(self) -> Any:
        """Give what opens the files."""
        for each in self.more:
            importlib.import_module(each, __package__)
        return getattr(importlib.import_module(self.module, __package__), self.name)

    def __call__(self, path: Path) -> FileSource:
        """Open one: only the header is read."""
        kind = self.imported()
        opened: FileSource = kind(path) if self.integrity is None else kind.open(path, integrity=self.integrity)
        return opened


NIFTI, WHOLE = Reader(".nifti.files", "NibabelFile"), Reader(".whole_files", "WholeFile")
NRRD_FILE, METAIMAGE_FILE, TIFF_FILE = (Reader(".itk.files", "ItkFile", each) for each in (NRRD, METAIMAGE, TIFF))
ZARR, NIFTI_ZARR = Reader(".zarr.source", "ZarrSource"), Reader(".zarr.source", "ZarrSource", more=(".nifti.files",))
DICOM, SERIES = Reader(".dicom.files", "open_dicom"), Reader(".dicom.files", "open_series")


@dataclass(frozen=True)
class Format:
    """What can be done with files of one ending."""

    ending: str
    open: Reader
    write: Writer | None = None
    """Writes a whole volume; None for formats that are only read."""
    unpacked: str | None = None
    """Ending of what is in the file, where it is another format and merely compressed."""
    is_streamed: bool = False
    """Whether a result can be written block by block."""
    described_by: str | None = None
    """Ending of the file beside it that holds its header, and that is named in its place where a folder is searched."""
    data_in: tuple[str, ...] = ()
    """Endings of files of which one is beside it: others may have its ending, too."""
    is_dicom: bool = False
    """Whether files lie in folders of which each is one volume."""
    is_folder: bool = False
    """Whether a volume is a folder."""


FORMATS = (
    Format(".nii", NIFTI, write_nifti, is_streamed=True),
    Format(".nii.gz", NIFTI, write_compressed_nifti, unpacked=".nii", is_streamed=True),
    Format(".nii.bz2", NIFTI, unpacked=".nii"),
    Format(".hdr", NIFTI),
    Format(".img", NIFTI, described_by=".hdr"),
    Format(".img.gz", NIFTI, described_by=".hdr"),
    Format(".mgh", NIFTI, write_mgh),
    Format(".mgz", NIFTI, write_mgh, unpacked=".mgh"),
    Format(".nrrd", NRRD_FILE, write_itk),
    Format(".seg.nrrd", NRRD_FILE, is_streamed=True),
    Format(".nhdr", NRRD_FILE),
    Format(".mha", METAIMAGE_FILE, write_itk),
    Format(".mhd", METAIMAGE_FILE),
    Format(".mnc", WHOLE),
    Format(".par", WHOLE, data_in=(".rec",)),
    Format(".head", WHOLE, data_in=(".brik", ".brik.gz")),
    Format(".brik", WHOLE, described_by=".head"),
    Format(".brik.gz", WHOLE, described_by=".head"),
    Format(".tif", TIFF_FILE),
    Format(".tiff", TIFF_FILE),
    Format(".b2nd", Reader(".arrays.blosc", "BloscFile")),
    Format(".npy", Reader(".arrays.npy", "NpyFile")),
    Format(".ome.zarr", ZARR, is_streamed=True, is_folder=True),
    Format(".nii.zarr", NIFTI_ZARR, is_streamed=True, is_folder=True),
    Format(".zarr", ZARR, is_streamed=True, is_folder=True),
    Format(".zarr.zip", ZARR),
    Format(".ozx", ZARR),
    Format(".dcm", DICOM, is_dicom=True),
    Format(".ima", DICOM, is_dicom=True),
)


# Endings of what SimpleITK alone reads. Pictures are read in this process, since their readers are proven, and others in one of
# their own.
PICTURES = (".png", ".jpg", ".jpeg", ".bmp")
OTHERS = (*PICTURES, ".gipl", ".gipl.gz", ".vtk", ".mrc", ".h5", ".hdf5", ".lsm", ".pic", ".jp2", ".spr")


def format_of(path: Path) -> Format | None:
    """Find the format of a file by its name; of several endings that fit, the longest counts."""
    fitting = [each for each in FORMATS if path.name.lower().endswith(each.ending)]
    return max(fitting, key=lambda each: len(each.ending), default=None)


def endings(which: Callable[[Format], object]) -> tuple[str, ...]:
    """Give the endings of some formats.

    Example:
        >>> endings(lambda each: each.is_streamed)
        ('.nii', '.nii.gz', '.seg.nrrd', '.ome.zarr', '.nii.zarr', '.zarr')
    """
    return tuple(each.ending for each in FORMATS if which(each))


def import_for(path: Path) -> None:
    """Import what reads, and writes, a file or a folder: with a name that says nothing, it may be DICOM."""
    known = format_of(path)
    if known is not None:
        known.open.imported()
    elif not (is_zarr(path) or is_label_of_image(path)):
        SERIES.imported()


def open_volume(path: Path) -> FileSource:
    """Open a file, or a folder that holds a DICOM series: only the header is read.

    What has no known ending is left to SimpleITK, in a process of its own.

    Raises:
        ImageNotFoundError, CorruptImageError, UnsupportedImageError, SeriesError: see `voxloom.errors`.
    """
    if path.is_dir():
        return ZarrSource(path) if is_zarr(path) else SERIES(path)
    if not path.exists():
        raise ImageNotFoundError(f"there is no file {path}")
    if not path.is_file():
        raise UnsupportedImageError(f"{path} is neither a file nor a folder")
    known = format_of(path)
    if known is not None:
        return known.open(path)
    # Names of DICOM files often have no ending, or the last part of an identifier for one.
    if is_dicom(path):
        return DICOM(path)
    from .itk.files import ItkFile
    from .itk.isolated import IsolatedFile

    return ItkFile.open(path) if path.suffix.lower() in PICTURES else IsolatedFile.open(path)


def is_folder_target(path: Path) -> bool:
    """Whether a result of that name is a folder."""
    known = format_of(path)
    return is_label_of_image(path) or (known is not None and known.is_folder)


def is_image(path: Path) -> bool:
    """Whether a file has the name of an image that a folder is searched for."""
    known = format_of(path)
    if known is None or known.is_dicom or known.described_by is not None:
        return False
    stem = path.name[: -len(known.ending)]
    beside = {each.name.lower() for each in path.parent.iterdir()} if known.data_in else set()
    return not known.data_in or any(f"{stem}{ending}".lower() in beside for ending in known.data_in)


def is_other_image(path: Path) -> bool:
    """Whether a file has a name of an image, though of a kind that folders are not searched for."""
    return path.is_file() and path.name.lower().endswith(OTHERS)


def stem_of(path: Path) -> str:
    """Name of a file without what its format adds: both endings of `.nii.gz`."""
    known = format_of(path)
    ending = path.suffix if known is None else known.ending
    return path.name[: len(path.name) - len(ending)] if ending else path.name
