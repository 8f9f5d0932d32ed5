"""Attacks against hand-written loops, closed forms and the definition of their threat model."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_guard.functional import ThreatModel, fgsm, n_fgsm, n_fgsm_threat, pgd

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
    length = delta.norm({"linf": math.inf, "l2": 2, "l1": 1}[threat.norm], dim=1)
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
    if threat.mutable == ():
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


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
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


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_inputs_made_in_inference_mode_work_once_cloned(norm):
    net = nn.Linear(4, 1)
    with torch.inference_mode():
        x = torch.rand(3, 4)
        with torch.inference_mode(False):
            moved = pgd(lambda x: net(x)[:, 0], x.clone(), ThreatModel(0.1, norm), 2, random_start=False)
    assert (moved != x).any(1).all()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
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


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_random_start_is_uniform_in_the_ball(norm):
    d, x = 3, torch.zeros(20_000, 3)
    moved = ThreatModel(2.0, norm, std=0.5).draw(x, seeded()) * 0.5
    length = moved.norm({"linf": math.inf, "l2": 2, "l1": 1}[norm], dim=1)
    for part in (0.3, 0.6, 0.9):  # the volume within a part of the radius
        assert (length <= 2.0 * part).float().mean().item() == pytest.approx(part**d, abs=0.015)
    assert moved.mean(0).abs().max() < 0.04


def test_an_input_beyond_its_bound_by_rounding_is_not_pulled_back():
    """Pulled back, an immutable feature would have moved, and a small radius would be left."""
    x = torch.tensor([[1.0 + 1e-5, 0.5]])
    for norm in ("linf", "l2", "l1"):
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
        ({"eps": 1.0, "norm": "l0"}, "norm='l0'"),
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
    with pytest.raises(ValueError, match="2 values of std"):
        ThreatModel(0.1, std=[1.0, 2.0]).scale(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="steps=-1"):
        pgd(wavy, torch.rand(1, 2), ThreatModel(0.1), -1)
    ThreatModel(0.1).check(torch.tensor([[1e9]]))  # open bounds hold everything


def l2_by_hand(loss, x, eps, low, high, std, steps, step_size, start):
    """Madry's loop in the Euclidean norm, as it stood before there were other norms."""
    scale = 1 / std
    moved = start
    for _ in range(steps):
        moved = moved.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(moved).sum(), moved)
        flat = (gradient * scale).flatten(1)
        flat = flat / flat.abs().amax(1, keepdim=True).clamp_min(1e-38)
        unit = (flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-38)).reshape(x.shape)
        moved = moved.detach() + unit * (step_size * scale)
        delta = (moved - x) / scale
        factor = (eps / delta.flatten(1).norm(dim=1).clamp_min(1e-30)).clamp_max(1).reshape(-1, 1, 1, 1)
        moved = x + delta * factor * scale
        moved = torch.minimum(torch.maximum(moved, torch.minimum(low, x)), torch.maximum(high, x))
    return moved.detach()


@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("normalised", [False, True])
def test_l2_is_bit_equal_to_a_loop_by_hand(random_start, normalised):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, 5))
    raw, y = torch.rand(6, 3, 5, 5), torch.randint(5, (6,))
    args = ([0.4, 0.5, 0.6], [0.2, 0.3, 0.25]) if normalised else (None, None)
    mean, std = (torch.tensor(values or 0.0 + i).reshape(1, -1, 1, 1) for i, values in enumerate(args))
    x, threat = (raw - mean) / std, ThreatModel(0.5, "l2", (0.0, 1.0), *args)

    def loss(z):
        return nn.functional.cross_entropy(net(z), y, reduction="none")

    start = threat.draw(x, seeded()) if random_start else x
    wanted = l2_by_hand(loss, x, 0.5, (0.0 - mean) / std, (1.0 - mean) / std, std, 4, 0.3, start)
    assert torch.equal(pgd(loss, x, threat, 4, 0.3, random_start, seeded()), wanted)


