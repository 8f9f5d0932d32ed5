"""The table of counts and what is drawn from it: against fairlearn, resampled examples, and simulation."""

import numpy as np
import pytest
import torch
from fairlearn.metrics import MetricFrame, false_positive_rate, selection_rate, true_positive_rate
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score

from lightning_guard.evaluation import paired_change
from lightning_guard.evaluation.chance import chance_gaps, corrected_gap
from lightning_guard.evaluation.families import families
from lightning_guard.evaluation.table import (
    TABLE_NOTIONS,
    Panel,
    bootstrap,
    cells,
    gaps,
    judged,
    percentiles,
    rates,
    sums,
    tabulate,
)
from lightning_guard.functional import group_gap, positive_scores, rate_sums

OLD = ("demographic_parity", "equal_opportunity", "equalized_odds")


def population(seed: int, n: int = 200, groups: int = 3, classes: int = 2):
    """Logits, targets and groups; every group has every class."""
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.cartesian_prod(torch.arange(groups), torch.arange(classes))
    rows = torch.randint(len(pairs), (n,), generator=generator)
    group, target = torch.cat([pairs, pairs[rows]]).T
    logits = torch.randn((len(group), classes), generator=generator)
    logits[:, 1] += 0.4 * group
    return logits[:, 1] if classes == 2 else logits, target, group


def table_of(seed: int, n: int = 200, groups: int = 3, classes: int = 2) -> torch.Tensor:
    logits, target, group = population(seed, n, groups, classes)
    return tabulate(group, target, (logits > 0).long() if classes == 2 else logits.argmax(1), groups, classes)


def by_loop(group, target, decision, notion: str, min_support: int = 1) -> float:
    """The gap, written as one would explain it; NaN where fewer than two groups can be compared."""
    classes = [1] if max(int(target.max()), int(decision.max())) < 2 else range(int(target.max()) + 1)
    kinds = {"equalized_odds": ("equal_opportunity", "predictive_equality")}.get(notion, (notion,))
    worst = []
    for kind in kinds:
        for c in classes if kind != "accuracy_parity" else [None]:
            found = []
            for g in range(int(group.max()) + 1):
                hits, among = 0, 0
                for s, y, d in zip(group.tolist(), target.tolist(), decision.tolist(), strict=True):
                    counts = {"equal_opportunity": y == c, "predictive_equality": y != c}.get(kind, True)
                    if s == g and counts:
                        among += 1
                        hits += (y == d) if kind == "accuracy_parity" else (d == c)
                if among >= min_support:
                    found.append(hits / among)
            worst.append(max(found) - min(found) if len(found) > 1 else float("nan"))
    return float("nan") if any(gap != gap for gap in worst) else max(worst)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 4), st.integers(2, 4), st.sampled_from(TABLE_NOTIONS), st.integers(1, 12))
def test_gaps_are_those_of_a_loop_over_examples(seed, groups, classes, notion, min_support):
    logits, target, group = population(seed, 40, groups, classes)
    decision = (logits > 0).long() if classes == 2 else logits.argmax(1)
    table = tabulate(group, target, decision, groups, classes)
    wanted = by_loop(group, target, decision, notion, min_support)
    found = float(gaps(table, notion, judged(table, notion, min_support)))
    assert found == pytest.approx(wanted, abs=1e-12, nan_ok=True)
    panel = Panel(families(group), target, decision, min_support, classes)
    assert panel.values()[notion] == pytest.approx(wanted, abs=1e-12, nan_ok=True)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 4), st.integers(2, 4), st.sampled_from(OLD))
def test_the_table_says_what_the_guards_rates_say(seed, groups, classes, notion):
    """The guard's training rates and the evaluator's come from two formulas."""
    logits, target, group = population(seed, 60, groups, classes)
    table = table_of(seed, 60, groups, classes)
    assert table.sum() == len(group)
    wanted = rate_sums(positive_scores(logits), group, target, notion)
    for found, part in zip(rates(table, notion), wanted, strict=True):
        torch.testing.assert_close(found.T.float(), part)
    torch.testing.assert_close(gaps(table, notion).float(), group_gap(logits, group, target, notion))
    several = gaps(torch.stack([table, table.flip(0)]), notion)
    assert torch.equal(several[0], several[1])  # the order of the groups is nobody's


def test_an_unknown_notion_is_refused():
    with pytest.raises(ValueError, match="'parity' compares no rates"):
        rates(table_of(0), "parity")


