"""What tells one function or class from another: the file that it is in, its source, or else its compiled code."""

import contextlib
import dis
import functools
import inspect
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from .files import hash_of_path

__all__ = [
    "compiled",
    "find_modules_here",
    "fingerprint_of_file",
    "is_of_library",
    "name_in_code",
    "parts_of_class",
    "source_of",
    "used_beside",
    "without_addresses",
]


OF_CODE = (FunctionType, BuiltinFunctionType, type, ModuleType)


def find_modules_here() -> None:
    """Let modules of the present folder be imported, as `python -m` does."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)


def fingerprint_of_file(thing: Any) -> str | None:
    """Know a class or a function by the source file that it is in; None where there is no such file."""
    try:
        path = inspect.getsourcefile(thing)
        if path is None:
            return None
        state = Path(path).stat()
        return _hash_of_file(path, state.st_mtime_ns, state.st_size)
    except (OSError, TypeError):
        return None


@functools.lru_cache(4096)
def _hash_of_file(path: str, modified_ns: int, size: int) -> str:
    return hash_of_path(Path(path))


def name_in_code(thing: Any) -> str:
    """Give the full name of a function or class; a script has another one in processes that are started by it."""
    module = "__main__" if thing.__module__ == "__mp_main__" else thing.__module__
    return f"{module}.{thing.__qualname__}"


def parts_of_class(kind: type) -> Iterator[tuple[str, Any]]:
    """Give the functions of a class, with those that they wrap, and the values that it has."""
    for name, given in sorted(vars(kind).items()):
        if isinstance(given, property):
            parts = [given.fget, given.fset, given.fdel]
        else:
            wrapped = [getattr(given, key, None) for key in ("__func__", "__wrapped__", "func")]
            functions = [each for each in (given, *wrapped) if isinstance(each, FunctionType)]
            parts = [*dict.fromkeys(functions), *([given] if not functions or _holds_more(given) else [])]
        for part in parts:
            if isinstance(part, FunctionType) or not name.startswith("__"):
                yield name, part


def _holds_more(given: Any) -> bool:
    """Whether what wraps a function of a class may hold something beside it."""
    if isinstance(given, functools.partial | functools.partialmethod | MethodType):
        return True
    return not isinstance(given, FunctionType | staticmethod | classmethod) and type(given).__module__ != "functools"


def source_of(function: Callable) -> str:
    """Give the source of a function; with its compiled code where it is a lambda, of which a line may have more, or has none."""
    code = function.__code__
    described = without_addresses(repr(_described(code)))
    # Other texts may go by this name too, whose lines would be found: from Python 3.13 on, what `python -c` was given.
    if code.co_filename == "<string>":
        return described
    with contextlib.suppress(OSError, TypeError):
        # Of the code, since of a function the source would be that of what it wraps.
        return inspect.getsource(code) + (described if code.co_name == "<lambda>" else "")
    return described


def _described(part: Any) -> Any:
    """Describe compiled code, and what is in it, the same in each process and wherever it stands in a text."""
    if isinstance(part, CodeType):
        return [part.co_code, part.co_names, [_described(constant) for constant in part.co_consts]]
    if isinstance(part, frozenset):
        return sorted(map(repr, part))
    return [_described(each) for each in part] if isinstance(part, tuple) else part


def compiled(function: FunctionType) -> str:
    """Give the compiled code of a function, which is what runs, whatever its file says by now."""
    return without_addresses(repr(_described(function.__code__)))


def used_beside(function: FunctionType) -> dict[str, Any]:
    """Give what a function uses of what its module holds: values, and functions, classes and modules of the user's."""
    found, codes = {}, [function.__code__]
    while codes:
        code = codes.pop()
        codes += [each for each in code.co_consts if isinstance(each, CodeType)]
        for names in _chains(code):
            name, *attributes = names
            # Such as the name of a module, which a script has another of in other processes; or what comes with Python.
            if re.fullmatch("__.*__", name) or name not in function.__globals__:
                continue
            value = function.__globals__[name]
            for attribute in (None, *attributes):
                if attribute is not None:
                    if not isinstance(value, ModuleType) or is_of_library(value) or not hasattr(value, attribute):
                        break
                    name, value = f"{name}.{attribute}", getattr(value, attribute)
                if not isinstance(value, OF_CODE) or (
                    isinstance(value, FunctionType | type | ModuleType) and not is_of_library(value)
                ):
                    found[name] = value
    return dict(sorted(found.items()))


def _chains(code: CodeType) -> Iterator[list[str]]:
    """Give the variables of its module that code uses, each with what follows it behind dots.

    Of names in the code others are attributes, and may be those of variables by chance.
    """
    chain: list[str] = []
    for each in dis.get_instructions(code):
        if each.opname == "EXTENDED_ARG":
            continue
        if each.opname in ("LOAD_ATTR", "LOAD_METHOD") and chain:
            chain.append(each.argval)
            continue
        if chain:
            yield chain
        chain = [each.argval] if each.opname in ("LOAD_GLOBAL", "LOAD_NAME") else []
    if chain:
        yield chain


def is_of_library(thing: Any) -> bool:
    """Whether a function, a class or a module comes with Python, or was installed: it is known by its file, if at all."""
    module = thing if isinstance(thing, ModuleType) else sys.modules.get(thing.__module__)
    path = getattr(module, "__file__", None)
    if path is None:
        return module is not None and module.__name__ in sys.builtin_module_names
    place = Path(path)
    is_installed = not {"site-packages", "dist-packages"}.isdisjoint(place.parts)
    return is_installed or any(place.is_relative_to(folder) for folder in _library_folders())


@functools.cache
def _library_folders() -> list[str]:
    own = str(Path(__file__).parents[1])
    return [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), own]


def without_addresses(text: str) -> str:
    """Leave out what differs between processes where a text tells of objects."""
    return re.sub(r"0x[0-9a-f]+|[./]?___torch_mangle_\d+", "", text)
