"""Stores side by side: random patches, an epoch of a queue, and a prediction that never holds its volume.

Patches of 64³ and 96³ voxels at random places of an image of float32, from `.nii`, `.nii.gz`, Zarr and the cache for training,
and from the same Zarr by tensorstore and by zarr-python; each with nothing kept between patches. An epoch of a queue of subjects
in `.nii.gz`, in the cache, and in nnU-Net's preprocessed form (Blosc2, as nnU-Net lays it out). And a model that is free, on
patches that share half, from Zarr to Zarr, against MONAI's `ZarrAvgMerger` with the same chunks, and the same in memory; then a
small network, of three layers, in its place. With `--parts unets` the same with a U-Net, which takes long: MONAI's BasicUNet
with 16 to 64 features.
Each system is a process of its own; rounds alternate. Peak memory is beyond what the process had.

    python benchmarks/stores.py [--size 256] [--patches 40] [--patch 64] [--rounds 5] [--subjects 6]
"""

import argparse
import gc
import json
import shutil
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch

from alternating import forget_peak, machine, memory_in_kilobytes, side_by_side

CHUNK = 64


def image_of(size, seed=0):
    """Make an image that compresses as scans do: smooth, with noise, and empty around it."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 1, *[max(2, size // 16)] * 3, generator=generator)
    values = torch.nn.functional.interpolate(coarse, [size] * 3, mode="trilinear")[0] * 1000
    values += torch.randn(1, *[size] * 3, generator=generator) * 20
    values[:, : size // 8], values[:, -size // 8 :] = 0, 0
    return values.round()


# Random patches


def read_voxloom(name):
    def prepare(folder, options):
        import voxloom as vx

        vx.set_chunk_cache(0)
        image = vx.ScalarImage(folder / name)
        if name.endswith(".gz"):
            image.load()  # as a queue's worker does: it can only be read whole
        return lambda start, size: image[(slice(None), *(slice(at, at + size) for at in start))].data.contiguous()

    return prepare


def read_cache(folder, options):
    import voxloom as vx

    cache = vx.SubjectsCache(vx.SubjectsDataset([vx.Subject(image=vx.ScalarImage(folder / "image.nii.gz"))]), folder / "cache")
    image = cache[0].image
    return lambda start, size: image[(slice(None), *(slice(at, at + size) for at in start))].data.contiguous()


def read_tensorstore(folder, options):
    import tensorstore

    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder}/image.zarr/"}, "recheck_cached_metadata": False}
    threads = {"data_copy_concurrency": {"limit": 1}, "file_io_concurrency": {"limit": 1}}
    array = tensorstore.open({**spec, "context": {"cache_pool": {"total_bytes_limit": 0}, **threads}}).result().T

    def read(start, size):
        return torch.from_numpy(array[tuple(slice(at, at + size) for at in start)].read(order="C").result())

    return read


def read_zarr_python(folder, options):
    import zarr

    array = zarr.open_array(folder / "image.zarr", mode="r")

    def read(start, size):
        return torch.from_numpy(np.ascontiguousarray(array[tuple(slice(at, at + size) for at in reversed(start))].T))

    return read


READERS = {
    "voxloom, .nii": read_voxloom("image.nii"),
    "voxloom, .nii.gz, loaded first": read_voxloom("image.nii.gz"),
    "voxloom, Zarr": read_voxloom("image.zarr"),
    "voxloom, cache": read_cache,
    "tensorstore, Zarr": read_tensorstore,
    "zarr-python, Zarr": read_zarr_python,
}


def serve_patches(name, folder, options, connection):
    """Read patches whenever it is asked for, and answer with milliseconds for each."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    began = time.perf_counter()
    read = READERS[name](folder, options)
    opened = time.perf_counter() - began
    generator = np.random.default_rng(0)
    connection.send("ready")
    while connection.recv():
        measured = {"opened": opened}
        for size in options.patch_sizes:
            starts = generator.integers(0, options.size - size + 1, (options.patches, 3)).tolist()
            began = time.perf_counter()
            for start in starts:
                read(start, size)
            measured[str(size)] = (time.perf_counter() - began) / options.patches * 1000
        connection.send(measured)


