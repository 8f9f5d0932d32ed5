"""Changes of gaps on the same examples: as for two models, and as a bootstrap by hand."""

import numpy as np
import pytest
import torch
from fairlearn.metrics import demographic_parity_difference

import lightning_guard as lg
from lightning_guard.callbacks import FairnessRegularization
from lightning_guard.evaluation import Efficiency, Fairness
from lightning_guard.evaluation.table import TABLE_NOTIONS, paired_change
from lightning_guard.report.paired import mean_changes
from tests.toys import Data, PlainNet


def drawn(n=600, models=4, seed=0):
    """Groups, targets, and decisions of models, the even ones more apart between the groups."""
    generator = torch.Generator().manual_seed(seed)
    group = torch.randint(2, (n,), generator=generator)
    target = torch.randint(2, (n,), generator=generator)
    decisions = [
        (torch.rand(n, generator=generator) < 0.4 + 0.2 * target + (0.2 if model % 2 == 0 else 0.02) * group).long()
        for model in range(models)
    ]
    return group, target, decisions


def test_one_pair_is_judged_as_two_models_are():
    group, target, (first, second, *_) = drawn()
    found = {one["figure"]: one for one in mean_changes(group, target, [(first, second)])}
    assert len(found) == len(TABLE_NOTIONS)
    for notion in TABLE_NOTIONS:
        expected = paired_change(group, target, first, second, notion)
        one = found[f"fairness/{notion}"]
        assert one["difference"] == expected.difference
        assert tuple(one["interval"]) == pytest.approx(expected.interval)
        assert one["p"] == pytest.approx(expected.p)


def test_several_pairs_are_drawn_again_together():
    group, target, (a, b, c, d) = drawn(400)
    found = {one["figure"]: one for one in mean_changes(group, target, [(a, b), (c, d)])}["fairness/demographic_parity"]

    def gap(decision, rows):
        return demographic_parity_difference(target[rows], decision[rows], sensitive_features=group[rows])

    everyone = np.arange(400)
    expected = (gap(b, everyone) - gap(a, everyone) + gap(d, everyone) - gap(c, everyone)) / 2
    assert found["difference"] == pytest.approx(expected)
    assert found["narrower"] == sum(gap(after, everyone) < gap(before, everyone) for before, after in ((a, b), (c, d)))
    draws, means = np.random.default_rng(1), []
    rates = np.stack([part.numpy() for part in (a, b, c, d)])
    for _ in range(3000):  # by hand: rows with replacement, the same for all four models
        rows = draws.integers(400, size=400)
        inside = group.numpy()[rows] == 1
        gaps = np.abs(rates[:, rows][:, inside].mean(1) - rates[:, rows][:, ~inside].mean(1))
        means.append((gaps[1] - gaps[0] + gaps[3] - gaps[2]) / 2)
    low, high = np.quantile(means, [0.025, 0.975])
    assert found["interval"] == pytest.approx([low, high], abs=0.15 * (high - low))


def test_a_model_does_not_differ_from_itself():
    group, target, (first, *_) = drawn()
    for one in mean_changes(group, target, [(first, first), (first, first)]):
        assert (one["difference"], one["interval"], one["p"], one["narrower"]) == (0.0, [0.0, 0.0], 1.0, 0)


def test_a_gap_that_cannot_be_estimated_has_no_entry():
    group, target, (first, second, *_) = drawn()
    found = mean_changes(group, torch.ones_like(target), [(first, second)])  # no false positive rate
    assert {one["figure"].split("/")[1] for one in found} == {
        "demographic_parity", "equal_opportunity", "accuracy_parity"
    }  # fmt: skip


def test_a_comparison_says_what_changed_on_the_same_examples(tmp_path):
    own = {"none": [], "fair": [FairnessRegularization(mode="penalty", weight=30.0)]}
    judges = [Fairness(min_support=1)]
    report = lg.compare(PlainNet, Data, own, {"max_epochs": 2, "accelerator": "cpu"}, 2, judges, tmp_path)
    by_arm = {(run["arm"], run["seed"]): run["values"] for run in report["runs"]}
    assert report["changes"]
    for entry in report["changes"]:
        differences = [by_arm["fair", seed][entry["figure"]] - by_arm["none", seed][entry["figure"]] for seed in (0, 1)]
        assert entry["difference"] == pytest.approx(sum(differences) / 2)
        assert entry["narrower"] == sum(difference < 0 for difference in differences)
        assert entry["arm"] == "fair"
    page = (tmp_path / "report.html").read_text()
    assert page.count("Change of group gaps on the same examples") == 2  # the heading, and its region
    assert "Change of group gaps on the same examples" in (tmp_path / "report.md").read_text()


def test_without_decisions_nothing_is_said(tmp_path):
    options = {"max_epochs": 1, "accelerator": "cpu"}
    judges = [Efficiency(latency=False)]
    report = lg.compare(PlainNet, Data, {"none": [], "more": []}, options, 1, judges, tmp_path)
    assert report["changes"] == []
    assert "same examples" not in (tmp_path / "report.html").read_text()
