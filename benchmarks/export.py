"""From scores on a model's grid to a label map on the scan's: voxloom beside nnU-Net's two ways, and MONAI's.

The scores are those of a network that is sure of most places: each class has its region, with a slope of a few voxels between
them. Each system is in a process of its own, which is given the same scores as a file that is mapped, and measures the time from
there to the label map, and by how much its memory grew.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from alternating import forget_peak, machine, memory_in_kilobytes, side_by_side

SYSTEMS = ("voxloom", "nnU-Net", "nnU-Net (torch)", "MONAI")
MODEL, SCAN = (1.5, 1.5, 1.5), (0.8, 0.8, 2.5)


def grids(shape):
    """Give shape and affine of the scan, and of the model's grid over the same space."""
    coarse = tuple(round(size * own / new) for size, own, new in zip(shape, SCAN, MODEL, strict=True))
    scan = np.diag([*SCAN, 1.0])
    spacing = [size * own / count for size, own, count in zip(shape, SCAN, coarse, strict=True)]
    model = np.diag([*spacing, 1.0])
    model[:3, 3] = (np.array(spacing) - SCAN) / 2
    return (shape, scan), (coarse, model)


def write_scores(path, shape, classes):
    """Write scores `(C, I, J, K)` in float32: how much nearer each class's seed is than the others', clipped, with noise."""
    from scipy.spatial import cKDTree

    rng = np.random.default_rng(0)
    seeds = rng.random((classes, 3)) * shape
    scores = np.lib.format.open_memmap(path, "w+", dtype=np.float32, shape=(classes, *shape))
    for plane in range(shape[0]):
        places = np.stack(np.meshgrid(plane, *map(np.arange, shape[1:]), indexing="ij"), -1)[0]
        nearest = cKDTree(seeds).query(places)[0]
        for number, seed in enumerate(seeds):
            distance = np.sqrt(((places - seed) ** 2).sum(-1))
            scores[number, plane] = np.maximum((nearest - distance) / 2, -15) + 0.3 * rng.standard_normal(shape[1:])
    scores.flush()


def exporter(name, path, scan, model):
    """Give the function of a system that makes the label map."""
    scores = np.load(path, mmap_mode="r")
    (shape, affine), (_, model_affine) = scan, model
    spacings = [float(model_affine[axis, axis]) for axis in range(3)], list(SCAN)
    if name == "voxloom":
        import voxloom as vx

        source = vx.ArraySource(scores, affine=model_affine)

        def export():
            # In slabs, as the scores lie in their file: no voxel is read twice.
            made = vx.predict(
                torch.nn.Identity(), source, (16, -1, -1), 0, "crop", like=(shape, affine), reduce="argmax", dtype=torch.float32
            )
            return made.data[0].numpy()

    elif name.startswith("nnU-Net"):
        os.environ |= dict.fromkeys(("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"), "/nonexistent")
        if name == "nnU-Net":
            from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape as resample

            options = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
        else:
            from nnunetv2.preprocessing.resampling.resample_torch import resample_torch_fornnunet as resample

            options = {"is_seg": False, "num_threads": os.cpu_count(), "force_separate_z": False}

        def export():
            # As convert_predicted_logits_to_segmentation_with_correct_shape does it.
            large = resample(torch.from_numpy(np.array(scores)), shape, *spacings, **options)
            return torch.as_tensor(large).argmax(0).numpy()

    else:
        from monai.data import MetaTensor
        from monai.transforms import SpatialResample

        transform = SpatialResample(mode="bilinear", padding_mode="border", align_corners=False, dtype=torch.float32)

        def export():
            given = MetaTensor(torch.from_numpy(np.array(scores)), affine=torch.from_numpy(model_affine))
            return transform(given, dst_affine=torch.from_numpy(affine), spatial_size=shape).argmax(0).numpy()

    return export


def serve(name, path, scan, model, expected, connection):
    """Measure whenever that is asked for."""
    export = exporter(name, path, scan, model)
    connection.send("ready")
    while connection.recv():
        before = memory_in_kilobytes("VmRSS")
        forget_peak()
        start = time.perf_counter()
        labels = export()
        seconds = time.perf_counter() - start
        grown = memory_in_kilobytes("VmHWM") - before
        differing = 0.0
        if Path(expected).exists():
            differing = float((labels != np.load(expected)).mean())
        elif name == "voxloom":
            np.save(expected, labels.astype(np.uint8))
        connection.send((seconds, grown / 2**20, differing))


def main():
    """Measure, and print a line for each system."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", type=int, default=60)
    parser.add_argument("--shape", type=int, nargs=3, default=(256, 256, 150), help="of the scan, at 0.8 × 0.8 × 2.5 mm")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--systems", nargs="+", default=SYSTEMS, choices=SYSTEMS)
    options = parser.parse_args()
    scan, model = grids(tuple(options.shape))
    print(machine())
    sizes = [" × ".join(map(str, shape)) for shape, _ in (model, scan)]
    print(f"{options.classes} classes, {sizes[0]} voxels of 1.5 mm to {sizes[1]} of 0.8 × 0.8 × 2.5 mm")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scores.npy"
        write_scores(path, model[0], options.classes)
        results = side_by_side(options.systems, options.rounds, serve, path, scan, model, Path(folder) / "labels.npy")
    ours = [seconds for seconds, _, _ in results.get("voxloom", [])]
    for name, rounds in results.items():
        times, memory, differing = zip(*rounds, strict=True)
        ratio = statistics.median(theirs / own for theirs, own in zip(times, ours, strict=True)) if ours else float("nan")
        print(
            f"{name:16} {statistics.median(times):8.2f} s (first {times[0]:.2f})  {ratio:6.2f} × voxloom's"
            f"  {max(memory):6.2f} GiB more  {100 * max(differing):.4f} % of voxels differ"
        )


if __name__ == "__main__":
    main()