def worst_l1(weights, x, eps):
    """The highest a linear function gets within the L1 ball and [0, 1]: the steepest entries first, to their bound."""
    best = []
    for row in x.tolist():
        left, value = eps, sum(w * v for w, v in zip(weights.tolist(), row, strict=True))
        for w, v in sorted(zip(weights.tolist(), row, strict=True), key=lambda pair: -abs(pair[0])):
            way = min(left, 1 - v if w > 0 else v)
            left, value = left - way, value + abs(w) * way
        best.append(value)
    return torch.tensor(best)


@pytest.mark.parametrize("eps", [0.2, 2.0, 5.0])
def test_l1_reaches_the_worst_case_of_a_linear_model_within_the_bounds(eps):
    weights, x = torch.randn(12, generator=seeded()), torch.rand(5, 12, generator=seeded(1))
    best, threat = worst_l1(weights, x, eps), ThreatModel(eps, "l1", (0.0, 1.0))
    for steps, least in ((7, 0.8), (100, 0.98)):
        for random_start in (False, True):
            moved = pgd(lambda z: z @ weights, x, threat, steps, None, random_start, seeded())
            assert threat.contains(moved, x).all()
            gained = (moved @ weights - x @ weights) / (best - x @ weights)
            assert gained.mean() > least
            assert gained.max() <= 1 + 1e-5


def test_restarts_keep_the_highest_of_each_example():
    x, threat = torch.rand(30, 4, generator=seeded()), ThreatModel(1.0)
    generator = seeded(3)
    each = torch.stack([pgd(wavy, x, threat, 2, generator=generator) for _ in range(4)])
    best = pgd(wavy, x, threat, 2, generator=seeded(3), restarts=4)
    heights = torch.stack([wavy(point) for point in each])
    torch.testing.assert_close(wavy(best), heights.amax(0))
    assert torch.equal(best, each[heights.argmax(0), torch.arange(30)])
    assert (heights.argmax(0) > 0).any()  # the first is not always best
    assert torch.equal(pgd(wavy, x, threat, 2, generator=seeded(3)), each[0])


def test_restarts_need_the_losses_of_the_examples_and_random_starts():
    x = torch.rand(3, 2)
    with pytest.raises(ValueError, match=r"loss of shape \(\).*3 losses"):
        pgd(lambda z: z.sum(), x, ThreatModel(0.1), restarts=2)
    with pytest.raises(ValueError, match="random_start=True"):
        pgd(wavy, x, ThreatModel(0.1), random_start=False, restarts=2)
    with pytest.raises(ValueError, match="restarts=0"):
        pgd(wavy, x, ThreatModel(0.1), restarts=0)


def all_within(threat, x):
    """Every row of whole numbers and categories that one row may become (linf)."""
    columns = []
    hot = {c for group in threat.one_hot for c in group}
    for c in range(x.numel()):
        if c not in hot:
            reach = int(threat.eps)
            columns.append([(c, float(x[c]) + step) for step in range(-reach, reach + 1)])
    for group in threat.one_hot:
        columns.append([(group, k) for k in range(len(group))])
    rows = []
    for choice in itertools.product(*columns):
        row, switched = x.clone(), 0
        for place, value in choice:
            if isinstance(place, int):
                row[place] = value
            else:
                switched += int(x[list(place)].argmax()) != value
                row[list(place)] = torch.eye(len(place))[value]
        if switched <= threat.switches:
            rows.append(row)
    return torch.stack(rows)


TABLE = ThreatModel(1.5, one_hot=[(2, 3, 4), (5, 6)], integer=[0, 1])
ROWS = torch.tensor([[3.0, -2.0, 1, 0, 0, 0, 1], [0.0, 5.0, 0, 0, 1, 1, 0], [1.0, 1.0, 0, 1, 0, 1, 0]])


@pytest.mark.parametrize("switches", [1, 2])
def test_the_worst_row_of_a_linear_model_is_found_among_all(switches):
    threat = replace(TABLE, switches=switches)
    for seed in range(10):
        weights = torch.randn(7, generator=seeded(seed))
        best = torch.stack([(all_within(threat, row) @ weights).max() for row in ROWS])
        for random_start in (False, True):
            moved = pgd(lambda z, w=weights: z @ w, ROWS, threat, 5, None, random_start, seeded())
            torch.testing.assert_close(moved @ weights, best)


