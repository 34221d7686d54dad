"""Label maps as DICOM segmentations of the series that they were made of."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom

from .._version import __version__
from ..errors import ImageNotFoundError, MissingDependencyError, SpaceError, TargetExistsError, UnsupportedImageError
from ..io.labels import Label, as_labels, color_of
from ..io.writing.saving import atomic_write
from ..volumes.images.image import Image, LabelMap

__all__ = ["save_dicom_seg"]

# How far, in voxels, a slice of the series may lie beside one of the label map.
TOLERANCE = 0.05
SERIES_NUMBER = 900
# What a series must have, though it may be empty: many that are made anonymous lack it.
MAY_BE_EMPTY = (
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "StudyID",
    "StudyDate",
    "StudyTime",
    "AccessionNumber",
    "ReferringPhysicianName",
)


def save_dicom_seg(
    labels: Image | str | os.PathLike[str],
    series: str | os.PathLike[str],
    path: str | os.PathLike[str],
    names: Mapping[str, int] | Sequence[Label] = (),
    *,
    description: str = "voxloom",
    overwrite: bool = False,
) -> Path:
    """Write a label map as a DICOM segmentation (type LABELMAP) that refers to the series it was made of.

    Args:
        labels: the label map, on the grid of the series, as `predict` gives it.
        series: the folder of the series.
        path: the file to write.
        names: what the numbers mean: names and numbers, such as `{"liver": 5}`, or a list of `Label`, with codes of a
            terminology where there are any; others get names of their own.
        description: description of the series that is made.
        overwrite: replace a file that is there.

    Raises:
        MissingDependencyError: if highdicom is not installed.
        SpaceError: if the label map is not on the grid of the series.
        UnsupportedImageError: if it holds numbers that a segmentation cannot.
        SaveError: if the file cannot be written.
    """
    try:
        import highdicom
    except ImportError as error:
        raise MissingDependencyError("DICOM segmentations need highdicom: pip install 'voxloom[dicom]'") from error
    target = Path(path)
    if target.exists() and not overwrite:
        raise TargetExistsError(f"{target} exists, and is kept: remove it, choose another name, or give overwrite=True")
    image = labels if isinstance(labels, Image) else LabelMap(labels)
    if image.num_channels != 1 or image.dtype.is_floating_point or int(image.data.min()) < 0 or int(image.data.max()) > 65535:
        raise UnsupportedImageError("a segmentation holds one channel of whole numbers from 0 to 65535")
    datasets = _in_order(Path(series), image)
    values = np.ascontiguousarray(image.data[0].numpy().transpose(2, 1, 0))
    known = {label.value: label for label in as_labels(names) if label.value}
    for value in np.unique(values).tolist():
        if value:
            known.setdefault(value, Label(value, f"label {value}"))
    if not known:
        raise UnsupportedImageError("the label map holds no label, and no names were given: a segmentation needs a segment")
    # Segments are numbered one after the other.
    numbers = {value: number for number, value in enumerate(sorted(known), start=1)}
    lookup = np.zeros(max(numbers) + 1, dtype=np.uint8 if len(numbers) < 256 else np.uint16)
    for value, number in numbers.items():
        lookup[value] = number
    try:
        made = highdicom.seg.Segmentation(
            source_images=datasets,
            pixel_array=lookup[values],
            segmentation_type=highdicom.seg.SegmentationTypeValues.LABELMAP,
            segment_descriptions=[_described(known[value], number) for value, number in numbers.items()],
            series_instance_uid=highdicom.UID(),
            series_number=SERIES_NUMBER,
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer="voxloom",
            manufacturer_model_name="voxloom",
            software_versions=__version__,
            device_serial_number="0",
            series_description=description,
        )
    except (ValueError, TypeError, AttributeError) as error:
        raise UnsupportedImageError(f"a segmentation cannot refer to the series in {series}: {error}") from error
    made.SpecificCharacterSet = "ISO_IR 192"  # names may be in any script
    atomic_write(target, made.save_as, target.suffix)
    return target


def _described(label: Label, number: int) -> Any:
    """Say what a segment is."""
    import highdicom
    from highdicom.sr.coding import CodedConcept

    scheme, code, meaning = label.code or ("99VOXLOOM", str(label.value), label.name)
    return highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=label.name[:64],
        segmented_property_category=CodedConcept("123037004", "SCT", "Anatomical Structure"),
        segmented_property_type=CodedConcept(code, scheme, meaning[:64]),
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name="voxloom", version=__version__, family=CodedConcept("123109", "DCM", "Artificial Intelligence")
        ),
        display_color=highdicom.color.CIELabColor.from_rgb(*color_of(label)),
    )


def _in_order(folder: Path, image: Image) -> list[pydicom.Dataset]:
    """Read the files of a series, in the order of the label map's slices."""
    found: dict[int, pydicom.Dataset] = {}
    to_voxels = np.linalg.inv(image.affine)
    if not folder.is_dir():
        raise ImageNotFoundError(f"there is no folder {folder}: give that of the series")
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.is_file():
            continue
        try:
            dataset = pydicom.dcmread(path)
        except pydicom.errors.InvalidDicomError:
            continue  # some other file
        if "ImagePositionPatient" not in dataset:
            raise SpaceError(f"{path} does not say where its slice lies: give a series of slices")
        x, y, z = map(float, dataset.ImagePositionPatient)
        i, j, k = (to_voxels @ (-x, -y, z, 1))[:3]
        size = (int(dataset.Columns), int(dataset.Rows))
        orientation = np.array([float(each) for each in dataset.ImageOrientationPatient]).reshape(2, 3)
        rows, columns = map(float, dataset.PixelSpacing)
        # Where the last pixels of the first row and of the first column lie, from the first one.
        ends = orientation * np.array([[columns * (size[0] - 1)], [rows * (size[1] - 1)]]) * (-1, -1, 1)
        expected = np.array([[size[0] - 1, 0, 0], [0, size[1] - 1, 0]])
        is_turned = np.abs(ends @ to_voxels[:3, :3].T - expected).max() > TOLERANCE
        if is_turned or max(abs(i), abs(j), abs(k - round(k))) > TOLERANCE or size != image.spatial_shape[:2]:
            raise SpaceError(f"{path} does not lie on a slice of the label map: give the series that it was made of")
        for keyword in MAY_BE_EMPTY:
            if keyword not in dataset:
                setattr(dataset, keyword, None)
        found[round(k)] = dataset
    if sorted(found) != list(range(image.spatial_shape[2])):
        raise SpaceError(
            f"{folder} has {len(found)} slices, and the label map {image.spatial_shape[2]}: give the series it is of"
        )
    return [found[number] for number in sorted(found)]
