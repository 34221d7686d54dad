"""Feeding a training loop side by side: voxloom's queue, TorchIO's, and MONAI's loader.

Pairs of an image and a label map lie on disk as .nii.gz. Two epochs are trained, each step of which takes the same time and none
of the processor's, as on a GPU. Each system lives in a process of its own; rounds alternate between them. Measured are the time
from making the queue to the first batch, the time to the first batch of the second epoch, the longest wait afterwards, and all
waiting of an epoch; and, in a process that has done little before, the peak of its memory beyond what it had, and of what its
workers have in all beside what they got from it. Then how long as many processes as there are workers take for an epoch's work
when nothing is handed over: what of that is longer than all steps together, no loader that reads files can hide.

    python benchmarks/training.py [--subjects 16] [--size 160] [--patch 64] [--samples 16] [--step 0.1] [--workers 2] [--rounds 5]
        [--transforms]
"""

import argparse
import gc
import importlib
import multiprocessing
import statistics
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import torch

from alternating import end, machine, side_by_side, start

BATCH = 16
POLL_SECONDS = 0.02


def write_pairs(folder, subjects, size):
    """Smooth noise with a bright ball in it, which compresses as scans do, and the label of the ball."""
    import voxloom as vx

    pairs = []
    for number in range(subjects):
        rng = np.random.default_rng(number)
        axes = np.meshgrid(*[np.arange(size) - size * (0.3 + 0.4 * rng.random()) for _ in range(3)], indexing="ij", sparse=True)
        ball = sum(axis**2 for axis in axes) < (size / 5) ** 2
        image = (300 + 400 * ball + 40 * rng.standard_normal(ball.shape)).astype(np.int16)
        pair = folder / f"{number:03}_t1.nii.gz", folder / f"{number:03}_seg.nii.gz"
        vx.ScalarImage(torch.from_numpy(image)[None]).save(pair[0])
        vx.LabelMap(torch.from_numpy(ball.astype(np.uint8))[None]).save(pair[1])
        pairs.append(pair)
    return pairs


def of_torchio():
    """What is usual there: whole subjects are augmented."""
    import torchio

    return torchio.Compose(
        [torchio.ZNormalization(), torchio.RandomFlip((0, 1, 2)), torchio.RandomNoise(), torchio.RandomGamma(p=0.5)]
    )


def of_monai():
    """What is usual there: patches are augmented."""
    from monai import transforms

    return [
        transforms.RandFlipd(["t1", "seg"], prob=0.5, spatial_axis=0),
        transforms.RandScaleIntensityd("t1", factors=0.1, prob=1),
        transforms.RandGaussianNoised("t1", prob=1, std=5),
    ]


def make_queue(library, pairs, settings, transform=None, **more):
    """For voxloom and TorchIO, whose queues are made alike."""
    library = importlib.import_module(library)
    subjects = [library.Subject(t1=library.ScalarImage(image), seg=library.LabelMap(label)) for image, label in pairs]
    sampler = library.LabelSampler(settings.patch, "seg", {0: 1, 1: 1})
    dataset = library.SubjectsDataset(subjects, transform=transform)
    queue = library.Queue(dataset, settings.max_length, settings.samples, sampler, num_workers=settings.workers, **more)
    return library.SubjectsLoader(queue, batch_size=BATCH)


