"""The Colin 27 average brain."""

from pathlib import Path

from ..core.sizes import as_int
from ..errors import DownloadError, SizeError
from ..volumes.images.image import LabelMap, ScalarImage
from ..volumes.subject import Subject
from .downloads import SOURCES, cached_archive

__all__ = ["Colin27"]

VERSIONS = (1998, 2008)


class Colin27(Subject):
    """One person, scanned 27 times: downloaded on first use, which needs the extra `[datasets]`.

    Source: Holmes et al., Enhancement of MR images using registration for signal averaging, Journal of Computer Assisted
    Tomography 22 (1998), https://doi.org/10.1097/00004728-199803000-00032.

    Args:
        version: 1998, with the images `t1`, `head` and `brain` of 181 × 217 × 181 voxels of 1 mm; or 2008, with `t1`, `t2`,
            `pd` and the tissue classes `cls` of 362 × 434 × 362 voxels of 0.5 mm.

    Raises:
        SizeError: if there is no such version.
        DownloadError: if it cannot be downloaded, or is not what it should be.
        MissingDependencyError: if pooch is not installed.
    """

    def __init__(self, version: int = 1998) -> None:
        if as_int(version, "version", 0) not in VERSIONS:
            raise SizeError(f"version is {version}: Colin27 has the versions {' and '.join(map(str, VERSIONS))}")
        name = f"colin27-{version}"
        folder = cached_archive(name, lambda unpacked: _finish(name, unpacked))
        if version == 1998:
            super().__init__(
                t1=ScalarImage(folder / "colin27_t1_tal_lin.nii"),
                head=LabelMap(folder / "colin27_t1_tal_lin_headmask.nii"),
                brain=LabelMap(folder / "colin27_t1_tal_lin_mask.nii"),
            )
        else:
            scans = {scan: ScalarImage(folder / f"colin27_{scan}_tal_hires.nii") for scan in ("t1", "t2", "pd")}
            super().__init__(scans, cls=LabelMap(folder / "colin27_cls_tal_hires.nii"))


def _finish(name: str, folder: Path) -> None:
    """Check the shapes, and store the classes, which come as numbers near whole ones, as whole ones."""
    for path in folder.iterdir():
        shape = ScalarImage(path).spatial_shape
        if shape != SOURCES[name].shape:
            raise DownloadError(f"{path.name} of {SOURCES[name].url} has {shape} voxels: it should have {SOURCES[name].shape}")
    classes = folder / "colin27_cls_tal_hires.nii"
    if classes.exists():
        image = LabelMap(classes)
        image.new_like(image.data.round().byte()).save(classes)
