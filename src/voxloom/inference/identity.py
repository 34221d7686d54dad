"""What tells one prediction from another: the input, the models and the options, in a form that can be written down."""

import functools
import hashlib
import inspect
import io
import json
import logging
import math
import re
import types
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.boxes import Box
from ..sampling.padded import Voxels
from ..volumes.image import Image

__all__ = ["content_hashes", "differences", "hash_of_file", "identity_of_model", "identity_of_option", "identity_of_volume"]

# Voxels of an array that are hashed at a time.
CHUNK_VOXELS = 2**20
# What tells scripted classes and functions of one process apart.
PASSING = re.compile(r"[./]?___torch_mangle_\d+")

Json = Any


def identity_of_volume(volume: Voxels) -> Json:
    """Identify a volume: files by size, time and header, and what is in memory by a hash of its values."""
    if not isinstance(volume, Image):
        return {"sha256": _hash(_bytes_of(volume)), "shape": list(volume.shape), "dtype": str(volume.dtype)}
    header = [repr(volume.shape), repr(volume.dtype), volume.affine.tobytes(), repr(volume.codes)]
    if not volume.can_be_reloaded:
        return {"sha256": _hash(_bytes_of(volume)), "header_sha256": _hash(header)}
    states = [path.stat() for path in _files_of(volume)]
    return {
        "bytes": sum(state.st_size for state in states),
        "modified_ns": max(state.st_mtime_ns for state in states),
        "header_sha256": _hash(header),
    }


def content_hashes(volumes: Iterable[Voxels]) -> dict[str, str]:
    """Hash the files that volumes are read from, by name; not those that are in memory."""
    files = [path for volume in volumes if isinstance(volume, Image) and volume.can_be_reloaded for path in _files_of(volume)]
    return {str(path): hash_of_file(path) for path in dict.fromkeys(files)}


def _files_of(image: Image) -> list[Path]:
    paths = image.path if isinstance(image.path, list) else [image.path]
    files = []
    for path in paths:
        assert path is not None
        files += sorted(part for part in path.iterdir() if part.is_file()) if path.is_dir() else [path]
    return files


