"""Labels of many classes side by side: voxloom, MONAI and nnU-Net; and a volume that the others cannot do.

A volume is cut into overlapping patches, a model makes scores of all classes for each, and the result is the number of the best
class at each voxel. Each system lives in a process of its own; the rounds alternate between them. The time that the model needs
for each patch once is taken out; what is computed more often than that counts. Peak memory is beyond what the process had, and
holds the outputs of the model, which are the same for all.

Then voxloom alone goes from file to file through a volume of 512 × 512 × 1024 voxels and 118 classes, with a limit of 4 GiB: the
scores of all classes would take 127 GB.

    python benchmarks/prediction.py [--size 256] [--classes 60] [--patch 96] [--overlap 48] [--batch 1] [--rounds 3]
    python benchmarks/prediction.py --large [--large-shape 512 512 1024] [--large-classes 118] [--large-overlap 24] [--limit 4GiB]
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch

from alternating import forget_peak, machine, memory_in_kilobytes, side_by_side, start
from nnunet import nnunet_predictor


class Model(torch.nn.Module):
    """Makes scores of classes of each voxel, into memory of its own, and knows how often it was called and how long that took."""

    def __init__(self, classes):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("factors", torch.randn(classes, 1, 1, 1, generator=generator))
        self.register_buffer("offsets", torch.randn(classes, 1, 1, 1, generator=generator))
        self.scores = None
        self.seconds, self.patches = 0.0, 0

    def forward(self, batch):
        began = time.perf_counter()
        shape = (len(batch), len(self.factors), *batch.shape[2:])
        if self.scores is None or self.scores.shape != shape:
            self.scores = torch.empty(shape)
        torch.addcmul(self.offsets, batch, self.factors, out=self.scores)
        self.seconds += time.perf_counter() - began
        self.patches += len(batch)
        return self.scores


def prepare_voxloom(options):
    import voxloom as vx

    current = []
    predictor = vx.Predictor(
        lambda batch: current[-1](batch), options.patch, options.overlap, batch_size=options.batch, reduce="argmax"
    )

    def run(model, volume):
        current[:] = [model]
        return predictor(volume).data[0]

    return run


def prepare_monai(options):
    from monai.inferers import SlidingWindowInferer

    share = options.overlap / options.patch
    inferer = SlidingWindowInferer((options.patch,) * 3, options.batch, share, "gaussian", cache_roi_weight_map=True)

    def run(model, volume):
        with torch.inference_mode():
            return inferer(volume[None], model)[0].argmax(0)

    return run


def prepare_nnunet(options):
    predictor = nnunet_predictor(options.patch, options.overlap, options.classes)

    def run(model, volume):
        predictor.network = model
        return predictor.predict_sliding_window_return_logits(volume).argmax(0)

    return run


SYSTEMS = {"voxloom": prepare_voxloom, "MONAI": prepare_monai, "nnU-Net": prepare_nnunet}


def number_of_patches(size, patch, overlap):
    return (-(-(size - patch) // (patch - overlap)) + 1) ** 3


def serve(name, options, connection):
    """Run one system whenever it is asked for, and answer with what was measured."""
    warnings.simplefilter("ignore")
    volume = torch.randn(1, *[options.size] * 3, generator=torch.Generator().manual_seed(1))
    run = SYSTEMS[name](options)
    small = SimpleNamespace(**(vars(options) | {"patch": 32, "overlap": 16}))
    # A small run first, so that code which is loaded late does not count as memory.
    SYSTEMS[name](small)(Model(options.classes), volume[:, :48, :48, :48].contiguous())
    model = Model(options.classes)
    with torch.inference_mode():
        expected = torch.stack([model(plane[None, :, None])[0, :, 0].argmax(0).to(torch.int16) for plane in volume[0][:, None]])
    gc.collect()
    at_rest = memory_in_kilobytes("VmRSS")
    connection.send("ready")
    necessary = number_of_patches(options.size, options.patch, options.overlap)
    while connection.recv():
        gc.collect()
        model = Model(options.classes).eval()
        forget_peak()
        began = time.perf_counter()
        labels = run(model, volume)
        seconds = time.perf_counter() - began - model.seconds * necessary / model.patches
        megabytes = (memory_in_kilobytes("VmHWM") - at_rest) * 1024 / 1e6
        wrong = int((labels != expected).sum())
        del labels
        connection.send({"seconds": seconds, "megabytes": megabytes, "wrong": wrong, "patches": model.patches})


def report(results):
    print("\n| | overhead, s | × MONAI | extra memory, MB | × MONAI | patches computed | voxels unlike the exact labels |")
    print("|---|---|---|---|---|---|---|")
    for name, found in results.items():
        pairs = list(zip(found, results.get("MONAI", found), strict=True))
        seconds, megabytes = (statistics.median(item[key] for item in found) for key in ("seconds", "megabytes"))
        ratios = [statistics.median(one[key] / two[key] for one, two in pairs) for key in ("seconds", "megabytes")]
        wrong, patches = max(item["wrong"] for item in found), max(item["patches"] for item in found)
        print(f"| {name} | {seconds:.2f} | {ratios[0]:.2f} | {megabytes:.0f} | {ratios[1]:.2f} | {patches} | {wrong} |")


def serve_large(options, connection):
    import voxloom as vx

    warnings.simplefilter("ignore")
    shape, model = options.large_shape, Model(options.large_classes)
    with tempfile.TemporaryDirectory() as folder:
        scan = Path(folder) / "scan.nii"
        generator = torch.Generator().manual_seed(1)
        values = torch.randint(-1000, 1000, (1, *shape), generator=generator, dtype=torch.int16)
        vx.ScalarImage(values).save(scan)
        del values
        predictor = vx.Predictor(model, options.patch, options.large_overlap, reduce="argmax", memory_limit=options.limit)
        vx.Predictor(model, 16, reduce="argmax")(torch.rand(1, 24, 24, 24))
        gc.collect()
        at_rest = memory_in_kilobytes("VmRSS")
        connection.send("ready")
        forget_peak()
        target = Path(folder) / "labels.nii.gz"
        plan = predictor.plan(scan, output=target)
        print(plan, flush=True)
        model.seconds = model.patches = 0
        began = time.perf_counter()
        predictor(scan, output=target, progress=sys.stderr.isatty())
        wall = time.perf_counter() - began
        connection.send(
            {
                "wall": wall,
                "overhead": wall - model.seconds * plan.num_patches / model.patches,
                "megabytes": (memory_in_kilobytes("VmHWM") - at_rest) * 1024 / 1e6,
                "planned": plan.peak_bytes / 1e6,
                "scores": options.large_classes * 4 * shape[0] * shape[1] * shape[2] / 1e6,
            }
        )


def measure_large(options):
    process, pipe = start(serve_large, options)
    found = pipe.recv()
    process.join()
    print(
        f"\n{' × '.join(map(str, options.large_shape))} voxels, {options.large_classes} classes, patch {options.patch}, overlap"
        f" {options.large_overlap}, limit {options.limit}: {found['wall']:.0f} s, of which {found['overhead']:.0f} s are not the"
        f" model's; peak {found['megabytes']:.0f} MB, planned {found['planned']:.0f} MB"
        f" (the scores of all classes: {found['scores']:.0f} MB)"
    )
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=256, help="voxels of the volume on each axis")
    parser.add_argument("--classes", type=int, default=60)
    parser.add_argument("--patch", type=int, default=96, help="voxels of a patch on each axis")
    parser.add_argument("--overlap", type=int, default=48, help="voxels that neighbours share")
    parser.add_argument("--batch", type=int, default=1, help="patches that the model is given at a time (nnU-Net: always 1)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds that are counted")
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), help="what to compare")
    parser.add_argument("--large", action="store_true", help="the large volume in place of the comparison")
    parser.add_argument("--large-shape", type=int, nargs=3, default=[512, 512, 1024])
    parser.add_argument("--large-classes", type=int, default=118)
    parser.add_argument("--large-overlap", type=int, default=24)
    parser.add_argument("--limit", default="4GiB", help="memory_limit for the large volume")
    options = parser.parse_args()
    print(machine(), flush=True)
    everything = {}
    if not options.large:
        print(
            f"{options.size}³, {options.classes} classes, patch {options.patch}, overlap {options.overlap}, batch {options.batch}"
        )
        everything["labels"] = side_by_side(options.systems, options.rounds, serve, options)
        report(everything["labels"])
    if options.large:
        everything["large"] = measure_large(options)
    target = Path("bench") / "prediction.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(vars(options) | {"results": everything}, indent=1))
    print(f"\nAll measurements: {target.resolve()}")


if __name__ == "__main__":
    sys.exit(main())
