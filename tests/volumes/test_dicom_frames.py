"""DICOM files of many frames, segmentations and pixels that ITK does not read: right, or an error that says why."""

import shutil
import warnings

import numpy as np
import pydicom
import pydicom.data
import pytest
import SimpleITK
import torch
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import CTImageStorage, RLELossless

import voxloom as vx
from dicom_samples import COLUMNS, FRAMES, ROWS, STEP, base, frames, item, write_enhanced, write_segments, write_slices
from voxloom.errors import CorruptImageError, SeriesError


@pytest.mark.parametrize("order", ["forwards", "backwards", "shuffled"])
def test_frames_are_put_where_they_lie(tmp_path, order):
    places = {"forwards": range(FRAMES), "backwards": range(FRAMES)[::-1], "shuffled": [3, 0, 6, 1, 5, 2, 4]}[order]
    image = vx.ScalarImage(write_enhanced(tmp_path / "a.dcm", places, frames()))
    assert image.shape == (1, COLUMNS, ROWS, FRAMES)
    np.testing.assert_allclose(image.spacing, (0.5, 0.8, STEP), atol=1e-6)
    np.testing.assert_allclose(image.affine[:3, 3], (-10, 20, 30))
    for frame, place in enumerate(places):
        np.testing.assert_array_equal(image.numpy()[0, :, :, place], frames()[frame].T)
    assert image.read(image_box(image, 2, 5)).equal(image.data[..., 2:5])


def image_box(image, start, stop):
    return type(vx.PatchGrid.cover(image.spatial_shape, 3)[0].box)((0, 0, start), (*image.spatial_shape[:2], stop))


def test_an_oblique_file_lies_where_its_frames_say(tmp_path):
    orientation = (0.8, 0.6, 0, 0, 0, -1)
    image = vx.ScalarImage(write_enhanced(tmp_path / "a.dcm", range(FRAMES), frames(), orientation=orientation))
    normal = np.cross(orientation[:3], orientation[3:])
    lps = (
        np.array([10.0, -20, 30]) + 3 * STEP * normal + 2 * 0.5 * np.array(orientation[:3]) + 4 * 0.8 * np.array(orientation[3:])
    )
    np.testing.assert_allclose((image.affine @ [2, 4, 3, 1])[:3], lps * [-1, -1, 1], atol=1e-4)
    assert image.data[0, 2, 4, 3] == frames()[3, 4, 2]


def test_a_missing_frame_is_located(tmp_path):
    write_enhanced(tmp_path / "a.dcm", [0, 1, 2, 4, 5, 6], frames(6))
    with pytest.raises(SeriesError, match=r"frame 3 and frame 4 are 5 mm apart, .* 1 of them are missing"):
        _ = vx.ScalarImage(tmp_path / "a.dcm").shape


def test_a_repeated_frame_is_located(tmp_path):
    write_enhanced(tmp_path / "a.dcm", [0, 1, 2, 2, 3, 4, 5], frames())
    with pytest.raises(SeriesError, match="frame 3 and frame 4 are slices at the same place"):
        _ = vx.ScalarImage(tmp_path / "a.dcm").shape


def test_frames_that_are_not_described_are_an_error(tmp_path):
    write_enhanced(tmp_path / "a.dcm", range(FRAMES), frames(), groups=6)
    with pytest.raises(SeriesError, match="has 7 frames, but describes 6"):
        _ = vx.ScalarImage(tmp_path / "a.dcm").shape


def test_times_are_channels(tmp_path):
    places, times = [0, 1, 2, 0, 1, 2], [2, 2, 2, 1, 1, 1]
    image = vx.ScalarImage(write_enhanced(tmp_path / "a.dcm", places, frames(6), times))
    assert image.shape == (2, COLUMNS, ROWS, 3)
    np.testing.assert_array_equal(image.numpy()[0], frames(6)[3:].transpose(2, 1, 0))
    np.testing.assert_array_equal(image.numpy()[1], frames(6)[:3].transpose(2, 1, 0))


def test_a_time_with_a_frame_less_is_an_error(tmp_path):
    write_enhanced(tmp_path / "a.dcm", [0, 1, 2, 0, 1], frames(5), [1, 1, 1, 2, 2])
    with pytest.raises(SeriesError, match="holds 2 volumes"):
        _ = vx.ScalarImage(tmp_path / "a.dcm").shape


