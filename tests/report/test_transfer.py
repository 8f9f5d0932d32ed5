"""What the arms of a comparison do to each other, and what the report says of doubts, pictures and unequal bars."""

import base64
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

import lightning_guard as lg
from lightning_guard.callbacks import AdversarialTraining, FeatureSqueezing, MagnitudePruning
from lightning_guard.evaluation import Bars, Efficiency, Evidence, Figure, Robustness, Subject, Task
from lightning_guard.report import ReportError, document, html, load_report, markdown, write_report
from lightning_guard.report.computed import computed
from lightning_guard.report.transfer import transfer
from tests.report.example import HOSTILE, comparison
from tests.toys import CLASSES, FEATURES, Data, PlainNet, rows

TRAINER = {"max_epochs": 2, "accelerator": "cpu"}
PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(40)).decode()


@pytest.fixture(autouse=True)
def few_queries(monkeypatch):
    monkeypatch.setattr("lightning_guard.evaluation.siege.QUERIES", 30)
    monkeypatch.setattr("lightning_guard.evaluation.siege.PROBES", 10)


def test_the_matrix_is_accuracy_by_hand():
    generator = torch.Generator().manual_seed(0)
    nets = {name: nn.Linear(4, 3) for name in "ab"}
    moved = {name: torch.randn(300, 4, generator=generator) for name in "ab"}
    y = torch.randint(3, (300,), generator=generator)
    found = transfer({name: Subject(net, [(moved["a"], y)]) for name, net in nets.items()}, moved, y)
    for i, made in enumerate("ab"):
        for j, judged in enumerate("ab"):
            assert found[i][j] == (nets[judged](moved[made]).argmax(1) == y).double().mean().item()


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transfer")
    own = {
        "none": [],
        "robust": [AdversarialTraining(0.1, bounds=(0.0, 1.0), steps=2)],
        "small": [MagnitudePruning(0.6)],
    }
    judges = [Robustness(examples=40, steps=3, curve=()), Task(), Efficiency(latency=False)]
    return folder, lg.compare(PlainNet, Data, own, TRAINER, seeds=2, evaluators=judges, folder=folder)


def test_a_comparison_judges_every_arm_on_what_the_others_made(compared):
    folder, report = compared
    matrix = report["matrices"]["robustness/transfer"]
    assert matrix["arms"] == ["none", "robust", "small"]
    x, y, _ = rows()
    values = torch.zeros(3, 3)
    for seed in (0, 1):
        for i, made in enumerate(matrix["arms"]):
            kept = torch.load(folder / "runs" / made / f"seed-{seed}" / "tensors.pt", weights_only=True)
            assert torch.equal(kept["robustness/target"], y[:40])
            assert (kept["robustness/moved"] - x[:40]).abs().max() <= 0.1 + 1e-6
            for j, judged in enumerate(matrix["arms"]):
                net = PlainNet().eval()
                net.load_state_dict(torch.load(folder / "runs" / judged / f"seed-{seed}" / "weights.pt"))
                values[i, j] += (net(kept["robustness/moved"]).argmax(1) == y[:40]).float().mean() / 2
    assert torch.allclose(torch.tensor(matrix["values"]), values, atol=1e-6)
    for run in report["runs"]:
        assert run["values"]["robustness/transfer"] is not None
    page = (folder / "report.html").read_text()
    assert "Transferred attacks" in page
    assert "Transferred attacks" in (folder / "report.md").read_text()


def test_a_second_time_the_matrix_is_the_same_and_nothing_is_trained(compared, monkeypatch):
    folder, report = compared
    monkeypatch.setattr("pytorch_lightning.Trainer.fit", lambda *_, **__: pytest.fail("trained again"))
    own = {
        "none": [],
        "robust": [AdversarialTraining(0.1, bounds=(0.0, 1.0), steps=2)],
        "small": [MagnitudePruning(0.6)],
    }
    judges = [Robustness(examples=40, steps=3, curve=()), Task(), Efficiency(latency=False)]
    again = lg.compare(PlainNet, Data, own, TRAINER, seeds=2, evaluators=judges, folder=folder)
    assert again["matrices"] == report["matrices"]
    assert again["runs"] == report["runs"]


