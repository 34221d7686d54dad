"""By what models and options are known: what differs is told apart, and what is the same is known again."""

import copy

import numpy as np
import torch
from torch import nn

from voxloom.inference.identity import identity_of_model, identity_of_option


def test_what_pytorchs_layers_keep_tells_them_apart():
    pairs = [
        (nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 4)),
        (nn.AvgPool3d(2, divisor_override=3), nn.AvgPool3d(2, divisor_override=5)),
        (nn.TransformerEncoderLayer(8, 2, activation="relu"), nn.TransformerEncoderLayer(8, 2, activation="gelu")),
    ]
    for one, other in pairs:
        other.load_state_dict(one.state_dict())
        assert identity_of_model(one, None) == identity_of_model(copy.deepcopy(one), None)
        assert identity_of_model(one, None) != identity_of_model(other, None)


def test_functions_that_modules_keep_tell_them_apart():
    def made(function):
        network = nn.Linear(1, 1)
        nn.init.ones_(network.weight), nn.init.ones_(network.bias)
        network.act = function
        return identity_of_model(network, None)

    assert made(torch.relu) == made(torch.relu)
    assert made(torch.relu) != made(torch.sigmoid)


def test_what_holds_itself_can_be_identified():
    def function(batch):
        return function(batch)

    network = nn.Linear(1, 1)
    network.method = network.forward
    network.closure = lambda batch: network(batch)
    for value in (function, network, [function, network]):
        assert identity_of_option(value) == identity_of_option(value)


def test_types_of_numbers_count():
    assert identity_of_option(torch.tensor([1.0])) != identity_of_option(torch.tensor([1065353216], dtype=torch.int32))
    assert identity_of_option(np.ones(1, np.float32)) != identity_of_option(np.ones(1, np.float32).view(np.int32))
