"""Drift that is known is found, and where there is none false alarms are as rare as stated."""

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from scipy.stats import chisquare, ks_2samp
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_guard as lg
from lightning_guard.data import AdultData
from lightning_guard.evaluation import Drift, Subject, Task
from lightning_guard.evaluation.drift import distance
from lightning_guard.functional.statistics import holm
from tests import toys


def test_numbers_are_compared_as_scipy_does():
    draws = np.random.default_rng(0)
    first, second = draws.normal(size=80), draws.normal(0.4, 1, 120)
    wanted = ks_2samp(first, second)
    assert distance(first, second) == pytest.approx((wanted.statistic, wanted.pvalue))


def test_few_values_are_compared_by_shares():
    first, second = np.repeat([0.0, 1.0], [60, 40]), np.repeat([0.0, 1.0], [30, 70])
    size, p = distance(first, second)
    assert size == pytest.approx(0.3)
    observed, expected = [60, 40, 30, 70], [45, 55, 45, 55]
    assert p == pytest.approx(chisquare(observed, expected, ddof=2).pvalue)


def test_edges_of_a_column():
    assert distance(np.zeros(5), np.zeros(9)) is None
    assert distance(np.full(50, np.nan), np.zeros(50))[0] == 1.0  # what is missing is a value
    assert distance(np.array([0.0, 1.0]), np.array([0.0, 0.0]))[1] == 1.0  # too rare to tell
    assert distance(np.r_[np.arange(40.0), np.nan], np.arange(40.0))[0] == pytest.approx(0.0)


def false_alarms(trials, columns=12, n=150):
    draws, alarms = np.random.default_rng(1), 0
    for _ in range(trials):
        chances = []
        for i in range(columns):
            kind = draws.normal if i % 2 else lambda size: draws.integers(0, 3, size).astype(float)
            chances.append(distance(kind(size=n), kind(size=n + 50))[1])
        alarms += min(holm(chances)) < 0.05
    return alarms


def test_no_drift_is_no_alarm():
    assert false_alarms(150) <= 15  # expected 7.5 at most; more than 15 has p < 0.005


def samples(draws, n, shift=0.0, together=0.0):
    x = torch.tensor(draws.normal(size=(n, 6)), dtype=torch.float32)
    x[:, 0] += shift
    x[:, 2] = together * x[:, 1] + (1 - together**2) ** 0.5 * x[:, 2]
    return x, torch.tensor(draws.integers(0, 2, n))


def judged(shift=0.0, together=0.0, n=500, seed=0, **options):
    draws = np.random.default_rng(seed)
    here, there = samples(draws, n), samples(draws, n, shift, together)
    names = ["income", "b", "c", "d", "e", "f"]
    return Drift(**options).evaluate(Subject(nn.Linear(6, 2), [there], train=[here], feature_names=names))


def test_a_shifted_column_is_named():
    found = judged(shift=0.5)
    assert found.figures["drift/columns"].value == 1
    assert found.bars["drift/columns"].categories[0] == "income"
    assert any("differ in income" in note for note in found.notes)
    assert found.intervals["drift/auc"][0] > 0.5


def test_what_no_column_shows_the_classifier_does():
    """Two columns that move together have the same distributions each."""
    found = judged(together=0.9, n=1000)
    assert found.figures["drift/columns"].value == 0
    assert found.intervals["drift/auc"][0] > 0.5


def test_the_same_distribution_is_left_alone():
    found = judged()
    assert found.figures["drift/columns"].value == 0
    low, high = found.intervals["drift/far"]
    assert low < 0.01 < high
    assert not any("differ in" in note for note in found.notes)


@pytest.mark.slow
def test_false_alarms_of_the_classifier_are_rare():
    alarms = sum(judged(n=200, seed=seed).intervals["drift/auc"][0] > 0.5 for seed in range(60))
    assert alarms <= 5  # 1.5 expected, for the lower end alone counts


def test_far_examples_are_counted():
    draws = np.random.default_rng(0)
    here, there = samples(draws, 400), samples(draws, 400)
    there[0][:60] += 25
    found = Drift().evaluate(Subject(nn.Linear(6, 2), [there], train=[here]))
    assert found.figures["drift/far"].value == pytest.approx(0.15, abs=0.03)


def test_copies_are_counted():
    draws = np.random.default_rng(0)
    here, there = samples(draws, 100), samples(draws, 100)
    both = tuple(torch.cat([a[:25], b[:75]]) for a, b in zip(here, there, strict=True))
    found = Drift().evaluate(Subject(nn.Linear(6, 2), [both], train=[here]))
    assert found.figures["drift/copies"].value == 0.25


def test_labels_and_groups_count_as_columns():
    x = torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
    y, group = torch.arange(200) % 2, torch.zeros(200).long()
    other = (torch.arange(200) < 40).long()
    found = Drift().evaluate(Subject(nn.Linear(3, 2), [(x[:200], y, other)], train=[(x[200:], y, group)]))
    assert found.bars["drift/columns"].categories[0] == "group"
    assert any("differ in group" in note for note in found.notes)


def test_few_examples_have_no_classifier():
    found = Drift().evaluate(Subject(nn.Linear(6, 2), toys.loader(n=40), train=toys.loader(n=40)))
    assert "drift/auc" not in found.figures
    assert any("too few" in note for note in found.notes)


@pytest.mark.parametrize("options", [{"level": 0.0}, {"level": 1.0}, {"examples": 3}, {"most": 3}])
def test_options_out_of_range(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Drift(**options)


def test_adult_has_not_drifted_much_but_has_copies():
    data = AdultData(group="sex")
    subject = Subject(
        nn.Linear(104, 1), data.test_dataloader(), train=data.train_dataloader(), feature_names=data.feature_names
    )
    found = Drift(examples=8000, most=500).evaluate(subject)
    assert found.figures["drift/copies"].value > 0.05  # people who answered alike
    assert abs(found.figures["drift/auc"].value - 0.5) < 0.06


class Shifted(pl.LightningDataModule):
    def __init__(self, shift=0.8):
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self):
        x, y, _ = toys.rows(200)
        return DataLoader(TensorDataset(x, y), 16, shuffle=True)

    def test_dataloader(self):
        x, y, _ = toys.rows(400)
        return DataLoader(TensorDataset(x[200:] + self.hparams["shift"], y[200:]), 100)


def test_a_comparison_looks_once(tmp_path):
    arms = {"none": [], "again": [pl.Callback()]}
    options = {"max_epochs": 1, "accelerator": "cpu"}
    report = lg.compare(toys.PlainNet, Shifted, arms, options, 1, [Task(), Drift(most=100)], tmp_path)
    found = {figure["key"]: figure for figure in report["data"]["figures"]}
    assert found["drift/columns"]["value"] == 6
    assert found["drift/auc"]["interval"][0] > 0.9
    assert not any(key.startswith("drift") for run in report["runs"] for key in run["values"])
    assert "Columns that have drifted" in (tmp_path / "report.md").read_text()
    assert "Columns that have drifted" in (tmp_path / "report.html").read_text()
