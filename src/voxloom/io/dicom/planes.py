"""Where the planes of a DICOM volume lie: their order, and the affine, or an error that says why there is none."""

from collections.abc import Sequence

import numpy as np

from ...core.geometry.affines import Affine, lps_to_ras
from ...errors import SeriesError

__all__ = ["arranged", "arranged_with_gaps"]

# Slices may lie this part of their distance away from where even spacing would put them: positions are stored rounded.
SLICE_TOLERANCE = 0.05
# A slice may be shifted sideways by this many degrees against the one below before the series counts as tilted.
TILT_TOLERANCE_DEGREES = 0.1
# By how much the cosines of two parallel planes may differ.
ANGLE_TOLERANCE = 1e-3
# How far from 1 the area may be that the directions of rows and columns span: some are stored with two digits.
UNIT_TOLERANCE = 0.1


def arranged(
    where: str,
    names: Sequence[str],
    positions: np.ndarray,
    orientations: np.ndarray,
    spacing: Sequence[float],
    thickness: float = 1,
) -> tuple[np.ndarray, Affine]:
    """Put parallel planes in order.

    Args:
        where: the file or folder, for messages.
        names: what to call each plane in messages.
        positions: `(N, 3)`, centres of the first pixels in DICOM's coordinates, in mm.
        orientations: `(N, 6)`, directions of a row and of a column.
        spacing: mm from column to column, and from row to row.
        thickness: mm that one plane alone is thick.

    Returns:
        The numbers of the planes, from the first to the last, and the RAS+ affine.

    Raises:
        SeriesError: if they are not parallel, not evenly spaced, at one place, or shifted sideways.
    """
    normal = _normal(where, orientations)
    order = np.argsort(positions @ normal, kind="stable")
    names, positions = [names[index] for index in order], positions[order]
    if len(order) == 1:
        return order, _affine(orientations[0], spacing, normal * thickness, positions[0])
    steps = np.diff(positions, axis=0)
    along = steps @ normal
    usual = float(np.median(along))
    for index, distance in enumerate(along):
        pair = f"{names[index]} and {names[index + 1]}"
        if distance < SLICE_TOLERANCE * max(usual, 1e-6):
            raise SeriesError(
                f"{where}: {pair} are slices at the same place ({positions[index].tolist()}): remove the duplicate, or, if"
                " the series has several times or echoes, put each into a folder of its own"
            )
        if abs(distance - usual) > SLICE_TOLERANCE * usual:
            gap = distance / usual
            raise SeriesError(
                f"{where}: {pair} are {distance:.4g} mm apart, but slices are usually {usual:.4g} mm apart:"
                + (f" {round(gap) - 1} of them are missing" if round(gap) > 1 else " the slices are not evenly spaced")
            )
    _check_tilt(where, positions, normal)
    step = (positions[-1] - positions[0]) / (len(positions) - 1)
    beside = np.linalg.norm(positions - positions[0] - np.arange(len(positions))[:, None] * step, axis=1)
    if beside.max() > SLICE_TOLERANCE * usual:
        raise SeriesError(
            f"{where}: {names[int(beside.argmax())]} lies {beside.max():.3g} mm beside where even spacing puts it, so that no"
            " affine fits: resample it"
        )
    return order, _affine(orientations[0], spacing, step, positions[0])


def arranged_with_gaps(
    where: str, positions: np.ndarray, orientations: np.ndarray, spacing: Sequence[float], steps: Sequence[float]
) -> tuple[np.ndarray, Affine]:
    """Place parallel planes of which some may be left out, as segmentations leave out those that are empty; see `arranged`.

    Args:
        where: the file, for messages.
        positions: `(N, 3)`; planes may be at the same place.
        orientations: `(N, 6)`.
        spacing: mm from column to column, and from row to row.
        steps: mm from plane to plane; of several the first that fits.

    Returns:
        The place of each plane, from 0, and the RAS+ affine.

    Raises:
        SeriesError: as for `arranged`.
    """
    normal = _normal(where, orientations)
    along = (positions - positions[0]) @ normal
    first, last = int(along.argmin()), int(along.argmax())
    along -= along[first]
    tried = [(each, *_whole_places(along, each)) for each in steps or (1.0,)]
    step, whole, off = next((each for each in tried if each[2] <= 1), tried[0])
    if off > 1:
        raise SeriesError(
            f"{where}: planes lie {off * _let_pass(whole):.2g} of their distance ({step:.4g} mm) beside where even spacing puts"
            " them: resample it"
        )
    step = float(along[last]) / int(whole[last]) if whole[last] else step
    _check_tilt(where, positions[[first, last]], normal)
    line = (positions[last] - positions[first]) / max(1, int(whole[last]))
    sideways = positions - positions[first] - whole[:, None] * line
    sideways -= (sideways @ normal)[:, None] * normal
    if np.linalg.norm(sideways, axis=1).max() > SLICE_TOLERANCE * step:
        raise SeriesError(f"{where}: its planes are shifted sideways, so that no affine fits: resample it")
    return whole, _affine(orientations[0], spacing, normal * step, positions[first])


def _whole_places(along: np.ndarray, step: float) -> tuple[np.ndarray, float]:
    """Number planes by steps; with how far they lie beside these, of what is let pass."""
    places = along / step
    whole = np.rint(places).astype(int)
    if whole.max():
        places *= whole.max() / places.max()  # the step that was given may be rounded
    # Rounding errors add up over the planes, but not to a plane.
    return whole, float(np.abs(places - whole).max()) / _let_pass(whole)


def _let_pass(places: np.ndarray) -> float:
    """Say which part of their distance planes of segments may lie beside their places."""
    return SLICE_TOLERANCE * (1 + len(np.unique(places)) / 50)


def _normal(where: str, orientations: np.ndarray) -> np.ndarray:
    if np.abs(orientations - orientations[0]).max() > ANGLE_TOLERANCE:
        raise SeriesError(f"{where}: the slices are not parallel, so that they are no volume: split the series")
    normal = np.cross(orientations[0, :3], orientations[0, 3:])
    length = float(np.linalg.norm(normal))
    if not np.isfinite(length) or abs(length - 1) > UNIT_TOLERANCE:
        raise SeriesError(f"{where}: its directions of rows and columns, {orientations[0].tolist()}, are not at right angles")
    return normal / length


def _check_tilt(where: str, positions: np.ndarray, normal: np.ndarray) -> None:
    """Refuse planes that are shifted sideways: by the first and the last, since each alone is rounded."""
    whole = positions[-1] - positions[0]
    along = float(whole @ normal)
    tilt = float(np.degrees(np.arctan2(np.linalg.norm(whole - along * normal), along))) if along > 0 else 0.0
    if tilt > TILT_TOLERANCE_DEGREES:
        raise SeriesError(
            f"{where}: the gantry was tilted by {tilt:.3g} degrees, so that slices are shifted against one another and no"
            " affine fits: resample the series onto a straight grid first"
        )


def _affine(orientation: np.ndarray, spacing: Sequence[float], step: np.ndarray, origin: np.ndarray) -> Affine:
    # Directions may be stored with few digits, sizes of pixels are not.
    row, column = (each / np.linalg.norm(each) for each in (orientation[:3], orientation[3:]))
    columns = np.stack([row * spacing[0], column * spacing[1], step], axis=1)
    return lps_to_ras(columns, (1.0, 1.0, 1.0), origin)
