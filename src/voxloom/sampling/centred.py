"""Random patches whose centres follow a map: what the samplers that draw so share."""

import operator
import secrets
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.boxes import Box
from ..core.centres import centre_box, start_of
from ..core.rows import RowSums
from ..core.sizes import Ints
from ..core.walking import walk
from ..errors import ModeError, SamplingError, SubjectError
from ..volumes.images.image import Image
from ..volumes.libraries import as_subject
from ..volumes.subject import Subject
from .indexing import kept_sums
from .random import PatchSampler
from .shares import pick_share

__all__ = ["CentredSampler", "Classes", "parts", "weight_shares", "weight_sums"]

# A map is gone through this many values at a time.
CHUNK_VALUES = 2**21
BORDERS = ("exclude", "clamp")
ON_EMPTY = ("error", "uniform", "skip")
Classes = dict[int, RowSums]


class CentredSampler(PatchSampler):
    """What the samplers that draw the centre of a patch from a map share.

    The map is gone through once, in parts, when the sampler is bound or first called with a subject. What is kept of it, with the
    image and until its data change, is one number for each row of voxels.
    """

    def __init__(self, *arguments: Any, border: str, on_empty: str, **more: Any) -> None:
        if border not in BORDERS:
            raise ModeError(f"border is {border!r}: it must be one of {', '.join(map(repr, BORDERS))}")
        if on_empty not in ON_EMPTY:
            raise ModeError(f"on_empty is {on_empty!r}: it must be one of {', '.join(map(repr, ON_EMPTY))}")
        self.border = border
        self.on_empty = on_empty
        self._token = secrets.token_hex(8)  # this sampler and its copies, whose maps are the same
        super().__init__(*arguments, **more)
        if self._cutter is not None:
            self.prepare(self._cutter.subject)

    @abstractmethod
    def _map_name(self, subject: Subject) -> str:
        """Name the image that is the map."""

    @abstractmethod
    def _sums(self, image: Image, name: str, box: Box) -> Classes:
        """Sum the map over the rows of a box, for each class."""

    @abstractmethod
    def _shares(self, sums: Classes) -> dict[int, float]:
        """Say how often a centre is drawn from each class that is there."""

    @abstractmethod
    def _weights(self, values: Tensor, number: int) -> Tensor:
        """Turn values of the map `(C, ...)` into weights of one class."""

    def _centres(self, subject: Subject) -> Box:
        """Voxels that may be drawn as the centre of a patch."""
        volume = Box.of_shape(subject.spatial_shape)
        if self.border == "clamp":
            return volume
        fitting = centre_box(self.domain(subject), self.patch_size)
        # An axis that is padded to the size of a patch lies in it whole, wherever the centre is.
        short = [size < patch for size, patch in zip(volume.shape, self.patch_size, strict=True)]
        start = tuple(0 if is_short else first for is_short, first in zip(short, fitting.start, strict=True))
        stop = tuple(size if is_short else last for is_short, size, last in zip(short, volume.stop, fitting.stop, strict=True))
        return Box(start, stop)

    def get_probability_map(self, subject: Subject) -> Tensor:
        """Give how probable each voxel is as a centre, `(1, I, J, K)`.

        A class of your own may override it, and then nothing else says where centres are drawn. What it gives need not be
        normalised. It is kept as long as the images are the same.
        """
        subject = as_subject(subject, "the subject")
        name, image = self._map(subject)
        centres = self._centres(subject)
        sums, values = self._sums(image, name, centres), image.read(centres)
        result = torch.zeros(subject.spatial_shape, dtype=torch.float64)
        shares = self._shares(sums)
        for number, share in shares.items():
            result[centres.slices] += self._weights(values, number) * (share / sum(shares.values()) / sums[number].total)
        return result[None]

    def get_probability_map_image(self, subject: Subject) -> Image:
        """Give the image that is the map.

        A class of your own may override it, and give one of as many voxels that is no image of the subject. What it
        gives is kept as long as the images are the same.
        """
        subject = as_subject(subject, "the subject")
        return subject.get_image(self._map_name(subject))

    def _kept(self, subject: Subject, what: str, make: Callable[[], Any]) -> Any:
        """Give what is made of a subject's images: it is kept with the first of them, until that is in a subject with others."""
        images = tuple(subject.images.values())
        kept: list[tuple[tuple[Image, ...], Any]] = images[0].derived((self._token, what), list)
        last = kept[0] if kept else None
        if last is None or len(last[0]) != len(images) or any(map(operator.is_not, last[0], images)):
            last = (images, make())
            kept[:] = [last]
        return last[1]

    def _map(self, subject: Subject) -> tuple[str, Image]:
        """Give the image that is the map, and a name for it."""
        if type(self).get_probability_map_image is CentredSampler.get_probability_map_image:
            name = self._map_name(subject)
            return name, subject.get_image(name)
        given = self._kept(subject, "image", lambda: self.get_probability_map_image(subject))
        if not isinstance(given, Image) or given.spatial_shape != subject.spatial_shape:
            what = f"an image of {given.spatial_shape} voxels" if isinstance(given, Image) else f"a {type(given).__qualname__}"
            raise SamplingError(
                f"{type(self).__name__}.get_probability_map_image returned {what}: it must be an image of"
                f" {subject.spatial_shape} voxels, as many as the subject has"
            )
        return "get_probability_map_image", given

    @property
    def _has_own_map(self) -> bool:
        return type(self).get_probability_map is not CentredSampler.get_probability_map

    def _drawn_shares(self, sums: Classes) -> dict[int, float]:
        return weight_shares(sums) if self._has_own_map else self._shares(sums)

    def _own_map(self, subject: Subject) -> Image:
        made = self.get_probability_map(subject)
        if not isinstance(made, Tensor | np.ndarray) or tuple(made.shape) != (1, *subject.spatial_shape):
            what = f"of shape {tuple(made.shape)}" if hasattr(made, "shape") else f"a {type(made).__name__}"
            raise SamplingError(
                f"{type(self).__name__}.get_probability_map returned {what}: it must be a tensor"
                f" {(1, *subject.spatial_shape)}, like the images of the subject"
            )
        return Image(made)

    def _classes(self, subject: Subject) -> tuple[Image, Box, Classes]:
        box = self._centres(subject)
        if self._has_own_map:
            image: Image = self._kept(subject, "map", lambda: self._own_map(subject))
            return image, box, image.derived((self._token, box), lambda: weight_sums(image, "get_probability_map", box))
        name, image = self._map(subject)
        key = (type(self).__name__, self._key(), box)
        return image, box, image.derived(key, lambda: kept_sums(image, key, lambda: self._sums(image, name, box)))

    def _key(self) -> Any:
        """What the sums depend on beside the map and the box."""
        return None

    def prepare(self, subject: Subject) -> bool:
        """Go through the map, if that has not been done, and say whether a patch can be drawn.

        Raises:
            SamplingError: if none can, and `on_empty` does not say what to do then.
        """
        subject = as_subject(subject, "the subject")
        image, box, sums = self._classes(subject)
        if self._drawn_shares(sums):
            return True
        if self.on_empty == "error":
            raise SamplingError(self._nothing(subject, image, box))
        return self.on_empty == "uniform"

    def _nothing(self, subject: Subject, image: Image, box: Box) -> str:
        if self._has_own_map:
            return (
                f"{type(self).__name__}.get_probability_map is 0 wherever a centre of a patch fits ({box.start} to {box.stop}):"
                " nothing can be drawn from it; on_empty='uniform' or 'skip' allows that, border='clamp' allows all voxels"
            )
        name, volume, wanted = self._map(subject)[0], Box.of_shape(subject.spatial_shape), self._wanted()
        if box != volume and self._shares(self._sums(image, name, volume)):
            half = max(size // 2 for size in self.patch_size)
            return (
                f"the map {name!r} has {wanted} only near the border, where no centre of a patch of {self.patch_size} fits"
                f" (centres lie in {box.start} to {box.stop}): use border='clamp', a smaller patch,"
                f" or pad the images by {half} voxels"
            )
        return f"the map {name!r} does not have {wanted}: nothing can be drawn from it; on_empty='uniform' or 'skip' allows that"

    def _wanted(self) -> str:
        return "a value above zero (all zeros)"

    def locate(self, subject: Subject, rng: np.random.Generator) -> Ints:
        """Draw the class, then the centre, and give the start of its patch."""
        image, box, sums = self._classes(subject)
        domain, shares = self.domain(subject), self._drawn_shares(sums)
        if not shares:
            return tuple(
                int(rng.integers(first, last - size, endpoint=True))
                for first, last, size in zip(domain.start, domain.stop, self.patch_size, strict=True)
            )
        number = pick_share(shares, rng)

        def read_row(j: int, k: int) -> np.ndarray:
            j, k = box.start[1] + j, box.start[2] + k
            row = image.read(Box((box.start[0], j, k), (box.stop[0], j + 1, k + 1)))
            return (row[0].double() if self._has_own_map else self._weights(row, number)).flatten().numpy()

        voxel = sums[number].draw(rng, read_row)
        centre = tuple(first + offset for first, offset in zip(box.start, voxel, strict=True))
        return start_of(centre, self.patch_size, domain)


def weight_sums(image: Image, name: str, box: Box) -> Classes:
    """Sum a map of probabilities over the rows of a box."""
    if image.num_channels != 1:
        raise SubjectError(f"the map {name!r} has {image.num_channels} channels: a map of probabilities must have one")
    rows = np.zeros(box.shape[1:])
    for part, values in parts(image, box):
        if bool((values < 0).any()):
            raise SamplingError(f"the map {name!r} holds negative values, such as {values.min():g}: probabilities cannot be")
        rows[part] += values[0].sum(dim=0, dtype=torch.float64).numpy()
    if not np.isfinite(rows).all():
        raise SamplingError(f"the map {name!r} holds NaN or infinity: probabilities must be finite; see torch.nan_to_num")
    with np.errstate(over="ignore"):
        total = rows.sum()
    if not np.isfinite(total):
        raise SamplingError(f"the values of the map {name!r} sum to more than a number can hold: divide them by their largest")
    return {0: RowSums(rows)}


def weight_shares(sums: Classes) -> dict[int, float]:
    """Say how often the one class of such a map is drawn: not at all where the map is 0."""
    return {0: 1.0} if sums[0].total > 0 else {}


def parts(image: Image, box: Box) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
    """Yield the map in parts `(C, i, j, k)`, each with the rows of the box that it belongs to, `(J, K)`."""
    for part in walk(box, image.chunks, max(1, CHUNK_VALUES // image.num_channels)):
        _, j, k = part.relative_to(box.start).slices
        yield (j, k), image.read(part)
