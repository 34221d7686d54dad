"""Which sizes an exported program takes.

PyTorch would check that itself, by source code that it makes of what the file says, names of inputs among it. Here nothing is run
but the arithmetic, which was looked into first.
"""

import ast
import math
import re
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..errors import SizeError

__all__ = ["Guards", "exported_for_others"]

# Batch sizes that are tried, from the least that was declared, for one that the program takes.
TRIED = 64
NAMES = {function.__name__: function for function in (abs, bool, float, int, max, min)} | {
    "math": math,
    "torch": SimpleNamespace(sym_float=float, sym_int=int),
}


class _Input:
    """Stands for a batch, by whatever name or path a check calls it."""

    def __init__(self, batch: Tensor) -> None:
        self._batch = batch

    def __getitem__(self, key: object) -> "_Input":
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batch, name)


class Guards:
    """What a program demands of the sizes of its batches.

    Args:
        program: a program of one input, whose checks are arithmetic.
        sizes: those of its input as they were declared: numbers, or symbols of PyTorch's.

    Raises:
        ValueError: if there is a check that cannot be evaluated.
    """

    def __init__(self, program: torch.export.ExportedProgram, sizes: Sequence[Any]) -> None:
        self._sizes = [size if isinstance(size, int) else size.node.expr for size in sizes]
        self._ranges = program.range_constraints
        self._checks = [(text, _compiled(text)) for text in getattr(program, "_guards_code", ())]

        ranges = sorted((str(symbol), str(size)) for symbol, size in self._ranges.items())
        self._said = ([str(size) for size in self._sizes], ranges, [text for text, _ in self._checks])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Guards) and self._said == other._said

    def __hash__(self) -> int:
        return hash(repr(self._said))

    def check(self, batch: Tensor) -> None:
        """Check a batch.

        Raises:
            SizeError: if the program was not exported for its sizes.
        """
        if reason := self._reason_against(batch):
            raise exported_for_others(batch.shape, reason)

    def least_batch_size(self, patch_size: Sequence[int] | None = None) -> int:
        """Give the smallest batch that the program was exported for, or that it takes with a patch size."""
        declared = self._sizes[0]
        if isinstance(declared, int):
            return declared
        # Such a size is a multiple of a symbol, and a constant. A least size of 2 is declared, but nowhere checked.
        least = max(1, int(declared.subs({symbol: self._ranges[symbol].lower for symbol in declared.free_symbols})))
        if patch_size is None:
            return least
        channels = self._sizes[1] if isinstance(self._sizes[1], int) else 1
        shapes = ((size, channels, *patch_size) for size in range(least, least + TRIED))
        fitting = (shape[0] for shape in shapes if not self._reason_against(torch.empty(shape, device="meta")))
        return next(fitting, least)

    def _reason_against(self, batch: Tensor) -> str | None:
        for axis, (declared, size) in enumerate(zip(self._sizes, batch.shape, strict=True)):
            if isinstance(declared, int):
                if size != declared:
                    return f"size {axis} must be {declared}"
            elif (allowed := self._ranges.get(declared)) is not None and not (
                (allowed.lower <= 2 or size >= allowed.lower) and size <= allowed.upper
            ):
                return f"size {axis} must be from {allowed.lower} to {allowed.upper}"
        for text, check in self._checks:
            names = dict.fromkeys(check.co_names, _Input(batch)) | NAMES
            if not eval(check, {"__builtins__": {}}, names):  # noqa: S307 - it was looked into
                return "it demands " + re.sub(r"\bL(\[[^]]*\])+", "batch", text)
        return None


def exported_for_others(shape: Sequence[int], reason: str) -> SizeError:
    """Make the error of a program that does not take a batch."""
    return SizeError(
        f"the model was exported for other sizes than a batch (B, C, I, J, K) of {tuple(shape)}: {reason}. Choose others,"
        " or export it anew"
    )


def _compiled(text: str) -> Any:
    tree = ast.parse(text, mode="eval")
    calls = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    if not calls <= set(NAMES):
        raise ValueError(f"its check {text!r} calls {', '.join(sorted(calls - set(NAMES)))}, which is not known here")
    return compile(tree, "<check>", "eval")
