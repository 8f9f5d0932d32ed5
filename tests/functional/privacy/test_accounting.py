"""Privacy spent, against other accountants."""

import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting import gaussian_mechanism
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant
from opacus.accountants.analysis.rdp import compute_rdp

from lightning_guard.functional.privacy import accounting
from lightning_guard.functional.privacy.accounting import (
    Segment,
    affordable_steps,
    epsilon,
    gaussian_epsilon,
    noise_multiplier,
)


def pld_epsilon(ledger: list[Segment], delta: float, interval: float = 1e-4) -> float:
    """Google's accountant: another method, another team, both neighbours."""
    accountant = PLDAccountant(value_discretization_interval=interval)
    for noise, rate, steps in ledger:
        release = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
        accountant.compose(release, steps)
    return accountant.get_epsilon(delta)


@pytest.mark.parametrize(
    ("ledger", "delta"),
    [
        ([(1.1, 256 / 60000, 3510)], 1e-5),
        ([(1.0, 0.01, 1000)], 1e-5),
        ([(4.0, 0.1, 300)], 1e-5),
        ([(20.0, 0.05, 200)], 1e-5),
        ([(50.0, 0.01, 1000)], 1e-6),
        ([(2.0, 0.5, 20)], 1e-5),
        ([(1.5, 0.9, 5)], 1e-5),
        ([(1.0, 0.01, 1)], 1e-5),
        ([(1.0, 1e-4, 100_000)], 1e-8),
        ([(1.0, 0.01, 300), (1.5, 0.01, 300)], 1e-6),
        ([(2.0, 0.02, 100), (1.0, 0.005, 500)], 1e-7),
    ],
)
def test_close_above_the_pld_accountant(ledger, delta):
    ledger = [Segment(*segment) for segment in ledger]
    oracle = pld_epsilon(ledger, delta, interval=1e-3 if ledger[0].sample_rate > 0.1 else 1e-4)
    assert 0.99 * oracle < epsilon(ledger, delta) < 1.03 * oracle


@pytest.mark.parametrize(("noise", "rate", "steps"), [(0.5, 0.004, 234), (0.35, 0.01, 50)])
def test_little_noise(noise, rate, steps):
    """Where Opacus' accountant once failed (opacus#601, #604)."""
    oracle = pld_epsilon([Segment(noise, rate, steps)], 1e-5, interval=1e-3)
    assert 0.99 * oracle < epsilon([Segment(noise, rate, steps)], 1e-5) < 1.03 * oracle


@pytest.mark.parametrize("delta", [1e-10, 1e-12])
def test_tiny_delta(delta):
    oracle = pld_epsilon([Segment(1.0, 0.01, 100)], delta)
    assert 0.99 * oracle < epsilon([Segment(1.0, 0.01, 100)], delta) < 1.03 * oracle
    # Too many steps for float64 at so small a delta: the looser bound.
    many = Segment(1.0, 0.001, 100_000)
    assert epsilon([many], 1e-12) == accounting._renyi_epsilon([many], 1e-12)


def test_the_same_as_opacus_for_the_same_error():
    ledger = [Segment(1.3, 0.01, 400), Segment(0.9, 0.01, 100)]
    opacus = PRVAccountant()
    opacus.history = [tuple(segment) for segment in ledger]
    for error in (0.01, 0.05):
        bounds = opacus._get_dprv(error, 1e-8).compute_epsilon(1e-5, 1e-8, error)
        ours = accounting._convolved_epsilon(ledger, 1e-5, error)
        assert bounds[0] < ours <= bounds[2] + 1e-5  # the grid is finer, so that its size is a power of two


def test_removal_is_what_opacus_looks_at_and_adding_is_looked_at_too():
    cells = 0.001, 2**14
    masses, means = accounting._losses(0.8, 0.1, *cells)
    losses = 0.001 * np.arange(-(2**14), 2**14)
    assert np.allclose(masses.sum(1), 1)
    assert np.allclose(masses @ losses, means, atol=1e-6)
    # By definition the loss is the logarithm of the ratio of the two chances.
    seen = (masses > 1e-9).all(0)
    assert np.allclose(np.log(masses[0, seen] / masses[1, seen]), losses[seen], atol=1e-3)


def test_renyi_bounds_are_those_of_opacus():
    for noise, rate in [(0.7, 0.02), (1.5, 0.3), (6.0, 1e-4)]:
        ours = accounting._renyi(noise, rate)
        whole = slice(len(accounting._SMALL), None)
        orders = accounting._ORDERS
        theirs = [compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=float(a)) for a in orders[whole]]
        assert np.allclose(ours[whole], theirs, rtol=1e-6, atol=1e-13)
        for i in range(8, len(accounting._SMALL), 10):  # a bound there, not the value
            assert ours[i] >= compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=float(orders[i])) * (1 - 1e-6)


