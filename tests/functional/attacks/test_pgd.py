"""Attacks against hand-written loops, closed forms and the definition of their threat model."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_guard.functional import ThreatModel, fgsm, pgd

SHAPES = [(3, 5), (2, 3, 4), (2, 3, 4, 4), (1, 1), (4, 2, 1, 3)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def per_channel(value, x):
    """``value`` as a tensor that broadcasts over ``x``, written without the code under test."""
    value = torch.as_tensor(value, dtype=torch.float64)
    return value if value.dim() == 0 else value.view(1, -1, *[1] * (x.dim() - 2))


def wavy(x):
    """A loss ``(N,)`` that is neither convex nor monotone."""
    flat = x.flatten(1)
    weights = torch.linspace(-2, 2, flat.shape[1], dtype=x.dtype)
    return (3 * flat * weights).sin().sum(1) + flat.square().sum(1)


@st.composite
def situations(draw):
    shape = draw(st.sampled_from(SHAPES))
    channels = shape[1]
    one_or_each = st.one_of(st.floats(0.1, 3.0), st.lists(st.floats(0.1, 3.0), min_size=channels, max_size=channels))
    mean, std = draw(st.none() | one_or_each), draw(st.none() | one_or_each)
    bounds = draw(st.none() | st.sampled_from([(0.0, 1.0), (-1.0, 2.0), (0.0, 255.0)]))
    mutable = draw(st.none() | st.lists(st.integers(0, channels - 1), unique=True))
    eps = draw(st.floats(0, 2.0)) * (20 if bounds == (0.0, 255.0) else 1)
    threat = ThreatModel(eps, draw(st.sampled_from(["linf", "l2"])), bounds, mean, std, mutable)
    low, high = bounds or (-2.0, 2.0)
    raw = low + (high - low) * torch.rand(shape, generator=seeded(draw(st.integers(0, 99))), dtype=torch.float64)
    raw[0] = draw(st.sampled_from([low, high]))  # where the bounds bite
    x = (raw - per_channel(mean or 0.0, raw)) / per_channel(std or 1.0, raw)
    return threat, x.to(draw(st.sampled_from([torch.float32, torch.float64])))


def assert_inside(threat, moved, x):
    """The definition, in float64 and in the user's units."""
    moved, was = moved.double(), x.double()
    mean, std = per_channel(threat.mean or 0.0, was), per_channel(threat.std or 1.0, was)
    rounding = 1e-5 * (1 + (was * std).abs().max().item()) if x.dtype == torch.float32 else 1e-9
    delta = ((moved - was) * std).flatten(1)
    length = delta.abs().amax(1) if threat.norm == "linf" else delta.norm(dim=1)
    assert (length <= threat.eps + rounding).all()
    if threat.bounds is not None:
        raw = moved * std + mean
        assert (raw >= threat.bounds[0] - rounding).all()
        assert (raw <= threat.bounds[1] + rounding).all()
    if threat.mutable is not None:
        fixed = [c for c in range(x.shape[1]) if c not in threat.mutable]
        assert torch.equal(moved[:, fixed], was[:, fixed])


@settings(max_examples=120, deadline=None)
@given(situations(), st.integers(0, 4), st.booleans(), st.none() | st.floats(0.01, 5.0))
def test_results_lie_inside_the_threat_model(situation, steps, random_start, step_size):
    threat, x = situation
    threat.check(x)
    moved = pgd(wavy, x, threat, steps, step_size, random_start, seeded())
    assert moved.shape == x.shape
    assert moved.dtype == x.dtype
    assert not moved.requires_grad
    assert_inside(threat, moved, x)
    assert threat.contains(moved, x, 1e-5 * (1 + threat.eps + 255)).all()
    assert_inside(threat, threat.draw(x, seeded()), x)
    far = x + 100 * torch.randn(x.shape, generator=seeded(), dtype=x.dtype)
    assert_inside(threat, threat.project(far, x), x)


@settings(max_examples=60, deadline=None)
@given(situations())
def test_contains_says_no_to_what_is_outside(situation):
    threat, x = situation
    std = per_channel(threat.std or 1.0, x).to(x)
    moved = x + (1.5 * threat.eps + 0.1) * std.reciprocal()  # every feature too far
    assert not threat.contains(moved, x).any()
    if threat.bounds is not None:
        wide = ThreatModel(1e6, threat.norm, threat.bounds, threat.mean, threat.std)
        assert not wide.contains(x + 1e4, x).any()
    if threat.mutable == []:
        assert threat.contains(x, x).all()
        assert not threat.contains(x + 1e-4, x).any()


