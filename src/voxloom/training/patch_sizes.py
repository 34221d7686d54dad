"""How many bytes patches have, as the headers of their subjects say."""

import contextlib
import math
from functools import cached_property

from ..errors import VoxloomError
from ..volumes.subject import Subject
from .epoch_plans import EpochPlanner, headers_of

__all__ = ["PatchSizes"]

# Bytes of patches that travel in one message, or one patch if that is larger.
MESSAGE_BYTES = 2 * 2**20
# Subjects whose headers are read to find out how large a patch is, before that is given up.
MOST_HEADERS = 8


class PatchSizes:
    """Bytes of the patches of a queue without transforms.

    Args:
        planner: knows the subjects, and the sampler that cuts patches out of them.
        skip_errors: whether subjects may be left out whose headers cannot be read.
    """

    def __init__(self, planner: EpochPlanner, skip_errors: bool) -> None:
        self._planner = planner
        self._skip_errors = skip_errors

    def of(self, subject: Subject) -> int:
        """Give the bytes of a patch of one subject."""
        values = sum(image.num_channels * image.dtype.itemsize for image in headers_of(subject).images.values())
        return values * math.prod(self._planner.sampler.patch_size)

    @cached_property
    def largest(self) -> int:
        """Bytes of the largest patch that any subject has."""
        subjects = self._planner.dry_subjects or ()
        sizes, errors = [], []
        for subject, count in zip(subjects, self._planner.counts, strict=True):
            try:
                sizes += [self.of(subject)] if count else []
            except VoxloomError as error:
                if not self._skip_errors:
                    raise
                errors.append(error)
        if not sizes:
            raise errors[0]
        return max(sizes)

    @cached_property
    def num_per_message(self) -> int:
        """How many patches a worker sends at once."""
        for subject in (self._planner.dry_subjects or ())[:MOST_HEADERS]:
            with contextlib.suppress(VoxloomError):  # an error that counts is raised when the subject is loaded
                return max(1, min(MESSAGE_BYTES // self.of(subject), self._planner.max_length))
        return 1
