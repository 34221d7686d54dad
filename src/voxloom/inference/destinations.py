"""Where results go: into memory, or each to a store."""

import os
from pathlib import Path
from typing import Any

from ..errors import OutputError
from ..io.protocols import VolumeStore, writing_bytes
from ..io.writing.sinks import Sink, SinkStore
from ..io.writing.targets import as_target, replacing, store_at
from ..models.outputs import Name
from .planning.results import ResultSpec, of_name

__all__ = ["Destinations", "Stores", "as_store", "as_stores"]

Stores = dict[Name, VolumeStore]
"""The stores that were asked for, by the names of results as far as these are known."""


def as_store(given: Any, overwrite: bool) -> VolumeStore:
    """Make a store of what was given as an output.

    Raises:
        OutputError: if it is none, nor the name of a file, nor a sink.
    """
    if isinstance(given, str | os.PathLike):
        return store_at(as_target(given), overwrite)
    if isinstance(given, VolumeStore):
        return replacing(given, overwrite)
    if isinstance(given, Sink):
        return SinkStore(given)
    raise OutputError(
        f"output is {given!r}: it must be None, the name of a file, a VolumeStore, or a sink with open, write, close and abort"
    )


def as_stores(given: Any, names: list[Name] | None, overwrite: bool) -> Stores:
    """Make the stores of what was given as an output, by the names of results as far as these are known.

    Raises:
        OutputError: if one is none, or is for several results.
    """
    by_name = {name: of_name(given, name) for name in names or [None]}
    outputs = [each for each in by_name.values() if each is not None]
    if len(set(map(id, outputs))) < len(outputs):
        raise OutputError("one output was given for several results: give a dict with one for each")
    return {name: as_store(each, overwrite) for name, each in by_name.items() if each is not None}


class Destinations:
    """What a plan must know of them.

    Args:
        target: what was given as an output, for all results or by the name of each.
    """

    def __init__(self, target: Any) -> None:
        self._target = target

    def is_memory(self, name: Name) -> bool:
        """Whether a result stays in memory."""
        return of_name(self._target, name) is None

    def writing_bytes(self, result: ResultSpec) -> int:
        """Memory that its store takes while it writes."""
        given = of_name(self._target, result.name)
        if isinstance(given, str | os.PathLike):
            given = store_at(Path(given).expanduser(), overwrite=True)  # nothing is made, nor looked for, when a plan is made
        return 0 if given is None else writing_bytes(given, result.volume)
