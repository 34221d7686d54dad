"""Under torch.distributed, a queue and a sampler share their patches among the ranks by themselves, or say what they need."""

import json
import subprocess
import sys

import pytest
import torch

import voxloom as vx
from voxloom.errors import QueueError

TRAINING = """
import json
import sys
import torch
import voxloom as vx

rank, made, seed = int(sys.argv[1]), sys.argv[2], None if sys.argv[3] == "None" else int(sys.argv[3])
torch.distributed.init_process_group("gloo", init_method=f"file://{made}", rank=rank, world_size=2)
torch.manual_seed(0)
subjects = [vx.Subject(t1=vx.ScalarImage(torch.full((1, 8, 8, 8), float(number))), number=number) for number in range(6)]
queue = vx.Queue(subjects, max_length=6, samples_per_volume=2, sampler=vx.UniformSampler(4), seed=seed, num_workers=2)
numbers = [int(number) for batch in vx.SubjectsLoader(queue, batch_size=2) for number in batch["number"]]
sampler = vx.UniformSampler(subjects[0], 4, num_patches=10, seed=3)
drawn = [patch.patch_location.index for patch in torch.utils.data.DataLoader(sampler, batch_size=None, num_workers=2)]
print(json.dumps([numbers, drawn]))
torch.distributed.destroy_process_group()
"""


def two_ranks(folder, seed):
    (folder / "train.py").write_text(TRAINING)
    started = [
        subprocess.Popen(
            [sys.executable, folder / "train.py", str(rank), folder / "rendezvous", str(seed)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    return [(process, *process.communicate(timeout=120)) for process in started]


@pytest.mark.slow
def test_two_processes_train_on_patches_of_their_own(tmp_path):
    done = two_ranks(tmp_path, 5)
    assert [process.returncode for process, _, _ in done] == [0, 0], done
    # What Gloo of some versions of PyTorch says comes first.
    numbers, drawn = zip(*(json.loads(out.splitlines()[-1]) for _, out, _ in done), strict=True)
    assert len(numbers[0]) == len(numbers[1]) == 6
    assert not set(numbers[0]) & set(numbers[1])
    alone = vx.UniformSampler(vx.Subject(t1=vx.ScalarImage(torch.zeros(1, 8, 8, 8))), 4, num_patches=10, seed=3)
    everything = [list(patch.patch_location.index) for patch in alone]
    assert [sorted(each) for each in drawn] == [sorted(everything[0::2]), sorted(everything[1::2])]


@pytest.mark.slow
def test_two_processes_without_a_common_seed_are_refused(tmp_path):
    for process, _, error in two_ranks(tmp_path, None):
        assert process.returncode != 0
        assert "the 2 ranks of this training share the subjects, and need the same seed" in error


def test_a_queue_from_before_the_ranks_is_refused(monkeypatch):
    subjects = [vx.Subject(t1=vx.ScalarImage(torch.zeros(1, 8, 8, 8))) for _ in range(4)]
    arguments = {"samples_per_volume": 1, "sampler": vx.UniformSampler(4), "seed": 0}
    queue, alone = vx.Queue(subjects, **arguments), vx.Queue(subjects, **arguments, rank=0, world_size=1)
    for name, value in (("is_initialized", True), ("get_rank", 1), ("get_world_size", 2)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    with pytest.raises(QueueError, match=r"made as rank 0 of 1, .* says rank 1 of 2: make the queue after init_process_group"):
        next(iter(queue))
    assert len(list(alone)) == 4
    assert vx.Queue(subjects, **arguments).iterations_per_epoch == 2
