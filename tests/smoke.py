"""The main job with nothing but the package's own requirements: run by hand and by CI, without pytest."""

import importlib
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import voxloom as vx

subject = vx.Subject(vx.datasets.HeadPhantom(40))
sampler = vx.GridSampler(subject, patch_size=16, patch_overlap=4)
aggregator = vx.GridAggregator(sampler, overlap_mode="hann")
for batch in vx.SubjectsLoader(sampler, batch_size=4):
    aggregator.add_batch(batch.t1.data, batch)
torch.testing.assert_close(aggregator.get_output(), subject.t1.data)

try:
    import matplotlib  # noqa: F401 - only whether it is there
except ImportError:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "voxloom", "demo", "--size", "32", "--patch-size", "16", "--steps", "1"]
        demo = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
        assert demo.returncode == 0, demo
        assert "pip install 'voxloom[plot]'" in demo.stdout, demo.stdout
        assert (Path(folder) / "demo" / "result.nii.gz").exists()

# Extras that are not there are named, with the command that brings them.
for module in ("torchio", "monai", "lightning"):
    try:
        importlib.import_module(module)
    except ImportError:
        try:
            ours = importlib.import_module(f"voxloom.integrations.{module}")
            ours.as_torchio(subject) if module == "torchio" else ours.as_dict(subject)
        except vx.errors.MissingDependencyError as error:
            assert f"pip install 'voxloom[{module}]'" in str(error), error
        else:
            raise AssertionError(f"{module} is not there, and nothing says so")

print("The package works.")
