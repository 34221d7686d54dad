"""The examples that users of TorchIO know, with nothing but their import lines changed.

Colin27, which has to be downloaded, is replaced by a template that travels inside nilearn, under the same names.
"""

import itertools

import pytest
import torch
from torch import nn

import voxloom
import voxloom as tio
from slow import slow


class Colin27(tio.Subject):
    """A stand-in of the same entries: T1, head and brain."""


@pytest.fixture(scope="module")
def colin(mni_path):
    t1 = tio.ScalarImage(mni_path)
    head = tio.LabelMap(tensor=(t1.data > 10).to(torch.uint8), affine=t1.affine)
    brain = tio.LabelMap(tensor=(t1.data > 60).to(torch.uint8), affine=t1.affine)
    return Colin27(t1=t1, head=head, brain=brain)


@pytest.fixture
def brain_path(tmp_path, monkeypatch):
    voxloom.datasets.HeadPhantom((150, 140, 130)).t1.save(tmp_path / "brain.nii.gz")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("brain_path")
def test_patch_based_inference():
    from voxloom.loader import SubjectsLoader

    model = nn.Identity()

    subject = tio.ScalarImage("brain.nii.gz")
    subject = tio.Subject(t1=subject)

    # 1. Sample patches
    sampler = tio.GridSampler(subject, patch_size=64, patch_overlap=8)

    # 2. Batch with DataLoader
    loader = SubjectsLoader(sampler, batch_size=4)

    # 3. Run inference and aggregate
    aggregator = tio.PatchAggregator(
        spatial_shape=subject.spatial_shape,
        overlap_mode="hann",
        patch_overlap=8,
    )

    for batch in loader:
        input_tensor = batch.t1.data
        output = model(input_tensor)
        locations = [batch.metadata["patch_location"][i] for i in range(batch.batch_size)]
        aggregator.add_batch(output, locations)

    result = aggregator.get_output()

    torch.testing.assert_close(result, subject.t1.data)


def test_training_with_random_samplers(colin):
    from voxloom.loader import SubjectsLoader

    subject = tio.Subject(t1=colin.t1, seg=colin.brain, sampling_weights=tio.Image(colin.t1.data.float(), type=tio.SAMPLING_MAP))
    subject["sampling_weights"].affine = colin.t1.affine

    sampler = tio.UniformSampler(subject, patch_size=64, num_patches=200)
    loader = SubjectsLoader(sampler, batch_size=8)
    assert len(loader) == 25

    batch = next(iter(loader))
    assert batch.t1.data.shape == batch.seg.data.shape == (8, 1, 64, 64, 64)

    sampler = tio.WeightedSampler(
        subject,
        patch_size=64,
        probability_map="sampling_weights",
        num_patches=200,
    )
    for patch in itertools.islice(sampler, 20):
        centre = tuple(first + 32 for first in patch.patch_location.index)
        assert subject.t1.data[(0, *centre)] > 0

    sampler = tio.LabelSampler(
        subject,
        patch_size=64,
        label_name="seg",
        label_probabilities={0: 0.5, 1: 0.5},
        num_patches=200,
    )
    labels = [int(subject.seg.data[(0, *(first + 32 for first in patch.patch_location.index))]) for patch in sampler]
    assert 70 < sum(labels) < 130


@pytest.mark.usefixtures("brain_path")
def test_weighted_sampler_called_with_a_subject(capsys):
    tio.ScalarImage("brain.nii.gz").save("t1_mri.nii.gz")
    tio.ScalarImage("brain.nii.gz").save("sampling.nii.gz")

    subject = tio.Subject(
        t1=tio.ScalarImage("t1_mri.nii.gz"),
        sampling_map=tio.Image("sampling.nii.gz", type=tio.SAMPLING_MAP),
    )
    patch_size = 64
    sampler = tio.data.WeightedSampler(patch_size, "sampling_map")
    for patch in itertools.islice(sampler(subject), 3):
        print(patch["index_ini"])
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_label_sampler_called_with_a_subject(colin, capsys):
    subject = colin
    probabilities = {0: 0.5, 1: 0.5}
    sampler = tio.data.LabelSampler(
        patch_size=64,
        label_name="brain",
        label_probabilities=probabilities,
    )
    generator = sampler(subject)
    for patch in itertools.islice(generator, 3):
        print(patch.shape)

    generator = sampler(subject, num_patches=10)
    for patch in generator:
        print(patch.shape)
    assert capsys.readouterr().out.splitlines() == ["(1, 64, 64, 64)"] * 13


