"""Evidence in the loggers: what TensorBoard and CSV hold afterwards, and what the interfaces of others are given."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure as Drawing
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger
from torch import nn

import lightning_guard as lg
from lightning_guard.callbacks import FeatureSqueezing, MagnitudePruning, RandomizedSmoothing, SampleLedger
from lightning_guard.evaluation import Bars, Curve, Evidence, Figure, Subject, Task
from lightning_guard.evaluation.attributions import maps_of
from lightning_guard.report.logged import harmless, log_evidence, log_report
from tests import toys
from tests.guards import GUARDS
from tests.report.example import HOSTILE, comparison


@pytest.fixture
def evidence():
    x, y = torch.rand(4, 3), torch.tensor([0, 1, 0, 1])
    subject = Subject(nn.Linear(3, 2), [(x, y)])
    return Evidence(
        {
            "task/accuracy": Figure(0.5, "Accuracy", "fraction", "higher", "On test data."),
            "task/auc": Figure(None, "AUC", "ratio", "higher", "Not estimable."),
        },
        {"privacy/roc": Curve([0.01, 0.1], [0.02, None], "ROC", "FPR", "TPR", "By loss.")},
        {"fairness/rates": Bars(["a", "<b>"], [0.25, None], "Rates", "Rate", "By group.")},
        intervals={"task/accuracy": (0.4, 0.6)},
        pictures=maps_of(subject, x, y, x, "Drawn."),
    )


NUMBERS = {
    "task/accuracy": 0.5, "task/accuracy/low": 0.4, "task/accuracy/high": 0.6, "privacy/roc/0.01": 0.02,
    "fairness/rates/a": 0.25,
}  # fmt: skip


def read_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"images": 0})
    found.Reload()
    scalars = {tag: found.Scalars(tag)[-1] for tag in found.Tags()["scalars"]}
    return scalars, {tag: found.Images(tag)[-1] for tag in found.Tags()["images"]}


def test_tensorboard_holds_numbers_and_pictures(evidence, tmp_path):
    logger = TensorBoardLogger(tmp_path, name="run", version="")
    log_evidence(evidence, [logger], step=7)
    logger.finalize("success")
    scalars, images = read_tensorboard(logger.log_dir)
    assert {tag: scalar.value for tag, scalar in scalars.items()} == pytest.approx(NUMBERS)
    assert {scalar.step for scalar in scalars.values()} == {7}
    assert list(images) == ["explanation/examples"]
    assert images["explanation/examples"].width > 100
    assert images["explanation/examples"].step == 7


def test_csv_holds_numbers(evidence, tmp_path):
    logger = CSVLogger(tmp_path, name="run", version="")
    logger.log_metrics({"train_loss": 1.0}, step=1)
    log_evidence(evidence, [logger], step=7)
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    assert float(rows[0]["train_loss"]) == 1.0
    assert {key: float(value) for key, value in rows[-1].items() if value} == pytest.approx({**NUMBERS, "step": 7})


class Recorder(Logger):
    """The generic interface and nothing else, as a logger of somebody's own."""

    name = version = "recorder"

    def __init__(self):
        self.numbers, self.images, self.saved = [], [], 0

    def log_metrics(self, metrics, step=None):
        self.numbers.append((metrics, step))

    def log_hyperparams(self, *_, **__):
        pass

    def save(self):
        self.saved += 1


class Wandb(Recorder):
    """As Lightning's WandbLogger takes images."""

    def log_image(self, key, images, step=None, **kwargs):
        assert all(isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 for image in images)
        self.images.append((key, step))


class Mlflow(Recorder):
    """As Lightning's MLFlowLogger gives its client and run."""

    run_id = "abc"

    @property
    def experiment(self):
        return self

    def log_figure(self, run_id, figure, artifact_file):
        assert run_id == "abc"
        assert isinstance(figure, Drawing)
        self.images.append((artifact_file, None))


