"""Bundles of MONAI: a trained network with what it expects, from the declared part of its configuration."""

import importlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ...errors import ModelFileError
from ...io.files import hash_of_path
from ...io.labels import Label
from ...models.loading import LoadedModel, load_weights
from ...models.spec import ModelSpec
from ...volumes.libraries import imported
from .configuration import CODE, PREDICTION, Configuration
from .findings import Findings

__all__ = ["load"]


def load(folder: Any, *, config: str | None = None, checkpoint: str = "model.pt", allow_code: bool = False) -> LoadedModel:
    """Load a bundle of MONAI's, with what it expects, for `Predictor` and `predict`.

    The network, the inferer and the usual transforms before and after it are read from the configuration, and become a
    `ModelSpec`. Expressions (`$`) in it are not evaluated, unless that is allowed; what is not understood is named. Scores are
    never held as a whole: they are brought to the grid of the image block by block, and reduced there.

    Args:
        folder: the folder that holds `configs` and `models`.
        config: name of the configuration in `configs`; by default `inference.json`.
        checkpoint: name of the file of weights in `models`.
        allow_code: let MONAI evaluate the expressions in the configuration, and networks be of any package.

    Raises:
        ModelFileError: if the folder is no such bundle, or its configuration is not understood; names the part.
        MissingDependencyError: if MONAI is not installed.
    """
    imported("monai", "monai")
    root = Path(folder).expanduser()
    configuration = Configuration.read(root, config, allow_code)
    found = Findings(configuration)
    image_key = found.before("preprocessing")
    found.inferer()
    found.after("postprocessing")
    network = _network(configuration)
    weights = root / "models" / checkpoint
    load_weights(network, weights, allow_pickle=False)
    labels, channels = _names(root, image_key)
    # Labels are named where the channels of the output are classes.
    is_classes = found.values.get("reduce") == "argmax"
    spec = ModelSpec(**found.values, channels=channels, labels=labels if is_classes else ())
    return LoadedModel(network.eval(), f"MONAI bundle {hash_of_path(weights)}", spec=spec, reduce=found.reduce)


def _network(configuration: Configuration) -> nn.Module:
    """Make the network."""
    component = configuration.component("network_def", needed=False) or configuration.component("network")
    assert component is not None
    module, _, name = component.target.rpartition(".")
    allowed = configuration.parser is not None
    if module and not allowed and not module.startswith("monai.networks."):
        raise ModelFileError(
            f"{component.place} in {configuration.path} is {component.target}, of a package that is not MONAI's, {CODE}"
        )
    try:
        found = getattr(importlib.import_module(module or "monai.networks.nets"), name)
    except (ImportError, AttributeError) as error:
        raise ModelFileError(f"{component.target} in {configuration.path} cannot be found: {error}") from error
    if not inspect.isclass(found) or not issubclass(found, nn.Module):
        raise ModelFileError(f"{component.target} in {configuration.path} is no network")
    arguments = {argument: component[argument] for argument in component.arguments}
    try:
        return found(**arguments)
    except (TypeError, ValueError) as error:
        raise ModelFileError(f"{component.target} in {configuration.path} cannot be made: {error}") from error


def _names(root: Path, image_key: str) -> tuple[tuple[Label, ...], tuple[str, ...]]:
    """Give names of labels and of channels, as far as the metadata have them."""
    try:
        metadata = json.loads((root / "configs" / "metadata.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return (), ()
    data = _part(metadata, "network_data_format")
    outputs, inputs = _part(data, "outputs"), _part(data, "inputs")
    output = _part(outputs, PREDICTION) or _part(outputs, next(iter(outputs), ""))
    classes, channels = _part(output, "channel_def"), _part(_part(inputs, image_key), "channel_def")
    labels = tuple(Label(int(number), str(name)) for number, name in classes.items() if str(number).isdecimal() and int(number))
    if len(channels) < 2 or not all(str(each).isdecimal() for each in channels):
        return labels, ()
    return labels, tuple(str(channels[each]) for each in sorted(channels, key=int))


def _part(of: Any, name: str) -> Mapping[str, Any]:
    """Give a part of the metadata; nothing where they are not as they should be, since nothing depends on them."""
    found = of.get(name) if isinstance(of, Mapping) else None
    return found if isinstance(found, Mapping) else {}
