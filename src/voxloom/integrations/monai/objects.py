"""MONAI's dictionaries of tensors, and its transforms of them."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from ...core.locations import PatchLocation
from ...errors import SubjectError
from ...io.arrays.memory import affine_of
from ...volumes.batch import ImagesBatch, SubjectsBatch
from ...volumes.constants import INTENSITY, LABEL, LOCATION, PATCH_LOCATION
from ...volumes.images.image import Image, LabelMap, ScalarImage
from ...volumes.libraries import LibraryTransform, Transform, as_subject, imported, in_its_type
from ...volumes.subject import Subject

__all__ = ["Labelled", "as_dict", "batch_transform_of", "dataset_of", "from_dict", "image_of", "subject_of", "transform_of"]

META, OPERATIONS = "meta", "applied_operations"
"""Entries of an image in which what a `MetaTensor` says of itself is kept."""
# Said by the image itself.
OWN = ("affine",)


def _monai() -> Any:
    return imported("monai", "monai")


def image_of(thing: Any, type: str = INTENSITY) -> Image | None:  # noqa: A002 - as `Library` has it
    """See `Library`: a `MetaTensor` `(C, I, J, K)`, or `(C, I, J)` of a plane, with place, metadata and applied operations."""
    if not isinstance(thing, _monai().data.MetaTensor):
        return None
    is_plane = thing.ndim == 3 and np.size(thing.meta.get("spatial_shape", ())) == 2
    if thing.ndim != 4 and not is_plane:
        return None
    thing = _without_pending(thing)
    # What was resampled has an affine of two axes.
    affine = _monai().data.utils.to_affine_nd(3, thing.affine).numpy() if is_plane else affine_of(thing)
    values = thing[..., None] if is_plane else thing
    return (LabelMap if type == LABEL else ScalarImage)(tensor=values, affine=affine, **_metadata_of(thing))


def _without_pending(value: Any) -> Any:
    """Give a tensor with all done that lazy transforms have left to be done."""
    if not value.has_pending_operations:
        return value
    return _monai().transforms.lazy.functional.apply_pending_transforms(value.clone(), None)


def _metadata_of(tensor: Any) -> dict[str, Any]:
    meta = {name: value for name, value in tensor.meta.items() if name not in OWN}
    return {META: meta, OPERATIONS: list(tensor.applied_operations)}


def subject_of(thing: Any) -> None:
    """See `Library`: MONAI's are dicts, which need no library."""


def dataset_of(thing: Any) -> None:
    """See `Library`: MONAI's data sets give dicts, and are taken as they are."""


def as_dict(thing: Subject | SubjectsBatch) -> dict[str, Any]:
    """Make the dictionary of a subject or a batch that MONAI's transforms, losses and metrics take.

    Images become `MetaTensor`s `(C, I, J, K)`, or `(B, C, I, J, K)` of a batch, with their affines, metadata and applied
    operations. Everything else of a subject stays as it is; that of a batch is put as MONAI's loader puts it, so that
    `decollate_batch` can part it: lists, tuples and dicts of each subject become one of what all have in a place, paths become
    text, and `patch_location` a tensor `(B, 6)` of where each patch begins and ends. What of the metadata of images only some of
    a batch have is left out. No voxel of an image is copied.

    Args:
        thing: the subject, or the batch.

    Example:
        >>> import torch, voxloom as vx
        >>> from voxloom.integrations.monai import as_dict
        >>> item = as_dict(vx.Subject(image=vx.ScalarImage(torch.rand(1, 8, 8, 8)), age=45))
        >>> type(item["image"]).__name__, item["age"]
        ('MetaTensor', 45)
    """
    if isinstance(thing, SubjectsBatch):
        is_placed = all(isinstance(each, PatchLocation) for each in thing.get(PATCH_LOCATION) or [None])
        given = {name: thing[LOCATION if name == PATCH_LOCATION and is_placed else name] for name in thing}
        return {
            name: _tensor_of_batch(value) if isinstance(value, ImagesBatch) else _put_together(name, value)
            for name, value in given.items()
        }
    return {name: _tensor_of(value) if isinstance(value, Image) else value for name, value in thing.items()}


def _tensor_of(image: Image) -> Any:
    meta = dict(image.metadata.get(META, {}))
    if image.path is not None:
        meta.setdefault("filename_or_obj", str(image.path))
    operations = list(image.metadata.get(OPERATIONS, []))
    return _monai().data.MetaTensor(image.data, affine=torch.from_numpy(image.affine), meta=meta, applied_operations=operations)


