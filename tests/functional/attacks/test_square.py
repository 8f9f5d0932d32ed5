"""Square against closed forms, against pyautoattack, and against what it promises."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_guard.functional import ThreatModel
from lightning_guard.functional.attacks.square import _pyramid, square
from tests.functional.attacks.arena import NORMS, Linear, Watched, inputs, network, samples, seeded, standing
from tests.functional.attacks.test_apgd import battles


@pytest.mark.parametrize(("norm", "slack"), [("linf", 1.001), ("l2", 1.3), ("l1", 1.1)])
@pytest.mark.parametrize("bounds", [None, (0.0, 1.0)])
def test_comes_close_to_the_exact_radius_of_a_linear_model(norm, slack, bounds):
    model, x = Linear(6, one_logit=bounds is None), inputs(30, 6)
    y = (model.score(x) > 0).long()
    radius = torch.as_tensor(model.radius(x, norm, *(bounds or ())))
    threat = ThreatModel(radius.median().item() * 1.05, norm, bounds)
    moved = square(model, x, y, threat, 300, generator=seeded())
    assert threat.contains(moved, x, 1e-9).all()
    fell = (model.score(moved) > 0).long() != y
    assert (radius < threat.eps / slack).sum() > 2
    assert fell[radius < threat.eps / slack].all()
    assert not fell[radius > threat.eps].any()


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.08), ("l2", 0.7), ("l1", 3.0)])
def test_agrees_with_pyautoattack(norm, eps):
    peer = pytest.importorskip("pyautoattack.square")
    net, (x, y) = network(), samples()
    moved = square(net, x, y, ThreatModel(eps, norm, (0.0, 1.0)), 100, generator=seeded())
    attack = peer.SquareAttack(
        net, {"linf": "Linf", "l2": "L2", "l1": "L1"}[norm], 100, eps, seed=0, device="cpu", resc_schedule=True
    )
    with torch.random.fork_rng(), torch.no_grad():
        theirs = standing(net, attack.perturb(x, y), y)
    assert theirs < 0.95
    assert standing(net, moved, y) <= theirs + 0.07


@given(battles())
@settings(deadline=None, max_examples=30)
def test_stays_inside_any_threat_model_and_repeats(case):
    threat, x, y, forward = case
    kept, state = x.clone(), torch.get_rng_state()
    moved, again = (square(forward, x, y, threat, 6, generator=seeded()) for _ in range(2))
    assert threat.contains(moved, x, threat.rounding(x)).all()
    assert (moved.shape, moved.dtype) == (x.shape, x.dtype)
    assert moved.equal(again)
    assert x.equal(kept)
    assert torch.get_rng_state().equal(state)


def test_gradients_are_not_needed():
    net, (x, y) = network(), samples()
    threat = ThreatModel(0.1, bounds=(0.0, 1.0))

    def masked(x):
        assert not torch.is_grad_enabled()
        return net((x * 64).round() / 64)

    assert standing(masked_free := (lambda x: net((x * 64).round() / 64)), x, y) > 0.9
    moved = square(masked, x, y, threat, 200, generator=seeded())
    assert standing(masked_free, moved, y) < 0.7


@pytest.mark.parametrize("c", [2, 3])
def test_few_classes_and_saturated_logits(c):
    net, (x, y) = network(classes=c), samples(c)
    threat = ThreatModel(0.25, bounds=(0.0, 1.0))
    left = [standing(net, square(lambda x, s=s: s * net(x), x, y, threat, 60, generator=seeded()), y) for s in (1, 1e4)]
    assert left[0] < standing(net, x, y) - 0.1
    assert abs(left[0] - left[1]) <= 0.1


def test_what_is_fooled_is_never_shown_again():
    net, (x, y) = network(), samples()
    marked = torch.stack([(torch.arange(len(x)) / 1000)[:, None].expand(-1, 64), x.flatten(1)], 1)
    watched = Watched(lambda x: net(x[:, 1].reshape(-1, 1, 8, 8)), y)
    moved = square(watched, marked, y, ThreatModel(0.2, bounds=(0.0, 1.0), mutable=(1,)), 60, generator=seeded())
    assert watched.wrong  # the control: some fell
    assert not watched.again
    assert standing(watched.model, moved, y) == 1 - len(watched.wrong) / len(x)


def test_whole_numbers_stay_whole():
    threat = ThreatModel(2.6, integer=(0, 1), bounds=(0.0, 9.0))
    x = torch.tensor([[4.0, 4.0, 0.5]])

    def forward(x):
        score = x[:, 0] + x[:, 1] - 11.5
        return torch.stack([torch.zeros_like(score), score], 1)

    moved = square(forward, x, torch.tensor([0]), threat, 100, generator=seeded())
    assert threat.contains(moved, x).all()
    assert forward(moved).argmax(1).item() == 1


def test_without_success_the_highest_margin_is_kept():
    model, x = Linear(4), inputs(10, 4)
    y = (model.score(x) > 0).long()
    threat = ThreatModel(0.5 * model.radius(x, "linf").min())
    moved = square(model, x, y, threat, 100, generator=seeded())
    assert torch.allclose(moved, x - threat.eps * torch.sign(model.score(x))[:, None] * model.w.sign())


@given(st.integers(1, 9), st.integers(1, 9))
def test_pyramid_against_its_definition(rows, columns):
    pyramid = _pyramid(rows, columns)
    last = max(rows, columns) // 2
    for r in range(rows):
        for c in range(columns):
            distance = max(abs(r - rows // 2), abs(c - columns // 2))
            expected = math.fsum(1 / (k + 1) ** 2 for k in range(distance, last + 1))
            assert pyramid[r, c].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("options", "match"), [({"queries": 0}, "queries=0"), ({"share": 0.0}, "share=0.0")])
def test_bad_options_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        square(lambda x: x, torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), ThreatModel(0.1), **options)


@pytest.mark.parametrize("norm", NORMS)
def test_sequences_have_windows_too(norm):
    x = torch.rand(6, 5, 4, generator=seeded(), dtype=torch.float64)
    model = Linear(20)
    y = (model.score(x) > 0).long()
    threat = ThreatModel(2 * float(model.radius(x, norm).max()), norm)
    moved = square(model, x, y, threat, 200, generator=seeded())
    assert standing(model, moved, y) == 0


@pytest.mark.parametrize("norm", NORMS)
def test_each_position_may_have_a_ball_of_its_own(norm):
    x = torch.rand(20, 5, 4, generator=seeded(), dtype=torch.float64)
    model = Linear(20)
    y = (model.score(x) > 0).long()
    radius = torch.as_tensor(model.radius(x, norm))
    threat = ThreatModel(0.8 * float(radius.max()), norm, per="position")
    moved = square(model, x, y, threat, 300, generator=seeded())
    assert threat.contains(moved, x, 1e-9).all()
    assert ((model.score(moved) > 0).long() != y)[radius < 0.6 * threat.eps].all()
    if norm != "linf":  # more than one ball for the whole example could do
        assert ((model.score(moved) > 0).long() != y)[radius > 1.05 * threat.eps].any()
