"""Where a result comes from: what tells its run from others, and what its sidecar says."""

import datetime
import platform
from typing import Any

import numpy as np
import torch

from .._version import __version__
from .identity import content_hashes, identity_of_model, identity_of_option, identity_of_volume
from .models import Models
from .options import Options
from .planning import Job
from .plans import PredictionPlan

__all__ = ["identity_of", "sidecar_of_run"]

Json = Any


def identity_of(models: Models, options: Options, model_name: str | None, job: Job) -> Json:
    """Give what a run must have in common with one that it takes up, or whose result is taken for its own."""
    window = options.window
    return {
        "versions": {"voxloom": __version__, "torch": str(torch.__version__)},
        "input": {name: identity_of_volume(volume) for name, volume in job.volumes.items()},
        "models": [identity_of_model(model, model_name) for model in models.models],
        "options": {
            "patch_size": list(options.patch_size),
            "patch_overlap": list(options.patch_overlap),
            "overlap_mode": options.overlap_mode
            if isinstance(options.overlap_mode, str) or window is None
            else identity_of_option([window(size).numpy() for size in options.patch_size]),
            "batch_size": options.batch_size,
            "activation": identity_of_option(options.wanted.activation),
            "reduce": identity_of_option(options.wanted.reduce),
            "output_scale": identity_of_option(options.wanted.scale),
            "padding_mode": identity_of_option(options.padding_mode),
            "mirror_flips": [list(flip) for flip in models.flips],
            "amp": str(models.amp),
            "fill": identity_of_option(options.fill),
            "mask": None if job.needed is None else identity_of_option(job.needed),
            "device": models.device.type,
        },
        "results": {str(result.name): {"shape": list(form.shape), "dtype": str(form.dtype)} for result, form in job.results},
    }


def sidecar_of_run(identity: Json, job: Job, plan: PredictionPlan, models: Models, warnings: list[str]) -> Json:
    """Say how a result came to be."""
    is_gpu = models.device.type == "cuda"
    return identity | {
        "files": content_hashes(job.volumes.values()),
        "plan": plan.to_json()
        | {
            "patches": plan.num_patches,
            "computed_patches": plan.computed_patches,
            "forward_passes": plan.forward_passes,
            "peak_bytes": plan.peak_bytes,
        },
        "made_with": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "system": f"{platform.system()} {platform.machine()}",
            "device": torch.cuda.get_device_name(models.device) if is_gpu else str(models.device),
        },
        "warnings": warnings,
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
