"""What goes wrong raises an error of voxloom's, whatever it is that goes wrong, and its message says something."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import voxloom as vx
from voxloom.errors import VoxloomError


@pytest.fixture
def world(tmp_path):
    """One of each thing, for mistakes to be made with."""
    images = {"t1": vx.ScalarImage(torch.rand(1, 8, 8, 8)), "seg": vx.LabelMap((torch.rand(1, 8, 8, 8) > 0.5).int())}
    subject = vx.Subject(images)
    dataset = vx.SubjectsDataset([subject, subject])
    grid = vx.GridSampler(subject, 4)
    (tmp_path / "x.txt").write_text("a")
    return SimpleNamespace(
        subject=subject,
        dataset=dataset,
        grid=grid,
        queue=vx.Queue([subject], samples_per_volume=2, sampler=vx.UniformSampler(4), seed=0),
        aggregator=vx.GridAggregator(grid),
        batch=next(iter(vx.SubjectsLoader(dataset, batch_size=2))),
        folder=tmp_path,
    )


MISTAKES = {
    "ds": lambda w: w.dataset[9],
    "dsneg": lambda w: w.dataset[-9],
    "grid": lambda w: w.grid[99],
    "q": lambda w: w.queue[0],
    "loc": lambda w: vx.PatchLocation((1, 2), (3, 4, 5)),
    "loc2": lambda w: vx.PatchLocation("ab", (3, 4, 5)),
    "cover": lambda w: vx.PatchGrid.cover((10, 10), (3, 3, 3)),
    "cover2": lambda w: vx.PatchGrid.cover((10, 10, 10), (3, 3)),
    "crop": lambda w: w.subject.t1[:, :, :, :, 1],
    "add": lambda w: w.aggregator.add_batch(torch.rand(2, 1, 4, 4, 4), [vx.PatchLocation((0, 0), (4, 4))] * 2),
    "add2": lambda w: w.aggregator.add_batch(torch.rand(2, 1, 4, 4, 4), torch.zeros(2, 5)),
    "add3": lambda w: w.aggregator.add_batch(torch.rand(2, 1, 4, 4, 4), torch.zeros(3, 6)),
    "add4": lambda w: w.aggregator.add_batch(torch.rand(2, 1, 4, 4, 4), "ab"),
    "add5": lambda w: w.aggregator.add_batch(np.zeros((2, 1, 4, 4, 4)), torch.zeros(2, 6)),
    "batch": lambda w: w.batch[5],
    "batchs": lambda w: w.batch["zz"],
    "bt": lambda w: w.batch.t1[5],
    "img": lambda w: w.subject.t1[9:99,],
    "imgneg": lambda w: w.subject.t1[0, -99],
    "subj": lambda w: w.subject["zz"],
    "subj2": lambda w: w.subject[99],
    "save": lambda w: w.subject.t1.save(w.folder / "a.xyz"),
    "save2": lambda w: w.subject.t1.save("/proc/a.nrrd"),
    "save3": lambda w: w.subject.t1.save(w.folder / "no" / "a.nrrd"),
    "load": lambda w: vx.ScalarImage(w.folder / "x.txt").data,
    "aff": lambda w: vx.ScalarImage(torch.rand(1, 4, 4, 4), affine="x"),
    "aff2": lambda w: vx.ScalarImage(torch.rand(1, 4, 4, 4), affine=np.eye(3)),
    "ps": lambda w: vx.predict(nn.Identity(), torch.rand(1, 8, 8, 8), (4, 4)),
    "po": lambda w: vx.predict(nn.Identity(), torch.rand(1, 8, 8, 8), 4, (0.5, 0.5)),
    "ps2": lambda w: vx.predict(nn.Identity(), torch.rand(1, 8, 8, 8), "a"),
    "red": lambda w: vx.predict(nn.Identity(), torch.rand(1, 8, 8, 8), 4, reduce="f("),
    "mask": lambda w: vx.predict(nn.Identity(), torch.rand(1, 8, 8, 8), 4, mask=torch.rand(1, 4, 4, 4)),
    "mirror": lambda w: vx.predict(nn.Identity(), torch.rand(1, 8, 8, 8), 4, mirror_axes=(7,)),
    "dev": lambda w: vx.predict(nn.Identity(), torch.rand(1, 8, 8, 8), 4, device="gpu"),
    "mem": lambda w: vx.predict(nn.Identity(), torch.rand(1, 8, 8, 8), 4, memory_limit="2 foos"),
    "five": lambda w: vx.predict(nn.Identity(), torch.rand(1, 1, 8, 8, 8), 4),
    "lab": lambda w: next(iter(vx.LabelSampler(w.subject, 4, "t9"))),
    "w": lambda w: next(iter(vx.WeightedSampler(w.subject, 4, "t1", "x"))),
    "num": lambda w: list(vx.UniformSampler(4)(w.subject, -1)),
    "num2": lambda w: list(vx.UniformSampler(4)(w.subject, "a")),
    "stack": lambda w: vx.SubjectsBatch.from_subjects([w.subject, vx.Subject(t1=vx.ScalarImage(torch.rand(1, 4, 4, 4)))]),
    "empty": lambda w: vx.SubjectsBatch.from_subjects([]),
    "files": lambda w: vx.ScalarImage([w.folder / "x.txt", w.folder / "y.txt"]).data,
    "none": lambda w: vx.ScalarImage([]),
    "out": lambda w: w.aggregator.get_output_tensor(),
    "pad": lambda w: vx.GridSampler(w.subject, 4, padding_mode="zz"),
    "pad2": lambda w: vx.GridSampler(w.subject, 4, padding_mode=None, patch_overlap=5),
    "src": lambda w: vx.ScalarImage(vx.ArraySource(np.zeros((2, 2)))),
    "lm": lambda w: vx.LabelSampler(w.subject, 4, "seg", label_probabilities={"a": 1}).__iter__().__next__(),
    "it": lambda w: vx.GridSampler(w.subject, (4, 4)),
    "grid2": lambda w: vx.GridSampler(w.subject, 4)[1.5],
    "kernel": lambda w: vx.Queue([w.subject], samples_per_volume=2, sampler=vx.UniformSampler(99), seed=0).__iter__().__next__(),
    "tr": lambda w: next(
        iter(vx.Queue([w.subject], samples_per_volume=2, sampler=vx.UniformSampler(4), seed=0, transform=lambda x: None))
    ),
    "sd": lambda w: w.queue.load_state_dict({}),
    "sd2": lambda w: w.queue.load_state_dict({"a": 1}),
    "sd3": lambda w: vx.UniformSampler(w.subject, 4).load_state_dict({}),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_an_error_of_ours(world, mistake):
    with pytest.raises(VoxloomError) as caught:
        mistake(world)
    assert len(str(caught.value)) > 20
