"""Randomised smoothing against scipy, counting and the one classifier whose certificate is known exactly."""

import math

import pytest
import torch
from scipy import stats

from lightning_guard.functional import GaussianNoise, certified_radius, clopper_pearson_lower


@pytest.mark.parametrize("trials", [1, 2, 10, 100, 1000, 100_000])
@pytest.mark.parametrize("alpha", [0.5, 0.05, 0.001, 1e-6])
def test_the_bound_is_that_of_scipy(trials, alpha):
    counts = sorted({round(share * trials) for share in (0, 0.01, 0.3, 0.5, 0.9, 0.99, 0.999, 1)})
    wanted = [stats.beta.ppf(alpha, k, trials - k + 1) if k else 0.0 for k in counts]
    found = clopper_pearson_lower(torch.tensor(counts), trials, alpha)
    assert found.tolist() == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    assert (found < 1).all()
    assert (found.diff() > 0).all()


def test_the_bound_is_above_the_truth_as_seldom_as_it_says():
    trials, alpha, draws = 40, 0.05, 40_000
    for p in (0.5, 0.8, 0.97):
        counts = torch.tensor(stats.binom(trials, p).rvs(draws, random_state=0))
        wrong = (clopper_pearson_lower(counts, trials, alpha) > p).double().mean().item()
        exact = sum(
            stats.binom(trials, p).pmf(k)
            for k in range(trials + 1)
            if clopper_pearson_lower(torch.tensor([k]), trials, alpha) > p
        )
        assert exact <= alpha
        assert wrong == pytest.approx(exact, abs=5 * math.sqrt(alpha / draws))
    # The plain share instead of the bound is above the truth about half of the time: the test would see it.
    assert (counts / trials > 0.97).double().mean() > 0.2


def test_the_shape_of_the_counts_is_kept():
    counts = torch.tensor([7, 3, 7, 0])
    one_by_one = [clopper_pearson_lower(count[None], 10, 0.01).item() for count in counts]
    assert clopper_pearson_lower(counts, 10, 0.01).tolist() == one_by_one


@pytest.mark.parametrize(("alpha", "counts", "trials"), [(0.0, [1], 2), (1.0, [1], 2), (0.1, [3], 2), (0.1, [-1], 2)])
def test_counts_and_probabilities_that_are_none(alpha, counts, trials):
    with pytest.raises(ValueError, match="alpha=" if alpha in (0, 1) else "successes="):
        clopper_pearson_lower(torch.tensor(counts), trials, alpha)


def test_the_radius_of_a_linear_classifier_is_its_distance():
    """Under noise a half-space has the probability of a normal tail, so theorem 1 is tight there."""
    w, b, sigma = torch.tensor([3.0, -4.0], dtype=torch.float64), 0.7, 0.4
    x = torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    distance = (x @ w + b).abs() / w.norm()
    probability = torch.tensor(stats.norm.cdf(distance / sigma))
    torch.testing.assert_close(certified_radius(probability, sigma), distance)


def test_nothing_is_certified_below_a_half():
    assert certified_radius(torch.tensor([0.0, 0.2, 0.5]), 1.0).tolist() == [0, 0, 0]


@pytest.mark.parametrize("shape", [(4000, 3), (500, 3, 4, 4), (2000, 3, 5)])
def test_noise_is_normal_in_the_users_units(shape):
    std = [0.5, 1.0, 4.0]
    x = torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    moved = GaussianNoise(0.3, std).add(x, torch.Generator().manual_seed(0))
    for channel, scale in enumerate(std):
        drawn = ((moved - x)[:, channel] * scale / 0.3).flatten()
        assert stats.kstest(drawn.numpy(), "norm").pvalue > 0.01
    assert not torch.equal(moved, GaussianNoise(0.3, std).add(x, torch.Generator().manual_seed(1)))
    assert (moved - x).unique().numel() == x.numel()  # each feature of each example has its own


def test_noise_that_is_none():
    for sigma in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="sigma="):
            GaussianNoise(sigma)
    with pytest.raises(ValueError, match="std="):
        GaussianNoise(1.0, std=[1.0, 0.0])
    with pytest.raises(ValueError, match="one a channel"):
        GaussianNoise(1.0, std=[1.0, 2.0]).add(torch.zeros(2, 3))
