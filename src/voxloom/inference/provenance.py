"""Where a result comes from: what tells its run from others, and what its sidecar says."""

import datetime
import json
import logging
import platform
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import torch

from .._version import __version__
from ..core.grid.windows import for_axis
from ..errors import VoxloomError
from ..io.files import files_in, hash_of_path
from ..io.fingerprints import fingerprint_of_model, fingerprint_of_option
from ..io.protocols import Json
from ..models.forms import CallForm
from ..models.running import Models
from .planning.plan import PredictionPlan
from .planning.results import ResultOptions
from .planning.settings import Input, Settings

__all__ = ["fingerprint_of_models", "fingerprint_of_run", "sidecar_of_run"]

_logger = logging.getLogger("voxloom.predict")


def fingerprint_of_models(models: Models, name: str | None) -> Json:
    """Say what tells models from others."""
    return [fingerprint_of_model(model, name) for model in models.models]


def fingerprint_of_run(of_models: Json, models: Models, settings: Settings, options: ResultOptions, given: Input) -> Json:
    """Give what a run must have in common with one that it resumes, or whose result is taken for its own."""
    window = settings.window
    is_named = isinstance(settings.overlap_mode, str) or window is None
    return {
        "versions": {"voxloom": __version__, "torch": str(torch.__version__)},
        "input": json.loads(json.dumps(given.source.fingerprint())),  # as it will be read again
        "models": of_models,
        "options": {
            "patch_size": list(settings.patch_size),
            "patch_overlap": list(settings.patch_overlap),
            **({} if settings.patch_spacing == "fixed" else {"patch_spacing": settings.patch_spacing}),
            "overlap_mode": settings.overlap_mode
            if is_named or window is None
            else fingerprint_of_option([for_axis(window, axis)(size) for axis, size in enumerate(settings.patch_size)]),
            "batch_size": settings.batch_size,
            "full_batches": settings.full_batches,
            "dtype": str(given.dtype),
            "activation": fingerprint_of_option(options.activation),
            "reduce": fingerprint_of_option(options.reduce),
            **({"after": list(options.after)} if options.after else {}),
            "output_scale": fingerprint_of_option(options.scale),
            "padding_mode": fingerprint_of_option(settings.padding_mode),
            "mirror_flips": [list(flip) for flip in models.flips],
            "amp": str(models.amp),
            "fill": fingerprint_of_option(settings.fill),
            **(
                {} if settings.form == CallForm() else {"context": list(settings.context), "slice_axis": settings.form.slice_axis}
            ),
            **({} if given.like is None else {"like": given.like.fingerprint(), "interpolation": list(given.kinds)}),
            "mask": None if given.needed is None else fingerprint_of_option(given.needed),
            "device": models.device.type,
        },
    }


def sidecar_of_run(fingerprint: Json, given: Input, plan: PredictionPlan, models: Models, warnings: Sequence[str]) -> Json:
    """Say how a result came to be."""
    notes = list(warnings)
    is_gpu = models.device.type == "cuda"
    return fingerprint | {
        "files": _hashes_of(fingerprint["input"], given, notes),
        "plan": plan.to_json()
        | {
            "patches": plan.num_patches,
            "computed_patches": plan.computed_patches,
            "forward_passes": plan.forward_passes,
            "peak_bytes": plan.peak_bytes,
        },
        **({"labels": [asdict(label) for label in given.labels]} if given.labels else {}),
        "made_with": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "system": f"{platform.system()} {platform.machine()}",
            "device": torch.cuda.get_device_name(models.device) if is_gpu else str(models.device),
        },
        "warnings": notes,
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _hashes_of(recorded: Json, given: Input, notes: list[str]) -> Json:
    """Give the hashes of the files of an input; without them where the files are no longer those that were read."""
    if not given.source.paths:
        return {}
    try:
        found = {str(path): hash_of_path(path) for path in files_in(given.source.paths)}
        if json.loads(json.dumps(given.source.fingerprint())) == recorded:
            return found
        what = (
            "was changed, or touched, while or after it was read: what was not read at once may be of both. Its hash is left out"
        )
    except (OSError, VoxloomError) as error:
        what = f"was changed or removed after it had been read ({error}): its hash is left out"
    notes.append(f"{given.name} {what}")
    _logger.warning(notes[-1])
    return {}
