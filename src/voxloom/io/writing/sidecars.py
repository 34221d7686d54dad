"""What is written beside a result: how it was made, and what the file is known by that is told of."""

import json
from pathlib import Path

from ..files import hash_of_path, sidecar_in, size_of_path
from ..formats import endings, is_folder_target, stem_of
from ..protocols import Json

__all__ = ["is_as_written", "other_told_of", "read_sidecar", "run_of", "sidecar_of", "written"]


def sidecar_of(target: Path) -> Path:
    """Name of the file that says how a result came to be."""
    return sidecar_in(target) if is_folder_target(target) else target.with_name(f"{stem_of(target)}.json")


def read_sidecar(path: Path) -> dict[str, Json] | None:
    """Read what a sidecar says; None if the file is none of voxloom's."""
    try:
        found = json.loads(path.read_text())
        return found if "voxloom" in found["versions"] else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def run_of(target: Path) -> str | None:
    """Name of the run that a result was made by; None where nothing says that."""
    return (read_sidecar(sidecar_of(target)) or {}).get("run")


def written(path: Path, target: Path) -> Json:
    """Say by what a result is known, which is under its own name or still under another one."""
    return {"name": target.name, "bytes": size_of_path(path), "sha256": hash_of_path(path)}


def is_as_written(path: Path, target: Path, sidecar: dict[str, Json] | None) -> bool:
    """Whether a result is the one that a sidecar tells of."""
    told = (sidecar or {}).get("written")
    if not isinstance(told, dict) or not path.exists() or told.get("bytes") != size_of_path(path):  # so that it need not be read
        return False
    return told == written(path, target)


def other_told_of(target: Path) -> Path | None:
    """Find another file that the sidecar of a target tells of, since it has the same stem."""
    told = (read_sidecar(sidecar_of(target)) or {}).get("written")
    name = told.get("name") if isinstance(told, dict) else None
    others = (target.with_name(stem_of(target) + ending) for ending in endings(lambda each: each.is_streamed))
    return next((path for path in others if path != target and path.exists() and name == path.name), None)
