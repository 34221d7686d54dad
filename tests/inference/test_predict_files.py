"""predict into files: as they would be saved, under their name only when whole, and taken up again after any interruption."""

import contextlib
import errno
import filecmp
import functools
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from isal import igzip
from torch import nn

import fresh
import voxloom as vx
from reductions import Scaling, scaling
from slow import slow
from voxloom.core.boxes import Box
from voxloom.errors import RecordError, SaveError, TargetExistsError, UnsupportedImageError
from voxloom.inference.planning.plan import BASE_BYTES
from voxloom.io import spooling
from voxloom.io.nifti import store as nifti_store
from voxloom.io.nifti.writing import NiftiWriter
from voxloom.runs.log import RunLog

from strategies import MODES, examples, geometries

AFFINE = np.array([[0, -2.0, 0, 5], [1.5, 0, 0, 6], [0, 0, 3, 7], [0, 0, 0, 1]])


def network(channels_out=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, channels_out, 3, padding=1))


def long_volume():
    """Larger than a prediction needs in all, and quickly compressed: of few values."""
    return torch.randint(0, 4, (1, 24, 24, 20000)).float()


@pytest.fixture
def scan(tmp_path):
    torch.manual_seed(1)
    image = vx.ScalarImage((torch.rand(1, 30, 26, 22) * 1000).to(torch.int16), affine=AFFINE)
    image.save(tmp_path / "scan.nii.gz")
    return tmp_path / "scan.nii.gz"


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def unfinished(folder, ending=".nii", stem="out"):
    """The file that a result is in until it is whole."""
    (found,) = (path for path in Path(folder).iterdir() if path.name.startswith(f".{stem}.") and path.name.endswith(ending))
    return found


# Files as they are saved


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float32, torch.float64, torch.bool, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 3])
def test_blocks_written_in_any_order_make_the_file_that_is_saved_at_once(tmp_path, dtype, channels):
    data = (torch.rand(channels, 11, 7, 9) * 100).to(dtype)
    image = vx.ScalarImage(data, affine=AFFINE)
    image.save(tmp_path / "whole.nii")
    writer = NiftiWriter(tmp_path / "blocks.nii", data.shape, dtype, AFFINE, image.codes, is_new=True)
    boxes = [Box((5, 0, 4), (11, 2, 9)), Box((0, 0, 0), (11, 7, 4)), Box((5, 2, 4), (11, 7, 9)), Box((0, 0, 4), (5, 7, 9))]
    for box in boxes:
        writer.write(box, data[(slice(None), *box.slices)])
    writer.flush()
    writer.close()
    writer.close()
    assert filecmp.cmp(tmp_path / "whole.nii", tmp_path / "blocks.nii", shallow=False)


def test_whole_numbers_that_int32_cannot_hold_are_kept(tmp_path):
    numbers = torch.randint(-(2**62), 2**62, (1, 12, 12, 12))
    result = vx.predict(lambda batch: batch, numbers, 8, overlap_mode="crop", output=tmp_path / "a.nii.gz")
    assert result.dtype == torch.int64
    assert torch.equal(result.data, numbers)


@examples(15)
@given(geometries(largest=9), st.sampled_from(MODES), st.booleans(), st.sampled_from([".nii", ".nii.gz"]))
def test_a_file_holds_what_memory_would(tmp_path_factory, geometry, mode, labels, ending):
    folder = tmp_path_factory.mktemp("predict")
    shape, patch, overlap = geometry
    image = vx.ScalarImage(torch.rand(1, *shape), affine=AFFINE)
    arguments = (network(), image, patch, overlap, mode)
    options = {"reduce": "argmax" if labels else None}
    in_memory = vx.predict(*arguments, **options)
    result = vx.predict(*arguments, **options, output=folder / f"out{ending}")
    assert torch.equal(result.data, in_memory.data)
    assert type(result) is type(in_memory)
    in_memory.save(folder / f"saved{ending}")
    opened = [
        igzip.open(folder / name) if ending == ".nii.gz" else (folder / name).open("rb")
        for name in (f"saved{ending}", f"out{ending}")
    ]
    with opened[0] as saved, opened[1] as written:
        assert saved.read() == written.read()
    assert names(folder) == sorted([f"saved{ending}", f"out{ending}", "out.json"])


def test_shape_affine_and_form_codes_of_a_real_scan_are_kept(mni_path, tmp_path):
    result = vx.predict(lambda batch: batch > 100, mni_path, 96, 16, "crop", output=tmp_path / "mask.nii.gz", batch_size=2)
    original, written = nib.load(mni_path), nib.load(tmp_path / "mask.nii.gz")
    assert written.shape == original.shape
    assert np.array_equal(written.affine, original.affine)
    for form in ("qform_code", "sform_code"):
        assert written.header[form] == original.header[form]
    assert written.get_data_dtype() == np.uint8
    assert torch.equal(result.data[0] > 0, vx.ScalarImage(mni_path).data[0] > 100)


def test_the_sidecar_says_how_the_result_came_to_be(scan, tmp_path):
    model = network()
    options = {"output": tmp_path / "out.nii.gz", "reduce": "argmax"}
    with pytest.raises(vx.errors.SizeError) as caught:
        vx.plan(model, scan, 10, 4, **options, memory_limit=BASE_BYTES)
    limit = int(re.search(r"\((\d+) bytes\)", str(caught.value))[1])
    with pytest.warns(RuntimeWarning, match="blocks"):
        vx.predict(model, scan, 10, 4, **options, memory_limit=limit)
    said = json.loads((tmp_path / "out.json").read_text())
    assert said["versions"] == {"voxloom": vx.__version__, "torch": torch.__version__}
    assert said["input"]["bytes"] == scan.stat().st_size
    digest = subprocess.check_output(
        [sys.executable, "-c", f"import hashlib; print(hashlib.sha256(open({str(scan)!r},'rb').read()).hexdigest())"]
    )
    assert said["files"] == {str(scan): digest.decode().strip()}
    assert len(said["models"][0]["sha256"]) == 64
    assert said["options"]["patch_size"] == [10, 10, 10]
    assert said["options"]["reduce"] == "argmax"
    assert len(said["plan"]["blocks"]) > 1
    assert "blocks" in said["warnings"][0]
    assert said["made_with"]["device"] == "cpu"


