"""Fairness beside DP-SGD: what is remembered of the data passes through queries, and the plan pays for them."""

import math

import pytest
import pytorch_lightning as pl
import torch
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant

from lightning_guard.callbacks import DPSGD, FairnessRegularization
from lightning_guard.functional.fairness import (
    OF_RATES,
    Census,
    census_of,
    histogram,
    joint,
    largest,
    moments,
    table_of,
)
from lightning_guard.functional.privacy import Deal, Noise, PrivacyPlan, Queries, contributions, noise_of_all
from lightning_guard.guard import Guard, GuardConflict, Phase, Trait
from lightning_guard.parity.running import table
from tests.callbacks.test_fairness import Logit, biased, data
from tests.toys import fit, same


def private(**options):
    return DPSGD(**{"delta": 1e-5, "noise_multiplier": 0.6, "test_seed": 2, "max_grad_norm": 1.0} | options)


def fair(notion="demographic_parity", **options):
    defaults = {"max_gap": 0.05, "groups": [2], "count_noise": 10.0, "rate_noise": 4.0}
    return FairnessRegularization(notion, **defaults | options)


def trained(guards, **options):
    return fit(guards, Logit, data(), **{"max_epochs": 10} | options)


def rates(net):
    x, _, s = biased()
    with torch.no_grad():
        yes = net(x) > 0
    return [float(yes[s == g].float().mean()) for g in (0, 1)]


# What the sums are -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[2], [2, 3]])
def test_without_noise_the_count_is_the_census(sizes):
    generator = torch.Generator().manual_seed(len(sizes))
    group = torch.stack([torch.randint(-1, k, (500,), generator=generator) for k in sizes], 1)
    target = torch.randint(0, 3, (500,), generator=generator)
    rows = joint(group, target, sizes, classes=3)
    assert bool((rows.norm(dim=1) == 1).all())
    oracle = Census(intersections=True)
    oracle.add(group, target)
    oracle.close()
    found = census_of(rows.double().sum(0), sizes, units=500, intersections=True)
    torch.testing.assert_close(found.counts[: sum(sizes)], oracle.counts[: sum(sizes)])
    torch.testing.assert_close(found.cells[: sum(sizes)], oracle.cells[: sum(sizes)])
    assert found.total == 500
    assert found.codes[: sum(sizes)] == oracle.codes[: sum(sizes)]


def test_values_outside_of_those_named_are_unknown():
    rows = joint(torch.tensor([0, 5, -1]), torch.tensor([0, 1, 9]), [2], classes=2)
    assert rows.nonzero()[:, 1].tolist() == [3, 1, 2]  # group 0 class 0; unknown class 1; unknown, no class
    with pytest.raises(ValueError, match="of 1 attributes, and an example has 2"):
        joint(torch.zeros(2, 2), None, [2], classes=2)


@pytest.mark.parametrize("notion", sorted(OF_RATES))
@pytest.mark.parametrize("classes", [2, 4])
def test_the_histogram_is_the_table_and_bounded(notion, classes):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(300, generator=generator) if classes == 2 else torch.randn(300, classes, generator=generator)
    target = torch.randint(0, classes, (300,), generator=generator)
    group = torch.stack([torch.randint(-1, k, (300,), generator=generator) for k in (2, 3)], 1)
    census = Census()
    census.add(group, target)
    census.close()
    found, members = moments(logits, target, notion), census.members(group)
    rates = found.values.shape[1]
    unit = largest(notion, rates, families=2)
    rows = histogram(found, members, unit)
    norms = rows.norm(dim=1)
    assert float(norms.max()) <= 1 + 1e-6
    assert float(norms.max()) > 0.99  # the bound is reached, so that no noise is wasted
    torch.testing.assert_close(table_of(rows.double().sum(0), rates, unit), table(found, members))


def test_no_unit_contributes_more_than_one():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 7, generator=generator) * torch.logspace(-2, 2, 40).unsqueeze(1)
    own = contributions(rows, rows_per_unit=4)
    assert own.shape == (10, 7)
    assert float(own.norm(dim=1).max()) <= 1 + 1e-12
    weights = torch.tensor([1.0, 0, 0, 0] * 10)
    first = rows[::4].double()
    torch.testing.assert_close(contributions(rows, 4, weights), first / first.norm(dim=1, keepdim=True).clamp_min(1))
    rows[3] = math.nan
    assert bool((contributions(rows, 4)[0] == 0).all())


