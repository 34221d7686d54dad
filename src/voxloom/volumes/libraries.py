"""The door for other libraries: what their images, subjects and transforms are here, and how they are found out."""

import importlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cache
from types import ModuleType
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from ..errors import ImageError, MissingDependencyError, SubjectError
from ..io.arrays.memory import affine_of
from ..io.arrays.objects import image_source_of, source_of
from ..io.protocols import is_source
from .constants import INTENSITY, LABEL
from .images.image import Image, LabelMap, ScalarImage
from .subject import Subject

__all__ = [
    "LIBRARIES",
    "Library",
    "LibraryTransform",
    "Transform",
    "as_image",
    "as_subject",
    "found_subject",
    "imported",
    "in_its_type",
    "library_of",
]

Transform = Callable[[Any], Any]

LIBRARIES = {"torchio": "voxloom.integrations.torchio", "monai": "voxloom.integrations.monai"}
"""Modules that are a `Library`, by the package of the classes that they know."""


class Library(Protocol):
    """What a module of `voxloom.integrations` says of the objects of another library."""

    def image_of(self, thing: Any, type: str) -> Image | None:  # noqa: A002 - the name that images have for it
        """Give one of its images as an `Image`, of a type if it does not say its own; None if it is none."""
        ...

    def subject_of(self, thing: Any) -> Subject | None:
        """Give one of its subjects as a `Subject`; None if it is none."""
        ...

    def dataset_of(self, thing: Any) -> Any:
        """Give one of its data sets as a map-style one of voxloom's; None if it is none, or more than such a one can say."""
        ...

    def transform_of(self, thing: Any) -> Transform | None:
        """Give one of its transforms as a function that takes a `Subject` and returns one; None if it is none."""
        ...

    def batch_transform_of(self, thing: Any) -> Transform | None:
        """Give one of its transforms as a function that takes a `SubjectsBatch` and returns one; None if it cannot be."""
        ...


class LibraryTransform(ABC):
    """A transform of another library, or several, one after the other, as a function of a `Subject`.

    Args:
        transforms: what the library has.
    """

    def __init__(self, *transforms: Any) -> None:
        self.transforms = list(transforms)  # which are seeded

    @abstractmethod
    def __call__(self, subject: Any) -> Any:
        """Apply them."""

    def __repr__(self) -> str:
        return ", ".join(map(repr, self.transforms))

    def then(self, following: "LibraryTransform") -> "LibraryTransform | None":
        """Give what does the following as well, and makes no subject of what lies between; None where there is none."""
        return type(self)(*self.transforms, *following.transforms) if type(self) is type(following) else None


def library_of(thing: Any) -> Library | None:
    """Find the library that a thing's class, or one that it is derived from, belongs to; None if it is none of those known.

    Nothing is imported for a thing of any other library.
    """
    for each in type(thing).__mro__:
        name = LIBRARIES.get(each.__module__.partition(".")[0])
        if name is not None:
            return cast(Library, _module(name))
    return None


@cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(name)