@pytest.mark.parametrize("num_workers", [0, slow(4)])
def test_queue(colin, num_workers):
    from torch.utils.data import DataLoader

    patch_size = 96
    queue_length = 300
    samples_per_volume = 10
    sampler = tio.data.UniformSampler(patch_size)
    subject = colin
    subjects_dataset = tio.SubjectsDataset(10 * [subject])
    patches_queue = tio.Queue(
        subjects_dataset,
        queue_length,
        samples_per_volume,
        sampler,
        num_workers=num_workers,
    )
    patches_loader = DataLoader(patches_queue, batch_size=16)
    num_epochs = 2
    model = torch.nn.Identity()
    patches = 0
    for _epoch_index in range(num_epochs):
        for patches_batch in patches_loader:
            inputs = patches_batch["t1"][tio.DATA]  # key 't1' is in subject
            targets = patches_batch["brain"][tio.DATA]  # key 'brain' is in subject
            logits = model(inputs)  # model being an instance of torch.nn.Module
            assert torch.equal(logits > 60, targets.bool())
            patches += len(logits)
    assert patches == 200


def test_downsampled_outputs():
    aggregator = tio.PatchAggregator(
        spatial_shape=(256, 256, 176),
        output_shape=(128, 128, 88),
        overlap_mode="average",
    )

    subject = tio.Subject(t1=tio.ScalarImage(torch.rand(1, 256, 256, 176)))
    for batch in tio.SubjectsLoader(tio.GridSampler(subject, (128, 128, 88)), batch_size=2):
        aggregator.add_batch(batch.t1.data[..., ::2, ::2, ::2], batch.metadata["patch_location"])
    assert torch.equal(aggregator.get_output(), subject.t1.data[..., ::2, ::2, ::2])


def test_multiple_outputs():
    volume = torch.rand(1, 20, 20, 20)
    sampler = tio.GridSampler(tio.Subject(t1=tio.ScalarImage(volume)), 10)
    aggregator = tio.PatchAggregator(spatial_shape=(20, 20, 20), overlap_mode="average")
    for batch in tio.SubjectsLoader(sampler, batch_size=4):
        seg_output, emb_output = batch.t1.data > 0.5, batch.t1.data.repeat(1, 8, 1, 1, 1)
        locations = batch.metadata["patch_location"]

        aggregator.add_batch(
            {"segmentation": seg_output, "embedding": emb_output},
            locations,
        )
    seg = aggregator.get_output("segmentation")
    emb = aggregator.get_output("embedding")

    torch.testing.assert_close(seg, (volume > 0.5).float())
    torch.testing.assert_close(emb, volume.repeat(8, 1, 1, 1))


@pytest.mark.parametrize("patch_overlap", [(4, 4, 4), 4])
@pytest.mark.parametrize("make_loader", [torch.utils.data.DataLoader, tio.SubjectsLoader])
def test_grid_sampler_and_aggregator(colin, patch_overlap, make_loader):
    patch_size = 88, 88, 60
    subject = colin
    assert repr(subject) == "Colin27(Keys: ('t1', 'head', 'brain'); images: 3)"
    grid_sampler = tio.inference.GridSampler(
        subject,
        patch_size,
        patch_overlap,
    )
    patch_loader = make_loader(grid_sampler, batch_size=4)
    aggregator = tio.inference.GridAggregator(grid_sampler)
    model = nn.Identity().eval()
    with torch.no_grad():
        for patches_batch in patch_loader:
            input_tensor = patches_batch["t1"][tio.DATA]
            locations = patches_batch[tio.LOCATION]
            logits = model(input_tensor)
            labels = logits.argmax(dim=tio.CHANNELS_DIMENSION, keepdim=True)
            outputs = labels
            aggregator.add_batch(outputs, locations)
    output_tensor = aggregator.get_output_tensor()

    assert output_tensor.shape == (1, 197, 233, 189)
    assert output_tensor.dtype == torch.int64
    assert not output_tensor.any()  # of one channel, the first is the greatest


def test_names_of_both_generations():
    from voxloom.data import GridAggregator, PatchLocation
    from voxloom.loader import SubjectsLoader

    assert tio.data.GridSampler is tio.inference.GridSampler is tio.GridSampler
    assert GridAggregator is tio.inference.GridAggregator
    assert SubjectsLoader is tio.SubjectsLoader
    assert PatchLocation is tio.PatchLocation
