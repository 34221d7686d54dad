"""Which images a command is applied to, and where each result goes."""

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import typer

from ..errors import ImageNotFoundError, ModeError, SaveError, SpecError, SubjectError
from ..io.formats import OTHERS, endings, is_folder_target, is_image, is_other_image, stem_of
from ..io.zarr.source import is_label_of_image, is_zarr
from ..volumes.images.image import ScalarImage
from ..volumes.subject import Subject

__all__ = [
    "DEFAULT_ENDING",
    "TARGETS",
    "Case",
    "Results",
    "as_ending",
    "beside",
    "cases_of",
    "cases_of_table",
    "checked",
    "images_in",
    "make_folder",
    "make_folder_of",
    "warn_of_left_out",
]

IMAGES = endings(lambda each: not each.is_dicom and each.described_by is None)
DICOM = endings(lambda each: each.is_dicom)
TARGETS = endings(lambda each: each.is_streamed)
DEFAULT_ENDING = ".nii.gz"
# Names of files that are channels of one case: those of nnU-Net, and of BIDS.
CHANNEL = re.compile(r"(?P<case>.+)_(?:(?P<number>\d{4})|(?P<suffix>(?:T1w|T2w|T1ce|T1gd|PDw|FLAIR|T2star|angio|CT|PET|pet|ct)))")


@dataclass(frozen=True)
class Case:
    """An image, or several that become channels, and where the result goes."""

    name: str
    files: tuple[Path, ...]
    target: Path
    channels: tuple[str, ...] = ()
    """Names of the channels, where there are any."""

    def from_anywhere(self) -> "Case":
        """Give the same for processes that may be in another folder."""
        return replace(self, files=tuple(path.absolute() for path in self.files), target=self.target.absolute())

    def subject(self, wanted: Sequence[str] = ()) -> Subject:
        """Make a subject whose images are the channels, in order; nothing is read yet.

        Args:
            wanted: names of the channels that a model takes: a table puts them in this order.

        Raises:
            SpecError: if the table has no column of that name.
        """
        names = self.channels or tuple(f"channel {number}" for number in range(len(self.files)))
        images = {name: ScalarImage(path) for name, path in zip(names, self.files, strict=True)}
        if not self.channels or not wanted:
            return Subject(images)
        missing = [name for name in wanted if name not in images]
        if missing:
            raise SpecError(
                f"the model takes {', '.join(wanted)}, but the columns are {', '.join(images)}: {missing[0]!r} is missing"
            )
        return Subject({name: images[name] for name in wanted})


@dataclass(frozen=True)
class Results:
    """Where results go, as it was said on the command line."""

    output: Path
    """A file for one case, or a folder."""
    ending: str = DEFAULT_ENDING
    """Of results in a folder."""
    endings: tuple[str, ...] = TARGETS
    """That results may have."""

    @classmethod
    def of(cls, output: Path, given: str | None, default: str, endings: tuple[str, ...]) -> "Results":
        """Say where results go, in the format that was given.

        Raises:
            ModeError: if they cannot have it, or the output is a file, whose name says it.
        """
        ending = default if given is None else as_ending(given, endings)
        results = cls(output, ending, endings)
        if given is not None and results.is_file:
            raise ModeError(f"--format is for results in a folder, and {output} is a file, whose name says it: leave one out")
        return results

    @property
    def is_file(self) -> bool:
        """Whether the output is the result of one case, rather than a folder of results."""
        return self.output.name.lower().endswith(self.endings) or is_folder_target(self.output)

    def at(self, place: Path | str) -> Path:
        """Name the result of a case in the folder."""
        return self.output / f"{place}{self.ending}"


def as_ending(given: str, endings: tuple[str, ...]) -> str:
    """Check an ending of results, which may be given without its dot.

    Raises:
        ModeError: if results cannot have it.
    """
    ending = f".{given.lower().lstrip('.')}"
    if ending not in endings:
        raise ModeError(f"--format is {given!r}: it must be one of {', '.join(each.lstrip('.') for each in endings)}")
    return ending