@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("normalised", [False, True])
def test_linf_is_bit_equal_to_a_loop_by_hand(random_start, normalised):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, 5))
    raw, y = torch.rand(6, 3, 5, 5), torch.randint(5, (6,))
    mean, std = (
        torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1),
        torch.tensor([0.2, 0.3, 0.25]).view(1, 3, 1, 1),
    )
    mean, std = (mean, std) if normalised else (torch.zeros(()), torch.ones(()))
    x, eps, steps = (raw - mean) / std, 8 / 255, 4
    loss = nn.CrossEntropyLoss(reduction="sum")

    scale = 1 / std
    low, high = torch.maximum(x - eps * scale, -mean / std), torch.minimum(x + eps * scale, (1 - mean) / std)
    moved = x
    if random_start:
        noise = torch.rand(x.shape, generator=seeded()) * 2 - 1
        moved = torch.minimum(torch.maximum(x + noise * (eps * scale), low), high)
    for _ in range(steps):
        moved = moved.clone().requires_grad_()
        loss(net(moved), y).backward()
        moved = moved.detach() + moved.grad.sign() * (2.5 * eps / steps * scale)
        moved = torch.minimum(torch.maximum(moved, low), high)

    args = ([0.4, 0.5, 0.6], [0.2, 0.3, 0.25]) if normalised else (None, None)
    threat = ThreatModel(eps, "linf", (0.0, 1.0), *args)
    net.zero_grad()
    found = pgd(lambda x: loss(net(x), y), x, threat, steps, 2.5 * eps / steps, random_start, seeded())
    assert torch.equal(found, moved)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("random_start", [False, True])
def test_normalised_inputs_are_attacked_as_their_raw_values(norm, random_start):
    raw = torch.rand(4, 3, 3, 3, generator=seeded(), dtype=torch.float64)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.25])

    def normalise(r):
        return (r - per_channel(mean, r)) / per_channel(std, r)

    options = {"steps": 5, "random_start": random_start}
    inside = pgd(wavy, normalise(raw), ThreatModel(0.3, norm, (0.0, 1.0), mean.tolist(), std.tolist()),
                 generator=seeded(), **options)  # fmt: skip
    before = pgd(lambda r: wavy(normalise(r)), raw, ThreatModel(0.3, norm, (0.0, 1.0)), generator=seeded(), **options)
    torch.testing.assert_close(inside, normalise(before), rtol=0, atol=1e-6)  # mean and std are float32


