"""The threat model against its definition, written out in loops, and against independent solvers."""

import itertools
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from lightning_guard.functional import ThreatModel, fgsm, n_fgsm, n_fgsm_threat, pgd, search
from lightning_guard.functional.attacks.balls import project_l1

NORMS = ["linf", "l2", "l1"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def each(value, default, size):
    """``value`` as a list of one number a column."""
    return [default] * size if value is None else [value] * size if isinstance(value, float | int) else list(value)


def violation(threat, moved, x, tolerance):
    """What the first row that breaks the threat model breaks, by its definition, column by column; None if none."""
    size = x.shape[1]
    mean, std, unit = each(threat.mean, 0.0, size), each(threat.std, 1.0, size), each(threat.unit, 1.0, size)
    low, high = (each(edge, 0.0, size) for edge in threat.bounds or (-float("inf"), float("inf")))
    mutable = set(range(size) if threat.mutable is None else threat.mutable) - set(threat.immutable or ())
    hot = {column for group in threat.one_hot or () for column in group}
    for after, before in zip(moved.double().tolist(), x.double().tolist(), strict=True):
        new, old = ([v * s + m for v, s, m in zip(row, std, mean, strict=True)] for row in (after, before))
        lengths = []
        for c in range(size):
            if c not in mutable and after[c] != before[c]:
                return f"immutable {c}"
            if c not in hot:
                lengths.append(abs(new[c] - old[c]) / unit[c])
            if not low[c] - tolerance <= new[c] <= high[c] + tolerance:
                return f"bounds {c}"
            if c in (threat.integer or ()) and abs(new[c] - round(new[c])) > 2 * tolerance:
                return f"integer {c}"
            if c in (threat.increasing or ()) and new[c] < old[c] - tolerance:
                return f"increasing {c}"
            if c in (threat.decreasing or ()) and new[c] > old[c] + tolerance:
                return f"decreasing {c}"
        length = {"linf": max, "l1": sum, "l2": lambda values: sum(v * v for v in values) ** 0.5}[threat.norm]
        if lengths and length(lengths) > threat.eps + tolerance:
            return f"eps {length(lengths)}"
        switched = 0
        for group in threat.one_hot or ():
            now, was = ([round(row[c], 3) for c in group] for row in (new, old))
            if sorted(now) != [0] * (len(group) - 1) + [1]:
                return f"one_hot {now}"
            switched += now != was
        if switched > threat.switches:
            return f"switches {switched}"
    return None


@st.composite
def tables(draw):
    """A threat to the rows of a table, with any of its constraints, and rows."""
    numbers, sizes = draw(st.integers(1, 4)), draw(st.lists(st.integers(2, 3), max_size=2))
    size = numbers + sum(sizes)
    order = draw(st.permutations(range(size)))
    numeric, rest = order[:numbers], order[numbers:]
    groups = [rest[sum(sizes[:g]) : sum(sizes[: g + 1])] for g in range(len(sizes))]
    some = st.lists(st.sampled_from(numeric), unique=True)
    integer, increasing = draw(some), draw(some)
    decreasing = [c for c in draw(some) if c not in increasing]
    column = st.lists(st.floats(0.2, 3.0), min_size=size, max_size=size)
    anything = st.lists(st.integers(0, size - 1), unique=True)
    mean, std = (draw(st.none() | st.floats(0.2, 3.0) | column) for _ in range(2))
    bounds = draw(st.sampled_from([None, (-4.0, 4.0), ([-4.0] * size, [4.0 + c for c in range(size)])]))
    threat = ThreatModel(
        draw(st.sampled_from([0.0, 0.5, 1.0, 2.7])),
        draw(st.sampled_from(NORMS)),
        bounds,
        mean,
        std,
        mutable=draw(st.none() | anything),
        immutable=draw(st.none() | anything),
        unit=draw(st.none() | column),
        one_hot=groups or None,
        switches=draw(st.integers(0, 2)) if groups else 1,
        integer=integer or None,
        increasing=increasing or None,
        decreasing=decreasing or None,
    )
    generator = seeded(draw(st.integers(0, 999)))
    raw = torch.rand(4, size, generator=generator, dtype=torch.float64) * 8 - 4
    raw[0, numeric] = draw(st.sampled_from([-4.0, 4.0]))  # where the bounds bite
    raw[:, integer] = raw[:, integer].round()
    for group in groups:
        raw[:, group] = torch.eye(len(group), dtype=torch.float64)[torch.randint(len(group), (4,), generator=generator)]
    x = (raw - torch.tensor(each(mean, 0.0, size), dtype=torch.float64)) / torch.tensor(
        each(std, 1.0, size), dtype=torch.float64
    )
    return threat, x.to(draw(st.sampled_from([torch.float32, torch.float64])))


def wavy(x):
    flat = x.flatten(1)
    weights = torch.linspace(-2, 2, flat.shape[1], dtype=x.dtype)
    return (3 * flat * weights).sin().sum(1) + flat.square().sum(1)


@settings(max_examples=50, deadline=None)
@given(tables(), st.integers(0, 4), st.booleans())
def test_every_point_of_every_attack_on_a_table_is_allowed(table, steps, random_start):
    threat, x = table
    threat.check(x)
    tolerance = 1e-9 if x.dtype == torch.float64 else 1e-4
    far = x + 5 * torch.randn(x.shape, generator=seeded(1), dtype=x.dtype)
    points = {
        "x": x,
        "draw": threat.draw(x, seeded()),
        "project": threat.project(far, x),
        "settle": threat.settle(threat.relaxed().project(far, x), x),
        "pgd": pgd(wavy, x, threat, steps, None, random_start, seeded()),
        "restarts": pgd(wavy, x, threat, 2, restarts=2, generator=seeded()),
        "fgsm": fgsm(wavy, x, threat, random_start=random_start, generator=seeded()),
        "search": search(lambda x: wavy(x) - 5, x, torch.zeros(4).long(), threat, 12, seeded()),
    }
    for name, moved in points.items():
        assert violation(threat, moved, x, tolerance) is None, name
        assert threat.contains(moved, x, max(tolerance, threat.rounding(x))).all(), name
        assert moved.dtype == x.dtype
    if threat.norm == "linf":
        wide = n_fgsm_threat(threat, 0.3)
        moved = n_fgsm(wavy, x, threat, 0.3, generator=seeded())
        assert violation(wide, moved, x, tolerance) is None
        assert wide.contains(moved, x, max(tolerance, threat.rounding(x))).all()


@settings(max_examples=50, deadline=None)
@given(tables(), st.integers(0, 99))
def test_contains_agrees_with_the_definition_on_what_is_outside(table, seed):
    """Random moves of one column break this or that; both must say the same."""
    threat, x = table
    assume(x.dtype == torch.float64)  # what is beyond a bound by rounding may stay, which the definition does not say
    generator = seeded(seed)
    for _ in range(10):
        moved = threat.draw(x, generator)
        column = int(torch.randint(x.shape[1], (), generator=generator))
        moved[:, column] += torch.randint(-6, 7, (len(x),), generator=generator) / 2
        found = threat.contains(moved, x, 1e-9)
        wanted = [violation(threat, a[None], b[None], 1e-9) is None for a, b in zip(moved, x, strict=True)]
        assert found.tolist() == wanted


PERSON = ThreatModel(
    2.0,
    "l1",
    bounds=([17.0, 0.0, 0.0, 0.0, 0.0, 0.0], [90.0, 9.0, 1.0, 1.0, 1.0, 1.0]),
    immutable=[1],
    one_hot=[(2, 3), (4, 5)],
    integer=[0],
    increasing=[0],
)
AGED = torch.tensor([[39.0, 3.5, 1.0, 0.0, 0.0, 1.0]])


@pytest.mark.parametrize(
    ("moved", "allowed"),
    [
        ([39.0, 3.5, 1, 0, 0, 1], True),
        ([41.0, 3.5, 1, 0, 0, 1], True),
        ([41.0, 3.5, 0, 1, 0, 1], True),
        ([42.0, 3.5, 1, 0, 0, 1], False),  # eps
        ([38.0, 3.5, 1, 0, 0, 1], False),  # younger
        ([40.5, 3.5, 1, 0, 0, 1], False),  # not whole
        ([39.0, 3.6, 1, 0, 0, 1], False),  # immutable
        ([39.0, 3.5, 0, 1, 1, 0], False),  # two switches
        ([39.0, 3.5, 1, 1, 0, 1], False),  # two categories
        ([39.0, 3.5, 0, 0, 0, 1], False),  # none
        ([39.0, 3.5, 0.5, 0.5, 0, 1], False),  # in between
        ([39.0, 3.5, 2, -1, 0, 1], False),  # sums to 1
    ],
)
def test_contains_checks_each_constraint(moved, allowed):
    PERSON.check(AGED)
    assert PERSON.contains(torch.tensor([moved]), AGED).item() is allowed


def test_bounds_of_a_column_hold_for_it_alone():
    old = torch.tensor([[89.0, 3.5, 1.0, 0.0, 0.0, 1.0]])
    assert PERSON.contains(torch.tensor([[90.0, 3.5, 1, 0, 0, 1]]), old)
    assert not PERSON.contains(torch.tensor([[91.0, 3.5, 1, 0, 0, 1]]), old)
    assert PERSON.project(torch.tensor([[99.0, 9.0, 1, 0, 0, 1]]), old)[0, 0] == 90
    with pytest.raises(ValueError, match="outside bounds"):
        PERSON.check(torch.tensor([[16.0, 3.5, 1, 0, 0, 1]]))
    half_open = ThreatModel(9.0, bounds=([0.0, -float("inf")], [float("inf"), 1.0]))
    half_open.check(torch.tensor([[5.0, -5.0]]))
    assert half_open.project(torch.tensor([[-9.0, 9.0]]), torch.tensor([[5.0, -5.0]])).tolist() == [[0.0, 1.0]]
    assert half_open.project(torch.tensor([[99.0, -99.0]]), torch.tensor([[5.0, -5.0]])).tolist() == [[14.0, -14.0]]


def test_one_immutable_category_keeps_its_group():
    threat = replace(PERSON, immutable=[3])
    other = torch.tensor([[39.0, 3.5, 0, 1, 0, 1]])
    assert not threat.contains(other, AGED)
    assert torch.equal(threat.settle(other, AGED), AGED)
    assert threat.frozen(AGED).tolist() == [[True, False]]


# ------------------------------------------------------------------------------------------------- the L1 ball


def brute_l1(delta, low, high, radius):
    """Bisection on the multiplier, an entry at a time."""

    def point(cut):
        shrunk = [np.sign(d) * max(abs(d) - cut, 0) for d in delta]
        return [min(max(s, lo), hi) for s, lo, hi in zip(shrunk, low, high, strict=True)]

    if sum(map(abs, point(0.0))) <= radius:
        return point(0.0)
    bottom, top = 0.0, max(map(abs, delta))
    for _ in range(200):
        middle = (bottom + top) / 2
        bottom, top = (middle, top) if sum(map(abs, point(middle))) > radius else (bottom, middle)
    return point(top)


entries = st.floats(-3, 3).map(lambda value: round(value, 2))  # ties and exact hits are likely


@settings(max_examples=120, deadline=None)
@given(st.lists(st.tuples(entries, entries, entries), min_size=1, max_size=8), st.sampled_from([0.0, 0.5, 1.0, 4.0]))
def test_the_l1_projection_is_that_of_a_bisection_by_hand(rows, radius):
    delta = [d for d, _, _ in rows]
    low, high = [-abs(a) for _, a, _ in rows], [abs(b) if b < 2.9 else float("inf") for _, _, b in rows]
    wanted = brute_l1(delta, low, high, radius)
    found = project_l1(*(torch.tensor([part], dtype=torch.float64) for part in (delta, low, high)), radius)
    assert found[0].tolist() == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("seed", range(25))
def test_the_l1_projection_is_that_of_a_general_solver(seed):
    """Sequential quadratic programming on positive and negative parts knows nothing of multipliers."""
    random = np.random.default_rng(seed)
    size, radius = int(random.integers(2, 7)), float(random.uniform(0.2, 2))
    delta = random.normal(size=size) * 2
    low, high = -random.uniform(0, 1, size), random.uniform(0, 1, size)
    solved = minimize(
        lambda z: ((z[:size] - z[size:] - delta) ** 2).sum(),
        np.zeros(2 * size),
        method="SLSQP",
        bounds=[*zip(np.zeros(size), high, strict=True), *zip(np.zeros(size), -low, strict=True)],
        constraints={"type": "ineq", "fun": lambda z: radius - z.sum()},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    found = project_l1(*(torch.tensor(part)[None] for part in (delta, low, high)), radius)[0].numpy()
    np.testing.assert_allclose(found, solved.x[:size] - solved.x[size:], atol=1e-5)


def test_the_l1_projection_of_many_far_points_is_on_the_sphere():
    """In single precision and thousands of dimensions, where errors add up."""
    x = torch.rand(16, 3072, generator=seeded())
    threat = ThreatModel(12.0, "l1", (0.0, 1.0))
    moved = threat.project(x + 100 * torch.randn(x.shape, generator=seeded(1)), x)
    torch.testing.assert_close((moved - x).abs().double().sum(1), torch.full((16,), 12.0).double(), rtol=1e-5, atol=0)
    assert moved.min() >= 0
    assert moved.max() <= 1
    inside = threat.draw(x, seeded())
    torch.testing.assert_close(threat.project(inside, x), inside, rtol=0, atol=1e-6)


def test_the_nearest_point_is_nearer_than_ball_then_box():
    """A positive control: the cheap projection is another one, and attacks that use it stop short."""
    x, far = torch.full((1, 3), 0.9), torch.tensor([[3.9, 2.9, 0.9]])
    exact = ThreatModel(1.0, "l1", (0.0, 1.0)).project(far, x)
    cheap = ThreatModel(1.0, "l1").project(far, x).clamp(0, 1)
    assert (exact - x).abs().sum() > (cheap - x).abs().sum() + 0.05
    assert (exact - far).norm() < (cheap - far).norm()


def test_an_l1_step_goes_where_there_is_room():
    gradient = torch.tensor([[5.0, -4.0, 3.0, 0.0]])
    x = torch.tensor([[1.0, 0.0, 0.5, 0.5]])
    threat = ThreatModel(2.0, "l1", (0.0, 1.0))
    assert threat.steepest(gradient, x).tolist() == [[0, 0, 0.5, 0]]
    assert threat.steepest(gradient, x, length=0.25).tolist() == [[0, 0, 0.25, 0]]
    assert ThreatModel(2.0, "l1").steepest(gradient, x, share=0.5).tolist() == [[0.5, -0.5, 0, 0]]
    assert ThreatModel(2.0, "l1").steepest(0 * gradient, x).tolist() == [[0, 0, 0, 0]]
    at = torch.tensor([[0.25, 0.25, 0.5, 0.5]])
    assert threat.steepest(gradient, x, at).tolist() == [[0.75, -0.25, 0, 0]]
    assert threat.steepest(gradient, x, at, share=0.5).tolist() == [[0.5, -0.25, 0.25, 0]]
    assert replace(threat, decreasing=[2]).steepest(gradient, x).tolist() == [[0, 0, 0, 0]]
    columns = ThreatModel(2.0, "l1", (0.0, 1.0), unit=[0.5, 1.0, 1.0, 1.0])  # steep only per unit
    assert columns.steepest(gradient, at).tolist() == [[0.125, -0.25, 0.5, 0]]


# -------------------------------------------------------------------------------------- steps, relaxed, settled


@settings(max_examples=80, deadline=None)
@given(tables())
def test_steps_have_unit_length_and_rise(table):
    threat, x = table
    threat, x = replace(threat, bounds=None, increasing=None, decreasing=None), x.double()
    gradient = torch.randn(x.shape, generator=seeded(), dtype=x.dtype)
    step, scale = threat.steepest(gradient, x), threat.scale(x).expand_as(x)
    if (scale == 0).all():
        assert not step.any()
        return
    assert not step[scale == 0].any()
    delta = torch.where(scale > 0, step / scale, 0)
    length = {"linf": delta.abs().amax(1), "l2": delta.norm(dim=1), "l1": delta.abs().sum(1)}[threat.norm]
    torch.testing.assert_close(length, torch.ones_like(length))
    assert ((gradient * step).sum(1) > 0).all()
    dual = {"linf": 1, "l2": 2, "l1": float("inf")}[threat.norm]  # no step of this length rises more
    torch.testing.assert_close((gradient * step).sum(1), (gradient * scale).norm(dual, dim=1))


def test_without_columns_relaxed_and_settled_are_the_same():
    threat, x = ThreatModel(0.1, mutable=[0]), torch.rand(2, 3)
    assert threat.relaxed() is threat
    assert threat.settle(x, x + 1) is x
    assert threat.switch(x, x) is x
    relaxed = PERSON.relaxed()
    assert not relaxed.discrete
    assert relaxed.increasing == (0,)
    moved = relaxed.project(torch.tensor([[40.6, 9.0, 0, 1, 0, 1]]), AGED)
    assert moved.tolist() == [[pytest.approx(40.6), 3.5, 1, 0, 0, 1]]
    assert PERSON.settle(moved, AGED).tolist() == [[40.0, 3.5, 1, 0, 0, 1]]


def test_settle_keeps_the_clearest_switches():
    threat = ThreatModel(0.0, one_hot=[(0, 1), (2, 3), (4, 5)], switches=2)
    x = torch.tensor([[1.0, 0, 1, 0, 1, 0]])
    between = torch.tensor([[0.4, 0.6, 0.1, 0.9, 0.3, 0.7]])
    assert threat.settle(between, x).tolist() == [[1, 0, 0, 1, 0, 1]]
    assert torch.equal(threat.settle(torch.full((1, 6), 0.5), x), x)  # undecided stays


def test_whole_steps_reach_the_radius_in_normalised_units():
    """39 + 2 is 41 also where a third of a unit cannot be written exactly."""
    mean, std = [38.6, 0.0], [13.7, 1.0]
    raw = torch.tensor([[39.0, 0.5], [17.0, 0.5], [90.0, 0.5]])
    x = (raw - torch.tensor(mean)) / torch.tensor(std)
    threat = ThreatModel(2.0, mean=mean, std=std, integer=[0])
    moved = threat.project(x + 9, x) * torch.tensor(std) + torch.tensor(mean)
    torch.testing.assert_close(moved[:, 0], raw[:, 0] + 2, rtol=0, atol=1e-4)
    small = replace(threat, eps=0.99)
    assert torch.equal(small.project(x + 9, x)[:, 0], x[:, 0])


def test_units_measure_each_column_by_its_range():
    threat = ThreatModel(0.1, unit=[73.0, 2.0], mean=[17.0, 0.0], std=[73.0, 1.0])
    moved = threat.project(torch.full((1, 2), 99.0), torch.zeros(1, 2))
    torch.testing.assert_close(moved, torch.tensor([[0.1, 0.2]]))
    l2 = replace(threat, norm="l2", eps=5.0)
    moved = l2.project(torch.tensor([[30.0, 80.0]]), torch.zeros(1, 2))  # 30 and 40 units
    torch.testing.assert_close(moved, torch.tensor([[3.0, 8.0]]))


def spread(threat, x, y):
    """All rows that one row may become by categories alone, by enumeration."""
    rows = []
    for choice in itertools.product(*(range(len(group)) for group in threat.one_hot)):
        row = x.clone()
        for group, k in zip(threat.one_hot, choice, strict=True):
            row[list(group)] = torch.eye(len(group), dtype=x.dtype)[k]
        rows.append(row)
    rows = torch.stack(rows)
    return rows[[violation(threat, row[None], x[None], 1e-6) is None for row in rows]]


@pytest.mark.parametrize("switches", [0, 1, 2])
def test_switches_are_the_best_of_all(switches):
    groups = [(0, 1, 2), (3, 4), (5, 6, 7)]
    threat = ThreatModel(0.0, one_hot=groups, switches=switches, immutable=[4])
    for seed in range(20):
        weights = torch.randn(8, generator=seeded(seed))
        x = threat.draw(torch.eye(8)[[0, 3, 5]].sum(0, keepdim=True), seeded(seed))
        best = (spread(threat, x[0], None) @ weights).max()
        moved = threat.switch(weights.expand_as(x), x)
        assert (moved @ weights).item() == pytest.approx(best.item(), abs=1e-5)
        assert torch.equal(pgd(lambda z, w=weights: z @ w, x, threat, 3, random_start=False), moved)


def test_switched_categories_are_hot_and_cold_as_the_network_sees_them():
    mean, std = [0.3, 0.2, 0.5], [0.5, 0.4, 0.5]
    threat = ThreatModel(0.0, mean=mean, std=std, one_hot=[(0, 1, 2)])
    x = ((torch.tensor([[0.0, 1.0, 0.0]]) - torch.tensor(mean)) / torch.tensor(std)).contiguous()
    threat.check(x)
    moved = threat.switch(torch.tensor([[0.0, 0.0, 1.0]]), x)
    torch.testing.assert_close(moved * torch.tensor(std) + torch.tensor(mean), torch.tensor([[0.0, 0.0, 1.0]]))
    # A raw step of 1 weighs 1 / std: 0.9 / 0.5 beats 0.0, and 1.0 / 0.5 beats that.
    assert threat.categories(threat.switch(torch.tensor([[0.9, 0.0, 1.0]]), x)).item() == 2


def test_draws_reach_every_category_and_no_more_than_allowed():
    threat = ThreatModel(0.0, one_hot=[(0, 1, 2), (3, 4)])
    x = torch.tensor([[1.0, 0, 0, 1, 0]]).expand(500, 5)
    seen = {tuple(row) for row in threat.categories(threat.draw(x, seeded())).tolist()}
    assert seen == {(0, 0), (1, 0), (2, 0), (0, 1)}


# ------------------------------------------------------------------------------------- positions, free features


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(NORMS), st.sampled_from(["example", "position"]), st.booleans(), st.booleans())
def test_sequences_are_attacked_per_example_or_per_position(norm, per, masked, bounded):
    x = torch.rand(3, 5, 4, generator=seeded(), dtype=torch.float64)
    free = torch.ones(3, 5, 1, dtype=torch.bool)
    if masked:
        free[0, 3:] = free[2, 1:] = False
    threat = ThreatModel(0.7, norm, (0.0, 1.0) if bounded else None, per=per)
    keep = {"free": free} if masked else {}
    far = x + torch.randn(x.shape, generator=seeded(1), dtype=x.dtype)
    points = [threat.draw(x, seeded(), **keep), threat.project(far, x, **keep), pgd(wavy, x, threat, 3, **keep)]
    if norm == "linf":
        wide = replace(threat, eps=2.1)
        assert wide.contains(n_fgsm(wavy, x, threat, **keep), x, **keep).all()
    for moved in points:
        delta = (moved - x).reshape(3, -1) if per == "example" else (moved - x)
        order = {"linf": float("inf"), "l2": 2, "l1": 1}[norm]
        assert (delta.norm(order, dim=-1) <= 0.7 + 1e-9).all()
        assert torch.equal(moved[~free.expand_as(x)], x[~free.expand_as(x)])
        assert threat.contains(moved, x, **keep).all()
    if not bounded:  # the ball is used up, one a position
        delta = (threat.project(x + 50, x) - x).reshape(3, -1) if per == "example" else threat.project(x + 50, x) - x
        torch.testing.assert_close(delta.norm(order, dim=-1), torch.full(delta.shape[:-1], 0.7, dtype=x.dtype))
    if masked:
        assert threat.contains(far, x, 1e9, free).tolist() == [False, True, False]
        assert threat.contains(far, x, 1e9).all()


def test_a_position_too_far_is_outside_though_the_others_are_not():
    x = torch.zeros(2, 3, 4)
    moved = x.clone()
    moved[0, 2] = 1.0
    threat = ThreatModel(1.9, "l2", per="position")
    assert threat.contains(moved, x).tolist() == [False, True]
    assert replace(threat, eps=2.0).contains(moved, x).tolist() == [True, True]


def test_draws_are_uniform_where_features_are_free():
    x, free = torch.zeros(20_000, 5), torch.tensor([True, False, True, True, False])
    for norm in NORMS:
        moved = ThreatModel(1.0, norm).draw(x, seeded(), free)
        length = moved.norm({"linf": float("inf"), "l2": 2, "l1": 1}[norm], dim=1)
        assert (length <= 0.6).float().mean().item() == pytest.approx(0.6**3, abs=0.015)
        assert not moved[:, ~free].any()


# ------------------------------------------------------------------------------------------------- being a value


def test_lists_from_a_file_and_tuples_are_one_threat():
    one = ThreatModel(1, "l2", [0, 1], [0.5], [0.5], [0], one_hot=[[1, 2]], integer=[0])
    two = ThreatModel(1, "l2", (0, 1), (0.5,), (0.5,), (0,), one_hot=((1, 2),), integer=(0,))
    assert one == two
    assert hash(one) == hash(two)
    assert {field.name for field in fields(ThreatModel)} >= {"eps", "norm", "bounds", "one_hot", "integer", "unit"}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"bounds": (0.0,)}, r"bounds=\(0.0,\) are no pair"),
        ({"bounds": ([0.0, 1.0], [1.0, 1.0])}, r"hold nothing at \(1.0, 1.0\)"),
        ({"bounds": ([0.0, 1.0], [1.0, 1.0, 2.0])}, "2 lowest and 3 highest"),
        ({"bounds": ([], [])}, "hold no number"),
        ({"unit": 0.0}, "unit=0.0"),
        ({"unit": [1.0, -1.0]}, "unit="),
        ({"per": "token"}, "per='token'"),
        ({"one_hot": [[1]]}, r"group \[1\]"),
        ({"one_hot": [[1, 2], [2, 3]]}, "names an index twice"),
        ({"one_hot": [[-1, 2]]}, "count from the front"),
        ({"integer": [-1]}, "integer=.*count from the front"),
        ({"one_hot": [[1, 2]], "integer": [2]}, r"integer and one_hot both name \[2\]"),
        ({"one_hot": [[1, 2]], "increasing": [1]}, r"increasing and one_hot both name \[1\]"),
        ({"increasing": [0, 1], "decreasing": [1]}, r"both name \[1\].*immutable"),
        ({"one_hot": [[1, 2]], "switches": -1}, "switches=-1"),
        ({"switches": 2}, "switches=2 without categories"),
        ({"per": "position", "integer": [0]}, "per='position'"),
    ],
)
def test_what_describes_no_threat_is_refused_by_name(options, named):
    with pytest.raises(ValueError, match=named):
        ThreatModel(1.0, **options)


