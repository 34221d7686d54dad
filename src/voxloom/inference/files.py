"""Results in files: written in place beside their target, recorded so that a run can be taken up again, and published when whole.

Beside a target `STEM.nii` or `STEM.nii.gz` there is, while a run is unfinished, a hidden folder `.STEM.voxloom`; the sidecar goes
by the stem too:

    lock          held by the process that is at it
    run           what tells one run from another: the same beside all targets of a run
    record.json   what the run is: targets, input, models, options and plan (beside the first target only)
    progress      a line for each layer that is on the disk, and one when all is ready to be published
    volume.nii    the result; whole.nii.gz is what becomes of it where it is compressed
    sidecar.json  what becomes `STEM.json`
"""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from ..core.boxes import Box
from ..errors import RecordError, SaveError, TargetExistsError, UnsupportedImageError, VoxloomError
from ..volumes.formats import NiftiWriter, as_save_error, compressing, stem_of
from .identity import differences
from .sidecars import ENDINGS, is_as_written, other_told_of, read_sidecar, sidecar_of, written
from .sinks import VolumeForm

__all__ = [
    "BEGIN_ANEW",
    "NiftiSink",
    "UnfinishedRun",
    "as_target",
    "is_ready_to_publish",
    "left_behind",
    "remove_leftovers",
]

CHUNK_BYTES = 2**22
READY = "ready"
UNFINISHED = ".unfinished"
RECORD_FILES = ("record.json", "progress")
SCRATCH_FILES = ("volume.nii", "whole.nii.gz", "sidecar.json", "run")
# What is said in Python and on the command line.
BEGIN_ANEW = "begin anew with resume=False (--no-resume)"
OVERWRITE = "overwrite=True (--overwrite)"

Json = Any


def as_target(path: Any) -> Path:
    """Check the name of a file that a result is to be written to.

    Raises:
        UnsupportedImageError: if its ending is not `.nii` or `.nii.gz`.
        SaveError: if there is no folder for it.
    """
    target = Path(path).expanduser()
    if target.is_symlink():
        try:
            target = target.resolve()  # the file is made beside where it will be
        except RuntimeError as error:
            raise SaveError(f"{target} cannot be written: it is a link to itself") from error
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


def left_behind(target: Path) -> Path | None:
    """Find what is left of a run for a target that was interrupted."""
    folder = NiftiSink(target).folder
    return folder if (folder / "record.json").exists() else None


