"""How a result lies in a Zarr hierarchy: its arrays, their chunks and shards, its levels, and what is said of it."""

import contextlib
import io
import itertools
import math
import warnings
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock

from ...core.geometry.affines import SPACE_TOLERANCE, corner_displacement, spacing_of
from ...core.pyramids import coarser_shape, factors_of_levels
from ...core.sizes import Ints
from ...errors import ModeError, RecordError, SizeError, SpaceError
from ..formats import stem_of
from ..labels import Label, color_of
from ..protocols import Json, VolumeSpec
from ..writing.whole_volumes import nifti_of
from .encoding import COMPRESSION
from .hierarchy import OWN, is_zarr
from .ngff import described
from .source import ZarrSource, is_label_of_image
from .storage import zarr_python
from .writing import chunks_for

__all__ = ["Layout", "describe_labels", "register_label"]

NIFTI = ".nii.zarr"
OME = ".ome.zarr"
# Files that say what is in a folder of Zarr.
METADATA = ("zarr.json", ".zarray", ".zgroup", ".zattrs", ".zmetadata")


@dataclass(frozen=True, eq=False)
class Layout:
    """What is made for a result, before any voxel of it is written.

    Args:
        path: where it will be.
        spec: what it is.
        dtype: type of the elements.
        chunks: voxels of a chunk, for each level.
        shards: the same of a shard.
        shapes: voxels of each level.
        factors: by which the axes of each level but the first are shorter.
        version: of OME-Zarr.
    """

    path: Path
    spec: VolumeSpec
    dtype: np.dtype
    chunks: tuple[Ints, ...]
    shards: tuple[Ints, ...]
    shapes: tuple[Ints, ...]
    factors: tuple[Ints, ...]
    version: str

    @classmethod
    def of(
        cls,
        path: Path,
        spec: VolumeSpec,
        version: str,
        chunks: Ints | None,
        shards: Ints | None,
        num_levels: int | None,
    ) -> "Layout":
        """Choose what is not said.

        Raises:
            SpaceError: if it is a label image on another grid than its image.
            SizeError: if shards are no multiples of the chunks.
            ModeError: if shards are asked for in a version that has none.
        """
        is_plain = not is_label_of_image(path) and not path.name.lower().endswith((OME, NIFTI))
        if is_label_of_image(path):
            version, shapes, factors = _of_image(path.parent.parent, spec)
        else:
            shapes, factors = [spec.shape[1:]], [] if is_plain else factors_of_levels(spec.shape[1:], spec.affine, num_levels)
            for step in factors:
                shapes.append(coarser_shape(shapes[-1], step))
        stored = {torch.bool: np.uint8, torch.bfloat16: np.float32}
        dtype = np.dtype(stored.get(spec.dtype) or torch.empty(0, dtype=spec.dtype).numpy().dtype)
        if spec.stored is not None:
            dtype = np.dtype(spec.stored)
        if dtype == np.float16 and path.name.lower().endswith(NIFTI):
            dtype = np.dtype(np.float32)  # which NIfTI lacks
        inner, outer = [], []
        for shape in shapes:
            chunk, shard = chunks_for(shape, dtype.itemsize, chunks)
            if version == "0.4":
                if shards is not None:
                    raise ModeError("OME-Zarr 0.4 has no shards: leave shards out, or choose version '0.5'")
                shard = chunk
            elif shards is not None:
                shard = tuple(
                    min(size, -(-length // part) * part) for size, length, part in zip(shards, shape, chunk, strict=True)
                )
            if any(size % part for size, part in zip(shard, chunk, strict=True)):
                raise SizeError(f"shards of {shard} voxels are not made of whole chunks of {chunk}: choose multiples")
            inner.append(chunk)
            outer.append(shard)
        return cls(path, spec, dtype, tuple(inner), tuple(outer), tuple(shapes), tuple(factors), version)

    @property
    def units(self) -> tuple[Ints, ...]:
        """Voxels that are written together, for each level: whole shards, of which whole voxels of the next level are made."""
        found = []
        for number, shard in enumerate(self.shards):
            factors = self.factors[number] if number < len(self.factors) else (1, 1, 1)
            found.append(tuple(math.lcm(size, factor) for size, factor in zip(shard, factors, strict=True)))
        return tuple(found)

    @property
    def most_voxels(self) -> list[int]:
        """Number of voxels of the largest of these, for each level: none reaches beyond it."""
        return [math.prod(map(min, unit, shape)) for unit, shape in zip(self.units, self.shapes, strict=True)]

    @property
    def is_plain(self) -> bool:
        """Whether it is an array alone."""
        return not is_label_of_image(self.path) and not self.path.name.lower().endswith((OME, NIFTI))

    @property
    def has_channels(self) -> bool:
        """Whether arrays have an axis of channels."""
        return self.spec.shape[0] > 1

    @property
    def names(self) -> list[str]:
        """Names of the axes of arrays."""
        return [*["c"] * self.has_channels, "z", "y", "x"]

    def _of_arrays(self, sizes: Sequence[int], lead: int) -> tuple[int, ...]:
        return (*([lead] if self.has_channels else []), *(int(size) for size in reversed(sizes)))

    def create(self, folder: Path) -> None:
        """Make the hierarchy, without voxels."""
        zarr = zarr_python()
        store = zarr.storage.LocalStore(folder)
        number = 2 if self.version == "0.4" else 3
        own = {OWN: {"affine": self.spec.affine.tolist(), "codes": asdict(self.spec.codes)}}
        if self.is_plain:
            self._create_array(zarr.create_array, number, 0, own, store=store, zarr_format=number)
            return
        name = stem_of(self.path)
        attributes: dict[str, Json] = described(
            self.spec.affine, self.factors, self.has_channels, self.version, name, self.spec.is_labels
        )
        if self.spec.is_labels:
            image = attributes.get("ome", attributes)
            image["image-label"] = {} if self.version != "0.4" else {"version": self.version}
            if is_label_of_image(self.path):
                image["image-label"]["source"] = {"image": "../../"}
        group = zarr.create_group(store=store, zarr_format=number, attributes={**attributes, **own})
        for level in range(len(self.shards)):
            self._create_array(group.create_array, number, level, {}, name=str(level))
        if self.path.name.lower().endswith(NIFTI):
            self._add_header(group)

    def _create_array(self, create: Any, number: int, level: int, attributes: dict[str, Json], **more: Any) -> None:
        zarr = zarr_python()
        shuffled = "shuffle" if self.dtype.itemsize > 1 else "noshuffle"
        if number == 2:
            import numcodecs

            more |= {
                "compressors": numcodecs.Blosc(cname="zstd", clevel=COMPRESSION, shuffle=int(shuffled == "shuffle")),
                "chunk_key_encoding": {"name": "v2", "separator": "/"},
            }
            attributes = {**attributes, "_ARRAY_DIMENSIONS": self.names}
        else:
            codec = zarr.codecs.BloscCodec(
                typesize=self.dtype.itemsize, cname="zstd", clevel=COMPRESSION, shuffle=shuffled, blocksize=0
            )
            # Blosc takes most flipped bits for values: with a check sum they are an error.
            more |= {"compressors": [codec, zarr.codecs.Crc32cCodec()], "dimension_names": self.names}
            if self.shards[level] != self.chunks[level]:
                more["shards"] = self._of_arrays(self.shards[level], self.spec.shape[0])
        create(
            shape=self._of_arrays(self.shapes[level], self.spec.shape[0]),
            chunks=self._of_arrays(self.chunks[level], 1),
            dtype=self.dtype,
            fill_value=0,
            attributes=attributes,
            **more,
        )

    def _add_header(self, group: Any) -> None:
        """Add what makes it a NIfTI-Zarr: the header that a NIfTI file would have."""
        shape = self.spec.shape
        image = nifti_of(np.broadcast_to(np.zeros((), self.dtype), shape), self.spec.affine, self.spec.codes)
        image.update_header()
        header = io.BytesIO()
        image.header.write_to(header)
        raw = np.frombuffer(header.getvalue()[: 540 if image.header.sizeof_hdr == 540 else 348], dtype=np.uint8)
        checks = None if group.metadata.zarr_format == 2 else zarr_python().codecs.Crc32cCodec()
        array = group.create_array("nifti", shape=raw.shape, chunks=raw.shape, dtype=np.uint8, fill_value=0, compressors=checks)
        array[...] = raw

    def arrays(self, folder: Path) -> list[Any]:
        """Open the arrays of all levels.

        Raises:
            RecordError: if they are not what was made.
        """
        zarr = zarr_python()
        try:
            if not folder.exists():
                raise FileNotFoundError("it is gone")
            node = zarr.open(store=zarr.storage.LocalStore(folder), mode="r")
            arrays = [node] if self.is_plain else [node[str(level)] for level in range(len(self.shards))]
            is_alike = (
                arrays[0].shape == self._of_arrays(self.spec.shape[1:], self.spec.shape[0]) and arrays[0].dtype == self.dtype
            )
        except Exception as error:
            raise RecordError(f"the unfinished folder {folder} is damaged: {type(error).__name__}: {error}") from error
        if not is_alike:
            raise RecordError(f"the unfinished folder {folder} is of another volume")
        return arrays


def _of_image(folder: Path, spec: VolumeSpec) -> tuple[str, list[Ints], list[Ints]]:
    """Give the version of an image that labels are put beside, and the shapes of its levels with the factors between them.

    Where an axis of an odd length is halved, some have a voxel of what is left over, and others have none.

    Raises:
        ImageError: if a level of the image cannot be read.
        SpaceError: if the labels are not on the image's grid.
    """
    image = ZarrSource(folder, time=0, channel=0)  # whatever more there is of it
    if image.shape[1:] != spec.shape[1:]:
        raise SpaceError(f"the labels have {spec.shape[1:]} voxels, but {folder} has {image.shape[1:]}: they must be on its grid")
    distance = corner_displacement(image.affine, spec.affine, spec.shape[1:])
    if not distance <= SPACE_TOLERANCE * min(spacing_of(spec.affine)):
        raise SpaceError(f"the labels lie up to {distance:.3g} mm away from {folder}: they must be on its grid")
    assert image.multiscales is not None
    levels = [ZarrSource(folder, level=number, time=0, channel=0) for number in range(len(image.multiscales.levels))]
    shapes: list[Ints] = [levels[0].shape[1:]]
    factors: list[Ints] = []
    for before, after in itertools.pairwise(levels):
        ratios = np.array(spacing_of(after.affine)) / np.array(spacing_of(before.affine))
        step = tuple(max(1, round(ratio)) for ratio in ratios.tolist())
        # Nothing is left out but a voxel that is left over: at another ratio the levels have sizes of their own.
        sizes = zip(shapes[-1], step, coarser_shape(shapes[-1], step), after.shape[1:], strict=True)
        shapes.append(tuple(own if size // factor == own else most for size, factor, most, own in sizes))
        factors.append(step)
    return image.version, shapes, factors


def describe_labels(folder: Path, labels: Sequence[Label]) -> None:
    """Add colours and names of labels to what a folder says of them."""
    zarr = zarr_python()
    node = zarr.open(store=zarr.storage.LocalStore(folder), mode="r+")
    attributes = dict(node.attrs)
    image = attributes.get("ome", attributes)
    if "image-label" not in image:
        return
    numbers = sorted(labels, key=lambda label: label.value)
    image["image-label"] |= {
        "colors": [{"label-value": each.value, "rgba": [*color_of(each), 255]} for each in numbers],
        "properties": [{"label-value": each.value, "name": each.name} for each in numbers],
    }
    node.attrs.put(attributes)


def _visible_store(folder: Path) -> Any:
    """Open a store without what is being written or replaced in it, whose folders have hidden names."""

    class VisibleStore(zarr_python().storage.LocalStore):  # type: ignore[misc]
        async def list_dir(self, prefix: str) -> AsyncIterator[str]:
            async for name in super().list_dir(prefix):
                if not name.startswith(".") or name in METADATA:
                    yield name

    return VisibleStore(folder)


def _consolidate_again(zarr: Any, folder: Path) -> None:
    """Renew the copy of all metadata that a hierarchy may keep in its root, which readers believe."""
    store = _visible_store(folder)
    try:
        if zarr.open_group(store=store, mode="r").metadata.consolidated_metadata is None:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is no part of the specification of Zarr v3
            zarr.consolidate_metadata(store)
    except Exception as error:  # noqa: BLE001 - whatever else lies there, what was written is whole by now
        warnings.warn(
            f"the copy of all metadata in {folder} could not be renewed, so that who reads it does not see what is new:"
            f" {type(error).__name__}: {error}. Renew it by zarr.consolidate_metadata",
            RuntimeWarning,
            stacklevel=2,
        )


def register_label(path: Path) -> None:
    """Name a label image in the list of its image's."""
    zarr = zarr_python()
    folder = path.parent
    with FileLock(folder / ".list.lock"):
        is_second = (path / ".zgroup").exists()
        group = zarr.open_group(store=zarr.storage.LocalStore(folder), mode="a", zarr_format=2 if is_second else 3)
        attributes = dict(group.attrs)
        names = attributes if is_second else attributes.setdefault("ome", {"version": ZarrSource(path).version})
        if path.name not in names.setdefault("labels", []):
            names["labels"].append(path.name)
            group.attrs.put(attributes)
        for each in itertools.takewhile(is_zarr, (folder, *folder.parents)):
            _consolidate_again(zarr, each)
    with contextlib.suppress(OSError):
        (folder / ".list.lock").unlink()