def test_several_results_of_one_pass_in_files(scan, tmp_path):
    targets = {"labels": tmp_path / "labels.nii.gz", "doubt": tmp_path / "doubt.nii"}
    result = vx.predict(
        network(),
        scan,
        8,
        4,
        activation="softmax",
        reduce={"labels": "argmax", "doubt": "entropy", "shares": None},
        output=targets,
    )
    shares = result["shares"].data
    assert torch.equal(result["labels"].data[0], shares.argmax(0).to(torch.uint8))
    assert result["labels"].path == targets["labels"]
    torch.testing.assert_close(result["doubt"].data[0], torch.special.entr(shares).sum(0), atol=1e-5, rtol=1e-5)
    assert names(tmp_path) == ["doubt.json", "doubt.nii", "labels.json", "labels.nii.gz", "scan.nii.gz"]


# What is there already


@pytest.mark.parametrize(
    ("there", "why"), [("out.nii.gz", "exists, and is kept"), ("out.json", "exists, and is not of voxloom's")]
)
def test_what_exists_is_kept_unless_it_is_to_be_replaced(scan, tmp_path, there, why):
    (tmp_path / there).write_text("mine")
    calls = []

    def model(batch):
        calls.append(1)
        return batch

    with pytest.raises(TargetExistsError, match=f"{there} {why}"):
        vx.predict(model, scan, 16, output=tmp_path / "out.nii.gz")
    assert calls == []
    assert (tmp_path / there).read_text() == "mine"
    assert names(tmp_path) == sorted(["scan.nii.gz", there])
    if there == "out.json":
        with pytest.raises(TargetExistsError, match="out.json exists, and is not of voxloom's"):
            vx.predict(model, scan, 16, output=tmp_path / "out.nii.gz", overwrite=True)
        (tmp_path / there).unlink()
    for _ in range(2):
        vx.predict(model, scan, 16, output=tmp_path / "out.nii.gz", overwrite=True)
    assert vx.ScalarImage(tmp_path / "out.nii.gz").shape == (1, 30, 26, 22)


def test_a_sidecar_is_of_the_file_that_it_names(scan, tmp_path):
    mine, model = tmp_path / "out.nii.gz", Fragile()
    mine.write_text("mine")
    vx.predict(model, scan, 10, 4, output=tmp_path / "out.nii")
    predictor = vx.Predictor(model, 10, 4)
    assert predictor.is_made(scan, output=tmp_path / "out.nii")
    with pytest.raises(TargetExistsError, match="out.json is not of it as it is now, but of .*'out.nii'"):
        predictor.is_made(scan, output=mine)
    (tmp_path / "out.nii").write_text("changed")
    with pytest.raises(TargetExistsError, match="out.json is not of it as it is now"):
        predictor.is_made(scan, output=tmp_path / "out.nii")


def test_a_mask_is_not_replaced_by_the_result(scan, tmp_path):
    mask = tmp_path / "mask.nii.gz"
    vx.LabelMap(vx.ScalarImage(scan).data > 0).save(mask)
    before = mask.read_bytes()
    for each in (mask, vx.LabelMap(mask)):
        with pytest.raises(SaveError, match="would replace the input"):
            vx.predict(Fragile(), scan, 10, 4, mask=each, output=mask, overwrite=True)
    assert mask.read_bytes() == before


def test_hidden_files_of_others_stay(scan, tmp_path):
    others = [".out.nii", ".out.0123456789abcdef.nii", ".out.json"]
    for name in others:
        (tmp_path / name).write_text("mine")
    interrupt(scan, tmp_path / "out.nii", at=3)
    vx.predict(Fragile(), scan, 10, 4, output=tmp_path / "out.nii")
    assert names(tmp_path) == sorted([*others, "out.json", "out.nii", "scan.nii.gz"])
    assert {(tmp_path / name).read_text() for name in others} == {"mine"}


def test_a_sidecar_of_others_that_appears_is_kept(scan, tmp_path):
    mine, calls = tmp_path / "out.json", []

    def model(batch):
        calls.append(1)
        if len(calls) == 5:
            mine.write_text("mine")
        return batch

    with pytest.raises(TargetExistsError, match="has appeared while the result was made, and is not of voxloom's"):
        vx.predict(model, scan, 10, 4, output=tmp_path / "out.nii", overwrite=True, model_name="one")
    assert mine.read_text() == "mine"
    mine.unlink()
    vx.predict(lambda batch: batch, scan, 10, 4, output=tmp_path / "out.nii", model_name="one", overwrite=True)
    assert names(tmp_path) == ["out.json", "out.nii", "scan.nii.gz"]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("damage", ["header", "cut", "gone"])
