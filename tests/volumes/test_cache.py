"""Preprocessed subjects on the disk: the same as without, made once, and never half."""

import copy
import errno
import functools
import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import types

import filelock
import numpy as np
import pytest
import torch

import noted
import voxloom as vx
from voxloom.errors import CorruptImageError, MissingDependencyError, SaveError, SubjectError
from voxloom.io.fingerprints import fingerprint_of_option
from voxloom.volumes import cache as module

AFFINE = np.array([[0.0, 2, 0, -30], [-1.5, 0, 0, 4], [0, 0, 3, 5], [0, 0, 0, 1]])
CALLS = noted.CALLS


def prepare(subject, factor=2.0):
    noted.CALLS.append(subject["case"])
    subject.t1.set_data(subject.t1.data * factor)
    return subject


@pytest.fixture
def subjects(tmp_path):
    CALLS.clear()
    made = []
    (tmp_path / "data").mkdir()
    for number in range(3):
        data = torch.rand(1, 30, 28, 26, generator=torch.Generator().manual_seed(number))
        vx.ScalarImage(data, affine=AFFINE).save(tmp_path / f"data/{number}.nii.gz")
        vx.LabelMap((data > 0.7).to(torch.uint8), affine=AFFINE).save(tmp_path / f"data/{number}-seg.nii.gz")
        t1 = vx.ScalarImage(tmp_path / f"data/{number}.nii.gz", site="north")
        made.append(vx.Subject(t1=t1, seg=vx.LabelMap(tmp_path / f"data/{number}-seg.nii.gz"), case=number, tags=["a", 1]))
    return made


def test_subjects_are_kept_as_they_were_made(tmp_path, subjects):
    dataset = vx.SubjectsDataset(subjects, prepare)
    expected = [dataset[number] for number in range(3)]
    CALLS.clear()
    cache = vx.SubjectsCache(dataset, tmp_path / "cache")
    for _ in range(2):
        for number, theirs in enumerate(expected):
            ours = cache[number]
            assert not ours.t1.is_loaded
            assert torch.equal(ours.t1[:, 3:9, 4:5].data, theirs.t1[:, 3:9, 4:5].data)
            assert torch.equal(ours.t1.data, theirs.t1.data)
            assert torch.equal(ours.seg.data, theirs.seg.data)
            assert (type(ours.t1), type(ours.seg), ours.seg.data.dtype) == (vx.ScalarImage, vx.LabelMap, torch.uint8)
            assert np.array_equal(ours.t1.affine, AFFINE)
            assert ours.t1.codes == theirs.t1.codes
            assert (ours["case"], ours["tags"], ours.t1["site"]) == (number, ["a", 1], "north")
    assert CALLS == [0, 1, 2]
    assert [subject["case"] for subject in cache.dry_iter()] == [0, 1, 2]
    assert len(list(cache)) == len(cache) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_a_queue_from_the_cache_is_the_same_queue(tmp_path, subjects, workers):
    def batches(**options):
        dataset = vx.SubjectsDataset(subjects, prepare)
        sampler = vx.LabelSampler(12, "seg", {0: 1, 1: 1})
        queue = vx.Queue(dataset, 20, 5, sampler, num_workers=workers, seed=0, **options)
        return [(batch.t1.data, batch.seg.data) for _ in range(2) for batch in vx.SubjectsLoader(queue, 4)]

    expected = batches()
    for made in (batches(cache=tmp_path / "cache"), batches(cache=tmp_path / "cache")):
        for ours, theirs in zip(made, expected, strict=True):
            assert torch.equal(ours[0], theirs[0])
            assert torch.equal(ours[1], theirs[1])
    # What the sampler found out is kept as well.
    assert len(list((tmp_path / "cache").rglob(".seg.index/*.npz"))) == 3


