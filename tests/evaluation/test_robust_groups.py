"""Groups under attack: closed forms of linear models, hand-written loops, and fairlearn on the attacked decisions."""

import pytest
import torch
from fairlearn.metrics import MetricFrame, demographic_parity_difference
from sklearn.metrics import accuracy_score
from torch import nn

from lightning_guard.evaluation import Fairness, Robustness, Subject, siege
from lightning_guard.evaluation.robust_groups import robust_groups, under_attack
from lightning_guard.evaluation.subject import predicted

EPS = 0.06


@pytest.fixture(autouse=True)
def few_queries(monkeypatch):
    monkeypatch.setattr(siege, "QUERIES", 60)
    monkeypatch.setattr(siege, "PROBES", 20)


def rows(columns: int, n: int = 300, seed: int = 0):
    """A linear model and rows, of which those of group 1 lie nearer to its boundary, and some have wrong labels."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    net = nn.Linear(4, columns).double()
    nn.init.zeros_(net.bias)
    group = torch.randint(3, (n,), generator=generator)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 0.3, 0.6])[group, None]
    with torch.no_grad():
        y = predicted(net(x)[:, 0] if columns == 1 else net(x))
    wrong = torch.rand(n, generator=generator) < 0.1
    return net, x, torch.where(wrong, (y + 1) % max(columns, 2), y), group


def judged(net, x, y, group, **options):
    batches = list(zip(x.split(100), y.split(100), group.split(100), strict=True))
    return Robustness(EPS, **{"curve": (), **options}).evaluate(Subject(net, batches))


def value(found, name):
    return found.figures[f"robustness/{name}"].value


@pytest.mark.parametrize("columns", [1, 2])
def test_of_two_classes_they_are_the_closed_form_and_fairlearns(columns):
    net, x, y, group = rows(columns)
    with torch.no_grad():
        weight = net.weight[0] if columns == 1 else net.weight[1] - net.weight[0]
        bias = net.bias[0] if columns == 1 else net.bias[1] - net.bias[0]
        clean = x @ weight + bias
    decisions = []
    for score, label in zip(clean.tolist(), y.tolist(), strict=True):  # the worst case moves each score the whole way
        push = EPS * weight.abs().sum().item()
        decisions.append(int(score - push > 0) if label == 1 else int(score + push > 0))
    attacked = torch.tensor(decisions)
    assert not torch.equal(attacked, (clean > 0).long())
    found = judged(net, x, y, group, min_support=1)
    wanted = demographic_parity_difference(y, attacked, sensitive_features=group)
    assert value(found, "demographic_parity") == pytest.approx(wanted, abs=1e-12)
    frame = MetricFrame(metrics=accuracy_score, y_true=y, y_pred=attacked, sensitive_features=group)
    assert value(found, "accuracy_gap") == pytest.approx(frame.difference(), abs=1e-12)
    assert value(found, "worst_group") == pytest.approx(frame.group_min(), abs=1e-12)
    assert value(found, "worst_group") == min(found.bars["robustness/by_group"].values)
    before = demographic_parity_difference(y, (clean > 0).long(), sensitive_features=group)
    assert before != wanted
    (note,) = [note for note in found.notes if note.startswith("Without attack")]
    assert f"demographic parity gap {before:.1%}" in note
    assert not found.doubts


def test_of_several_classes_and_attributes_the_worst_counts():
    net, x, y, first = rows(4)
    second = (torch.arange(len(x)) % 5 == 0).long()
    second[:20] = -1  # unknown
    found = judged(net, x, y, torch.stack([first, second], 1), min_support=1)
    subject = Subject(net, list(zip(x.split(100), y.split(100), strict=True)))
    whole = Robustness(EPS, curve=())
    with subject.still():
        attack = siege.Siege(subject, whole._batches(subject, whole._threat()), whole._threat())
        moved = torch.cat([chunk.moved for chunk in attack.chunks])
        decision = predicted(net(moved))
    assert torch.equal(decision == y, attack.standing())
    gaps, accuracies, parities = [], [], []
    for group in (first, second):
        names = [g for g in group.unique().tolist() if g >= 0]
        right = [float((decision == y)[group == g].double().mean()) for g in names]
        accuracies += right
        gaps.append(max(right) - min(right))
        for label in range(4):
            rates = [float((decision == label)[group == g].double().mean()) for g in names]
            parities.append(max(rates) - min(rates))
    assert value(found, "worst_group") == pytest.approx(min(accuracies))
    assert value(found, "accuracy_gap") == pytest.approx(max(gaps))
    assert value(found, "demographic_parity") == pytest.approx(max(parities))
    assert "the worst attribute" in found.figures["robustness/accuracy_gap"].about


def test_intervals_are_those_of_a_bootstrap_over_examples():
    net, x, y, group = rows(2)
    found = judged(net, x, y, group)
    push = EPS * (net.weight[1] - net.weight[0]).abs().sum().item()
    with torch.no_grad():
        score = net(x) @ torch.tensor([-1.0, 1.0], dtype=torch.float64)
    decision = torch.where(y == 1, score - push > 0, score + push > 0).long()
    generator, drawn = (
        torch.Generator().manual_seed(9),
        {"accuracy_gap": [], "demographic_parity": [], "worst_group": []},
    )
    for _ in range(3000):
        rows_ = torch.randint(len(y), (len(y),), generator=generator)
        right = [(decision == y)[rows_][group[rows_] == g].double().mean() for g in range(3)]
        chosen = [decision[rows_][group[rows_] == g].double().mean() for g in range(3)]
        drawn["accuracy_gap"].append(max(right) - min(right))
        drawn["demographic_parity"].append(max(chosen) - min(chosen))
        drawn["worst_group"].append(min(right))
    for name, values in drawn.items():
        wanted = torch.stack(values).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        assert found.intervals[f"robustness/{name}"] == pytest.approx(wanted, abs=0.012)


def test_small_groups_take_no_part_and_are_named():
    net, x, y, group = rows(2)
    quick = {"steps": 2, "restarts": 0}
    few = torch.where(torch.arange(len(x)) < 7, 5, group)
    found = judged(net, x, y, few, **quick)
    without = few < 5
    assert value(found, "accuracy_gap") == value(
        judged(net, x[without], y[without], few[without], **quick), "accuracy_gap"
    )
    assert any("group 5 has 7" in note for note in found.notes)
    assert "group 5" in found.doubts["robustness/accuracy_gap"][0]
    none = judged(net, x, y, torch.zeros_like(group), **quick)
    assert value(none, "accuracy_gap") is None
    assert value(none, "worst_group") == value(none, "accuracy")
    assert value(judged(net, x, y, group, min_support=1000, **quick), "worst_group") is None


def test_without_groups_there_are_none():
    net, x, y, _ = rows(2)
    found = Robustness(EPS, curve=(), steps=2, restarts=0).evaluate(Subject(net, [(x, y)]))
    assert not {"robustness/worst_group", "robustness/accuracy_gap"} & found.figures.keys()
    many = judged(net, x, y, torch.arange(len(x)), steps=2, restarts=0)
    assert "robustness/worst_group" not in many.figures
    assert any("look like identifiers" in note for note in many.notes)
    with pytest.raises(ValueError, match="min_support=0"):
        Robustness(min_support=0)


def test_an_attack_that_changes_nothing_leaves_the_gaps_of_the_fairness_axis():
    net, x, y, group = rows(2)
    batches = [(x, y, group)]
    fair = Fairness().evaluate(Subject(net, batches))
    found = Robustness(1e-9, curve=(), steps=2, restarts=0).evaluate(Subject(net, batches))
    same = {"accuracy_gap": "accuracy_parity", "demographic_parity": "demographic_parity"}
    for one, other in (*same.items(), ("worst_group", "worst_group_accuracy")):
        assert value(found, one) == fair.figures[f"fairness/{other}"].value
        assert found.intervals[f"robustness/{one}"] == fair.intervals[f"fairness/{other}"]


def test_gaps_are_doubted_where_the_attack_is():
    class Deaf(nn.Module):
        def forward(self, x):
            return x[:, 0].detach().round()

    x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    found = judged(Deaf(), x, (x[:, 0] > 0.5).long(), torch.arange(200) % 2)
    doubted = ("accuracy", "worst_class", "worst_group", "accuracy_gap", "demographic_parity")
    assert {f"robustness/{name}" for name in doubted} == found.doubts.keys()


def test_a_model_that_draws_numbers_is_not_right_where_it_fell():
    logits, target = torch.tensor([[0.0, 5.0, 1.0], [9.0, 0.0, 1.0]]), torch.tensor([1, 1])
    assert under_attack(logits, target, torch.tensor([False, True])).tolist() == [2, 1]
    assert under_attack(torch.tensor([3.0, 3.0]), target, torch.tensor([False, True])).tolist() == [0, 1]
    assert not robust_groups([], target, target, target, 3).figures