def test_others_get_what_their_interfaces_take(evidence):
    plain, wandb, mlflow = Recorder(), Wandb(), Mlflow()
    log_evidence(evidence, [plain, wandb, mlflow], step=3)
    assert [one.numbers for one in (plain, wandb, mlflow)] == [[(NUMBERS, 3)]] * 3
    assert not plain.images
    assert wandb.images == [("explanation/examples", 3)]
    assert mlflow.images == [("explanation/examples.png", None)]
    assert plain.saved == 1


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_names_that_every_logger_takes(name, tmp_path):
    key = harmless(name)
    assert all(c.isalnum() or c in "_-./ " for c in key)
    figure = Figure(1.0, "x", "", None, "About.")
    logger = Recorder()
    log_evidence(Evidence({f"a/{name}": figure, "a/b": figure}), [logger])
    assert len(logger.numbers[0][0]) == 2


def test_names_that_become_one_are_kept_apart():
    figure = Figure(1.0, "x", "", None, "About.")
    logger = Recorder()
    log_evidence(Evidence({"a<b": figure, "a>b": figure, "a_b": figure}), [logger])
    assert len(logger.numbers[0][0]) == 3


def test_a_report_with_its_figures(tmp_path):
    from lightning_guard.report.computed import computed
    from lightning_guard.report.document import prepare

    report = computed(prepare(comparison(["none", "dp"], seeds=3)))
    board, recorder = TensorBoardLogger(tmp_path, name="c", version=""), Recorder()
    log_report(report, [board, recorder])
    board.finalize("success")
    scalars, images = read_tensorboard(board.log_dir)
    for entry in report["summary"]:
        assert scalars[f"compare/{entry['arm']}/{entry['figure']}"].value == pytest.approx(entry["mean"], rel=1e-6)
    assert "compare/dp/task/accuracy/difference" in scalars
    assert len(images) >= 3
    assert set(recorder.numbers[0][0]) == set(scalars)


def test_a_comparison_logs_each_run_to_the_loggers_of_its_trainer(tmp_path):
    logger = Recorder()
    lg.compare(toys.PlainNet, toys.Data, {"none": []}, {"max_epochs": 1, "accelerator": "cpu", "logger": logger}, 1,
               [Task()], tmp_path)  # fmt: skip
    final = logger.numbers[-1][0]
    assert {"task/accuracy", "task/accuracy/low", "cost/train_seconds"} <= final.keys()
    assert logger.numbers[-1][1] == 4


def test_guards_log_under_their_names(tmp_path):
    """What docs/loggers.md says: guard/<name>/<figure>, in TensorBoard and CSV alike."""
    loggers = [TensorBoardLogger(tmp_path, name="tb", version=""), CSVLogger(tmp_path, name="csv", version="")]
    pl.seed_everything(0, verbose=False)
    toys.trainer([MagnitudePruning(0.5, every=1)], logger=loggers, log_every_n_steps=1).fit(
        toys.PlainNet(), toys.loader()
    )
    scalars, _ = read_tensorboard(loggers[0].log_dir)
    header = next(csv.reader((tmp_path / "csv" / "metrics.csv").open()))
    assert "guard/magnitude_pruning/sparsity" in scalars
    assert "guard/magnitude_pruning/sparsity" in header


def documented():
    page = (Path(__file__).parents[2] / "docs" / "loggers.md").read_text()
    return set(re.findall(r"`(guard/\w+/\w+)`", page))


def logged_by(guard, **options):
    recorder = Recorder()
    toys.fit([guard], logger=recorder, log_every_n_steps=1, **options)
    return {key for numbers, _ in recorder.numbers for key in numbers if key.startswith("guard/")}


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.name)
def test_whatever_a_guard_logs_is_on_the_page(guard, monkeypatch):
    monkeypatch.setattr(toys, "BATCH_NORM", False)
    found = logged_by(GUARDS[guard].on())
    assert found <= documented()
    if guard not in (FeatureSqueezing, RandomizedSmoothing, SampleLedger):  # which have no figure of a step
        assert found


def test_a_guard_that_is_off_logs_nothing():
    assert not logged_by(MagnitudePruning(0.0))
