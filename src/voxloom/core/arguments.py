"""Arguments under a name that a function does not have, with the name that was probably meant."""

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

from ..errors import ArgumentNameError

__all__ = ["known_arguments"]

Function = TypeVar("Function", bound=Callable[..., Any])

# How other libraries, or the command, name what voxloom's functions take.
ELSEWHERE = {
    "overlap": "patch_overlap",
    "roi_size": "patch_size",
    "sw_batch_size": "batch_size",
    "mode": "overlap_mode",
    "num_samples": "num_patches",
    "queue_length": "max_length",
    "sw_device": "device",
    "threshold": "reduce",
    "step_size": "patch_overlap",
    "use_mirroring": "mirror_axes",
}


def known_arguments(function: Function) -> Function:
    """Let a function, or an `__init__`, say which argument was probably meant, if it is called with one that it does not have.

    Raises:
        ArgumentNameError: in place of Python's `TypeError`.
    """
    signature = inspect.signature(function)
    names = [name for name, each in signature.parameters.items() if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]

    @functools.wraps(function)
    def checked(*arguments: Any, **named: Any) -> Any:
        unknown = [name for name in named if name not in names]
        if unknown:
            is_method = names[0] == "self"
            called = type(arguments[0]).__name__ if is_method and arguments else function.__name__
            known = _arguments_of(type(arguments[0])) if is_method and arguments else names
            raise ArgumentNameError(f"{called} has no argument {unknown[0]!r}{_meant(unknown[0], known)}")
        return function(*arguments, **named)

    return cast(Function, checked)


def _arguments_of(kind: type) -> list[str]:
    """Name the arguments of a class, and of those that it hands others on to."""
    makers = [vars(each)["__init__"] for each in kind.__mro__ if "__init__" in vars(each) and each is not object]
    given = [each for maker in makers for each in inspect.signature(maker).parameters.values()]
    named = [each.name for each in given if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    return [name for name in dict.fromkeys(named) if name != "self"]


def _meant(name: str, names: list[str]) -> str:
    """Say what was probably meant."""
    if ELSEWHERE.get(name) in names:
        return f": it is called {ELSEWHERE[name]}"
    close = difflib.get_close_matches(name, names, n=2, cutoff=0.6)
    return f": did you mean {' or '.join(close)}?" if close else f", only {', '.join(names)}"
