"""Comparisons of what others have trained, of what is finished already, and of what was killed on the way."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

import lightning_guard as lg
from lightning_guard.callbacks import MagnitudePruning
from lightning_guard.cli import main
from lightning_guard.data import AdultData
from lightning_guard.evaluation import Efficiency, Fairness, Task
from lightning_guard.models import MLP
from lightning_guard.recipe import RecipeError
from lightning_guard.report import load_report
from lightning_guard.report.sign import sign
from lightning_guard.report.verify import failed, lines, verify
from tests.report.example import HOSTILE
from tests.toys import Data, PlainNet, fit

TRAINER = {"max_epochs": 1, "accelerator": "cpu"}
JUDGES = [Task(), Efficiency(latency=False)]
SHORT = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "8"]
AXES = [part for axis in ("privacy", "robustness", "fairness") for part in (f"--evaluate.{axis}", "null")]


def compared(folder, arms, **options):
    return lg.compare(PlainNet, Data, arms, TRAINER, evaluators=JUDGES, folder=folder, **options)


def values(report, arm, key="task/accuracy"):
    return {run["seed"]: run["values"][key] for run in report["runs"] if run["arm"] == arm}


# Models that were not trained here ------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [False, True], ids=["weights", "checkpoint"])
def test_a_checkpoint_is_judged_as_the_model_that_it_is(tmp_path, whole):
    """The oracle: the same training inside the comparison, whose figures must be the same to the bit."""
    for seed in (0, 1):
        module = fit(seed=seed, data=Data(), max_epochs=1)
        path = tmp_path / f"theirs-{seed}.ckpt"
        if whole:
            module.fitted.save_checkpoint(path)
        else:
            torch.save(module.state_dict(), path)
    report = compared(tmp_path / "out", {"none": [], "theirs": str(tmp_path / "theirs-{seed}.ckpt")}, seeds=2)
    assert values(report, "theirs") == values(report, "none")
    assert [arm.get("trained", True) for arm in report["arms"]] == [True, False]
    assert not any(key.startswith("cost/") for run in report["runs"] if run["arm"] == "theirs" for key in run["values"])
    assert any("was not recorded whether theirs started" in check for check in report["checks"])
    assert not failed(verify(tmp_path / "out"))


def test_a_checkpoint_without_a_seed_counts_once(tmp_path):
    torch.save(PlainNet().state_dict(), tmp_path / "theirs.pt")
    report = compared(tmp_path / "out", {"none": [], "theirs": tmp_path / "theirs.pt"}, seeds=2)
    assert values(report, "theirs").keys() == {0}
    assert "There is no run of theirs for seed 1." in report["checks"]


def test_a_checkpoint_that_changed_is_judged_again(tmp_path):
    found = []
    for scale in (1.0, 1.0, -1.0):
        weights = PlainNet().state_dict()
        torch.manual_seed(0)
        torch.save({key: torch.rand_like(value) * scale if value.is_floating_point() else value
                    for key, value in weights.items()}, tmp_path / "theirs.pt")  # fmt: skip
        compared(tmp_path / "out", {"none": [], "theirs": tmp_path / "theirs.pt"}, seeds=1)
        found.append((tmp_path / "out/runs/theirs/seed-0/result.json").stat().st_mtime_ns)
    assert found[0] == found[1] < found[2]


def test_code_makes_an_arm(tmp_path):
    """Any module will do: here one that always says class 1."""

    class Stubborn(nn.Module):
        def forward(self, x):
            return torch.eye(3)[1].expand(len(x), 3)

    report = compared(tmp_path, {"none": [], "stubborn": lambda seed: Stubborn()}, seeds=1)
    labels = torch.cat([batch[1] for batch in Data().test_dataloader()])
    assert values(report, "stubborn")[0] == pytest.approx(float((labels == 1).double().mean()))


@pytest.mark.parametrize(
    ("save", "said"),
    [
        (lambda path: None, "no checkpoint"),
        (lambda path: torch.save(PlainNet(), path), "without running code"),
        (lambda path: torch.save(torch.zeros(2), path), "no weights"),
        (lambda path: torch.save({"other": torch.zeros(2)}, path), "does not fit PlainNet"),
        (lambda path: path.write_text("x"), "without running code"),
    ],
)
def test_what_is_no_checkpoint_of_the_class_is_refused(tmp_path, save, said):
    save(tmp_path / "theirs.pt")
    with pytest.raises(RecipeError, match=said):
        compared(tmp_path / "out", {"none": [], "theirs": tmp_path / "theirs.pt"}, seeds=1)


def test_code_that_makes_no_model_is_refused(tmp_path):
    with pytest.raises(TypeError, match="made a int"):
        compared(tmp_path, {"none": [], "theirs": lambda seed: seed}, seeds=1)


# Splits by seed -------------------------------------------------------------------------------------------------


def test_the_split_goes_by_seed_if_asked_and_arms_share_it(tmp_path):
    seen = {}

    class Looking(pl.Callback):
        def on_train_start(self, trainer, module):
            held = trainer.datamodule.val_set.columns[0].sum().item()
            seen.setdefault(trainer.datamodule.split_seed, set()).add(held)

    short = {"max_epochs": 1, "limit_train_batches": 2, "callbacks": [Looking()]}
    arms = {"none": [], "small": [MagnitudePruning(0.5)]}
    for resplit in (False, True):
        seen.clear()
        report = lg.compare(
            lambda: MLP(in_features=104), lambda: AdultData(group="sex"), arms, short, 2, [Task()], tmp_path,
            resplit=resplit,
        )  # fmt: skip
        assert report["provenance"]["resplit"] == resplit
        assert len(seen) == (2 if resplit else 1)
        assert all(len(sums) == 1 for sums in seen.values())
    assert len({next(iter(sums)) for sums in seen.values()}) == 2


def test_data_whose_split_is_fixed_refuse_it(tmp_path):
    with pytest.raises(RecipeError, match="Data has no attribute split_seed"):
        compared(tmp_path, {"none": []}, seeds=1, resplit=True)


# Gates from Python ----------------------------------------------------------------------------------------------


def test_gates_are_checked_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(pl.Trainer, "fit", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(RecipeError, match="no figure of an axis"):
        compared(tmp_path, {"none": [], "a": []}, seeds=1, accept={"fairness/x": {"min": 1}})


# Finished runs --------------------------------------------------------------------------------------------------


def test_finished_comparisons_are_compared_afterwards(tmp_path, monkeypatch):
    """The oracle: one comparison of all arms. Nothing is trained, and the folders stay as they are."""
    both = {"none": [], "half": [MagnitudePruning(0.5)], "most": [MagnitudePruning(0.9)]}
    whole = compared(tmp_path / "whole", both, seeds=2)
    compared(tmp_path / "a", {name: both[name] for name in ("none", "half")}, seeds=2)
    compared(tmp_path / "b", {name: both[name] for name in ("none", "most")}, seeds=2)
    monkeypatch.setattr(pl.Trainer, "fit", lambda *_, **__: pytest.fail("trained"))
    assert main(["compare", "--runs", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "out")]) == 0
    report = load_report(tmp_path / "out")
    assert [arm["name"] for arm in report["arms"]] == ["none", "half", "most"]
    for arm in both:
        assert values(report, arm) == values(whole, arm)
    summaries = [
        [entry for entry in one["summary"] if not entry["figure"].startswith("cost/")] for one in (whole, report)
    ]
    assert summaries[0] == summaries[1]
    for folder in ("out", "a", "b"):
        assert not failed(verify(tmp_path / folder))


def test_arms_of_one_name_that_differ_keep_apart_and_strangers_are_refused(tmp_path, capsys):
    compared(tmp_path / "a", {"none": [], "small": [MagnitudePruning(0.5)]}, seeds=1)
    compared(tmp_path / "b", {"none": [], "small": [MagnitudePruning(0.9)]}, seeds=1)
    runs = ["compare", "--runs", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "out")]
    assert main(runs) == 0
    assert [arm["name"] for arm in load_report(tmp_path / "out")["arms"]] == ["none", "small", "small (b)"]
    result = tmp_path / "b/runs/small/seed-0/result.json"
    found = json.loads(result.read_text())
    for change, said in (
        ({"data": {"name": "others"}}, "different data"),
        ({"evaluators": []}, "other evaluators"),
    ):
        result.write_text(json.dumps(found | change))
        assert main(runs) == 2
        assert said in capsys.readouterr().err
    for more, said in ((["--arm", "x"], "leave out --arm"), (["--seed_everything", "1"], "leave out all but")):
        assert main([*runs, *more]) == 2
        assert said in capsys.readouterr().err
    assert main(["compare", "--runs", str(tmp_path), str(tmp_path / "a"), "--out", str(tmp_path / "x")]) == 2
    assert "neither a finished comparison" in capsys.readouterr().err
    assert main(["compare", "--runs", str(tmp_path / "a"), "--out", str(tmp_path / "a")]) == 2
    assert "give another one" in capsys.readouterr().err


def test_a_fit_and_a_checkpoint_are_arms_of_the_command_line(tmp_path):
    logger = {"class_path": "pytorch_lightning.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path / "fit")}}
    Path("log.yaml").write_text(json.dumps({"trainer": {"logger": logger, "enable_checkpointing": True}}))
    assert main(["fit", "--config", "demo/adult", "--config", "log.yaml", *SHORT]) == 0
    log = next((tmp_path / "fit").rglob("config.yaml")).parent
    checkpoint = next(log.rglob("*.ckpt"))
    assert "=" in checkpoint.name  # epoch=0-step=8: the first equals sign is the arm's
    out = tmp_path / "out"
    stated = ["--config", "demo/adult", "--arm", "none", "--arm", f"theirs={checkpoint}", "--seeds", "1"]
    assert main(["compare", *stated, *SHORT, *AXES, "--out", str(out)]) == 0
    report = load_report(out)
    assert values(report, "theirs") == values(report, "none")
    assert not failed(verify(out))
    assert main(["compare", "--runs", str(out), str(log), "--out", str(tmp_path / "again")]) == 0
    again = load_report(tmp_path / "again")
    assert values(again, again["arms"][2]["name"]) == values(report, "none")


# Hostile names --------------------------------------------------------------------------------------------------


class Named(Data):
    """Data whose groups and classes are called what nobody should be called."""

    group_names = (HOSTILE[0], HOSTILE[6])
    class_names = (HOSTILE[1], HOSTILE[4], "../" + HOSTILE[7])


def test_hostile_names_of_arms_groups_and_classes_are_harmless(tmp_path):
    arms = {HOSTILE[0]: [], "../../" + HOSTILE[7]: [], HOSTILE[8]: [MagnitudePruning(0.5)]}
    lg.compare(PlainNet, Named, arms, TRAINER, 1, [Task(), Fairness(min_support=1)], tmp_path / "in")
    place = tmp_path / "in"
    sign(place, HOSTILE[1], HOSTILE[4])
    assert {path.name for path in tmp_path.iterdir()} - {"lightning_logs"} == {"in"}
    assert all(len(path.name) < 60 for path in place.rglob("*"))
    page, text = (place / "report.html").read_text(), (place / "report.md").read_text()
    assert not re.search(r"(?<!\\)<(script|img src=x)|\u202e", page + text)
    assert not re.search(r"(?<!\\)\]\(javascript", text)
    found = verify(place)
    assert not failed(found)
    assert not any(mark in line for line in lines(found) for mark in "\u202e\x1b\n")


# Killed on the way ----------------------------------------------------------------------------------------------

KILLED = """
import sys, time
import pytorch_lightning as pl
import torch
torch.set_num_threads(1)
import lightning_guard as lg
from lightning_guard.evaluation import Task
from tests.toys import Data, PlainNet


