"""Intervals, tests and verdicts against scipy, brute force, and simulations whose truth is known."""

from itertools import chain, combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lightning_guard.functional import statistics as ours

SAMPLES = st.lists(st.integers(-20, 20).map(lambda k: k / 16), min_size=2, max_size=8)

DRAW = {
    "normal": lambda g, shape: g.normal(size=shape),
    "heavy": lambda g, shape: g.standard_t(3, size=shape),
    "flat": lambda g, shape: g.uniform(-1, 1, size=shape),
    "skewed": lambda g, shape: g.exponential(size=shape) - 1,
    "coarse": lambda g, shape: g.choice([-1.0, 0.0, 1.0], size=shape),
}


@settings(deadline=None, max_examples=60)
@given(SAMPLES)
def test_student_is_scipy_s(values):
    if len(set(values)) == 1:
        assert ours.student_interval(values) == pytest.approx((values[0], values[0]))
        assert ours.student_p(values) == (0.0 if values[0] else 1.0)
        return
    found = stats.ttest_1samp(values, 0.0)
    assert ours.student_p(values) == pytest.approx(found.pvalue, rel=1e-9)
    assert ours.student_interval(values) == pytest.approx(tuple(found.confidence_interval(0.95)), abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(SAMPLES)
def test_sign_flips_are_all_tried(values):
    sums = [abs(sum(sign * value for sign, value in zip(signs, values, strict=True)))
            for signs in product((1, -1), repeat=len(values))]  # fmt: skip
    assert ours.sign_flip_p(values) == sum(one >= abs(sum(values)) for one in sums) / len(sums)  # sixteenths: exact


def test_sign_flips_are_scipy_s_for_many_seeds():
    values = np.random.default_rng(1).normal(0.5, 1.0, 20)
    scipys = stats.permutation_test((values,), np.sum, permutation_type="samples", vectorized=False, n_resamples=20_000)
    assert ours.sign_flip_p(values) == pytest.approx(scipys.pvalue, abs=0.01)
    assert ours.sign_flip_p(values) == ours.sign_flip_p(values)


@pytest.mark.parametrize("n", range(1, 12))
def test_the_smallest_sign_flip_p(n):
    assert ours.sign_flip_p([0.1 * (i + 1) for i in range(n)]) == min(1.0, 2 / 2**n)
    assert (n >= ours.FEWEST_SEEDS) == (2 / 2**n <= 0.05)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_halves_what_was_seen(first, second):
    apart = first + second
    if not apart:
        assert ours.mcnemar_p(first, second) == 1.0
        return
    exact = stats.binomtest(first, apart, 0.5).pvalue
    middle = exact - stats.binom.pmf(first, apart, 0.5)  # half of both tails' last step
    assert ours.mcnemar_p(first, second) == pytest.approx(min(1.0, middle) if first != second else 1.0, abs=1e-9)
    assert ours.mcnemar_p(first, second) == ours.mcnemar_p(second, first)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 200), st.integers(0, 200))
def test_clopper_pearson_is_where_the_tails_hold_a_fortieth(k, more):
    n = k + more
    low, high = ours.clopper_pearson(k, n)
    if not n:
        assert (low, high) == (0.0, 1.0)
        return
    assert stats.binom.sf(k - 1, n, low) == pytest.approx(0.025 if k else 1.0, abs=1e-9)
    assert stats.binom.cdf(k, n, high) == pytest.approx(0.025 if more else 1.0, abs=1e-9)


def test_counts_that_are_none():
    with pytest.raises(ValueError, match="from 0 to trials"):
        ours.clopper_pearson(3, 2)
    with pytest.raises(ValueError, match="margin=0"):
        ours.equivalence_p([1.0, 2.0], 0.0)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 100).map(lambda k: k / 100), min_size=1, max_size=6))
def test_holm_is_the_closed_test_of_bonferroni(p_values):
    """By definition: a claim stands if every set of claims that holds it is refused by Bonferroni."""
    every = range(len(p_values))
    sets = list(chain.from_iterable(combinations(every, size) for size in range(1, len(p_values) + 1)))
    closed = [max(min(1.0, len(one) * min(p_values[j] for j in one)) for one in sets if i in one) for i in every]
    assert ours.holm(p_values) == pytest.approx(closed)
    assert ours.holm([]) == []


def test_bca_is_scipy_s_and_repeats_itself():
    values = np.random.default_rng(0).exponential(size=25)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="BCa", rng=np.random.default_rng(5))
    assert ours.bca_interval(values) == pytest.approx(tuple(theirs.confidence_interval), abs=0.02)
    assert ours.bca_interval(values) == ours.bca_interval(values)
    assert ours.bca_interval([0.5, 0.5, 0.5]) == (0.5, 0.5)
    assert ours.bca_interval([0.5]) is None


def test_the_interval_over_examples_is_that_of_bonett_and_price():
    gained, lost, n = 9, 4, 120
    after, before = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    middle, reach = after - before, 1.959963984540054 * np.sqrt((after + before - (after - before) ** 2) / (n + 2))
    apart = [1.0] * gained + [-1.0] * lost + [0.0] * (n - gained - lost)
    assert ours.example_interval(apart) == pytest.approx((middle - reach, middle + reach))
    assert ours.example_interval([]) is None


