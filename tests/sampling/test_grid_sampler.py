import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fresh
import voxloom as vx
from slow import slow
from voxloom.errors import ModeError, SizeError, SpaceError, SubjectError
from voxloom.sampling import padded

from strategies import examples, geometries


def subject_of(data, **more):
    return vx.Subject(t1=vx.ScalarImage(data), **more)


def test_locations_patches_and_affines(subject):
    sampler = vx.GridSampler(subject, (5, 20, 20), (2, 4, 6))
    assert sampler.locations.tolist() == [
        [0, 0, 0, 5, 20, 20],
        [0, 0, 10, 5, 20, 30],
        [3, 0, 0, 8, 20, 20],
        [3, 0, 10, 8, 20, 30],
        [5, 0, 0, 10, 20, 20],
        [5, 0, 10, 10, 20, 30],
    ]
    assert len(sampler) == 6
    patch = sampler[3]
    assert torch.equal(patch.t1.data, subject.t1.data[:, 3:8, :, 10:])
    assert torch.equal(patch.seg.data, subject.seg.data[:, 3:8, :, 10:])
    assert type(patch.seg) is vx.LabelMap
    assert patch.age == 45
    assert patch.t1.origin == (3, 0, 10)
    assert sampler[-1].patch_location == sampler.grid[5]
    assert repr(sampler) == "GridSampler(6 patches of (5, 20, 20), overlap (2, 4, 6))"


def test_a_sampler_can_be_called_iterated_and_indexed(subject):
    bound, unbound = vx.GridSampler(subject, (5, 20, 20)), vx.GridSampler((5, 20, 20))
    everything = [bound(), iter(bound), unbound(subject), (bound[number] for number in range(len(bound)))]
    listed = [[patch.patch_location for patch in patches] for patches in everything]
    assert listed == [list(bound.grid)] * 4
    assert vx.GridSampler(patch_size=(5, 20, 20), patch_overlap=2).patch_overlap == (2, 2, 2)
    with pytest.raises(IndexError):
        bound[len(bound)]
    with pytest.raises(ValueError, match="does not support limiting the number of patches"):
        bound(num_patches=1)


def test_an_unbound_sampler_says_what_it_lacks():
    sampler = vx.GridSampler(4, patch_overlap=2)
    for use in (len, iter, lambda s: s[0], lambda s: s.grid, lambda s: s()):
        with pytest.raises(SubjectError, match="no subject"):
            use(sampler)
    assert repr(sampler) == "GridSampler(patches of (4, 4, 4), overlap (2, 2, 2))"
    with pytest.raises(SubjectError, match=r"one argument too many.*GridSampler\(patch_size=...\)"):
        vx.GridSampler(4, 8)
    with pytest.raises(SizeError, match="patch size is missing"):
        vx.GridSampler()


MODES = ["edge", "reflect", "symmetric", "wrap", "linear_ramp", "constant", 3, -2.0]


@examples(150)
@given(
    geometries(largest=8, may_exceed=True),
    st.sampled_from(MODES),
    st.sampled_from([torch.float32, torch.float64, torch.int16, torch.int32]),
)
def test_virtual_padding_is_what_numpy_pads(geometry, mode, dtype):
    shape, patch, overlap = geometry
    data = (torch.rand(2, *shape) * 200 - 100).to(dtype)
    sampler = vx.GridSampler(subject_of(data), patch, overlap, mode)
    box = sampler.grid.box
    widths = [(0, 0), *((-a, b - size) for a, b, size in zip(box.start, box.stop, shape, strict=True))]
    arguments = {"mode": mode} if isinstance(mode, str) else {"constant_values": mode}
    padded = torch.from_numpy(np.pad(data.numpy(), widths, **arguments))
    for part in sampler:
        location = part.patch_location.box.relative_to(box.start)
        expected = padded[(slice(None), *location.slices)]
        if mode == "linear_ramp":
            # NumPy rounds down after a division that itself was rounded; ours is exact.
            tolerance = {"rtol": 1e-5, "atol": 1e-4} if dtype.is_floating_point else {"rtol": 0, "atol": 3}
            torch.testing.assert_close(part.t1.data, expected, **tolerance)
        else:
            assert torch.equal(part.t1.data, expected)


