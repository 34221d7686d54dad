"""Random patches whose centres follow a map of labels."""

from collections.abc import Mapping
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from ..core.boxes import Box
from ..core.rows import RowSums
from ..core.sizes import as_int
from ..core.values import can_hold
from ..errors import SamplingError, SubjectError
from ..volumes.constants import LABEL
from ..volumes.images.image import Image
from ..volumes.subject import Subject
from .centred import CentredSampler, Classes, parts
from .random import Sizes
from .shares import as_probabilities
from .spelling import subject_may_be_left_out

__all__ = ["LabelSampler"]

# How far a label that is stored as a float may be off a whole number.
WHOLE = 0.01


class LabelSampler(CentredSampler):
    """Draw patches whose centre has a label: first the class, then one of its voxels, each with the same probability.

    Args:
        subject: see `PatchSampler`.
        patch_size: see `PatchSampler`.
        label_name: name of the label map; None takes the first image of type `LABEL`.
        label_probabilities: how often a centre is drawn from each class, in any unit; classes that a subject lacks drop out.
            None draws from all voxels above 0 alike. Labels that are stored as floats may be up to 0.01 off a whole number. In a
            map of several channels the channel is the class, and its voxels are those above 0; None draws from those of any
            channel but the first.
        num_patches: see `PatchSampler`.
        ignore_label: a label that is never drawn, and no foreground.
        border: see `WeightedSampler`.
        on_empty: see `WeightedSampler`.
        **more: see `PatchSampler`.

    Raises:
        NoSuchKeyError: if there is no such image; lists what there is.
        SamplingError: if a probability is negative or not finite, a label is no whole number, or nothing can be drawn.

    Example:
        >>> import torch, voxloom as vx
        >>> labels = torch.zeros(1, 8, 8, 8, dtype=torch.uint8)
        >>> labels[0, 4, 5, 3] = 2
        >>> subject = vx.Subject(seg=vx.LabelMap(labels))
        >>> sampler = vx.LabelSampler(patch_size=4, label_name="seg", label_probabilities={0: 0, 1: 3, 2: 1})
        >>> next(sampler(subject)).patch_location.index
        (2, 3, 1)
    """

    @overload
    def __init__(
        self,
        subject: Subject,
        patch_size: Sizes,
        label_name: str | None = None,
        label_probabilities: Mapping[int, float] | None = None,
        num_patches: int | None = None,
        **more: Any,
    ) -> None: ...
    @overload
    def __init__(
        self, subject: Sizes, patch_size: str | None = None, label_name: Mapping[int, float] | None = None, **more: Any
    ) -> None: ...
    @overload
    def __init__(self, subject: Sizes, *, label_name: str, **more: Any) -> None: ...
    @overload
    def __init__(self, *, patch_size: Sizes, **more: Any) -> None: ...
    @subject_may_be_left_out()
    def __init__(
        self,
        subject: Any = None,
        patch_size: Any = None,
        label_name: Any = None,
        label_probabilities: Any = None,
        num_patches: Any = None,
        *,
        ignore_label: int | None = None,
        border: str = "exclude",
        on_empty: str = "error",
        **more: Any,
    ) -> None:
        self.label_name = label_name
        self.label_probabilities = None if label_probabilities is None else as_probabilities(label_probabilities)
        self.ignore_label = None if ignore_label is None else as_int(ignore_label, "ignore_label", -(2**62))
        super().__init__(subject, patch_size=patch_size, num_patches=num_patches, border=border, on_empty=on_empty, **more)

    def _map_name(self, subject: Subject) -> str:
        if self.label_name is not None:
            return str(self.label_name)
        for name, image in subject.images.items():
            if image.type == LABEL:
                return name
        raise SubjectError(
            f"the subject has no label map, only {', '.join(map(repr, subject.images))}: make a LabelMap of the one that holds"
            " labels, rather than a ScalarImage, or give label_name"
        )

    def _key(self) -> Any:
        return (None if self.label_probabilities is None else tuple(self._drawn()), self.ignore_label)

    def _drawn(self) -> list[int]:
        """The classes that are drawn from; one for the whole foreground where no probabilities were given."""
        if self.label_probabilities is None:
            return [1]
        return [label for label, share in self.label_probabilities.items() if share > 0 and label != self.ignore_label]

    def _sums(self, image: Image, name: str, box: Box) -> Classes:
        if image.num_channels > 1:
            missing = [label for label in self._drawn() if not 0 <= label < image.num_channels]
            if missing:
                raise SamplingError(
                    f"label_probabilities names class {missing[0]}, but the map {name!r} has only {image.num_channels} channels"
                )
        rows = {label: np.zeros(box.shape[1:], dtype=np.int32) for label in self._drawn()}
        for part, values in parts(image, box):
            if values.is_floating_point():
                _check_whole(values if image.num_channels == 1 else values[~values.isfinite()], name)
            for label, sums in rows.items():
                sums[part] += self._weights(values, label).sum(dim=0, dtype=torch.int32).numpy()
        return {label: RowSums(sums) for label, sums in rows.items()}

    def _shares(self, sums: Classes) -> dict[int, float]:
        given = self.label_probabilities or {1: 1.0}
        return {label: given[label] for label, rows in sums.items() if rows.total > 0}

    def _weights(self, values: Tensor, number: int) -> Tensor:
        if len(values) > 1 and self.label_probabilities is None:
            return (values[[channel for channel in range(1, len(values)) if channel != self.ignore_label]] > 0).any(dim=0)
        if len(values) > 1:
            return values[number] > 0
        labels = values[0].round() if values.is_floating_point() else values[0]
        if self.label_probabilities is not None:
            return _equals(labels, number)
        foreground = labels > 0
        return foreground if self.ignore_label is None else foreground & ~_equals(labels, self.ignore_label)

    def _wanted(self) -> str:
        if self.label_probabilities is None:
            return "foreground"
        labels = ", ".join(map(str, self._drawn()))
        return f"any of the labels {labels}" if labels else "a label of which the probability is not 0"


def _check_whole(labels: Tensor, name: str) -> None:
    """Refuse values that are no labels; rounding of a file's scale is let through."""
    far = ~((labels - labels.round()).abs() <= WHOLE)  # so that NaN and infinity are far as well
    if far.any():
        raise SamplingError(
            f"the label map {name!r} holds {float(labels[far][0]):.4g}, which is no whole number: resample labels with nearest"
            " neighbours, make labels of a map of probabilities by a threshold, or draw by its values, with a WeightedSampler"
        )


def _equals(labels: Tensor, number: int) -> Tensor:
    """Say where a label is; PyTorch would compare with what is left of a number that the type of the labels cannot hold."""
    is_exact = can_hold(labels.dtype, number) and torch.tensor(number, dtype=labels.dtype).item() == number
    return labels == number if is_exact else torch.zeros_like(labels, dtype=torch.bool)
