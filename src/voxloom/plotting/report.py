"""A page for each predicted case: three planes with what was found, volumes of labels, the plan, and how it was made."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..core.boxes import Box
from ..core.walking import walk
from ..errors import SaveError
from ..io.labels import Label, color_of
from ..io.protocols import read_checked
from ..io.writing.saving import write_safely
from ..volumes.constants import LABEL
from ..volumes.images.image import Image
from .comparison import require_matplotlib
from .planes import plot_image, plot_images

__all__ = ["CaseReport", "check_page", "write_index", "write_report"]

# Voxels of a label map that are counted at a time.
CHUNK_VOXELS = 2**22
# By which pages are known that may be replaced.
GENERATOR = "<meta name='generator' content='voxloom'>"
STYLE = """
body { font-family: system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1c2430; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
img { max-width: 100%; } table { border-collapse: collapse; } td, th { padding: .25rem .8rem; text-align: left; }
td.number { text-align: right; font-variant-numeric: tabular-nums; } tr:nth-child(even) { background: #f2f5f8; }
pre { background: #f2f5f8; padding: .8rem; white-space: pre-wrap; } .swatch { display: inline-block; width: 1rem; height: 1rem; }
"""


@dataclass(frozen=True)
class CaseReport:
    """What a page says of a case."""

    name: str
    image: Image
    """What the model was applied to."""
    result: Image
    """What came of it, on the same grid or another."""
    plan: str
    seconds: float | None
    """None for a result that was there already."""
    labels: Sequence[Label] = ()
    """What the numbers of the result mean."""


def write_report(path: Path, report: CaseReport) -> None:
    """Write the page of a case, which needs no other file; see `check_page`.

    Raises:
        MissingDependencyError: if matplotlib is not installed.
        SaveError: if it could not be written.
    """
    require_matplotlib()
    named = {label.value: label for label in report.labels}
    is_labels = report.result.type == LABEL
    counts = _counts(report.result) if is_labels else {}
    table = ""
    if is_labels:
        rows = _rows(counts, named, float(abs(np.linalg.det(report.result.affine[:3, :3]))) / 1000)
        heads = "".join(f"<th>{each}</th>" for each in ("", "label", "name", "voxels", "ml"))
        table = f"<h2>Labels</h2><table><tr>{heads}</tr>{''.join(rows)}</table>"
    took = "" if report.seconds is None else f"<p>It took {report.seconds:.1f} s.</p>"
    text = (
        f"<h1>{html.escape(report.name)}</h1>"
        f"<img alt='three planes of the image and the result' src='{_picture(report, counts)}'/>{table}"
        f"<h2>Plan</h2><pre>{html.escape(report.plan)}</pre>{took}"
        f"<h2>Image</h2><pre>{html.escape(repr(report.image))}</pre>"
        f"<h2>Result</h2><pre>{html.escape(repr(report.result))}</pre>"
    )
    write_safely(path, _page(report.name, text))


def write_index(path: Path, pages: Mapping[str, str]) -> None:
    """Write a page with a link for each case, by its name."""
    links = "".join(f"<li><a href='{html.escape(page)}'>{html.escape(name)}</a></li>" for name, page in pages.items())
    write_safely(path, _page("Predicted cases", f"<h1>Predicted cases</h1><ul>{links}</ul>"))


def check_page(path: Path, overwrite: bool) -> None:
    """Check that a page may be written: where there is nothing, or one of voxloom's.

    Raises:
        SaveError: if something else is there.
    """
    if path.is_dir():
        raise SaveError(f"{path} is a folder, where a page would be written: remove it, or choose another output")
    if path.exists() and not overwrite:
        with path.open("rb") as file:
            head = file.read(1000)
        if GENERATOR.encode() not in head:
            raise SaveError(f"{path} exists, and is no page of voxloom's: remove it, or give --overwrite")


def _page(title: str, body: str) -> str:
    head = f"<meta charset='utf-8'>{GENERATOR}<title>{html.escape(title)}</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{body}</body></html>\n"


def _counts(result: Image) -> dict[int, int]:
    """Count the voxels of each label but 0, part by part."""
    counts: dict[int, int] = {}
    for box in walk(Box.of_shape(result.spatial_shape), result.chunks, CHUNK_VOXELS):
        values, found = np.unique(read_checked(result, box).numpy(), return_counts=True)
        for value, count in zip(values.tolist(), found.tolist(), strict=True):
            if value:
                counts[int(value)] = counts.get(int(value), 0) + count
    return dict(sorted(counts.items()))


def _rows(counts: Mapping[int, int], named: Mapping[int, Label], millilitres: float) -> list[str]:
    rows = []
    for value in sorted({*counts, *named} - {0}):  # which is not counted
        red, green, blue = color_of(named.get(value, Label(max(value, 0), str(value))))
        count = counts.get(value, 0)
        rows.append(
            f"<tr><td><span class='swatch' style='background:rgb({red},{green},{blue})'></span></td><td>{value}</td>"
            f"<td>{html.escape(named[value].name if value in named else '')}</td><td class='number'>{count:,}</td>"
            f"<td class='number'>{count * millilitres:.2f}</td></tr>"
        )
    return rows


def _picture(report: CaseReport, counts: Mapping[int, int]) -> str:
    """Draw the planes through the middle of the largest label, or of the image; as the address of a picture."""
    image, result = report.image, report.result
    is_same = image.spatial_shape == result.spatial_shape and np.allclose(image.affine, result.affine, atol=1e-3)
    largest = max(counts, key=lambda value: counts[value], default=None)
    if counts and is_same:
        figure = plot_image(image, result, label=largest, meanings=report.labels)
    elif is_same:
        figure = plot_images({"image": image, "result": result})
    else:  # on another grid
        figure = plot_images({"result": result}, label=largest, meanings=report.labels)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
