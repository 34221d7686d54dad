"""All patches of a regular grid."""

from collections.abc import Iterator, Sequence
from typing import Any, overload

from torch.utils.data import Dataset

from ..core.arguments import known_arguments
from ..core.grid.grids import PatchGrid, PatchSpacing, check_patch_spacing
from ..core.padding import check_padding_mode
from ..core.sizes import as_patch_size, checked_overlap
from ..errors import SizeError, SubjectError
from ..volumes.libraries import as_subject
from ..volumes.subject import Subject
from .patches import NumberedPatches, PatchCutter, PatchSequence
from .spelling import subject_may_be_left_out

__all__ = ["GridSampler"]

Sizes = int | Sequence[int]


class GridSampler(Dataset[Subject]):
    """Cut a subject into patches on a regular grid that covers it.

    Patches are `patch_size - patch_overlap` voxels apart, but for the last on each axis, which ends where the volume ends.
    They are numbered with the last axis fastest. A patch is cut when it is asked for, owns its memory and knows its location
    in the frame of the original volume; the subject is only read, and never copied, not even to pad it.

    Args:
        subject: the subject that patches are cut from: the sampler is a map-style data set. Or, in its place, the patch size:
            the sampler is then called with a subject.
        patch_size: voxels of a patch `(I, J, K)`, or one number for all axes; -1 is all of an axis.
        patch_overlap: voxels that neighbours share on each axis, or the fraction of a patch that they share, a float below 1;
            an even number where the volume is padded. See `PatchGrid.cover`.
        padding_mode: pad the volume by half the overlap on each side, and an axis that is still shorter than a patch until
            the patch fits. A number, `"constant"`, `"edge"`, `"reflect"`, `"symmetric"`, `"wrap"`, `"linear_ramp"` (as in
            `numpy.pad`), or `"minimum"`, `"maximum"`, `"mean"` or `"median"` of the whole volume. None does not pad.
        fill: what `"constant"` pads with.
        patch_spacing: `"fixed"`, or `"even"` to spread the patches evenly; see `PatchGrid.cover`.
        check_space: check that all images of the subject lie on one another; their shapes must be the same in any case.

    Raises:
        SizeError: if a size or overlap cannot be used, or the patch does not fit into a volume that is not padded.
        ModeError: if there is no such padding mode, or an image cannot hold the number that it is to be padded with.
        SpaceError: if the images of the subject do not have the same shape, or do not lie on one another.

    Example:
        >>> import torch, voxloom as vx
        >>> subject = vx.Subject(t1=vx.ScalarImage(torch.rand(1, 20, 20, 20)))
        >>> sampler = vx.GridSampler(subject, patch_size=12, patch_overlap=4)
        >>> len(sampler), sampler[-1].patch_location.index
        (8, (8, 8, 8))
        >>> len(list(vx.GridSampler(12)(subject)))
        8
    """

    @overload
    def __init__(
        self,
        subject: Subject,
        patch_size: Sizes,
        patch_overlap: float | Sequence[float] = 0,
        padding_mode: str | float | None = None,
        fill: float = 0,
        *,
        patch_spacing: PatchSpacing = "fixed",
        check_space: bool = True,
    ) -> None: ...
    @overload
    def __init__(
        self,
        subject: Sizes,
        *,
        patch_overlap: float | Sequence[float] = 0,
        padding_mode: str | float | None = None,
        fill: float = 0,
        patch_spacing: PatchSpacing = "fixed",
        check_space: bool = True,
    ) -> None: ...
    @overload
    def __init__(
        self,
        *,
        patch_size: Sizes,
        patch_overlap: float | Sequence[float] = 0,
        padding_mode: str | float | None = None,
        fill: float = 0,
        patch_spacing: PatchSpacing = "fixed",
        check_space: bool = True,
    ) -> None: ...
    @subject_may_be_left_out(most=1)
    @known_arguments
    def __init__(
        self,
        subject: Any = None,
        patch_size: Any = None,
        patch_overlap: float | Sequence[float] = 0,
        padding_mode: str | float | None = None,
        fill: float = 0,
        *,
        patch_spacing: PatchSpacing = "fixed",
        check_space: bool = True,
    ) -> None:
        if patch_size is None:
            raise SizeError("the patch size is missing: GridSampler(subject, patch_size)")
        self.patch_size = as_patch_size(patch_size, 3)
        self.patch_overlap = checked_overlap(patch_overlap, self.patch_size, is_even=padding_mode is not None)
        self.patch_spacing = check_patch_spacing(patch_spacing)
        self.padding_mode = padding_mode
        self.fill = fill
        self.check_space = check_space
        self._mode = None if padding_mode is None else check_padding_mode(padding_mode, fill)
        self.subject: Subject | None = subject
        self._bound: tuple[PatchGrid, PatchCutter] | None = None if subject is None else self._bind(subject)

    def grid_of(self, subject: Subject) -> PatchGrid:
        """Plan the grid of a subject, of which only the headers are read."""
        is_padded = self._mode is not None
        return PatchGrid.cover(
            subject.spatial_shape, self.patch_size, self.patch_overlap, padded=is_padded, patch_spacing=self.patch_spacing
        )

    def _bind(self, subject: Subject) -> tuple[PatchGrid, PatchCutter]:
        if self.check_space:
            subject.check_space()
        grid = self.grid_of(subject)
        return grid, PatchCutter(subject, grid.box, self._mode)

    def numbered(self, subject: Subject, seed: int, epoch: int, subject_index: int) -> NumberedPatches:
        """Give the patches of a subject by their numbers, again from the first after the last; the same in every epoch."""
        grid, cutter = self._bind(subject)
        return NumberedPatches(cutter, subject_index, lambda number: grid[number % len(grid)])

    def _parts(self) -> tuple[PatchGrid, PatchCutter]:
        if self._bound is None:
            raise SubjectError("the sampler has no subject: make it with GridSampler(subject, patch_size), or call it with one")
        return self._bound

    @property
    def grid(self) -> PatchGrid:
        """The plan: where all patches lie, in the frame of the original volume."""
        return self._parts()[0]

    @property
    def locations(self) -> PatchGrid:
        """The same as `grid`: a sequence of `PatchLocation`; `tolist()` gives rows of first and last corner."""
        return self.grid

    def __len__(self) -> int:
        return len(self.grid)

    @overload
    def __getitem__(self, index: int) -> Subject: ...
    @overload
    def __getitem__(self, index: slice) -> PatchSequence: ...
    def __getitem__(self, index: int | slice) -> Subject | PatchSequence:
        grid, cutter = self._parts()
        return PatchSequence(cutter, grid[index]) if isinstance(index, slice) else cutter.cut(grid[index])

    def __getitems__(self, indices: Sequence[int]) -> PatchSequence:
        """Give the patches of a batch: PyTorch's loader asks for them so, and they are cut straight into the batch."""
        grid, cutter = self._parts()
        return PatchSequence(cutter, [grid[index] for index in indices])

    def __iter__(self) -> Iterator[Subject]:
        grid, cutter = self._parts()
        return map(cutter.cut, grid)

    def __call__(self, subject: Subject | None = None, num_patches: int | None = None) -> Iterator[Subject]:
        """Give all patches of a subject, or of the sampler's own, one by one."""
        if num_patches is not None:
            raise SizeError(
                "GridSampler does not support limiting the number of patches: slice its grid, or use itertools.islice"
            )
        grid, cutter = self._parts() if subject is None else self._bind(as_subject(subject, "the subject"))
        return map(cutter.cut, grid)

    def __repr__(self) -> str:
        number = f"{len(self)} patches of" if self._bound else "patches of"
        padded = "" if self.padding_mode is None else f", padded with {self.padding_mode!r}"
        return f"{type(self).__name__}({number} {self.patch_size}, overlap {self.patch_overlap}{padded})"
