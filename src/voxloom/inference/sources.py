"""By what code of one's own is known: all source that it may use, and the weights that are kept beside it."""

import ast
import importlib.util
import sys
import sysconfig
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from torch import Tensor, nn

__all__ = ["files_of", "weights_in"]

INSTALLED = {Path(sysconfig.get_path(kind)).resolve() for kind in ("stdlib", "platstdlib", "purelib", "platlib")}
OWN_NAME = __name__.partition(".")[0]
DEEPEST = 8


def files_of(name: str) -> dict[str, Path]:
    """Find the files of a module and of all that it imports, also within functions, but for packages that are installed."""
    found: dict[str, Path] = {}
    waiting = [name]
    while waiting:
        each = waiting.pop()
        path = None if each in found else _file_of(each)
        if path is not None:
            found[each] = path
            waiting += _imported_by(each, path)
            waiting += [name for name in sys.modules if name.startswith(f"{each}.")]  # however a package imports its own
    return dict(sorted(found.items()))


def weights_in(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """Give the networks and arrays that a module keeps, also within collections and objects, and where they are."""
    values = {name: value for name, value in sorted(vars(module).items()) if not name.startswith("__")}
    yield from _weights_of(values, "", set())


def _file_of(name: str) -> Path | None:
    module = sys.modules.get(name)
    spec = _spec_of(name) if module is None else None
    place = getattr(module, "__file__", None) if spec is None else spec.origin
    if place is None or name.partition(".")[0] == OWN_NAME:
        return None
    path = Path(place).resolve()
    is_installed = any(map(path.is_relative_to, INSTALLED)) or not {"site-packages", "dist-packages"}.isdisjoint(path.parts)
    return None if is_installed or not path.is_file() else path


def _spec_of(name: str) -> ModuleSpec | None:
    """Find a module without importing the packages that it is in."""
    parent = name.rpartition(".")[0]
    try:
        if not parent or parent in sys.modules:
            return importlib.util.find_spec(name)
        package = _spec_of(parent)
        return None if package is None else PathFinder.find_spec(name, package.submodule_search_locations or [])
    except (ImportError, ValueError, AttributeError):
        return None


def _imported_by(name: str, path: Path) -> Iterator[str]:
    """Give whatever may be the name of a module that a source file imports, and packages that it is in."""
    if path.suffix != ".py":
        return
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    names = [name]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            try:
                base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            except ImportError:
                continue
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    for each in names:
        parts = each.split(".")
        yield from (".".join(parts[:count]) for count in range(1, len(parts) + 1))


def _weights_of(value: Any, where: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    if id(value) in seen or isinstance(value, type | ModuleType | str | bytes):
        return
    seen.add(id(value))
    if isinstance(value, Tensor | nn.Module | np.ndarray):
        yield where, value
    elif isinstance(value, dict | list | tuple):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        for number, (key, part) in enumerate(parts):
            yield from _weights_of(part, f"{where}.{key if isinstance(key, str) else number}", seen)
    elif isinstance(getattr(value, "__dict__", None), dict) and where.count(".") < DEEPEST:
        yield from _weights_of(vars(value), where, seen)
