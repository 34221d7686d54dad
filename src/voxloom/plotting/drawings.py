"""Drawings of how patches lie, weigh, are drawn and mixed."""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import numpy as np

from ..core.boxes import Box
from ..core.geometry.affines import spacing_of
from ..core.grid.blending import AxisWeights
from ..core.grid.grids import AxisGrid, PatchGrid
from ..core.grid.shards import ShardGrid
from ..core.grid.windows import OverlapMode, for_axis, resolve_window
from ..errors import SizeError, SubjectError, UnsupportedImageError
from ..io.protocols import read_checked
from ..io.zarr.source import open_zarr
from ..sampling.by_label import LabelSampler
from ..sampling.grid import GridSampler
from ..sampling.random import PatchSampler
from ..sampling.weighted import WeightedSampler
from ..training.queue import Queue
from ..volumes.constants import LABEL
from ..volumes.images.image import Image
from .comparison import require_matplotlib
from .planes import plot_images

__all__ = ["compare", "draw_parts", "draws", "grid", "levels", "queue", "weights"]

MODES = ("crop", "average", "hann", "gaussian")
# Two axes of a plane, by the one that is left out.
OTHERS = {0: (1, 2), 1: (0, 2), 2: (0, 1)}


def grid(
    patches: PatchGrid | GridSampler, image: Image | None = None, axis: int = 2, index: int | None = None, output: Any = None
) -> Any:
    """Draw the patches of a grid that a plane cuts.

    Args:
        patches: the grid, or a sampler of one subject.
        image: what is drawn beneath; of a sampler by default its first image.
        axis: the axis of the plane, 0, 1 or 2.
        index: where the plane is; by default in the middle.
        output: name of a picture to write.

    Returns:
        Figure of matplotlib.

    Example:
        >>> import voxloom as vx
        >>> head = vx.datasets.HeadPhantom(32)
        >>> len(vx.plot.grid(vx.GridSampler(head, 16, 4)).axes[0].patches)
        9
    """
    figure, axes = _figure(5.5, 5)
    if isinstance(patches, GridSampler):
        image = patches.subject.get_first_image() if image is None and patches.subject is not None else image
        patches = patches.grid
    right, up = OTHERS[axis]
    index = patches.spatial_shape[axis] // 2 if index is None else index
    slab = Box(*_slab(patches, axis, index))
    _show_plane(axes, image, axis, index)
    from matplotlib.patches import Rectangle

    cut = list(patches.axes[axis].touching(index, index + 1))
    for number_of_patch in patches.touching(slab):
        numbers = patches.unravel(number_of_patch)
        if numbers[axis] != cut[0]:
            continue  # the plane of one patch along the axis is enough
        start, size = patches.location(numbers).index, patches.patch_size
        colour = f"C{sum(numbers) % 10}"
        axes.add_patch(
            Rectangle((start[right] - 0.5, start[up] - 0.5), size[right], size[up], fill=False, edgecolor=colour, linewidth=1.5)
        )
    axes.autoscale_view()
    axes.set_title(f"{patches.counts[right]} × {patches.counts[up]} patches of {size[right]} × {size[up]} voxels")
    return _saved(figure, output)