def test_an_arm_that_others_fool_more_often_than_itself_is_doubted(tmp_path):
    """What one run kept is replaced by inputs that fool the other arm."""
    own = {"none": [], "small": [MagnitudePruning(0.1)]}
    judges = [Robustness(1e-4, examples=40, steps=1, curve=())]
    lg.compare(PlainNet, Data, own, TRAINER, seeds=1, evaluators=judges, folder=tmp_path)
    path = tmp_path / "runs" / "none" / "seed-0" / "tensors.pt"
    kept = torch.load(path, weights_only=True)
    net = PlainNet().eval()
    net.load_state_dict(torch.load(path.parent / "weights.pt"))
    x = torch.rand(5000, FEATURES, generator=torch.Generator().manual_seed(0))
    wrong = [x[net(x).argmax(1) != c][0] for c in kept["robustness/target"]]
    kept["robustness/moved"] = torch.stack(wrong)
    kept["robustness/predicted"] = net(kept["robustness/moved"]).argmax(1)
    torch.save(kept, path)
    report = lg.compare(PlainNet, Data, own, TRAINER, seeds=1, evaluators=judges, folder=tmp_path)
    none, small = report["runs"]
    assert not none["doubts"]
    assert "attacked on none leave" in small["doubts"]["robustness/accuracy"][0]
    assert small["doubts"]["robustness/accuracy"][0] in small["notes"][-1]
    assert "doubtful" in (tmp_path / "report.md").read_text()
    kept["robustness/predicted"] = (kept["robustness/predicted"] + 1) % CLASSES  # as if training had changed the code
    torch.save(kept, path)
    report = lg.compare(PlainNet, Data, own, TRAINER, seeds=1, evaluators=judges, folder=tmp_path)
    assert [row[0] for row in report["matrices"]["robustness/transfer"]["values"]] == [None, None]
    assert "changed more than the weights" in report["runs"][0]["notes"][-1]


def test_an_arm_that_squeezes_its_inputs_is_judged_with_its_squeezing(tmp_path):
    """The steps of its inputs are no weight, yet they are what attacks from elsewhere have to get through."""
    own = {"none": [], "squeezed": [FeatureSqueezing(bits=1)]}
    judges = [Robustness(0.1, examples=40, steps=3, curve=())]
    report = lg.compare(PlainNet, Data, own, TRAINER, seeds=1, evaluators=judges, folder=tmp_path)
    matrix = report["matrices"]["robustness/transfer"]
    kept = {name: torch.load(tmp_path / "runs" / name / "seed-0" / "tensors.pt", weights_only=True) for name in own}
    net, y = PlainNet().eval(), rows()[1][:40]
    net.load_state_dict(torch.load(tmp_path / "runs" / "squeezed" / "seed-0" / "weights.pt", weights_only=True))
    told = []
    for i, moved in enumerate(kept[name]["robustness/moved"] for name in own):
        by_hand = (net((moved > 0.5).float()).argmax(1) == y).double().mean()  # one bit: rounded to 0 or 1
        assert matrix["values"][i][1] == pytest.approx(float(by_hand))
        told.append(float((net(moved).argmax(1) == y).double().mean()) != float(by_hand))
    assert any(told)  # without the squeezing another accuracy would stand there
    assert not any("changed more than the weights" in note for run in report["runs"] for note in run["notes"])


def test_other_inputs_are_no_common_ground(tmp_path):
    """What another arm was attacked on counts only if both were given the same inputs, normalised alike."""
    own = {"none": [], "small": [MagnitudePruning(0.1)], "more": [MagnitudePruning(0.3)]}
    judges = [Robustness(0.1, examples=40, steps=1, curve=())]
    lg.compare(PlainNet, Data, own, TRAINER, seeds=1, evaluators=judges, folder=tmp_path)
    path = tmp_path / "runs" / "more" / "seed-0" / "tensors.pt"
    kept = torch.load(path, weights_only=True)
    torch.save({**kept, "robustness/inputs": kept["robustness/inputs"] * 2 - 1}, path)
    report = lg.compare(PlainNet, Data, own, TRAINER, seeds=1, evaluators=judges, folder=tmp_path)
    values = report["matrices"]["robustness/transfer"]["values"]
    assert [value is None for row in values for value in row] == [False, False, True, False, False, True, *[True] * 3]
    assert "robustness/transfer" not in report["runs"][2]["values"]