def cases_of(images: Sequence[Path], results: Results, is_grouped: bool | None = None) -> list[Case]:
    """Find the cases for files and folders.

    A single file, or files that are channels of one case, may have an output that is a file; otherwise the output is a folder, in
    which stems, and for folders the paths within them, are kept.

    Args:
        images: the files and folders.
        results: where results go.
        is_grouped: whether files in one folder that are named as channels of one case, `CASE_0000` and `CASE_0001`, or
            `sub-01_T1w` and `sub-01_T2w`, are one. None refuses them, since either may be meant.

    Raises:
        ImageNotFoundError: if there is no such file or folder, or no image in it.
        SubjectError: if it must be said whether files are channels of one case, or a case lacks one that others have.
        SaveError: if two results would go to the same file, or one would replace an input.
    """
    output = results.output
    is_file = results.is_file
    if len(images) == 1 and is_file and not _is_folder_of_images(images[0]):
        return checked([Case(images[0].name, (images[0],), output)])
    if is_file and is_grouped and not any(map(_is_folder_of_images, images)):
        grouped = cases_of(images, replace(results, output=output.parent), is_grouped)
        if len(grouped) == 1:  # the files are its channels
            return checked([replace(grouped[0], target=output)])
    _check_folder(output, results.endings)
    for path in images:
        if path.is_dir() and path.resolve() == output.resolve():
            raise SaveError(
                f"{output} is the folder of the images, and its results would be taken for images the next time: choose another"
            )
    cases = []
    for path in images:
        if not path.exists():
            raise ImageNotFoundError(f"there is no file or folder {path}")
        found, unknown = _images_in(path, output) if _is_folder_of_images(path) else ([path], [])
        if unknown:
            warn_of_left_out(path, unknown, f"named with {', '.join(IMAGES)} in the end")
        if not found:
            raise ImageNotFoundError(f"the folder {path} holds no image ({', '.join(IMAGES)}, or a folder of DICOM files)")
        for file in found:
            place = file.relative_to(path).parent if file != path else Path()
            cases.append(Case(str(place / file.name), (file,), results.at(place / _stem_of(file))))
    return checked(cases if is_grouped is False else _grouped(cases, results, bool(is_grouped)))


def _grouped(cases: list[Case], results: Results, is_wanted: bool) -> list[Case]:
    """Make one case of files that are named as its channels."""
    groups: dict[Path, dict[str, Case]] = {}
    for case in cases:
        found = CHANNEL.fullmatch(_stem_of(case.files[0]))
        stem, channel = (found["case"], found["number"] or found["suffix"]) if found else (_stem_of(case.files[0]), "")
        groups.setdefault(case.target.parent / stem, {})[channel] = case
    if all(len(group) == 1 for group in groups.values()):
        return cases
    if not is_wanted:
        several = next(group for group in groups.values() if len(group) > 1)
        listed = ", ".join(str(case.files[0].name) for case in several.values())
        raise SubjectError(
            f"{listed} are named as channels of one case: give --group if they are, or --no-group if each is a case of its own"
        )
    channels = sorted({channel for group in groups.values() for channel in group})
    made = []
    for target, group in groups.items():
        missing = [channel for channel in channels if channel not in group]
        if missing:
            raise SubjectError(f"the case {target.name} has no file of the channel {missing[0]!r}, which others have")
        names = tuple(channels) if not all(each.isdecimal() for each in channels) else ()
        files = tuple(group[channel].files[0] for channel in channels)
        place = target.relative_to(results.output)
        made.append(Case(str(place), files, results.at(place), names))
    return made


def cases_of_table(table: Path, results: Results) -> list[Case]:
    """Find the cases that a table lists.

    Its first line names the columns, each of which is a channel, but for `case`, which names the results. Paths are relative to
    the table. A table is separated by commas, or by tabs if its name ends in `.tsv`.

    Raises:
        ImageNotFoundError: if there is no such table.
        SubjectError: if a line has another number of columns, or lacks a file.
        SaveError: if two results would go to the same file, or one would replace an input.
    """
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, delimiter="\t" if table.suffix.lower() == ".tsv" else ",")
            (_, header), *rows = [(reader.line_num, row) for row in reader if row]
    except FileNotFoundError as error:
        raise ImageNotFoundError(f"there is no table {table}") from error
    except OSError as error:
        raise SubjectError(f"the table {table} cannot be read: {error.strerror}") from error
    except (ValueError, csv.Error) as error:
        raise SubjectError(f"the table {table} is empty, or is not text: its first line names the columns") from error
    columns = [name.strip() for name in header]
    places = [name for name in columns if is_image(Path(name)) or ("/" in name and (table.parent / name).is_file())]
    if places:
        raise SubjectError(
            f"the first line of the table {table} has {places[0]!r}, which is a file: it must name the columns, such as case,t1"
        )
    if len(set(columns)) < len(columns):
        raise SubjectError(f"the table {table} has columns {columns}: each must have a name of its own")
    _check_folder(results.output, results.endings)
    channels = [number for number, name in enumerate(columns) if name != "case"]
    if not channels or not rows:
        raise SubjectError(f"the table {table} has columns {columns} and {len(rows)} lines: it needs a channel, and a line")
    cases = []
    for line, row in rows:
        if len(row) != len(columns) or not all(row[number].strip() for number in channels):
            raise SubjectError(f"line {line} of {table} is {row}: it must have a value for each of the columns {columns}")
        given = [Path(row[number].strip()).expanduser() for number in channels]
        name = row[columns.index("case")].strip() if "case" in columns else None
        first = given[0]
        place = Path(name) if name else (Path() if first.is_absolute() else first.parent) / _stem_of(table.parent / first)
        if place.is_absolute() or ".." in place.parts or not place.name:
            raise SubjectError(
                f"line {line} of {table} would put its result at {place}, outside of {results.output}: name it with a column case"
            )
        files = tuple(table.parent / path for path in given)
        cases.append(Case(str(place), files, results.at(place), tuple(columns[each] for each in channels)))
    return checked(cases)


