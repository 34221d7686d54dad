"""What cannot be aggregated is refused with a reason, and nothing is lost."""

import warnings

import numpy as np
import pytest
import torch

import voxloom as vx
from voxloom.errors import IncompleteError, LocationError, ModeError, NoSuchKeyError, OutputError, SizeError, SubjectError


@pytest.fixture
def sampler():
    return vx.GridSampler(vx.Subject(t1=vx.ScalarImage(torch.rand(1, 8, 8, 8))), 4)


@pytest.fixture
def aggregator(sampler):
    return vx.GridAggregator(sampler, "average")


def batch_of(sampler, count=2, channels=1):
    return torch.rand(count, channels, 4, 4, 4), [sampler.grid[number] for number in range(count)]


@pytest.mark.parametrize("count", [1, 3])
def test_more_or_fewer_locations_than_patches(aggregator, sampler, count):
    output, _ = batch_of(sampler, 2)
    with pytest.raises(LocationError, match=f"the output has 2 patches, but there are {count} locations"):
        aggregator.add_batch(output, [sampler.grid[number] for number in range(count)])


@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 4, 1), (4, 4, 5), (8, 8, 8), (2, 2, 2)])
@pytest.mark.parametrize("mode", ["crop", "average"])
def test_a_spatial_shape_that_does_not_match_is_never_broadcast(sampler, shape, mode):
    for aggregator in (vx.GridAggregator(sampler, mode), vx.PatchAggregator((8, 8, 8), mode)):
        with pytest.raises(OutputError, match="the output has spatial shape .* but the patch .* has"):
            aggregator.add_batch(torch.rand(2, 1, *shape), batch_of(sampler)[1])
        with pytest.raises(IncompleteError, match="no patch"):
            aggregator.get_output()


def test_wrong_numbers_of_dimensions(aggregator, sampler):
    locations = batch_of(sampler)[1]
    with pytest.raises(OutputError, match=r"must have 5 dimensions, \(B, C, I, J, K\)"):
        aggregator.add_batch(torch.rand(2, 4, 4, 4), locations)
    with pytest.raises(OutputError, match="of type list: it must be a tensor"):
        aggregator.add_batch({"a": [1, 2]}, locations)
    with pytest.raises(OutputError, match="dict of outputs is empty"):
        aggregator.add_batch({}, locations)
    with pytest.raises(LocationError, match=r"shape \(2, 3\): it must be \(B, 6\)"):
        aggregator.add_batch(torch.rand(2, 1, 4, 4, 4), torch.zeros(2, 3))
    with pytest.raises(LocationError, match="single PatchLocation"):
        aggregator.add_batch(torch.rand(1, 1, 4, 4, 4), locations[0])
    with pytest.raises(LocationError, match="2 axes, but the volume has 3"):
        aggregator.add_batch(torch.rand(1, 1, 4, 4, 4), [vx.PatchLocation((0, 0), (4, 4))])