@pytest.mark.parametrize(
    ("differences", "better", "p", "equal", "verdict"),
    [
        ([], "higher", None, 1.0, "not measured"),
        ([0.0, 0.0], "higher", 1.0, 1.0, "same"),
        ([0.0], "higher", None, 1.0, "inconclusive"),
        ([0.1] * 5, "higher", 0.0, 0.0, "inconclusive"),
        ([0.1] * 6, "higher", 0.0, 1.0, "better"),
        ([-0.1] * 6, "higher", 0.0, 1.0, "worse"),
        ([-0.1] * 6, "lower", 0.0, 1.0, "better"),
        ([0.1] * 6, None, 0.0, 1.0, "higher"),
        ([-0.1] * 6, None, 0.0, 1.0, "lower"),
        ([0.1] * 6, "higher", 0.06, 1.0, "inconclusive"),
        ([0.1] * 5 + [-0.1], "higher", 0.0, 1.0, "inconclusive"),  # the sign-flip test alone objects
        ([0.1] * 6, "higher", 0.0, 0.01, "equivalent"),
    ],
)
def test_verdicts(differences, better, p, equal, verdict):
    assert ours.judge(differences, better, p, equivalence=equal) == verdict


@settings(deadline=None, max_examples=30)
@given(st.floats(0.3, 3.0), st.integers(1, 20))
def test_the_seeds_needed_have_the_power_and_one_less_has_not(effect, claims):
    sample = [effect - 1.0, effect, effect + 1.0]  # mean ``effect``, standard deviation 1
    n = ours.seeds_needed(sample, claims)

    def power(n):  # by integration over the standard deviation, without the noncentral t
        critical = stats.t.ppf(1 - 0.05 / claims / 2, n - 1)
        return stats.chi2(n - 1).expect(
            lambda q: stats.norm.sf(critical * np.sqrt(q / (n - 1)) - effect * np.sqrt(n)), epsabs=1e-6
        )

    assert n is not None
    assert power(n) >= 0.799
    assert n == ours.FEWEST_SEEDS or power(n - 1) <= 0.801


def test_seeds_that_are_not_known_and_seeds_without_spread():
    assert ours.seeds_needed([0.1]) is None
    assert ours.seeds_needed([0.1, -0.1]) is None
    assert ours.seeds_needed([0.0001, 1.0, -1.0, 0.0002]) is None
    assert ours.seeds_needed([0.1, 0.1]) == ours.FEWEST_SEEDS


# Simulations with a known truth ---------------------------------------------------------------------------------


def coverage(interval, kind, n, repeats, seed=0):
    """How often an interval of ``n`` values of a distribution holds its mean."""
    draws = DRAW[kind](np.random.default_rng(seed), (repeats, n))
    return float(np.mean([low <= 0 <= high for low, high in map(interval, draws)]))


def false_claims(kind, n, claims, repeats, seed=0):
    """How often a report of ``claims`` claims, none of them true, makes any; seeds are shared by all of them."""
    draw, made = np.random.default_rng(seed), 0
    for _ in range(repeats):
        # Two arms that are alike, whose figures have half of their chance in common.
        both = DRAW[kind](draw, (2, n, claims)) + DRAW[kind](draw, (2, n, 1))
        apart = (both[0] - both[1]).T
        corrected = ours.holm([ours.student_p(one) for one in apart])
        made += any(
            ours.judge(one.tolist(), "higher", p) != "inconclusive" for one, p in zip(apart, corrected, strict=True)
        )
    return made / repeats


def test_student_holds_the_truth_at_six_seeds_and_bca_does_not():
    assert coverage(ours.student_interval, "normal", 6, 1000) == pytest.approx(0.95, abs=0.02)
    assert coverage(lambda x: ours.bca_interval(x, replicates=499), "normal", 6, 400) < 0.91  # 0.87 in truth


def test_reports_without_a_true_claim_seldom_make_one():
    assert false_claims("normal", 6, 10, 400) <= 0.075  # 0.05 and two standard errors
    assert false_claims("normal", 5, 10, 20) == 0.0


def test_a_true_claim_is_made():
    """The positive control: a difference of three standard deviations, among nine that are none."""
    draw, made = np.random.default_rng(0), 0
    for _ in range(100):
        apart = draw.normal(size=(10, 8))
        apart[0] += 3.0
        corrected = ours.holm([ours.student_p(one) for one in apart])
        made += ours.judge(apart[0].tolist(), "higher", corrected[0]) == "better"
    assert made >= 80


@pytest.mark.parametrize("rate", [0.02, 0.3])
def test_the_interval_over_examples_holds_the_truth(rate):
    draw = np.random.default_rng(3)
    n, shift = 400, 0.3 * rate
    held = 0
    for _ in range(1000):
        one = draw.choice([1.0, -1.0, 0.0], size=n, p=[(rate + shift) / 2, (rate - shift) / 2, 1 - rate])
        low, high = ours.example_interval(one)
        held += low <= shift <= high
    assert held / 1000 >= 0.93


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(DRAW))
@pytest.mark.parametrize("n", [3, 6, 10, 20])
def test_coverage_is_as_the_docs_say(kind, n):
    """The table of docs/comparison.md, printed with -s: Student's interval is never far worse than BCa's."""
    student = coverage(ours.student_interval, kind, n, 2000)
    bca = coverage(lambda x: ours.bca_interval(x, replicates=999), kind, n, 1000)
    print(f"\n{kind} {n}: Student {student:.3f}, BCa {bca:.3f}")
    assert student >= {"skewed": 0.85, "coarse": 0.80}.get(kind, 0.93) - (0.03 if n == 3 else 0.0)
    assert student >= bca - 0.04


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(DRAW))
@pytest.mark.parametrize("n", [6, 10])
def test_false_claims_are_as_the_docs_say(kind, n):
    rate = false_claims(kind, n, 20, 2000)
    print(f"\n{kind} {n}: {rate:.3f} of reports with 20 false claims make one")
    assert rate <= 0.06
