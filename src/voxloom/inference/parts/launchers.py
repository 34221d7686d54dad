"""Who computes the parts of a prediction: this process, several of this machine, or an engine. Each is a few lines."""

import contextlib
import importlib
import itertools
import multiprocessing
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from ...core.sizes import as_int
from ...errors import ModeError, VoxloomError
from ...io.zarr.storage import is_url
from .shards import ShardedRun

__all__ = ["Launcher", "ProcessLauncher", "SerialLauncher", "ShardJob", "as_devices", "as_launcher", "packed"]

# How often a part is tried that nobody has finished.
ATTEMPTS = 3
# How often it is looked at what is done: a folder that may have many files.
POLL_SECONDS = 0.5


@dataclass(eq=False)
class ShardJob:
    """All that another process needs to compute parts of predictions: how they are made, and not the thing itself.

    Parts are numbered one prediction after the other, so that many small images are spread over workers as one large one is.

    Args:
        predictor: arguments of the `Predictor`.
        calls: what it is asked for, for each prediction; see `Predictor.shards`.
        counts: how many parts each has.
        opened: those predictions that are open in this process, by their number.
    """

    predictor: Mapping[str, Any]
    calls: Sequence[Mapping[str, Any]]
    counts: Sequence[int]
    opened: dict[int, ShardedRun] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        # Workers may be in another folder.
        calls = [{name: _from_anywhere(value) if name in PATHS else value for name, value in call.items()} for call in self.calls]
        return {"predictor": self.predictor, "calls": calls, "counts": self.counts, "opened": {}}

    def on(self, device: Any) -> "ShardJob":
        """Give the same on another device."""
        return ShardJob({**self.predictor, "device": device}, self.calls, self.counts)

    @property
    def folder(self) -> Path:
        """Where there is room for what all parts have in common, for as long as they are computed."""
        return self._run(0).folder

    @property
    def name(self) -> str:
        """Tells these parts from those of other runs."""
        return self._run(0).run

    def remaining(self) -> list[int]:
        """Give the parts that are not done."""
        return [start + number for which, start in self._starts() for number in self._run(which).remaining()]

    def done(self) -> set[int]:
        """Give the parts that are recorded as done."""
        return {start + number for which, start in self._starts() for number in self._run(which).done()}

    def compute(self, number: int) -> None:
        """Compute a part in this process; its prediction is opened with its first part, and the model loaded once.

        Raises:
            Exception: whatever the model, reading or writing raises.
        """
        run, own = self._place(number)
        run.compute(own)

    def record_failure(self, number: int, error: BaseException) -> None:
        """Record why a part failed."""
        run, own = self._place(number)
        run.record_failure(own, error)

    def _starts(self) -> Iterator[tuple[int, int]]:
        return zip(range(len(self.counts)), itertools.accumulate(self.counts, initial=0), strict=False)

    def _place(self, number: int) -> tuple[ShardedRun, int]:
        which, start = max(each for each in self._starts() if each[1] <= number)
        return self._run(which), number - start

    def _run(self, which: int) -> ShardedRun:
        if which not in self.opened:
            self.opened[which] = self._predictor.shards(**self.calls[which])
        return self.opened[which]

    @cached_property
    def _predictor(self) -> Any:
        from ..predictor import Predictor

        return Predictor(**self.predictor)


PATHS = ("image", "like", "mask", "output")
"""What may be a path in what a predictor is asked for."""


def _from_anywhere(thing: Any) -> Any:
    """Give a path, or several in a list or a dict, such that it means the same in a process that is in another folder."""
    if isinstance(thing, list | tuple):
        return [_from_anywhere(each) for each in thing]
    if type(thing) is dict:
        return {name: _from_anywhere(each) for name, each in thing.items()}
    is_local = isinstance(thing, Path) or (isinstance(thing, str) and not is_url(thing))
    return Path(thing).expanduser().absolute() if is_local else thing


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

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shard_size={self.shard_size})"

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
        >>> from voxloom.inference import ProcessLauncher
        >>> ProcessLauncher("cpu,cpu").devices, ProcessLauncher([0, 1]).devices
        (['cpu', 'cpu'], ['cuda:0', 'cuda:1'])
    """

    def __init__(
        self, devices: int | str | Sequence[Any], timeout: float | None = None, shard_size: int | Sequence[int] | None = None
    ) -> None:
        self.devices: list[Any] = [None] * as_int(devices, "devices", 1) if isinstance(devices, int) else as_devices(devices)
        self.timeout, self.shard_size = timeout, shard_size

    def __repr__(self) -> str:
        return f"ProcessLauncher({self.devices}, timeout={self.timeout}, shard_size={self.shard_size})"

    def launch(self, job: ShardJob, numbers: Iterable[int], finished: Callable[[int], object]) -> None:
        """See `Launcher`."""
        wanted = set(numbers)
        told: set[int] = set()
        for _ in range(ATTEMPTS):
            left = sorted(wanted - job.done())
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
        brought = packed(job)
        for place, device in enumerate(self.devices[:count]):
            threads = max(1, torch.get_num_threads() // count) if device in (None, "cpu") else None
            arguments = (brought, device, numbers[place::count], threads)
            process = context.Process(target=_compute_all, args=arguments, daemon=True)
            process.start()
            processes.append(process)
        return processes

    def _watched(self, job: ShardJob, processes: Sequence[BaseProcess]) -> Iterator[set[int]]:
        """Give what is done, until the processes have ended, or nothing has been finished for too long."""
        count, since = -1, time.monotonic()
        while True:
            has_ended = not any(process.is_alive() for process in processes)
            done = job.done()
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


def packed(job: ShardJob, dumps: Callable[[ShardJob], bytes] = pickle.dumps) -> bytes:
    """Give a job as it travels to another process.

    Raises:
        ModeError: if the model, or a function of the user's, cannot travel.
        ModelFileError: if the model is not what its file holds.
    """
    try:
        return dumps(job)
    except VoxloomError:
        raise
    except Exception as error:  # whatever a model or a function of the user's raises
        raise ModeError(
            "the model or a function cannot be sent to other processes: give a model by the name of its file, as what load_model"
            f" gives, or as package.module:callable, and functions that stand in a module: {error}"
        ) from error


def _end_with_parent() -> None:
    """Let this process end as soon as the one that started it has, even by force: what it leaves is what a crash leaves."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True, name="voxloom-parent").start()


def _compute_all(brought: bytes, device: Any, numbers: Sequence[int], threads: int | None) -> None:
    """Compute parts in a process of their own."""
    _end_with_parent()
    if threads is not None:
        torch.set_num_threads(threads)
    job: ShardJob = pickle.loads(brought)  # noqa: S301 - of the process that started this one
    SerialLauncher().launch(job if device is None else job.on(device), numbers, lambda number: None)


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
