"""Noise is normal, independent of all other noise, and unpredictable unless a test asks for it."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from lightning_guard.functional.privacy import Bookkeeper, Noise, NoisySum

MANY = 1 << 20
RARE = 1e-7  # chance of a false alarm for each check
LIMIT = float(stats.norm.isf(RARE / 2))
KINDS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def drawn(*shape: int, dtype: torch.dtype = torch.float32, std: float = 1.0, noise: Noise | None = None) -> Tensor:
    return (noise or Noise()).fill_(torch.empty(shape, dtype=dtype), std).double() / std


def normal_mean(x: Tensor, variance: float) -> None:
    """That the mean of independent numbers of this variance is zero, as far as it can be told."""
    assert abs(float(x.mean())) <= LIMIT * math.sqrt(variance / x.numel())


@KINDS
@pytest.mark.parametrize("std", [1e-3, 1.0, 40.0])
def test_moments(dtype, std):
    z = drawn(MANY, dtype=dtype, std=std)
    normal_mean(z, 1)
    normal_mean(z.square() - 1, 2)
    normal_mean(z**3, 15)
    normal_mean(z**4 - 3, 96)


@KINDS
def test_distribution(dtype):
    assert stats.kstest(drawn(MANY, dtype=dtype).numpy(), "norm").pvalue > RARE
    z = drawn(MANY, dtype=dtype)
    for threshold in (3.0, 4.0):
        beyond, wanted = int((z.abs() > threshold).sum()), 2 * stats.norm.sf(threshold) * MANY
        assert stats.poisson.cdf(beyond, wanted) > RARE
        assert stats.poisson.sf(beyond - 1, wanted) > RARE


@KINDS
@pytest.mark.parametrize("lag", [1, 2, 32768, 65536, MANY // 2])
def test_entries_are_independent(dtype, lag):
    z = drawn(MANY, dtype=dtype)
    normal_mean(z[lag:] * z[:-lag], 1)
    normal_mean((z.square() - 1)[lag:] * (z.square() - 1)[:-lag], 4)


@KINDS
def test_steps_and_objects_are_independent(dtype):
    noise = Noise()
    several = [drawn(MANY // 4, dtype=dtype, noise=one) for one in (noise, noise, Noise(), Noise())]
    for i, a in enumerate(several):
        for b in several[:i]:
            normal_mean(a * b, 1)
            assert int((a == b).sum()) < 5


@KINDS
@pytest.mark.parametrize("size", [0, 1, 2, 3, 65535, 65536, 65537])
def test_sizes(dtype, size):
    z = drawn(size, dtype=dtype)
    assert z.unique().numel() >= size * 0.99
    assert bool((z != 0).all())


def test_the_shape_and_memory_stay():
    out = torch.empty(3, 5, 7)
    assert Noise().fill_(out, 2.0) is out
    assert not Noise().fill_(out, 0.0).any()


@KINDS
@pytest.mark.parametrize("first", [-1, 0, "least", "most"])
@pytest.mark.parametrize("second", [-1, 0, "least", "most"])
def test_extreme_bits_are_finite(dtype, first, second):
    whole = np.int32 if dtype is torch.float32 else np.int64
    named = {"least": np.iinfo(whole).min, "most": np.iinfo(whole).max}
    noise = Noise()
    bits = np.array([named.get(first, first), named.get(second, second)], whole)
    noise._bits = lambda count: np.tile(bits.repeat(count // bits.nbytes), 1).tobytes()[:count]
    z = noise.fill_(torch.empty(64, dtype=dtype), 1.0)
    assert bool(z.isfinite().all())
    assert float(z.abs().max()) <= (6.7 if dtype is torch.float32 else 9.5)


@KINDS
def test_a_seed_makes_it_reproducible(dtype):
    def steps(seed: int | None, *which: int) -> list[Tensor]:
        noise, made = Noise(seed), []
        for step in which:
            noise.at(step)
            made += [drawn(1000, dtype=dtype, noise=noise), drawn(5, dtype=dtype, noise=noise)]
        return made

    assert all(map(torch.equal, steps(3, 0, 1, 2), steps(3, 0, 1, 2)))
    assert all(map(torch.equal, steps(3, 2), steps(3, 0, 1, 2)[4:]))
    different = [*steps(3, 0, 1), *steps(4, 0), *steps(None, 0, 0)]
    assert len({float(z[0]) for z in different}) == len(different)


def test_global_seeds_change_nothing_and_are_not_used():
    torch.manual_seed(0)
    np.random.seed(0)
    first, after = drawn(4), torch.rand(3)
    torch.manual_seed(0)
    np.random.seed(0)
    assert not torch.equal(first, drawn(4))
    assert torch.equal(after, torch.manual_seed(0) and torch.rand(3))


def test_a_number():
    noise = Noise()
    z = torch.tensor([noise.number(3.0) for _ in range(5000)], dtype=torch.float64) / 3
    normal_mean(z, 1)
    normal_mean(z.square() - 1, 2)


# The noisy sum --------------------------------------------------------------------------------------------------------


def released(total: NoisySum, std: float) -> list[Tensor]:
    for p in total.parameters:
        p.grad = None
    total.begin(std)
    total.end()
    return [p.grad.detach().clone() for p in total.parameters]


def test_each_gradient_has_its_own_noise_of_the_same_size():
    parameters = [nn.Parameter(torch.zeros(n)) for n in (300_001, 300_001, 300_001)]
    parameters.append(nn.Parameter(torch.zeros(300_001, dtype=torch.float64)))
    total = NoisySum(parameters, Noise())
    several = [g.double() / 2.5 for _ in range(2) for g in released(total, 2.5)]
    for i, a in enumerate(several):
        normal_mean(a, 1)
        normal_mean(a.square() - 1, 2)
        for b in several[:i]:
            normal_mean(a * b, 1)


def test_the_sum_is_there_under_the_noise():
    layer = nn.Linear(3, 2)
    book = Bookkeeper(layer.named_parameters())
    sums = []
    for std in (0.0, 1e-3):
        total = NoisySum(layer.parameters(), Noise())
        with book.step(units=4):
            layer(torch.arange(12.0).view(4, 3)).square().sum().backward()
        total.begin(std)
        total.add(book, torch.ones(1, 4), {})
        layer.zero_grad()
        total.end()
        sums.append(layer.weight.grad)
    layer.zero_grad()
    layer(torch.arange(12.0).view(4, 3)).square().sum().backward()
    torch.testing.assert_close(sums[0], layer.weight.grad)
    torch.testing.assert_close(sums[1], layer.weight.grad, rtol=0, atol=1e-2)
    assert not torch.equal(sums[0], sums[1])


def test_gradients_in_use_are_kept_and_added_to():
    p = nn.Parameter(torch.zeros(5))
    total = NoisySum([p], Noise())
    total.begin(1.0)
    total.end()
    first = p.grad.clone()
    total.begin(1.0)
    assert torch.equal(p.grad, first)
    total.end()
    assert not torch.equal(p.grad, first)
    p.grad = None
    total.begin(1.0)
    total.end(reached=())
    assert p.grad is None