def test_cells_are_the_distinct_rows():
    generator = torch.Generator().manual_seed(0)
    first, second = (
        torch.randint(-1, 3, (200,), generator=generator),
        torch.randint(0, 2, (200, 3), generator=generator),
    )
    chosen, counts = cells(first, second)
    rows = torch.cat([first[:, None], second], 1)
    wanted = dict(
        zip(map(tuple, (u := rows.unique(dim=0, return_counts=True))[0].tolist()), u[1].tolist(), strict=True)
    )
    assert dict(zip(map(tuple, rows[chosen].tolist()), counts.tolist(), strict=True)) == wanted


def test_the_table_bootstrap_is_the_bootstrap_over_examples():
    logits, target, group = population(1, n=300)
    decision = (logits > 0).long()
    found = bootstrap(tabulate(group, target, decision, 3, 2), 1500, np.random.default_rng(0))
    draws = torch.Generator().manual_seed(0)
    for notion in TABLE_NOTIONS:
        again = []
        for _ in range(1500):
            rows = torch.randint(len(group), (len(group),), generator=draws)
            again.append(gaps(tabulate(group[rows], target[rows], decision[rows], 3, 2), notion))
        for q in (0.05, 0.5, 0.95):
            wanted = torch.stack(again).quantile(q).item()
            assert found[notion].quantile(q).item() == pytest.approx(wanted, abs=0.015)


def test_attributes_and_labels_are_drawn_together():
    """Worst of two attributes, their crossing, and two labels: as often large as in resampled examples."""
    generator = torch.Generator().manual_seed(5)
    group = torch.randint(0, 2, (400, 2), generator=generator)
    target = torch.randint(0, 2, (400, 2), generator=generator)
    decision = (torch.rand(400, 2, generator=generator) < 0.4 + 0.2 * group[:, :1] * target).long()
    kin = families(group, intersections=True)
    assert [len(family.names) for family in kin] == [2, 2, 4]
    panel = Panel(kin, target, decision, 1, 2)
    drawn = panel.bootstrap(1500, np.random.default_rng(0))

    def by_hand(rows):
        codes = [group[rows, 0], group[rows, 1], group[rows, 0] * 2 + group[rows, 1]]
        every = [tabulate(code, target[rows, k], decision[rows, k], 4, 2) for code in codes for k in (0, 1)]
        found = {
            notion: max(float(gaps(table, notion, judged(table, notion, 1))) for table in every)
            for notion in TABLE_NOTIONS
        }
        accuracy = [table.diagonal(dim1=1, dim2=2).sum(1) / table.sum((1, 2)) for table in every]
        found["worst_group_accuracy"] = min(float(rate[~rate.isnan()].min()) for rate in accuracy)
        return found

    assert panel.values() == pytest.approx(by_hand(torch.arange(400)))
    again = [by_hand(torch.randint(400, (400,), generator=generator)) for _ in range(400)]
    for key, values in drawn.items():
        wanted = np.quantile([one[key] for one in again], [0.1, 0.5, 0.9])
        assert np.quantile(values, [0.1, 0.5, 0.9]) == pytest.approx(wanted, abs=0.02)


def test_tables_of_many_classes_are_drawn_in_parts(monkeypatch):
    from lightning_guard.evaluation import table as module

    table = table_of(3, groups=2, classes=4)
    whole = bootstrap(table, 50, np.random.default_rng(0))
    monkeypatch.setattr(module, "_AT_ONCE", 7 * table.numel())
    parts = bootstrap(table, 50, np.random.default_rng(0))
    for notion in TABLE_NOTIONS:
        assert torch.equal(whole[notion].nan_to_num(-1), parts[notion].nan_to_num(-1))


def test_drawing_examples_is_drawing_cells():
    """Cells of one example each are drawn as examples, others as a multinomial: the same distribution."""
    group, target, decision = torch.arange(60) % 2, (torch.arange(60) % 7 < 3).long(), (torch.arange(60) % 5 < 2).long()
    own = (torch.arange(60), torch.ones(60, dtype=torch.float64))
    few, many = (Panel(families(group), target, decision, 1, 2, chosen) for chosen in (None, own))
    assert many.values() == few.values()
    drawn = [panel.bootstrap(6000, np.random.default_rng(0)) for panel in (few, many)]
    for key in drawn[0]:
        one, two = (part[key][~part[key].isnan()].numpy() for part in drawn)
        assert one.mean() == pytest.approx(two.mean(), abs=0.004)
        assert one.std() == pytest.approx(two.std(), abs=0.004)


