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
# What torch.export writes, below a folder of the program's name, by what is to be looked for in it.
ENTRIES = {
    "graph": re.compile(r"models/[^/]+\.json"),
    "payload": re.compile(r"data/(weights/[^/]+_weights|constants/[^/]+_constants)_config\.json"),
    "tensors": re.compile(r"data/sample_inputs/[^/]+\.pt"),
    "plain": re.compile(
        r"data/weights/weight_\d+|data/constants/tensor_\d+|archive_format|archive_version|byteorder|version|\.data/version"
        r"|\.data/serialization_id|extra/[^/]+"
    ),
}
# What it wrote before version 2.8.
OLD_ENTRIES = {
    "graph": re.compile(r"serialized_exported_program\.json"),
    "tensors": re.compile(r"serialized_(state_dict|constants|example_inputs)\.(pt|json)"),
    "plain": re.compile(r"version|extra_files/[^/]+"),
}
# Names of modules and weights become part of the source that is run, between quotes; those of values without.
NAMES = re.compile(r"[\w.\- ]*")
# Symbols in expressions of sizes, and functions of sympy, of torch and of Python that are no more than arithmetic.
SYMBOLS = re.compile(r"[a-z]{1,3}\d+|int_oo|oo|zoo|true|false")
FUNCTIONS = re.compile(
    "Abs|Add|And|CeilDiv|CeilToInt|CleanDiv|Eq|Equality|FloatPow|FloatTrueDiv|FloorDiv|FloorToInt|Ge|GreaterThan|Gt|Identity"
    "|IntTrueDiv|Integer|LShift|Le|LessThan|Lt|Max|Min|Mod|ModularIndexing|Mul|Ne|Not|Or|Piecewise|Pow|PowByNatural|PythonMod"
    "|RShift|Rational|RoundDecimal|RoundToInt|StrictGreaterThan|StrictLessThan|ToFloat|TruncToFloat|TruncToInt|Unequality|Where"
    "|abs|bool|ceiling|float|floor|int|max|min"
)
LONGEST_EXPRESSION = 20_000
GREATEST_EXPONENT = 64
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
        _check_sizes(archive, path.stat().st_size)
        kinds = _kinds_of(names)
        if len({name.lower() for name in names}) < len(names):
            raise ProgramRefusedError("it holds two entries of one name, of which only one can be looked into")
        reasons = []
        for name in names:
            content = archive.read(name)
            try:
                reasons += list(_of_entry(name, kinds[name], content))
            except (AttributeError, LookupError, TypeError, RecursionError) as error:
                raise ValueError(f"{name} is damaged ({error})") from error
            target.writestr(name, content)
    if reasons:
        raise ProgramRefusedError("; ".join(dict.fromkeys(reasons)))
    copy.seek(0)
    return copy


def _check_sizes(archive: zipfile.ZipFile, size: int) -> None:
    """Refuse entries that would unpack to more than the file holds: torch.export compresses none."""
    entries = archive.infolist()
    packed = next((entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED), None)
    if packed is not None:
        raise ValueError(f"its entry {packed} is compressed, as torch.export leaves none: save it with torch.export.save")
    if sum(entry.file_size for entry in entries) > size:
        raise ValueError("its entries claim to be larger than the file")


def _kinds_of(names: list[str]) -> dict[str, str | None]:
    """Say what each entry is, as torch sees it: it leaves out the folder that all are in."""
    roots = {name.partition("/")[0] for name in names}
    is_old = len(roots) > 1 or not all("/" in name for name in names)
    patterns = OLD_ENTRIES if is_old else ENTRIES
    inner = {name: name if is_old else name.partition("/")[2] for name in names}
    return {
        name: next((kind for kind, pattern in patterns.items() if pattern.fullmatch(part)), None) for name, part in inner.items()
    }


