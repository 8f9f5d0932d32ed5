"""Moments, census and multipliers against fairlearn, and against counting by hand."""

import fairlearn.metrics as fl
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import mean_squared_error

from lightning_guard.functional.fairness import Census, Multipliers, deviations, errors_of, gaps_of, moments

DIFFERENCES = {
    "demographic_parity": fl.demographic_parity_difference,
    "equal_opportunity": fl.equal_opportunity_difference,
    "equalized_odds": fl.equalized_odds_difference,
}


def drawn(seed, groups=3, n=400):
    generator = torch.Generator().manual_seed(seed)
    group = torch.randint(0, groups, (n,), generator=generator)
    y = torch.randint(0, 2, (n,), generator=generator)
    logits = torch.randn(n, generator=generator) + 0.5 * group
    return logits, y, group


def judged(found, census, group, notion):
    members = census.members(group).double()
    values, counted = found.values.double(), found.counted.double()
    counts = counted.T @ members
    return gaps_of((values * counted).T @ members / counts, counts > 0, census.families, notion)


def census_of(group, y, intersections=False):
    census = Census(intersections)
    for part in torch.arange(len(group)).split(37):
        census.add(group[part], None if y is None else y[part])
    census.close()
    return census


@given(st.integers(0, 10_000), st.integers(2, 4))
@settings(max_examples=25, deadline=None)
def test_gaps_are_fairlearns(seed, groups):
    logits, y, group = drawn(seed, groups)
    census, decided = census_of(group, y), (logits > 0).long()
    for notion, theirs in DIFFERENCES.items():
        ours = float(judged(moments(logits, y, notion), census, group, notion).amax())
        assert ours == pytest.approx(theirs(y, decided, sensitive_features=group), abs=1e-9)
    for notion, metric in (("predictive_equality", fl.false_positive_rate), ("accuracy_parity", None)):
        metric = metric or (lambda y, p: float(np.mean(np.asarray(y) == np.asarray(p))))
        frame = fl.MetricFrame(metrics=metric, y_true=y, y_pred=decided, sensitive_features=group)
        ours = float(judged(moments(logits, y, notion), census, group, notion).amax())
        assert ours == pytest.approx(frame.difference(), abs=1e-9)
    losses = (logits - y).square()
    frame = fl.MetricFrame(metrics=mean_squared_error, y_true=y, y_pred=logits, sensitive_features=group)
    ours = judged(moments(logits, y, "bounded_group_loss", losses=losses), census, group, "bounded_group_loss")
    assert float(ours) == pytest.approx(frame.group_max(), rel=1e-5)


def test_several_classes_are_each_taken_against_the_rest():
    generator = torch.Generator().manual_seed(0)
    logits, y = torch.randn(300, 4, generator=generator), torch.randint(0, 4, (300,), generator=generator)
    group = torch.randint(0, 2, (300,), generator=generator)
    census, decided = census_of(group, y), logits.argmax(1)
    ours = judged(moments(logits, y, "equal_opportunity"), census, group, "equal_opportunity")
    for label in range(4):
        theirs = fl.equal_opportunity_difference(
            (y == label).long(), (decided == label).long(), sensitive_features=group
        )
        assert float(ours[label]) == pytest.approx(theirs, abs=1e-9)


@pytest.mark.parametrize("notion", ["equal_opportunity", "predictive_equality", "equalized_odds", "demographic_parity"])
@pytest.mark.parametrize("classes", [2, 3])
def test_support_is_what_the_moments_count(notion, classes):
    generator = torch.Generator().manual_seed(1)
    y = torch.randint(0, classes, (200,), generator=generator)
    group = torch.randint(-1, 3, (200,), generator=generator)
    logits = torch.randn(200, classes, generator=generator)
    counted = moments(logits, y, notion).counted
    census = census_of(group, y)
    expected = counted.double().T @ census.members(group).double()
    assert torch.equal(census.support(notion, counted.shape[1]), expected)


def test_soft_moments_tend_to_hard_ones():
    logits, y, _ = drawn(4)
    for notion in (*DIFFERENCES, "accuracy_parity"):
        soft, hard = moments(logits, y, notion, steepness=1e4), moments(logits, y, notion)
        assert float((soft.values - hard.values).abs().mean()) < 1e-3
        assert torch.equal(soft.counted, hard.counted)


def test_attributes_their_intersections_and_unknown_ones():
    group = torch.tensor([[0, 1], [1, 1], [0, -1], [-1, 0], [1, 0]])
    census = census_of(group, torch.tensor([0, 1, 1, 0, 1]), intersections=True)
    assert census.families.tolist() == [0, 0, 1, 1, 2, 2, 2]
    assert census.codes[4:] == [(0, 1), (1, 0), (1, 1)]
    assert census.counts.tolist() == [2, 2, 2, 2, 1, 1, 1]
    assert census.members(group)[2].tolist() == [1, 0, 0, 0, 0, 0, 0]
    other = Census(True)
    other.restore(census.state())
    assert torch.equal(other.cells, census.cells)
    assert other.codes == census.codes


