"""Preprocessed subjects on the disk: made once, and from then on read patch by patch."""

import contextlib
import copy
import inspect
import itertools
import json
import os
import re
import shutil
import time
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch.utils.data import ConcatDataset, Dataset

from .._version import __version__
from ..errors import CorruptImageError, NoSuchIndexError, SaveError, SubjectError, VoxloomError
from ..io.arrays.blosc import BloscFile, write_blosc
from ..io.arrays.memory import hash_of
from ..io.files import size_of_path
from ..io.fingerprints import fingerprint_of_option, is_setting
from ..io.plain import MOST_NUMBERS, from_plain, to_plain
from ..io.protocols import Json, SpaceCodes
from ..io.writing.saving import as_save_error, bring_to_disk, write_safely
from ..runtime.limits import as_bytes
from ..runtime.marks import left_by_dead, new_mark
from ..runtime.seeding import reseed, seeded
from .constants import HISTORY
from .contents import TRANSFORMS, dry_subjects_of, leaf_at, leaves_of, name_of, transforms_of
from .images.image import Image, LabelMap, ScalarImage
from .libraries import LIBRARIES, as_subject, found_subject
from .loading import SubjectsDataset
from .subject import Subject

__all__ = ["SubjectsCache"]

# The form of entries: others are made anew.
VERSION = 2
ENTRY = "subject.json"
# What has been used within this time is not removed: another process may be about to read it.
IN_USE_SECONDS = 3600.0
IMAGES: dict[str, type[Image]] = {each.__name__: each for each in (Image, ScalarImage, LabelMap)}


