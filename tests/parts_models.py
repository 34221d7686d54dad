"""Models that processes other than that of the tests import."""

import os
import time
from pathlib import Path

import torch


def three(batch):
    return torch.cat([batch, 1.1 - batch, (batch - 0.5).abs() * 2], 1)


def two_outputs(batch):
    return {"sum": batch + 1, "labels": three(batch)}


class Hangs:
    """Hangs in the first process that calls it twice, and in no other."""

    def __init__(self, path):
        self.path, self.calls = path, 0

    def __call__(self, batch):
        self.calls += 1
        if self.calls == 3 and not Path(self.path).exists():
            Path(self.path).write_text("")
            time.sleep(600)
        return three(batch)


class Tells:
    """Tells which processes call it more than twice, and hangs there."""

    def __init__(self, folder):
        self.folder, self.calls = folder, 0

    def __call__(self, batch):
        self.calls += 1
        if self.calls == 3:
            (Path(self.folder) / str(os.getpid())).touch()
            time.sleep(600)
        return three(batch)


class Slow:
    """Takes its time."""

    def __call__(self, batch):
        time.sleep(0.02)
        return three(batch)


def noted(batch):
    """Notes which process was asked, in the folder that the environment names."""
    with (Path(os.environ["NOTES"]) / str(os.getpid())).open("a") as notes:
        notes.write("." * len(batch))
    return batch * 2


def fails_where_large(batch):
    """Fails for patches that hold a value above 1."""
    if batch.max() > 1:
        raise ValueError("too large")
    return batch
