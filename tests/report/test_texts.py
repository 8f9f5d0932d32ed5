"""Numbers, Markdown and CSV."""

import csv
import io
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from lightning_guard.report import document as documents
from lightning_guard.report import markdown, tables, units
from lightning_guard.report.computed import computed
from tests.report.example import HOSTILE, comparison


def prepared(results):
    return computed(documents.prepare(results))


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.8714, "fraction", "87.1%"),
        (1.0, "fraction", "100.0%"),
        (0.9999, "fraction", "99.99%"),
        (0.0004, "fraction", "0.04%"),
        (0.0, "fraction", "0.0%"),
        (-0.02, "fraction", "\u22122.0%"),
        (0.0, "s", "0.0 s"),
        (2.5e-7, "s", "0.250 \u00b5s"),
        (0.0123, "s", "12.3 ms"),
        (59.96, "s", "1 min 0 s"),
        (3599.7, "s", "1 h 00 min"),
        (93784.0, "s", "26 h 03 min"),
        (999.0, "bytes", "999 B"),
        (999_960.0, "bytes", "1.0 MB"),
        (407_080, "bytes", "407.1 kB"),
        (101_770, "count", "101,770"),
        (12_345_678, "count", "12.3 M"),
        (2.5, "count", "2.50"),
        (0.5, "ratio", "0.500"),
        (0.00042, "nats", "0.0004 nats"),
        (3e-7, "", "3.0e\u221207"),
        (None, "s", "n/a"),
    ],
)
def test_values_as_people_read_them(value, unit, text):
    assert units.shown(value, unit) == text


def test_differences_have_signs_and_points():
    assert units.change(-0.031, "fraction") == "\u22123.1 pts"
    assert units.change(0.0003, "fraction") == "+0.03 pts"
    assert units.change(-0.278, "s", like=12.0) == "\u22120.28 s"
    assert units.change(0.0, "bytes") == "0"


@settings(deadline=None, max_examples=50)
@given(st.floats(1e-12, 1e12), st.sampled_from(["fraction", "s", "bytes", "count", "ratio", "nats", "kg"]))
def test_a_difference_is_never_shown_as_none_or_with_the_wrong_sign(value, unit):
    up, down = units.change(value, unit), units.change(-value, unit)
    assert (up[0], down[0]) == ("+", "\u2212")
    assert up[1:] == down[1:]
    if unit not in ("fraction",) or value > 1e-5:
        assert re.search("[1-9]", up), up


@settings(deadline=None, max_examples=50)
@given(st.floats(1e-9, 1e12), st.sampled_from(["fraction", "s", "bytes", "count", "nats"]))
def test_axes_count_in_steps_that_suit_them(largest, unit):
    step, _ = units.scale(unit, largest)
    assert step > 0
    if unit != "fraction" and largest >= 2:
        assert largest / step >= 1


@settings(deadline=None, max_examples=50)
@given(st.text())
def test_clean_text_survives_every_file(text):
    clean = documents.clean(text)
    clean.encode("utf-8")
    assert documents.clean(clean) == clean
    assert len(clean.splitlines()) <= 1
    assert not re.search("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]", clean)


@settings(deadline=None, max_examples=50)
@given(st.text(alphabet=st.sampled_from("=+-@ab1 \uff1d\uff0b\"',;\t"), max_size=5))
def test_no_cell_begins_a_formula(text):
    harmless = tables.harmless(text)
    assert harmless.removeprefix("'") == text.removeprefix("'") or harmless == f"'{text}"
    assert harmless.strip()[:1] not in ("=", "+", "-", "@", "\uff1d", "\uff0b") or not harmless.strip()


def test_the_csv_holds_every_value_bit_for_bit():
    results = comparison(arms=["plain", "=1+1", '-a,"b"'], seeds=2)
    results["runs"][0]["values"]["task/accuracy"] = None
    results["runs"][1]["values"]["task/accuracy"] = -0.1 + 0.30000000000000004
    rows = list(csv.DictReader(io.StringIO(tables.metrics(prepared(results)))))
    read = {(row["arm"], int(row["seed"]), row["figure"]): row["value"] for row in rows}
    names = {"plain": "plain", "=1+1": "'=1+1", '-a,"b"': '\'-a,"b"'}
    for run in results["runs"]:
        for figure, value in run["values"].items():
            cell = read.pop((names[run["arm"]], run["seed"], figure))
            assert cell == "" if value is None else float(cell) == value
    assert not read
    assert {row["unit"] for row in rows if row["figure"] == "cost/time"} == {"s"}


@settings(deadline=None, max_examples=50)
@given(st.text(max_size=30))
def test_markdown_shows_names_as_they_are(text):
    text = " ".join(documents.clean(text).split())
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(f"x {markdown.plain(text)} y")
    (inline,) = [token for token in tokens if token.type == "inline"]
    assert {child.type for child in inline.children} <= {"text", "text_special"}
    assert "".join(child.content for child in inline.children) == f"x {text} y".replace("x  y", "x  y")


def test_markdown_has_whole_tables_and_no_markup_of_others():
    results = comparison(arms=HOSTILE, seeds=2)
    results["limits"] += HOSTILE
    for run in results["runs"]:
        run["notes"] = list(HOSTILE)
    text = markdown.text(prepared(results))
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(text)
    kinds = {token.type for token in tokens} | {child.type for token in tokens for child in token.children or ()}
    assert not kinds & {"html_block", "html_inline", "link_open", "image", "code_inline", "em_open", "fence"}
    rows = text.count("\n| ")
    # Five tables of figures with a head and a row, and provenance.
    assert sum(token.type == "table_open" for token in tokens) == 6
    assert sum(token.type == "tr_open" for token in tokens) == rows
    heads = [token.type for token in tokens].count("th_open")
    assert heads == 5 * (len(HOSTILE) + 1) + 2


def test_markdown_tells_the_same_as_the_page():
    results = comparison(arms=2, seeds=2)
    for run in results["runs"]:
        run["values"]["task/accuracy"] = 0.75 if run["arm"] == "arm-1" else 0.5
    text = markdown.text(prepared(results))
    assert "| Accuracy (higher is better) | 50.0% | 75.0% (+25.0 pts, better in every seed) |" in text
    verdict = "Inconclusive, better in every seed: Accuracy 50.0% → 75.0% (+25.0 pts, about 6 seeds would tell)"
    assert f"  - {verdict}" in text
