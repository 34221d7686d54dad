"""Names that scripts for TorchIO use, and errors for what is easily written wrong."""

import numpy as np
import pytest
import torch
import torchio as tio

import voxloom as vx
from voxloom.errors import ArgumentNameError, ImageError, NoSuchKeyError, QueueError, SamplingError, SubjectError

OBLIQUE = np.array([[1.2, 0.3, 0, -40], [-0.3, 1.1, 0.2, 12], [0, -0.2, 2.5, 7], [0, 0, 0, 1]])


@pytest.fixture
def subject():
    data, labels = torch.rand(1, 8, 9, 10), torch.zeros(1, 8, 9, 10, dtype=torch.uint8)
    labels[0, :2] = 3
    return vx.Subject(t1=vx.ScalarImage(data, affine=OBLIQUE), seg=vx.LabelMap(labels, affine=OBLIQUE), age=4)


# Names


def test_images_tell_what_torchios_do(subject):
    theirs = tio.ScalarImage(tensor=subject.t1.data, affine=np.diag([2.0, 3, 4, 1]))
    ours = vx.ScalarImage(subject.t1.data, affine=np.diag([2.0, 3, 4, 1]))
    assert ours.get_center() == pytest.approx(theirs.get_center())
    assert ours.get_center(lps=True) == pytest.approx(theirs.get_center(lps=True))
    assert np.allclose(ours.get_bounds(), theirs.get_bounds())
    assert subject.seg.count_labels() == {0: 540, 3: 180} == tio.LabelMap(tensor=subject.seg.data).count_labels()
    assert not subject.t1.is_2d()
    assert vx.ScalarImage(torch.zeros(1, 4, 5, 1)).is_2d()


def test_bounds_hold_all_of_an_oblique_volume(subject):
    bounds = np.array(subject.t1.get_bounds())
    voxels = np.stack(np.meshgrid(*map(np.arange, subject.spatial_shape), indexing="ij"), -1).reshape(-1, 3)
    places = voxels @ OBLIQUE[:3, :3].T + OBLIQUE[:3, 3]
    assert (places >= bounds[:, 0]).all()
    assert (places <= bounds[:, 1]).all()
    assert (bounds[:, 1] - bounds[:, 0] - np.ptp(places, axis=0) < 3).all()


def test_subjects_give_images_as_torchios_do(subject):
    assert list(subject.get_images_dict()) == ["t1"]
    assert list(subject.get_images_dict(intensity_only=False)) == subject.get_images_names() == ["t1", "seg"]
    assert list(subject.get_images_dict(False, exclude=["t1"])) == ["seg"]
    assert subject.get_images(False, include=["seg"]) == [subject.seg]
    assert subject.get_first_image() is subject.t1
    assert subject.get_scalar_image("t1") is subject.t1
    assert subject.get_label_map("seg") is subject.seg
    with pytest.raises(SubjectError, match="'t1' is of type 'intensity', not 'label'"):
        subject.get_label_map("t1")
    subject.check_consistent_space()
    assert not subject.is_2d()


def test_batches_give_subjects_by_their_number(subject):
    batch = vx.SubjectsBatch.from_subjects([subject, subject])
    assert torch.equal(batch[1].t1.data, subject.t1.data)
    assert batch[-1].age == 4
    assert type(batch[0].seg) is vx.LabelMap
    assert len(batch.t1.affines) == 2
    assert np.array_equal(batch.t1.affines[0], OBLIQUE)
    with pytest.raises(IndexError, match="2 subjects"):
        batch[2]


def test_data_sets_are_made_of_batches(subject):
    ours = vx.SubjectsDataset.from_batch(vx.SubjectsBatch.from_subjects([subject, subject]))
    theirs = tio.SubjectsLoader(
        tio.SubjectsDataset([tio.Subject(t1=tio.ScalarImage(tensor=subject.t1.data), age=4)] * 2), batch_size=2
    )
    for dataset in (ours, vx.SubjectsDataset.from_batch(next(iter(theirs)))):
        assert len(dataset) == 2
        assert torch.equal(dataset[1].t1.data, subject.t1.data)
        assert dataset[1].t1.type == "intensity"
        assert int(dataset[1].age) == 4
    with pytest.raises(SubjectError, match="no batch of subjects"):
        vx.SubjectsDataset.from_batch([1, 2])


@pytest.mark.parametrize("channels", [1, 3])
def test_images_go_to_nibabel_and_simpleitk_and_back(channels):
    data = torch.from_numpy(np.random.default_rng(0).integers(-99, 99, (channels, 5, 6, 7)).astype(np.int16))
    image = vx.ScalarImage(data, affine=OBLIQUE)
    for there in (image.as_nibabel(), image.as_sitk()):
        back = vx.as_image(there)
        assert torch.equal(back.data, data)
        assert np.allclose(back.affine, OBLIQUE, atol=1e-5)
    assert np.array_equal(image.as_nibabel().affine, OBLIQUE)


