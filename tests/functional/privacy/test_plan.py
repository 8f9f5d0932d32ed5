"""One plan for sampling, noise, clipping and accountant."""

import json
import math
from dataclasses import FrozenInstanceError, fields, replace

import numpy as np
import pytest

from lightning_guard.functional.privacy.accounting import Segment, epsilon, gaussian_epsilon
from lightning_guard.functional.privacy.plan import PrivacyPlan

BASE = {
    "units": 10_000,
    "batch_size": 100,
    "steps": 300,
    "steps_per_epoch": 100,
    "delta": 1e-5,
    "noise_multiplier": 1.2,
    "max_grad_norm": 0.5,
}


def plan(**changed) -> PrivacyPlan:
    return PrivacyPlan(**(BASE | changed))


def solve(**given) -> PrivacyPlan:
    return PrivacyPlan.solve(10_000, 100, 100, 1e-5, 0.5, **given)


# Validation ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"units": 0}, "units=0 is too small"),
        ({"steps": 0}, "steps=0 is too small"),
        ({"steps": 1.5}, "steps=1.5 is no whole number"),
        ({"releases": 0}, "releases=0 is too small"),
        ({"batch_size": 10_001}, "batch_size=10001 is more than the units=10000"),
        ({"delta": 0.0}, "delta=0.0 is no probability"),
        ({"delta": 1.0}, "delta=1.0 is no probability"),
        ({"delta": 1e-4}, "delta=0.0001 would allow publishing one of the 10000 units .* give well below"),
        ({"noise_multiplier": -1}, "noise_multiplier=-1.0 is impossible"),
        ({"noise_multiplier": math.nan}, "noise_multiplier=nan is impossible"),
        ({"max_grad_norm": 0}, "max_grad_norm=0.0 is impossible"),
        ({"max_grad_norm": math.inf}, "max_grad_norm=inf is impossible"),
        ({"target_epsilon": 0}, "target_epsilon=0.0 is impossible"),
        ({"noise_final": 0}, "noise_final=0.0 is impossible"),
        ({"clipping": "soft"}, "clipping='soft' is not known; give 'flat' or 'per_layer' or 'automatic'"),
        ({"sampling": "fixed"}, "sampling='fixed' is not known"),
        ({"unit": "group"}, "unit='group' is not known"),
        ({"sampling": "shuffle", "steps_per_epoch": 101}, "give at most 100 with sampling='shuffle'"),
        ({"target_quantile": 1.0}, "target_quantile=1.0 is no fraction"),
        ({"target_quantile": 0.5, "clipping": "per_layer"}, "clipping='per_layer' has no norm for target_quantile"),
        ({"target_quantile": 0.5, "clip_final": 0.5}, "both move max_grad_norm"),
        ({"target_quantile": 0.5, "count_noise": 0.6}, "count_noise=0.6 lets the count tell .* give more than 0.6"),
        ({"target_quantile": 0.5, "count_noise": 0.7, "noise_final": 2.0}, "give more than 1.2"),
        ({"count_noise": 5.0}, "count_noise=5.0 has nothing to count"),
    ],
)
def test_impossible_plans_say_what_to_change(changed, message):
    with pytest.raises(ValueError, match=message):
        plan(**changed)


def test_all_faults_come_at_once():
    with pytest.raises(ValueError) as error:
        plan(units=50, delta=2.0, clipping="soft")
    assert len(str(error.value).splitlines()) == 3


def test_a_plan_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        plan().noise_multiplier = 0.1


# Identity ------------------------------------------------------------------------------------------------------------

OTHER = {
    "units": 10_001,
    "batch_size": 99,
    "steps": 301,
    "steps_per_epoch": 99,
    "delta": 2e-5,
    "noise_multiplier": 1.3,
    "max_grad_norm": 0.6,
    "target_epsilon": 3.0,
    "clipping": "automatic",
    "sampling": "shuffle",
    "unit": "user",
    "releases": 2,
    "noise_final": 0.9,
    "clip_final": 0.9,
    "target_quantile": 0.5,
    "count_noise": 6.0,
    "query_noise": 8.0,
    "once_noise": 20.0,
    "before": (Segment(1.1, 0.02, 10),),
}


@pytest.mark.parametrize("name", [field.name for field in fields(PrivacyPlan)])
def test_every_field_changes_the_fingerprint(name):
    first = plan(target_quantile=0.6) if name == "count_noise" else plan()
    second = replace(first, **{name: OTHER[name]})
    assert first.fingerprint != second.fingerprint
    told = first.differences(second)
    assert f"{name} {getattr(first, name)} became {OTHER[name]}" in told
    assert len(told) == (2 if name == "target_quantile" else 1)  # whose default noise comes with it


