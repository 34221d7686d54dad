"""Models of other projects on the command line: how each is loaded, and how its images are named."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ModeError
from ..integrations import nnunet
from ..models.loading import LoadedModel
from .cases import Case, Results, checked, images_in, warn_of_left_out

__all__ = ["OTHERS", "LoadingOptions", "OtherModels", "cases_of_other", "names_channels", "other_model"]


@dataclass(frozen=True)
class LoadingOptions:
    """How a model of another project is loaded, as it was said on the command line; None where nothing was said."""

    weights: Path | None
    folds: list[str] | None
    checkpoint: str | None
    allow_pickle: bool
    allow_code: bool

    def refuse(self, kind: str, **given: object) -> None:
        """Refuse options that a kind of model does not have.

        Raises:
            ModeError: names the option.
        """
        for name, value in given.items():
            if value not in (None, False):
                raise ModeError(f"--{name.replace('_', '-')} was given, which is not for {kind}: leave it out")


@dataclass(frozen=True)
class OtherModels:
    """What the command does with the models of another project."""

    load: Callable[[Path, LoadingOptions], LoadedModel]
    """Loads the model in a folder."""
    cases: Callable[[Path, Path, Results], list[Case]]
    """Finds the cases in a folder of images, given that, the folder of the model, and where results go."""


def _cases_of_nnunet(images: Path, model: Path, results: Results) -> list[Case]:
    dataset = nnunet.json_of(model, "dataset.json")
    # Their endings are a matter of training; where none is as there, any are taken.
    found = nnunet.cases_in(images, dataset) or nnunet.cases_in(images)
    taken = {path for files in found.values() for path in files}
    left_out = [path for path in images_in(images, results.output) if path not in taken]
    if found and left_out:
        example = next(iter(taken)).name.partition(".")[2]
        warn_of_left_out(images, left_out, f"named as nnU-Net names them, CASE_0000.{example}")
    return checked([Case(name, tuple(files), results.at(name)) for name, files in found.items()])


def _nnunet(folder: Path, options: LoadingOptions) -> LoadedModel:
    options.refuse("a folder of nnU-Net", weights=options.weights, allow_code=options.allow_code)
    checkpoint = options.checkpoint or "checkpoint_final.pth"
    return nnunet.load(folder, options.folds, checkpoint, allow_pickle=options.allow_pickle)


def _monai(folder: Path, options: LoadingOptions) -> LoadedModel:
    options.refuse("a bundle", weights=options.weights, folds=options.folds, allow_pickle=options.allow_pickle)
    from ..integrations import monai  # which takes seconds to import

    return monai.load(folder, checkpoint=options.checkpoint or "model.pt", allow_code=options.allow_code)


def _cases_of_monai(images: Path, model: Path, results: Results) -> list[Case]:
    """Several files of a case are its channels, if they are named as those of nnU-Net; otherwise each file is a case."""
    found = nnunet.cases_in(images)
    if all(len(files) == 1 for files in found.values()):
        return []
    return checked([Case(name, tuple(files), results.at(name)) for name, files in found.items()])


OTHERS = {"nnunet": OtherModels(_nnunet, _cases_of_nnunet), "monai": OtherModels(_monai, _cases_of_monai)}
"""By what stands before the colon in the name of a model."""


def other_model(name: str) -> tuple[OtherModels, Path] | None:
    """Say of which project a model is, and in which folder; None for a model of one's own."""
    kind, colon, folder = name.partition(":")
    return (OTHERS[kind], Path(folder).expanduser()) if colon and kind in OTHERS else None


def names_channels(name: str) -> bool:
    """Whether files that are named `CASE_0000` are channels of a case, since the project of a model names them so."""
    return name.partition(":")[0] == "nnunet"


def cases_of_other(name: str, images: Sequence[Path], results: Results) -> list[Case] | None:
    """Find the cases in a folder that is named as another project names its images; None where there are none."""
    found = other_model(name)
    if found is None or len(images) != 1 or not images[0].is_dir():
        return None
    other, folder = found
    return other.cases(images[0], folder, results) or None