# An epoch


def serve_epochs(name, folder, options, connection):
    """Run an epoch of a queue whenever it is asked for, and answer with seconds."""
    warnings.simplefilter("ignore")
    import voxloom as vx

    by_label = vx.LabelSampler(options.patch, "labels", border="clamp")
    sampler = vx.MixedSampler([(1 / 3, by_label), (2 / 3, vx.UniformSampler(options.patch))])
    if name == "nnU-Net's cases":
        from voxloom.integrations.nnunet_cases import preprocessed_cases

        dataset, more = preprocessed_cases(folder / "nnunet"), {}
    else:
        files = [(folder / f"{number}.nii.gz", folder / f"{number}-labels.nii.gz") for number in range(options.subjects)]
        dataset = vx.SubjectsDataset([vx.Subject(image=vx.ScalarImage(a), labels=vx.LabelMap(b)) for a, b in files])
        more = {"cache": folder / "kept"} if name == "the cache" else {}
    connection.send("ready")
    while connection.recv():
        began = time.perf_counter()
        # Anew each time: a queue prepares the next epoch while the others have their turn.
        queue = vx.Queue(dataset, 4 * options.draws, options.draws, sampler, num_workers=2, seed=0, **more)
        for _ in vx.SubjectsLoader(queue, 4):
            pass
        connection.send({"seconds": time.perf_counter() - began})
        queue.close()


# A prediction


def labels_of(scores):
    """A model that is free: two classes."""
    return torch.cat([500 - scores, scores - 500], 1)


def network():
    """A model that costs something."""
    torch.manual_seed(0)
    layers = [(1, 8), (8, 8), (8, 2)]
    parts = [part for layer in layers for part in (torch.nn.Conv3d(*layer, 3, padding=1), torch.nn.ReLU())]
    return torch.nn.Sequential(*parts[:-1]).eval()


def unet():
    """A model as it is used."""
    from monai.networks.nets import BasicUNet

    torch.manual_seed(0)
    return BasicUNet(3, 1, 2, features=(16, 16, 32, 64, 64, 16)).eval()


def predictor_of(model, options):
    import voxloom as vx

    return vx.Predictor(model, options.patch, patch_overlap=0.5, batch_size=4, overlap_mode="average", model_name="labels")


def predict_voxloom(model, folder, options):
    import voxloom as vx

    predictor = predictor_of(model, options)
    source = vx.ScalarImage(folder / "image.zarr")

    def run():
        shutil.rmtree(folder / "out.zarr", ignore_errors=True)
        predictor(source, output=vx.ZarrStore(folder / "out.zarr", chunks=CHUNK))

    return run


def predict_voxloom_in_memory(model, folder, options):
    import voxloom as vx

    predictor = predictor_of(model, options)
    volume = vx.ScalarImage(folder / "image.nii").data

    def run():
        predictor(volume)

    return run


def predict_monai(model, folder, options):
    import zarr
    from monai.inferers import PatchInferer, SlidingWindowSplitter, ZarrAvgMerger

    array = zarr.open_array(folder / "image.zarr", mode="r")

    def run():
        shutil.rmtree(folder / "monai.zarr", ignore_errors=True)
        volume = torch.from_numpy(np.ascontiguousarray(array[...].T))[None, None]  # its splitter takes tensors
        chunks = (1, 2, CHUNK, CHUNK, CHUNK)
        inferer = PatchInferer(
            splitter=SlidingWindowSplitter(options.patch, overlap=0.5),
            merger_cls=ZarrAvgMerger,
            batch_size=4,
            store=zarr.storage.LocalStore(folder / "monai.zarr"),
            chunks=chunks,
        )
        with torch.inference_mode():
            inferer(volume, model)

    return run


PREDICTIONS = {
    "voxloom, Zarr to Zarr": predict_voxloom,
    "voxloom, in memory": predict_voxloom_in_memory,
    "MONAI, ZarrAvgMerger": predict_monai,
}


