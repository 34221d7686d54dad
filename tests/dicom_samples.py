"""DICOM files of many frames, segmentations and series, made by pydicom."""

import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    EnhancedMRImageStorage,
    ExplicitVRLittleEndian,
    RLELossless,
    SegmentationStorage,
    generate_uid,
)

ROWS, COLUMNS, FRAMES, STEP = 6, 5, 7, 2.5
SPACING = (0.8, 0.5)


def frames(count=FRAMES):
    return np.arange(count * ROWS * COLUMNS, dtype=np.int16).reshape(count, ROWS, COLUMNS)


def item(**values):
    data = Dataset()
    for name, value in values.items():
        setattr(data, name, value)
    return data


def base(path, kind, bits=16, signed=1, syntax=ExplicitVRLittleEndian):
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID, meta.TransferSyntaxUID = kind, generate_uid(), syntax
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = kind, meta.MediaStorageSOPInstanceUID
    data.StudyInstanceUID, data.SeriesInstanceUID, data.Modality = "1.2", "1.2.3", "MR"
    data.Rows, data.Columns, data.SamplesPerPixel, data.PhotometricInterpretation = ROWS, COLUMNS, 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = bits, bits, bits - 1, signed
    return data


def write_enhanced(path, places, values, times=None, groups=None, orientation=(1, 0, 0, 0, 1, 0), scales=None):
    """Write a file of many frames, each at one of the places along the normal."""
    data = base(path, EnhancedMRImageStorage)
    data.NumberOfFrames = len(values)
    normal = np.cross(orientation[:3], orientation[3:])
    data.SharedFunctionalGroupsSequence = [
        item(
            PixelMeasuresSequence=[item(PixelSpacing=list(SPACING), SliceThickness=STEP)],
            PlaneOrientationSequence=[item(ImageOrientationPatient=list(map(float, orientation)))],
        )
    ]
    data.DimensionIndexSequence = [
        item(DimensionIndexPointer=0x00209056),
        item(DimensionIndexPointer=0x00209057),
        item(DimensionIndexPointer=0x00209128),
    ]
    per_frame = []
    for number, place in enumerate(places):
        position = np.array([10.0, -20, 30]) + STEP * place * normal
        group = item(
            FrameContentSequence=[item(DimensionIndexValues=[1, int(place) + 1, 1 if times is None else int(times[number])])],
            PlanePositionSequence=[item(ImagePositionPatient=[round(float(value), 6) for value in position])],
        )
        if scales is not None:
            group.PixelValueTransformationSequence = [item(RescaleSlope=scales[number], RescaleIntercept=0, RescaleType="US")]
        per_frame.append(group)
    data.PerFrameFunctionalGroupsSequence = per_frame[: groups or len(per_frame)]
    data.PixelData = np.ascontiguousarray(values).tobytes()
    data.save_as(path)
    return path


def write_segments(path, entries, masks, count=2, kind="BINARY", step=STEP):
    """Write a segmentation of `(segment, place)` entries, of which each has a mask."""
    bits = 1 if kind == "BINARY" else 8
    data = base(path, SegmentationStorage, bits=bits, signed=0)
    data.SegmentationType, data.NumberOfFrames = kind, len(entries)
    if kind == "FRACTIONAL":
        data.MaximumFractionalValue = 250
    data.SegmentSequence = [item(SegmentNumber=number + 1, SegmentLabel=f"organ {number}") for number in range(count)]
    measures = item(PixelSpacing=list(SPACING), SliceThickness=STEP)
    if step is not None:
        measures.SpacingBetweenSlices = step
    data.SharedFunctionalGroupsSequence = [
        item(
            PixelMeasuresSequence=[measures],
            PlaneOrientationSequence=[item(ImageOrientationPatient=[1.0, 0.0, 0.0, 0.0, 1.0, 0.0])],
        )
    ]
    data.PerFrameFunctionalGroupsSequence = [
        item(
            PlanePositionSequence=[item(ImagePositionPatient=[0.0, 0.0, STEP * place])],
            SegmentIdentificationSequence=[item(ReferencedSegmentNumber=segment)],
        )
        for segment, place in entries
    ]
    values = np.ascontiguousarray(masks, dtype=np.uint8)
    packed = np.packbits(values.ravel(), bitorder="little") if bits == 1 else values.ravel()
    data.PixelData = packed.tobytes() + b"\0" * (packed.size % 2)
    data.save_as(path)
    return path


def write_slices(folder, photometric="MONOCHROME2", syntax=ExplicitVRLittleEndian, samples=1, **tags):
    values = np.random.default_rng(0).integers(0, 4000, (FRAMES, ROWS, COLUMNS, samples), dtype=np.uint16)
    for number, plane in enumerate(values):
        data = base(folder / "x.dcm", CTImageStorage, signed=0)
        data.PhotometricInterpretation, data.SamplesPerPixel, data.BitsStored, data.HighBit = photometric, samples, 12, 11
        if samples > 1:
            data.PlanarConfiguration, data.BitsStored, data.HighBit = 0, 16, 15
        data.ImagePositionPatient, data.ImageOrientationPatient = [0.0, 0.0, STEP * number], [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
        data.PixelSpacing, data.InstanceNumber = list(SPACING), number + 1
        for name, value in tags.items():
            setattr(data, name, value)
        data.PixelData = plane.tobytes()
        if syntax == RLELossless:
            data.compress(RLELossless, generate_instance_uid=False)
        data.save_as(folder / f"s{number}.dcm")
    return values.transpose(3, 2, 1, 0).astype(np.int64)
