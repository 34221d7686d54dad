"""Dask: parts of a prediction on the workers of a cluster. Only their numbers travel, and never many of them at a time."""

import contextlib
import pickle
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import ModeError
from ..inference.parts.launchers import ATTEMPTS, Launcher, ShardJob, packed
from ..io.writing.saving import as_save_error
from ..volumes.libraries import imported

__all__ = ["DaskLauncher", "client_of", "launcher_of"]

# Parts that each worker has at a time, or waits for.
IN_FLIGHT = 2
# How often the scheduler is asked what is done.
POLL_SECONDS = 0.2
COMPUTING = threading.Lock()


class DaskLauncher:
    """Computes parts on the workers of a Dask cluster.

    How the prediction is made goes to a file beside the output, which each worker reads once; so the model is loaded once in
    each. The output's folder must be one that all workers see.

    Args:
        client: a client of `dask.distributed`.
        attempts: how often a part is tried, where workers are lost, or it fails.
        timeout: seconds after which a part is tried elsewhere, and its worker started anew; None for ever.
        resources: what a part needs of a worker, such as `{"GPU": 1}`.
        shard_size: voxels of a part; see `voxloom.inference.Launcher`.

    Example:
        >>> from dask.distributed import Client, LocalCluster
        >>> from voxloom.integrations.dask import DaskLauncher
        >>> with LocalCluster(n_workers=1, processes=False, dashboard_address=":0") as cluster, Client(cluster) as client:
        ...     DaskLauncher(client, timeout=600).attempts
        3
    """

    def __init__(
        self,
        client: Any,
        attempts: int = ATTEMPTS,
        timeout: float | None = None,
        resources: Mapping[str, float] | None = None,
        shard_size: int | Sequence[int] | None = None,
    ) -> None:
        self.client, self.attempts, self.timeout = client, attempts, timeout
        self.resources, self.shard_size = dict(resources or {}), shard_size

    def __repr__(self) -> str:
        return f"DaskLauncher({self.client}, attempts={self.attempts}, timeout={self.timeout}, shard_size={self.shard_size})"

    def launch(self, job: ShardJob, numbers: Iterable[int], finished: Callable[[int], object]) -> None:
        """See `Launcher`."""
        wait: Any = _distributed().wait

        path = _saved(job)
        waiting = iter(numbers)
        again: list[int] = []
        tried: dict[int, int] = {}
        flying: dict[Any, tuple[int, float]] = {}

        def send(number: int) -> None:
            tried[number] = tried.get(number, 0) + 1
            key = f"voxloom-{job.name}-{number}-{tried[number]}"
            future = self.client.submit(
                _compute, str(path), number, key=key, pure=False, retries=0, resources=self.resources or None
            )
            flying[future] = (number, time.monotonic())

        def more() -> None:
            # Where a part may take too long, none waits at a worker: its time would count, too.
            each = IN_FLIGHT if self.timeout is None else 1
            room = each * max(1, len(self.client.scheduler_info(n_workers=-1)["workers"])) - len(flying)
            for _ in range(room):
                number = again.pop() if again else next(waiting, None)
                if number is None:
                    return
                send(number)

        more()
        while flying:
            with contextlib.suppress(TimeoutError):
                wait(list(flying), timeout=POLL_SECONDS, return_when="FIRST_COMPLETED")
            late = self._end_late(flying)
            # Those that are late are not waited for any more: the cluster may never say that they were cancelled.
            for future in [each for each in flying if each in late or each.done() or each.cancelled()]:
                number, _ = flying.pop(future)
                is_done = future.status == "finished"
                error = future.exception() if future.status == "error" else None
                future.release()
                if not is_done and tried[number] < self.attempts:
                    again.append(number)
                    continue
                if error is not None:  # it may have come before anything was computed, when nobody could record it
                    job.record_failure(number, error)
                finished(number)
            more()

    def _end_late(self, flying: Mapping[Any, tuple[int, float]]) -> list[Any]:
        """Start workers anew that have been at a part for too long, and say which parts these were."""
        if self.timeout is None:
            return []
        late = [future for future, (_, since) in flying.items() if time.monotonic() - since > self.timeout]
        if late:
            keys = {future.key for future in late}
            hanging = [worker for worker, own in self.client.processing().items() if keys.intersection(own)]
            for future in late:
                future.cancel(force=True)
            if hanging:
                self.client.restart_workers(hanging, raise_for_error=False)
        return late


def launcher_of(client: Any) -> Launcher:
    """Give a client of Dask as a launcher."""
    return DaskLauncher(client)


def _saved(job: ShardJob) -> Path:
    """Write down how a prediction is made, where workers find it."""
    import cloudpickle

    path = job.folder.absolute() / f"job-{job.name}.pkl"  # a worker that lives on must not take it for that of another run
    try:
        path.write_bytes(packed(job, cloudpickle.dumps))
    except OSError as error:
        raise as_save_error(path, error) from error
    return path


def _compute(path: str, number: int) -> None:
    """Compute a part, in a worker: one at a time, however many threads it has."""
    with COMPUTING:
        _loaded(path).compute(number)


@lru_cache(maxsize=1)
def _loaded(path: str) -> ShardJob:
    job: ShardJob = pickle.loads(Path(path).read_bytes())  # noqa: S301 - of the process that started this run
    return job


def _distributed() -> Any:
    return imported("distributed", "dask")


def client_of(address: str) -> Any:
    """Connect to a cluster, or start one.

    Args:
        address: `tcp://…` or another address of a scheduler, or the name of its file (`.json`); `local:N` starts N workers on
            this machine, and `slurm:N`, `pbs:N` or `lsf:N` N jobs, as dask-jobqueue is configured.

    Raises:
        MissingDependencyError: if Dask, or dask-jobqueue, is not installed.
        ModeError: if it is none of these.
    """
    distributed = _distributed()
    kind, colon, count = address.partition(":")
    clusters = {"slurm": "SLURMCluster", "pbs": "PBSCluster", "lsf": "LSFCluster"}
    if colon and (kind == "local" or kind in clusters):
        if not count.isdecimal() or int(count) < 1:
            raise ModeError(f"--dask is {address!r}: a number of workers must follow, such as {kind}:4")
        if kind == "local":
            return distributed.Client(
                distributed.LocalCluster(n_workers=int(count), threads_per_worker=1, dashboard_address=":0")
            )
        cluster = getattr(imported("dask_jobqueue", "dask"), clusters[kind])()
        cluster.scale(jobs=int(count))
        return distributed.Client(cluster)
    if address.endswith(".json"):
        return distributed.Client(scheduler_file=address)
    return distributed.Client(address, timeout=30)