@settings(max_examples=10, deadline=None)
@given(st.floats(0.3, 20), st.floats(1e-4, 0.99), st.integers(1, 300), st.floats(1e-9, 1e-3))
def test_more_steps_less_noise_and_larger_draws_cost_more(noise, rate, steps, delta):
    spent = epsilon([Segment(noise, rate, steps)], delta)
    assert 0 <= spent <= gaussian_epsilon([noise / math.sqrt(steps)], delta) * 1.02 + 0.002
    slack = 0.98 * spent - 0.002  # the numerical error may differ
    assert epsilon([Segment(noise, rate, 2 * steps)], delta) >= slack
    assert epsilon([Segment(noise / 1.5, rate, steps)], delta) >= slack
    assert epsilon([Segment(noise, min(1.5 * rate, 1.0), steps)], delta) >= slack
    assert epsilon([Segment(noise, rate, steps)], delta / 10) >= slack


def test_how_a_ledger_is_cut_does_not_matter():
    whole = epsilon([Segment(1.0, 0.01, 500), Segment(2.0, 0.01, 100)], 1e-5)
    parts = [Segment(1.0, 0.01, 300), Segment(2.0, 0.01, 100), Segment(1.0, 0.01, 200), Segment(0.0, 0.5, 0)]
    assert epsilon(parts, 1e-5) == whole


def test_a_long_schedule_costs_hardly_more_than_its_parts():
    fine = [Segment(2.0 - i / 199, 0.01, 5) for i in range(200)]
    coarse = [Segment(2.0 - i / 49 - 0.01, 0.01, 20) for i in range(50)]
    assert epsilon(fine, 1e-5) == pytest.approx(epsilon(coarse, 1e-5), rel=0.03)


def test_edges():
    assert epsilon([], 1e-5) == epsilon([Segment(1.0, 0.1, 0)], 1e-5) == 0
    assert epsilon([Segment(0.0, 0.1, 1)], 1e-5) == epsilon([Segment(0.0, 1.0, 1)], 1e-5) == math.inf
    assert epsilon([Segment(1e-9, 0.1, 1), Segment(1.0, 0.1, 1)], 1e-5) == math.inf
    assert 1e4 < epsilon([Segment(0.01, 0.5, 10)], 1e-5) < math.inf
    assert epsilon([Segment(1e5, 0.01, 10)], 1e-5) < 0.01
    assert epsilon([Segment(1e5, 0.01, 10)], 0.1) == epsilon([Segment(1.0, 0.01, 1)], 0.5) == 0
    for segment in (Segment(-1.0, 0.1, 1), Segment(1.0, 0.0, 1), Segment(1.0, 1.5, 1), Segment(math.nan, 0.1, 1)):
        with pytest.raises(ValueError, match="is no release; give"):
            epsilon([segment], 1e-5)
    for delta in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="delta="):
            epsilon([Segment(1.0, 0.1, 1)], delta)


def test_published_values():
    """Of MNIST with batches of 256, by Rényi accountants with an older conversion, which is looser."""
    # tensorflow/privacy, tutorials/README.md; and Bu et al., Deep Learning with Gaussian DP, 2020, figure 4.
    for noise, epochs, published in [
        (1.12, 60, 2.92),
        (0.6, 30, 9.74),
        (1.3, 20, 1.34),
        (0.7, 70, 8.68),
    ]:
        spent = epsilon([Segment(noise, 256 / 60000, round(epochs * 60000 / 256))], 1e-5)
        assert 0.75 * published < spent < published


# Without subsampling -------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.floats(0.1, 50), st.floats(1e-12, 0.1))
def test_gaussian_epsilon_is_that_of_dp_accounting(noise, delta):
    ours = gaussian_epsilon([noise], delta)
    assert ours == pytest.approx(gaussian_mechanism.get_epsilon_gaussian(noise, delta), rel=1e-6, abs=1e-6)


def test_sample_rate_one_is_exact():
    theirs = gaussian_mechanism.get_epsilon_gaussian(2.0 / math.sqrt(10), 1e-6)
    assert epsilon([Segment(2.0, 1.0, 10)], 1e-6) == pytest.approx(theirs, rel=1e-6)
    # The convolution, which is not asked there, agrees.
    assert theirs < accounting._convolved_epsilon([(2.0, 1.0, 10)], 1e-6, 0.01) < theirs + 0.025