def test_a_damaged_unfinished_file_is_refused(scan, tmp_path, damage):
    target = tmp_path / "out.nii"
    interrupt(scan, target, at=50)
    volume = unfinished(tmp_path)
    content = volume.read_bytes()
    if damage == "gone":
        volume.unlink()
    else:
        volume.write_bytes(bytes(352) + content[352:] if damage == "header" else content[:500])
    with pytest.raises(RecordError, match=".nii is (damaged|gone).*start over with resume=False"):
        vx.predict(Fragile(), scan, 10, 4, output=target)
    vx.predict(Fragile(), scan, 10, 4, output=target, resume=False)
    assert torch.equal(vx.ScalarImage(target).data, vx.predict(Fragile().network, scan, 10, 4).data)


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_file_that_was_ready_is_not_published(scan, tmp_path, monkeypatch, damage):
    target = tmp_path / "out.nii"

    def killed(source, target, overwrite):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(nifti_store, "put", killed)
        with pytest.raises(KeyboardInterrupt):
            vx.predict(Fragile(), scan, 10, 4, output=target)
    volume = unfinished(tmp_path)
    volume.write_bytes(volume.read_bytes()[:500])
    if damage == "gone":
        volume.unlink()
        target.write_text("mine")
    with pytest.raises(RecordError, match="is gone or damaged"):
        vx.predict(Fragile(), scan, 10, 4, output=target)
    if damage == "gone":
        assert target.read_text() == "mine"
        target.unlink()
    vx.predict(Fragile(), scan, 10, 4, output=target, resume=False)
    assert torch.equal(vx.ScalarImage(target).data, vx.predict(Fragile().network, scan, 10, 4).data)


def test_a_sidecar_without_its_file_is_replaced(scan, tmp_path):
    first, second = tmp_path / "out.nii.gz", tmp_path / "out.nii"
    vx.predict(Fragile(), scan, 10, 4, output=first)
    with pytest.raises(TargetExistsError, match="says how .*out.nii.gz was made"):
        vx.predict(Fragile(), scan, 10, 4, output=second)
    first.unlink()
    vx.predict(Fragile(), scan, 10, 4, output=second)
    assert names(tmp_path) == ["out.json", "out.nii", "scan.nii.gz"]


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        ("out.nrrd", UnsupportedImageError, "its name must end in .nii or .nii.gz"),
        ("missing/out.nii", SaveError, "there is no folder"),
        ("folder.nii", SaveError, "is a folder"),
    ],
)
def test_targets_that_cannot_be(scan, tmp_path, target, error, message):
    (tmp_path / "folder.nii").mkdir()
    with pytest.raises(error, match=message):
        vx.predict(nn.Identity(), scan, 16, output=tmp_path / target)


def test_two_results_cannot_go_to_one_file(scan, tmp_path):
    with pytest.raises(SaveError, match="two results are to be written to the same file"):
        vx.predict(
            network(), scan, 16, reduce={"a": None, "b": "argmax"}, output={"a": tmp_path / "x.nii", "b": tmp_path / "x.nii"}
        )
    assert names(tmp_path) == ["scan.nii.gz"]


def test_two_at_once_do_not_write_to_one_file(scan, tmp_path):
    entered, leave = threading.Event(), threading.Event()

    def slow(batch):
        entered.set()
        leave.wait(20)
        return batch

    first = threading.Thread(target=lambda: vx.predict(slow, scan, 16, output=tmp_path / "out.nii"))
    first.start()
    try:
        assert entered.wait(20)
        with pytest.raises(RecordError, match="another process is writing .*out.nii"):
            vx.predict(nn.Identity(), scan, 16, output=tmp_path / "out.nii")
    finally:
        leave.set()
        first.join()
    assert (tmp_path / "out.nii").exists()

    assert names(tmp_path) == ["out.json", "out.nii", "scan.nii.gz"]


# Interruptions


class Interrupted(Exception):  # noqa: N818 - it stands for a power cut
    pass


class Fragile(nn.Module):
    """A network that fails at its n-th call, and counts them."""

    def __init__(self, fails_at=-1):
        super().__init__()
        self.network = network()
        self.at, self.calls = fails_at, 0  # not a setting of the network's

    def forward(self, batch):
        self.calls += 1
        if self.calls == self.at:
            raise Interrupted
        return self.network(batch)


def test_nothing_is_read_to_see_that_there_is_no_result_yet(tmp_path):
    class Unread:
        shape, dtype, affine, codes = (1, 16, 16, 16), torch.float32, np.eye(4), vx.SpaceCodes()
        chunks, resident_bytes, paths = (16, 16, 16), 0, ()

        def read(self, box):
            raise AssertionError

        fingerprint = read

    predictor = vx.Predictor(nn.Identity(), 8)
    assert not predictor.is_made(Unread(), output=tmp_path / "out.nii", mask=0.5)