def test_padding_contributes_nothing_and_noise_goes_out_all_the_same():
    sent = []
    queries = Queries(Noise(seed=0))
    queries.open("q", 3, noise=2.0, take=sent.append)
    for _ in range(2000):
        queries.add("q", torch.ones(1, 3), Deal(0, 1, torch.zeros(1), True, True, 0))
        queries.release()
    noise = torch.stack(sent)
    assert abs(float(noise.std()) - 2.0) < 0.1
    assert abs(float(noise.mean())) < 0.1
    with pytest.raises(ValueError, match="3 contributions to 'q' for 2 rows"):
        queries.add("q", torch.ones(3, 3), Deal(2, 1, None, True, True, 0))


# What they cost ----------------------------------------------------------------------------------------------------


def plan(**options):
    return PrivacyPlan.solve(10_000, 200, 50, 1e-5, 1.0, **{"noise_multiplier": 1.2, "epochs": 4} | options)


def test_a_step_tells_as_much_as_one_release_of_the_stated_noise():
    both = plan(query_noise=5.0, target_quantile=0.5, count_noise=4.0)
    parts = [both.noise_at(0), 5.0, 2 * 4.0]
    assert noise_of_all(parts) == pytest.approx(1.2)
    assert both.noise_at(0) > plan(query_noise=5.0).noise_at(0) > plan().noise_at(0) == 1.2
    assert both.epsilon() == plan().epsilon()


def test_the_plan_agrees_with_another_accountant():
    whole = plan(query_noise=5.0, once_noise=20.0)
    accountant = PLDAccountant()
    accountant.compose(GaussianDpEvent(20.0))
    accountant.compose(PoissonSampledDpEvent(0.02, GaussianDpEvent(1.2)), 200)
    assert whole.epsilon() == pytest.approx(accountant.get_epsilon(1e-5), rel=0.02)
    lone = PLDAccountant()
    lone.compose(PoissonSampledDpEvent(0.02, GaussianDpEvent(whole.noise_at(0))), 200)
    assert whole.query_cost == pytest.approx(accountant.get_epsilon(1e-5) - lone.get_epsilon(1e-5), abs=0.03)
    assert whole.query_cost > 0 == plan().query_cost
    assert whole.epsilon(0) > 0  # the count comes before the first step


def test_a_budget_pays_for_the_queries_too():
    found = plan(target_epsilon=1.0, noise_multiplier=None, query_noise=8.0, once_noise=40.0)
    assert 0.99 < found.epsilon() <= 1.0
    assert found.noise_multiplier > plan(target_epsilon=1.0, noise_multiplier=None).noise_multiplier
    assert "of epsilon" in found.describe()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query_noise": 1.0}, "query_noise=1 lets the queries of a step tell more"),
        ({"query_noise": 1.5, "target_quantile": 0.5, "count_noise": 0.8}, "together tell more"),
        ({"once_noise": -1.0}, "once_noise=-1.0 is impossible"),
    ],
)
def test_noise_that_the_step_cannot_hold_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        plan(**options)


# Together ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("notion", ["demographic_parity", "equal_opportunity"])
def test_the_gap_narrows_and_the_plan_books_the_queries(notion):
    plain, guard, dp = trained([private(), fair(max_gap=math.inf)]), fair(notion), private()
    guarded = trained([dp, guard])
    plan = dp.plan
    assert (plan.query_noise, plan.once_noise) == (4.0, 10.0)
    (low, high), (was_low, was_high) = sorted(rates(guarded)), sorted(rates(plain))
    if notion == "demographic_parity":
        assert was_high - was_low > 0.3
        assert high - low < 0.12
    assert "standard error" in guard.notes()[0]
    assert any("queries" in line for line in plan.describe().splitlines())


def test_all_that_is_remembered_passes_through_the_queries(monkeypatch):
    """With answers that tell nothing, the state of the guard does not depend on the data."""

    def states(flipped):
        guard, seen = fair(select=False), []

        class Looking(pl.Callback):
            def on_train_end(self, trainer, module):
                seen.append(str(guard.state()))

        x, y, s = biased()
        parts = torch.utils.data.TensorDataset(x, y, 1 - s if flipped else s)
        fit([guard, private(), Looking()], Logit, torch.utils.data.DataLoader(parts, 100), max_epochs=3)
        return seen[0]

    assert states(flipped=False) != states(flipped=True)
    monkeypatch.setattr(Queries, "release", lambda self: [take(n * 0 + 7.0) for n, _, take in self._open.values()])
    monkeypatch.setattr(
        "lightning_guard.private.PrivateSums.once", lambda self, name, rows: torch.full((9,), 500.0).double()
    )
    assert states(flipped=False) == states(flipped=True)


