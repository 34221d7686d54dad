"""What the numbers of a label map mean."""

import colorsys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

from ..errors import ModeError

__all__ = ["Label", "as_labels", "color_of"]


@dataclass(frozen=True)
class Label:
    """A number of a label map, and what it means.

    Example:
        >>> Label(5, "liver", color=(221, 130, 101), code=("SCT", "10200004", "Liver")).name
        'liver'
    """

    value: int
    name: str
    color: tuple[int, int, int] | None = None
    """Red, green and blue from 0 to 255; None for one that differs from those of other numbers."""
    code: tuple[str, str, str] | None = None
    """Scheme, value and meaning of what it is in a terminology, such as `("SCT", "10200004", "Liver")`."""


def as_labels(given: Any) -> list[Label]:
    """Give labels, which may be given as names and numbers.

    Raises:
        ModeError: if something else is given, or two names for one number.

    Example:
        >>> as_labels({"liver": 5})
        [Label(value=5, name='liver', color=None, code=None)]
    """
    labels = [Label(value, name) for name, value in given.items()] if isinstance(given, Mapping) else list(given)
    for label in labels:
        is_label = isinstance(label, Label) and isinstance(label.name, str)
        if not is_label or not isinstance(label.value, Integral) or isinstance(label.value, bool):
            raise ModeError(
                f"labels has {label!r}: give names and whole numbers, such as {{'liver': 5}}, or vx.Label(5, 'liver')"
            )
    # Numbers may be of NumPy, which cannot be written down.
    labels = [
        replace(label, value=int(label.value), color=None if label.color is None else tuple(map(int, label.color)))
        for label in labels
    ]
    names: dict[int, str] = {}
    for label in labels:
        other = names.setdefault(label.value, label.name)
        if other != label.name and label.value:
            raise ModeError(f"labels has two names for {label.value}, {other!r} and {label.name!r}: give each number one name")
    return labels


def color_of(label: Label) -> tuple[int, int, int]:
    """Give the colour of a label, or one that follows from its number.

    Example:
        >>> color_of(Label(1, "liver"))
        (217, 121, 65)
    """
    if label.color is not None:
        return label.color
    # Hues by the golden ratio lie far from one another, however many there are.
    red, green, blue = colorsys.hsv_to_rgb((0.443 + label.value * 0.618034) % 1, 0.7, 0.85)
    return round(red * 255), round(green * 255), round(blue * 255)
