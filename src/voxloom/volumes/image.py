"""Images: a volume, where it lies in the world, and what it means. Files are read when they are needed."""

import copy
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import nibabel as nib
import numpy as np
import torch
from torch import Tensor

from ..core.boxes import Box
from ..errors import ImageError, ImageFileError, NoSuchKeyError, SubjectError, VoxloomError
from .constants import AFFINE, DATA, INTENSITY, LABEL, PATH, STEM, TYPE
from .formats import SpaceCodes, VolumeInfo, VolumeReader, open_volume, save_volume, stem_of
from .formats.base import as_tensor
from .paths import PathLike, as_path
from .slices import as_slices
from .sources import CustomFile, StackedFiles
from .space import Affine, as_affine, shifted, spacing_of

__all__ = ["Image", "LabelMap", "ScalarImage"]

CustomReader = Callable[[Path], tuple[Any, Any]]
RESERVED = (DATA, AFFINE, TYPE, PATH, STEM)
TYPES = ("intensity", "label", "sampling_map")


class Image:
    """A volume `(C, I, J, K)` and the RAS+ affine that places it in the world.

    An image of a file is lazy: `shape`, `affine`, `spacing` and `orientation` come from the header, `data` is read when it is
    first asked for and then kept, and slicing reads no more than the format allows.

    Args:
        path: a file, a folder that holds one DICOM series, or a list of files that become channels; or in its place the tensor.
        type: `"intensity"`, `"label"` or `"sampling_map"`; `ScalarImage` and `LabelMap` set it.
        tensor: tensor or array `(C, I, J, K)`, in place of a path. It is not copied.
        affine: matrix of 4 × 4 from voxels to millimetres; for a file it takes the place of the one in its header.
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
        path: PathLike | Sequence[PathLike] | Tensor | np.ndarray | None = None,
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
            raise SubjectError(
                "an image needs a path or a tensor: ScalarImage('t1.nii.gz') or ScalarImage(torch.rand(1, 8, 8, 8))"
            )
        reserved = [key for key in RESERVED if key in metadata]
        if reserved:
            raise SubjectError(f"{reserved[0]!r} is the name of an entry that every image has: use another one")
        self.type = self._check_type(type)
        self.check_nans = check_nans
        self.metadata: dict[str, Any] = dict(metadata)
        self.path = None if path is None else as_path(path, verify_path)
        self._custom_reader = reader
        self._affine = None if affine is None else as_affine(affine)
        self._codes: SpaceCodes | None = None
        self._info: VolumeInfo | None = None
        self._reader: VolumeReader | None = None
        self._data: Tensor | None = None
        self._is_derived = False
        self._derived: dict[Hashable, Any] = {}
        self._derived_for: tuple[int, int] | None = None
        self._times_set = 0
        self._is_from_file = False
        if tensor is not None:
            self.set_data(tensor)
            if self._affine is None and self.path is None:
                self._affine = np.eye(4)

    @classmethod
    def from_tensor(cls, tensor: Any, *, affine: Any = None, metadata: Mapping[str, Any] | None = None) -> Self:
        """Make an image of a tensor or array `(C, I, J, K)`: the same as `cls(tensor=tensor)`."""
        return cls(tensor=tensor, affine=affine, **dict(metadata or {}))

    @classmethod
    def _check_type(cls, given: str | None) -> str:
        if cls.fixed_type is not None:
            if given not in (None, cls.fixed_type):
                raise ImageError(f"the type of a {cls.__name__} is {cls.fixed_type!r}, not {given!r}: use Image(..., type=...)")
            return cls.fixed_type
        if given is None:
            return INTENSITY
        if given not in TYPES:
            raise ImageError(f"type is {given!r}: it must be one of {', '.join(map(repr, TYPES))}")
        return given

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
        """Replace the data by a tensor or array `(C, I, J, K)`, which is not copied.

        Raises:
            ImageError: if it has another number of dimensions, no voxels, or is not of numbers.
        """
        data = as_tensor(tensor)
        if data.ndim != 4:
            raise ImageError(
                f"an image was given data of shape {tuple(data.shape)}: it must be 4D, (C, I, J, K); tensor[None] adds a channel"
                " in front, and [..., None] a third axis to a 2-D image"
            )
        if 0 in data.shape:
            raise ImageError(f"an image was given data of shape {tuple(data.shape)}, which has no voxels")
        self._warn_of_nans(data)
        self._data, self._is_from_file = data, False
        self._times_set += 1

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
            reader = self._open()
            with torch.inference_mode(False):  # what is kept must be good for training, too
                data = reader.read(reader.info.box)
            self._warn_of_nans(data)
            self._data, self._is_from_file = data, True
            self._reader = None  # closed: what its header says is kept

    def unload(self) -> None:
        """Forget the data; they are read again from the file when they are needed.

        Raises:
            ImageError: if there is no file to read them from.
        """
        if not self.can_be_reloaded:
            raise ImageError("the data of the image were made, set or cut in memory, so that they could not be read again")
        self._data = None

    @property
    def can_be_reloaded(self) -> bool:
        """Whether the data are those of a file, and not of a tensor or a part of another image."""
        return self.path is not None and not self._is_derived and (self._data is None or self._is_from_file)

    def prepare(self) -> None:
        """Make ready to be read in parts, also by workers: load what can only be read whole, so that they share it."""
        if not self.can_be_sliced:
            self.load()
        _ = self.affine  # kept with the header, so that no worker reads them again

    def read(self, box: Box) -> Tensor:
        """Read all channels of a box of voxels `(I, J, K)`.

        Returns:
            Tensor `(C, *box.shape)`: a view where the data are in memory, otherwise read from the file.
        """
        if not self.can_be_sliced:
            self.load()
        if self._data is not None:
            return self._data[(slice(None), *box.slices)]
        return self._open().read(Box((0, *box.start), (self.num_channels, *box.stop)))

    def derived(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """Give what follows from the data, computed once and kept with the image until its data change.

        Args:
            key: names what it is.
            compute: makes it.
        """
        version = None if self._data is None or self._data.is_inference() else self._data._version
        stamp = (self._times_set, version or 0)
        if self._derived_for != stamp:
            self._derived, self._derived_for = {}, stamp
        if key not in self._derived:
            self._derived[key] = compute()
        return self._derived[key]

    @property
    def can_be_sliced(self) -> bool:
        """Whether a part can be read without reading all of it: the data are in memory, or the format allows it."""
        return self._data is not None or self._open().sliceable

    def _warn_of_nans(self, data: Tensor) -> None:
        if self.check_nans and data.is_floating_point() and bool(data.isnan().any()):
            warnings.warn(f"{self._name()} holds NaN", RuntimeWarning, stacklevel=3)

    def _header(self) -> VolumeInfo:
        return self._open().info if self._info is None else self._info

    def _open(self) -> VolumeReader:
        if self._reader is None:
            if self.path is None or self._is_derived:
                raise ImageError("the image has no data, and no file of its own to read them from")
            paths = self.path if isinstance(self.path, list) else [self.path]
            custom = self._custom_reader
            readers = [open_volume(path) if custom is None else CustomFile(path, custom) for path in paths]
            names = [str(path) for path in paths]
            reader = readers[0] if len(readers) == 1 else StackedFiles(readers, names, check_place=self._affine is None)
            if self._info is not None and (reader.info.shape, reader.info.dtype) != (self._info.shape, self._info.dtype):
                raise ImageFileError(f"{self._name()} is another file than when its header was read: make the image anew")
            self._reader, self._info = reader, reader.info
        return self._reader

    # Geometry

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Channels and voxels `(C, I, J, K)`."""
        c, i, j, k = self._header().shape if self._data is None else self._data.shape
        return c, i, j, k

    @property
    def spatial_shape(self) -> tuple[int, int, int]:
        """Voxels `(I, J, K)`."""
        return self.shape[1:]

    @property
    def num_channels(self) -> int:
        """Number of channels."""
        return self.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the data, or the type that they will be read as."""
        return self._header().dtype if self._data is None else self._data.dtype

    @property
    def memory(self) -> int:
        """Bytes that the data take in memory."""
        return Box.of_shape(self.shape).numel * self.dtype.itemsize

    @property
    def affine(self) -> Affine:
        """RAS+ matrix of 4 × 4 from voxels to millimetres, in float64.

        Raises:
            ImageError: if the file's affine holds NaN or infinity, or is singular.
        """
        if self._affine is None:
            self._affine = as_affine(self._header().affine, f"the affine of {self._name()}")
        return self._affine

    @affine.setter
    def affine(self, matrix: Any) -> None:
        self._affine = as_affine(matrix)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Millimetres from one voxel to the next along each axis."""
        return spacing_of(self.affine)

    @property
    def origin(self) -> tuple[float, float, float]:
        """Place of the first voxel's centre, in millimetres."""
        i, j, k = self.affine[:3, 3].tolist()
        return i, j, k

    @property
    def orientation(self) -> tuple[str, str, str]:
        """Where each axis points to: one of R, L, A, P, S and I for each."""
        i, j, k = nib.aff2axcodes(self.affine)
        return i, j, k

    @property
    def codes(self) -> SpaceCodes:
        """What NIfTI records of the space beside the affine."""
        if self._codes is None:
            self._codes = SpaceCodes() if self.path is None else self._header().codes
        return self._codes

    @codes.setter
    def codes(self, codes: SpaceCodes) -> None:
        self._codes = codes

    # Entries

    @property
    def stem(self) -> str | list[str]:
        """Name of the file without folder and endings; empty where there is none."""
        if isinstance(self.path, list):
            return [stem_of(path) for path in self.path]
        return "" if self.path is None else stem_of(self.path)

    def keys(self) -> list[str]:
        """Names of all entries."""
        return [DATA, AFFINE, TYPE, PATH, STEM, *self.metadata]

    def __contains__(self, key: object) -> bool:
        return key in self.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __getitem__(self, key: Any) -> Any:
        """Give an entry by its name, or the part of the image that slices `(C, I, J, K)` cut out.

        A single index keeps its axis. Steps must be positive. The part owns its memory, and its affine is shifted, so that it
        lies where it was.
        """
        if not isinstance(key, str):
            return self._cut(key)
        if key == DATA:
            return self.data
        if key in RESERVED:
            value = getattr(self, key)
            return ("" if value is None else str(value)) if key == PATH else value
        if key not in self.metadata:
            raise NoSuchKeyError(f"{self._name()} has no entry {key!r}, only {', '.join(map(repr, self.keys()))}")
        return self.metadata[key]

    def __setitem__(self, key: str, value: Any) -> None:
        if key == DATA:
            self.set_data(value)
        elif key == AFFINE:
            self.affine = value
        elif key in RESERVED:
            raise NoSuchKeyError(f"the entry {key!r} of an image cannot be set")
        else:
            self.metadata[key] = value

    def _cut(self, key: Any) -> Self:
        slices = as_slices(key, self.shape)
        channels, *spatial = slices
        step = tuple(part.step for part in spatial)
        box = Box(tuple(part.start for part in spatial), tuple(part.stop for part in spatial))
        data = self.read(box)[(channels, *(slice(None, None, part) for part in step))]
        return self.part(data.clone(memory_format=torch.contiguous_format), box.start, step)

    # Copies and files

    def new_like(self, data: Any, affine: Any = None) -> Self:
        """Make an image of the same class, type and metadata with other data, and another affine if one is given."""
        new = self.without_data()
        new.set_data(data)
        new._affine = self.affine.copy() if affine is None else as_affine(affine)
        return new

    def part(self, data: Tensor, index: tuple[int, ...], step: tuple[int, ...] = (1, 1, 1)) -> Self:
        """Make an image of a part of this one's data, which begins at a voxel `(I, J, K)` and takes every `step`-th one.

        The index is negative where the part begins in padding. Nothing is checked: a sampler makes thousands of parts.
        """
        new = self.without_data()
        new._data = data
        new._affine = shifted(self.affine, index, step)
        return new

    def without_data(self) -> Self:
        """Make a shallow copy that keeps everything but the data and the affine; for a batch to keep."""
        new = copy.copy(self)
        new._codes = self.codes
        new._data = new._reader = new._info = new._affine = new._custom_reader = None
        new._is_derived = True
        new._derived = {}
        return new

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_reader": None}  # another process opens the file anew

    def __copy__(self) -> Self:
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        new.metadata = dict(self.metadata)
        new._derived = {}
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        new = object.__new__(type(self))
        memo[id(self)] = new
        shared = {"_data", "_reader", "_custom_reader"}
        for name, value in self.__dict__.items():
            new.__dict__[name] = value if name in shared else copy.deepcopy(value, memo)
        new._derived = {}
        new._data = None if self._data is None else self._data.clone()
        return new

    def save(self, path: PathLike) -> None:
        """Write the image: NIfTI, MGH, NRRD or MetaImage, by the ending of the name.

        The affine is kept, and in NIfTI the form codes and units too. A crash, a full disk or an error leaves the old file
        or the new one; a process that is killed may leave a hidden file beside it, with `unfinished` in its name.

        Raises:
            SaveError: if it could not be written.
            UnsupportedImageError: if the format is unknown or cannot hold the data.
        """
        save_volume(Path(path).expanduser(), self.data, self.affine, self.codes)

    def numpy(self) -> np.ndarray:
        """The data as an array `(C, I, J, K)`, which shares their memory.

        Raises:
            ImageError: if NumPy lacks their type, as it lacks bfloat16.
        """
        try:
            return self.data.numpy()
        except TypeError as error:
            raise ImageError(f"NumPy has no type for data of {self.dtype}: convert them, with image.data.float()") from error

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.numpy(), dtype=dtype, copy=copy)

    def _name(self) -> str:
        return type(self).__name__ if self.path is None else str(self.path)

    def __repr__(self) -> str:
        try:
            parts = [
                f"shape: {self.shape}",
                f"spacing: ({', '.join(f'{value:.2f}' for value in self.spacing)})",
                f"orientation: {''.join(self.orientation)}+",
                f"dtype: {self.dtype}",
            ]
        except VoxloomError as error:
            parts = [f"unreadable: {error}"]
        if self.is_loaded:
            parts.append(f"memory: {self.memory / 2**20:.1f} MiB")
        if self.path is not None:
            parts.append(f'path: "{self.path}"')
        return f"{type(self).__name__}({'; '.join([*parts, f'type: {self.type}'])})"


class ScalarImage(Image):
    """An image whose values are intensities: a scan, or a map of numbers. See `Image`."""

    fixed_type = INTENSITY


class LabelMap(Image):
    """An image whose values are labels, or whose channels are classes. See `Image`."""

    fixed_type = LABEL
