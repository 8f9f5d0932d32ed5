"""The audit's mathematics against independent computations and mechanisms whose epsilon is known."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import binom
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SequentialSampler

from lightning_guard.functional.privacy import (
    Mixed,
    Outliers,
    audit,
    ceiling,
    contrast,
    epsilon_lower_bound,
    label,
    p_value,
    refilled,
    relabelled,
)
from lightning_guard.functional.privacy.audit import guess_counts
from lightning_guard.functional.random import stream


def by_hand(correct, guesses, canaries, epsilon, delta):
    """Theorem 5.2 as it is written, one i after the other."""
    q = 1 / (1 + math.exp(-epsilon))
    alpha = max(
        (binom.cdf(correct - 1, guesses, q) - binom.cdf(correct - i - 1, guesses, q)) / i for i in range(1, correct + 1)
    )
    return min(1.0, binom.sf(correct - 1, guesses, q) + 2 * canaries * delta * alpha)


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0, 4.0])
@pytest.mark.parametrize("delta", [0.0, 1e-5, 1e-3])
@pytest.mark.parametrize(("correct", "guesses", "canaries"), [(1, 1, 1), (7, 9, 20), (40, 60, 100), (480, 500, 1000)])
def test_p_value_is_the_theorems(correct, guesses, canaries, epsilon, delta):
    expected = by_hand(correct, guesses, canaries, epsilon, delta)
    assert p_value(correct, guesses, canaries, epsilon, delta) == pytest.approx(expected, rel=1e-8, abs=1e-15)


@pytest.mark.parametrize("epsilon", [0.0, 0.7, 2.0])
def test_p_value_is_exact_for_randomized_response(epsilon):
    right = math.exp(epsilon) / (1 + math.exp(epsilon))
    for guesses in (1, 4, 7):
        outcomes = list(itertools.product([True, False], repeat=guesses))
        for correct in range(1, guesses + 1):
            chance = sum(math.prod(right if one else 1 - right for one in o) for o in outcomes if sum(o) >= correct)
            assert p_value(correct, guesses, guesses, epsilon) == pytest.approx(chance, rel=1e-12)


@pytest.mark.parametrize("delta", [1e-3, 1e-2])
def test_p_value_covers_mechanisms_that_fail_with_delta(delta):
    epsilon, guesses = 0.5, 60
    q = 1 / (1 + math.exp(-epsilon))
    for correct in range(20, guesses + 1):
        leaks_each = binom.sf(correct - 1, guesses, delta + (1 - delta) * q)  # each canary by itself
        leaks_all = delta + (1 - delta) * binom.sf(correct - 1, guesses, q)  # or all at once
        assert max(leaks_each, leaks_all) <= p_value(correct, guesses, guesses, epsilon, delta) + 1e-12


def test_p_value_of_nothing_right_is_one_and_nonsense_is_refused():
    assert p_value(0, 0, 5, 1.0) == p_value(0, 5, 5, 1.0) == 1.0
    with pytest.raises(ValueError, match="6 right of 5 guesses about 9 canaries"):
        p_value(6, 5, 9, 1.0)


def test_monotone():
    bounds = [epsilon_lower_bound(correct, 100, 200, 1e-5) for correct in range(50, 101, 5)]
    assert bounds == sorted(bounds)
    assert bounds[-1] > bounds[0] == 0
    assert epsilon_lower_bound(90, 100, 200, 1e-5, 0.99) < epsilon_lower_bound(90, 100, 200, 1e-5, 0.9)
    assert epsilon_lower_bound(90, 100, 200, 1e-3) < epsilon_lower_bound(90, 100, 200, 0.0)
    values = [p_value(90, 100, 200, epsilon / 10) for epsilon in range(40)]
    assert values == sorted(values)


@pytest.mark.parametrize(("correct", "guesses"), [(70, 100), (100, 100), (499, 500)])
def test_the_bound_is_where_the_p_value_crosses(correct, guesses):
    bound = epsilon_lower_bound(correct, guesses, 1000, 1e-5, 0.95)
    assert by_hand(correct, guesses, 1000, bound, 1e-5) < 0.05
    assert by_hand(correct, guesses, 1000, bound + 2e-6, 1e-5) >= 0.05 * (1 - 1e-3)


@pytest.mark.parametrize("canaries", [10, 100, 1000, 5000])
def test_the_ceiling_is_that_of_all_right(canaries):
    share = 0.05 / len(guess_counts(canaries))  # (e^eps / (1 + e^eps))^r = share, solved for eps
    assert ceiling(canaries) == pytest.approx(-math.log(share ** (-1 / canaries) - 1), abs=2e-6)
    coins = torch.rand(canaries) < 0.5
    coins[: canaries // 2], coins[canaries // 2 :] = True, False
    assert audit(coins.float(), coins).epsilon_lower == pytest.approx(ceiling(canaries), abs=1e-9)
    assert ceiling(canaries, delta=1e-4) < ceiling(canaries)


def test_guess_counts_pay_for_themselves_only():
    assert guess_counts(4) == [2, 4]
    assert guess_counts(1) == []
    assert audit(torch.zeros(1), torch.ones(1, dtype=torch.bool)).epsilon_lower == ceiling(5) == 0


def answered(epsilon, canaries, generator):
    """Coins, and what an exactly epsilon-private mechanism says of each: randomized response."""
    coins = torch.rand(canaries, generator=generator) < 0.5
    honest = torch.rand(canaries, generator=generator) < 1 / (1 + math.exp(-epsilon))
    return coins, (coins == honest) + torch.rand(canaries, generator=generator) / 2


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0])
def test_coverage(epsilon):
    generator, runs = stream(0, int(10 * epsilon)), 400
    above = 0
    for _ in range(runs):
        coins, scores = answered(epsilon, 100, generator)
        above += audit(scores, coins).epsilon_lower > epsilon
    assert above <= binom.ppf(0.999, runs, 0.05)


def test_the_bound_is_close_where_guesses_are_many():
    coins, scores = answered(1.0, 20_000, stream(1))
    result = audit(scores, coins)
    assert 0.9 < result.epsilon_lower < 1
    assert result.guesses in guess_counts(20_000)


def test_scores_that_are_not_finite_are_the_least():
    coins = torch.arange(200) < 100
    scores = torch.where(coins, 1.0, torch.nan)
    assert audit(scores, coins).epsilon_lower == pytest.approx(ceiling(200))
    with pytest.raises(ValueError, match="no pairs"):
        audit(scores, coins[:100])


def test_contrast():
    own, others = torch.tensor([1.0, 2.0]), [torch.tensor([2.0, torch.nan]), torch.tensor([4.0, 1.0])]
    torch.testing.assert_close(contrast(own, others), torch.tensor([2.0, -1.0]))
    torch.testing.assert_close(contrast(own, []), -own)


# Canaries ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target", [2, True, np.int64(2), np.array([1]), torch.tensor(2), torch.tensor([1.0]), 1.0, np.float32(0)], ids=repr
)
def test_labels_of_any_form_are_read_and_written(target):
    other = relabelled(target, 1.0)
    assert type(other) is type(target)
    assert getattr(other, "dtype", None) == getattr(target, "dtype", None)
    assert label(other) == 1


@pytest.mark.parametrize(
    ("target", "message"),
    [(0.5, "a quantity"), (torch.tensor(7.0), "a quantity"), ("cat", "str"), (torch.tensor([0, 1]), r"shape \(2,\)")],
)
def test_what_is_no_class_is_refused(target, message):
    with pytest.raises(ValueError, match=message):
        label(target)


def test_outliers_stay_in_the_range_and_have_directions_of_their_own():
    rows = torch.rand(50, 1, 28, 28)
    make, draw = Outliers(list(rows)), stream(0)
    made = torch.stack([make(rows[0], draw) for _ in range(40)])
    assert made.shape == (40, 1, 28, 28)
    assert set(made.unique().tolist()) <= {float(rows.min()), float(rows.max()), float(rows.double().median().float())}
    moved = (made - rows.median()).flatten(1)
    cosines = torch.nn.functional.cosine_similarity(moved[:, None], moved[None], dim=2)
    assert float((cosines - torch.eye(40)).abs().max()) < 0.35


def test_outliers_of_other_kinds():
    tokens = torch.tensor([5, 7, 9])
    assert set(Outliers([tokens])(tokens.repeat(9), stream(0)).tolist()) == {5, 7, 9}
    pixels = np.array([[0, 200], [0, 0]], np.uint8)
    made = Outliers([pixels])(pixels, stream(0))
    assert made.dtype == np.uint8
    assert set(made.flatten().tolist()) <= {0, 200}
    holes = torch.tensor([1.0, float("nan"), float("inf"), 3.0])
    assert Outliers([holes])(holes, stream(0)).isfinite().all()
    with pytest.raises(ValueError, match="mislabelled"):
        Outliers(["a sentence"])


def test_mixed_rows_are_all_there_and_spread():
    mixed = Mixed(list(range(300)), list(range(1000, 1100)), stream(0))
    rows = [mixed[i] for i in range(len(mixed))]
    assert [row for row in rows if row < 1000] == list(range(300))
    assert sorted(row for row in rows if row >= 1000) == list(range(1000, 1100))
    assert 10 <= sum(row >= 1000 for row in rows[:100]) <= 40


@pytest.mark.parametrize("order", ["shuffle", "sequence", "distributed"])
def test_a_refilled_loader_is_otherwise_as_it_was(order):
    data, generator = list(range(10)), torch.Generator()
    sampler = DistributedSampler(data, 2, 1, shuffle=False, seed=7) if order == "distributed" else None
    old = DataLoader(
        data, 4, shuffle=order == "shuffle" if sampler is None else None, sampler=sampler, drop_last=True,
        generator=generator, collate_fn=list, timeout=0,
    )  # fmt: skip
    new = refilled(old, list(range(13)))
    kinds = {"shuffle": RandomSampler, "sequence": SequentialSampler, "distributed": DistributedSampler}
    assert type(new.sampler) is kinds[order]
    assert (new.batch_size, new.drop_last, new.collate_fn, new.generator) == (4, True, list, generator)
    if sampler is not None:
        assert (new.sampler.rank, new.sampler.num_replicas, new.sampler.seed, new.sampler.shuffle) == (1, 2, 7, False)
    seen = [row for batch in new for row in batch]
    assert len(set(seen)) == (12 if sampler is None else 4)
