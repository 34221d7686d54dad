import copy
import pickle
import warnings

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.data import MetaTensor

import voxloom as vx
from voxloom.errors import ImageError, ImageNotFoundError, NoSuchKeyError, SizeError, SubjectError


@pytest.fixture
def image():
    affine = np.array([[0, -2.0, 0, 5], [1.5, 0, 0, -7], [0, 0, 3.0, 1], [0, 0, 0, 1]])
    return vx.ScalarImage(torch.arange(2 * 6 * 5 * 4).reshape(2, 6, 5, 4).float(), affine=affine, scan_id="abc")


def test_what_an_image_says_of_itself(image):
    assert image.shape == (2, 6, 5, 4)
    assert image.spatial_shape == (6, 5, 4)
    assert image.num_channels == 2
    assert image.spacing == (1.5, 2.0, 3.0)
    assert image.orientation == ("A", "L", "S")
    assert image.origin == (5.0, -7.0, 1.0)
    assert image.dtype == torch.float32
    assert image.memory == 2 * 6 * 5 * 4 * 4
    assert image.data is image.tensor
    assert image.is_loaded
    assert image.path is None
    assert image.stem == ""
    assert repr(image) == (
        "ScalarImage(shape: (2, 6, 5, 4); spacing: (1.50, 2.00, 3.00); orientation: ALS+; dtype: torch.float32;"
        " memory: 0.0 MiB; type: intensity)"
    )


def test_entries(image):
    assert image[vx.DATA] is image.data
    assert image[vx.AFFINE] is image.affine
    assert (image[vx.TYPE], image[vx.PATH], image[vx.STEM], image["scan_id"]) == ("intensity", "", "", "abc")
    assert list(image) == ["data", "affine", "type", "path", "stem", "scan_id"]
    assert "scan_id" in image
    image["more"] = 1
    assert image.metadata == {"scan_id": "abc", "more": 1}
    with pytest.raises(NoSuchKeyError, match="no entry 'missing', only 'data'"):
        image["missing"]
    with pytest.raises(SubjectError, match="'stem' is the name of an entry"):
        vx.ScalarImage(torch.zeros(1, 2, 2, 2), stem="x")


def test_types_of_images():
    data = torch.zeros(1, 2, 2, 2)
    assert vx.Image(data, type=vx.SAMPLING_MAP).type == "sampling_map"
    assert vx.Image(data, type=vx.LABEL).type == vx.LabelMap(data).type == "label"
    assert vx.Image(data).type == "intensity"
    with pytest.raises(ImageError, match="ScalarImage is 'intensity', not 'label'"):
        vx.ScalarImage(data, type=vx.LABEL)
    with pytest.raises(ImageError, match="type is 'x'"):
        vx.Image(data, type="x")


@given(st.data())
def test_slices_cut_what_numpy_cuts_and_keep_every_voxel_where_it_was(data):
    image = vx.ScalarImage(torch.arange(360.0).reshape(3, 6, 5, 4), affine=np.diag([1.5, 2, 3, 1]) + np.eye(4, k=3) * 4)
    key, expected = [], []
    for size in image.shape:
        start = data.draw(st.integers(-size, size - 1))
        stop = data.draw(st.integers(start % size + 1, size))
        part = data.draw(st.sampled_from([slice(None), slice(start, stop), slice(start, stop, 2), start]))
        key.append(part)
        expected.append(slice(part % size, part % size + 1) if isinstance(part, int) else part)
    cut = image[tuple(key)]
    assert torch.equal(cut.data, image.data[tuple(expected)])
    first = [part.indices(size)[0] for part, size in zip(expected[1:], image.spatial_shape, strict=True)]
    steps = [part.step or 1 for part in expected[1:]]
    for voxel in np.ndindex(cut.spatial_shape):
        there = [start + step * index for start, step, index in zip(first, steps, voxel, strict=True)]
        np.testing.assert_allclose(cut.affine @ [*voxel, 1], image.affine @ [*there, 1])


def test_slicing_in_short_and_with_an_ellipsis(image):
    assert image[0].shape == (1, 6, 5, 4)
    assert image[:, 1:3].shape == (2, 2, 5, 4)
    assert image[..., 1:3].shape == (2, 6, 5, 2)
    assert image[:, 1:3, ..., 0].shape == (2, 2, 5, 1)
    assert type(image[..., 0]) is vx.ScalarImage
    assert image[0]["scan_id"] == "abc"


NO_SLICES = [slice(3, 3), slice(5, 2), slice(None, None, -1), slice(0, 4, 0), slice(1.5, 3)]
NO_SLICES += [(0, 0, 0, 0, 0), (..., ...), "x", 1.5, (np.array([1, 2]), ...)]


