"""Comparisons share what they must, survive interrupts, and never run twice what is there."""

import importlib
import json
import linecache
import os
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

import lightning_guard as lg
from lightning_guard.callbacks import (
    AdversarialTraining,
    FairnessRegularization,
    MagnitudePruning,
    QuantizationAwareTraining,
    WeightClustering,
)
from lightning_guard.evaluation import Efficiency, Fairness, Robustness, Task
from lightning_guard.guard import Guard, GuardConflict, Phase
from tests.toys import Data, Net, PlainNet

TRAINER = {"max_epochs": 2, "accelerator": "cpu"}
JUDGES = [Task(), Fairness(), Efficiency(latency=False)]


def arms():
    return {
        "none": [],
        "fair": [FairnessRegularization(mode="penalty", weight=4.0)],
        "small": [MagnitudePruning(0.7, every=1)],
        "both": [MagnitudePruning(0.7, every=1), FairnessRegularization(mode="penalty", weight=4.0)],
    }


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison")
    # Net unpacks two parts and the loader yields three: the group is withheld in the unguarded arm too.
    return folder, lg.compare(Net, Data, arms(), TRAINER, seeds=2, evaluators=JUDGES, folder=folder, title="Toys")


def test_arms_share_start_and_order(compared):
    _, report = compared
    for seed in (0, 1):
        runs = [run for run in report["runs"] if run["seed"] == seed]
        assert len(runs) == 4
        assert len({run["initial_weights_sha256"] for run in runs}) == 1
        assert len({run["data_order_sha256"] for run in runs}) == 1
    assert len({run["data_order_sha256"] for run in report["runs"]}) == 2
    assert not any("not" in check for check in report["checks"])


def test_every_arm_is_judged_on_every_axis(compared):
    _, report = compared
    assert {figure["axis"] for figure in report["figures"].values()} == {"task", "fairness", "efficiency", "cost"}
    sparse = {run["arm"]: run["values"]["efficiency/sparsity"] for run in report["runs"]}
    assert sparse["none"] == sparse["fair"] == 0
    assert sparse["small"] == sparse["both"] == pytest.approx(0.7, abs=0.01)
    assert report["arms"][3]["guards"][0]["name"] == "fairness"
    assert report["arms"][3]["guards"][0]["options"]["weight"] == 4.0


def test_all_files_are_there(compared):
    folder, _ = compared
    assert {"report.html", "report.json", "report.md", "metrics.csv"} <= {path.name for path in folder.iterdir()}
    weights = torch.load(folder / "runs" / "small" / "seed-1" / "weights.pt", weights_only=True)
    assert weights.keys() == Net().state_dict().keys()


def test_a_second_time_nothing_is_trained(compared, monkeypatch):
    folder, report = compared
    monkeypatch.setattr(pl.Trainer, "fit", lambda *_, **__: pytest.fail("trained again"))
    again = lg.compare(Net, Data, arms(), TRAINER, seeds=2, evaluators=JUDGES, folder=folder, title="Toys")
    assert again["runs"] == report["runs"]


def test_what_decides_a_run_decides_whether_it_is_kept(tmp_path, monkeypatch):
    counted = []
    fit = pl.Trainer.fit
    monkeypatch.setattr(pl.Trainer, "fit", lambda self, *a, **k: counted.append(1) or fit(self, *a, **k))

    def run(own, trainer=TRAINER, more=(), net=PlainNet):
        counted.clear()
        lg.compare(net, Data, own, trainer, seeds=1, evaluators=[Task(), *more], folder=tmp_path)
        return len(counted)

    own = {"none": [], "small": [MagnitudePruning(0.5)]}
    assert run(own) == 2
    assert run(own) == 0
    assert run({**own, "small": [MagnitudePruning(0.6)]}) == 1  # an option of a guard
    assert run(own | {"more": [MagnitudePruning(0.9)]}) == 2  # a further arm, and the option changed back
    assert run(own, {**TRAINER, "max_epochs": 1}) == 2  # the training
    assert run(own, {**TRAINER, "max_epochs": 1}, [Fairness()]) == 2  # the evidence
    assert run(own, {**TRAINER, "max_epochs": 1}, [Fairness()], lambda: PlainNet(lr=0.01)) == 2  # the model