def test_merged_processes_are_one():
    _, y, group = drawn(2)
    parts = [census_of(group[i::2], y[i::2]) for i in (0, 1)]
    both = Census()
    both.merge(parts)
    both.close()
    whole = census_of(group, y)
    assert torch.equal(both.cells, whole.cells)
    assert both.total == whole.total


def test_errors_are_those_of_resampled_examples():
    logits, y, group = drawn(5, 2, 3000)
    census, found = census_of(group, y), moments(logits, y, "equalized_odds")
    members, counted, values = census.members(group).double(), found.counted.double(), found.values.double()
    counts = counted.T @ members
    rates = (values * counted).T @ members / counts
    squares = (values**2 * counted).T @ members / counts
    errors = errors_of(rates, squares, counts, counts > 0, census.families, "equalized_odds")
    generator, gaps = torch.Generator().manual_seed(0), []
    for _ in range(400):
        rows = torch.randint(0, 3000, (3000,), generator=generator)
        one = type(found)(found.values[rows], found.counted[rows])
        gaps.append(judged(one, census, group[rows], "equalized_odds"))
    torch.testing.assert_close(torch.stack(gaps).std(0), errors, rtol=0.15, atol=0)


def test_multipliers_rise_while_the_bound_is_broken_and_fall_after():
    families, present = torch.tensor([0, 0, 0]), torch.ones(1, 3, dtype=torch.bool)
    cost = Multipliers("demographic_parity", families, 1, cap=0.5)
    wide, narrow = torch.tensor([[0.1, 0.3, 0.5]]), torch.tensor([[0.29, 0.3, 0.31]])
    for _ in range(3):
        cost.update(wide, present, 0.1, 0.5)
    first = cost.costs(present)
    assert first[0, 2] > 0 > first[0, 0]
    assert float(first.sum()) == pytest.approx(0, abs=1e-12)
    assert float(cost.up.max()) == pytest.approx(0.45)
    for _ in range(9):
        cost.update(wide, present, 0.1, 0.5)
    assert float(cost.up.max()) == 0.5  # the cap
    for _ in range(99):
        cost.update(narrow, present, 0.1, 0.5)
    assert not cost.costs(present).any()


def swings(damping):
    """The gap over time of a network that answers to a price late: half the way in half an epoch."""
    present = torch.ones(1, 2, dtype=torch.bool)
    cost = Multipliers("demographic_parity", torch.tensor([0, 0]), 1, damping=damping)
    gap, gaps = 0.2, []
    for _ in range(400):
        cost.update(torch.tensor([[0.0, gap]]), present, 0.05, 10.0, time=0.05)
        price = float(cost.costs(present)[0, 1])
        gap += 0.05 * (0.2 - 0.2 * price - gap) / 0.7
        gaps.append(gap)
    return torch.tensor(gaps)


def test_damping_keeps_a_late_gap_from_swinging():
    loose, damped = swings(0.0), swings(1.0)
    assert loose.min() < 0.02  # far through the bound
    assert damped.min() > 0.045
    torch.testing.assert_close(damped[-100:], torch.full((100,), 0.05), atol=1e-3, rtol=0)


def test_damping_follows_the_change_alone():
    present, families = torch.ones(1, 2, dtype=torch.bool), torch.tensor([0, 0])
    rates = [torch.tensor([[0.1, high]]) for high in (0.5, 0.4)]
    plain, damped = (Multipliers("demographic_parity", families, 1, damping=d) for d in (0.0, 0.5))
    for cost in (plain, damped):
        cost.update(rates[0], present, 0.1, 2.0, time=0.1)
    assert torch.equal(plain.up, damped.up)  # nothing has changed yet
    for cost in (plain, damped):
        cost.update(rates[1], present, 0.1, 2.0, time=0.1)
    apart = float((damped.up - plain.up)[0, 1])
    assert apart == pytest.approx(2.0 * 0.5 * -0.1)  # step size, damping, change of the gap


def test_a_group_that_is_not_judged_has_no_price():
    present = torch.tensor([[True, True, False]])
    cost = Multipliers("demographic_parity", torch.tensor([0, 0, 0]), 1)
    cost.update(torch.tensor([[0.1, 0.5, 0.9]]), present, 0.1, 1.0)
    assert float(cost.costs(present)[0, 2]) == 0
    away = deviations(torch.tensor([[0.1, 0.5, 0.9]]), present, torch.tensor([0, 0, 0]), "demographic_parity")
    torch.testing.assert_close(away, torch.tensor([[-0.2, 0.2, 0.0]]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"notion": "justice"}, "notion='justice'"),
        ({"notion": "bounded_group_loss"}, "give the loss"),
        ({"notion": "quantile_parity"}, "give thresholds"),
    ],
)
def test_what_is_missing_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        moments(torch.zeros(3), torch.zeros(3), **options)
    with pytest.raises(ValueError, match="give the target"):
        moments(torch.zeros(3), None, "equal_opportunity")