def _bytes_of(volume: Voxels) -> Iterable[Any]:
    shape = volume.spatial_shape
    planes = max(1, CHUNK_VOXELS // (volume.num_channels * shape[1] * shape[2]))
    for start in range(0, shape[0], planes):
        values = volume.read(Box((start, 0, 0), (min(start + planes, shape[0]), *shape[1:])))
        yield _raw(values)


def _raw(values: Tensor) -> Any:
    contiguous = values.detach().cpu().contiguous()
    return contiguous.view(-1).view(torch.uint8).numpy() if contiguous.numel() else b""


def identity_of_model(model: Callable, name: str | None, within: tuple[Any, ...] = (), is_new: bool = False) -> Json:
    """Identify a model: by a name that the user gives, or a module by its weights. None for a function without a name.

    Args:
        model: the model.
        name: by what it is known; None for nothing.
        within: what it is a part of.
        is_new: whether it has just been made, so that its whole numbers do not count calls.
    """
    if name is not None:
        return {"name": name}
    if not isinstance(model, nn.Module):
        return None
    digest = hashlib.sha256(_without_addresses(repr(model)).encode())
    for name, part in model.named_modules():
        # Of exported and scripted modules the code is not that of the class. They keep constants where no checkpoint has them.
        digest.update(f"{name} {getattr(part, 'code', '')} {json.dumps(_attributes_of(part, (*within, model), is_new))}".encode())
    if isinstance(model, torch.jit.ScriptModule):
        digest.update(_hash(_parts_of_script(model)).encode())
    values = dict(model.state_dict()) | dict(model.named_buffers())  # with those that are not part of a checkpoint
    for key, value in sorted(values.items()):
        digest.update(f"{key} {getattr(value, 'dtype', type(value))} {getattr(value, 'shape', '')}".encode())
        digest.update(_raw(value) if isinstance(value, Tensor) else repr(value).encode())
    return {"class": f"{type(model).__module__}.{type(model).__qualname__}", "sha256": digest.hexdigest()}


def _attributes_of(part: nn.Module, within: tuple[Any, ...], is_new: bool) -> Json:
    """Write down what a module does, and the values that it keeps beside its parameters, buffers and modules.

    Objects are left out, which may change with each call. So are whole numbers but in PyTorch's own layers: others may count
    calls. Functions are left out in what PyTorch makes when it exports or traces, where they are its own.
    """
    home = type(part).__module__
    is_layer = home.startswith("torch.nn.")
    is_made = home.startswith("torch.") and not is_layer
    code = [
        f"{name} {_text_of(function.__code__)}"
        for base in type(part).__mro__
        if not base.__module__.startswith("torch.")
        for name, function in sorted(vars(base).items())
        if inspect.isfunction(function)
    ]
    own = {name: value for name, value in sorted(vars(part).items()) if name not in vars(nn.Module()) and _is_value(value)}
    told = {
        name: identity_of_option(value, within)
        for name, value in own.items()
        if (is_layer or is_new or type(value) is not int) and not (is_made and callable(value))
    }
    return [_hash(code), told]


def _is_value(value: Any) -> bool:
    if isinstance(value, tuple | list | set | frozenset):
        return all(map(_is_value, value))
    if isinstance(value, Mapping):
        return all(map(_is_value, value.values()))
    is_function = inspect.isroutine(value) and not inspect.ismethod(value)
    return (
        is_function or value is None or isinstance(value, torch.dtype | bool | int | float | complex | str | np.ndarray | Tensor)
    )


def _parts_of_script(model: torch.jit.ScriptModule) -> Iterable[str | bytes]:
    """Give what a scripted model would be saved as, without what differs each time that it is scripted."""
    with zipfile.ZipFile(io.BytesIO(model.save_to_buffer())) as archive:
        for name in archive.namelist():
            if re.search(r"/(data|constants)(/|\.pkl$)|/code/.*\.py$", name):
                yield PASSING.sub("", name.partition("/")[2])
                yield PASSING.sub("", archive.read(name).decode("latin-1"))


def identity_of_option(value: Any, within: tuple[Any, ...] = ()) -> Json:
    """Write an option down: functions by their code and what it uses, objects by their class and state.

    Args:
        value: the option.
        within: what it is a part of.
    """
    if any(value is each for each in within):
        return "itself"
    part = functools.partial(identity_of_option, within=(*within, value))
    if value is None or isinstance(value, bool | int | float | str):
        return value if not isinstance(value, float) or math.isfinite(value) else repr(value)
    if isinstance(value, Mapping):
        return {_without_addresses(str(key)): part(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [part(item) for item in value]
    if isinstance(value, set | frozenset):  # whose order differs from process to process
        return sorted(json.dumps(part(item)) for item in value)
    if isinstance(value, nn.Module):
        return identity_of_model(value, None, within)
    if isinstance(value, logging.Logger):
        return value.name
    if isinstance(value, np.ndarray) and value.dtype.hasobject:
        return part(value.tolist())
    if isinstance(value, np.ndarray):
        return _hash([f"{value.dtype} {value.shape}", np.ascontiguousarray(value).tobytes()])
    if isinstance(value, Tensor):
        return _hash([f"{value.dtype} {value.shape}", _raw(value)])
    if inspect.isfunction(value):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        used = part([value.__defaults__, value.__kwdefaults__, cells])
        return f"{value.__module__}.{value.__qualname__} {_hash([_text_of(value.__code__), json.dumps(used)])[:16]}"
    if inspect.ismethod(value):
        return [part(value.__func__), part(value.__self__)]
    if isinstance(value, functools.partial):
        return [part(each) for each in (value.func, value.args, value.keywords)]
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    slots = [slot for base in type(value).__mro__ for slot in getattr(base, "__slots__", ()) if hasattr(value, slot)]
    if (hasattr(value, "__dict__") or slots) and not isinstance(value, type | types.ModuleType):
        return {name: part(getattr(value, "__dict__", {}) | {slot: getattr(value, slot) for slot in slots})}
    return _without_addresses(repr(value))


def _text_of(code: types.CodeType) -> str:
    constants = [_text_of(item) if isinstance(item, types.CodeType) else _text_of_constant(item) for item in code.co_consts]
    return repr((code.co_code, code.co_names, constants))


def _text_of_constant(value: Any) -> str:
    # The order of a set differs from process to process.
    return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)


def _without_addresses(text: str) -> str:
    return re.sub(r"0x[0-9a-f]+", "", text)


def differences(recorded: Json, now: Json, path: str = "") -> list[str]:
    """Say where two identities differ, each with both values."""
    if isinstance(recorded, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*recorded, *now])
        return [
            text
            for key in keys
            for text in differences(recorded.get(key, "nothing"), now.get(key, "nothing"), f"{path}.{key}" if path else str(key))
        ]
    return [] if recorded == now else [f"{path} was {recorded} and is {now}"]


def _hash(parts: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()


def hash_of_file(path: Path) -> str:
    """Hash all that is in a file (SHA-256)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