def test_plans_survive_being_written():
    for each in (plan(), plan(target_quantile=0.5, target_epsilon=2, unit="user"), plan(sampling="shuffle")):
        copy = PrivacyPlan.from_dict(json.loads(json.dumps(each.to_dict())))
        assert copy == each
        assert copy.fingerprint == each.fingerprint
        assert copy.differences(each) == []
    with pytest.raises(ValueError, match=r"\['sigma'\] are not known, \['units'\] are missing"):
        PrivacyPlan.from_dict({**{k: v for k, v in BASE.items() if k != "units"}, "sigma": 1.0})


def test_numbers_of_other_kinds_are_the_same_plan():
    same = plan(units=np.int64(10_000), noise_multiplier=np.float32(1.5), max_grad_norm=np.float64(0.5))
    assert same.fingerprint == plan(noise_multiplier=1.5).fingerprint
    assert plan(max_grad_norm=1).fingerprint == plan(max_grad_norm=1.0).fingerprint
    assert len(plan().fingerprint) == 64
    assert plan().differences(plan(noise_multiplier=0.9)) == ["noise_multiplier 1.2 became 0.9"]


# Accounting ----------------------------------------------------------------------------------------------------------


def test_poisson_steps_are_subsampled_releases():
    each = plan()
    assert each.sample_rate == 0.01
    assert each.epochs == 3
    assert each.ledger() == [Segment(1.2, 0.01, 300)]
    assert each.epsilon() == epsilon([Segment(1.2, 0.01, 300)], 1e-5)
    assert each.epsilon(0) == 0 < each.epsilon(1) < each.epsilon(150) < each.epsilon() < each.epsilon(400)
    assert plan(noise_multiplier=0).epsilon(1) == math.inf


def test_shuffled_epochs_are_whole_releases():
    each = plan(sampling="shuffle", noise_multiplier=4.0)
    assert each.ledger() == [Segment(4.0, 1.0, 3)]
    for steps, begun in [(0, 0), (1, 1), (100, 1), (101, 2), (300, 3)]:
        assert each.epsilon(steps) == pytest.approx(gaussian_epsilon([4.0] * begun, 1e-5), rel=1e-9)
    falling = replace(each, noise_final=0.5)
    assert falling.epsilon() == pytest.approx(gaussian_epsilon([4.0, 3.0, 2.0], 1e-5))


def test_schedules_change_by_epoch():
    each = plan(noise_final=0.5, clip_final=2.0, steps=250)  # two epochs and a half
    assert [each.noise_at(step) for step in (0, 99, 100, 200, 249, 1000)] == pytest.approx(
        [1.2, 1.2, 0.9, 0.6, 0.6, 0.6]
    )
    assert [each.clip_at(step) for step in (0, 100, 249)] == pytest.approx([0.5, 0.75, 1.0])
    assert each.ledger() == [Segment(1.2, 0.01, 100), Segment(pytest.approx(0.9), 0.01, 100), Segment(0.6, 0.01, 50)]
    assert each.ledger(150)[-1] == Segment(pytest.approx(0.9), 0.01, 50)
    alone = plan(noise_final=0.5, steps=50)
    assert alone.noise_at(49) == 1.2  # one epoch is the first


def test_the_ledger_books_the_noise_of_every_step():
    for changed in ({}, {"noise_final": 0.3}, {"noise_final": 1.7, "releases": 3, "steps": 270}):
        each = plan(**changed)
        booked = [segment.noise_multiplier for segment in each.ledger() for _ in range(segment.steps)]
        assert booked == pytest.approx([each.noise_at(i) / math.sqrt(each.releases) for i in range(each.steps)])


@pytest.mark.parametrize("sampling", ["poisson", "shuffle"])
def test_two_releases_on_one_draw(sampling):
    both = plan(releases=2, sampling=sampling)
    assert both.epsilon() == pytest.approx(plan(noise_multiplier=1.2 / math.sqrt(2), sampling=sampling).epsilon())
    if sampling == "poisson":  # two draws would be cheaper, so they must not be booked
        assert both.epsilon() > 1.1 * plan(steps=600).epsilon()
    else:
        assert both.epsilon() == pytest.approx(gaussian_epsilon([1.2] * 6, 1e-5))


def test_releases_of_one_draw_by_simulation():
    """The privacy loss of two releases of one drawn unit, against the accountant's one release."""
    rng, q, sigma, spent = np.random.default_rng(0), 0.2, 1.0, 1.0
    drawn = rng.random(400_000) < q
    outputs = rng.normal(size=(400_000, 2)) * sigma + drawn[:, None]
    with_it = (1 - q) + q * np.exp((outputs - 0.5).sum(1) / sigma**2)
    delta = np.maximum(0, 1 - math.exp(spent) / with_it).mean()
    one = Segment(sigma / math.sqrt(2), q, 1)
    assert epsilon([one], delta) == pytest.approx(spent, rel=0.03)
    assert epsilon([Segment(sigma, q, 2)], delta) < 0.9 * spent


