"""Task figures against torchmetrics, scikit-learn and counting."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torch import nn
from torchmetrics.functional.classification import (
    binary_auroc,
    multiclass_accuracy,
    multiclass_calibration_error,
)

from lightning_guard.evaluation import Subject, Task
from lightning_guard.evaluation.task import auc, calibration_error


def evaluated(logits, target, batch_size=16, **options):
    batches = list(zip(logits.split(batch_size), target.split(batch_size), strict=True))
    return Task(**options).evaluate(Subject(nn.Identity(), batches))


def values(logits, target, **options):
    return {key.split("/")[1]: figure.value for key, figure in evaluated(logits, target, **options).figures.items()}


def drawn(seed: int, n: int = 97, classes: int = 2):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(classes, (n,), generator=generator)
    shape = (n,) if classes == 2 else (n, classes)
    return 2 * torch.randn(shape, generator=generator, dtype=torch.float64), target


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("columns", [1, 2])
def test_two_classes(seed, columns):
    logit, target = drawn(seed)
    found = values(logit if columns == 1 else torch.stack([-logit, torch.zeros_like(logit)], 1), target)
    p = logit.sigmoid()
    assert found["accuracy"] == pytest.approx(((p > 0.5).long() == target).double().mean().item())
    assert found["cross_entropy"] == pytest.approx(nn.functional.binary_cross_entropy(p, target.double()).item())
    assert found["auc"] == pytest.approx(roc_auc_score(target, logit), abs=1e-12)
    wanted = multiclass_calibration_error(torch.stack([1 - p, p], 1), target, 2, n_bins=15)
    assert found["calibration_error"] == pytest.approx(wanted.item(), abs=1e-6)
    assert set(found) == {"accuracy", "cross_entropy", "auc", "calibration_error"}


@pytest.mark.parametrize("seed", range(3))
def test_many_classes(seed):
    logits, target = drawn(seed, classes=5)
    found = values(logits, target, bins=10)
    assert found["accuracy"] == pytest.approx(multiclass_accuracy(logits, target, 5, "micro").item())
    assert found["cross_entropy"] == pytest.approx(nn.functional.cross_entropy(logits, target).item())
    wanted = multiclass_calibration_error(logits.softmax(1), target, 5, n_bins=10)
    assert found["calibration_error"] == pytest.approx(wanted.item(), abs=1e-6)
    recalls = multiclass_accuracy(logits, target, 5, average="none")
    assert found["worst_class"] == pytest.approx(recalls[target.unique()].min().item())
    assert set(found) == {"accuracy", "worst_class", "cross_entropy", "calibration_error"}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([-90.0, -1.0, 0.0, 0.5, 40.0, 40.5, 90.0]), st.booleans()), min_size=2))
def test_auc_is_the_share_of_ordered_pairs(pairs):
    score, target = (torch.tensor(part) for part in zip(*pairs, strict=True))
    ones, zeros = score[target], score[~target]
    found = auc(score, target.long())
    if len(ones) and len(zeros):
        wins = (ones[:, None] > zeros).double() + 0.5 * (ones[:, None] == zeros).double()
        assert found.item() == pytest.approx(wins.mean().item(), abs=1e-12)
    else:
        assert found.isnan()


def test_auc_sees_what_a_sigmoid_would_not():
    """torchmetrics takes a sigmoid of logits, in which 40 and 50 are equal."""
    score, target = torch.tensor([50.0, 40.0]), torch.tensor([1, 0])
    assert auc(score, target) == 1
    assert binary_auroc(score, target) == 0.5


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1), st.integers(1, 20))
def test_calibration_error_is_the_sum_over_bins(pairs, bins):
    total = 0.0
    for b in range(bins):
        inside = [(c, hit) for c, hit in pairs if min(int(c * bins), bins - 1) == b]
        if inside:
            confidence = sum(c for c, _ in inside) / len(inside)
            accuracy = sum(hit for _, hit in inside) / len(inside)
            total += len(inside) / len(pairs) * abs(confidence - accuracy)
    confidence, hits = (torch.tensor(part) for part in zip(*pairs, strict=True))
    found = calibration_error(torch.tensor([c for c, _ in pairs], dtype=torch.float64), hits, bins)
    assert found.item() == pytest.approx(total, abs=1e-9)


def test_one_class_alone_has_no_auc():
    assert values(torch.tensor([1.0, -1.0]), torch.tensor([1, 1]))["auc"] is None


@pytest.mark.parametrize("shape", [(40,), (40, 1), (40, 3)])
def test_a_regression_is_judged_by_its_squared_error(shape):
    logits, target = torch.randn(shape), torch.randn(shape)
    found = values(logits, target)
    assert found == {"mean_squared_error": pytest.approx(nn.functional.mse_loss(logits, target).item())}


def test_outputs_that_are_no_numbers_are_wrong():
    logits, target = torch.tensor([[2.0, 1.0], [torch.nan, 0.0], [0.0, torch.nan]]), torch.tensor([0, 0, 0])
    found = evaluated(logits, target)
    assert found.figures["task/accuracy"].value == pytest.approx(1 / 3)
    assert [k for k, f in found.figures.items() if f.value is None] == [
        "task/cross_entropy", "task/auc", "task/calibration_error"
    ]  # fmt: skip
    assert found.notes == ["2 of 3 outputs are not numbers."]


def test_infinite_outputs_have_an_infinite_loss_that_is_not_shown():
    found = values(torch.tensor([torch.inf, -torch.inf]), torch.tensor([0, 0]))
    assert found["accuracy"] == 0.5
    assert found["cross_entropy"] is None


def test_what_is_not_understood_is_a_note():
    found = evaluated(torch.zeros(3), torch.tensor([0, 1, 7]))
    assert not found.figures
    assert "0 to 7" in found.notes[0]


def test_the_interval_belongs_to_the_accuracy():
    found = evaluated(*drawn(0))
    low, high = found.intervals["task/accuracy"]
    assert low < found.figures["task/accuracy"].value < high


def test_no_bins_are_refused_by_name():
    with pytest.raises(ValueError, match="bins=0"):
        Task(bins=0)