class SubjectsCache(Dataset[Subject]):
    """A data set whose subjects, as they are after its own transform, are kept in a folder; a queue then reads only patches.

    An entry is known by its files (path, size, time and header), and by the name, the code and the parameters of the transform:
    if any of them changes, it is made anew. Several processes can share a folder, and a crash leaves no half entry. A random
    transform would be frozen: give such a one to the queue, as `patch_transform`.

    Args:
        dataset: a `SubjectsDataset`, or another map-style one; its transform is what is done before subjects are kept.
        folder: for the entries; it is made if need be.
        size_limit: bytes, or a text such as `"200 GiB"`. What was used longest ago is removed, unless it was used within the last
            hour; where that is not enough, subjects are not kept.
        name: stands for the transform and the code of the data set, where these cannot be told apart: for a data set that does
            not say what its subjects are before it loads them.

    Raises:
        SubjectError: if a name is needed.
        SaveError: if the folder is none, or cannot be made.

    Example:
        >>> import tempfile, torch, voxloom as vx
        >>> def normalise(subject):
        ...     subject.t1.set_data((subject.t1.data - subject.t1.data.mean()) / subject.t1.data.std())
        ...     return subject
        >>> subjects = [vx.Subject(t1=vx.ScalarImage(torch.rand(1, 40, 40, 40)), case=n) for n in range(3)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cache = vx.SubjectsCache(vx.SubjectsDataset(subjects, normalise), folder)
        ...     first = cache[0]
        ...     again = cache[0]
        ...     again.t1.is_loaded, abs(float(again.t1[:, 3:9].data.mean())) < 0.5, again["case"]
        (False, True, 0)
    """

    gives_copies = True
    """A transform may change what it is given."""

    def __init__(self, dataset: Any, folder: Any, *, size_limit: int | str | None = None, name: str | None = None) -> None:
        if not isinstance(folder, str | os.PathLike):
            raise SaveError(f"the folder of the cache is {folder!r}: give its name")
        if name is not None and not isinstance(name, str):
            raise SubjectError(f"the name of what is kept is {name!r}: give a text")
        self.dataset = dataset
        self.folder = Path(folder).expanduser()
        self.size_limit = None if size_limit is None else as_bytes(size_limit, "size_limit")
        self.name = name
        if name is None and dry_subjects_of(dataset) is None:
            raise SubjectError(
                f"{type(dataset).__name__} does not say what its subjects are before it loads them, so that it cannot be told"
                " whether what is kept is of these: give a name, by vx.SubjectsCache(dataset, folder, name=...), and another one"
                " when anything changes"
            )
        self._made_by: dict[int, tuple[list[Any], Json]] = {}
        """By the number of a part of the data set: its transforms, and what its subjects are made by."""
        self._readers: dict[int, tuple[Any, Json]] = {}
        """By the number of a reader: itself, and what it is."""
        for subject in [] if name is not None else dry_subjects_of(dataset) or []:
            for image in subject.images.values():
                self._reader_of(image)
        for number in range(len(leaves_of(dataset)) if name is None else 0):
            self._maker_of(number)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise as_save_error(self.folder, error) from error
        for _, left in left_by_dead(self.folder, ".", r"\..*\.unfinished"):
            shutil.rmtree(left, ignore_errors=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._readers = {id(reader): (reader, told) for reader, told in self._readers.values()}  # in this process

    def __len__(self) -> int:
        return len(self.dataset)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.dataset!r}; folder: {self.folder})"

    def dry_iter(self) -> list[Subject]:
        """Give the subjects as they are kept; those that are not yet, as they are before they are made."""
        before = dry_subjects_of(self.dataset)
        found = (self._read(self.folder / self._key(index)) for index in range(len(self)))
        if before is None:
            return [as_subject(self[index], "what the data set gave") for index in range(len(self))]
        return [each if subject is None else subject for subject, each in zip(found, before, strict=True)]

    def __getitem__(self, index: int) -> Subject:
        if not -len(self) <= index < len(self):
            raise NoSuchIndexError(f"the data set has {len(self)} subjects, and none of index {index}")
        index %= len(self)
        key = self._key(index)
        found = self._read(self.folder / key)
        if found is not None:
            with contextlib.suppress(OSError):
                (self.folder / key / ENTRY).touch()  # it has been used
            return found
        with self._locked(key):
            found = self._read(self.folder / key)  # another process may have made it
            return self._made(index, key) if found is None else found

    def __iter__(self) -> Iterator[Subject]:
        return (self[index] for index in range(len(self)))

    def _maker_of(self, number: int) -> Json:
        """Say what the subjects of a part of the data set are made by: found once, and anew if it has other transforms."""
        leaf = leaves_of(self.dataset)[number]
        now = transforms_of(leaf)
        before, told = self._made_by.get(number, ([], None))
        if told is None or len(now) != len(before) or not all(map(_is_same, now, before)):
            told = _made_by(leaf)
            self._made_by[number] = now, told
        return told

    def _reader_of(self, image: Image) -> Json:
        """Say how the files of an image are read: found once for each reader."""
        reader = image.reader
        if reader is None:
            return None
        before, told = self._readers.get(id(reader), (None, None))
        if before is not reader:
            told = fingerprint_of_option(reader, with_files=True)
            self._readers[id(reader)] = reader, told
        return told

    def _key(self, index: int) -> str:
        """Name the entry of a subject by all that it depends on."""
        if self.name is not None:
            told: Json = [self.name, index]
        else:
            subjects = dry_subjects_of(self.dataset)
            assert subjects is not None
            subject = subjects[index]
            images = {
                name: [
                    type(image).__name__,
                    image.type,
                    [os.path.realpath(path) for path in image.paths],
                    _fingerprint_of(image),
                    self._reader_of(image),
                    fingerprint_of_option(image.metadata),
                ]
                for name, image in subject.images.items()
            }
            told = [self._maker_of(leaf_at(self.dataset, index)), images, fingerprint_of_option(subject.metadata)]
        return hash_of([json.dumps([VERSION, told], sort_keys=True)])[:32]

    @contextlib.contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        lock = FileLock(self.folder / f".{key}.lock")
        try:
            lock.acquire()
        except OSError as error:
            raise SaveError(
                f"what is to be kept in {self.folder} cannot be written there: {error.strerror or error}. Make it writable,"
                " or give another folder"
            ) from error
        try:
            yield
        finally:
            lock.release()
            with contextlib.suppress(OSError):
                Path(lock.lock_file).unlink()

    # Entries

    def _read(self, entry: Path) -> Subject | None:
        """Give a subject that is kept, of which nothing is read yet; None if it is not."""
        try:
            told = json.loads((entry / ENTRY).read_text())
            metadata = from_plain(told["metadata"])
            images = {name: _image_of(entry / _file_of(name), each) for name, each in told["images"].items()}
            return Subject({name: images[name] if name in images else metadata[name] for name in told["entries"]})
        except FileNotFoundError:
            return None
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            if isinstance(error, VoxloomError):
                raise
            raise CorruptImageError(f"{entry / ENTRY} is damaged: remove {entry}, and it is made anew") from error

    def _made(self, index: int, key: str) -> Subject:
        """Make a subject, and keep it if there is room."""
        with seeded([zlib.crc32(key.encode()), 0, 0, 0]):  # the same whoever makes it
            subject = as_subject(self.dataset[index], "what the data set gave")
        size = sum(image.memory for image in subject.images.values())
        if self.size_limit is not None and not self._has_room(size):
            return subject
        unfinished = self.folder / f".{new_mark()}.{key}.unfinished"
        try:
            unfinished.mkdir()
            told = {
                "voxloom": __version__,
                "entries": list(subject),
                "images": {name: _written(unfinished / _file_of(name), image) for name, image in subject.images.items()},
                "metadata": _plain(subject.metadata, name_of(self.dataset, index)),
            }
            write_safely(unfinished / ENTRY, json.dumps(told))
            if (self.folder / key).exists():  # what is left of an entry
                self._remove(self.folder / key)
            unfinished.rename(self.folder / key)
        except VoxloomError:
            raise
        except OSError as error:
            raise as_save_error(self.folder / key, error) from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        found = self._read(self.folder / key)
        assert found is not None
        return found

    def _has_room(self, size: int) -> bool:
        """Remove what was used longest ago until there is room for so many bytes before they are compressed."""
        assert self.size_limit is not None
        with self._locked("room"):
            entries = []
            for path in self.folder.iterdir():
                with contextlib.suppress(OSError):
                    entries.append(((path / ENTRY).stat().st_mtime, size_of_path(path), path))
            used = sum(each for _, each, _ in entries)
            for last_used, each, path in sorted(entries):
                if used + size <= self.size_limit or time.time() - last_used < IN_USE_SECONDS:
                    break
                with contextlib.suppress(OSError):
                    self._remove(path)
                    used -= each
            return used + size <= self.size_limit

    def _remove(self, entry: Path) -> None:
        """Remove an entry, of which no part is to be found under its name meanwhile."""
        gone = entry.with_name(f".{new_mark()}.{entry.name}.unfinished")
        entry.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def build(self, progress: Any = None) -> None:
        """Make all entries that are not there.

        Args:
            progress: function that takes the indices, and gives them while it shows how far they have come, as `tqdm` does.
        """
        indices = range(len(self))
        for index in indices if progress is None else progress(indices):
            self[index]

    def count(self) -> int:
        """Say how many of the subjects are kept: fewer than all, where there is no room for all."""
        return sum((self.folder / self._key(index) / ENTRY).exists() for index in range(len(self)))

    def prune(self) -> int:
        """Remove the entries that are of no subject of this data set, and say how many they were.

        What another process reads is lost to it: prune when nobody trains from the folder.
        """
        own = {self._key(index) for index in range(len(self))}
        others = [path for path in self.folder.iterdir() if path.is_dir() and path.name not in own and (path / ENTRY).exists()]
        for path in others:
            with contextlib.suppress(FileNotFoundError):  # another process has removed it
                self._remove(path)
        return len(others)


