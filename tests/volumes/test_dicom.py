"""DICOM folders: one regular series is a volume, and anything else an error that says what is wrong."""

import numpy as np
import pydicom
import pytest
import torch
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

import voxloom as vx
from voxloom.errors import SeriesError, UnsupportedImageError

ROWS, COLUMNS, SLICES = 6, 5, 8
SPACING = (0.8, 0.5)  # between rows, between columns
STEP = 2.5


def volume():
    return np.arange(SLICES * ROWS * COLUMNS, dtype=np.int16).reshape(SLICES, ROWS, COLUMNS) - 100


def write_series(folder, positions=None, orientation=(1, 0, 0, 0, 1, 0), uid="1.2.3", values=None, prefix="s", **tags):
    """Write one file for each slice, under names in an order of their own."""
    values = volume() if values is None else values
    if positions is None:
        normal = np.cross(orientation[:3], orientation[3:])
        positions = [np.array([10.0, -20, 30]) + STEP * number * normal for number in range(len(values))]
    for number, (plane, position) in enumerate(zip(values, positions, strict=True)):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
        data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        data.StudyInstanceUID, data.SeriesInstanceUID, data.Modality = "1.2", uid, "CT"
        data.SeriesDescription = f"series {uid}"
        data.ImagePositionPatient = [float(value) for value in position]
        data.ImageOrientationPatient = [float(value) for value in orientation]
        data.PixelSpacing, data.SliceThickness, data.InstanceNumber = list(SPACING), STEP, number + 1
        data.Rows, data.Columns = plane.shape
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
        data.RescaleSlope, data.RescaleIntercept = 1, 0
        for name, value in tags.items():
            setattr(data, name, value)
        data.PixelData = np.ascontiguousarray(plane).tobytes()
        data.save_as(folder / f"{prefix}{(number * 5) % 97:03d}.dcm")


OBLIQUE = (0.8, 0.6, 0, 0, 0, -1)


@pytest.mark.parametrize("orientation", [(1, 0, 0, 0, 1, 0), (0, 1, 0, 0, 0, -1), OBLIQUE])
def test_a_series_is_a_volume_in_its_place(tmp_path, orientation):
    write_series(tmp_path, orientation=orientation)
    image = vx.ScalarImage(tmp_path)
    assert image.shape == (1, COLUMNS, ROWS, SLICES)
    assert not image.is_loaded
    np.testing.assert_allclose(image.spacing, (0.5, 0.8, 2.5), atol=1e-9)
    normal = np.cross(orientation[:3], orientation[3:])
    for i, j, k in [(0, 0, 0), (4, 5, 7), (1, 2, 3)]:
        lps = (
            np.array([10.0, -20, 30])
            + i * 0.5 * np.array(orientation[:3])
            + j * 0.8 * np.array(orientation[3:])
            + k * STEP * normal
        )
        np.testing.assert_allclose((image.affine @ [i, j, k, 1])[:3], lps * [-1, -1, 1], atol=1e-6)
        assert image.data[0, i, j, k] == volume()[k, j, i]


def test_a_series_is_read_in_the_order_of_its_slices_and_not_of_its_names(tmp_path):
    write_series(tmp_path, positions=[(0, 0, -2.5 * number) for number in range(SLICES)])
    image = vx.ScalarImage(tmp_path)
    np.testing.assert_array_equal(image.numpy()[0], volume()[::-1].transpose(2, 1, 0))


def test_one_file_alone_is_an_image_too(tmp_path):
    write_series(tmp_path, values=volume()[:1])
    for path in (tmp_path, next(tmp_path.iterdir())):
        image = vx.ScalarImage(path)
        assert image.shape == (1, COLUMNS, ROWS, 1)
        np.testing.assert_array_equal(image.numpy()[0, ..., 0], volume()[0].T)


def test_hounsfield_units_are_what_is_read(tmp_path):
    write_series(tmp_path, RescaleSlope=2, RescaleIntercept=-1000)
    np.testing.assert_array_equal(vx.ScalarImage(tmp_path).numpy()[0], volume().transpose(2, 1, 0) * 2.0 - 1000)


