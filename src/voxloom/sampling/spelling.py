"""Both ways in which samplers are made: with a subject first, or without one and the patch size first."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

from ..errors import SubjectError
from ..volumes.libraries import found_subject

__all__ = ["subject_may_be_left_out"]

Make = TypeVar("Make", bound=Callable[..., None])


def subject_may_be_left_out(most: int | None = None) -> Callable[[Make], Make]:
    """Let an `__init__` whose first argument is a subject be called without it: then what follows comes first.

    Args:
        most: how many arguments may then be given by position; None for all.
    """

    def decorated(make: Make) -> Make:
        signature = inspect.signature(make)

        @functools.wraps(make)
        def made(self: Any, *arguments: Any, **named: Any) -> None:
            first = arguments[0] if arguments else named.get("subject")
            subject = found_subject(first)
            if subject is not None:
                named.pop("subject", None)
                arguments = (subject, *arguments[1:])
            elif first is not None:
                arguments = arguments or (named.pop("subject"),)
                try:
                    if most is not None and len(arguments) > most:
                        raise TypeError(f"{len(arguments)} arguments by position")
                    arguments = (None, *arguments)
                    signature.bind(self, *arguments, **named)
                except TypeError as error:
                    name = type(self).__name__
                    raise SubjectError(
                        f"{name} was given {first!r} in the place of the subject, and one argument too many ({error}):"
                        f" {name}(subject, patch_size), or, to call it with a subject later, {name}(patch_size=...)"
                    ) from None
            make(self, *arguments, **named)

        return cast(Make, made)

    return decorated