@pytest.mark.parametrize("gradient", [1.0, 1e-12, 1e-25, 1e-35])
def test_an_l2_step_has_the_stated_length(gradient):
    x = torch.randn(5, 3, 4, generator=seeded())
    std = per_channel([0.5, 2.0, 3.0], x).float()
    threat = ThreatModel(10.0, "l2", std=[0.5, 2.0, 3.0])
    moved = pgd(lambda x: (gradient * x.flatten(1) * torch.linspace(1, 2, 12)).sum(1), x, threat, 1, 0.1, False)
    torch.testing.assert_close(((moved - x) * std).flatten(1).norm(dim=1), torch.full((5,), 0.1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_zero_gradient_leaves_its_example_alone(norm, dtype):
    x = torch.rand(3, 4, generator=seeded()).to(dtype)
    moved = pgd(lambda x: x.sum(1) * torch.tensor([0.0, 1.0, 0.0]), x, ThreatModel(0.5, norm), 3, random_start=False)
    assert torch.equal(moved[[0, 2]], x[[0, 2]])
    assert (moved[1] != x[1]).all()


def test_without_radius_the_loss_is_not_called():
    x = torch.rand(3, 4)

    def loss(_):
        raise AssertionError

    assert torch.equal(pgd(loss, x, ThreatModel(0.0)), x)
    assert pgd(loss, x[:0], ThreatModel(1.0)).shape == (0, 4)


def test_without_steps_there_is_only_the_start():
    x = torch.rand(3, 4)
    assert torch.equal(pgd(wavy, x, ThreatModel(0.1), 0, random_start=False), x)
    assert torch.equal(pgd(wavy, x, ThreatModel(0.1), 0, generator=seeded()), ThreatModel(0.1).draw(x, seeded()))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_loss_rises_on_a_convex_problem(norm):
    x, center = torch.randn(8, 6, generator=seeded()), torch.randn(6, generator=seeded(1))

    def loss(x):
        return (x - center).square().sum(1)

    last = loss(x)
    for steps in range(1, 5):  # fixed steps, so that each is one further
        now = loss(pgd(loss, x, ThreatModel(1.0, norm), steps, 0.2, random_start=False))
        assert (now > last).all()
        last = now


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_linear_model_has_a_known_worst_case(norm):
    weights, x = torch.randn(7, generator=seeded()), torch.randn(5, 7, generator=seeded(1))
    eps = 0.3
    worst = eps * weights.sign() if norm == "linf" else eps * weights / weights.norm()
    for random_start in (False, True):
        moved = pgd(lambda x: x @ weights, x, ThreatModel(eps, norm), 100, eps, random_start, seeded())
        torch.testing.assert_close(moved, x + worst, rtol=0, atol=1e-5)
    x = x.clamp(-0.5, 0.5)
    moved = pgd(lambda x: x @ weights, x, ThreatModel(eps, "linf", (-0.5, 0.5)), 20)
    torch.testing.assert_close(moved, (x + eps * weights.sign()).clamp(-0.5, 0.5))


def test_a_single_step_has_its_own_length():
    x = torch.rand(3, 4)
    torch.testing.assert_close(fgsm(lambda x: x.sum(1), x, ThreatModel(0.1), random_start=False), x + 0.1)
    start = ThreatModel(0.1).draw(x, seeded())
    moved = fgsm(lambda x: x.sum(1), x, ThreatModel(0.1), generator=seeded())
    torch.testing.assert_close(moved, torch.minimum(start + 0.125, x + 0.1))


def test_no_gradient_of_a_parameter_is_touched():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    net[0].weight.grad = torch.full_like(net[0].weight, 7.0)
    x = torch.rand(3, 4, requires_grad=True)
    pgd(lambda x: net(x).sum(1), x, ThreatModel(0.1), 2)
    assert x.grad is None
    assert net[2].weight.grad is None
    assert (net[0].weight.grad == 7).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_inputs_made_in_inference_mode_work_once_cloned(norm):
    net = nn.Linear(4, 1)
    with torch.inference_mode():
        x = torch.rand(3, 4)
        with torch.inference_mode(False):
            moved = pgd(lambda x: net(x)[:, 0], x.clone(), ThreatModel(0.1, norm), 2, random_start=False)
    assert (moved != x).any(1).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_each_example_is_attacked_by_itself(norm):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    x = torch.rand(5, 6)
    other = x.clone()
    other[2] = torch.rand(6)
    one, two = (pgd(lambda x: net(x)[:, 0], x, ThreatModel(0.2, norm), 4, generator=seeded()) for x in (x, other))
    rest = [0, 1, 3, 4]
    assert torch.equal(one[rest], two[rest])
    assert not torch.equal(one[2], two[2])


def test_the_random_start_is_the_generators_and_moves_no_other():
    state, x = torch.get_rng_state(), torch.rand(3, 4, generator=seeded())
    one, two, three = (ThreatModel(0.1).draw(x, seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, three)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_random_start_is_uniform_in_the_ball(norm):
    d, x = 3, torch.zeros(20_000, 3)
    moved = ThreatModel(2.0, norm, std=0.5).draw(x, seeded()) * 0.5
    length = moved.abs().amax(1) if norm == "linf" else moved.norm(dim=1)
    for part in (0.3, 0.6, 0.9):  # the volume within a part of the radius
        assert (length <= 2.0 * part).float().mean().item() == pytest.approx(part**d, abs=0.015)
    assert moved.mean(0).abs().max() < 0.04


def test_an_input_beyond_its_bound_by_rounding_is_not_pulled_back():
    """Pulled back, an immutable feature would have moved, and a small radius would be left."""
    x = torch.tensor([[1.0 + 1e-5, 0.5]])
    for norm in ("linf", "l2"):
        threat = ThreatModel(1e-6, norm, (0.0, 1.0), mutable=[1])
        threat.check(x)
        moved = pgd(lambda x: x.sum(1), x, threat, 3)
        assert moved[0, 0] == x[0, 0]
        assert threat.contains(moved, x, 1e-7).all()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"eps": -1.0}, "eps=-1.0"),
        ({"eps": math.inf}, "eps=inf"),
        ({"eps": math.nan}, "eps=nan"),
        ({"eps": 1.0, "norm": "l1"}, "norm='l1'"),
        ({"eps": 1.0, "bounds": (1.0, 0.0)}, r"bounds=\(1.0, 0.0\)"),
        ({"eps": 1.0, "std": 0.0}, "std=0.0"),
        ({"eps": 1.0, "std": [1.0, -1.0]}, "std="),
    ],
)
def test_what_describes_no_threat_is_refused_by_name(options, named):
    with pytest.raises(ValueError, match=named):
        ThreatModel(**options)


def test_what_fits_no_input_is_refused_by_name():
    with pytest.raises(ValueError, match=r"range over \[-0.5, 2\].*outside bounds=\(0.0, 1.0\)"):
        ThreatModel(0.1, bounds=(0.0, 1.0)).check(torch.tensor([[-0.5, 2.0]]))
    with pytest.raises(ValueError, match="after normalisation"):
        ThreatModel(0.1, bounds=(0.0, 1.0), std=0.5).check(torch.tensor([[3.0]]))
    with pytest.raises(ValueError, match="outside bounds"):
        ThreatModel(0.1, bounds=(0.0, 1.0)).check(torch.tensor([[math.nan]]))
    with pytest.raises(ValueError, match="2 values of mean or std"):
        ThreatModel(0.1, std=[1.0, 2.0]).scale(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="steps=-1"):
        pgd(wavy, torch.rand(1, 2), ThreatModel(0.1), -1)
    ThreatModel(0.1).check(torch.tensor([[1e9]]))  # open bounds hold everything