def _of_entry(name: str, kind: str | None, content: bytes) -> Iterator[str]:
    if kind is None:
        yield f"{name} is none of the entries of a program"
    elif kind == "payload":
        yield from _of_payload(name, json.loads(content))
    elif kind == "graph":
        yield from _of_graph(name, json.loads(content))
    elif kind == "tensors" and content:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of old ways to pickle
                loaded = torch.load(io.BytesIO(content), weights_only=True)
        except Exception:  # noqa: BLE001 - whatever does not load as tensors alone would be unpickled
            yield f"{name} is pickled, and is more than tensors"
        else:
            yield from (f"{name} holds the name {text!r}" for text in _names(loaded) if not NAMES.fullmatch(text))


def _of_payload(name: str, content: Any) -> Iterator[str]:
    for entry, meta in (content.get("config") or {}).items():
        kind = str(meta.get("path_name", ""))
        if meta.get("use_pickle") is not False or not kind.startswith(("weight_", "tensor_")):
            yield f"the entry {entry!r} of {name} is pickled"


def _of_graph(name: str, content: Any) -> Iterator[str]:
    if any(_is_text_input(key, value) for key, value in _items(content)):
        yield f"{name} takes text, which would become part of the source that is run"
    yield from (f"{name} holds the name {text!r}" for text in _names(content) if not NAMES.fullmatch(text))
    for key, value in _items(content):
        if key in ("target", "as_operator") and isinstance(value, str) and not TARGETS.fullmatch(value):
            yield f"{name} calls {value!r}"
        elif key == "expr_str" and not is_plain(str(value)):
            yield f"{name} holds the expression {value!r}"
        elif key in ("in_spec", "out_spec") and isinstance(value, str) and not _is_plain_tree(json.loads(value), key):
            yield f"{name} has inputs or outputs of the kind {value!r}"
        elif key == "guards_code":
            yield from (f"{name} holds the check {text!r}" for text in value if not is_plain(str(text)))
        elif key == "range_constraints":
            yield from (f"{name} holds the expression {text!r}" for text in value if not is_plain(str(text)))


def _is_text_input(key: str, value: Any) -> bool:
    if key == "inputs" and isinstance(value, list):
        return any("as_string" in each or "as_strings" in each for each in value)
    return key == "constant_input" or (key == "user_input" and "as_string" in value["arg"])


