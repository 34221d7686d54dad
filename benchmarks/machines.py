"""One prediction by several processes of one machine: how much quicker, what a part costs, and what its border costs.

A small U-Net (one thread for each process) is applied to a Zarr image, and its probabilities go to a Zarr store: in one process,
by array jobs, by processes of voxloom's own, by a Dask cluster of this machine, and, where a Python is named that has volara and
volara-torch, by volara's block-wise prediction. Rounds alternate; every shard must be that of the one process. The largest
difference from the network on the whole volume says what seams there are (volara cuts them off to bytes, by up to 0.004).
Patches that are computed only to see what the output looks like count too, one for each process. Then, with a model that is free
and patches that share nothing, many small parts beside few large ones: what is left of the difference is what a part costs.

    python benchmarks/machines.py [--shape 288 128 128] [--patch 64] [--overlap 32] [--part 144 128 128] [--volara PYTHON]
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from alternating import compile_as_installed, machine
from efficiency import Watch

CHUNK = 16


class UNet(torch.nn.Module):
    """Three levels of two convolutions, without any normalisation: the same network wherever a patch begins."""

    def __init__(self, width):
        super().__init__()
        torch.manual_seed(0)

        def block(before, after):
            layers = []
            for channels in (before, after):
                layers += [torch.nn.Conv3d(channels, after, 3, padding=1), torch.nn.LeakyReLU()]
            return torch.nn.Sequential(*layers)

        self.down = torch.nn.ModuleList([block(1, width), block(width, 2 * width), block(2 * width, 4 * width)])
        self.up = torch.nn.ModuleList([block(6 * width, 2 * width), block(3 * width, width)])
        self.last = torch.nn.Conv3d(width, 1, 1)

    def forward(self, batch):
        kept = []
        for number, block in enumerate(self.down):
            batch = block(torch.nn.functional.max_pool3d(batch, 2) if number else batch)
            kept.append(batch)
        for block in self.up:
            kept.pop()
            batch = block(torch.cat([torch.nn.functional.interpolate(batch, scale_factor=2.0), kept[-1]], 1))
        return torch.sigmoid(20 * self.last(batch))


class Counted:
    """A model that notes in a file each patch that it is given, in whichever process."""

    def __init__(self, width, path):
        self.model, self.path = UNet(width).eval() if width else torch.nn.Identity(), path

    def __call__(self, batch):
        with Path(self.path).open("ab") as counts:
            counts.write(b"." * len(batch))
        with torch.inference_mode():
            return self.model(batch)


# Systems, each in a process of its own that ends when its result is written


def asked(given):
    """Give what voxloom is asked for: the predictor's arguments, and the call's."""
    import voxloom as vx
    from machines import Counted  # as other processes know it

    root, overlap = Path(given["root"]), given["overlap"]
    applied = {
        "model": Counted(given["width"], str(root / "counts")),
        "patch_size": given["patch"],
        "patch_overlap": overlap,
        "overlap_mode": "gaussian" if overlap else "crop",
        "model_name": "U-Net",
    }
    shards = given["shard"]
    return applied, {"output": vx.ZarrStore(given["out"], chunks=CHUNK, shards=shards), "shard_size": given["part"]}


def run_whole(given):
    import voxloom as vx

    applied, called = asked(given)
    vx.Predictor(**applied)(Path(given["root"]) / "scan.zarr", output=called["output"])


def run_share(given):
    import voxloom as vx

    applied, called = asked(given)
    run = vx.Predictor(**applied).shards(Path(given["root"]) / "scan.zarr", **called)
    for number in run.remaining(tuple(given["share"])):
        run.compute(number)
    if run.is_whole():
        run.published()


def run_processes(given):
    import voxloom as vx

    applied, called = asked(given)
    executor = vx.inference.ProcessLauncher(["cpu"] * given["workers"], shard_size=called["shard_size"])
    vx.Predictor(**applied, executor=executor)(Path(given["root"]) / "scan.zarr", output=called["output"])


def run_dask(given):
    from distributed import Client, LocalCluster

    import voxloom as vx
    from voxloom.integrations.dask import DaskLauncher

    applied, called = asked(given)
    options = {"n_workers": given["workers"], "threads_per_worker": 1, "dashboard_address": ":0"}
    with LocalCluster(**options) as cluster, Client(cluster) as client:
        executor = DaskLauncher(client, shard_size=called["shard_size"])
        vx.Predictor(**applied, executor=executor)(Path(given["root"]) / "scan.zarr", output=called["output"])


VOLARA = """
import sys, json
from pathlib import Path
from volara.datasets import Raw
from volara_torch.blockwise import Predict
from volara_torch.models import TorchModel
given = json.loads(sys.argv[1])
root, patch, step = Path(given["root"]), given["patch"], given["patch"] - given["overlap"]
model = TorchModel(
    in_channels=1, out_channels=1, out_range=(0, 1), save_path=root / "network.pt", min_input_shape=(patch,) * 3,
    min_output_shape=(step,) * 3, min_step_shape=(4, 4, 4),
)
task = Predict(
    checkpoint=model,
    in_data=Raw(store=root / "scan.zarr"),
    out_data=[Raw(store=Path(given["out"]))],
    num_workers=given["workers"],
)
task.run_blockwise(multiprocessing=given["workers"] > 1)
"""


STARTER = """
import json, subprocess, sys
started = [subprocess.Popen(command) for command in json.loads(sys.argv[1])]
sys.exit(any([each.wait() for each in started]))
"""


class Centre(torch.nn.Module):
    """The middle of what a network gives: what volara writes."""

    def __init__(self, network, margin):
        super().__init__()
        self.network, self.margin = network, margin

    def forward(self, batch):
        inner = slice(self.margin, -self.margin)
        return self.network(batch)[..., inner, inner, inner]


KINDS = {"one process": run_whole, "share": run_share, "processes": run_processes, "Dask": run_dask}
SYSTEMS = {
    "one process": ("one process", 1),
    "array jobs, 1": ("share", 1),
    "array jobs, 2": ("share", 2),
    "processes, 1": ("processes", 1),
    "processes, 2": ("processes", 2),
    "Dask, 1 worker": ("Dask", 1),
    "Dask, 2 workers": ("Dask", 2),
    "volara, 1": ("volara", 1),
    "volara, 2": ("volara", 2),
}


# Measuring


def commands_of(kind, workers, given, options):
    """Give the command lines that are started together."""
    if kind == "volara":
        return [[options.volara, "-c", VOLARA, json.dumps(given | {"workers": workers})]]
    shares = [[number, workers] for number in range(workers)] if kind == "share" else [[0, 1]]
    here = [sys.executable, "-W", "ignore", __file__, "--run", kind]
    return [[*here, json.dumps(given | {"workers": workers, "share": share})] for share in shares]


def measured(name, given, options):
    """Run a system once, and give what it took, and its result."""
    compile_as_installed()
    kind, workers = SYSTEMS[name]
    root = Path(given["root"])
    out = root / f"result-{next(NUMBERS)}.zarr"
    (root / "counts").write_bytes(b"")
    commands = commands_of(kind, workers, given | {"out": str(out)}, options)
    environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    # All from one process, so that one tree holds them.
    process = subprocess.Popen(
        [sys.executable, "-c", STARTER, json.dumps(commands)],
        env=environment,
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    watch = Watch(process.pid)
    output = process.communicate()[0]
    found = watch.end()
    if process.returncode or not out.exists():
        raise RuntimeError(f"{name} failed:\n{output}")
    patches = len((root / "counts").read_bytes())
    return {"seconds": found["seconds"], "peak MB": found["peak MB"], "patches": patches}, out


NUMBERS = iter(range(10**6))


def hash_of(folder):
    """Name the bytes of all shards of a store."""
    told = ("voxloom.json", "zarr.json")  # when it was made, and by whom
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in told)
    return hashlib.sha256(
        b"".join(str(path.relative_to(folder)).encode() + hashlib.sha256(path.read_bytes()).digest() for path in files)
    ).hexdigest()


def scan_of(root, shape):
    """Write a scan as a Zarr array, of the older version that all read: a head, in small chunks."""
    import zarr

    import voxloom as vx

    data = vx.datasets.HeadPhantom(shape).t1.data[0].numpy()
    options = {"chunks": (CHUNK,) * 3, "dtype": data.dtype, "zarr_format": 2}
    array = zarr.create_array(root / "scan.zarr", shape=data.shape, **options)
    array[...] = data
    return data


def array_of(folder, is_voxlooms):
    """Read a result: with its axes as they are stored, or as voxloom orders them; volara stores bytes."""
    import zarr

    import voxloom as vx

    return vx.ScalarImage(folder).data[0].numpy() if is_voxlooms else zarr.open(folder, mode="r")[0] / 255


def speeds(options, root):
    """Time every system on the U-Net; give a table's rows."""
    data = scan_of(root, options.shape)
    network = UNet(options.width).eval()
    given = {name: getattr(options, name) for name in ("patch", "overlap", "part", "width")}
    given |= {"root": str(root), "shard": options.part}
    names = [name for name in options.systems if not name.startswith("volara") or options.volara]
    with torch.inference_mode():
        whole = network(torch.from_numpy(data)[None, None])[0, 0].numpy()
        if options.volara:
            traced = torch.jit.trace(Centre(network, options.overlap // 2), torch.zeros(1, 1, *(options.patch,) * 3))
            traced.save(root / "network.pt")
    rounds = {name: [] for name in names}
    hashes = {}
    for number in range(options.rounds):
        for name in names if number % 2 else reversed(names):
            found, out = measured(name, given, options)
            rounds[name].append(found)
            found["difference"] = float(np.abs(array_of(out, not name.startswith("volara")) - whole).max())
            hashes.setdefault(name, set()).add(hash_of(out))
    ours = {each for name in names if not name.startswith("volara") for each in hashes[name]}
    if len(ours) > 1:
        raise RuntimeError(f"shards differ: {hashes}")
    return rounds


def costs(options, root):
    """Give what a part costs by each way, in seconds: from many and from few parts of the same shards and a free model."""
    scan_of(root, (options.free,) * 3)
    names = [name for name in options.systems if name in ("array jobs, 1", "processes, 1", "Dask, 1 worker")]
    patch = options.free // 8
    given = {"patch": patch, "overlap": 0, "width": 0, "root": str(root), "shard": patch}
    seconds = {name: {8: [], 512: []} for name in names}
    for number in range(options.rounds):
        for name in names if number % 2 else reversed(names):
            for count, part in ((8, options.free // 2), (512, patch)):
                found, _ = measured(name, given | {"part": part}, options)
                # Each process looks at the output of one patch more.
                if not 8**3 <= found["patches"] <= 8**3 + 2:
                    raise RuntimeError(f"{name} computed {found['patches']} patches, and not {8**3}")
                seconds[name][count].append(found["seconds"])
    middle = {name: {count: statistics.median(each) for count, each in found.items()} for name, found in seconds.items()}
    return {name: (found[512] - found[8]) / (512 - 8) for name, found in middle.items()}


def planned_patches(options):
    """Give the patches of the grid, and how many are computed in parts."""
    from voxloom.core.grid.grids import PatchGrid
    from voxloom.core.grid.shards import ShardGrid

    shape, part = tuple(options.shape), tuple(options.part)
    grid = PatchGrid.cover(shape, (options.patch,) * 3, (options.overlap,) * 3)
    return grid.num_patches, ShardGrid(shape, part).computed_patches(grid)


def print_speeds(rounds):
    """Print a row for each system."""
    print("| | seconds | the first / this | peak, MB | patches computed | largest difference from the whole |")
    print("|---|---|---|---|---|---|")
    alone = statistics.median(each["seconds"] for each in next(iter(rounds.values())))
    for name, each in rounds.items():
        middle = {key: statistics.median(found[key] for found in each) for key in each[0]}
        spread = f"{min(found['seconds'] for found in each):.3g} to {max(found['seconds'] for found in each):.3g}"
        print(
            f"| {name} | {middle['seconds']:.3g} ({spread}) | {alone / middle['seconds']:.2f} | {middle['peak MB']:.0f}"
            f" | {middle['patches'] or ''} | {middle['difference']:.2g} |",
            flush=True,
        )


def main(arguments=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", nargs=2)
    parser.add_argument("--shape", type=int, nargs=3, default=[288, 128, 128])
    parser.add_argument("--part", type=int, nargs=3, default=[144, 128, 128])
    for name, default in {"patch": 64, "overlap": 32, "width": 8, "free": 256, "rounds": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=SYSTEMS)
    parser.add_argument("--volara", help="a Python that has volara, volara-torch and the same PyTorch")
    options = parser.parse_args(arguments)
    if options.run:
        kind, given = options.run
        KINDS[kind](json.loads(given))
        return None
    planned = planned_patches(options)
    print(f"{machine()}; {options}\n\n{planned[0]} patches in the grid; {planned[1]} in parts of {options.part}\n")
    with tempfile.TemporaryDirectory() as temporary:
        rounds = speeds(options, Path(temporary))
    print_speeds(rounds)
    with tempfile.TemporaryDirectory() as temporary:
        parts = costs(options, Path(temporary))
    print("\n| a part costs | " + " | ".join(parts) + " |\n|---|" + "---|" * len(parts))
    print("| milliseconds |" + "|".join(f" {1000 * seconds:.0f} " for seconds in parts.values()) + "|")
    Path("bench").mkdir(exist_ok=True)
    told = {"machine": machine(), "options": vars(options), "rounds": rounds, "parts": parts, "planned": planned}
    Path("bench/machines.json").write_text(json.dumps(told, indent=1))
    return told


if __name__ == "__main__":
    main()
