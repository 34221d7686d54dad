"""Subjects: the images of one person or specimen, and whatever else is known of it."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch.utils.data._utils.collate import default_collate_fn_map

from ..core.geometry.affines import SPACE_TOLERANCE, corner_displacement
from ..core.locations import PatchLocation
from ..errors import NoSuchKeyError, SpaceError, SubjectError
from .constants import INDEX_INI, INTENSITY, LABEL, LOCATION, PATCH_LOCATION
from .images.exchange import pictures
from .images.image import Image
from .images.slices import as_slices

__all__ = ["Subject"]


class Subject(dict[str, Any]):
    """A dict of images and metadata whose entries are attributes too.

    A patch is a subject that knows where it is from: `patch.patch_location` is its `PatchLocation`, `patch["index_ini"]` an
    array of the first voxel, and `patch[LOCATION]` a tensor of the first voxel and one past the last.

    Args:
        *args: at most one mapping of names to images and metadata.
        **kwargs: more of them. At least one entry must be an image.

    Raises:
        SubjectError: if there is no image.

    Example:
        >>> import torch, voxloom as vx
        >>> subject = vx.Subject(t1=vx.ScalarImage(torch.rand(1, 8, 8, 8)), age=45)
        >>> subject
        Subject(Keys: ('t1', 'age'); images: 1)
        >>> subject.age, subject["t1"].spatial_shape
        (45, (8, 8, 8))
    """

    def __init__(self, *args: Mapping[str, Any], **kwargs: Any) -> None:
        if len(args) > 1 or (args and not isinstance(args[0], Mapping)):
            raise SubjectError(f"a subject is made of one dict, or of keywords, not of {args!r}")
        super().__init__(*args, **kwargs)
        if not self.images:
            example = "Subject(t1=ScalarImage('t1.nii.gz'))"
            for name, value in self.items():
                if isinstance(value, str | os.PathLike):
                    example = f"make one of {str(value)!r}, {name}=ScalarImage({str(value)!r})"
            raise SubjectError(
                f"a subject needs at least one image, but it has {', '.join(map(repr, self)) or 'no entries'}: {example}"
            )

    # Entries

    @property
    def images(self) -> dict[str, Image]:
        """All images, by name."""
        return {name: value for name, value in self.items() if isinstance(value, Image)}

    @property
    def metadata(self) -> dict[str, Any]:
        """All entries that are not images, by name."""
        return {name: value for name, value in self.items() if not isinstance(value, Image)}

    def get_images_dict(
        self, intensity_only: bool = True, include: Sequence[str] | None = None, exclude: Sequence[str] | None = None
    ) -> dict[str, Image]:
        """Give the images by name, those of intensities alone or all; of these only some names, or all but some."""
        return {
            name: image
            for name, image in self.images.items()
            if (not intensity_only or image.type == INTENSITY)
            and (include is None or name in include)
            and (exclude is None or name not in exclude)
        }

    def get_images(
        self, intensity_only: bool = True, include: Sequence[str] | None = None, exclude: Sequence[str] | None = None
    ) -> list[Image]:
        """Give the images; see `get_images_dict`."""
        return list(self.get_images_dict(intensity_only, include, exclude).values())

    def get_images_names(self) -> list[str]:
        """Give the names of all images."""
        return list(self.images)

    def get_scalar_image(self, image_name: str) -> Image:
        """Give an image of intensities by its name.

        Raises:
            NoSuchKeyError: if there is none of that name.
            SubjectError: if it is of another type.
        """
        return self._of_type(image_name, INTENSITY)

    def get_label_map(self, image_name: str) -> Image:
        """Give a label map by its name; see `get_scalar_image`."""
        return self._of_type(image_name, LABEL)

    def _of_type(self, name: str, wanted: str) -> Image:
        image = self.get_image(name)
        if image.type != wanted:
            raise SubjectError(f"the image {name!r} is of type {image.type!r}, not {wanted!r}")
        return image

    def is_2d(self) -> bool:
        """Whether all images are single slices."""
        return all(image.is_2d() for image in self.images.values())

    def get_first_image(self) -> Image:
        """Give the image that was named first."""
        return next(iter(self.images.values()))

    def add_image(self, image: Image, image_name: str) -> None:
        """Add an image."""
        if not isinstance(image, Image):
            raise SubjectError(f"{image_name!r} is of type {type(image).__name__}, not an image")
        self[image_name] = image

    def remove_image(self, image_name: str) -> None:
        """Remove an image."""
        self.get_image(image_name)
        del self[image_name]

    def get_image(self, name: str) -> Image:
        """Give an image by its name.

        Raises:
            NoSuchKeyError: if there is none of that name; lists what there is.
        """
        if name in self.images:
            return self.images[name]
        hint = ""
        if isinstance(self.get(name), str | os.PathLike):
            hint = f"; {name!r} is the text {str(self[name])!r}: make an image of it, ScalarImage(...) or LabelMap(...)"
        raise NoSuchKeyError(f"the subject has no image {name!r}, only {', '.join(map(repr, self.images))}{hint}")

    def __getitem__(self, key: Any) -> Any:
        """Give an entry by its name, or the part of all images that slices `(I, J, K)` cut out: all channels stay."""
        if isinstance(key, str):
            # Of a patch these are its location, also where the subject has metadata of such a name.
            derived = location_entry(key, self.get(PATCH_LOCATION))
            return super().__getitem__(key) if derived is None else derived
        spatial = as_slices(key, self.spatial_shape)
        whole = (slice(None), *spatial)
        entries = {name: value[whole] if isinstance(value, Image) else value for name, value in self.items()}
        location = entries.pop(PATCH_LOCATION, None)
        if location is not None and all(part.step == 1 for part in spatial):  # otherwise it is no patch any more
            index = tuple(first + part.start for first, part in zip(location.index, spatial, strict=True))
            size = tuple(part.stop - part.start for part in spatial)
            entries[PATCH_LOCATION] = PatchLocation(index, size, location.subject_index)
        return Subject(entries)

    def __missing__(self, key: str) -> Any:
        raise NoSuchKeyError(f"the subject has no entry {key!r}, only {', '.join(map(repr, self))}")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(str(error)) from None

    def __setattr__(self, name: str, value: Any) -> None:
        if hasattr(type(self), name):
            raise AttributeError(f"{name!r} is an attribute that every subject has: set subject[{name!r}] instead")
        self[name] = value

    def __delattr__(self, name: str) -> None:
        if name not in self:
            raise AttributeError(f"the subject has no entry {name!r}")
        del self[name]

    # Geometry

    @property
    def spatial_shape(self) -> tuple[int, int, int]:
        """Voxels `(I, J, K)` of all images.

        Raises:
            SpaceError: if the images differ.
        """
        self._check_shapes()
        return self.get_first_image().spatial_shape

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Channels and voxels `(C, I, J, K)` of all images.

        Raises:
            SpaceError: if the images differ.
        """
        self._check_same({name: image.shape for name, image in self.images.items()}, "shapes")
        return self.get_first_image().shape

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Millimetres from one voxel to the next along each axis, in all images.

        Raises:
            SpaceError: if the images differ by more than a thousandth.
        """
        self._check_same(
            {name: tuple(round(side, 3) for side in image.spacing) for name, image in self.images.items()}, "spacings"
        )
        return self.get_first_image().spacing

    def check_space(self, tolerance: float = SPACE_TOLERANCE) -> None:
        """Check that all images have the same voxels, and that these lie at the same places.

        Args:
            tolerance: how far corners may lie apart, as a part of the shortest side of a voxel.

        Raises:
            SpaceError: names the images, and how many millimetres the corners are apart.
        """
        self._check_shapes()
        (first_name, first), *others = self.images.items()
        limit = tolerance * min(first.spacing)
        for name, image in others:
            distance = corner_displacement(first.affine, image.affine, first.spatial_shape)
            if distance > limit:
                raise SpaceError(
                    f"the images {first_name!r} and {name!r} do not lie on one another: a corner is displaced by"
                    f" {distance:.4g} mm, and {limit:.4g} mm, {tolerance:g} of a voxel's shortest side, are allowed."
                    " Resample one onto the other, or pass check_space=False if their headers are wrong"
                )

    check_consistent_space = check_space

    def _check_shapes(self) -> None:
        self._check_same({name: image.spatial_shape for name, image in self.images.items()}, "spatial shapes")

    def _check_same(self, values: dict[str, tuple[Any, ...]], what: str) -> None:
        if len(set(values.values())) > 1:
            listed = ", ".join(f"{name!r}: {value}" for name, value in values.items())
            raise SpaceError(f"Inconsistent {what} in one subject: {listed}. Resample the images to one grid")

    def plot(self, labels: str | None = None, *, at: Any = None, label: int | None = None, output: Any = None) -> Any:
        """Draw three planes of each image; see `Image.plot`.

        Args:
            labels: name of a label map that is laid on top of the others.
            at: the voxel `(I, J, K)` that the planes go through; by default the middle.
            label: the label through whose middle they go instead.
            output: name of a picture to write.

        Example:
            >>> import voxloom as vx
            >>> len(vx.datasets.HeadPhantom(32).plot(labels="labels", label=7).axes)
            6
        """
        chosen = None if labels is None else self.get_image(labels)
        if chosen is None and label is not None:
            chosen = next((image for image in self.images.values() if image.type == LABEL), None)
        return pictures().plot_images(self.images, None if labels is None else chosen, at, label, 0, output, chosen)

    def _repr_html_(self) -> str:
        return pictures().html_of(self.images, self.metadata)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *(name for name in self if name.isidentifier())})

    def load(self) -> None:
        """Read the data of all images."""
        for image in self.images.values():
            image.load()

    def unload(self) -> None:
        """Forget the data of all images that can be read again from a file."""
        for image in self.images.values():
            if image.can_be_reloaded:
                image.unload()

    def __copy__(self) -> Self:
        new = type(self).__new__(type(self))
        new.update(self)
        return new

    def copy(self) -> Self:
        """Make a shallow copy."""
        return self.__copy__()

    def __or__(self, other: Any) -> Self:  # type: ignore[override]
        new = self.__copy__()
        new.update(other)
        return new

    def __repr__(self) -> str:
        return f"{type(self).__name__}(Keys: {tuple(self)}; images: {len(self.images)})"


def _collated(subjects: Sequence[Subject], **_: Any) -> Any:
    """Make a batch of subjects, where PyTorch's own loader collates them."""
    from .batch import collate_subjects  # which needs this file

    return collate_subjects(subjects)


# A type that is registered here is tried before PyTorch's branch for mappings, which would take a subject apart.
default_collate_fn_map[Subject] = _collated


def location_entry(key: str, location: PatchLocation | None) -> Any:
    """Give what follows from a patch's location under the names that patches have always had."""
    if location is None:
        return None
    if key == LOCATION:
        return torch.tensor(location.tolist(), dtype=torch.int64)
    if key == INDEX_INI:
        return np.array(location.index, dtype=np.int64)
    return None