def imported(package: str, extra: str) -> Any:
    """Import an optional package.

    Raises:
        MissingDependencyError: if it is not installed; says how it is.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingDependencyError(f"this needs {package}: pip install 'voxloom[{extra}]'") from error


def as_image(thing: Any, type: str = INTENSITY) -> Image:  # noqa: A002 - the name that images have for it
    """Make an `Image` of anything that holds a volume.

    Args:
        thing: an `Image`, which is given back; a path; a tensor or array `(C, I, J, K)` or `(I, J, K)`, also one of MONAI's
            `MetaTensor`; an image of nibabel, SimpleITK or TorchIO; a source of voxels, or an array that is read by slices.
        type: `"intensity"` or `"label"`; what an image of TorchIO says of itself counts more.

    Raises:
        ImageError: if it is nothing of these.

    Example:
        >>> import nibabel, numpy as np, voxloom as vx
        >>> vx.as_image(nibabel.Nifti1Image(np.zeros((8, 9, 10), dtype=np.float32), np.diag([2, 2, 2, 1]))).spacing
        (2.0, 2.0, 2.0)
    """
    if type not in (INTENSITY, LABEL):
        raise ImageError(f"type is {type!r}: it must be {INTENSITY!r} or {LABEL!r}")
    if isinstance(thing, Image):
        return thing
    library = library_of(thing)
    found = None if library is None else library.image_of(thing, type)
    if found is not None:
        return found
    image_class = LabelMap if type == LABEL else ScalarImage
    if isinstance(thing, Tensor | np.ndarray):
        return image_class(tensor=thing, affine=affine_of(thing))
    if isinstance(thing, str | os.PathLike) or is_source(thing):
        return image_class(thing)
    source = source_of(thing)
    if source is None:
        raise ImageError(
            f"something of type {thing.__class__.__name__} is no image: give a path, an Image, a tensor (C, I, J, K), an image of"
            " nibabel, SimpleITK or TorchIO, or an array that is read by slices"
        )
    return image_class(source)


def as_subject(thing: Any, what: str) -> Subject:
    """Make a `Subject` of anything that is one: of TorchIO, or a dict of images as MONAI has it.

    Args:
        thing: a `Subject`, which is given back; a subject of TorchIO; or a dict, of which images, tensors and arrays
            `(C, I, J, K)`, or `(I, J, K)` like those, are the images, and everything else the metadata.
        what: what messages call it.

    Raises:
        SubjectError: if it is nothing of these.
    """
    found = found_subject(thing)
    if found is not None:
        return found
    if isinstance(thing, Mapping):
        has_paths = any(isinstance(value, str | os.PathLike) for value in thing.values())
        hint = "; where a transform of MONAI reads the files, give monai.data.Dataset(files, transform)" if has_paths else ""
        raise SubjectError(f"{what} is a dict without images: it has {', '.join(map(repr, thing)) or 'no entries'}{hint}")
    if isinstance(thing, list) and thing and isinstance(thing[0], Mapping):
        raise SubjectError(
            f"{what} is a list of {len(thing)} dicts, as MONAI's transforms that cut several patches make it: leave that one out,"
            " since a sampler cuts the patches"
        )
    raise SubjectError(f"{what} is of type {type(thing).__name__}, not a subject")


def in_its_type(data: Any, kind: str, dtype: torch.dtype) -> Any:
    """Give labels the type of values that they had before a transform, if it can hold them: some make floats of them, some not.

    Of floats whole numbers may be made, since nobody does that but a cast.

    Args:
        data: what the transform made, a tensor or an array.
        kind: type of the image, such as `"label"`.
        dtype: type of the values before.
    """
    values = torch.as_tensor(data)
    if kind != LABEL or values.dtype == dtype or (dtype.is_floating_point and not values.dtype.is_floating_point):
        return data
    converted = values.to(dtype)
    return converted if torch.equal(converted.to(values.dtype), values) else data


def found_subject(thing: Any) -> Subject | None:
    """Give a thing as a `Subject`, if it is anything of what `as_subject` knows."""
    if isinstance(thing, Subject):
        return thing
    library = library_of(thing)
    if library is not None:  # an image of TorchIO 1 is a dict too
        return library.subject_of(thing)
    if not isinstance(thing, Mapping):
        return None
    shapes = _shapes_in(thing)
    entries = {name: _entry(name, value, shapes) for name, value in thing.items()}
    return Subject(entries) if any(isinstance(value, Image) for value in entries.values()) else None


# A part of an entry's name that says that it holds labels.
LABEL_NAMES = frozenset({"label", "labels", "labelmap", "seg", "segmentation", "mask"})


def _shapes_in(thing: Mapping[Any, Any]) -> frozenset[tuple[int, ...]] | None:
    """Give the shapes that an image without channels may have: those of images with them; None for any, if there is none."""
    arrays = [value for value in thing.values() if isinstance(value, Tensor | np.ndarray)]
    found = [tuple(value.shape[1:]) for value in arrays if value.ndim == 4]
    found += [value.spatial_shape for value in thing.values() if isinstance(value, Image)]
    return frozenset(found) or None


def _entry(name: Any, value: Any, shapes: frozenset[tuple[int, ...]] | None) -> Any:
    """Make an image of what is one; a dict does not say which are label maps, but its names usually do."""
    is_label = isinstance(name, str) and not LABEL_NAMES.isdisjoint(re.split(r"[^a-z]+", name.lower()))
    library = library_of(value)
    found = None if library is None else library.image_of(value, LABEL if is_label else INTENSITY)
    source = image_source_of(value) if found is None else None
    if source is not None:
        return (LabelMap if is_label else ScalarImage)(source)
    is_array = isinstance(value, Tensor | np.ndarray)
    if found is None and is_array and (value.ndim == 4 or (value.ndim == 3 and (shapes is None or tuple(value.shape) in shapes))):
        found = (LabelMap if is_label else ScalarImage)(tensor=value, affine=affine_of(value))
    return value if found is None else found
