"""Letting modules be in evaluation mode, and on a device, for as long as somebody makes predictions with them."""

import contextlib
import itertools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import ModeError
from ..runtime.forks import in_forked_process

__all__ = ["evaluating", "home_of"]


@dataclass
class _Borrowed:
    """What a module was like before the first of those that use it now."""

    module: nn.Module
    was_training: bool
    home: torch.device | None = None
    """Where it was, if it was moved."""
    users: int = 0


# Threads may share a module, or a part of one, so that only the last one may bring it back.
_borrowed: dict[int, _Borrowed] = {}
lock = threading.Lock()


@contextlib.contextmanager
def evaluating(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Let modules be on a device and in evaluation mode. When nobody uses them any more, they are as they were.

    Raises:
        ModeError: if one is in use on another device.
    """
    parts = {id(part): part for module in modules for part in module.modules()}
    with lock:
        for module in modules:
            if home_of(module) not in (None, device) and any(id(part) in _borrowed for part in module.modules()):
                raise ModeError(
                    f"the model {type(module).__name__} is being used on {home_of(module)} by another thread, and so cannot be"
                    f" moved to {device}: wait for it, or use a copy"
                )
        for number, part in parts.items():
            _borrowed.setdefault(number, _Borrowed(part, part.training)).users += 1
    try:
        with lock:
            for module in modules:
                _prepare(module, device)
        yield
    finally:
        with lock:
            _give_back(parts)


def _prepare(module: nn.Module, device: torch.device) -> None:
    home = home_of(module)
    if home is not None and home != device:
        _borrowed[id(module)].home = home  # first, since it may fail halfway
        module.to(device)
    if any(part.training for part in module.modules()):
        with contextlib.suppress(NotImplementedError):  # exported programs have no modes
            module.eval()


def _give_back(numbers: dict[int, nn.Module]) -> None:
    used = [_borrowed[number] for number in numbers if number in _borrowed]  # not in a process that was forked meanwhile
    for use in used:
        use.users -= 1
    free = [use for use in used if not use.users]
    for use in free:
        del _borrowed[id(use.module)]
        use.module.training = use.was_training
    for use in free:
        if use.home is not None:
            use.module.to(use.home)


def home_of(module: nn.Module) -> torch.device | None:
    """Say where a module's weights are; None where it has none."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return next((tensor.device for tensor in tensors), None)


@in_forked_process
def _start_anew() -> None:
    """In a forked process: threads that make predictions, and may hold the lock, are not there any more."""
    global lock
    lock = threading.Lock()
    _borrowed.clear()
