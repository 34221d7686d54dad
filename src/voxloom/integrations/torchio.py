"""Images, subjects, data sets and transforms of TorchIO, of both generations, 1 and 2."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.geometry.affines import Affine
from ..io.arrays.memory import ArraySource
from ..volumes.batch import SubjectsBatch
from ..volumes.constants import AFFINE, DATA, HISTORY, INTENSITY, LABEL, PATH, STEM, TYPE
from ..volumes.images.image import Image, LabelMap, ScalarImage
from ..volumes.libraries import LibraryTransform, Transform, imported, in_its_type
from ..volumes.loading import SubjectsDataset
from ..volumes.subject import Subject

__all__ = [
    "HISTORY",
    "as_torchio",
    "batch_transform_of",
    "dataset_of",
    "from_torchio",
    "image_of",
    "subject_of",
    "transform_of",
]


def _torchio() -> Any:
    return imported("torchio", "torchio")


def as_torchio(thing: Any) -> Any:
    """Make an image or a subject of TorchIO of one of voxloom's.

    Voxels are not copied, and an image of one file is read when TorchIO asks for it, by voxloom. Names, types, affines, metadata
    and the history of transforms are kept.

    Args:
        thing: an `Image` or a `Subject`.

    Raises:
        MissingDependencyError: if TorchIO is not installed.

    Example:
        >>> import torch, voxloom as vx
        >>> from voxloom.integrations.torchio import as_torchio, from_torchio
        >>> subject = vx.Subject(t1=vx.ScalarImage(torch.rand(1, 8, 8, 8)), age=45)
        >>> theirs = as_torchio(subject)
        >>> type(theirs).__module__.split(".")[0], from_torchio(theirs).age
        ('torchio', 45)
    """
    tio = _torchio()
    return _their_image(tio, thing) if isinstance(thing, Image) else _their_subject(tio, thing)


def from_torchio(thing: Any) -> Any:
    """Make an image or a subject of voxloom of one of TorchIO's: the way back from `as_torchio`.

    Raises:
        TypeError: if it is neither.
    """
    found = image_of(thing) or subject_of(thing)
    if found is None:
        raise TypeError(f"something of type {type(thing).__name__} is neither an image nor a subject of TorchIO")
    return found


def image_of(thing: Any, type: str = INTENSITY) -> Image | None:  # noqa: A002 - as `Library` has it
    """See `Library`."""
    tio = _torchio()
    return _our_image(tio, thing) if isinstance(thing, tio.Image) else None


def subject_of(thing: Any) -> Subject | None:
    """See `Library`."""
    tio = _torchio()
    return _our_subject(tio, thing, None) if isinstance(thing, tio.Subject) else None


def dataset_of(thing: Any) -> SubjectsDataset | None:
    """See `Library`."""
    known = getattr(_torchio(), "SubjectsDataset", None)
    if known is None or type(thing) is not known:  # a class of the user's own may do other things
        return None
    return SubjectsDataset(thing.dry_iter(), thing._transform, thing.load_getitem)


def transform_of(thing: Any) -> Transform | None:
    """See `Library`."""
    return TorchioTransform(thing) if isinstance(thing, _torchio().Transform) else None


def batch_transform_of(thing: Any) -> Transform | None:
    """See `Library`."""
    tio = _torchio()
    return TorchioBatchTransform(thing) if isinstance(thing, tio.Transform) and hasattr(tio, "SubjectsBatch") else None


class TorchioTransform(LibraryTransform):
    """A transform of TorchIO, as a function of a `Subject`.

    Label maps keep the type of their values where that can hold them: some transforms make floats of them, and others do not.

    Args:
        transforms: the transform, or several, which are applied one after the other.
    """

    def __call__(self, subject: Subject) -> Subject:
        tio = _torchio()
        *others, last = self.transforms
        theirs = _their_subject(tio, subject)
        for transform in others:
            theirs = transform(theirs)
            if not _has_images_of(tio, theirs, subject):
                subject = _our_subject(tio, theirs, subject)
                theirs = _their_subject(tio, subject)
        return _our_subject(tio, last(theirs), subject)


class TorchioBatchTransform(TorchioTransform):
    """A transform of TorchIO 2, as a function of a `SubjectsBatch`: all subjects at once, each with parameters of its own."""

    def __call__(self, batch: SubjectsBatch) -> SubjectsBatch:  # type: ignore[override]
        tio = _torchio()
        theirs = {
            name: tio.ImagesBatch(
                images.data,
                [tio.AffineMatrix(affine) for affine in images.affine],
                image_class=_class_for(tio, images.templates[0]),
            )
            for name, images in batch.images.items()
        }
        made = tio.SubjectsBatch(theirs)
        for transform in self.transforms:
            made = transform(made)
        for name, images in made.images.items():
            if name in batch.images:
                own = batch.images[name]
                own.replace(
                    in_its_type(images.data, own.templates[0].type, own.data.dtype),
                    torch.stack([torch.from_numpy(_matrix(each)) for each in images.affines]),
                )
        batch[HISTORY] = [
            [*before, *each.applied_transforms]
            for before, each in zip(batch.metadata.get(HISTORY, [[]] * len(batch)), made.unbatch(), strict=True)
        ]
        return batch


# There


def _class_for(tio: Any, image: Image) -> Any:
    return {INTENSITY: tio.ScalarImage, LABEL: tio.LabelMap}.get(image.type, tio.Image)


def _is_first(tio: Any) -> bool:
    """Whether it is TorchIO 1."""
    return issubclass(tio.Image, dict)


def _their_image(tio: Any, image: Image) -> Any:
    image_class = _class_for(tio, image)
    more: dict[str, Any] = dict(image.metadata)
    if image_class is tio.Image and _is_first(tio):
        more[TYPE] = image.type
    if not image.is_loaded and image.can_be_reloaded and isinstance(image.path, Path) and image.path.is_file():
        return image_class(image.path, reader=_Reader(copy.copy(image)), **more)
    if _is_first(tio):
        return image_class(image.path, tensor=image.data, affine=image.affine, verify_path=False, **more)
    return image_class(image.data, affine=image.affine, **more)


class _Reader:
    """Lets TorchIO read what voxloom reads."""

    def __init__(self, image: Image) -> None:
        self.image = image

    def __call__(self, path: Any) -> tuple[Tensor, Affine]:
        return self.image.data, self.image.affine


def _their_subject(tio: Any, subject: Subject) -> Any:
    entries = {name: _their_image(tio, value) if isinstance(value, Image) else value for name, value in subject.items()}
    history = entries.pop(HISTORY, [])
    theirs = tio.Subject(**entries)
    theirs.applied_transforms = list(history)
    return theirs


# And back


def _matrix(affine: Any) -> Affine:
    """Give the affine of either generation, of which the second has a class for it."""
    return np.array(affine if isinstance(affine, np.ndarray) else affine.data.detach().cpu().numpy(), dtype=np.float64)


def _metadata_of(image: Any) -> dict[str, Any]:
    if isinstance(image, Mapping):  # TorchIO 1
        return {name: value for name, value in image.items() if name not in (DATA, AFFINE, TYPE, PATH, STEM)}
    return dict(image.metadata)


def _is_loaded(image: Any) -> bool:
    return dict.__contains__(image, DATA) if isinstance(image, Mapping) else image.is_loaded


def _our_image(tio: Any, image: Any, original: Image | None = None) -> Image:
    """Make an image of TorchIO's one of voxloom's, of the class that it had before."""
    if original is not None and _class_for(tio, original) is _base(tio, image):
        new = original.new_like(in_its_type(image.data, original.type, original.dtype), _matrix(image.affine))
        new.metadata |= _metadata_of(image)  # of which TorchIO 2 forgets what it had before
        return new
    base, more = _base(tio, image), _metadata_of(image)
    if base is tio.Image:
        more[TYPE] = getattr(image, TYPE, INTENSITY)
    ours = {tio.ScalarImage: ScalarImage, tio.LabelMap: LabelMap}.get(base, Image)
    if _is_loaded(image):
        return ours(image.path, tensor=image.data, affine=_matrix(image.affine), verify_path=False, **more)
    reader = _own_reader(tio, image)
    if image.path is not None and (reader is None or callable(reader)):
        return ours(image.path, reader=reader, affine=_given_affine(image), **more)
    # TorchIO 2 reads it by slices, from whatever it is.
    return ours(ArraySource(image.dataobj, _matrix(image.affine)), **more)


def _own_reader(tio: Any, image: Any) -> Any:
    """Give the function that a user reads a lazy image with; None where it is TorchIO's own."""
    reader = getattr(image, "reader", None) or getattr(image, "_reader", None)
    is_own = reader is not None and not getattr(reader, "__module__", "").startswith("torchio.")
    check = getattr(type(image), "read_and_check", None)  # of TorchIO 1, which says what the axes of an array are
    if check is not None and (is_own or check is not tio.Image.read_and_check):
        return image.read_and_check
    return reader if is_own else None