def _made_by(leaf: Any) -> Json:
    """Say what the subjects of a data set are made by, whatever random numbers its transforms have at the moment."""
    given = transforms_of(leaf)
    # One of its own methods is told with the data set, which is not copied for that.
    transforms = copy.deepcopy([each for each in given if getattr(each, "__self__", None) is not leaf])
    seeds = itertools.count()
    for each in transforms:
        reseed(each, seeds)
    told = fingerprint_of_option(transforms, with_files=True)
    getter = type(leaf).__getitem__
    is_known = getter is SubjectsDataset.__getitem__ or getter.__module__.partition(".")[0] in LIBRARIES
    if is_known and len(transforms) == len(given):
        return told
    # It has its own way to make them, which is a matter of its code, and of what it holds.
    settings = {
        name: value
        for name, value in vars(leaf).items()
        if name.lstrip("_") not in TRANSFORMS and is_setting(value) and not _holds_subjects(value)
    }
    within = [_made_by(part) for part in _within(leaf)]
    return [told, fingerprint_of_option([type(leaf), settings], with_files=True), within]


def _is_same(one: Any, other: Any) -> bool:
    """Whether two are one and the same; a method is another object each time that it is asked for."""
    return one is other or (inspect.ismethod(one) and inspect.ismethod(other) and one == other)


