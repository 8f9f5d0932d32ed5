"""Group figures against fairlearn, counting, and simulation."""

import re

import numpy as np
import pytest
import torch
from fairlearn.metrics import (
    MetricFrame,
    demographic_parity_difference,
    equal_opportunity_difference,
    equalized_odds_difference,
    false_positive_rate,
    selection_rate,
    true_positive_rate,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score
from torch import nn

from lightning_guard.evaluation import Evidence, Fairness, Subject
from lightning_guard.evaluation.table import bootstrap, chance_gap, gaps, rates, tabulate
from lightning_guard.functional import NOTIONS, group_gap, positive_scores, rate_sums

FAIRLEARN = {
    "demographic_parity": demographic_parity_difference,
    "equal_opportunity": equal_opportunity_difference,
    "equalized_odds": equalized_odds_difference,
}


def population(seed: int, n: int = 200, groups: int = 3, classes: int = 2):
    """Logits, targets and groups; every group has every class."""
    generator = torch.Generator().manual_seed(seed)
    cells = torch.cartesian_prod(torch.arange(groups), torch.arange(classes))
    rows = torch.randint(len(cells), (n,), generator=generator)
    group, target = torch.cat([cells, cells[rows]]).T
    logits = torch.randn((len(group), classes), generator=generator)
    logits[:, 1] += 0.4 * group
    return logits[:, 1] if classes == 2 else logits, target, group


def evaluated(logits, target, group, **options) -> Evidence:
    names = {key: options.pop(key) for key in ("group_names", "class_names") if key in options}
    batches = list(zip(logits.split(64), target.split(64), group.split(64), strict=True))
    return Fairness(**{"replicates": 20, **options}).evaluate(Subject(nn.Identity(), batches, **names))


def values(evidence: Evidence) -> dict[str, float | None]:
    return {key.split("/")[1]: figure.value for key, figure in evidence.figures.items()}


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 5), st.integers(20, 200))
def test_two_classes_are_as_in_fairlearn(seed, groups, n):
    logits, target, group = population(seed, n, groups)
    evidence = evaluated(logits, target, group)
    arrays = target.numpy(), (logits > 0).long().numpy()
    found = values(evidence)
    for notion in NOTIONS:
        wanted = FAIRLEARN[notion](*arrays, sensitive_features=group.numpy())
        assert found[notion] == pytest.approx(wanted, abs=1e-12)
    frame = MetricFrame(
        metrics={"selection_rate": selection_rate, "true_positive_rate": true_positive_rate,
                 "false_positive_rate": false_positive_rate, "accuracy": accuracy_score},
        y_true=arrays[0], y_pred=arrays[1], sensitive_features=group.numpy(),
    ).by_group  # fmt: skip
    assert {key.split("/")[1] for key in evidence.bars} == set(frame.columns)
    for name in frame.columns:
        assert evidence.bars[f"fairness/{name}"].values == pytest.approx(frame[name].tolist())
        assert evidence.bars[f"fairness/{name}"].categories == [f"group {g}" for g in range(groups)]
    assert found["worst_group_accuracy"] == pytest.approx(frame["accuracy"].min())


@pytest.mark.parametrize("seed", range(3))
def test_of_many_classes_the_worst_against_the_rest_counts(seed):
    logits, target, group = population(seed, groups=2, classes=4)
    evidence = evaluated(logits, target, group)
    for notion in NOTIONS:
        wanted = max(
            FAIRLEARN[notion]((target == c).numpy(), (logits.argmax(1) == c).numpy(), sensitive_features=group.numpy())
            for c in range(4)
        )
        assert values(evidence)[notion] == pytest.approx(wanted, abs=1e-12)
    assert list(evidence.bars) == ["fairness/accuracy"]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 4), st.integers(2, 4), st.sampled_from(NOTIONS))
def test_the_table_says_what_the_examples_say(seed, groups, classes, notion):
    """The guard's training rates and the evaluator's come from two formulas."""
    logits, target, group = population(seed, 60, groups, classes)
    decision = (logits > 0).long() if classes == 2 else logits.argmax(1)
    table = tabulate(group, target, decision, groups, classes)
    assert table.sum() == len(group)
    wanted = rate_sums(positive_scores(logits), group, target, notion)
    for found, part in zip(rates(table, notion), wanted, strict=True):
        torch.testing.assert_close(found.T.float(), part)
    torch.testing.assert_close(gaps(table, notion).float(), group_gap(logits, group, target, notion))
    several = gaps(torch.stack([table, table.flip(0)]), notion)
    assert torch.equal(several[0], several[1])  # the order of the groups is nobody's


