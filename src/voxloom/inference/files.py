"""Results in files: written in place beside their target, recorded so that a run can be taken up again, and published when whole.

Beside a target `NAME` there is, while a run is unfinished, a hidden folder `.NAME.voxloom`:

    lock          held by the process that is at it
    record.json   what the run is: input, models, options and plan (beside the first target only)
    progress      a line for each layer that is on the disk, and one when all is ready to be published
    volume.nii    the result
    sidecar.json  what becomes `NAME.json`
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from ..core.boxes import Box
from ..errors import RecordError, SaveError, TargetExistsError, UnsupportedImageError
from ..volumes.formats import NiftiWriter, as_save_error, compressing, stem_of
from .identity import differences
from .sinks import VolumeForm

__all__ = ["NiftiSink", "UnfinishedRun", "as_target", "difference_of_made", "sidecar_of"]

ENDINGS = (".nii", ".nii.gz")
CHUNK_BYTES = 2**22
READY = "ready"

Json = Any


def as_target(path: Any) -> Path:
    """Check the name of a file that a result is to be written to.

    Raises:
        UnsupportedImageError: if its ending is not `.nii` or `.nii.gz`.
        SaveError: if there is no folder for it.
    """
    target = Path(path).expanduser()
    if not target.name.lower().endswith(ENDINGS):
        raise UnsupportedImageError(
            f"{target} cannot be written block by block: its name must end in {' or '.join(ENDINGS)}. For other formats leave out"
            " output, and save the image that is returned"
        )
    if target.is_dir():
        raise SaveError(f"{target} is a folder: give the name of a file in it")
    if not target.parent.is_dir():
        raise SaveError(f"{target} cannot be written: there is no folder {target.parent}; make it first")
    return target


def sidecar_of(target: Path) -> Path:
    """Name of the file that says how a result came to be."""
    return target.with_name(f"{stem_of(target)}.json")


def difference_of_made(target: Path, identity: Json) -> str | None:
    """Say in what the result that is at a target differs from what would be made; empty if in nothing, None if there is none."""
    if not target.exists():
        return None
    sidecar = sidecar_of(target)
    try:
        made = json.loads(sidecar.read_text())
        recorded = {key: made.get(key) for key in identity}
    except (OSError, ValueError, AttributeError):
        return f"nothing beside it says how it was made ({sidecar.name})"
    if None in identity["models"]:
        return "whether it is of the same model cannot be told of a function without a name"
    return "; ".join(differences(recorded, identity))


class NiftiSink:
    """Writes a result to a file of a hidden folder beside its target. See `Sink`."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.folder = target.with_name(f".{target.name}.voxloom")
        self.is_new = True
        self._writer: NiftiWriter | None = None

    @property
    def volume(self) -> Path:
        """The unfinished file."""
        return self.folder / "volume.nii"

    @property
    def whole(self) -> Path:
        """The file that takes the target's place."""
        return self.folder / "whole.nii.gz" if self.is_compressed else self.volume

    @property
    def is_compressed(self) -> bool:
        """Whether the target is."""
        return self.target.name.lower().endswith(".gz")

    def open(self, form: VolumeForm) -> None:
        """See `Sink`."""
        self._form = form
        with self._explained():
            self._writer = NiftiWriter(self.volume, form.shape, form.dtype, form.affine, form.codes, self.is_new)
            if self.volume.stat().st_size != self._writer.num_bytes:
                raise RecordError(
                    f"the unfinished file {self.volume} has {self.volume.stat().st_size} bytes in place of"
                    f" {self._writer.num_bytes}: begin anew with resume=False"
                )

    def write(self, box: Box, values: Tensor) -> None:
        """See `Sink`."""
        assert self._writer is not None
        with self._explained():
            self._writer.write(box, values)

    def flush(self) -> None:
        """Bring what was written to the disk."""
        assert self._writer is not None
        with self._explained():
            self._writer.flush()

    def close(self) -> Any:
        """Make the whole file; it is published by the run."""
        assert self._writer is not None
        self.flush()
        self._writer.close()
        if self.is_compressed:
            with self._explained(), self.volume.open("rb") as plain, self.whole.open("wb") as file:
                with compressing(file) as packed:
                    shutil.copyfileobj(plain, packed, CHUNK_BYTES)
                file.flush()
                os.fsync(file.fileno())
        return self._form.image_class

    def abort(self) -> None:
        """See `Sink`."""
        if self._writer is not None:
            self._writer.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if isinstance(error, SaveError | RecordError):
                raise
            raise SaveError(
                f"{as_save_error(self.target, error)}. What is finished stays in {self.folder.name}: the same call goes on"
                " from there"
            ) from error


