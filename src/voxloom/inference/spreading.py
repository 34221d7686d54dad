"""Predictions in parts that others compute: handed to a launcher, and published when all is done."""

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import RecordError
from ..runtime.progress import shown_if
from .entering import from_anywhere
from .launchers import Launcher, ShardJob
from .many import ManyRuns
from .shards import ShardedRun

__all__ = ["compute_together", "predicted_in_parts", "published"]


def predicted_in_parts(
    launcher: Launcher, predictor: Mapping[str, Any], call: Mapping[str, Any], progress: bool | str = False
) -> Any:
    """Have the parts of a prediction computed, and publish it.

    Args:
        launcher: has them computed.
        predictor: arguments of the predictor.
        call: what it is asked for; see `Predictor.shards`.
        progress: whether, or under which name, to show how far it is.
    """
    # Workers may be in another folder.
    paths = {name: from_anywhere(call[name]) for name in ("image", "like", "mask", "output")}
    arguments = {"predictor": predictor, "call": {**call, **paths, "shard_size": launcher.shard_size}}
    run = _opened(**arguments)
    numbers = list(run.remaining())
    with contextlib.ExitStack() as stack:
        told = stack.enter_context(shown_if(progress, run.plan.plan.name, len(numbers), "parts"))
        launcher.launch(ShardJob(_opened, arguments, run), numbers, lambda number: told(1))
    return published(run)


def compute_together(
    launcher: Launcher,
    predictor: Mapping[str, Any],
    calls: Sequence[Mapping[str, Any]],
    runs: Sequence[ShardedRun],
    progress: bool | str = False,
) -> None:
    """Have the parts of several predictions computed; see `Predictor.compute_parts`."""
    counts = [len(run) for run in runs]
    starts = itertools.accumulate(counts, initial=0)
    numbers = [start + number for start, run in zip(starts, runs, strict=False) for number in run.remaining()]
    if not numbers:
        return
    job = ShardJob(_opened_many, {"predictor": predictor, "calls": list(calls), "counts": counts})
    with contextlib.ExitStack() as stack:
        told = stack.enter_context(shown_if(progress, f"{len(runs)} images", len(numbers), "parts"))
        launcher.launch(job, numbers, lambda number: told(1))


def published(run: ShardedRun) -> Any:
    """Publish what all parts of are done.

    Raises:
        ShardError: if parts are missing; names them, and says why they failed.
        RecordError: if another process is at it.
    """
    made = run.published()
    if made is None:
        raise RecordError(
            f"another process is publishing the result for {run.plan.plan.name}: wait for it; if it was interrupted, the same"
            " call takes it up in ten minutes"
        )
    return made


def _opened(predictor: Mapping[str, Any], call: Mapping[str, Any]) -> ShardedRun:
    """Make a prediction in parts of all that was said of it."""
    from .predictor import Predictor

    return Predictor(**predictor).shards(**call)


def _opened_many(predictor: Mapping[str, Any], calls: Sequence[Mapping[str, Any]], counts: Sequence[int]) -> ManyRuns:
    """Make several predictions in parts of all that was said of them."""
    from .predictor import Predictor

    return ManyRuns(Predictor(**predictor), calls, counts)
