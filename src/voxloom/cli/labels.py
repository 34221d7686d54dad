"""What is written beside a label map that was predicted: a file for each label, and a table of what they mean."""

from collections.abc import Sequence
from pathlib import Path

from ..errors import SaveError
from ..io.labels import Label
from ..volumes.images.image import LabelMap
from ..volumes.label_files import PER_LABEL, is_split_of, label_table, split_labels, write_label_table
from .cases import as_ending, beside
from .options import CaseOptions
from .reporting import Report

__all__ = ["split", "write_labels"]


def split(image: Path, output: Path, ending: str, overwrite: bool, report: Report) -> None:
    """Write a file for each label of a label map."""
    progress = False if report.quiet or report.as_json else image.name
    made = split_labels(LabelMap(image), output, ending=as_ending(ending, PER_LABEL), overwrite=overwrite, progress=progress)
    report.done(f"{image}: {len(made)} labels in {output}", {"file": str(image), "target": str(output), "labels": list(made)})
    report.end()


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
        if path.exists() and path.read_bytes() != label_table(labels).encode() and not overwrite:
            raise SaveError(f"{path} exists, and is another table: remove it, or give --overwrite")
        write_label_table(labels, path)
        made.append(path)
    if wanted.per_label:
        folder = beside(target, "_labels")
        if not is_split_of(folder, target):
            ending = next((each for each in PER_LABEL if target.name.endswith(each)), ".nii.gz")
            if folder.exists() and not (is_new or overwrite):
                raise SaveError(f"{folder} was made of another label map than {target.name}: remove it, or give --overwrite")
            split_labels(LabelMap(target), folder, ending=ending, overwrite=is_new or overwrite)
        made.append(folder)
    return made
