"""Predictions in parts, on the command line: who computes them."""

import contextlib
from collections.abc import Iterator
from typing import Any

from ..errors import ShardError
from ..inference.parts.launchers import ProcessLauncher
from ..inference.parts.shard_plan import as_share
from ..inference.parts.shards import ShardedRun
from ..inference.predictor import Predictor
from ..runtime.progress import shown_if
from ..volumes.subject import Subject
from .options import PartsOptions, numbers
from .reporting import Report, printable

__all__ = ["compute_share", "launcher"]


@contextlib.contextmanager
def launcher(parts: PartsOptions) -> Iterator[Any]:
    """Give what parts are computed by; None for this process."""
    parts.check()
    if parts.devices is not None:
        yield ProcessLauncher(parts.devices, shard_size=_size(parts))
    elif parts.dask is not None:
        from ..integrations.dask import DaskLauncher, client_of

        client = client_of(parts.dask)
        try:
            yield DaskLauncher(client, shard_size=_size(parts))
        finally:
            client.shutdown() if ":" in parts.dask and "//" not in parts.dask else client.close()
    else:
        yield None


def _size(parts: PartsOptions) -> Any:
    size = numbers(parts.shard_size, int, "shard-size")
    return size[0] if size is not None and len(size) == 1 else size


def compute_share(
    predictor: Predictor,
    subject: Subject,
    asked: dict[str, Any],
    parts: PartsOptions,
    place: tuple[int, int],
    overwrite: bool,
    report: Report,
    name: str,
) -> tuple[int, ShardedRun]:
    """Compute the parts of a case that are a job's share, and say how many these are, and of what.

    Args:
        predictor: the model, and how it is applied.
        subject: the case.
        asked: what is asked for beside it.
        parts: which share.
        place: number of the case, and how many there are: where there are many, each is one part.
        overwrite: whether what is there may be replaced.
        report: says what happens.
        name: of the case.

    Raises:
        ShardError: if parts failed; names them, and says why.
    """
    number, count = as_share(parts.shard)
    wanted = _size(parts)
    if wanted is None and place[1] >= count:
        wanted = -1
    run = predictor.shards(subject, **asked, overwrite=overwrite, shard_size=wanted)
    # Cases of few parts are spread as well.
    share = list(run.remaining(((number - place[0]) % count, count)))
    failed: list[int] = []
    with contextlib.ExitStack() as stack:
        is_told = not report.quiet and not report.as_json
        told = stack.enter_context(shown_if(is_told, printable(name), len(share), "parts"))
        for each in share:
            try:
                run.compute(each)
            except Exception as error:  # noqa: BLE001 - one part that fails, by whatever, must not stop the others
                report.warn(f"voxloom: {name}: part {each} failed: {type(error).__name__}: {error}")
                failed.append(each)
            told(1)
    if failed:
        raise ShardError(
            f"{len(failed)} of {len(share)} parts failed: {', '.join(map(str, failed))}. The same command tries again"
        )
    return len(share), run
