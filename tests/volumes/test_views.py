"""Images that are turned and resampled when they are read."""

import pickle

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates, zoom

import voxloom as vx
from voxloom.core.boxes import Box
from voxloom.core.geometry.affines import scaled
from voxloom.errors import ImageError, ModeError, SizeError, SpaceError, SubjectError
from voxloom.io.protocols import Space, loading_bytes
from voxloom.testing import check_source
from voxloom.volumes.views import cubic
from voxloom.volumes.views.spatial import ResampledSource

OBLIQUE = np.array([[0.9, -0.3, 0, 5], [0.28, 1.1, 0.1, -7], [0, 0.1, -2.5, 30], [0, 0, 0, 1]])


def image_of(shape=(2, 12, 10, 8), affine=OBLIQUE, **options):
    return vx.ScalarImage(torch.randn(shape, generator=torch.Generator().manual_seed(4)), affine=affine, **options)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SRA", "ILP", "PSR"])
def test_turning_is_what_nibabel_does(codes):
    image = image_of()
    turned = image.reoriented(codes)
    ours = nib.Nifti1Image(np.moveaxis(image.data.numpy(), 0, -1), image.affine)
    turn = nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(codes))
    expected = ours.as_reoriented(turn)
    assert turned.orientation == tuple(codes)
    assert np.allclose(turned.affine, expected.affine)
    assert np.array_equal(turned.data.numpy(), np.moveaxis(expected.get_fdata(dtype=np.float32), -1, 0))
    check_source(turned, turned.data, turned.affine)
    assert torch.equal(turned.reoriented("".join(image.orientation)).data, image.data)


@pytest.mark.parametrize("wrong", ["RAR", "RA", "XYZ", "RASL", 3, None, ""])
def test_orientations_that_are_none(wrong):
    with pytest.raises(ModeError, match="the orientation is"):
        image_of().reoriented(wrong)


@pytest.mark.parametrize("order", [0, 1, 3])
def test_views_are_sources(order):
    image = image_of().resampled((1.3, 0.7, 2), order=order)
    check_source(image, image.data, image.affine)
    again = pickle.loads(pickle.dumps(image_of().resampled((1.3, 0.7, 2), order=order)))
    assert torch.equal(again.data, image.data)


@pytest.mark.parametrize(
    ("size", "new", "expected"), [(10, 2, 5), (11, 2, 6), (10, 0.4, 25), (3, 6, 1), (1, 1.9, 1), (10, None, 10)]
)
def test_the_rule_of_spacing(size, new, expected):
    image = image_of((1, size, 4, 4), np.diag([1, 2, 3, 1])).resampled((new, None, None))
    assert image.shape == (1, expected, 4, 4)
    assert image.spacing == (new or 1, 2, 3)
    corner = image.affine @ [-0.5, -0.5, -0.5, 1]
    assert np.allclose(corner, np.diag([1, 2, 3, 1]) @ [-0.5, -0.5, -0.5, 1])


@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize(("size", "new"), [(1, 2.1), (1, 9), (3, 7), (2, 5)])
def test_what_is_thinner_than_half_a_voxel_is_one_in_its_middle(size, new, order):
    data = torch.arange(1.0, size + 1).view(1, size, 1, 1).expand(1, size, 4, 4)
    image = vx.ScalarImage(data, affine=np.diag([1, 2, 3, 1])).resampled((new, None, None), order=order)
    assert (image.shape, image.spacing) == ((1, 1, 4, 4), (new, 2, 3))
    assert image.affine[0, 3] == (size - 1) / 2
    middle = (size + 1) / 2 if order else size // 2 + 1
    assert torch.allclose(image.data.float(), torch.full((1, 1, 4, 4), float(middle)))


@pytest.mark.parametrize("order", [0, 1, 3])
def test_resampling_is_what_scipy_does(order):
    image = image_of((1, 12, 10, 9), np.diag([1, 2, 3, 1]))
    made = image.resampled((2, 1, 2), order=order)
    assert made.spatial_shape == (6, 20, 14)
    # SciPy stretches a grid to the whole of the volume, which 14 voxels of 2 mm do not quite fill.
    filling = image.resampled(like=((6, 20, 14), scaled(image.affine, (0.5, 2, 14 / 9))), order=order)
    expected = zoom(image.data[0].numpy(), (0.5, 2, 14 / 9), order=order, mode="nearest", grid_mode=True)
    if order == 0:
        assert set(filling.data.flatten().tolist()) <= set(image.data.flatten().tolist())
    else:
        assert np.allclose(filling.data[0].numpy(), expected, atol=3e-6)