@given(
    geometries(largest=6),
    st.sampled_from(["minimum", "maximum", "mean", "median"]),
    st.sampled_from([torch.float32, torch.uint8]),
)
def test_statistics_are_of_the_whole_volume(geometry, mode, dtype):
    shape, _, _ = geometry
    data = (torch.rand(2, *shape) * 255).to(dtype)
    values = data.double().numpy()
    expected = {"minimum": np.min, "maximum": np.max, "mean": np.mean, "median": np.median}[mode](values)
    expected = expected if dtype.is_floating_point else round(expected)
    corner = vx.GridSampler(subject_of(data), 3, 2, mode)[0].t1.data[:, 0, 0, 0]
    torch.testing.assert_close(corner.double(), torch.full((2,), float(expected), dtype=torch.float64))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.int64, torch.int16, torch.uint8, torch.bool]
)
@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_the_median_is_exact_for_every_type(dtype, count):
    generator = torch.Generator().manual_seed(count)
    data = (torch.randn(1, count, 3, 5, generator=generator) * 100).to(dtype)
    corner = vx.GridSampler(subject_of(data), 3, 2, "median")[0].t1.data[0, 0, 0, 0]
    expected = np.median(data.double().numpy())
    assert corner.double() == (torch.tensor(expected).to(dtype).double() if dtype.is_floating_point else round(expected))


def test_an_image_that_cannot_hold_what_it_is_padded_with_is_named():
    subject = vx.Subject(ct=vx.ScalarImage(torch.zeros(1, 6, 6, 6)), seg=vx.LabelMap(torch.zeros(1, 6, 6, 6, dtype=torch.uint8)))
    for number in (-1000, 256, 0.5, float("nan"), float("inf")):
        with pytest.raises(ModeError, match=r"image 'seg' of type torch\.uint8 cannot be padded.*from 0 to 255"):
            vx.GridSampler(subject, 4, 2, number)
    assert vx.GridSampler(subject, 4, 0, -1000)[0].seg.data.max() == 0  # where nothing is padded nothing need be held
    half = vx.Subject(t1=vx.ScalarImage(torch.zeros(1, 6, 6, 6).half()))
    with pytest.raises(ModeError, match=r"torch\.float16 cannot be padded with 1e\+06"):
        vx.GridSampler(half, 4, 2, 1e6)
    large = vx.Subject(t1=vx.ScalarImage(torch.zeros(1, 6, 6, 6, dtype=torch.int64)))
    assert vx.GridSampler(large, 4, 2, 2**53 + 1)[0].t1.data[0, 0, 0, 0] == 2**53 + 1
    patch = vx.GridSampler(subject, 4, 2, "constant", fill=7)[0]
    assert (patch.ct.data[0, 0, 0, 0], patch.seg.data[0, 0, 0, 0]) == (7, 7)


