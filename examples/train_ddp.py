"""Train with several processes, each on patches of its own, and go on in mid-epoch with the same losses.

    torchrun --nproc-per-node 2 examples/train_ddp.py [--folder ddp] [--epochs 2] [--stop-after 5]

The queue finds out which of the processes it is in, and needs nothing but the same seed in each. All have the same number of
batches. With `--stop-after` everything is saved after so many steps, as if the training had been interrupted; the same command
without it goes on from there. Each process writes its losses and the places of its patches to a file of its own.
"""

import argparse
import json
import os
from pathlib import Path

import torch
from torch import distributed, nn

import voxloom as vx


def flip(batch: vx.SubjectsBatch) -> vx.SubjectsBatch:
    """Mirror a whole batch from left to right, or not, wherever it is."""
    if torch.rand(1) < 0.5:
        batch.t1.data, batch.labels.data = batch.t1.data.flip(2), batch.labels.data.flip(2)
    return batch


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("ddp"))
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--stop-after", type=int)
    options = parser.parse_args()

    has_gpu = torch.cuda.is_available()
    distributed.init_process_group("nccl" if has_gpu else "gloo")
    rank, size = distributed.get_rank(), distributed.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if has_gpu else torch.device("cpu")
    options.folder.mkdir(parents=True, exist_ok=True)

    subjects = [vx.datasets.HeadPhantom(32, seed=number) for number in range(6)]
    queue = vx.Queue(
        subjects,
        max_length=12,
        samples_per_volume=8,
        sampler=vx.LabelSampler(16, "labels"),
        num_workers=options.workers,
        seed=0,
        start_background=False,
    )
    loader = vx.SubjectsLoader(queue, batch_size=4, device=device, batch_transform=flip)

    torch.manual_seed(0)
    classes = len(vx.datasets.HeadPhantom.names)
    network = nn.Sequential(nn.Conv3d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, classes, 3, padding=1)).to(device)
    model = nn.parallel.DistributedDataParallel(network)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)

    checkpoint = options.folder / "checkpoint.pt"
    first, step = 0, 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device)
        network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
        loader.load_state_dict(saved["loaders"][rank])
        first, step = saved["epoch"], saved["step"]

    with (options.folder / f"losses_{rank}.jsonl").open("a") as log:
        for epoch in range(first, options.epochs):
            for batch in loader:
                scores = model(batch.t1.data / 500)
                loss = nn.functional.cross_entropy(scores, batch.labels.data[:, 0].long())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
                places = [[location.subject_index, *location.index] for location in batch.patch_location]
                log.write(json.dumps({"epoch": epoch, "step": step, "loss": loss.item(), "patches": places}) + "\n")
                if step == options.stop_after:
                    break
            if step == options.stop_after:
                break

    loaders = [None] * size
    distributed.all_gather_object(loaders, loader.state_dict())
    if rank == 0:
        state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "loaders": loaders}
        torch.save({**state, "epoch": loaders[0]["epoch"], "step": step}, checkpoint)
        print(f"{size} processes, {step} steps each, the last loss was {loss.item():.3f}")
    queue.close()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
