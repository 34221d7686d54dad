"""Putting a result of a prediction in parts under its name, from an array of which all but the coarser levels is there."""

import shutil
from pathlib import Path

from ...errors import RecordError
from ...io.protocols import Json, VolumeSpec
from ...io.writing.sidecars import run_of
from ...io.zarr.parts import PartsStore
from ...runs.claim import Claim

__all__ = ["put_in_place"]


def put_in_place(
    store: PartsStore, spec: VolumeSpec, parts: Path, room: Path, sidecar: dict[str, Json], run: str, claim: Claim
) -> None:
    """Put a result under its name; whatever has been done of that is not done again.

    Args:
        store: where it goes.
        spec: what it is.
        parts: the array that parts are written to.
        room: for what is needed to make the coarser levels.
        sidecar: how the result was made.
        run: name of the run.
        claim: what this process must hold.

    Raises:
        RecordError: if the array is gone, or another process has taken the claim.
    """
    whole = store.array(run)
    if run_of(store.path) != run:
        if not whole.exists():
            try:
                parts.rename(whole)  # so that a part that comes late finds nothing to write into
            except FileNotFoundError:
                raise RecordError(f"{parts} is gone: remove {room.parent.parent}, and begin again") from None
        store.complete(spec, room, run)
        store.make_ready(sidecar, run)
        if not claim.is_held:
            raise RecordError(f"another process puts {store.path} in its place, since nothing was heard of this one")
    store.commit(sidecar, run)
    for path in (whole, parts):
        shutil.rmtree(path, ignore_errors=True)
