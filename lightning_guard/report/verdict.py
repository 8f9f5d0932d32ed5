"""The verdict: per arm, what it promised, what it gained and what it paid."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

from lightning_guard.report.summary import baseline, caution, headlines
from lightning_guard.report.units import change, count, factor, shown
from lightning_guard.report.view import doubt


class Finding(NamedTuple):
    """One headline figure of one arm: "Accuracy", "87.2% → 84.1%", "−3.1 pts"."""

    label: str
    values: str
    change: str

    def __str__(self) -> str:
        return f"{self.label} {self.values}" + (f" ({self.change})" if self.change else "")


class Verdict(NamedTuple):
    """What one guarded arm promised, and what the headline figures say about it."""

    arm: str
    promises: list[str]
    findings: list[tuple[str, str, list[Finding]]]
    tally: str


def verdicts(document: Mapping[str, Any]) -> list[Verdict]:
    """Returns the verdict on every guarded arm; empty without a baseline to judge by."""
    if baseline(document) is None:
        return []
    return [_verdict(document, arm) for arm in document["arms"] if not arm["baseline"]]


def warning(document: Mapping[str, Any]) -> str:
    """Returns the sentence about significance, for the number of seeds that could be paired."""
    pairs = [entry["paired"]["n"] for entry in document["summary"] if entry["paired"]]
    return caution(max(pairs)) if any(pairs) else "No arm can be compared with a baseline, so no differences are shown."


def _verdict(document: Mapping[str, Any], arm: Mapping[str, Any]) -> Verdict:
    entries = {(entry["figure"], entry["arm"]): entry for entry in document["summary"]}
    reference, name, seeds = baseline(document), arm["name"], len(document["provenance"]["seeds"])
    groups: dict[str, list[Finding]] = defaultdict(list)
    for key in headlines(document):
        figure, entry, base = document["figures"][key], entries[key, name], entries[key, reference]
        if entry["n"]:
            unit, word = figure["unit"], entry["paired"]["word"]
            before, after = shown(base["mean"], unit), shown(entry["mean"], unit)
            extra = factor(base["mean"], entry["mean"], unit) or change(
                entry["paired"]["mean"], unit, like=entry["mean"]
            )
            if word != "not measured" and _alike(base["mean"], entry["mean"], unit):
                word = "same"  # a reader sees no difference, so none is counted as gained or paid
            if doubt(document, key, name) and word not in ("same", "not measured"):
                word = "doubtful"  # not gained before it is known to be there
            if entry["paired"]["n"] < seeds:
                extra += f", {entry['paired']['n']} of {seeds} seeds"
            groups[word].append(
                Finding(figure["label"], after, "")
                if word in ("same", "not measured")
                else Finding(figure["label"], f"{before} → {after}", extra)
            )
    headings = (
        ("better", "Gained in every seed", "good"),
        ("worse", "Paid in every seed", "bad"),
        ("higher", "Higher in every seed", "plain"),
        ("lower", "Lower in every seed", "plain"),
        ("doubtful", "Doubtful, see the notes", "bad"),
        ("seeds disagree", "Seeds disagree", "plain"),
        ("one seed", "Seen in one seed", "plain"),
        ("same", "Unchanged, as far as shown", "plain"),
        ("not measured", f"Without a value in {reference}", "plain"),
    )
    findings = [(heading, tone, groups[word]) for word, heading, tone in headings if groups[word]]
    promises = [guard["promise"] or guard["name"] for guard in arm["guards"]]
    return Verdict(name, promises, findings, _tally(document, name))


def _alike(one: float, other: float, unit: str) -> bool:
    return shown(one, unit) == shown(other, unit) or (unit != "fraction" and abs(other - one) < 0.005 * abs(one))


def _tally(document: Mapping[str, Any], arm: str) -> str:
    words = Counter(entry["paired"]["word"] for entry in document["summary"] if entry["arm"] == arm)
    del words["not measured"]
    said = ", ".join(
        f"{words[word]} {name}"
        for word, name in (
            ("better", "better"),
            ("worse", "worse"),
            ("higher", "higher"),
            ("lower", "lower"),
            ("same", "unchanged"),
            ("seeds disagree", "undecided"),
            ("one seed", "seen in one seed only"),
        )
        if words[word]
    )
    return f"Of all {count(words.total(), 'figure')} compared: {said}." if said else "No figure could be compared."
