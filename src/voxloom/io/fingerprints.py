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
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .arrays import hash_of, raw_bytes
from .code import fingerprint_of_class, fingerprint_of_file, source_of, used_beside, without_addresses
from .protocols import Json

__all__ = ["differences", "fingerprint_of_model", "fingerprint_of_option", "state_of_model"]


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
    digest = hashlib.sha256(without_addresses(repr(model)).encode())
    files: set[str] = set()
    for where, part in model.named_modules():
        digest.update(f"{where} {_settings_of(part)} {getattr(part, 'code', '')}".encode())
        files.add(fingerprint_of_file(type(part)) or fingerprint_of_class(type(part)))
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
                yield without_addresses(name.partition("/")[2])
                yield without_addresses(archive.read(name).decode("latin-1"))


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


def fingerprint_of_option(value: Any, with_files: bool = False) -> Json:
    """Write an option down: numbers and texts as they are, functions by their source and what it uses, objects by their state.

    Args:
        value: the option.
        with_files: know functions by the files that they are in, too, since they may use what stands beside them.
    """
    return _Teller(with_files).tell(value)


class _Teller:
    """Writes options down, however they are nested."""

    def __init__(self, with_files: bool) -> None:
        self._with_files = with_files
        self._at_hand: set[int] = set()
        """Objects that are being written down: what holds itself would have no end."""

    def tell(self, value: Any) -> Json:
        """Write an option down."""
        if value is None or isinstance(value, bool | int | float | str):
            return value if not isinstance(value, float) or math.isfinite(value) else repr(value)
        if isinstance(value, np.ndarray | Tensor) and not _holds_objects(value):
            array = torch.as_tensor(value)
            return hash_of([f"{array.dtype} {tuple(array.shape)}", raw_bytes(array)])
        if isinstance(value, nn.Module):
            return fingerprint_of_model(value)
        if id(value) in self._at_hand:
            return "itself"
        self._at_hand.add(id(value))
        try:
            return self._of_parts(value)
        finally:
            self._at_hand.discard(id(value))

    def _of_parts(self, value: Any) -> Json:
        if isinstance(value, Mapping):
            return {str(key): self.tell(item) for key, item in value.items()}
        if isinstance(value, tuple | list):
            return [self.tell(item) for item in value]
        if isinstance(value, set | frozenset):
            return sorted(json.dumps(self.tell(item), sort_keys=True) for item in value)  # their order is that of the process
        if isinstance(value, functools.partial):
            return [self.tell(part) for part in (value.func, value.args, value.keywords)]
        if inspect.ismethod(value):
            return [self.tell(value.__self__), value.__qualname__]
        if inspect.isfunction(value):
            return f"{value.__module__}.{value.__qualname__} {self._of_function(value)[:16]}"
        if isinstance(value, type):
            return f"{value.__module__}.{value.__qualname__} {fingerprint_of_class(value)[:16]}"
        kind = type(value)
        wrapped = getattr(value, "__wrapped__", None) if kind.__module__ == "functools" else None  # of one that keeps results
        state = self._state_of(value) if wrapped is None else json.dumps(self.tell(wrapped))
        return f"{kind.__module__}.{kind.__qualname__} {hash_of([fingerprint_of_class(kind), state])[:16]}"

    def _of_function(self, function: FunctionType) -> str:
        used: list[Any] = []
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # one that is empty yet
                used.append(cell.cell_contents)
        told = [source_of(function), self._state_of([used, function.__defaults__, function.__kwdefaults__])]
        if self._with_files:
            file = fingerprint_of_file(function)
            told.append(json.dumps(self.tell(used_beside(function))) if file is None else file)
        return hash_of(told)

    def _state_of(self, value: Any) -> bytes:
        """Give what an object holds: as it is pickled; or, where it cannot be, by the fingerprints of its parts."""
        try:
            return _pickled(value, self)
        except Exception:  # noqa: BLE001 - whatever an object of the user's raises
            parts = value if isinstance(value, list) else getattr(value, "__dict__", None)
            told = without_addresses(repr(value)) if parts is None else json.dumps(self.tell(parts), sort_keys=True)
            return told.encode()


def _holds_objects(value: np.ndarray | Tensor) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind not in "biufc"


class _StatePickler(pickle.Pickler):
    """Pickles what an object holds; what would be named alone, or differ between processes, as a fingerprint tells it."""

    def __init__(self, file: io.BytesIO, teller: _Teller) -> None:
        super().__init__(file)
        self.fast = True  # or it would matter whether two parts are one, or are equal
        self._teller = teller

    def persistent_id(self, thing: Any) -> str | None:
        """Give what is pickled in place of a part; None for the part itself."""
        is_told = isinstance(thing, FunctionType | type | set | frozenset | Tensor | nn.Module)
        if is_told or (isinstance(thing, np.ndarray) and not _holds_objects(thing)):
            return json.dumps(self._teller.tell(thing), sort_keys=True)
        return None


def _pickled(value: Any, teller: _Teller) -> bytes:
    buffer = io.BytesIO()
    _StatePickler(buffer, teller).dump(value)
    return buffer.getvalue()


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
