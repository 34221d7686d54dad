"""The main job with nothing but the package's own requirements: run by hand and by CI, without pytest."""

import subprocess
import sys

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
    demo = subprocess.run([sys.executable, "-m", "voxloom", "demo"], capture_output=True, text=True, check=False)
    assert demo.returncode == 1, demo
    assert "pip install 'voxloom[plot]'" in demo.stderr, demo.stderr

print("The package works.")
