"""What tells entries of a cache apart: files, parts of data sets, and code however it is nested."""

import importlib
import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch
import torchio as tio
from torch.utils.data import ConcatDataset, Dataset, Subset

import voxloom as vx
from voxloom.errors import CorruptImageError, SubjectError


def scan(value=0.0):
    return vx.ScalarImage(torch.full((1, 8, 8, 8), float(value)))


def plus(subject, number):
    subject.t1.set_data(subject.t1.data + number)
    return subject


def values(dataset):
    return [float(dataset[index].t1.data.max()) for index in range(len(dataset))]


def cached(dataset, folder):
    return values(vx.SubjectsCache(dataset, folder / "cache"))


def test_files_of_one_size_time_and_header_are_told_apart(tmp_path):
    paths = [tmp_path / name / "t1.nii" for name in "abc"]
    for number, path in enumerate(paths):
        path.parent.mkdir()
        data = torch.zeros(1, 40, 40, 40)
        data[0, 17, 19, 23] = number  # where no sample is taken
        vx.ScalarImage(data).save(path)
        os.utime(path, (1.7e9, 1.7e9))
    dataset = vx.SubjectsDataset([vx.Subject(t1=vx.ScalarImage(path)) for path in paths])
    assert cached(dataset, tmp_path) == [0, 1, 2]


def test_arrays_of_one_hdf5_file_are_told_apart(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "scans.h5", "w") as file:
        for number in range(2):
            file[f"scan{number}"] = np.full((8, 8, 8), number, np.float32)
    images = [vx.ScalarImage(f"{tmp_path}/scans.h5:/scan{number}") for number in range(2)]
    assert images[0].fingerprint() != images[1].fingerprint()
    assert cached(vx.SubjectsDataset([vx.Subject(t1=image) for image in images]), tmp_path) == [0, 1]


STEPS = """
import torchio as tio

def step(subject):
    subject.t1.set_data(helper(subject.t1.data))
    return subject

def helper(data):
    return data + {number}

class Step:
    def __call__(self, subject):
        return step(subject)

class Base:
    def __call__(self, subject):
        return step(subject)

class Mine(tio.Transform):
    def apply_transform(self, subject):
        for image in subject.get_images():
            image.set_data(helper(image.data))
        return subject

class Holder:
    def __init__(self, function):
        self.function = function

    def __call__(self, subject):
        return self.function(subject)

def outer(function):
    return lambda subject: function(subject)
"""


@pytest.mark.parametrize(
    "make",
    [
        lambda steps: steps.step,
        lambda steps: [steps.step],
        lambda steps: vx.Compose([steps.step]),
        lambda steps: [steps.Step()],
        lambda steps: steps.Mine(),
        lambda steps: tio.Compose([tio.Lambda(steps.helper)]),
        lambda steps: steps.Holder(steps.step),
        lambda steps: steps.outer(steps.step),
        lambda steps: type("Derived", (steps.Base,), {})(),
    ],
)
@pytest.mark.filterwarnings("ignore:the history of TorchIO")
def test_code_that_is_changed_is_seen_wherever_it_is(tmp_path, monkeypatch, make):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for number in (1, 2, 1):
        (tmp_path / "own_steps.py").write_text(STEPS.format(number=number))
        monkeypatch.delitem(sys.modules, "own_steps", raising=False)
        importlib.invalidate_caches()
        dataset = vx.SubjectsDataset([vx.Subject(t1=scan())], make(importlib.import_module("own_steps")))
        assert cached(dataset, tmp_path) == [number]
    assert len([path for path in (tmp_path / "cache").iterdir() if not path.name.startswith(".")]) == 2


class Adding(torch.nn.Module):
    more = 0.0

    def __init__(self, by):
        super().__init__()
        self._by = by

    def forward(self, subject):
        return plus(subject, self._by + self.more)


class AddingDataset(vx.SubjectsDataset):
    def __init__(self, subjects, by):
        super().__init__(subjects)
        self._added = by

    def __getitem__(self, index):
        return plus(super().__getitem__(index), self._added)


