"""Cases that nnU-Net has preprocessed, as a data set for the queue: patches are read, and never the whole."""

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CorruptImageError, ImageNotFoundError, SubjectError
from ..volumes.images.image import LabelMap, ScalarImage
from ..volumes.loading import SubjectsDataset
from ..volumes.subject import Subject

__all__ = ["preprocessed_cases", "properties_of"]


def preprocessed_cases(
    folder: Any, cases: Sequence[str] | None = None, image: str = "image", labels: str = "labels"
) -> SubjectsDataset:
    """Give the cases in a folder of nnU-Net's preprocessed data, such as `nnUNetPlans_3d_fullres`, for a `Queue`.

    Each has the image and the labels of nnU-Net's `CASE.b2nd` and `CASE_seg.b2nd`, lazily, and `case`, its name. Axes are in the
    order of nnU-Net's arrays, with their spacing; the place in the world is lost in preprocessing. Labels below 0 are voxels that
    nnU-Net leaves out. Of a case no more is read than its patches, unless there is a transform of whole subjects.

    Args:
        folder: the folder.
        cases: names of the cases, such as those of a fold in `splits_final.json`; None for all that are there.
        image: name of the image in the subjects.
        labels: name of the label map.

    Raises:
        ImageNotFoundError: if a case lacks a file.
        SubjectError: if there is no case.
    """
    folder = Path(folder).expanduser()
    found = sorted(path.name.removesuffix(".b2nd") for path in folder.glob("*.b2nd") if not path.name.endswith("_seg.b2nd"))
    names = found if cases is None else list(cases)
    if not names:
        raise SubjectError(f"{folder} has no case of nnU-Net's, which are CASE.b2nd, CASE_seg.b2nd and CASE.pkl")
    subjects = []
    for name in names:
        data, truth, notes = (folder / f"{name}{ending}" for ending in (".b2nd", "_seg.b2nd", ".pkl"))
        for path in (data, truth, notes):
            if not path.is_file():
                raise ImageNotFoundError(f"the case {name!r} has no {path}; there are {', '.join(found[:10]) or 'none'}")
        spacing = properties_of(notes).get("spacing", (1.0, 1.0, 1.0))
        affine = np.diag([*map(float, spacing), 1.0])
        subjects.append(Subject({image: ScalarImage(data, affine=affine), labels: LabelMap(truth, affine=affine), "case": name}))
    return SubjectsDataset(subjects, load_getitem=False)


class _Plain(pickle.Unpickler):
    """Reads dicts, lists, numbers, texts and arrays, and runs nothing that a file names."""

    KNOWN = frozenset(
        {
            ("numpy", "dtype"),
            ("numpy", "ndarray"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy.core.multiarray", "scalar"),
            ("numpy._core.multiarray", "scalar"),
            ("collections", "OrderedDict"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        """Find a class that a file names, if it is harmless."""
        if (module, name) in self.KNOWN:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}")


def properties_of(path: Any) -> dict[str, Any]:
    """Read the properties of a preprocessed case, `CASE.pkl`, without running what the file may bring.

    Raises:
        CorruptImageError: if it is damaged, or holds more than numbers, texts and arrays.
    """
    path = Path(path).expanduser()
    try:
        with path.open("rb") as file:
            found = _Plain(file).load()
    except Exception as error:  # whatever a damaged file makes pickle stumble over
        raise CorruptImageError(f"{path} cannot be read: {error}. Properties of a case are numbers, texts and arrays") from error
    if not isinstance(found, dict):
        raise CorruptImageError(f"{path} holds a {type(found).__name__}, not the properties of a case")
    return found
