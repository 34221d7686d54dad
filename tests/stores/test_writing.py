"""Results in Zarr: every shard once and whole, the same bytes however often a run was interrupted, and valid for others."""

import errno
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

import voxloom as vx
from slow import slow
from voxloom.core.boxes import Box
from voxloom.core.grid.shards import ShardGrid
from voxloom.core.pyramids import coarser, factors_of_levels
from voxloom.errors import CorruptImageError, ModeError, RecordError, SaveError, SizeError, SpaceError, TargetExistsError
from voxloom.io.zarr import encoding, layout, writing
from voxloom.io.zarr.encoding import put_shard
from voxloom.io.zarr.writing import PyramidWriter, chunks_for
from voxloom.testing import check_store
from zarr_samples import AFFINE, TENSOR

SCAN = vx.ScalarImage(torch.rand(1, 32, 28, 36, generator=torch.Generator().manual_seed(0)), affine=AFFINE)
NETWORK = torch.nn.Conv3d(1, 3, 3, padding=1)


def labelled(batch):
    """A cheap model of three classes."""
    return torch.cat([batch, 1.1 - batch, (batch - 0.5).abs() * 2], 1)


def one_hot(batch):
    """Scores of the classes 0, 1 and 2 of which a batch is made."""
    return torch.cat([(batch == number).float() for number in range(3)], 1)


