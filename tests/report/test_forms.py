"""Card, annex, frames and notebook say what report.json says, whatever arms and classes are called."""

import re

import pandas as pd
import pytest
import yaml

from lightning_guard.report import ReportError, load_report, write_report
from lightning_guard.report.annex import annex
from lightning_guard.report.card import OPEN, card
from lightning_guard.report.frames import Comparison, frames
from tests.report.example import HOSTILE, comparison


@pytest.fixture
def report(tmp_path):
    write_report(comparison(["none", "dp"], seeds=3), tmp_path)
    return load_report(tmp_path)


def front_of(text):
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


# The card -------------------------------------------------------------------------------------------------------------


def test_the_card_holds_the_means_of_its_arm(report):
    front, body = front_of(card(report, "dp"))
    (model,) = front["model-index"]
    assert model["name"] == "dp"
    (results,) = model["results"]
    assert results["task"] == {"type": "classification"}
    assert {"type", "name"} <= results["dataset"].keys()
    told = {metric["type"]: metric["value"] for metric in results["metrics"]}
    for entry in report["summary"]:
        if entry["arm"] == "dp":
            assert told[{"task/accuracy": "accuracy"}.get(entry["figure"], entry["figure"])] == entry["mean"]
    assert "a_guard" in front["tags"]
    assert "Keeps its promise" in body
    assert f"Licence:** {OPEN}" in body


def test_the_first_guarded_arm_has_the_card_unless_said_otherwise(report, tmp_path):
    assert (tmp_path / "card.md").read_text() == card(report) == card(report, "dp")
    assert front_of(card(report, "none"))[0]["model-index"][0]["name"] == "none"
    with pytest.raises(ReportError, match="arm='db' is not in this comparison; there are none, dp"):
        card(report, "db")


def test_it_has_the_sections_of_the_hub(report):
    headings = re.findall(r"^## (.*)$", card(report), re.M)
    assert headings == [
        "Model details", "Uses", "Bias, risks and limitations", "Training details", "Evaluation",
        "Environmental impact", "Technical specifications", "Model card contact",
    ]  # fmt: skip


def test_groups_are_told_one_by_one():
    given = comparison(["none", "dp"], seeds=2)
    given["bars"]["fairness/auc_by_group"] = given["bars"].pop("fairness/rates")
    for run in given["runs"]:
        run["bars"] = {"fairness/auc_by_group": run["bars"]["fairness/rates"]}
    from lightning_guard.report.computed import computed
    from lightning_guard.report.document import prepare

    body = card(computed(prepare(given)))
    assert re.search(r"^\| Female \| [\d.]+ \|$", body, re.M)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_names(tmp_path, name):
    write_report(comparison(["none", name]), tmp_path)
    report = load_report(tmp_path)
    arm = report["arms"][1]["name"]
    front, body = front_of(card(report))
    assert front["model-index"][0]["name"] == arm
    for text in (body, annex(report)):
        assert not re.search(r"(?<!\\)<", text)
        assert not re.search(r"(?<!\\)\[b(?<!\\)\]\(", text)
    html = Comparison(report)._repr_html_()
    assert "<script>" not in html
    assert "<img" not in html
    assert frames(report)["runs"]["arm"].unique().tolist() == ["none", arm]


# The annex ------------------------------------------------------------------------------------------------------------


def test_every_point_is_there_and_open_points_are_marked(report):
    text = annex(report)
    points = re.findall(r"^### (\S+) ", text, re.M)
    act = ["1", *(f"2({c})" for c in "abcdefgh"), *"3456789"]
    assert points == [*act, *(f"2.{i}" for i in range(1, 14))]
    for point in text.split("\n### ")[1:]:
        lines = point.split("\n## ")[0].splitlines()[1:]
        assert any(line.startswith("- ") for line in lines), point
    for open_point in ("2(e)", "2(f)", "5", "8", "9"):
        section = text.split(f"\n### {open_point} ")[1].split("\n### ")[0].split("\n## ")[0]
        assert OPEN in section
        assert len(re.findall("^- ", section, re.M)) == 1
    assert "no declaration of conformity" in text


def test_what_was_measured_is_where_it_belongs_and_the_rest_is_said_to_be_missing(report):
    text = annex(report)
    tested = text.split("### 2(g)")[1].split("###")[0]
    assert "Accuracy" in tested
    assert "Selection rate" in tested
    assert "Privacy was not measured in this comparison" in text.split("### 2.10")[1].split("###")[0]


# Frames and the notebook ----------------------------------------------------------------------------------------------


def test_frames_are_the_report(report):
    found = frames(report)
    runs = found["runs"]
    assert len(runs) == sum(len(run["values"]) for run in report["runs"])
    for run in report["runs"]:
        own = runs[(runs.arm == run["arm"]) & (runs.seed == run["seed"])].set_index("figure").value
        assert own.to_dict() == run["values"]
    means = runs.groupby(["arm", "figure"]).value.mean()
    for row in found["summary"].itertuples():
        assert row.mean == pytest.approx(means[row.arm, row.figure])
    curve = report["runs"][0]["curves"]["robustness/eps"]
    first = found["curves"].query("arm == 'none' and seed == 0")
    assert (first.x.tolist(), first.y.tolist()) == (curve["x"], curve["y"])
    assert found["bars"].category.unique().tolist() == ["Female", "Male"]
    assert found["arms"].query("option == 'eps'").value.tolist() == [0.1]
    assert all(isinstance(frame, pd.DataFrame) for frame in found.values())


def test_missing_values_are_missing():
    given = comparison(["none", "dp"], curves=False, bars=False)
    given["runs"][0]["values"]["task/accuracy"] = None
    from lightning_guard.report.computed import computed
    from lightning_guard.report.document import prepare

    found = frames(computed(prepare(given)))
    assert found["runs"].value.isna().sum() == 1
    assert list(found["curves"].columns) == ["arm", "seed", "curve", "x", "y"]
    assert not len(found["curves"])


def test_a_notebook_shows_every_arm_and_figure(report):
    shown = Comparison(report)
    html = shown._repr_html_()
    for figure in report["figures"].values():
        assert figure["label"] in html
    assert html.count("<tr>") == 1 + len(report["figures"]) + len({f["axis"] for f in report["figures"].values()})
    assert "none (baseline)" in html
    assert shown == report
    assert shown.frames["runs"].equals(frames(report)["runs"])
