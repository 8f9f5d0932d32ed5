"""The verdict: per arm, what it promised, whether what was asked of it holds, what it gained and what it paid."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

from lightning_guard.report import gates
from lightning_guard.report.claims import ALPHA, telling
from lightning_guard.report.summary import FEWEST_SHOWN, baseline
from lightning_guard.report.units import change, count, factor, shown
from lightning_guard.report.view import between, doubt

_DIRECTIONS = ("better", "worse", "higher", "lower")
_HEADINGS = {
    "better": ("Better", "good"),
    "worse": ("Worse", "bad"),
    "higher": ("Higher", "plain"),
    "lower": ("Lower", "plain"),
    "doubtful": ("Doubtful, see the notes", "bad"),
    "equivalent": ("Equivalent, within what was asked for", "good"),
    "inconclusive, better": ("Inconclusive, better in every seed", "plain"),
    "inconclusive, worse": ("Inconclusive, worse in every seed", "plain"),
    "inconclusive, higher": ("Inconclusive, higher in every seed", "plain"),
    "inconclusive, lower": ("Inconclusive, lower in every seed", "plain"),
    "inconclusive": ("Inconclusive, the seeds disagree", "plain"),
    "one seed": ("Inconclusive, seen in one seed", "plain"),
    "same": ("Unchanged, as far as shown", "plain"),
    "not measured": ("Without a value in {baseline}", "plain"),
}


class Finding(NamedTuple):
    """One headline figure of one arm: "Accuracy", "87.2% → 84.1%", "−3.1 pts (−3.5 to −2.7 pts, p = 0.002)"."""

    label: str
    values: str
    change: str

    def __str__(self) -> str:
        return f"{self.label} {self.values}" + (f" ({self.change})" if self.change else "")


class Gate(NamedTuple):
    """One thing that was asked of an arm, what was found, and the answer."""

    arm: str
    asked: str
    found: str
    state: str
    tone: str


class Verdict(NamedTuple):
    """What one guarded arm promised, what its guards say of that, what was asked of it, and what the figures say."""

    arm: str
    promises: list[str]
    told: list[str]
    gates: list[Gate]
    findings: list[tuple[str, str, list[Finding]]]
    tally: str


def verdicts(document: Mapping[str, Any]) -> list[Verdict]:
    """Returns the verdict on every guarded arm; empty without a baseline to judge by."""
    if baseline(document) is None:
        return []
    return [_verdict(document, arm) for arm in document["arms"] if not arm["baseline"]]


def answers(document: Mapping[str, Any]) -> list[Gate]:
    """Returns every gate of the report in words."""
    tones = {"met": "good", "not met": "bad", "not measured": "bad"}
    return [
        Gate(
            gate["arm"],
            gates.asked(gate, document),
            gates.found(gate, document),
            gate["state"] + (", let pass" if gate["passed"] and gate["state"] != "met" else ""),
            tones.get(gate["state"], "plain"),
        )
        for gate in document.get("gates", ())
    ]


def outcome(document: Mapping[str, Any]) -> str:
    """Returns whether what was asked of the arms holds, in a sentence; nothing if nothing was asked."""
    asked = document.get("gates", ())
    if not asked:
        return ""
    failed = sum(not gate["passed"] for gate in asked)
    tally = Counter(gate["state"] for gate in asked)
    states = ", ".join(f"{tally[state]} {state}" for state in gates.STATES if tally[state])
    return f"{'Passed' if not failed else 'Not passed'}: of {count(len(asked), 'gate')}, {states}."


def certainty(document: Mapping[str, Any]) -> str:
    """Returns what must hold before something is called better or worse, for the seeds and claims of this report."""
    entries = [entry for entry in document["claims"] if entry["n"]]
    if not entries:
        return "No arm can be compared with a baseline, so no differences are shown."
    seeds = max(entry["n"] for entry in entries)
    corrected = sum((entry["holm_p"] is not None) + (entry["equivalence_p"] is not None) for entry in entries)
    if not corrected:
        return (
            f"No claim is made: with {count(seeds, 'seed')} a two-sided sign-flip test cannot give a p-value below "
            f"{min(1.0, 2 / 2**seeds):.3g}. Six seeds are the fewest that can tell."
            + (" Intervals (95%) are over seeds, Student's." if seeds >= FEWEST_SHOWN else "")
        )
    return (
        f"Better and worse are claimed where Student's paired test over seeds, corrected for all "
        f"{count(corrected, 'claim')} of this report (Holm), and the sign-flip test, which needs no normal "
        f"distribution, both have p at most {ALPHA}; p is the larger. Intervals (95%) are over seeds, Student's, and "
        "are not corrected. How many seeds would tell assumes the mean and spread seen here: an order of magnitude."
    )


def _verdict(document: Mapping[str, Any], arm: Mapping[str, Any]) -> Verdict:
    entries = {(entry["figure"], entry["arm"]): entry for entry in document["summary"]}
    reference, name, seeds = baseline(document), arm["name"], len(document["provenance"]["seeds"])
    groups: dict[str, list[Finding]] = defaultdict(list)
    for claim in (claim for claim in document["claims"] if claim["arm"] == name):
        key = claim["figure"]
        figure, entry, base = document["figures"][key], entries[key, name], entries[key, reference]
        if not entry["n"]:
            continue
        unit, kind = figure["unit"], _kind(claim, entry["paired"]["word"])
        before, after = shown(base["mean"], unit), shown(entry["mean"], unit)
        if kind in (*_DIRECTIONS, "inconclusive") and _alike(base["mean"], entry["mean"], unit):
            kind = "same"  # a reader sees no difference, so none is counted as gained or paid
        if doubt(document, key, name) and kind not in ("same", "not measured"):
            kind = "doubtful"  # not gained before it is known to be there
        plain = kind in ("same", "not measured")
        told = "" if plain else _change(claim, base["mean"], entry["mean"], unit)
        if not plain and claim["n"] < seeds:
            told += f", {claim['n']} of {seeds} seeds"
        groups[kind].append(Finding(figure["label"], after if plain else f"{before} → {after}", told))
    findings = [
        (heading.format(baseline=reference), tone, groups[kind])
        for kind, (heading, tone) in _HEADINGS.items()
        if groups[kind]
    ]
    promises = [guard["promise"] or guard["name"] for guard in arm["guards"]]
    own = [gate for gate in answers(document) if gate.arm == name]
    return Verdict(name, promises, _told(document, arm), own, findings, _tally(document, name))


def _told(document: Mapping[str, Any], arm: Mapping[str, Any]) -> list[str]:
    """What the guards of an arm said at the end of its runs, once if numbers alone differ; first what few runs said.

    A promise that one seed missed must not hide behind those that all kept.
    """
    guards = tuple(f"{guard['name']}: " for guard in arm["guards"])
    alike: dict[str, list[tuple[int, str]]] = defaultdict(list)
    runs = sorted((run for run in document["runs"] if run["arm"] == arm["name"]), key=lambda run: run["seed"])
    for run in runs if guards else ():
        for note in dict.fromkeys(run["notes"]):
            if note.startswith(guards):
                alike[re.sub(r"\d[\d.,e+-]*", "0", note)].append((run["seed"], note))
    said = []
    for notes in sorted(alike.values(), key=len):
        if len(notes) < len(runs):
            seeds = ", ".join(str(seed) for seed, _ in notes)
            said.append(f"{notes[0][1]} (Seed{'s' * (len(notes) > 1)} {seeds}.)")
        else:
            more = f" (Alike in {count(len(notes) - 1, 'further run')}.)" if len(notes) > 1 else ""
            said.append(notes[0][1] + more)
    return said


def _kind(claim: Mapping[str, Any], word: str) -> str:
    if claim["verdict"] != "inconclusive":
        return str(claim["verdict"])
    if word in _DIRECTIONS:
        return f"inconclusive, {word}"
    return "one seed" if word == "one seed" else "inconclusive"


def _change(claim: Mapping[str, Any], before: float, after: float, unit: str) -> str:
    """The difference, its interval, its p-value where a claim was tested, and what would tell where none is made."""
    said = factor(before, after, unit) or change(claim["difference"], unit, like=after)
    if claim["n"] >= FEWEST_SHOWN:
        low, high = (change(end, unit, like=after) for end in claim["interval"])
        said += f" ({between(low, high) or low})"
    if claim["holm_p"] is not None:
        p = max(claim["holm_p"], claim["sign_flip_p"])
        said += ", p < 0.001" if p < 0.001 else f", p = {p:.2g}"
    return ", ".join(filter(None, (said, telling(claim))))


def _alike(one: float, other: float, unit: str) -> bool:
    return shown(one, unit) == shown(other, unit) or (unit != "fraction" and abs(other - one) < 0.005 * abs(one))


def _tally(document: Mapping[str, Any], arm: str) -> str:
    words = Counter(entry["paired"]["word"] for entry in document["summary"] if entry["arm"] == arm)
    del words["not measured"]
    said = ", ".join(
        f"{words[word]} {name}"
        for word, name in (
            ("better", "better in every seed"),
            ("worse", "worse in every seed"),
            ("higher", "higher in every seed"),
            ("lower", "lower in every seed"),
            ("same", "unchanged"),
            ("seeds disagree", "undecided"),
            ("one seed", "seen in one seed only"),
        )
        if words[word]
    )
    compared = count(words.total(), "figure")
    return f"All {compared}, described and not claimed: {said}." if said else "No figure could be compared."
