"""Tiny trained models of nnU-Net, as folders, and scans for them."""

import json

import numpy as np
import torch
from scipy.spatial.transform import Rotation

import voxloom as vx

NAMES = {
    "PlainConvUNet": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
    "ResidualEncoderUNet": "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
}


def architecture(kind, dimensions):
    convs = "n_conv_per_stage" if kind == "PlainConvUNet" else "n_blocks_per_stage"
    return {
        "network_class_name": NAMES[kind],
        "arch_kwargs": {
            "n_stages": 2,
            "features_per_stage": [4, 6],
            "conv_op": f"torch.nn.modules.conv.Conv{dimensions}d",
            "kernel_sizes": [[3] * dimensions] * 2,
            "strides": [[1] * dimensions, [2] * dimensions],
            convs: [1, 1],
            "n_conv_per_stage_decoder": [1],
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dimensions}d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def old_architecture(kind, dimensions):
    """How plans of the first versions said it."""
    return {
        "UNet_class_name": kind,
        "UNet_base_num_features": 4,
        "n_conv_per_stage_encoder": [1, 1],
        "n_conv_per_stage_decoder": [1],
        "num_pool_per_axis": [1] * dimensions,
        "pool_op_kernel_sizes": [[1] * dimensions, [2] * dimensions],
        "conv_kernel_sizes": [[3] * dimensions] * 2,
        "unet_max_num_features": 6,
    }


def configuration(spacing, patch, kind="PlainConvUNet", schemes=("CTNormalization",), masked=(False,), old=False, **others):
    dimensions = len(patch)
    order = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    return {
        "data_identifier": "nnUNetPlans",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(patch),
        "median_image_size_in_voxels": [30] * dimensions,
        "spacing": list(spacing),
        "normalization_schemes": list(schemes),
        "use_mask_for_norm": list(masked),
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": order,
        "resampling_fn_seg_kwargs": {**order, "is_seg": True, "order": 1},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": {**order, "order": 1},
        "batch_dice": True,
        **(old_architecture(kind, dimensions) if old else {"architecture": architecture(kind, dimensions)}),
        **others,
    }


def write_folder(
    folder,
    configurations,
    name,
    *,
    labels=None,
    regions=None,
    channels=("CT",),
    folds=(0,),
    mirrored=(0, 1, 2),
    forward=(0, 1, 2),
    reader="SimpleITKIO",
    trainer="nnUNetTrainer",
    extra_inputs=0,
    seed=0,
    steps=0,
):
    """Write a folder of a model with random weights, or trained for some steps."""
    from dynamic_network_architectures.architectures import unet

    folder.mkdir(parents=True)
    labels = labels or {"background": 0, "liver": 1, "tumour": 2, "kidney": 3}
    properties = {
        "mean": 40.0,
        "std": 130.0,
        "percentile_00_5": -260.0,
        "percentile_99_5": 330.0,
        "median": 30.0,
        "min": -1000,
        "max": 3000,
    }
    plans = {
        "dataset_name": "Dataset001_Tiny",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [1, 1, 1],
        "original_median_shape_after_transp": [30, 30, 30],
        "image_reader_writer": reader,
        "transpose_forward": list(forward),
        "transpose_backward": np.argsort(forward).tolist(),
        "configurations": configurations,
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {str(number): properties for number in range(len(channels))},
    }
    dataset = {
        "channel_names": {str(number): each for number, each in enumerate(channels)},
        "labels": labels,
        "numTraining": 2,
        "file_ending": ".nii.gz",
        **({"regions_class_order": list(regions)} if regions else {}),
    }
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset))
    own = configurations[name]
    while "inherits_from" in own:
        own = {**configurations[own["inherits_from"]], **{key: value for key, value in own.items() if key != "inherits_from"}}
    dimensions = len(own["patch_size"])
    kind = own["UNet_class_name"] if "UNet_class_name" in own else own["architecture"]["network_class_name"].rpartition(".")[2]
    made = architecture(kind, dimensions)["arch_kwargs"] | {
        "conv_op": getattr(torch.nn, f"Conv{dimensions}d"),
        "norm_op": getattr(torch.nn, f"InstanceNorm{dimensions}d"),
        "nonlin": torch.nn.LeakyReLU,
    }
    heads = len(regions) if regions else len(labels)
    for fold in folds:
        with torch.random.fork_rng():
            torch.manual_seed(seed + 7 * (fold if isinstance(fold, int) else 99))
            network = getattr(unet, kind)(
                input_channels=len(channels) + extra_inputs, num_classes=heads, deep_supervision=True, **made
            )
            with torch.no_grad():
                for layer in network.decoder.seg_layers:
                    layer.weight.mul_(8)
            _train(network, len(channels) + extra_inputs, own["patch_size"], heads, steps)
        (folder / f"fold_{fold}").mkdir()
        torch.save(
            {
                "network_weights": network.state_dict(),
                "optimizer_state": {"state": {}, "param_groups": [{"lr": np.float64(0.01)}]},
                "grad_scaler_state": None,
                "logging": {"ema_fg_dice": [np.float64(0.5), np.float32(0.25)]},
                "_best_ema": np.float64(0.5),
                "current_epoch": 5,
                "init_args": {"configuration": name, "fold": fold, "plans": plans},
                "trainer_name": trainer,
                "inference_allowed_mirroring_axes": tuple(mirrored) if mirrored else None,
            },
            folder / f"fold_{fold}" / "checkpoint_final.pth",
        )
    return folder


def _train(network, channels, patch, heads, steps):
    """Let it find in which of as many ranges the mean of its neighbours lies."""
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(steps):
        smooth = torch.randn(2, channels, *patch)
        for axis in range(2, smooth.ndim):
            smooth = (smooth + smooth.roll(1, axis) + smooth.roll(-1, axis)) / 2
        target = ((smooth[:, 0] + 1.5) * heads / 3).clamp(0, heads - 1).long()
        loss = torch.nn.functional.cross_entropy(network(smooth)[0], target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def write_case(
    folder,
    name,
    shape=(30, 26, 22),
    spacing=(0.9, 1.1, 1.6),
    channels=1,
    seed=0,
    border=3,
    codes=(-1, -1, 1),
    colours=False,
    angles=(0, 0, 0),
    empty=0,
):
    """Write the files of a case: smooth noise, with a border of zeros; of colours from 0 to 255.

    Args:
        angles: by how many degrees the scan is turned about each axis.
        empty: voxels of a corner within the border that are 0 as well, along each axis.
    """
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() * (np.array(codes) * spacing)
    affine[:3, 3] = (17, -9, 4)
    files = []
    for channel in range(channels):
        noise = torch.nn.functional.avg_pool3d(torch.randn((1, *shape), generator=generator), 3, 1, 1)
        values = torch.zeros(1, *shape)
        inner = tuple(slice(border, size - border) for size in shape)
        values[(slice(None), *inner)] = (noise[(slice(None), *inner)] * 500).round()
        if colours:
            values = values.abs().clamp(max=255)
        values[0, shape[0] // 2, shape[1] // 2, shape[2] // 2] = 0  # a hole
        if empty:
            values[:, : border + empty, : border + empty, : border + empty] = 0
        files.append(folder / f"{name}_{channel:04d}.nii.gz")
        vx.ScalarImage(values, affine=affine).save(files[-1])
    return files
