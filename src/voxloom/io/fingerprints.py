"""What tells one prediction from another: the models and the options, in a form that can be written down.

A model is known by its weights, and by the source file of its class. What it finds elsewhere, such as in files that it reads or
in variables of other modules, is not looked at: `model_name` stands for what a fingerprint cannot tell.
"""

import abc
import contextlib
import enum
import functools
import hashlib
import inspect
import io
import json
import logging
import math
import pickle
import random
import re
import zipfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType, GetSetDescriptorType, MemberDescriptorType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .arrays.memory import hash_of, raw_bytes
from .code import (
    compiled,
    fingerprint_of_file,
    is_of_library,
    name_in_code,
    parts_of_class,
    source_of,
    used_beside,
    without_addresses,
)
from .protocols import Json

# Attributes that each module has: weights and parts are told otherwise, and hooks are of PyTorch.
OF_MODULES = {*vars(nn.Module()), "_is_full_backward_hook"}

# What is drawn from, or told to, is no part of what is made.
OF_CHANCE = (
    random.Random,
    np.random.Generator,
    np.random.RandomState,
    np.random.BitGenerator,
    np.random.SeedSequence,
    torch.Generator,
    logging.Logger,
    io.IOBase,
)
# What would be pickled by its name alone, or is another one in each process.
TOLD = (FunctionType, type, set, frozenset, ModuleType, enum.Enum, *OF_CHANCE)
# What Python itself keeps in a class.
OF_CLASSES = (MemberDescriptorType, GetSetDescriptorType, type(vars(abc.ABC)["_abc_impl"]))

