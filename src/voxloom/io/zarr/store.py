"""Results in Zarr: OME-Zarr with all its levels, NIfTI-Zarr, or a plain array; each shard is written once, as a whole."""

import json
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ...core.boxes import Box
from ...core.sizes import as_int, as_sizes
from ...errors import ModeError, RecordError, TargetExistsError
from ..files import sidecar_in
from ..formats import stem_of
from ..labels import Label
from ..protocols import Json, VolumeSpec
from ..writing.replacing import forget_old, replace_folder, restore_old
from ..writing.saving import saving, write_safely
from ..writing.sidecars import run_of, written
from ..writing.words import BEGIN_AGAIN, OVERWRITE
from .encoding import put_shard
from .layout import Layout, describe_labels, register_label
from .ngff import VERSIONS
from .parts import make_coarser
from .source import is_label_of_image, is_zarr, more_than_image
from .writing import PyramidWriter, at_once

__all__ = ["ZarrStore"]

# How many times the bytes of a shard are in memory, at most: while it is encoded (as values, and as bytes, with some room), or
# while the next level of labels is made of it.
SHARD_COPIES, COARSER_COPIES = 3.0, 6.0


class ZarrStore:
    """Writes `STEM.ome.zarr`, `STEM.nii.zarr`, `STEM.zarr` (a plain array), or `IMAGE.ome.zarr/labels/NAME`.

    Until it is whole, a result is in the folder `.STEM.RUN.zarr`, and what is there of shards that are not whole yet in
    `.STEM.RUN.parts`. Coarser levels are made as the finest one is written: labels are those of most voxels, other values their
    mean.

    Args:
        path: the folder to be made.
        overwrite: whether a result that is there may be replaced.
        version: of OME-Zarr: `"0.4"` (in Zarr v2), `"0.5"` or `"0.6"` (in v3). A label image is of its image's version.
        chunks: voxels of a chunk, `(I, J, K)` or one number; by default about 1 MiB.
        shards: voxels of a shard, multiples of the chunk; by default chunks are files of their own unless there are many.
        levels: number of levels; by default so many that the last has at most 128 voxels along any axis. A label image has as
            many as its image.

    Raises:
        ModeError: if there is no such version.
        SizeError: if chunks, shards or levels are no sizes.

    Example:
        >>> import tempfile, torch, voxloom as vx
        >>> image = vx.ScalarImage(torch.rand(1, 40, 30, 20))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = vx.ZarrStore(f"{folder}/out.ome.zarr", chunks=16, levels=2)
        ...     made = vx.predict(torch.nn.Identity(), image, patch_size=16, output=store)
        ...     vx.ScalarImage(vx.open_zarr(made.path, level=1)).shape
        (1, 20, 15, 10)
    """

    supports_resume = True

    def __init__(
        self,
        path: str | Path,
        overwrite: bool = False,
        *,
        version: str = "0.5",
        chunks: int | Sequence[int] | None = None,
        shards: int | Sequence[int] | None = None,
        levels: int | None = None,
    ) -> None:
        if version not in VERSIONS:
            raise ModeError(f"version is {version!r}: it must be one of {', '.join(map(repr, VERSIONS))}")
        self.path = Path(path).expanduser()
        self.overwrite = overwrite
        self._version, self._num_levels = version, None if levels is None else as_int(levels, "levels", 1)
        self._chunks = None if chunks is None else as_sizes(chunks, 3, "chunks")
        self._shards = None if shards is None else as_sizes(shards, 3, "shards")
        self._writer: PyramidWriter | None = None
        self._layout: Layout | None = None

    def __repr__(self) -> str:
        return f"ZarrStore({str(self.path)!r}, version={self._version!r}, chunks={self._chunks}, shards={self._shards})"

    @property
    def chunk_shape(self) -> tuple[int, int, int] | None:
        """A shard, once it is known what is written; see `VolumeStore`."""
        sizes = self._chunks if self._layout is None else self._layout.units[0]
        return None if sizes is None else (sizes[0], sizes[1], sizes[2])

    def _at(self, run: str, ending: str) -> Path:
        return self.path.with_name(f".{stem_of(self.path)}.{run}{ending}")

    def _old(self, run: str) -> Path:
        """Name what was there before, while it is replaced: by its whole name, since others may have the same stem."""
        return self.path.with_name(f".{self.path.name}.{run}.old")

    def check(self) -> None:
        """See `VolumeStore`."""
        if self.path.exists() and not self.overwrite:
            raise TargetExistsError(f"{self.path} exists, and is kept: remove it, choose another name, or give {OVERWRITE}")
        if self.path.exists() and not is_zarr(self.path):
            raise TargetExistsError(f"{self.path} exists, and is no Zarr store: choose another name")
        if self.path.exists() and (more := more_than_image(self.path)):
            raise TargetExistsError(
                f"{self.path} holds more than an image, which would be lost with it: {', '.join(more)}. Move it away, or choose"
                " another name"
            )

    # Writing

    def layout(self, spec: VolumeSpec) -> Layout:
        """Say how a result would lie in the folder.

        Raises:
            SpaceError, SizeError, ModeError: if it cannot.
        """
        return Layout.of(self.path, spec, self._version, self._chunks, self._shards, self._num_levels)

    def writing_bytes(self, spec: VolumeSpec) -> int:
        """See the function `writing_bytes`: of each shard that is encoded there are several copies meanwhile."""
        layout = self.layout(spec)
        sizes = [spec.shape[0] * voxels * layout.dtype.itemsize for voxels in layout.most_voxels]
        copies = COARSER_COPIES if spec.is_labels and len(sizes) > 1 else SHARD_COPIES
        return int(copies * max(size * at_once(size) for size in sizes))

    def create(self, spec: VolumeSpec, run: str) -> None:
        """See `VolumeStore`."""
        with saving(self.path):
            self._open(spec, run, is_new=True)

    def reopen(self, spec: VolumeSpec, run: str) -> None:
        """See `VolumeStore`."""
        whole = self._at(run, ".zarr")
        if not whole.is_dir():
            raise RecordError(f"the unfinished folder {whole} is gone: {BEGIN_AGAIN}")
        try:
            with saving(self.path):
                self._open(spec, run, is_new=False)
        except RecordError as error:
            raise RecordError(f"{error}: {BEGIN_AGAIN}") from error

    def _open(self, spec: VolumeSpec, run: str, is_new: bool) -> None:
        layout = self._layout = self.layout(spec)
        whole = self._at(run, ".zarr")
        if is_new:
            layout.create(whole)
        arrays = layout.arrays(whole)
        self._writer = PyramidWriter(
            self._at(run, ".parts"),
            [partial(put_shard, array, layout.has_channels) for array in arrays],
            spec.shape[0],
            layout.shapes,
            layout.dtype,
            layout.units,
            layout.factors,
            spec.is_labels,
            is_new,
        )

    def write(self, box: Box, values: Tensor) -> None:
        """See `VolumeStore`."""
        assert self._writer is not None
        assert self._layout is not None
        if values.dtype == torch.bfloat16:
            values = values.float()
        with saving(self.path):
            self._writer.write(box, values.numpy().astype(self._layout.dtype, copy=False))

    def flush(self) -> None:
        """See `VolumeStore`."""
        assert self._writer is not None
        with saving(self.path):
            self._writer.flush()

    def abort(self) -> None:
        """See `VolumeStore`."""

    def discard(self, run: str) -> None:
        """See `VolumeStore`."""
        restore_old(self._old(run), self.path)
        for ending in (".zarr", ".parts"):
            shutil.rmtree(self._at(run, ending), ignore_errors=True)

    # Publishing

    def array(self, run: str) -> Path:
        """See `PartsStore`."""
        return self._at(run, ".zarr")

    def complete(self, spec: VolumeSpec, room: Path, run: str) -> None:
        """See `PartsStore`."""
        if not sidecar_in(self.array(run)).exists():
            make_coarser(self.layout(spec), self.array(run), room)

    def make_ready(self, sidecar: Mapping[str, Json], run: str) -> None:
        """Let nothing be missing but the name."""
        whole = self._at(run, ".zarr")
        with saving(self.path):
            if whole.exists() and not sidecar_in(whole).exists():
                self._complete(whole, self._at(run, ".parts"), sidecar, run)

    def commit(self, sidecar: Mapping[str, Json], run: str) -> Path:
        """See `VolumeStore`."""
        self.make_ready(sidecar, run)
        whole, old = self._at(run, ".zarr"), self._old(run)
        with saving(self.path):
            if whole.exists():
                self._put(whole, old)
            elif run_of(self.path) != run:
                raise RecordError(f"the result that was ready to be put at {self.path} is gone: start over with resume=False")
            if is_label_of_image(self.path):
                register_label(self.path)
            shutil.rmtree(self._at(run, ".parts"), ignore_errors=True)
            forget_old(old)
        return self.path

    def _complete(self, whole: Path, parts: Path, sidecar: Mapping[str, Json], run: str) -> None:
        """Say in the folder how its image was made."""
        if parts.exists() and any(parts.rglob("*.raw")):
            raise RecordError(f"{parts} holds shards of which a part was never written: {BEGIN_AGAIN}")
        for ending in ("partial", "unfinished"):  # of a process that was killed while it wrote a shard, or what is said of it
            for unfinished in whole.rglob(f"*.{ending}"):
                unfinished.unlink(missing_ok=True)
        labels = [Label(**each) for each in sidecar.get("labels", ())]
        if labels:
            describe_labels(whole, labels)
        if sidecar:
            write_safely(sidecar_in(whole), json.dumps({**sidecar, "run": run, "written": written(whole, self.path)}, indent=1))

    def _put(self, whole: Path, old: Path) -> None:
        """Put the folder under its name; what is there is only replaced if it may be."""
        if self.path.exists() and not self.overwrite:
            raise TargetExistsError(
                f"{self.path} has appeared while its result was made, and is kept. The result is in {whole.name}: the same"
                f" call with {OVERWRITE} puts it there, and so does this one once the folder is gone"
            )
        replace_folder(whole, self.path, old)
