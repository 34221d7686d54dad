"""From a scan's file to its label map with one network, as a competition would measure it: a fresh process for each case.

A trained folder of nnU-Net (made by this script: a plain or a residual network, trained for some steps) is run by voxloom's
command, by nnU-Net's own predictor (in one process, and with its worker processes), by MONAI's sliding window and by TorchIO's
grid and aggregator; the last two scale, resample and bring back by their own transforms. Of the whole tree of processes, every
0.1 s: memory (private, and a share of what is shared), processor time, and /dev/shm. So start-up counts: importing, loading,
planning. What a bare loop over the same number of patches takes, and holds, is the limit.

    python benchmarks/efficiency.py [--rounds 5] [--kind ResidualEncoderUNet] [--sizes small thick mni mni-2mm mni-thick]
        [--width 8] [--patch 64] [--spacing 1.5]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import numpy as np

from alternating import compile_as_installed, machine

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "integrations"))

INTERVAL = 0.1


# Systems, each in a process of its own that ends when its file is written


def network_of(folder):
    """Make the network of a folder, without nnU-Net: give it, its configuration and its intensities."""
    import torch
    from dynamic_network_architectures.architectures import unet

    plans = json.loads((folder / "plans.json").read_text())
    configuration = plans["configurations"]["tiny"]
    architecture = configuration["architecture"]
    options = architecture["arch_kwargs"] | {
        "conv_op": torch.nn.Conv3d,
        "norm_op": torch.nn.InstanceNorm3d,
        "nonlin": torch.nn.LeakyReLU,
    }
    kind = architecture["network_class_name"].rpartition(".")[2]
    network = getattr(unet, kind)(input_channels=1, num_classes=4, deep_supervision=False, **options)
    with warnings.catch_warnings(action="ignore"):
        weights = torch.load(folder / "fold_0" / "checkpoint_final.pth", weights_only=False)["network_weights"]
    network.load_state_dict(weights)
    return network.eval(), configuration, plans["foreground_intensity_properties_per_channel"]["0"]


def turned(network):
    """Let a network that was trained on arrays (z, y, x), as nnU-Net's are, take (x, y, z)."""
    return lambda batch: network(batch.permute(0, 1, 4, 3, 2)).permute(0, 1, 4, 3, 2)


def run_voxloom(folder, scan, out):
    sys.argv = ["voxloom", "--quiet", "predict", f"nnunet:{folder}", str(scan), "-o", str(out)]
    from voxloom.cli import main

    main()


def nnunet_predictor(folder):
    os.environ |= dict.fromkeys(("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"), "/nonexistent")
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder), (0,), "checkpoint_final.pth")
    return predictor


def run_nnunet(folder, scan, out):
    nnunet_predictor(folder).predict_from_files_sequential([[str(scan)]], [str(out).removesuffix(".nii.gz")], overwrite=True)


def run_nnunet_workers(folder, scan, out):
    nnunet_predictor(folder).predict_from_files(
        [[str(scan)]],
        [str(out).removesuffix(".nii.gz")],
        overwrite=True,
        num_processes_preprocessing=1,
        num_processes_segmentation_export=1,
    )


def run_monai(folder, scan, out):
    import nibabel
    import torch
    from monai.inferers import sliding_window_inference
    from monai.transforms import LoadImage, Spacing, SpatialResample

    network, configuration, intensities = network_of(folder)
    image = LoadImage(ensure_channel_first=True, image_only=True)(scan)
    original = (image.affine, image.shape[1:])
    image = image.clamp(intensities["percentile_00_5"], intensities["percentile_99_5"])
    image = (image - intensities["mean"]) / intensities["std"]
    image = Spacing(configuration["spacing"][::-1], mode="bilinear")(image)
    with torch.inference_mode():
        scores = sliding_window_inference(
            image[None], configuration["patch_size"], 1, turned(network), overlap=0.5, mode="gaussian"
        )[0]
    back = SpatialResample(mode="bilinear", padding_mode="border")(scores, dst_affine=original[0], spatial_size=original[1])
    labels = back.argmax(0).to(torch.uint8).numpy()
    nibabel.save(nibabel.Nifti1Image(labels, original[0].numpy()), out)