def test_cubic_resampling_against_simpleitk():
    image = image_of((1, 16, 15, 14), np.diag([1, 1.2, 1.4, 1]))
    made = image.resampled(0.7, order=3)
    source = SimpleITK.GetImageFromArray(image.data[0].numpy().T)
    source.SetSpacing(image.spacing)
    source.SetOrigin(image.affine[:3, 3].tolist())
    found = SimpleITK.Resample(
        source, made.spatial_shape, SimpleITK.Transform(), SimpleITK.sitkBSpline, made.affine[:3, 3].tolist(), made.spacing
    )
    inner = (slice(8, -8),) * 3  # borders go on differently
    assert np.allclose(made.data[0].numpy()[inner], SimpleITK.GetArrayFromImage(found).T[inner], atol=5e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int16])
@pytest.mark.parametrize("spatial_shape", [(12, 10, 8), (9, 11, 1)])
def test_cubic_resampling_at_an_angle(spatial_shape, dtype):
    values = (torch.randn(2, *spatial_shape, generator=torch.Generator().manual_seed(0)) * 100).to(dtype)
    image = vx.ScalarImage(values, affine=np.diag([1, 1.2, 2.5, 1]))
    grid = ((14, 16, 12), OBLIQUE @ np.diag([0.8, 0.7, -0.5, 1]) - np.outer([7, -8, 30 - spatial_shape[2], 0], [0, 0, 0, 1]))
    made = image.resampled(like=grid, order=3, fill=-7)
    assert made.data.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    places = np.einsum("xy,yijk->xijk", np.linalg.inv(image.affine) @ grid[1], [*np.indices(grid[0]), np.ones(grid[0])])[:3]
    is_inside = np.ones(grid[0], dtype=bool)
    for place, length in zip(places, spatial_shape, strict=True):
        is_inside &= (place > -0.5) & (place < length - 0.5)
    assert 20 < is_inside.sum() < 0.9 * is_inside.size
    for found, channel in zip(made.data.numpy(), values.double().numpy(), strict=True):
        expected = map_coordinates(np.pad(channel, 12, mode="edge"), places + 12, order=3, mode="mirror")
        assert np.allclose(found[is_inside], expected[is_inside], atol=1e-8 if dtype == torch.float64 else 1e-4)
        assert (found[~is_inside] == -7).all()
    check_source(made, made.data, made.affine)


def test_cubic_resampling_at_hardly_an_angle_is_that_along_the_axes():
    image = image_of((1, 12, 10, 9), np.eye(4))
    turn = np.eye(4)
    turn[0, 1] = 1e-3
    along, at_angle = (
        image.resampled(like=((14, 12, 20), affine @ np.diag([0.8, 0.9, 0.4, 1])), order=3) for affine in (np.eye(4), turn)
    )
    assert not torch.equal(at_angle.data, along.data)
    assert torch.allclose(at_angle.data, along.data, atol=0.05)


@pytest.mark.parametrize("orders", [(3, 3, 3), (0, 3, 3), (3, 1, 3), (0, 0, 3), (3, 3, 0)])
@pytest.mark.parametrize("is_clipped", [False, True])
def test_cubic_resampling_in_slabs_is_that_of_the_whole(orders, is_clipped, monkeypatch):
    values = torch.randn(2, 24, 21, 18, generator=torch.Generator().manual_seed(4))
    boxes = []

    class Counted(vx.ArraySource):
        def read(self, box):
            boxes.append(box)
            return super().read(box)

    grid = Space((15, 40, 12), np.array([[0, 0, 1.5, 0.2], [-0.6, 0, 0, 20], [0, 0.5, 0, -1], [0, 0, 0, 1]]))
    made = []
    for voxels in (2**22, 1000):
        monkeypatch.setattr(cubic, "SLAB_VOXELS", voxels)
        source = ResampledSource(Counted(values.numpy(), affine=np.eye(4)), grid, orders, fill=-5, is_clipped=is_clipped)
        made.append(source.read(Box.of_shape(grid.shape)))
        assert loading_bytes(source) > 0
        assert sum(box.numel for box in boxes) == values[0].numel()  # each voxel once
        boxes.clear()
    whole, in_slabs = made
    assert torch.allclose(whole, in_slabs, atol=1e-5)
    assert torch.equal(whole == -5, in_slabs == -5)
    assert (whole == -5).any()
    if is_clipped and 0 not in orders:
        assert whole.max() <= values.max()


