"""Models of other projects on the command line: how each is loaded, and how its images are named."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..integrations import nnunet
from ..models.loading import LoadedModel
from .cases import DEFAULT_ENDING, Case, checked

__all__ = ["OTHERS", "OtherModels", "cases_of_other", "other_model"]


@dataclass(frozen=True)
class OtherModels:
    """What the command does with the models of another project."""

    load: Callable[..., LoadedModel]
    """Takes a folder, `folds`, `checkpoint` and `allow_pickle`."""
    cases: Callable[[Path, Path, Path], list[Case]]
    """Finds the cases in a folder of images, given that, the folder of the model and that of the results."""


def _cases_of_nnunet(images: Path, model: Path, output: Path) -> list[Case]:
    found = nnunet.cases_in(images, nnunet.json_of(model, "dataset.json"))
    return checked([Case(name, tuple(files), output / f"{name}{DEFAULT_ENDING}") for name, files in found.items()])


OTHERS = {"nnunet": OtherModels(nnunet.load, _cases_of_nnunet)}
"""By what stands before the colon in the name of a model."""


def other_model(name: str) -> tuple[OtherModels, Path] | None:
    """Say of which project a model is, and in which folder; None for a model of one's own."""
    kind, colon, folder = name.partition(":")
    return (OTHERS[kind], Path(folder).expanduser()) if colon and kind in OTHERS else None


def cases_of_other(name: str, images: Sequence[Path], output: Path) -> list[Case] | None:
    """Find the cases in a folder that is named as another project names its images; None where there are none."""
    found = other_model(name)
    if found is None or len(images) != 1 or not images[0].is_dir():
        return None
    other, folder = found
    return other.cases(images[0], folder, output) or None
