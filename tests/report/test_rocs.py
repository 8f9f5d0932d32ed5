"""The attackers' figure says its numbers, draws what is allowed, and takes any arms."""

import re

from lightning_guard.report.computed import computed
from lightning_guard.report.document import prepare
from lightning_guard.report.figures import of_axes
from lightning_guard.report.rocs import roc
from tests.report.example import HOSTILE, comparison

GRID = [0.001, 0.01, 0.1, 1.0]


def attacked(arms=("none", "dp"), found=(0.0, 0.05, 0.4, 1.0), seeds=2):
    given = comparison(list(arms), seeds=seeds)
    spec = {"axis": "privacy", "label": "Members found", "x_label": "False alarms", "y_label": "Members found",
            "about": "By loss."}  # fmt: skip
    given["curves"] |= {"privacy/roc": spec, "privacy/allowed": spec}
    for run in given["runs"]:
        run["curves"]["privacy/roc"] = {"x": GRID, "y": list(found)}
        if run["arm"] != "none":
            run["curves"]["privacy/allowed"] = {"x": GRID, "y": [0.02, 0.2, 0.9, 1.0]}
    return computed(prepare(given))


def test_the_figure_says_its_numbers():
    picture = roc(attacked(), "privacy")
    said = re.search('aria-label="([^"]*)"', picture.svg)[1]
    assert "none finds 0.0% at 0.1%, 5.0% at 1.0%, 40.0% at 10.0% false alarms" in said
    assert "allowed 2.0% at 0.1%, 20.0% at 1.0%, 90.0% at 10.0% false alarms" in said
    assert picture.legend
    assert "Dashed" in picture.about
    assert picture.svg.count("stroke-dasharray") >= 2  # the guess, and what is allowed


def test_it_stands_once_in_its_axis_and_the_others_as_they_were():
    pictures = of_axes(attacked())
    assert [picture.title for picture in pictures["privacy"]] == ["Members found"]
    assert "Under attack" in [picture.title for picture in pictures["robustness"]]


def test_nothing_found_and_hostile_arms_are_drawn():
    assert "<svg" in roc(attacked(found=(0.0, 0.0, 0.0, 1.0)), "privacy").svg
    svg = roc(attacked(("none", *HOSTILE)), "privacy").svg
    assert "<script" not in svg
    assert "<img" not in svg


def test_without_an_attack_there_is_no_figure():
    assert roc(computed(prepare(comparison())), "privacy") is None
