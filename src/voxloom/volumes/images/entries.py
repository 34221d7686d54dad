"""Entries of an image, by name: data, affine, type, path and stem, and whatever else was given."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...core.geometry.affines import Affine
from ...errors import NoSuchKeyError
from ...io.formats import stem_of
from ..constants import AFFINE, DATA, PATH, STEM, TYPE

__all__ = ["RESERVED", "ImageEntries"]

RESERVED = (DATA, AFFINE, TYPE, PATH, STEM)
"""Names that every image has."""


class ImageEntries:
    """Reads attributes as entries, and has all others in `metadata`."""

    metadata: dict[str, Any]
    path: Path | list[Path] | None
    data: Any
    affine: Affine

    @property
    def _name(self) -> str:
        """What to call it in a message: its file, or its class."""
        return type(self).__name__ if self.path is None else str(self.path)

    @property
    def stem(self) -> str | list[str]:
        """Name of the file without folder and endings; empty where there is none."""
        if isinstance(self.path, list):
            return [stem_of(path) for path in self.path]
        return "" if self.path is None else stem_of(self.path)

    def keys(self) -> list[str]:
        """Names of all entries."""
        return [*RESERVED, *self.metadata]

    def __contains__(self, key: object) -> bool:
        return key in self.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __getitem__(self, key: str) -> Any:
        if key in RESERVED:
            value = getattr(self, key)
            return ("" if value is None else str(value)) if key == PATH else value
        if key not in self.metadata:
            raise NoSuchKeyError(f"{self._name} has no entry {key!r}, only {', '.join(map(repr, self.keys()))}")
        return self.metadata[key]

    def __setitem__(self, key: str, value: Any) -> None:
        if key in (DATA, AFFINE):
            setattr(self, key, value)
        elif key in RESERVED:
            raise NoSuchKeyError(f"the entry {key!r} of an image cannot be set")
        else:
            self.metadata[key] = value
