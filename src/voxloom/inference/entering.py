"""From what a user gives to what a model is applied to: the source, the grid of the result, the mask."""

import contextlib
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..core.geometry.interpolation import Interpolation
from ..errors import SubjectError
from ..io.arrays.objects import image_source_of
from ..io.protocols import Space, VolumeSource
from ..io.spooling import Packed, spooled
from ..models.loading import Preceding
from ..models.spec import ModelSpec
from ..volumes.constants import INTENSITY
from ..volumes.images.image import Image, ScalarImage
from ..volumes.libraries import as_image, found_subject, library_of
from ..volumes.views.spaces import space_of
from .inputs import as_source, chosen_images, name_of
from .masks import on_image
from .planning.planner import SPOOLED_PART
from .planning.settings import Input
from .specified import in_model_space, looks_at_volume, named_channels

__all__ = ["Entered", "Entrance", "Request"]


@dataclass(frozen=True, eq=False)
class Request:
    """What a user asks a predictor for; see `Predictor.__call__`."""

    image: Any
    image_name: str | Sequence[str] | None = None
    like: Any = None
    resample_to: str | None = None
    mask: Any = None
    affine: Any = None


def placed(image: Image, affine: Any) -> Image:
    """Give an image, neither copied nor read, with another affine."""
    new = copy.copy(image)
    new.affine = affine
    return new


def _own(thing: Any) -> Any:
    """Give an image of another library as one of voxloom's; anything else as it is."""
    library = library_of(thing)
    found = None if library is None else library.image_of(thing, INTENSITY)
    if found is None and (source := image_source_of(thing)) is not None:
        found = ScalarImage(source)
    return thing if found is None else found


@dataclass(frozen=True, eq=False)
class Entered:
    """What a model is applied to."""

    source: VolumeSource
    unpacked: VolumeSource | None
    """What is read in its place, if its files have been unpacked."""
    name: str
    """What messages call it."""
    like: Space | None
    """The grid that results are interpolated to; None for that of the source."""
    kinds: tuple[Interpolation, Interpolation, Interpolation]
    steps: tuple[str, ...]
    mask: Any
    """The mask, which lies on the image, whatever the source is."""
    loaded_bytes: int
    """Memory that the image takes since it was looked at."""

    def told(self, prepared: Input, spec: ModelSpec) -> Input:
        """Add what is known beside the source to an input."""
        resident = prepared.resident_bytes + self.loaded_bytes
        known = replace(prepared, like=self.like, kinds=self.kinds, steps=self.steps, labels=spec.labels, unpacked=self.unpacked)
        return replace(known, resident_bytes=resident)


@dataclass(frozen=True, eq=False)
class Entrance:
    """Makes what a model is applied to of what a user gives."""

    spec: ModelSpec
    is_specified: bool
    """Whether the spec is the model's, rather than one that changes nothing."""
    kinds: tuple[Interpolation, Interpolation, Interpolation] | None
    """How scores are interpolated; None as the spec has it."""
    preceding: Preceding | None
    """What comes before the model, of a cascade."""
    shared_options: Mapping[str, Any]
    """How models are run: keywords of `Predictor` that are not a matter of one model."""
    memory_limit: int | None

    def enter(self, request: Request, stack: contextlib.ExitStack) -> Entered:
        """Make it; files that are unpacked for that stay until the stack ends.

        Raises:
            SubjectError, SpaceError, SpecError, ImageError: if something does not fit.
        """
        request = replace(request, like=_own(request.like), mask=_own(request.mask))
        image = self._source_of(request)
        name, packed = name_of(request.image, image), image.resident_bytes
        own = Space(image.shape[1:], image.affine, image.codes)
        unpacked = None
        before = None if self.preceding is None else self.preceding.found(image, self.shared_options)
        if looks_at_volume(self.spec) and self._is_to_be_unpacked(image):
            # What it says of the volume is found without holding all of it.
            found = in_model_space(stack.enter_context(spooled(image)), self.spec, name, before)
            unpacked, found = found.source, found.over(image)
        else:
            found = in_model_space(image, self.spec, name, before)
        source = found.source
        if self.preceding is not None and before is not None:
            source, unpacked = self.preceding.added(image, before, found), None
        like = own if self.spec.changes_space else None
        return Entered(
            source=source,
            unpacked=unpacked,
            name=name,
            like=like if request.like is None else space_of(request.like, source),
            kinds=found.kinds if self.kinds is None else self.kinds,
            steps=found.steps if self.is_specified else (),
            mask=request.mask if source is image else on_image(request.mask, image),
            loaded_bytes=packed - image.resident_bytes,
        )

    def _source_of(self, request: Request) -> VolumeSource:
        if request.affine is not None:
            if found_subject(request.image) is not None:
                raise SubjectError("affine= is for an array or an image, and not for a subject, whose images have their own")
            request = replace(request, image=placed(as_image(request.image), request.affine), affine=None)
        if request.image_name is None:
            return as_source(named_channels(request.image, self.spec, request.resample_to))
        if request.resample_to is None:
            return as_source(request.image, request.image_name)
        return as_source(named_channels(chosen_images(request.image, request.image_name), ModelSpec(), request.resample_to))

    def _is_to_be_unpacked(self, source: VolumeSource) -> bool:
        """Whether the files of a source are unpacked to the disk, rather than read whole, to look at the volume."""
        limit = self.memory_limit
        return limit is not None and isinstance(source, Packed) and source.packed_bytes > limit * SPOOLED_PART
