"""What Hypothesis draws: shapes, patches, overlaps, modes and types that are allowed together."""

from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st

# What Hypothesis itself draws, and what is said of the tests that draw more or fewer is measured by.
MOST_EXAMPLES = 100

WINDOWS = ("average", "hann", "gaussian")
MODES = ("crop", *WINDOWS)
PADDING = (None, 7, "constant", "edge", "reflect", "symmetric", "wrap", "linear_ramp", "minimum", "maximum", "mean", "median")
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)


def examples(most: int, **more: Any) -> settings:
    """Draw so many examples where all tests are run, and a quarter of them where only the quick ones are."""
    return settings(max_examples=max(5, most * settings().max_examples // MOST_EXAMPLES), **more)


@st.composite
def geometries(draw, ndim=3, largest=12, may_exceed=False):
    """A shape, a patch size and an overlap, one number per axis each."""
    shape, patch, overlap = [], [], []
    for _ in range(ndim):
        size = draw(st.integers(1, largest))
        shape.append(size)
        patch.append(draw(st.integers(1, largest if may_exceed else size)))
        overlap.append(2 * draw(st.integers(0, (patch[-1] - 1) // 2)))
    return tuple(shape), tuple(patch), tuple(overlap)


def random_values(shape, dtype, seed=0):
    """Values of any type: for floats over many orders of magnitude and of both signs."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    if not dtype.is_floating_point:
        info = torch.iinfo(dtype)
        return torch.randint(max(info.min, -(2**40)), min(info.max, 2**40), shape, generator=generator).to(dtype)
    exponents = torch.rand(shape, generator=generator, dtype=torch.float64) * 8 - 4
    signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return (signs * 10**exponents).to(dtype)
