"""Where the centre of a patch may lie, and where a patch of a centre begins.

The centre of a patch of `size` voxels is its voxel number `size // 2`.
"""

from .boxes import Box
from .sizes import Ints

__all__ = ["centre_box", "start_of"]


def centre_box(domain: Box, patch_size: Ints) -> Box:
    """Voxels that can be the centre of a patch that lies within a domain, which must be at least as large as a patch."""
    start = tuple(first + size // 2 for first, size in zip(domain.start, patch_size, strict=True))
    stop = tuple(last - size + size // 2 + 1 for last, size in zip(domain.stop, patch_size, strict=True))
    return Box(start, stop)


def start_of(centre: Ints, patch_size: Ints, domain: Box) -> Ints:
    """First voxel of the patch of a centre, shifted inwards where the patch would reach beyond the domain."""
    return tuple(
        min(max(middle - size // 2, first), last - size)
        for middle, size, first, last in zip(centre, patch_size, domain.start, domain.stop, strict=True)
    )