def few_held(settings):
    """Hold few patches: MONAI's loader holds none, and mixes nothing."""
    return argparse.Namespace(**vars(settings) | {"max_length": settings.samples // 2})


def make_monai(pairs, settings, augmentation=(), is_cached=False):
    from monai.data import CacheDataset, DataLoader, Dataset
    from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, RandCropByPosNegLabeld

    keys = ["t1", "seg"]
    transform = Compose(
        [
            LoadImaged(keys),
            EnsureChannelFirstd(keys),
            RandCropByPosNegLabeld(keys, "seg", (settings.patch,) * 3, pos=1, neg=1, num_samples=settings.samples),
            *augmentation,
        ]
    )
    items = [{"t1": str(image), "seg": str(label)} for image, label in pairs]
    dataset = CacheDataset(items, transform, progress=False, copy_cache=False) if is_cached else Dataset(items, transform)
    # All patches of a batch are from the same subject: MONAI does not mix.
    return DataLoader(dataset, batch_size=max(1, BATCH // settings.samples), shuffle=True, num_workers=settings.workers)


SYSTEMS = {
    "voxloom": lambda pairs, settings: make_queue("voxloom", pairs, settings),
    "TorchIO": lambda pairs, settings: make_queue("torchio", pairs, settings),
    "voxloom, few held": lambda pairs, settings: make_queue("voxloom", pairs, few_held(settings)),
    "MONAI": make_monai,
    "voxloom with TorchIO's transforms": lambda pairs, settings: make_queue("voxloom", pairs, settings, of_torchio()),
    "TorchIO with its own": lambda pairs, settings: make_queue("torchio", pairs, settings, of_torchio()),
    "voxloom with MONAI's transforms": lambda pairs, settings: make_queue("voxloom", pairs, settings, patch_transform=of_monai()),
    "voxloom with MONAI's transforms, few held": lambda pairs, settings: make_queue(
        "voxloom", pairs, few_held(settings), patch_transform=of_monai()
    ),
    "MONAI with its own": lambda pairs, settings: make_monai(pairs, settings, of_monai()),
    "MONAI with its own, cached": lambda pairs, settings: make_monai(pairs, settings, of_monai(), is_cached=True),
}


def read(batch):
    """Look at all of a batch, as copying it to a GPU does; give the number of patches."""
    tensors = [batch[name]["data"] if isinstance(batch[name], dict) else batch[name] for name in ("t1", "seg")]
    for tensor in tensors:
        torch.as_tensor(tensor).numpy().max()  # by one thread
    return len(tensors[0])


def train(make, pairs, settings):
    """Two epochs: the waits of each."""
    began = time.perf_counter()
    loader = make(pairs, settings)
    epochs = []
    for _ in range(2):
        waits, patches = [], 0
        for batch in loader:
            waits.append(time.perf_counter() - began)
            patches += read(batch)
            time.sleep(settings.step)
            began = time.perf_counter()
        assert patches == settings.subjects * settings.samples, patches
        epochs.append(waits)
        began = time.perf_counter()
    (first, *rest), (second, *more) = epochs
    return {"first": first, "second": second, "worst": max(rest + more), "idle": (sum(rest) + second + sum(more)) / 2}


def serve_loop(name, pairs, settings, connection):
    warnings.simplefilter("ignore")
    small = argparse.Namespace(**vars(settings) | {"subjects": 2, "step": 0})
    train(SYSTEMS[name], pairs[:2], small)
    gc.collect()
    connection.send("ready")
    while connection.recv():
        gc.collect()
        connection.send(train(SYSTEMS[name], pairs, settings))


def kilobytes(path, *names):
    """Add up some of the numbers that Linux gives of a process; 0 once it has ended."""
    try:
        values = dict(line.split(":") for line in Path(path).read_text().splitlines() if line.count(":") == 1)
        return sum(int(values[name].split()[0]) for name in names)
    except (OSError, KeyError):
        return 0


def bytes_of_main(pid):
    return 1024 * kilobytes(f"/proc/{pid}/status", "RssAnon", "RssShmem")


def bytes_of_worker(pid):
    """What it has written itself, and its part of what is shared."""
    return 1024 * kilobytes(f"/proc/{pid}/smaps_rollup", "Private_Dirty", "Pss_Shmem")


def children_of(pid):
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def watch(pid, stop, peaks):
    """Keep the peak of a process, and that of the sum of its workers."""
    while not stop.is_set():
        peaks["main"] = max(peaks["main"], bytes_of_main(pid))
        peaks["workers"] = max(peaks["workers"], sum(bytes_of_worker(child) for child in children_of(pid)))
        stop.wait(POLL_SECONDS)


def measure_times(pairs, settings):
    chosen = [name for name in SYSTEMS if ("with" in name) == settings.transforms]
    results = side_by_side([*chosen, *WORK], settings.rounds, serve, pairs, settings)
    return {name: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for name, rows in results.items()}


def measure_memory(name, pairs, settings):
    """In a process that has done nothing else yet."""
    process, pipe = start(serve_loop, name, pairs, settings)
    rest, stop = bytes_of_main(process.pid), threading.Event()
    peaks = {"main": rest, "workers": 0}
    watcher = threading.Thread(target=watch, args=(process.pid, stop, peaks))
    watcher.start()
    pipe.send(True)
    pipe.recv()
    stop.set()
    watcher.join()
    end(process, pipe)
    return {"main": (peaks["main"] - rest) / 1e6, "workers": peaks["workers"] / 1e6}


def load_and_cut(pairs, settings, augmentation):
    """Load pairs, cut patches from anywhere, and transform them, without drawing by labels and without seeds."""
    from monai.transforms import Compose

    import voxloom as vx

    torch.set_num_threads(1)
    transform, rng = Compose(augmentation), np.random.default_rng(0)
    for image, label in pairs:
        subject = vx.Subject(t1=vx.ScalarImage(image), seg=vx.LabelMap(label))
        volumes = {name: each.data for name, each in subject.images.items()}
        for _ in range(settings.samples):
            slices = tuple(slice(at, at + settings.patch) for at in rng.integers(0, settings.size - settings.patch + 1, 3))
            transform({name: volume[(slice(None), *slices)].clone() for name, volume in volumes.items()})


def make_batches(pairs, settings, augmentation):
    """All that voxloom does of an epoch, but that nothing goes from one process to another."""
    torch.set_num_threads(1)
    alone = argparse.Namespace(**vars(settings) | {"workers": 0})
    for _ in make_queue("voxloom", pairs, alone, patch_transform=list(augmentation) or None):
        pass


WORK = {"loading and cutting": load_and_cut, "drawing, seeds and batches as well": make_batches}


def serve_alone(name, pairs, settings, connection):
    """Share the work of an epoch out, and wait until all is done."""
    warnings.simplefilter("ignore")
    work, augmentation = WORK[name], of_monai() if settings.transforms else ()
    work(pairs[:1], settings, augmentation)
    connection.send("ready")
    while connection.recv():
        began = time.perf_counter()
        count = max(1, settings.workers)
        shares = [(pairs[number::count], settings, augmentation) for number in range(count)]
        processes = [multiprocessing.Process(target=work, args=share) for share in shares]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            assert process.exitcode == 0, process.exitcode
        connection.send({"seconds": time.perf_counter() - began})


def serve(name, *more):
    (serve_alone if name in WORK else serve_loop)(name, *more)


def least_wait(pairs, settings):
    """How long it takes to load as many subjects as the first batch needs, shared by the workers."""
    import voxloom as vx

    queue = make_queue("voxloom", pairs, argparse.Namespace(**vars(settings) | {"workers": 0})).dataset
    patches = [patch.patch_location.subject_index for _, patch in zip(range(BATCH), queue, strict=False)]
    began = time.perf_counter()
    for image, label in pairs[:4]:
        vx.Subject(t1=vx.ScalarImage(image), seg=vx.LabelMap(label)).load()
    seconds = (time.perf_counter() - began) / 4
    return len(set(patches)), seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", type=int, default=16, help="pairs of an image and a label map")
    parser.add_argument("--size", type=int, default=160, help="voxels of a volume on each axis")
    parser.add_argument("--patch", type=int, default=64, help="voxels of a patch on each axis")
    parser.add_argument("--samples", type=int, default=16, help="patches of each volume")
    parser.add_argument("--max-length", type=int, default=64, help="patches that a queue holds")
    parser.add_argument("--step", type=float, default=0.1, help="seconds of a training step")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--rounds", type=int, default=5, help="rounds")
    parser.add_argument("--transforms", action="store_true", help="with augmentation by TorchIO and by MONAI")
    settings = parser.parse_args()
    print(f"\n{machine()}, {settings.workers} workers")
    print(
        f"{settings.subjects} pairs of {settings.size}³ (.nii.gz, int16 and uint8), {settings.samples} patches of"
        f" {settings.patch}³ each, {settings.max_length} held, batches of {BATCH}, steps of {settings.step} s\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        pairs = write_pairs(Path(folder), settings.subjects, settings.size)
        needed, seconds = least_wait(pairs, settings)
        print(f"Loading a pair takes {seconds:.3f} s; the first batch has patches of {needed} subjects\n")
        print("| | first batch, s | of 2nd epoch, s | longest wait, s | idle per epoch, s | main, MB | workers, MB |")
        print("|---|---|---|---|---|---|---|")
        found = measure_times(pairs, settings)
        alone = {name: found.pop(name)["seconds"] for name in WORK}
        for name, row in found.items():
            row |= measure_memory(name, pairs, settings)
            times = " | ".join(f"{row[key]:.3f}" for key in ("first", "second", "worst", "idle"))
            print(f"| {name} | {times} | {row['main']:.0f} | {row['workers']:.0f} |", flush=True)
        steps = settings.step * settings.subjects * settings.samples / BATCH
        kind = "with MONAI's transforms" if settings.transforms else "without transforms"
        print(f"\nThe steps of an epoch take {steps:.3f} s. Its work alone, {kind}:")
        print("".join(f"- {name}: {seconds:.3f} s\n" for name, seconds in alone.items()))


if __name__ == "__main__":
    sys.exit(main())