__all__ = ["differences", "fingerprint_of_model", "fingerprint_of_option", "is_setting", "state_of_model"]


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
        files.add(fingerprint_of_file(type(part)) or json.dumps(_Teller(with_files=False).tell(type(part))))
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

    def __init__(self, with_files: bool, apart: dict[int, tuple[Any, Json]] | None = None) -> None:
        self._with_files = with_files
        self._apart: dict[int, tuple[Any, Json]] = {} if apart is None else apart
        """What has been written down as if it were alone."""
        self._at_hand: set[int] = set()
        """Objects that are being written down: what holds itself would have no end."""
        self._told: dict[int, tuple[Any, Json]] = {}
        """What has been written down, since many may hold it. They are kept, so that no other has their number."""

    def tell(self, value: Any) -> Json:
        """Write an option down."""
        is_member = isinstance(value, enum.Enum)
        if value is None or (isinstance(value, bool | int | str) and not is_member):
            return value
        if isinstance(value, float) and not is_member:
            return value if math.isfinite(value) else f"float {value!r}"
        if id(value) in self._told:
            return self._told[id(value)][1]
        if id(value) in self._at_hand:
            return "itself"
        self._at_hand.add(id(value))
        try:
            told = self._of_parts(value)
        finally:
            self._at_hand.discard(id(value))
        self._told[id(value)] = value, told
        return told

    def _told_apart(self, value: Any) -> Json:
        """Write down what is part of a set, once, as if it were alone."""
        if id(value) in self._apart:
            return self._apart[id(value)][1]
        self._apart[id(value)] = value, "itself"
        told = _Teller(self._with_files, self._apart).tell(value)
        self._apart[id(value)] = value, told
        return told

    def _of_parts(self, value: Any) -> Json:
        if _is_array(value):
            return _hash_of_array(value)
        if isinstance(value, OF_CHANCE):
            return name_in_code(type(value))
        if isinstance(value, enum.Enum):
            return [self.tell(type(value)), value.name, self.tell(value.value)]
        if isinstance(value, nn.Module):
            told = fingerprint_of_model(value)
            return [told, self._settings_of_parts(value)] if self._with_files else told
        if isinstance(value, Mapping):
            items = {key if isinstance(key, str) else f"key {json.dumps(self.tell(key))}": self.tell(value[key]) for key in value}
            return items if type(value) is dict else [self.tell(type(value)), items]
        if isinstance(value, tuple | list):
            each = [self.tell(item) for item in value]
            return each if type(value) in (tuple, list) else [self.tell(type(value)), each]
        if isinstance(value, set | frozenset):
            # Their order is that of the process, so that none is told by what was told before.
            return sorted(json.dumps(self._told_apart(item), sort_keys=True) for item in value)
        if isinstance(value, functools.partial):
            return [self.tell(part) for part in (value.func, value.args, value.keywords)]
        if isinstance(value, ModuleType):
            file = fingerprint_of_file(value) if self._with_files and not is_of_library(value) else ""
            return f"module {value.__name__} {file}".rstrip()
        if inspect.ismethod(value):
            return [self.tell(value.__self__), value.__qualname__]
        if inspect.isfunction(value):
            return f"{name_in_code(value)} {self._of_function(value)[:16]}"
        if isinstance(value, type):
            return f"{name_in_code(value)} {self._of_class(value)[:16]}"
        kind = type(value)
        wrapped = getattr(value, "__wrapped__", None) if kind.__module__ == "functools" else None  # of one that keeps results
        state = self._state_of(value) if wrapped is None else json.dumps(self.tell(wrapped))
        return f"{name_in_code(kind)} {hash_of([json.dumps(self.tell(kind)), state])[:16]}"

    def _of_function(self, function: FunctionType) -> str:
        told = [source_of(function), self._state_of(_held_by(function))]
        if self._with_files:
            file = fingerprint_of_file(function)
            used = self.tell(_used(function)) if file is None else self._used_by(function)
            told.append(json.dumps([file, compiled(function), used], sort_keys=True))
        return hash_of(told)

    def _used_by(self, thing: FunctionType | type) -> Json:
        """Say what a function or a class that is in a file uses of the user's, and what that uses in turn."""
        found: list[Json] = []
        seen, waiting = set[int](), deque([thing])
        while waiting:
            each = waiting.popleft()
            if id(each) in seen or is_of_library(each):
                continue
            seen.add(id(each))
            held = _used_by_class(each) if isinstance(each, type) else _used(each)
            others = {key: value for key, value in held.items() if isinstance(value, FunctionType | type)}
            in_files = {key: value for key, value in others.items() if fingerprint_of_file(value) is not None}
            waiting.extend(in_files.values())
            values = {key: self.tell(value) for key, value in held.items() if key not in in_files}
            names = {key: name_in_code(value) for key, value in in_files.items()}
            parts = [part for _, part in parts_of_class(each)] if isinstance(each, type) else [each]
            functions = [part for part in parts if isinstance(part, FunctionType)]
            state = (
                "" if each is thing and not isinstance(thing, type) else hash_of(map(self._state_of, map(_held_by, functions)))
            )
            # A file may have been changed since it was imported.
            codes = hash_of(map(compiled, functions))
            found.append([name_in_code(each), fingerprint_of_file(each), codes, state, values, names])
        return found

    def _settings_of_parts(self, module: nn.Module) -> Json:
        """Say what a module that makes subjects holds beside weights: unlike a model it may hold it under any name."""
        found = []
        for where, part in module.named_modules():
            own = {name: value for name, value in vars(part).items() if name not in OF_MODULES and is_setting(value)}
            found.append([where, self.tell(own), self.tell(type(part))])
        return found

    def _of_class(self, kind: type) -> str:
        """Know a class by the source files of it and of those that it is made from; one without a file, by its parts."""
        told = []
        for each in kind.__mro__[:-1]:  # but for `object`
            file = fingerprint_of_file(each)
            parts = [(name, self.tell(part)) for name, part in parts_of_class(each)] if _is_own(each, file) else None
            told.append(file or json.dumps([name_in_code(each), parts], sort_keys=True))
            if file is not None and self._with_files:
                told.append(json.dumps(self._used_by(each), sort_keys=True))
        return hash_of(told)

    def _state_of(self, value: Any) -> bytes:
        """Give what an object holds: as it is pickled; or, where it cannot be, by the fingerprints of its parts."""
        try:
            buffer = io.BytesIO()
            _StatePickler(buffer, self).dump(value)
            return buffer.getvalue()
        except Exception:  # noqa: BLE001 - whatever an object of the user's raises
            parts = value if isinstance(value, list) else _attributes_of(value)
        try:
            return (json.dumps(self.tell(parts), sort_keys=True) if parts else without_addresses(repr(value))).encode()
        except RecursionError:
            return b"deeper than can be looked into"


