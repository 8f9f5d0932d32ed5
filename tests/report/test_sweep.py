"""A comparison of a sweep, from training to the report: its front, what stands beside it, and the data."""

from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_guard as lg
from lightning_guard.callbacks import FairnessRegularization, MagnitudePruning
from lightning_guard.evaluation import Fairness, Task
from lightning_guard.evaluation.references import Unsuitable
from lightning_guard.recipe import RecipeError
from lightning_guard.report.beside import references
from lightning_guard.report.described import described
from lightning_guard.report.runs import Arm, ArmRun
from tests.toys import Data, PlainNet

TRAINER = {"max_epochs": 2, "accelerator": "cpu"}
JUDGES = [Task(), Fairness(min_support=1)]


class Scorer(pl.LightningModule):
    """One logit."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(3, 1)

    def forward(self, x):
        return self.net(x)[:, 0]

    def training_step(self, batch, batch_idx):
        return F.binary_cross_entropy_with_logits(self(batch[0]), batch[1].float())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.05)


class Binary(pl.LightningDataModule):
    """Two classes, and two groups of which the third column tells."""

    group_names = ("a", "b")

    def __init__(self, population=None, group=True):
        super().__init__()
        self.population, self.group = population, group

    def _loader(self, seed, shuffle=False):
        generator = torch.Generator().manual_seed(seed)
        group = (torch.rand(400, generator=generator) < 0.25).long()
        x = torch.randn(400, 3, generator=generator) + torch.stack([group * 0, group * 0, group], 1)
        y = (x.sum(1) > 0.5).long()
        columns = (x, y, group) if self.group else (x, y)
        return DataLoader(TensorDataset(*columns), 64, shuffle=shuffle)

    def train_dataloader(self):
        return self._loader(0, shuffle=True)

    def test_dataloader(self):
        return self._loader(1)


def arms():
    weights = {f"weight {weight}": [FairnessRegularization(mode="penalty", weight=weight)] for weight in (1.0, 20.0)}
    return {"none": [], **weights, "small": [MagnitudePruning(0.3, every=1)]}


def compared(folder, **options):
    options = {"seeds": 2, "evaluators": JUDGES, "folder": folder, **options}
    return lg.compare(Scorer, Binary, arms(), TRAINER, **options)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    return folder, compared(folder, references=["threshold_optimizer", "exponentiated_gradient"])


def test_a_loop_of_the_user_is_a_sweep(report):
    _, found = report
    assert {arm["name"]: arm.get("sweep") for arm in found["arms"]} == {
        "none": None,
        "weight 1.0": {"key": "guards.fairness.weight", "value": 1.0, "of": "fairness"},
        "weight 20.0": {"key": "guards.fairness.weight", "value": 20.0, "of": "fairness"},
        "small": None,
    }
    (front,) = found["fronts"]
    means = {(entry["arm"], entry["figure"]): entry["mean"] for entry in found["summary"]}
    for point in front["points"]:
        if point["kind"] != "reference":
            assert point["x"] == means[point["name"], "fairness/demographic_parity"]
            assert point["y"] == means[point["name"], "task/accuracy"]


def test_references_stand_beside_it(report):
    folder, found = report
    runs = found["references"]["runs"]
    of_each = {
        method: [run["seed"] for run in runs if run["method"] == method] for method in found["references"]["methods"]
    }
    assert of_each == {"threshold_optimizer": [0, 0, 0, 1, 1, 1], "exponentiated_gradient": [None] * 3}
    assert {run["bound"] for run in runs} == {0.02, 0.05, 0.1}
    assert "no sweep states any" in found["references"]["notes"][0]  # a weight is no gap
    points = [point for point in found["fronts"][0]["points"] if point["kind"] == "reference"]
    assert len(points) == 6
    own = [run for run in runs if (run["method"], run["bound"]) == ("threshold_optimizer", 0.02)]
    assert points[0]["x"] == pytest.approx(sum(run["values"]["fairness/demographic_parity"] for run in own) / 2)
    # The tightest bound closes most of the gap of the baseline.
    base = next(point for point in found["fronts"][0]["points"] if point["kind"] == "baseline")
    assert points[0]["x"] < 0.5 * base["x"]
    assert "ThresholdOptimizer" in (folder / "report.html").read_text()


def test_bounds_are_the_gaps_of_the_sweep(tmp_path, monkeypatch):
    asked = []

    def stand_in(method, run, notion, bounds):
        asked.append((method, run.seed, notion, list(bounds)))
        return "Not here." if method == "exponentiated_gradient" else []

    def run(name, seed, **sweep):
        fairness = {"name": "fairness", "options": {"notion": "equalized_odds"}}
        result = {"guards": [fairness] if sweep else []}
        arm = Arm(name, lambda _: None, sweep=sweep or None)
        return SimpleNamespace(arm=arm, seed=seed, fingerprint=f"{name}{seed}", result=lambda: result)

    monkeypatch.setattr("lightning_guard.report.beside._found", stand_in)
    runs = [run("none", 0), run("none", 1)]
    runs += [run(f"fair {gap}", 0, key="guards.fairness.max_gap", value=gap, of="fair") for gap in (0.1, 0.02, None)]
    told = []
    found = references(["threshold_optimizer", "exponentiated_gradient"], runs, tmp_path, told.append)
    assert asked == [
        ("threshold_optimizer", 0, "equalized_odds", [0.02, 0.1]),
        ("threshold_optimizer", 1, "equalized_odds", [0.02, 0.1]),
        ("exponentiated_gradient", 0, "equalized_odds", [0.02, 0.1]),
    ]
    assert found["notes"] == ["Not here."]
    assert told == [
        "ThresholdOptimizer, equalized odds, seed 0", "ThresholdOptimizer, equalized odds, seed 1",
        "ExponentiatedGradient, equalized odds",
    ]  # fmt: skip


def test_a_second_time_nothing_is_fitted(report, monkeypatch):
    folder, found = report
    monkeypatch.setattr("lightning_guard.report.beside._found", lambda *_: pytest.fail("fitted again"))
    monkeypatch.setattr("lightning_guard.report.described._described", lambda *_: pytest.fail("read again"))
    again = compared(folder, references=["threshold_optimizer", "exponentiated_gradient"])
    assert again["references"] == found["references"]
    assert again["data"] == found["data"]


def test_the_report_tells_of_the_data_after_the_verdict(report):
    folder, found = report
    bars = {one["key"]: dict(zip(one["categories"], one["values"], strict=True)) for one in found["data"]["bars"]}
    _, y, group = Binary()._loader(0).dataset.tensors
    assert bars["data/group_size"] == {"a": int((group == 0).sum()), "b": int((group == 1).sum())}
    assert bars["data/base_rate"]["b"] == pytest.approx(float(y[group == 1].double().mean()))
    page = (folder / "report.html").read_text()
    assert page.index('id="verdict-title"') < page.index('id="data-title"')
    text = (folder / "report.md").read_text()
    assert text.index("## Verdict") < text.index("## Data")
    assert f"| a | {bars['data/group_size']['a']:.0f} |" in text


def test_groups_are_compared_with_a_stated_population(tmp_path):
    def run(population):
        make = lambda: Binary(population)  # noqa: E731
        options = {"seeds": 1, "evaluators": JUDGES, "folder": tmp_path}
        return lg.compare(Scorer, make, {"none": []}, {**TRAINER, "max_epochs": 1}, **options)

    group = Binary()._loader(0).dataset.tensors[2]
    found = run({"a": 0.5, "b": 0.5})["data"]
    gap = next(one for one in found["figures"] if one["key"] == "data/representation_gap")
    assert gap["value"] == pytest.approx(abs(float(group.double().mean()) - 0.5))


def test_a_population_that_does_not_fit_is_refused_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(pl.Trainer, "fit", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(RecipeError, match="data: population"):
        lg.compare(Scorer, lambda: Binary({"a": 0.9}), {"none": []}, TRAINER, folder=tmp_path)


def test_without_groups_nothing_is_said_of_them(tmp_path):
    report = lg.compare(
        Scorer, lambda: Binary(group=False), {"none": []}, {**TRAINER, "max_epochs": 1}, 1, JUDGES, tmp_path
    )
    assert "data" not in report
    assert 'id="data"' not in (tmp_path / "report.html").read_text()


def test_looking_at_the_data_draws_nothing(tmp_path):
    """A run that begins after the data were looked at is the run that would have been."""
    options = {"seeds": 1, "evaluators": [Task()]}
    one = lg.compare(Scorer, Binary, {"none": []}, TRAINER, folder=tmp_path / "one", **options)
    two = lg.compare(Scorer, lambda: Binary(group=False), {"none": []}, TRAINER, folder=tmp_path / "two", **options)
    assert one["runs"][0]["values"]["task/accuracy"] == two["runs"][0]["values"]["task/accuracy"]
    parts = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu"), Scorer(), Binary()
    before = torch.get_rng_state()
    assert described(ArmRun(Arm("none", lambda _: parts), 0, tmp_path, [], False, ""), parts, tmp_path)["figures"]
    assert torch.equal(torch.get_rng_state(), before)


def test_references_that_cannot_be_had_are_a_note(tmp_path):
    own = {
        "none": [],
        **{str(w): [FairnessRegularization(mode="penalty", weight=w)] for w in (1.0, 2.0)},
    }  # of three classes
    options = {"evaluators": JUDGES, "folder": tmp_path, "references": ["threshold_optimizer"]}
    report = lg.compare(PlainNet, Data, own, {**TRAINER, "max_epochs": 1}, 1, **options)
    assert report["references"]["runs"] == []
    assert "binary labels" in " ".join(report["references"]["notes"])
    assert "binary labels" in (tmp_path / "report.html").read_text()
    assert issubclass(Unsuitable, ValueError)


@pytest.mark.parametrize(
    ("references", "own", "said"),
    [
        (["threshold_optimiser"], arms(), "nothing is named 'threshold_optimiser'; did you mean 'threshold_optimizer'"),
        (["threshold_optimizer"], {"none": [], "small": [MagnitudePruning(0.5)]}, "there is none"),
    ],
)
def test_references_without_a_place_are_refused(references, own, said, tmp_path, monkeypatch):
    monkeypatch.setattr(pl.Trainer, "fit", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(ValueError, match=said):
        lg.compare(Scorer, Binary, own, TRAINER, folder=tmp_path, references=references)
