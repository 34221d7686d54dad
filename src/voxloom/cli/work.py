"""What the commands do, once it is known what was asked for."""

import contextlib
import logging
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import typer
from tqdm.auto import tqdm

from ..core.sizes import pretty_sizes
from ..datasets import HeadPhantom
from ..errors import MissingDependencyError, ModeError, SaveError, SizeError, TargetExistsError, VoxloomError
from ..inference import Launcher, Predictor
from ..inference.shards import ShardedRun
from ..inference.spreading import published
from ..io.formats import is_folder_target
from ..io.labels import Label
from ..models.loading import LoadedModel, load_model
from ..models.packing import pack_model
from ..models.spec import ModelSpec
from ..plotting.comparison import require_matplotlib, save_comparison
from ..plotting.report import CaseReport, write_index, write_report
from ..runs.log import left_behind
from ..volumes.image import LabelMap, ScalarImage
from ..volumes.subject import Subject
from .applied import predictor_of
from .cases import TARGETS, Case, Results, as_ending, beside, cases_of, cases_of_table
from .demo import run_demo
from .labels import write_labels
from .options import CaseOptions, ModelOptions, PartsOptions
from .others import cases_of_other, names_channels
from .parts import compute_share, launcher
from .reporting import Report, printable
from .whole_way import run_whole_way

# So many cases are computed before the first of them is published: workers need something to do, and parts lie on the disk.
AHEAD = 64

__all__ = ["describe", "make_folder", "pack", "plan_cases", "predict_cases", "show"]


def predict_cases(
    options: ModelOptions,
    wanted: CaseOptions,
    parts: PartsOptions,
    resume: bool,
    overwrite: bool,
    with_pages: bool,
    report: Report,
) -> None:
    """Predict all cases; one that fails does not stop the others."""
    if parts.is_given and not resume:
        raise ModeError("--no-resume is not for predictions in parts: remove the folder .STEM.shards beside the result instead")
    whole = {"--report": with_pages, "--per-label": wanted.per_label, "--label-table": wanted.label_table}
    asked = [name for name, is_given in whole.items() if is_given]
    if parts.shard is not None and asked:
        raise ModeError(f"{asked[0]} is not for one share: give it with the same command without --shard, when all is done")
    with launcher(parts) as executor:
        _predict_cases(options, wanted, parts, executor, resume, overwrite, with_pages, report)


def _predict_cases(
    options: ModelOptions,
    wanted: CaseOptions,
    parts: PartsOptions,
    executor: Any,
    resume: bool,
    overwrite: bool,
    with_pages: bool,
    report: Report,
) -> None:
    cases = _cases(wanted, options.model)
    predictor, model = predictor_of(options, executor)
    done, skipped, failed = 0, 0, []
    pages: dict[str, str] = {}
    if with_pages:
        require_matplotlib()
    if wanted.label_table and not predictor.spec.labels:
        raise ModeError("--label-table: the model's spec names no labels; give a --spec with 'labels', see voxloom info MODEL")
    ahead: dict[int, ShardedRun] = {}
    for number, case in enumerate(cases):
        began = time.monotonic()
        entry: dict[str, Any] = {"case": case.name, "files": [str(path) for path in case.files], "target": str(case.target)}
        case = case if executor is None else case.from_anywhere()
        try:
            if executor is not None and len(cases) > 1 and number % AHEAD == 0:
                group = dict(enumerate(cases[number : number + AHEAD], number))
                ahead = _computed_ahead(predictor, model, group, wanted, executor, overwrite, report)
            subject = _subject(case, model, predictor)
            if parts.shard is not None and not _is_made(predictor, subject, case, wanted, may_be_other=overwrite):
                asked, place = _asked(wanted, subject, case), (number, len(cases))
                state = compute_share(predictor, subject, asked, parts, place, overwrite, report, case.name)
                done += 1
                report.done(f"{case.name}: {case.target}: {state}", entry | {"state": state})
                continue
            is_ahead = number in ahead
            if is_ahead:
                published(ahead.pop(number))
            if is_ahead or _predict_case(predictor, subject, case, wanted, resume, overwrite, report):
                done += 1
                text, entry["state"] = f"{case.name}: {entry['target']}", "done"
            else:
                skipped += 1
                rest = left_behind(case.target)
                of_rest = "" if rest is None else f"; {rest} is left of a run that was interrupted: --overwrite resumes it"
                text, entry["state"] = f"{case.name}: {case.target} is complete{of_rest}", "complete"
            if wanted.per_label or wanted.label_table:
                others = write_labels(case.target, wanted, predictor.spec.labels, entry["state"] == "done", overwrite)
                text, entry["labels"] = "; ".join([text, *map(str, others)]), [str(path) for path in others]
            if with_pages:
                # What was computed together with others took no time of its own.
                seconds = time.monotonic() - began if entry["state"] == "done" and not is_ahead else None
                page = _write_page(case, subject, predictor, wanted, seconds)
                pages[case.name] = os.path.relpath(page, wanted.output if wanted.output.is_dir() else wanted.output.parent)
                text, entry["report"] = f"{text}; {page}", str(page)
            report.done(text, entry)
        except KeyboardInterrupt:
            report.warn(f"{case.name}: interrupted; the same command goes on from what is finished")
            raise typer.Exit(130) from None
        except Exception as error:  # noqa: BLE001 - one case that fails, by whatever, must not stop the others
            failed.append(case.name)
            report.failed(case.name, error, isinstance(error, VoxloomError | OSError))
    if len(pages) > 1:
        write_index(wanted.output / "index.html", pages)
    if len(cases) > 1:
        listed = "".join(f"\n  {name}" for name in failed)
        report.say(f"{done} done, {skipped} complete already, {len(failed)} failed{listed}")
    report.end()
    if failed:
        raise typer.Exit(1)