@pytest.mark.parametrize("answer", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_a_file_system_refuses_locks_the_file_itself_is_one(tmp_path, monkeypatch, answer):
    def refused(*_):
        raise OSError(answer, os.strerror(answer))

    monkeypatch.setattr("fcntl.flock", refused)
    assert vx.predict(nn.Identity(), torch.rand(1, 16, 16, 16), 8, output=tmp_path / "out.nii").shape == (1, 16, 16, 16)
    assert names(tmp_path) == ["out.json", "out.nii"]
    log = RunLog({None: nifti_store.NiftiStore(tmp_path / "a.nii")})
    with pytest.raises(RecordError, match=r"another process is writing .*a\.nii.* remove .*\.a\.lock"):
        RunLog({None: nifti_store.NiftiStore(tmp_path / "a.nii")})
    log.close()
    RunLog({None: nifti_store.NiftiStore(tmp_path / "a.nii")}).close()
    assert names(tmp_path) == ["out.json", "out.nii"]


@examples(8)
@given(st.data(), st.sampled_from(MODES), st.integers(1, 3), st.booleans())
def test_a_run_that_is_interrupted_anywhere_is_taken_up_and_ends_with_the_same_bits(
    tmp_path_factory, data, mode, batch_size, split
):
    folder = tmp_path_factory.mktemp("predict")
    image = vx.ScalarImage(torch.rand(1, 20, 17, 15, generator=torch.Generator().manual_seed(0)))
    image.save(folder / "scan.nii")
    options = {"patch_size": 6, "patch_overlap": 2, "overlap_mode": mode, "batch_size": batch_size, "model_name": "one"}
    whole = vx.plan(Fragile(), folder / "scan.nii", **options, output="x")
    limit = {"memory_limit": whole.peak_bytes - 1} if split and mode != "crop" else {}  # a cropped patch is finished at once
    plan = vx.plan(Fragile(), folder / "scan.nii", **options, **limit, output="x")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        vx.predict(Fragile(), folder / "scan.nii", **options, **limit, output=folder / "expected.nii")
        calls, runs = 0, 0
        while not (folder / "out.nii").exists():
            model = Fragile(data.draw(st.integers(2, plan.forward_passes)) if runs < 3 else None)
            runs += 1
            with contextlib.suppress(Interrupted):
                # Today's limit does not matter: what was begun goes on as it was planned.
                vx.predict(model, folder / "scan.nii", **options, **(limit if runs == 1 else {}), output=folder / "out.nii")
            calls += model.calls
    assert filecmp.cmp(folder / "expected.nii", folder / "out.nii", shallow=False)
    assert calls <= plan.forward_passes + (runs - 1) * plan.restart_passes
    assert names(folder) == ["expected.json", "expected.nii", "out.json", "out.nii", "scan.nii"]


def interrupt(scan, target, at=25, overlap_mode="gaussian", **options):
    with pytest.raises(Interrupted):
        vx.predict(Fragile(at), scan, 10, 4, overlap_mode, output=target, **options)


def test_nothing_is_left_of_a_run_that_has_finished_nothing(scan, tmp_path):
    interrupt(scan, tmp_path / "out.nii", at=3)
    assert names(tmp_path) == ["scan.nii.gz"]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_several_results_of_one_output_are_resumed(scan, tmp_path):
    """Each has a sum of its own, and the model still gives one output."""
    options = {"activation": {"labels": None, "doubt": "softmax"}, "reduce": {"labels": "argmax", "doubt": "entropy"}}
    targets = {name: tmp_path / f"{name}.nii" for name in ("labels", "doubt")}
    with pytest.raises(Interrupted):
        vx.predict(Fragile(40), scan, 10, 4, output=targets, **options)
    again = Fragile()
    vx.predict(again, scan, 10, 4, output=targets, **options)
    whole = {name: tmp_path / f"whole {name}.nii" for name in ("labels", "doubt")}
    counted = Fragile()
    vx.predict(counted, scan, 10, 4, output=whole, **options)
    assert again.calls < counted.calls
    for name in targets:
        assert targets[name].read_bytes() == whole[name].read_bytes()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_another_model_image_or_option_is_refused_by_name(scan, tmp_path):
    target = tmp_path / "out.nii"
    interrupt(scan, target, at=40)
    assert names(tmp_path) == sorted([".out.voxloom", unfinished(tmp_path).name, "scan.nii.gz"])
    assert not target.exists()
    other = Fragile()
    with torch.no_grad():
        other.network[0].bias[0] += 1
    for model, image, options, message in (
        (other, scan, {}, "models"),
        (Fragile(), scan, {"overlap_mode": "hann"}, "options.overlap_mode was gaussian and is hann"),
        (Fragile(), scan, {"batch_size": 2}, "options.batch_size was 1 and is 2"),
        (Fragile(), scan, {"mask": 998}, "options.mask was None"),
        (Fragile(), vx.ScalarImage(scan).data, {}, "input.bytes was"),
        (nn.Sequential(Fragile()), scan, {}, "models"),
        (Fragile(), scan, {"reduce": lambda block: block * 2}, "options.reduce was None"),
    ):
        with pytest.raises(RecordError, match="is of an unfinished run of something else") as caught:
            vx.predict(model, image, 10, 4, output=target, **options)
        assert message in str(caught.value)
    os.utime(scan, ns=(1, 1))
    with pytest.raises(RecordError, match="input.modified_ns was"):
        vx.predict(Fragile(), scan, 10, 4, output=target)
    # Or anew.
    model = Fragile()
    vx.predict(model, scan, 10, 4, "hann", output=target, resume=False)
    assert model.calls == vx.plan(model, scan, 10, 4).forward_passes


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("then", "now"),
    [
        (scaling(1), scaling(2)),
        (Scaling(1), Scaling(2)),
        (lambda block, factor=1: block * factor, lambda block, factor=2: block * factor),
        (Scaling(torch.ones(1)).__call__, Scaling(torch.zeros(1)).__call__),
        (functools.partial(torch.mul, other=1), functools.partial(torch.mul, other=2)),
    ],
)
def test_what_a_function_uses_is_part_of_what_it_is(scan, tmp_path, then, now):
    interrupt(scan, tmp_path / "out.nii", at=40, reduce=then)
    with pytest.raises(RecordError, match="options.reduce"):
        vx.predict(Fragile(), scan, 10, 4, output=tmp_path / "out.nii", reduce=now)
    vx.predict(Fragile(), scan, 10, 4, output=tmp_path / "out.nii", reduce=then)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_buffer_that_is_in_no_checkpoint_is_part_of_the_model(scan, tmp_path):
    def model(value):
        network = Fragile()
        network.register_buffer("scale", torch.full((1,), float(value)), persistent=False)
        return network

    vx.predict(model(1), scan, 10, 4, output=tmp_path / "out.nii")
    assert vx.Predictor(model(1), 10, 4).is_made(scan, output=tmp_path / "out.nii")
    with pytest.raises(TargetExistsError, match="models"):
        vx.Predictor(model(2), 10, 4).is_made(scan, output=tmp_path / "out.nii")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_files_of_different_runs_are_not_mixed(scan, tmp_path):
    a, b = tmp_path / "a.nii", tmp_path / "b.nii"
    reduce = {"x": None, "y": "argmax"}
    interrupt(scan, {"x": a, "y": b}, at=40, reduce=reduce)
    with pytest.raises(RecordError, match="targets.y was"):
        vx.predict(Fragile(), scan, 10, 4, reduce=reduce, output={"x": a, "y": tmp_path / "c.nii"})
    with pytest.raises(RecordError, match="a.voxloom is of an unfinished run .* go on with that one"):
        vx.predict(Fragile(), scan, 10, 4, reduce=reduce, output={"x": b, "y": a})
    # A run for one of the targets alone knows nothing of that one, and takes nothing from it.
    interrupt(scan, b, at=40, reduce="argmax", overlap_mode="hann")
    expected = vx.predict(Fragile(), scan, 10, 4, "hann", reduce="argmax").data
    assert torch.equal(vx.predict(Fragile(), scan, 10, 4, "hann", reduce="argmax", output=b).data, expected)
    with pytest.raises(TargetExistsError, match="b.nii exists"):
        vx.predict(Fragile(), scan, 10, 4, reduce=reduce, output={"x": a, "y": b})
    b.unlink()
    result = vx.predict(Fragile(), scan, 10, 4, reduce=reduce, output={"x": a, "y": b})
    assert torch.equal(result["y"].data[0], result["x"].data.argmax(0).to(torch.uint8))
    assert names(tmp_path) == ["a.json", "a.nii", "b.json", "b.nii", "scan.nii.gz"]