@pytest.mark.parametrize("make", [vx.as_image, vx.ScalarImage, lambda data: vx.predict(torch.nn.Identity(), data, 4)])
@pytest.mark.parametrize("kind", [torch.as_tensor, np.asarray])
def test_a_volume_without_channels_has_one_everywhere(make, kind):
    values = np.random.default_rng(0).normal(size=(5, 6, 7)).astype(np.float32)
    assert np.allclose(make(kind(values)).data[0], values, atol=1e-6)


def test_as_image_takes_what_holds_a_volume(tmp_path):
    data = torch.rand(1, 5, 6, 7)
    image = vx.ScalarImage(data)
    image.save(tmp_path / "scan.nii.gz")
    assert vx.as_image(image) is image
    for given in (tmp_path / "scan.nii.gz", str(tmp_path / "scan.nii.gz"), data, data.numpy(), vx.ArraySource(data.numpy())):
        assert torch.equal(vx.as_image(given).data, data)
    assert vx.as_image(data, type="label").type == "label"
    with pytest.raises(ImageError, match="something of type dict is no image: give a path"):
        vx.as_image({})


# Errors


def test_arguments_of_other_names_are_named(subject):
    with pytest.raises(ArgumentNameError, match="Predictor has no argument 'overlap': it is called patch_overlap"):
        vx.predict(torch.nn.Identity(), subject.t1, 4, overlap=0.5)
    with pytest.raises(TypeError, match="no argument 'roi_size': it is called patch_size"):
        vx.Predictor(torch.nn.Identity(), roi_size=4)
    with pytest.raises(ArgumentNameError, match=r"GridSampler has no argument 'patch_sise': did you mean patch_size"):
        vx.GridSampler(subject, patch_sise=4)
    with pytest.raises(ArgumentNameError, match="Queue has no argument 'worker': did you mean num_workers"):
        vx.Queue([subject], 4, 1, vx.UniformSampler(4), worker=2)
    with pytest.raises(ArgumentNameError, match="LabelSampler has no argument 'zzz', only subject, patch_size, label_name"):
        vx.LabelSampler(4, zzz=2)
    with pytest.raises(ArgumentNameError, match="LabelSampler has no argument 'label_probs': did you mean label_probabilities"):
        vx.LabelSampler(4, "seg", label_probs={1: 1})


def test_a_queue_has_no_patch_of_an_index(subject):
    with pytest.raises(QueueError, match="iterate it, or give it to a SubjectsLoader"):
        vx.Queue([subject], 4, 1, vx.UniformSampler(4))[0]


def test_paths_are_not_images(subject):
    with pytest.raises(SubjectError, match=r"make one of 't1.nii.gz', t1=ScalarImage\('t1.nii.gz'\)"):
        vx.Subject(t1="t1.nii.gz")
    subject["other"] = "other.nii.gz"
    with pytest.raises(NoSuchKeyError, match=r"'other' is the text 'other.nii.gz': make an image of it"):
        next(vx.LabelSampler(4, "other")(subject))


def test_channels_that_come_last_are_warned_of():
    array = np.zeros((40, 41, 42, 1), dtype=np.float32)
    for make in (vx.ScalarImage, lambda data: vx.predict(torch.nn.Identity(), data, (16, 16, 1)), vx.ArraySource):
        with pytest.warns(RuntimeWarning, match=r"40 channels of 41 × 42 × 1 voxels.*np.moveaxis"):
            make(array)
    vx.ScalarImage(np.moveaxis(array, -1, 0))


def test_batches_are_no_images():
    with pytest.raises(ImageError, match=r"\(2, 1, 8, 8, 8\), which is a batch.*batch\[0\]"):
        vx.predict(torch.nn.Identity(), torch.zeros(2, 1, 8, 8, 8), 4)


def test_labels_are_whole_numbers(subject):
    subject["soft"] = vx.LabelMap(torch.full((1, 8, 9, 10), 0.52), affine=OBLIQUE)
    for more in ({}, {"label_probabilities": {1: 1}}):
        with pytest.raises(SamplingError, match="'soft' holds 0.52, which is no whole number: resample"):
            next(vx.LabelSampler(4, "soft", **more)(subject))
    subject["scaled"] = vx.LabelMap(torch.full((1, 8, 9, 10), 0.9999), affine=OBLIQUE)
    assert (next(vx.LabelSampler(4, "scaled", {1: 1})(subject)).scaled.data == 0.9999).all()


def test_labels_in_a_scalar_image_are_named():
    subject = vx.Subject(labels=vx.ScalarImage(torch.ones(1, 8, 8, 8)))
    with pytest.raises(SubjectError, match="make a LabelMap of the one that holds labels"):
        next(vx.LabelSampler(4)(subject))


def test_channels_that_a_network_does_not_take_are_named_with_the_image(tmp_path):
    vx.ScalarImage(torch.zeros(2, 8, 8, 8)).save(tmp_path / "two.nii.gz")
    with pytest.raises(RuntimeError) as caught:
        vx.predict(torch.nn.Conv3d(1, 1, 1), tmp_path / "two.nii.gz", 4)
    assert "2 channels as" in "".join(caught.value.__notes__)
    assert "two.nii.gz" in "".join(caught.value.__notes__)
