"""Group rates against fairlearn, finite differences and counting by hand."""

import math

import numpy as np
import pytest
import torch
from fairlearn.metrics import (
    demographic_parity_difference,
    equal_opportunity_difference,
    equalized_odds_difference,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_guard.functional import RATE_NOTIONS, group_gap, positive_scores, rate_gaps, rate_sums

FAIRLEARN = {
    "demographic_parity": demographic_parity_difference,
    "equal_opportunity": equal_opportunity_difference,
    "equalized_odds": equalized_odds_difference,
}


def population(seed: int, n: int = 200, groups: int = 3, classes: int = 2):
    """Logits ``(N,)`` or ``(N, C)``, groups and targets; every group has every class."""
    generator = torch.Generator().manual_seed(seed)
    group = torch.randint(groups, (n,), generator=generator)
    target = torch.randint(classes, (n,), generator=generator)
    cells = torch.cartesian_prod(torch.arange(groups), torch.arange(classes))
    group, target = torch.cat([group, cells[:, 0]]), torch.cat([target, cells[:, 1]])
    shape = (len(group),) if classes == 2 else (len(group), classes)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (
        logits + (0.4 * group if classes == 2 else 0.4 * group.unsqueeze(1) * torch.arange(classes)),
        group,
        target,
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 5), st.integers(10, 300), st.sampled_from(RATE_NOTIONS))
def test_hard_gaps_are_fairlearns(seed, groups, n, notion):
    logits, group, target = population(seed, n, groups)
    wanted = FAIRLEARN[notion](target.numpy(), (logits > 0).long().numpy(), sensitive_features=group.numpy())
    for form in (logits, logits.unsqueeze(1), torch.stack([torch.zeros_like(logits), logits], 1)):
        assert group_gap(form, group, target, notion).item() == pytest.approx(wanted, abs=1e-12)
    half = group_gap(logits.half(), group, target, notion)  # counted in float32
    assert half.item() == pytest.approx(wanted, abs=1e-5)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 4), st.integers(3, 4), st.sampled_from(RATE_NOTIONS))
def test_of_many_classes_the_worst_against_the_rest_counts(seed, groups, classes, notion):
    logits, group, target = population(seed, 120, groups, classes)
    wanted = max(
        FAIRLEARN[notion]((target == c).numpy(), (logits.argmax(1) == c).numpy(), sensitive_features=group.numpy())
        for c in range(classes)
    )
    assert group_gap(logits, group, target, notion).item() == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("notion", RATE_NOTIONS)
@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("steepness", [None, 3.0])
def test_parts_add_up_to_the_whole(notion, classes, steepness):
    logits, group, target = population(0, classes=classes)
    scores = positive_scores(logits, steepness)
    whole = rate_sums(scores, group, target, notion, 3)
    parts = [
        rate_sums(s, g, t, notion, 3)
        for s, g, t in zip(scores.split(17), group.split(17), target.split(17), strict=True)
    ]
    for i in range(2):
        torch.testing.assert_close(sum(part[i] for part in parts), whole[i])


@pytest.mark.parametrize("notion", RATE_NOTIONS)
def test_sums_and_counts_are_what_counting_finds(notion):
    logits, group, target = population(3, 60, classes=3)
    scores = positive_scores(logits)
    sums, counts = rate_sums(scores, group, target, notion)
    rows = {
        "demographic_parity": [lambda i, c: True] * 3,
        "equal_opportunity": [lambda i, c: target[i] == c] * 3,
        "equalized_odds": [lambda i, c: target[i] == c] * 3 + [lambda i, c: target[i] != c] * 3,
    }[notion]
    for r, counted in enumerate(rows):
        for g in range(3):
            members = [i for i in range(len(group)) if group[i] == g and counted(i, r % 3)]
            assert counts[r, g] == len(members)
            assert sums[r, g] == sum(logits[i].argmax() == r % 3 for i in members)


@pytest.mark.parametrize("notion", RATE_NOTIONS)
def test_absent_and_unknown_groups_count_nowhere(notion):
    logits, group, target = population(1)
    gap = group_gap(logits, group, target, notion)
    with_a_hole = torch.where(group == 2, 4, group)  # groups 2 and 3 are absent
    assert torch.equal(group_gap(logits, with_a_hole, target, notion), gap)
    sums, counts = rate_sums(positive_scores(logits), group, target, notion, 6)  # and so are 3 to 5
    assert torch.equal(rate_gaps(sums, counts).amax(), gap)
    more = torch.cat([logits, 100 * torch.ones(5)]), torch.cat([group, -torch.arange(1, 6)])
    assert torch.equal(group_gap(*more, torch.cat([target, torch.ones(5).long()]), notion), gap)


