"""Cases that are predicted: one after the other, or the parts of many together."""

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from ..errors import ModeError, RecordError, SizeError, TargetExistsError, VoxloomError
from ..inference import Launcher, Predictor
from ..inference.parts.shards import ShardedRun
from ..models.loading import LoadedModel
from ..plotting.comparison import require_matplotlib
from ..plotting.report import CaseReport, check_page, write_index, write_report
from ..runs.log import left_behind
from ..runs.parts import is_being_published
from ..volumes.images.image import LabelMap, ScalarImage
from ..volumes.subject import Subject
from .applied import predictor_of
from .cases import DEFAULT_ENDING, TARGETS, Case, Results, beside, cases_of, cases_of_table, make_folder_of
from .labels import check_labels, write_labels
from .options import CaseOptions, ModelOptions, PartsOptions
from .others import cases_of_other, names_channels
from .parts import compute_share, launcher
from .reporting import Report, printable

__all__ = ["asked_of", "cases_wanted", "predict_cases", "subject_of"]

# Of so many cases the parts are computed together: workers need something to do, and until all are done parts lie on the disk.
TOGETHER = 64


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
    if wanted.per_label and options.channels is not None:
        raise ModeError("--per-label is for label maps, and --channels gives scores: give --labels, or leave one out")
    with launcher(parts) as executor:
        cases = cases_wanted(wanted, options.model)
        predictor, model = predictor_of(options, executor)
        if with_pages:
            require_matplotlib()
        if wanted.label_table and not predictor.spec.labels:
            raise ModeError(
                "--label-table: the model's spec names no labels; give a --spec with 'labels', see voxloom info MODEL"
            )
        if executor is not None:
            cases = [case.from_anywhere() for case in cases]
        Predictions(predictor, model, cases, wanted, parts, executor, resume, overwrite, with_pages, report).make()


def cases_wanted(wanted: CaseOptions, model: str) -> list[Case]:
    """Give the cases that were named.

    Raises:
        SizeError: if they were named in no way, or in two.
    """
    if bool(wanted.images) == (wanted.table is not None):
        raise SizeError("give either images or a --table of cases")
    wanted.check()
    results = Results.of(wanted.output, wanted.format, DEFAULT_ENDING, TARGETS)
    if wanted.table is not None:
        return cases_of_table(wanted.table, results)
    images = wanted.images or []
    group = True if wanted.group is None and names_channels(model) else wanted.group
    return cases_of_other(model, images, results) or cases_of(images, results, group)


def asked_of(wanted: CaseOptions, subject: Subject, case: Case) -> dict[str, Any]:
    """Give what a predictor is asked for, beside the image."""
    return {
        "image_name": list(subject.images),
        "output": case.target,
        "resample_to": wanted.resample_to,
        "like": wanted.like,
        "mask": wanted.where,
    }


def subject_of(case: Case, model: LoadedModel, predictor: Predictor) -> Subject:
    """Make a subject of a case, and check that a model takes as many channels.

    Raises:
        SizeError: if it takes another number.
    """
    subject = case.subject(predictor.spec.channels)
    channels = sum(image.num_channels for image in subject.images.values())
    if model.channels not in (None, channels):
        raise SizeError(
            f"{', '.join(map(str, case.files))} has {channels} channel{'s' if channels > 1 else ''}, but the model takes"
            f" {model.channels}: give as many, in one file or in the columns of a --table"
        )
    return subject


