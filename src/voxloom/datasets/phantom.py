"""A synthetic head, for examples and tests that need an image but no download."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..core.sizes import as_sizes
from ..volumes.images.image import LabelMap, ScalarImage
from ..volumes.subject import Subject

__all__ = ["HeadPhantom"]

# Half a head, in millimetres from its centre: the field of view is a cube of this half side around it.
HALF_FIELD_MM = 110.0
NOISE = 0.02

LABELS = {
    0: "background",
    1: "scalp",
    2: "skull",
    3: "cerebrospinal fluid",
    4: "grey matter",
    5: "white matter",
    6: "ventricles",
    7: "lesion",
}
# Brightness of each label in a T1-weighted scan, from 0 to 1.
BRIGHTNESS = (0.0, 0.75, 0.12, 0.22, 0.52, 0.82, 0.2, 0.4)
# Ellipsoids from the outside in: label, centre and semi-axes in millimetres, along right, anterior and superior.
SHELLS = (
    (1, (0, 0, 0), (76, 98, 92)),
    (2, (0, -1, 3), (70, 91, 84)),
    (3, (0, -1, 4), (65, 85, 78)),
)
BRAIN = ((0, -1, 4), (62, 82, 75))
VENTRICLES = (((-13, 2, 8), (7, 32, 13)), ((13, 2, 8), (7, 32, 13)), ((0, -4, -2), (3, 18, 9)))
LESION = ((36, 26, 4), (9, 8, 9))
CORTEX = 0.16  # thickness of grey matter, as a part of the brain's radius


class HeadPhantom(Subject):
    """A head of ellipsoids with a folded cortex, ventricles, a lesion, uneven brightness and noise.

    It is made in memory, plane by plane, and is the same every time for the same arguments. Whatever its size, it shows
    the same head: more voxels are smaller voxels.

    Args:
        size: voxels `(I, J, K)`, or one number for all axes.
        seed: of the noise.

    Entries: `t1`, a `ScalarImage` of float32 from about 0 to 1000; `labels`, a `LabelMap` of uint8 whose values
    `HeadPhantom.names` explains.

    Raises:
        SizeError: if a size cannot be used.

    Example:
        >>> import voxloom as vx
        >>> phantom = vx.datasets.HeadPhantom(32)
        >>> phantom, phantom.labels.data.unique().tolist()
        (HeadPhantom(Keys: ('t1', 'labels'); images: 2), [0, 1, 2, 3, 4, 5, 6, 7])
    """

    names = LABELS

    def __init__(self, size: int | Sequence[int] = 128, seed: int = 0) -> None:
        shape = as_sizes(size, 3, "size")
        spacing = [2 * HALF_FIELD_MM / length for length in shape]
        affine = np.diag([*spacing, 1.0])
        affine[:3, 3] = [step / 2 - HALF_FIELD_MM for step in spacing]
        t1 = torch.empty((1, *shape), dtype=torch.float32)
        labels = torch.empty((1, *shape), dtype=torch.uint8)
        i, j, k = (affine[axis, 3] + spacing[axis] * np.arange(shape[axis]) for axis in range(3))
        for number, right in enumerate(i):
            labels[0, number] = torch.from_numpy(_labels(right, j[:, None], k[None, :]))
            noise = np.random.Generator(np.random.Philox(key=seed, counter=number)).standard_normal((shape[1], shape[2]))
            t1[0, number] = _scan(labels[0, number], right, j[:, None], k[None, :], noise)
        super().__init__(t1=ScalarImage(tensor=t1, affine=affine), labels=LabelMap(tensor=labels, affine=affine))


def _radius(x: float, y: np.ndarray, z: np.ndarray, centre: Sequence[float], axes: Sequence[float]) -> np.ndarray:
    """Distance from the centre of an ellipsoid, 1 on its surface."""
    values = (np.asarray(x), y, z)
    offsets = ((value - middle) / half for value, middle, half in zip(values, centre, axes, strict=True))
    return np.sqrt(sum(offset**2 for offset in offsets))


def _labels(x: float, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Labels of one sagittal plane."""
    result = np.zeros(np.broadcast_shapes(y.shape, z.shape), dtype=np.uint8)
    for label, centre, axes in SHELLS:
        result[_radius(x, y, z, centre, axes) < 1] = label
    depth = 1 - _radius(x, y, z, *BRAIN)
    waves = np.sin(x / 4.1 + 1.7 * np.sin(y / 9)) + np.sin(y / 3.9 + 1.3 * np.sin(z / 11)) + np.sin(z / 4.7 + 1.5 * np.sin(x / 8))
    folds = 0.045 * waves
    fissure = np.abs(x) < 1.2
    brain = (depth + 0.5 * folds > 0.03) & (result == 3) & ~(fissure & (z > 25))
    result[brain] = 4
    result[brain & (depth + 1.6 * folds > CORTEX)] = 5
    for centre, axes in VENTRICLES:
        result[_radius(x, y, z, centre, axes) < 1] = 6
    result[_radius(x, y, z, *LESION) < 1] = 7
    return result


def _scan(labels: Tensor, x: float, y: np.ndarray, z: np.ndarray, noise: np.ndarray) -> Tensor:
    """What a scanner would show of one plane: brighter near the coil, and noisy."""
    clean = torch.tensor(BRIGHTNESS, dtype=torch.float64)[labels.long()]
    coil = torch.from_numpy(1 + 0.12 * np.cos((x + y) / 140) - 0.1 * np.sin(z / 120))
    return (1000 * (clean * coil + NOISE * torch.from_numpy(noise)).abs()).float()
