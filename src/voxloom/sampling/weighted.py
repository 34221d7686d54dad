"""Random patches whose centres follow a map: of probabilities, or of labels."""

import copy
import math
import operator
import secrets
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from ..core.boxes import Box
from ..core.centres import centre_box, start_of
from ..core.rows import RowSums
from ..core.sizes import Ints, as_int
from ..core.values import can_hold
from ..core.walking import walk
from ..errors import ModeError, SamplingError, SizeError, SubjectError
from ..volumes.constants import LABEL
from ..volumes.image import Image
from ..volumes.subject import Subject
from .indexing import kept_sums
from .random import PatchSampler, Sizes
from .spelling import subject_may_be_left_out

__all__ = ["LabelSampler", "MixedSampler", "WeightedSampler"]

# Probabilities that are not 0 are at least so large, so that their parts of the sum are numbers.
LEAST_SHARE = 1e-300
# How far a label that is stored as a float may be off a whole number.
WHOLE = 0.01
# A map is gone through this many values at a time.
CHUNK_VALUES = 2**21
BORDERS = ("exclude", "clamp")
ON_EMPTY = ("error", "uniform", "skip")
Classes = dict[int, RowSums]
Mixture = Sequence[tuple[float, PatchSampler]]


class _CentredSampler(PatchSampler):
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
        if type(self).get_probability_map_image is _CentredSampler.get_probability_map_image:
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
        return type(self).get_probability_map is not _CentredSampler.get_probability_map

    def _drawn_shares(self, sums: Classes) -> dict[int, float]:
        return _weight_shares(sums) if self._has_own_map else self._shares(sums)

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
            return image, box, image.derived((self._token, box), lambda: _weight_sums(image, "get_probability_map", box))
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
        number = _pick_share(shares, rng)

        def read_row(j: int, k: int) -> np.ndarray:
            j, k = box.start[1] + j, box.start[2] + k
            row = image.read(Box((box.start[0], j, k), (box.stop[0], j + 1, k + 1)))
            return (row[0].double() if self._has_own_map else self._weights(row, number)).flatten().numpy()

        voxel = sums[number].draw(rng, read_row)
        centre = tuple(first + offset for first, offset in zip(box.start, voxel, strict=True))
        return start_of(centre, self.patch_size, domain)


class WeightedSampler(_CentredSampler):
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
        return _weight_sums(image, name, box)

    def _shares(self, sums: Classes) -> dict[int, float]:
        return _weight_shares(sums)

    def _weights(self, values: Tensor, number: int) -> Tensor:
        return values[0].double()


class LabelSampler(_CentredSampler):
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
        self.label_probabilities = None if label_probabilities is None else _as_probabilities(label_probabilities)
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
        for part, values in _parts(image, box):
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


class MixedSampler(PatchSampler):
    """Draw each patch with one of several samplers, as nnU-Net mixes patches of the foreground with patches from anywhere.

    Source: Isensee et al., nnU-Net, Nature Methods 18, 203-211 (2021), https://doi.org/10.1038/s41592-020-01008-z.

    Args:
        subject: see `PatchSampler`; or, in its place, the samplers.
        samplers: pairs of how often a sampler is used, in any unit, and the sampler, made without a subject. All must have the
            same patch size. How the mixture is padded counts for all of them.
        num_patches: see `PatchSampler`.
        **more: see `PatchSampler`.

    Example:
        >>> import voxloom as vx
        >>> phantom = vx.datasets.HeadPhantom(32)
        >>> by_label, uniform = vx.LabelSampler(8, "labels", {7: 1}), vx.UniformSampler(8)
        >>> mixed = vx.MixedSampler(phantom, [(1 / 3, by_label), (2 / 3, uniform)], num_patches=6)
        >>> len(list(mixed))
        6
    """

    @overload
    def __init__(self, subject: Subject, samplers: Mixture, num_patches: int | None = None, **more: Any) -> None: ...
    @overload
    def __init__(self, subject: Mixture, **more: Any) -> None: ...
    @overload
    def __init__(self, *, samplers: Mixture, **more: Any) -> None: ...
    @subject_may_be_left_out()
    def __init__(self, subject: Any = None, samplers: Any = None, num_patches: Any = None, **more: Any) -> None:
        pairs = list(samplers or [])
        are_pairs = all(isinstance(pair, Sequence) and len(pair) == 2 for pair in pairs)
        if not pairs or not are_pairs or not all(isinstance(sampler, PatchSampler) for _, sampler in pairs):
            raise SubjectError(f"samplers is {samplers!r}: it must be a list of pairs of a number and a sampler")
        seeded = next((sampler for _, sampler in pairs if sampler.seed_was_given), None)
        if seeded is not None:
            raise SamplingError(
                f"{seeded!r} of the mixture has the seed {seeded.seed}, which would not be used: give the mixture a seed"
            )
        sizes = {sampler.patch_size for _, sampler in pairs}
        if len(sizes) > 1:
            raise SizeError(f"the samplers of a mixture must have one patch size, but they have {sorted(sizes)}")
        shares = _as_probabilities(dict(enumerate(share for share, _ in pairs)), "the mixture")
        self.samplers = [(shares[number], sampler) for number, (_, sampler) in enumerate(pairs) if shares[number] > 0]
        if not self.samplers:
            raise SamplingError("all samplers of the mixture have probability 0")
        super().__init__(subject, patch_size=sizes.pop(), num_patches=num_patches, **more)
        self.samplers = [(share, self._padded_alike(sampler)) for share, sampler in self.samplers]
        if self._cutter is not None:
            self.prepare(self._cutter.subject)

    def _padded_alike(self, sampler: PatchSampler) -> PatchSampler:
        """Copy a sampler, so that it draws from what the mixture cuts from."""
        alike = copy.copy(sampler)
        alike._mode = self._mode
        if isinstance(alike, MixedSampler):
            alike.samplers = [(share, self._padded_alike(inner)) for share, inner in alike.samplers]
        return alike

    def prepare(self, subject: Subject) -> bool:
        """Prepare all samplers; those that skip the subject drop out."""
        return bool(self._usable(subject))

    def locate(self, subject: Subject, rng: np.random.Generator) -> Sequence[int]:
        """Draw the sampler, and let it locate the patch."""
        usable = self._usable(subject)
        number = _pick_share({number: share for number, (share, _) in enumerate(usable)}, rng)
        return usable[number][1].locate(subject, rng)

    def _usable(self, subject: Subject) -> list[tuple[float, PatchSampler]]:
        return [(share, sampler) for share, sampler in self.samplers if sampler.prepare(subject)]