def test_adaptive_clipping_shares_the_release():
    each = plan(target_quantile=0.5, noise_final=0.7)
    assert each.count_noise == 5.0  # a twentieth of the batch
    for step in (0, 100, 200):
        total = 1.2 * (1 - 0.3 * step / 200)
        # The gradient moves by one clipping norm, the centred indicator by one half.
        assert gaussian_epsilon([each.noise_at(step), 5.0 / 0.5], 1e-5) == pytest.approx(
            gaussian_epsilon([total], 1e-5)
        )
        assert each.noise_at(step) > total
    assert each.epsilon() == plan(noise_final=0.7).epsilon()
    assert plan(target_quantile=0.5, noise_multiplier=0).noise_at(0) == 0


# Solving -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        {},
        {"sampling": "shuffle"},
        {"noise_final": 0.6},
        {"releases": 2, "clipping": "per_layer"},
        {"target_quantile": 0.5, "count_noise": 40.0},
    ],
)
def test_any_two_give_the_third(other):
    noise = solve(target_epsilon=2.0, epochs=3, **other)
    assert noise.steps == 300
    assert noise.epsilon() <= 2.0 == noise.target_epsilon
    lower = replace(noise, noise_multiplier=noise.noise_multiplier / 1.0011)
    assert lower.epsilon() > 2.0

    steps = solve(target_epsilon=2.0, noise_multiplier=noise.noise_multiplier, **other)
    assert steps.epsilon() <= 2.0 < replace(steps, steps=steps.steps + 1).epsilon()
    # Longer schedules fall more slowly and may pay for more.
    assert steps.steps >= 300 if other.get("noise_final") else steps.steps == pytest.approx(300, rel=0.03)

    cost = solve(noise_multiplier=noise.noise_multiplier, epochs=3, **other)
    assert cost.epsilon() == noise.epsilon()
    assert cost.target_epsilon is None


def test_all_three_cut_the_steps():
    enough = solve(target_epsilon=50.0, noise_multiplier=1.2, steps=321)
    assert (enough.steps, enough.target_epsilon) == (321, 50.0)
    cut = solve(target_epsilon=1.0, noise_multiplier=1.2, epochs=30)
    assert cut.epsilon() <= 1.0 < replace(cut, steps=cut.steps + 1).epsilon()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "target_epsilon, noise_multiplier, epochs or steps: not given"),
        ({"epochs": 3}, "target_epsilon, noise_multiplier: not given"),
        ({"target_epsilon": 2.0}, "noise_multiplier, epochs or steps: not given"),
        ({"noise_multiplier": 1.0}, "target_epsilon, epochs or steps: not given"),
        ({"noise_multiplier": 1.0, "epochs": 3, "steps": 300}, "epochs=3 and steps=300 both say how long"),
        ({"target_epsilon": 0.1, "noise_multiplier": 0.3}, "does not pay for one step, which spends"),
        (
            {"target_epsilon": 5.0, "noise_multiplier": 1e4, "sampling": "shuffle"},
            "pays for more than 10,000,000 steps",
        ),
        ({"target_epsilon": 1e-9, "epochs": 3}, "target_epsilon=1e-09 is out of reach"),
        ({"target_epsilon": 2.0, "noise_multiplier": 1.0, "steps": 0}, "steps=0 is too small"),
        ({"target_epsilon": 2.0, "epochs": 3, "target_quantile": 0.5, "count_noise": 0.2}, "count_noise=0.2 lets"),
        ({"target_epsilon": -2.0, "epochs": 3}, "target_epsilon=-2.0 is impossible"),
    ],
)
def test_what_cannot_be_solved(given, message):
    with pytest.raises(ValueError, match=message):
        solve(**given)


# For people ----------------------------------------------------------------------------------------------------------


def test_descriptions():
    text = plan(target_epsilon=3.0, unit="user", noise_final=0.5, releases=2, clipping="per_layer").describe()
    assert "of 3 at delta 1e-05, add or remove one person" in text
    assert "Poisson: 100 of 10,000 people a step on average, rate 0.01" in text
    assert "300 in 3 epochs" in text
    assert "1.2 (last epoch 0.6) times the clipping norm, on each of 2 releases a step" in text
    assert "per layer at 0.5" in text
    assert "PRV" in text
    adaptive = plan(target_quantile=0.4).describe()
    assert "flat at 0.5, then at the 0.4 quantile (noise 5 on the count)" in adaptive
    assert "privacy at all" in plan(noise_multiplier=0).describe()


def test_shuffled_batches_do_not_borrow_the_epsilon_of_poisson():
    honest, borrowed = plan(sampling="shuffle"), plan()
    lines = honest.describe().splitlines()
    assert lines[0].split()[:3] == ["privacy", "epsilon", f"{honest.epsilon():.3g}"]
    assert "zeroed out" in lines[0]
    assert lines[1].strip() == f"(epsilon {borrowed.epsilon():.3g} needs Poisson sampling and is not valid here)"
    assert "PRV" not in honest.describe()
    assert "shuffle" not in borrowed.describe()
