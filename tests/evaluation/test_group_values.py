"""Means, calibration and ranking of groups: against torchmetrics, sklearn, loops, and resampled examples."""

import numpy as np
import pytest
import torch
from fairlearn.metrics import MetricFrame
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.metrics import mean_squared_error, roc_auc_score, roc_curve
from torch import nn
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

from lightning_guard.evaluation import Fairness, Subject
from lightning_guard.evaluation.families import families
from lightning_guard.evaluation.group_scores import calibration_errors
from lightning_guard.evaluation.group_values import group_aucs, group_means, highest, jointly, largest_gap


def examples(seed: int = 0, n: int = 600, groups: int = 2):
    """Logits, targets that follow them, and groups of which one is overconfident."""
    generator = torch.Generator().manual_seed(seed)
    group = torch.arange(n) % groups
    logits = 1.5 * torch.randn(n, generator=generator).double()
    truth = torch.where(group == 0, logits, 0.4 * logits + 0.5)
    return logits, (torch.rand(n, generator=generator) < truth.sigmoid()).long(), group


def evaluated(logits, target, group, **options):
    batches = list(zip(logits.split(64), target.split(64), group.split(64), strict=True))
    return Fairness(**{"replicates": 200, **options}).evaluate(Subject(nn.Identity(), batches))


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 4), st.integers(2, 20))
def test_calibration_errors_are_those_of_torchmetrics(seed, groups, bins):
    logits, target, group = examples(seed, 300, groups)
    found = evaluated(logits, target, group, bins=bins)
    wanted = [
        float(binary_calibration_error(logits[group == g].sigmoid(), target[group == g], bins, "l1"))
        for g in range(groups)
    ]
    assert found.bars["fairness/calibration"].values == pytest.approx(wanted, abs=1e-6)
    assert found.figures["fairness/calibration"].value == pytest.approx(max(wanted), abs=1e-6)
    generator = torch.Generator().manual_seed(seed)
    three = torch.randn(300, 3, generator=generator)
    label = torch.randint(0, 3, (300,), generator=generator)
    wanted = [
        float(multiclass_calibration_error(three[group == g].softmax(1), label[group == g], 3, bins, "l1"))
        for g in range(groups)
    ]
    found = evaluated(three, label, group, bins=bins)
    assert found.bars["fairness/calibration"].values == pytest.approx(wanted, abs=1e-6)


def test_what_right_probabilities_show_is_what_simulation_shows():
    generator = torch.Generator().manual_seed(0)
    probability, group = torch.rand(500, generator=generator), (torch.arange(500) % 5 > 0).long()
    _, chance = calibration_errors(probability, probability > 2, group, 2, 15)
    shown = [
        calibration_errors(probability, torch.rand(500, generator=generator) < probability, group, 2, 15)[0]
        for _ in range(300)
    ]
    torch.testing.assert_close(chance, torch.stack(shown).mean(0), rtol=0.1, atol=0)
    assert chance[0] > 1.5 * chance[1]


def test_the_overconfident_group_is_found():
    logits, target, group = examples(n=4000)
    found = evaluated(logits, target, group)
    right, over = found.bars["fairness/calibration"].values
    assert over > 0.1 > 0.05 > right
    assert found.figures["fairness/calibration"].value == over
    assert any("The calibration error of group 1 is" in note for note in found.notes)