def test_channels_and_types_that_change_between_batches(aggregator, sampler):
    aggregator.add_batch(*batch_of(sampler))
    with pytest.raises(OutputError, match="3 channels, but earlier batches had 1"):
        aggregator.add_batch(*batch_of(sampler, channels=3))
    with pytest.raises(OutputError, match=r"torch.float16, but earlier batches were torch.float32"):
        aggregator.add_batch(batch_of(sampler)[0].half(), batch_of(sampler)[1])
    with pytest.raises(OutputError, match="real and imaginary"):
        vx.GridAggregator(sampler).add_batch(torch.zeros(1, 1, 4, 4, 4, dtype=torch.complex64), [sampler.grid[0]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("mode", ["crop", "hann", "average"])
def test_nan_is_an_error_that_names_the_patch_and_nothing_of_its_batch_is_added(dtype, mode):
    data = torch.rand(1, 8, 8, 8).to(dtype)
    sampler = vx.GridSampler(vx.Subject(t1=vx.ScalarImage(data)), 6, 4)
    aggregator = vx.GridAggregator(sampler, mode)
    (batch,) = vx.SubjectsLoader(sampler, batch_size=8)
    good = {"seg": batch.t1.data, "emb": batch.t1.data}
    bad = {"seg": batch.t1.data, "emb": batch.t1.data.clone()}
    bad["emb"][7, 0, 5, 5, 5] = float("nan")
    with pytest.raises(OutputError, match=r"the output 'emb' for the patch \(2, 2, 2\) to \(8, 8, 8\) holds 1 NaN of 216"):
        aggregator.add_batch(bad, batch)
    with pytest.raises(IncompleteError, match="no patch"):
        aggregator.get_output("seg")
    aggregator.add_batch(good, batch)
    fresh = vx.GridAggregator(sampler, mode)
    fresh.add_batch(good, batch)
    for key in good:
        torch.testing.assert_close(aggregator.get_output(key).to(dtype), data)
        assert torch.equal(aggregator.get_output(key), fresh.get_output(key))  # a patch added twice would show in the last bits


def test_a_batch_that_is_refused_leaves_nothing_behind():
    data = torch.rand(1, 8, 8, 8)
    sampler = vx.GridSampler(vx.Subject(t1=vx.ScalarImage(data)), 4)
    (batch,) = vx.SubjectsLoader(sampler, batch_size=8)
    aggregator = vx.PatchAggregator((8, 8, 8), "crop")
    with pytest.raises(OutputError, match="spatial shape"):  # a location of another size must not settle the grid
        aggregator.add_batch(torch.rand(1, 1, 4, 4, 4), [vx.PatchLocation((0, 0, 0), (8, 8, 8), subject_index=3)])
    with pytest.raises(OutputError, match="'emb' has spatial shape"):
        aggregator.add_batch({"seg": batch.t1.data, "emb": batch.t1.data[..., :2]}, batch)
    aggregator.add_batch(batch.t1.data, batch)
    assert torch.equal(aggregator.get_output(), data)


def test_names_are_those_of_the_input_also_where_the_output_is_smaller(sampler):
    aggregator = vx.GridAggregator(sampler, "average", downsampling_factor=2)
    with pytest.raises(OutputError, match=r"patch \(0, 0, 4\) to \(4, 4, 8\) holds 8 NaN"):
        aggregator.add_batch(torch.full((1, 1, 2, 2, 2), float("nan")), [sampler.grid[1]])
    aggregator.add_batch(torch.rand(1, 1, 2, 2, 2), [sampler.grid[0]])
    with pytest.raises(IncompleteError, match=r"7 of 8 patches are missing, the first at \(0, 0, 4\) to \(4, 4, 8\)"):
        aggregator.get_output()


def test_a_batch_of_no_patches_changes_nothing(sampler):
    for aggregator in (vx.GridAggregator(sampler), vx.PatchAggregator((8, 8, 8))):
        aggregator.add_batch(torch.empty(0, 1, 4, 4, 4), [])
        with pytest.raises(IncompleteError, match="no patch"):
            aggregator.get_output()


@pytest.mark.parametrize("index", [(100, 0, 0), (-50, 0, 0), (8, 0, 0), (0, -4, 0)])
def test_patches_outside_of_the_volume_are_refused(sampler, index):
    for aggregator in (vx.GridAggregator(sampler, "average"), vx.PatchAggregator((8, 8, 8), "average")):
        with pytest.raises(LocationError, match=r"lies outside of the volume of \(8, 8, 8\)"):
            aggregator.add_batch(torch.rand(1, 1, 4, 4, 4), [vx.PatchLocation(index, (4, 4, 4))])


@pytest.mark.parametrize("mode", ["crop", "average"])
def test_a_grid_aggregator_takes_only_patches_of_its_grid(sampler, mode):
    with pytest.raises(LocationError, match=r"none of the grid of 8 patches of \(4, 4, 4\).*PatchAggregator"):
        vx.GridAggregator(sampler, mode).add_batch(torch.rand(1, 1, 4, 4, 4), [vx.PatchLocation((1, 1, 1), (4, 4, 4))])


def test_an_overlap_that_is_not_smaller_than_the_patch_is_refused_when_the_patch_is_known():
    aggregator = vx.PatchAggregator((16, 16, 16), "average", patch_overlap=16)
    with pytest.raises(SizeError, match="patch_overlap is 16.*smaller than the patch size, 8; the largest is 7"):
        aggregator.add_batch(torch.rand(1, 1, 8, 8, 8), [vx.PatchLocation((0, 0, 0), (8, 8, 8))])


@pytest.mark.parametrize("mode", ["crop", "hann"])
def test_patches_of_a_padded_volume_in_any_order(mode):
    data = torch.rand(1, 12, 12, 12)
    sampler = vx.GridSampler(vx.Subject(t1=vx.ScalarImage(data)), 6, 4, "edge")
    aggregator = vx.PatchAggregator((12, 12, 12), mode, 4, padded=True)
    order = sorted(range(len(sampler)), key=lambda number: sampler.grid[number].index != (2, 2, 2))
    for number in order:  # the first lies on both grids
        aggregator.add_batch(sampler[number].t1.data[None], [sampler.grid[number]])
    torch.testing.assert_close(aggregator.get_output(), data)


@pytest.mark.parametrize(("dtype", "fill"), [(torch.uint8, -1), (torch.int16, 0.5), (torch.bool, 2), (torch.int16, float("nan"))])
def test_a_fill_that_the_output_cannot_hold_is_refused(sampler, dtype, fill):
    aggregator = vx.GridAggregator(sampler, fill=fill)
    with pytest.raises(OutputError, match="cannot hold the fill value"):
        aggregator.add_batch(torch.zeros(1, 1, 4, 4, 4, dtype=dtype), [sampler.grid[0]])
    for nonsense in (None, "x", True):
        with pytest.raises(SizeError, match="fill is"):
            vx.GridAggregator(sampler, fill=nonsense)


@pytest.mark.parametrize("shape", [np.array([4, 4, 4]), torch.tensor([4, 4, 4]), 4, torch.Size((4, 4, 4)), [4, 4, 4]])
def test_shapes_may_be_given_in_any_form(shape):
    aggregator = vx.PatchAggregator(np.array([8, 8, 8]), "average", output_shape=shape)
    aggregator.add_batch(torch.ones(1, 1, 4, 4, 4), np.array([[0, 0, 0, 8, 8, 8]]))
    assert aggregator.get_output().shape == (1, 4, 4, 4)


@pytest.mark.parametrize(
    ("batch", "locations", "error"),
    [
        ([torch.rand(1, 1, 4, 4, 4)], [vx.PatchLocation((0, 0, 0), (4, 4, 4))], OutputError),
        (np.zeros((1, 1, 4, 4, 4)), [vx.PatchLocation((0, 0, 0), (4, 4, 4))], OutputError),
        (torch.rand(1, 1, 4, 4, 4), None, LocationError),
        (torch.rand(1, 1, 4, 4, 4), [[0, 0, 0, 4, 4]], LocationError),
        (torch.rand(1, 1, 4, 4, 4), torch.tensor([[0.9, 0.9, 0.9, 4.9, 4.9, 4.9]]), LocationError),
    ],
)
def test_other_types_than_tensors_and_locations_are_refused(sampler, batch, locations, error):
    with pytest.raises(error):
        vx.GridAggregator(sampler).add_batch(batch, locations)
    whole = vx.SubjectsBatch.from_subjects([vx.Subject(t1=vx.ScalarImage(torch.rand(1, 4, 4, 4)))])
    with pytest.raises(LocationError, match="no patch locations"):
        vx.GridAggregator(sampler).add_batch(torch.rand(1, 1, 4, 4, 4), whole)


def test_a_mostly_empty_output_of_many_patches_takes_no_time():
    aggregator = vx.PatchAggregator((256, 256, 256), "average", 14)
    aggregator.add_batch(torch.ones(1, 1, 16, 16, 16), [vx.PatchLocation((100, 100, 100), (16, 16, 16))])
    assert len(vx.PatchGrid.cover((256, 256, 256), 16, 14)) > 10**6
    assert aggregator.get_output(strict=False).sum() == 16**3


def test_infinity_is_a_warning_and_large_values_are_none(aggregator, sampler):
    output, locations = batch_of(sampler)
    output[0, 0, 0, 0, 0] = float("inf")
    with pytest.warns(RuntimeWarning, match=r"patch \(0, 0, 0\) to \(4, 4, 4\) holds infinity") as caught:
        aggregator.add_batch(output, locations)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        largest = torch.full((1, 1, 4, 4, 4), torch.finfo(torch.float32).max)
        vx.GridAggregator(sampler).add_batch(largest, [sampler.grid[0]])
        vx.GridAggregator(sampler).add_batch(torch.full((1, 1, 4, 4, 4), 60000.0).half(), [sampler.grid[0]])


def test_reading_before_any_patch(aggregator):
    with pytest.raises(IncompleteError, match="no patch has been added yet"):
        aggregator.get_output()
    with pytest.raises(RuntimeError, match="no patch"):
        aggregator.get_output_tensor()


@pytest.mark.parametrize("mode", ["crop", "average", "hann", "gaussian"])
def test_reading_with_patches_missing_names_how_many(mode):
    data = torch.rand(1, 10, 8, 8) + 1
    sampler = vx.GridSampler(vx.Subject(t1=vx.ScalarImage(data)), 4, 2)
    for aggregator in (vx.GridAggregator(sampler, mode, fill=-1), vx.PatchAggregator((10, 8, 8), mode, 2, fill=-1)):
        for number in range(len(sampler) - 9):
            aggregator.add_batch(sampler[number].t1.data[None], [sampler.grid[number]])
        with pytest.raises(IncompleteError, match=rf"9 of {len(sampler)} patches are missing, the first at \(6, 0, 0\)"):
            aggregator.get_output()
        output = aggregator.get_output(strict=False)
        uncovered = output == -1
        torch.testing.assert_close(output[~uncovered], data[~uncovered])
        # Cropping keeps centres only, so it leaves the edge of the patches that were added, too.
        assert int(uncovered.sum()) == (3 if mode == "crop" else 2) * 8 * 8
        for number in range(len(sampler) - 9, len(sampler)):
            aggregator.add_batch(sampler[number].t1.data[None], [sampler.grid[number]])
        torch.testing.assert_close(aggregator.get_output(), data)


def test_voxels_that_strays_leave_uncovered_are_counted():
    aggregator = vx.PatchAggregator((8, 8, 8), "average")
    aggregator.add_batch(torch.ones(1, 1, 4, 4, 4), [vx.PatchLocation((1, 1, 1), (4, 4, 4))])
    with pytest.raises(IncompleteError, match="448 of 512 voxels are covered by no patch"):
        aggregator.get_output()


def test_cropping_has_no_meaning_off_the_grid():
    aggregator = vx.PatchAggregator((8, 8, 8), "crop")
    with pytest.raises(LocationError, match=r"\(1, 1, 1\) to \(5, 5, 5\) is none of the grid of 8 patches.*patch_overlap"):
        aggregator.add_batch(torch.ones(1, 1, 4, 4, 4), [vx.PatchLocation((1, 1, 1), (4, 4, 4))])


def test_an_output_that_was_read_is_never_written_to_again(aggregator, sampler):
    data = sampler.subject.t1.data
    for location in sampler.grid:
        aggregator.add_batch(data[(slice(None), *location.to_slices())][None], [location])
    first = aggregator.get_output()
    kept = first.clone()
    assert aggregator.get_output() is first
    aggregator.add_batch(torch.full((1, 1, 4, 4, 4), 100.0), [sampler.grid[0]])
    assert torch.equal(first, kept)
    assert aggregator.get_output()[0, 0, 0, 0] == pytest.approx((data[0, 0, 0, 0].item() + 100) / 2)


def test_names_of_outputs(sampler):
    aggregator = vx.GridAggregator(sampler)
    output, locations = batch_of(sampler, 8)
    aggregator.add_batch({"a": output, "b": output}, locations)
    with pytest.raises(NoSuchKeyError, match="there is no output 'c'; there is 'a', 'b'"):
        aggregator.get_output("c")
    with pytest.raises(NoSuchKeyError, match="there is no output None"):
        aggregator.get_output()
    assert torch.equal(aggregator.get_output("a"), aggregator.get_output("b"))
    single = vx.GridAggregator(sampler)
    single.add_batch({"seg": output}, locations)
    assert torch.equal(single.get_output(), single.get_output("seg"))
    unnamed = vx.GridAggregator(sampler)
    unnamed.add_batch(output, locations)
    with pytest.raises(NoSuchKeyError, match="without a name"):
        unnamed.get_output("seg")


def test_two_subjects_do_not_mix(aggregator, sampler):
    output, _ = batch_of(sampler, 1)
    aggregator.add_batch(output, [vx.PatchLocation((0, 0, 0), (4, 4, 4), subject_index=0)])
    with pytest.raises(LocationError, match="the patches are from several subjects, 0, 1"):
        aggregator.add_batch(output, [vx.PatchLocation((0, 0, 4), (4, 4, 4), subject_index=1)])


@pytest.mark.parametrize("shape", [(0, 8, 8), (8, 8.0, 8), (True, 8, 8)])
def test_arguments_of_a_patch_aggregator(shape):
    with pytest.raises(SizeError, match="spatial_shape"):
        vx.PatchAggregator(shape)
    with pytest.raises(SizeError, match="output_shape"):
        vx.PatchAggregator((8, 8, 8), output_shape=shape)
    with pytest.raises(SizeError, match="output_shape of 'seg'"):
        vx.PatchAggregator((8, 8, 8), output_shape={"seg": shape})
    with pytest.raises(SizeError, match="patch_overlap"):
        vx.PatchAggregator((8, 8, 8), patch_overlap=-2)
    with pytest.raises(SizeError, match="patch_overlap"):
        vx.PatchAggregator((8, 8, 8), patch_overlap=1.5)
    with pytest.raises(ModeError, match="overlap_mode"):
        vx.PatchAggregator((8, 8, 8), "invalid")


def test_an_aggregator_needs_a_sampler_with_a_subject():
    with pytest.raises(SubjectError, match="no sampler that has a subject"):
        vx.GridAggregator(vx.GridSampler(4))


@pytest.mark.filterwarnings("ignore:the outputs have gradients")
def test_outputs_that_need_gradients_and_views_of_the_input_are_only_read(sampler):
    aggregator = vx.GridAggregator(sampler, "hann")
    data = sampler.subject.t1.data.clone().requires_grad_()
    for location in sampler.grid:
        aggregator.add_batch(data[(slice(None), *location.to_slices())][None], torch.tensor([location.tolist()]))
    output = aggregator.get_output()
    assert not output.requires_grad
    torch.testing.assert_close(output, data.detach())
    assert torch.equal(data, sampler.subject.t1.data)


def test_batches_from_within_inference_mode_and_from_outside_mix(sampler):
    data = sampler.subject.t1.data
    aggregator = vx.GridAggregator(sampler, "hann")
    for number, location in enumerate(sampler.grid):
        patch = data[(slice(None), *location.to_slices())][None]
        with torch.inference_mode(number % 2 == 0):
            aggregator.add_batch(patch.clone(), [location])
    with torch.inference_mode():
        output = aggregator.get_output()
    output += 1  # an inference tensor could not be changed here
    torch.testing.assert_close(output, data + 1)
