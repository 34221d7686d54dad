"""A label map as people hand it on: a file for each of its labels, and a table of what its numbers mean."""

import contextlib
import csv
import io
import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.boxes import Box
from ..core.walking import walk
from ..errors import ModeError, SaveError, VoxloomError
from ..io.formats import endings
from ..io.labels import Label, as_labels, color_of
from ..io.protocols import Json, VolumeSource, read_checked
from ..io.spooling import spooled
from ..io.writing.replacing import forget_old, replace_folder, restore_old
from ..io.writing.saving import appeared, atomic_write
from ..io.writing.sidecars import read_sidecar, sidecar_of, written
from ..io.writing.words import OVERWRITE
from ..runtime.marks import left_by_dead, new_mark
from ..runtime.progress import shown_if
from .converting import convert
from .images.image import LabelMap
from .libraries import as_image
from .views.spatial import View

__all__ = ["PER_LABEL", "is_split_of", "is_untouched", "known_labels", "label_table", "split_labels", "write_label_table"]

TABLE = "labels.tsv"
RECORD = "labels.json"
# Bytes of a label map that are looked at together.
BOX_BYTES = 64 * 2**20
PER_LABEL = endings(lambda each: each.is_streamed and each.ending != ".seg.nrrd")


class OneLabelSource(View):
    """1 where a label map has a number, and 0 elsewhere.

    Args:
        of: the label map.
        value: the number.
    """

    def __init__(self, of: VolumeSource, value: int) -> None:
        super().__init__(of)
        self._value = value
        self.shape, self.affine = of.shape, of.affine
        self.dtype = torch.uint8

    @property
    def chunks(self) -> tuple[int, int, int]:
        """See `VolumeSource`."""
        return self.of.chunks

    def read(self, box: Box) -> Tensor:
        """See `VolumeSource`."""
        return (read_checked(self.of, box) == self._value).to(torch.uint8)

    def fingerprint(self) -> Json:
        """See `VolumeSource`."""
        return {"one_label": self._value, "of": self.of.fingerprint()}

    def over(self, source: VolumeSource) -> VolumeSource:
        """See `View`."""
        return OneLabelSource(source, self._value)