def _tensor_of_batch(images: ImagesBatch) -> Any:
    monai = _monai()
    tensor = monai.data.MetaTensor(images.data)
    tensor.is_batch = True
    metas = [dict(image.metadata.get(META, {})) for image in images.templates]
    for meta, path in zip(metas, images["path"], strict=True):
        if path:
            meta.setdefault("filename_or_obj", str(path))
    common = set.intersection(*map(set, metas))
    tensor.meta = {name: _put_together(name, [meta[name] for meta in metas]) for name in metas[0] if name in common}
    tensor.meta["affine"] = images.affine.clone()
    tensor.applied_operations = [list(image.metadata.get(OPERATIONS, [])) for image in images.templates]
    return tensor


def _put_together(name: str, values: Any) -> Any:
    """Collate what each subject of a batch has under a name as MONAI's loader does, which its `decollate_batch` relies on."""
    if not isinstance(values, list):
        return values
    if all(isinstance(value, str | bytes) or not isinstance(value, Mapping | Sequence | np.ndarray | Tensor) for value in values):
        return [str(value) if isinstance(value, PurePath) else value for value in values]
    forms = [_form_of(value) for value in values]
    try:
        if any(form != forms[0] for form in forms):
            raise ValueError("they are not all of one form")
        return default_collate(values)
    except (TypeError, RuntimeError, KeyError, ValueError) as error:
        warnings.warn(
            f"{name!r} of the subjects of a batch cannot be collated as MONAI's loader does ({error}): it stays a list with one"
            " for each subject, which decollate_batch does not part",
            RuntimeWarning,
            stacklevel=3,
        )
        return values


