"""Whole volumes through a network on the CPU, side by side: voxloom, MONAI, nnU-Net, and a bare loop.

The network is a small U-Net (MONAI's BasicUNet with features from 16 to 64), or one that only multiplies by the factors of some
channels, into fresh memory: then nothing but the way around it counts. Each call of each system is in a process that has not
called it before; that process calls it a second time. The rounds alternate between the systems. What is "kept" runs within
`vx.kept_memory()`, which helps any loop; `predict` does that by itself.

    python benchmarks/network.py [--network unet] [--shape 160 160 128] [--patch 96] [--overlap 48] [--batch 1] [--rounds 3]
    python benchmarks/network.py --network 4 --shape 256 256 256 --batch 4
    python benchmarks/network.py --network 60 --shape 160 160 160 --batch 4
    python benchmarks/network.py --bfloat16

Prints medians, medians of the ratios to MONAI and to the bare loop, how many patches the network was given, and peak memory
beyond what the process had.
"""

import argparse
import contextlib
import gc
import itertools
import json
import statistics
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import torch

from alternating import end, forget_peak, machine, memory_in_kilobytes, start
from nnunet import nnunet_predictor

CLASSES = 3


class Factors(torch.nn.Module):
    """Multiplies by the factors of some channels."""

    def __init__(self, channels):
        super().__init__()
        self.factors = torch.nn.Parameter(torch.arange(1.0, channels + 1).view(-1, 1, 1, 1))

    def forward(self, batch):
        return batch * self.factors


class Counting(torch.nn.Module):
    """Knows how many patches it was given."""

    def __init__(self, network):
        super().__init__()
        self.network, self.patches = network, 0

    def forward(self, batch):
        self.patches += len(batch)
        return self.network(batch)


def make_network(name):
    torch.manual_seed(0)
    if name != "unet":
        return Factors(int(name))
    from monai.networks.nets import BasicUNet

    return BasicUNet(3, 1, CLASSES, features=(16, 16, 32, 64, 64, 16))


def window(size):
    place = torch.arange(size) - (size - 1) / 2
    one = torch.exp(-(place**2) / (2 * (size / 8) ** 2))
    return one[:, None, None] * one[None, :, None] * one[None, None, :]


def prepare_bare(options, is_divided=False):
    """What cannot be left out: copy the patches of a batch, call the network, and add them; dividing is left out unless asked."""
    sides = []
    for length in options.shape:
        starts = range(0, length - options.patch + 1, options.patch - options.overlap)
        sides.append(sorted({*starts, length - options.patch}))
    boxes = [(slice(None), *(slice(start, start + options.patch) for start in starts)) for starts in itertools.product(*sides)]
    weights = window(options.patch)

    def run(network, volume):
        output = None
        sums = torch.zeros(options.shape) if is_divided else None
        with torch.inference_mode():
            for first in range(0, len(boxes), options.batch):
                some = boxes[first : first + options.batch]
                made = network(torch.stack([volume[box] for box in some]))
                output = torch.zeros(made.shape[1], *options.shape) if output is None else output
                for box, patch in zip(some, made, strict=True):
                    output[box].addcmul_(patch, weights)
                    if is_divided:
                        sums[box[1:]].add_(weights)
            return output.div_(sums) if is_divided else output

    return run


def prepare_by_hand(options):
    import voxloom as vx

    def run(network, volume):
        sampler = vx.GridSampler(vx.Subject(image=vx.ScalarImage(volume)), options.patch, options.overlap)
        aggregator = vx.GridAggregator(sampler, "gaussian")
        with torch.inference_mode():
            for batch in vx.SubjectsLoader(sampler, batch_size=options.batch):
                aggregator.add_batch(network(batch.image.data), batch[vx.LOCATION])
        return aggregator.get_output()

    return run


def prepare_predict(options):
    import voxloom as vx

    def run(network, volume):
        amp = torch.bfloat16 if options.bfloat16 else False
        return vx.predict(network, volume, options.patch, options.overlap, "gaussian", batch_size=options.batch, amp=amp).data

    return run


def prepare_monai(options):
    from monai.inferers import SlidingWindowInferer

    inferer = SlidingWindowInferer((options.patch,) * 3, options.batch, options.overlap / options.patch, "gaussian")

    def run(network, volume):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=options.bfloat16):
            return inferer(volume[None], network)[0]

    return run