def is_setting(value: Any) -> bool:
    """Whether a value that an object holds may be what it was made with: no generator, nor what is found out while it is used."""
    is_empty = value is None or (isinstance(value, list | dict | set | tuple) and not value)
    return not is_empty and not isinstance(value, OF_CHANCE)


def _used(function: FunctionType) -> dict[str, Any]:
    """Give what a function uses beside itself, as far as it may matter to what it makes."""
    return {name: value for name, value in used_beside(function).items() if is_setting(value)}


def _held_by(function: FunctionType) -> list[Any]:
    """Give what a function was made with: what it has of the function around it, its defaults, and its attributes."""
    cells: list[Any] = []
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # one that is empty yet
            cells.append(cell.cell_contents)
    attributes = {name: value for name, value in vars(function).items() if name != "__wrapped__"}
    return [cells, function.__defaults__, function.__kwdefaults__, *([attributes] if attributes else [])]


def _used_by_class(kind: type) -> dict[str, Any]:
    """Give the values that a class has, and what its functions use."""
    found: dict[str, Any] = {}
    for name, part in parts_of_class(kind):
        if isinstance(part, FunctionType):
            found |= {f"{name} {key}": value for key, value in _used(part).items()}
        elif is_setting(part) and not isinstance(part, OF_CLASSES):
            found[name] = part
    if not issubclass(kind, enum.Enum):
        return found
    # Its members are told by their values, and what Python makes of them is not.
    members = {name: part.value if isinstance(part, kind) else part for name, part in found.items()}
    return {name: part for name, part in members.items() if not name.startswith("_")}
    return found


def _is_own(kind: type, file: str | None) -> bool:
    """Whether a class was written in Python, and is in no file."""
    return file is None and any(isinstance(part, FunctionType) for _, part in parts_of_class(kind))


def _is_array(value: Any) -> bool:
    """Whether the values of an array, or of a tensor, can be told by their bytes."""
    if isinstance(value, np.ndarray):
        return not value.dtype.hasobject
    is_plain = isinstance(value, Tensor) and value.layout == torch.strided
    return is_plain and not value.is_meta and not value.is_quantized


def _hash_of_array(value: np.ndarray | Tensor) -> str:
    if isinstance(value, np.ndarray):
        return hash_of([f"{value.dtype.str} {value.shape}", np.ascontiguousarray(value).tobytes()])
    return hash_of([f"{value.dtype} {tuple(value.shape)}", raw_bytes(value)])


def _attributes_of(value: Any) -> dict[str, Any]:
    found = {}
    for kind in type(value).__mro__:
        given = vars(kind).get("__slots__", ())
        for name in (given,) if isinstance(given, str) else given:
            is_hidden = name.startswith("__") and not name.endswith("__")
            full = f"_{kind.__name__.lstrip('_')}{name}" if is_hidden else name
            if hasattr(value, full):
                found[full] = getattr(value, full)
    return {**found, **getattr(value, "__dict__", {})}


class _StatePickler(pickle.Pickler):
    """Pickles what an object holds; what would be named alone, or differ between processes, as a fingerprint tells it."""

    def __init__(self, file: io.BytesIO, teller: _Teller) -> None:
        super().__init__(file)
        self._teller = teller

    def persistent_id(self, thing: Any) -> str | None:
        """Give what is pickled in place of a part; None for the part itself."""
        is_told = isinstance(thing, TOLD) or _is_array(thing)
        return json.dumps(self._teller.tell(thing), sort_keys=True) if is_told else None


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