def _write_page(
    case: Case,
    subject: Subject,
    predictor: Predictor,
    wanted: CaseOptions,
    seconds: float | None,
) -> Path:
    """Write the page of a case, beside its result."""
    plan = predictor.plan(subject, **_asked(wanted, subject, case))
    kind = LabelMap if plan.results[0].volume.is_labels else ScalarImage
    image = next(iter(subject.images.values()))
    found = CaseReport(case.name, image, kind(case.target), str(plan), seconds, predictor.spec.labels)
    path = beside(case.target, ".html")
    write_report(path, found)
    return path


def plan_cases(
    options: ModelOptions,
    wanted: CaseOptions,
    report: Report,
) -> None:
    """Say what predicting would do."""
    cases = _cases(wanted, options.model)
    predictor, model = predictor_of(options)
    failed = False
    for case in cases:
        try:
            subject = _subject(case, model, predictor)
            found = predictor.plan(subject, **_asked(wanted, subject, case))
            numbers = {
                "patches": found.num_patches,
                "forward_passes": found.forward_passes,
                "blocks": found.num_blocks,
                "peak_bytes": found.peak_bytes,
            }
            entry = {"case": case.name, "target": str(case.target), **numbers, "plan": found.to_json(), "text": str(found)}
            report.answer(f"{case.name}\n{found}\n" if len(cases) > 1 else str(found), entry)
        except Exception as error:  # noqa: BLE001 - see above
            report.failed(case.name, error, isinstance(error, VoxloomError | OSError))
            failed = True
    report.end()
    if failed:
        raise typer.Exit(1)


def _cases(wanted: CaseOptions, model: str) -> list[Case]:
    if bool(wanted.images) == (wanted.table is not None):
        raise SizeError("give either images or a --table of cases")
    wanted.check()
    results = Results(wanted.output, as_ending(wanted.format, TARGETS))
    if wanted.table is not None:
        return cases_of_table(wanted.table, results)
    images = wanted.images or []
    group = True if wanted.group is None and names_channels(model) else wanted.group
    return cases_of_other(model, images, results) or cases_of(images, results, group)


def _asked(wanted: CaseOptions, subject: Subject, case: Case) -> dict[str, Any]:
    """Give what a predictor is asked for, beside the image."""
    return {
        "image_name": list(subject.images),
        "output": case.target,
        "resample_to": wanted.resample_to,
        "like": wanted.like,
        "mask": wanted.where,
    }


