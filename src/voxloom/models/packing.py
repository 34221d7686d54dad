"""Putting a model and its spec into one file."""

import io
import warnings
from pathlib import Path

import torch
from torch import nn

from ..errors import ModelFileError, SpecError, TargetExistsError
from ..io.saving import atomic_write
from .forms import CallForm, size_of_slices
from .loading import SPEC_FILE, load_model
from .program_check import inspected
from .spec import ModelSpec

__all__ = ["pack_model"]


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
    if target.suffix != ".pt2":
        raise ModelFileError(f"{target} must end in .pt2")
    if target.exists() and not overwrite:
        raise TargetExistsError(f"{target} exists, and is kept: remove it, choose another name, or give --overwrite")
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
        packed = io.BytesIO()
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