@pytest.mark.parametrize("key", NO_SLICES)
def test_slices_that_cut_nothing_or_backwards_are_refused(image, key):
    with pytest.raises((SizeError, NoSuchKeyError)):
        image[:, key] if isinstance(key, slice) else image[key]
    with pytest.raises(IndexError, match="axis I of an image was sliced with 6"):
        image[:, 6]


def test_a_part_owns_its_memory_and_cannot_forget_it(image):
    part = image[:, 1:3]
    part.data.zero_()
    assert image.data[:, 1:3].all()
    with pytest.raises(ImageError, match="could not be read again"):
        part.unload()


def test_tensors_are_shared_and_types_without_arithmetic_widened():
    tensor = torch.zeros(1, 2, 2, 2)
    assert vx.ScalarImage(tensor).data.data_ptr() == tensor.data_ptr()
    array = np.zeros((1, 2, 2, 2), dtype=np.float32)
    vx.ScalarImage(array).data.fill_(3)
    assert (array == 3).all()
    for given_type, becomes in (("uint16", torch.int32), ("uint32", torch.int64), ("uint64", torch.int64), (">i2", torch.int16)):
        image = vx.ScalarImage(np.full((1, 2, 2, 2), 7, dtype=given_type))
        assert image.dtype == becomes
        assert (image.data + 1 == 8).all()
    assert vx.ScalarImage(torch.full((1, 2, 2, 2), 60000, dtype=torch.uint16)).data.max() == 60000
    with pytest.raises(ValueError, match="more than int64"):
        vx.ScalarImage(np.full((1, 2, 2, 2), 2**64 - 1, dtype=np.uint64))
    read_only = np.ones((1, 4, 2, 2))[:, ::-1]
    read_only.flags.writeable = False
    assert torch.equal(vx.ScalarImage(read_only).data, torch.ones(1, 4, 2, 2, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(2, 2), (2,), (1, 1, 2, 2, 2), (1, 0, 2, 2)])
def test_data_of_another_dimension_are_refused(shape, image):
    with pytest.raises(ImageError, match=r"4D|no voxels"):
        vx.ScalarImage(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"4D|no voxels"):
        image.set_data(torch.zeros(shape))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({}, "needs a path or a tensor"),
        ({"path": 5}, "path of an image is 5"),
        ({"path": b"scan.nii"}, "path of an image is b'scan.nii', of type bytes"),
        ({"source": None}, "needs a path or a tensor"),
        ({"path": []}, "empty list"),
        ({"path": ""}, "path of an image is empty"),
        ({"path": torch.zeros(1, 2, 2, 2), "tensor": torch.zeros(1, 2, 2, 2)}, "two tensors"),
    ],
)
def test_images_of_nothing_in_particular(arguments, error):
    with pytest.raises(SubjectError, match=error):
        vx.ScalarImage(**arguments)


@pytest.mark.parametrize("path", ["nowhere.nii", "~nobody-of-this-name/x.nii", ["nowhere.nii", "neither.nii"]])
def test_missing_files_are_an_error_at_once_unless_told_otherwise(path):
    with pytest.raises(ImageNotFoundError, match="there is no file"):
        vx.ScalarImage(path)
    with pytest.raises(FileNotFoundError):
        vx.ScalarImage(path)


def test_a_file_that_may_come_later(tmp_path):
    image = vx.ScalarImage(tmp_path / "later.nii", verify_path=False)
    assert "unreadable" in repr(image)
    with pytest.raises(ImageNotFoundError):
        _ = image.shape
    vx.ScalarImage(torch.ones(1, 2, 3, 4)).save(tmp_path / "later.nii")
    assert image.shape == (1, 2, 3, 4)


def nan_at(row, column):
    affine = np.eye(4)
    affine[row, column] = np.nan
    return affine


@pytest.mark.parametrize(
    ("affine", "rule"),
    [
        (np.eye(3), r"4 × 4"),
        (nan_at(0, 3), "NaN"),
        (np.diag([1, 1, np.inf, 1]), "infinity"),
        (np.diag([1, 0, 1, 1]), "flat"),
        (np.ones((4, 4)), "last row"),
        ("x", "4 × 4"),
    ],
)
def test_affines_that_place_nothing_are_refused(affine, rule, image):
    with pytest.raises(ImageError, match=rule):
        vx.ScalarImage(torch.zeros(1, 2, 2, 2), affine=affine)
    with pytest.raises(ImageError, match=rule):
        image.affine = affine