def _subject(case: Case, model: LoadedModel, predictor: Predictor) -> Subject:
    """Make a subject of a case, and check that a model takes as many channels."""
    subject = case.subject(predictor.spec.channels)
    channels = sum(image.num_channels for image in subject.images.values())
    if model.channels not in (None, channels):
        raise SizeError(
            f"{', '.join(map(str, case.files))} has {channels} channel{'s' if channels > 1 else ''}, but the model takes"
            f" {model.channels}: give as many, in one file or in the columns of a --table"
        )
    return subject


def _predict_case(
    predictor: Predictor, subject: Subject, case: Case, wanted: CaseOptions, resume: bool, overwrite: bool, report: Report
) -> bool:
    """Predict a case, unless its result is there."""
    asked = _asked(wanted, subject, case)
    if not overwrite and _is_made(predictor, subject, case, wanted):
        return False
    progress = False if report.quiet or report.as_json else printable(case.name)
    logging.getLogger("voxloom").info("%s", printable(", ".join(map(str, case.files))))
    predictor(subject, **asked, resume=resume, overwrite=overwrite, progress=progress)
    return True


def _computed_ahead(
    predictor: Predictor,
    model: LoadedModel,
    cases: Mapping[int, Case],
    wanted: CaseOptions,
    executor: Launcher,
    overwrite: bool,
    report: Report,
) -> dict[int, ShardedRun]:
    """Have the parts of several cases computed, so that all workers have something to do; give what is left to be published.

    What cannot be begun is left to whoever predicts the case, and says why.
    """
    calls, runs = [], {}
    for number, case in cases.items():
        with contextlib.suppress(Exception):
            case = case.from_anywhere()
            subject = _subject(case, model, predictor)
            is_made = _is_made(predictor, subject, case, wanted, may_be_other=overwrite)
            if overwrite or not is_made:
                asked = _asked(wanted, subject, case) | {"overwrite": overwrite, "shard_size": executor.shard_size}
                call = {"image": subject, **asked}
                runs[number] = predictor.shards(**call)
                calls.append(call)
    predictor.compute_parts(calls, list(runs.values()), progress=not report.quiet and not report.as_json)
    return runs


def _is_made(predictor: Predictor, subject: Subject, case: Case, wanted: CaseOptions, may_be_other: bool = False) -> bool:
    """Whether the result of a case is there, and of this model; its folder is made if need be.

    Args:
        predictor: the model, and how it is applied.
        subject: the case.
        case: where it goes.
        wanted: what is asked for.
        may_be_other: whether a result of something else is one that is to be replaced, rather than an error.
    """
    if not is_folder_target(case.target) or case.target.parent.name != "labels":
        make_folder(case.target.parent)
    try:
        return predictor.is_made(subject, **_asked(wanted, subject, case))
    except TargetExistsError:
        if may_be_other:
            return False
        raise


def describe(files: list[Path], allow_pickle: bool, report: Report) -> None:
    """Say what images and models are."""
    failed = False
    for path in files:
        try:
            lines = _description(path, allow_pickle)
            text = "\n".join([str(path), *(f"  {name + ':':<13}{value}" for name, value in lines.items())])
            report.answer(text, {"file": str(path), **lines})
        except VoxloomError as error:
            report.warn(f"voxloom: {error}")
            failed = True
    report.end()
    if failed:
        raise typer.Exit(1)


def _description(path: Path, allow_pickle: bool) -> dict[str, str]:
    if path.suffix.lower() in (".pt2", ".pt", ".ts", ".pth"):
        loaded = load_model(str(path), allow_pickle=allow_pickle)
        least = loaded.least_batch_size()
        free = "any" if least == 1 else f"{least} or more"
        said = "none: raw intensities, native grid" if loaded.spec is None else str(loaded.spec).replace("\n", "\n  ")
        return {"batch size": str(loaded.batch_size or free), "patch size": pretty_sizes(loaded.patch_size), "spec": said}
    image = ScalarImage(path)
    size = image.memory / 2**20
    return {
        "shape": f"{image.spatial_shape}, {image.num_channels} channel{'s' if image.num_channels > 1 else ''}",
        "type": f"{image.dtype}, {size:.1f} MiB in memory".replace("torch.", ""),
        "spacing": f"({', '.join(f'{value:.4g}' for value in image.spacing)}) mm",
        "orientation": f"{''.join(image.orientation)}+",
        "origin": f"({', '.join(f'{value:.4g}' for value in image.origin)}) mm",
        "read": "in parts" if image.can_be_sliced else "as a whole",
    }


