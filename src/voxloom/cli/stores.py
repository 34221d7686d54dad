"""What the commands do with images as such: convert them, go through their labels, keep subjects, and say how far a run is."""

import importlib
from pathlib import Path
from typing import Any

import typer
from tqdm.auto import tqdm

from ..core.sizes import pretty_bytes
from ..errors import ModeError, SubjectError, VoxloomError
from ..io.code import find_modules_here
from ..io.files import size_of_path
from ..io.formats import format_of, is_folder_target
from ..io.writing.sidecars import read_sidecar, sidecar_of
from ..plotting.drawings import draw_parts
from ..runs.log import progress_of, targets_of_log
from ..runs.parts import forget_failures, status_of, targets_of_records
from ..sampling.by_label import LabelSampler
from ..sampling.indexing import build_index
from ..sampling.random import PatchSampler
from ..sampling.weighted import WeightedSampler
from ..volumes.cache import SubjectsCache
from ..volumes.converting import WRITTEN, convert
from ..volumes.images.image import LabelMap
from ..volumes.subject import Subject
from .cases import Results, cases_of, make_folder_of
from .reporting import Report, printable

__all__ = ["convert_cases", "index_labels", "keep_subjects", "tell_status", "try_again"]


def convert_cases(
    images: list[Path], output: Path, ending: str | None, overwrite: bool, options: dict[str, Any], report: Report
) -> None:
    """Write images in another format; one that fails does not stop the others."""
    failed = False
    for case in cases_of(images, Results.of(output, ending, ".ome.zarr", WRITTEN), is_grouped=False):
        entry = {"case": case.name, "target": str(case.target)}
        try:
            make_folder_of(case.target)
            progress = False if report.quiet or report.as_json else printable(case.name)
            convert(case.files[0], case.target, overwrite=overwrite, progress=progress, **options)
            size = size_of_path(case.target)
            report.done(f"{case.name}: {case.target}, {pretty_bytes(size)}", entry | {"state": "done", "bytes": size})
        except Exception as error:  # noqa: BLE001 - one that fails, by whatever, must not stop the others
            report.failed(case.name, error, isinstance(error, VoxloomError | OSError))
            failed = True
    report.end()
    if failed:
        raise typer.Exit(1)


def index_labels(
    images: list[Path],
    patch_size: int | list[int] | None,
    classes: list[int] | None,
    is_weighted: bool,
    border: str,
    report: Report,
) -> None:
    """Go through maps once, and keep what samplers need of them."""
    size: Any = patch_size
    sampler: PatchSampler
    if is_weighted:
        if classes is not None:
            raise ModeError("--classes are those of labels: give either that or --weighted")
        sampler = WeightedSampler(size, "map", border=border)
    else:
        shares = None if classes is None else dict.fromkeys(classes, 1.0)
        sampler = LabelSampler(size, label_name="map", label_probabilities=shares, border=border)
    failed = False
    for path in images:
        try:
            (folder,) = build_index(sampler, Subject(map=LabelMap(path)))
            report.done(f"{path}: {folder}, {pretty_bytes(size_of_path(folder))}", {"file": str(path), "index": str(folder)})
        except VoxloomError as error:
            report.failed_file(path, error)
            failed = True
    report.end()
    if failed:
        raise typer.Exit(1)


def keep_subjects(name: str, folder: Path, size_limit: str | None, prune: bool, report: Report) -> None:
    """Make the entries of a cache for a data set that is named by where it is found."""
    cache = SubjectsCache(_dataset(name), folder, size_limit=size_limit)
    cache.build(None if report.quiet or report.as_json else lambda indices: tqdm(indices, desc="Subjects"))
    removed = cache.prune() if prune else 0
    of_others = f"; {removed} of others removed" if prune else ""
    size, kept = size_of_path(folder), cache.count()
    rest = "" if kept == len(cache) else f"; {len(cache) - kept} are not kept, for which there is no room: raise --size-limit"
    report.done(
        f"{folder}: {kept} subjects, {pretty_bytes(size)}{of_others}{rest}",
        {"folder": str(folder), "subjects": kept, "bytes": size, "removed": removed},
    )
    report.end()


