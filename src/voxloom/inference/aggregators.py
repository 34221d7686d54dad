"""Aggregators: they take a model's outputs, batch by batch, and give back whole volumes."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from ..core.accumulator import Accumulator
from ..core.grids import PatchGrid
from ..core.locations import PatchLocation
from ..core.sizes import Ints, Scale, as_overlap, as_scale, as_sizes
from ..core.windows import OverlapMode, resolve_window
from ..errors import IncompleteError, LocationError, NoSuchKeyError, OutputError, SubjectError
from ..sampling.grid import GridSampler
from ..volumes.batch import SubjectsBatch

__all__ = ["GridAggregator", "PatchAggregator"]

Key = str | None
Outputs = Tensor | Mapping[str, Tensor]


class _Aggregator:
    """What both aggregators share: all but how they come by their grid and their scales."""

    def __init__(
        self,
        spatial_shape: Ints,
        overlap_mode: OverlapMode,
        device: torch.device | str | None,
        fill: float,
    ) -> None:
        self.spatial_shape = spatial_shape
        self.overlap_mode = overlap_mode
        self.fill = fill
        self._window = resolve_window(overlap_mode)
        self._device = None if device is None else torch.device(device)
        self._accumulators: dict[Key, Accumulator] = {}
        self._scales: dict[Key, Scale] = {}
        self._subject_index: int | None = None

    def add_batch(self, batch: Outputs, locations: Any) -> None:
        """Add the outputs of a model for a batch of patches.

        Args:
            batch: tensor `(B, C, I, J, K)`, or a dict of such tensors. They are only read.
            locations: where the patches are from: `batch[LOCATION]`, that is a tensor `(B, 6)`; a list of
                `PatchLocation`; or the `SubjectsBatch` that the outputs were made from.

        Raises:
            LocationError: if there are more or fewer locations than outputs, or one does not belong to this volume.
            OutputError: if the shape, type or number of channels is not what was expected, or a patch holds NaN.
            ScaleError: if a patch does not lie on whole voxels of the output.
        """
        places = _as_locations(locations, len(self.spatial_shape))
        self._check_subject(places)
        outputs: dict[Key, Tensor] = {None: batch} if isinstance(batch, Tensor) else dict(batch.items())
        if not outputs:
            raise OutputError("the dict of outputs is empty: give at least one tensor")
        self._expect(places)
        ready = [self._checked(key, tensor, places) for key, tensor in outputs.items()]
        for accumulator, tensor, scaled in ready:
            for patch, location in zip(tensor, scaled, strict=True):
                accumulator.add(patch, location)

    def get_output(self, key: str | None = None, *, strict: bool = True) -> Tensor:
        """Give the aggregated volume `(C, I, J, K)`.

        `crop` keeps the type of the model's output; all other modes give float32, or float64 for float64. Calls that
        follow without a batch added in between give the same tensor, which is not written to again.

        Args:
            key: which output, where `add_batch` was given dicts; may be left out where there is only one.
            strict: raise an error if patches are missing; otherwise voxels are normalised by what there is, and those
                that no patch covers are set to `fill`.

        Raises:
            IncompleteError: if nothing has been added, or patches are missing.
            NoSuchKeyError: if there is no such output.
        """
        if not self._accumulators:
            raise IncompleteError("no patch has been added yet: call add_batch for each batch first")
        if key is None and len(self._accumulators) == 1:
            key = next(iter(self._accumulators))
        if key not in self._accumulators:
            names = ", ".join(map(repr, filter(None, self._accumulators))) or "only one, without a name: leave out the key"
            raise NoSuchKeyError(f"there is no output {key!r}; there is {names}")
        return self._accumulators[key].result(strict)

    def get_output_tensor(self) -> Tensor:
        """Give the aggregated volume where there is one output: the same as `get_output()`."""
        return self.get_output()

    def _expect(self, locations: list[PatchLocation]) -> None:
        """See the locations of a batch before it is added."""

    def _grid_for(self, key: Key) -> tuple[PatchGrid, Ints, Scale]:
        """Give the grid and shape of an output, in its own frame, and its scale."""
        raise NotImplementedError

    def _check_subject(self, locations: list[PatchLocation]) -> None:
        for location in locations:
            if self._subject_index is None:
                self._subject_index = location.subject_index
            if location.subject_index != self._subject_index:
                raise LocationError(
                    f"the patch {location.index} to {location.index_fin} is from subject {location.subject_index}, but earlier"
                    f" ones were from subject {self._subject_index}: use one aggregator for each subject"
                )

    def _checked(
        self, key: Key, tensor: Tensor, locations: list[PatchLocation]
    ) -> tuple[Accumulator, Tensor, list[PatchLocation]]:
        """Find the accumulator of an output, and check everything that can be known before adding to it."""
        name = "the output" if key is None else f"the output {key!r}"
        ndim = len(self.spatial_shape)
        if not isinstance(tensor, Tensor):
            raise OutputError(f"{name} is of type {type(tensor).__name__}, not a tensor")
        if tensor.ndim != ndim + 2:
            raise OutputError(
                f"{name} has shape {tuple(tensor.shape)}: it must have {ndim + 2} dimensions, (B, C, {', '.join('IJK'[:ndim])})"
            )
        if len(tensor) != len(locations):
            raise LocationError(f"{name} has {len(tensor)} patches, but there are {len(locations)} locations")
        if key in self._accumulators:
            accumulator, scale = self._accumulators[key], self._scales[key]
        else:
            grid, shape, scale = self._grid_for(key)
            accumulator = Accumulator(shape, grid, self._window, self._device or tensor.device, self.fill)
        unscaled = all(factor == 1 for factor in scale)
        scaled = locations if unscaled else [location.scaled(scale) for location in locations]
        for location, original in zip(scaled, locations, strict=True):
            if tuple(tensor.shape[2:]) != location.size:
                raise OutputError(
                    f"{name} has spatial shape {tuple(tensor.shape[2:])}, but the patch {original.index} to {original.index_fin}"
                    f" has {location.size}"
                    + ("" if unscaled else f" at the scale {tuple(map(str, scale))}")
                    + ": crop or pad the output to it, or tell the aggregator its scale"
                )
        try:
            accumulator.check(tensor.shape[1], tensor.dtype)
        except OutputError as error:
            raise OutputError(str(error).replace("the output", name, 1)) from None
        self._accumulators[key], self._scales[key] = accumulator, scale
        return accumulator, tensor, scaled


class PatchAggregator(_Aggregator):
    """Aggregate patches from anywhere in a volume.

    Args:
        spatial_shape: voxels `(I, J, K)` of the volume that the patches were cut from, without padding.
        overlap_mode: how overlapping patches are combined: `"crop"` keeps of each patch the voxels that lie nearest to its
            centre, `"average"`, `"hann"` and `"gaussian"` weigh them, and so does a function that takes a size and returns a
            window of that many positive weights.
        patch_overlap: the overlap that the patches were cut with. With it nothing need be divided; `"crop"` cannot do without it.
        output_shape: voxels of the output, where a model's output is smaller or larger than its input; a dict for outputs
            that differ. Nothing is inferred from a tensor's shape.
        device: where the volume is held; None for the device of the first batch.
        fill: value of voxels that no patch covers, when the output is read with `strict=False`.

    Raises:
        SizeError, ModeError, ScaleError: if an argument cannot be used.

    Example:
        >>> import torch, voxloom as vx
        >>> subject = vx.Subject(t1=vx.ScalarImage(torch.rand(1, 20, 20, 20)))
        >>> sampler = vx.GridSampler(subject, patch_size=12, patch_overlap=4)
        >>> aggregator = vx.PatchAggregator(subject.spatial_shape, overlap_mode="hann", patch_overlap=4)
        >>> for batch in vx.SubjectsLoader(sampler, batch_size=4):
        ...     aggregator.add_batch(batch.t1.data, batch.metadata["patch_location"])
        >>> torch.allclose(aggregator.get_output(), subject.t1.data)
        True
    """

    def __init__(
        self,
        spatial_shape: Sequence[int],
        overlap_mode: OverlapMode = "crop",
        patch_overlap: int | Sequence[int] = 0,
        output_shape: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
        *,
        device: torch.device | str | None = "cpu",
        fill: float = 0.0,
    ) -> None:
        ndim = len(spatial_shape)
        super().__init__(as_sizes(spatial_shape, ndim, "spatial_shape"), overlap_mode, device, fill)
        self.patch_overlap = as_sizes(patch_overlap, ndim, "patch_overlap", minimum=0)
        as_overlap(self.patch_overlap, tuple(overlap + 2 for overlap in self.patch_overlap))
        shapes = output_shape.items() if isinstance(output_shape, Mapping) else [(None, output_shape)]
        for key, shape in shapes:
            if shape is not None:
                as_sizes(shape, ndim, "output_shape" if key is None else f"output_shape of {key!r}")
        self.output_shape = output_shape
        self._grid: PatchGrid | None = None

    def _expect(self, locations: list[PatchLocation]) -> None:
        if self._grid is None and locations:
            self._grid = self._guess_grid(locations)

    def _guess_grid(self, locations: list[PatchLocation]) -> PatchGrid:
        """Find the grid that the first batch is from: one within the volume, or one that begins in the padding."""
        size = locations[0].size
        overlap = tuple(min(overlap, (patch - 1) // 2 * 2) for overlap, patch in zip(self.patch_overlap, size, strict=True))
        padded = PatchGrid.cover(self.spatial_shape, size, overlap, padded=True)
        if any(patch > length for patch, length in zip(size, self.spatial_shape, strict=True)):
            return padded
        plain = PatchGrid.cover(self.spatial_shape, size, overlap)
        on_plain, on_padded = (sum(location in grid for location in locations) for grid in (plain, padded))
        return padded if on_padded > on_plain else plain

    def _grid_for(self, key: Key) -> tuple[PatchGrid, Ints, Scale]:
        assert self._grid is not None
        shape = _for_key(self.output_shape, key, "output_shape") or self.spatial_shape
        scale = tuple(Fraction(out, size) for out, size in zip(shape, self.spatial_shape, strict=True))
        return self._grid.scaled(scale), tuple(shape), scale


class GridAggregator(_Aggregator):
    """Aggregate all patches of a `GridSampler`.

    What the sampler padded is dropped again: the output has the shape of the original volume, times the scale.

    Args:
        sampler: the sampler that the patches are from.
        overlap_mode: how overlapping patches are combined; see `PatchAggregator`.
        downsampling_factor: how many times smaller the output is than the input: a number, one for each axis, or a dict of
            these for outputs that differ.
        scale: how many times larger the output is, in place of `downsampling_factor`.
        device: where the volume is held; None for the device of the first batch.
        fill: value of voxels that no patch covers, when the output is read with `strict=False`.

    Raises:
        ModeError, ScaleError: if an argument cannot be used, or patches would not lie on whole voxels of the output.

    Example:
        >>> import torch, voxloom as vx
        >>> subject = vx.Subject(t1=vx.ScalarImage(torch.rand(1, 20, 20, 20)))
        >>> sampler = vx.GridSampler(subject, patch_size=12, patch_overlap=4, padding_mode="reflect")
        >>> aggregator = vx.GridAggregator(sampler)
        >>> for batch in vx.SubjectsLoader(sampler, batch_size=4):
        ...     aggregator.add_batch(batch["t1"][vx.DATA], batch[vx.LOCATION])
        >>> torch.equal(aggregator.get_output_tensor(), subject.t1.data)
        True
    """

    def __init__(
        self,
        sampler: GridSampler,
        overlap_mode: OverlapMode = "crop",
        downsampling_factor: Any = 1,
        *,
        scale: Any = None,
        device: torch.device | str | None = "cpu",
        fill: float = 0.0,
    ) -> None:
        if sampler.subject is None:
            raise SubjectError("the sampler has no subject yet: make it with GridSampler(subject, patch_size)")
        super().__init__(sampler.subject.spatial_shape, overlap_mode, device, fill)
        self.sampler = sampler
        self.scale = scale
        self.downsampling_factor = downsampling_factor
        given = scale if scale is not None else downsampling_factor
        for key in given if isinstance(given, Mapping) else (None,):
            self._grid_for(key)

    def _grid_for(self, key: Key) -> tuple[PatchGrid, Ints, Scale]:
        ndim = len(self.spatial_shape)
        if self.scale is not None:
            scale = as_scale(_for_key(self.scale, key, "scale"), ndim, "scale")
        else:
            factor = _for_key(self.downsampling_factor, key, "downsampling_factor")
            scale = tuple(1 / value for value in as_scale(factor, ndim, "downsampling_factor"))
        grid = self.sampler.grid.scaled(scale)
        return grid, PatchLocation((0,) * ndim, self.spatial_shape).scaled(scale).size, scale


def _for_key(value: Any, key: Key, name: str) -> Any:
    """Look up what was said for one output, where it was said for each."""
    if not isinstance(value, Mapping):
        return value
    if key not in value:
        raise NoSuchKeyError(f"{name} says nothing of the output {key!r}, only of {', '.join(map(repr, value))}")
    return value[key]


def _as_locations(locations: Any, ndim: int) -> list[PatchLocation]:
    """Read locations in any of the forms in which a batch gives them."""
    if isinstance(locations, SubjectsBatch):
        locations = locations.patch_location
    if isinstance(locations, PatchLocation):
        raise LocationError("locations is a single PatchLocation: give a list with one for each patch of the batch")
    if hasattr(locations, "tolist"):
        if locations.ndim != 2 or locations.shape[1] != 2 * ndim:
            raise LocationError(
                f"locations has shape {tuple(locations.shape)}: it must be (B, {2 * ndim}), first and last corner"
            )
        locations = locations.tolist()
    result = [item if isinstance(item, PatchLocation) else PatchLocation.from_row(item) for item in locations]
    for location in result:
        if len(location.size) != ndim:
            raise LocationError(f"{location} has {len(location.size)} axes, but the volume has {ndim}")
    return result
