"""By what models and options are known: what differs is told apart, and what is the same is known again."""

import copy
import functools
import importlib
import itertools
import sys
import threading
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import voxloom as vx
from reductions import Scaling, scaling
from voxloom.io.fingerprints import differences, fingerprint_of_model, fingerprint_of_option


class Scaled(nn.Module):
    """Keeps a number, and a tensor that is a buffer but in no checkpoint."""

    def __init__(self, factor, shift):
        super().__init__()
        self.layer = nn.Conv3d(1, 1, 1, bias=False)
        nn.init.ones_(self.layer.weight)
        self.factor = float(factor)
        self.register_buffer("shift", torch.tensor(float(shift)), persistent=False)
        self.last_mean = None

    def forward(self, batch):
        self.last_mean = float(batch.mean())
        return self.layer(batch) * self.factor + self.shift


class Plain(Scaled):
    def forward(self, batch):
        return self.layer(batch) * self.factor + self.shift


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of TorchScript as such
@pytest.mark.parametrize(
    "make",
    [
        lambda model: model,
        lambda model: torch.jit.script(model),
        lambda model: torch.jit.trace(model, torch.zeros(1, 1, 4, 4, 4)),
        lambda model: torch.export.export(model, (torch.zeros(1, 1, 4, 4, 4),)).module(),
    ],
    ids=["eager", "scripted", "traced", "exported"],
)
def test_models_are_known_by_their_numbers(make):
    first, again, *others = (
        fingerprint_of_model(make(nn.Sequential(Plain(*numbers), Plain(4, 4)).eval()))
        for numbers in ((0.1, 2), (0.1, 2), (0.7, 2), (0.1, 5))
    )
    assert first == again
    assert all(other != first for other in others)


def test_what_a_forward_pass_leaves_on_a_module_does_not_matter():
    model = Scaled(0.5, 1)
    before = fingerprint_of_model(model)
    model(torch.ones(1, 1, 4, 4, 4))
    assert model.last_mean == 1
    assert fingerprint_of_model(model) == before


def test_weights_and_settings_tell_models_apart():
    pairs = [
        (nn.Conv3d(1, 1, 3, padding=1), nn.Conv3d(1, 1, 3)),
        (nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 4)),
        (nn.AvgPool3d(2, divisor_override=3), nn.AvgPool3d(2, divisor_override=5)),
        (nn.Sequential(nn.ReLU()), nn.Sequential(nn.Sigmoid())),
    ]
    for one, other in pairs:
        other.load_state_dict(one.state_dict())
        assert fingerprint_of_model(one) == fingerprint_of_model(copy.deepcopy(one))
        assert fingerprint_of_model(one) != fingerprint_of_model(other)
    changed = copy.deepcopy(pairs[0][0])
    with torch.no_grad():
        changed.bias += 1
    assert fingerprint_of_model(changed) != fingerprint_of_model(pairs[0][0])


