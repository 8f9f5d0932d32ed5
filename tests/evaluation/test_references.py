"""What fairlearn's methods reach, against fairlearn used by hand."""

import numpy as np
import pytest
import torch
from fairlearn.metrics import MetricFrame, demographic_parity_difference, selection_rate
from fairlearn.postprocessing import ThresholdOptimizer
from fairlearn.reductions import DemographicParity, ExponentiatedGradient
from sklearn.linear_model import LogisticRegression
from torch import nn

from lightning_guard.evaluation import Subject
from lightning_guard.evaluation.references import (
    LABELS,
    REFERENCES,
    Unsuitable,
    expected_table,
    exponentiated_gradient,
    threshold_optimizer,
)


def rows(n, seed):
    """Inputs of which the last column betrays the group, and labels that depend on it."""
    generator = torch.Generator().manual_seed(seed)
    group = torch.randint(2, (n,), generator=generator)
    x = torch.randn(n, 3, generator=generator)
    x[:, 2] += 1.5 * group
    y = (x.sum(1) + 0.5 * torch.randn(n, generator=generator) > 0.8).long()
    return x, y, group


class Scoring(nn.Module):
    def forward(self, x):
        return x.sum(1) - 0.8


def subjects(n=1500, module=None, change=lambda x, y, group: (x, y, group)):
    return [Subject(module or Scoring(), [change(*rows(n, seed))]) for seed in (0, 1)]


def test_the_expected_table_is_that_of_a_loop():
    x, y, group = rows(200, 0)
    chance = torch.sigmoid(x[:, 0]).double()
    expected = torch.zeros(2, 2, 2, dtype=torch.float64)
    for g, label, p in zip(group.tolist(), y.tolist(), chance.tolist(), strict=True):
        expected[g, label, 1] += p
        expected[g, label, 0] += 1 - p
    assert torch.allclose(expected_table(group, y, chance, 2), expected)


def test_post_processing_is_the_mean_of_its_draws():
    (found,) = threshold_optimizer(*subjects(), "demographic_parity", [0.05])
    (x, y, group), (x_test, y_test, group_test) = rows(1500, 0), rows(1500, 1)

    class Sigmoid(LogisticRegression):
        def predict_proba(self, scores):
            p = 1 / (1 + np.exp(-scores[:, 0]))
            return np.stack([1 - p, p], 1)

    z, z_test = ((part.sum(1, keepdim=True) - 0.8).double().numpy() for part in (x, x_test))
    fitted = Sigmoid().fit(z, y)
    by_hand = ThresholdOptimizer(
        estimator=fitted, constraints="demographic_parity", prefit=True, predict_method="predict_proba", tol=0.05
    ).fit(z, y.numpy(), sensitive_features=group.numpy())
    accuracies, rates = [], []
    for seed in range(60):
        decided = by_hand.predict(z_test, sensitive_features=group_test.numpy(), random_state=seed)
        accuracies.append(float((decided == y_test.numpy()).mean()))
        by_group = {"metrics": selection_rate, "y_true": y_test, "y_pred": decided, "sensitive_features": group_test}
        rates.append(MetricFrame(**by_group).by_group)
    assert found.values["task/accuracy"] == pytest.approx(np.mean(accuracies), abs=0.002)
    gap = np.ptp(np.mean(rates, 0))
    assert found.values["fairness/demographic_parity"] == pytest.approx(gap, abs=0.005)
    low, high = found.intervals["fairness/demographic_parity"]
    assert low < found.values["fairness/demographic_parity"] < high


def test_tolerances_are_kept_on_the_examples_they_are_fitted_to():
    train, _ = subjects()
    before = demographic_parity_difference(
        rows(1500, 0)[1], train.outputs.logits > 0, sensitive_features=rows(1500, 0)[2]
    )
    assert before > 0.3  # there is something to close
    found = threshold_optimizer(train, train, "demographic_parity", [0.2, 0.1, 0.02])
    assert [one.bound for one in found] == [0.2, 0.1, 0.02]
    for one in found:
        assert one.values["fairness/demographic_parity"] <= one.bound + 0.002
    accuracies = [one.values["task/accuracy"] for one in found]
    assert accuracies == sorted(accuracies, reverse=True)