class UnfinishedRun:
    """The files of one run, from the first layer to the last; only one process at a time has them.

    Args:
        sinks: the files.
        overwrite: whether targets that are there may be replaced.

    Raises:
        TargetExistsError: if a target is there and must not be replaced.
        RecordError: if another process is at it.
    """

    def __init__(self, sinks: Sequence[NiftiSink], overwrite: bool) -> None:
        self.sinks = list(sinks)
        self.folder = sinks[0].folder
        self.overwrite = overwrite
        self._locks: list[tuple[Path, FileLock]] = []
        self.layers_done = 0
        names = [sink.target.resolve() for sink in sinks]
        if len(set(names)) < len(names):
            raise SaveError(f"two results are to be written to the same file, {', '.join(map(str, names))}")
        self._check_targets()
        try:
            for sink in sorted(self.sinks, key=lambda sink: sink.folder):
                self._locks.append((sink.folder, _locked(sink)))
            self._check_targets()
        except BaseException:
            self.close()
            raise

    def _check_targets(self) -> None:
        if self.overwrite or self._is_ready():
            return
        for sink in self.sinks:
            for path in (sink.target, sidecar_of(sink.target)):
                if path.exists():
                    raise TargetExistsError(f"{path} exists, and is kept: remove it, choose another name, or give overwrite=True")

    def _lines(self) -> list[str]:
        try:
            # A line is only complete with its end.
            return (self.folder / "progress").read_text().split("\n")[:-1]
        except FileNotFoundError:
            return []

    def _is_ready(self) -> bool:
        return READY in self._lines()

    def begin(self, identity: Json, plan: Json, resume: bool) -> Json | None:
        """Find out whether there is something to take up.

        Args:
            identity: what the run is.
            plan: how it will be done, if it begins now.
            resume: whether an unfinished run may be taken up.

        Returns:
            The plan of the unfinished run, or None where the run begins now.

        Raises:
            RecordError: if the unfinished run is another one; says in what.
        """
        path = self.folder / "record.json"
        if resume and path.exists():
            try:
                record = json.loads(path.read_text())
                recorded, plan_then = record["identity"], record["plan"]
            except (ValueError, KeyError) as error:
                raise RecordError(f"{path} is damaged: begin anew with resume=False") from error
            self._check_same(recorded, identity)
            lines = self._lines()
            self.layers_done = len([line for line in lines if line != READY])
            for sink in self.sinks:
                sink.is_new = False
            return plan_then
        for sink in self.sinks:
            self._remove_files(sink)
            sink.is_new = True
        self._record = {"identity": identity, "plan": plan}
        return None

    def opened(self) -> None:
        """Record the run, now that all files are there."""
        path = self.folder / "record.json"
        if not path.exists():
            _write_safely(path, json.dumps(self._record, indent=1))

    def _check_same(self, recorded: Json, now: Json) -> None:
        what = differences(recorded, now)
        way_out = "go on with what it was begun with, give another output, or begin anew with resume=False"
        if what:
            raise RecordError(
                f"{self.folder} holds an unfinished run of something else: {'; '.join(what)}. {way_out.capitalize()}"
            )
        if None in now["models"]:
            raise RecordError(
                f"{self.folder} holds an unfinished run, but whether it is of the same model cannot be told of a function: give"
                " model_name, or begin anew with resume=False"
            )

    def layer_finished(self) -> None:
        """Record that all blocks of a layer have been written, once they are on the disk."""
        for sink in self.sinks:
            sink.flush()
        self._add_line(str(self.layers_done))
        self.layers_done += 1

    def _add_line(self, line: str) -> None:
        with (self.folder / "progress").open("a") as file:
            file.write(f"{line}\n")
            file.flush()
            os.fsync(file.fileno())

    @property
    def is_ready(self) -> bool:
        """Whether everything is there, and need only be published."""
        return self._is_ready()

    def publish(self, sidecar: Json | None = None) -> None:
        """Put whole files under their names, with a sidecar each, and remove what is beside them.

        Args:
            sidecar: what the sidecars say; None where they were written before the run was interrupted.
        """
        if sidecar is not None:
            for sink in self.sinks:
                _write_safely(sink.folder / "sidecar.json", json.dumps(sidecar, indent=1))
            self._add_line(READY)
        for sink in self.sinks:
            try:
                if sink.whole.exists():
                    if sink.target.exists():
                        sink.whole.chmod(sink.target.stat().st_mode & 0o777)
                    sink.whole.replace(sink.target.resolve())
                if (sink.folder / "sidecar.json").exists():
                    (sink.folder / "sidecar.json").replace(sidecar_of(sink.target))
            except OSError as error:
                raise as_save_error(sink.target, error) from error
        for sink in reversed(self.sinks):  # the record goes last
            shutil.rmtree(sink.folder, ignore_errors=True)

    def discard_if_empty(self) -> None:
        """Remove the files of a run of which nothing is finished."""
        if self.layers_done == 0:
            for sink in reversed(self.sinks):
                self._remove_files(sink)

    @staticmethod
    def _remove_files(sink: NiftiSink) -> None:
        for name in ("record.json", "progress", "volume.nii", "whole.nii.gz", "sidecar.json"):
            (sink.folder / name).unlink(missing_ok=True)

    def close(self) -> None:
        """Let others at the files."""
        for folder, lock in self._locks:
            # While the lock is held nobody else looks into the folder.
            if not (folder / "record.json").exists() and not (folder / "volume.nii").exists():
                shutil.rmtree(folder, ignore_errors=True)
            lock.release(force=True)


def _locked(sink: NiftiSink) -> FileLock:
    while True:
        try:
            sink.folder.mkdir(exist_ok=True)
            lock = FileLock(sink.folder / "lock", timeout=0)
            lock.acquire()
        except Timeout:
            raise RecordError(
                f"another process is writing {sink.target}: wait for it, or choose another name (its unfinished files are in"
                f" {sink.folder})"
            ) from None
        except FileNotFoundError:
            continue  # the other process has just finished, and removed the folder
        except OSError as error:
            raise as_save_error(sink.target, error) from error
        if (sink.folder / "lock").exists():
            return lock
        lock.release(force=True)


def _write_safely(path: Path, text: str) -> None:
    unfinished = path.with_suffix(".unfinished")
    try:
        with unfinished.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        raise as_save_error(path, error) from error
