"""Prediction on a GPU with a real network, beside MONAI where that is installed.

A U-Net of random weights is applied to a volume, patch by patch: (a) four channels of output, kept as they are; (b) labels of 60
classes. For each system are printed: seconds; the share of them that is not the model's (by running the model alone on as many
batches); the peak of memory on the device, and of the host beyond what the process had; and the greatest difference from the same
on the CPU, or the share of labels that differ.

    python benchmarks/gpu.py [--device cuda] [--size 320] [--patch 128] [--batch 2] [--width 32] [--rounds 3]

It runs on the CPU too, at a small size, which shows that it works and nothing else:

    python benchmarks/gpu.py --device cpu --size 40 --patch 16 --width 2 --classes 5 --rounds 1
"""

import argparse
import gc
import json
import platform
import statistics
import sys
import threading
import time
import warnings
from pathlib import Path

import torch
from torch import nn

import voxloom as vx


class UNet(nn.Module):
    """Four levels with skip connections, as nnU-Net builds them; sides must be multiples of eight."""

    def __init__(self, classes, width):
        super().__init__()
        widths = [width * factor for factor in (1, 2, 4, 8)]
        self.down = nn.ModuleList([_block(before, after) for before, after in zip([1, *widths], widths, strict=False)])
        pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.grow = nn.ModuleList([nn.ConvTranspose3d(deep, wide, 2, 2) for deep, wide in pairs])
        self.up = nn.ModuleList([_block(2 * wide, wide) for _, wide in pairs])
        self.last = nn.Conv3d(width, classes, 1)

    def forward(self, volume):
        kept = []
        for number, block in enumerate(self.down):
            volume = block(volume if number == 0 else nn.functional.max_pool3d(volume, 2))
            kept.append(volume)
        for grow, block, wide in zip(self.grow, self.up, reversed(kept[:-1]), strict=True):
            volume = block(torch.cat([grow(volume), wide], dim=1))
        return self.last(volume)


def _block(before, after):
    layers = []
    for channels in (before, after):
        layers += [nn.Conv3d(channels, after, 3, padding=1), nn.InstanceNorm3d(after, affine=True), nn.LeakyReLU()]
    return nn.Sequential(*layers)


def with_voxloom(model, volume, options, reduce):
    predictor = vx.Predictor(
        model, options.patch, 0.5, batch_size=options.batch, device=options.device, amp=options.amp, reduce=reduce
    )
    return lambda: predictor(volume).data


def with_monai(model, volume, options, reduce):
    try:
        from monai.inferers import SlidingWindowInferer
    except ImportError:
        return None
    inferer = SlidingWindowInferer((options.patch,) * 3, options.batch, 0.5, "gaussian", cache_roi_weight_map=True)

    def run():
        with torch.inference_mode(), torch.autocast(torch.device(options.device).type, enabled=options.amp):
            scores = inferer(volume[None].to(options.device), model)[0]
            return (scores if reduce is None else scores.argmax(0, keepdim=True)).cpu()

    return run


def model_alone(model, options, batches):
    """Seconds that the model takes for as many batches."""
    batch = torch.rand(options.batch, 1, *[options.patch] * 3, device=options.device)
    with torch.inference_mode(), torch.autocast(torch.device(options.device).type, enabled=options.amp):
        model(batch)
        _wait(options.device)
        began = time.perf_counter()
        for _ in range(batches):
            model(batch)
        _wait(options.device)
    return time.perf_counter() - began


def _wait(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


class HostPeak:
    """The most memory that the process has while something runs, beyond what it had."""

    def __enter__(self):
        gc.collect()
        self.before, self.most, self.stop = self._now(), 0, threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.stop.set()
        self.thread.join()

    def _watch(self):
        while not self.stop.wait(0.005):
            self.most = max(self.most, self._now() - self.before)

    @staticmethod
    def _now():
        try:
            return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
        except OSError:
            return 0


def measure(name, classes, reduce, options):
    torch.manual_seed(0)
    model = UNet(classes, options.width).to(options.device).eval()
    volume = torch.randn(1, *[options.size] * 3)
    plan = vx.plan(model, volume, options.patch, 0.5, batch_size=options.batch, device=options.device, reduce=reduce)
    alone = model_alone(model, options, plan.forward_passes - 1)
    print(f"\n{name}: {plan.num_patches} patches, of which the model alone takes {alone:.2f} s\n")
    print("| | seconds | not the model's | device peak, MB | host peak, MB | unlike the CPU |")
    print("|---|---|---|---|---|---|")
    # Compared with what the same system makes of a corner on the CPU: all of it would take hours.
    corner = volume[:, : options.compare, : options.compare, : options.compare].contiguous()
    on_cpu = argparse.Namespace(**(vars(options) | {"device": "cpu", "batch": 1, "amp": False}))
    found = {}
    for system, prepare in (("voxloom", with_voxloom), ("MONAI", with_monai)):
        run = prepare(model, volume, options, reduce)
        if run is None:
            continue
        run()
        seconds, host, device = [], 0, 0
        for _ in range(options.rounds):
            if torch.device(options.device).type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            with HostPeak() as peak:
                began = time.perf_counter()
                run()
                _wait(options.device)
                seconds.append(time.perf_counter() - began)
            host = max(host, peak.most)
            if torch.device(options.device).type == "cuda":
                device = max(device, torch.cuda.max_memory_allocated())
        there = prepare(model, corner, options, reduce)()
        here = prepare(model.cpu(), corner, on_cpu, reduce)()
        model.to(options.device)
        unlike = float((there != here).float().mean()) if reduce else float((there - here).abs().max())
        middle = statistics.median(seconds)
        found[system] = {
            "seconds": seconds,
            "share": 1 - alone / middle,
            "device_bytes": device,
            "host_bytes": host,
            "unlike_cpu": unlike,
        }
        print(f"| {system} | {middle:.2f} | {1 - alone / middle:.0%} | {device / 1e6:.0f} | {host / 1e6:.0f} | {unlike:.2g} |")
    return found


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", type=int, default=320, help="voxels of the volume on each axis")
    parser.add_argument("--patch", type=int, default=128, help="voxels of a patch on each axis")
    parser.add_argument("--batch", type=int, default=2, help="patches that the model is given at a time")
    parser.add_argument("--width", type=int, default=32, help="channels of the network's first level")
    parser.add_argument("--classes", type=int, default=60, help="classes of (b)")
    parser.add_argument(
        "--compare", type=int, help="voxels on each axis that are compared with the CPU; a patch and a half if left out"
    )
    parser.add_argument("--amp", action="store_true", help="mixed precision")
    parser.add_argument("--rounds", type=int, default=3, help="rounds that are counted")
    options = parser.parse_args(arguments)
    options.compare = options.compare or min(options.size, options.patch * 3 // 2)
    warnings.simplefilter("ignore")
    name = torch.cuda.get_device_name() if torch.device(options.device).type == "cuda" else platform.machine()
    print(f"{name}, PyTorch {torch.__version__}, {options.size}³, patch {options.patch}, batch {options.batch}")
    everything = {
        "dense": measure("(a) four channels", 4, None, options),
        "labels": measure(f"(b) labels of {options.classes} classes", options.classes, "argmax", options),
    }
    target = Path("bench") / "gpu.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(vars(options) | {"results": everything}, indent=1))
    return everything


if __name__ == "__main__":
    sys.exit(None if main() else 1)
