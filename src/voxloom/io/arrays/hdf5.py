"""Data sets in HDF5 files, named by the file and their path in it: `scan.h5:/group/data`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ...core.boxes import Box
from ...errors import ImageNotFoundError, MissingDependencyError, UnsupportedImageError, VoxloomError
from ..files import FileSource, changed, explained
from ..protocols import Json, SpaceCodes, VolumeSpec
from .memory import as_tensor, torch_dtype

__all__ = ["Hdf5Source"]


class Hdf5Source(FileSource):
    """A data set `(C, I, J, K)` or `(I, J, K)` in an HDF5 file. It has no affine of its own: voxels of 1 mm.

    Args:
        path: the file.
        dataset: path of the data set in it.
    """

    is_sliceable = True
    is_of_many = True

    def __init__(self, path: Path, dataset: str) -> None:
        self.name, self.paths, self._path, self._dataset = f"{path}:{dataset}", (path,), path, dataset
        with self._opened() as array:
            shape = tuple(map(int, array.shape or ()))
            if len(shape) not in (3, 4) or 0 in shape:
                raise UnsupportedImageError(f"{self.name} has shape {shape}: it must be (C, I, J, K), or (I, J, K)")
            self._has_channels = len(shape) == 4
            c, i, j, k = shape if self._has_channels else (1, *shape)
            dtype = torch_dtype(np.dtype(array.dtype), self.name)
            self.spec = VolumeSpec((c, i, j, k), dtype, np.eye(4), SpaceCodes(qform=0, sform=0))
            self.paths = (path, *self._sources_of(array))
            self._chunks = tuple(map(int, array.chunks[-3:])) if array.chunks else (1, j, k)
        self.remember()

    def _sources_of(self, array: Any) -> list[Path]:
        """Name the files that a virtual data set is put together from; for one that is gone HDF5 would take fill values."""
        named = {each.file_name for each in array.virtual_sources()} if array.is_virtual else set()
        # Where HDF5 looks for them; by their last part alone if they were named from the root of the file system.
        prefixes = os.environ.get("HDF5_VDS_PREFIX", "").replace("${ORIGIN}", str(self._path.resolve().parent)).split(":")
        folders = [*map(Path, filter(None, prefixes)), self._path.parent, self._path.resolve().parent, Path()]
        found = []
        for name in sorted(named - {"."}):
            if "%" in name:  # a number stands there, of as many files as there are
                continue
            names = [name, Path(name).name] if Path(name).is_absolute() else [name]
            place = next((folder / each for folder in folders for each in names if (folder / each).is_file()), None)
            if place is None:
                raise ImageNotFoundError(f"{self.name} is put together from other files, of which {name} is not there")
            found.append(place)
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._path, self._dataset)

    @property
    def chunks(self) -> tuple[int, int, int]:
        """See `VolumeSource`."""
        i, j, k = self._chunks
        return i, j, k

    def read(self, box: Box) -> Tensor:
        """See `VolumeSource`."""
        self.check_unchanged()
        with self._opened() as array:
            if tuple(array.shape)[-3:] != self.shape[1:]:
                raise changed(self.name)
            values = as_tensor(np.asarray(array[(slice(None), *box.slices) if self._has_channels else box.slices]))
        return values if self._has_channels else values[None]

    def fingerprint(self) -> Json:
        """See `VolumeSource`."""
        return {**super().fingerprint(), "array": self._dataset}

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        """Open the file for as long as it is read: an open one cannot be used by a process that is forked."""
        try:
            import h5py
        except ImportError as error:
            raise MissingDependencyError(f"{self.name} needs h5py: pip install 'voxloom[hdf5]'") from error
        try:
            with h5py.File(self._path, "r") as file:
                found = file.get(self._dataset)
                if not isinstance(found, h5py.Dataset):
                    there: list[str] = []
                    file.visititems(lambda name, item: there.append(f"/{name}") if isinstance(item, h5py.Dataset) else None)
                    raise ImageNotFoundError(
                        f"{self._path} has no data set {self._dataset}, only {', '.join(there[:10]) or 'none at all'}"
                    )
                yield found
        except (VoxloomError, MemoryError):
            raise
        except Exception as error:  # whatever a damaged file makes h5py stumble over
            raise explained(error, self.name, "cannot be read") from error