def hashes(folder):
    """The hash of each file of a store, but for the note of how it was made."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "voxloom.json")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def predicted(target, model=labelled, **options):
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        return vx.predict(
            model, SCAN, patch_size=16, patch_overlap=8, reduce="argmax", output=target, model_name="labelled", **options
        )


def store(path, **options):
    return vx.ZarrStore(path, chunks=8, levels=3, **options)


@pytest.mark.parametrize(
    ("ending", "version", "shards"),
    [
        slow(".ome.zarr", "0.4", None),
        (".ome.zarr", "0.5", 16),
        slow(".ome.zarr", "0.6", (16, 8, 32)),
        slow(".nii.zarr", "0.5", 16),
        (".zarr", "0.5", None),
    ],
)
def test_stores(tmp_path, ending, version, shards):
    def make(name):
        return vx.ZarrStore(tmp_path / f"{name}{ending}", version=version, chunks=8, shards=shards, levels=3)

    check_store(make, lambda made: (made if isinstance(made, vx.Image) else vx.ScalarImage(made)).data)
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_path_says_what_is_written(tmp_path):
    for ending in (".ome.zarr", ".nii.zarr", ".zarr"):
        made = predicted(tmp_path / f"out{ending}")
        assert isinstance(made, vx.LabelMap)
        assert made.path == tmp_path / f"out{ending}"
        assert torch.equal(made.data, predicted(None).data)
        assert np.array_equal(made.affine, AFFINE)
        assert made.data.dtype == torch.uint8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.nii.zarr", "out.ome.zarr", "out.zarr"]
    sidecar = json.loads((tmp_path / "out.ome.zarr/0/voxloom.json").read_text())
    assert sidecar["written"]["name"] == "out.ome.zarr"
    assert sidecar["options"]["patch_size"] == [16, 16, 16]
    assert list(zarr.open_group(tmp_path / "out.ome.zarr", mode="r").keys()) == ["0"]  # without a warning


def test_every_level_is_made_of_the_one_before(tmp_path):
    for labels, more in ((True, {"reduce": "argmax"}), (False, {})):
        path = tmp_path / f"{labels}.ome.zarr"
        vx.predict(labelled, SCAN, patch_size=16, patch_overlap=8, output=store(path), **more)
        level = vx.ScalarImage(path).data.numpy()
        for number, factors in enumerate(factors_of_levels((32, 28, 36), AFFINE, 3), start=1):
            level = coarser(level, factors, labels)
            assert np.array_equal(vx.ScalarImage(vx.open_zarr(path, level=number)).data.numpy(), level)


@pytest.mark.parametrize("version", [slow("0.4"), "0.5", slow("0.6")])
@pytest.mark.parametrize("reduce", [None, "argmax"])
def test_others_find_it_valid(tmp_path, version, reduce):
    import ngff_zarr
    import ome_zarr_models

    path = tmp_path / "out.ome.zarr"
    vx.predict(labelled, SCAN, patch_size=16, reduce=reduce, output=store(path, version=version))
    ngff_zarr.from_ngff_zarr(str(path), validate=True)
    if version != "0.6":  # of which the models know nothing yet
        assert ome_zarr_models.open_ome_zarr(zarr.open_group(path, mode="r")).ome_zarr_version == version


def test_a_nifti_zarr_is_read_by_its_own_reader(tmp_path):
    import niizarr

    made = vx.convert(SCAN, tmp_path / "scan.nii.zarr", levels=2)
    theirs = niizarr.zarr2nii(str(made.path))
    assert np.allclose(theirs.header.get_best_affine(), AFFINE)
    assert np.array_equal(np.asarray(theirs.dataobj), SCAN.data[0].numpy())


# Labels of an image


def test_labels_are_put_beside_their_image(tmp_path):
    vx.convert(SCAN, tmp_path / "scan.ome.zarr", levels=3, chunks=16)
    spec = vx.ModelSpec(labels=(vx.Label(1, "one", color=(1, 2, 3)), vx.Label(2, "two")))
    made = predicted(tmp_path / "scan.ome.zarr/labels/organs", spec=spec)
    predicted(tmp_path / "scan.ome.zarr/labels/other", spec=spec)
    assert made.path == tmp_path / "scan.ome.zarr/labels/organs"
    assert torch.equal(made.data, predicted(None).data)
    group = zarr.open_group(tmp_path / "scan.ome.zarr", mode="r")
    assert sorted(group["labels"].attrs["ome"]["labels"]) == ["organs", "other"]
    told = group["labels/organs"].attrs["ome"]
    assert len(told["multiscales"][0]["datasets"]) == 3
    assert told["image-label"]["source"] == {"image": "../../"}
    assert told["image-label"]["colors"][0] == {"label-value": 1, "rgba": [1, 2, 3, 255]}
    assert told["image-label"]["properties"][1] == {"label-value": 2, "name": "two"}
    assert [vx.open_zarr(made.path, level=level).shape for level in range(3)] == [
        vx.open_zarr(tmp_path / "scan.ome.zarr", level=level).shape for level in range(3)
    ]
    with pytest.raises(TargetExistsError):
        predicted(tmp_path / "scan.ome.zarr/labels/organs", spec=spec)
    predicted(tmp_path / "scan.ome.zarr/labels/organs", spec=spec, overwrite=True)
    assert not [path for path in (tmp_path / "scan.ome.zarr/labels").iterdir() if path.name.startswith(".")]
    import ome_zarr_models

    ome_zarr_models.open_ome_zarr(group["labels/organs"])
    assert ome_zarr_models.open_ome_zarr(group).labels is not None


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [False, True])
def test_labels_have_the_levels_of_an_image_that_rounds_down(tmp_path, jobs):
    """Halved by another program, which drops what is left over at the end of an axis; and in one step by three."""
    labels = vx.LabelMap(torch.randint(0, 3, (1, 33, 17, 20), dtype=torch.uint8))
    group = zarr.create_group(tmp_path / "scan.ome.zarr")
    scales = [(1, 1, 1), (2, 2, 2), (4, 4, 4), (12, 4, 8)]
    shapes = [(33, 17, 20), (16, 8, 10), (8, 4, 5), (2, 4, 2)]
    for number, shape in enumerate(shapes):
        group.create_array(str(number), shape=shape[::-1], dtype="u1")
    steps = [[{"type": "scale", "scale": scale[::-1]}] for scale in scales]
    datasets = [{"path": str(number), "coordinateTransformations": each} for number, each in enumerate(steps)]
    axes = [{"name": name, "type": "space", "unit": "millimeter"} for name in "zyx"]
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": datasets}]}
    image, path = vx.ScalarImage(tmp_path / "scan.ome.zarr"), tmp_path / "scan.ome.zarr/labels/organs"
    whole = vx.LabelMap(labels.data, affine=image.affine)
    if jobs:
        options = {"reduce": "argmax", "model_name": "one_hot", "devices": "cpu,cpu"}
        vx.predict(one_hot, whole, 16, 0, "crop", output=vx.ZarrStore(path, chunks=8, shards=16), **options)
    else:
        vx.convert(whole, path, chunks=8, shards=16)
    levels = [vx.open_zarr(path, level=number) for number in range(4)]
    assert [level.shape[1:] for level in levels] == shapes
    expected = labels.data.numpy()
    for level, factors, shape in zip(levels[1:], [(2, 2, 2), (2, 2, 2), (3, 1, 2)], shapes[1:], strict=True):
        expected = coarser(expected, factors, is_labels=True)[(slice(None), *map(slice, shape))]
        assert torch.equal(vx.LabelMap(level).data, torch.from_numpy(expected))


@pytest.mark.parametrize(("size", "coarser_size"), [(24, 16), (24, 17), (40, 16)])
def test_no_label_is_lost_beside_levels_of_another_ratio(tmp_path, size, coarser_size):
    group, ratio = zarr.create_group(tmp_path / "scan.ome.zarr"), size / coarser_size
    for number, length in enumerate((size, coarser_size)):
        group.create_array(str(number), shape=(length,) * 3, dtype="u1")
    steps = [[{"type": "scale", "scale": [each] * 3}] for each in (1, ratio)]
    datasets = [{"path": str(number), "coordinateTransformations": each} for number, each in enumerate(steps)]
    axes = [{"name": name, "type": "space", "unit": "millimeter"} for name in "zyx"]
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": datasets}]}
    labels = torch.zeros(1, size, size, size, dtype=torch.uint8)
    labels[:, -4:, -4:, -4:] = 1
    path = tmp_path / "scan.ome.zarr/labels/corner"
    vx.convert(vx.LabelMap(labels, affine=vx.ScalarImage(tmp_path / "scan.ome.zarr").affine), path, chunks=8)
    coarse = vx.LabelMap(vx.open_zarr(path, level=1))
    assert coarse.data[0, -1, -1, -1] == 1
    assert np.prod(coarse.spacing) * coarse.data.sum() >= 4**3


def test_labels_are_of_the_version_of_their_image(tmp_path):
    vx.convert(SCAN, tmp_path / "scan.ome.zarr", version="0.4", levels=2)
    predicted(tmp_path / "scan.ome.zarr/labels/organs")
    group = zarr.open_group(tmp_path / "scan.ome.zarr", mode="r")
    assert group["labels"].metadata.zarr_format == group["labels/organs"].metadata.zarr_format == 2
    assert group["labels"].attrs["labels"] == ["organs"]


def test_labels_on_another_grid_are_refused(tmp_path):
    vx.convert(vx.ScalarImage(TENSOR, affine=AFFINE), tmp_path / "scan.ome.zarr")
    with pytest.raises(SpaceError, match=r"labels have \(32, 28, 36\) voxels.*\(40, 30, 20\)"):
        predicted(tmp_path / "scan.ome.zarr/labels/organs")
    vx.convert(vx.ScalarImage(SCAN.data, affine=np.eye(4)), tmp_path / "moved.ome.zarr")
    with pytest.raises(SpaceError, match=r"mm away from"):
        predicted(tmp_path / "moved.ome.zarr/labels/organs")
    for name in ("scan", "moved"):
        assert not list((tmp_path / f"{name}.ome.zarr/labels").iterdir())


# Interruptions


def killed(target, event, number, memory_limit, out):
    """Predict, and be killed when something happens for the n-th time."""
    count = itertools.count(1)

    def dying(function):
        def call(*arguments, **more):
            if next(count) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **more)

        return call

    model = labelled
    if event == "model":
        model = dying(labelled)
    elif event == "shard":
        import voxloom.io.zarr.store as module

        module.put_shard = dying(module.put_shard)
    else:
        module, name = {"record": (writing, "write_safely"), "disk": (writing, "bring_to_disk"), "rename": (os, "rename")}[event]
        setattr(module, name, dying(getattr(module, name)))
    predicted(store(target), model=model, memory_limit=memory_limit)
    out.put("done")


def run_killed(target, event, number, memory_limit=None):
    """Run that in a process of its own; whether it was killed."""
    context = multiprocessing.get_context("fork")
    out = context.Queue()
    process = context.Process(target=killed, args=(target, event, number, memory_limit, out))
    process.start()
    process.join(120)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


@pytest.mark.parametrize(
    ("event", "number"),
    [("shard", 3), ("record", 3)]
    + [slow(*each) for each in (("model", 25), ("rename", 1), ("shard", 60), ("record", 5), ("disk", 7))],
)
def test_a_process_that_is_killed_is_taken_up_with_the_same_bytes(tmp_path, event, number):
    predicted(store(tmp_path / "whole.ome.zarr"))
    expected = hashes(tmp_path / "whole.ome.zarr")
    target = tmp_path / "out.ome.zarr"
    assert run_killed(target, event, number)
    assert not target.exists()
    predicted(store(target))
    found = hashes(target)
    assert {name: each for name, each in found.items() if not name.endswith("zarr.json")} == {
        name: each for name, each in expected.items() if not name.endswith("zarr.json")
    }
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".out")]


@pytest.mark.slow
def test_a_process_that_is_killed_again_and_again_ends_with_the_same_bytes(tmp_path):
    target = tmp_path / "out.ome.zarr"
    predicted(store(target))
    expected = hashes(target)
    rng = random.Random(0)
    for memory_limit in (None, "34 MiB"):
        shutil.rmtree(target)
        kills = 0
        for _ in range(12):
            if target.exists():
                break
            event, most = rng.choice([("model", 20), ("shard", 30), ("record", 5), ("disk", 6)])
            kills += run_killed(target, event, rng.randrange(1, most), memory_limit)
        else:
            predicted(store(target), memory_limit=memory_limit)
        assert kills >= 3
        assert hashes(target) == expected


def test_the_bytes_do_not_depend_on_the_memory(tmp_path):
    predicted(store(tmp_path / "a/out.ome.zarr") if (tmp_path / "a").mkdir() is None else None)
    (tmp_path / "b").mkdir()
    predicted(store(tmp_path / "b/out.ome.zarr"), memory_limit="33 MiB")
    assert hashes(tmp_path / "a/out.ome.zarr") == hashes(tmp_path / "b/out.ome.zarr")


@pytest.mark.parametrize("damage", ["array", "parts", slow("raw"), slow("group")])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_damaged_unfinished_store_is_refused(tmp_path, damage):
    target = tmp_path / "out.ome.zarr"
    assert run_killed(target, "model", 18)
    whole = next(path for path in tmp_path.iterdir() if path.name.endswith(".zarr"))
    parts = next(path for path in tmp_path.iterdir() if path.name.endswith(".parts"))
    if damage == "array":
        (whole / "0/zarr.json").write_text("{")
    elif damage == "parts":
        (parts / "parts.json").write_text("[1]")
    elif damage == "raw":
        next(parts.rglob("*.raw")).write_bytes(b"short")
    else:
        shutil.rmtree(whole)
    with pytest.raises(RecordError, match=r"gone|damaged"):
        predicted(store(target))
    predicted(store(target), resume=False)
    assert torch.equal(vx.LabelMap(target).data, predicted(None).data)


def test_two_at_once_do_not_write_to_one_store(tmp_path):
    with ThreadPoolExecutor(2) as pool:
        made = [pool.submit(predicted, store(tmp_path / "out.ome.zarr")) for _ in range(2)]
        errors = [type(each.exception()) for each in made]
    assert set(errors) in ({RecordError, type(None)}, {TargetExistsError, type(None)})
    assert torch.equal(vx.LabelMap(tmp_path / "out.ome.zarr").data, predicted(None).data)


# Bad input


def test_what_exists_is_kept_unless_it_is_to_be_replaced(tmp_path):
    target = tmp_path / "out.ome.zarr"
    vx.convert(SCAN, target)
    before = hashes(target)
    with pytest.raises(TargetExistsError, match="exists, and is kept"):
        predicted(target)
    with pytest.raises(TargetExistsError):
        vx.convert(SCAN, target)
    assert hashes(target) == before
    predicted(target, overwrite=True)
    assert torch.equal(vx.LabelMap(target).data, predicted(None).data)
    (tmp_path / "mine.zarr").mkdir()
    (tmp_path / "mine.zarr/thesis.txt").write_text("mine")
    with pytest.raises(SaveError, match=r"mine\.zarr is a folder"):
        predicted(tmp_path / "mine.zarr", overwrite=True)
    with pytest.raises(TargetExistsError, match="no Zarr store"):
        predicted(vx.ZarrStore(tmp_path / "mine.zarr", overwrite=True))
    assert (tmp_path / "mine.zarr/thesis.txt").read_text() == "mine"


def test_an_input_is_never_replaced(tmp_path):
    made = vx.convert(SCAN, tmp_path / "scan.ome.zarr")
    with pytest.raises(SaveError, match="replace the input"):
        vx.predict(labelled, made, patch_size=16, output=made.path, overwrite=True)
    with pytest.raises(SaveError, match="over itself"):
        vx.convert(made, made.path, overwrite=True)


def test_is_made(tmp_path):
    target = tmp_path / "out.ome.zarr"
    predictor = vx.Predictor(labelled, 16, patch_overlap=8, model_name="labelled")
    assert not predictor.is_made(SCAN, output=target)
    predictor(SCAN, output=target)
    assert predictor.is_made(SCAN, output=target)
    with pytest.raises(TargetExistsError, match="patch_overlap"):
        vx.Predictor(labelled, 16, patch_overlap=4, model_name="labelled").is_made(SCAN, output=target)
    chunk = next(path for path in (target / "0/c").rglob("*") if path.is_file())
    chunk.write_bytes(chunk.read_bytes()[:-1])
    with pytest.raises(TargetExistsError, match="not of it as it is now"):
        predictor.is_made(SCAN, output=target)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_full_disk_keeps_what_is_finished(tmp_path, monkeypatch):
    target = tmp_path / "out.ome.zarr"
    opened, count = Path.open, itertools.count()

    class Full:
        """A file that takes half of what is written."""

        def __init__(self, file):
            self.__dict__["file"] = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            self.file.write(data.cast("B")[: data.nbytes // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full(path, mode="r", *arguments, **options):
        file = opened(path, mode, *arguments, **options)
        return Full(file) if path.suffix == ".raw" and mode != "rb" and next(count) > 100 else file

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(SaveError, match=r"No space left.*the same call goes on from there"):
            predicted(store(target))
    predicted(store(target))
    assert torch.equal(vx.LabelMap(target).data, predicted(None).data)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(SaveError, match="Permission denied"):
        predicted(tmp_path / "closed/out.ome.zarr")


def test_sizes_and_versions_that_cannot_be(tmp_path):
    with pytest.raises(ModeError, match=r"'0\.4', '0\.5', '0\.6'"):
        vx.ZarrStore(tmp_path / "a.ome.zarr", version="0.3")
    with pytest.raises(SizeError, match="chunks"):
        vx.ZarrStore(tmp_path / "a.ome.zarr", chunks=0)
    with pytest.raises(SizeError, match="multiples"):
        vx.convert(SCAN, tmp_path / "a.ome.zarr", chunks=(8, 12, 8), shards=16)
    with pytest.raises(ModeError, match="no shards"):
        vx.convert(SCAN, tmp_path / "a.ome.zarr", version="0.4", chunks=8, shards=16)
    assert list(tmp_path.iterdir()) == []


# The parts


def test_boxes_in_any_order_make_whole_shards_once(tmp_path):
    values = np.random.default_rng(0).integers(0, 9, (2, 21, 14, 17)).astype(np.int16)
    rng = np.random.default_rng(1)
    cuts = [sorted({0, size, *rng.integers(0, size, 3).tolist()}) for size in values.shape[1:]]
    boxes = [Box(*zip(*each, strict=True)) for each in itertools.product(*(itertools.pairwise(along) for along in cuts))]
    rng.shuffle(boxes)
    levels = [np.zeros((2, 21, 14, 17), np.int16), np.zeros((2, 11, 7, 9), np.int16)]
    written = []

    def put(number):
        def store(box, part):
            written.append((number, box))
            levels[number][(slice(None), *box.slices)] = part

        return store

    def writer(is_new):
        places = [put(0), put(1)]
        return PyramidWriter(
            tmp_path / "parts",
            places,
            len(values),
            [level.shape[1:] for level in levels],
            values.dtype,
            [(8, 8, 8), (8, 4, 8)],
            [(2, 2, 2)],
            False,
            is_new,
        )

    current, flushed = writer(True), 0
    for number, box in enumerate(boxes):
        current.write(box, values[(slice(None), *box.slices)])
        if number % 3 == 0:
            current.flush()
            flushed = number + 1
        if number % 4 == 0:  # an interruption: boxes come again, and one that was recorded
            current = writer(False)
            for again in reversed(boxes[max(0, flushed - 1) : number + 1]):
                current.write(again, values[(slice(None), *again.slices)])
    current.flush()
    assert current.num_unfinished == 0
    assert np.array_equal(levels[0], values)
    assert np.array_equal(levels[1], coarser(values, (2, 2, 2), False))
    assert len(written) == len(set(written)) == 3 * 2 * 3 + 2 * 2 * 2
    assert not list((tmp_path / "parts").rglob("*.raw"))


def halves(tmp_path, put):
    """Begin four shards of 1 MiB, each written in two halves."""
    writer = PyramidWriter(tmp_path / "parts", [put], 1, [(32, 128, 64)], np.dtype(np.float32), [(32, 128, 16)], [], False, True)
    values = np.random.default_rng(0).random((1, 32, 128, 64), np.float32)
    for start in (0, 64):
        writer.write(Box((0, start, 0), (32, start + 64, 64)), values[:, :, start : start + 64])
    return writer, values


def test_a_box_that_comes_again_must_have_the_size_that_it_had(tmp_path):
    writer = PyramidWriter(
        tmp_path / "parts", [lambda box, part: None], 1, [(8, 8, 8)], np.dtype(np.uint8), [(8, 8, 8)], [], False, True
    )
    writer.write(Box((0, 0, 0), (4, 8, 8)), np.zeros((1, 4, 8, 8), np.uint8))
    with pytest.raises(RecordError, match="which comes again with"):
        writer.write(Box((0, 0, 0), (3, 8, 8)), np.zeros((1, 3, 8, 8), np.uint8))


def test_a_box_that_is_written_twice_has_the_later_values(tmp_path):
    made = np.zeros((1, 32, 128, 64), np.float32)

    def put(box, part):
        made[(slice(None), *box.slices)] = part

    writer, values = halves(tmp_path, put)
    later = values[:, :, :64] + 1
    writer.write(Box((0, 0, 0), (32, 64, 64)), later)
    writer.flush()
    assert np.array_equal(made, np.concatenate([later, values[:, :, 64:]], 2))


def test_small_shards_are_written_several_at_once(tmp_path):
    together, made = threading.Barrier(4), np.zeros((1, 32, 128, 64), np.float32)

    def put(box, part):
        together.wait(30)
        made[(slice(None), *box.slices)] = part

    writer, values = halves(tmp_path, put)
    writer.flush()
    assert np.array_equal(made, values)


def test_a_shard_that_cannot_be_written_is_not_recorded_and_can_be_written_later(tmp_path):
    is_full, made = [True], np.zeros((1, 32, 128, 64), np.float32)

    def put(box, part):
        if is_full and box.start[2] == 16:
            raise OSError(errno.ENOSPC, "No space left on device")
        made[(slice(None), *box.slices)] = part

    writer, values = halves(tmp_path, put)
    before = (tmp_path / "parts" / "parts.json").read_text()
    with pytest.raises(OSError, match="No space left"):
        writer.flush()
    assert (tmp_path / "parts" / "parts.json").read_text() == before
    assert len(list((tmp_path / "parts").rglob("*.raw"))) == 4
    is_full.clear()
    writer.flush()
    assert np.array_equal(made, values)
    assert not list((tmp_path / "parts").rglob("*.raw"))


def test_negative_zeros_are_written_and_zeros_are_not(tmp_path):
    path = tmp_path / "a.zarr"
    spec = vx.VolumeSpec((2, 16, 8, 8), torch.float32, np.eye(4))
    chosen = layout.Layout.of(path, spec, "0.5", (8, 8, 8), None, None)
    chosen.create(path)
    (array,) = chosen.arrays(path)
    values = np.stack([np.full((8, 8, 8), -0.0, np.float32), np.zeros((8, 8, 8), np.float32)])
    for start, part in ((0, values), (8, np.ones_like(values)), (8, values)):
        put_shard(array, True, Box((start, 0, 0), (start + 8, 8, 8)), part)
    files = {str(file.relative_to(path / "c")) for file in (path / "c").rglob("*") if file.is_file()}
    assert files == {"0/0/0/0", "0/0/0/1"}  # what is 0 bit by bit is not kept, nor is what was there before
    assert np.signbit(array[0]).all()


@pytest.mark.parametrize(("version", "shards"), [("0.4", None), ("0.5", None), ("0.5", (16, 8, 16))])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [1, 2])
def test_files_are_those_of_zarr(tmp_path, version, dtype, channels, shards, monkeypatch):
    monkeypatch.setattr(encoding, "at_once", lambda num_bytes: 1)  # as of large ones, which are divided among threads
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    values = (torch.rand(channels, 21, 18, 37, generator=torch.Generator().manual_seed(0)) * 90).to(dtype).numpy()
    values[:, :8, :8, :8] = 0  # a chunk that is not kept
    spec = vx.VolumeSpec(values.shape, dtype, np.eye(4))
    chosen = layout.Layout.of(tmp_path / "a.ome.zarr", spec, version, (8, 8, 8), shards, 1)
    contents = []
    for name in ("own", "theirs"):
        path = tmp_path / name
        chosen.create(path)
        (array,) = chosen.arrays(path)
        if name == "own":
            for box in ShardGrid(values.shape[1:], chosen.units[0]):
                put_shard(array, chosen.has_channels, box, values[(slice(None), *box.slices)])
        else:
            turned = values.transpose(0, 3, 2, 1)
            zarr.open_array(path / "0", mode="r+")[...] = turned if channels > 1 else turned[0]
        found = zarr.open_array(path / "0", mode="r")[...]
        assert np.array_equal(found if channels > 1 else found[None], values.transpose(0, 3, 2, 1))
        files = sorted(file for file in path.rglob("*") if file.is_file())
        contents.append({str(file.relative_to(path)): file.read_bytes() for file in files})
    own, theirs = contents
    assert set(own) == set(theirs)
    assert {name: len(content) for name, content in own.items()} == {name: len(content) for name, content in theirs.items()}
    if not shards:  # of which chunks may have any order
        assert own == theirs


@pytest.mark.parametrize(("name", "shards"), [("out.zarr", None), ("out.zarr", 16), ("out.nii.zarr", None)])
def test_a_flipped_bit_is_an_error(tmp_path, name, shards):
    made = vx.predict(NETWORK, SCAN, patch_size=16, output=vx.ZarrStore(tmp_path / name, chunks=8, shards=shards, levels=1))
    files = [path for path in made.path.rglob("*") if path.is_file() and "json" not in path.name]
    files += [path for path in files if "nifti" in path.parts] * len(files)  # the header: half of what is tried
    drawn = random.Random(0)
    for _ in range(30):
        file = drawn.choice(files)
        content = file.read_bytes()
        place = drawn.randrange(len(content))
        file.write_bytes(content[:place] + bytes([content[place] ^ 1 << drawn.randrange(8)]) + content[place + 1 :])
        with pytest.raises(CorruptImageError, match=r"out(\.nii)?\.zarr.* is damaged"):
            _ = vx.ScalarImage(made.path).data
        file.write_bytes(content)


def test_chunks_suit_the_size_of_a_voxel():
    assert chunks_for((512, 512, 300), 1) == ((128, 128, 128), (128, 128, 128))
    assert chunks_for((512, 512, 300), 4) == ((64, 64, 64), (64, 64, 64))
    assert chunks_for((20, 5000, 5000), 1, (64, 64, 64)) == ((20, 64, 64), (20, 128, 128))


# What was found out by reading


@pytest.mark.parametrize(("chunks", "version"), [((16, 16, 1), "0.4"), slow(15, "0.5"), slow(7, "0.4"), ((5, 40, 3), "0.5")])
def test_levels_are_right_for_odd_chunks(tmp_path, chunks, version):
    image = vx.ScalarImage(torch.rand(1, 32, 33, 20))
    whole, parts = tmp_path / "whole.ome.zarr", tmp_path / "parts.ome.zarr"
    vx.convert(image, whole, chunks=chunks, levels=3, version=version)
    store = vx.ZarrStore(parts, chunks=chunks, levels=3, version=version)
    vx.predict(torch.nn.Identity(), image, patch_size=8, overlap_mode="crop", output=store)
    level = image.data.numpy()
    for number, factors in enumerate([(1, 1, 1), *factors_of_levels((32, 33, 20), np.eye(4), 3)]):
        level = coarser(level, factors, False)
        for path in (whole, parts):
            assert np.array_equal(vx.ScalarImage(vx.open_zarr(path, level=number)).data.numpy(), level)


def test_what_is_replaced_is_put_back_if_that_is_interrupted(tmp_path, monkeypatch):
    path = vx.convert(SCAN, tmp_path / "out.ome.zarr").path
    before = hashes(path)
    rename, count = type(path).rename, itertools.count()

    def interrupted(self, target):
        if next(count) == 1:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(type(path), "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            vx.convert(SCAN[:, :20], path, overwrite=True)
    assert hashes(path) == before
    assert [each.name for each in tmp_path.iterdir()] == ["out.ome.zarr"]


def test_shards_are_on_the_disk_before_they_are_recorded(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def noting(file):
        synced.append(os.readlink(f"/proc/self/fd/{file}"))
        fsync(file)

    monkeypatch.setattr(os, "fsync", noting)
    predicted(store(tmp_path / "out.ome.zarr"))
    chunks = {name for name in hashes(tmp_path / "out.ome.zarr") if "/c/" in name}
    assert {path.partition(".zarr/")[2] for path in synced} >= chunks
    assert chunks


def test_a_group_that_holds_more_is_not_replaced(tmp_path):
    group = zarr.open_group(tmp_path / "experiment.zarr", mode="w")
    group.create_array("precious", shape=(2,), dtype="u1")
    with pytest.raises(TargetExistsError, match="would be lost with it: precious"):
        SCAN.save(tmp_path / "experiment.zarr")
    vx.convert(SCAN, tmp_path / "scan.ome.zarr", levels=2)
    predicted(tmp_path / "scan.ome.zarr/labels/organs")
    for replace in (SCAN.save, lambda path: vx.convert(SCAN, path, overwrite=True), lambda path: predicted(path, overwrite=True)):
        with pytest.raises(TargetExistsError, match="labels"):
            replace(tmp_path / "scan.ome.zarr")
    assert torch.equal(vx.LabelMap(tmp_path / "scan.ome.zarr/labels/organs").data, predicted(None).data)


def test_places_that_are_easily_missed(tmp_path, monkeypatch):
    vx.convert(SCAN, tmp_path / "scan.ome.zarr", levels=2)
    monkeypatch.chdir(tmp_path / "scan.ome.zarr")
    assert vx.ScalarImage("1").shape == vx.open_zarr("../scan.ome.zarr", level=1).shape
    bright = vx.ScalarImage((SCAN.data > 0.5).to(torch.uint8), affine=AFFINE)
    made = vx.convert(bright, tmp_path / "scan.ome.zarr/labels/bright")
    assert "image-label" in zarr.open_group(made.path, mode="r").attrs["ome"]
    vx.ScalarImage(SCAN.data.half(), affine=AFFINE).save(tmp_path / "half.nii.zarr")
    assert torch.equal(vx.ScalarImage(tmp_path / "half.nii.zarr").data, SCAN.data.half().float())
    group = zarr.open_group(tmp_path / "nested.zarr", mode="w")
    group.create_array("scale0/image", data=np.zeros((4, 5, 6), np.uint8))
    steps = [{"type": "scale", "scale": [3, 2, 1]}]
    datasets = [{"path": "scale0/image", "coordinateTransformations": steps}]
    axes = [{"name": name, "type": "space"} for name in "zyx"]
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": datasets}]}
    assert vx.ScalarImage(tmp_path / "nested.zarr/scale0/image").spacing == (1, 2, 3)