def split_labels(
    image: Any,
    folder: Any,
    *,
    labels: Mapping[str, int] | Sequence[Label] | None = None,
    ending: str = ".nii.gz",
    overwrite: bool = False,
    progress: bool | str = False,
) -> dict[str, LabelMap]:
    """Write a file for each label of a label map: 1 where it is, 0 elsewhere (uint8), on the same grid.

    Files are named after the labels, in a new folder with a table of them, `labels.tsv`. The folder appears when all are written.
    Labels that no voxel has get a file too; 0, the background, gets none. The map is read box by box, and never held whole.

    Args:
        image: the label map, of one channel: anything that `as_image` takes.
        folder: name of the folder.
        labels: those that are written: names and numbers, or `Label`s. By default all numbers that it has, by the names that the
            sidecar says which was written with the map, or else `label-5` and so on.
        ending: format of the files: `.nii.gz`, `.nii`, `.ome.zarr`, `.nii.zarr` or `.zarr`.
        overwrite: whether a folder may be replaced that this function made before.
        progress: show how far it has come.

    Returns:
        The images as they were written, by name.

    Raises:
        ModeError: if the image is no label map of one channel, two labels would be one file, or one number has two names.
        SaveError: if the folder exists, or cannot be written.

    Example:
        >>> import tempfile, voxloom as vx
        >>> head = vx.datasets.HeadPhantom(32).labels
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     files = vx.split_labels(head, f"{folder}/parts", labels={"white matter": 3, "lesion": 7})
        ...     sorted(files), files["lesion"].path.name
        (['lesion', 'white matter'], 'lesion.nii.gz')
    """
    given, folder = as_image(image), Path(folder).expanduser()
    if given.num_channels != 1:
        raise ModeError(f"a label map of one channel is needed, but this has {given.num_channels}: reduce='argmax' makes one")
    if ending not in PER_LABEL:
        raise ModeError(f"ending is {ending!r}: it must be {', '.join(PER_LABEL[:-1])} or {PER_LABEL[-1]}")
    for mark in {mark for mark, _ in left_by_dead(folder.parent, f".{folder.name}.", r"\.(part|old)(\.gone)?")}:
        with contextlib.suppress(OSError):  # it may be another user's
            restore_old(folder.with_name(f".{folder.name}.{mark}.old"), folder)
        shutil.rmtree(folder.with_name(f".{folder.name}.{mark}.part"), ignore_errors=True)
    for path in given.paths:
        if path.resolve().is_relative_to(folder.resolve()):
            raise SaveError(f"{path} is in {folder}, which would be replaced: choose another folder")
    if folder.exists() and not (overwrite and _is_split(folder)):
        way = "remove it, or choose another name" if overwrite else f"remove it, or give {OVERWRITE}"
        raise SaveError(f"{folder} exists, and is kept: {way}")
    told = as_labels(labels) if labels is not None else known_labels(given.paths[0]) if given.paths else []
    mark = new_mark()
    part, old = (folder.with_name(f".{folder.name}.{mark}.{ending}") for ending in ("part", "old"))
    try:
        part.mkdir(parents=True)
        with spooled(given) as source:
            given_names = {label.value: label for label in told if label.value}
            there = _all_labels(source) if labels is None or source.dtype.is_floating_point else []
            taken = {label.name.casefold() for label in given_names.values()}
            others = [
                replace(label, name=f"unnamed {label.name}") if label.name in taken else label
                for label in there
                if labels is None and label.value not in given_names
            ]
            named = _named([*given_names.values(), *others])
            with shown_if(progress, "labels written", len(named), "labels") as show:
                for name, label in named.items():
                    convert(OneLabelSource(source, label.value), part / f"{name}{ending}", labels=True)
                    show(1)
        write_label_table(list(named.values()), part / TABLE)
        (part / RECORD).write_text(_record_of(given.paths, told, sorted(part.iterdir())))
        if folder.exists() and not (overwrite and _is_split(folder)):
            raise appeared(folder, "let only one at a time write there" if overwrite else f"give {OVERWRITE}")
        replace_folder(part, folder, old)
        forget_old(old)
    except VoxloomError:
        raise
    except OSError as error:
        raise SaveError(f"{folder} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return {label.name: LabelMap(folder / f"{name}{ending}") for name, label in named.items()}


def known_labels(path: Path) -> list[Label]:
    """Give what the sidecar of a label map says of its numbers; nothing if there is none."""
    told = (read_sidecar(sidecar_of(path)) or {}).get("labels")
    try:
        return [Label(**each) for each in told or ()]
    except TypeError:  # of another version
        return []


def is_split_of(folder: Path, path: Path) -> bool:
    """Whether a folder holds a file for each label of a label map as it is now, by the names that its sidecar says."""
    record = _record_in(folder)
    try:
        told = [asdict(label) for label in known_labels(path)]
        is_whole = all((folder / name).exists() for name in record["files"])
        return is_whole and record["labels"] == json.loads(json.dumps(told)) and record["of"] == written(path, path)
    except (OSError, LookupError, TypeError):
        return False


def is_untouched(folder: Path) -> bool:
    """Whether a folder holds what `split_labels` wrote, and nothing else."""
    try:
        files = _record_in(folder)["files"]
        return _is_split(folder) and all(files[name] == written(folder / name, folder / name) for name in files)
    except (OSError, LookupError, TypeError):
        return False


def write_label_table(labels: Mapping[str, int] | Sequence[Label], path: Path) -> None:
    """Write what the numbers of a label map mean, as BIDS has it beside a `_dseg.nii.gz`: a `.tsv` of `index`, `name`, `color`.

    Example:
        >>> import tempfile, pathlib, voxloom as vx
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "sub-01_dseg.tsv")
        ...     vx.write_label_table([vx.Label(5, "liver", (221, 130, 101))], path)
        ...     print(path.read_text())
        index	name	color
        5	liver	#dd8265
        <BLANKLINE>
    """
    text = label_table(as_labels(labels)).encode()

    def write(part: Path) -> None:
        part.write_bytes(text)

    atomic_write(Path(path), write, Path(path).suffix)


def label_table(labels: Sequence[Label]) -> str:
    """Give the text of a table of labels; see `write_label_table`."""
    text = io.StringIO()
    table = csv.writer(text, dialect="excel-tab", lineterminator="\n")
    table.writerow(("index", "name", "color"))
    for label in labels:
        table.writerow((label.value, label.name, "#" + bytes(color_of(label)).hex()))
    return text.getvalue()


def _all_labels(source: VolumeSource) -> list[Label]:
    """Give the numbers that a label map has, but 0.

    Raises:
        ModeError: if they are not whole.
    """
    found: set[int] = set()
    most = max(1, BOX_BYTES // source.dtype.itemsize)
    for box in walk(Box((0, 0, 0), source.shape[1:]), source.chunks, most):
        for value in np.unique(read_checked(source, box).numpy()).tolist():
            if not math.isfinite(value) or value != int(value):
                raise ModeError(f"a label map is needed, but this has the value {value:g}: reduce='argmax' makes one of scores")
            found.add(int(value))
    return [Label(value, f"label-{value}") for value in sorted(found - {0})]


def _named(labels: Sequence[Label]) -> dict[str, Label]:
    """Give labels by the names of their files.

    Raises:
        ModeError: if two of them would be one file.
    """
    named: dict[str, Label] = {}
    for label in labels:
        # What every file system takes, and no folder above.
        name = re.sub(r"[^\w\-+.() ]", "_", label.name).strip(". ") or f"label-{label.value}"
        other = next((each for key, each in named.items() if key.casefold() == name.casefold()), None)
        if other is not None:
            raise ModeError(
                f"the labels {other.value} ({other.name!r}) and {label.value} ({label.name!r}) would both be the file {name}:"
                " give them names that differ"
            )
        named[name] = label
    return named


def _record_of(paths: Sequence[Path], told: Sequence[Label], files: Sequence[Path]) -> str:
    of = written(paths[0], paths[0]) if len(paths) == 1 else None
    record = {"of": of, "labels": [asdict(label) for label in told], "files": {path.name: written(path, path) for path in files}}
    return json.dumps(record, indent=2) + "\n"


def _record_in(folder: Path) -> Json:
    try:
        return json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return {}


def _is_split(folder: Path) -> bool:
    """Whether `split_labels` made a folder, and nothing else is in it."""
    try:
        return {path.name for path in folder.iterdir()} <= {RECORD, *_record_in(folder)["files"]}
    except (OSError, LookupError, TypeError):
        return False
