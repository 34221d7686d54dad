"""Putting a model and its spec into one file."""

import io
import warnings
from pathlib import Path

import torch
from torch import nn

from ..errors import ModelFileError, SpecError, TargetExistsError
from ..io.writing.saving import atomic_write
from ..io.writing.words import OVERWRITE
from .forms import CallForm, size_of_slices
from .loading import SPEC_FILE, load_model
from .modes import evaluating
from .program_check import inspected
from .spec import ModelSpec

__all__ = ["pack_model", "save_model"]


def pack_model(
    name: str, spec: ModelSpec, target: Path, weights: Path | None = None, allow_pickle: bool = False, overwrite: bool = False
) -> None:
    """Write a `.pt2` that holds a model and what it expects.

    Args:
        name: a `.pt2`, or with weights `package.module:factory`, whose network is exported for the spec's patches, in any number.
        spec: what it expects.
        target: the file to write.
        weights: file of weights.
        allow_pickle: let files run the code that they bring.
        overwrite: replace a file that is there.

    Raises:
        ModelFileError: if the model cannot be loaded or exported.
        SpecError: if the spec does not say what exporting needs to know.
        TargetExistsError: if the file is there.
    """
    _check_target(target, overwrite)
    loaded = load_model(name, weights, allow_pickle)
    path = Path(name).expanduser()
    with warnings.catch_warnings(action="ignore"):  # of PyTorch's, that its format may change
        if path.exists():
            if path.suffix != ".pt2":
                raise ModelFileError(f"{path} is no torch.export program (.pt2), which is what a spec can be put into")
            program = torch.export.load(path if allow_pickle else inspected(path))
        else:
            if not isinstance(loaded.model, nn.Module):
                raise ModelFileError(f"{name} makes no torch.nn.Module, which is what can be exported")
            program = _exported(loaded.model, spec, name)
    _write(program, spec, target)


def save_model(model: nn.Module, path: Path | str, spec: ModelSpec, *, overwrite: bool = False) -> None:
    """Write a `.pt2` that holds a network and what it expects: `predict`, `load_model` and the command need nothing else.

    Args:
        model: a network that `torch.export` can export; it is exported in evaluation mode, and on the CPU.
        path: name of the file, which ends in `.pt2`.
        spec: what it expects; must name its channels and its patch size. Any number of patches may be given to it at a time.
        overwrite: replace a file that is there.

    Raises:
        ModelFileError: if the model cannot be exported.
        SpecError: if the spec does not say what exporting needs to know.
        TargetExistsError: if the file is there.

    Example:
        >>> import tempfile, torch, voxloom as vx
        >>> spec = vx.ModelSpec(channels=("t1",), patch_size=16, reduce="argmax")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     vx.save_model(torch.nn.Conv3d(1, 2, 3, padding=1), f"{folder}/model.pt2", spec)
        ...     loaded = vx.load_model(f"{folder}/model.pt2")
        ...     vx.predict(loaded.model, torch.rand(1, 20, 20, 20), spec=loaded.spec).shape
        (1, 20, 20, 20)
    """
    target = Path(path).expanduser()
    if not isinstance(model, nn.Module):
        raise ModelFileError(f"the model is of type {type(model).__name__}: what can be exported is a torch.nn.Module")
    if not isinstance(spec, ModelSpec):
        raise SpecError(f"spec is of type {type(spec).__name__}: give a vx.ModelSpec that names channels and patch_size")
    _check_target(target, overwrite)
    with evaluating([model], torch.device("cpu")):
        _write(_exported(model, spec, type(model).__name__), spec, target)


def _check_target(target: Path, overwrite: bool) -> None:
    if target.suffix != ".pt2":
        raise ModelFileError(f"{target} must end in .pt2")
    if target.exists() and not overwrite:
        raise TargetExistsError(f"{target} exists, and is kept: choose another name, or give {OVERWRITE}")


def _write(program: torch.export.ExportedProgram, spec: ModelSpec, target: Path) -> None:
    packed = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):  # of PyTorch's, that its format may change
        torch.export.save(program, packed, extra_files={SPEC_FILE: str(spec)})

    def write(path: Path) -> None:
        path.write_bytes(packed.getvalue())

    atomic_write(target, write, ".pt2")


def _exported(model: nn.Module, spec: ModelSpec, name: str) -> torch.export.ExportedProgram:
    if spec.patch_size is None or -1 in spec.patch_size or not spec.channels:
        raise SpecError(f"to export {name}, the spec must say its channels, and a patch_size without -1")
    size = size_of_slices(spec.patch_size, spec.slice_axis)
    form = CallForm(spec.context, spec.slice_axis)
    batch = form.given(torch.zeros((2, len(spec.channels), *form.input_size(size))))
    try:
        return torch.export.export(model, (batch,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    except Exception as error:  # whatever the network does that cannot be exported
        raise ModelFileError(f"{name} cannot be exported for patches of {size}: {str(error).splitlines()[0]}") from error
