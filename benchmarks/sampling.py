"""Drawing random patches side by side: voxloom, TorchIO and MONAI.

Each system lives in a process of its own; rounds alternate between them. Measured are the time to the first patch of a subject
that was not seen before, the memory that this takes beyond the volumes, and the time of each patch that follows, against that
of copying it.

    python benchmarks/sampling.py [--sizes 256 400] [--patch 96] [--rounds 5]
"""

import argparse
import functools
import gc
import importlib
import statistics
import sys
import time
import warnings

import torch

from alternating import machine, memory_in_kilobytes, side_by_side

MORE_PATCHES = 20
KINDS = ("label", "weighted", "uniform")


def volumes(size):
    """An image, and a label map with a large and a small region."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(1, size, size, size, dtype=torch.uint8)
    labels[0, size // 4 : size // 2, size // 4 : size // 2, size // 4 : 3 * size // 4] = 1
    labels[0, size // 2 : size // 2 + 8, size // 2 : size // 2 + 8, size // 2 : size // 2 + 8] = 2
    return torch.rand(1, size, size, size, generator=generator), labels


def prepare_called(library, image, labels, patch, kind):
    """For voxloom and TorchIO, whose samplers are made and called alike."""
    library = importlib.import_module(library)

    def first():
        subject = library.Subject(t1=library.ScalarImage(tensor=image), seg=library.LabelMap(tensor=labels))
        sampler = {
            "label": lambda: library.LabelSampler(patch, "seg", {0: 1, 1: 1, 2: 1}),
            "weighted": lambda: library.WeightedSampler(patch, "seg"),
            "uniform": lambda: library.UniformSampler(patch),
        }[kind]()
        patches = sampler(subject)
        next(patches)
        return lambda: next(patches)

    return first


def prepare_monai(image, labels, patch, kind):
    from monai.transforms import RandCropByLabelClassesd, RandSpatialCropd, RandWeightedCropd

    def first():
        size = (patch,) * 3
        crop = {
            "label": lambda: RandCropByLabelClassesd(["t1", "seg"], "seg", size, ratios=[1, 1, 1], num_classes=3),
            "weighted": lambda: RandWeightedCropd(["t1", "seg"], "seg", size),
            "uniform": lambda: RandSpatialCropd(["t1", "seg"], size, random_size=False),
        }[kind]()
        data = {"t1": image, "seg": labels}
        crop(data)
        return lambda: crop(data)  # MONAI has no state between patches: each costs as much as the first

    return first


SYSTEMS = {
    "voxloom": functools.partial(prepare_called, "voxloom"),
    "TorchIO": functools.partial(prepare_called, "torchio"),
    "MONAI": prepare_monai,
}


def time_of_copying(image, labels, patch):
    """Seconds that it takes to copy a patch of both volumes from a place that is not in the processor's cache."""
    highest = image.shape[1] - patch + 1
    starts = torch.randint(highest, (MORE_PATCHES, 3)).tolist()
    began = time.perf_counter()
    for i, j, k in starts:
        box = (slice(None), slice(i, i + patch), slice(j, j + patch), slice(k, k + patch))
        image[box].clone(), labels[box].clone()
    return (time.perf_counter() - began) / MORE_PATCHES


def serve(name, size, patch, kind, connection):
    """Make the first patch and some more whenever asked to, and answer with what was measured."""
    warnings.simplefilter("ignore")
    image, labels = volumes(size)
    small = volumes(2 * patch if size > 2 * patch else size)
    SYSTEMS[name](*small, patch, kind)()()
    first = SYSTEMS[name](image, labels, patch, kind)
    gc.collect()
    at_rest = memory_in_kilobytes("VmRSS")
    connection.send("ready")
    while connection.recv():
        gc.collect()
        began = time.perf_counter()
        more = first()
        to_first = time.perf_counter() - began
        peak = (memory_in_kilobytes("VmHWM") - at_rest) * 1024 / 1e6
        began = time.perf_counter()
        for _ in range(MORE_PATCHES):
            more()
        each = (time.perf_counter() - began) / MORE_PATCHES
        copy = time_of_copying(image, labels, patch)
        connection.send({"first": to_first, "megabytes": peak, "each": each, "copy": copy})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 400], help="voxels of the volumes on each axis")
    parser.add_argument("--patch", type=int, default=96, help="voxels of a patch on each axis")
    parser.add_argument("--rounds", type=int, default=5, help="rounds")
    arguments = parser.parse_args()
    print(f"\n{machine()}")
    print(f"Patches of {arguments.patch}³ of an image of float32 and a label map of uint8")
    for size in arguments.sizes:
        for kind in KINDS:
            print(f"\n{kind}, {size}³\n")
            print("| | first patch, s | extra memory, MB | each patch, ms | × copying it |\n|---|---|---|---|---|")
            for name, rows in side_by_side(list(SYSTEMS), arguments.rounds, serve, size, arguments.patch, kind).items():
                first, each, megabytes = (statistics.median(row[key] for row in rows) for key in ("first", "each", "megabytes"))
                times = statistics.median(row["each"] / row["copy"] for row in rows)
                print(f"| {name} | {first:.3f} | {megabytes:.0f} | {1000 * each:.2f} | {times:.1f} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
