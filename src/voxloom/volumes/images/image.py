"""Images: a volume, where it lies in the world, and what it means. Files are read when they are needed."""

import builtins
import copy
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ...core.boxes import Box
from ...core.geometry.affines import Affine, as_affine
from ...errors import ImageError, SubjectError, VoxloomError
from ...io.addresses import source_at
from ...io.arrays.memory import affine_of, as_volume, values_hash
from ...io.arrays.objects import source_of
from ...io.compression import READ_ERRORS
from ...io.protocols import Extent, Json, SpaceCodes, VolumeSource, chunk_bytes, is_source, loading_bytes, read_checked
from ...io.writing.targets import save_volume
from ..constants import INTENSITY, LABEL
from .copies import Copies
from .derived import DerivedValues
from .entries import RESERVED, ImageEntries
from .exchange import Exchange
from .origins import CustomReader, FileOrigin, GivenOrigin, Origin
from .paths import PathLike, as_path, is_path
from .slices import as_slices
from .viewing import Views

__all__ = ["Image", "LabelMap", "ScalarImage"]

TYPES = ("intensity", "label", "sampling_map")


class Image(ImageEntries, Exchange, Copies, Views):
    """A volume `(C, I, J, K)` and the RAS+ affine that places it in the world.

    An image of a file is lazy: `shape`, `affine`, `spacing` and `orientation` come from the header, `data` is read when it is
    first asked for and then kept, and slicing reads no more than the format allows.

    Args:
        path: a file, a folder that holds one DICOM series or is a Zarr store, a URL of one, a data set in an HDF5 file
            (`scan.h5:/data`), or a list of files that become channels; or in its place the tensor, a source of voxels such as
            `ArraySource`, an image of nibabel or SimpleITK, or an array that is read by slices, as of Zarr or Dask.
        type: `"intensity"`, `"label"` or `"sampling_map"`; `ScalarImage` and `LabelMap` set it.
        tensor: tensor or array `(C, I, J, K)`, or `(I, J, K)`, in place of a path. It is not copied.
        affine: RAS+ matrix of 4 × 4 from voxels to millimetres; by default that of the file, or what a tensor brings along, as
            MONAI's `MetaTensor` does, or voxels of 1 mm.
        check_nans: warn when the data hold NaN.
        reader: function that takes a path and returns `(data, affine)`, for a format of one's own.
        verify_path: check at once that the file exists.
        **metadata: anything else that belongs to the image: `image["name"]`.

    Raises:
        ImageNotFoundError: if there is no such file.
        ImageError: if the tensor or the affine is not what an image can have.

    Example:
        >>> import torch, voxloom as vx
        >>> image = vx.ScalarImage(torch.rand(1, 20, 30, 40))
        >>> image.spatial_shape, image.orientation
        ((20, 30, 40), ('R', 'A', 'S'))
        >>> image[:, 10:15].shape
        (1, 5, 30, 40)
    """

    fixed_type: str | None = None

    def __init__(
        self,
        path: PathLike | Sequence[PathLike] | Tensor | np.ndarray | VolumeSource | None = None,
        type: str | None = None,  # noqa: A002 - the name that users of TorchIO know
        tensor: Any = None,
        affine: Any = None,
        *,
        check_nans: bool = False,
        reader: CustomReader | None = None,
        verify_path: bool = True,
        **metadata: Any,
    ) -> None:
        if isinstance(path, Tensor | np.ndarray):
            if tensor is not None:
                raise SubjectError("an image was given two tensors: one in place of the path, and one as tensor=")
            path, tensor = None, path
        if path is None and tensor is None:
            path = metadata.pop("source", None)  # as TorchIO 2 calls it
        if path is None and tensor is None:
            raise SubjectError(
                "an image needs a path or a tensor: ScalarImage('t1.nii.gz') or ScalarImage(torch.rand(1, 8, 8, 8))"
            )
        _check_names(metadata)
        self.type = _checked_type(type, self.fixed_type, builtins.type(self).__name__)
        self.check_nans = check_nans
        self.metadata: dict[str, Any] = dict(metadata)
        self.path: Path | list[Path] | None = None
        self._affine = affine_of(tensor) if affine is None else as_affine(affine)
        self._origin: Origin | None = None
        given = path if path is None or is_source(path) else source_at(path) if is_path(path) else source_of(path, affine)
        if is_source(given):
            self._origin = GivenOrigin(given)
        elif path is not None:
            self.path = as_path(path, verify_path)
            self._origin = FileOrigin(self.paths, reader, is_placed=affine is not None)
        self._codes: SpaceCodes | None = None
        self._data: Tensor | None = None
        self._is_from_file = False
        self._times_set = 0
        self._derived = DerivedValues()
        if tensor is not None:
            self.set_data(tensor)
            if self._affine is None and self._origin is None:
                self._affine = np.eye(4)

    @classmethod
    def from_tensor(cls, tensor: Any, *, affine: Any = None, metadata: Mapping[str, Any] | None = None) -> Self:
        """Make an image of a tensor or array `(C, I, J, K)`: the same as `cls(tensor=tensor)`."""
        return cls(tensor=tensor, affine=affine, **dict(metadata or {}))

    # Data

    @property
    def data(self) -> Tensor:
        """Tensor `(C, I, J, K)`, read from the file when it is first asked for."""
        self.load()
        assert self._data is not None
        return self._data

    @data.setter
    def data(self, tensor: Any) -> None:
        self.set_data(tensor)

    @property
    def tensor(self) -> Tensor:
        """The same as `data`."""
        return self.data

    def set_data(self, tensor: Any) -> None:
        """Replace the data by a tensor or array `(C, I, J, K)`, or `(I, J, K)`, which is not copied.

        Raises:
            ImageError: if it has another number of dimensions, no voxels, or is not of numbers.
        """
        self._keep(as_volume(tensor), False)
        self._times_set += 1

    def _keep(self, data: Tensor, is_from_file: bool) -> None:
        if self.check_nans and data.is_floating_point() and bool(data.isnan().any()):
            warnings.warn(f"{self._name} holds NaN", RuntimeWarning, stacklevel=4)
        self._data, self._is_from_file = data, is_from_file

    def count_labels(self) -> dict[int | float, int]:
        """Give the number of voxels of each value, from the least value on."""
        values, counts = torch.unique(self.data, return_counts=True)
        return dict(zip(values.tolist(), counts.tolist(), strict=True))

    @property
    def is_loaded(self) -> bool:
        """Whether the data are in memory."""
        return self._data is not None

    def load(self) -> None:
        """Read the data, if that has not been done yet.

        Raises:
            CorruptImageError: if the file does not hold what its header says.
        """
        if self._data is None:
            source = self._opened.source
            self._opened.note(source.paths)
            with torch.inference_mode(False):  # what is kept must be good for training, too
                self._keep(read_checked(source, Box.of_shape(source.shape[1:])), True)
            self._opened.close()

    def unload(self) -> None:
        """Forget the data; they are read again from the file when they are needed.

        Raises:
            ImageError: if there is no file to read them from.
        """
        if not self.can_be_reloaded:
            raise ImageError("the data of the image were made, set or cut in memory, so that they could not be read again")
        self._data = None
        self._opened.close()

    @property
    def can_be_reloaded(self) -> bool:
        """Whether the data are those of a file, and not of a tensor or a part of another image."""
        return self._origin is not None and (self._data is None or self._is_from_file)

    def prepare(self) -> None:
        """Make ready to be read in parts, also by workers: load what can only be read whole, so that they share it."""
        self._make_sliceable()
        _ = self.affine  # kept with the header, so that no worker reads them again

    def read(self, box: Box) -> Tensor:
        """Read all channels of a box of voxels `(I, J, K)`.

        Returns:
            Tensor `(C, *box.shape)`: a view where the data are in memory, otherwise read from the file.
        """
        self._make_sliceable()
        return read_checked(self._opened.source, box) if self._data is None else self._data[(slice(None), *box.slices)]

    def _make_sliceable(self) -> None:
        """Load what can only be read whole: of a view, what it is of."""
        if not self.can_be_sliced:
            self._opened.prepare()
        if not self.can_be_sliced:
            self.load()

    @property
    def chunks(self) -> tuple[int, int, int]:
        """Voxels that are read together; see `VolumeSource`."""
        return self._opened.source.chunks if self._data is None else (1, *self.shape[2:])

    @property
    def resident_bytes(self) -> int:
        """Memory that is still needed because the file cannot be read in parts; see `VolumeSource`."""
        return 0 if self.can_be_sliced else self._opened.source.resident_bytes

    @property
    def loading_bytes(self) -> int:
        """Memory that reading takes beside that, for a moment."""
        return 0 if self.can_be_sliced else loading_bytes(self._opened.source)

    @property
    def packed_loading_bytes(self) -> int:
        """How much of that unpacking its files saves."""
        return self.loading_bytes if self.packed_bytes else 0

    @property
    def keeps_whole(self) -> bool:
        """See the function `keeps_whole`."""
        return True

    @property
    def chunk_bytes(self) -> int:
        """See the function `chunk_bytes`."""
        return 0 if self._data is not None else chunk_bytes(self._opened.source)

    @property
    def paths(self) -> tuple[Path, ...]:
        """Files and folders that it is read from."""
        if isinstance(self._origin, GivenOrigin):
            return self._origin.paths
        return tuple(self.path) if isinstance(self.path, list) else () if self.path is None else (self.path,)

    @property
    def extent(self) -> Extent | None:
        """Where the volume begins and ends, for one that was resampled when it was read; see `VolumeSource`."""
        return getattr(self._opened.source, "extent", None) if self.can_be_reloaded else None

    def fingerprint(self) -> Json:
        """Say what tells the image from others; see `VolumeSource`."""
        space = {"affine": self.affine.tolist(), "codes": repr(self.codes)}
        if self.can_be_reloaded and not (self.is_loaded and self._opened.has_changed):
            return {**self._opened.source.fingerprint(), **space}
        return {"sha256": values_hash(self), "dtype": str(self.dtype), "shape": list(self.shape), **space}

    @property
    def packed_bytes(self) -> int:
        """Memory that unpacking its files saves; see `Packed`."""
        return self.resident_bytes if self._origin is not None and self._origin.is_packed else 0

    def unpacked(self, folder: Path) -> Self:
        """Give the image of the same files, unpacked into a folder; see `Packed`."""
        new = self.without_data()
        try:
            new._origin = self._opened.unpacked(folder)
        except READ_ERRORS:
            self.load()  # which says what is wrong with the file
            raise
        new._affine = self.affine.copy()
        return new

    def derived(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """Give what follows from the data, computed once and kept with the image until its data change.

        Args:
            key: names what it is.
            compute: makes it.
        """
        return self._derived.get(key, self._times_set, self._data, compute)

    @property
    def can_be_sliced(self) -> bool:
        """Whether a part can be read without reading all of it: the data are in memory, or the format allows it."""
        return self._data is not None or not self._opened.source.resident_bytes

    @property
    def _opened(self) -> Origin:
        if self._origin is None:
            raise ImageError("the image has no data, and no file of its own to read them from")
        return self._origin

    # Geometry

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Channels and voxels `(C, I, J, K)`."""
        c, i, j, k = self._opened.spec.shape if self._data is None else self._data.shape
        return c, i, j, k

    @property
    def dtype(self) -> torch.dtype:
        """Type of the data, or the type that they will be read as."""
        return self._opened.spec.dtype if self._data is None else self._data.dtype

    @property
    def reader(self) -> CustomReader | None:
        """The function of one's own that reads its files; patches of it have none."""
        return self._origin.reader if isinstance(self._origin, FileOrigin) else None

    @property
    def stored_dtype(self) -> np.dtype | None:
        """Type of the voxels where they are stored, such as uint16, of which tensors are int32; None if it is not known."""
        return getattr(self._origin.source, "stored_dtype", None) if self._origin is not None and self.can_be_reloaded else None

    @property
    def affine(self) -> Affine:
        """RAS+ matrix of 4 × 4 from voxels to millimetres, in float64.

        Raises:
            ImageError: if the file's affine holds NaN or infinity, or is singular.
        """
        if self._affine is None:
            self._affine = as_affine(self._opened.spec.affine, f"the affine of {self._name}")
        return self._affine

    @affine.setter
    def affine(self, matrix: Any) -> None:
        self._affine = as_affine(matrix)

    @property
    def codes(self) -> SpaceCodes:
        """What NIfTI records of the space beside the affine."""
        if self._codes is None:
            self._codes = SpaceCodes() if self._origin is None else self._origin.spec.codes
        return self._codes

    @codes.setter
    def codes(self, codes: SpaceCodes) -> None:
        self._codes = codes

    # Entries

    def __getitem__(self, key: Any) -> Any:
        """Give an entry by its name, or the part of the image that slices `(C, I, J, K)` cut out.

        A single index keeps its axis. Steps must be positive. The part owns its memory, and its affine is shifted, so that it
        lies where it was.
        """
        return super().__getitem__(key) if isinstance(key, str) else self._cut(key)

    def _cut(self, key: Any) -> Self:
        slices = as_slices(key, self.shape)
        channels, *spatial = slices
        step = tuple(part.step for part in spatial)
        box = Box(tuple(part.start for part in spatial), tuple(part.stop for part in spatial))
        data = self.read(box)[(channels, *(slice(None, None, part) for part in step))]
        return self.part(data.clone(memory_format=torch.contiguous_format), box.start, step)

    # Other classes, and files

    def of_class(self, image_class: builtins.type["Image"]) -> "Image":
        """Give the same image as one of another class, such as `LabelMap`; it is neither copied nor read."""
        new = copy.copy(self)
        new.__class__ = image_class
        new.type = image_class.fixed_type or self.type
        return new

    def as_source(self) -> VolumeSource:
        """Give the image as a source of voxels, which it is."""
        return self

    def save(self, path: PathLike) -> None:
        """Write the image: NIfTI, MGH, NRRD, MetaImage or Zarr (`.ome.zarr`, `.nii.zarr`, `.zarr`), by the ending of the name.

        The affine is kept, and in NIfTI the form codes and units too. A crash, a full disk or an error leaves the old file
        or the new one; a process that is killed may leave a hidden file beside it, with `unfinished` in its name.

        Raises:
            SaveError: if it could not be written.
            UnsupportedImageError: if the format is unknown or cannot hold the data.
        """
        save_volume(Path(path).expanduser(), self.data, self.affine, self.codes, is_labels=self.type == LABEL)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({'; '.join(_described(self))})"


class ScalarImage(Image):
    """An image whose values are intensities: a scan, or a map of numbers. See `Image`."""

    fixed_type = INTENSITY


class LabelMap(Image):
    """An image whose values are labels, or whose channels are classes. See `Image`."""

    fixed_type = LABEL


def _check_names(metadata: Mapping[str, Any]) -> None:
    reserved = [key for key in RESERVED if key in metadata]
    if reserved:
        raise SubjectError(f"{reserved[0]!r} is the name of an entry that every image has: use another one")


def _checked_type(given: str | None, fixed: str | None, name: str) -> str:
    if fixed is not None:
        if given not in (None, fixed):
            raise ImageError(f"the type of a {name} is {fixed!r}, not {given!r}: use Image(..., type=...)")
        return fixed
    if given is None:
        return INTENSITY
    if given not in TYPES:
        raise ImageError(f"type is {given!r}: it must be one of {', '.join(map(repr, TYPES))}")
    return given


def _described(image: Image) -> list[str]:
    try:
        parts = [
            f"shape: {image.shape}",
            f"spacing: ({', '.join(f'{value:.2f}' for value in image.spacing)})",
            f"orientation: {''.join(image.orientation)}+",
            f"dtype: {image.dtype}",
        ]
    except VoxloomError as error:
        parts = [f"unreadable: {error}"]
    if image.is_loaded:
        parts.append(f"memory: {image.memory / 2**20:.1f} MiB")
    if image.path is not None:
        parts.append(f'path: "{image.path}"')
    return [*parts, f"type: {image.type}"]