def test_an_affine_with_nan_in_a_file_is_refused_by_name_and_can_be_overridden(tmp_path):
    path = tmp_path / "nan.nii"
    nib.save(nib.Nifti1Image(np.ones((2, 2, 2), dtype=np.float32), np.eye(4)), path)
    content = bytearray(path.read_bytes())
    content[280:296] = np.full(4, np.nan, dtype="<f4").tobytes()  # where NIfTI-1 keeps the first row of the sform
    path.write_bytes(content)
    image = vx.ScalarImage(path)
    assert image.data.sum() == 8
    with pytest.raises(ImageError, match=r"nan\.nii holds NaN"):
        _ = image.affine
    with pytest.raises(ImageError, match=r"nan\.nii"):
        vx.GridSampler(vx.Subject(t1=image), 2)
    assert vx.ScalarImage(path, affine=np.eye(4)).spacing == (1.0, 1.0, 1.0)


def test_copies(image, tmp_path):
    shallow, deep = copy.copy(image), copy.deepcopy(image)
    assert shallow.data is image.data
    assert deep.data is not image.data
    deep.data.zero_()
    deep.metadata["scan_id"] = "other"
    assert image.data.any()
    assert image["scan_id"] == "abc"
    image.save(tmp_path / "x.nii")
    lazy = vx.ScalarImage(tmp_path / "x.nii")
    assert not copy.deepcopy(lazy).is_loaded
    again = pickle.loads(pickle.dumps(lazy))
    assert not again.is_loaded
    assert torch.equal(again.data, image.data)
    lazy.load()
    assert torch.equal(pickle.loads(pickle.dumps(lazy)).data, image.data)


def test_loading_and_unloading(tmp_path, image):
    image.save(tmp_path / "x.nii.gz")
    lazy = vx.ScalarImage(tmp_path / "x.nii.gz")
    assert not lazy.is_loaded
    assert lazy.shape == image.shape
    assert not lazy.is_loaded
    first = lazy.data
    assert lazy.is_loaded
    assert lazy.data is first
    lazy.unload()
    assert not lazy.is_loaded
    assert torch.equal(lazy.data, first)
    with pytest.raises(ImageError, match="made, set or cut in memory"):
        image.unload()


def test_new_like_keeps_class_metadata_and_affine(image):
    class Special(vx.ScalarImage):
        def __init__(self, number):
            super().__init__(torch.full((1, 2, 2, 2), float(number)))

    assert type(Special(3).new_like(torch.zeros(1, 1, 1, 1))) is Special
    new = image.new_like(torch.zeros(1, 2, 2, 2))
    assert new["scan_id"] == "abc"
    assert np.array_equal(new.affine, image.affine)


def test_files_of_one_shape_become_channels(tmp_path):
    for number in range(3):
        vx.ScalarImage(torch.full((1, 3, 4, 5), number, dtype=torch.int16)).save(tmp_path / f"{number}.nii")
    image = vx.ScalarImage([tmp_path / "0.nii", tmp_path / "1.nii", tmp_path / "2.nii"])
    assert image.shape == (3, 3, 4, 5)
    assert image.stem == ["0", "1", "2"]
    assert image[1:, :2].data.unique().tolist() == [1, 2]
    assert image.data[:, 0, 0, 0].tolist() == [0, 1, 2]
    vx.ScalarImage(torch.zeros(1, 3, 4, 6)).save(tmp_path / "other.nii")
    with pytest.raises(RuntimeError, match="files of one image must agree"):
        _ = vx.ScalarImage([tmp_path / "0.nii", tmp_path / "other.nii"]).shape


def test_a_file_may_be_named_as_in_torchio_2(tmp_path):
    vx.ScalarImage(torch.rand(1, 4, 5, 6)).save(tmp_path / "scan.nii")
    image = vx.ScalarImage(source=tmp_path / "scan.nii")
    assert (image.path, dict(image.metadata)) == (tmp_path / "scan.nii", {})


def test_a_reader_of_ones_own(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(60.0).reshape(1, 3, 4, 5))

    def read(path):
        return np.load(path), np.diag([2, 2, 2, 1])

    image = vx.ScalarImage(tmp_path / "x.npy", reader=read)
    assert image.shape == (1, 3, 4, 5)
    assert image.spacing == (2, 2, 2)
    assert torch.equal(image[:, 1:].data, torch.arange(60.0, dtype=torch.float64).reshape(1, 3, 4, 5)[:, 1:])