def test_frames_that_are_scaled_on_their_own_keep_their_values(tmp_path):
    scales = [1, 2, 0.5, 1, 4, 1, 1]
    image = vx.ScalarImage(write_enhanced(tmp_path / "a.dcm", range(FRAMES), frames(), scales=scales))
    np.testing.assert_allclose(image.numpy()[0], frames().transpose(2, 1, 0) * np.array(scales))


ENTRIES = [(1, 3), (1, 4), (2, 0), (2, 4), (1, 6)]


def masks(largest=1):
    return (np.random.default_rng(0).random((len(ENTRIES), ROWS, COLUMNS)) * (largest + 0.999)).astype(np.uint8)


def segments(values, count=2, dtype=np.uint8):
    out = np.zeros((count, COLUMNS, ROWS, FRAMES), dtype=dtype)
    for (segment, place), plane in zip(ENTRIES, values, strict=True):
        out[segment - 1, :, :, place] = plane.T
    return out


@pytest.mark.parametrize("step", [STEP, None])
def test_segments_are_channels_of_0_and_1_and_frames_left_out_are_empty(tmp_path, step):
    image = vx.LabelMap(write_segments(tmp_path / "a.dcm", ENTRIES, masks(), step=step))
    assert image.dtype == torch.uint8
    np.testing.assert_array_equal(image.numpy(), segments(masks()))
    np.testing.assert_allclose(image.spacing, (0.5, 0.8, STEP), atol=1e-6)


@pytest.mark.parametrize("places", [(0, 3, 7), (0, 2, 5, 7)])
def test_planes_of_segments_lie_as_thick_as_they_are_if_nothing_else_fits(tmp_path, places):
    entries = [(1, place) for place in places]
    image = vx.LabelMap(
        write_segments(tmp_path / "a.dcm", entries, np.ones((len(places), ROWS, COLUMNS), np.uint8), 1, step=None)
    )
    np.testing.assert_allclose(image.spacing, (0.5, 0.8, STEP), atol=1e-6)
    assert np.flatnonzero(image.numpy()[0, 0, 0]).tolist() == list(places)


def test_positions_of_segments_may_differ_by_their_rounding(tmp_path):
    entries = [(1, 0), (1, 1), (2, 1 + 4e-4), (2, 2), (1, 3)]
    image = vx.LabelMap(write_segments(tmp_path / "a.dcm", entries, masks(), step=None))
    assert image.shape == (2, COLUMNS, ROWS, 4)


def test_a_frame_in_run_lengths_that_is_missing_is_damage(tmp_path):
    write_enhanced(tmp_path / "a.dcm", range(FRAMES), frames())
    data = pydicom.dcmread(tmp_path / "a.dcm")
    data.compress(RLELossless)
    pieces = list(generate_frames(data.PixelData, number_of_frames=FRAMES))
    data.PixelData = encapsulate(pieces[:-1])
    data["PixelData"].is_undefined_length = True
    data.save_as(tmp_path / "a.dcm")
    with pytest.raises(CorruptImageError, match=r"a\.dcm cannot be decoded"):
        list(map(vx.ScalarImage.load, [vx.ScalarImage(tmp_path / "a.dcm")]))


def test_fractional_segments_are_parts_of_1(tmp_path):
    image = vx.ScalarImage(write_segments(tmp_path / "a.dcm", ENTRIES, masks(250), kind="FRACTIONAL"))
    np.testing.assert_allclose(image.numpy(), segments(masks(250) / 250, dtype=np.float32), rtol=1e-6)


def test_a_segmentation_of_one_frame_is_of_0_and_1():
    image = vx.LabelMap(pydicom.data.get_testdata_file("liver_1frame.dcm"))
    assert image.data.unique().tolist() == [0, 1]


def test_a_segment_twice_at_one_place_is_an_error(tmp_path):
    write_segments(tmp_path / "a.dcm", [(1, 0), (1, 1), (1, 1)], masks()[:3])
    with pytest.raises(SeriesError, match="frames 2 and 3 are of one segment and at one place"):
        _ = vx.LabelMap(tmp_path / "a.dcm").shape


# Pixels


@pytest.mark.parametrize(
    "name",
    [
        "rtdose_expb.dcm",
        "rtdose_expb_1frame.dcm",
        "rtdose_1frame.dcm",
        "rtdose_rle.dcm",
        "SC_rgb_rle_16bit.dcm",
        "SC_rgb_rle_32bit_2frame.dcm",
    ],
)
def test_what_itk_reads_wrongly_is_what_pydicom_reads(name):
    path = pydicom.data.get_testdata_file(name)
    data = pydicom.dcmread(path)
    planes = data.pixel_array.reshape(int(data.get("NumberOfFrames", 1)), data.Rows, data.Columns, data.SamplesPerPixel)
    np.testing.assert_array_equal(vx.ScalarImage(path).numpy(), planes.transpose(3, 2, 1, 0))