def _names(content: Any) -> Iterator[str]:
    """Give all text but that which is looked into otherwise, is only ever a value, or is for people to read."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield key
            if key == "range_constraints":
                yield from _names(list(value.values()))
            elif key not in OTHER_TEXT:
                yield from _names(value)
    elif isinstance(content, list | tuple):
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


def _is_plain_tree(spec: Any, place: str) -> bool:
    """Whether a structure of inputs or outputs is of tuples, lists and dicts; others name classes that would be imported."""
    if isinstance(spec, list):
        return all(isinstance(part, int) or _is_plain_tree(part, place) for part in spec)
    kind, context = spec.get("type"), spec.get("context")
    if kind not in (None, "builtins.tuple", "builtins.list", "builtins.dict", "builtins.NoneType", "collections.OrderedDict"):
        return False
    keys = json.loads(context) if isinstance(context, str) else context
    # Keys of inputs become names of parameters in the source that is run; those of outputs do not.
    is_plain_context = keys is None or (
        isinstance(keys, list)
        and all(isinstance(key, int | str) for key in keys)
        and (place == "out_spec" or all(NAMES.fullmatch(str(key)) for key in keys))
    )
    return is_plain_context and all(_is_plain_tree(part, place) for part in spec.get("children_spec") or ())


def is_plain(text: str) -> bool:
    """Whether an expression is arithmetic on sizes, can do nothing else, and comes to an end."""
    try:
        tree = ast.parse(text, mode="eval").body if len(text) < LONGEST_EXPRESSION else None
        return tree is not None and _is_arithmetic(tree) and _has_small_powers(tree)
    except (SyntaxError, ValueError, RecursionError):
        return False


def _has_small_powers(tree: ast.AST) -> bool:
    """Whether numbers stay of a size that can be calculated: 2**2**2**2**2**2 does not."""
    for node in ast.walk(tree):
        match node:
            case ast.BinOp(left=base, op=ast.Pow() | ast.LShift(), right=exponent):
                pass
            case ast.Call(func=ast.Name(id="Pow" | "PowByNatural" | "FloatPow" | "LShift"), args=arguments):
                if len(arguments) != 2:
                    return False
                base, exponent = arguments
            case _:
                continue
        value = _constant(exponent)
        if value is None or abs(value) > GREATEST_EXPONENT or any(map(_is_power, ast.walk(base))):
            return False
    return True


def _is_power(node: ast.AST) -> bool:
    match node:
        case ast.BinOp(op=ast.Pow() | ast.LShift()) | ast.Call(func=ast.Name(id="Pow" | "PowByNatural" | "FloatPow" | "LShift")):
            return True
    return False


def _constant(node: ast.AST) -> float | None:
    match node:
        case ast.Constant(value=int() | float() as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            negated = _constant(operand)
            return None if negated is None else -negated
        case ast.Call(func=ast.Name(id="Integer"), args=[whole]):
            return _constant(whole)
        case ast.Call(func=ast.Name(id="Rational"), args=[ast.Constant(int() as above), ast.Constant(int() as below)]):
            return above / below if below else None
    return None


def _is_arithmetic(node: ast.AST) -> bool:
    match node:
        case ast.Constant(value=value):
            return isinstance(value, int | float)
        case ast.Name(id=name):
            return SYMBOLS.fullmatch(name) is not None
        case ast.UnaryOp(operand=operand):
            return _is_arithmetic(operand)
        case ast.BinOp(left=left, right=right):
            return _is_arithmetic(left) and _is_arithmetic(right)
        case ast.BoolOp(values=values):
            return all(map(_is_arithmetic, values))
        case ast.Compare(left=left, comparators=others):
            return _is_arithmetic(left) and all(map(_is_arithmetic, others))
        case ast.Tuple(elts=elements):
            return all(map(_is_arithmetic, elements))
        case ast.Call(func=ast.Name(id="Symbol"), args=[ast.Constant(value=str(name))], keywords=assumptions):
            return re.fullmatch(r"\w+", name) is not None and all(_is_arithmetic(keyword.value) for keyword in assumptions)
        case ast.Call(func=ast.Name(id="Float"), args=[ast.Constant(value=str(digits))], keywords=precision):
            return re.fullmatch(r"[\d.e+-]{1,40}", digits) is not None and all(
                isinstance(keyword.value, ast.Constant) and keyword.value.value in range(1000) for keyword in precision
            )
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
            return FUNCTIONS.fullmatch(name) is not None and all(map(_is_arithmetic, arguments))
        case ast.Call(func=ast.Attribute(value=ast.Name(id="math"), attr="trunc" | "floor" | "ceil"), args=[value], keywords=[]):
            return _is_arithmetic(value)
        case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="sym_float" | "sym_int"), args=[value], keywords=[]):
            return _is_arithmetic(value)
        case ast.Subscript(value=sizes, slice=ast.Constant(value=int())):
            return _is_of_input(sizes)
    return _is_of_input(node)


def _is_of_input(node: ast.AST) -> bool:
    """Whether something is `NAME.attribute` or `NAME.attribute()`, or one of `NAME['name'][0]` and the like."""
    match node:
        case ast.Call(func=called, args=arguments, keywords=[]):
            return isinstance(called, ast.Attribute) and _is_of_input(called) and all(map(_is_arithmetic, arguments))
        case ast.Attribute(value=value, attr=name):
            return name in ATTRIBUTES and _is_input(value)
    return False


def _is_input(node: ast.AST) -> bool:
    match node:
        case ast.Subscript(value=value, slice=ast.Constant(value=key)):
            return (type(key) is int or (isinstance(key, str) and NAMES.fullmatch(key) is not None)) and _is_input(value)
    return isinstance(node, ast.Name)
