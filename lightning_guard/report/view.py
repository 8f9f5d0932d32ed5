"""The words of a report around its verdict: tables, notes and provenance, for the page and the Markdown alike."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

from lightning_guard.report.summary import baseline, by_axis
from lightning_guard.report.units import change, count, shown

TITLES = {
    "task": ("Task", "Does the model still do its job?"),
    "robustness": ("Robustness", "What is left when somebody tampers with the inputs?"),
    "certificate": ("Certificate", "Of how many inputs is it proven that small changes do not matter?"),
    "fairness": ("Fairness", "Are the groups treated alike?"),
    "efficiency": ("Efficiency", "What does the finished model weigh, and how fast is it?"),
    "cost": ("Cost", "What did the training itself cost?"),
    "privacy": ("Privacy", "What may the model reveal about those it learned from?"),
    "explanation": ("Explanation", "Does the model still look at the same things?"),
}

_TONES = {"better": "good", "worse": "bad"}


class Cell(NamedTuple):
    """What one arm shows for one figure. What compares is empty for the baseline."""

    arm: str
    value: str
    spread: str
    interval: str
    change: str
    span: str
    word: str
    tone: str
    doubt: str


class Row(NamedTuple):
    """One figure."""

    label: str
    about: str
    direction: str
    cells: list[Cell]


class Section(NamedTuple):
    """One axis."""

    axis: str
    title: str
    question: str
    rows: list[Row]


def sections(document: Mapping[str, Any]) -> list[Section]:
    """Returns a table for every axis that has figures, bars or curves, in the order of display."""
    entries = _entries(document)
    groups = by_axis(
        {
            f"{kind}:{key}": spec
            for kind in ("figures", "curves", "bars", "matrices")
            for key, spec in document[kind].items()
        }
    )
    if document.get("lira"):
        groups.setdefault("privacy", [])
    result = []
    for axis, keys in groups.items():
        rows = []
        for key in (key.removeprefix("figures:") for key in keys if key.startswith("figures:")):
            figure = document["figures"][key]
            cells = [
                _cell(
                    entries[key, arm["name"]],
                    figure,
                    _seeds(document),
                    _interval(document, key, arm["name"]),
                    doubt(document, key, arm["name"]),
                )
                for arm in document["arms"]
            ]
            direction = f"{figure['better']} is better" if figure["better"] else ""
            rows.append(Row(figure["label"], figure["about"], direction, cells))
        title, question = TITLES.get(axis, (axis.replace("_", " ").capitalize(), ""))
        result.append(Section(axis, title, question, rows))
    return result


class Drawn(NamedTuple):
    """A picture that one arm made of itself."""

    arm: str
    label: str
    about: str
    png: str


def drawn(document: Mapping[str, Any]) -> dict[str, list[Drawn]]:
    """Returns the pictures of every axis, those of the first seed of each arm."""
    found: dict[str, dict[tuple[str, str], Drawn]] = defaultdict(dict)
    for arm in document["arms"]:
        for run in sorted(document["runs"], key=lambda run: run["seed"]):
            for key, picture in run["pictures"].items() if run["arm"] == arm["name"] else ():
                own = Drawn(arm["name"], picture["label"], picture["about"], picture["png"])
                found[key.partition("/")[0]].setdefault((key, arm["name"]), own)
    return {axis: list(pictures.values()) for axis, pictures in found.items()}


class Matrix(NamedTuple):
    """What each arm does with what each arm made: text and shade from 0 to 1 of each cell, rows made it."""

    label: str
    about: str
    row_label: str
    column_label: str
    arms: list[str]
    cells: list[list[tuple[str, float]]]


def matrices(document: Mapping[str, Any]) -> dict[str, list[Matrix]]:
    """Returns the matrices of every axis."""
    found: dict[str, list[Matrix]] = defaultdict(list)
    for axis, keys in by_axis(document["matrices"]).items():
        for key in keys:
            spec = document["matrices"][key]
            known = [value for row in spec["values"] for value in row if value is not None]
            low, high = min(known, default=0.0), max(known, default=0.0)
            cells = [
                [
                    (shown(value, spec["unit"]), 0.0 if value is None else (value - low) / ((high - low) or 1.0))
                    for value in row
                ]
                for row in spec["values"]
            ]
            told = spec["label"], spec["about"], spec["row_label"], spec["column_label"]
            found[axis].append(Matrix(*told, spec["arms"], cells))
    return dict(found)


def opening(document: Mapping[str, Any]) -> str:
    """Returns the sentence under the title: how many arms, how many seeds, on what data."""
    arms, seeds, data = len(document["arms"]), _seeds(document), document["provenance"]["data"]
    name = f"{data['name']}" + (
        f" ({data['train']:,} to train, {data['test']:,} to test)"
        if data["train"] is not None and data["test"] is not None
        else ""
    )
    return f"{count(arms, 'arm')} trained on {count(seeds, 'seed')} with {name}."


def reading(document: Mapping[str, Any]) -> str:
    """Returns how to read a table."""
    words = "Mean \u00b1 standard deviation over seeds." if _seeds(document) > 1 else "One seed."
    if baseline(document) is not None and len(document["arms"]) > 1:
        words += (
            f" Below it, the difference from {baseline(document)}, paired by seed: mean, its 95% interval over seeds "
            "(from three seeds on, else lowest to highest), and whether the seeds agree, which is no claim: what is "
            "claimed stands in the verdict."
        )
    if any(pair for run in document["runs"] for pair in run["intervals"].values()):
        words += " Test set: what 95% of samples of test examples would give, lowest to highest over the seeds."
    return words


def notes(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the notes of the runs, each once, with the runs that made it."""
    places: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for run in document["runs"]:
        for note in dict.fromkeys(run["notes"]):
            places[note][run["arm"]].append(run["seed"])
    return [
        (
            note,
            "; ".join(
                f"{arm}, seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, sorted(seeds)))}"
                for arm, seeds in where.items()
            ),
        )
        for note, where in places.items()
    ]