def serve_predictions(name, folder, options, connection, model=labels_of):
    """Predict whenever it is asked for, and answer with seconds and megabytes."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    run = PREDICTIONS[name](model, folder, options)
    connection.send("ready")
    while connection.recv():
        gc.collect()
        before = memory_in_kilobytes("VmRSS")
        forget_peak()
        began = time.perf_counter()
        run()
        seconds = time.perf_counter() - began
        connection.send({"seconds": seconds, "megabytes": (memory_in_kilobytes("VmHWM") - before) / 1024})


def serve_networks(name, folder, options, connection):
    """The same with a network."""
    serve_predictions(name, folder, options, connection, network())


def serve_unets(name, folder, options, connection):
    """And with a U-Net."""
    serve_predictions(name, folder, options, connection, unet())


# What they are applied to


def prepare(folder, options):
    """Make the files."""
    import blosc2

    import voxloom as vx

    image = vx.ScalarImage(image_of(options.size))
    for name, more in (("image.nii", {}), ("image.nii.gz", {}), ("image.zarr", {"chunks": CHUNK})):
        vx.convert(image, folder / name, **more)
    (folder / "nnunet").mkdir()
    size = options.size
    for number in range(options.subjects):
        values = image_of(size, number)
        labels = (values > 600).to(torch.int8)
        vx.ScalarImage(values).save(folder / f"{number}.nii.gz")
        vx.LabelMap(labels).save(folder / f"{number}-labels.nii.gz")
        # As nnU-Net lays them out: blocks of 128 KiB at most, chunks of the size of a patch and a half.
        for stem, array in ((f"case_{number}", values), (f"case_{number}_seg", labels)):
            chunk = min(size, options.patch * 3 // 2)
            layout = {"chunks": (1, chunk, chunk, chunk), "blocks": (1, *[min(32, chunk)] * 3)}
            packing = {"codec": blosc2.Codec.ZSTD, "clevel": 8, "nthreads": 1}
            blosc2.asarray(array.numpy(), urlpath=str(folder / "nnunet" / f"{stem}.b2nd"), mode="w", cparams=packing, **layout)
        (folder / "nnunet" / f"case_{number}.pkl").write_bytes(b"\x80\x04}\x94.")
    read_cache(folder, options)


def told(found, keys):
    return " | ".join(f"{statistics.median(each[key] for each in found):.3g}" for key in keys)


def main(arguments=None):
    parser = argparse.ArgumentParser()
    for name, default in {"size": 256, "patches": 40, "patch": 64, "rounds": 5, "subjects": 6, "draws": 4, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--parts", nargs="+", default=["patches", "epochs", "predictions", "networks"])
    parser.add_argument("--patch-sizes", type=int, nargs="+", default=[64, 96])
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        prepare(folder, options)
        systems = {
            "patches": (list(READERS), serve_patches),
            "epochs": ([".nii.gz", "the cache", "nnU-Net's cases"], serve_epochs),
            "predictions": (list(PREDICTIONS), serve_predictions),
            "networks": (list(PREDICTIONS), serve_networks),
            "unets": (list(PREDICTIONS), serve_unets),
        }
        results = {
            part: side_by_side(names, options.rounds, serve, folder, options)
            for part, (names, serve) in systems.items()
            if part in options.parts
        }
    print(f"{machine()}; {options}")
    sizes = list(map(str, options.patch_sizes))
    for part, (head, keys) in {
        "patches": (f"random patches, ms for each | {' | '.join(f'{size}³' for size in sizes)}", sizes),
        "epochs": ("an epoch | s", ["seconds"]),
        "predictions": ("a prediction by a model that is free | s | MB", ["seconds", "megabytes"]),
        "networks": ("a prediction by a network of three layers | s | MB", ["seconds", "megabytes"]),
        "unets": ("a prediction by a U-Net | s | MB", ["seconds", "megabytes"]),
    }.items():
        if part in results:
            print(f"\n| {head} |\n|---|{'---|' * len(keys)}")
            for name, found in results[part].items():
                print(f"| {name} | {told(found, keys)} |")
    Path("bench").mkdir(exist_ok=True)
    Path("bench/stores.json").write_text(
        json.dumps({"machine": machine(), "options": vars(options), "results": results}, indent=1)
    )
    return results


if __name__ == "__main__":
    main()
