"""Membership scores against loops, scikit-learn, and simulations whose truth is known."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from lightning_guard.functional.losses import example_losses
from lightning_guard.functional.membership import area, by_class, confidence_scores, offline_lira, rate_at, roc
from lightning_guard.functional.privacy import Segment, largest_rate, profile

SCORES = st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.5, 3.0]), min_size=1, max_size=12)


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_scores_are_the_logit_of_the_probability(classes):
    generator = torch.Generator().manual_seed(classes)
    shape = (50,) if classes == 1 else (50, classes)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64)
    target = torch.randint(max(classes, 2), (50,), generator=generator)
    p = torch.exp(-example_losses(logits, target))
    torch.testing.assert_close(confidence_scores(logits, target), torch.log(p) - torch.log1p(-p))


def test_scores_of_several_labels_are_the_loss():
    logits, target = torch.randn(6, 3), torch.randint(2, (6, 3)).float()
    torch.testing.assert_close(confidence_scores(logits, target), -example_losses(logits.double(), target))


def test_sure_models_are_still_told_apart():
    """Probabilities of 40 and 50 nats are both 1 in float32; the scores are not."""
    logits = torch.tensor([[40.0, 0.0], [50.0, 0.0]])
    assert confidence_scores(logits, torch.tensor([0, 0])).tolist() == [40.0, 50.0]


@settings(max_examples=60, deadline=None)
@given(SCORES, SCORES)
def test_area_counts_pairs(members, others):
    mine, theirs = np.array(members), np.array(others)
    wins = (mine[:, None] > theirs).mean() + 0.5 * (mine[:, None] == theirs).mean()
    value, (low, high) = area(mine, theirs)
    assert value == pytest.approx(wins, abs=1e-12)
    assert value == pytest.approx(roc_auc_score([1] * len(mine) + [0] * len(theirs), [*members, *others]), abs=1e-12)
    assert 0 <= low <= value <= high <= 1


def test_the_interval_of_the_area_holds_the_truth():
    """The truth for normal scores a distance of d apart is Phi(d / sqrt 2)."""
    draws, held = np.random.default_rng(0), 0
    for _ in range(1500):
        _, (low, high) = area(draws.normal(0.5, 1, 120), draws.normal(0, 1, 60))
        held += low <= norm.cdf(0.5 / math.sqrt(2)) <= high
    assert 0.925 <= held / 1500 <= 0.97


@settings(max_examples=60, deadline=None)
@given(SCORES, SCORES, st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0]))
def test_rates_are_the_best_threshold(members, others, limit):
    mine, theirs = np.array(members), np.array(others)
    found = rate_at(mine, theirs, limit)
    best = max((int((mine > t).sum()) for t in [-np.inf, *theirs] if (theirs > t).mean() <= limit + 1e-12), default=0)
    assert (found.hits, found.members, found.others) == (best, len(mine), len(theirs))
    assert found.alarms <= limit * len(theirs) + 1e-9
    assert roc(mine, theirs, np.array([limit]))[0] == pytest.approx(found.hits / len(mine))


def test_by_class_is_the_loop():
    draws = np.random.default_rng(3)
    classes, known = draws.integers(0, 3, 40), draws.integers(0, 3, 60)
    members, others = draws.normal(classes, 1.0), draws.normal(known, 1.0)
    found = by_class(members, classes, others, known)
    for i, label in enumerate(classes):
        yard = others[known == label]
        assert found[0][i] == pytest.approx((members[i] - yard.mean()) / yard.std())
    for i, label in enumerate(known):
        yard = np.array([others[j] for j in range(60) if known[j] == label and j != i])
        assert found[1][i] == pytest.approx((others[i] - yard.mean()) / yard.std())


def test_a_class_of_few_is_measured_by_all():
    others = np.random.default_rng(0).normal(size=50)
    found = by_class(np.array([1.0]), np.array([7]), others, np.zeros(50, int))
    assert found[0][0] == pytest.approx((1.0 - others.mean()) / others.std())


def test_hard_classes_hide_nobody_from_a_threshold_of_their_own():
    draws = np.random.default_rng(1)
    classes, known = draws.integers(0, 4, 4000), draws.integers(0, 4, 4000)
    members, others = draws.normal(5.0 * classes + 1, 1), draws.normal(5.0 * known, 1)
    mine, theirs = by_class(members, classes, others, known)
    assert area(members, others)[0] < 0.6
    assert area(mine, theirs)[0] == pytest.approx(norm.cdf(1 / math.sqrt(2)), abs=0.02)


def lira_by_hand(scores, members, own_from=16):
    models, rows = scores.shape
    out = [[scores[m, r] for m in range(models) if not members[m, r]] for r in range(rows)]
    pooled = sum(sum((x - np.mean(o)) ** 2 for x in o) for o in out if len(o) > 1)
    pooled /= sum(len(o) - 1 for o in out if len(o) > 1)
    found = np.full(scores.shape, np.nan)
    for m in range(models):
        for r in range(rows):
            others = [scores[k, r] for k in range(models) if not members[k, r] and k != m]
            if len(others) >= 2:
                spread = np.var(others, ddof=1) if len(others) >= own_from else pooled
                found[m, r] = (scores[m, r] - np.mean(others)) / np.sqrt(spread * (1 + 1 / len(others)))
    return found


@pytest.mark.parametrize("models", [5, 40])
def test_lira_is_the_loop(models):
    draws = np.random.default_rng(models)
    scores, members = draws.normal(size=(models, 7)), draws.random((models, 7)) < 0.5
    np.testing.assert_allclose(offline_lira(scores, members), lira_by_hand(scores, members), rtol=1e-9)


def test_a_model_is_no_reference_for_itself():
    scores, members = np.zeros((3, 1)), np.zeros((3, 1), bool)
    scores[0] = 100.0
    scores[1] = 0.1
    changed = scores.copy()
    changed[0] = 5.0
    first, second = offline_lira(scores, members)[0, 0], offline_lira(changed, members)[0, 0]
    assert first > second  # only its own score differs, the mean of the others does not


def test_lira_finds_what_the_loss_does_not():
    """Rows differ in difficulty by 5, membership moves a score by 3 of its standard deviations: known power."""
    draws, (models, rows) = np.random.default_rng(0), (32, 4000)
    members = draws.random((models, rows)) < 0.5
    scores = draws.normal(0, 5, rows) + 3 * members + draws.normal(size=(models, rows))
    found = offline_lira(scores, members)
    mine, theirs = found[0][members[0]], found[0][~members[0]]
    hit = rate_at(mine, theirs, 0.01)
    assert hit.hits / hit.members == pytest.approx(1 - norm.cdf(norm.ppf(0.99) - 3), abs=0.12)  # 0.75
    plain = rate_at(scores[0][members[0]], scores[0][~members[0]], 0.01)
    assert plain.hits / plain.members < 0.05


def test_without_membership_lira_guesses():
    draws, inside = np.random.default_rng(5), 0
    for _ in range(60):
        members = draws.random((8, 300)) < 0.5
        found = offline_lira(draws.normal(0, 3, 300) + draws.normal(size=(8, 300)), members)
        told = np.isfinite(found[0])
        low, high = area(found[0][members[0] & told], found[0][~members[0] & told])[1]
        inside += low <= 0.5 <= high
    assert inside >= 52


def test_too_few_references_say_nothing():
    assert np.isnan(offline_lira(np.zeros((2, 3)), np.zeros((2, 3), bool))).all()


@pytest.mark.parametrize("sigma", [0.7, 1.0, 3.0])
def test_what_a_claim_allows_is_the_trade_off_of_the_gaussian(sigma):
    """One Gaussian release is 1/sigma-GDP: TPR = Phi(Phi^-1(FPR) + 1/sigma), and no bound may lie below."""
    deltas = np.logspace(-8, -0.5, 60)
    claims = profile([Segment(sigma, 1.0, 1)], 1e-5, deltas)
    for alarms in (1e-3, 0.01, 0.1, 0.3, 0.7):
        truth = norm.cdf(norm.ppf(alarms) + 1 / sigma)
        bound = largest_rate(claims, alarms)
        assert truth - 1e-6 <= bound <= truth + 0.03


def test_edges_of_what_a_claim_allows():
    assert largest_rate([(0.0, 0.0)], 0.3) == pytest.approx(0.3)
    assert largest_rate([(math.inf, 1e-5)], 0.1) == 1.0
    assert largest_rate([(math.inf, 1e-5)], 0.0) == pytest.approx(1e-5)
    assert largest_rate([(1.0, 1e-5), (0.5, 0.1)], 0.01) == pytest.approx(min(math.e * 0.01 + 1e-5, 1))