def _form_of(value: Any) -> Any:
    """Say what a value is but for its numbers and texts: the same of those that can be collated without loss."""
    if isinstance(value, Mapping):
        return {key: _form_of(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_form_of(each) for each in value]
    return type(value).__name__, getattr(value, "shape", None), getattr(value, "dtype", None)


def from_dict(item: Mapping[str, Any], labels: Iterable[str] | None = None) -> Subject:
    """Make a subject of a dictionary of MONAI's: the way back from `as_dict`.

    Tensors, arrays and `MetaTensor`s `(C, I, J, K)` become images, and everything else metadata.

    Args:
        item: the dictionary.
        labels: names of those that are label maps; by default those with `label`, `seg` or `mask` as a word in their name, as in
            `tumor_seg` and `mask2`.

    Raises:
        SubjectError: if there is no image in it, or none of a name in `labels`.
    """
    subject = as_subject(item, "the dictionary")
    if labels is None:
        return subject
    names = list(labels)
    missing = [name for name in names if name not in subject.images]
    if missing:
        raise SubjectError(f"the dictionary has no image {missing[0]!r}, only {', '.join(map(repr, subject.images))}")
    subject = subject.copy()
    for name, image in subject.images.items():
        wanted = LABEL if name in names else INTENSITY
        if image.type != wanted:
            subject[name] = image.of_class(LabelMap if wanted == LABEL else ScalarImage)
    return subject


class Labelled:
    """A data set of dictionaries as one of subjects, of which it is said which are label maps.

    Needed where the names do not say it: see `from_dict`.

    Args:
        dataset: MONAI's `Dataset`, `CacheDataset`, `PersistentDataset`, or any other with indices and a length.
        labels: names of the label maps.

    Example:
        >>> import torch, voxloom as vx
        >>> from voxloom.integrations.monai import Labelled
        >>> data = [{"image": torch.rand(1, 8, 8, 8), "truth": torch.zeros(1, 8, 8, 8)}]
        >>> Labelled(data, labels=["truth"])[0].truth.type
        'label'
    """

    def __init__(self, dataset: Any, labels: Sequence[str]) -> None:
        self.dataset, self.labels = dataset, tuple(labels)
        self.transform = getattr(dataset, "transform", None)  # which is seeded, where it has a generator of its own

    def __repr__(self) -> str:
        return f"Labelled({type(self.dataset).__name__} of {len(self)}, labels={self.labels})"

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Subject:
        return from_dict(self.dataset[index], self.labels)


def transform_of(thing: Any) -> Transform | None:
    """See `Library`."""
    return MonaiTransform(thing) if isinstance(thing, _monai().transforms.Transform) else None


def batch_transform_of(thing: Any) -> Transform | None:
    """See `Library`."""
    return MonaiBatchTransform(thing) if isinstance(thing, _monai().transforms.Transform) else None


def _is_of_arrays(transform: Any) -> bool:
    """Whether a transform, or the first of those that it consists of that shows it, takes an array rather than a dictionary."""
    transforms = _monai().transforms
    if isinstance(transform, transforms.MapTransform):
        return False
    parts = getattr(transform, "transforms", None)
    if isinstance(parts, Iterable):
        known = [part for part in parts if isinstance(part, transforms.Transform)]
        return bool(known) and _is_of_arrays(known[0])
    return True


class MonaiTransform(LibraryTransform):
    """A transform of MONAI, as a function of a `Subject`.

    One of dictionaries gets all images and metadata by their names. One of arrays gets the only image of a subject; where there
    are several it would be applied to each differently, and is refused. Label maps keep the type of their values where that can
    hold them.

    Args:
        transforms: the transform, or several of dictionaries, which are applied one after the other.
    """

    def __init__(self, *transforms: Any) -> None:
        super().__init__(*transforms)
        self._is_of_arrays = _is_of_arrays(transforms[0])

    def __call__(self, subject: Subject) -> Subject:
        if self._is_of_arrays:
            return self._applied_to_array(subject)
        *others, last = self.transforms
        item = as_dict(subject)
        for transform in others:
            item = _applied(transform, item)
            if not _has_images_of(item, subject):
                subject = _subject_of(item, subject)
                item = as_dict(subject)
        return _subject_of(_applied(last, item), subject)

    def _applied_to_array(self, subject: Subject) -> Subject:
        item = as_dict(subject)
        (transform,) = self.transforms
        names = list(subject.images)
        if len(names) > 1:
            name = type(transform).__name__
            raise SubjectError(
                f"{name} transforms one array, but the subject has the images {', '.join(map(repr, names))}, which it would"
                f" transform differently: use {name}d(keys=[...]), which takes the dictionary"
            )
        return _subject_of({**item, names[0]: _applied(transform, item[names[0]])}, subject)

    def then(self, following: LibraryTransform) -> LibraryTransform | None:
        """See `LibraryTransform`."""
        is_of_arrays = self._is_of_arrays or _is_of_arrays(following.transforms[0])
        return None if is_of_arrays else super().then(following)

    def __repr__(self) -> str:
        return ", ".join(f"{type(each).__module__.partition('.')[0]}.{type(each).__name__}" for each in self.transforms)


class MonaiBatchTransform(MonaiTransform):
    """A transform of MONAI, as a function of a `SubjectsBatch`: of one subject after the other, wherever the batch is."""

    def __call__(self, batch: SubjectsBatch) -> SubjectsBatch:  # type: ignore[override]
        made = [super(MonaiBatchTransform, self).__call__(subject) for subject in batch.unbatch()]
        images = {name: [subject.get_image(name) for subject in made] for name in made[0].images}
        stacked = {name: ImagesBatch(torch.stack([each.data for each in own]), own) for name, own in images.items()}
        return type(batch)(stacked, {name: [subject[name] for subject in made] for name in made[0].metadata})


def _applied(transform: Any, item: Any) -> Any:
    """Apply a transform at once, also a lazy one, as `Compose` does unless it is told otherwise."""
    transforms = _monai().transforms
    is_lazy = isinstance(transform, transforms.LazyTrait) and transform.lazy and not isinstance(transform, transforms.Compose)
    return transform(item, lazy=False) if is_lazy else transform(item)


def _has_images_of(item: Any, subject: Subject) -> bool:
    """Whether there are the same images as before, all with their places: otherwise they get from a subject what they lack."""
    if not isinstance(item, Mapping):
        return False
    names = {name for name, value in item.items() if isinstance(value, Tensor | np.ndarray) and value.ndim == 4}
    return names == set(subject.images) and all(isinstance(item[name], _monai().data.MetaTensor) for name in names)


def _subject_of(item: Any, original: Subject) -> Subject:
    """Make a subject of what a transform returned, with images of the classes that they had."""
    if not isinstance(item, Mapping):
        return as_subject(item, "what the transform returned")
    images = original.images
    entries = {name: _image_like(value, images[name]) if name in images else value for name, value in item.items()}
    return as_subject(entries, "what the transform returned")


def _image_like(value: Any, original: Image) -> Any:
    if not isinstance(value, Tensor | np.ndarray) or value.ndim != 4:
        return value
    if isinstance(value, _monai().data.MetaTensor):
        value = _without_pending(value)
    new = original.new_like(in_its_type(value, original.type, original.dtype), affine_of(value))
    if isinstance(value, _monai().data.MetaTensor):
        new.metadata |= _metadata_of(value)
    return new