def test_padding_makes_no_copy_of_the_volume():
    script = """
        import resource, torch, voxloom as vx
        subject = vx.Subject(t1=vx.ScalarImage(torch.zeros(1, 300, 300, 300)))  # 108 MB
        vx.GridSampler(subject, 16)[0]
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        sampler = vx.GridSampler(subject, 16, 8, "reflect")
        for number in (0, len(sampler) // 2, len(sampler) - 1):
            sampler[number]
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    grown = fresh.printed(script)
    assert int(grown) * 1024 < 20e6


@pytest.mark.parametrize("mode", ["minimum", "maximum", "mean", "median"])
def test_statistics_are_the_same_in_small_parts(mode, monkeypatch):
    data = torch.rand(2, 9, 8, 7)
    expected = vx.GridSampler(subject_of(data), 3, 2, mode)[0].t1.data[0, 0, 0, 0]
    monkeypatch.setattr(padded, "CHUNK_VALUES", 1)
    torch.testing.assert_close(vx.GridSampler(subject_of(data), 3, 2, mode)[0].t1.data[0, 0, 0, 0], expected)
    data[0, 8, 7, 6] = float("nan")
    assert vx.GridSampler(subject_of(data), 3, 2, mode)[0].t1.data[0, 0, 0, 0].isnan()


def test_a_subject_that_changes_under_the_sampler(subject):
    sampler = vx.GridSampler(subject, 4)
    subject["late"] = vx.ScalarImage(torch.zeros(1, 10, 20, 30))
    assert "late" not in sampler[0]
    subject.t1.set_data(torch.zeros(1, 6, 6, 6))
    with pytest.raises(SubjectError, match=r"'t1' has \(6, 6, 6\) voxels, but had \(10, 20, 30\)"):
        sampler[0]


def test_slices_give_sequences_of_patches(subject):
    sampler = vx.GridSampler(subject, 4)
    assert [patch.patch_location for patch in sampler[2:5]] == sampler.grid[2:5]


def test_slices_of_patches_know_where_they_are(subject):
    patch = vx.GridSampler(subject, 6)[5]
    first = patch.patch_location.index
    part = patch[1:3, ..., 2:]
    assert part.patch_location == vx.PatchLocation((first[0] + 1, first[1], first[2] + 2), (2, 6, 4))
    assert torch.equal(part.t1.data, subject.t1.data[(slice(None), *part.patch_location.to_slices())])
    assert "patch_location" not in patch[::2]


def test_metadata_of_the_same_name_do_not_hide_the_location(subject):
    subject["location"], subject["index_ini"] = "Paris", 7
    sampler = vx.GridSampler(subject, 5)
    assert sampler[1][vx.LOCATION].tolist() == sampler.grid[1].tolist()
    batch = next(iter(vx.SubjectsLoader(sampler, batch_size=2)))
    assert batch[vx.LOCATION].shape == (2, 6)
    assert batch.metadata["location"] == ["Paris", "Paris"]


def test_a_patch_owns_its_memory(subject):
    sampler = vx.GridSampler(subject, (10, 20, 30))
    before = subject.t1.data.clone()
    patch = sampler[0]
    assert patch.t1.data.untyped_storage().nbytes() == patch.t1.data.numel() * 4
    patch.t1.data.zero_()
    for batch in vx.SubjectsLoader(sampler):
        batch.t1.data.zero_()
    for item in sampler.__getitems__([0]):
        item.t1.data.zero_()
    assert torch.equal(subject.t1.data, before)


def test_the_subject_is_left_as_it_was(subject):
    entries = dict(subject)
    list(vx.GridSampler(subject, 8, 4, "mean"))
    assert dict(subject) == entries


def test_a_batch_is_cut_as_patches_are(subject):
    sampler = vx.GridSampler(subject, 8, 2, "symmetric")
    sequence = sampler.__getitems__([5, 2, 7])
    batch = sequence.to_batch()
    for row, patch in zip(batch.unbatch(), sequence, strict=True):
        assert torch.equal(row.t1.data, patch.t1.data)
        assert np.array_equal(row.t1.affine, patch.t1.affine)
        assert row.patch_location == patch.patch_location
        assert row.age == patch.age
    assert [patch.patch_location for patch in sequence[1:]] == [sampler.grid[2], sampler.grid[7]]


@pytest.mark.parametrize("start", ["fork", slow("spawn")])
@pytest.mark.parametrize("loader", [vx.SubjectsLoader, torch.utils.data.DataLoader])
def test_workers_give_the_same_batches(subject, loader, start):
    sampler = vx.GridSampler(subject, 8, 2, "reflect")
    alone = [batch.t1.data for batch in loader(sampler, batch_size=5)]
    workers = loader(sampler, batch_size=5, num_workers=2, multiprocessing_context=start)
    for expected, batch in zip(alone, workers, strict=True):
        assert torch.equal(batch.t1.data, expected)
        assert batch.seg.data.is_shared()


def test_images_that_do_not_fit_together_are_refused():
    with pytest.raises(SpaceError, match="Inconsistent"):
        vx.GridSampler(vx.Subject(a=vx.ScalarImage(torch.zeros(1, 4, 4, 4)), b=vx.ScalarImage(torch.zeros(1, 4, 4, 5))), 2)
    with pytest.raises(SpaceError, match="Inconsistent"):
        vx.GridSampler(
            vx.Subject(a=vx.ScalarImage(torch.zeros(1, 4, 4, 4)), b=vx.ScalarImage(torch.zeros(1, 4, 4, 5))), 2, check_space=False
        )


@pytest.mark.parametrize("size", [(5, 21, 5), 11])
def test_a_patch_larger_than_the_volume_needs_padding(subject, size):
    with pytest.raises(
        SizeError, match=r"patch size is \d+ on axis [IJ], but the volume has only \d+ voxels there.*padding_mode"
    ):
        vx.GridSampler(subject, size)
    sampler = vx.GridSampler(subject, size, 0, "constant", fill=9) if size == 11 else None
    if sampler:
        assert sampler.grid.box.start == (0, 0, 0)
        assert sampler.grid.box.stop == (11, 20, 30)