def test_what_changes_is_made_anew(tmp_path, subjects):
    folder = tmp_path / "cache"
    vx.SubjectsCache(vx.SubjectsDataset(subjects, prepare), folder).build()
    assert len(CALLS) == 3
    vx.SubjectsCache(vx.SubjectsDataset(subjects, prepare), folder).build()
    assert len(CALLS) == 3
    # The transform's parameters, ...
    changed = vx.SubjectsCache(vx.SubjectsDataset(subjects, functools.partial(prepare, factor=3.0)), folder)
    assert torch.allclose(changed[0].t1.data, subjects[0].t1.data * 3)
    # ... a file, ...
    vx.ScalarImage(torch.ones(1, 30, 28, 26), affine=AFFINE).save(tmp_path / "data/1.nii.gz")
    fresh = vx.Subject(t1=vx.ScalarImage(tmp_path / "data/1.nii.gz", site="north"), seg=subjects[1].seg, case=1, tags=["a", 1])
    cache = vx.SubjectsCache(vx.SubjectsDataset([subjects[0], fresh, subjects[2]], prepare), folder)
    assert torch.equal(cache[1].t1.data, torch.full((1, 30, 28, 26), 2.0))
    # ... and what else the subject says.
    subjects[2]["case"] = 7
    assert vx.SubjectsCache(vx.SubjectsDataset(subjects, prepare), folder)[2]["case"] == 7
    assert len(CALLS) == 6
    assert cache.prune() == 3
    assert cache[1]["case"] == 1


def test_a_transform_is_known_by_its_code_and_not_by_its_random_state(tmp_path, subjects):
    import monai.transforms as mt

    def dataset():
        return vx.SubjectsDataset(subjects, mt.Compose([mt.ScaleIntensityd("t1"), mt.Lambdad("t1", lambda data: data * 2)]))

    first, second = (vx.SubjectsCache(dataset(), tmp_path / "cache") for _ in range(2))
    assert first._key(0) == second._key(0)
    other = mt.Compose([mt.ScaleIntensityd("t1"), mt.Lambdad("t1", lambda data: data * 3)])
    assert vx.SubjectsCache(vx.SubjectsDataset(subjects, other), tmp_path / "cache")._key(0) != first._key(0)


def test_images_in_memory(tmp_path):
    subjects = [vx.Subject(t1=vx.ScalarImage(torch.rand(1, 9, 8, 7)), case=0)]
    cache = vx.SubjectsCache(vx.SubjectsDataset(subjects), tmp_path / "cache")
    assert torch.equal(cache[0].t1.data, subjects[0].t1.data)
    subjects[0].t1.data.mul_(2)
    assert torch.equal(cache[0].t1.data, subjects[0].t1.data)


def fetch(folder, subjects, index, results):
    CALLS.clear()
    values = vx.SubjectsCache(vx.SubjectsDataset(subjects, prepare), folder)[index].t1.data.sum().item()
    results.put((values, len(CALLS)))


def test_processes_that_share_a_folder_make_each_entry_once(tmp_path, subjects):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    running = [context.Process(target=fetch, args=(tmp_path / "cache", subjects, 0, results)) for _ in range(4)]
    for process in running:
        process.start()
    found = [results.get(timeout=60) for _ in running]
    for process in running:
        process.join()
    assert len({value for value, _ in found}) == 1
    assert sum(calls for _, calls in found) == 1
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")]


def die(folder, subjects, name):
    original = getattr(module, name)

    def dying(*arguments, **more):
        original(*arguments, **more)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(module, name, dying)
    vx.SubjectsCache(vx.SubjectsDataset(subjects, prepare), folder)[0]


@pytest.mark.parametrize("name", ["write_blosc", "write_safely"])
def test_a_crash_leaves_no_half_entry(tmp_path, subjects, name):
    context = multiprocessing.get_context("fork")
    process = context.Process(target=die, args=(tmp_path / "cache", subjects, name))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    cache = vx.SubjectsCache(vx.SubjectsDataset(subjects, prepare), tmp_path / "cache")
    assert torch.allclose(cache[0].t1.data, subjects[0].t1.data * 2)