def test_without_groups_there_is_a_note():
    subject = Subject(nn.Identity(), [(torch.zeros(4), torch.ones(4))])
    evidence = Fairness().evaluate(subject)
    assert (evidence.figures, evidence.bars) == ({}, {})
    assert evidence.notes == ["No group rates: the batches have no group; if they do, say where with Batch(group=...)."]


def test_unknown_groups_count_nowhere():
    logits, target, group = population(0)
    wanted = values(evaluated(logits, target, group))
    more = [torch.cat([part, part[:9]]) for part in (logits, target, group)]
    more[2][-9:] = -1
    evidence = evaluated(*more)
    assert values(evidence) == wanted
    assert "9 of 215 examples are of unknown group and count in no rate." in evidence.notes
    nobody = evaluated(logits, target, torch.full_like(group, -1))
    assert not nobody.figures
    assert "no example has one" in nobody.notes[0]


def test_an_absent_group_is_no_group():
    logits, target, group = population(0)
    evidence = evaluated(logits, target, 2 * group, group_names=["a", "b", "c", "d", "e"])
    assert values(evidence) == values(evaluated(logits, target, group))
    assert evidence.bars["fairness/accuracy"].categories == ["a", "c", "e"]


def test_a_single_group_has_no_gap():
    logits, target, group = population(0)
    evidence = evaluated(logits, target, torch.zeros_like(group), group_names=["all"])
    assert [values(evidence)[notion] for notion in NOTIONS] == [None] * 3
    assert values(evidence)["worst_group_accuracy"] > 0
    assert "There is nothing to compare: all examples are of all." in evidence.notes
    assert evidence.intervals == {}


def test_a_rate_without_examples_is_not_zero():
    """fairlearn takes the true positive rate of a group without positives for 0, and the gap for 1."""
    logits = torch.tensor([1.0, 1.0, 1.0, -1.0])
    target, group = torch.tensor([1, 0, 0, 0]), torch.tensor([0, 0, 1, 1])
    assert equal_opportunity_difference(target, logits > 0, sensitive_features=group) == 1.0
    evidence = evaluated(logits, target, group, group_names=["a", "b"], class_names=["no", "yes"])
    found = values(evidence)
    assert found["equal_opportunity"] is None
    assert found["equalized_odds"] is None
    assert found["demographic_parity"] == 0.5
    assert evidence.bars["fairness/true_positive_rate"].values == [1.0, None]
    assert any("b has 0 of yes" in note and "cannot be estimated" in note for note in evidence.notes)
    assert "fairness/equal_opportunity" not in evidence.intervals


def test_small_groups_are_named():
    logits, target, group = population(0, n=600)
    few = group != 2
    few |= torch.arange(len(group)) < 20
    evidence = evaluated(logits[few], target[few], group[few], min_support=30, group_names=["a", "b", "c"])
    named = [note for note in evidence.notes if "Fewer than 30" in note]
    assert len(named) == 1
    for label in range(2):
        count = int(((group[few] == 2) & (target[few] == label)).sum())
        assert f"c has {count} of class {label}" in named[0]
    assert "a has" not in named[0]
    enough = evaluated(logits, target, group, min_support=30)
    assert not any("Fewer" in note for note in enough.notes)


def test_identifiers_are_not_taken_for_groups():
    n = 60
    evidence = evaluated(torch.ones(n), torch.ones(n), torch.arange(n))
    assert not evidence.figures
    assert "look like identifiers" in evidence.notes[0]


@pytest.mark.parametrize(
    ("logits", "target", "word"),
    [
        (torch.tensor([0.5, 1.5]), torch.tensor([0.1, 0.2]), "needs? classes|need classes"),
        (torch.tensor([torch.nan, 1.5]), torch.tensor([0, 1]), "not numbers"),
    ],
)
def test_what_has_no_rates_is_a_note(logits, target, word):
    evidence = evaluated(logits, target, torch.tensor([0, 1]))
    assert not evidence.figures
    assert len(evidence.notes) == 1
    assert re.search(word, evidence.notes[0])


def test_the_table_bootstrap_is_the_bootstrap_over_examples():
    logits, target, group = population(1, n=300)
    decision = (logits > 0).long()
    table = tabulate(group, target, decision, 3, 2)
    found = bootstrap(table, 1500, np.random.default_rng(0))
    draws = torch.Generator().manual_seed(0)
    for notion in NOTIONS:
        again = []
        for _ in range(1500):
            rows = torch.randint(len(group), (len(group),), generator=draws)
            again.append(gaps(tabulate(group[rows], target[rows], decision[rows], 3, 2), notion))
        for q in (0.05, 0.5, 0.95):
            wanted = torch.stack(again).quantile(q).item()
            assert found[notion].quantile(q).item() == pytest.approx(wanted, abs=0.015)


