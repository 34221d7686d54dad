"""Predictions in parts of one scan, for tests."""

import hashlib
import os
import random
import signal

import torch

import voxloom as vx
from parts_models import three

OPTIONS = {"patch_size": 16, "patch_overlap": 8, "reduce": "argmax", "model_name": "three"}


def store(path, **options):
    return vx.ZarrStore(path, **{"chunks": 16, "levels": 2, **options})


def hashes(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in ("voxloom.json", "zarr.json"))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def leftovers(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def run_of(scan, target, model=three, shard_size=16, **options):
    return vx.Predictor(model, **{**OPTIONS, **options}).shards(scan, output=target, shard_size=shard_size)


def share(scan, target, number, count, seed, shard_size=16):
    """What a job of an array does."""
    torch.set_num_threads(1)
    run = run_of(scan, store(target), shard_size=shard_size)
    numbers = list(run.remaining((number, count)))
    random.Random(seed).shuffle(numbers)
    for each in numbers:
        run.compute(each)
    if run.is_whole():
        run.publish()


def dying(function):
    """Let a process be killed after a call."""

    def call(*arguments, **more):
        function(*arguments, **more)
        os.kill(os.getpid(), signal.SIGKILL)

    return call