@pytest.mark.parametrize(
    ("options", "shape", "named"),
    [
        ({"one_hot": [[0, 1]]}, (2, 3, 4), r"one_hot is for rows of a table \(N, D\)"),
        ({"integer": [0]}, (2, 3, 4), "integer is for rows"),
        ({"one_hot": [[0, 7]]}, (2, 3), r"one_hot=\[0, 7\] for inputs of shape \(2, 3\)"),
        ({"immutable": [3]}, (2, 3), r"immutable=\[3\]"),
        ({"increasing": [3]}, (2, 3), r"increasing=\[3\]"),
        ({"decreasing": [3]}, (2, 3, 4), r"decreasing=\[3\]"),
        ({"integer": [3]}, (2, 3), r"integer=\[3\]"),
        ({"unit": [1.0, 2.0]}, (2, 3), "2 values of unit"),
        ({"bounds": ([0.0, 0.0], [1.0, 1.0])}, (2, 3), "2 values of bounds"),
    ],
)
def test_what_fits_no_input_is_refused_by_name(options, shape, named):
    with pytest.raises(ValueError, match=named):
        ThreatModel(1.0, **options).project(torch.zeros(shape), torch.zeros(shape))


def test_inputs_that_are_not_what_is_claimed_are_refused():
    threat = ThreatModel(1.0, one_hot=[(1, 2)], integer=[0])
    threat.check(torch.tensor([[3.0, 1.0, 0.0]]))
    for row, named in (
        ([3.5, 1.0, 0.0], "integer column 0 holds 3.5, in 1 of 1 rows"),
        ([3.0, 1.0, 1.0], r"one_hot=\[1, 2\] holds \[1.0, 1.0\] in 1 of 1 rows"),
        ([3.0, 0.0, 0.0], "one_hot="),
        ([3.0, 0.5, 0.5], "one_hot="),
        ([float("nan"), 1.0, 0.0], "integer column 0 holds nan"),
    ):
        with pytest.raises(ValueError, match=named):
            threat.check(torch.tensor([row]))
    # Columns that only grow still start within the bounds.
    with pytest.raises(ValueError, match="outside bounds"):
        ThreatModel(1.0, bounds=(0.0, 1.0), increasing=[0]).check(torch.tensor([[-1.0]]))
