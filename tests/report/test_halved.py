"""Offline LiRA in a comparison: it finds memory, trains nothing twice, and is made again by whoever doubts it."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, random_split

import lightning_guard as lg
from lightning_guard.callbacks import DPSGD, MagnitudePruning
from lightning_guard.cli import main
from lightning_guard.evaluation import Privacy, Task
from lightning_guard.recipe import RecipeError
from lightning_guard.report import load_report
from lightning_guard.report.compare import compare_arms
from lightning_guard.report.frames import frames
from lightning_guard.report.halved import FILE, folder_of, read
from lightning_guard.report.lira import Half, evidence, halves, reference_attack, trained
from lightning_guard.report.manifest import read_manifest, write_manifest
from lightning_guard.report.markdown import text as markdown
from lightning_guard.report.runs import Arm
from lightning_guard.report.units import shown as written
from lightning_guard.report.verify import failed, lines, verify
from tests.evaluation.test_privacy import Wide
from tests.toys import Data, PlainNet, trainer

MODELS = 6
CPU = {"accelerator": "cpu", "devices": 1}


class Grouped(pl.LightningDataModule):
    """Labels of group a are noise, so that only memory gets them right; those of group b follow from a row."""

    group_names = ("a", "b", "few")
    class_names = ("no", "yes")

    def setup(self, stage):
        x = torch.randn(480, 20, generator=torch.Generator().manual_seed(3))
        group = torch.arange(480) % 2
        group[:10] = 2
        x[group == 1, 0] = 5 * x[group == 1, 0].sign()
        noise = torch.randint(2, (480,), generator=torch.Generator().manual_seed(4))
        rows = x, torch.where(group == 1, (x[:, 0] > 0).long(), noise), group
        self.parts = (TensorDataset(*(part[:240] for part in rows)), TensorDataset(*(part[240:] for part in rows)))

    def train_dataloader(self):
        return DataLoader(self.parts[0], 60, shuffle=True)

    def test_dataloader(self):
        return DataLoader(self.parts[1], 240)


def counted(monkeypatch, stop=None):
    """How often a Trainer fits; the training of that number is interrupted."""
    fits, fit = [], pl.Trainer.fit

    def counting(self, *args, **kwargs):
        fits.append(self)
        if len(fits) == stop:
            raise KeyboardInterrupt
        return fit(self, *args, **kwargs)

    monkeypatch.setattr(pl.Trainer, "fit", counting)
    return fits


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lira")
    private = DPSGD(target_epsilon=0.1, delta=1e-4)
    options = {"max_epochs": 25, **CPU}
    lg.compare(Wide, Grouped, {"none": [], "private": [private]}, options, 1, [Task(), Privacy()], folder, lira=MODELS)
    return folder


@pytest.fixture
def folder(place, tmp_path):
    return Path(shutil.copytree(place, tmp_path / "copy"))


@pytest.fixture(scope="module")
def section(place):
    return load_report(place)["lira"]


def of(section, arm):
    return next(one for one in section["arms"] if one["arm"] == arm)


# What is found ----------------------------------------------------------------------------------------------------


def test_memory_is_found_and_a_private_training_hides_it(section):
    none, private = of(section, "none"), of(section, "private")
    assert none["intervals"]["privacy/lira_auc"][0] > 0.6
    assert none["values"]["privacy/lira_at_1"] > 3 * 0.01
    low, high = private["intervals"]["privacy/lira_auc"]
    assert low < 0.5 < high
    assert "privacy/allowed" not in none["curves"]
    assert private["curves"]["privacy/allowed"]["y"][0] < 0.2
    assert [item["key"] for item in section["figures"]] == [f"privacy/lira_{end}" for end in ("auc", "at_1", "at_01")]


def test_parts_are_those_of_a_hand_written_loop(place, section):
    """The oracle takes one score at a time and counts pairs."""
    kept = [read(folder_of(place, "none", number)) for number in range(MODELS)]
    scores, members = [half.scores.tolist() for half in kept], [half.members.tolist() for half in kept]
    out = [[scores[m][row] for m in range(MODELS) if not members[m][row]] for row in range(240)]
    pooled = sum(sum((s - sum(own) / 3) ** 2 for s in own) for own in out) / (240 * 2)
    found = {}
    for model in range(MODELS):
        for row in range(240):
            others = [scores[m][row] for m in range(MODELS) if m != model and not members[m][row]]
            far = (scores[model][row] - sum(others) / len(others)) / (pooled * (1 + 1 / len(others))) ** 0.5
            for part in (("group", kept[0].group[row]), ("class", kept[0].target[row])):
                found.setdefault(part, ([], []))[0 if members[model][row] else 1].append(far)
    auc = {
        part: float(np.mean([(m > o) + 0.5 * (m == o) for m in mine for o in theirs]))
        for part, (mine, theirs) in found.items()
    }
    bars = of(section, "none")["bars"]
    assert bars["privacy/lira_auc_by_group"] == [pytest.approx(auc["group", 0]), pytest.approx(auc["group", 1]), None]
    assert bars["privacy/lira_auc_by_class"] == [pytest.approx(auc["class", 0]), pytest.approx(auc["class", 1])]
    assert auc["group", 0] > auc["group", 1] + 0.1  # a mean hides who is told apart most easily
    categories = {item["key"]: item["categories"] for item in section["bars"]}
    assert categories["privacy/lira_auc_by_group"] == ["a", "b", "few"]
    assert any("few have fewer than 30" in note for note in of(section, "none")["notes"])


def test_a_claim_that_is_wrong_is_refuted():
    draw, about = np.random.default_rng(0), {"why": "", "copies": 0, "group_names": None, "attribute_names": None}
    members = [halves(600, 0, number) for number in range(MODELS)]
    scores = [draw.normal(2.0 * inside, 1.0) for inside in members]
    nothing = np.zeros(0, dtype=np.int64)
    for epsilon, wrong in ((0.1, True), (1.0, True), (20.0, False)):
        claim = np.array([[epsilon, 1e-5]])
        found = [Half(one, inside, claim, nothing, nothing, about) for one, inside in zip(scores, members, strict=True)]
        notes = " ".join(evidence(found).notes)
        assert (f"than the claim of epsilon = {epsilon:.3g} allows" in notes) == wrong
        assert ("The claim is wrong: members and non-members were drawn alike" in notes) == wrong


class Drawn(pl.LightningDataModule):
    """Which rows are for training is left to the global generator, and drawn again by every setup."""

    def setup(self, stage):
        rows = TensorDataset(torch.randn(80, 20, generator=torch.Generator().manual_seed(1)), torch.arange(80) % 2)
        self.rows = random_split(rows, [60, 20])[0]

    def train_dataloader(self):
        return DataLoader(self.rows, 7, shuffle=True)


class Seen(pl.Callback):
    def __init__(self):
        self.rows = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rows += batch[0][:, 0].tolist()


@pytest.mark.parametrize("number", [0, 3])
def test_a_model_sees_its_half_and_nothing_else(number):
    seen, made = Seen(), []

    def build(callbacks):
        made.append(Drawn())
        return trainer(callbacks, max_epochs=2), Wide(), made[-1]

    half = trained(build, 5, number, [seen])
    assert (half.members == halves(60, 5, number)).all()
    again = trained(build, 5, number + 1)
    assert (half.target == again.target).all()  # every model is asked about the same rows
    pl.seed_everything(5)
    source = Drawn()
    source.setup("fit")
    first = torch.stack([x for x, _ in source.rows])[:, 0]
    assert sorted(seen.rows) == sorted(first[torch.from_numpy(half.members)].tolist() * 2)


def test_copies_are_neither_in_nor_out():
    class Twice(Data):
        def train_dataloader(self):
            rows = torch.randn(40, 20, generator=torch.Generator().manual_seed(1))
            return DataLoader(TensorDataset(torch.cat([rows, rows[:5]]), torch.arange(45) % 2 * 0), 9, shuffle=True)

    half = trained(lambda callbacks: (trainer(callbacks, max_epochs=1), Wide(), Twice()), 0, 0)
    assert np.flatnonzero(np.isnan(half.scores)).tolist() == [*range(5), *range(40, 45)]
    assert half.about["copies"] == 10


# What is shown ----------------------------------------------------------------------------------------------------


def test_every_form_shows_it_and_none_without(place, section):
    page, text = (place / "report.html").read_text(), (place / "report.md").read_text()
    rows = list(csv.DictReader((place / "metrics.csv").open()))
    shown = [row for row in rows if "lira" in row["figure"]]
    values = of(section, "private")["values"]
    assert {row["seed"] for row in shown} == {""}
    told = {row["figure"]: row["value"] for row in shown if row["arm"] == "private"}
    assert float(told["privacy/lira_auc"]) == values["privacy/lira_auc"]
    assert told["privacy/lira_at_01"] == ""  # a thousandth of 720 is nobody
    for form in (page, text):
        assert "Reference models: offline LiRA" in form
        assert "so the recipe is judged, on halves" in form
        assert written(values["privacy/lira_auc"], "ratio") in form
    assert 'aria-label="Members found at each rate of false alarms, by LiRA. none finds' in page
    assert 'aria-label="LiRA by group. a: none' in page
    frame = frames(load_report(place))["lira"].set_index(["arm", "figure"])
    assert frame.value["private", "privacy/lira_auc"] == values["privacy/lira_auc"]
    assert frame.low["private", "privacy/lira_auc"] < frame.high["private", "privacy/lira_auc"]
    report = load_report(place)
    assert not any("lira" in key for run in report["runs"] for key in run["values"])  # they are of no seed
    del report["lira"]
    assert "LiRA" not in markdown(report)


def test_without_the_axis_it_has_a_section_of_its_own(tmp_path):
    small(tmp_path, {"none": []}, lira=MODELS)
    assert "## Privacy\n\nWhat" not in (tmp_path / "report.md").read_text()
    assert "## Privacy\n\n**Reference models: offline LiRA.**" in (tmp_path / "report.md").read_text()
    assert ">Privacy</h2>" in (tmp_path / "report.html").read_text()


# Kept and resumed -------------------------------------------------------------------------------------------------


def small(folder, arms, **options):
    return lg.compare(PlainNet, Data, arms, {"max_epochs": 1, **CPU}, 1, [Task()], folder, **options)


def test_an_interrupted_comparison_trains_nothing_twice(tmp_path, monkeypatch):
    def arms(sparsity):
        return {"none": [], "small": [MagnitudePruning(sparsity=sparsity)]}

    with monkeypatch.context() as patch:
        fits = counted(patch, stop=6)  # 2 runs, 3 models, and the one that is lost
        with pytest.raises(KeyboardInterrupt):
            small(tmp_path, arms(0.5), lira=MODELS)
        assert len(fits) == 6
    for sparsity, models, trainings in ((0.5, 6, 9), (0.5, 6, 0), (0.5, 8, 4), (0.5, 6, 0), (0.6, 6, 7)):
        with monkeypatch.context() as patch:
            fits = counted(patch)
            report = small(tmp_path, arms(sparsity), lira=models)
            assert (len(fits), report["lira"]["models"]) == (trainings, models)
    assert not list(tmp_path.rglob("claim"))
    assert not list(tmp_path.rglob("*.part"))


def test_a_resumed_attack_is_the_same_attack(tmp_path, monkeypatch):
    whole = small(tmp_path / "whole", {"none": []}, lira=MODELS)
    found = reference_attack(PlainNet, Data, [], {"max_epochs": 1, **CPU}, models=MODELS)
    values = of(whole["lira"], "none")["values"]
    assert {key: found.figures[key].value for key in values} == values
    with monkeypatch.context() as patch:
        counted(patch, stop=4)
        with pytest.raises(KeyboardInterrupt):
            small(tmp_path / "parts", {"none": []}, lira=MODELS)
    assert small(tmp_path / "parts", {"none": []}, lira=MODELS)["lira"] == whole["lira"]


def test_what_others_trained_is_not_attacked_and_said_so(tmp_path):
    report = small(tmp_path, {"none": [], "theirs": lambda seed: PlainNet()}, lira=MODELS)
    assert of(report["lira"], "theirs")["values"] == {}
    assert of(report["lira"], "theirs")["notes"] == ["No LiRA was made: the model was not trained here."]
    assert of(report["lira"], "none")["values"]
    assert not failed(verify(tmp_path))
    assert "No LiRA was made: the model was not trained here. (theirs)" in (tmp_path / "report.md").read_text()


# Refused ----------------------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(torch.zeros(6), torch.tensor(0))] * 8)


class Streamed(Data):
    def train_dataloader(self):
        return DataLoader(Stream(), 4)


@pytest.mark.parametrize(
    ("options", "arms", "data", "said"),
    [
        ({"lira": 7}, {"none": []}, Data, "lira=7 must be even and at least 6"),
        ({"lira": 4}, {"none": []}, Data, "lira=4 must be even and at least 6"),
        ({"lira": -6}, {"none": []}, Data, "lira=-6 must be even and at least 6"),
        ({"limit": 2}, {"none": [], "b": []}, Data, "arm none: limit_train_batches=2 .*\n.*arm b: limit_train"),
        ({}, {"none": []}, Streamed, "arm none: Stream is a stream"),
        ({}, {"theirs": lambda seed: PlainNet()}, Data, "no arm is trained here"),
    ],
)
def test_what_cannot_be_attacked_is_refused_before_training(tmp_path, monkeypatch, options, arms, data, said):
    fits = counted(monkeypatch)
    limit = {"limit_train_batches": options["limit"]} if "limit" in options else {}
    with pytest.raises(RecipeError, match=said):
        lg.compare(PlainNet, data, arms, {**CPU, **limit}, 1, [Task()], tmp_path, lira=options.get("lira", MODELS))
    assert not fits


def test_the_command_line_refuses_too(capsys):
    stated = ["compare", "--config", "demo/adult", "--arm", "none", "--arm", "fairness"]
    assert main([*stated, "--lira", "7"]) == 2
    assert "--lira: 7 must be even and at least 6" in capsys.readouterr().err
    assert main(["compare", "--runs", "a", "b", "--lira", "6"]) == 2
    assert "leave out --lira" in capsys.readouterr().err


def test_a_training_that_ends_within_its_first_epoch_is_told(tmp_path):
    report = lg.compare(PlainNet, Data, {"none": []}, {"max_steps": 1, **CPU}, 1, [Task()], tmp_path, lira=MODELS)
    assert "training ended after 1 of 2 batches" in of(report["lira"], "none")["notes"][0]
    assert not report["lira"]["figures"]


# Verified ---------------------------------------------------------------------------------------------------------


def rewritten(folder, **changes):
    path = folder_of(folder, "none", 2) / FILE
    with np.load(path) as arrays:
        kept = dict(arrays)
    np.savez_compressed(path, **kept | {name: change(kept[name]) for name, change in changes.items()})


def of_scores(folder):
    rewritten(folder, scores=lambda scores: np.where(np.arange(len(scores)) == 3, scores + 2, scores))


def of_members(folder):
    rewritten(folder, members=lambda members: ~members)


def of_objects(folder):
    rewritten(folder, scores=lambda scores: scores.astype(object))


def of_nothing(folder):
    (folder_of(folder, "private", 5) / FILE).unlink()


def of_report(folder):
    found = json.loads((folder / "report.json").read_text())
    of(found["lira"], "private")["values"]["privacy/lira_auc"] = 0.5
    (folder / "report.json").write_text(json.dumps(found, indent=2, sort_keys=True) + "\n")


def of_support(folder):
    found = json.loads((folder / "report.json").read_text())
    found["lira"]["bars"][0]["label"] = "Nobody"
    (folder / "report.json").write_text(json.dumps(found, indent=2, sort_keys=True) + "\n")


def test_an_untouched_folder_verifies(folder):
    found = verify(folder)
    assert not failed(found), list(lines(found))
    assert {f"report.json, lira of {arm}" for arm in ("none", "private")} <= {
        finding.what for finding in found if finding.state == "same"
    }
    assert any("models on halves are not kept" in line for line in lines(found))
    kept = read_manifest(folder)["files"]
    assert sum(name.endswith(FILE) for name in kept) == 2 * MODELS


@pytest.mark.parametrize(
    ("hand", "where"),
    [
        (of_scores, "report.json, lira of none"),
        (of_members, "report.json, lira of none"),
        (of_objects, "report.json, lira"),
        (of_nothing, "report.json, lira"),
        (of_report, "report.json, lira of private"),
        (of_support, "report.json, lira"),
    ],
)
def test_a_hand_in_the_folder_is_found_with_its_manifest_written_anew(folder, hand, where):
    hand(folder)
    write_manifest(folder)
    assert where in [finding.what for finding in verify(folder) if finding.state == "differs"]


def test_what_is_published_holds_no_scores(tmp_path):
    arms = [Arm("none", lambda callbacks: (trainer(callbacks, max_epochs=1), PlainNet(), Data()))]
    compare_arms(arms, [0], [Task()], tmp_path, publishable=True, lira=MODELS)
    public = tmp_path / "public"
    assert {path.suffix for path in public.rglob("*")} == {".json", ".html", ".md", ".csv"}
    published = json.loads((public / "report.json").read_text())["lira"]
    assert published == load_report(tmp_path)["lira"]
    scores = read(folder_of(tmp_path, "none", 0)).scores
    assert not any(repr(float(score)) in (public / "report.json").read_text() for score in scores)


@pytest.mark.slow
def test_workers_share_the_models(tmp_path):
    stated = ["--config", "demo/adult", "--arm", "none", "--arm", "pruning", "--seeds", "1", "--lira", str(MODELS)]
    axes = [part for axis in ("privacy", "robustness", "fairness") for part in (f"--evaluate.{axis}", "null")]
    options = ["--trainer.max_epochs", "1", "--workers", "2", "--out", str(tmp_path)]
    assert main(["compare", *stated, *axes, *options]) == 0
    assert len(list(tmp_path.rglob(FILE))) == 2 * MODELS
    assert main(["verify", str(tmp_path)]) == 0
