"""Random patches whose centres follow a map of probabilities."""

from typing import Any, overload

from torch import Tensor

from ..core.boxes import Box
from ..errors import SubjectError
from ..volumes.images.image import Image
from ..volumes.subject import Subject
from .centred import CentredSampler, Classes, weight_shares, weight_sums
from .random import Sizes
from .spelling import subject_may_be_left_out

__all__ = ["WeightedSampler"]


class WeightedSampler(CentredSampler):
    """Draw patches whose centre is a voxel with a probability in proportion to its value in a map.

    The centre of a patch of `size` voxels is its voxel number `size // 2`.

    Args:
        subject: see `PatchSampler`.
        patch_size: see `PatchSampler`.
        probability_map: name of the image that says how probable each voxel is; values need not be normalised.
        num_patches: see `PatchSampler`.
        border: `"exclude"` centres around which a patch would reach beyond the volume, or `"clamp"`: allow them, and shift the
            patch inwards.
        on_empty: what to do where nothing can be drawn: `"error"`, draw `"uniform"`-ly, or `"skip"` the subject.
        **more: see `PatchSampler`.

    Raises:
        NoSuchKeyError: if there is no such image; lists what there is.
        SamplingError: if the map holds negative numbers, NaN or infinity, or nothing can be drawn from it.

    Example:
        >>> import torch, voxloom as vx
        >>> weights = torch.zeros(1, 8, 8, 8)
        >>> weights[0, 4, 5, 3] = 1
        >>> subject = vx.Subject(t1=vx.ScalarImage(torch.rand(1, 8, 8, 8)), where=vx.Image(weights, type=vx.SAMPLING_MAP))
        >>> sampler = vx.WeightedSampler(subject, 4, "where", num_patches=1)
        >>> [patch["index_ini"].tolist() for patch in sampler]
        [[2, 3, 1]]
    """

    @overload
    def __init__(
        self, subject: Subject, patch_size: Sizes, probability_map: str, num_patches: int | None = None, **more: Any
    ) -> None: ...
    @overload
    def __init__(self, subject: Sizes, patch_size: str, **more: Any) -> None: ...
    @overload
    def __init__(self, subject: Sizes, *, probability_map: str, **more: Any) -> None: ...
    @overload
    def __init__(self, *, patch_size: Sizes, probability_map: str, **more: Any) -> None: ...
    @subject_may_be_left_out()
    def __init__(
        self,
        subject: Any = None,
        patch_size: Any = None,
        probability_map: Any = None,
        num_patches: Any = None,
        *,
        border: str = "exclude",
        on_empty: str = "error",
        **more: Any,
    ) -> None:
        if not isinstance(probability_map, str):
            raise SubjectError(f"probability_map is {probability_map!r}: it must be the name of an image")
        self.probability_map = probability_map
        super().__init__(subject, patch_size=patch_size, num_patches=num_patches, border=border, on_empty=on_empty, **more)

    def _map_name(self, subject: Subject) -> str:
        return self.probability_map

    def _sums(self, image: Image, name: str, box: Box) -> Classes:
        return weight_sums(image, name, box)

    def _shares(self, sums: Classes) -> dict[int, float]:
        return weight_shares(sums)

    def _weights(self, values: Tensor, number: int) -> Tensor:
        return values[0].double()
