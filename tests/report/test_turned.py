"""Predictions of an arm that the baseline makes otherwise: counted from what the runs kept."""

import pytest
import torch

import lightning_guard as lg
from lightning_guard.callbacks import MagnitudePruning
from lightning_guard.evaluation import Efficiency, Fairness, Task
from tests.toys import Data, PlainNet


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("turned")
    own = {"none": [], "small": [MagnitudePruning(sparsity=0.95, end=0.5, every=1)]}
    judges = [Task(), Fairness(min_support=1), Efficiency()]
    return folder, lg.compare(PlainNet, Data, own, {"max_epochs": 3, "accelerator": "cpu"}, 2, judges, folder)


def test_flips_are_those_of_the_kept_decisions(compared):
    folder, report = compared
    values = {(run["arm"], run["seed"]): run["values"] for run in report["runs"]}
    some = 0
    for seed in (0, 1):
        before, after = (
            torch.load(folder / "runs" / arm / f"seed-{seed}" / "tensors.pt", weights_only=True)
            for arm in ("none", "small")
        )
        pairs = list(zip(before["task/decision"], after["task/decision"], after["task/target"], strict=True))
        flipped = sum(int(a != b) for a, b, _ in pairs) / len(pairs)
        harmed = sum(int(a != b and a == y) for a, b, y in pairs) / len(pairs)
        assert values["small", seed]["efficiency/flips"] == pytest.approx(flipped)
        assert values["small", seed]["efficiency/harmed"] == pytest.approx(harmed)
        assert values["none", seed]["efficiency/flips"] == 0
        some += flipped > 0
    assert some


def test_they_are_told_by_class_and_by_group(compared):
    page = (compared[0] / "report.html").read_text()
    assert "Predictions that flipped" in page
    assert "Flips by class" in page
    assert "Flips by group" in page


def test_without_efficiency_or_a_baseline_of_the_same_examples_there_are_none(tmp_path):
    options = {"max_epochs": 1, "accelerator": "cpu"}
    report = lg.compare(PlainNet, Data, {"none": [], "more": []}, options, 1, [Task()], tmp_path)
    assert "efficiency/flips" not in report["figures"]
