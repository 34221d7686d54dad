"""What is wanted of a model's outputs: which results, by which activation and reduction, at which scale."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...core.geometry.affines import scaled
from ...core.geometry.interpolation import Interpolation, interpolated_dtype
from ...core.grid.grids import PatchGrid
from ...core.sizes import Scale, as_scale
from ...core.values import can_hold
from ...errors import ModeError, NoSuchKeyError, OutputError
from ...io.protocols import Space, VolumeSource, VolumeSpec
from ...models.outputs import Name, OutputRequest, OutputSpec, as_activation
from ..reductions import AfterSum, AfterSumStep, Function, Reduction, as_reduction

__all__ = ["ResultOptions", "ResultRequest", "ResultSpec", "of_name", "result_specs", "spec_of_result"]


@dataclass(frozen=True)
class ResultRequest:
    """One result that is asked for."""

    name: Name
    output: int
    """Number of the sum that it is made of."""
    reduction: Reduction


@dataclass(frozen=True)
class ResultSpec:
    """What is made of an output."""

    name: Name
    output: int
    """Number of the output."""
    volume: VolumeSpec
    """What it is as a volume."""
    needs_copy: bool
    """Whether it is made of a copy of the sum, because other results are made of the same."""


@dataclass(frozen=True)
class ResultOptions:
    """What the user asked for, before it is known which outputs there are. Each may be a dict by the names of results."""

    activation: Any
    reduce: Any
    scale: Any
    after: tuple[AfterSumStep, ...] = ()
    """What is done with all sums first, before any is interpolated or reduced."""

    def __post_init__(self) -> None:
        for given, check in ((self.activation, as_activation), (self.reduce, as_reduction), (self.scale, _as_scale)):
            for value in given.values() if isinstance(given, Mapping) else [given]:
                check(value)

    def names(self, target: Any) -> list[Name] | None:
        """Names of the results, where a dict gives them.

        Args:
            target: where results go: a dict, if that is by name.
        """
        dicts = [given for given in (self.reduce, target, self.activation) if isinstance(given, Mapping)]
        names = list(dict.fromkeys(name for given in dicts for name in given))
        if dicts and not names:
            raise ModeError("the dict of results is empty: name at least one, or leave the dict out")
        return names if dicts else None

    def resolve(self, outputs: list[Name], target: Any = None) -> tuple[list[OutputRequest], list[ResultRequest]]:
        """Find the sums that are needed, and the results that are made of them.

        Args:
            outputs: names of the model's outputs.
            target: where results go: a dict, if that is by name.

        Raises:
            NoSuchKeyError: if it is not clear which output a result is made of, or something is said of a result that is none.
        """
        names = self.names(target)
        self._check_names(outputs, target)
        requests: list[OutputRequest] = []
        results = []
        for name in outputs if names is None else names:
            source = _source(name, outputs)
            scale = _as_scale(of_name(self.scale, name, of_name(self.scale, source, 1)))
            reduction = as_reduction(of_name(self.reduce, name))
            for step in reversed(self.after):
                reduction = AfterSum(step, reduction)
            request = OutputRequest(source, as_activation(of_name(self.activation, name)), scale, reduction.needs_squares)
            if request not in requests:
                requests.append(request)
            results.append(ResultRequest(name, requests.index(request), reduction))
        return requests, results

    def _check_names(self, outputs: list[Name], target: Any) -> None:
        """Check that all that is said by name is said of a result: of one that is mistyped there would be another."""
        reduce, activation = (given if isinstance(given, Mapping) else {} for given in (self.reduce, self.activation))
        leading = reduce or activation or (target if isinstance(target, Mapping) else {})
        known = list(dict.fromkeys([*leading, *(name for name in outputs if name is not None)]))
        for what, given in (("activation", self.activation), ("output", target), ("output_scale", self.scale)):
            unknown = [name for name in given if name not in known] if isinstance(given, Mapping) else []
            if unknown:
                there = ", ".join(map(repr, known)) or "one, without a name"
                raise NoSuchKeyError(
                    f"{what} names a result {unknown[0]!r}, and there is {there}: write it alike; or name all in reduce,"
                    f" {', '.join(map(repr, dict.fromkeys([*known, *unknown])))}, those with None that are not reduced"
                )


def result_specs(
    results: Sequence[ResultRequest],
    outputs: Sequence[OutputSpec],
    samples: Sequence[torch.Tensor],
    grid: PatchGrid,
    source: VolumeSource,
    fill: float,
    like: Space | None = None,
    kinds: Sequence[Interpolation] = (),
) -> list[ResultSpec]:
    """Say what results will be, by what is made of a single voxel.

    Args:
        results: the results.
        outputs: what the model gives.
        samples: a voxel `(1, C, 1, 1, 1)` of each output.
        grid: the patches, in the frame of the input.
        source: the input.
        fill: value of voxels that are not computed.
        like: the grid that results are interpolated to; None for that of each output.
        kinds: how they are interpolated, along each axis.

    Raises:
        OutputError: if a result cannot hold the value.
    """
    is_shared = [sum(other.output == number for other in results) > 1 for number in range(len(outputs))]
    specs = []
    for result in results:
        output = outputs[result.output]
        with torch.no_grad():
            sample = samples[result.output][0].clone().nan_to_num_()
            reduced = result.reduction(sample if like is None else sample.to(interpolated_dtype(sample.dtype, kinds)))
        if not can_hold(reduced.dtype, fill):
            raise OutputError(f"fill is {fill}, which a result of {reduced.dtype} cannot hold: choose another one")
        i, j, k = grid.scaled(output.scale).spatial_shape
        is_labels = result.reduction.is_labels or not reduced.dtype.is_floating_point
        volume = spec_of_result(source, output.scale, (len(reduced), i, j, k), reduced.dtype, is_labels, like)
        # A function of the user's may write to what it is given.
        needs_copy = isinstance(result.reduction, Function) and is_shared[result.output]
        specs.append(ResultSpec(result.name, result.output, volume, needs_copy))
    return specs


def spec_of_result(
    source: VolumeSource,
    scale: Scale,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    is_labels: bool,
    like: Space | None = None,
) -> VolumeSpec:
    """Say what a result is as a volume: it fills the same space as the input, or is on a grid that is given."""
    if like is not None:
        return VolumeSpec((shape[0], *like.shape), dtype, like.affine, like.codes, is_labels)
    return VolumeSpec(shape, dtype, scaled(source.affine, tuple(map(float, scale))), source.codes, is_labels)


def of_name(given: Any, name: Name, default: Any = None) -> Any:
    """Give what belongs to a result or an output, where a dict may say it by name."""
    return given.get(name, default) if isinstance(given, Mapping) else given


def _as_scale(value: Any) -> Scale:
    return as_scale(value, 3, "output_scale")


def _source(name: Name, outputs: list[Name]) -> Name:
    if name in outputs:
        return name
    if len(outputs) == 1:
        return outputs[0]
    there = ", ".join(map(repr, outputs))
    raise NoSuchKeyError(f"there is a result {name!r}, but the model returns {there}: name results after these")
