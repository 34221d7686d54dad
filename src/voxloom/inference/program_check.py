"""Looking into a .pt2 file before it is loaded: loading unpickles, evaluates and resolves whatever such a file says."""

import ast
import io
import json
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

__all__ = ["ProgramRefusedError", "inspected", "is_program"]

# Calls that a graph may hold: registered operators, and arithmetic on sizes.
ARITHMETIC = (
    "add|sub|mul|truediv|floordiv|mod|pow|neg|pos|abs|eq|ne|lt|le|gt|ge|and_|or_|xor|not_|inv|invert|getitem|lshift|rshift|index"
)
# Operators that reach beyond tensors.
REACHING = "from_file|save|load|_export|_record_function|record_function"
HIGHER_ORDER = "cond|wrap_with_set_grad_enabled|wrap_with_autocast|while_loop|scan|map_impl"
TARGETS = re.compile(
    rf"torch\.ops\.(aten|prims)\.(?!({REACHING})\b|__)\w+(\.(?!__)\w+)?|torch\.ops\.higher_order\.({HIGHER_ORDER})"
    rf"|_?operator\.({ARITHMETIC})|math\.[a-z]\w*|torch\._?sym_\w+"
)
# What torch.export writes, below a folder of the program's name, and what it wrote before version 2.8.
ENTRIES = re.compile(
    r"([^/]+/)?(models/[^/]+\.json|data/weights/(weight_\d+|[^/]+_weights_config\.json)"
    r"|data/constants/(tensor_\d+|[^/]+_constants_config\.json)|data/sample_inputs/[^/]+\.pt|archive_format|archive_version"
    r"|byteorder|version|\.data/version|\.data/serialization_id|extra/[^/]+)"
    r"|serialized_exported_program\.json|serialized_(state_dict|constants|example_inputs)\.(pt|json)|version|extra_files/[^/]+"
)
# Names in expressions of sizes: classes of sympy, and symbols such as s0, u1 and int_oo.
SYMBOLS = re.compile(r"[A-Z]\w*|[a-z]{1,3}\d+|int_oo|oo|zoo")
ATTRIBUTES = {"size", "stride", "storage_offset", "shape", "ndim", "dim", "dtype", "device"}
OTHER_TEXT = {
    "as_operator",
    "as_string",
    "as_strings",
    "expr_str",
    "guards_code",
    "in_spec",
    "metadata",
    "out_spec",
    "target",
    "torch_version",
}
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


class ProgramRefusedError(Exception):
    """A program would run code."""


def inspected(path: Path) -> io.BytesIO:
    """Give a copy of a program in which there is nothing but what was looked into: other readers may see more in the file.

    Raises:
        ProgramRefusedError: if it would run code while it is loaded or run.
        ValueError: if it is damaged.
    """
    copy = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, "w", zipfile.ZIP_STORED) as target:
        names = archive.namelist()
        if len({name.lower() for name in names}) < len(names):
            raise ProgramRefusedError("it holds two entries of one name, of which only one can be looked into")
        reasons = []
        for name in names:
            content = archive.read(name)
            try:
                reasons += list(_of_entry(name, content))
            except (AttributeError, LookupError, TypeError, RecursionError) as error:
                raise ValueError(f"{name} is damaged ({error})") from error
            target.writestr(name, content)
    if reasons:
        raise ProgramRefusedError("; ".join(dict.fromkeys(reasons)))
    copy.seek(0)
    return copy


def _of_entry(name: str, content: bytes) -> Iterator[str]:
    if not ENTRIES.fullmatch(name):
        yield f"{name} is none of the entries of a program"
    elif name.endswith("_config.json"):
        yield from _of_payload(name, json.loads(content))
    elif name.endswith(".json") and not name.startswith("extra_files/"):
        yield from _of_graph(name, json.loads(content))
    elif name.endswith(".pt") and content:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of old ways to pickle
                torch.load(io.BytesIO(content), weights_only=True)
        except Exception:  # noqa: BLE001 - whatever does not load as tensors alone would be unpickled
            yield f"{name} is pickled, and is more than tensors"


def _of_payload(name: str, content: Any) -> Iterator[str]:
    for entry, meta in (content.get("config") or {}).items():
        kind = str(meta.get("path_name", ""))
        if meta.get("use_pickle") is not False or not kind.startswith(("weight_", "tensor_")):
            yield f"the entry {entry!r} of {name} is pickled"


def _of_graph(name: str, content: Any) -> Iterator[str]:
    yield from (f"{name} holds the name {text!r}" for text in _names(content) if not re.fullmatch(r"[\w.]*", text, re.ASCII))
    for key, value in _items(content):
        if key in ("target", "as_operator") and isinstance(value, str) and not TARGETS.fullmatch(value):
            yield f"{name} calls {value!r}"
        elif key == "expr_str" and not _is_plain(str(value), ()):
            yield f"{name} holds the expression {value!r}"
        elif key in ("in_spec", "out_spec") and isinstance(value, str) and not _is_plain_tree(json.loads(value)):
            yield f"{name} has inputs or outputs of the kind {value!r}"
        elif key == "guards_code":
            yield from (f"{name} holds the check {text!r}" for text in value if not _is_plain(str(text), ATTRIBUTES))


def _names(content: Any) -> Iterator[str]:
    """Give all text but that which is looked into otherwise, is only ever a value, or is for people to read.

    Names become part of the source that is run.
    """
    if isinstance(content, dict):
        for key, value in content.items():
            yield key
            if key not in OTHER_TEXT:
                yield from _names(value)
    elif isinstance(content, list):
        for part in content:
            yield from _names(part)
    elif isinstance(content, str):
        yield content


def _items(content: Any) -> Iterator[tuple[str, Any]]:
    waiting = [content]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            yield from part.items()
            waiting.extend(part.values())
        elif isinstance(part, list):
            waiting.extend(part)


def _is_plain_tree(spec: Any) -> bool:
    """Whether a structure of inputs or outputs is of tuples, lists and dicts; others name classes that would be imported."""
    if isinstance(spec, list):
        return all(isinstance(part, int) or _is_plain_tree(part) for part in spec)
    kind, context = spec.get("type"), spec.get("context")
    if kind not in (None, "builtins.tuple", "builtins.list", "builtins.dict", "builtins.NoneType"):
        return False
    keys = json.loads(context) if isinstance(context, str) else context
    is_plain_context = keys is None or (isinstance(keys, list) and all(isinstance(key, str | int) for key in keys))
    return is_plain_context and all(map(_is_plain_tree, spec.get("children_spec") or ()))


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
