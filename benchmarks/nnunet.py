"""nnU-Net's predictor, without a folder of a trained model."""

import os
from types import SimpleNamespace

import torch


def nnunet_predictor(patch, overlap, classes):
    """Make nnU-Net's own predictor for patches of a size, on the CPU, with a Gaussian; its network is still to be set."""
    os.environ |= dict.fromkeys(("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"), "/nonexistent")
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(
        tile_step_size=1 - overlap / patch,
        use_gaussian=True,
        use_mirroring=False,
        perform_everything_on_device=False,
        device=torch.device("cpu"),
        allow_tqdm=False,
    )
    predictor.configuration_manager = SimpleNamespace(patch_size=(patch,) * 3)
    predictor.label_manager = SimpleNamespace(num_segmentation_heads=classes)
    return predictor
