"""Copies of images, and images that are like another one."""

import copy
from abc import abstractmethod
from typing import Any, Self

from torch import Tensor

from ...core.geometry.affines import Affine, as_affine, shifted
from ...io.protocols import SpaceCodes, VolumeSource
from .derived import DerivedValues
from .origins import GivenOrigin, Origin

__all__ = ["Copies", "own"]

IMMUTABLE = (str, int, float, bool, type(None))


def own(value: Any) -> Any:
    """Copy an entry deeply, so that whoever changes it in place changes that of no other; what cannot be copied is shared."""
    if type(value) in IMMUTABLE:
        return value
    if type(value) is dict and not value:  # as most metadata of images are
        return {}
    try:
        return copy.deepcopy(value)
    except TypeError:  # such as an open file, of which there can be only one
        return value


class Copies:
    """An image of which others are made. None of the methods reads or copies a voxel, but for a deep copy."""

    affine: Affine
    metadata: dict[str, Any]
    _affine: Affine | None
    _codes: SpaceCodes | None
    _data: Tensor | None
    _derived: DerivedValues
    _origin: Origin | None

    @property
    @abstractmethod
    def codes(self) -> SpaceCodes:
        """What NIfTI records of the space beside the affine."""

    @abstractmethod
    def set_data(self, tensor: Any) -> None:
        """Replace the data."""

    def new_like(self, data: Any, affine: Any = None) -> Self:
        """Make an image of the same class, type and metadata with other data, and another affine if one is given."""
        new = self.without_data()
        new.set_data(data)
        new._affine = self.affine.copy() if affine is None else as_affine(affine)
        return new

    def part(self, data: Tensor, index: tuple[int, ...], step: tuple[int, ...] = (1, 1, 1)) -> Self:
        """Make an image of a part of this one's data, which begins at a voxel `(I, J, K)` and takes every `step`-th one.

        The index is negative where the part begins in padding. Nothing is checked: a sampler makes thousands of parts.
        """
        new = self.without_data()
        new.metadata = own(self.metadata)
        new._data = data
        new._affine = shifted(self.affine, index, step)
        return new

    def of_source(self, source: VolumeSource) -> Self:
        """Make an image of the same class, type and metadata whose voxels come from a source."""
        new = self.without_data()
        new._codes, new._origin = None, GivenOrigin(source)
        return new

    def without_data(self) -> Self:
        """Make a shallow copy that keeps everything but the data and the affine; for a batch to keep."""
        new = copy.copy(self)
        new._codes = self.codes
        new._data = new._origin = new._affine = None
        return new

    def __copy__(self) -> Self:
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        new.metadata, new._origin, new._derived = dict(self.metadata), copy.copy(self._origin), DerivedValues()
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        new = object.__new__(type(self))
        memo[id(self)] = new
        shared = {"_data", "_origin", "_derived"}
        for name, value in self.__dict__.items():
            new.__dict__[name] = value if name in shared else copy.deepcopy(value, memo)
        new._derived, new._origin = DerivedValues(), copy.copy(self._origin)
        new._data = None if self._data is None else self._data.clone()
        return new
