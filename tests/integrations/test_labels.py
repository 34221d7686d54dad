"""Label maps with names and colours: segments of 3D Slicer, sidecars, and DICOM segmentations."""

import json

import numpy as np
import pydicom
import pytest
import SimpleITK
import torch
from torch import nn

import voxloom as vx
from dicom_samples import write_slices
from voxloom.errors import ModeError, SpaceError, TargetExistsError, UnsupportedImageError
from voxloom.integrations.dicom_seg import save_dicom_seg

LABELS = (vx.Label(1, "liver", (200, 10, 20), ("SCT", "10200004", "Liver")), vx.Label(2, "kidney, left"), vx.Label(9, "absent"))
SPEC = vx.ModelSpec(patch_size=16, reduce="argmax", labels=LABELS)
AFFINE = np.array([[-1, 0, 0, 9], [0, -1.5, 0, 8], [0, 0.1, 2, -7], [0, 0, 0, 1]])


def test_a_segmentation_may_have_many_segments(tmp_path):
    labels = (torch.arange(16**3) % 2001).reshape(1, 16, 16, 16).to(torch.int16)
    vx.convert(vx.LabelMap(labels), tmp_path / "many.seg.nrrd")
    assert torch.equal(vx.LabelMap(tmp_path / "many.seg.nrrd").data, labels)


def test_tables_take_names_and_numbers(tmp_path):
    vx.write_label_table({"liver": 5}, tmp_path / "table.tsv")
    assert (tmp_path / "table.tsv").read_text().splitlines()[1].startswith("5\tliver\t#")
    with pytest.raises(ModeError, match="labels has 'liver': give names and whole numbers"):
        vx.write_label_table(["liver"], tmp_path / "table.tsv")


def fixed(count=4):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Conv3d(1, count, 3, padding=1, bias=False)


@pytest.fixture
def image():
    return vx.ScalarImage(torch.randn((1, 20, 18, 14), generator=torch.Generator().manual_seed(1)), affine=AFFINE)


def test_segments_for_3d_slicer(image, tmp_path):
    made = vx.predict(fixed(), image, spec=SPEC, output=tmp_path / "out.seg.nrrd")
    expected = vx.predict(fixed(), image, spec=SPEC)
    assert torch.equal(made.data, expected.data)
    assert np.allclose(made.affine, AFFINE)
    header = SimpleITK.ReadImage(tmp_path / "out.seg.nrrd")
    fields = {key: header.GetMetaData(key) for key in header.GetMetaDataKeys() if key.startswith("Segment")}
    assert (fields["Segment0_Name"], fields["Segment1_Name"], fields["Segment0_LabelValue"]) == ("liver", "kidney, left", "1")
    assert fields["Segment0_Color"] == "0.784314 0.0392157 0.0784314"
    assert "SCT^10200004^Liver" in fields["Segment0_Tags"]
    assert fields["Segment2_Name"] == "label 3"  # it has no name, but is there
    assert (fields["Segment3_Name"], fields["Segment3_Extent"]) == ("absent", "0 -1 0 -1 0 -1")
    where = (expected.data[0] == 1).nonzero()
    ends = [f"{low} {high}" for low, high in zip(where.amin(0).tolist(), where.amax(0).tolist(), strict=True)]
    assert fields["Segment0_Extent"] == " ".join(ends)
    assert fields["Segmentation_SourceRepresentation"] == "Binary labelmap"
    assert json.loads((tmp_path / "out.json").read_text())["labels"][0]["name"] == "liver"


def test_segments_of_a_run_that_was_interrupted(image, tmp_path):
    calls = []

    def stopping(batch):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return fixed()(batch)

    options = {"spec": SPEC, "output": tmp_path / "out.seg.nrrd", "model_name": "fixed", "patch_size": 8, "dtype": torch.float32}
    with pytest.raises(KeyboardInterrupt):
        vx.predict(stopping, image, **options)
    made = vx.predict(fixed(), image, **options)
    assert torch.equal(made.data, vx.predict(fixed(), image, spec=SPEC, patch_size=8).data)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.seg.nrrd"]


def test_scores_are_no_segments(image, tmp_path):
    """Which is said before anything is computed."""
    with pytest.raises(UnsupportedImageError, match="label map of one channel"):
        vx.predict(fixed(), image, 16, output=tmp_path / "out.seg.nrrd")
    assert list(tmp_path.iterdir()) == []