def test_reliability_and_roc_are_those_of_sklearn():
    logits, target, group = examples(n=2000)
    logits = (4 * logits).round() / 4  # ties
    found = evaluated(logits, target, group)
    assert list(found.curves) == [f"fairness/{kind}_{g}" for g in (0, 1) for kind in ("reliability", "roc")]
    for g in (0, 1):
        y, p = target[group == g].numpy(), logits[group == g].sigmoid().numpy()
        curve = found.curves[f"fairness/reliability_{g}"]
        happened = [height for height in curve.y if height is not None]
        assert happened == pytest.approx(calibration_curve(y, p, n_bins=15)[0].tolist())
        curve = found.curves[f"fairness/roc_{g}"]
        false, true, _ = roc_curve(y, p, drop_intermediate=False)
        assert curve.y == pytest.approx(np.interp(curve.x, false, true).tolist())
        assert curve.label == f"ROC, group {g}"
        assert found.bars["fairness/auc"].values[g] == pytest.approx(roc_auc_score(y, p))
    aucs = found.bars["fairness/auc"].values
    assert found.figures["fairness/auc_gap"].value == pytest.approx(max(aucs) - min(aucs))
    two = evaluated(torch.stack([torch.zeros_like(logits), logits], 1), target, group)  # a logit a class
    assert {key: figure.value for key, figure in two.figures.items()} == pytest.approx(
        {key: figure.value for key, figure in found.figures.items()}
    )


def test_many_groups_have_bars_and_no_curves():
    found = evaluated(*examples(n=1000, groups=5))
    assert not found.curves
    assert len(found.bars["fairness/auc"].values) == 5


@pytest.mark.parametrize("classes", [3, 4])
def test_auc_of_many_classes_is_each_against_the_rest(classes):
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(600) % 2
    logits, target = torch.randn(600, classes, generator=generator), torch.arange(600) // 2 % classes
    logits[torch.arange(600), target] += 1.0 + group
    share = logits.double().softmax(1)
    gaps = []
    for c in range(classes):
        one, two = (roc_auc_score(target[group == g] == c, share[group == g, c]) for g in (0, 1))
        gaps.append(abs(one - two))
    assert evaluated(logits, target, group).figures["fairness/auc_gap"].value == pytest.approx(max(gaps))


def test_values_vary_as_in_resampled_examples():
    """Means and AUC of two attributes that share examples: their spread, and that of gaps and maxima."""
    generator = torch.Generator().manual_seed(0)
    logits, target, first = examples(n=800)
    second = ((torch.rand(800, generator=generator) < 0.7) == (first == 1)).long()
    group, loss = torch.stack([first, second], 1), (logits - target).square()

    def values(rows):
        kin = families(group[rows])
        means = [group_means(loss[rows], family, 1) for family in kin]
        return means, [group_aucs(logits[rows], target[rows] == 1, family, 1) for family in kin]

    again = [values(torch.randint(800, (800,), generator=generator)) for _ in range(600)]
    for kind, found in enumerate(values(torch.arange(800))):
        drawn = jointly(found, 4000, np.random.default_rng(0))
        several = torch.stack([torch.cat([one.value for one in each[kind]]) for each in again])
        torch.testing.assert_close(torch.cat(drawn, 1).std(0), several.std(0), rtol=0.1, atol=0)
        correlation = several.T.corrcoef()
        torch.testing.assert_close(torch.cat(drawn, 1).T.corrcoef(), correlation, rtol=0, atol=0.12)
        assert correlation[:2, 2:].abs().max() > 0.3  # the attributes do share examples
        for figure in (largest_gap, highest):
            wanted = np.quantile([float(figure(each[kind])) for each in again], [0.05, 0.5, 0.95])
            shown = np.quantile(figure(found, drawn), [0.05, 0.5, 0.95])
            assert shown == pytest.approx(wanted, abs=0.12 * (wanted[2] - wanted[0]) + 0.003)


def test_groups_without_values_have_none():
    logits, target, group = examples(n=40)
    target[group == 1] = 0
    family = families(group)[0]
    found = group_aucs(logits, target == 1, family, 1)
    assert found.value.isnan().tolist() == [False, True]
    assert found.counted.tolist() == [True, False]
    assert largest_gap([found]).isnan()
    evidence = evaluated(logits, target, group, min_support=1)
    assert evidence.figures["fairness/auc_gap"].value is None
    assert evidence.bars["fairness/auc"].values[1] is None
    assert "fairness/roc_1" not in evidence.curves