def _weight_sums(image: Image, name: str, box: Box) -> Classes:
    """Sum a map of probabilities over the rows of a box."""
    if image.num_channels != 1:
        raise SubjectError(f"the map {name!r} has {image.num_channels} channels: a map of probabilities must have one")
    rows = np.zeros(box.shape[1:])
    for part, values in _parts(image, box):
        if bool((values < 0).any()):
            raise SamplingError(f"the map {name!r} holds negative values, such as {values.min():g}: probabilities cannot be")
        rows[part] += values[0].sum(dim=0, dtype=torch.float64).numpy()
    if not np.isfinite(rows).all():
        raise SamplingError(f"the map {name!r} holds NaN or infinity: probabilities must be finite; see torch.nan_to_num")
    return {0: RowSums(rows)}


def _weight_shares(sums: Classes) -> dict[int, float]:
    return {0: 1.0} if sums[0].total > 0 else {}


def _pick_share(shares: Mapping[int, float], rng: np.random.Generator) -> int:
    """Draw one of several numbers, each as often as its share says."""
    cumulative = np.cumsum(list(shares.values()))
    return list(shares)[int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))]


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


def _as_probabilities(given: Any, name: str = "label_probabilities") -> dict[int, float]:
    if not isinstance(given, Mapping) or not given:
        raise SamplingError(f"{name} is {given!r}: it must be a dict of labels and their probabilities")
    result = {}
    for label, share in given.items():
        is_whole = not isinstance(label, bool) and not (isinstance(label, Tensor) and label.dtype in (torch.bool, torch.float32))
        try:
            number = operator.index(label) if is_whole else None
        except (TypeError, ValueError):
            number = None
        if number is None:
            raise SamplingError(f"{name} names the label {label!r}: labels must be whole numbers")
        try:
            value = float("nan") if isinstance(share, bool | str | complex) else float(share)
        except (TypeError, ValueError, OverflowError):
            value = float("nan")
        if not math.isfinite(value) or value < 0:
            raise SamplingError(f"the probability of {label!r} in {name} is {share!r}: it must be a finite number of at least 0")
        result[number] = value
    wanted = [value for value in result.values() if value > 0]
    if wanted and not (min(wanted) >= LEAST_SHARE and math.isfinite(sum(wanted))):
        raise SamplingError(f"{name} is {dict(result)}: its numbers must be 0 or at least {LEAST_SHARE}, and have a finite sum")
    return result


def _parts(image: Image, box: Box) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
    """Yield the map in parts `(C, i, j, k)`, each with the rows of the box that it belongs to, `(J, K)`."""
    for part in walk(box, image.chunks, max(1, CHUNK_VALUES // image.num_channels)):
        _, j, k = part.relative_to(box.start).slices
        yield (j, k), image.read(part)