class Telling(pl.Callback):
    def on_train_start(self, trainer, module):
        with open("fits", "a") as file:
            file.write("fit\\n")

    def on_train_batch_end(self, trainer, *args):
        if sys.argv[1] == "wait" and open("fits").read().count("fit") == 2 and trainer.global_step == 2:
            open("there", "w").close()
            time.sleep(600)


lg.compare(PlainNet, Data, {"none": [], "also": []}, {"max_epochs": 1, "callbacks": [Telling()]}, 2, [Task()], "out")
"""


def test_a_process_killed_in_its_second_run_loses_that_run_alone(tmp_path):
    Path("killed.py").write_text(KILLED)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    first = subprocess.Popen([sys.executable, "killed.py", "wait"], env=environment)
    while not Path("there").exists():
        assert first.poll() is None
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    results = {path.parent.parent.name: path.stat().st_mtime_ns for path in Path("out").rglob("result.json")}
    assert results.keys() == {"none"}
    subprocess.run([sys.executable, "killed.py", "go"], check=True, env=environment, capture_output=True)
    assert Path("fits").read_text().count("fit") == 5  # one, the one killed, and the three that were missing
    assert Path("out/runs/none/seed-0/result.json").stat().st_mtime_ns == results["none"]
    whole = lg.compare(PlainNet, Data, {"none": [], "also": []}, {"max_epochs": 1}, 2, [Task()], "whole")
    assert [run["values"]["task/accuracy"] for run in load_report("out")["runs"]] == [
        run["values"]["task/accuracy"] for run in whole["runs"]
    ]
    assert not failed(verify(Path("out")))