def test_nans_are_reported_when_asked_for():
    with pytest.warns(RuntimeWarning, match="holds NaN"):
        vx.ScalarImage(torch.full((1, 2, 2, 2), float("nan")), check_nans=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vx.ScalarImage(torch.full((1, 2, 2, 2), float("nan")))


def test_an_image_is_an_array_for_numpy(image):
    assert np.array_equal(np.asarray(image), image.data.numpy())
    assert np.asarray(image).base is not None


def test_an_image_that_was_loaded_within_inference_mode_can_be_trained_with(tmp_path):
    vx.ScalarImage(torch.rand(1, 4, 4, 4)).save(tmp_path / "x.nii.gz")
    image = vx.ScalarImage(tmp_path / "x.nii.gz")
    with torch.inference_mode():
        image.load()
    weight = torch.ones((), requires_grad=True)
    (image.data * weight).sum().backward()
    assert weight.grad > 0


def test_data_that_were_set_are_not_lost_to_unloading(tmp_path):
    vx.ScalarImage(torch.ones(1, 2, 2, 2)).save(tmp_path / "x.nii")
    image = vx.ScalarImage(tmp_path / "x.nii")
    image.set_data(image.data * 5)
    with pytest.raises(ImageError, match="made, set or cut in memory"):
        image.unload()
    vx.Subject(x=image).unload()
    assert image.data.max() == 5


def test_a_subclass_with_attributes_of_its_own_is_copied_whole():
    class Special(vx.ScalarImage):
        def __init__(self):
            super().__init__(torch.zeros(1, 2, 2, 2))
            self.extra = [1]

    image = Special()
    again = copy.deepcopy(image)
    again.extra.append(2)
    assert image.extra == [1]
    assert type(again) is Special


def test_a_reader_of_ones_own_is_called_once_and_stays_out_of_batches(tmp_path):
    calls = []

    def read(path):
        calls.append(path)
        return np.arange(8, dtype=np.uint16).reshape(1, 2, 2, 2), None

    (tmp_path / "x.own").write_text("")
    image = vx.ScalarImage(tmp_path / "x.own", reader=read)
    assert image.shape == (1, 2, 2, 2)
    assert image.data.dtype == torch.int32
    assert len(calls) == 1
    loader = vx.SubjectsLoader(vx.GridSampler(vx.Subject(x=image), 2), num_workers=1)
    assert next(iter(loader)).x.data.sum() == 28
    for bad in (lambda path: 3, lambda path: (np.zeros((0, 2, 2, 2)), None), lambda path: (np.zeros((1, 2, 2, 2)), np.eye(3))):
        with pytest.raises(vx.errors.VoxloomError):
            _ = vx.ScalarImage(tmp_path / "x.own", reader=bad).shape


def test_an_affine_that_is_given_overrides_those_of_several_files(tmp_path):
    for number in range(2):
        vx.ScalarImage(torch.zeros(1, 3, 3, 3), affine=np.diag([1 + number, 1, 1, 1])).save(tmp_path / f"{number}.nii")
    paths = [tmp_path / "0.nii", tmp_path / "1.nii"]
    with pytest.raises(vx.errors.SpaceError, match="lies up to"):
        _ = vx.ScalarImage(paths).shape
    assert vx.ScalarImage(paths, affine=np.eye(4)).shape == (2, 3, 3, 3)


def test_numpy_has_no_bfloat16():
    with pytest.raises(ImageError, match=r"image\.data\.float\(\)"):
        vx.ScalarImage(torch.zeros(1, 2, 2, 2, dtype=torch.bfloat16)).numpy()


def test_names_that_no_file_can_have():
    with pytest.raises(ImageNotFoundError):
        vx.ScalarImage("x" * 5000)


# Affines that arrays bring along


AFFINE = np.array([[-0.8, 0.1, 0, 12], [0.1, 0.9, 0.2, -30], [0, -0.2, 2.5, 7], [0, 0, 0, 1]])


class Placed(np.ndarray):
    affine = AFFINE


@pytest.mark.parametrize("space", ["RAS", "LPS"])
def test_the_affine_of_a_metatensor_is_used(space):
    affine = AFFINE if space == "RAS" else np.diag([-1, -1, 1, 1]) @ AFFINE
    tensor = MetaTensor(torch.rand(1, 8, 9, 10), affine=torch.as_tensor(affine), meta={"space": space})
    for image in (vx.ScalarImage(tensor), vx.ScalarImage(tensor=tensor), vx.predict(torch.nn.Identity(), tensor, 4)):
        np.testing.assert_allclose(image.affine, AFFINE, atol=1e-6)
        assert type(image.data) is torch.Tensor
    labels = vx.predict(torch.nn.Identity(), tensor[0], 4, reduce=0.5)
    np.testing.assert_allclose(labels.affine, AFFINE, atol=1e-6)
    np.testing.assert_array_equal(vx.ScalarImage(tensor, affine=np.eye(4)).affine, np.eye(4))


def test_the_affine_of_an_array_is_used():
    array = np.zeros((1, 8, 9, 10), np.float32).view(Placed)
    for image in (vx.ScalarImage(array), vx.ScalarImage(vx.ArraySource(array)), vx.predict(torch.nn.Identity(), array, 4)):
        np.testing.assert_array_equal(image.affine, AFFINE)


def test_an_affine_that_is_none_is_an_error():
    tensor = MetaTensor(torch.rand(1, 8, 9, 10), affine=torch.zeros(4, 4))
    with pytest.raises(ImageError, match="the affine of the MetaTensor"):
        vx.ScalarImage(tensor)
