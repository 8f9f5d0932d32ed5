"""Factorised layers against numpy and against what the theorem says."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_guard.functional.lowrank import check_rank, factorized, rank_of, saves, singular_values

LAYERS = {
    "linear": (lambda: nn.Linear(12, 7), (4, 12)),
    "wide": (lambda: nn.Linear(5, 20, bias=False), (4, 5)),
    "conv1d": (lambda: nn.Conv1d(3, 8, 3, stride=2, padding=1), (2, 3, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 8, 3, padding=1, dilation=2, padding_mode="reflect"), (2, 3, 9, 9)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2), (2, 2, 3, 3, 3)),
}


def matrix(layer):
    return layer.weight.detach().flatten(1).double().numpy()


def product(pair):
    return (pair[1].weight.flatten(1).double() @ pair[0].weight.flatten(1).double()).detach().numpy()


@pytest.mark.parametrize("name", LAYERS)
def test_full_rank_is_the_dense_layer(name):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer, x = make(), torch.randn(shape)
    pair = factorized(layer, min(matrix(layer).shape))
    torch.testing.assert_close(pair(x), layer(x), rtol=1e-4, atol=1e-5)
    assert pair[1].bias is layer.bias


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_error_is_what_the_discarded_singular_values_say(name, rank):
    torch.manual_seed(1)
    layer = LAYERS[name][0]()
    sigma = np.linalg.svd(matrix(layer), compute_uv=False)
    np.testing.assert_allclose(singular_values(layer).numpy(), sigma, rtol=1e-6)
    error = np.linalg.norm(matrix(layer) - product(factorized(layer, rank)))
    assert error == pytest.approx(np.sqrt((sigma[rank:] ** 2).sum()), rel=1e-4)


def test_no_other_factors_of_that_rank_are_closer():
    torch.manual_seed(2)
    layer = nn.Linear(8, 6)
    best = np.linalg.norm(matrix(layer) - product(factorized(layer, 2)))
    rng = np.random.default_rng(0)
    for _ in range(20):  # alternating least squares from random beginnings finds the best there is
        left = rng.normal(size=(6, 2))
        for _ in range(50):
            right = np.linalg.lstsq(left, matrix(layer), rcond=None)[0]
            left = np.linalg.lstsq(right.T, matrix(layer).T, rcond=None)[0].T
        assert np.linalg.norm(matrix(layer) - left @ right) >= best - 1e-5


def test_both_factors_are_of_one_size():
    pair = factorized(nn.Linear(8, 6), 3)
    sizes = [np.linalg.norm(thin.weight.detach().numpy()) for thin in pair]
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-5)


def test_type_mode_and_gradients_are_kept():
    layer = nn.Linear(8, 6).to(torch.bfloat16).eval()
    layer.weight.requires_grad_(False)
    pair = factorized(layer, 2)
    assert not pair.training
    assert not pair[0].training
    assert pair[0].weight.dtype == torch.bfloat16
    assert not pair[0].weight.requires_grad
    assert pair[1].bias.requires_grad
    layer, state = nn.Linear(8, 6), torch.get_rng_state()
    factorized(layer, 2)
    assert torch.equal(torch.get_rng_state(), state)


def test_ranks():
    layer = nn.Linear(8, 6)
    sigma = singular_values(layer)
    assert rank_of(layer, 4) == 4
    assert rank_of(layer, 99) == 6
    assert rank_of(layer, 0.5) == 3
    assert rank_of(layer, 0.51) == 4
    for energy in (0.3, 0.6, 0.9, 0.999, 1.0):
        rank = rank_of(layer, energy=energy)
        assert sigma[:rank].square().sum() >= energy * sigma.square().sum() * (1 - 1e-9)
        assert rank == 1 or sigma[: rank - 1].square().sum() < energy * sigma.square().sum()
    nn.init.zeros_(layer.weight)
    assert rank_of(layer, energy=0.9) == 1


def test_when_it_saves():
    for out, inn in ((6, 8), (10, 64), (1, 5)):
        layer = nn.Linear(inn, out, bias=False)
        for rank in range(1, min(out, inn) + 1):
            pair = factorized(layer, rank)
            assert saves(layer, rank) == (sum(p.numel() for p in pair.parameters()) < layer.weight.numel())


@pytest.mark.parametrize(
    ("rank", "energy"), [(None, None), (2, 0.5), (0, None), (1.5, None), (None, 0.0), (None, 1.5), (-1, None)]
)
def test_no_rank_is_refused(rank, energy):
    with pytest.raises(ValueError, match="give"):
        check_rank(rank, energy)


def test_other_layers_are_refused():
    with pytest.raises(ValueError, match="BatchNorm1d"):
        rank_of(nn.BatchNorm1d(3), 2)
    with pytest.raises(ValueError, match="groups"):
        factorized(nn.Conv2d(4, 4, 3, groups=2), 1)
    with pytest.raises(ValueError, match="rank=7"):
        factorized(nn.Linear(8, 6), 7)
