"""Objectives against their definitions, written as loops, and against pyautoattack's."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_guard.functional.attacks.objectives import (
    classes,
    dlr,
    fooled,
    input_gradient,
    log_odds,
    margin,
    ranking,
    targeted_dlr,
)
from tests.functional.attacks.arena import seeded


@st.composite
def judged(draw, least=2):
    n, c = draw(st.integers(1, 5)), draw(st.integers(least, 12))
    seed = draw(st.integers(0, 999))
    logits = draw(st.sampled_from([1e-3, 1.0, 30.0])) * torch.randn(n, c, generator=seeded(seed), dtype=torch.float64)
    return logits, torch.randint(c, (n,), generator=seeded(seed + 1))


@given(judged())
@settings(deadline=None)
def test_log_odds_are_an_increasing_function_of_the_cross_entropy(case):
    logits, y = case
    assert torch.allclose(F.softplus(log_odds(logits, y)), F.cross_entropy(logits, y, reduction="none"))


@given(judged())
@settings(deadline=None)
def test_margin_and_ranking_against_loops(case):
    logits, y = case
    for row, right, value, order in zip(
        logits.tolist(), y.tolist(), margin(logits, y), ranking(logits, y), strict=True
    ):
        wrong = [i for i in range(len(row)) if i != right]
        assert value.item() == max(row[i] for i in wrong) - row[right]
        assert order.tolist() == sorted(wrong, key=lambda i: -row[i])


@given(judged(least=3))
@settings(deadline=None)
def test_dlr_against_its_definition(case):
    logits, y = case
    for row, right, value in zip(logits.tolist(), y.tolist(), dlr(logits, y), strict=True):
        top = sorted(row, reverse=True)
        best = max(z for i, z in enumerate(row) if i != right)
        assert value.item() == pytest.approx(-(row[right] - best) / (top[0] - top[2]))


@given(judged(least=4))
@settings(deadline=None)
def test_targeted_dlr_against_its_definition(case):
    logits, y = case
    target = ranking(logits, y)[:, -1]
    for row, right, t, value in zip(logits.tolist(), y.tolist(), target, targeted_dlr(logits, y, target), strict=True):
        top = sorted(row, reverse=True)
        assert value.item() == pytest.approx(-(row[right] - row[t]) / (top[0] - (top[2] + top[3]) / 2))


def test_dlr_agrees_with_pyautoattack():
    apgd = pytest.importorskip("pyautoattack.autopgd_base")
    logits, y = torch.randn(20, 10, generator=seeded()), torch.randint(10, (20,), generator=seeded(1))
    attack = apgd.APGDAttack_targeted(None, eps=0.1, norm="Linf", device="cpu")
    assert torch.allclose(dlr(logits, y), attack.dlr_loss(logits, y), atol=1e-5)
    attack.y_target = ranking(logits, y)[:, 2]
    assert torch.allclose(targeted_dlr(logits, y, attack.y_target), attack.dlr_loss_targeted(logits, y), atol=1e-5)


@pytest.mark.parametrize("c", [2, 3, 4, 10])
def test_scale_and_shift_do_not_change_the_direction_of_ascent(c):
    x, w = torch.randn(6, 5, generator=seeded()), torch.randn(5, c, generator=seeded(1))
    y = (x @ w).argmax(1)
    target = ranking(x @ w, y)[:, 0]
    for objective in (dlr, lambda logits, y: targeted_dlr(logits, y, target)):
        directions = []
        for scale, shift in ((1.0, 0.0), (1e4, 0.0), (1.0, 3.0)):
            moved = x.clone().requires_grad_()
            gradient = input_gradient(objective(scale * (moved @ w) + shift, y), moved)
            assert (gradient.norm(dim=1) > 0).all()
            directions.append(F.normalize(gradient))
        assert torch.allclose(directions[0], directions[1], atol=1e-4)
        assert torch.allclose(directions[0], directions[2], atol=1e-4)


def test_log_odds_climb_where_cross_entropy_has_no_gradient_left():
    x, w = torch.randn(6, 5, generator=seeded()), torch.randn(5, 10, generator=seeded(1))
    y = (x @ w).argmax(1)
    gradients = {}
    for name, objective in (
        ("ce", lambda z: F.cross_entropy(z, y, reduction="none")),
        ("odds", lambda z: log_odds(z, y)),
    ):
        moved = x.clone().requires_grad_()
        gradients[name] = input_gradient(objective(1e4 * (moved @ w)), moved)
    assert (gradients["ce"] == 0).all()  # the control: the plain loss is blind here
    assert (gradients["odds"].norm(dim=1) > 0).all()


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_one_logit_counts_as_two_classes(shape):
    z, y = torch.tensor([2.0, -1.0, 0.5, -3.0]), torch.tensor([1, 1, 0, 0])
    pair = torch.stack([torch.zeros(4), z], 1)
    assert classes(z.reshape(shape)).equal(pair)
    for objective in (log_odds, margin, dlr):
        assert objective(z.reshape(shape), y).equal(objective(pair, y))
    assert log_odds(z, y).tolist() == [-2.0, 1.0, 0.5, -3.0]
    assert fooled(z.reshape(shape), y).tolist() == [False, True, True, False]


def test_equal_logits_and_logits_that_are_no_number():
    logits, y = torch.zeros(1, 5), torch.tensor([0])
    assert dlr(logits, y).item() == 0
    assert targeted_dlr(logits, y, torch.tensor([1])).item() == 0
    assert fooled(torch.tensor([[math.nan, 1.0], [1.0, math.nan]]), torch.tensor([0, 0])).all()


def test_half_precision_is_widened():
    assert classes(torch.zeros(2, 3, dtype=torch.bfloat16)).dtype == torch.float32
    assert classes(torch.zeros(2, 3, dtype=torch.float64)).dtype == torch.float64


def test_logits_of_many_dimensions_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3, 4\)"):
        classes(torch.zeros(2, 3, 4))


def test_input_gradient_is_zero_where_there_is_none():
    x, w = torch.ones(2, 3, requires_grad=True), torch.ones(3, requires_grad=True)
    assert input_gradient(torch.ones(2), x).equal(torch.zeros(2, 3))
    assert input_gradient(x.detach() @ w, x).equal(torch.zeros(2, 3))
    assert input_gradient((x * torch.tensor([math.nan, 1.0, 2.0])).sum(1), x).equal(torch.tensor([[0.0, 1.0, 2.0]] * 2))
    assert w.grad is None
    assert x.grad is None
