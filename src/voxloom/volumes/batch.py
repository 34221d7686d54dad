"""Batches: the images of several subjects stacked, and everything else as lists."""

import copy
import operator
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate, get_worker_info

from ..core.geometry.affines import Affine
from ..core.locations import PatchLocation
from ..errors import NoSuchIndexError, NoSuchKeyError, SubjectError
from ..runtime import memory
from ..runtime.shared_memory import shared_storage
from .constants import AFFINE, DATA, INDEX_INI, INTENSITY, LABEL, LOCATION, PATCH_LOCATION, PATH, STEM, TYPE
from .images.copies import own
from .images.exchange import pictures
from .images.image import Image, LabelMap, ScalarImage
from .libraries import as_subject
from .subject import Subject

__all__ = ["ImagesBatch", "StackableSubjects", "SubjectsBatch", "batch_memory", "collate_subjects", "subjects_of_batch"]


class ImagesBatch(dict[str, Any]):
    """The images of one name of several subjects: a dict whose entries `data` and `affine` are stacked, and the rest lists.

    An entry that only some of the images have is None for the others. Its length is the number of images, an index gives one of
    them, and iterating goes from image to image.

    Example:
        >>> import torch, voxloom as vx
        >>> images = [vx.ScalarImage(torch.rand(1, 8, 8, 8)) for _ in range(2)]
        >>> vx.ImagesBatch.from_images(images).data.shape
        torch.Size([2, 1, 8, 8, 8])
    """

    def __init__(self, data: Tensor, images: Sequence[Image]) -> None:
        self.templates = [image.without_data() for image in images]
        affines = torch.stack([torch.from_numpy(image.affine) for image in images])
        known = {key: [image[key] for image in images] for key in (PATH, STEM, TYPE)}
        added = dict.fromkeys(key for image in images for key in image.metadata)
        more = {key: [image.metadata.get(key) for image in images] for key in added}
        super().__init__({DATA: data, AFFINE: affines} | known | more)

    @classmethod
    def from_images(cls, images: Sequence[Image], name: str = "image") -> Self:
        """Stack images of one shape and type.

        Raises:
            SubjectError: if they differ; names the first that does.
        """
        first = images[0]
        for number, image in enumerate(images):
            for what in ("shape", "dtype"):
                if getattr(image, what) != getattr(first, what):
                    raise SubjectError(
                        f"the images {name!r} of a batch must have the same {what}, but that of item {number}"
                        f" ({_origin(image)}) is {getattr(image, what)}, and that of item 0 ({_origin(first)}) is"
                        f" {getattr(first, what)}: sample patches, or bring the images to one size and type"
                    )
        data = batch_memory((len(images), *first.shape), first.dtype)
        for target, image in zip(data, images, strict=True):
            memory.copy_alone(target, image.data)
        return cls(data, images)

    @property
    def data(self) -> Tensor:
        """Tensor `(B, C, I, J, K)`."""
        return self[DATA]

    @data.setter
    def data(self, tensor: Tensor) -> None:
        if not isinstance(tensor, Tensor) or tensor.ndim != 5 or len(tensor) != self.batch_size:
            what = f"of shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"
            raise SubjectError(
                f"the data of a batch of {self.batch_size} images were set to {what}: they must be a tensor"
                f" ({self.batch_size}, C, I, J, K)"
            )
        if tensor.shape[2:] != self.data.shape[2:]:
            raise SubjectError(
                f"the data of a batch of images of {tuple(self.data.shape[2:])} voxels were set to {tuple(tensor.shape[2:])}: its"
                " affines would be wrong; crop or pad the subjects that batch.unbatch() gives, or set batch.images[name][DATA]"
            )
        self[DATA] = tensor

    def replace(self, data: Tensor, affine: Tensor) -> None:
        """Set data `(B, C, I, J, K)` of any size, and the affines `(B, 4, 4)` that go with them."""
        self.update({DATA: data, AFFINE: affine})

    @property
    def affine(self) -> Tensor:
        """Affines `(B, 4, 4)`, float64."""
        return self[AFFINE]

    @property
    def affines(self) -> list[Affine]:
        """The affine of each image."""
        return list(self.affine.numpy())

    @property
    def batch_size(self) -> int:
        """Number of images."""
        return len(self.data)

    @property
    def device(self) -> torch.device:
        """Where the data are."""
        return self.data.device

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or convert the data as `Tensor.to` does, in this batch, and return it. Affines stay as they are."""
        self[DATA] = self.data.to(*args, **kwargs)
        return self

    def pin_memory(self) -> Self:
        """Give the batch with its data in memory from which they can be copied to a GPU while that computes."""
        new = copy.copy(self)
        new[DATA] = self.data.pin_memory()
        return new

    def __copy__(self) -> Self:
        new = type(self).__new__(type(self))
        new.update(self)
        new.templates = self.templates
        return new

    def unbatch(self) -> list[Image]:
        """Give the images one by one; each owns its memory."""
        return [self[number] for number in range(self.batch_size)]

    def __len__(self) -> int:
        return self.batch_size

    def __getitem__(self, key: Any) -> Any:
        """Give an entry by its name, or an image by its number, with memory of its own."""
        if isinstance(key, str):
            return super().__getitem__(key)
        try:
            number = operator.index(key)
            if not -self.batch_size <= number < self.batch_size:
                raise NoSuchIndexError(f"the batch has {self.batch_size} subjects, and none of index {number}")
            number %= self.batch_size
        except TypeError as error:
            raise SubjectError(f"a batch of images was asked for {key!r}: give a name, or the number of an image") from error
        made = self.templates[number].new_like(self.data[number].clone(), self.affine[number].numpy())
        made.metadata = own(made.metadata)
        return made

    def __iter__(self) -> Iterator[Any]:
        return iter(self.unbatch())


class SubjectsBatch(dict[str, Any]):
    """Several subjects stacked: a dict of `ImagesBatch` and metadata whose entries are attributes too.

    Its length is the number of subjects; a number gives one of them, iterating gives names, as of any dict, and `unbatch` all
    subjects.
    `batch.t1.data` and `batch["t1"][DATA]` are the same tensor `(B, C, I, J, K)`. Metadata are collated as PyTorch does it,
    numbers to tensors, and `batch.metadata` has them as they were, in lists. Of patches, `batch.patch_location` is a list of
    `PatchLocation`, and `batch[LOCATION]` a tensor `(B, 6)`.

    Example:
        >>> import torch, voxloom as vx
        >>> subjects = [vx.Subject(t1=vx.ScalarImage(torch.rand(1, 8, 8, 8)), age=age) for age in (45, 50)]
        >>> batch = vx.SubjectsBatch.from_subjects(subjects)
        >>> batch.batch_size, batch["age"].tolist(), batch.metadata["age"]
        (2, [45, 50], [45, 50])
    """

    def __init__(self, images: dict[str, ImagesBatch], metadata: dict[str, list[Any]]) -> None:
        super().__init__(metadata | images)

    @classmethod
    def from_subjects(cls, subjects: Sequence[Any]) -> Self:
        """Stack subjects that have the same entries; those of TorchIO, and dicts of images, too.

        Raises:
            SubjectError: if there are none, if one is no subject, or if they differ; names the first that does.
        """
        if len(subjects) == 0:
            raise SubjectError("a batch was to be made of no subjects")
        subjects = [as_subject(subject, f"item {number} of a batch") for number, subject in enumerate(subjects)]
        for number, subject in enumerate(subjects):
            if subject.keys() != subjects[0].keys():
                raise SubjectError(
                    f"item {number} of a batch has the entries {', '.join(subject)}, but item 0 has {', '.join(subjects[0])}:"
                    " all subjects of a batch need the same ones"
                )
        images = {
            name: ImagesBatch.from_images([subject.get_image(name) for subject in subjects], name) for name in subjects[0].images
        }
        return cls(images, {name: [subject[name] for subject in subjects] for name in subjects[0].metadata})

    @property
    def images(self) -> dict[str, ImagesBatch]:
        """The batches of images, by name."""
        return {name: value for name, value in self.items() if isinstance(value, ImagesBatch)}

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Everything else, by name: one value for each subject. To add to it, set an entry of the batch."""
        return MappingProxyType({name: value for name, value in self.items() if not isinstance(value, ImagesBatch)})

    @property
    def batch_size(self) -> int:
        """Number of subjects."""
        return next(iter(self.images.values())).batch_size

    @property
    def device(self) -> torch.device:
        """Where the images are."""
        return next(iter(self.images.values())).device

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or convert all images as `Tensor.to` does, in this batch, and return it."""
        for images in self.images.values():
            images.to(*args, **kwargs)
        return self

    def pin_memory(self) -> Self:
        """Give the batch with its images in memory from which they can be copied to a GPU while that computes."""
        new = copy.copy(self)
        new.update({name: images.pin_memory() for name, images in self.images.items()})
        return new

    def unbatch(self) -> list[Subject]:
        """Give the subjects one by one; each owns its memory."""
        return [self._subject(number) for number in range(self.batch_size)]

    def _subject(self, number: int) -> Subject:
        images = {name: images[number] for name, images in self.images.items()}
        return Subject(images | {name: own(values[number]) for name, values in self.metadata.items()})

    def __len__(self) -> int:
        return self.batch_size

    def __getitem__(self, key: Any) -> Any:
        """Give an entry by its name, or a subject by its number, with memory of its own."""
        if not isinstance(key, str):
            return self._subject(operator.index(key)) if hasattr(key, "__index__") else self.__missing__(key)
        locations: list[PatchLocation] | None = super().get(PATCH_LOCATION)
        if locations is not None and key == LOCATION:
            return torch.tensor([location.tolist() for location in locations], dtype=torch.int64)
        if locations is not None and key == INDEX_INI:
            return torch.tensor([location.index for location in locations], dtype=torch.int64)
        value = super().__getitem__(key)
        return _collated(value) if isinstance(value, list) else value

    def get(self, key: Any, default: Any = None) -> Any:
        """Give what `batch[key]` gives, or `default` where there is no such entry."""
        try:
            return self[key]
        except NoSuchKeyError:
            return default

    def __missing__(self, key: str) -> Any:
        way_out = "" if isinstance(key, str) else ": batch.unbatch() gives the subjects, and batch[number] one of them"
        raise NoSuchKeyError(f"the batch has no entry {key!r}, only {', '.join(map(repr, self))}{way_out}")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(str(error)) from None

    def __setattr__(self, name: str, value: Any) -> None:
        if hasattr(type(self), name):
            raise AttributeError(f"{name!r} is an attribute that every batch has: set batch[{name!r}] instead")
        self[name] = value

    def __copy__(self) -> Self:
        new = type(self).__new__(type(self))
        new.update(self)
        return new

    def __repr__(self) -> str:
        return f"{type(self).__name__}(Keys: {tuple(self)}; images: {len(self.images)}; batch size: {self.batch_size})"

    def _repr_html_(self) -> str:
        return str(pictures().html_of_batch(self.images, self.batch_size, repr(self)))


@runtime_checkable
class StackableSubjects(Protocol):
    """A sequence of subjects that can make a batch of itself, without making the subjects first."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Subject: ...
    def __iter__(self) -> Iterator[Subject]: ...
    def to_batch(self) -> SubjectsBatch:
        """Make the batch."""
        ...


