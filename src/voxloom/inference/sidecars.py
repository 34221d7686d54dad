"""What is written beside a result: how it was made, and what the file is known by that is told of."""

import json
from pathlib import Path
from typing import Any

from ..volumes.formats import stem_of
from .identity import differences, hash_of_file

__all__ = ["ENDINGS", "difference_of_made", "is_as_written", "other_told_of", "read_sidecar", "sidecar_of", "written"]

ENDINGS = (".nii", ".nii.gz")

Json = Any


def sidecar_of(target: Path) -> Path:
    """Name of the file that says how a result came to be."""
    return target.with_name(f"{stem_of(target)}.json")


def read_sidecar(path: Path) -> dict[str, Json] | None:
    """Read what a sidecar says; None if the file is none of voxloom's."""
    try:
        found = json.loads(path.read_text())
        return found if "voxloom" in found["versions"] else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def written(path: Path, target: Path) -> Json:
    """Say by what a result is known, which is under its own name or still under another one."""
    return {"name": target.name, "bytes": path.stat().st_size, "sha256": hash_of_file(path)}


def is_as_written(path: Path, target: Path, made: dict[str, Json] | None) -> bool:
    """Whether a result is the one that a sidecar tells of."""
    told = (made or {}).get("written")
    if not isinstance(told, dict) or told.get("bytes") != path.stat().st_size:  # so that it need not be read
        return False
    return told == written(path, target)


def other_told_of(target: Path) -> Path | None:
    """Find another file that the sidecar of a target tells of, since it has the same stem."""
    told = (read_sidecar(sidecar_of(target)) or {}).get("written")
    others = (target.with_name(stem_of(target) + ending) for ending in ENDINGS)
    return next((path for path in others if path != target and path.exists() and _name_in(told) == path.name), None)


def difference_of_made(target: Path, identity: Json) -> str | None:
    """Say in what the result that is at a target differs from what would be made; empty if in nothing, None if there is none."""
    if not target.exists():
        return None
    sidecar = sidecar_of(target)
    made = read_sidecar(sidecar)
    if made is None:
        return f"nothing beside it says how it was made ({sidecar.name})"
    if not is_as_written(target, target, made):
        return f"{sidecar.name} is not of it as it is now, but of {made.get('written')}"
    if None in identity["models"]:
        return "whether it is of the same model cannot be told of a function without a name"
    return "; ".join(differences({key: made.get(key) for key in identity}, identity))


def _name_in(told: Json) -> Json:
    return told.get("name") if isinstance(told, dict) else None
