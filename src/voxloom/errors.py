"""Every error that voxloom raises on purpose.

    VoxloomError
    ├── SizeError             ValueError, TypeError, RuntimeError   a size, overlap, index or number that cannot be used
    ├── ArgumentNameError     TypeError                   an argument of a name that a function does not have
    ├── ModeError             ValueError, KeyError        an unknown overlap, padding or window mode
    ├── ScaleError            ValueError                  a scale at which a patch would not lie on whole voxels
    ├── LocationError         ValueError                  locations that do not fit the batch, the grid or the volume
    ├── OutputError           ValueError, RuntimeError    a model's output that cannot be aggregated
    ├── DeviceMemoryError     RuntimeError                a GPU without room for a single patch
    ├── RecordError           ValueError, RuntimeError    an unfinished prediction that is another one than was asked for
    ├── ShardError            RuntimeError                a prediction in parts of which some are missing
    ├── ModelFileError        ValueError, RuntimeError    a model that cannot, or must not, be loaded
    ├── SpecError             ValueError                  what a model is said to expect, which cannot be
    ├── IncompleteError       RuntimeError                an output was asked for before all of it was there
    ├── SubjectError          ValueError, TypeError, RuntimeError   a subject or batch that is not put together properly
    │   └── SpaceError                                    images of one subject that do not lie on one another
    ├── SamplingError         ValueError, RuntimeError    a map from which no patch can be drawn
    ├── QueueError            ValueError, RuntimeError    a queue that is put together or used in a way that cannot work
    ├── WorkerError           RuntimeError                a worker process that died
    ├── NoSuchIndexError      IndexError                  an index beyond an axis, a grid, a data set or a batch
    ├── NoSuchKeyError        KeyError, RuntimeError      a name that a subject, image, batch or aggregator lacks
    ├── ImageError            ValueError, TypeError, RuntimeError   data or an affine that no image can have
    ├── ImageFileError        RuntimeError, OSError       a file that is not what it should be
    │   ├── ImageNotFoundError    FileNotFoundError
    │   ├── CorruptImageError     truncated, not an image, or claiming more than it holds
    │   ├── UnsupportedImageError an image that voxloom has no way to hold or to write
    │   ├── SeriesError           a DICOM folder that is not one regular series
    │   └── SaveError             a target that could not be written; what was there before is untouched
    │       └── TargetExistsError FileExistsError         a target that is there already, and is kept
    ├── DownloadError         OSError                     a data set that could not be had, or is not what it was
    └── MissingDependencyError ImportError                an extra that is not installed

Each carries one message, so that it crosses processes with its type: pickling keeps it, and so does a data loader's worker.
The second column names the built-in types that it also is, so that code written for them goes on working.
"""

from typing import Self

__all__ = [
    "ArgumentNameError",
    "CorruptImageError",
    "DeviceMemoryError",
    "DownloadError",
    "ImageError",
    "ImageFileError",
    "ImageNotFoundError",
    "IncompleteError",
    "LocationError",
    "MissingDependencyError",
    "ModeError",
    "ModelFileError",
    "NoSuchIndexError",
    "NoSuchKeyError",
    "OutputError",
    "QueueError",
    "RecordError",
    "SamplingError",
    "SaveError",
    "ScaleError",
    "SeriesError",
    "ShardError",
    "SizeError",
    "SpaceError",
    "SpecError",
    "SubjectError",
    "TargetExistsError",
    "UnsupportedImageError",
    "VoxloomError",
    "WorkerError",
]


class VoxloomError(Exception):
    """Base of all errors raised by voxloom."""

    def __str__(self) -> str:
        # KeyError would show the message between quotes, with its line breaks escaped.
        return str(self.args[0]) if self.args else ""


class SizeError(VoxloomError, ValueError, TypeError, RuntimeError):
    """A size, overlap, index or number has a value or a type that cannot be used."""


class ArgumentNameError(VoxloomError, TypeError):
    """A function was given an argument of a name that it does not have."""


class ModeError(VoxloomError, ValueError, KeyError):
    """An overlap, padding or window mode is unknown."""


class ScaleError(VoxloomError, ValueError):
    """At this scale a patch would start or end between two voxels."""


class LocationError(VoxloomError, ValueError):
    """Locations do not fit the batch, the grid or the volume."""


class OutputError(VoxloomError, ValueError, RuntimeError):
    """The output of a model cannot be aggregated."""


class DeviceMemoryError(VoxloomError, RuntimeError):
    """A device lacks memory for a single patch."""


class RecordError(VoxloomError, ValueError, RuntimeError):
    """An unfinished prediction is of another image, model or option, or another process is at it."""


class ShardError(VoxloomError, RuntimeError):
    """Of a prediction in parts, some are missing."""


class ModelFileError(VoxloomError, ValueError, RuntimeError):
    """A model cannot be loaded, or must not be, because its file holds code."""


class SpecError(VoxloomError, ValueError):
    """What a model is said to expect cannot be, or an image is not what it expects."""


class IncompleteError(VoxloomError, RuntimeError):
    """An output was asked for before all of its patches were added."""


class SubjectError(VoxloomError, ValueError, TypeError, RuntimeError):
    """A subject, a data set of subjects or a batch is not put together properly."""


class SamplingError(VoxloomError, ValueError, RuntimeError):
    """No patch can be drawn from a map of probabilities or labels."""


class QueueError(VoxloomError, ValueError, RuntimeError):
    """A queue is put together or used in a way that cannot work."""


class WorkerError(VoxloomError, RuntimeError):
    """A worker process died."""


class SpaceError(SubjectError):
    """The images of a subject do not have the same shape or do not lie on one another."""


class NoSuchKeyError(VoxloomError, KeyError, RuntimeError):
    """A subject, an image, a batch or an aggregator has nothing of that name."""


class NoSuchIndexError(VoxloomError, IndexError):
    """An index lies beyond an axis of an image, a grid, a data set or a batch."""


class ImageError(VoxloomError, ValueError, TypeError, RuntimeError):
    """Data or an affine that no image can have."""


class ImageFileError(VoxloomError, RuntimeError, OSError):
    """A file or folder is not what it should be."""

    def __new__(cls, *args: object) -> Self:  # noqa: D102 - nothing that anybody calls
        # Found first, RuntimeError's would refuse to make what is an OSError too, where an error is made anew by its name, as
        # tblib does for Dask.
        return OSError.__new__(cls, *args)


class ImageNotFoundError(ImageFileError, FileNotFoundError):
    """There is no such file or folder."""


class CorruptImageError(ImageFileError):
    """A file is truncated, not an image, or claims to hold more than it does."""


class UnsupportedImageError(ImageFileError, ValueError):
    """An image of a kind that voxloom has no way to hold, or no way to write."""


class SeriesError(ImageFileError):
    """A DICOM folder does not hold exactly one regular series."""


class SaveError(ImageFileError):
    """A target could not be written; what was there before is untouched."""


class TargetExistsError(SaveError, FileExistsError):
    """A target is there already, and was not to be replaced."""


class DownloadError(VoxloomError, OSError):
    """A data set cannot be downloaded, or is not what it was when it was first downloaded."""


class MissingDependencyError(VoxloomError, ImportError):
    """An optional dependency is not installed."""