@pytest.mark.parametrize("classes", [2, 3])
def test_sums_of_many_columns_are_those_of_few(classes):
    from lightning_guard.evaluation.table import Sheet

    generator = torch.Generator().manual_seed(0)
    group = torch.randint(-1, 40, (300,), generator=generator)
    target, decision = torch.randint(0, classes, (2, 300), generator=generator)
    counts = torch.randint(0, 9, (5, 300), generator=generator).double()
    few = Sheet(0, 0, group.clamp_max(3), target, decision, 4, classes)
    many = Sheet(0, 0, group.clamp_max(3), target, decision, 40, classes)
    for product, added in zip(few.sums(counts), many.sums(counts), strict=True):
        assert torch.equal(product, added[:, :4])
        assert not added[:, 4:].any()


def test_percentiles_of_too_few_are_none():
    assert percentiles(torch.cat([torch.arange(96.0), torch.full((4,), torch.nan)])) is not None
    assert percentiles(torch.cat([torch.arange(94.0), torch.full((6,), torch.nan)])) is None


def test_intervals_cover_the_truth_as_often_as_they_say():
    """Of populations drawn again and again, about 95 in 100 have the true gap in their interval."""
    truth = torch.tensor([[[0.25, 0.05], [0.08, 0.12]], [[0.15, 0.15], [0.04, 0.16]]], dtype=torch.float64)
    rng, covered, runs = np.random.default_rng(0), dict.fromkeys(TABLE_NOTIONS, 0), 300
    for _ in range(runs):
        table = torch.from_numpy(rng.multinomial(1500, truth.flatten().numpy())).double().reshape(2, 2, 2)
        drawn = bootstrap(table, 400, rng)
        for notion in TABLE_NOTIONS:
            low, high = drawn[notion].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
            covered[notion] += int(low <= gaps(truth, notion) <= high)
    for notion in TABLE_NOTIONS:
        assert 0.91 <= covered[notion] / runs <= 0.985


@pytest.mark.slow
def test_intervals_on_adult_are_those_of_fairlearns_bootstrap():
    """300 resamplings of 16,281 rows by fairlearn; the quantiles of so few are uncertain by some 0.003."""
    from lightning_guard.data import AdultData

    data = AdultData(group="sex")
    data.setup("test")
    x, y, group = (torch.cat(part) for part in zip(*data.test_dataloader(), strict=True))
    score = x[:, list(data.continuous)].sum(1) + 0.3 * x[:, data.feature_names.index("relationship=Husband")]
    decision = (score > score.quantile(0.8)).long()
    table = tabulate(group, y, decision, 2, 2)
    drawn = bootstrap(table, 10_000, np.random.default_rng(0))
    metrics = {
        "demographic_parity": selection_rate, "equal_opportunity": true_positive_rate,
        "predictive_equality": false_positive_rate, "accuracy_parity": accuracy_score,
    }  # fmt: skip
    frame = MetricFrame(
        metrics=metrics, y_true=y.numpy(), y_pred=decision.numpy(), sensitive_features=group.numpy(),
        n_boot=300, ci_quantiles=[0.025, 0.975], random_state=0,
    )  # fmt: skip
    low, high = frame.difference_ci()
    for notion in metrics:
        assert percentiles(drawn[notion]) == pytest.approx((low[notion], high[notion]), abs=0.008)


def test_what_chance_alone_shows_is_what_simulation_shows():
    rng = np.random.default_rng(0)
    counts = np.array([[[14, 1], [13, 2]], [[60, 40], [40, 60]], [[28, 2], [27, 3]]])  # group, label, prediction
    table = torch.from_numpy(counts).double()
    negatives, positives = counts.sum(2).T
    fpr, tpr = counts[:, 0, 1].sum() / negatives.sum(), counts[:, 1, 1].sum() / positives.sum()
    selected = counts[:, :, 1].sum() / counts.sum()
    right = (counts[:, 0, 0] + counts[:, 1, 1]).sum() / counts.sum()

    def shown(sizes, rate):
        return np.ptp(rng.binomial(sizes, rate, size=(4000, 3)) / sizes, axis=1)

    wanted = {
        "demographic_parity": shown(counts.sum((1, 2)), selected),
        "equal_opportunity": shown(positives, tpr),
        "predictive_equality": shown(negatives, fpr),
        "equalized_odds": np.maximum(shown(positives, tpr), shown(negatives, fpr)),
        "accuracy_parity": shown(counts.sum((1, 2)), right),
    }
    for notion in TABLE_NOTIONS:
        assert float(chance_gaps(table, notion, rng).mean()) == pytest.approx(wanted[notion].mean(), rel=0.05)
    without = judged(table, "demographic_parity", 40)  # the first group is left out
    assert without[:, 0].tolist() == [False, True, True]
    two = float(chance_gaps(table[1:], "demographic_parity", np.random.default_rng(1)).mean())
    assert float(chance_gaps(table, "demographic_parity", rng, without).mean()) == pytest.approx(two, rel=0.06)


