"""MINC, PAR/REC and AFNI: nibabel reads them, whole."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from torch import Tensor

from ..core.boxes import Box
from ..core.copying import copy_voxels
from ..errors import CorruptImageError, MissingDependencyError, UnsupportedImageError, VoxloomError
from .arrays.memory import torch_dtype, widest_unsigned
from .compression import GREATEST_GZIP_RATIO, is_compressed
from .files import FileSource, explained
from .protocols import VolumeSpec

__all__ = ["WholeFile"]

HDF5 = b"\x89HDF\r\n\x1a\n"


class WholeFile(FileSource):
    """A volume that nibabel reads whole, since its numbers are scaled plane by plane, or lie in any order.

    Args:
        path: the file, or one of the two.
    """

    is_sliceable = False

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path = path
        with self._opened("is not an image that can be read") as image:
            files = [holder.filename for holder in image.file_map.values() if holder.filename]
            self.paths = tuple(map(Path, dict.fromkeys(files)))
            self._check_size(image)
            shape = tuple(map(int, image.shape))
            if not 1 <= len(shape) <= 4 or (len(shape) == 4 and isinstance(image, nib.Minc1Image)):
                raise UnsupportedImageError(
                    f"{path} has {len(shape)} axes, of which at most three can be read, or four where the last one is known to be"
                    " time: save its volumes one by one"
                )
            if min(shape) < 1:
                raise CorruptImageError(f"{path} has shape {shape}, and so no voxels: its header is damaged")
            i, j, k, volumes = (*shape, 1, 1, 1)[:4]
            self.spec = VolumeSpec((volumes, i, j, k), self._dtype_of(image), np.asarray(image.affine, dtype=np.float64))
        self.remember()

    @property
    def loading_bytes(self) -> int:
        """Doubles, and what they are made of."""
        return 2 * 8 * math.prod(self.shape)

    def read(self, box: Box) -> Tensor:
        """Read a box of voxels into a new tensor; see `VolumeSource`."""
        self.check_unchanged()
        with self._opened("cannot be read to its end") as image:
            stored = np.asarray(image.dataobj)
        widest_unsigned(stored, self.name)
        volumes, *spatial = self.shape
        channels = np.moveaxis(stored.reshape(*spatial, volumes), -1, 0)
        out = torch.empty((volumes, *box.shape), dtype=self.dtype)
        copy_voxels(out.numpy(), channels[(slice(None), *box.slices)])
        return out

    def _dtype_of(self, image: Any) -> torch.dtype:
        stored = np.dtype(image.get_data_dtype())
        plain = torch_dtype(stored, self.name)
        scaling = image.header.get_data_scaling() if hasattr(image.header, "get_data_scaling") else True
        if stored.kind == "f" or scaling is None:
            return plain
        return torch.float64 if stored.itemsize > 2 else torch.float32

    def _check_size(self, image: Any) -> None:
        """Compare what the header promises with the size of the file, before memory is asked for."""
        holder = image.file_map["image"].filename
        path = self._path if holder is None else Path(holder)
        size = path.stat().st_size
        with path.open("rb") as file:
            shrinks = is_compressed(path) or file.read(len(HDF5)) == HDF5
        claimed = int(np.prod(image.shape, dtype=object)) * np.dtype(image.get_data_dtype()).itemsize
        if claimed > size * (GREATEST_GZIP_RATIO if shrinks else 1):
            raise CorruptImageError(
                f"{self.name} claims {tuple(image.shape)} voxels, which take {claimed} bytes, but {path.name} has {size}: it is"
                " truncated, or its header is damaged: copy it again"
            )

    @contextmanager
    def _opened(self, what: str) -> Iterator[Any]:
        """Give nibabel's image; its errors say what of this file failed."""
        file: Any = None
        try:
            if self._path.suffix.lower() == ".par":
                # Planes are put in order by all that tells one from another, and not only by their place and number.
                image: Any = nib.parrec.PARRECImage.from_filename(str(self._path), mmap=False, strict_sort=True)
                file = image.dataobj.file_like
            else:
                image = nib.load(self._path)
            yield image
        except VoxloomError:
            raise
        except ImportError as error:
            raise MissingDependencyError(f"{self.name} is MINC 2, which needs h5py: pip install voxloom[minc]") from error
        except MemoryError:
            raise
        except Exception as error:  # whatever nibabel, or what it calls, stumbles over in a damaged file
            raise explained(error, self.name, what) from error
        finally:
            if file is not None:
                file.close()