@pytest.mark.parametrize(
    "make",
    [
        lambda subjects, by: vx.SubjectsDataset(subjects, Adding(by)),
        lambda subjects, by: vx.SubjectsDataset(subjects, Adding(by).forward),
        lambda subjects, by: vx.SubjectsDataset(subjects, vx.Compose([Adding(by)])),
        AddingDataset,
    ],
)
def test_what_a_transform_holds_counts_under_any_name(tmp_path, make):
    for by in (1, 2):
        assert cached(make([vx.Subject(t1=scan())], by), tmp_path) == [by]


def test_what_is_drawn_from_or_found_out_meanwhile_does_not_count(tmp_path):
    class Drawing(Adding):
        def __init__(self, by):
            super().__init__(by)
            self._generator, self._found = np.random.default_rng(), {}

        def forward(self, subject):
            self._found[len(self._found)] = subject
            return super().forward(subject)

    subjects = [vx.Subject(t1=scan())]
    for _ in range(2):
        cache = vx.SubjectsCache(vx.SubjectsDataset(subjects, Drawing(1)), tmp_path / "cache")
        assert values(cache) == [1]
        assert cache.count() == len(list((tmp_path / "cache").iterdir())) == 1


def test_a_long_chain_of_functions_is_followed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    chain = "".join(f"def f{number}(s):\n    return f{number + 1}(s)\n\n\n" for number in range(3 * sys.getrecursionlimit()))
    (tmp_path / "chained.py").write_text(f"{chain}def f{3 * sys.getrecursionlimit()}(s):\n    return s\n")
    importlib.invalidate_caches()
    chained = importlib.import_module("chained")
    vx.SubjectsCache(vx.SubjectsDataset([vx.Subject(t1=scan())], chained.f0), tmp_path / "cache")
    sys.modules.pop("chained")


NUMBER = 0.0


def adding_number(subject):
    return plus(subject, NUMBER)


def test_what_a_function_finds_beside_it_counts_as_it_is_now(tmp_path, monkeypatch):
    dataset = vx.SubjectsDataset([vx.Subject(t1=scan())], adding_number)
    for number in (1.0, 2.0):
        monkeypatch.setattr(sys.modules[__name__], "NUMBER", number)
        assert cached(dataset, tmp_path) == [number]


def made_adding(number):
    return lambda subject: plus(subject, number)


ADD, MORE = made_adding(0.0), made_adding(0.0)


def adding_twice(subject):
    return MORE(ADD(subject))


def test_what_functions_beside_it_hold_counts_too(tmp_path, monkeypatch):
    dataset = vx.SubjectsDataset([vx.Subject(t1=scan())], adding_twice)
    for name, number in (("ADD", 1.0), ("MORE", 2.0)):
        monkeypatch.setattr(sys.modules[__name__], name, made_adding(number))
        assert cached(dataset, tmp_path) == [1 if name == "ADD" else 3]


def test_a_value_of_a_class_counts_as_it_is_now(tmp_path, monkeypatch):
    dataset = vx.SubjectsDataset([vx.Subject(t1=scan())], Adding(1))
    for number in (1.0, 2.0):
        monkeypatch.setattr(Adding, "more", number)
        assert cached(dataset, tmp_path) == [1 + number]