def _is_folder_of_images(path: Path) -> bool:
    return path.is_dir() and not is_zarr(path) and not _is_series(path)


def _is_series(folder: Path) -> bool:
    """Whether a folder is of DICOM files, which often have no ending, or the last part of an identifier for one.

    Raises:
        SubjectError: if it holds other images too.
    """
    files = [file for file in folder.iterdir() if file.is_file() and not file.name.startswith(".")]
    images = [file for file in files if is_image(file)]
    if not any(map(_is_dicom, set(files).difference(images))):
        return False
    if images:
        raise SubjectError(
            f"the folder {folder} holds DICOM files and {images[0].name}: move one or the other to a folder of its own"
        )
    return True


def _is_dicom(file: Path) -> bool:
    if file.name.lower().endswith(DICOM):
        return True
    try:
        with file.open("rb") as opened:
            return opened.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _stem_of(path: Path) -> str:
    return path.name if path.is_dir() and not is_zarr(path) else stem_of(path)


def _check_folder(output: Path, targets: tuple[str, ...]) -> None:
    if output.name.lower().endswith((*IMAGES, *DICOM, *OTHERS)) and not output.is_dir():
        dicom = (
            "; of labels, voxloom.integrations.dicom_seg makes a DICOM segmentation" if output.suffix.lower() == ".dcm" else ""
        )
        raise SaveError(
            f"{output} is the name of a file: results are {' or '.join(targets)}, and where there may be several, give the name"
            f" of a folder{dicom}"
        )
    if output.exists() and not output.is_dir():
        raise SaveError(f"{output} is a file: give the name of a folder")


def warn_of_left_out(folder: Path, paths: Sequence[Path], expected: str) -> None:
    """Say which files of a folder are not taken."""
    listed = ", ".join(map(str, paths[:3])) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
    text = f"voxloom: {folder} also holds what may be images, {listed}: left out, since they are not {expected}."
    typer.echo(f"{text} Give those that are wanted by name", err=True)


def images_in(folder: Path, output: Path) -> list[Path]:
    """Give all that may be images in a folder, but for those in the folder of results, if that is inside."""
    found, unknown = _images_in(folder, output)
    return found + unknown


def _images_in(folder: Path, output: Path) -> tuple[list[Path], list[Path]]:
    """Give the images in a folder, but for those in the folder of results, if that is inside; and images of other kinds."""
    found, unknown = [], []
    for path in _paths_in(folder, output):
        if path.is_dir() or is_image(path):
            found.append(path)
        elif is_other_image(path):
            unknown.append(path)
    return found, unknown


def _paths_in(folder: Path, output: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Give the files in a folder and below, and the folders that are DICOM series."""
    if folder.resolve() in above:
        return  # a link that leads back
    above = (*above, folder.resolve())
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or (path.is_dir() and path.resolve() == output.resolve() != folder.resolve()):
            continue
        if path.is_dir():
            yield from [path] if is_zarr(path) or _is_series(path) else _paths_in(path, output, above)
        else:
            yield path


def checked(cases: list[Case]) -> list[Case]:
    """Refuse, before anything is computed, what would write twice to one file, or over an input."""
    files = [file.resolve() for case in cases for file in case.files]
    inputs = {place for file in files for place in (file, *file.parents)}  # a level lies in its store
    sources: dict[Path, Case] = {}
    for case in cases:
        target = case.target.resolve()
        if target in inputs:
            raise SaveError(f"the result of {case.name} would replace the input {case.target}: choose another output")
        # Sidecars go by the stem, so that a.nii and a.nii.gz collide too.
        key = target.with_name(stem_of(target))
        if key in sources:
            raise SaveError(f"the results of {sources[key].files[0]} and of {case.files[0]} would both go to {case.target}")
        sources[key] = case
    return cases


def beside(target: Path, ending: str) -> Path:
    """Name what is written beside a result; of a label image, beside the store of its image rather than in it."""
    if is_label_of_image(target):
        store = target.parent.parent
        return store.with_name(f"{stem_of(store)}-{stem_of(target)}{ending}")
    return target.with_name(f"{stem_of(target)}{ending}")


def make_folder_of(target: Path) -> None:
    """Make the folder of a result; that of labels of an image is made with them, once it is known that they fit it.

    Raises:
        SaveError: if it cannot be made.
    """
    if not is_folder_target(target) or target.parent.name != "labels":
        make_folder(target.parent)


def make_folder(path: Path) -> None:
    """Make a folder for results.

    Raises:
        SaveError: if it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(f"the folder {path} cannot be made: {error.strerror}; give another one with --output") from error