def pack(model: str, spec: Path, output: Path, weights: Path | None, allow_pickle: bool, overwrite: bool, report: Report) -> None:
    """Put a model and its spec into one file."""
    pack_model(model, ModelSpec.read(spec), output, weights, allow_pickle, overwrite)
    report.say(f"{output}: {model} with {spec}")


def show(image: Path | None, output: Path, size: int, patch_size: int, patch_overlap: int, overlap_mode: str, steps: int) -> None:
    """Apply a small network to an image as a whole and patch by patch, and show both; and train one, and predict with it."""
    make_folder(output)
    scan = HeadPhantom(size).t1 if image is None else ScalarImage(image)
    typer.echo(f"Input: {scan}")
    result = run_demo(scan, patch_size, patch_overlap, overlap_mode, output, _progress)
    typer.echo(f"Patches: {result.sampler}")
    picture = output / "result.png"
    title = f"{image.name if image else 'synthetic head'}: a network applied patch by patch, overlap mode '{overlap_mode}'"
    try:
        require_matplotlib()
        save_comparison(
            picture, result.image.data, result.whole, result.patched, result.sampler.grid, result.image.spacing, title
        )
        drawn = str(picture.resolve())
    except MissingDependencyError as error:
        drawn = f"none: {error}"
    typer.echo(
        f"Greatest difference between the whole and the patches: {result.greatest_difference:.3g}"
        f" (values reach {result.greatest_value:.4g})"
    )
    typer.echo(f"Model:   {result.model_file.resolve()}")
    typer.echo(f"Volume:  {(output / 'result.nii.gz').resolve()}\nPicture: {drawn}")
    overlap = ",".join(str(axis.patch - axis.stride) for axis in result.sampler.grid.axes)
    options = f"--overlap {overlap} --mode {overlap_mode} -o {output / 'again.nii.gz'}"
    typer.echo(f"Again:   voxloom predict {result.model_file} {result.image_file} {options}")
    if steps:
        _show_whole_way(output, steps)


def _show_whole_way(output: Path, steps: int) -> None:
    typer.echo(f"\nA small U-Net learns the labels of the synthetic head from {steps} batches of patches:")
    made = run_whole_way(output, steps, lambda batches, count: tqdm(batches, total=count, unit="batch"))
    typer.echo(f"Loss:    {made.losses[0]:.2f} at first, {made.losses[-1]:.2f} in the end")
    typer.echo(f"Plan for a scan that it has not seen:\n{made.plan}")
    found = ", ".join(f"{name} {score:.2f}" for name, score in made.dice.items())
    typer.echo(f"Dice of its labels: {found}")
    typer.echo(f"Model:   {made.model_file.resolve()}\nLabels:  {made.label_file.resolve()}")
    try:
        page = made.label_file.with_suffix("").with_suffix(".html")
        labels = [Label(value, name) for value, name in HeadPhantom.names.items()]
        scan = ScalarImage(made.scan_file)
        write_report(page, CaseReport("head", scan, made.labels, made.plan, made.seconds, labels))
        typer.echo(f"Page:    {page.resolve()}")
    except MissingDependencyError as error:
        typer.echo(f"Page:    none: {error}")
    typer.echo(f"Again:   voxloom predict {made.model_file} {made.scan_file} -o {output / 'again_labels.nii.gz'}")


def make_folder(path: Path) -> None:
    """Make a folder for results.

    Raises:
        SaveError: if it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(f"the folder {path} cannot be made: {error.strerror}; give another one with --output") from error


def _progress(batches: Iterable) -> Iterable:
    return tqdm(batches, desc="Batches", unit="batch")