def test_what_was_used_longest_ago_makes_room(tmp_path, subjects):
    dataset = vx.SubjectsDataset(subjects, prepare)
    whole = vx.SubjectsCache(dataset, tmp_path / "cache")
    whole.build()
    for age, index in ((9000, 0), (7000, 1)):
        entry = tmp_path / "cache" / whole._key(index) / "subject.json"
        os.utime(entry, (entry.stat().st_mtime - age,) * 2)
    limit = module.size_of_path(tmp_path / "cache")
    fourth = vx.Subject(t1=vx.ScalarImage(torch.rand(1, 30, 28, 26)), seg=vx.LabelMap(torch.zeros(1, 30, 28, 26)), case=3)
    bounded = vx.SubjectsCache(vx.SubjectsDataset([*subjects, fourth], prepare), tmp_path / "cache", size_limit=limit)
    assert torch.allclose(bounded[3].t1.data, fourth.t1.data * 2)
    kept = {path.name for path in (tmp_path / "cache").iterdir()}
    assert bounded._key(0) not in kept
    assert {bounded._key(2), bounded._key(3)} <= kept
    # Where there is no room at all, a subject is given without being kept.
    tiny = vx.SubjectsCache(dataset, tmp_path / "other", size_limit=1000)
    assert torch.allclose(tiny[0].t1.data, subjects[0].t1.data * 2)
    assert list((tmp_path / "other").iterdir()) == []