@pytest.mark.parametrize(
    ("size", "truth"),
    [
        ([50] * 5, [0.3] * 5),
        ([20] * 10, [0.3] * 10),
        ([50] * 5, [0.3, 0.35, 0.35, 0.35, 0.4]),
        ([40] * 10, [0.3] * 9 + [0.6]),
    ],
)
def test_the_corrected_gap_has_half_the_bias_at_most(size, truth):
    rng, raw, corrected = np.random.default_rng(0), [], []
    for _ in range(25):
        chosen = rng.binomial(size, truth)
        table = torch.zeros(len(size), 2, 2, dtype=torch.float64)
        table[:, 1, 1], table[:, 1, 0] = torch.from_numpy(chosen), torch.from_numpy(size - chosen)
        raw.append(float(gaps(table, "demographic_parity")))
        corrected.append(corrected_gap(table, "demographic_parity"))
    true = max(truth) - min(truth)
    assert np.mean(raw) - true > 0.05  # there is something to correct
    assert abs(np.mean(corrected) - true) < 0.5 * (np.mean(raw) - true)


def test_large_groups_need_no_correction():
    table = 1000 * table_of(0)
    for notion in TABLE_NOTIONS:
        assert corrected_gap(table, notion) == pytest.approx(float(gaps(table, notion)), rel=0.01)
    alone = table[:1]
    assert corrected_gap(alone, "demographic_parity") != corrected_gap(alone, "demographic_parity")  # NaN


@pytest.mark.parametrize("notion", [*TABLE_NOTIONS, "worst_group_accuracy"])
def test_paired_changes_are_those_of_resampled_examples(notion):
    generator = torch.Generator().manual_seed(3)
    logits, target, group = population(6, n=500, groups=2)
    first = (logits > 0).long()
    second = (logits + 0.3 * torch.randn(len(logits), generator=generator) - 0.25 * group > 0).long()
    change = paired_change(group, target, first, second, notion, min_support=1, replicates=4000)

    def figure(rows, decision):
        table = tabulate(group[rows], target[rows], decision[rows], 2, 2)
        if notion == "worst_group_accuracy":
            return float((table.diagonal(dim1=1, dim2=2).sum(1) / table.sum((1, 2))).min())
        return float(gaps(table, notion))

    everyone = torch.arange(len(group))
    assert (change.first, change.second) == pytest.approx((figure(everyone, first), figure(everyone, second)))
    assert change.difference == pytest.approx(change.second - change.first)
    again = []
    for _ in range(1000):
        rows = torch.randint(len(group), (len(group),), generator=generator)
        again.append(figure(rows, second) - figure(rows, first))
    assert change.interval == pytest.approx(np.quantile(again, [0.025, 0.975]), abs=0.015)
    p = 2 * min(np.mean(np.array(again) <= 0), np.mean(np.array(again) >= 0))
    assert change.p == pytest.approx(min(1, p), abs=0.05)


def test_equal_models_do_not_differ_and_unequal_ones_do():
    logits, target, group = population(6, n=800, groups=2)
    first = (logits > 0).long()
    same = paired_change(group, target, first, first, replicates=500)
    assert (same.difference, same.interval, same.p) == (0.0, (0.0, 0.0), 1.0)
    fair = (torch.randn(len(group), generator=torch.Generator().manual_seed(0)) > 0).long()
    change = paired_change(group, target, group, fair, replicates=1000)
    assert change.interval[1] < 0
    assert change.p < 0.01


def test_under_no_difference_p_is_rarely_small():
    rng, small = torch.Generator().manual_seed(0), 0
    for _ in range(150):
        group, target = torch.randint(0, 2, (2, 500), generator=rng)
        rate = 0.3 + 0.3 * group
        both = [(torch.rand(500, generator=rng) < rate).long() for _ in range(2)]
        small += paired_change(group, target, *both, replicates=300).p < 0.05
    assert 1 <= small <= 15


def test_pairing_refuses_what_is_no_pair():
    ok = torch.tensor([0, 1, 1])
    with pytest.raises(ValueError, match="second has 2 examples and group 3"):
        paired_change(ok, ok, ok, ok[:2])
    with pytest.raises(ValueError, match="first has negative predictions"):
        paired_change(ok, ok, ok - 1, ok)
    with pytest.raises(ValueError, match="'gap' is not known"):
        paired_change(ok, ok, ok, ok, "gap")
    assert paired_change(ok, ok, ok, ok, min_support=30) == (None,) * 5
    assert paired_change(ok[:0], ok[:0], ok[:0], ok[:0]) == (None,) * 5
    assert sums(tabulate(ok, ok, ok, 2, 2)).hits.tolist() == [[1, 0], [0, 2]]