class NiftiSink:
    """Writes a result to a file of a hidden folder beside its target. See `Sink`."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.folder = target.with_name(f".{stem_of(target)}.voxloom")
        self.is_new = True
        self.is_kept = False
        """Whether anything of it has been recorded as finished."""
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
        if not self.is_new and not self.volume.exists():
            raise RecordError(f"the unfinished file {self.volume} is gone: {BEGIN_ANEW}")
        with self._explained():
            try:
                self._writer = NiftiWriter(self.volume, form.shape, form.dtype, form.affine, form.codes, self.is_new)
            except RecordError as error:
                raise RecordError(f"{error}: {BEGIN_ANEW}") from error

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
        except VoxloomError:
            raise
        except OSError as error:
            kept = f". What is finished stays in {self.folder.name}: the same call goes on from there" if self.is_kept else ""
            raise SaveError(f"{as_save_error(self.target, error)}{kept}") from error


class UnfinishedRun:
    """The files of one run, from the first layer to the last; only one process at a time has them.

    Args:
        sinks: the files, by the names of results.
        overwrite: whether targets that are there may be replaced.

    Raises:
        RecordError: if another process is at it.
        SaveError: if two results would go to the same file.
    """

    def __init__(self, sinks: Mapping[str | None, NiftiSink], overwrite: bool) -> None:
        self.sinks = list(sinks.values())
        self.targets = {str(name): str(sink.target.resolve()) for name, sink in sinks.items()}
        self.folder = self.sinks[0].folder
        self.overwrite = overwrite
        self.layers_done = 0
        self._locks: list[tuple[NiftiSink, FileLock]] = []
        stems = [sidecar_of(sink.target.resolve()) for sink in self.sinks]
        if len(set(stems)) < len(stems):
            raise SaveError(
                f"two results are to be written to the same file, or have one stem: {', '.join(self.targets.values())}"
            )
        try:
            for sink in sorted(self.sinks, key=lambda sink: sink.folder):
                self._locks.append((sink, _locked(sink)))
        except BaseException:
            self.close()
            raise

    def recorded(self, identity: Json, resume: bool) -> Json | None:
        """Look for a run that was interrupted.

        Args:
            identity: what the run is.
            resume: whether an unfinished run may be taken up.

        Returns:
            Its plan, or None where there is none.

        Raises:
            TargetExistsError: if a target is there and must not be replaced.
            RecordError: if the unfinished run is another one; says in what.
        """
        path = self.folder / "record.json"
        if not resume or not path.exists():
            self._check_targets()
            if resume:
                self._check_others()
            return None
        try:
            record = json.loads(path.read_text())
            run, targets, then, plan = (record[key] for key in ("run", "targets", "identity", "plan"))
            recorded = {"targets": targets} | then
        except (ValueError, KeyError, TypeError) as error:
            raise RecordError(f"{path} is damaged: {BEGIN_ANEW}") from error
        self._check_same(recorded, {"targets": self.targets} | identity)
        for sink in self.sinks:
            if _text_of(sink.folder / "run") != run and not self.is_ready:
                raise RecordError(
                    f"{sink.folder} is not of the unfinished run that {path} records: {BEGIN_ANEW}, or move it away"
                )
        if not self.is_ready:
            self._check_targets()
        self.layers_done = self._layers_recorded()
        for sink in self.sinks:
            sink.is_new, sink.is_kept = False, self.layers_done > 0
        return plan

    def _check_others(self) -> None:
        """Refuse to discard files of an unfinished run that is recorded beside another target."""
        for sink in self.sinks:
            run, _, place = _text_of(sink.folder / "run").partition(" ")
            if place and Path(place) != self.folder.resolve() and run in _text_of(Path(place) / "record.json"):
                raise RecordError(
                    f"{sink.folder} is of an unfinished run that is recorded in {place}: go on with that one, or {BEGIN_ANEW}"
                )

    def begin(self, identity: Json, plan: Json) -> None:
        """Make ready for a run from the start; what an earlier one has left is removed."""
        run = f"{secrets.token_hex(16)} {self.folder.resolve()}"
        for sink in self.sinks:
            self._remove_files(sink)
            _write_safely(sink.folder / "run", run)
        self._record = {"run": run, "targets": self.targets, "identity": identity, "plan": plan}

    def opened(self) -> None:
        """Record the run, now that all files are there."""
        path = self.folder / "record.json"
        if not path.exists():
            _write_safely(path, json.dumps(self._record, indent=1))

    def _check_targets(self) -> None:
        for sink in self.sinks:
            sidecar = sidecar_of(sink.target)
            if os.path.lexists(sidecar) and read_sidecar(sidecar) is None:
                raise TargetExistsError(f"{sidecar} exists, and is not of voxloom's: move it away, or choose another name")
            other = other_told_of(sink.target)
            if other is not None:
                raise TargetExistsError(
                    f"{sidecar} says how {other} was made, which has the same stem: move both away, or choose another name"
                )
            if sink.target.exists() and not self.overwrite:
                raise TargetExistsError(f"{sink.target} exists, and is kept: remove it, choose another name, or give {OVERWRITE}")

    def _check_same(self, recorded: Json, now: Json) -> None:
        what = differences(recorded, now)
        if what:
            raise RecordError(
                f"{self.folder} holds an unfinished run of something else: {'; '.join(what)}. Go on with what it was begun with,"
                f" give another output, or {BEGIN_ANEW}"
            )
        if None in now["models"]:
            raise RecordError(
                f"{self.folder} holds an unfinished run, but whether it is of the same model cannot be told of a function: give"
                f" model_name, or {BEGIN_ANEW}"
            )

    def _lines(self) -> list[str]:
        # A line is only complete with its end.
        return _text_of(self.folder / "progress").split("\n")[:-1]

    def _layers_recorded(self) -> int:
        """Number of layers that are on the disk; what was left of a line that was not finished is removed."""
        path, lines = self.folder / "progress", self._lines()
        done = len(lines) - int(self.is_ready)
        if lines != [*map(str, range(done)), *([READY] if self.is_ready else [])]:
            raise RecordError(f"{path} is damaged: {BEGIN_ANEW}")
        if path.exists():
            _write_safely(path, "".join(f"{line}\n" for line in lines))
        return done

    @property
    def is_ready(self) -> bool:
        """Whether everything is there, and need only be published."""
        return READY in self._lines()

    def layer_finished(self) -> None:
        """Record that all blocks of a layer have been written, once they are on the disk."""
        for sink in self.sinks:
            sink.flush()
        self._add_line(str(self.layers_done))
        self.layers_done += 1
        for sink in self.sinks:
            sink.is_kept = True

    def _add_line(self, line: str) -> None:
        try:
            with (self.folder / "progress").open("a") as file:
                file.write(f"{line}\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise as_save_error(self.sinks[0].target, error) from error

    def publish(self, contents: Json | None = None) -> None:
        """Put whole files under their names, with a sidecar each.

        Args:
            contents: what the sidecars say; None where they were written before the run was interrupted.

        Raises:
            TargetExistsError: if a file has appeared there in the meantime, and must not be replaced.
            RecordError: if what was whole is not so any more.
        """
        if contents is not None:
            for sink in self.sinks:
                described = contents | {"written": written(sink.whole, sink.target)}
                _write_safely(sink.folder / "sidecar.json", json.dumps(described, indent=1))
            self._add_line(READY)
        for sink in self.sinks:
            if contents is None:
                _check_whole(sink)
            sidecar = sidecar_of(sink.target)
            if sidecar.exists() and read_sidecar(sidecar) is None:
                raise TargetExistsError(
                    f"{sidecar} has appeared while the result was made, and is not of voxloom's: move it away, and give the same"
                    " call again"
                )
        for sink in self.sinks:
            try:
                _put(sink.whole, sink.target, self.overwrite)
                sidecar = sidecar_of(sink.target)
                is_left_over = read_sidecar(sidecar) is not None and other_told_of(sink.target) is None
                _put(sink.folder / "sidecar.json", sidecar, self.overwrite or is_left_over)
            except VoxloomError:
                raise
            except OSError as error:
                raise as_save_error(sink.target, error) from error
        # While the record is there, all of this is done once more after an interruption; so it goes last.
        for sink in self.sinks:
            self._remove_files(sink, SCRATCH_FILES)
        for sink in reversed(self.sinks):
            self._remove_files(sink)

    def discard_if_empty(self) -> None:
        """Remove the files of a run of which nothing is finished."""
        if self.layers_done == 0:
            for sink in reversed(self.sinks):
                self._remove_files(sink)

    @staticmethod
    def _remove_files(sink: NiftiSink, names: Sequence[str] = RECORD_FILES + SCRATCH_FILES) -> None:
        # The record first: without it the others mean nothing.
        for name in names:
            (sink.folder / name).unlink(missing_ok=True)

    def close(self) -> None:
        """Let others at the files."""
        for sink, lock in self._locks:
            # While the lock is held nobody else looks into the folder; but not everywhere what is open can be removed.
            is_empty = not _is_recorded(sink.folder)
            if is_empty and os.name == "posix":
                _remove_folder(sink.folder)
            lock.release(force=True)
            if is_empty and os.name != "posix":
                _remove_folder(sink.folder)
        self._locks = []


def is_ready_to_publish(target: Path) -> bool:
    """Whether a run for a target was interrupted while it was published."""
    folder = NiftiSink(target).folder
    return _is_recorded(folder) and READY in _text_of(folder / "progress").split("\n")[:-1]


def remove_leftovers(target: Path) -> None:
    """Remove what a run that was interrupted in its last moment has left of its hidden folder."""
    sink = NiftiSink(target)
    if sink.folder.exists() and not _is_recorded(sink.folder):
        with contextlib.suppress(RecordError):  # another process is at it
            UnfinishedRun({None: sink}, overwrite=False).close()


def _remove_folder(folder: Path) -> None:
    """Remove a hidden folder, unless somebody else has put something there."""
    unfinished = (Path(name).with_suffix(UNFINISHED).name for name in RECORD_FILES + SCRATCH_FILES)
    with contextlib.suppress(OSError):
        for name in (*RECORD_FILES, *SCRATCH_FILES, *unfinished, "lock"):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def _is_recorded(folder: Path) -> bool:
    """Whether a hidden folder is of an unfinished run, whose record may be in the folder of another of its results."""
    _, _, place = _text_of(folder / "run").partition(" ")
    return (folder / "record.json").exists() or bool(place and (Path(place) / "record.json").exists())


def _locked(sink: NiftiSink) -> FileLock:
    path = sink.folder / "lock"
    while True:
        lock = FileLock(path, timeout=0)
        try:
            sink.folder.mkdir(exist_ok=True)
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
        if _is_of_lock(lock, path):
            return lock
        lock.release(force=True)


def _is_of_lock(lock: FileLock, path: Path) -> bool:
    """Whether the file that is locked is still the one of that name: another process may have removed it just before."""
    file = lock._context.lock_file_fd
    try:
        return file is not None and os.path.samestat(os.fstat(file), path.stat())
    except OSError:
        return False


def _check_whole(sink: NiftiSink) -> None:
    """Check that a result is as it was when it was whole, whether it is still in the hidden folder or under its name."""
    made = read_sidecar(sink.folder / "sidecar.json") or read_sidecar(sidecar_of(sink.target))
    place = sink.whole if sink.whole.exists() else sink.target
    if not place.exists() or not is_as_written(place, sink.target, made):
        raise RecordError(f"the result that was ready to be put at {sink.target} is gone or damaged ({place}): {BEGIN_ANEW}")


def _put(source: Path, target: Path, overwrite: bool) -> None:
    """Put a file under its name; what is there is only replaced if it may be."""
    if not source.exists():  # that was done before an interruption
        return
    if not overwrite:
        try:
            os.link(source, target)  # unlike a renaming, this replaces nothing
            source.unlink()
            return
        except FileExistsError:
            if target.exists() and target.samefile(source):  # interrupted in between
                source.unlink()
                return
            raise TargetExistsError(
                f"{target} has appeared while its result was made, and is kept. The result is in {source.parent.name}:"
                f" the same call with {OVERWRITE} puts it there, and so does this one once the file is gone"
            ) from None
        except OSError:
            pass  # a file system without links
    if target.exists():
        source.chmod(target.stat().st_mode & 0o777)
    source.replace(target)


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")  # names of files may be of any bytes
    except OSError:
        return ""


def _write_safely(path: Path, text: str) -> None:
    unfinished = path.with_suffix(UNFINISHED)
    try:
        with unfinished.open("w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        raise as_save_error(path, error) from error
