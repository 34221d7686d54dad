"""The network that plans of nnU-Net's name, with the weights of a checkpoint."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ...errors import MissingDependencyError, ModelFileError

__all__ = ["network_of"]

# Packages that networks and their layers may be of.
PACKAGES = ("dynamic_network_architectures.", "torch.nn.")
ARCHITECTURES = "dynamic_network_architectures.architectures"
EXTRA = "pip install 'voxloom[nnunet]'"


def network_of(
    configuration: Mapping[str, Any], channels: int, heads: int, state: Mapping[str, Any], folder: Path, allow_pickle: bool
) -> nn.Module:
    """Make the network that the plans name, and give it its weights.

    Args:
        configuration: what the plans say of it.
        channels: how many go in.
        heads: how many come out.
        state: the checkpoint.
        folder: the model's, for errors.
        allow_pickle: let the network be of any package.

    Raises:
        ModelFileError: if the plans name none that is known, or the weights are those of another one.
        MissingDependencyError: if its package is not installed.
    """
    architecture = configuration.get("architecture") or _old_architecture(configuration, folder)
    name, arguments = architecture["network_class_name"], dict(architecture["arch_kwargs"])
    for key in architecture.get("_kw_requires_import", ()):
        if arguments.get(key) is not None:
            arguments[key] = _imported(arguments[key], allow_pickle)
    kind = _imported(name, allow_pickle)
    try:
        network = kind(input_channels=channels, num_classes=heads, deep_supervision=False, **arguments)
    except TypeError as error:
        raise ModelFileError(f"{name} cannot be made of the plans in {folder}: {error}") from error
    weights = {key.removeprefix("module.").removeprefix("_orig_mod."): value for key, value in state["network_weights"].items()}
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise ModelFileError(
            f"the weights in {folder} do not fit the network of its plans, {name}. The trainer {state.get('trainer_name')} may"
            f" build another one: export that with torch.export, and give a spec. ({str(error).splitlines()[0]})"
        ) from error
    return network.eval()


def _imported(name: str, allow_pickle: bool) -> Any:
    if not allow_pickle and not name.startswith(PACKAGES):
        raise ModelFileError(
            f"the plans name {name}, which is of none of the packages {', '.join(each[:-1] for each in PACKAGES)}: give"
            " allow_pickle=True (--allow-pickle) if you trust where the model is from"
        )
    module, _, attribute = name.rpartition(".")
    if module.startswith(ARCHITECTURES) and attribute.endswith("UNet"):
        module = f"{ARCHITECTURES}.unet"  # where all of them are now, and were not always
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise MissingDependencyError(f"{name} is not installed ({error}): {EXTRA}") from error
    except AttributeError as error:
        raise ModelFileError(f"there is no {attribute} in {module}, which the plans name") from error


def _old_architecture(configuration: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Say what plans mean that were written before they named the network."""
    kinds = {
        "PlainConvUNet": ("dynamic_network_architectures.architectures.unet.PlainConvUNet", "n_conv_per_stage"),
        "ResidualEncoderUNet": ("dynamic_network_architectures.architectures.unet.ResidualEncoderUNet", "n_blocks_per_stage"),
    }
    kind = configuration.get("UNet_class_name")
    if kind not in kinds:
        raise ModelFileError(f"the plans in {folder} name no architecture that is known: UNet_class_name is {kind!r}")
    name, stages = kinds[kind]
    dimensions, count = len(configuration["patch_size"]), len(configuration["n_conv_per_stage_encoder"])
    most, base = configuration["unet_max_num_features"], configuration["UNet_base_num_features"]
    return {
        "network_class_name": name,
        "arch_kwargs": {
            "n_stages": count,
            "features_per_stage": [min(base * 2**stage, most) for stage in range(count)],
            "conv_op": f"torch.nn.modules.conv.Conv{dimensions}d",
            "kernel_sizes": configuration["conv_kernel_sizes"],
            "strides": configuration["pool_op_kernel_sizes"],
            stages: configuration["n_conv_per_stage_encoder"],
            "n_conv_per_stage_decoder": configuration["n_conv_per_stage_decoder"],
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