def test_names_of_all_kinds(image, tmp_path):
    spec = vx.ModelSpec(patch_size=16, reduce="argmax", labels=(vx.Label(1, "a\tb:=c\r\nName \\ 肝"),))
    vx.predict(fixed(), image, spec=spec, output=tmp_path / "out.seg.nrrd")
    assert SimpleITK.ReadImage(tmp_path / "out.seg.nrrd").GetMetaData("Segment0_LabelValue") == "1"


def test_a_sidecar_names_the_labels(image, tmp_path):
    vx.predict(fixed(), image, spec=SPEC, output=tmp_path / "scan_dseg.nii.gz")
    found = json.loads((tmp_path / "scan_dseg.json").read_text())["labels"]
    assert [(each["value"], each["name"]) for each in found] == [(1, "liver"), (2, "kidney, left"), (9, "absent")]


@pytest.mark.slow
def test_a_dicom_segmentation(tmp_path):
    highdicom = pytest.importorskip("highdicom", reason="an extra, which `make test` installs")
    folder = tmp_path / "series"
    folder.mkdir()
    write_slices(
        folder, FrameOfReferenceUID="1.2.3.4", StudyInstanceUID="1.2.3.5", SeriesInstanceUID="1.2.3.6", SliceThickness="2.0"
    )
    scan = vx.ScalarImage(folder)
    values = torch.zeros(scan.spatial_shape, dtype=torch.uint8)
    values[1:3, 1:3, :2], values[0, 0, -1] = 1, 2
    labels = vx.LabelMap(values[None], affine=scan.affine)
    path = save_dicom_seg(labels, folder, tmp_path / "seg.dcm", LABELS)
    read = highdicom.seg.segread(path)
    assert read.segmentation_type == highdicom.seg.SegmentationTypeValues.LABELMAP
    assert [read.get_segment_description(number).segment_label for number in (1, 2, 3)] == ["liver", "kidney, left", "absent"]
    volume = read.get_volume(combine_segments=True)
    found = vx.LabelMap(torch.from_numpy(volume.array.astype(np.int64))[None], affine=np.diag([-1, -1, 1, 1]) @ volume.affine)
    on_grid = found.resampled(like=scan)
    assert torch.equal(on_grid.data[0], values.long())
    dataset = pydicom.dcmread(path)
    assert dataset.ReferencedSeriesSequence[0].SeriesInstanceUID == pydicom.dcmread(next(folder.iterdir())).SeriesInstanceUID
    with pytest.raises(TargetExistsError):
        save_dicom_seg(labels, folder, path, LABELS)
    (folder / "README.txt").write_text("of no matter")
    many = [vx.Label(number, f"label {number}") for number in range(1, 300)]
    many[0] = vx.Label(1, "肝臓 é", None, ("99X", "1", "long " * 20))
    again = pydicom.dcmread(save_dicom_seg(labels, folder, tmp_path / "many.dcm", many))
    assert "肝臓 é" in [segment.SegmentLabel for segment in again.SegmentSequence]
    with pytest.raises(vx.errors.ImageNotFoundError):
        save_dicom_seg(labels, tmp_path / "none", tmp_path / "b.dcm")
    with pytest.raises(SpaceError):
        save_dicom_seg(vx.LabelMap(values[None]), folder, tmp_path / "b.dcm")
    with pytest.raises(UnsupportedImageError, match="no label"):
        save_dicom_seg(vx.LabelMap(values[None] * 0, affine=scan.affine), folder, tmp_path / "b.dcm")
    with pytest.raises(UnsupportedImageError, match="0 to 65535"):
        save_dicom_seg(vx.LabelMap(values[None].int() - 1, affine=scan.affine), folder, tmp_path / "b.dcm")


def test_a_segmentation_has_the_axes_and_the_pixels_of_its_series(tmp_path):
    pytest.importorskip("highdicom", reason="an extra, which `make test` installs")
    folder = tmp_path / "series"
    folder.mkdir()
    write_slices(folder, FrameOfReferenceUID="1.2.3.4", StudyInstanceUID="1.2.3.5", SeriesInstanceUID="1.2.3.6")
    scan = vx.ScalarImage(folder)
    data = torch.ones((1, *scan.spatial_shape), dtype=torch.uint8)
    turned, wider = scan.affine.copy(), scan.affine.copy()
    turned[:, :2] = scan.affine[:, [1, 0]]
    wider[:, 0] *= 2
    for affine in (turned, wider):
        with pytest.raises(SpaceError, match="does not lie on a slice of the label map"):
            save_dicom_seg(vx.LabelMap(data, affine=affine), folder, tmp_path / "seg.dcm", LABELS)
    assert not (tmp_path / "seg.dcm").exists()
