"""Kernel dependence against double loops and the trace formula."""

import math

import pytest
import torch

from lightning_guard.functional.fairness.dependence import hsic, median_bandwidth, mmd2
from lightning_guard.guard import GuardConflict
from lightning_guard.parity.dependence import HSIC, MMD, Watched
from tests.functional.fairness.test_group_dro import batch


def points(n, d, seed, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) + shift


def kernel(a, b, width):
    return math.exp(-float((a - b).square().sum()) / (2 * width**2))


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("d", [1, 3, 20])
def test_mmd_is_the_double_loop(unbiased, d):
    x, y, width = points(7, d, 0), points(5, d, 1, 0.5), 1.7

    def mean(a, b, same):
        pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if not (same and unbiased and i == j)]
        return sum(kernel(a[i], b[j], width) for i, j in pairs) / len(pairs)

    hand = mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)
    assert mmd2(x, y, width, unbiased).item() == pytest.approx(hand, abs=1e-12)


def test_mmd_sees_a_shift_and_is_right_on_average_without_one():
    assert mmd2(points(50, 2, 0), points(50, 2, 1, 2.0)) > 0.3
    unbiased = [float(mmd2(points(5, 2, 2 * i), points(5, 2, 2 * i + 1), 1.0, True)) for i in range(400)]
    biased = [float(mmd2(points(5, 2, 2 * i), points(5, 2, 2 * i + 1), 1.0)) for i in range(400)]
    assert abs(sum(unbiased) / 400) < 0.02 < sum(biased) / 400
    assert min(biased) >= 0


def test_mmd_of_hardly_anybody_is_nothing():
    x = points(4, 2, 0).requires_grad_()
    found = mmd2(x, points(1, 2, 1))
    assert found == 0
    assert torch.autograd.grad(found, x)[0].abs().sum() == 0


def test_median_bandwidth():
    x = torch.tensor([0.0, 0.0, 1.0, 5.0], requires_grad=True)
    assert median_bandwidth(x).item() == 4.0  # of 1, 1, 4, 5, 5
    assert not median_bandwidth(x).requires_grad
    assert median_bandwidth(torch.ones(3)) == 1
    assert median_bandwidth(torch.zeros(0, 2)) == 1


def test_hsic_is_the_trace_formula():
    x, s = points(9, 3, 0), points(9, 1, 1)
    k = torch.tensor([[kernel(a, b, 1.3) for a in x] for b in x], dtype=torch.float64)
    l = torch.tensor([[kernel(a, b, 0.7) for a in s] for b in s], dtype=torch.float64)  # noqa: E741
    h = torch.eye(9, dtype=torch.float64) - 1 / 9
    hand = torch.trace(k @ h @ l @ h)
    assert hsic(x, s, (1.3, 0.7)).item() == pytest.approx(hand.item() / 64)
    own = torch.trace(k @ h @ k @ h) * torch.trace(l @ h @ l @ h)
    assert hsic(x, s, (1.3, 0.7), normalised=True).item() == pytest.approx((hand / own.sqrt()).item())


def test_hsic_leaves_out_what_is_unknown():
    x, s = points(12, 2, 0).requires_grad_(), points(12, 1, 1)
    s[[3, 7]] = torch.nan
    known = [i for i in range(12) if i not in (3, 7)]
    found = hsic(x, s)
    assert found.item() == pytest.approx(hsic(x[known], s[known]).item())
    grad = torch.autograd.grad(found, x)[0]
    assert grad.isfinite().all()
    assert grad[[3, 7]].abs().sum() == 0
    for nothing in (torch.full((12, 1), torch.nan), torch.ones(12)):
        found = hsic(x, nothing, normalised=True)
        assert found == 0
        assert torch.autograd.grad(found, x)[0].isfinite().all()


def test_hsic_sees_dependence_without_correlation():
    x = points(300, 1, 0)
    assert hsic(x, x.square(), normalised=True) > 5 * hsic(x, points(300, 1, 1), normalised=True)


@pytest.mark.parametrize("make", [MMD, HSIC])
def test_a_step_down_the_term_brings_groups_together(make):
    group = torch.arange(40) % 2
    group[:4] = -1
    seen = batch(group, None)
    seen.logits = (points(40, 1, 0)[:, 0] + 2 * group).requires_grad_()
    mode = make(weight=1.0)
    mode.begin(torch.nn.Identity(), seen.census)
    before = mode.term(seen)
    grad = torch.autograd.grad(before, seen.logits)[0]
    assert grad[:4].abs().sum() == 0
    seen.logits = seen.logits.detach() - grad / grad.norm()
    assert mode.term(seen) < before
    away = (group == 0) | (group == -1)
    lone = batch(group[away], None, census=seen.census)
    assert abs(mode.term(lone).item()) < 1e-12  # the other group is absent


def test_mmd_of_three_groups_is_each_against_the_rest():
    group = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    seen = batch(group, None)
    mode = MMD(weight=3.0)
    mode.begin(torch.nn.Identity(), seen.census)
    x = seen.logits.detach()
    width = median_bandwidth(x)
    hand = sum(mmd2(x[group == g], x[group != g], width, True) for g in range(3))
    assert mode.term(seen).item() == pytest.approx(hand.item())


def test_hsic_of_a_quantity():
    seen = batch(torch.arange(20), None)
    seen.attribute = seen.logits.detach().unsqueeze(1).clone()
    seen.attribute[3] = torch.nan
    mode = HSIC(weight=2.0, continuous=True)
    mode.begin(torch.nn.Identity(), seen.census)
    assert mode.term(seen).item() == pytest.approx(2.0)


def test_a_layer_is_watched_in_training_alone():
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    seen = batch(torch.tensor([0, 1, 1]), None)
    watched = Watched("0")
    watched.begin(net)
    x = torch.randn(3, 2)
    net(x)
    want = net[0](x)
    net.eval()
    net(x + 1)
    net.train()
    with torch.no_grad():
        net(x + 1)
    assert watched.take(seen).equal(want)
    with pytest.raises(GuardConflict, match="layer='0'"):
        watched.take(seen)  # taken already, so of another step
    watched.end()
    assert not net[0]._forward_hooks
    with pytest.raises(GuardConflict, match="layer='no'"):
        Watched("no").begin(net)