def test_what_cannot_be_resumed_in_part_is_started_over(scan, tmp_path):
    reduce = {"x": None, "y": "argmax"}
    interrupt(scan, {"x": tmp_path / "x.nii"}, at=40, reduce=reduce)  # the other one is in memory
    assert names(tmp_path) == ["scan.nii.gz"]
    result = vx.predict(Fragile(), scan, 10, 4, reduce=reduce, output={"x": tmp_path / "x.nii"})
    assert torch.equal(result["y"].data[0], result["x"].data.argmax(0).to(torch.uint8))


def test_a_file_that_appears_in_the_meantime_is_kept(scan, tmp_path):
    target, calls = tmp_path / "out.nii", []

    def model(batch):
        calls.append(1)
        if len(calls) == 5:
            target.write_text("precious")
        return batch

    options = {"output": target, "model_name": "it"}
    with pytest.raises(TargetExistsError, match="has appeared while its result was made, and is kept"):
        vx.predict(model, scan, 16, **options)
    assert target.read_text() == "precious"
    with pytest.raises(TargetExistsError, match="has appeared"):
        vx.predict(model, scan, 16, **options)
    number = len(calls)
    target.unlink()
    torch.testing.assert_close(vx.predict(model, scan, 16, **options).data, vx.ScalarImage(scan).data.float())
    assert len(calls) == number


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_todays_memory_does_not_matter_to_a_run_that_was_begun(scan, tmp_path):
    interrupt(scan, tmp_path / "out.nii", at=40)
    with pytest.raises(vx.errors.SizeError, match="memory_limit"):
        vx.predict(Fragile(), scan, 10, 4, output=tmp_path / "other.nii", memory_limit=1000)
    vx.predict(Fragile(), scan, 10, 4, output=tmp_path / "out.nii", memory_limit=1000)


