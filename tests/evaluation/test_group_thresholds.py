"""Thresholds of each group: against fairlearn's own predictions, and by what they promise."""

import json

import numpy as np
import pytest
import torch
from fairlearn.postprocessing import ThresholdOptimizer
from sklearn.linear_model import LogisticRegression
from torch import nn

from lightning_guard.data import AdultData
from lightning_guard.evaluation import Fairness, GroupThresholds, Subject
from lightning_guard.evaluation.group_thresholds import Rule

NOTIONS = ("demographic_parity", "equal_opportunity", "predictive_equality", "equalized_odds")
CONSTRAINTS = dict(
    zip(
        NOTIONS,
        ("demographic_parity", "true_positive_rate_parity", "false_positive_rate_parity", "equalized_odds"),
        strict=True,
    )
)


def biased(seed: int, n: int = 4000, groups: int = 2):
    """Logits and targets whose base rates differ between groups."""
    generator = torch.Generator().manual_seed(seed)
    group = torch.arange(n) % groups
    logits = torch.randn(n, generator=generator) + 0.8 * group - 0.5
    return logits, (torch.rand(n, generator=generator) < logits.sigmoid()).long(), group


def subject(logits, target, group, **names):
    return Subject(
        nn.Identity(), list(zip(logits.split(500), target.split(500), group.split(500), strict=True)), **names
    )


@pytest.mark.parametrize("notion", NOTIONS)
@pytest.mark.parametrize("max_gap", [0.0, 0.05])
def test_chances_are_those_of_fairlearn(notion, max_gap):
    logits, target, group = biased(0, 800)
    if max_gap and notion == "equalized_odds":
        with pytest.raises(ValueError, match=r"max_gap=0.05 cannot be had with equalized odds"):
            GroupThresholds.fit(subject(logits, target, group), notion, max_gap)
        return
    found = GroupThresholds.fit(subject(logits, target, group), notion, max_gap)
    score = logits.double().sigmoid().numpy()
    model = LogisticRegression().fit(score[:, None], target.numpy())
    model.predict_proba = lambda x: np.concatenate([1 - x, x], 1)
    oracle = ThresholdOptimizer(
        estimator=model, constraints=CONSTRAINTS[notion], objective="accuracy_score", prefit=True,
        predict_method="predict_proba", tol=max_gap or None,
    ).fit(score[:, None], target.numpy(), sensitive_features=group.numpy())  # fmt: skip
    fresh, _, other = biased(1, 800)
    wanted = oracle._pmf_predict(fresh.double().sigmoid().numpy()[:, None], sensitive_features=other.numpy())[:, 1]
    assert found.chances(fresh, other).numpy() == pytest.approx(np.asarray(wanted, dtype=float), abs=1e-9)
    assert GroupThresholds.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False))) == found


@pytest.mark.parametrize("notion", NOTIONS)
def test_the_notion_holds_on_new_data(notion):
    fitted = GroupThresholds.fit(subject(*biased(0, 8000, 3)), notion)
    new = subject(*biased(1, 8000, 3))
    before = Fairness(replicates=10).evaluate(new).figures[f"fairness/{notion}"].value
    found = fitted.evaluate(new, replicates=200)
    after = found.figures[f"group_thresholds/{notion}"].value
    assert before > 0.15
    assert after < 0.06
    low, high = found.intervals[f"group_thresholds/{notion}"]
    assert low <= after <= high + 0.02
    assert "The group is used at prediction time" in found.notes[0]
    assert found.figures["group_thresholds/accuracy"].value > 0.6


def test_adult_keeps_its_gap_within_the_bound():
    data = AdultData(group="sex")
    data.setup("fit")
    data.setup("test")
    x, y, _ = (torch.cat(part) for part in zip(*data.train_dataloader(), strict=True))
    ridge = x.T @ x + 0.1 * torch.eye(x.shape[1])
    net = nn.Linear(x.shape[1], 1, bias=False)
    net.weight.data = 3 * torch.linalg.solve(ridge, x.T @ (2 * y - 1.0))[None]
    names = {"group_names": data.group_names, "class_names": data.class_names}
    fitted = GroupThresholds.fit(Subject(net, data.val_dataloader(), **names), "demographic_parity", max_gap=0.05)
    test = Subject(net, data.test_dataloader(), **names)
    found = fitted.evaluate(test)
    assert found.figures["group_thresholds/demographic_parity"].value < 0.08
    assert Fairness(replicates=10).evaluate(test).figures["fairness/demographic_parity"].value > 0.12
    assert found.figures["group_thresholds/accuracy"].value > 0.81
    assert found == fitted.evaluate(test)


def test_decisions_between_thresholds_are_drawn_by_the_seed():
    fitted = GroupThresholds("equalized_odds", 0.0, {0: Rule(-1, 2, 0.3), 4: Rule(0.5, 0.5, 1.0, 1.0, 0.25)})
    logits, group = torch.tensor([0.0, 3.0, -3.0]).repeat(4000), torch.tensor([0, 4, 4]).repeat(4000)
    chance = fitted.chances(logits, group)
    assert chance[:3].tolist() == pytest.approx([0.3, 1.0, 0.25])
    before = torch.get_rng_state()
    once, again, other = (fitted.predict(logits, group, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    for k in range(3):
        assert float(once[k::3].double().mean()) == pytest.approx(float(chance[k]), abs=0.03)
    two = torch.stack([torch.zeros_like(logits), logits], 1)
    assert torch.equal(fitted.predict(two, group), once)


def test_unknown_groups_are_left_out_or_refused():
    logits, target, group = biased(0)
    some = group.clone()
    some[:50] = -1
    fitted = GroupThresholds.fit(subject(logits, target, some))
    assert fitted == GroupThresholds.fit(subject(logits[50:], target[50:], group[50:]))
    found = fitted.evaluate(subject(logits, target, some), replicates=20)
    assert "50 of 4000 examples are of unknown group: left out." in found.notes
    with pytest.raises(ValueError, match="no threshold for group -1"):
        fitted.predict(logits, some)
    with pytest.raises(ValueError, match="no threshold for group 7"):
        fitted.predict(logits[:1], torch.tensor([7]))


def test_what_has_no_group_thresholds_is_refused():
    logits, target, group = biased(0, 200)
    for wrong, words in (
        ((torch.randn(200, 3), target, group), "decide between two classes"),
        ((logits, torch.randn(200), group), "decide between two classes"),
        ((logits, target, torch.stack([group, group], 1)), "has 2 attributes"),
        ((logits, target, 0 * group), "has 1 known groups"),
        ((logits, target * (group == 0), group), "group 1 lacks a class"),
    ):
        with pytest.raises(ValueError, match=words):
            GroupThresholds.fit(subject(*wrong))
    with pytest.raises(ValueError, match="need the group"):
        GroupThresholds.fit(Subject(nn.Identity(), [(logits, target)]))
    with pytest.raises(ValueError, match="'accuracy_parity' has no group thresholds"):
        GroupThresholds.fit(subject(logits, target, group), "accuracy_parity")
    with pytest.raises(ValueError, match="max_gap=2"):
        GroupThresholds.fit(subject(logits, target, group), max_gap=2)