def draw_parts(boxes: ShardGrid, done: AbstractSet[int], failed: AbstractSet[int], output: Path) -> None:
    """Draw which parts of a volume are done, seen along each axis: what share of the parts behind each place.

    Args:
        boxes: the parts.
        done: numbers of those that are done.
        failed: numbers of those that failed; places with such a part are red.
        output: name of the picture.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    share, broken = np.zeros(boxes.counts), np.zeros(boxes.counts, dtype=bool)
    share.flat[sorted(done)] = 1
    broken.flat[sorted(failed)] = True
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for axis, axes in enumerate(figure.subplots(1, 3)):
        right, up = OTHERS[axis]
        extent = (0, boxes.shape[right], 0, boxes.shape[up])
        shown = axes.imshow(
            share.mean(axis=axis).T, cmap="viridis", vmin=0, vmax=1, origin="lower", extent=extent, aspect="equal"
        )
        marked = np.ma.masked_where(~broken.any(axis=axis).T, np.ones(share.mean(axis=axis).T.shape))
        axes.imshow(marked, cmap="Reds", vmin=0, vmax=1.4, origin="lower", extent=extent, aspect="equal")
        axes.set_title(f"along {'IJK'[axis]}")
        axes.set_xlabel(f"{'IJK'[right]}, voxels")
        axes.set_ylabel(f"{'IJK'[up]}, voxels")
    figure.colorbar(shown, ax=figure.axes, label="share of the parts that is done")
    figure.suptitle(f"{len(done)} of {len(boxes)} parts are done, {len(failed)} failed")
    figure.savefig(output, dpi=110)


def weights(
    length: int = 100, patch_size: int = 40, patch_overlap: int = 20, modes: Sequence[OverlapMode] = MODES, output: Any = None
) -> Any:
    """Draw the weights of patches along an axis, which sum to 1 on every voxel.

    Args:
        length: voxels of the axis.
        patch_size: voxels of a patch.
        patch_overlap: voxels that neighbours share.
        modes: overlap modes, or windows.
        output: name of a picture to write.

    Returns:
        Figure of matplotlib.

    Example:
        >>> import voxloom as vx
        >>> [axes.get_title() for axes in vx.plot.weights(modes=("hann", vx.Gaussian(0.25))).axes]
        ['hann', 'Gaussian(0.25)']
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    along = PatchGrid.cover((length,), (patch_size,), (patch_overlap,)).axes[0]
    columns = min(2, len(modes))
    figure = Figure(figsize=(4.5 * columns, 2.3 * -(-len(modes) // columns)), layout="constrained")
    rows = figure.subplots(-(-len(modes) // columns), columns, sharex=True, sharey=True, squeeze=False)
    for axes, mode in zip(rows.flat, modes, strict=False):
        total = np.zeros(length)
        for start, values in _weights_of(along, mode):
            axes.plot(np.arange(start, start + patch_size), values)
            total[start : start + patch_size] += values
        axes.plot(np.arange(length), total, color="black", linewidth=1, linestyle="--", label="sum of all")
        axes.set_title(str(mode))
        axes.set_ylim(0, 1.1)
    rows[0, 0].legend(loc="lower right")
    figure.supxlabel(f"voxel along an axis; patches of {patch_size} voxels that share {patch_overlap}")
    return _saved(figure, output)


def _weights_of(along: AxisGrid, mode: OverlapMode) -> list[tuple[int, np.ndarray]]:
    window = resolve_window(mode)
    own = AxisWeights(along, None if window is None else for_axis(window, 0))
    found = []
    for number, start in enumerate(along):
        if window is None:
            values, (first, last) = np.zeros(along.patch), own.core(number)
            values[first - start : last - start] = 1
        else:
            values = own.of(number).numpy()
        found.append((start, values))
    return found


def draws(sampler: PatchSampler, count: int = 2000, axis: int = 2, output: Any = None) -> Any:
    """Draw where a sampler's centres fall along each axis, beside how often they should, and over a plane.

    Args:
        sampler: the sampler, of one subject.
        count: how many draws.
        axis: the axis of the plane.
        output: name of a picture to write.

    Returns:
        Figure of matplotlib.

    Raises:
        SubjectError: if the sampler has no subject.

    Example:
        >>> import voxloom as vx
        >>> head = vx.datasets.HeadPhantom(32)
        >>> len(vx.plot.draws(vx.LabelSampler(head, 8, "labels"), count=100).axes)
        2
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    subject = sampler.subject
    if subject is None:
        raise SubjectError("the sampler has no subject: make it with one, or show draws of a sampler that is bound to a subject")
    patches = [each.patch_location for _, each in zip(range(count), sampler(subject, count), strict=False)]
    centres = np.array([[first + size // 2 for first, size in zip(each.index, each.size, strict=True)] for each in patches])
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    plane, line = figure.subplots(1, 2, width_ratios=(1, 1.2))
    middle = int(np.median(centres[:, axis]))
    _show_plane(plane, subject.get_first_image(), axis, middle)
    near = centres[np.abs(centres[:, axis] - middle) <= max(1, subject.spatial_shape[axis] // 20)]
    right, up = OTHERS[axis]
    plane.scatter(near[:, right], near[:, up], s=5, color="gold")
    plane.set_title(f"centres near the plane {middle} of axis {axis}")
    for each in range(3):
        size = subject.spatial_shape[each]
        found = np.bincount(centres[:, each], minlength=size)[:size] / len(centres)
        line.plot(np.arange(size), found, color=f"C{each}", linewidth=1, label=f"axis {each}, drawn")
        if isinstance(sampler, WeightedSampler | LabelSampler):
            exact = sampler.get_probability_map(subject)[0].double().numpy()
            exact = exact.sum(axis=tuple(other for other in range(3) if other != each))
            line.plot(np.arange(size), exact / exact.sum(), color=f"C{each}", linestyle="--", label=f"axis {each}, of the map")
    line.set_xlabel("voxel")
    line.set_title(f"{len(centres)} draws")
    line.legend(fontsize=8)
    return _saved(figure, output)


def queue(patches: Queue, output: Any = None) -> Any:
    """Go through an epoch of a queue, and draw how well it mixes, how full it is, and how long patches were waited for.

    The epoch is used up: the next pass is the next one.

    Args:
        patches: the queue.
        output: name of a picture to write.

    Returns:
        Figure of matplotlib.

    Example:
        >>> import voxloom as vx
        >>> heads = [vx.datasets.HeadPhantom(32, seed=number) for number in range(3)]
        >>> len(vx.plot.queue(vx.Queue(heads, 8, 8, vx.UniformSampler(8), seed=0)).axes)
        3
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    before, rows = patches.idle_seconds, []
    for patch in patches:
        rows.append((patch.patch_location.subject_index, patches.num_patches, patches.idle_seconds - before))
    subjects, held, waited = np.array(rows, dtype=float).T
    figure = Figure(figsize=(9, 6), layout="constrained")
    mixing, filling, waiting = figure.subplots(3, 1, sharex=True)
    mixing.scatter(range(len(rows)), subjects, s=6)
    mixing.set_ylabel("subject")
    mixing.yaxis.get_major_locator().set_params(integer=True)
    filling.plot(held)
    filling.axhline(patches.max_length, color="gray", linestyle="--")
    filling.set_ylabel("patches held")
    waiting.plot(waited)
    waiting.set_ylabel("waited so far, s")
    waiting.set_xlabel("patch of the epoch")
    return _saved(figure, output)


def levels(image: Any, labels: Any = None, axis: int = 2, output: Any = None) -> Any:
    """Draw the middle plane of each level of an OME-Zarr image, and of labels beside it, at the same size.

    Args:
        image: the image's folder or URL.
        labels: that of the labels, such as `scan.ome.zarr/labels/organs`.
        axis: the axis of the plane, 0, 1 or 2.
        output: name of a picture to write.

    Returns:
        Figure of matplotlib.

    Raises:
        UnsupportedImageError: if it has no levels.

    Example:
        >>> import tempfile, voxloom as vx
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     made = vx.convert(vx.datasets.HeadPhantom(64).t1, f"{folder}/head.ome.zarr", levels=3)
        ...     [axes.get_title() for axes in vx.plot.levels(made.path).axes]
        ['level 0: 64 × 64', 'level 1: 32 × 32', 'level 2: 16 × 16']
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    finest = open_zarr(image)
    if finest.multiscales is None:
        raise UnsupportedImageError(f"{image} is an array without levels: give an OME-Zarr image")
    count, (right, up) = len(finest.multiscales.levels), OTHERS[axis]
    rows = [image] if labels is None else [image, labels]
    figure = Figure(figsize=(3.2 * count, 3.2 * len(rows)), layout="constrained")
    for row, (location, all_axes) in enumerate(zip(rows, figure.subplots(len(rows), count, squeeze=False), strict=True)):
        for number, axes in enumerate(all_axes):
            source = open_zarr(location, level=number)
            shape, spacing = source.shape[1:], spacing_of(source.affine)
            box = Box(*_slab_of(shape, axis, shape[axis] // 2))
            values = read_checked(source, box)[0].float().numpy().squeeze(axis=axis).T
            aspect = spacing[up] / spacing[right]
            axes.imshow(
                values, cmap="gray" if row == 0 else "nipy_spectral", origin="lower", aspect=aspect, interpolation="nearest"
            )
            axes.set_title(f"level {number}: {shape[right]} × {shape[up]}")
            axes.set_axis_off()
    return _saved(figure, output)


def _slab_of(shape: Sequence[int], axis: int, index: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    start, stop = [0, 0, 0], list(shape)
    start[axis], stop[axis] = index, index + 1
    return tuple(start), tuple(stop)


def compare(image: Image, predicted: Image, truth: Image, label: int | None = None, output: Any = None) -> Any:
    """Draw a prediction and the truth on an image, one below the other.

    Args:
        image: the image.
        predicted: a label map on its grid.
        truth: the same.
        label: the label through whose middle (in the truth) the planes go; by default the middle of the image.
        output: name of a picture to write.

    Returns:
        Figure of matplotlib.

    Raises:
        SizeError: if the maps are not on the image's grid.

    Example:
        >>> import voxloom as vx
        >>> head = vx.datasets.HeadPhantom(32)
        >>> len(vx.plot.compare(head.t1, head.labels, head.labels, label=7).axes)
        9
    """
    for name, each in (("predicted", predicted), ("truth", truth)):
        if each.spatial_shape != image.spatial_shape:
            raise SizeError(f"{name} has {each.spatial_shape} voxels, but the image {image.spatial_shape}: give them on one grid")
    return plot_images(
        {"image": image, "predicted": predicted.of_class(_of_labels(predicted)), "truth": truth.of_class(_of_labels(truth))},
        label=label,
        map_of_label=truth,
        output=output,
    )


def _of_labels(image: Image) -> type[Image]:
    from ..volumes.images.image import LabelMap

    return type(image) if image.type == LABEL else LabelMap


def _figure(width: float, height: float) -> tuple[Any, Any]:
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _slab(patches: PatchGrid, axis: int, index: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    start, stop = list(patches.box.start), list(patches.box.stop)
    if not start[axis] <= index < stop[axis]:
        raise SizeError(f"index is {index}: it must be a voxel of the grid along axis {axis}, {start[axis]} to {stop[axis] - 1}")
    start[axis], stop[axis] = index, index + 1
    return tuple(start), tuple(stop)


def _show_plane(axes: Any, image: Image | None, axis: int, index: int) -> None:
    axes.set_aspect("equal")
    if image is None:
        return
    start, stop = [0, 0, 0], list(image.spatial_shape)
    start[axis], stop[axis] = index, index + 1
    values = read_checked(image, Box(tuple(start), tuple(stop)))[0].float().numpy().squeeze(axis=axis).T
    right, up = OTHERS[axis]
    axes.imshow(values, origin="lower", cmap="gray", interpolation="nearest")
    axes.set_aspect(image.spacing[up] / image.spacing[right])


def _saved(figure: Any, output: Any) -> Any:
    if output is not None:
        figure.savefig(Path(output).expanduser(), dpi=110)
    return figure