@pytest.mark.parametrize("notion", RATE_NOTIONS)
@pytest.mark.parametrize("group", [[0, 0, 0], [-1, -1, -1], [2, -1, 2], []])
def test_with_fewer_than_two_groups_there_is_no_gap(notion, group):
    group = torch.tensor(group, dtype=torch.long)
    logits = torch.linspace(-1, 1, len(group)).requires_grad_()
    gap = group_gap(logits, group, torch.ones(len(group)), notion, steepness=2.0)
    assert gap == 0
    assert (torch.autograd.grad(gap, logits)[0] == 0).all()


def test_a_rate_without_examples_contributes_nothing():
    """Group 1 has no positive: its true positive rate is no rate, and the false positive rates remain."""
    logits, group = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0]), torch.tensor([0, 0, 0, 1, 1])
    target = torch.tensor([1, 0, 0, 0, 0])
    assert group_gap(logits, group, target, "equal_opportunity") == 0
    assert group_gap(logits, group, target, "equalized_odds") == 0
    assert group_gap(logits, group, target) == pytest.approx(2 / 3 - 1 / 2)
    soft = group_gap(logits.requires_grad_(), group, target, "equal_opportunity", steepness=1.0)
    assert (torch.autograd.grad(soft, logits)[0] == 0).all()


@pytest.mark.parametrize("notion", RATE_NOTIONS)
@pytest.mark.parametrize("classes", [2, 3])
def test_the_soft_gradient_is_that_of_finite_differences(notion, classes):
    logits, group, target = population(2, 30, classes=classes)
    assert torch.autograd.gradcheck(
        lambda z: group_gap(z, group, target, notion, steepness=1.7), logits.requires_grad_()
    )
    scores = positive_scores(logits, 3.0)
    assert 0 < scores.min() < scores.max() < 1
    one = 1 / (1 + (-3.0 * logits.detach()).exp()) if classes == 2 else (3 * logits.detach()).softmax(1)
    torch.testing.assert_close(scores.detach().squeeze(1), one)


@pytest.mark.parametrize("notion", RATE_NOTIONS)
@pytest.mark.parametrize("classes", [2, 3])
def test_a_steep_surrogate_is_the_hard_rate(notion, classes):
    logits, group, target = population(4, classes=classes)
    hard = group_gap(logits, group, target, notion)
    distance = [abs(group_gap(logits, group, target, notion, k) - hard) for k in (1.0, 10.0, 100.0, 1e6)]
    assert distance[-1] < 1e-9
    assert distance[-1] <= distance[2] <= distance[0]


def test_of_equal_logits_the_first_class_wins():
    for logits in (torch.zeros(2), torch.zeros(2, 1), torch.zeros(2, 2)):
        assert positive_scores(logits).tolist() == [[0.0], [0.0]]
    assert positive_scores(torch.zeros(1, 3)).tolist() == [[1.0, 0.0, 0.0]]


def test_half_precision_counts_beyond_2048():
    logits, group = torch.ones(10_000, dtype=torch.float16), torch.arange(10_000) % 2
    logits[::4] = -1  # half of group 0
    assert group_gap(logits, group) == 0.5
    assert positive_scores(logits.bfloat16(), 1.0).dtype == torch.float32


def test_labels_may_be_of_any_number_type():
    logits, group, target = population(5)
    gap = group_gap(logits, group, target, "equalized_odds")
    for form in (target.float(), target.bool(), target.unsqueeze(1), target.to(torch.uint8)):
        assert torch.equal(group_gap(logits, group.to(torch.int32), form, "equalized_odds"), gap)


def test_what_cannot_be_meant_is_refused_by_name():
    with pytest.raises(ValueError, match="notion='parity'"):
        rate_sums(torch.ones(1, 1), torch.zeros(1), None, "parity")
    with pytest.raises(ValueError, match="give the target"):
        group_gap(torch.ones(1), torch.zeros(1).long(), notion="equal_opportunity")
    with pytest.raises(ValueError, match=r"shape \(1, 2, 3\)"):
        positive_scores(torch.ones(1, 2, 3))


def test_gaps_are_by_row():
    sums, counts = np.array([[1.0, 3.0, 9.0], [0.0, 0.0, 1.0]]), np.array([[4.0, 4.0, 0.0], [0.0, 0.0, 2.0]])
    assert rate_gaps(torch.tensor(sums), torch.tensor(counts)).tolist() == [0.5, 0.0]
    assert rate_gaps(torch.zeros(2, 0), torch.zeros(2, 0)).tolist() == [0.0, 0.0]
    assert not math.isnan(rate_gaps(torch.zeros(1, 3), torch.zeros(1, 3)).item())