@settings(max_examples=20, deadline=None)
@given(st.floats(0.02, 300), st.floats(-250, -1))
def test_gaussian_epsilon_solves_its_equation_for_tiny_deltas(noise, exponent):
    from mpmath import erfc, exp, mp, mpf, sqrt

    delta = 10.0**exponent
    found, mu = gaussian_epsilon([noise], delta), 1 / noise

    def exact(at: float):
        with mp.workdps(40):
            at, shift = mpf(at), mpf(mu)
            return (erfc((at / shift - shift / 2) / sqrt(2)) - exp(at) * erfc((at / shift + shift / 2) / sqrt(2))) / 2

    if found == 0:
        assert exact(0.0) <= delta * (1 + 1e-9)
    else:
        assert exact(found * (1 - 1e-8)) > delta * (1 - 1e-6)
        assert exact(found * (1 + 1e-8)) < delta * (1 + 1e-6)


def test_gaussian_releases_compose():
    assert gaussian_epsilon([3.0] * 9, 1e-6) == pytest.approx(gaussian_epsilon([1.0], 1e-6), rel=1e-9)
    assert gaussian_epsilon([1.25, 5 / 3], 1e-6) == pytest.approx(gaussian_epsilon([1.0], 1e-6), rel=1e-9)
    assert gaussian_epsilon([], 1e-6) == gaussian_epsilon([1e9], 1e-6) == 0
    assert gaussian_epsilon([1.0, 0.0], 1e-6) == math.inf


# Turned around -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [0.3, 2.0, 8.0, 40.0])
@pytest.mark.parametrize("rate", [0.01, 1.0])
def test_the_smallest_noise_within_a_budget(target, rate):
    def ledger(noise):
        return [Segment(noise, rate, 200)]

    noise = noise_multiplier(target, 1e-6, ledger)
    assert epsilon(ledger(noise), 1e-6) <= target < epsilon(ledger(noise / 1.0011), 1e-6)


def test_noise_of_a_schedule():
    def ledger(noise):
        return [Segment(noise * (1 - i / 10), 0.01, 50) for i in range(6)]

    noise = noise_multiplier(1.5, 1e-5, ledger)
    assert epsilon(ledger(noise), 1e-5) <= 1.5 < epsilon(ledger(noise / 1.0011), 1e-5)


def test_budgets_out_of_reach():
    with pytest.raises(
        ValueError, match=r"target_epsilon=0.5 is out of reach: even a noise multiplier of 100000 spends"
    ):
        noise_multiplier(0.5, 1e-5, lambda noise: [Segment(noise, 0.01, 1), Segment(1.0, 0.1, 100)])
    assert noise_multiplier(1e9, 1e-5, lambda noise: [Segment(noise, 0.01, 1)]) == 1e-3
    for target in (0, -1.0, math.nan):
        with pytest.raises(ValueError, match="is no budget"):
            noise_multiplier(target, 1e-5, lambda noise: [])
        with pytest.raises(ValueError, match="is no budget"):
            affordable_steps(target, 1e-5, lambda steps: [], 10)


@pytest.mark.parametrize("target", [0.5, 1.5, 6.0])
@pytest.mark.parametrize("rate", [0.01, 1.0])
def test_affordable_steps_fit_and_one_more_does_not(target, rate):
    def ledger(steps):
        return [Segment(3.0, rate, steps // 2), Segment(1.0, rate, steps - steps // 2)]

    steps = affordable_steps(target, 1e-5, ledger, 100_000)
    assert 0 <= steps < 100_000
    assert epsilon(ledger(steps), 1e-5) <= target < epsilon(ledger(steps + 1), 1e-5)


def test_affordable_steps_at_the_ends():
    def ledger(steps):
        return [Segment(1.0, 0.01, steps)]

    assert affordable_steps(2.0, 1e-5, ledger, 100) == 100
    assert affordable_steps(2.0, 1e-5, ledger, 0) == 0
    assert affordable_steps(2.0, 1e-5, lambda steps: [Segment(0.1, 1.0, steps)], 100) == 0
    limit = affordable_steps(2.0, 1e-5, ledger, 10**6)
    for most in (limit - 1, limit, limit + 1):
        assert affordable_steps(2.0, 1e-5, ledger, most) == min(most, limit)
    # Costs that jump, as whole epochs do.
    assert affordable_steps(5.0, 1e-5, lambda steps: [Segment(4.0, 1.0, math.ceil(steps / 37))], 10**5) % 37 == 0


def test_searches_need_few_calls():
    accounting._epsilon.cache_clear()
    noise_multiplier(2.0, 1e-5, lambda noise: [Segment(noise, 0.01, 1000)])
    assert accounting._epsilon.cache_info().misses <= 12
    accounting._epsilon.cache_clear()
    affordable_steps(2.0, 1e-5, lambda steps: [Segment(1.0, 0.01, steps)], 10**6)
    assert accounting._epsilon.cache_info().misses <= 16
