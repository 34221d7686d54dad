"""Dense aggregation side by side: voxloom, TorchIO, MONAI, nnU-Net, and a bare loop.

Every system cuts a volume of four channels into overlapping patches, gives them to a model that returns its input, and weaves
the outputs together. Each lives in a process of its own; the rounds alternate between them, so that what slows the machine
down for a while slows all of them. The time that is spent in the model (MONAI needs one that copies, because it writes into
its output) is taken out.

    python benchmarks/aggregation.py [--size 256] [--patch 96] [--overlap 48] [--rounds 7]

Prints a table of medians, of medians of the ratios to the bare loop and to voxloom, round by round, of peak memory beyond
the volume, and of the largest error, and writes all measurements to bench/aggregation.json.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch

from alternating import forget_peak, machine, memory_in_kilobytes, side_by_side

CHANNELS = 4
BATCH = 4


class Model(torch.nn.Module):
    """Returns its input, or a copy of it, and knows how long that took."""

    def __init__(self, copies):
        super().__init__()
        self.copies, self.seconds = copies, 0.0

    def forward(self, batch):
        began = time.perf_counter()
        result = batch.clone() if self.copies else batch
        self.seconds += time.perf_counter() - began
        return result


def prepare_bare(volume, patch, overlap, mode):
    """Copy each patch once, and add it under fixed weights: what cannot be left out. Its output is of no use."""
    length = volume.shape[1]
    starts = sorted({*range(0, length - patch + 1, patch - overlap), length - patch})
    weights = torch.rand(patch, patch, patch)

    def run(model):
        output = torch.zeros_like(volume)
        for i in starts:
            for j in starts:
                for k in starts:
                    box = (slice(None), slice(i, i + patch), slice(j, j + patch), slice(k, k + patch))
                    output[box].addcmul_(volume[box].clone(), weights)

    return run, False


def prepare_voxloom(volume, patch, overlap, mode):
    import voxloom as vx

    subject = vx.Subject(t1=vx.ScalarImage(volume))

    def run(model):
        sampler = vx.GridSampler(subject, patch, overlap)
        aggregator = vx.GridAggregator(sampler, mode)
        for batch in vx.SubjectsLoader(sampler, batch_size=BATCH):
            aggregator.add_batch(model(batch.t1.data), batch[vx.LOCATION])
        return aggregator.get_output()

    return run, False


def prepare_predict(volume, patch, overlap, mode):
    import voxloom as vx

    current = []
    predictor = vx.Predictor(lambda batch: current[-1](batch), patch, overlap, mode, batch_size=BATCH)

    def run(model):
        current[:] = [model]
        return predictor(volume).data

    return run, False


def prepare_torchio(volume, patch, overlap, mode):
    import torchio as tio

    subject = tio.Subject(t1=tio.ScalarImage(tensor=volume))

    def run(model):
        sampler = tio.GridSampler(subject, patch, overlap)
        aggregator = tio.GridAggregator(sampler, "hann" if mode == "gaussian" else mode)
        for batch in tio.SubjectsLoader(sampler, batch_size=BATCH):
            aggregator.add_batch(model(batch["t1"][tio.DATA]), batch[tio.LOCATION])
        return aggregator.get_output_tensor()

    return run, False


def prepare_monai(volume, patch, overlap, mode):
    from monai.inferers import SlidingWindowInferer

    theirs = "constant" if mode == "average" else "gaussian"
    inferer = SlidingWindowInferer((patch,) * 3, BATCH, overlap / patch, theirs, cache_roi_weight_map=True)
    return lambda model: inferer(volume[None], model)[0], True


def prepare_nnunet(volume, patch, overlap, mode):
    os.environ |= dict.fromkeys(("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"), "/nonexistent")
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(
        tile_step_size=1 - overlap / patch,
        use_gaussian=mode != "average",
        use_mirroring=False,
        perform_everything_on_device=False,
        device=torch.device("cpu"),
        allow_tqdm=False,
    )
    predictor.configuration_manager = SimpleNamespace(patch_size=(patch,) * 3)
    predictor.label_manager = SimpleNamespace(num_segmentation_heads=CHANNELS)

    def run(model):
        predictor.network = model
        return predictor.predict_sliding_window_return_logits(volume)

    return run, False


SYSTEMS = {
    "bare loop": prepare_bare,
    "voxloom": prepare_voxloom,
    "voxloom.predict": prepare_predict,
    "TorchIO": prepare_torchio,
    "MONAI": prepare_monai,
    "nnU-Net": prepare_nnunet,
}


def serve(name, size, patch, overlap, mode, connection):
    """Run one system whenever it is asked for, and answer with what was measured."""
    warnings.simplefilter("ignore")
    generator = torch.Generator().manual_seed(0)
    volume = torch.rand(CHANNELS, size, size, size, generator=generator)
    run, copies = SYSTEMS[name](volume, patch, overlap, mode)
    # A small run first, so that code which is loaded late does not count as memory.
    SYSTEMS[name](volume[:, :64, :64, :64].contiguous(), 32, 16, mode)[0](Model(copies).eval())
    gc.collect()
    at_rest = memory_in_kilobytes("VmRSS")
    connection.send("ready")
    while connection.recv():
        gc.collect()
        model = Model(copies).eval()
        forget_peak()
        began = time.perf_counter()
        output = run(model)
        seconds = time.perf_counter() - began - model.seconds
        megabytes = (memory_in_kilobytes("VmHWM") - at_rest) * 1024 / 1e6
        error = None if name == "bare loop" else float((output.float() - volume).abs().max())
        del output
        connection.send({"seconds": seconds, "megabytes": megabytes, "error": error})


def ratio(results, name, other):
    """Median of the ratios of two systems, round by round, as text."""
    if other not in results:
        return "-"
    pairs = zip(results[name], results[other], strict=True)
    return f"{statistics.median(one['seconds'] / two['seconds'] for one, two in pairs):.2f}"


def report(results, size, mode):
    output = CHANNELS * size**3 * 4 / 1e6
    print(f"\n{mode}: the output itself is {output:.0f} MB\n")
    print("| | seconds | × bare loop | × voxloom | extra memory, MB | × output | largest error |")
    print("|---|---|---|---|---|---|---|")
    for name, measurements in results.items():
        seconds = statistics.median(item["seconds"] for item in measurements)
        megabytes = statistics.median(item["megabytes"] for item in measurements)
        error = max((item["error"] for item in measurements if item["error"] is not None), default=None)
        print(
            f"| {name} | {seconds:.3f} | {ratio(results, name, 'bare loop')} | {ratio(results, name, 'voxloom')}"
            f" | {megabytes:.0f} | {megabytes / output:.2f} | {'-' if error is None else f'{error:.1e}'} |"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=256, help="voxels of the volume on each axis")
    parser.add_argument("--patch", type=int, default=96, help="voxels of a patch on each axis")
    parser.add_argument("--overlap", type=int, default=48, help="voxels that neighbours share")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that are counted")
    parser.add_argument("--modes", nargs="+", default=["gaussian", "hann", "average", "crop"], help="overlap modes of voxloom")
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), help="what to compare")
    arguments = parser.parse_args()
    print(machine())
    print(
        f"{arguments.size}³, {CHANNELS} channels of float32, patch {arguments.patch}, overlap {arguments.overlap},"
        f" batches of {BATCH}"
    )
    everything = {}
    for mode in arguments.modes:
        # Only TorchIO crops and has a Hann window; only MONAI and nnU-Net a Gaussian, for which TorchIO stands with Hann.
        absent = {"hann": {"MONAI", "nnU-Net"}, "crop": {"MONAI", "nnU-Net"}}.get(mode, set())
        names = [name for name in arguments.systems if name not in absent]
        found = side_by_side(names, arguments.rounds + 1, serve, arguments.size, arguments.patch, arguments.overlap, mode)
        everything[mode] = {name: rounds[1:] for name, rounds in found.items()}  # the first round warms up
        report(everything[mode], arguments.size, mode)
    target = Path("bench") / "aggregation.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(vars(arguments) | {"results": everything}, indent=1))
    print(f"\nAll measurements: {target.resolve()}")


if __name__ == "__main__":
    sys.exit(main())
