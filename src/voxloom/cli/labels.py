"""What is written beside a label map that was predicted: a file for each label, and a table of what they mean."""

from collections.abc import Sequence
from pathlib import Path

from ..errors import SaveError
from ..io.labels import Label
from ..volumes.images.image import LabelMap
from ..volumes.label_files import PER_LABEL, is_split_of, is_untouched, label_table, split_labels, write_label_table
from .cases import as_ending, beside
from .options import CaseOptions
from .reporting import Report

__all__ = ["check_labels", "split", "write_labels"]


def split(image: Path, output: Path, ending: str, overwrite: bool, report: Report) -> None:
    """Write a file for each label of a label map."""
    progress = False if report.quiet or report.as_json else image.name
    made = split_labels(LabelMap(image), output, ending=as_ending(ending, PER_LABEL), overwrite=overwrite, progress=progress)
    report.done(f"{image}: {len(made)} labels in {output}", {"file": str(image), "target": str(output), "labels": list(made)})
    report.end()


def check_labels(target: Path, wanted: CaseOptions, labels: Sequence[Label], overwrite: bool) -> None:
    """Check, before anything is computed, that nothing would be replaced that is not stale.

    Raises:
        SaveError: says what would.
    """
    table, folder = beside(target, ".tsv"), beside(target, "_labels")
    if wanted.label_table:
        _check_table(table, labels, overwrite)
    if wanted.per_label and folder.exists() and not (overwrite or target.exists() or is_untouched(folder)):
        raise SaveError(f"{folder} holds what was not made here, or was changed since: move it away, or give --overwrite")


def write_labels(target: Path, wanted: CaseOptions, labels: Sequence[Label], is_new: bool, overwrite: bool) -> list[Path]:
    """Write what is wanted of a label map, and say where.

    Args:
        target: the label map.
        wanted: what is asked for.
        labels: what the model's spec says of its numbers.
        is_new: whether it has just been made, so that what was made of the one before is stale.
        overwrite: whether what is there may be replaced.
    """
    made = []
    if wanted.label_table:
        path = beside(target, ".tsv")
        _check_table(path, labels, overwrite)
        write_label_table(labels, path)
        made.append(path)
    if wanted.per_label:
        folder = beside(target, "_labels")
        is_kept = is_split_of(folder, target) and (not overwrite or is_untouched(folder))
        if not is_kept:
            ending = next((each for each in PER_LABEL if target.name.endswith(each)), ".nii.gz")
            may_replace = overwrite or (is_new and is_untouched(folder))
            if folder.exists() and not may_replace:
                raise SaveError(
                    f"{folder} was made of another label map than {target.name}, or was changed since: move it away, or give"
                    " --overwrite"
                )
            split_labels(LabelMap(target), folder, ending=ending, overwrite=may_replace)
        made.append(folder)
    return made


def _check_table(path: Path, labels: Sequence[Label], overwrite: bool) -> None:
    if path.exists() and path.read_bytes() != label_table(labels).encode() and not overwrite:
        raise SaveError(f"{path} exists, and is another table: remove it, or give --overwrite")
