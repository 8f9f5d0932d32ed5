"""Auto-PGD against closed forms, against pyautoattack, and against what it promises."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_guard.functional import ThreatModel
from lightning_guard.functional.attacks.apgd import _checkpoints, apgd, apgd_pair
from tests.functional.attacks.arena import (
    NORMS,
    Linear,
    Watched,
    digits,
    inputs,
    network,
    samples,
    seeded,
    standing,
)

OBJECTIVES = ["ce", "dlr", "targeted"]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bounds", [None, (0.0, 1.0)])
def test_finds_the_exact_radius_of_a_linear_model(objective, norm, bounds):
    model, x = Linear(one_logit=bounds is None), inputs(40)
    y = (model.score(x) > 0).long()
    radius = torch.as_tensor(model.radius(x, norm, *(bounds or ())))
    threat = ThreatModel(radius.median().item() * 1.001, norm, bounds)
    moved = apgd(model, x, y, threat, 40, objective, generator=seeded())
    assert threat.contains(moved, x, 1e-9).all()
    fell = (model.score(moved) > 0).long() != y
    assert fell[radius < 0.97 * threat.eps].all()
    assert not fell[radius > threat.eps].any()
    assert 10 < fell.sum() < 30


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.06), ("l2", 0.5)])
@pytest.mark.parametrize("robust", [False, True])
def test_agrees_with_pyautoattack(norm, eps, robust):
    peer = pytest.importorskip("pyautoattack.autopgd_base")
    net, (x, y) = network(eps * robust, norm), samples()
    threat, kind = ThreatModel(eps, norm, (0.0, 1.0)), {"linf": "Linf", "l2": "L2"}[norm]
    with torch.random.fork_rng():
        for objective in OBJECTIVES:
            ours = standing(net, apgd(net, x, y, threat, 25, objective, targets=3, generator=seeded()), y)
            if objective == "targeted":
                attack = peer.APGDAttack_targeted(net, 25, kind, eps=eps, n_target_classes=3, device="cpu")
            else:
                attack = peer.APGDAttack(net, 25, kind, eps=eps, loss=objective, device="cpu")
            theirs = standing(net, attack.perturb(x, y), y)
            assert 0.1 < theirs < 0.95  # neither can be right by chance
            assert ours <= theirs + 0.035  # two of 60


def test_agrees_with_pyautoattack_in_l1():
    peer = pytest.importorskip("pyautoattack.autopgd_base")
    net, (x, y) = network(), samples()
    threat = ThreatModel(1.2, "l1", (0.0, 1.0))
    ours = standing(net, apgd(net, x, y, threat, 60, generator=seeded()), y)
    with torch.random.fork_rng():
        attack = peer.APGDAttack(net, 60, "L1", eps=1.2, use_largereps=True, device="cpu")
        theirs = standing(net, attack.perturb(x, y), y)
    assert 0.1 < theirs < 0.95
    assert ours <= theirs + 0.035  # two of 60


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_saturated_logits_hide_nothing(norm, objective):
    net, (x, y) = network(), samples()
    threat = ThreatModel({"linf": 0.06, "l2": 0.5, "l1": 1.2}[norm], norm, (0.0, 1.0))
    attack = partial(apgd, x=x, y=y, threat=threat, steps=20, objective=objective, targets=2)
    plain = standing(net, attack(net, generator=seeded()), y)
    saturated = standing(net, attack(lambda x: 1e4 * net(x), generator=seeded()), y)
    assert plain < 0.9
    assert saturated <= plain + 0.1  # at that scale the cross-entropy is the margin, which climbs another way


@pytest.mark.parametrize("c", [2, 3, 4])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_few_classes(c, objective):
    net, (x, y) = network(classes=c), samples(c)
    threat = ThreatModel(0.2, bounds=(0.0, 1.0))
    moved = apgd(net, x, y, threat, 20, objective, generator=seeded())
    assert threat.contains(moved, x).all()
    assert standing(net, moved, y) < standing(net, x, y) - 0.2


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.06), ("l2", 0.5)])
def test_the_pair_is_as_strong_as_its_long_form(norm, eps):
    net, (x, y) = network(eps, norm), samples()
    threat, seen = ThreatModel(eps, norm, (0.0, 1.0)), [0, 0]

    def counting(x, which):
        seen[which] += len(x)
        return net(x)

    pair = apgd_pair(partial(counting, which=0), x, y, threat, generator=seeded())
    long = apgd(partial(counting, which=1), x, y, threat, 50, generator=seeded())
    stood = net(long).argmax(1) == y
    rest = apgd(partial(counting, which=1), x[stood], y[stood], threat, 50, "targeted", generator=seeded())
    assert threat.contains(pair, x, threat.rounding(x)).all()
    assert 0.2 < standing(net, pair, y) <= (net(rest).argmax(1) == y[stood]).sum() / len(x) + 0.01
    assert seen[0] < 0.6 * seen[1]


@st.composite
def battles(draw):
    shape = draw(st.sampled_from([(3, 5), (2, 3, 4), (2, 3, 4, 4), (1, 1), (0, 3)]))
    channels = shape[1]
    one_or_each = st.one_of(st.floats(0.1, 3.0), st.lists(st.floats(0.1, 3.0), min_size=channels, max_size=channels))
    mean, std = draw(st.none() | one_or_each), draw(st.none() | one_or_each)
    bounds = draw(st.none() | st.sampled_from([(0.0, 1.0), (-1.0, 2.0)]))
    mutable = draw(st.none() | st.lists(st.integers(0, channels - 1), unique=True))
    threat = ThreatModel(draw(st.floats(0, 2)), draw(st.sampled_from(NORMS)), bounds, mean, std, mutable)
    low, high = bounds or (-2.0, 2.0)
    raw = low + (high - low) * torch.rand(shape, generator=seeded(draw(st.integers(0, 99))), dtype=torch.float64)

    def spread(values):
        values = torch.as_tensor(values, dtype=torch.float64)
        return values if values.dim() == 0 else values.view(1, -1, *[1] * (len(shape) - 2))

    x = ((raw - spread(mean or 0.0)) / spread(std or 1.0)).to(draw(st.sampled_from([torch.float32, torch.float64])))
    c = draw(st.integers(1, 5))
    w = torch.randn(math.prod(shape[1:]), c, generator=seeded(draw(st.integers(0, 99)))).to(x)
    y = torch.randint(max(c, 2), shape[:1], generator=seeded(1))
    return threat, x, y, lambda x: (3 * x.flatten(1)).sin() @ w


@given(battles(), st.sampled_from(OBJECTIVES))
@settings(deadline=None, max_examples=30)
def test_stays_inside_any_threat_model(case, objective):
    threat, x, y, forward = case
    kept = x.clone()
    moved = apgd(forward, x, y, threat, 6, objective, restarts=2, generator=seeded())
    assert threat.contains(moved, x, threat.rounding(x)).all()
    pair = apgd_pair(forward, x, y, threat, 6, generator=seeded())
    assert threat.contains(pair, x, threat.rounding(x)).all()
    assert moved.shape == x.shape
    assert moved.dtype == x.dtype
    assert not moved.requires_grad
    assert x.equal(kept)


@given(battles(), st.sampled_from(OBJECTIVES))
@settings(deadline=None, max_examples=10)
def test_same_generator_same_points_and_no_other_randomness(case, objective):
    threat, x, y, forward = case
    state = torch.get_rng_state()
    first, second = (apgd(forward, x, y, threat, 5, objective, generator=seeded(3)) for _ in range(2))
    assert first.equal(second)
    assert torch.get_rng_state().equal(state)


def test_parameters_get_no_gradient():
    net, (x, y) = network(), samples()
    apgd(net, x[:5], y[:5], ThreatModel(0.05), 3, "targeted", generator=seeded())
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_is_fooled_is_never_shown_again(objective):
    net, (x, y) = network(), samples()
    x = x.clone()
    x[:, 0, 0, 0] = torch.arange(len(x)) / 1000  # stays, because only other columns may move
    threat = ThreatModel(0.3, bounds=(0.0, 1.0), mutable=(1,))

    def columns(x):  # (N, 64) -> two channels: the mark, and the rest
        return torch.stack([x.flatten(1)[:, :1].expand(-1, 63), x.flatten(1)[:, 1:]], 1)

    watched = Watched(lambda x: net(torch.cat([x[:, 0, :1], x[:, 1]], 1).reshape(-1, 1, 8, 8)), y)
    moved = apgd(watched, columns(x), y, threat, 20, objective, generator=seeded())
    assert watched.wrong  # the control: some fell
    assert not watched.again
    assert standing(watched.model, moved, y) == 1 - len(watched.wrong) / len(x)


def test_without_success_the_highest_objective_is_kept():
    model, x = Linear(), inputs(4)
    y = (model.score(x) > 0).long()
    radius = torch.as_tensor(model.radius(x, "linf"))
    threat = ThreatModel(0.5 * radius.min().item())
    moved = apgd(model, x, y, threat, 20, restarts=2, generator=seeded())
    best = x - threat.eps * torch.sign(model.score(x))[:, None] * model.w.sign()
    assert torch.allclose(moved, best)


class Detached(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(3, 4))

    def forward(self, x):
        return x.detach() @ self.w


def test_half_precision_inputs():
    net, (x, y) = network(), samples()
    x, threat = x[:20].bfloat16(), ThreatModel(0.1, bounds=(0.0, 1.0))
    moved = apgd_pair(lambda x: net(x.float()), x, y[:20], threat, 10, generator=seeded())
    assert moved.dtype == torch.bfloat16
    assert threat.contains(moved, x, threat.rounding(x)).all()
    assert standing(lambda x: net(x.float()), moved, y[:20]) < 0.7


@pytest.mark.parametrize("forward", [Detached(), lambda x: x.detach() @ torch.eye(3), lambda x: x.round()])
def test_models_without_a_gradient_raise_nothing(forward):
    x, threat = torch.rand(4, 3, generator=seeded()), ThreatModel(0.1)
    moved = apgd(forward, x, torch.zeros(4, dtype=torch.long), threat, 3, "targeted", generator=seeded())
    assert threat.contains(moved, x).all()


def test_a_gradient_that_is_no_number_does_not_spoil_the_others():
    def forward(x):
        first = torch.where(x[:, :1] > 9, x[:, :1].sqrt(), 0 * (x[:, :1] * 0).sqrt())  # NaN backwards
        return torch.cat([x[:, 1:2] + first, torch.full_like(x[:, :1], 0.5)], 1)

    x, y = torch.tensor([[0.2, 0.6]]), torch.tensor([0])
    with torch.enable_grad():
        probe = x.clone().requires_grad_()
        assert torch.autograd.grad(forward(probe)[:, 0].sum(), probe)[0].isnan().any()  # the control
    moved = apgd(forward, x, y, ThreatModel(0.2), 10, generator=seeded())
    assert moved[0, 1] < 0.5


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_whole_numbers_are_climbed_in_between_and_judged_where_they_are_whole(objective):
    threat = ThreatModel(2.6, integer=(0, 1), bounds=(0.0, 9.0))
    x = torch.tensor([[4.0, 4.0, 0.5], [4.0, 4.0, 0.5]])

    def forward(x):
        score = x[:, 0] + x[:, 1]
        return torch.stack([torch.zeros_like(score), score - torch.tensor([11.5, 12.5])[: len(x)].to(x)], 1)

    for row, falls in ((0, True), (1, False)):  # 12 is within reach of whole numbers, 13 only of others

        def judged(x, row=row):
            return forward(x) if row == 0 else forward(torch.cat([x, x]))[len(x) :]

        moved = apgd(judged, x[row : row + 1], torch.tensor([0]), threat, 20, objective, generator=seeded())
        assert threat.contains(moved, x[row : row + 1]).all()
        assert moved[:, :2].equal(moved[:, :2].round())
        assert (judged(moved).argmax(1) == 1).item() is falls


def test_more_steps_and_restarts_do_not_find_less():
    net, (x, y) = network(0.1), samples()
    threat = ThreatModel(0.1, bounds=(0.0, 1.0))
    left = [
        standing(net, apgd(net, x, y, threat, steps, restarts=restarts, generator=seeded()), y)
        for steps, restarts in ((1, 1), (10, 1), (50, 1), (50, 3))
    ]
    assert left[-1] < standing(net, x, y)
    assert left[0] >= left[-1]
    assert all(later <= earlier + 0.01 for earlier, later in pairwise(left))


def test_checkpoints_are_those_of_the_paper():
    """Section 3 of Croce & Hein (2020): p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06)."""
    p = [0.0, 0.22]
    while p[-1] < 1:
        p.append(p[-1] + max(p[-1] - p[-2] - 0.03, 0.06))
    assert sorted(_checkpoints(100)) == [math.ceil(round(100 * share, 6)) for share in p[1:] if share <= 1]


def test_at_eps_zero_the_model_is_not_asked():
    def refuse(x):
        raise AssertionError

    x, y = digits()[0][:3], digits()[1][:3]
    assert apgd(refuse, x, y, ThreatModel(0.0)).equal(x)


@pytest.mark.parametrize(
    ("options", "match"),
    [({"objective": "cw"}, "objective='cw'"), ({"steps": 0}, "steps=0"), ({"restarts": 0}, "restarts=0"),
     ({"targets": 0}, "targets=0")],
)  # fmt: skip
def test_bad_options_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        apgd(lambda x: x, torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), ThreatModel(0.1), **options)
