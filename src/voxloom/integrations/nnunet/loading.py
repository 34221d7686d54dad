"""Load trained models of nnU-Net v2."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...errors import ModelFileError
from ...io.files import hash_of_path
from ...models.loading import LoadedModel
from .cascades import Cascade
from .folder import checkpoint_of, configuration_name, folds_of, json_of, understood
from .networks import network_of
from .plans import Labels, channel_names, configuration_of, resamples_labels_by_torch, spec_of

__all__ = ["load"]


def load(
    folder: Any,
    folds: Sequence[int | str] | int | str | None = None,
    checkpoint: str = "checkpoint_final.pth",
    *,
    previous: Any = None,
    mirror: bool = True,
    allow_pickle: bool = False,
) -> LoadedModel:
    """Load a trained model of nnU-Net v2, with what it expects, for `Predictor` and `predict`.

    Its scores are made as nnU-Net makes them, in float32 where that sums in float16; they are interpolated back block by block,
    so that those of a whole volume are never held.

    Args:
        folder: the folder that holds `plans.json`, `dataset.json` and the folds.
        folds: numbers of the folds, or `"all"`; several are an ensemble. None takes all that are there.
        checkpoint: name of the file of weights in each fold.
        previous: of a cascade, the folder of the stage before; by default that beside this one. It runs first.
        mirror: whether patches are mirrored as well, along the axes that the training allows.
        allow_pickle: let checkpoints that hold more than weights and numbers run the code that they bring, and networks be of any
            package.

    Raises:
        ModelFileError: if the folder is no such model; says what is missing.
        MissingDependencyError: if the package of the networks is not installed.
    """
    folder = Path(folder).expanduser()
    plans, dataset = (json_of(folder, name) for name in ("plans.json", "dataset.json"))
    chosen = folds_of(folder, folds, checkpoint)
    states = [checkpoint_of(folder / f"fold_{fold}" / checkpoint, allow_pickle) for fold in chosen]
    names = {configuration_name(state, folder, fold) for fold, state in zip(chosen, states, strict=True)}
    if len(names) > 1:
        raise ModelFileError(
            f"the folds of {folder} are of several configurations, {', '.join(sorted(names))}: give folds of one"
        )
    (name,) = names
    with understood(folder / "dataset.json"):
        labels, names_of_channels = Labels.of(dataset, folder), channel_names(dataset, folder)
    axes = states[0].get("inference_allowed_mirroring_axes") if mirror else None
    with understood(folder / "plans.json"):
        configuration = configuration_of(plans, name, folder)
        stage = configuration.get("previous_stage")
        channels = len(names_of_channels) + (len(labels.foreground) if stage else 0)
        networks = [network_of(configuration, channels, labels.heads, state, folder, allow_pickle) for state in states]
        spec = spec_of(plans, names_of_channels, configuration, labels, axes, folder)
    identity = " ".join(hash_of_path(folder / f"fold_{fold}" / checkpoint) for fold in chosen)
    before = None
    if stage:
        beside = folder.with_name(folder.name.replace(name, str(stage)))
        model = load(previous or beside, folds, checkpoint, mirror=mirror, allow_pickle=allow_pickle)
        before = Cascade(model, labels.foreground, resamples_labels_by_torch(configuration))
    return LoadedModel(networks if len(networks) > 1 else networks[0], f"nnU-Net {name} {identity}", spec=spec, preceding=before)
