"""Where the voxels of an image come from: files, or a source that was given in place of them."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ...io.arrays.composed import CustomFile, StackedSource
from ...io.files import changed, states_of
from ...io.formats import import_for, open_volume
from ...io.protocols import VolumeSource, VolumeSpec
from ...io.spooling import Packed, is_packed, unpack

__all__ = ["CustomReader", "FileOrigin", "GivenOrigin", "Origin"]

CustomReader = Callable[[Path], tuple[Any, Any]]


class _Noted:
    """Notes of which files the data in memory are."""

    _noted: Mapping[Path, tuple[int, ...] | None] = MappingProxyType({})

    def note(self, paths: Sequence[Path]) -> None:
        """Note the files that are about to be loaded."""
        self._noted = _states_anywhere(paths)

    @property
    def has_changed(self) -> bool:
        """Whether the files are others than those that were loaded."""
        return _states_anywhere(tuple(self._noted)) != self._noted


class FileOrigin(_Noted):
    """One file, or several that become channels: opened when they are needed, and again after they were closed.

    Args:
        paths: the files.
        reader: the user's own function that reads one; None leaves it to the format.
        is_placed: whether the image has an affine of its own, so that those of the files need not agree.
    """

    def __init__(self, paths: tuple[Path, ...], reader: CustomReader | None, is_placed: bool) -> None:
        self.paths = paths
        self.reader = reader
        self._is_placed = is_placed
        self._spec: VolumeSpec | None = None
        self._source: VolumeSource | None = None
        if reader is None:
            for path in paths:
                import_for(path)

    @property
    def source(self) -> VolumeSource:
        """The open files.

        Raises:
            ImageFileError: if they are others than when their header was read.
        """
        if self._source is None:
            reader = self.reader
            files = [open_volume(path) if reader is None else CustomFile(path, reader) for path in self.paths]
            names = list(map(str, self.paths))
            source = files[0] if len(files) == 1 else StackedSource(files, names, check_place=not self._is_placed)
            spec = VolumeSpec(source.shape, source.dtype, source.affine, source.codes)
            if self._spec is not None and (spec.shape, spec.dtype) != (self._spec.shape, self._spec.dtype):
                raise changed(", ".join(names))
            self._source, self._spec = source, spec
        return self._source

    @property
    def spec(self) -> VolumeSpec:
        """What the headers say; kept when the files are closed."""
        if self._spec is None:
            _ = self.source
        assert self._spec is not None
        return self._spec

    @property
    def is_packed(self) -> bool:
        """Whether its files need only be unpacked to be read in parts."""
        return bool(self.paths) and all(map(is_packed, self.paths))

    def unpacked(self, folder: Path) -> "FileOrigin":
        """Unpack its files into a folder.

        Raises:
            OSError, EOFError, ValueError: if one is damaged.
        """
        return FileOrigin(tuple(unpack(path, folder) for path in self.paths), self.reader, self._is_placed)

    def prepare(self) -> None:
        """Files are read by whom they belong to."""

    def close(self) -> None:
        """Let go of the files."""
        self._source = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_source": None}  # another process opens the files anew


class GivenOrigin(_Noted):
    """A source that was given."""

    def __init__(self, source: VolumeSource) -> None:
        self.source = source
        self.paths = source.paths
        self.spec = VolumeSpec(source.shape, source.dtype, source.affine, source.codes)

    @property
    def is_packed(self) -> bool:
        """Whether it need only be unpacked to be read in parts."""
        return isinstance(self.source, Packed) and self.source.packed_bytes > 0

    def unpacked(self, folder: Path) -> "GivenOrigin":
        """Unpack its files into a folder."""
        assert isinstance(self.source, Packed)
        return GivenOrigin(self.source.unpacked(folder))

    def prepare(self) -> None:
        """Let the source load what can only be read whole, if it keeps that."""
        prepare = getattr(self.source, "prepare", None)
        if prepare is not None:
            prepare()

    def close(self) -> None:
        """It is the giver's."""


def _states_anywhere(paths: Sequence[Path]) -> dict[Path, tuple[int, ...] | None]:
    """Give the states of files as they are on any machine: copies with the same times are the same."""
    states = [state if state is None else state[1:] or state for state in states_of(paths)]
    return dict(zip(paths, states, strict=True))


Origin = FileOrigin | GivenOrigin