def test_reweighing_takes_noisy_counts():
    guard = FairnessRegularization(mode="reweigh", groups=[2])
    dp = private()
    guarded = trained([guard, dp])
    assert not same(guarded, trained([private(), fair(max_gap=math.inf)]))
    assert dp.plan.query_noise is None
    assert dp.plan.once_noise == 50.0


def test_a_resumed_run_counts_nothing_twice_and_is_the_same(tmp_path):
    def run(folder, epochs, path=None):
        guard, dp = fair(warmup=5), private(noise_multiplier=1.0, target_epsilon=None)
        kept = pl.callbacks.ModelCheckpoint(folder, filename="last", every_n_epochs=1, save_top_k=-1)
        pl.seed_everything(0, verbose=False)
        net = Logit()
        trainer = pl.Trainer(
            max_epochs=epochs, callbacks=[guard, dp, kept], logger=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(net, data(), ckpt_path=path)
        return net, dp

    whole, dp = run(tmp_path / "a", 4)
    run(tmp_path / "b", 2)
    resumed, again = run(tmp_path / "c", 4, max((tmp_path / "b").glob("*.ckpt"), key=lambda p: p.stat().st_mtime))
    assert same(whole, resumed)
    assert again.plan.epsilon() == dp.plan.epsilon()


def test_off_it_asks_nothing():
    dp = private()
    off = trained([dp, fair(max_gap=math.inf)])
    assert dp.plan.query_noise is None
    x, y, _ = biased()
    pairs = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 100, shuffle=True)
    assert same(off, fit([private()], Logit, pairs, max_epochs=10))


@pytest.mark.parametrize(
    ("guard", "message"),
    [
        (lambda: fair(groups=None), "which groups there are tells who is in the data"),
        (lambda: fair("calibration"), "values without a bound"),
        (lambda: FairnessRegularization(mode="penalty"), "changes what others contribute"),
        (lambda: FairnessRegularization(mode="group_dro"), "which groups there are tells who is in the data"),
        (lambda: FairnessRegularization(mode="mmd"), "changes what others contribute"),
    ],
)
def test_what_has_no_private_form_is_refused(guard, message):
    with pytest.raises(GuardConflict, match=message):
        trained([guard(), private()])


def test_people_with_any_number_of_rows_are_refused():
    with pytest.raises(GuardConflict, match="a person may have any number"):
        trained([fair(), private(users=[i // 2 for i in range(2000)])])


def test_a_bounding_guard_that_answers_nothing_is_refused():
    class Bounding(Guard):
        """Bounds examples and answers no query."""

        name, phase = "bounding", Phase.GRADIENTS
        traits = frozenset({Trait.BOUNDS_EXAMPLES})

    with pytest.raises(GuardConflict, match="nobody answers for sums"):
        trained([fair(), Bounding()])


def test_groups_that_do_not_fit_the_data_are_refused():
    with pytest.raises(GuardConflict, match=r"groups=\[2, 2\] does not fit"):
        trained([fair(groups=[2, 2])])
    with pytest.raises(GuardConflict, match="of 2 attributes, and an example has 1"):
        trained([fair(groups=[2, 2]), private()])


@pytest.mark.parametrize("option", [{"min_support": 5}, {"cap": 2.0}, {"select": False}, {"intersections": True}])
def test_options_of_another_mode_are_refused(option):
    with pytest.raises(ValueError, match="says nothing to mode='counterfactual'"):
        FairnessRegularization(mode="counterfactual", **option)


def test_how_little_few_examples_say_is_said():
    x, y, s = biased(400)
    few = torch.where(s.cumsum(0) <= 34, s, 0)
    guard = FairnessRegularization(max_gap=0.1, warmup=0)
    with pytest.warns(UserWarning, match="of so few examples that the gap on others may be|was not reached"):
        fit([guard], Logit, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y, few), 50), max_epochs=8)
    assert "standard error" in guard.notes()[0]
