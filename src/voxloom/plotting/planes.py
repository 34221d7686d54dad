"""Pictures of images: three planes through a place, as radiologists look at them, with labels on top."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..core.boxes import Box
from ..errors import SizeError, SubjectError, VoxloomError
from ..io.labels import Label, color_of
from ..io.protocols import read_checked
from ..volumes.constants import LABEL
from ..volumes.images.image import Image
from .comparison import require_matplotlib

__all__ = ["html_of", "html_of_batch", "picture_of", "plot_image", "plot_images"]

# Axis that is left out, the one to the right, the one upwards; and the letters at the left, right, lower and upper edge.
PLANES = (
    ("sagittal", 0, 1, 2, "P A I S"),
    ("coronal", 1, 0, 2, "R L I S"),
    ("axial", 2, 0, 1, "R L P A"),
)
# Of the values of a plane, these percentiles become black and white.
DARKEST, LIGHTEST = 0.5, 99.5
# Labels that a legend has room for.
MOST_IN_LEGEND = 24
# Subjects of a batch that are shown in a notebook.
MOST_OF_BATCH = 4
ALPHA = 0.55


def plot_image(
    image: Image,
    labels: Any = None,
    at: Any = None,
    label: int | None = None,
    channel: int = 0,
    output: Any = None,
    meanings: Sequence[Label] = (),
) -> Any:
    """Draw three planes of an image; see `Image.plot` and `plot_images`."""
    return plot_images({"": image}, labels, at, label, channel, output, meanings=meanings)


def plot_images(
    images: Mapping[str, Image],
    labels: Any = None,
    at: Any = None,
    label: int | None = None,
    channel: int = 0,
    output: Any = None,
    map_of_label: Image | None = None,
    meanings: Sequence[Label] = (),
) -> Any:
    """Draw three planes of each of several images on one grid, one below the other.

    Args:
        images: the images, by name.
        labels: a label map that is laid on top of all that are none.
        at: the voxel `(I, J, K)` that the planes go through; None for the middle, or that of a label.
        label: the label through whose middle the planes go.
        channel: which channel is drawn.
        output: name of a picture to write.
        map_of_label: in which map the label is looked for; by default the one on top, or else the first image.
        meanings: names and colours of labels.

    Returns:
        Figure of matplotlib.

    Raises:
        MissingDependencyError: if matplotlib is not installed.
        SizeError: if the place is not in the image.
        SubjectError: if there is no such label.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    first = next(iter(images.values()))
    place = _place(first, labels if map_of_label is None else map_of_label, at, label)
    figure = Figure(figsize=(10, 3.6 * len(images)), layout="constrained")
    rows = figure.subplots(len(images), 3, squeeze=False)
    shown: set[int] = set()
    named = {each.value: each for each in meanings}
    for axes, (name, image) in zip(rows, images.items(), strict=True):
        on_top = labels if image.type != LABEL else None
        shown |= _draw(axes, name, image, on_top, place, channel, named)
    if shown:
        _add_legend(figure, sorted(shown), named)
    if output is not None:
        figure.savefig(Path(output).expanduser(), dpi=120)
    return figure