def regression(seed: int = 0, n: int = 500, groups: int = 3):
    generator = torch.Generator().manual_seed(seed)
    group = torch.arange(n) % groups
    target = torch.randn(n, generator=generator).double() + 0.5 * group
    return target + 0.7 * torch.randn(n, generator=generator).double() + 0.2 * group, target, group


def test_regressions_have_gaps_of_means_and_quantiles():
    prediction, target, group = regression()
    found = evaluated(prediction, target, group)
    by_group = MetricFrame(
        metrics={"mean": lambda y, p: p.mean(), "error": mean_squared_error},
        y_true=target.numpy(), y_pred=prediction.numpy(), sensitive_features=group.numpy(),
    )  # fmt: skip
    value = {key.split("/")[1]: figure.value for key, figure in found.figures.items()}
    assert value["mean_parity"] == pytest.approx(by_group.difference()["mean"])
    assert value["worst_group_loss"] == pytest.approx(by_group.group_max()["error"])
    gaps = []
    for tau in np.quantile(prediction, np.arange(1, 10) / 10):
        below = [float((prediction[group == g] <= tau).double().mean()) for g in range(3)]
        gaps.append(max(below) - min(below))
    assert value["quantile_parity"] == pytest.approx(max(gaps))
    assert found.intervals.keys() == found.figures.keys()
    assert list(found.bars) == ["fairness/mean_prediction", "fairness/mean_squared_error"]


def test_intervals_of_a_regression_are_those_of_resampled_examples():
    prediction, target, group = regression(n=900)
    found = evaluated(prediction, target, group, replicates=4000)
    generator, again = torch.Generator().manual_seed(1), []
    taus = torch.from_numpy(np.quantile(prediction, np.arange(1, 10) / 10))
    for _ in range(1500):
        rows = torch.randint(900, (900,), generator=generator)
        inside = [rows[group[rows] == g] for g in range(3)]
        means = [float(prediction[one].mean()) for one in inside]
        errors = [float((prediction - target)[one].square().mean()) for one in inside]
        below = torch.stack([(prediction[one, None] <= taus).double().mean(0) for one in inside])
        again.append((max(means) - min(means), float((below.amax(0) - below.amin(0)).max()), max(errors)))
    low, high = np.quantile(again, [0.025, 0.975], axis=0)
    for place, key in enumerate(("mean_parity", "quantile_parity", "worst_group_loss")):
        width = high[place] - low[place]
        assert found.intervals[f"fairness/{key}"] == pytest.approx((low[place], high[place]), abs=0.1 * width)


def test_a_regression_of_several_outputs_and_attributes():
    prediction, target, group = regression()
    wide = torch.stack([prediction, 0 * prediction], 1), torch.stack([target, 0 * target], 1)
    one, two = evaluated(prediction, target, group), evaluated(*wide, group)
    for key in ("fairness/mean_parity", "fairness/quantile_parity"):
        assert two.figures[key].value == pytest.approx(one.figures[key].value)
    both = evaluated(prediction, target, torch.stack([torch.arange(500) % 2, group], 1))
    assert both.figures["fairness/mean_parity"].value == pytest.approx(one.figures["fairness/mean_parity"].value)
    many = evaluated(torch.randn(40, 60), torch.randn(40, 60), torch.arange(40) % 2)
    assert not many.figures
    assert "60 outputs are more" in many.notes[0]


def test_a_regression_leaves_small_groups_out_and_says_so():
    prediction, target, group = regression()
    keep = (group != 2) | (torch.arange(500) < 60)
    found = evaluated(prediction[keep], target[keep], group[keep])
    two = evaluated(*(part[keep & (group != 2)] for part in (prediction, target, group)))
    assert found.figures["fairness/mean_parity"].value == two.figures["fairness/mean_parity"].value
    assert "Fewer than 30 examples, so not judged: group 2 has 20." in found.notes
    alone = evaluated(prediction, target, 0 * group)
    assert alone.figures["fairness/mean_parity"].value is None
    assert alone.figures["fairness/quantile_parity"].value is None
    assert alone.figures["fairness/worst_group_loss"].value > 0