@pytest.mark.slow
def test_workers_keep_what_transfer_needs(tmp_path):
    options = "--config demo/adult --arm none --arm pruning --seeds 1 --evaluate.robustness.eps 0.05"
    short = "--evaluate.robustness.examples 32 --trainer.max_epochs 1 --trainer.limit_train_batches 6"
    command = [sys.executable, "-m", "lightning_guard", "compare", *options.split(), *short.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    own = [*command, "--workers", "2", "--out", str(tmp_path / "out")]
    done = subprocess.run(own, capture_output=True, text=True, check=False, timeout=400, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert torch.tensor(report["matrices"]["robustness/transfer"]["values"]).shape == (2, 2)


def test_arms_may_differ_in_what_their_bars_are_of(tmp_path):
    class Counting:
        """Bars of the layers whose weights are sparse: not the same in every arm."""

        name = "layers"

        def evaluate(self, subject):
            share = {k: float((p == 0).double().mean()) for k, p in subject.module.named_parameters() if p.dim() > 1}
            shown = {k: v for k, v in share.items() if v} or {"none": 0.0}
            figure = Figure(1.0, "One", "count", None, "One.")
            return Evidence(
                {"layers/one": figure}, bars={"layers/zero": Bars(list(shown), list(shown.values()), "Zero", "", "")}
            )

    own = {"none": [], "small": [MagnitudePruning(0.6)]}
    report = lg.compare(PlainNet, Data, own, TRAINER, seeds=1, evaluators=[Counting()], folder=tmp_path)
    assert report["bars"]["layers/zero"]["categories"] == ["none", "net.0.weight", "net.4.weight"]
    none, small = (run["bars"]["layers/zero"] for run in report["runs"])
    assert none == [0.0, None, None]
    assert small[0] is None
    assert min(small[1:]) > 0


def test_inputs_outside_the_bounds_are_a_note_after_training(tmp_path):
    judges = [Robustness(0.1, bounds=(0.2, 0.8), examples=20)]
    report = lg.compare(PlainNet, Data, {"none": []}, TRAINER, seeds=1, evaluators=judges, folder=tmp_path)
    assert "outside bounds" in report["runs"][0]["notes"][0]


def rich():
    results = comparison(2, 2)
    for run in results["runs"]:
        run["pictures"] = {"robustness/examples": {"png": PNG, "label": HOSTILE[0], "about": HOSTILE[2]}}
    for run in results["runs"][2:]:
        run["doubts"] = {"robustness/pgd": ["Gradients are masked."]}
    results["matrices"] = {
        "robustness/transfer": {
            "axis": "robustness", "label": HOSTILE[1], "row_label": "made", "column_label": "judged",
            "unit": "fraction", "about": HOSTILE[4], "arms": ["arm-0", "arm-1"], "values": [[0.1, None], [0.5, 0.9]],
        }
    }  # fmt: skip
    return results


def finished(results):
    return computed(document.prepare(results))


def test_pictures_doubts_and_matrices_are_shown_and_escaped():
    page = html.page(finished(rich()))
    assert page.count(f"data:image/png;base64,{PNG}") == 2  # one an arm, of its first seed
    assert not re.search(r"<script|<img src=x|onload=\"alert", page)
    assert page.count('<div class="word bad">doubtful</div>') == 1
    assert "Doubtful, see the notes" in page  # in the verdict, instead of a gain
    text = markdown.text(finished(rich()))
    assert "doubtful" in text
    assert "| arm-0 | 10.0% | n/a |" in text
    assert "| arm-1 | 50.0% | 90.0% |" in text


def test_a_doubt_in_some_seeds_says_in_how_many():
    results = rich()
    del results["runs"][3]["doubts"]
    assert "doubtful in 1 of 2 seeds" in html.page(finished(results))


def test_they_survive_writing_and_reading(tmp_path):
    write_report(rich(), tmp_path)
    report = load_report(tmp_path)
    assert report["matrices"]["robustness/transfer"]["values"] == [[0.1, None], [0.5, 0.9]]
    assert report["runs"][2]["doubts"] == {"robustness/pgd": ["Gradients are masked."]}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda r: r["matrices"]["robustness/transfer"]["values"].pop(), "1 rows"),
        (lambda r: r["matrices"]["robustness/transfer"].update(arms=["arm-0", "arm-7"]), "arm-7"),
        (lambda r: r["runs"][0].update(doubts={"robustness/pdg": ["x"]}), "did you mean 'robustness/pgd'"),
        (lambda r: r["runs"][0]["pictures"]["robustness/examples"].update(png='x" onload="y'), "png"),
    ],
)
def test_what_does_not_fit_is_named(change, named):
    results = rich()
    change(results)
    with pytest.raises(ReportError, match=named):
        document.prepare(results)