def run_torchio(folder, scan, out):
    import torch
    import torchio as tio

    network, configuration, intensities = network_of(folder)
    original = tio.ScalarImage(scan)
    image = tio.ScalarImage(scan)
    values = image.data.float().clamp(intensities["percentile_00_5"], intensities["percentile_99_5"])
    image.set_data((values - intensities["mean"]) / intensities["std"])
    subject = tio.Subject(image=tio.Resample(configuration["spacing"][::-1])(image))
    patch = configuration["patch_size"]
    short = [max(0, size - length) for size, length in zip(patch, subject.spatial_shape, strict=True)]
    subject = tio.Pad([each for size in short for each in (size // 2, size - size // 2)])(subject) if any(short) else subject
    sampler = tio.GridSampler(subject, patch, [size // 2 for size in patch])
    aggregator = tio.GridAggregator(sampler, overlap_mode="hann")
    with torch.inference_mode():
        for batch in tio.SubjectsLoader(sampler, batch_size=1):
            aggregator.add_batch(turned(network)(batch["image"][tio.DATA]), batch[tio.LOCATION])
    scores = tio.ScalarImage(tensor=aggregator.get_output_tensor(), affine=subject.image.affine)
    back = tio.Resample(original)(scores)
    tio.LabelMap(tensor=back.data.argmax(0, keepdim=True).to(torch.uint8), affine=original.affine).save(out)


def run_bare(folder, scan, out):
    """Call the network as often as there are patches, and nothing else: what no system can be quicker than."""
    import torch

    network, configuration, _ = network_of(folder)
    count = json.loads(out.with_suffix(".count").read_text())
    batch = torch.zeros(1, 1, *configuration["patch_size"])
    began = time.perf_counter()
    with torch.inference_mode():
        for _ in range(count):
            network(batch)
    out.with_suffix(".seconds").write_text(str(time.perf_counter() - began))


SYSTEMS = {
    "voxloom": run_voxloom,
    "nnU-Net": run_nnunet,
    "nnU-Net, with workers": run_nnunet_workers,
    "MONAI": run_monai,
    "TorchIO": run_torchio,
    "bare loop": run_bare,
}


# Measuring


class Watch:
    """Samples the tree of a process, until it ends."""

    def __init__(self, pid):
        import psutil

        self._root, self.curve = psutil.Process(pid), []
        self._began, self._cpu = time.perf_counter(), {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        import psutil

        while True:
            memory = 0
            try:
                tree = [self._root, *self._root.children(recursive=True)]
            except psutil.Error:
                tree = []
            for process in tree:
                try:
                    rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
                    memory += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
                    times = process.cpu_times()
                    self._cpu[process.pid] = times.user + times.system
                except (psutil.Error, OSError, StopIteration):
                    continue
            shared = sum(each.stat().st_size for each in Path("/dev/shm").iterdir() if each.is_file())
            self.curve.append((time.perf_counter() - self._began, memory / 1024, sum(self._cpu.values()), shared / 2**20))
            if self._stop.wait(INTERVAL):
                return

    def end(self):
        """Give what was seen: seconds, megabytes at most, and the areas under memory and processor time."""
        self._stop.set()
        self._thread.join()
        times, memory, cpu, shared = map(np.array, zip(*self.curve, strict=True))
        return {
            "seconds": float(times[-1]),
            "peak MB": float(memory.max()),
            "GB·s": float(np.trapezoid(memory, times) / 1024),
            "CPU s": float(cpu.max()),
            "shm MB": float(shared.max()),
            "curve": [[round(value, 3) for value in row] for row in zip(times, memory, cpu, strict=True)],
        }


def measured(name, folder, scan, out, threads):
    """Run a system once, in a fresh process."""
    compile_as_installed()
    command = [sys.executable, "-W", "ignore", __file__, "--run", name, str(folder), str(scan), str(out)]
    limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    process = subprocess.Popen(command, env=os.environ | limits, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    watch = Watch(process.pid)
    output = process.communicate()[0]
    found = watch.end()
    if process.returncode:
        raise RuntimeError(f"{name} failed:\n{output}")
    return found


def dice(one, other):
    """Agreement of two label maps, averaged over the labels of the first."""
    labels = [label for label in np.unique(one) if label]
    scores = [2 * np.sum((one == label) & (other == label)) / (np.sum(one == label) + np.sum(other == label)) for label in labels]
    return float(np.mean(scores)) if labels else 1.0


# What they are applied to


HEADS = {"mni": (1, 1, 1), "mni-2mm": (2, 2, 2), "mni-thick": (0.8, 0.8, 4)}


def scan_of(size, path):
    """Write a scan: a phantom, or the MNI152 head at some spacing in millimetres."""
    import voxloom as vx

    if size in HEADS:
        from nilearn.datasets import load_mni152_template

        template = load_mni152_template(resolution=1)
        image = vx.ScalarImage(np.asarray(template.dataobj, dtype=np.float32) * 500 - 100, affine=template.affine)
        image = image.resampled(HEADS[size])
    else:
        shapes = {"tiny": (48, 44, 40), "small": (128, 128, 96), "thick": (200, 200, 40), "large": (512, 512, 600)}
        spacings = {"tiny": (1.4, 1.4, 1.4), "small": (1.2, 1.2, 1.2), "thick": (0.9, 0.9, 5.0), "large": (0.8, 0.8, 1.0)}
        head = vx.datasets.HeadPhantom(shapes[size])
        image = vx.ScalarImage(head.t1.data * 4 - 200, affine=np.diag([*spacings[size], 1]))
    image.save(path)
    return path


def trained(folder, options):
    """Write the folder of a network that is trained for some steps."""
    import nnunet_samples

    small = nnunet_samples.architecture

    def architecture(kind, dimensions):
        made = small(kind, dimensions)
        own, stages = made["arch_kwargs"], 4
        key = "n_conv_per_stage" if "n_conv_per_stage" in own else "n_blocks_per_stage"
        own |= {"n_stages": stages, "features_per_stage": [options.width * 2**stage for stage in range(stages)]}
        own |= {"kernel_sizes": [[3] * dimensions] * stages, "strides": [[1] * dimensions, *[[2] * dimensions] * (stages - 1)]}
        own |= {key: [2] * stages, "n_conv_per_stage_decoder": [2] * (stages - 1)}
        return made

    nnunet_samples.architecture = architecture
    configuration = nnunet_samples.configuration((options.spacing,) * 3, (options.patch,) * 3, kind=options.kind)
    return nnunet_samples.write_folder(folder, {"tiny": configuration}, "tiny", steps=options.steps, mirrored=None)


def draw(results, path):
    """Draw memory over time of each system, a case in each row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3 * len(results)), layout="constrained")
    rows = figure.subplots(len(results), 1, squeeze=False)
    for axes, (case, systems) in zip(rows[:, 0], results.items(), strict=True):
        for name, rounds in systems.items():
            times, memory, _ = zip(*rounds[0]["curve"], strict=True)
            axes.plot(times, memory, label=name, linestyle="--" if name == "bare loop" else "-")
        axes.set_title(case)
        axes.set_ylabel("memory of all processes, MB")
    rows[0, 0].legend(fontsize=8)
    rows[-1, 0].set_xlabel("seconds")
    figure.savefig(path, dpi=110)


def main(arguments=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", nargs=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", nargs="+", default=["small", "thick", *HEADS])
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=SYSTEMS)
    parser.add_argument("--kind", default="PlainConvUNet", choices=["PlainConvUNet", "ResidualEncoderUNet"])
    for name, default in {"width": 8, "patch": 64, "steps": 10, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--spacing", type=float, default=1.5, help="of the network, in millimetres")
    options = parser.parse_args(arguments)
    if options.run:
        name, *paths = options.run
        SYSTEMS[name](*map(Path, paths))
        return None
    import voxloom as vx

    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        folder = trained(root / "model", options)
        model = vx.integrations.nnunet.load(folder)
        for size in options.sizes:
            scan = scan_of(size, root / f"{size}_0000.nii.gz")
            count = vx.plan(model, scan).num_patches
            found, labels = {name: [] for name in options.systems}, {}
            for number in range(options.rounds):
                for name in options.systems if number % 2 else reversed(options.systems):
                    place = root / f"{size}-{number}-{list(SYSTEMS).index(name)}"
                    place.mkdir()
                    out = place / "labels.nii.gz"
                    out.with_suffix(".count").write_text(json.dumps(count))
                    found[name].append(measured(name, folder, scan, out, options.threads))
                    if name == "bare loop":
                        found[name][-1]["network s"] = float(out.with_suffix(".seconds").read_text())
                    else:
                        labels[name] = vx.LabelMap(out).data[0].numpy()
            reference = labels.get("nnU-Net", next(iter(labels.values())))
            for name, made in labels.items():
                found[name][0]["dice"] = dice(reference, made)
            results[f"{size}: {' × '.join(map(str, reference.shape))}, {count} patches"] = found
    print(f"{machine()}; {options}\n")
    keys = ("seconds", "peak MB", "GB·s", "CPU s", "shm MB")
    for case, systems in results.items():
        print(f"\n| {case} | first, s | {' | '.join(keys)} | Dice with nnU-Net |\n|---|---|{'---|' * len(keys)}---|")
        for name, rounds in systems.items():
            middle = [statistics.median(each[key] for each in rounds) for key in keys]
            spread = f"{min(each['seconds'] for each in rounds):.3g} to {max(each['seconds'] for each in rounds):.3g}"
            row = [f"{middle[0]:.3g} ({spread})", *(f"{value:.3g}" for value in middle[1:])]
            agreement = rounds[0].get("dice")
            print(
                f"| {name} | {rounds[0]['seconds']:.3g} | {' | '.join(row)} | {'' if agreement is None else f'{agreement:.4f}'} |"
            )
        if "bare loop" in systems and "voxloom" in systems:
            network = statistics.median(each["network s"] for each in systems["bare loop"])
            ours = statistics.median(each["seconds"] for each in systems["voxloom"])
            rest = 100 * (1 - network / ours)
            print(f"\nthe network alone takes {network:.3g} s; of voxloom's time {rest:.1f} % is not the network's")
    Path("bench").mkdir(exist_ok=True)
    told = {"machine": machine(), "options": vars(options), "results": results}
    Path("bench/efficiency.json").write_text(json.dumps(told, indent=1))
    draw(results, "bench/efficiency.png")
    return results


if __name__ == "__main__":
    main()
