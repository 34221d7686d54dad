"""By what code of one's own is known: all source that it may use, and the weights that are kept beside it."""

import ast
import importlib.util
import sys
import sysconfig
from collections.abc import Iterator, Mapping
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
    return dict(sorted(found.items()))


def weights_in(module: ModuleType) -> dict[str, Any]:
    """Give what a module keeps that holds networks or arrays."""
    return {name: value for name, value in sorted(vars(module).items()) if not name.startswith("__") and _holds_weights(value)}


def _file_of(name: str) -> Path | None:
    module, parent = sys.modules.get(name), name.rpartition(".")[0]
    place = getattr(module, "__file__", None)
    if module is None and (not parent or parent in sys.modules):
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError, AttributeError):
            return None
        place = None if spec is None or not spec.has_location else spec.origin
    if place is None or name.partition(".")[0] == OWN_NAME:
        return None
    path = Path(place).resolve()
    is_installed = any(path.is_relative_to(folder) for folder in INSTALLED) or "site-packages" in path.parts
    return None if is_installed or not path.is_file() else path


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


def _holds_weights(value: Any, depth: int = 0) -> bool:
    if isinstance(value, Tensor | nn.Module | np.ndarray):
        return True
    if depth == DEEPEST or isinstance(value, type | ModuleType | str):
        return False
    if isinstance(value, Mapping):
        return any(_holds_weights(each, depth + 1) for each in value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return any(_holds_weights(each, depth + 1) for each in value)
    return any(_holds_weights(each, depth + 1) for each in getattr(value, "__dict__", {}).values())
