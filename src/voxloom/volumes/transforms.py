"""Transforms: functions of a subject, of one's own or of another library, alone or one after the other."""

from collections.abc import Iterable
from typing import Any

from ..errors import SubjectError
from .libraries import LibraryTransform, Transform, library_of
from .subject import Subject

__all__ = ["Compose", "as_batch_transform", "as_transform"]


class Compose:
    """Applies transforms one after the other. A list of them is accepted wherever a transform is, and means the same.

    Args:
        transforms: functions that take a subject and return one, and transforms of TorchIO or MONAI, in any mixture.

    Raises:
        SubjectError: if one of them is no transform.

    Example:
        >>> import torch, voxloom as vx
        >>> def double(subject):
        ...     subject.t1.set_data(2 * subject.t1.data)
        ...     return subject
        >>> transform = vx.Compose([double, double])
        >>> transform(vx.Subject(t1=vx.ScalarImage(torch.ones(1, 4, 4, 4)))).t1.data.max().item()
        4.0
    """

    def __init__(self, transforms: Iterable[Any]) -> None:
        self.given = list(transforms)
        self.transforms = [
            each for number, given in enumerate(self.given) if (each := as_transform(given, f"transform {number}")) is not None
        ]

    def __call__(self, subject: Subject) -> Any:
        """Give what the last of them returns."""
        for transform in _joined(self.transforms):
            subject = transform(subject)
        return subject

    def __repr__(self) -> str:
        return f"{type(self).__name__}([{', '.join(map(repr, self.transforms))}])"


def _joined(transforms: Iterable[Transform]) -> list[Transform]:
    """Let those of one library that follow each other be done in one step."""
    steps: list[Transform] = []
    for each in transforms:
        before = steps[-1] if steps else None
        both = before.then(each) if isinstance(before, LibraryTransform) and isinstance(each, LibraryTransform) else None
        if both is None:
            steps.append(each)
        else:
            steps[-1] = both
    return steps


def as_transform(given: Any, name: str) -> Transform | None:
    """Give what was given as a function of a subject.

    Args:
        given: such a function, a transform of another library, a list of these, or None.
        name: what messages call it.

    Raises:
        SubjectError: if it is nothing of these.
    """
    if given is None:
        return None
    if isinstance(given, list | tuple):
        return Compose(given)
    if isinstance(given, type):
        raise SubjectError(f"{name} is the class {given.__name__}: make a transform of it, {given.__name__}(...)")
    library = library_of(given)
    found = None if library is None else library.transform_of(given)
    return _called(given, name) if found is None else found


def as_batch_transform(given: Any, name: str) -> Transform | None:
    """Give what was given as a function of a `SubjectsBatch`; see `as_transform`."""
    if given is None:
        return None
    if isinstance(given, Compose):
        given = given.given
    if isinstance(given, list | tuple):
        return _InTurn([each for part in given if (each := as_batch_transform(part, name)) is not None])
    library = library_of(given)
    found = None if library is None else library.batch_transform_of(given)
    if found is None and library is not None and library.transform_of(given) is not None:
        raise SubjectError(f"{name} is {given!r}, which transforms subjects, and no batches: give it as a queue's transform")
    return _called(given, name) if found is None else found


class _InTurn(Compose):
    """Transforms of a batch, which have been made functions of it."""

    def __init__(self, transforms: list[Transform]) -> None:
        self.given = self.transforms = transforms


def _called(given: Any, name: str) -> Transform:
    if not callable(given):
        raise SubjectError(f"{name} is of type {type(given).__name__}, which cannot be called")
    return given
