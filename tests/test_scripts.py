"""Training scripts as people write them for TorchIO and for MONAI, with voxloom's queue, loader and inferer in their place."""

import monai
import numpy as np
import pytest
import torch
import torchio as tio
from monai import transforms as mt
from monai.data import CacheDataset, decollate_batch
from monai.losses import DiceCELoss
from monai.metrics import DiceMetric
from monai.networks.nets import UNet

import voxloom as vx
from slow import slow
from voxloom.integrations.monai import VoxloomInferer, as_dict


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heads")
    for number in range(4):
        head = vx.datasets.HeadPhantom(32, seed=number)
        head.t1.save(folder / f"{number}_t1.nii.gz")
        vx.LabelMap((head.labels.data > 3).to(torch.uint8), affine=head.labels.affine).save(folder / f"{number}_seg.nii.gz")
    return folder


def small_network():
    torch.manual_seed(0)
    return UNet(3, 1, 2, channels=(4, 8, 16), strides=(2, 2))


def torchio_script(folder, workers):
    """The structure of TorchIO's tutorial on patches, but for `vx.` before the queue and the loaders."""
    subjects = [
        tio.Subject(mri=tio.ScalarImage(folder / f"{number}_t1.nii.gz"), heart=tio.LabelMap(folder / f"{number}_seg.nii.gz"))
        for number in range(4)
    ]
    training_transform = tio.Compose(
        [
            tio.ToCanonical(),
            tio.RandomMotion(p=0.2),
            tio.RandomBiasField(p=0.3),
            tio.ZNormalization(masking_method=tio.ZNormalization.mean),
            tio.RandomNoise(p=0.5),
            tio.RandomFlip(),
            tio.OneOf({tio.RandomAffine(): 0.8, tio.RandomElasticDeformation(num_control_points=5, max_displacement=2): 0.2}),
        ]
    )
    patches_training_set = vx.Queue(
        subjects_dataset=tio.SubjectsDataset(subjects, transform=training_transform),
        max_length=12,
        samples_per_volume=4,
        sampler=vx.LabelSampler(patch_size=16, label_name="heart", label_probabilities={0: 1, 1: 3}),
        num_workers=workers,
        seed=0,
    )
    loader = vx.SubjectsLoader(patches_training_set, batch_size=4, num_workers=0)
    network = small_network()
    optimizer = torch.optim.AdamW(network.parameters())
    losses = []
    for _ in range(2):
        for batch in loader:
            inputs, targets = batch["mri"][tio.DATA], batch["heart"][tio.DATA]
            optimizer.zero_grad()
            loss = DiceCELoss(to_onehot_y=True, softmax=True)(network(inputs), targets)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    patches_training_set.close()
    return losses


def monai_script(folder, workers):
    """The structure of MONAI's tutorial on the spleen: cached items, dictionary transforms, an inferer in the validation."""
    items = [{"image": folder / f"{number}_t1.nii.gz", "label": folder / f"{number}_seg.nii.gz"} for number in range(4)]
    keys = ["image", "label"]
    before = mt.Compose(
        [
            mt.LoadImaged(keys),
            mt.EnsureChannelFirstd(keys),
            mt.ScaleIntensityRanged("image", a_min=0, a_max=800, b_min=0, b_max=1, clip=True),
            mt.Orientationd(keys, axcodes="RAS"),
            mt.Spacingd(keys, pixdim=(7, 7, 7), mode=("bilinear", "nearest")),
        ]
    )
    queue = vx.Queue(
        CacheDataset(items[:3], before, progress=False),
        max_length=12,
        samples_per_volume=4,
        sampler=vx.LabelSampler(16, "label", {0: 1, 1: 1}),
        num_workers=workers,
        patch_transform=[mt.RandFlipd(keys, prob=0.5, spatial_axis=1), mt.RandShiftIntensityd("image", offsets=0.1, prob=0.5)],
        seed=0,
    )
    network = small_network()
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    loss_function = DiceCELoss(to_onehot_y=True, softmax=True)
    losses = []
    for _ in range(2):
        network.train()
        for batch in vx.SubjectsLoader(queue, batch_size=4):
            batch_data = as_dict(batch)
            optimizer.zero_grad()
            loss = loss_function(network(batch_data["image"]), batch_data["label"])
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
    queue.close()
    network.eval()
    metric = DiceMetric(include_background=False, reduction="mean")
    scores = []
    val_loader = monai.data.DataLoader(CacheDataset(items[3:], before, progress=False), batch_size=1)
    for inferer in (VoxloomInferer((16, 16, 16), 4), monai.inferers.SlidingWindowInferer((16, 16, 16), 4)):
        with torch.no_grad():
            for val_data in val_loader:
                outputs = inferer(val_data["image"], network)
                outputs = [mt.AsDiscrete(argmax=True, to_onehot=2)(each) for each in decollate_batch(outputs)]
                labels = [mt.AsDiscrete(to_onehot=2)(each) for each in decollate_batch(val_data["label"])]
                metric(y_pred=outputs, y=labels)
        scores.append(metric.aggregate().item())
        metric.reset()
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    return losses


@pytest.mark.filterwarnings("ignore")  # of the peers' own
@pytest.mark.parametrize("script", [slow(torchio_script), monai_script])
def test_losses_are_the_same_bit_for_bit_for_every_number_of_workers(script, folder):
    runs = [script(folder, workers) for workers in (0, 1, 2)]
    assert len(runs[0]) >= 6
    assert np.isfinite(runs[0]).all()
    assert len(set(runs[0])) == len(runs[0])
    assert runs[0] == runs[1] == runs[2]
