import copy
import pickle

import numpy as np
import pytest
import torch

import voxloom as vx
from voxloom.errors import NoSuchKeyError, SpaceError, SubjectError


def image(*shape, affine=None):
    return vx.ScalarImage(torch.rand(1, *(shape or (4, 5, 6))), affine=affine)


def test_entries_are_items_and_attributes(subject):
    assert repr(subject) == "Subject(Keys: ('t1', 'seg', 'age'); images: 2)"
    assert subject.t1 is subject["t1"]
    assert subject.age == subject["age"] == 45
    assert list(subject.images) == ["t1", "seg"]
    assert subject.metadata == {"age": 45}
    assert subject.spatial_shape == (10, 20, 30)
    assert subject.shape == (1, 10, 20, 30)
    assert subject.spacing == (1, 1, 1)
    assert [type(item) for item in subject.get_images()] == [vx.ScalarImage]
    assert list(subject.get_images_dict(intensity_only=False)) == ["t1", "seg"]
    assert subject.get_first_image() is subject.t1


def test_entries_can_be_set_as_attributes_too(subject):
    subject.t2 = image(10, 20, 30)
    assert list(subject.images) == ["t1", "seg", "t2"]
    del subject.t2
    assert "t2" not in subject
    subject.add_image(image(10, 20, 30), "t3")
    subject.remove_image("t3")
    with pytest.raises(AttributeError, match="'shape' is an attribute that every subject has"):
        subject.shape = 3
    with pytest.raises(SubjectError, match="not an image"):
        subject.add_image(3, "x")


def test_a_missing_entry_is_named_together_with_those_there_are(subject):
    with pytest.raises(NoSuchKeyError, match="no entry 't2', only 't1', 'seg', 'age'"):
        subject["t2"]
    with pytest.raises(AttributeError, match="no entry 't2'"):
        _ = subject.t2
    with pytest.raises(NoSuchKeyError, match="no image 'age', only 't1', 'seg'"):
        subject.get_image("age")
    with pytest.raises(AttributeError):
        del subject.t2
    assert subject.get("t2") is None


@pytest.mark.parametrize("arguments", [(), ({},), ({"age": 3},), ([],), ({}, {})])
def test_a_subject_needs_an_image(arguments):
    with pytest.raises(SubjectError):
        vx.Subject(*arguments)
    with pytest.raises(ValueError, match=r"at least one|one dict"):
        vx.Subject(*arguments)
    with pytest.raises(TypeError):
        vx.Subject(*arguments)


def test_images_of_another_shape_are_named():
    subject = vx.Subject(a=image(4, 5, 6), b=image(4, 5, 7))
    for what in ("spatial_shape", "shape"):
        with pytest.raises(SpaceError, match=r"Inconsistent .*'a': .*4, 5, 6\), 'b': .*4, 5, 7"):
            getattr(subject, what)
    with pytest.raises(RuntimeError, match="Inconsistent"):
        subject.check_space()
    with pytest.raises(SpaceError, match="Inconsistent spacings"):
        _ = vx.Subject(a=image(), b=image(affine=np.diag([2, 1, 1, 1]))).spacing


@pytest.mark.parametrize(("shift", "allowed"), [(0.0999, True), (0.1001, False)])
def test_a_displaced_corner_is_named_with_its_distance(shift, allowed):
    affine = np.eye(4)
    affine[1, 3] = shift
    subject = vx.Subject(a=image(), b=image(), c=image(affine=affine))
    if allowed:
        subject.check_space()
        return
    with pytest.raises(SpaceError, match="'a' and 'c' do not lie on one another: a corner is displaced by 0.1001 mm, and 0.1 mm"):
        vx.GridSampler(subject, 2)
    with pytest.raises(SpaceError):
        subject.check_space()
    assert len(vx.GridSampler(subject, 2, check_space=False)) == 2 * 3 * 3
    subject.check_space(tolerance=0.2)


def test_a_rotation_shows_at_the_far_corner():
    angle = 1e-3
    affine = np.eye(4)
    affine[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    vx.Subject(a=image(10, 10, 10), b=image(10, 10, 10, affine=affine)).check_space()
    with pytest.raises(SpaceError, match="displaced by 0.28"):
        vx.Subject(a=image(200, 200, 2), b=image(200, 200, 2, affine=affine)).check_space()


def test_slices_cut_all_images(subject):
    part = subject[2:4, ..., 5]
    assert part.shape == (1, 2, 20, 1)
    assert part.age == 45
    assert torch.equal(part.seg.data, subject.seg.data[:, 2:4, :, 5:6])


def test_copies(subject):
    shallow, deep = copy.copy(subject), copy.deepcopy(subject)
    assert shallow.t1 is subject.t1
    assert type(deep) is vx.Subject
    deep.t1.data.zero_()
    assert subject.t1.data.any()
    again = pickle.loads(pickle.dumps(subject))
    assert torch.equal(again.t1.data, subject.t1.data)
    assert again.age == 45


def test_a_subclass_of_ones_own_has_its_name_in_the_repr():
    class Colin27(vx.Subject):
        pass

    assert repr(Colin27(t1=image(), head=image(), brain=image())) == "Colin27(Keys: ('t1', 'head', 'brain'); images: 3)"


def test_loading_and_unloading(tmp_path):
    image().save(tmp_path / "a.nii")
    subject = vx.Subject(a=vx.ScalarImage(tmp_path / "a.nii"), b=image())
    subject.load()
    assert subject.a.is_loaded
    subject.unload()
    assert not subject.a.is_loaded
    assert subject.b.is_loaded


def test_a_patch_has_its_location_under_all_names(subject):
    patch = vx.GridSampler(subject, (5, 20, 20), (2, 4, 6))[3]
    assert patch.patch_location == patch["patch_location"] == vx.PatchLocation((3, 0, 10), (5, 20, 20))
    assert patch[vx.LOCATION].tolist() == [3, 0, 10, 8, 20, 30]
    assert patch[vx.LOCATION].dtype == torch.int64
    assert patch["index_ini"].tolist() == [3, 0, 10]
    assert patch.location.tolist() == patch.patch_location.tolist()
    with pytest.raises(NoSuchKeyError):
        subject[vx.LOCATION]
