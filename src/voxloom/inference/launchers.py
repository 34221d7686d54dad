"""Who computes the parts of a prediction: this process, several of this machine, or an engine. Each is a few lines."""

import contextlib
import importlib
import multiprocessing
import pickle
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from typing import Any, Protocol, runtime_checkable

import torch

from ..core.sizes import as_int
from ..errors import ModeError
from .many import ManyRuns
from .shards import ShardedRun

__all__ = ["Launcher", "ProcessLauncher", "SerialLauncher", "ShardJob", "as_devices", "as_launcher"]

# How often a part is tried that nobody has finished.
ATTEMPTS = 3
# How often it is looked at what is done: a folder that may have many files.
POLL_SECONDS = 0.5


@dataclass(eq=False)
class ShardJob:
    """All that another process needs to compute parts of a prediction: how it is made, and not the thing itself.

    Args:
        open: makes the run, in whichever process it is called.
        arguments: what it is called with; it can be pickled.
    """

    open: Callable[..., ShardedRun | ManyRuns]
    arguments: Mapping[str, Any]
    _run: ShardedRun | ManyRuns | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {"open": self.open, "arguments": self.arguments, "_run": None}

    @property
    def run(self) -> ShardedRun | ManyRuns:
        """The run, made once in each process: so a model is loaded once."""
        if self._run is None:
            self._run = self.open(**self.arguments)
        return self._run

    def on(self, device: Any) -> "ShardJob":
        """Give the same on another device."""
        options = {**self.arguments["predictor"], "device": device}
        return ShardJob(self.open, {**self.arguments, "predictor": options})

    def compute(self, number: int) -> None:
        """Compute a part in this process."""
        self.run.compute(number)


@runtime_checkable
class Launcher(Protocol):
    """Has parts of a prediction computed."""

    shard_size: int | Sequence[int] | None
    """Voxels of a part, which is made up to whole shards; None for about four patches, -1 for all."""

    def launch(self, job: ShardJob, numbers: Iterable[int], finished: Callable[[int], object]) -> None:
        """Have parts computed. One that fails is recorded, and does not stop the others.

        Args:
            job: computes a part, wherever it is brought to.
            numbers: the parts.
            finished: is told of each that has been computed, or has failed for good.
        """
        ...


class SerialLauncher:
    """Computes parts in this process, one after the other.

    Args:
        shard_size: voxels of a part; see `Launcher`.
    """

    def __init__(self, shard_size: int | Sequence[int] | None = None) -> None:
        self.shard_size = shard_size

    def launch(self, job: ShardJob, numbers: Iterable[int], finished: Callable[[int], object]) -> None:
        """See `Launcher`."""
        for number in numbers:
            with contextlib.suppress(Exception):  # which is recorded
                job.compute(number)
            finished(number)


class ProcessLauncher:
    """Computes parts in processes of this machine, for example one for each GPU.

    Args:
        devices: what each process runs the model on, such as `["cuda:0", "cuda:1"]` or `"0,1"`; `"all"` for all GPUs; or a
            number of processes.
        timeout: seconds without any part being finished after which the processes are ended, and what they had is tried again.
        shard_size: voxels of a part; see `Launcher`.

    Raises:
        ModeError: if there is no device.

    Example:
        >>> from voxloom.inference.launchers import ProcessLauncher
        >>> ProcessLauncher("cpu,cpu").devices, ProcessLauncher([0, 1]).devices
        (['cpu', 'cpu'], ['cuda:0', 'cuda:1'])
    """

    def __init__(
        self, devices: int | str | Sequence[Any], timeout: float | None = None, shard_size: int | Sequence[int] | None = None
    ) -> None:
        self.devices: list[Any] = [None] * as_int(devices, "devices", 1) if isinstance(devices, int) else as_devices(devices)
        self.timeout, self.shard_size = timeout, shard_size

    def launch(self, job: ShardJob, numbers: Iterable[int], finished: Callable[[int], object]) -> None:
        """See `Launcher`."""
        wanted = set(numbers)
        told: set[int] = set()
        for _ in range(ATTEMPTS):
            left = sorted(wanted - job.run.done())
            if not left:
                break
            processes = self._started(job, left)
            try:
                for done in self._watched(job, processes):
                    for number in (done & wanted) - told:
                        told.add(number)
                        finished(number)
            finally:
                for process in processes:
                    process.kill()
                    process.join()
        for number in wanted - told:
            finished(number)

    def _started(self, job: ShardJob, numbers: Sequence[int]) -> list[BaseProcess]:
        context = multiprocessing.get_context("spawn")
        count = min(len(self.devices), len(numbers))
        processes: list[BaseProcess] = []
        for place, device in enumerate(self.devices[:count]):
            own = job if device is None else job.on(device)
            threads = max(1, torch.get_num_threads() // count) if device in (None, "cpu") else None
            process = context.Process(target=_compute_all, args=(pickle.dumps(own), numbers[place::count], threads), daemon=True)
            process.start()
            processes.append(process)
        return processes

    def _watched(self, job: ShardJob, processes: Sequence[BaseProcess]) -> Iterator[set[int]]:
        """Give what is done, until the processes have ended, or nothing has been finished for too long."""
        count, since = -1, time.monotonic()
        while True:
            has_ended = not any(process.is_alive() for process in processes)
            done = job.run.done()
            yield done
            if len(done) > count:
                count, since = len(done), time.monotonic()
            if has_ended or (self.timeout is not None and time.monotonic() - since > self.timeout):
                return
            time.sleep(POLL_SECONDS)


LAUNCHERS = {"distributed": "voxloom.integrations.dask"}
"""Modules that make a launcher of an engine's client, by the package of its class."""


def as_launcher(given: Any) -> Launcher | None:
    """Give what was given as an executor as a launcher of parts, if it is one, or the client of an engine."""
    if isinstance(given, Launcher):
        return given
    module = LAUNCHERS.get(type(given).__module__.partition(".")[0])
    return None if module is None else importlib.import_module(module).launcher_of(given)


def _compute_all(job: bytes, numbers: Sequence[int], threads: int | None) -> None:
    """Compute parts in a process of their own."""
    if threads is not None:
        torch.set_num_threads(threads)
    SerialLauncher().launch(pickle.loads(job), numbers, lambda number: None)  # noqa: S301 - of the process that started this one


def as_devices(given: Any) -> list[str]:
    """Give the devices that are meant: names with commas between them, numbers of GPUs, or `"all"` for all GPUs.

    Raises:
        ModeError: if there is none.
    """
    if isinstance(given, str) and given.strip() == "all":
        found = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
        if not found:
            raise ModeError(
                "devices is 'all', but this machine has no GPU that PyTorch can use: name the devices, such as cpu,cpu"
            )
        return found
    names = [str(each).strip() for each in (given.split(",") if isinstance(given, str) else given)]
    if not all(names) or not names or "all" in names:
        raise ModeError(f"devices is {given!r}: name at least one, such as 0,1 or cpu,cpu, or all alone")
    return [f"cuda:{name}" if name.isdecimal() else name for name in names]