def test_big_and_little_endian_doses_are_one_image():
    big, little = (vx.ScalarImage(pydicom.data.get_testdata_file(name)) for name in ("rtdose_expb.dcm", "rtdose.dcm"))
    assert big.data.equal(little.data)
    np.testing.assert_allclose(big.affine, little.affine)


def test_a_series_of_colours_in_run_lengths_is_read_right(tmp_path):
    values = write_slices(tmp_path, "RGB", RLELossless, samples=3)
    np.testing.assert_array_equal(vx.ScalarImage(tmp_path).numpy(), values)


def test_monochrome1_is_turned_round_unless_what_is_stored_is_wanted(tmp_path):
    values = write_slices(tmp_path, "MONOCHROME1", RescaleSlope=2, RescaleIntercept=-10)
    np.testing.assert_array_equal(vx.ScalarImage(tmp_path).numpy(), (4095 - values) * 2 - 10)
    stored = vx.ScalarImage(tmp_path, reader=vx.stored_dicom)
    np.testing.assert_array_equal(stored.numpy(), values)
    np.testing.assert_array_equal(stored.affine, vx.ScalarImage(tmp_path).affine)
    single = vx.ScalarImage(tmp_path / "s3.dcm", reader=vx.stored_dicom)
    np.testing.assert_array_equal(single.numpy(), values[..., 3:4])


def test_palettes_become_colours_unless_what_is_stored_is_wanted():
    path = pydicom.data.get_testdata_file("examples_palette.dcm")
    colours = vx.ScalarImage(path)
    assert colours.shape[0] == 3
    stored = vx.ScalarImage(path, reader=vx.stored_dicom)
    np.testing.assert_array_equal(stored.numpy()[0, ..., 0], pydicom.dcmread(path).pixel_array.T)


def test_a_header_that_claims_gigabytes_is_refused_before_memory_is_taken(tmp_path):
    data = pydicom.dcmread(write_enhanced(tmp_path / "a.dcm", range(FRAMES), frames()))
    data.Rows = data.Columns = 60000
    data.save_as(tmp_path / "a.dcm")
    with pytest.raises(CorruptImageError, match="claims 25200000000 values of 16 bits"):
        _ = vx.ScalarImage(tmp_path / "a.dcm").shape


@pytest.mark.parametrize("size", [0, 1, 131, 132, 300])
@pytest.mark.parametrize("which", [0, 3, 6])
def test_a_slice_that_was_cut_is_named_wherever_it_was_cut(tmp_path, size, which):
    write_slices(tmp_path)
    path = tmp_path / f"s{which}.dcm"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(SeriesError, match=rf"s{which}\.dcm is a slice that cannot be read"):
        _ = vx.ScalarImage(tmp_path).shape


def test_names_without_an_ending_are_dicom_by_their_content(tmp_path):
    shutil.copy(pydicom.data.get_testdata_file("rtdose_expb.dcm"), tmp_path / "1.2.840.3")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = vx.ScalarImage(tmp_path / "1.2.840.3")
    assert image.shape == (1, 10, 10, 15)
    assert SimpleITK.ReadImage(str(tmp_path / "1.2.840.3")).GetSize() == (10, 10, 15)


# What else there is


NUCLEAR, SECONDARY_CAPTURE, RT_IMAGE = (f"1.2.840.10008.5.1.4.1.1.{number}" for number in ("20", "7", "481.1"))


def test_nuclear_medicine_says_where_it_lies_in_its_detector(tmp_path):
    data = base(tmp_path / "a.dcm", NUCLEAR)
    data.NumberOfFrames, data.PixelSpacing, data.PixelData = 4, [4, 4], frames(4).tobytes()
    place = {"ImagePositionPatient": [-100.0, -110.0, 50.0], "ImageOrientationPatient": [1.0, 0.0, 0.0, 0.0, 0.0, -1.0]}
    data.DetectorInformationSequence = [item(**place)]
    data.save_as(tmp_path / "a.dcm")
    image = vx.ScalarImage(tmp_path / "a.dcm")
    np.testing.assert_allclose(image.affine[:3, 3], (100, 110, 50))
    assert image.orientation == ("L", "I", "P")