class Counted(vx.ArraySource):
    """An array in chunks that counts what is read."""

    def __init__(self, values, chunks):
        super().__init__(values, affine=np.eye(4))
        self._given, self.boxes = chunks, []

    @property
    def chunks(self):
        return self._given

    def read(self, box):
        self.boxes.append(box)
        return super().read(box)


@pytest.mark.parametrize(("depth", "most"), [(20, 1), (10, 4)])
def test_slices_that_are_read_one_by_one_are_read_once_or_a_few_times(monkeypatch, depth, most):
    monkeypatch.setattr(cubic, "SLAB_VOXELS", 1000)
    source = Counted(np.random.default_rng(0).random((1, 24, 21, 40), dtype=np.float32), (24, 21, 1))
    grid = Space((20, 19, depth), np.diag([1.2, 1.1, 40 / depth, 1]))
    ResampledSource(source, grid, 3).read(Box.of_shape(grid.shape))
    for plane in range(40):
        assert 1 <= sum(box.start[2] <= plane < box.stop[2] for box in source.boxes) <= most


@pytest.mark.parametrize("shape", [(20, 19, 21), (31, 17, 12), (12, 40, 9)])
def test_the_bits_of_a_resampled_scan_do_not_depend_on_its_chunks(monkeypatch, shape):
    monkeypatch.setattr(cubic, "SLAB_VOXELS", 3000)
    values = np.random.default_rng(0).random((2, 24, 21, 40), dtype=np.float32)
    grid = Space(shape, np.diag([24 / shape[0], 21 / shape[1], 40 / shape[2], 1]))
    expected = ResampledSource(vx.ScalarImage(torch.from_numpy(values)), grid, 3).read(Box.of_shape(shape))
    for chunks in ((24, 21, 1), (1, 21, 40), (7, 5, 6), (24, 21, 40), (24, 1, 40), (24, 9, 40)):
        source = Counted(values, chunks)
        assert torch.equal(ResampledSource(source, grid, 3).read(Box.of_shape(shape)), expected)
        if chunks == (7, 5, 6):
            assert sum(box.numel for box in source.boxes) == 24 * 21 * 40


def test_each_plane_is_clipped_by_itself_where_several_axes_are_not_interpolated():
    values = torch.randn(1, 9, 8, 16, generator=torch.Generator().manual_seed(4))
    values[0, :, 1::2] *= 10
    grid = Space((4, 4, 31), np.diag([2, 2, 0.5, 1]))
    made = ResampledSource(vx.ScalarImage(values), grid, (0, 0, 3), None, True).read(Box.of_shape(grid.shape))
    rows = values[:, 0:8:2, 0:8:2]
    assert torch.equal(made[..., ::2], rows)  # on the voxels
    least, most = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
    assert ((made >= least) & (made <= most)).all()
    assert ((made == least).sum(-1) > 1).any()  # some is clipped


@given(st.tuples(*[st.floats(0.3, 3)] * 3), st.sampled_from(["RAS", "LSP", "SAL"]))
def test_a_label_map_comes_back_within_half_a_voxel(spacing, codes):
    labels = torch.zeros(1, 14, 12, 10, dtype=torch.uint8)
    labels[0, 4:10, 3:9, 2:8] = 3
    image = vx.LabelMap(labels, affine=np.diag([1.5, 2, 2.5, 1]))
    turned = image.reoriented(codes)
    fine = turned.resampled([min(own / 2, each) for own, each in zip(turned.spacing, spacing, strict=True)])
    assert fine.dtype == torch.uint8
    back = fine.resampled(like=image)
    changed = (back.data != labels)[0]
    border = torch.nn.functional.max_pool3d(labels.float(), 3, 1, 1) != -torch.nn.functional.max_pool3d(-labels.float(), 3, 1, 1)
    assert not bool((changed & ~border[0]).any())