def test_threads(tmp_path, subjects):
    cache = vx.SubjectsCache(vx.SubjectsDataset(subjects, prepare), tmp_path / "cache")
    threads = [threading.Thread(target=cache.__getitem__, args=(0,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert CALLS == [0]


# Bad input


def test_a_disk_that_is_full_or_may_not_be_written_to_is_named(tmp_path, subjects, monkeypatch):
    class Full(filelock.FileLock):
        def acquire(self, *arguments, **more):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), self.lock_file)

    def full(*arguments, **more):
        raise RuntimeError("Error while setting the slice")

    cache = vx.SubjectsCache(vx.SubjectsDataset(subjects, prepare), tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr("blosc2.asarray", full)
        with pytest.raises(SaveError, match=r"cache.*Error while setting the slice.*bytes are free"):
            cache[0]
    with monkeypatch.context() as patch:
        patch.setattr(module, "FileLock", Full)
        with pytest.raises(SaveError, match=r"kept in .*cache cannot be written there: Permission denied"):
            cache[0]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == []


def test_what_cannot_be_kept_is_named(tmp_path, subjects):
    subjects[0]["model"] = object()
    cache = vx.SubjectsCache(vx.SubjectsDataset(subjects, prepare), tmp_path / "cache")
    with pytest.raises(SubjectError, match=r"'model' of subject 0 .* is or holds a builtins.object, which a cache cannot keep"):
        cache[0]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == []


def test_a_data_set_that_does_not_say_what_is_in_it_needs_a_name(tmp_path, subjects):
    class Other(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return prepare(vx.Subject(t1=vx.ScalarImage(torch.full((1, 8, 8, 8), float(index))), case=index))

    with pytest.raises(SubjectError, match="give a name"):
        vx.SubjectsCache(Other(), tmp_path / "cache")
    cache = vx.SubjectsCache(Other(), tmp_path / "cache", name="version 1")
    assert [each.t1.data.mean().item() for each in cache] == [0, 2]
    assert [each.t1.data.mean().item() for each in cache] == [0, 2]
    assert CALLS == [0, 1]


def test_damage_is_named(tmp_path, subjects):
    cache = vx.SubjectsCache(vx.SubjectsDataset(subjects, prepare), tmp_path / "cache")
    cache.build()
    entry = tmp_path / "cache" / cache._key(0)
    content = (entry / "t1.b2nd").read_bytes()
    (entry / "t1.b2nd").write_bytes(content[: len(content) // 2])
    with pytest.raises(CorruptImageError, match=r"t1\.b2nd .*: remove .*, and it is made anew"):
        cache[0].t1.load()
    (entry / "subject.json").write_text("{")
    with pytest.raises(CorruptImageError, match="remove"):
        cache[0]
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="file"):
        vx.SubjectsCache(vx.SubjectsDataset(subjects), tmp_path / "file")


def test_a_missing_package_is_named(tmp_path, subjects, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "blosc2", None)
    with pytest.raises(MissingDependencyError, match=r"voxloom\[cache\]"):
        vx.SubjectsCache(vx.SubjectsDataset(subjects), tmp_path / "cache")[0]


def test_entries_say_who_made_them(tmp_path, subjects):
    cache = vx.SubjectsCache(vx.SubjectsDataset(subjects), tmp_path / "cache")
    cache.build()
    told = json.loads((tmp_path / "cache" / cache._key(0) / "subject.json").read_text())
    assert told["voxloom"] == vx.__version__


FACTOR = 2


def by_global(subject):
    subject.t1.set_data(subject.t1.data * subject.t1["gain"])
    return subject


def test_metadata_readers_and_types_tell_subjects_apart(tmp_path, subjects):
    path = tmp_path / "data/0.nii.gz"

    def mean(**more):
        subject = vx.Subject(t1=vx.ScalarImage(path, **{"gain": 2.0, **more}), case=0)
        return vx.SubjectsCache(vx.SubjectsDataset([subject], by_global), tmp_path / "cache")[0].t1.data.mean().item()

    own = vx.ScalarImage(path).data.mean().item()
    assert mean() == pytest.approx(2 * own)
    assert mean(gain=3.0) == pytest.approx(3 * own)
    assert mean(reader=lambda path: (torch.ones(1, 4, 4, 4), AFFINE)) == 2
    assert mean(reader=lambda path: (torch.full((1, 4, 4, 4), 4.0), AFFINE)) == 8
    half = vx.Subject(t1=vx.ScalarImage(torch.ones(1, 4, 4, 4, dtype=torch.bfloat16)))
    assert vx.SubjectsCache(vx.SubjectsDataset([half]), tmp_path / "cache")[0].t1.data.mean() == 1


def test_chunks_of_a_former_state_are_not_kept(tmp_path):
    import zarr

    array = zarr.create_array(tmp_path / "a.zarr", shape=(8, 8, 8), chunks=(4, 4, 4), dtype="f4")
    array[...] = 1
    subject = vx.Subject(t1=vx.ScalarImage(vx.open_zarr(tmp_path / "a.zarr")))
    cache = vx.SubjectsCache(vx.SubjectsDataset([subject], load_getitem=False), tmp_path / "cache")
    assert cache[0].t1.data.mean() == 1
    array[...] = 5
    assert cache[0].t1.data.mean() == 5


SETTINGS = {"factor": 2.0}
FACTORS = np.array([2.0])


class Holder:
    factor = 2.0


HELD = Holder()


def by_dict(subject):
    subject.t1.set_data(subject.t1.data * SETTINGS["factor"])
    return subject


def by_array(subject):
    subject.t1.set_data(subject.t1.data * FACTORS[0])
    return subject


def by_object(subject):
    subject.t1.set_data(subject.t1.data * HELD.factor)
    return subject


@pytest.mark.parametrize("transform", [by_dict, by_array, by_object])
def test_what_a_transform_finds_beside_itself_counts(transform, tmp_path, subjects, monkeypatch):
    def made():
        return vx.SubjectsCache(vx.SubjectsDataset(subjects, transform), tmp_path / "cache")

    before, again = made(), made()
    assert before._key(0) == again._key(0)
    assert torch.equal(before[0].t1.data, subjects[0].t1.data * 2)
    monkeypatch.setitem(SETTINGS, "factor", 3.0)
    monkeypatch.setattr(HELD, "factor", 3.0)
    FACTORS[0] = 3.0
    try:
        assert torch.equal(made()[0].t1.data, subjects[0].t1.data * 3)
    finally:
        FACTORS[0] = 2.0


def test_a_transform_that_is_set_later_makes_other_entries(tmp_path, subjects):
    dataset = vx.SubjectsDataset(subjects, prepare)
    cache = vx.SubjectsCache(dataset, tmp_path / "cache")
    dataset.set_transform(functools.partial(prepare, factor=5.0))
    assert torch.equal(cache[0].t1.data, subjects[0].t1.data * 5)
    dataset.set_transform(prepare)
    assert torch.equal(cache[0].t1.data, subjects[0].t1.data * 2)


def test_code_that_was_imported_before_its_file_was_changed(tmp_path, subjects, monkeypatch):
    text = "def prepare(subject):\n    subject.t1.set_data(subject.t1.data * 2)\n    return subject\n"
    (tmp_path / "prepared_so.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    import prepared_so

    (tmp_path / "prepared_so.py").write_text(text.replace("* 2", "* 3.0"))
    old = vx.SubjectsCache(vx.SubjectsDataset(subjects, prepared_so.prepare), tmp_path / "cache")
    assert torch.equal(old[0].t1.data, subjects[0].t1.data * 2)
    monkeypatch.delitem(sys.modules, "prepared_so")
    importlib.invalidate_caches()
    changed = importlib.import_module("prepared_so").prepare
    new = vx.SubjectsCache(vx.SubjectsDataset(subjects, changed), tmp_path / "cache")
    assert torch.equal(new[0].t1.data, subjects[0].t1.data * 3)


BESIDE = {
    "class made by a function": """
def make(k):
    class Made:
        def __call__(self, s):
            return times(s, k)
    return Made()
made = make({})
""",
    "default of a method": """
k = {}
class Made:
    def __call__(self, s, k=k):
        return times(s, k)
made = Made()
""",
    "array of a class": """
class Made:
    k = np.array([{}])
    def __call__(self, s):
        return times(s, float(self.k[0]))
made = Made()
""",
    "decorator of a method": """
def by(k):
    def wrap(function):
        @functools.wraps(function)
        def scaled(self, s):
            return times(function(self, s), k)
        return scaled
    return wrap
k = {}
class Made:
    @by(k)
    def __call__(self, s):
        return s
made = Made()
""",
    "partial of a class": """
class Made:
    scaled = functools.partialmethod(lambda self, k, s: times(s, k), {})
    def __call__(self, s):
        return self.scaled(s)
made = Made()
""",
    "method of an enum": """
import enum
k = {}
class Mode(enum.Enum):
    A = 1
    def apply(self, s):
        return times(s, k)
class Made:
    def __init__(self):
        self.mode = Mode.A
    def __call__(self, s):
        return self.mode.apply(s)
made = Made()
""",
    "attribute of a function": """
def made(s):
    return times(s, made.k)
made.k = {}
""",
    "hidden variable": """
__k = {}
def made(s):
    return times(s, __k)
""",
    "value of another module": """
import beside_it
beside_it.k = {}
def made(s):
    return times(s, beside_it.k)
""",
}
BEFORE = """
import functools
import numpy as np
def times(s, k):
    s.t1.set_data(s.t1.data * k)
    return s
"""


@pytest.mark.parametrize("case", BESIDE)
def test_what_a_transform_is_made_with_counts(tmp_path, subjects, monkeypatch, case):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "beside_it.py").write_text("")
    (tmp_path / "made_with.py").write_text("")  # by which a function is known that is in a file

    def first(factor):
        module = types.ModuleType("made_with")
        module.__file__ = str(tmp_path / "made_with.py")
        monkeypatch.setitem(sys.modules, "made_with", module)
        exec(compile(BEFORE + BESIDE[case].format(factor), module.__file__, "exec"), module.__dict__)
        return vx.SubjectsCache(vx.SubjectsDataset(subjects, module.made), tmp_path / "cache")[0].t1.data

    for factor in (2.0, 3.0, 2.0):
        assert torch.equal(first(factor), subjects[0].t1.data * factor)
    assert len(list((tmp_path / "cache").glob("[0-9a-f]*"))) == 2


def test_a_module_that_was_changed_since_it_was_imported(tmp_path, subjects, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "helps_so.py").write_text("def times(x):\n    return x * 2\n")
    (tmp_path / "is_helped.py").write_text(
        "import helps_so\ndef made(s):\n    s.t1.set_data(helps_so.times(s.t1.data))\n    return s\n"
    )

    def first():
        made = importlib.import_module("is_helped").made
        return vx.SubjectsCache(vx.SubjectsDataset(subjects, made), tmp_path / "cache")[0].t1.data

    importlib.import_module("is_helped")
    (tmp_path / "helps_so.py").write_text("def times(x):\n    return x * 3.0\n")
    assert torch.equal(first(), subjects[0].t1.data * 2)
    for name in ("helps_so", "is_helped"):
        monkeypatch.delitem(sys.modules, name)
    importlib.invalidate_caches()
    assert torch.equal(first(), subjects[0].t1.data * 3)


def test_keys_are_the_same_in_all_processes(tmp_path):
    """Whatever order sets have, and whatever random numbers would be drawn."""
    (tmp_path / "stable.py").write_text(
        "import enum\nimport monai.transforms as mt\nimport numpy as np\nimport voxloom as vx\n"
        "class Organ(enum.Enum):\n    LIVER = 1\n    SPLEEN = 2\n    LUNG = 'a'\n"
        "KEEP = {Organ.LIVER, Organ.SPLEEN, Organ.LUNG}\nPRE = mt.Compose([mt.ScaleIntensity()])\n"
        "DRAWN = [np.random.PCG64(), np.random.default_rng(), np.random.SeedSequence()]\n"
        "def made(s):\n    return PRE(s) if KEEP else DRAWN\n"
        "dataset = vx.SubjectsDataset([vx.Subject(t1=vx.ScalarImage(np.zeros((1, 4, 4, 4), np.float32)))], made)\n"
        "print(vx.SubjectsCache(dataset, 'cache')._key(0))\n"
    )
    keys = set()
    for seed in ("1", "2", "3"):
        script = [sys.executable, "-W", "ignore", "stable.py"]
        told = subprocess.run(script, cwd=tmp_path, env=os.environ | {"PYTHONHASHSEED": seed}, check=True, capture_output=True)
        keys.add(told.stdout)
    assert len(keys) == 1


def test_a_method_that_is_called_transform_is_part_of_its_data_set(tmp_path, subjects):
    class Own(torch.utils.data.Dataset):
        def __deepcopy__(self, memo):
            raise AssertionError("the data set is copied")

        def dry_iter(self):
            return subjects

        def __len__(self):
            return len(subjects)

        def transform(self, subject):
            return prepare(subject)

        def __getitem__(self, index):
            return self.transform(copy.deepcopy(subjects[index]))

    assert torch.equal(vx.SubjectsCache(Own(), tmp_path / "cache")[0].t1.data, subjects[0].t1.data * 2)


def read_by_file(path):
    return torch.full((1, 4, 4, 4), VALUE), np.eye(4)


VALUE = 1.0


def test_a_reader_is_known_by_what_it_uses(tmp_path, monkeypatch):
    (tmp_path / "a.raw").write_bytes(b"x")

    def first():
        subject = vx.Subject(t1=vx.ScalarImage(tmp_path / "a.raw", reader=read_by_file))
        return vx.SubjectsCache(vx.SubjectsDataset([subject]), tmp_path / "cache")[0].t1.data.mean().item()

    assert first() == 1
    monkeypatch.setitem(globals(), "VALUE", 2.0)
    assert first() == 2


def test_a_data_set_whose_transform_is_a_method_of_its_own(tmp_path, subjects):
    class Own(vx.SubjectsDataset):
        def __init__(self, subjects, factor):
            self.factor = factor
            super().__init__(subjects, self.prepared)

        def prepared(self, subject):
            return prepare(subject, factor=self.factor)

    for factor in (2.0, 3.0):
        made = vx.SubjectsCache(Own(subjects, factor), tmp_path / "cache")
        assert torch.equal(made[0].t1.data, subjects[0].t1.data * factor)


def test_sets_within_sets_are_known_quickly():
    def nested(value):
        held = Holder()
        held.value = value
        for _ in range(40):
            other = Holder()
            other.held = {("a", held), ("b", held)}
            held = other
        return held

    keys = [fingerprint_of_option(nested(value), with_files=True) for value in (1, 1, 2)]
    assert keys[0] == keys[1] != keys[2]
