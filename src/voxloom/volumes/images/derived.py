"""What follows from the values of a tensor, kept until they change."""

from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor

__all__ = ["DerivedValues"]


class DerivedValues:
    """Computes things of a tensor once, and again when it is another one, or was changed in place."""

    def __init__(self) -> None:
        self._values: dict[Hashable, Any] = {}
        self._stamp: tuple[int, int] | None = None

    def get(self, key: Hashable, times_set: int, data: Tensor | None, compute: Callable[[], Any]) -> Any:
        """Give one of them.

        Args:
            key: names it.
            times_set: how many tensors came before this one.
            data: the tensor; None where it has not been read.
            compute: makes it.
        """
        version = 0 if data is None or data.is_inference() else data._version
        if self._stamp != (times_set, version):
            self._values, self._stamp = {}, (times_set, version)
        if key not in self._values:
            self._values[key] = compute()
        return self._values[key]
