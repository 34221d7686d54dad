"""Where the results of a prediction in parts go: an array for each, until all parts are done."""

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ...core.sizes import Ints
from ...errors import OutputError, SaveError
from ...io.formats import stem_of
from ...io.writing.sidecars import run_of
from ...io.zarr.layout import Layout
from ...io.zarr.parts import PartsStore
from ...models.outputs import Name
from ...runs.parts import records_of
from ..destinations import Stores
from ..memory_sink import image_class
from ..planning.plan import PredictionPlan

__all__ = ["PartTarget", "PartTargets", "PartsStores", "as_parts_stores"]

PartsStores = dict[Name, PartsStore]


def as_parts_stores(stores: Stores) -> PartsStores:
    """Give the stores of all results, if they are of kinds that parts can be written to.

    Raises:
        OutputError: if one is of another kind, or there is none.
        SaveError: if two would have their records in one place.
    """
    made = {name: store for name, store in stores.items() if isinstance(store, PartsStore)}
    if not made or len(made) < len(stores):
        raise OutputError("a prediction in parts needs an output, or a dict of outputs: names of files or of Zarr stores")
    paths = [store.path for store in made.values()]
    if len(set(map(records_of, paths))) < len(paths):
        raise SaveError(f"two results have one stem: {', '.join(map(str, paths))}: give each a name of its own")
    return made


@dataclass(frozen=True)
class PartTarget:
    """Where one result goes."""

    name: Name
    store: PartsStore
    layout: Layout
    """Of the array that parts are written to."""

    def array(self, run: str) -> Path:
        """Name where its voxels are until all parts are done."""
        return self.store.path.with_name(f".{stem_of(self.store.path)}.{run}.parts.zarr")


@dataclass(frozen=True)
class PartTargets:
    """Where all results go, in the order of the plan's."""

    of_results: tuple[PartTarget, ...]

    @classmethod
    def of(cls, stores: PartsStores, plan: PredictionPlan) -> Self:
        """Find a store for each result of a plan.

        Raises:
            OutputError: if a result has none, or results differ in size.
        """
        made = []
        for result in plan.results:
            is_for_all = list(stores) == [None] and len(plan.results) == 1
            store = stores.get(None if is_for_all else result.name)
            if store is None:
                raise OutputError(f"the result {result.name!r} has no output: a prediction in parts keeps none in memory")
            made.append(PartTarget(result.name, store, store.layout(result.volume)))
        if len({result.volume.shape[1:] for result in plan.results}) > 1:
            raise OutputError("results of several sizes cannot be made in parts: predict them one by one")
        return cls(tuple(made))

    def __iter__(self) -> Iterator[PartTarget]:
        return iter(self.of_results)

    @property
    def shard(self) -> Ints:
        """Voxels of the smallest part that is whole shards of all results; along an axis that a shard spans, one part does."""
        shape = self.of_results[0].layout.spec.shape[1:]
        sizes = [[each.layout.shards[0][axis] for each in self] for axis in range(3)]
        return tuple(length if max(each) >= length else math.lcm(*each) for each, length in zip(sizes, shape, strict=True))

    def array_names(self, run: str) -> list[str]:
        """Names of the arrays that hold the results until all parts are done."""
        return [each.array(run).name for each in self]

    def create_arrays(self, run: str) -> None:
        """Make an empty array for each result."""
        for each in self:
            each.layout.create(each.array(run))

    def remove_arrays(self, run: str) -> None:
        """Remove what was made for a run."""
        for each in self:
            shutil.rmtree(each.array(run), ignore_errors=True)

    def are_in_place(self, run: str) -> bool:
        """Whether all results of a run are under their names."""
        return all(run_of(each.store.path) == run for each in self)

    def images(self) -> Any:
        """Give the results, as `predict` does."""
        by_name = {each.name: image_class(each.layout.spec)(each.store.path) for each in self}
        return by_name[None] if list(by_name) == [None] else by_name
