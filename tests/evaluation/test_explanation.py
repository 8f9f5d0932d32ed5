"""Explanations against linear models whose attributions are known, scipy, and captum left as it was found."""

import importlib.util

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch import nn

import lightning_guard as lg
from lightning_guard.callbacks import MagnitudePruning
from lightning_guard.evaluation import Explanation, Subject
from lightning_guard.functional.agreement import rank_correlation, top_overlap
from tests import toys

ROWS = st.lists(st.sampled_from([-2.0, 0.0, 0.0, 1.0, 1.5, 7.0]), min_size=4, max_size=4)


@settings(max_examples=50, deadline=None)
@given(ROWS, ROWS)
def test_rank_correlation_is_scipys(first, second):
    found = rank_correlation(torch.tensor([first]), torch.tensor([second]))
    if len(set(first)) == 1 or len(set(second)) == 1:
        assert found.isnan()
    else:
        assert found.item() == pytest.approx(spearmanr(first, second).statistic, abs=1e-12)


def test_top_overlap_counts():
    draws = torch.Generator().manual_seed(0)
    first, second = torch.randn(20, 9, generator=draws), torch.randn(20, 9, generator=draws)
    wanted = []
    for one, other in zip(first.abs().tolist(), second.abs().tolist(), strict=True):
        top = [set(sorted(range(9), key=lambda i: -values[i])[:3]) for values in (one, other)]
        wanted.append(len(top[0] & top[1]) / 3)
    assert top_overlap(first, second, 3).tolist() == pytest.approx(wanted)
    assert top_overlap(first, first, 3).tolist() == [1.0] * 20


def linear(classes, width=6, n=40):
    torch.manual_seed(0)
    model = nn.Linear(width, classes).double()
    x, y = torch.randn(n, width, dtype=torch.float64), torch.randint(max(classes, 2), (n,))
    return model, x, y


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("baseline", [0.0, 0.5])
def test_of_a_linear_model_they_are_weight_times_input(classes, baseline):
    model, x, y = linear(classes)
    subject = Subject(model, [(x, y)])
    evidence = Explanation(examples=1000, steps=3, baseline=baseline).evaluate(subject)
    weight = model.weight[torch.zeros(len(y), dtype=int) if classes == 1 else y]
    wanted = (weight * (x - baseline)).detach()
    torch.testing.assert_close(evidence.tensors["explanation/attributions"], wanted.float(), atol=1e-5, rtol=1e-4)
    share = wanted.abs().mean(0) / wanted.abs().mean(0).sum()
    bars = evidence.bars["explanation/importance"]
    assert bars.categories[0] == f"column {share.argmax()}"
    assert bars.values == pytest.approx(share.sort(descending=True).values.tolist(), rel=1e-4)
    assert evidence.figures["explanation/infidelity"].value == pytest.approx(0, abs=1e-8)  # a linear model has none


def test_parts_of_one_category_are_added_up_before_their_size_is_taken():
    model = nn.Linear(3, 1, bias=False)
    model.weight.data = torch.tensor([[2.0, -2.0, 1.0]])
    names = ["job=a", "job=b", "age"]
    subject = Subject(model, [(torch.ones(8, 3), torch.ones(8).long())], feature_names=names)
    bars = Explanation(steps=2).evaluate(subject).bars["explanation/importance"]
    assert dict(zip(bars.categories, bars.values, strict=True)) == {"age": 1.0, "job": 0.0}


def test_a_steady_model_is_told_from_one_that_is_not():
    x, y = torch.rand(30, 4), torch.ones(30).long()

    class Rough(nn.Module):
        def forward(self, x):
            return torch.sin(400 * x).sum(1)

    steady, rough = (
        Explanation(radius=0.01).evaluate(Subject(model, [(x, y)])).figures["explanation/sensitivity"].value
        for model in (nn.Linear(4, 1), Rough())
    )
    assert steady < 0.05 < 0.5 < rough


def test_images_have_pictures_and_no_bars():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3))
    evidence = Explanation(examples=8, steps=4).evaluate(
        Subject(model, [(torch.rand(9, 1, 8, 8), torch.arange(9) % 3)], class_names=["<b>", "$x$", "c" * 99])
    )
    assert set(evidence.pictures) == {"explanation/mean", "explanation/examples"}
    assert not evidence.bars
    assert evidence.tensors["explanation/attributions"].shape == (8, 64)


@pytest.mark.parametrize(
    ("model", "batch", "why"),
    [
        (nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2)),
         (torch.randint(5, (7, 2)), torch.randint(2, (7,))), "no floating tensor"),
        (nn.Linear(3, 2), (torch.rand(7, 3), 3 * torch.rand(7, 2)), "more than one answer"),
        (nn.Conv1d(1, 2, 1), (torch.rand(7, 1, 4), torch.randint(2, (7, 4))), "not understood"),
    ],
)  # fmt: skip
def test_what_has_no_explanation_says_why(model, batch, why):
    evidence = Explanation().evaluate(Subject(model, [batch]))
    assert not evidence.figures
    assert why in evidence.notes[0]


def test_without_captum_it_is_refused_in_one_line(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "lightning_guard.evaluation.explanation.find_spec", lambda name: None if name == "captum" else found(name)
    )
    with pytest.raises(ValueError, match=r"^explanations need captum; pip install 'lightning-guard\[explain\]'$"):
        Explanation()


@pytest.mark.parametrize("options", [{"examples": 0}, {"steps": 1}, {"radius": 0.0}])
def test_options_out_of_range(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Explanation(**options)


def test_a_comparison_says_whether_arms_look_at_the_same_things(tmp_path):
    judges = [Explanation(examples=16, steps=4)]
    arms = {"none": [], "same": [pl.Callback()], "small": [MagnitudePruning(0.5, every=1)]}
    report = lg.compare(toys.PlainNet, toys.Data, arms, {"max_epochs": 2, "accelerator": "cpu"}, 2, judges, tmp_path)
    values = {(run["arm"], run["seed"]): run["values"] for run in report["runs"]}
    for seed in (0, 1):
        assert values["same", seed]["explanation/rank_correlation"] == pytest.approx(1.0)
        assert values["same", seed]["explanation/top_overlap"] == 1.0
        assert values["small", seed]["explanation/rank_correlation"] < 0.999
    # The baseline's own figure is the yardstick: two seeds of it.
    yardstick = {values["none", seed]["explanation/rank_correlation"] for seed in (0, 1)}
    assert len(yardstick) == 1
    assert -1 <= yardstick.pop() < 1
    assert "explanation" in (tmp_path / "report.md").read_text().lower()


def test_it_is_off_unless_asked_for():
    from lightning_guard.report.compare import _evaluators

    assert "explanation" not in [judge.name for judge in _evaluators(None, [])]


def test_the_command_line_asks_for_it_and_for_drift():
    from lightning_guard.launch import GuardCLI

    def judges(*args):
        cli = GuardCLI("compare", ["--config", "demo/adult", *args])
        cli.build()
        return {judge.name: judge for judge in cli.evaluators}

    assert {"task", "privacy"} <= judges().keys()
    assert not {"explanation", "drift"} & judges().keys()
    asked = judges("--evaluate.explanation", "Explanation", "--evaluate.explanation.examples", "8",
                   "--evaluate.drift", "Drift", "--evaluate.privacy", "null")  # fmt: skip
    assert asked["explanation"].examples == 8
    assert "drift" in asked
    assert "privacy" not in asked
