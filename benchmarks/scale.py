"""What a prediction over many machines would be, from the plan itself: nothing is computed, and nothing is listed.

For volumes from a CT to a hundred teravoxels, and for a million CTs: parts, patches and how often each is computed, bytes read
and written, records, what a scheduler is asked in a second, and hours and cost for some numbers of GPUs. What a patch costs is an
assumption, stated below; everything else follows from the plan's own objects.

    python benchmarks/scale.py [--patch 128] [--overlap 0.5] [--milliseconds 25] [--euros 1.5]
"""

import argparse
import json
import math
import time
import tracemalloc
from pathlib import Path

from alternating import machine

# Voxels, bytes of a voxel, and how many such volumes.
VOLUMES = {
    "a CT": ((512, 512, 600), 2, 1),
    "a light-sheet brain": ((8192, 8192, 4096), 2, 1),
    "a hundred teravoxels": ((46416, 46416, 46416), 1, 1),
    "a million CTs": ((512, 512, 600), 2, 10**6),
}
GPUS = (1, 8, 64, 512)
RECORD_BYTES = 80


def simulated(shape, itemsize, count, options):
    """Give what a prediction of labels from such volumes takes."""
    from voxloom.core.grid.grids import PatchGrid
    from voxloom.core.grid.shards import ShardGrid
    from voxloom.io.zarr.writing import chunks_for

    patch = tuple(min(options.patch, size) for size in shape)
    overlap = tuple(int(size * options.overlap) // 2 * 2 for size in patch)
    grid = PatchGrid.cover(shape, patch, overlap)
    _, shard = chunks_for(shape, 1)
    parts = ShardGrid.of(shape, shard, patch) if count == 1 else ShardGrid(shape, shape)
    computed = parts.computed_patches(grid)
    seconds = computed * options.milliseconds / 1000 * count
    # Each part reads the chunks that its patches touch, once: its own box and half a patch around it.
    around = [min(length, size + step) for length, size, step in zip(shape, parts.size, patch, strict=True)]
    read = len(parts) * math.prod(around) * itemsize * count
    return {
        "patches": grid.num_patches * count,
        "parts": len(parts) * count,
        "redundancy": computed / grid.num_patches,
        "part": parts.size,
        "seconds for a part": computed / len(parts) * options.milliseconds / 1000,
        "bytes read": read,
        "bytes written": math.prod(shape) * count,
        "files written": math.prod(-(-length // size) for length, size in zip(shape, shard, strict=True)) * count,
        "bytes of records": len(parts) * count * RECORD_BYTES,
        "hours": {gpus: seconds / min(gpus, len(parts) * count) / 3600 for gpus in GPUS},
        "parts in a second": {gpus: min(gpus, len(parts) * count) * len(parts) * count / seconds for gpus in GPUS},
        "euros": seconds / 3600 * options.euros,
    }


def planning(options):
    """Give seconds and bytes of planning ten million parts, and of asking for every ten-thousandth."""
    from voxloom.core.grid.grids import PatchGrid
    from voxloom.core.grid.shards import ShardGrid

    tracemalloc.start()
    began = time.perf_counter()
    parts = ShardGrid((2**16,) * 3, (304,) * 3)
    grid = PatchGrid.cover((2**16,) * 3, (options.patch,) * 3, (options.patch // 2,) * 3)
    parts.computed_patches(grid)
    for number in range(0, len(parts), 10**4):
        _ = parts[number]
    seconds = time.perf_counter() - began
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return {"parts": len(parts), "seconds": seconds, "megabytes": peak / 2**20}


def in_short(number):
    for factor, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= factor:
            return f"{number / factor:.3g} {name}"
    return f"{number:.3g}"


def main(arguments=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--patch", type=int, default=128)
    parser.add_argument("--overlap", type=float, default=0.5)
    parser.add_argument("--milliseconds", type=float, default=25, help="for a patch on a GPU, an assumption")
    parser.add_argument("--euros", type=float, default=1.5, help="for an hour of a GPU, an assumption")
    options = parser.parse_args(arguments)
    results = {name: simulated(*volume, options) for name, volume in VOLUMES.items()}
    planned = planning(options)
    names = list(results)
    print(f"{options.patch}³ patches that share {options.overlap:g}, {options.milliseconds:g} ms for each\n")
    print(f"| | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    rows = [
        "patches",
        "parts",
        "redundancy",
        "seconds for a part",
        "bytes read",
        "bytes written",
        "files written",
        "bytes of records",
    ]
    for row in rows:
        print(f"| {row} | {' | '.join(in_short(results[name][row]) for name in names)} |")
    for gpus in GPUS:
        print(f"| hours with {gpus} GPUs | {' | '.join(in_short(results[name]['hours'][gpus]) for name in names)} |")
    rates = " | ".join(in_short(results[name]["parts in a second"][GPUS[-1]]) for name in names)
    print(f"| parts in a second, {GPUS[-1]} GPUs | {rates} |")
    print(f"| euros | {' | '.join(in_short(results[name]['euros']) for name in names)} |")
    print(f"\nplanning {planned['parts']:,} parts: {planned['seconds']:.2g} s, {planned['megabytes']:.2g} MiB")
    Path("bench").mkdir(exist_ok=True)
    told = {"machine": machine(), "options": vars(options), "results": results, "planning": planned}
    Path("bench/scale.json").write_text(json.dumps(told, indent=1))
    return told


if __name__ == "__main__":
    main()
