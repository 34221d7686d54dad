"""What becomes of finished tiles: they are reduced, on the grid of the model or on another one, and written."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ..aggregation.streaming import FinishedTile
from ..aggregation.tiles import ExtendedTile, TileEdges, joined
from ..core.boxes import Box
from ..core.geometry.interpolation import Part, SpaceMap, interpolated_dtype
from ..core.grid.traversal import Block
from ..core.values import is_finite as are_finite
from ..errors import OutputError
from ..io.protocols import VolumeStore
from ..models.running import is_out_of_memory
from ..runtime.sharing import Share
from .planning.block_memory import PIECE_BYTES
from .planning.plan import PredictionPlan
from .planning.results import ResultSpec
from .reductions import Function, Reduction, Surroundings

__all__ = ["Delivery"]


class Delivery:
    """Reduces and writes finished tiles of a plan; they must come in the order of its traversal.

    Args:
        plan: the plan.
        reductions: what its results are made by.
        stores: where they go.
        share: does the work of interpolation; None for the thread that calls.
    """

    def __init__(
        self,
        plan: PredictionPlan,
        reductions: Sequence[Reduction],
        stores: Sequence[VolumeStore],
        share: Share | None = None,
    ) -> None:
        self._plan, self._reductions, self._stores = plan, reductions, stores
        self.share = share

    def begin(self, block: Block) -> None:
        """Tiles of a block come next."""
        plan = self._plan
        if plan.maps is not None:
            self._own = [traversal.block_box(block.own) for traversal in plan.traversals]
            self._edges = [(_edges(each), _edges(each)) for each in plan.maps]

    def __call__(self, number: int, finished: FinishedTile, is_wanted: bool = True, is_finite: bool | None = None) -> None:
        """Deliver a tile.

        Args:
            number: number of the output that it is of.
            finished: the tile.
            is_wanted: whether it is to be written, rather than only needed by those behind it.
            is_finite: whether all its values are finite, if that is known.
        """
        if self._plan.maps is not None:
            self._deliver_interpolated(number, finished, is_wanted, is_finite, self._plan.maps[number])
        elif is_wanted:
            for result, spec in enumerate(self._plan.results):
                if spec.output == number:
                    self._stores[result].write(finished.box, self._reduced(result, spec, finished))

    def _reduced(self, number: int, spec: ResultSpec, finished: FinishedTile) -> Tensor:
        shape, dtype = (spec.volume.shape[0], *finished.box.shape), spec.volume.dtype
        if finished.values is None:
            return torch.full(shape, self._plan.fill, dtype=dtype)
        values = finished.values.clone() if spec.needs_copy else finished.values
        block = self._made(number, spec, finished.values.shape, lambda reduction, moved: reduction(moved(values)))
        if finished.uncovered is not None:
            block = block.masked_fill(finished.uncovered.to(block.device), self._plan.fill)
        return block.cpu()

    @torch.no_grad()
    def _made(
        self,
        number: int,
        spec: ResultSpec,
        shape: Sequence[int],
        make: Callable[[Reduction, Callable[[Tensor], Tensor]], Tensor],
    ) -> Tensor:
        """Make a block of a result, and check it.

        Args:
            number: of the result.
            spec: of it.
            shape: of the block `(C, i, j, k)`, before it is reduced.
            make: makes the block by a reduction, of values that it moves by the function that it is given.
        """
        reduction = self._reductions[number]
        block = None
        try:
            block = make(reduction, lambda values: values)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        if block is None:  # what failed has been freed by now
            block = make(reduction, _on_host)
        expected, dtype = (spec.volume.shape[0], *shape[1:]), spec.volume.dtype
        if tuple(block.shape) != expected or block.dtype != dtype:
            raise OutputError(
                f"reduce gave {block.dtype} of shape {tuple(block.shape)} for a block of shape {tuple(shape)}; by what it gave"
                f" for a single voxel, {dtype} of shape {expected} was expected"
            )
        if isinstance(reduction, Function) and block.is_floating_point() and bool(block.isnan().any()):
            raise OutputError(f"the function that was given as reduce made NaN of a block of {self._plan.name} without any")
        return block

    # On another grid

    def _deliver_interpolated(
        self, number: int, finished: FinishedTile, is_wanted: bool, is_finite: bool | None, space: SpaceMap
    ) -> None:
        spec = self._plan.outputs[number]
        held = spec.held_dtype(self._plan.window is None)
        values = finished.values
        if values is None:
            values = torch.zeros((1, 1, 1, 1), dtype=held).expand(spec.channels, *finished.box.shape)
        if not (are_finite(values) if is_finite is None else is_finite):  # between infinities there would be NaN
            limits = torch.finfo(values.dtype)
            values = values.clamp(limits.min / 4, limits.max / 4)  # so that differences are finite, too
        of_values, of_coverage = self._edges[number]
        tile = of_values.extended(finished.box, values)
        coverage = None
        if self._plan.needed is not None:
            coverage = of_coverage.extended(finished.box, _coverage(finished))
        own = finished.box & self._own[number]
        if is_wanted and own.numel:
            self.write_interpolated(number, own, tile, coverage, space)

    def write_interpolated(
        self, number: int, own: Box, tile: ExtendedTile, coverage: ExtendedTile | None, space: SpaceMap
    ) -> None:
        """Write those voxels of results whose last voxels of the output lie in a box.

        Args:
            number: number of the output.
            own: the box.
            tile: the output there, and before it.
            coverage: 1 where it was computed, else 0; None for all.
            space: where voxels of the results lie in the output.
        """
        for result, spec in enumerate(self._plan.results):
            if spec.output != number:
                continue
            channels, dtype = spec.volume.shape[0], spec.volume.dtype
            for piece in space.pieces(own, max(1, PIECE_BYTES // (channels * dtype.itemsize))):
                values = torch.full((channels, *piece.shape), self._plan.fill, dtype=dtype)

                def make(
                    part: Part, result: int = result, spec: ResultSpec = spec, piece: Box = piece, into: Tensor = values
                ) -> None:
                    part.put(into, piece.start, self._part(result, spec, part, tile, coverage))

                works = [partial(make, part) for part in space.parts(piece, own)]
                if self.share is not None and len(works) > 1 and self._reductions[result].is_shared:
                    self.share(works)
                else:
                    for work in works:
                        work()
                for box in space.boxes(piece, own):
                    self._stores[result].write(box, values[(slice(None), *box.relative_to(piece.start).slices)])

    def _part(self, number: int, spec: ResultSpec, part: Part, tile: ExtendedTile, coverage: ExtendedTile | None) -> Tensor:
        """Make some voxels of a result on its own grid."""
        covered = None if coverage is None else coverage.read(part.support)
        covered = None if covered is None or bool(covered.all()) else part.apply(covered)
        if covered is not None and not bool((covered >= 0.5).any()):
            return torch.full((spec.volume.shape[0], *part.shape), self._plan.fill, dtype=spec.volume.dtype)
        dtype = interpolated_dtype(tile.values.dtype, self._plan.kinds)

        def interpolate(values: Tensor) -> Tensor:
            found = part.apply(values.contiguous())
            return found if covered is None else found / covered.to(found.device).clamp(min=torch.finfo(covered.dtype).tiny)

        def make(reduction: Reduction, moved: Callable[[Tensor], Tensor]) -> Tensor:
            views = [(box, moved(values)) for box, values in tile.views(part.support)]

            def read(channels: Sequence[int] | None) -> Tensor:
                return joined(views, part.support, channels).to(dtype)

            return reduction.of_interpolated(Surroundings([values for _, values in views], read, interpolate, part.shape))

        block = self._made(number, spec, (len(tile.values), *part.shape), make)
        return block if covered is None else block.masked_fill(covered.to(block.device) < 0.5, self._plan.fill)


def _on_host(values: Tensor) -> Tensor:
    """Copy values `(C, i, j, k)` channel by channel, since the device may have no room for another copy of them all."""
    out = torch.empty(values.shape, dtype=values.dtype)
    for one, other in zip(out, values, strict=True):
        one.copy_(other)
    return out


def _edges(space: SpaceMap) -> TileEdges:
    return TileEdges(space.shape, space.mixing_axes)


def _coverage(finished: FinishedTile) -> Tensor:
    """Say of each voxel of a tile whether any patch was added to it, as 1 or 0."""
    if finished.values is None:
        return torch.zeros((1, *finished.box.shape))
    if finished.uncovered is None:
        return torch.ones((1, 1, 1, 1), device=finished.values.device).expand(1, *finished.box.shape)
    return (~finished.uncovered).float()[None]