def test_several_series_are_listed(tmp_path):
    write_series(tmp_path, uid="1.2.3")
    write_series(tmp_path, uid="1.2.4", prefix="t", values=volume()[:3])
    with pytest.raises(SeriesError, match=r"holds 2 DICOM series.*8 files \(series 1\.2\.3\); .*3 files \(series 1\.2\.4\)"):
        _ = vx.ScalarImage(tmp_path).shape


def test_a_missing_slice_is_located(tmp_path):
    positions = [(0, 0, STEP * number) for number in (0, 1, 2, 3, 5, 6, 7, 8)]
    write_series(tmp_path, positions)
    with pytest.raises(SeriesError, match=r"are 5 mm apart, but slices are usually 2\.5 mm apart: 1 of them are missing"):
        _ = vx.ScalarImage(tmp_path).shape


def test_a_duplicate_slice_is_located(tmp_path):
    write_series(tmp_path, [(0, 0, STEP * number) for number in (0, 1, 2, 3, 3, 4, 5, 6)])
    with pytest.raises(SeriesError, match=r"slices at the same place \(\[0\.0, 0\.0, 7\.5\]\): remove the duplicate"):
        _ = vx.ScalarImage(tmp_path).shape


def test_uneven_slices_are_refused(tmp_path):
    write_series(tmp_path, [(0, 0, position) for position in (0, 2.5, 5, 7.5, 10.7, 12.5, 15, 17.5)])
    with pytest.raises(SeriesError, match="not evenly spaced"):
        _ = vx.ScalarImage(tmp_path).shape


def test_positions_that_were_rounded_are_accepted(tmp_path):
    write_series(tmp_path, [(0, 0, round(number * 2.5123, 2)) for number in range(SLICES)])
    assert vx.ScalarImage(tmp_path).spacing[2] == pytest.approx(2.5123, abs=2e-3)


def test_steps_that_add_up_to_another_place_are_refused(tmp_path):
    # Each is within a twentieth of the others, and the middle is 1.2 mm off.
    along = np.concatenate([np.arange(50), 50 + 1.048 * np.arange(50)])
    write_series(tmp_path, [(0, 0, place) for place in along], values=np.repeat(volume()[:1], 100, axis=0))
    with pytest.raises(SeriesError, match=r"s\d+\.dcm lies 1\.\d+ mm beside where even spacing puts it"):
        _ = vx.ScalarImage(tmp_path).shape


def test_slices_that_go_aside_and_back_are_refused(tmp_path):
    aside = [0, 0.1, 0.2, 0.3, 0.3, 0.2, 0.1, 0]
    write_series(tmp_path, [(each, 0, STEP * number) for number, each in enumerate(aside)])
    with pytest.raises(SeriesError, match=r"lies 0\.3 mm beside where even spacing puts it"):
        _ = vx.ScalarImage(tmp_path).shape


def test_directions_of_few_digits_leave_the_sizes_of_pixels_alone(tmp_path):
    write_series(tmp_path, orientation=(0.7, 0.7, 0, -0.7, 0.7, 0))
    np.testing.assert_allclose(vx.ScalarImage(tmp_path).spacing[:2], (0.5, 0.8), rtol=1e-12)


def test_pixels_of_two_sizes_are_no_series(tmp_path):
    write_series(tmp_path, values=volume()[:4])
    more = [(10, -20, 30 + STEP * number) for number in (4, 5)]
    write_series(tmp_path, more, values=volume()[4:6], prefix="z", PixelSpacing=[1.6, 1.0])
    with pytest.raises(
        SeriesError, match=r"z005\.dcm has pixels of 1 × 1\.6 mm, but s000\.dcm has pixels of 0\.5 × 0\.8 mm|z000"
    ):
        _ = vx.ScalarImage(tmp_path).shape