def test_models_are_known_by_the_file_of_their_class(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    found = []
    for number, factor in enumerate((1, 1, 2)):
        name = f"own_network_{number}"
        source = "from torch import nn\nclass Own(nn.Module):\n    def forward(self, batch):\n        return batch * "
        (tmp_path / f"{name}.py").write_text(f"{source}{factor}\n")
        found.append(fingerprint_of_model(importlib.import_module(name).Own())["sha256"])
    assert found[0] == found[1] != found[2]


def test_a_name_stands_for_everything_and_a_function_without_one_for_nothing():
    assert fingerprint_of_model(Scaled(1, 2), "it") == fingerprint_of_model(len, "it") == {"name": "it"}
    assert fingerprint_of_model(lambda batch: batch) is None


@pytest.mark.parametrize(
    ("make", "one", "other"),
    [
        (lambda value: value, 1, 2),
        (lambda value: value, "a", "b"),
        (lambda value: value, float("nan"), float("inf")),
        (lambda value: {"x": value}, 1, 2),
        (lambda value: [value], 1, 2),
        (lambda value: torch.tensor(value), [1.0], [2.0]),
        (lambda value: np.array(value), [1.0], [2.0]),
        (scaling, 1, 2),
        (Scaling, 1, 2),
        (Scaling, torch.ones(1), torch.zeros(1)),
        (lambda value: Scaling(value).__call__, 1, 2),
        (lambda value: functools.partial(torch.mul, other=value), 1, 2),
        (lambda value: nn.Threshold(value, 0), 1, 2),
        (lambda value: vx.Regions((value,)), 1, 2),
    ],
)
def test_options_are_known_by_what_they_use(make, one, other):
    assert fingerprint_of_option(make(one)) == fingerprint_of_option(make(one))
    assert fingerprint_of_option(make(one)) != fingerprint_of_option(make(other))


def test_functions_are_known_by_their_source():
    first, second = (lambda block: block + 1), (lambda block: block + 2)
    assert fingerprint_of_option(first) == fingerprint_of_option(first)
    assert fingerprint_of_option(torch.relu) != fingerprint_of_option(torch.sigmoid)
    one, other = scaling, Scaling.__call__
    assert fingerprint_of_option(one) != fingerprint_of_option(other)
    made = {}
    for name, text in (("a", "block * 1"), ("b", "block * 2")):  # of which there is no source
        exec(f"def reduce(block):\n    return {text}", made)
        made[name] = fingerprint_of_option(made["reduce"])
    assert made["a"] != made["b"]
    for one, other in (("[v * 2 for v in block]", "[v * 3 for v in block]"), ("(lambda v: v > 0)", "(lambda v: v < 0)")):
        for name, text in (("a", one), ("b", other), ("c", f"\\\n    {one}")):
            exec(f"def reduce(block):\n    return {text}", made)
            made[name] = fingerprint_of_option(made["reduce"])
        assert made["a"] != made["b"]
        assert made["a"] == made["c"]  # wherever it stands
    assert fingerprint_of_option(functools.wraps(len)(lambda block: block))
    assert second is not first


def test_what_holds_itself_can_be_written_down():
    def function(batch):
        return function(batch)

    network = nn.Linear(1, 1)
    network.method = network.forward
    for value in (function, network, [function, network]):
        assert fingerprint_of_option(value) == fingerprint_of_option(value)


def test_types_of_numbers_count():
    assert fingerprint_of_option(torch.tensor([1.0])) != fingerprint_of_option(torch.tensor([1065353216], dtype=torch.int32))
    assert fingerprint_of_option(np.ones(1, np.float32)) != fingerprint_of_option(np.ones(1, np.float32).view(np.int32))


def test_differences_name_what_differs():
    recorded = {"a": 1, "b": {"c": 2, "d": 3}, "gone": 5}
    assert differences(recorded, recorded) == []
    assert differences(recorded, {"a": 1, "b": {"c": 4, "d": 3}, "new": 6}) == [
        "b.c was 2 and is 4",
        "gone was 5 and is nothing",
        "new was nothing and is 6",
    ]


def test_weights_are_hashed_once_as_long_as_they_are_the_same(tmp_path, monkeypatch):
    data = torch.rand(1, 8, 8, 8)
    vx.ScalarImage(data).save(tmp_path / "scan.nii")
    model, hashed = nn.Conv3d(1, 1, 1), []
    count = nn.Module.state_dict
    monkeypatch.setattr(nn.Conv3d, "state_dict", lambda self, *args, **more: (hashed.append(1), count(self, *args, **more))[1])
    predictor = vx.Predictor(model, 8, 0)
    for number in range(3):
        predictor(tmp_path / "scan.nii", output=tmp_path / f"{number}.nii")
    assert len(hashed) == 1
    assert predictor.is_made(tmp_path / "scan.nii", output=tmp_path / "2.nii")
    with torch.no_grad():
        model.bias += 1
    with pytest.raises(vx.errors.TargetExistsError, match="models"):
        predictor.is_made(tmp_path / "scan.nii", output=tmp_path / "2.nii")


def test_sizes_that_a_constructor_took_count():
    class Sized(nn.Module):
        def __init__(self, sizes):
            super().__init__()
            self.sizes = sizes

    assert fingerprint_of_model(Sized((1, 2))) == fingerprint_of_model(Sized((1, 2)))
    assert fingerprint_of_model(Sized((1, 2))) != fingerprint_of_model(Sized((1, 3)))


class Known:
    """Knows others."""

    def __init__(self, value=None):
        self.value, self.others = value, []


class Slots:
    __slots__ = ("lock", "value")

    def __init__(self, value):
        self.value, self.lock = value, threading.Lock()


class Pair(NamedTuple):
    value: float

    def __call__(self, block):
        return block * self.value


class Triple(NamedTuple):
    value: float


class Atlas(nn.Module):
    """Holds a tensor that is no buffer."""

    def __init__(self, value):
        super().__init__()
        self.weights = torch.tensor(value)


def with_a_module(value):
    import math as used

    return lambda block: used.sqrt(block) + value


def wrapped(function, value):
    if value == 1:

        @functools.wraps(function)
        def once(block):
            return function(block)

        return once

    @functools.wraps(function)
    def twice(block):
        return function(function(block))

    return twice


@pytest.mark.parametrize(
    ("make", "one", "other"),
    [
        (lambda value: {8, 0, value}, 1, 2),
        (lambda value: [frozenset((0, 8, value))], 1, 2),
        (lambda value: {value: 1}, 1, "1"),
        (lambda value: value, float("nan"), "nan"),
        (lambda value: Scaling([lambda block: block + value]), 1, 2),
        (lambda value: Scaling(Atlas(value)), 1.0, 2.0),
        (lambda value: Scaling(np.array([value], ">f4")), 1, 2),
        (lambda value: Scaling(np.array([value], np.longdouble)), 1, 2),
        (lambda value: Scaling(np.array([value], object)), 1, 2),
        (lambda value: Scaling(torch.tensor([[0, value]]).to_sparse()), 1, 2),
        (Slots, 1, 2),
        (lambda value: [Slots(value)], 1, 2),
        (with_a_module, 1, 2),
        (lambda value: Scaling(functools.lru_cache(wrapped(scaling, value))), 1, 2),
        (lambda value: wrapped(scaling, value), 1, 2),
        (lambda value: value(1.0), Pair, Triple),
        (lambda value: value, Pair, Triple),
        (lambda value: {scaling: value}, 1, 2),
    ],
)
def test_parts_are_known_wherever_they_are(make, one, other):
    assert fingerprint_of_option(make(one)) == fingerprint_of_option(make(one))
    assert fingerprint_of_option(make(one)) != fingerprint_of_option(make(other))


def test_sets_are_known_in_whatever_order_they_are():
    first, second = (set(range(*given)) for given in ((0, 24, 8), (16, -1, -8)))
    assert list(first) != list(second)
    for make in (lambda each: each, lambda each: Scaling(each), lambda each: [{"names": each}]):
        assert fingerprint_of_option(make(first)) == fingerprint_of_option(make(second))


def test_what_is_shared_by_many_is_looked_at_once():
    shared = Scaling([lambda block: block])
    for _ in range(40):
        shared = Scaling([shared, shared, lambda block: block])
    group = [Known(number) for number in range(12)]
    for each in group:
        each.others = group
        each.function = lambda block, each=each: each
    nodes = [Known(number) for number in range(3000)]
    for one, other in itertools.pairwise(nodes):
        one.next, other.last = other, one
    for value in (shared, group, nodes[0]):
        assert fingerprint_of_option(value) == fingerprint_of_option(value)