def _place(image: Image, labels: Image | None, at: Any, label: int | None) -> tuple[int, ...]:
    """Say through which voxel of an image the planes go."""
    shape = image.spatial_shape
    if label is not None:
        source = labels if labels is not None else image
        found = np.argwhere(source.data[0].numpy() == label)
        if not len(found):
            raise SubjectError(f"no voxel has the label {label}, so that no plane can go through it")
        # The voxel of the label that is nearest to its middle, which may lie beside it.
        middle = found.mean(axis=0)
        return tuple(found[((found - middle) ** 2).sum(axis=1).argmin()].tolist())
    if at is None:
        return tuple(size // 2 for size in shape)
    place = tuple(map(int, at))
    if len(place) != 3 or not all(0 <= each < size for each, size in zip(place, shape, strict=True)):
        raise SizeError(f"at is {at!r}: it must be a voxel of the image, whose shape is {shape}")
    return place


def _draw(
    axes: Any, name: str, image: Image, labels: Image | None, place: Sequence[int], channel: int, named: Mapping[int, Label]
) -> set[int]:
    """Draw the planes of one image; give the labels that are seen."""
    turned = image.reoriented("RAS")
    # The same place in the turned image: its voxels are the same points of the world.
    world = image.affine @ np.array([*place, 1.0])
    index = np.rint((np.linalg.inv(turned.affine) @ world)[:3]).astype(int).tolist()
    spacing, shown = turned.spacing, set()
    over = None if labels is None else labels.reoriented("RAS")
    for plane, (title, out, right, up, letters) in zip(axes, PLANES, strict=True):
        extent = (0, turned.spatial_shape[right] * spacing[right], 0, turned.spatial_shape[up] * spacing[up])
        values = _slice(turned, out, index[out], right, up, channel)
        how: dict[str, Any] = {"extent": extent, "origin": "lower", "interpolation": "nearest"}
        if image.type == LABEL:
            colours, seen = _coloured(values, named)
            plane.imshow(colours, **how)
            shown |= seen
        else:
            low, high = np.percentile(values, (DARKEST, LIGHTEST)) if values.size else (0, 1)
            plane.imshow(values, cmap="gray", vmin=low, vmax=max(high, low + 1e-8), **how)
        if over is not None:
            colours, seen = _coloured(_slice(over, out, index[out], right, up, 0), named)
            plane.imshow(colours, **how)
            shown |= seen
        if right == 0:  # the patient's right is on the left, as if one stood at the feet
            plane.invert_xaxis()
        _mark(plane, letters.split(), f"{name} {title}".strip())
    return shown


def _slice(image: Image, out: int, index: int, right: int, up: int, channel: int) -> np.ndarray:
    """Read a plane: rows go upwards."""
    start, stop = [0, 0, 0], list(image.spatial_shape)
    start[out], stop[out] = index, index + 1
    values = read_checked(image, Box(tuple(start), tuple(stop)))[channel].float().numpy()
    return values.squeeze(axis=out).T if right < up else values.squeeze(axis=out)


def _coloured(labels: np.ndarray, named: Mapping[int, Label]) -> tuple[np.ndarray, set[int]]:
    """Give labels as colours that can be seen through, and which there are; 0 is clear."""
    colours = np.zeros((*labels.shape, 4))
    seen = {int(each) for each in np.unique(labels) if each != 0}
    for each in seen:
        colours[labels == each] = (*_colour(each, named), ALPHA)
    return colours, seen


def _colour(label: int, named: Mapping[int, Label]) -> tuple[float, float, float]:
    red, green, blue = color_of(named.get(label, Label(max(label, 0), str(label))))
    return red / 255, green / 255, blue / 255


def _mark(axes: Any, letters: Sequence[str], title: str) -> None:
    """Write where each edge is."""
    axes.set_facecolor("black")
    axes.set_title(title, fontsize=10)
    axes.set_xticks([])
    axes.set_yticks([])
    places = (
        (0.02, 0.5, "left", "center"),
        (0.98, 0.5, "right", "center"),
        (0.5, 0.02, "center", "bottom"),
        (0.5, 0.98, "center", "top"),
    )
    for letter, (x, y, horizontal, vertical) in zip(letters, places, strict=True):
        axes.text(x, y, letter, transform=axes.transAxes, color="gold", ha=horizontal, va=vertical, fontsize=11)


def _add_legend(figure: Any, labels: Sequence[int], named: Mapping[int, Label]) -> None:
    from matplotlib.patches import Patch

    names = {each: f"{each} {named[each].name}" if each in named else str(each) for each in labels}
    patches = [Patch(color=_colour(each, named), label=names[each]) for each in labels[:MOST_IN_LEGEND]]
    if len(labels) > MOST_IN_LEGEND:
        patches.append(Patch(color="white", label=f"and {len(labels) - MOST_IN_LEGEND} more"))
    figure.legend(handles=patches, loc="outside right upper", title="labels", fontsize=8)


def html_of(images: Mapping[str, Image], metadata: Mapping[str, Any] | None = None) -> str:
    """Show images in a notebook: a small picture of each, where matplotlib is installed, and what is known of it."""
    parts = []
    for name, image in images.items():
        title = f"<b>{html.escape(name)}</b> " if name else ""
        try:
            picture = f'<img src="data:image/png;base64,{base64.b64encode(picture_of(image)).decode()}"/><br/>'
        except VoxloomError:  # it cannot be read, or there is no matplotlib
            picture = ""
        parts.append(f"<div>{picture}{title}<code>{html.escape(repr(image))}</code></div>")
    for name, value in (metadata or {}).items():
        parts.append(f"<div><b>{html.escape(str(name))}</b> {html.escape(repr(value))}</div>")
    return "".join(parts)


def html_of_batch(images: Mapping[str, Any], size: int, text: str) -> str:
    """Show a batch in a notebook: its first subjects.

    Args:
        images: the images of the subjects, by name, each to be asked for by the number of its subject.
        size: number of subjects.
        text: what is known of the batch.
    """
    numbers = range(min(size, MOST_OF_BATCH))
    shown = html_of({f"{number} {name}": stacked[number] for number in numbers for name, stacked in images.items()})
    more = f"<div>and {size - len(numbers)} more</div>" if size > len(numbers) else ""
    return f"<div><code>{html.escape(text)}</code></div>{shown}{more}"


def picture_of(image: Image) -> bytes:
    """Give a small picture of an image, as PNG."""
    figure = plot_image(image)
    figure.set_size_inches(6, 2.2)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=70)
    return buffer.getvalue()
