"""Results as NIfTI files, or as what is made of one in the end."""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ...core.boxes import Box
from ...core.grid.shards import ShardGrid
from ...errors import RecordError, TargetExistsError
from ..compression import compressing
from ..formats import format_of, stem_of
from ..itk.segments import SEGMENTS, check_segments, write_segments
from ..labels import Label
from ..protocols import Json, VolumeSpec
from ..writing.saving import put, saving, write_safely
from ..writing.sidecars import is_as_written, other_told_of, read_sidecar, sidecar_of, written
from ..writing.words import BEGIN_AGAIN, OVERWRITE
from ..zarr.layout import Layout
from ..zarr.source import ZarrSource
from .writing import NiftiWriter

__all__ = ["NiftiStore"]

CHUNK_BYTES = 2**22


def _compress(plain: Path, whole: Path, labels: Sequence[Label]) -> None:
    with plain.open("rb") as unpacked, whole.open("wb") as file:
        with compressing(file) as packed:
            shutil.copyfileobj(unpacked, packed, CHUNK_BYTES)
        file.flush()
        os.fsync(file.fileno())


FINISHED_BY: dict[str, Callable[[Path, Path, Sequence[Label]], None]] = {".nii.gz": _compress, SEGMENTS: write_segments}
"""What makes a file of some format out of a NIfTI file, when all of that is written."""