def test_the_worst_row_of_a_network_is_mostly_found_among_all():
    """Gradients between categories say little about them, so this is a share, not a proof."""
    found, before, threat = [], [], replace(TABLE, switches=2)
    for seed in range(12):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(7, 16), nn.Tanh(), nn.Linear(16, 1)).requires_grad_(False)
        best, worst = (
            torch.stack([pick(net(all_within(threat, row))) for row in ROWS]) for pick in (torch.max, torch.min)
        )
        moved = pgd(lambda z, net=net: net(z)[:, 0], ROWS, threat, 10, restarts=5, generator=seeded())
        found.append((net(moved)[:, 0] - worst) / (best - worst))
        before.append((net(ROWS)[:, 0] - worst) / (best - worst))
    assert torch.cat(found).mean() > 0.9
    assert torch.cat(before).mean() < 0.6


def test_categories_switch_without_a_radius():
    threat = replace(TABLE, eps=0.0)
    moved = pgd(lambda z: z[:, 3] + 5 * z[:, 0], ROWS, threat, 1, random_start=False)
    assert torch.equal(moved[:, :2], ROWS[:, :2])
    assert (moved[:, 3] == 1).all()
    assert torch.equal(pgd(lambda z: z[:, 3], ROWS, replace(threat, switches=0), 1), ROWS)


@pytest.mark.parametrize("normalised", [False, True])
def test_n_fgsm_is_bit_equal_to_a_loop_by_hand(normalised):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.Tanh(), nn.Linear(8, 5))
    raw, y, eps = torch.rand(6, 3, 4, 4), torch.randint(5, (6,)), 8 / 255
    args = ([0.4, 0.5, 0.6], [0.2, 0.3, 0.25]) if normalised else (None, None)
    mean, std = (torch.tensor(values or 0.0 + i).reshape(1, -1, 1, 1) for i, values in enumerate(args))
    x, scale = (raw - mean) / std, 1 / std
    low, high = (0.0 - mean) / std, (1.0 - mean) / std
    noise = torch.rand(x.shape, generator=seeded()) * 2 - 1
    start = torch.minimum(torch.maximum(x + noise * (2 * eps * scale), low), high).requires_grad_()
    nn.functional.cross_entropy(net(start), y, reduction="sum").backward()
    wanted = torch.minimum(torch.maximum(start.detach() + start.grad.sign() * (eps * scale), low), high)

    threat = ThreatModel(eps, "linf", (0.0, 1.0), *args)
    found = n_fgsm(lambda z: nn.functional.cross_entropy(net(z), y, reduction="none"), x, threat, generator=seeded())
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    if not normalised:
        assert torch.equal(found, wanted)
    assert not threat.contains(found, x).any()  # it is not clipped
    assert n_fgsm_threat(threat).contains(found, x).all()
    assert not replace(threat, eps=2.5 * eps).contains(found, x).any()
    assert not found.requires_grad


def test_n_fgsm_without_noise_is_fgsm_and_without_radius_nothing():
    x, threat = torch.rand(4, 6, generator=seeded()), ThreatModel(0.1, bounds=(0.0, 1.0))
    plain = fgsm(wavy, x, threat, random_start=False)
    torch.testing.assert_close(n_fgsm(wavy, x, threat, noise=0.0), plain)
    assert n_fgsm(wavy, x, replace(threat, eps=0.0)) is not None
    assert torch.equal(n_fgsm(wavy, x, replace(threat, eps=0.0)), x)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"threat": ThreatModel(1.0, "l2")}, "norm='l2'"),
        ({"threat": ThreatModel(1.0, "l1")}, "norm='l1'"),
        ({"noise": -1.0}, "noise=-1.0"),
        ({"step_size": 0.0}, "step_size=0.0"),
    ],
)
def test_n_fgsm_refuses_what_it_does_not_know(options, named):
    with pytest.raises(ValueError, match=named):
        n_fgsm(wavy, torch.rand(2, 2), **{"threat": ThreatModel(0.1), **options})