def provenance(document: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Returns what is needed to run the comparison again: label, value, and "code" or "text"."""
    facts, machine = document["provenance"], document["provenance"]["machine"]
    rows = [
        ("Created", document["created"], "text"),
        ("Command", facts["command"], "code"),
        ("Source revision", facts["git"], "code"),
        ("Configuration, SHA-256", facts["config_sha256"], "code"),
        *((f"Recipe {name}, SHA-256", value, "code") for name, value in sorted(facts["recipes"].items())),
        ("Seeds", ", ".join(map(str, facts["seeds"])), "text"),
        ("Data", facts["data"]["name"], "text"),
        ("Data, SHA-256", facts["data"]["sha256"], "code"),
        (
            "Machine",
            f"{machine['processor']}, {count(machine['cores'], 'core')}, "
            f"{count(machine['threads'], 'thread')}, {machine['system']}",
            "text",
        ),
        ("Versions", ", ".join(f"{name} {version}" for name, version in sorted(facts["versions"].items())), "text"),
    ]
    return [(label, value if value else "not recorded", kind if value else "text") for label, value, kind in rows]


def option(value: Any) -> str:
    """Returns an option of a guard the way a recipe would spell it.

    >>> option(None), option(True), option(0.1), option([1, 2])
    ('null', 'true', '0.1', '[1, 2]')
    """
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)


def phrase(word: str, n: int, seeds: int) -> str:
    """Returns the word of a paired difference together with how many seeds stand behind it.

    >>> phrase("better", 3, 3), phrase("worse", 2, 3), phrase("one seed", 1, 1)
    ('better in every seed', 'worse in 2 of 2 measured seeds', 'one seed')
    """
    if word not in ("better", "worse", "higher", "lower", "same"):
        return word
    return f"{word} in every seed" if n == seeds else f"{word} in {n} of {n} measured seeds"


def between(low: str, high: str) -> str:
    """Returns a range that names a common unit once; nothing if both ends read the same.

    >>> between("83.8%", "84.4%"), between("-3.4 pts", "-2.8 pts"), between("5", "5")
    ('83.8 to 84.4%', '-3.4 to -2.8 pts', '')
    """
    if low == high:
        return ""
    for unit in ("%", f" {high.rpartition(' ')[2]}"):
        # "1 min 3 s" has no unit to share: what is left of it would be read as seconds.
        if low.endswith(unit) and high.endswith(unit) and " " not in low.removesuffix(unit):
            low = low.removesuffix(unit)
    return f"{low} to {high}"


def _interval(document: Mapping[str, Any], key: str, arm: str) -> str:
    """Returns the range that covers the test-set intervals of all seeds; seeds and test set are not mixed."""
    pairs = [pair for run in document["runs"] if run["arm"] == arm and (pair := run["intervals"].get(key))]
    pairs = [pair for pair in pairs if None not in pair]
    unit = document["figures"][key]["unit"]
    if not pairs:
        return ""
    span = between(shown(min(low for low, _ in pairs), unit), shown(max(high for _, high in pairs), unit))
    return f"test set {span}" if span else ""


def _alone(deviation: str, value: str) -> str:
    """Drops the unit of a standard deviation where the value beside it has it already."""
    if value.endswith("%"):
        return deviation.removesuffix("%")
    return deviation.removesuffix(f" {value.partition(' ')[2]}")


def doubt(document: Mapping[str, Any], key: str, arm: str) -> str:
    """Returns whether a figure of an arm is to be doubted, and in how many seeds; nothing if not."""
    runs = [run for run in document["runs"] if run["arm"] == arm and key in run["values"]]
    doubted = sum(key in run["doubts"] for run in runs)
    return f"doubtful in {doubted} of {len(runs)} seeds" if 0 < doubted < len(runs) else "doubtful" * bool(doubted)


def _cell(entry: Mapping[str, Any], figure: Mapping[str, Any], seeds: int, interval: str, doubt: str) -> Cell:
    unit, paired = figure["unit"], entry["paired"]
    value = shown(entry["mean"], unit)
    spread = f"\u00b1 {_alone(shown(entry['sd'], unit, like=entry['mean']), value)}" if entry["sd"] else ""
    if 0 < entry["n"] < seeds:
        spread = f"{spread}, " * bool(spread) + f"{entry['n']} of {seeds} seeds"
    if paired is None or not paired["n"]:
        return Cell(entry["arm"], value, spread, interval, "", "", "", "", doubt)
    difference = change(paired["mean"], unit, like=entry["mean"])
    span = paired["interval"] or (paired["lowest"], paired["highest"])
    ends = [change(end, unit, like=entry["mean"]) for end in span]
    return Cell(
        entry["arm"],
        value,
        spread,
        interval,
        difference,
        between(*ends),
        phrase(paired["word"], paired["n"], seeds),
        "plain" if doubt else _TONES.get(paired["word"], "plain"),
        doubt,
    )


def _entries(document: Mapping[str, Any]) -> dict[tuple[str, str], Mapping[str, Any]]:
    return {(entry["figure"], entry["arm"]): entry for entry in document["summary"]}


def _seeds(document: Mapping[str, Any]) -> int:
    return len(document["provenance"]["seeds"])
