"""DICOM: a folder of files of which each holds a slice, or one file of one frame or many.

What reads it is imported when there is DICOM to read, since pydicom takes its time.
"""

from pathlib import Path

from torch import Tensor

from ...core.geometry.affines import Affine

__all__ = ["is_dicom", "stored_dicom"]

MARK_PLACE, MARK = 128, b"DICM"


def is_dicom(path: Path) -> bool:
    """Whether a file says of itself that it is DICOM."""
    with path.open("rb") as file:
        return file.read(MARK_PLACE + len(MARK))[MARK_PLACE:] == MARK


def stored_dicom(path: Path) -> tuple[Tensor, Affine]:
    """Read a DICOM file, or a folder with one series, as it is stored: a `reader` for images.

    Values are neither scaled nor clipped, MONOCHROME1 is not turned round, and a palette gives its indices. What is compressed as
    JPEG needs one of the decoders that pydicom names.

    Returns:
        Voxels `(C, I, J, K)`, and the RAS+ affine.

    Raises:
        SeriesError, CorruptImageError: as for images without a reader.

    Example:
        >>> import pydicom.data, voxloom as vx
        >>> path = pydicom.data.get_testdata_file("CT_small.dcm")
        >>> int(vx.ScalarImage(path).data.min()), int(vx.ScalarImage(path, reader=vx.stored_dicom).data.min())
        (-896, 128)
    """
    from .files import stored_dicom

    return stored_dicom(path)
