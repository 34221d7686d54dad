"""What lies in the folder of a model of nnU-Net's: its files, folds and checkpoints, and cases that are named its way."""

import contextlib
import json
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...errors import ModelFileError, VoxloomError
from ...io.protocols import Json

__all__ = ["cases_in", "checkpoint_of", "configuration_name", "folds_of", "json_of", "understood"]


@contextlib.contextmanager
def understood(path: Path) -> Iterator[None]:
    """Name the file of which something is missing, or of another kind than nnU-Net writes."""
    try:
        yield
    except VoxloomError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, AssertionError) as error:
        raise ModelFileError(f"{path} is not such as nnU-Net v2 writes: {error!r} is missing or wrong") from error


def cases_in(folder: Any, dataset: Json | None = None) -> dict[str, list[Path]]:
    """Find the cases in a folder of images that are named as nnU-Net names them, `CASE_0000.nii.gz`, in order of their channels.

    Args:
        folder: the folder.
        dataset: `dataset.json`, which may say the ending; None for any.

    Raises:
        ModelFileError: if a case lacks a channel that others have.
    """
    ending = None if dataset is None else dataset.get("file_ending")
    found: dict[str, dict[int, Path]] = {}
    for path in sorted(Path(folder).iterdir()):
        stem = path.name[: -len(ending)] if ending and path.name.endswith(ending) else path.name.partition(".")[0]
        if ending and not path.name.endswith(ending):
            continue
        case, underscore, number = stem.rpartition("_")
        if underscore and len(number) == 4 and number.isdecimal():
            found.setdefault(case, {})[int(number)] = path
    count = max((len(each) for each in found.values()), default=0)
    for case, files in found.items():
        if sorted(files) != list(range(count)):
            missing = next(number for number in range(count) if number not in files)
            raise ModelFileError(f"the case {case} in {folder} has no channel {missing:04d}, which others have")
    return {case: [files[number] for number in range(count)] for case, files in found.items()}


def json_of(folder: Path, name: str) -> Json:
    """Read a file of a trained model's folder.

    Raises:
        ModelFileError: if it is not there, or damaged.
    """
    path = folder / name
    if not path.is_file():
        old = "; plans.pkl is of nnU-Net v1, which is not supported" if list(folder.glob("plans*.pkl")) else ""
        raise ModelFileError(
            f"there is no {path}: give the folder of a trained nnU-Net v2, such as"
            f" {_inner(folder) or 'nnUNetTrainer__nnUNetPlans__3d_fullres'}{old}"
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelFileError(f"{path} is damaged: {error}") from error
    if not isinstance(found, Mapping):
        raise ModelFileError(f"{path} is not such as nnU-Net v2 writes: it holds no object with names")
    return found


def _inner(folder: Path) -> Path | None:
    """Find the folder of a trained model in that of its data set."""
    return next((path.parent for path in sorted(folder.glob("*/plans.json"))), None) if folder.is_dir() else None


def folds_of(folder: Path, folds: Any, checkpoint: str) -> list[str]:
    """Say which folds are wanted.

    Args:
        folder: the folder of the model.
        folds: numbers, or `"all"`, or several; None for those that are there.
        checkpoint: name of the file of weights that a fold must hold.

    Raises:
        ModelFileError: if one is not there.
    """
    there = sorted(path.parent.name.removeprefix("fold_") for path in folder.glob(f"fold_*/{checkpoint}"))
    if folds is None or (folds in ("all", ["all"]) and "all" not in there):
        numbered = [fold for fold in there if fold != "all"]
        if not there:
            raise ModelFileError(f"{folder} has no fold with a {checkpoint}")
        return numbered or there
    wanted = [str(fold) for fold in ([folds] if isinstance(folds, int | str) else folds)]
    missing = [fold for fold in wanted if fold not in there]
    if missing or not wanted:
        listed = ", ".join(there) or "none"
        raise ModelFileError(f"{folder} has no fold {', '.join(missing)} with a {checkpoint}; there is {listed}")
    return wanted


def checkpoint_of(path: Path, allow_pickle: bool) -> Mapping[str, Any]:
    """Read the weights of a fold, and what the training says of them.

    Args:
        path: the file.
        allow_pickle: let it run the code that it brings.

    Raises:
        ModelFileError: if it is damaged or no checkpoint, or would run code.
    """
    from numpy import dtypes

    try:  # what the numbers of a training are, beside tensors
        from numpy._core.multiarray import scalar
    except ImportError:
        from numpy.core.multiarray import scalar  # type: ignore[no-redef]

    kinds = [np.dtype, *(getattr(dtypes, name) for name in ("Float64DType", "Float32DType", "Int64DType", "BoolDType"))]
    # Written by other versions of NumPy under another name.
    known = [scalar, (scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar"), *kinds]
    try:
        with torch.serialization.safe_globals(known):
            found = torch.load(path, map_location="cpu", weights_only=not allow_pickle)
    except pickle.UnpicklingError as error:
        raise ModelFileError(
            f"{path} holds more than weights and numbers: it would run code from the file, so give allow_pickle=True"
            f" (--allow-pickle) if you trust where it is from. ({str(error).splitlines()[0]})"
        ) from error
    except Exception as error:  # whatever a damaged file makes torch stumble over
        raise ModelFileError(f"{path} cannot be read: {str(error).splitlines()[0] if str(error) else error!r}") from error
    if not isinstance(found, Mapping) or not isinstance(found.get("network_weights"), Mapping):
        raise ModelFileError(f"{path} is no checkpoint of nnU-Net v2: it has no network_weights")
    return found


def configuration_name(state: Mapping[str, Any], folder: Path, fold: str) -> str:
    """Say of which configuration a checkpoint is.

    Raises:
        ModelFileError: if it does not say so.
    """
    try:
        return str(state["init_args"]["configuration"])
    except (KeyError, TypeError) as error:
        raise ModelFileError(f"the checkpoint of fold {fold} in {folder} does not say of which configuration it is") from error