@pytest.mark.parametrize(
    ("tags", "says"),
    [
        ({"BitsStored": 12, "HighBit": 15}, "keeps 12 bits below bit 15"),
        ({"ModalityLUTSequence": [pydicom.Dataset()]}, "has a table of what its stored numbers mean"),
    ],
)
def test_numbers_that_mean_something_else_are_refused(tmp_path, tags, says):
    write_series(tmp_path, **tags)
    for path in (tmp_path, next(tmp_path.iterdir())):
        with pytest.raises(UnsupportedImageError, match=rf"\.dcm {says}"):
            _ = vx.ScalarImage(path).shape
    if "ModalityLUTSequence" in tags:
        assert vx.stored_dicom(next(tmp_path.iterdir()))[0].shape == (1, COLUMNS, ROWS, 1)
        assert vx.stored_dicom(tmp_path)[0].shape == (1, COLUMNS, ROWS, SLICES)


def test_a_tilted_gantry_is_refused_with_its_angle(tmp_path):
    tilt = np.radians(15)
    write_series(tmp_path, [(0, number * STEP * np.sin(tilt), number * STEP * np.cos(tilt)) for number in range(SLICES)])
    with pytest.raises(SeriesError, match="tilted by 15 degrees"):
        _ = vx.ScalarImage(tmp_path).shape


def test_slices_that_are_not_parallel_are_refused(tmp_path):
    write_series(tmp_path, values=volume()[:4])
    write_series(tmp_path, values=volume()[:1], positions=[(10, -20, 40)], orientation=(1, 0, 0, 0, 0.8, 0.6), prefix="z")
    with pytest.raises(SeriesError, match=r"not parallel|holds 2 DICOM series"):
        _ = vx.ScalarImage(tmp_path).shape


def test_slices_of_another_size_are_refused(tmp_path):
    write_series(tmp_path, values=volume()[:4])
    write_series(tmp_path, values=volume()[:1, :4], positions=[(10, -20, 40)], prefix="z")
    with pytest.raises(SeriesError, match=r"a series must be of one kind|holds 2 DICOM series"):
        _ = vx.ScalarImage(tmp_path).shape


@pytest.mark.parametrize("which", [0, 3, -1])
def test_a_damaged_slice_is_named_also_at_the_ends(tmp_path, which):
    write_series(tmp_path)
    by_place = sorted(tmp_path.iterdir(), key=lambda path: pydicom.dcmread(path).ImagePositionPatient[2])
    damaged = by_place[which]
    damaged.write_bytes(damaged.read_bytes()[:-20])
    with pytest.raises(SeriesError, match=f"{damaged.name} is a slice that cannot be read"):
        _ = vx.ScalarImage(tmp_path).shape


def test_other_files_in_the_folder_do_not_matter(tmp_path):
    write_series(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    report = pydicom.dcmread(next(tmp_path.glob("*.dcm")))
    report.file_meta.MediaStorageSOPClassUID = report.SOPClassUID = "1.2.840.10008.5.1.4.1.1.88.11"
    del report.PixelData
    report.save_as(tmp_path / "report.dcm")
    assert vx.ScalarImage(tmp_path).shape == (1, COLUMNS, ROWS, SLICES)


def test_slices_that_are_scaled_on_their_own_keep_their_values(tmp_path):
    slopes = [1.5, 2.0, 1.75, 1.0]
    for number, slope in enumerate(slopes):
        plane, place = volume()[number : number + 1], [(0, 0, STEP * number)]
        write_series(tmp_path, values=plane, positions=place, prefix=f"p{number}", RescaleSlope=slope)
    expected = volume()[:4].astype(float) * np.array(slopes)[:, None, None]
    np.testing.assert_allclose(vx.ScalarImage(tmp_path).numpy()[0], expected.transpose(2, 1, 0))


def test_a_position_that_is_none_is_refused(tmp_path):
    write_series(tmp_path, values=volume()[:3], ImagePositionPatient=None)
    with pytest.raises(SeriesError, match=r"ImagePositionPatient"):
        _ = vx.ScalarImage(tmp_path).shape


def test_a_series_goes_through_a_grid(tmp_path):
    write_series(tmp_path)
    sampler = vx.GridSampler(vx.Subject(ct=vx.ScalarImage(tmp_path)), 3, 2)
    aggregator = vx.GridAggregator(sampler)
    for batch in vx.SubjectsLoader(sampler, batch_size=4):
        aggregator.add_batch(batch.ct.data, batch)
    assert torch.equal(aggregator.get_output(), vx.ScalarImage(tmp_path).data)
