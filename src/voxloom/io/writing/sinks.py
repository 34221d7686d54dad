"""Sinks of the user's, as stores."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from ...core.boxes import Box
from ...errors import RecordError
from ..protocols import Json, VolumeSpec
from .words import BEGIN_AGAIN

__all__ = ["Sink", "SinkStore"]


@runtime_checkable
class Sink(Protocol):
    """The least that takes a result: it cannot be resumed, unlike a `VolumeStore`.

    Its methods are called one at a time, but not all from one thread. After `open` each voxel is written once, in blocks that do
    not overlap; then follows `close`, or, after an error, `abort`.
    """

    def open(self, form: VolumeSpec) -> None:
        """Make ready for a result."""
        ...

    def write(self, box: Box, values: Tensor) -> None:
        """Take a block.

        Args:
            box: voxels `(I, J, K)`.
            values: tensor `(C, *box.shape)` on the CPU, which the sink may keep, but not change.
        """
        ...

    def close(self) -> Any:
        """All is written. What is returned is what `predict` returns."""
        ...

    def abort(self) -> None:
        """No more will come."""
        ...


class SinkStore:
    """Makes a store of a sink."""

    supports_resume = False
    path: Path | None = None
    chunk_shape: tuple[int, int, int] | None = None

    def __init__(self, sink: Sink) -> None:
        self.sink = sink

    def check(self) -> None:
        """See `VolumeStore`."""

    def create(self, spec: VolumeSpec, run: str) -> None:
        """See `VolumeStore`."""
        self.sink.open(spec)

    def reopen(self, spec: VolumeSpec, run: str) -> None:
        """See `VolumeStore`."""
        raise RecordError(f"what {type(self.sink).__name__} has taken is gone: {BEGIN_AGAIN}")

    def write(self, box: Box, values: Tensor) -> None:
        """See `VolumeStore`."""
        self.sink.write(box, values)

    def flush(self) -> None:
        """See `VolumeStore`."""

    def commit(self, sidecar: Mapping[str, Json], run: str) -> Any:
        """See `VolumeStore`."""
        return self.sink.close()

    def abort(self) -> None:
        """See `VolumeStore`."""
        self.sink.abort()

    def discard(self, run: str) -> None:
        """See `VolumeStore`."""
