"""What a model is applied to, however it was given: one source of voxels, read patch by patch."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.boxes import Box
from ..core.grid.grids import PatchGrid
from ..core.sizes import Ints
from ..errors import SpaceError, SubjectError
from ..io.arrays.composed import StackedSource, read_into
from ..io.arrays.memory import ArraySource
from ..io.protocols import VolumeSource, is_source
from ..runtime import memory
from ..sampling.padded import PaddedSource
from ..volumes.libraries import as_image, found_subject
from ..volumes.subject import Subject

__all__ = ["as_source", "check_one_grid", "chosen_images", "name_of", "padded", "read_batch", "widened"]


def as_source(image: Any, image_name: str | Sequence[str] | None = None) -> VolumeSource:
    """Give the source that a model is applied to; the images of a subject are stacked, each in the type of its own.

    Args:
        image: a `Subject`, or anything else that `as_subject` or `as_image` knows.
        image_name: which images of a subject; may be left out where there is only one.

    Raises:
        SubjectError: if it is none of these, or it is not clear which images of a subject are meant.
        SpaceError: if they do not lie on one another.
    """
    subject = found_subject(image)
    if subject is not None:
        chosen = _chosen(subject, image_name)
        names, sources = list(chosen.images), list(chosen.images.values())
        return sources[0] if len(sources) == 1 else StackedSource(sources, names, check_place=False)
    if image_name is not None:
        raise SubjectError(f"image_name is {image_name!r}, but only a Subject has images with names")
    if is_source(image):
        return image
    return as_image(image)


def chosen_images(image: Any, image_name: str | Sequence[str] | None) -> Any:
    """Choose images of a subject, whatever grids they are on; all but a subject with names stays as it is."""
    subject = found_subject(image)
    if image_name is None or subject is None:
        return image
    names = [image_name] if isinstance(image_name, str) else list(image_name)
    return Subject({name: subject.get_image(name) for name in names})


def _chosen(subject: Subject, image_name: str | Sequence[str] | None) -> Subject:
    if image_name is None:
        if len(subject.images) > 1:
            raise SubjectError(f"the subject has {len(subject.images)} images: say which with image_name, {list(subject.images)}")
        return subject
    names = [image_name] if isinstance(image_name, str) else list(image_name)
    if not names:
        raise SubjectError("image_name names no image")
    chosen = Subject({name: subject.get_image(name) for name in names})
    check_one_grid(chosen)
    return chosen


def check_one_grid(subject: Subject) -> None:
    """Check that the images of a subject lie on one another.

    Raises:
        SpaceError: says in what they differ, and the way out.
    """
    try:
        subject.check_space()
    except SpaceError as error:
        names = ", ".join(map(repr, subject.images))
        raise SpaceError(f"{error}. resample_to= (--resample-to) one of {names} brings the others onto its grid") from error


def name_of(image: Any, source: VolumeSource) -> str:
    """Say what messages call the input."""
    if isinstance(image, Subject) or found_subject(image) is not None:
        return "the subject"
    if source.paths:
        return ", ".join(map(str, source.paths))
    return "the array" if isinstance(image, Tensor | np.ndarray | ArraySource) or not is_source(image) else "the image"


def padded(source: VolumeSource, domain: Box, mode: str | float) -> VolumeSource:
    """Let a source go on beyond its borders; of several that are stacked, each has a mean, a minimum and so on of its own."""
    if not isinstance(source, StackedSource):
        return PaddedSource(source, domain, mode, "image")
    parts = [PaddedSource(part, domain, mode, name) for part, name in zip(source.parts, source.names, strict=True)]
    return StackedSource(parts, source.names, check_place=False)


def widened(box: Box, context: Ints) -> Box:
    """Give a box with what lies around it."""
    start = tuple(first - around for first, around in zip(box.start, context, strict=True))
    return Box(start, tuple(last + around for last, around in zip(box.stop, context, strict=True)))


def read_batch(
    source: VolumeSource,
    grid: PatchGrid,
    patches: Sequence[Ints],
    batch_size: int,
    dtype: torch.dtype,
    pinned: bool,
    context: Ints = (0, 0, 0),
) -> Tensor:
    """Read patches of a padded source, by their numbers on the axes of a grid.

    Args:
        source: the source; boxes of the grid lie in its domain.
        grid: the grid.
        patches: which patches.
        batch_size: patches in the result, of which the last one is repeated where there are fewer.
        dtype: type of the batch.
        pinned: let the memory be such as can be copied to a GPU while that computes.
        context: voxels that are read around each patch.

    Returns:
        Tensor `(B, C, I, J, K)`.
    """
    shape = (batch_size, source.shape[0], *(size + 2 * around for size, around in zip(grid.patch_size, context, strict=True)))
    out = torch.empty(shape, dtype=dtype, pin_memory=True) if pinned else memory.empty(shape, dtype)
    for target, numbers in zip(out, patches, strict=False):
        read_into(source, target, widened(grid.box_of(numbers), context))
    for target in out[len(patches) :]:
        target.copy_(out[len(patches) - 1])
    return out