def test_a_link_is_followed_before_anything_is_computed(scan, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link.nii").symlink_to(tmp_path / "elsewhere" / "real.nii")
    vx.predict(nn.Identity(), scan, 16, output=tmp_path / "link.nii")
    assert names(tmp_path / "elsewhere") == ["real.json", "real.nii"]
    (tmp_path / "dangling.nii").symlink_to(tmp_path / "nowhere" / "real.nii")
    with pytest.raises(SaveError, match="there is no folder"):
        vx.predict(nn.Identity(), scan, 16, output=tmp_path / "dangling.nii")


def test_names_that_share_a_sidecar_are_refused(scan, tmp_path):
    with pytest.raises(SaveError, match="have one stem"):
        vx.predict(network(), scan, 16, reduce={"a": None, "b": 1}, output={"a": tmp_path / "x.nii", "b": tmp_path / "x.nii.gz"})


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_function_without_a_name_is_not_taken_up(scan, tmp_path):
    calls = []

    def model(batch):
        calls.append(1)
        if len(calls) == 40:
            raise Interrupted
        return batch

    with pytest.raises(Interrupted):
        vx.predict(model, scan, 10, 4, output=tmp_path / "out.nii")
    with pytest.raises(RecordError, match="may have been another one: give model_name"):
        vx.predict(model, scan, 10, 4, output=tmp_path / "out.nii")
    vx.predict(model, scan, 10, 4, output=tmp_path / "out.nii", resume=False)


def test_it_is_said_how_much_is_done_again(scan, tmp_path):
    interrupt(scan, tmp_path / "out.nii", at=40)
    model = Fragile()
    plan = vx.plan(model, scan, 10, 4)
    model.calls = 0
    with pytest.warns(RuntimeWarning, match=r"with (\d+) of \d+ slabs finished; \d+ forward passes are made again") as caught:
        vx.predict(model, scan, 10, 4, output=tmp_path / "out.nii")
    text = str(caught[0].message)
    assert int(text.split("finished; ")[1].split()[0]) <= plan.restart_passes
    assert json.loads((tmp_path / "out.json").read_text())["warnings"] == [text]
    assert model.calls < plan.forward_passes


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_damaged_record_is_an_error(scan, tmp_path):
    interrupt(scan, tmp_path / "out.nii", at=40)
    record = tmp_path / ".out.voxloom"
    text = record.read_text()
    record.write_text(text[: len(text) // 2])
    with pytest.raises(RecordError, match="is damaged: start over with resume=False"):
        vx.predict(Fragile(), scan, 10, 4, output=tmp_path / "out.nii")
    record.write_text(text)
    volume = unfinished(tmp_path)
    volume.write_bytes(volume.read_bytes()[:-10])
    with pytest.raises(RecordError, match="has .* bytes in place of"):
        vx.predict(Fragile(), scan, 10, 4, output=tmp_path / "out.nii")


@pytest.mark.parametrize(
    ("ending", "step"), [(".nii", 0), (".nii", 2), (".nii.gz", 3), *(slow(".nii.gz", step) for step in (0, 1, 2, 4, 5))]
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_run_that_ends_while_it_is_published_is_published_the_next_time(scan, tmp_path, monkeypatch, ending, step):
    target = tmp_path / f"out{ending}"
    steps = []

    def failing(function):
        def inner(*arguments, **options):
            steps.append(1)
            if len(steps) == step + 1:
                raise Interrupted
            return function(*arguments, **options)

        return inner

    model = Fragile()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", failing(Path.replace))
        patch.setattr(nifti_store.os, "link", failing(nifti_store.os.link))
        patch.setattr(nifti_store.shutil, "copyfileobj", failing(nifti_store.shutil.copyfileobj))
        with contextlib.suppress(Interrupted):
            vx.predict(model, scan, 10, 4, output=target)
    calls = model.calls
    with contextlib.suppress(TargetExistsError):
        vx.predict(model, scan, 10, 4, output=target)
    if step > 1:
        assert model.calls <= calls + vx.plan(model, scan, 10, 4).restart_passes
    assert names(tmp_path) == ["out.json", target.name, "scan.nii.gz"]
    assert torch.equal(vx.ScalarImage(target).data, vx.predict(model.network, scan, 10, 4).data)


def changed(record, **content):
    return json.dumps(json.loads(record) | content)


DAMAGES = [
    lambda first, rest: [first, *["x"] * 200],
    lambda first, rest: [first, "", "", ""],
    lambda first, rest: [first, "0", "1", '{"whole": true}'],
    lambda first, rest: [first, *map(str, range(99))],
    lambda first, rest: [first, *rest[1:]],
    lambda first, rest: [first, "\x00"],
    lambda first, rest: [*rest],
    lambda first, rest: ["[]", *rest],
    lambda first, rest: [changed(first, plan={}), *rest],
    lambda first, rest: [changed(first, plan=json.loads(first)["plan"] | {"blocks": [[0, 1]]}), *rest],
    lambda first, rest: [changed(first, plan=json.loads(first)["plan"] | {"blocks": []}), *rest],
    lambda first, rest: [changed(first, plan=json.loads(first)["plan"] | {"blocks": [[0, 1, 0, 1]]}), *rest],
    lambda first, rest: [changed(first, plan=json.loads(first)["plan"] | {"outputs": []}), *rest],
    lambda first, rest: [changed(first, plan=json.loads(first)["plan"] | {"results": [[None, 5, [1], "x", 0, 0]]}), *rest],
    lambda first, rest: [changed(first, fingerprint=None), *rest],
    lambda first, rest: [changed(first, run="../x"), *rest],
]


def test_a_damaged_log_is_never_believed(scan, tmp_path):
    interrupt(scan, tmp_path / "out.nii", at=40)
    path = tmp_path / ".out.voxloom"
    whole = path.read_text()
    first, *rest = whole.splitlines()
    for damage in DAMAGES:
        path.write_text("".join(f"{line}\n" for line in damage(first, rest)))
        with pytest.raises(RecordError, match=r"start over with resume=False"):
            vx.predict(Fragile(), scan, 10, 4, output=tmp_path / "out.nii")
    path.write_text(whole)
    with pytest.warns(RuntimeWarning, match="is resumed"):  # nothing was lost by all that
        vx.predict(Fragile(), scan, 10, 4, output=tmp_path / "out.nii")
    expected = vx.predict(Fragile().network, scan, 10, 4).data
    assert torch.equal(vx.ScalarImage(tmp_path / "out.nii").data, expected)
    (tmp_path / "out.nii").unlink()
    for damage in (DAMAGES[0], DAMAGES[-1]):
        interrupt(scan, tmp_path / "out.nii", at=40)
        first, *rest = path.read_text().splitlines()
        path.write_text("".join(f"{line}\n" for line in damage(first, rest)))
        vx.predict(Fragile(), scan, 10, 4, output=tmp_path / "out.nii", resume=False)
        assert torch.equal(vx.ScalarImage(tmp_path / "out.nii").data, expected)
        (tmp_path / "out.nii").unlink()


def test_a_line_that_was_not_finished_is_no_line(scan, tmp_path):
    interrupt(scan, tmp_path / "out.nii", at=40)
    with (tmp_path / ".out.voxloom").open("a") as file:
        file.write("1")
    with pytest.warns(RuntimeWarning, match="is resumed"):
        vx.predict(Fragile(), scan, 10, 4, output=tmp_path / "out.nii")
    assert torch.equal(vx.ScalarImage(tmp_path / "out.nii").data, vx.predict(Fragile().network, scan, 10, 4).data)


def test_an_input_is_never_replaced(tmp_path):
    vx.ScalarImage(torch.rand(1, 9, 9, 9)).save(tmp_path / "a.nii")
    before = (tmp_path / "a.nii").read_bytes()
    with pytest.raises(SaveError, match="the result would replace the input"):
        vx.predict(nn.Identity(), tmp_path / "a.nii", 8, output=tmp_path / "a.nii", overwrite=True)
    assert (tmp_path / "a.nii").read_bytes() == before


@pytest.mark.parametrize("damage", [lambda content: content[:-4], lambda content: content[: len(content) // 2]])
def test_a_compressed_input_that_is_cut_off_is_named_where_it_is_unpacked(tmp_path, damage):
    vx.ScalarImage(long_volume()).save(tmp_path / "scan.nii.gz")
    (tmp_path / "scan.nii.gz").write_bytes(damage((tmp_path / "scan.nii.gz").read_bytes()))
    with pytest.raises(vx.errors.VoxloomError, match=r"scan.nii.gz"):
        vx.predict(nn.Conv3d(1, 3, 1), tmp_path / "scan.nii.gz", (24, 24, 200), 0, reduce="argmax", memory_limit="52MiB")


SCRIPT = """
    import sys, time
    import torch
    import voxloom as vx

    class Slow(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = torch.nn.Conv3d(1, 3, 3, padding=1)

        def forward(self, batch):
            with open("calls", "a") as file:
                file.write("x")
            time.sleep(0.002)
            return self.layer(batch)

    torch.set_num_threads(1)
    vx.predict(Slow(), "scan.nii.gz", 10, 4, output=sys.argv[1], reduce="argmax", batch_size=2)
"""


@pytest.mark.slow
def test_a_process_that_is_killed_again_and_again_ends_with_the_same_file(scan, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))

    def start(target):
        return subprocess.Popen([sys.executable, "-W", "ignore", script, target], cwd=tmp_path, stderr=subprocess.PIPE, text=True)

    process = start("expected.nii.gz")
    assert process.wait() == 0, process.stderr.read()
    process.stderr.close()
    needed = len((tmp_path / "calls").read_text())
    (tmp_path / "calls").unlink()
    plan = vx.plan(network(), scan, 10, 4, reduce="argmax", batch_size=2, output="x")
    assert needed == plan.forward_passes
    random = np.random.default_rng(0)
    kills = 0
    for attempt in range(40):
        process = start("out.nii.gz")
        before = len((tmp_path / "calls").read_text()) if (tmp_path / "calls").exists() else 0
        stop_after = int(random.integers(1, plan.forward_passes // 2))
        while process.poll() is None and attempt < 5:
            if (tmp_path / "calls").exists() and len((tmp_path / "calls").read_text()) >= before + stop_after:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.001)
        process.wait()
        error = process.stderr.read()
        process.stderr.close()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, error
        kills += 1
    assert kills >= 2
    assert filecmp.cmp(tmp_path / "expected.nii.gz", tmp_path / "out.nii.gz", shallow=False)
    calls = len((tmp_path / "calls").read_text())
    assert calls <= plan.forward_passes + kills * plan.restart_passes
    assert names(tmp_path) == ["calls", "expected.json", "expected.nii.gz", "out.json", "out.nii.gz", "scan.nii.gz", "script.py"]


@pytest.mark.slow
def test_a_full_disk_shows_before_anything_is_computed_and_loses_nothing(scan, tmp_path):
    script = """
        import resource, torch, voxloom as vx
        calls = []
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
        try:
            vx.predict(lambda batch: (calls.append(1), batch)[1], "scan.nii.gz", 10, 4, output="out.nii")
        except vx.errors.SaveError as error:
            print(len(calls), error)
    """
    said = fresh.printed(script, cwd=tmp_path)
    assert re.match(r"\d+ out.nii could not be written", said), said
    assert names(tmp_path) == ["scan.nii.gz"]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_disk_that_is_full_in_the_middle_keeps_what_is_finished(scan, tmp_path, monkeypatch):
    target, model = tmp_path / "out.nii", Fragile()
    writes = []
    write = NiftiWriter.write

    def full(self, box, values):
        writes.append(1)
        if len(writes) == 60:
            raise OSError(28, "No space left on device")
        write(self, box, values)

    with monkeypatch.context() as patch:
        patch.setattr(NiftiWriter, "write", full)
        with pytest.raises(SaveError, match="No space left on device.*What is finished stays: the same call goes on"):
            vx.predict(model, scan, 10, 4, output=target)
    model.calls = 0
    vx.predict(model, scan, 10, 4, output=target)
    assert model.calls < vx.plan(model, scan, 10, 4).forward_passes
    assert torch.equal(vx.ScalarImage(target).data, vx.predict(model.network, scan, 10, 4).data)


def test_a_slab_is_not_recorded_whose_last_block_could_not_be_written(scan, tmp_path, monkeypatch):
    target, model, writes = tmp_path / "out.nii", Fragile(), []
    plan = vx.plan(model, scan, 10, 4)
    outer, middle, inner = plan.joining(plan.blocks[0]).applied(plan.traversal).parts
    of_slab = [len(outer.finished_with(group)) * len(middle.intervals) * len(inner.intervals) for group in range(2)]
    write = NiftiWriter.write

    def failing(self, box, values):
        writes.append(1)
        if len(writes) == sum(of_slab):
            time.sleep(0.2)  # meanwhile the slab is at its end
            raise OSError(28, "No space left on device")
        write(self, box, values)

    with monkeypatch.context() as patch:
        patch.setattr(NiftiWriter, "write", failing)
        with pytest.raises(SaveError, match="No space left on device"):
            vx.predict(model, scan, 10, 4, output=target)
    assert (tmp_path / ".out.voxloom").read_text().splitlines()[1:] == ["0"]
    with pytest.warns(RuntimeWarning, match="1 of 4 slabs finished"):
        vx.predict(model, scan, 10, 4, output=target)
    assert torch.equal(vx.ScalarImage(target).data, vx.predict(model.network, scan, 10, 4).data)


def test_ctrl_c_leaves_what_can_be_taken_up(scan, tmp_path):
    model = Fragile()

    def interrupting(module, given):
        if model.calls == 40:
            signal.raise_signal(signal.SIGINT)

    handle = model.register_forward_pre_hook(interrupting)
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        vx.predict(model, scan, 10, 4, output=tmp_path / "out.nii", model_name="it")
    assert threading.active_count() == before
    handle.remove()
    with pytest.warns(RuntimeWarning, match="is resumed"):
        vx.predict(model, scan, 10, 4, output=tmp_path / "out.nii", model_name="it")


def test_an_input_that_is_truncated_is_named_and_leaves_nothing(scan, tmp_path):
    scan.write_bytes(scan.read_bytes()[:-2000])
    with pytest.raises(vx.errors.CorruptImageError, match="scan.nii.gz"):
        vx.predict(nn.Identity(), scan, 16, output=tmp_path / "out.nii")
    assert names(tmp_path) == ["scan.nii.gz"]


# A compressed input that is larger than the memory


@pytest.mark.slow
def test_a_process_that_is_killed_while_a_slab_is_brought_to_the_disk(tmp_path):
    script = """
        import os, sys, time
        import torch
        import voxloom as vx
        from voxloom.io.nifti.writing import NiftiWriter

        flush = NiftiWriter.flush
        NiftiWriter.flush = lambda writer: (time.sleep(0.3), flush(writer))
        calls = int(sys.argv[1])

        def model(batch):
            global calls
            calls -= 1
            with open("calls", "a") as file:
                file.write("x")
            if calls == 0:
                os.kill(os.getpid(), 9)
            return batch

        options = {"model_name": "a", "output": "out.nii"}
        plan = vx.plan(lambda batch: batch, torch.zeros(1, 48, 16, 64), 16, 0, **options)
        print(plan.forward_passes + plan.restart_passes, flush=True)
        vx.predict(model, torch.zeros(1, 48, 16, 64), 16, 0, **options)
    """
    for kill_at in (5, 8):
        for calls in (kill_at, 0):
            code, said, errors = fresh.run(script, calls, cwd=tmp_path)
            assert code == (-signal.SIGKILL if calls else 0), errors
        assert len((tmp_path / "calls").read_text()) <= int(said)
        for name in ("calls", "out.nii", "out.json"):
            (tmp_path / name).unlink()


def test_files_are_unpacked_where_that_saves_passes(tmp_path):
    vx.ScalarImage(torch.rand(1, 128, 128, 128)).save(tmp_path / "scan.nii.gz")
    passes, spooled = [], []
    for limit in range(16, 64, 4):
        with contextlib.suppress(vx.errors.SizeError):
            model = lambda batch: batch.repeat(1, 12, 1, 1, 1)  # noqa: E731
            plan = vx.plan(model, tmp_path / "scan.nii.gz", 32, 0.25, reduce="argmax", memory_limit=f"{limit}MiB")
            assert plan.peak_bytes <= limit * 2**20
            passes.append(plan.forward_passes)
            spooled.append(plan.spooled_bytes > 0)
    assert passes == sorted(passes, reverse=True)
    assert spooled == sorted(spooled, reverse=True)
    assert set(spooled) == {True, False}


@pytest.mark.parametrize(("mask", "times"), [(0.5, 1), (torch.ones(24, 24, 20000, dtype=torch.bool), 1)])
def test_a_compressed_input_is_unpacked_once(tmp_path, monkeypatch, mask, times):
    vx.ScalarImage(long_volume()).save(tmp_path / "scan.nii.gz")
    unpacked = []
    copy = spooling.shutil.copyfileobj
    monkeypatch.setattr(spooling.shutil, "copyfileobj", lambda *args: (unpacked.append(1), copy(*args)))
    vx.predict(nn.Conv3d(1, 3, 1), tmp_path / "scan.nii.gz", (24, 24, 200), 0, reduce="argmax", mask=mask, memory_limit="52MiB")
    assert len(unpacked) == times


@pytest.mark.slow
def test_a_compressed_input_that_is_too_large_is_unpacked_to_a_temporary_file(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    image = vx.ScalarImage(long_volume(), affine=AFFINE)
    image.save(tmp_path / "scan.nii.gz")
    patch, model = (24, 24, 200), nn.Conv3d(1, 3, 1)
    expected = vx.predict(model, image, patch, 0, reduce="argmax").data
    given = vx.ScalarImage(tmp_path / "scan.nii.gz")
    options = {"reduce": "argmax", "batch_size": 1, "memory_limit": "52MiB", "output": tmp_path / "out.nii"}
    plan = vx.plan(model, given, patch, 0, mask=0.5, **options)
    assert plan.spooled_bytes == image.memory
    assert plan.memory.volume == 0
    assert "for the unpacked input" in str(plan)
    assert not given.is_loaded
    seen = []

    def look(module, batch):
        seen.extend(path.name for path in (tmp_path / "temporary").rglob("*.nii"))

    model.register_forward_pre_hook(look)
    result = vx.predict(model, given, patch, 0, **options)
    assert torch.equal(result.data, expected)
    assert set(seen) == {"0.nii"}
    assert not given.is_loaded
    assert names(tmp_path / "temporary") == []