def _dataset(name: str) -> Any:
    module, colon, attribute = name.partition(":")
    if not module or not colon:
        raise ModeError(f"the data set is {name!r}: it must be package.module:name, of a data set or of a function that makes it")
    find_modules_here()
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise SubjectError(f"there is no data set {name}: {error}") from error
    return found() if callable(found) and not hasattr(found, "__getitem__") else found


def tell_status(outputs: list[Path], picture: Path | None, report: Report) -> None:
    """Say of results, or of all in a folder, how far their runs are."""
    for path in _all_results(outputs):
        text, entry = _status(path)
        if picture is not None and (found := status_of(path)) is not None:
            draw_parts(found.boxes, found.numbers, set(found.failed), picture)
            text, entry["picture"] = f"{text}; {picture}", str(picture)
        elif picture is not None and path in outputs:
            raise ModeError(f"{path} is {text}, and not in parts, which a picture would show: leave out --picture")
        report.answer(f"{path}: {text}", {"target": str(path), **entry})
    report.end()


def _all_results(outputs: list[Path]) -> list[Path]:
    """Give results, in place of folders those in them: what is complete, and what is begun.

    Raises:
        ModeError: if there is none in a folder.
    """
    found: list[Path] = []
    for path in outputs:
        is_folder = path.is_dir() and not is_folder_target(path)
        inside = sorted(_results_in(path)) if is_folder else [path]
        if not inside:
            raise ModeError(f"{path} is a folder in which no prediction has been begun: name a result, or the folder of results")
        found += inside
    return found


def _results_in(folder: Path) -> set[Path]:
    found: set[Path] = set()
    for path in folder.iterdir():
        if path.is_symlink() and path.is_dir():
            continue  # it may lead back
        if path.name.startswith("."):
            found.update(targets_of_records(path) if path.is_dir() else targets_of_log(path))
        elif path.is_dir() and not is_folder_target(path):
            found |= _results_in(path)
        elif (format_of(path) is not None or is_folder_target(path)) and read_sidecar(sidecar_of(path)) is not None:
            found.add(path)
    return found


def _status(path: Path) -> tuple[str, dict[str, Any]]:
    parts = status_of(path)
    if parts is not None:
        left = "" if parts.seconds_left is None or parts.done == parts.total else f", about {parts.seconds_left:.0f} s to go"
        failed = f"; {len(parts.failed)} failed: {', '.join(map(str, parts.failed))}" if parts.failed else ""
        published = "; it is being published" if parts.is_published else ""
        entry = {
            "state": "publishing" if parts.is_published else "in parts",
            "done": parts.done,
            "total": parts.total,
            "seconds": parts.seconds,
            "seconds_of_parts": parts.seconds_of_parts,
            "seconds_left": parts.seconds_left,
            "failed": {str(number): text for number, text in parts.failed.items()},
        }
        return f"{parts.done} of {parts.total} parts are done{left}{failed}{published}", entry
    progress = progress_of(path)
    if progress is not None:
        done, total = progress
        text = f"{done} of {total} slabs are finished; the same command goes on from there"
        return text, {"state": "unfinished", "done": done, "total": total}
    if not path.exists():
        return "not begun", {"state": "not begun"}
    is_ours = read_sidecar(sidecar_of(path)) is not None
    return ("complete", {"state": "complete"}) if is_ours else ("there, but nothing says how it was made", {"state": "unknown"})


def try_again(outputs: list[Path], report: Report) -> None:
    """Forget which parts of results failed, or of all in a folder."""
    for path in _all_results(outputs):
        if path in outputs and status_of(path) is None:
            raise ModeError(f"{path} is no result in parts: there is nothing that could be tried again")
        count = forget_failures(path)
        report.done(f"{path}: {count} parts that failed are tried again by the next that computes it", {"target": str(path)})
    report.end()
