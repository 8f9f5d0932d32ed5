"""FAB against closed forms, against pyautoattack, and against what it promises."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_guard.functional import ThreatModel
from lightning_guard.functional.attacks.balls import lengths
from lightning_guard.functional.attacks.fab import fab, shortest
from tests.functional.attacks.arena import NORMS, Linear, _radius, inputs, network, samples, seeded, standing


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bounds", [None, (0.0, 1.0)])
@pytest.mark.parametrize("one_logit", [False, True])
def test_finds_the_exact_radius_of_a_linear_model(norm, bounds, one_logit):
    model, x = Linear(one_logit=one_logit), inputs(20)
    y = (model.score(x) > 0).long()
    points = fab(model, x, y, ThreatModel(1.0, norm, bounds), steps=20)
    found = lengths(points - x, norm).numpy()
    radius = model.radius(x, norm, *(bounds or ()))
    reached = np.isfinite(radius)
    assert reached.sum() > 10
    assert ((model.score(points) > 0).long() != y).numpy()[reached].all()
    assert (found[reached] >= radius[reached] * (1 - 1e-9)).all()
    assert (found[reached] <= radius[reached] * 1.02).all()
    assert (found[~reached] == 0).all()


@st.composite
def planes(draw):
    d = draw(st.integers(1, 6))
    numbers = st.lists(st.floats(-3, 3).map(lambda v: round(v, 2)), min_size=d, max_size=d)
    room = st.lists(st.sampled_from([0.0, 0.3, 1.0, 2.0, math.inf]), min_size=d, max_size=d)
    return draw(numbers), draw(st.floats(-5, 5)), draw(room), draw(room), draw(st.sampled_from(NORMS))


@given(planes())
@settings(deadline=None, max_examples=150)
def test_shortest_step_to_a_plane_against_bisection_and_linear_programs(case):
    gradient, gap, down, up, norm = case
    rows = [torch.tensor([values], dtype=torch.float64) for values in (gradient, [-v for v in down], up)]
    step = shortest(rows[0], torch.tensor([gap], dtype=torch.float64), rows[1], rows[2], norm)[0]
    assert (step >= rows[1][0] - 1e-12).all()
    assert (step <= rows[2][0] + 1e-12).all()
    w = np.sign(gap) * np.array(gradient)
    room = np.where(w > 0, up, down)
    room = np.where(w == 0, 0.0, np.minimum(room, 1e3))
    wanted = min(abs(gap), float(np.abs(w) @ room))
    assert step @ torch.as_tensor(w) == pytest.approx(wanted, abs=1e-6)
    if wanted == abs(gap) > 1e-3 and np.abs(w[w != 0]).min(initial=1) > 0.05:
        best = _radius(np.abs(w), wanted * (1 - 1e-9), room, norm)
        assert lengths(step[None], norm).item() == pytest.approx(best, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.06), ("l2", 0.5), ("l1", 1.2)])
def test_agrees_with_pyautoattack(norm, eps):
    peer = pytest.importorskip("pyautoattack.fab_pt")
    net, (x, y) = network(), samples()
    x, y = x[:40], y[:40]
    points = fab(net, x, y, ThreatModel(eps, norm, (0.0, 1.0)), steps=20, targets=3)
    far = lengths((points - x).flatten(1), norm) > eps
    ours = standing(net, torch.where(far[:, None, None, None], x, points), y)
    attack = peer.FABAttack_PT(
        net, norm={"linf": "Linf", "l2": "L2", "l1": "L1"}[norm], n_restarts=1, n_iter=20, eps=eps, device="cpu"
    )
    attack.targeted, attack.n_target_classes = True, 3
    with torch.random.fork_rng():
        theirs = standing(net, attack.perturb(x, y), y)
    net.zero_grad()
    assert 0.1 < theirs < 0.95
    assert ours <= theirs + 0.04


@st.composite
def situations(draw):
    shape = draw(st.sampled_from([(3, 5), (2, 3, 4), (2, 3, 4, 4), (1, 1), (0, 3)]))
    mean, std = draw(st.none() | st.floats(0, 1)), draw(st.none() | st.floats(0.2, 2))
    bounds = draw(st.none() | st.just((0.0, 1.0)))
    mutable = draw(st.none() | st.lists(st.integers(0, shape[1] - 1), unique=True))
    threat = ThreatModel(0.5, draw(st.sampled_from(NORMS)), bounds, mean, std, mutable)
    raw = torch.rand(shape, generator=seeded(draw(st.integers(0, 99))), dtype=torch.float64)
    x = ((raw - (mean or 0)) / (std or 1)).to(draw(st.sampled_from([torch.float32, torch.float64])))
    c = draw(st.integers(1, 5))
    w = torch.randn(math.prod(shape[1:]), c, generator=seeded(draw(st.integers(0, 99)))).to(x)
    return threat, x, torch.randint(max(c, 2), shape[:1], generator=seeded(1)), lambda x: (3 * x.flatten(1)).sin() @ w


@given(situations())
@settings(deadline=None, max_examples=20)
def test_points_lie_within_bounds_and_fool_the_model_or_are_the_input(case):
    threat, x, y, forward = case
    kept, state = x.clone(), torch.get_rng_state()
    first, second = (fab(forward, x, y, threat, 4, restarts=2, generator=seeded()) for _ in range(2))
    assert first.equal(second)
    assert torch.get_rng_state().equal(state)
    assert x.equal(kept)
    wide = ThreatModel(1e9, threat.norm, threat.bounds, threat.mean, threat.std, threat.mutable)
    assert wide.contains(first, x, threat.rounding(x)).all()
    moved = (first != x).flatten(1).any(1)
    if moved.any():
        logits = forward(first[moved])
        answers = (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(1)
        assert (answers != y[moved]).all()


def test_more_classes_than_two_and_saturated_logits():
    net, (x, y) = network(classes=3), samples(3)
    threat = ThreatModel(1.0, "l2", (0.0, 1.0))
    plain, saturated = (fab(lambda x, s=s: s * net(x), x, y, threat, 10) for s in (1.0, 1e4))
    near, far = lengths((plain - x).flatten(1), "l2"), lengths((saturated - x).flatten(1), "l2")
    assert near.median() > 0.1
    assert torch.allclose(near, far, rtol=0.05, atol=0.02)
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_model_without_a_gradient_leaves_the_input():
    x = torch.rand(3, 4, generator=seeded())
    points = fab(lambda x: x.detach() @ torch.eye(4), x, x.argmax(1), ThreatModel(0.1), 3)
    assert points.equal(x)


@pytest.mark.parametrize(
    ("threat", "options", "match"),
    [
        (ThreatModel(1.0, integer=(0,)), {}, "no distance"),
        (ThreatModel(1.0, per="position"), {}, "no distance"),
        (ThreatModel(1.0), {"steps": 0}, "steps=0"),
        (ThreatModel(1.0), {"targets": 0}, "targets=0"),
        (ThreatModel(1.0), {"restarts": 0}, "restarts=0"),
    ],
)
def test_bad_options_are_named(threat, options, match):
    with pytest.raises(ValueError, match=match):
        fab(lambda x: x, torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), threat, **options)