def collate_subjects(subjects: Sequence[Subject] | StackableSubjects, **_: Any) -> SubjectsBatch:
    """Make a batch of subjects: the function that `SubjectsLoader` collates with, and PyTorch's `DataLoader` too.

    Raises:
        SubjectError: if the subjects do not have the same entries, shapes and types.
    """
    if isinstance(subjects, StackableSubjects):
        return subjects.to_batch()
    return SubjectsBatch.from_subjects(subjects)


def subjects_of_batch(batch: Any) -> list[Subject]:
    """Give the subjects of a batch: a `SubjectsBatch`, or a dict whose images are dicts of stacked tensors, as TorchIO 1 has it.

    Raises:
        SubjectError: if it is no batch.
    """
    if isinstance(batch, SubjectsBatch):
        return batch.unbatch()
    images = (
        [name for name, value in batch.items() if isinstance(value, Mapping) and DATA in value]
        if isinstance(batch, Mapping)
        else []
    )
    if not images:
        raise SubjectError(f"something of type {type(batch).__name__} is no batch of subjects: it has no images")

    def entry(name: str, number: int) -> Any:
        value = batch[name]
        if name not in images:
            return value[number]
        stacked = {key: each[number] for key, each in value.items() if key not in (DATA, AFFINE, TYPE, PATH, STEM)}
        image_class = {INTENSITY: ScalarImage, LABEL: LabelMap}.get(value[TYPE][number], Image)
        return image_class(tensor=value[DATA][number], affine=value[AFFINE][number], type=value[TYPE][number], **stacked)

    return [Subject({name: entry(name, number) for name in batch}) for number in range(len(batch[images[0]][DATA]))]


def batch_memory(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Make an unset tensor for a batch: in a loader's worker in shared memory, so that it is not copied on its way out."""
    if get_worker_info() is None:
        return memory.empty(shape, dtype)
    return torch.empty(0, dtype=dtype).set_(shared_storage(torch.Size(shape).numel() * dtype.itemsize)).view(tuple(shape))


def _collated(values: list[Any]) -> Any:
    """Stack numbers, arrays and tensors as PyTorch does; keep everything else as a list."""
    is_number = all(isinstance(value, bool | int | float | np.generic) for value in values)
    is_array = all(isinstance(value, Tensor | np.ndarray) and value.shape == values[0].shape for value in values)
    fits = all(abs(value) < 2**63 for value in values if isinstance(value, int))
    return default_collate(values) if (is_number and fits) or is_array else list(values)


def _origin(image: Image) -> str:
    return "from memory" if image.path is None else str(image.path)