def test_intervals_agree_with_fairlearns_bootstrap():
    """fairlearn bootstraps rows; of two groups the selection rates' difference is its demographic parity."""
    logits, target, group = population(2, n=800, groups=2)
    frame = MetricFrame(
        metrics=selection_rate, y_true=target.numpy(), y_pred=(logits > 0).long().numpy(),
        sensitive_features=group.numpy(), n_boot=150, ci_quantiles=[0.025, 0.975], random_state=0,
    )  # fmt: skip
    wanted = frame.difference_ci()
    found = evaluated(logits, target, group, replicates=2000).intervals["fairness/demographic_parity"]
    assert found == pytest.approx(wanted, abs=0.02)


def test_intervals_cover_the_truth_as_often_as_they_say():
    """Of populations drawn again and again, about 95 in 100 have the true gap in their interval."""
    truth = torch.tensor([[[0.25, 0.05], [0.08, 0.12]], [[0.15, 0.15], [0.04, 0.16]]], dtype=torch.float64)
    rng, covered, runs = np.random.default_rng(0), dict.fromkeys(NOTIONS, 0), 300
    for _ in range(runs):
        table = torch.from_numpy(rng.multinomial(1500, truth.flatten().numpy())).double().reshape(2, 2, 2)
        drawn = bootstrap(table, 400, rng)
        for notion in NOTIONS:
            low, high = drawn[notion].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
            covered[notion] += int(low <= gaps(truth, notion) <= high)
    for notion in NOTIONS:
        assert 0.91 <= covered[notion] / runs <= 0.985


def test_what_chance_alone_shows_is_what_simulation_shows():
    rng = np.random.default_rng(0)
    counts = np.array([[[14, 1], [13, 2]], [[60, 40], [40, 60]], [[28, 2], [27, 3]]])  # group, label, prediction
    table = torch.from_numpy(counts).double()
    negatives, positives = counts.sum(2).T
    fpr, tpr = counts[:, 0, 1].sum() / negatives.sum(), counts[:, 1, 1].sum() / positives.sum()
    selected = counts[:, :, 1].sum() / counts.sum()

    def shown(sizes, rate):
        return np.ptp(rng.binomial(sizes, rate, size=(4000, 3)) / sizes, axis=1)

    wanted = {
        "demographic_parity": shown(counts.sum((1, 2)), selected),
        "equal_opportunity": shown(positives, tpr),
        "equalized_odds": np.maximum(shown(positives, tpr), shown(negatives, fpr)),
    }
    for notion in NOTIONS:
        found = chance_gap(table, notion, 4000, rng)
        assert found == pytest.approx(wanted[notion].mean(), rel=0.04)


def test_gaps_come_with_intervals_and_what_chance_would_show():
    evidence = evaluated(*population(0), replicates=300)
    for notion in NOTIONS:
        low, high = evidence.intervals[f"fairness/{notion}"]
        assert low < values(evidence)[notion] <= high + 0.05
    assert any("95% intervals from 206 examples: demographic parity gap" in note for note in evidence.notes)
    assert any("equal rates would show by chance: demographic parity gap" in note for note in evidence.notes)
    assert evaluated(*population(0), replicates=300) == evidence
    assert evaluated(*population(0), replicates=300, seed=1).intervals != evidence.intervals


def test_a_gap_that_many_draws_cannot_give_has_no_interval():
    logits, target, group = population(0, n=400, groups=2)
    keep = (group == 0) | (target == 0) | (torch.arange(len(group)) < 4)  # a single positive of group 1
    evidence = evaluated(logits[keep], target[keep], group[keep], replicates=500)
    assert values(evidence)["equal_opportunity"] is not None
    assert "fairness/equal_opportunity" not in evidence.intervals
    assert "fairness/demographic_parity" in evidence.intervals


def test_tables_of_many_classes_are_drawn_in_parts(monkeypatch):
    from lightning_guard.evaluation import table as module

    logits, target, group = population(3, groups=2, classes=4)
    table = tabulate(group, target, logits.argmax(1), 2, 4)
    whole = bootstrap(table, 50, np.random.default_rng(0))
    monkeypatch.setattr(module, "_AT_ONCE", 7 * table.numel())
    parts = bootstrap(table, 50, np.random.default_rng(0))
    for notion in NOTIONS:
        assert torch.equal(whole[notion].nan_to_num(-1), parts[notion].nan_to_num(-1))


@pytest.mark.parametrize("options", [{"min_support": 0}, {"replicates": 0}])
def test_what_is_no_number_is_refused_by_name(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}=0"):
        Fairness(**options)