def test_patches_read_no_more_than_they_need(tmp_path):
    image = image_of((1, 60, 60, 60), np.eye(4))
    image.save(tmp_path / "a.nii")
    reads = []

    class Watched(vx.ArraySource):
        def read(self, box):
            reads.append(box.numel)
            return super().read(box)

    watched = vx.ScalarImage(Watched(image.data.numpy(), affine=np.eye(4))).reoriented("SPL").resampled(1.5)
    patch = watched[:, 10:18, 10:18, 10:18]
    assert max(reads) <= 14**3
    whole = image.reoriented("SPL").resampled(1.5)
    assert torch.equal(patch.data, whole.data[:, 10:18, 10:18, 10:18])
    lazy = vx.ScalarImage(tmp_path / "a.nii").reoriented("SPL").resampled(1.5)
    assert torch.equal(lazy.data, whole.data)
    assert lazy.paths == (tmp_path / "a.nii",)


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd"])
def test_what_can_only_be_read_whole_is_read_once(tmp_path, ending):
    image = image_of((1, 20, 22, 24), np.eye(4))
    image.save(tmp_path / f"a{ending}")
    base = vx.ScalarImage(tmp_path / f"a{ending}")
    view = base.reoriented("LPS").resampled(2)
    expected = image.reoriented("LPS").resampled(2)
    sampler = vx.GridSampler(vx.Subject(t1=view), 5)
    assert base.is_loaded
    assert not view.is_loaded
    aggregator = vx.GridAggregator(sampler)
    for patch in sampler:
        aggregator.add_batch(
            patch.t1.data[None], patch.patch_location[None] if False else torch.tensor([patch["location"].tolist()])
        )
    assert torch.equal(aggregator.get_output_tensor(), expected.data)


@pytest.mark.slow
def test_predictions_of_views(tmp_path):
    image = image_of((1, 40, 36, 30), np.diag([-1.5, -1.5, 3, 1]))
    image.save(tmp_path / "a.nii.gz")
    expected = vx.predict(torch.nn.Identity(), image.reoriented("RAS").resampled(2), 16, like=image, dtype=torch.float32)
    for limit in (None, "34MiB"):
        scan = vx.ScalarImage(tmp_path / "a.nii.gz")
        made = vx.predict(torch.nn.Identity(), scan.reoriented("RAS").resampled(2), 16, like=scan, memory_limit=limit)
        assert torch.equal(made.data, expected.data)
        assert made.spatial_shape == (40, 36, 30)
    inner = (slice(None), slice(4, -4), slice(4, -4), slice(4, -4))
    smooth = torch.nn.functional.avg_pool3d(image.data, 5, 1, 2)
    again = vx.predict(torch.nn.Identity(), image.new_like(smooth).reoriented("RAS").resampled(0.75), 16, like=image)
    assert float((again.data - smooth)[inner].abs().max()) < 0.25 * float(smooth.abs().max())


def test_samplers_and_the_queue_take_views():
    subject = vx.Subject(
        t1=image_of((1, 30, 30, 30), np.eye(4)).resampled(1.5), seg=vx.LabelMap(torch.ones(1, 30, 30, 30)).resampled(1.5)
    )
    patch = next(iter(vx.Queue(vx.SubjectsDataset([subject] * 2), 8, 4, vx.UniformSampler(8))))
    whole = image_of((1, 30, 30, 30), np.eye(4)).resampled(1.5).data
    assert torch.equal(patch.t1.data, whole[(slice(None), *patch.patch_location.box.slices)])


def test_metadata_and_class_are_kept():
    labels = vx.LabelMap(torch.ones(1, 4, 4, 4), name="heart").resampled(2).reoriented("LAS")
    assert (type(labels), labels["name"], labels.dtype) == (vx.LabelMap, "heart", torch.float32)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({}, SizeError, "either a spacing"),
        ({"spacing": 1, "like": ((3, 3, 3), np.eye(4))}, SizeError, "either a spacing"),
        ({"spacing": 0}, SizeError, "positive"),
        ({"spacing": (1, 2)}, SizeError, "three"),
        ({"spacing": "fine"}, SizeError, "positive"),
        ({"spacing": float("nan")}, SizeError, "positive"),
        ({"spacing": 1, "order": 2}, ModeError, "order is 2"),
        ({"spacing": 1, "order": True}, ModeError, "order is True"),
        ({"like": ((20, 20, 40), np.eye(4)), "order": (3, 0, 3)}, ModeError, r"order is \(3, 0, 3\).*one order for all"),
        ({"like": ((9, 9, 9), np.eye(4) + np.eye(4, k=3) * 1000)}, SpaceError, "lies beside"),
        ({"like": 3}, SubjectError, "like is of type int"),
    ],
)
def test_wrong_arguments(options, error, text):
    with pytest.raises(error, match=text):
        image_of().resampled(**options)


def test_a_fill_must_fit():
    with pytest.raises(ImageError, match="fill is -5"):
        vx.LabelMap(torch.ones(1, 4, 4, 4, dtype=torch.uint8)).resampled(2, fill=-5)
    made = image_of((1, 4, 4, 4), np.eye(4)).resampled(like=((6, 4, 4), np.eye(4)), fill=-9)
    assert bool((made.data[:, 4:] == -9).all())