def prepare_nnunet(options):
    classes = CLASSES if options.network == "unet" else int(options.network)
    predictor = nnunet_predictor(options.patch, options.overlap, classes)

    def run(network, volume):
        predictor.network = network
        return predictor.predict_sliding_window_return_logits(volume)

    return run


SYSTEMS = {
    "bare loop": prepare_bare,
    "bare loop, divided": partial(prepare_bare, is_divided=True),
    "voxloom by hand": prepare_by_hand,
    "voxloom.predict": prepare_predict,
    "MONAI": prepare_monai,
    "nnU-Net": prepare_nnunet,
}
KEPT = ", kept"


def serve(name, options, connection):
    """Call one system twice, and answer with what was measured."""
    warnings.simplefilter("ignore")
    volume = torch.rand(1, *options.shape, generator=torch.Generator().manual_seed(0))
    run = SYSTEMS[name.removesuffix(KEPT)](options)
    network = Counting(make_network(options.network)).eval()
    keep = contextlib.nullcontext
    if name.endswith(KEPT):
        from voxloom import kept_memory as keep
    gc.collect()
    at_rest = memory_in_kilobytes("VmRSS")
    connection.send("ready")
    while connection.recv():
        measured = []
        for _ in range(2):
            network.patches = 0
            forget_peak()
            began = time.perf_counter()
            with keep():
                output = run(network, volume)
            seconds = time.perf_counter() - began
            peak = (memory_in_kilobytes("VmHWM") - at_rest) * 1024 / 1e6
            del output
            measured.append({"seconds": seconds, "patches": network.patches, "megabytes": peak})
        connection.send(measured)


def measure(options):
    """Give for each system a list of rounds, each of two calls."""
    results = {name: [] for name in options.systems}
    for number in range(options.rounds):
        for name in options.systems if number % 2 else reversed(options.systems):
            process, pipe = start(serve, name, options)
            pipe.send(True)
            results[name].append(pipe.recv())
            end(process, pipe)
    return results


def ratio(results, name, other, call):
    if other not in results:
        return "-"
    pairs = zip(results[name], results[other], strict=True)
    return f"{statistics.median(one[call]['seconds'] / two[call]['seconds'] for one, two in pairs):.2f}"


def report(results):
    print("\n| | first call, s | second, s | × MONAI | × bare loop | patches given | peak, MB |")
    print("|---|---|---|---|---|---|---|")
    for name, rounds in results.items():
        first, second = (statistics.median(each[call]["seconds"] for each in rounds) for call in (0, 1))
        monai, bare = (" / ".join(ratio(results, name, other, call) for call in (0, 1)) for other in ("MONAI", "bare loop"))
        peak = max(call["megabytes"] for each in rounds for call in each)
        patches = "/".join(str(call["patches"]) for call in rounds[0])
        print(f"| {name} | {first:.2f} | {second:.2f} | {monai} | {bare} | {patches} | {peak:.0f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="unet", help="unet, or the number of channels that one is multiplied to")
    parser.add_argument("--shape", type=int, nargs=3, default=[160, 160, 128])
    parser.add_argument("--patch", type=int, default=96, help="voxels of a patch on each axis")
    parser.add_argument("--overlap", type=int, default=48, help="voxels that neighbours share")
    parser.add_argument("--batch", type=int, default=1, help="patches that the network is given at a time (nnU-Net: always 1)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bfloat16", action="store_true", help="mixed precision, for voxloom.predict and MONAI")
    parser.add_argument("--systems", nargs="+", help="what to compare")
    options = parser.parse_args()
    if options.systems is None:
        options.systems = ["voxloom.predict", "MONAI"] if options.bfloat16 else [*SYSTEMS]
        if not options.bfloat16:
            options.systems += [f"{name}{KEPT}" for name in ("bare loop", "bare loop, divided", "voxloom by hand", "MONAI")]
    print(machine(), flush=True)
    what = "U-Net" if options.network == "unet" else f"1 channel to {options.network}"
    print(
        f"{what}{', bfloat16' if options.bfloat16 else ''}, {' × '.join(map(str, options.shape))} voxels, patch {options.patch},"
        f" overlap {options.overlap}, batches of {options.batch}"
    )
    results = measure(options)
    report(results)
    target = Path("bench") / "network.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(vars(options) | {"results": results}, indent=1))
    print(f"\nAll measurements: {target.resolve()}")


if __name__ == "__main__":
    sys.exit(main())