@pytest.mark.parametrize(
    ("kind", "name"),
    [(SECONDARY_CAPTURE, "NominalScannedPixelSpacing"), (RT_IMAGE, "ImagePlanePixelSpacing"), (NUCLEAR, "PixelSpacing")],
)
def test_pixels_have_the_size_that_their_kind_of_object_states(tmp_path, kind, name):
    data = base(tmp_path / "a.dcm", kind)
    setattr(data, name, [0.3, 0.2])
    data.PixelData = frames(1).tobytes()
    data.save_as(tmp_path / "a.dcm")
    np.testing.assert_allclose(vx.ScalarImage(tmp_path / "a.dcm").spacing, (0.2, 0.3, 1))


@pytest.mark.parametrize("is_implicit", [True, False])
def test_old_files_without_a_mark_are_read(tmp_path, is_implicit):
    data = base(tmp_path / "a.dcm", CTImageStorage)
    data.PixelData = frames(1).tobytes()
    bare = pydicom.Dataset(dict(data.items()))
    pydicom.dcmwrite(tmp_path / "a.dcm", bare, implicit_vr=is_implicit, little_endian=True, enforce_file_format=False)
    for reader in (None, vx.stored_dicom):
        np.testing.assert_array_equal(vx.ScalarImage(tmp_path / "a.dcm", reader=reader).numpy()[0, ..., 0], frames(1)[0].T)


@pytest.mark.parametrize(("digits", "count", "step"), [(2, 40, 1.0), (3, 200, 1.0), (3, 200, 1 / 3)])
def test_rounded_places_of_oblique_segments_are_whole_planes(tmp_path, digits, count, step):
    tilt = 0.3
    path = write_segments(tmp_path / "a.dcm", [(1, k) for k in range(count)], np.ones((count, ROWS, COLUMNS)), count=1, step=None)
    data = pydicom.dcmread(path)
    for k, group in enumerate(data.PerFrameFunctionalGroupsSequence):
        place = k * step * np.array([0, np.sin(tilt), np.cos(tilt)])
        group.PlanePositionSequence[0].ImagePositionPatient = [round(float(value), digits) for value in place]
    orientation = [1.0, 0.0, 0.0, 0.0, float(np.cos(tilt)), float(-np.sin(tilt))]
    data.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0].ImageOrientationPatient = orientation
    data.save_as(path)
    image = vx.LabelMap(path)
    assert image.shape == (1, COLUMNS, ROWS, count)
    assert image.spacing[2] == pytest.approx(step, rel=1e-3)
    assert image.data.all()


def test_large_files_of_other_kinds_beside_slices_are_not_parsed(tmp_path):
    values = write_slices(tmp_path)
    (tmp_path / "mask.raw").write_bytes(bytes(10**7))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("voxloom.io.dicom.frames.pydicom.dcmread", _refusing(pydicom.dcmread))
        assert vx.ScalarImage(tmp_path).shape == (1, COLUMNS, ROWS, len(values[0, 0, 0]))


def _refusing(read):
    def dcmread(file, **options):
        assert not file.name.endswith(".raw")
        return read(file, **options)

    return dcmread


@pytest.mark.parametrize("scales", [[1, 2, 0.5, 1, 4, 1, 1], [0.5, 0.25, 0.125, 1, 2, 4, 0.5]])
def test_frames_that_itk_decodes_get_scales_of_their_own_too(tmp_path, monkeypatch, scales):
    """What is compressed as pictures is ITK's, which takes the first scale for all; here it decodes plain frames."""
    path = write_enhanced(tmp_path / "a.dcm", [3, 0, 6, 1, 5, 2, 4], frames(), scales=scales)
    expected = vx.ScalarImage(path).data
    monkeypatch.setattr("voxloom.io.dicom.files._is_for_itk", lambda header: True)
    assert SimpleITK.ReadImage(str(path)).GetSize() == (COLUMNS, ROWS, FRAMES)
    torch.testing.assert_close(vx.ScalarImage(path).data.double(), expected.double())


def test_fractions_that_itk_decodes_are_parts_of_1_too(tmp_path, monkeypatch):
    path = write_segments(tmp_path / "a.dcm", ENTRIES, masks(250), kind="FRACTIONAL")
    expected = vx.ScalarImage(path).data
    monkeypatch.setattr("voxloom.io.dicom.files._is_for_itk", lambda header: True)
    torch.testing.assert_close(vx.ScalarImage(path).data, expected)