def test_the_file_of_what_was_imported_counts(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for number in (1, 2):
        (tmp_path / "helping.py").write_text(
            f"def add(subject):\n    subject.t1.set_data(subject.t1.data + {number})\n    return subject\n"
        )
        (tmp_path / "using.py").write_text("import helping\n\n\ndef use(subject):\n    return helping.add(subject)\n")
        for name in ("helping", "using"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        using = importlib.import_module("using")
        assert cached(vx.SubjectsDataset([vx.Subject(t1=scan())], using.use), tmp_path) == [number]
    for name in ("helping", "using"):
        sys.modules.pop(name, None)


def test_two_functions_of_one_line_are_two(tmp_path):
    for number, function in {1: lambda subject: plus(subject, 1), 2: lambda subject: plus(subject, 2)}.items():
        assert cached(vx.SubjectsDataset([vx.Subject(t1=scan())], function), tmp_path) == [number]


@pytest.mark.parametrize("name", ["STEP", "helper", "NUMBER", "USING", "CACHED"])
def test_what_a_notebook_defines_is_seen(tmp_path, name):
    texts = {
        "STEP": "class STEP:\n    def __call__(self, subject):\n        return plus(subject, {0})\nstep = STEP()",
        "helper": "def helper(subject):\n    return plus(subject, {0})\ndef step(subject):\n    return helper(subject)",
        "USING": "def helper(subject):\n    return plus(subject, {0})\nclass Step:\n    def __call__(self, subject):\n"
        "        return helper(subject)\nstep = Step()",
        "CACHED": "import functools\nclass Step:\n    @functools.cached_property\n    def number(self):\n        return {0}\n"
        "    def __call__(self, subject):\n        return plus(subject, self.number)\nstep = Step()",
        "NUMBER": "NUMBER = {0}\ndef step(subject):\n    return plus(subject, NUMBER)",
    }
    for number in (1, 2, 1):
        cells = {"plus": plus, "__name__": "no_file_of_this_name"}
        exec(compile(texts[name].format(number), "<cell>", "exec"), cells)
        assert cached(vx.SubjectsDataset([vx.Subject(t1=scan())], cells["step"]), tmp_path) == [number]
    assert len([path for path in (tmp_path / "cache").iterdir() if not path.name.startswith(".")]) == 2


def test_subjects_are_of_the_part_that_they_come_from(tmp_path):
    subjects = [vx.Subject(t1=scan(value)) for value in range(2)]
    parts = [vx.SubjectsDataset(subjects, lambda subject, more=number: plus(subject, more)) for number in (10, 20)]
    both = ConcatDataset([Subset(parts[1], [1]), ConcatDataset(parts), Subset(parts[0], [1, 0])])
    assert values(both) == [21, 10, 11, 20, 21, 11, 10]
    assert cached(both, tmp_path) == values(both)
    assert len([path for path in (tmp_path / "cache").iterdir() if not path.name.startswith(".")]) == 4


class Plus(vx.SubjectsDataset):
    def __init__(self, subjects, number):
        super().__init__(subjects)
        self.number = number

    def __getitem__(self, index):
        return plus(super().__getitem__(index), self.number)


def test_a_data_set_that_makes_subjects_in_its_own_way_is_known_by_it(tmp_path):
    for number in (1, 2, 1):
        assert cached(Plus([vx.Subject(t1=scan())], number), tmp_path) == [number]
    assert len([path for path in (tmp_path / "cache").iterdir() if not path.name.startswith(".")]) == 2


class Changed(Subset):
    def __init__(self, dataset, indices, number):
        super().__init__(dataset, indices)
        self.number, self.calls = number, 0

    def __getitem__(self, index):
        self.calls += 1
        return plus(super().__getitem__(index), self.number)

    def __getitems__(self, indices):
        return [self[index] for index in indices]

    def dry_iter(self):
        return [self.dataset.dry_iter()[index] for index in self.indices]


class Wrapped(Dataset):
    def __init__(self, inner, number):
        self.inner, self.number = inner, number
        self.generator = np.random.default_rng()  # another one in each process

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, index):
        return plus(self.inner[index], self.number)

    def dry_iter(self):
        return self.inner.dry_iter()


@pytest.mark.parametrize("kind", [lambda inner, number: Changed(inner, [0], number), Wrapped])
def test_a_data_set_that_changes_subjects_of_another_is_known_by_both(tmp_path, kind):
    def three(subject):
        return plus(subject, 3)

    for number in (1, 2, 1):
        for transform, more in ((None, 0), (three, 3)):
            dataset = kind(vx.SubjectsDataset([vx.Subject(t1=scan())], transform), number)
            cache = vx.SubjectsCache(dataset, tmp_path / "cache")
            assert values(cache) == values(cache) == [number + more]
    assert len([path for path in (tmp_path / "cache").iterdir() if not path.name.startswith(".")]) == 4


def test_indices_may_count_from_the_end(tmp_path):
    subjects = [vx.Subject(t1=scan())]
    for number in (2, 3):
        both = ConcatDataset([vx.SubjectsDataset(subjects), vx.SubjectsDataset(subjects, lambda each, k=number: plus(each, k))])
        assert cached(Subset(both, [-1, -2]), tmp_path) == [number, 0]


def test_entries_come_back_as_they_were(tmp_path):
    more = {
        "names": {1: "liver", (2, 3): None},
        "size": (1, (2.5, [3])),
        "file": tmp_path / "a.nii",
        "matrix": np.eye(2, dtype=np.float32),
        "weights": torch.tensor([[1, 2]], dtype=torch.int16),
        "nothing": np.zeros((0, 3)),
    }
    subject = vx.Subject({"names": more.pop("names"), "t1": vx.ScalarImage(scan(1.5).data.bfloat16()), **more})
    subject["CT/lung"] = scan(2)
    subject["../z"] = vx.LabelMap(torch.ones(1, 8, 8, 8, dtype=torch.bool))
    dataset = vx.SubjectsDataset([subject, subject])
    for _ in range(2):
        for found in vx.SubjectsCache(dataset, tmp_path / "in" / "cache"):
            assert list(found) == list(dataset[0])
            for name, value in dataset[0].items():
                if isinstance(value, vx.Image):
                    assert type(found[name]) is type(value)
                    assert found[name].data.dtype == value.data.dtype
                    assert torch.equal(found[name].data, value.data)
                elif hasattr(value, "dtype"):
                    assert (type(found[name]), found[name].dtype) == (type(value), value.dtype)
                    assert found[name].shape == value.shape
                    assert found[name].tolist() == value.tolist()
                else:
                    assert (type(found[name]), found[name]) == (type(value), value)
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["cache"]


def test_a_history_that_cannot_be_kept_is_left_out(tmp_path):
    def bright(data):
        return data > -1

    transform = tio.ZNormalization(masking_method=bright)
    image = vx.ScalarImage(torch.rand(1, 8, 8, 8))
    cache = vx.SubjectsCache(vx.SubjectsDataset([vx.Subject(t1=image)], transform), tmp_path / "cache")
    with pytest.warns(RuntimeWarning, match=r"history of TorchIO's transforms .* holds a builtins.function"):
        cache.build()
    assert torch.equal(cache[0].t1.data, vx.SubjectsDataset([vx.Subject(t1=image)], transform)[0].t1.data)
    kept = vx.SubjectsCache(vx.SubjectsDataset([vx.Subject(t1=image)], tio.RescaleIntensity((0, 1))), tmp_path / "cache")
    assert (
        kept[0]["applied_transforms"]
        == vx.SubjectsDataset([vx.Subject(t1=image)], tio.RescaleIntensity((0, 1)))[0]["applied_transforms"]
    )


@pytest.mark.parametrize("value", [np.zeros(1, np.longdouble), torch.eye(2).to_sparse(), torch.zeros(2, device="meta"), "itself"])
def test_metadata_that_cannot_be_kept_are_named(tmp_path, value):
    if isinstance(value, str):
        value = []
        value.append(value)

    def add(subject):
        subject["more"] = value
        return subject

    cache = vx.SubjectsCache(vx.SubjectsDataset([vx.Subject(t1=scan())], add, load_getitem=False), tmp_path / "cache", name="a")
    with pytest.raises(SubjectError, match="'more' of subject 0 is or holds"):
        cache[0]


def test_what_is_left_of_an_entry_is_made_anew(tmp_path):
    cache = vx.SubjectsCache(vx.SubjectsDataset([vx.Subject(t1=scan(3))]), tmp_path / "cache")
    assert values(cache) == [3]
    (entry,) = (path for path in (tmp_path / "cache").iterdir() if not path.name.startswith("."))
    (entry / "subject.json").unlink()
    assert values(cache) == [3]
    told = json.loads((entry / "subject.json").read_text())
    (entry / "subject.json").write_text(json.dumps({**told, "images": {"t1": {}}}))
    with pytest.raises(CorruptImageError, match=r"subject\.json is damaged: remove"):
        cache[0]


def test_pruning_that_is_interrupted_leaves_no_half_entry(tmp_path, monkeypatch):
    dataset = vx.SubjectsDataset([vx.Subject(t1=scan(3))])
    cache = vx.SubjectsCache(dataset, tmp_path / "cache")
    cache.build()
    other = vx.SubjectsCache(vx.SubjectsDataset([vx.Subject(t1=scan(4))]), tmp_path / "cache")
    remove, seen = shutil.rmtree, []

    def removed(path, **options):
        seen.append((path / "subject.json").exists() and not path.name.startswith("."))
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", removed)
    assert other.prune() == 1
    assert seen == [False]  # no longer under its name when its files are removed
    assert values(cache) == [3]
