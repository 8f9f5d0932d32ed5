"""What is said of combinations: by hand on numbers of our own, and with hostile names."""

import csv
import io
import re
from itertools import combinations

import pytest

from lightning_guard.report import ReportError, load_report, write_report
from lightning_guard.report.combined import subsets
from lightning_guard.report.composed import collected, composition, lines
from lightning_guard.report.matrix import entries, keys, pictures, refused, rows, table
from lightning_guard.report.summary import summarise
from tests.report.example import HOSTILE, comparison

PARTS = ["private", "fair", "small"]


def combined(parts=PARTS, values=None, unit="fraction", better="higher"):
    """A comparison of parts, all their pairs and all of them, with one figure of these values."""
    told = [pair for size in (2, 3) for pair in combinations(parts, size) if pair != (parts[1], parts[2])]
    arms = {"+".join(pair): list(pair) for pair in told}
    document = comparison(["none", *parts, *arms], seeds=1)
    for run in document["runs"]:
        run["values"]["task/accuracy"] = (values or {}).get(run["arm"], 0.5)
    document["figures"]["task/accuracy"] |= {"unit": unit, "better": better}
    document["combinations"] = {
        "parts": list(parts),
        "arms": [{"arm": name, "parts": pair} for name, pair in arms.items()],
        "refused": [{"parts": [parts[1], parts[2]], "reasons": ["one breaks the other; give one of them"]}],
    }
    document["composition"] = [
        {
            "together": f"{parts[0]} + {parts[1]}",
            "verdict": "sound if",
            "why": "a reason",
            "then": "a remedy",
            "source": "a source",
            "arms": ["+".join(parts[:2])],
        }
    ]
    return document


def summarised(document):
    document = {**document, "runs": [{**run, "intervals": {}} for run in document["runs"]]}
    for position, figure in enumerate(document["figures"].values()):
        figure["order"] = position
    return {**document, "summary": summarise(document)}


VALUES = {"none": 0.9, "private": 0.8, "fair": 0.6, "small": 0.7}


@pytest.mark.parametrize(
    ("value", "better", "word", "change"),
    [
        (0.85, "higher", "better", 0.05),
        (0.8, "higher", "between", 0.0),
        (0.804, "higher", "between", 0.004),  # too close to tell
        (0.80004, "higher", "between", 0.0),  # shown as no change
        (0.7, "higher", "between", -0.1),
        (0.55, "higher", "worse", -0.25),
        (0.85, "lower", "worse", 0.25),
        (0.55, "lower", "better", -0.05),
        (None, "higher", "not measured", None),
    ],
)
def test_a_pair_is_compared_with_both_of_its_parts_alone(value, better, word, change):
    document = summarised(combined(values={**VALUES, "private+fair": value}, better=better))
    found = {entry.parts: entry for entry in entries(document, "task/accuracy")}
    pair = found["private", "fair"]
    assert pair.word == word
    assert pair.change == (None if change is None else pytest.approx(change))
    assert found["private",].word == "alone"
    assert found["private",].change == 0
    assert found["fair", "small"].word == "refused"
    assert found["fair", "small"].value is None
    whole = found["private", "fair", "small"]
    assert {whole.best, whole.worst} == {0.8, 0.6}


def test_what_the_test_set_cannot_tell_is_not_marked():
    document = summarised(combined(values={**VALUES, "private+fair": 0.85}))
    for run in document["runs"]:
        run["intervals"]["task/accuracy"] = [0.75, 0.95]  # half of it is 0.1, twice the difference
    found = {entry.parts: entry.word for entry in entries(document, "task/accuracy")}
    assert found["private", "fair"] == "between"


def test_a_figure_that_one_part_has_is_compared_with_that():
    document = summarised(combined(values={**VALUES, "fair": None, "private+fair": 0.8}))
    found = {entry.parts: entry for entry in entries(document, "task/accuracy")}
    assert (found["private", "fair"].best, found["private", "fair"].worst) == (0.8, 0.8)


