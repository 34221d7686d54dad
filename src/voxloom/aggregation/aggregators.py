"""Aggregators: they take a model's outputs, batch by batch, and give back whole volumes."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from ..core.boxes import Box
from ..core.grid.grids import PatchGrid
from ..core.grid.windows import OverlapMode, resolve_window
from ..core.locations import PatchLocation
from ..core.sizes import Ints, Scale, as_overlap, as_scale, as_shape, as_shares, as_sizes
from ..core.values import as_number, is_finite
from ..errors import IncompleteError, LocationError, NoSuchKeyError, OutputError, ScaleError, SubjectError
from ..sampling.grid import GridSampler
from ..volumes.batch import SubjectsBatch
from .accumulator import Accumulator

__all__ = ["GridAggregator", "PatchAggregator"]

Key = str | None
Outputs = Tensor | Mapping[str, Tensor]


@dataclass
class _Output:
    """One output: where it is summed up, and how it relates to the input."""

    accumulator: Accumulator
    grid: PatchGrid
    """The patches in the frame of the input, in which messages name them."""
    scale: Scale


class _Aggregator:
    """What both aggregators share: all but how they come by their grid and their scales."""

    takes_off_grid: bool

    def __init__(self, spatial_shape: Ints, overlap_mode: OverlapMode, device: torch.device | str | None, fill: float) -> None:
        self.spatial_shape = spatial_shape
        self.overlap_mode = overlap_mode
        self.fill = as_number(fill, "fill")
        self._window = resolve_window(overlap_mode)
        self._device = None if device is None else torch.device(device)
        self._outputs: dict[Key, _Output] = {}
        self._subject_indices: set[int | None] = set()
        self._has_warned = False

    def __repr__(self) -> str:
        outputs = ", ".join("the output" if name is None else repr(name) for name in self._outputs) or "nothing yet"
        return f"{type(self).__name__}({self.spatial_shape} voxels, overlap mode {self.overlap_mode!r}; added: {outputs})"

    def add_batch(self, batch: Outputs, locations: Any) -> None:
        """Add the outputs of a model for a batch of patches: all of them, or after an error none.

        Args:
            batch: tensor `(B, C, I, J, K)`, or a dict of such tensors. They are only read.
            locations: where the patches are from: `batch[LOCATION]`, that is a tensor `(B, 6)`; a list of
                `PatchLocation`; or the `SubjectsBatch` that the outputs were made from.

        Raises:
            LocationError: if there are more or fewer locations than outputs, or one does not belong to this volume.
            OutputError: if the shape, type or number of channels is not what was expected, or a patch holds NaN.
            ScaleError: if a patch does not lie on whole voxels of the output.
        """
        places = _as_locations(locations, self.spatial_shape)
        tensors: Mapping[Any, Any] = batch if isinstance(batch, Mapping) else {None: batch}
        if not tensors:
            raise OutputError("the dict of outputs is empty: give at least one tensor")
        if (
            torch.is_grad_enabled()
            and not self._has_warned
            and any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in tensors.values())
        ):
            self._has_warned = True
            warnings.warn(
                "the outputs have gradients, which the sum does not keep: run the model under torch.inference_mode(), which also"
                " saves its memory; to train through a sum, add up the patches yourself",
                RuntimeWarning,
                stacklevel=2,
            )
        indices = self._subject_indices | {place.subject_index for place in places}
        if len(indices) > 1:
            raise LocationError(
                f"the patches are from several subjects, {', '.join(map(str, sorted(indices, key=str)))}:"
                " use one aggregator for each subject"
            )
        grid = self._grid_of(places)
        ready = []
        for key, tensor in tensors.items():
            name = "the output" if key is None else f"the output {key!r}"
            self._check_form(name, tensor, places)
            if places:
                output = self._outputs.get(key) or self._make_output(key, grid, tensor.device)
                ready.append((key, output, tensor.detach(), self._checked(name, output, tensor.detach(), places)))
        self._subject_indices = indices
        self._settle(grid)
        for key, output, tensor, scaled in ready:
            self._outputs[key] = output
            for patch, location in zip(tensor, scaled, strict=True):
                output.accumulator.add(patch, location)

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
        if not self._outputs:
            raise IncompleteError("no patch has been added yet: call add_batch for each batch first")
        if key is None and len(self._outputs) == 1:
            key = next(iter(self._outputs))
        if key not in self._outputs:
            names = ", ".join(map(repr, filter(None, self._outputs))) or "only one, without a name: leave out the key"
            raise NoSuchKeyError(f"there is no output {key!r}; there is {names}")
        output = self._outputs[key]
        missing = output.accumulator.missing
        # Among patches from anywhere none can be missed; what counts is whether they cover the volume.
        if strict and len(missing) and not output.accumulator.off_grid:
            first = output.grid[int(missing[0])]
            raise IncompleteError(
                f"{len(missing)} of {len(output.grid)} patches are missing, the first at {first.index} to {first.index_fin}:"
                " add them, or ask with strict=False for what there is"
            )
        return output.accumulator.result(strict)

    def get_output_tensor(self) -> Tensor:
        """Give the aggregated volume where there is one output: the same as `get_output()`."""
        return self.get_output()

    def _grid_of(self, locations: list[PatchLocation]) -> PatchGrid:
        """Give the grid in the frame of the input, or work it out from the first batch."""
        raise NotImplementedError

    def _settle(self, grid: PatchGrid) -> None:
        """Keep the grid, now that a batch has been found to be good."""

    def _scaled_grid(self, key: Key, grid: PatchGrid) -> tuple[PatchGrid, Scale]:
        """Give the grid in the frame of an output, and its scale."""
        raise NotImplementedError

    def _make_output(self, key: Key, grid: PatchGrid, device: torch.device) -> _Output:
        scaled, scale = self._scaled_grid(key, grid)
        return _Output(Accumulator(scaled, self._window, self._device or device, self.fill), grid, scale)

    def _check_form(self, name: str, tensor: Any, locations: list[PatchLocation]) -> None:
        ndim = len(self.spatial_shape)
        if not isinstance(tensor, Tensor):
            raise OutputError(f"{name} is of type {type(tensor).__name__}: it must be a tensor, or several in a dict by name")
        if tensor.ndim != ndim + 2:
            axes = ", ".join("IJK"[:ndim])
            raise OutputError(f"{name} has shape {tuple(tensor.shape)}: it must have {ndim + 2} dimensions, (B, C, {axes})")
        if len(tensor) != len(locations):
            raise LocationError(f"{name} has {len(tensor)} patches, but there are {len(locations)} locations")

    def _checked(self, name: str, output: _Output, tensor: Tensor, locations: list[PatchLocation]) -> list[PatchLocation]:
        """Check everything before anything is added, and give the locations in the frame of the output."""
        unscaled = all(factor == 1 for factor in output.scale)
        scaled = locations if unscaled else [location.scaled(output.scale) for location in locations]
        try:
            output.accumulator.check(tensor.shape[1], tensor.dtype)
        except OutputError as error:
            raise OutputError(f"{name} {error}") from None
        for patch, place, location in zip(tensor, scaled, locations, strict=True):
            where = f"the patch {location.index} to {location.index_fin}"
            if tuple(patch.shape[1:]) != place.size:
                raise OutputError(
                    f"{name} has spatial shape {tuple(patch.shape[1:])}, but {where} has {place.size}"
                    + ("" if unscaled else f" at the scale {tuple(map(str, output.scale))}")
                    + ": pad the output of valid convolutions to it, or, if the model changes the scale, tell the aggregator"
                )
            if location not in output.grid and not (self.takes_off_grid and self._window):
                raise LocationError(
                    f"{where} is none of the grid of {len(output.grid)} patches of {output.grid.patch_size}, of which the first"
                    f" is {output.grid[0].index} to {output.grid[0].index_fin}: {self._way_out()}"
                )
            _check_values(patch, f"{name} for {where}")
        return scaled

    def _way_out(self) -> str:
        raise NotImplementedError


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
        padded: whether the patches were cut from a padded volume; None works it out from the first batch.
        device: where the volume is held; None for the device of the first batch.
        fill: value of voxels that no patch covers, when the output is read with `strict=False`.

    Raises:
        SizeError, ModeError: if an argument cannot be used.

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

    takes_off_grid = True

    def __init__(
        self,
        spatial_shape: Sequence[int],
        overlap_mode: OverlapMode = "crop",
        patch_overlap: float | Sequence[float] = 0,
        output_shape: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
        *,
        padded: bool | None = None,
        device: torch.device | str | None = "cpu",
        fill: float = 0.0,
    ) -> None:
        shape = as_shape(spatial_shape, "spatial_shape")
        super().__init__(shape, overlap_mode, device, fill)
        self.patch_overlap = as_shares(patch_overlap, len(shape))
        self.padded = padded
        self.output_shape: Ints | dict[str, Ints]
        if isinstance(output_shape, Mapping):
            self.output_shape = {
                key: as_sizes(value, len(shape), f"output_shape of {key!r}") for key, value in output_shape.items()
            }
        else:
            self.output_shape = shape if output_shape is None else as_sizes(output_shape, len(shape), "output_shape")
        self._grid: PatchGrid | None = None

    def _grid_of(self, locations: list[PatchLocation]) -> PatchGrid:
        if self._grid is not None:
            return self._grid
        size = locations[0].size if locations else self.spatial_shape
        overlap = as_overlap(self.patch_overlap, size, is_even=self.padded is True)
        if self.padded is False or any(each % 2 for each in overlap):  # odd ones are never of a padded volume
            return PatchGrid.cover(self.spatial_shape, size, overlap)
        padded = PatchGrid.cover(self.spatial_shape, size, overlap, padded=True)
        if self.padded is None and not any(map(int.__gt__, size, self.spatial_shape)):
            plain = PatchGrid.cover(self.spatial_shape, size, overlap)
            on_plain, on_padded = (sum(location in grid for location in locations) for grid in (plain, padded))
            return padded if on_padded > on_plain else plain
        return padded

    def _settle(self, grid: PatchGrid) -> None:
        self._grid = grid

    def _scaled_grid(self, key: Key, grid: PatchGrid) -> tuple[PatchGrid, Scale]:
        shape = _for_key(self.output_shape, key, "output_shape")
        scale = tuple(Fraction(out, size) for out, size in zip(shape, self.spatial_shape, strict=True))
        return grid.scaled(scale), scale

    def _way_out(self) -> str:
        return (
            "'crop' keeps the centres of a grid, so give the patch_overlap that the patches were cut with, and padded=True if the"
            " volume was padded; or use GridAggregator(sampler), or choose 'average', 'hann' or 'gaussian'"
        )


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

    takes_off_grid = False

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
        if not isinstance(sampler, GridSampler) or sampler.subject is None:
            raise SubjectError(f"{sampler!r} is no sampler that has a subject: make it with GridSampler(subject, patch_size)")
        super().__init__(sampler.grid.spatial_shape, overlap_mode, device, fill)
        if scale is not None and downsampling_factor != 1:
            raise ScaleError(f"both scale={scale!r} and downsampling_factor={downsampling_factor!r} were given: give one of them")
        self.sampler = sampler
        self.scale = scale
        self.downsampling_factor = downsampling_factor
        given = downsampling_factor if scale is None else scale
        for key in given if isinstance(given, Mapping) else (None,):
            self._scaled_grid(key, sampler.grid)

    def _grid_of(self, locations: list[PatchLocation]) -> PatchGrid:
        return self.sampler.grid

    def _scaled_grid(self, key: Key, grid: PatchGrid) -> tuple[PatchGrid, Scale]:
        ndim = len(self.spatial_shape)
        if self.scale is None:
            factor = _for_key(self.downsampling_factor, key, "downsampling_factor")
            scale = tuple(1 / value for value in as_scale(factor, ndim, "downsampling_factor"))
        else:
            scale = as_scale(_for_key(self.scale, key, "scale"), ndim, "scale")
        return grid.scaled(scale), scale

    def _way_out(self) -> str:
        return "add the outputs for the sampler's own patches, or use PatchAggregator, which takes any"


def _for_key(value: Any, key: Key, name: str) -> Any:
    """Look up what was said for one output, where it was said for each."""
    if not isinstance(value, Mapping):
        return value
    if key not in value:
        raise NoSuchKeyError(f"{name} says nothing of the output {key!r}, only of {', '.join(map(repr, value))}")
    return value[key]


def _as_locations(locations: Any, spatial_shape: Ints) -> list[PatchLocation]:
    """Read locations in any of the forms in which a batch gives them, and check that they touch the volume."""
    ndim = len(spatial_shape)
    if isinstance(locations, SubjectsBatch):
        if "patch_location" not in locations:
            raise LocationError("the batch has no patch locations: it is not of a sampler")
        locations = locations.patch_location
    if isinstance(locations, PatchLocation):
        raise LocationError("locations is a single PatchLocation: give a list with one for each patch of the batch")
    if hasattr(locations, "tolist"):
        if locations.ndim != 2 or locations.shape[1] != 2 * ndim:
            raise LocationError(
                f"locations has shape {tuple(locations.shape)}: it must be (B, {2 * ndim}), first and last corner"
            )
        locations = locations.tolist()
    if not isinstance(locations, Sequence) or isinstance(locations, str):
        raise LocationError(f"locations is of type {type(locations).__name__}: give batch[LOCATION], or a list of PatchLocation")
    result = [item if isinstance(item, PatchLocation) else PatchLocation.from_row(item) for item in locations]
    for location in result:
        if len(location.size) != ndim or len(location.index) != ndim:
            raise LocationError(f"{location} has {len(location.size)} axes, but the volume has {ndim}")
        if not (location.box & Box.of_shape(spatial_shape)).numel:
            raise LocationError(
                f"the patch {location.index} to {location.index_fin} lies outside of the volume of {spatial_shape} voxels"
            )
    return result


def _check_values(patch: Tensor, name: str) -> None:
    """Refuse NaN, and warn of infinity, in the output for one patch."""
    if is_finite(patch):
        return
    if bool(patch.isnan().any()):
        raise OutputError(
            f"{name} holds {int(patch.isnan().sum())} NaN of {patch.numel()} values, which would spread to its neighbours:"
            " look for a division by zero or an overflow in the model, or replace them with torch.nan_to_num"
        )
    warnings.warn(f"{name} holds infinity", RuntimeWarning, stacklevel=4)