def test_equalized_odds_takes_no_tolerance():
    train, _ = subjects()
    (found,) = threshold_optimizer(train, train, "equalized_odds", [0.1, 0.05])
    assert found.bound is None
    assert found.values["fairness/equalized_odds"] < 0.01


def test_reductions_are_those_of_fairlearn_by_hand():
    (found,) = exponentiated_gradient(*subjects(600), "demographic_parity", [0.05])
    (x, y, group), (x_test, y_test, group_test) = rows(600, 0), rows(600, 1)
    by_hand = ExponentiatedGradient(LogisticRegression(max_iter=1000), DemographicParity(difference_bound=0.05))
    by_hand.fit(x.double().numpy(), y.numpy(), sensitive_features=group.numpy())
    drawn = [by_hand.predict(x_test.double().numpy(), random_state=seed) for seed in range(200)]
    assert found.values["task/accuracy"] == pytest.approx(np.mean([d == y_test.numpy() for d in drawn]), abs=0.003)
    rates = [np.mean([d[group_test.numpy() == g] for d in drawn]) for g in (0, 1)]
    assert found.values["fairness/demographic_parity"] == pytest.approx(np.ptp(rates), abs=0.006)
    seen = exponentiated_gradient(subjects(600)[0], subjects(600)[0], "demographic_parity", [0.05])[0]
    assert seen.values["fairness/demographic_parity"] <= 2 * 0.05 + 0.01  # the bound is between a group and all


def test_unknown_groups_take_no_part():
    def some_unknown(x, y, group):
        return x, y, torch.where(torch.arange(len(group)) % 3 == 0, -1, group)

    def left_out(x, y, group):
        kept = torch.arange(len(group)) % 3 != 0
        return x[kept], y[kept], group[kept]

    for method in REFERENCES.values():
        with_unknown = method(*subjects(300, change=some_unknown), "demographic_parity", [0.1])
        assert with_unknown == method(*subjects(300, change=left_out), "demographic_parity", [0.1])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x, y, group: (x, y), "no group"),
        (lambda x, y, group: (x, y, torch.stack([group, group], 1)), "one attribute"),
        (lambda x, y, group: (x, y, torch.zeros_like(group)), "two groups"),
        (lambda x, y, group: (x, x.sum(1), group), "binary labels"),
    ],
)
def test_what_cannot_be_had_is_said(change, said):
    for method in REFERENCES.values():
        with pytest.raises(Unsuitable, match=said):
            method(*subjects(60, change=change), "demographic_parity", [0.1])


def test_more_than_two_classes_cannot_be_had():
    module = nn.Linear(3, 3)
    with pytest.raises(Unsuitable, match="binary"):
        threshold_optimizer(*subjects(60, module), "demographic_parity", [0.1])


def test_two_logits_are_as_good_as_one():
    class Two(nn.Module):
        def forward(self, x):
            return torch.stack([torch.zeros(len(x)), x.sum(1) - 0.8], 1)

    one, two = (threshold_optimizer(*subjects(300, module), "demographic_parity", [0.1]) for module in (None, Two()))
    for key, value in one[0].values.items():
        assert two[0].values[key] == pytest.approx(value, abs=1e-6)


def test_notions_that_a_method_lacks_are_named():
    with pytest.raises(Unsuitable, match=r"ThresholdOptimizer is not shown: it knows .* and not accuracy_parity"):
        threshold_optimizer(*subjects(60), "accuracy_parity", [0.1])
    with pytest.raises(Unsuitable, match="not bounded_group_loss"):
        exponentiated_gradient(*subjects(60), "bounded_group_loss", [0.1])
    assert LABELS.keys() == REFERENCES.keys()


def test_a_loader_of_another_order_each_time_is_refused():
    class Moving:
        times = 0

        def __iter__(self):
            self.times += 1
            yield tuple(part.roll(self.times, 0) for part in rows(60, 0))

    with pytest.raises(Unsuitable, match="other examples each time"):
        exponentiated_gradient(Subject(Scoring(), Moving()), subjects(60)[1], "demographic_parity", [0.1])