def test_an_edited_module_is_trained_again(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    text = "from tests.toys import PlainNet\n\n\nclass Mine(PlainNet):\n    scale = 1\n"
    kept = []
    for scale in (1, 1, 2):
        (tmp_path / "mine.py").write_text(text.replace("scale = 1", f"scale = {scale}"))
        sys.modules.pop("mine", None)
        linecache.clearcache()
        module = importlib.import_module("mine").Mine
        lg.compare(module, Data, {"none": []}, TRAINER, seeds=1, evaluators=[Task()], folder=tmp_path / "out")
        kept.append((tmp_path / "out" / "runs" / "none" / "seed-0" / "result.json").stat().st_mtime_ns)
    assert kept[0] == kept[1] < kept[2]


def test_an_interrupt_keeps_what_is_finished(tmp_path):
    class Interrupting(pl.Callback):
        def on_train_batch_end(self, *args):
            raise KeyboardInterrupt

    own = {"none": [], "small": [MagnitudePruning(0.5), Interrupting()]}
    with pytest.raises(KeyboardInterrupt):
        lg.compare(PlainNet, Data, own, TRAINER, seeds=1, evaluators=[Task()], folder=tmp_path)
    assert (tmp_path / "runs" / "none" / "seed-0" / "result.json").exists()
    assert not (tmp_path / "runs" / "small" / "seed-0" / "result.json").exists()
    assert not (tmp_path / "report.json").exists()
    kept = (tmp_path / "runs" / "none" / "seed-0" / "result.json").stat().st_mtime_ns
    own["small"].pop()
    report = lg.compare(PlainNet, Data, own, TRAINER, seeds=1, evaluators=[Task()], folder=tmp_path)
    assert len(report["runs"]) == 2
    assert (tmp_path / "runs" / "none" / "seed-0" / "result.json").stat().st_mtime_ns == kept


def test_robustness_takes_the_threat_of_an_arm(tmp_path):
    own = {"none": [], "robust": [AdversarialTraining(0.1, bounds=(0.0, 1.0), steps=2)]}
    judges = [Robustness(examples=32, steps=3)]
    report = lg.compare(PlainNet, Data, own, TRAINER, seeds=1, evaluators=judges, folder=tmp_path)
    values = {run["arm"]: run["values"] for run in report["runs"]}
    assert all(value["robustness/accuracy"] is not None for value in values.values())
    assert values["robust"]["cost/passes"] == 3 * values["none"]["cost/passes"]


def test_an_order_that_differs_is_said(tmp_path):
    class Disturbing(Guard):
        """Draws from the global generator, so that the loader shuffles otherwise."""

        name, phase, traits = "disturbing", Phase.BATCH, frozenset()

        def on_batch(self, step):
            torch.rand(1)
            return step.batch

    own = {"none": [], "disturbed": [Disturbing()]}
    report = lg.compare(PlainNet, Data, own, TRAINER, seeds=1, evaluators=[Task()], folder=tmp_path)
    assert any("data order" in check for check in report["checks"])


def test_hostile_names_stay_in_the_folder(tmp_path):
    own = {"none": [], "../../<b>évil": [MagnitudePruning(0.5)]}
    lg.compare(PlainNet, Data, own, TRAINER, seeds=1, evaluators=[Task()], folder=tmp_path / "in")
    assert {path.name for path in tmp_path.iterdir() if path.name != "lightning_logs"} == {"in"}
    assert "<b>" not in (tmp_path / "in" / "report.html").read_text()


def test_impossible_comparisons_are_refused(tmp_path):
    with pytest.raises(ValueError, match="0 seeds"):
        lg.compare(PlainNet, Data, {"none": []}, seeds=0, folder=tmp_path)


def test_workers_share_the_runs(tmp_path):
    """From the command line, in two processes; the report is that of one process but for the time that it took."""
    options = "--config demo/adult --arm none --arm pruning --seeds 2"
    short = "--trainer.max_epochs 1 --trainer.limit_train_batches 12"
    command = [sys.executable, "-m", "lightning_guard", "compare", *options.split(), *short.split()]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # sums depend on the number of threads in their last bits
    for workers in ("1", "2"):
        own = [*command, "--workers", workers, "--out", workers]
        done = subprocess.run(own, capture_output=True, text=True, check=False, timeout=900, env=one_thread)
        assert done.returncode == 0, done.stderr
    one, two = (json.loads(Path(workers, "report.json").read_text())["runs"] for workers in ("1", "2"))
    for first, second in zip(one, two, strict=True):
        for run in (first, second):
            run["values"] = {
                key: value
                for key, value in run["values"].items()
                if not any(word in key for word in ("second", "latency", "cost/peak_memory", "cost/energy"))
            }
        assert first == second


def test_callbacks_of_the_trainer_are_fresh_in_every_run(tmp_path):
    class Remembering(pl.Callback):
        fits = 0

        def on_train_start(self, trainer, module):
            assert self.fits == 0  # as an EarlyStopping must not remember the run before
            self.fits += 1

    options = {"max_epochs": 1, "limit_train_batches": 1, "callbacks": [Remembering()]}
    lg.compare(PlainNet, Data, {"none": [], "pruned": [MagnitudePruning(0.5)]}, options, 2, [Efficiency()], tmp_path)


def test_combinations_are_trained_and_the_refused_are_told(tmp_path):
    own = {
        "none": [],
        "small": [MagnitudePruning(0.7, every=1)],
        "shared": [WeightClustering(4, every=1)],
        "rounded": [QuantizationAwareTraining()],
    }
    options = {"seeds": 1, "evaluators": [Task()], "folder": tmp_path}
    report = lg.compare(PlainNet, Data, own, TRAINER, combine="pairs,all", **options)
    trained = ["none", "small", "shared", "rounded", "small+shared", "small+rounded"]
    assert [arm["name"] for arm in report["arms"]] == [run["arm"] for run in report["runs"]] == trained
    told = report["combinations"]
    assert told["parts"] == ["small", "shared", "rounded"]
    assert [arm["arm"] for arm in told["arms"]] == ["small+shared", "small+rounded"]
    refused = {"+".join(entry["parts"]): entry["reasons"] for entry in told["refused"]}
    assert refused.keys() == {"shared+rounded", "small+shared+rounded"}
    assert all("part again" in reasons[0] for reasons in refused.values())
    both = next(arm for arm in report["arms"] if arm["name"] == "small+rounded")
    assert {guard["name"] for guard in both["guards"]} == {"magnitude_pruning", "quantization"}
    assert (tmp_path / "combinations.csv").exists()
    for kinds, message in (
        ("fours", "combine: 'fours' is no way to combine; give pairs, triples or all"),
        ("pairs:none", "combine: 'pairs:none' names no arm with safeguards; there are small"),
    ):
        with pytest.raises(ValueError, match=message):
            lg.compare(PlainNet, Data, own, TRAINER, combine=kinds, **options)
    with pytest.raises(ValueError, match="combine: old is a model that is not trained here"):
        lg.compare(PlainNet, Data, {**own, "old": lambda seed: PlainNet()}, TRAINER, combine="pairs", **options)
    alone = {"none": [], "a": [WeightClustering(4), QuantizationAwareTraining()], "b": [MagnitudePruning(0.5)]}
    with pytest.raises(GuardConflict, match="part again"):
        lg.compare(PlainNet, Data, alone, TRAINER, combine="pairs", **options)
