"""Looking into a .pt2 file before it is loaded: loading unpickles, evaluates and resolves whatever such a file says."""

import ast
import io
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

__all__ = ["is_program", "reasons_to_refuse"]

# Calls that a graph may hold: registered operators, and arithmetic on sizes.
ARITHMETIC = (
    "add|sub|mul|truediv|floordiv|mod|pow|neg|pos|abs|eq|ne|lt|le|gt|ge|and_|or_|xor|not_|inv|invert|getitem|lshift|rshift|index"
)
TARGETS = re.compile(rf"torch\.ops\.[A-Za-z]\w*(\.(?!__)\w+){{1,2}}|_?operator\.({ARITHMETIC})|math\.[a-z]\w*|torch\.(_?sym_\w+)")
# Names in expressions of sizes: classes of sympy, and symbols such as s0, u1 and int_oo.
SYMBOLS = re.compile(r"[A-Z]\w*|[a-z]{1,3}\d+|int_oo|oo|zoo")
ATTRIBUTES = {"size", "stride", "storage_offset", "shape", "ndim", "dim", "dtype", "device"}
EXPRESSION_NODES = (
    ast.Expression,
    ast.BinOp,
    ast.UnaryOp,
    ast.BoolOp,
    ast.Compare,
    ast.Call,
    ast.keyword,
    ast.Name,
    ast.Constant,
    ast.Tuple,
    ast.operator,
    ast.unaryop,
    ast.boolop,
    ast.cmpop,
    ast.expr_context,
)


def is_program(names: list[str]) -> bool:
    """Whether the entries of an archive are those of a `torch.export` program."""
    return any(re.search(r"(^|/)models/[^/]+\.json$", name) or name == "serialized_exported_program.json" for name in names)


def reasons_to_refuse(path: Path) -> list[str]:
    """Say what in a program would run code while it is loaded or run; nothing where all is plain."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if len(set(names)) < len(names):
            return ["it holds two entries of one name, of which only one can be looked into"]
        return list(dict.fromkeys(reason for name in names for reason in _of_entry(name, archive)))


def _of_entry(name: str, archive: zipfile.ZipFile) -> Iterator[str]:
    if "data/aotinductor/" in name or name.endswith((".so", ".pyd", ".dll", ".dylib")):
        yield f"{name} is compiled code"
    elif name.endswith(".json"):
        try:
            content = json.loads(archive.read(name))
        except ValueError:
            yield f"{name} is damaged"
            return
        if name.endswith("_config.json"):
            yield from _of_payload(name, content)
        else:
            yield from _of_graph(name, content)
    elif name.endswith((".pt", ".pkl")):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of old ways to pickle
                torch.load(io.BytesIO(archive.read(name)), weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError):
            if archive.getinfo(name).file_size:
                yield f"{name} is pickled, and is more than tensors"


def _of_payload(name: str, content: Any) -> Iterator[str]:
    for entry, meta in (content.get("config") or {}).items():
        kind = str(meta.get("path_name", ""))
        if meta.get("use_pickle") or not kind.startswith(("weight_", "tensor_")):
            yield f"the entry {entry!r} of {name} is pickled"


def _of_graph(name: str, content: Any) -> Iterator[str]:
    for key, value in _items(content):
        if key == "target" and isinstance(value, str) and not TARGETS.fullmatch(value):
            yield f"{name} calls {value!r}"
        elif key == "expr_str" and not _is_plain(str(value), ()):
            yield f"{name} holds the expression {value!r}"
        elif key == "guards_code":
            yield from (f"{name} holds the check {text!r}" for text in value if not _is_plain(str(text), ATTRIBUTES))


def _items(content: Any) -> Iterator[tuple[str, Any]]:
    waiting = [content]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            yield from part.items()
            waiting.extend(part.values())
        elif isinstance(part, list):
            waiting.extend(part)


def _is_plain(text: str, attributes: Any) -> bool:
    """Whether an expression is arithmetic on sizes, and can do nothing else."""
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError, RecursionError):
        return False
    called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
    for node in nodes:
        if isinstance(node, ast.Attribute):
            is_allowed = node.attr in attributes
        elif isinstance(node, ast.Name):
            is_allowed = bool(SYMBOLS.fullmatch(node.id)) or (bool(attributes) and id(node) not in called and "__" not in node.id)
        elif isinstance(node, ast.Constant):
            is_allowed = not isinstance(node.value, str) or bool(re.fullmatch(r"\w+", node.value))
        else:
            is_allowed = isinstance(node, EXPRESSION_NODES) or (bool(attributes) and isinstance(node, ast.Subscript))
        if not is_allowed:
            return False
    return True