class NiftiStore:
    """Writes `STEM.nii`, `STEM.nii.gz` or `STEM.seg.nrrd`, with `STEM.json` beside it.

    Until it is whole, a result is in `.STEM.RUN.nii`; if it is to be of another format then in a file of that, such as
    `.STEM.RUN.nii.gz`, and what its sidecar will say is in `.STEM.RUN.json`.

    Args:
        target: the file.
        overwrite: whether a file that is there may be replaced.
    """

    supports_resume = True
    chunk_shape: tuple[int, int, int] | None = None

    def __init__(self, target: Path, overwrite: bool = False) -> None:
        self.path = target
        self.overwrite = overwrite
        self._writer: NiftiWriter | None = None
        self._spec: VolumeSpec | None = None

    def check(self) -> None:
        """See `VolumeStore`."""
        sidecar = sidecar_of(self.path)
        if os.path.lexists(sidecar) and read_sidecar(sidecar) is None:
            raise TargetExistsError(f"{sidecar} exists, and is not of voxloom's: move it away, or choose another name")
        other = other_told_of(self.path)
        if other is not None:
            raise TargetExistsError(
                f"{sidecar} says how {other} was made, which has the same stem: move both away, or choose another name"
            )
        if self.path.exists() and not self.overwrite:
            raise TargetExistsError(f"{self.path} exists, and is kept: remove it, choose another name, or give {OVERWRITE}")

    def _part(self, run: str, ending: str) -> Path:
        return self.path.with_name(f".{stem_of(self.path)}.{run}{ending}")

    def create(self, spec: VolumeSpec, run: str) -> None:
        """See `VolumeStore`."""
        if self._ending == SEGMENTS:
            check_segments(spec, self.path)
        self._open(spec, run, is_new=True)

    def reopen(self, spec: VolumeSpec, run: str) -> None:
        """See `VolumeStore`."""
        if not self._part(run, ".nii").exists():
            raise RecordError(f"the unfinished file {self._part(run, '.nii')} is gone: {BEGIN_AGAIN}")
        try:
            self._open(spec, run, is_new=False)
        except RecordError as error:
            raise RecordError(f"{error}: {BEGIN_AGAIN}") from error

    def _open(self, spec: VolumeSpec, run: str, is_new: bool) -> None:
        self._spec = spec
        with saving(self.path):
            self._writer = NiftiWriter(
                self._part(run, ".nii"), spec.shape, spec.dtype, spec.affine, spec.codes, is_new, spec.stored
            )

    def write(self, box: Box, values: Tensor) -> None:
        """See `VolumeStore`."""
        assert self._writer is not None
        with saving(self.path):
            self._writer.write(box, values)

    def flush(self) -> None:
        """See `VolumeStore`."""
        assert self._writer is not None
        with saving(self.path):
            self._writer.flush()

    def abort(self) -> None:
        """See `VolumeStore`."""
        if self._writer is not None:
            self._writer.close()

    def discard(self, run: str) -> None:
        """See `VolumeStore`."""
        self.abort()
        for ending in (".nii", self._ending, ".json"):
            self._part(run, ending).unlink(missing_ok=True)

    def layout(self, spec: VolumeSpec) -> Layout:
        """See `PartsStore`: the file is made of a plain array in the end."""
        return Layout.of(self.path.with_name(f"{stem_of(self.path)}.zarr"), spec, "0.5", None, None, None)

    def array(self, run: str) -> Path:
        """See `PartsStore`."""
        return self._part(run, ".zarr")

    def complete(self, spec: VolumeSpec, room: Path, run: str) -> None:
        """See `PartsStore`."""
        if self.is_ready(run):
            return
        self.discard(run)
        source = ZarrSource(self.array(run))
        try:
            self.create(spec, run)
            boxes = ShardGrid(spec.shape[1:], self.layout(spec).shards[0])
            for number in range(len(boxes)):
                self.write(boxes[number], source.read(boxes[number]).to(spec.dtype))
            self.flush()
        except BaseException:
            self.discard(run)
            raise

    def is_ready(self, run: str) -> bool:
        """Whether the file is whole, and only to be put under its name."""
        return self._part(run, ".json").exists()

    def make_ready(self, sidecar: Mapping[str, Json], run: str) -> None:
        """Let nothing be missing but the name: what was written is compressed, and known by its hash."""
        if self.is_ready(run):
            return
        self.abort()
        whole = self._part(run, self._ending)
        with saving(self.path):
            self._make_whole(self._part(run, ".nii"), whole, [Label(**each) for each in sidecar.get("labels", ())])
            told = {**sidecar, "run": run, "written": written(whole, self.path)}
            write_safely(self._part(run, ".json"), json.dumps(told, indent=1))

    def commit(self, sidecar: Mapping[str, Json], run: str) -> Path:
        """See `VolumeStore`."""
        self.abort()
        plain, described = self._part(run, ".nii"), self._part(run, ".json")
        whole = self._part(run, self._ending)
        with saving(self.path):
            if not sidecar:
                self._make_whole(plain, whole, ())
                put(whole, self.path, self.overwrite)
                plain.unlink(missing_ok=True)
                return self.path
            published = read_sidecar(sidecar_of(self.path)) or {}
            if not described.exists() and published.get("run") == run:  # that was done before an interruption
                plain.unlink(missing_ok=True)
                return self.path
            if not described.exists():
                self.make_ready(sidecar, run)
            elif not is_as_written(whole if whole.exists() else self.path, self.path, read_sidecar(described)):
                raise RecordError(f"the result that was ready to be put at {self.path} is gone or damaged: {BEGIN_AGAIN}")
            beside = sidecar_of(self.path)
            if beside.exists() and read_sidecar(beside) is None:
                raise TargetExistsError(
                    f"{beside} has appeared while the result was made, and is not of voxloom's: move it away, and give the same"
                    " call again"
                )
            put(whole, self.path, self.overwrite)
            is_left_over = read_sidecar(beside) is not None and other_told_of(self.path) is None
            put(described, beside, self.overwrite or is_left_over)
            plain.unlink(missing_ok=True)
        return self.path

    @property
    def _ending(self) -> str:
        """That of the format which the file is of."""
        known = format_of(self.path)
        assert known is not None
        return known.ending

    def _make_whole(self, plain: Path, whole: Path, labels: Sequence[Label]) -> None:
        if not plain.exists():
            raise RecordError(f"the unfinished file {plain} is gone: {BEGIN_AGAIN}")
        finish = FINISHED_BY.get(self._ending)
        if finish is not None:
            finish(plain, whole, labels)