def test_files_say_what_was_combined_and_what_was_refused(tmp_path):
    document = combined(values={**VALUES, "private+fair": 0.85, "private+small": 0.5, "private+fair+small": 0.65})
    write_report(document, tmp_path)
    page, text = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    told = list(csv.DictReader(io.StringIO((tmp_path / "combinations.csv").read_text())))
    mine = {row["parts"]: row for row in told if row["figure"] == "task/accuracy"}
    assert float(mine["private + fair"]["value"]) == 0.85
    assert mine["private + fair"]["compared"] == "better"
    assert mine["fair + small"]["reasons"] == "one breaks the other; give one of them"
    assert "85.0% (+5.0 pts ▲)" in text
    assert "50.0% (−30.0 pts ▼)" in text
    assert "65.0% (−15.0 pts)" in text
    for said in ("one breaks the other; give one of them", "a reason; a remedy", "a source"):
        assert said in text
        assert said in page
    assert "private with fair 85.0%, better than either alone" in page
    assert "fair with small refused" in page
    assert load_report(tmp_path)["combinations"] == document["combinations"]


def test_a_comparison_without_combinations_has_no_such_file(tmp_path):
    write_report(comparison(), tmp_path)
    assert not (tmp_path / "combinations.csv").exists()
    assert "Combinations" not in (tmp_path / "report.html").read_text()


def test_hostile_names_stay_names(tmp_path):
    names = [name for name in HOSTILE if name.isprintable()][:6]
    document = combined(names)
    document["combinations"]["refused"][0]["reasons"] = ["<script>alert(2)</script>"]
    document["composition"][0]["why"] = "</td><script>alert(3)</script>"
    write_report(document, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"<script|<img(?! alt)|onerror=alert\(1\)>", page)
    assert "=HYPERLINK" not in [line[:10] for line in (tmp_path / "combinations.csv").read_text().splitlines()]


def test_what_names_no_arm_is_refused(tmp_path):
    for place, value in (("parts", [*PARTS, "nobody"]), ("arms", [{"arm": "nobody", "parts": PARTS}])):
        document = combined()
        document["combinations"][place] = value
        with pytest.raises(ReportError, match="nobody"):
            write_report(document, tmp_path)


def test_pictures_are_of_the_first_headline_of_each_axis_and_of_size():
    document = summarised(combined())
    assert keys(document) == ["task/accuracy", "robustness/pgd", "efficiency/bytes"]
    drawn = pictures(document)
    assert [picture.title for picture in drawn] == ["Accuracy", "Accuracy under PGD", "File size"]
    assert all(picture.svg.count("<svg") == 1 for picture in drawn)
    assert [row[0] for row in rows(document, 3)] == ["private + fair + small"]
    assert refused(document) == [("fair + small", ["one breaks the other; give one of them"])]
    assert len(table(document).splitlines()) == 1 + 3 * (3 + 3 + 1)


def test_subsets_are_those_that_were_asked_for():
    parts = ["a", "b", "c", "d"]
    assert set(subsets(parts, ["pairs"])) == set(combinations(parts, 2))
    assert subsets(parts, ["triples:c", "all"]) == [("a", "b", "c"), ("a", "c", "d"), ("b", "c", "d"), tuple(parts)]
    assert subsets(parts, ["pairs:a", "pairs"])[:3] == [("a", "b"), ("a", "c"), ("a", "d")]
    for kinds, message in ((["fours"], "no way to combine"), (["pairs:x"], "names no arm"), (["triples"], "more arms")):
        with pytest.raises(ValueError, match=message):
            subsets(parts[:2], kinds)


def test_rows_are_told_once_with_their_arms_and_refusals_first():
    row = {"together": "a + b", "verdict": "sound", "why": "x", "then": "", "source": "s"}
    other = {**row, "together": "a + c", "verdict": "refused"}
    found = collected({"one": [row, other], "two": [row]})
    assert [(entry["together"], entry["arms"]) for entry in found] == [("a + b", ["one", "two"]), ("a + c", ["one"])]
    assert [met.verdict for met in composition({"composition": found})] == ["refused", "sound"]


def test_lines_fit_the_terminal():
    row = {"together": "one_guard + another_guard", "verdict": "sound if", "why": "word " * 40, "then": "then " * 9}
    for width in (70, 100):
        told = list(lines([row], width))
        assert max(map(len, told)) <= width
        assert " ".join(told).split().count("word") == 40
