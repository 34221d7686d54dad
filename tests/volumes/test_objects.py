"""Volumes of other libraries keep their places, and are read by slices where they can be."""

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch
from monai.data import MetaTensor

import voxloom as vx
from voxloom.errors import ImageError, SubjectError

AFFINE = np.array([[-0.9, 0, 0.1, 5], [0, 1.1, 0, -7], [0.1, 0, 2.5, 30], [0, 0, 0, 1]])
VALUES = np.arange(2 * 4 * 5 * 6, dtype=np.float32).reshape(2, 4, 5, 6)


class Sliced:
    """As an array of Zarr: it has a shape and a type, and is read by slices."""

    def __init__(self, values):
        self._values, self.reads = values, []
        self.shape, self.dtype = values.shape, values.dtype

    def __getitem__(self, slices):
        part = self._values[slices]
        self.reads.append(part.size)
        return part


def of_simpleitk(values):
    image = SimpleITK.GetImageFromArray(np.moveaxis(values, 0, -1).transpose(2, 1, 0, 3), isVector=True)
    spacing = np.linalg.norm(AFFINE[:3, :3], axis=0)
    flip = np.diag([-1, -1, 1])
    image.SetSpacing(spacing.tolist())
    image.SetDirection((flip @ AFFINE[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin((flip @ AFFINE[:3, 3]).tolist())
    return image


KINDS = {
    "nibabel": lambda: nib.Nifti1Image(np.moveaxis(VALUES, 0, -1), AFFINE),
    "SimpleITK": lambda: of_simpleitk(VALUES),
    "MetaTensor": lambda: MetaTensor(VALUES, affine=torch.from_numpy(AFFINE)),
}


@pytest.mark.parametrize("name", KINDS)
def test_the_affine_is_used_everywhere(name):
    thing = KINDS[name]()
    image = vx.ScalarImage(thing)
    assert np.allclose(image.affine, AFFINE, atol=1e-5)
    assert np.array_equal(image.data.numpy(), VALUES)
    made = vx.predict(torch.nn.Identity(), thing, 4)
    assert np.allclose(made.affine, AFFINE, atol=1e-5)
    assert np.allclose(made.data.numpy(), VALUES)
    subject = vx.Subject(t1=vx.ScalarImage(thing, affine=np.eye(4)))
    assert np.array_equal(subject.t1.affine, np.eye(4))
    assert np.allclose(
        vx.predict(torch.nn.Identity(), vx.ScalarImage(VALUES, affine=AFFINE), 4, like=thing).affine, AFFINE, atol=1e-5
    )


def test_files_of_nibabel_are_read_in_parts_and_scaled(tmp_path):
    stored = nib.Nifti1Image(np.arange(120, dtype=np.int16).reshape(4, 5, 6), AFFINE)
    stored.header.set_slope_inter(0.5, 3)
    nib.save(stored, tmp_path / "a.nii")
    image = vx.ScalarImage(nib.load(tmp_path / "a.nii"))
    assert not image.is_loaded
    assert (
        image[:, 1:3, 2, 3:5].data.flatten().tolist() == nib.load(tmp_path / "a.nii").get_fdata()[1:3, 2, 3:5].flatten().tolist()
    )
    assert torch.equal(image.data.float(), vx.ScalarImage(tmp_path / "a.nii").data.float())


@pytest.mark.parametrize("values", [VALUES, VALUES[0]])
def test_arrays_stay_lazy(values):
    array = Sliced(values)
    image = vx.ScalarImage(array, affine=AFFINE)
    assert array.reads == []
    assert np.array_equal(image.affine, AFFINE)
    assert image[:, 1:3, 1:3, 1:3].shape == (image.num_channels, 2, 2, 2)
    assert max(array.reads) <= 16
    assert torch.equal(image.data, torch.from_numpy(values.reshape(-1, 4, 5, 6)))


def test_flat_images_of_simpleitk():
    flat = SimpleITK.GetImageFromArray(np.arange(12, dtype=np.uint8).reshape(3, 4))
    flat.SetSpacing((0.5, 2))
    image = vx.ScalarImage(flat)
    assert (image.shape, image.spacing) == ((1, 4, 3, 1), (0.5, 2, 1))
    assert image.data[0, :, :, 0].T.flatten().tolist() == list(range(12))


@pytest.mark.parametrize("thing", [3, object(), {"a": 1}])
def test_what_is_no_image(thing):
    with pytest.raises(SubjectError, match="the path of an image"):
        vx.ScalarImage(thing)


def test_images_of_too_many_axes():
    with pytest.raises(ImageError, match="shape"):
        vx.ScalarImage(nib.Nifti1Image(np.zeros((2, 3, 4, 5, 6), dtype=np.float32), np.eye(4)))
    with pytest.raises(ImageError, match="shape"):
        vx.ScalarImage(Sliced(VALUES[0, 0]))


def test_times_of_simpleitk_are_channels():
    image = SimpleITK.GetImageFromArray(np.arange(6 * 5 * 4 * 3, dtype=np.int16).reshape(3, 4, 5, 6), isVector=False)
    image.SetSpacing((1, 2, 3, 10))
    made = vx.ScalarImage(image)
    assert (made.shape, made.spacing) == ((3, 6, 5, 4), (1, 2, 3))
    assert int(made.data[2, 1, 0, 0]) == 2 * 120 + 1


def test_units_of_nibabel_are_those_of_its_file(tmp_path):
    image = nib.Nifti1Image(VALUES[0], np.diag([25.0, 25, 50, 1]))
    image.header.set_xyzt_units("micron")
    nib.save(image, tmp_path / "x.nii")
    file, thing = vx.as_image(tmp_path / "x.nii"), vx.as_image(nib.load(tmp_path / "x.nii"))
    assert np.array_equal(file.affine, thing.affine)
    assert thing.spacing == pytest.approx((0.025, 0.025, 0.05))
    assert thing.codes == file.codes
    assert np.allclose(vx.as_image(file.as_nibabel()).affine, file.affine)


def test_images_of_others_in_a_dict_are_images():
    dict_of = {"t1": VALUES[:1], "t2": nib.Nifti1Image(VALUES[0], np.eye(4)), "seg": SimpleITK.GetImageFromArray(VALUES[0].T)}
    subject = vx.SubjectsDataset([dict_of])[0]
    assert list(subject.images) == ["t1", "t2", "seg"]
    assert [image.type for image in subject.images.values()] == ["intensity", "intensity", "label"]
    assert torch.equal(subject.seg.data, subject.t2.data)


def test_proxies_of_nibabel_have_the_type_of_their_values(tmp_path):
    image = nib.Nifti1Image((VALUES[0] * 100).astype("int16"), np.eye(4))
    image.header.set_slope_inter(0.5, 1)
    nib.save(image, tmp_path / "x.nii")
    proxy = nib.load(tmp_path / "x.nii").dataobj
    assert np.allclose(vx.ScalarImage(proxy, affine=np.eye(4)).data[0], np.asarray(proxy))


@pytest.mark.parametrize("kind", ["nibabel", "SimpleITK"])
def test_masks_may_be_of_others(kind):
    mask = np.zeros((12, 12, 12), "uint8")
    mask[:4, :4, :4] = 1
    thing = nib.Nifti1Image(mask, np.eye(4))
    if kind == "SimpleITK":
        thing = vx.LabelMap(mask[None]).as_sitk()
    plan = vx.plan(torch.nn.Identity(), torch.zeros(1, 12, 12, 12), 4, 0, mask=thing)
    assert plan.computed_patches == 1