def _within(leaf: Any) -> list[Any]:
    """Give the data sets that one of the user's is made of."""
    held = leaf.datasets if isinstance(leaf, ConcatDataset) else vars(leaf).values()
    parts = [each for each in held if isinstance(each, Dataset) and each is not leaf]
    return [each for part in parts for each in leaves_of(part)]


def _holds_subjects(value: Any) -> bool:
    if isinstance(value, Dataset) or found_subject(value) is not None:
        return True
    values = list(value.values()) if isinstance(value, Mapping) else value
    return isinstance(values, Sequence) and not isinstance(values, str) and any(map(_holds_subjects, values[:1]))


def _file_of(name: str) -> str:
    """Name the file of an image, whatever the image is called."""
    return f"{name if re.fullmatch('[a-z0-9_-]{1,64}', name) else hash_of([name])[:32]}.b2nd"


def _fingerprint_of(image: Image) -> Json:
    """Say what tells an image from others; the values of one that is in memory are only hashed again if they change."""
    if image.paths and image.can_be_reloaded:
        return image.fingerprint()
    return image.derived("fingerprint", image.fingerprint)


def _written(path: Path, image: Image) -> Json:
    """Write an image, with a folder for what samplers find out about it, and say what it is."""
    data = image.data
    write_blosc(path, data.float() if data.dtype == torch.bfloat16 else data)
    bring_to_disk(path)
    path.with_name(f".{path.stem}.index").mkdir()
    name = next(each.__name__ for each in type(image).__mro__ if each.__name__ in IMAGES)
    return {
        "class": name,
        "dtype": str(data.dtype).removeprefix("torch."),
        "type": image.type,
        "affine": image.affine.tolist(),
        "codes": asdict(image.codes),
        "metadata": _plain(image.metadata, str(path.stem)),
    }


def _image_of(path: Path, told: Mapping[str, Json]) -> Image:
    codes = dict(told["codes"])
    world = tuple(map(tuple, codes.pop("qform_world")))
    way_out = f"remove {path.parent}, and it is made anew"
    source = BloscFile(
        path, np.array(told["affine"]), SpaceCodes(**codes, qform_world=world), getattr(torch, told["dtype"]), way_out
    )
    more = {"type": told["type"]} if told["class"] == "Image" else {}
    return IMAGES[told["class"]](source, **more, **from_plain(told["metadata"]))


def _plain(values: Mapping[str, Any], what: str) -> Json:
    """Give metadata as they are written down.

    Raises:
        SubjectError: if there is something that cannot be.
    """
    kept = dict(values)
    for name, value in values.items():
        try:
            to_plain(value)
        except (TypeError, RecursionError) as error:
            kind = "list or dict that holds itself" if isinstance(error, RecursionError) else str(error)
            if name == HISTORY:
                warnings.warn(
                    f"the history of TorchIO's transforms ({HISTORY!r}) of {what} holds a {kind}, which a cache cannot keep:"
                    " it is left out",
                    RuntimeWarning,
                    stacklevel=2,
                )
                kept[name] = []
                continue
            raise SubjectError(
                f"{name!r} of {what} is or holds a {kind}, which a cache cannot keep: numbers, texts, paths, arrays of"
                f" {MOST_NUMBERS} numbers at most, and lists, tuples and dicts of these can be. Let the data set's transform"
                " remove it, or make it an image"
            ) from error
    return to_plain(kept)