@dataclass(eq=False)
class Predictions:
    """What is made of cases, and what has been made of them."""

    predictor: Predictor
    model: LoadedModel
    cases: Sequence[Case]
    wanted: CaseOptions
    parts: PartsOptions
    executor: Launcher | None
    resume: bool
    overwrite: bool
    with_pages: bool
    report: Report
    done: int = 0
    complete: int = 0
    failed: list[str] = field(default_factory=list)
    pages: dict[str, str] = field(default_factory=dict)
    together: dict[int, ShardedRun] = field(default_factory=dict)
    """What has been computed together, and is still to be published, by the numbers of the cases."""
    waited_for: dict[str, tuple[ShardedRun, str, dict[str, Any]]] = field(default_factory=dict)
    """What other jobs are publishing, which is waited for when there is nothing else to do; and what is said of it then."""

    def make(self) -> None:
        """Predict all of them, and say in the end how many failed, also by the exit code."""
        if self.with_pages:
            self._check_pages()
        for case in self.cases:
            check_labels(case.target, self.wanted, self.predictor.spec.labels, self.overwrite)
        for number, case in enumerate(self.cases):
            with self._reporting(case.name):
                if self.executor is not None and len(self.cases) > 1 and number % TOGETHER == 0:
                    self._compute_together(range(number, min(number + TOGETHER, len(self.cases))), self.executor)
                self._make(number, case)
        for name, (run, text, entry) in self.waited_for.items():
            with self._reporting(name):
                run.publish()
                self.done += 1
                self.report.done(text, entry)
        if len(self.pages) > 1:
            write_index(self._index, self.pages)
        if len(self.cases) > 1:
            listed = "".join(f"\n  {name}" for name in self.failed)
            self.report.say(f"{self.done} done, {self.complete} complete already, {len(self.failed)} failed{listed}")
        self.report.end()
        if self.failed:
            raise typer.Exit(1)

    @property
    def _index(self) -> Path:
        return self.wanted.output / "index.html"

    def _check_pages(self) -> None:
        """Check, before anything is computed, that no page would replace a file of others.

        Raises:
            SaveError: names the first that would.
        """
        pages = [beside(case.target, ".html") for case in self.cases]
        for page in [*pages, *([self._index] if len(pages) > 1 else [])]:
            check_page(page, self.overwrite)

    @contextlib.contextmanager
    def _reporting(self, name: str) -> Iterator[None]:
        """Report what happens to a case: one that fails must not stop the others."""
        try:
            yield
        except KeyboardInterrupt:
            self.report.warn(f"{name}: interrupted; the same command goes on from what is finished")
            raise typer.Exit(130) from None
        except Exception as error:  # noqa: BLE001 - by whatever
            self.failed.append(name)
            self.report.failed(name, error, isinstance(error, VoxloomError | OSError))

    def _make(self, number: int, case: Case) -> None:
        began = time.monotonic()
        subject = subject_of(case, self.model, self.predictor)
        entry: dict[str, Any] = {"case": case.name, "files": [str(path) for path in case.files], "target": str(case.target)}
        text = f"{case.name}: {case.target}"
        if self.parts.shard is not None and (share := self._share(number, subject, case)) is not None:
            computed, run = share
            if run.is_whole() and run.published() is None:
                self.waited_for[case.name] = run, f"{text}: done", entry | {"state": "done"}
                return
            state = "done" if run.is_whole() else f"{computed} parts computed; {len(run.done())} of {len(run)} are done"
            self.done += 1
            self.report.done(f"{text}: {state}", entry | {"state": state})
            return
        # What was computed together with others took no time of its own.
        is_timed = number not in self.together
        is_new = self.parts.shard is None and self._predicted(number, subject, case)
        if is_new:
            self.done += 1
        else:
            self.complete += 1
            rest = left_behind(case.target)
            of_rest = "" if rest is None else f"; {rest} is left of a run that was interrupted: --overwrite resumes it"
            text += f" is complete{of_rest}"
        entry["state"] = "done" if is_new else "complete"
        if self.wanted.per_label or self.wanted.label_table:
            others = write_labels(case.target, self.wanted, self.predictor.spec.labels, is_new, self.overwrite)
            text, entry["labels"] = "; ".join([text, *map(str, others)]), [str(path) for path in others]
        if self.with_pages:
            page = self._write_page(subject, case, time.monotonic() - began if is_new and is_timed else None)
            text, entry["report"] = f"{text}; {page}", str(page)
        self.report.done(text, entry)

    def _share(self, number: int, subject: Subject, case: Case) -> tuple[int, ShardedRun] | None:
        """Compute a job's share of a case; None where the result is there."""
        if self._is_made(subject, case, may_be_other=self.overwrite):
            return None
        asked, place = asked_of(self.wanted, subject, case), (number, len(self.cases))
        try:
            return compute_share(self.predictor, subject, asked, self.parts, place, self.overwrite, self.report, case.name)
        except TargetExistsError:  # made by other jobs meanwhile
            if not self._is_made(subject, case):
                raise
            return None

    def _predicted(self, number: int, subject: Subject, case: Case) -> bool:
        """Predict a case, or publish what has been computed of it; whether that was needed."""
        run = self.together.pop(number, None)
        if run is not None:
            run.publish()
            return True
        if not self.overwrite and self._is_made(subject, case):
            return False
        progress = printable(case.name) if self._shows_progress else False
        logging.getLogger("voxloom").info("%s", printable(", ".join(map(str, case.files))))
        asked = asked_of(self.wanted, subject, case)
        is_published = is_being_published(case.target)
        try:
            if is_published:
                self.predictor.shards(subject, **asked, overwrite=self.overwrite).publish()
            else:
                self.predictor(subject, **asked, resume=self.resume, overwrite=self.overwrite, progress=progress)
        except (RecordError, TargetExistsError):
            # What is there may be what is to be replaced, unless it has just been published.
            if (self.overwrite and not is_published) or not self._is_made(subject, case):
                raise
            return False  # another process has ended it meanwhile
        return True

    def _compute_together(self, numbers: range, executor: Launcher) -> None:
        """Have the parts of several cases computed, so that all workers have something to do."""
        calls = []
        self.together.clear()
        for number in numbers:
            case = self.cases[number]
            # What cannot be begun fails once more when its turn comes, and is reported then.
            with contextlib.suppress(Exception):
                subject = subject_of(case, self.model, self.predictor)
                if not self._is_made(subject, case, may_be_other=self.overwrite) or self.overwrite:
                    asked = asked_of(self.wanted, subject, case)
                    call = {"image": subject, **asked, "overwrite": self.overwrite, "shard_size": executor.shard_size}
                    run = self.predictor.shards(**call)
                    run.join()
                    self.together[number] = run
                    calls.append(call)
        self.predictor.compute_parts(calls, list(self.together.values()), progress=self._shows_progress)

    @property
    def _shows_progress(self) -> bool:
        return not self.report.quiet and not self.report.as_json

    def _is_made(self, subject: Subject, case: Case, may_be_other: bool = False) -> bool:
        """Whether the result of a case is there, and of this model; its folder is made if need be.

        Args:
            subject: the case's.
            case: where it goes.
            may_be_other: whether a result of something else is one that is to be replaced, rather than an error.
        """
        make_folder_of(case.target)
        try:
            return self.predictor.is_made(subject, **asked_of(self.wanted, subject, case))
        except TargetExistsError:
            if may_be_other:
                return False
            raise

    def _write_page(self, subject: Subject, case: Case, seconds: float | None) -> Path:
        """Write the page of a case, beside its result."""
        plan = self.predictor.plan(subject, **asked_of(self.wanted, subject, case))
        kind = LabelMap if plan.results[0].volume.is_labels else ScalarImage
        image = next(iter(subject.images.values()))
        found = CaseReport(case.name, image, kind(case.target), str(plan), seconds, self.predictor.spec.labels)
        page = beside(case.target, ".html")
        write_report(page, found)
        of = self.wanted.output if self.wanted.output.is_dir() else self.wanted.output.parent
        self.pages[case.name] = os.path.relpath(page, of)
        return page
