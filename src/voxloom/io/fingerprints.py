"""What tells one prediction from another: the models and the options, in a form that can be written down.

A model is known by its weights, and by the source file of its class. What it finds elsewhere, such as in files that it reads or
in variables of other modules, is not looked at: `model_name` stands for what a fingerprint cannot tell.
"""

import contextlib
import functools
import hashlib
import inspect
import io
import json
import math
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import CodeType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .arrays import hash_of, raw_bytes
from .files import hash_of_path
from .protocols import Json

__all__ = ["differences", "fingerprint_of_code", "fingerprint_of_model", "fingerprint_of_option", "state_of_model"]


def fingerprint_of_model(model: Callable, name: str | None = None) -> Json:
    """Know a model by a name, or a module by its weights, its settings and its code; None for a function without a name.

    Of the settings count those that PyTorch prints, and the attributes that are called as the arguments of a constructor are:
    others may change while a model runs.
    """
    if name is not None:
        return {"name": name}
    if not isinstance(model, nn.Module):
        return None
    if isinstance(model, torch.jit.ScriptModule):
        return {"class": "torch.jit.ScriptModule", "sha256": hash_of(_parts_of_script(model))}
    digest = hashlib.sha256(_without_addresses(repr(model)).encode())
    files: set[str] = set()
    for where, part in model.named_modules():
        digest.update(f"{where} {_settings_of(part)} {getattr(part, 'code', '')}".encode())
        files.add(fingerprint_of_code(type(part)) or "")
    digest.update("".join(sorted(files)).encode())
    values = dict(model.state_dict()) | dict(model.named_buffers())  # with those that are not part of a checkpoint
    for key, value in sorted(values.items()):
        digest.update(f"{key} {getattr(value, 'dtype', type(value))} {getattr(value, 'shape', '')}".encode())
        digest.update(raw_bytes(value) if isinstance(value, Tensor) else repr(value).encode())
    return {"class": f"{type(model).__module__}.{type(model).__qualname__}", "sha256": digest.hexdigest()}


def _parts_of_script(model: torch.jit.ScriptModule) -> Iterator[str]:
    """Give what a scripted model would be saved as, without what differs each time that it is scripted."""
    with zipfile.ZipFile(io.BytesIO(model.save_to_buffer())) as archive:
        for name in archive.namelist():
            if re.search(r"/(data|constants)(/|\.pkl$)|/code/.*\.py$", name):
                yield _without_addresses(name.partition("/")[2])
                yield _without_addresses(archive.read(name).decode("latin-1"))


def _settings_of(part: nn.Module) -> list[tuple[str, Any]]:
    arguments = inspect.signature(type(part).__init__).parameters
    return [(name, vars(part)[name]) for name in arguments if name in vars(part) and _is_plain(vars(part)[name])]


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def state_of_model(model: Callable) -> Json:
    """Say quickly what is nearly certain to differ where the fingerprint does, once a model has been changed.

    Neither addresses nor versions of tensors would do: what is written to `tensor.data` changes neither.
    """
    if not isinstance(model, nn.Module):
        return None
    settings = [] if isinstance(model, torch.jit.ScriptModule) else [_settings_of(part) for part in model.modules()]
    return settings, [_sums_of(tensor) for tensor in (*model.parameters(), *model.buffers())]


def _sums_of(tensor: Tensor) -> Json:
    if tensor.is_meta:
        return None
    values = tensor.detach().reshape(-1)
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(values.element_size())
    numbers = values.view(whole) if whole is not None else torch.view_as_real(values).view(torch.int64)
    return tensor.data_ptr(), int(numbers.sum(dtype=torch.int64)), int(numbers[1::2].sum(dtype=torch.int64))


def fingerprint_of_code(thing: Any) -> str | None:
    """Know a class or a function by the source file that it is in; None where there is no such file."""
    try:
        path = inspect.getsourcefile(thing)
        return None if path is None else hash_of_path(Path(path))
    except (OSError, TypeError):
        return None


def fingerprint_of_option(value: Any) -> Json:
    """Write an option down: numbers and texts as they are, functions by their source and what it uses, objects by their state."""
    if value is None or isinstance(value, bool | int | float | str):
        return value if not isinstance(value, float) or math.isfinite(value) else repr(value)
    if isinstance(value, np.ndarray | Tensor):
        array = torch.as_tensor(value)
        return hash_of([f"{array.dtype} {tuple(array.shape)}", raw_bytes(array)])
    if isinstance(value, nn.Module):
        return fingerprint_of_model(value)
    if id(value) in _AT_HAND:
        return "itself"
    _AT_HAND.add(id(value))
    try:
        return _fingerprint_of_parts(value)
    finally:
        _AT_HAND.discard(id(value))


_AT_HAND: set[int] = set()
"""Objects that a fingerprint is being made of: what holds itself would have no end."""


def _fingerprint_of_parts(value: Any) -> Json:
    if isinstance(value, Mapping):
        return {str(key): fingerprint_of_option(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [fingerprint_of_option(item) for item in value]
    if isinstance(value, functools.partial):
        return [fingerprint_of_option(part) for part in (value.func, value.args, value.keywords)]
    if inspect.ismethod(value):
        return [fingerprint_of_option(value.__self__), value.__qualname__]
    if inspect.isfunction(value):
        used = [cell.cell_contents for cell in value.__closure__ or ()]
        state = _state_of([used, value.__defaults__, value.__kwdefaults__])
        return f"{value.__module__}.{value.__qualname__} {hash_of([_source_of(value), state])[:16]}"
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    return f"{name} {hash_of([fingerprint_of_code(type(value)) or '', _state_of(value)])[:16]}"


def _source_of(function: Callable) -> str:
    code = function.__code__
    # Other texts may go by this name too, whose lines would be found: from Python 3.13 on, what `python -c` was given.
    if code.co_filename != "<string>":
        with contextlib.suppress(OSError, TypeError):
            return inspect.getsource(function)
    return _without_addresses(repr(_described(code)))


def _described(part: Any) -> Any:
    """Describe compiled code, and what is in it, the same in each process and wherever it stands in a text."""
    if isinstance(part, CodeType):
        return [part.co_code, part.co_names, [_described(constant) for constant in part.co_consts]]
    if isinstance(part, frozenset):
        return sorted(map(repr, part))
    return [_described(each) for each in part] if isinstance(part, tuple) else part


def _state_of(value: Any) -> bytes:
    """Give what an object holds: as it is pickled; or, where it cannot be, by the fingerprints of its parts."""
    try:
        return pickle.dumps(value)
    except Exception:  # noqa: BLE001 - whatever an object of the user's raises
        parts = value if isinstance(value, list) else getattr(value, "__dict__", None)
        told = _without_addresses(repr(value)) if parts is None else json.dumps(fingerprint_of_option(parts), sort_keys=True)
        return told.encode()


def _without_addresses(text: str) -> str:
    return re.sub(r"0x[0-9a-f]+|[./]?___torch_mangle_\d+", "", text)


def differences(recorded: Json, now: Json, path: str = "") -> list[str]:
    """Say where two fingerprints differ, each with both values."""
    if isinstance(recorded, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*recorded, *now])
        return [
            text
            for key in keys
            for text in differences(recorded.get(key, "nothing"), now.get(key, "nothing"), f"{path}.{key}" if path else str(key))
        ]
    return [] if recorded == now else [f"{path} was {recorded} and is {now}"]
