"""predict against the definition, voxel by voxel, with everything that it can do drawn at once."""

import itertools
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import voxloom as vx
from voxloom.inference.planning import block_memory

import reference
from strategies import MODES, examples, geometries


class Constants(nn.Module):
    """Returns 0.25 and 2 wherever."""

    def forward(self, batch):
        return torch.tensor([0.25, 2]).view(1, 2, 1, 1, 1).expand(len(batch), 2, *batch.shape[2:])


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv3d(3, 2, 3, padding=1))


MODELS = {"identity": nn.Identity(), "constants": Constants(), "network": network()}


class Gathered:
    """A sink of the user's: takes blocks in any order, each voxel once."""

    def open(self, form):
        self.data = torch.full(form.shape, -99, dtype=form.dtype)
        self.is_written = torch.zeros(form.shape[1:], dtype=torch.bool)

    def write(self, box, values):
        assert not self.is_written[box.slices].any()
        self.is_written[box.slices] = True
        self.data[(slice(None), *box.slices)] = values

    def close(self):
        assert self.is_written.all()
        return self.data

    def abort(self):
        raise AssertionError


@st.composite
def cases(draw):
    return {
        "model": draw(st.sampled_from(sorted(MODELS))),
        "mode": draw(st.sampled_from(MODES)),
        "batch_size": draw(st.integers(1, 4)),
        "mirror_axes": draw(st.sampled_from([None, (0,), (1, 2), (0, 1, 2)])),
        "mask": draw(st.none() | st.tuples(st.integers(0, 2**16), st.integers(0, 12))),
        "reduce": draw(st.sampled_from([None, "argmax", 0.5])),
        "sink": draw(st.sampled_from(["memory", ".nii", ".nii.gz", "own"])),
        "room": draw(st.none() | st.floats(0, 1)),
        "waits": draw(st.booleans()),
    }


def defined(model, data, patch, overlap, mode, mirror_axes, mask, fill):
    """What the output is by definition, as float64 of (C, I, J, K)."""
    shape = data.shape[1:]
    padded = any(map(int.__gt__, patch, shape))
    grid = vx.PatchGrid.cover(shape, patch, overlap, padded=padded)
    flips = [()]
    if mirror_axes:
        flips = [flip for count in range(len(mirror_axes) + 1) for flip in itertools.combinations(mirror_axes, count)]
    patches = []
    for location in grid:
        inside = tuple(
            slice(max(0, start), min(stop, size))
            for start, stop, size in zip(location.index, location.index_fin, shape, strict=True)
        )
        clamped = [
            torch.arange(start, stop).clamp(0, size - 1)
            for start, stop, size in zip(location.index, location.index_fin, shape, strict=True)
        ]
        batch = data[:, clamped[0]][:, :, clamped[1]][..., clamped[2]][None]  # edge padding
        with torch.no_grad():
            outputs = [model(batch.flip([axis + 2 for axis in flip])).flip([axis + 2 for axis in flip])[0] for flip in flips]
        output = torch.stack(outputs).double().mean(0)
        is_needed = mask is None or bool(mask[inside].any())
        if mode == "crop" and not is_needed:
            output = torch.full_like(output, fill)  # its part of the volume is nobody else's
        if mode == "crop" or is_needed:
            patches.append((location.index, output))
    if not patches:
        channels = 1 if isinstance(model, nn.Identity) else 2
        return torch.full((channels, *shape), fill, dtype=torch.float64)
    return reference.crop(shape, patches) if mode == "crop" else reference.blend(shape, patches, mode, fill)


@examples(100)
@given(geometries(largest=8, may_exceed=True), cases())
def test_whatever_is_asked_for_is_what_the_definition_says(geometry, case):
    shape, patch, overlap = geometry
    model, fill = MODELS[case["model"]], 7
    data = torch.rand(1, *shape, generator=torch.Generator().manual_seed(1))
    mask = None
    if case["mask"] is not None:
        seed, count = case["mask"]
        places = torch.randint(data.numel(), (count,), generator=torch.Generator().manual_seed(seed))
        mask = torch.zeros(shape, dtype=torch.bool)
        mask.view(-1)[places] = True
    options = {
        "batch_size": case["batch_size"],
        "mirror_axes": case["mirror_axes"],
        "mask": mask,
        "fill": fill,
        "padding_mode": "edge" if any(map(int.__gt__, patch, shape)) else None,
    }
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patched, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that several blocks cost more
        if case["waits"]:
            patched.setattr(block_memory, "WAITING_BYTES", 0)
        arguments = (model, data, patch, overlap, case["mode"])
        if case["room"] is not None:
            whole = vx.plan(*arguments, **options, reduce=case["reduce"]).peak_bytes
            with pytest.raises(vx.errors.SizeError, match="at least") as caught:
                vx.plan(*arguments, **options, reduce=case["reduce"], memory_limit=1)
            least = int(str(caught.value).split("(")[1].split(" bytes)")[0])
            options["memory_limit"] = int(least + (whole - least) * case["room"])
        output = {"memory": None, "own": Gathered()}.get(case["sink"], Path(folder) / f"result{case['sink']}")
        returned = vx.predict(*arguments, **options, reduce=case["reduce"], output=output)
        found = returned if case["sink"] == "own" else returned.data
    scores = defined(model, data, patch, overlap, case["mode"], case["mirror_axes"], mask, fill)
    if case["reduce"] is None:
        torch.testing.assert_close(found.double(), scores, atol=1e-5, rtol=1e-5)
        return
    # Voxels that were not computed are filled, and others are labelled; either is left out where rounding could decide.
    is_filled = (scores == fill).all(0)
    is_clear = torch.ones(shape, dtype=torch.bool)
    if case["reduce"] == "argmax":
        expected = scores.argmax(0, keepdim=True)
        if len(scores) > 1:
            is_clear = (scores[0] - scores[1]).abs() > 1e-4
    else:
        expected = scores > 0.5
        is_clear = ((scores - 0.5).abs() > 1e-4).all(0)
    expected = torch.where(is_filled, fill, expected.long())
    assert torch.equal(found.long()[:, is_clear | is_filled], expected[:, is_clear | is_filled])
    assert found.dtype == torch.uint8