def _given_affine(image: Any) -> Affine | None:
    """Give the affine that a lazy image of TorchIO 2 has in place of its file's."""
    given = getattr(image, "_affine", None)
    return None if given is None else _matrix(given)


def _base(tio: Any, image: Any) -> Any:
    return next((each for each in (tio.ScalarImage, tio.LabelMap) if isinstance(image, each)), tio.Image)


def _entries_of(theirs: Any) -> dict[str, Any]:
    if isinstance(theirs, Mapping):  # TorchIO 1
        return dict(theirs)
    return {**theirs.images, **theirs.points, **theirs.bounding_boxes, **theirs.metadata}


def _has_images_of(tio: Any, theirs: Any, subject: Subject) -> bool:
    """Whether there are the same images as before: one that was added is given a type by ours."""
    return {name for name, value in _entries_of(theirs).items() if isinstance(value, tio.Image)} == set(subject.images)


def _our_subject(tio: Any, theirs: Any, original: Subject | None) -> Subject:
    before = {} if original is None else original.images
    entries = {
        name: _our_image(tio, value, before.get(name)) if isinstance(value, tio.Image) else value
        for name, value in _entries_of(theirs).items()
    }
    if original is not None:  # in the order that it had; TorchIO 2 puts images first
        entries = {name: entries[name] for name in (*original, *entries) if name in entries}
    history = list(theirs.applied_transforms)
    if history or original is not None:  # after a transform always, so that all subjects of a batch have the same entries
        entries[HISTORY] = history
    return Subject(entries)
