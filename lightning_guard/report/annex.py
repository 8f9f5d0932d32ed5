"""What a training run can say for technical documentation, and what it leaves to people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from lightning_guard.report.card import OPEN
from lightning_guard.report.markdown import plain
from lightning_guard.report.summary import by_axis
from lightning_guard.report.units import shown


class Item(NamedTuple):
    """A point of a framework: its number, what it asks for in our words, what the run can say, who completes it."""

    number: str
    asks: str
    evidence: tuple[str, ...]  # of what this module can tell: an axis, or one of the words below
    person: str


_ACT = (
    Item("1", "General description: purpose, provider, versions, hardware, interfaces, instructions for use",
         ("versions",), "purpose, provider, how it is put on the market, hardware it will run on, instructions"),
    Item("2(a)", "Methods and steps of development, third-party tools and pre-trained parts", ("versions", "recipes"),
         "pre-trained models and data that were used before this training"),
    Item("2(b)", "Design: what is optimised for, key choices, and the trade-offs that were decided",
         ("guards", "trade-offs"), "why these choices, and who made them"),
    Item("2(c)", "Architecture and the computing resources used", ("machine", "cost"), "the architecture as a system"),
    Item("2(d)", "Data: provenance, scope, main characteristics, selection, labelling, cleaning", ("data", "drift"),
         "how the data were obtained, selected, labelled and cleaned"),
    Item("2(e)", "Human oversight measures", (), "all of it"),
    Item("2(f)", "Changes to the system that are foreseen", (), "all of it"),
    Item("2(g)", "Validation and testing: data, metrics of accuracy and robustness, discriminatory impacts, signed and "
         "dated test reports", ("task", "robustness", "certificate", "fairness", "dates"),
         "the name of who is responsible; `lightning-guard sign` binds it to this folder"),
    Item("2(h)", "Cybersecurity measures", ("privacy", "robustness"), "measures outside of the model"),
    Item("3", "Capabilities and limits, accuracy for groups of persons, foreseeable risks, oversight, input data",
         ("task", "groups", "limits"), "risks to health, safety and fundamental rights; the specification of inputs"),
    Item("4", "Why these performance metrics suit the system", (), "all of it; each figure says how it is measured"),
    Item("5", "The risk management system", (), "all of it"),
    Item("6", "Changes made through the lifecycle", ("revision",), "the history before and after this comparison"),
    Item("7", "Standards that are applied", (), "all of it"),
    Item("8", "The declaration of conformity", (), "all of it: this document declares nothing"),
    Item("9", "Monitoring after the system is in use", (), "all of it"),
)  # fmt: skip

_MEASURE = (
    Item("2.1", "Test sets, metrics and tools are documented", ("data", "versions", "dates"), ""),
    Item("2.2", "Evaluations that involve people protect them", (), "all of it"),
    Item("2.3", "Performance is shown for conditions like those of use", ("task", "drift"), "how like they are"),
    Item("2.4", "The system is monitored in production", (), "all of it"),
    Item("2.5", "It is valid and reliable, and its limits are known", ("task", "limits"), "validity for the purpose"),
    Item("2.6", "Safety risks are evaluated", (), "all of it"),
    Item("2.7", "Security and resilience are evaluated", ("robustness", "certificate"), "the system around the model"),
    Item("2.8", "Risks of transparency and accountability are examined", ("dates", "revision"), "who answers for it"),
    Item("2.9", "The model is explained, and its output read in context", ("explanation",), "the context"),
    Item("2.10", "Privacy risk is examined", ("privacy",), "data flows around the training"),
    Item("2.11", "Fairness and bias are evaluated", ("fairness", "groups"), "which groups matter, and why"),
    Item("2.12", "Environmental impact is assessed", ("cost",), "everything but this training"),
    Item("2.13", "The measurements themselves are judged", ("limits", "doubts"), "by somebody who did not make them"),
)  # fmt: skip


def annex(report: Mapping[str, Any]) -> str:
    """Returns ``annex.md``: EU AI Act Annex IV and NIST AI RMF MEASURE, filled with what a comparison knows.

    Every point is there. What a run cannot know is marked as to be completed by a person; nothing declares that any
    duty is met. Points are told in our words: the official texts are Regulation (EU) 2024/1689, Annex IV, and NIST AI
    100-1.

    Args:
        report: what :func:`lightning_guard.compare` returned or ``load_report`` read.
    """
    lines = [f"# {plain(report['title'])}: extract for technical documentation", ""]
    lines.append(
        "This is evidence from a training run, set beside the points of two frameworks. It is no legal advice and no "
        "declaration of conformity. Numbers are means over seeds, arm by arm; how each is measured is in `report.html`."
    )
    told = _told(report)
    for heading, items in (
        ("Regulation (EU) 2024/1689, Annex IV", _ACT),
        ("NIST AI Risk Management Framework, MEASURE 2", _MEASURE),
    ):
        lines += ["", f"## {heading}"]
        for item in items:
            lines += ["", f"### {item.number} {item.asks}", ""]
            lines += [line for part in item.evidence for line in told.get(part, [])]
            person = f" ({item.person})" if item.person else ""
            if item.person or not item.evidence:
                lines.append(f"- {OPEN}{person}")
    return "\n".join(lines) + "\n"


def _told(report: Mapping[str, Any]) -> dict[str, list[str]]:
    """Lines by what they are evidence of; what was not measured says so."""
    facts = report["provenance"]
    machine, data = facts["machine"], facts["data"]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(facts["versions"].items()))
    rows = (
        f"{data['train']} rows to train, {data['test']} to test" if data["train"] is not None else "rows not recorded"
    )
    hardware = f"{machine['processor']}, {machine['cores']} cores, {machine['system']}"
    known = {
        "versions": [f"Software: {versions}"],
        "recipes": [f"Recipe {name}, SHA-256 {digest}" for name, digest in sorted(facts["recipes"].items())],
        "machine": [f"Machine: {hardware}"],
        "data": [f"Data: {data['name']}, {rows}, SHA-256 {data['sha256'] or 'not recorded'}", *_groups(report)],
        "dates": [f"Compared on {report['created']}, seeds {', '.join(map(str, facts['seeds']))}"],
        "revision": [f"Source revision {facts['git'] or 'not recorded'}, configuration {facts['config_sha256']}"],
        "guards": [
            f"{arm['name']}: {guard['name']}, {guard['promise']}" for arm in report["arms"] for guard in arm["guards"]
        ],
        "trade-offs": list(_trades(report)),
        "limits": list(report["limits"]),
        "doubts": sorted({s for run in report["runs"] for lines in run["doubts"].values() for s in lines}),
        "groups": [*_groups(report), *_parts(report)],
        "drift": list((report.get("data") or {"notes": []})["notes"]),
    }
    for axis, keys in by_axis(report["figures"]).items():
        known[axis] = [line for key in keys if (line := _line(report, key))]
    for axis in ("task", "privacy", "robustness", "certificate", "fairness", "explanation", "cost"):
        known.setdefault(axis, []) or known.update(
            {axis: [f"{axis.capitalize()} was not measured in this comparison."]}
        )
    return {name: [f"- {plain(line)}" for line in lines] for name, lines in known.items()}


def _line(report: Mapping[str, Any], key: str) -> str:
    spec = report["figures"][key]
    values = [
        f"{entry['arm']} {shown(entry['mean'], spec['unit'])}"
        for entry in report["summary"]
        if entry["figure"] == key and entry["mean"] is not None
    ]
    return f"{spec['label']}: {', '.join(values)}" if values else ""


def _trades(report: Mapping[str, Any]) -> Iterator[str]:
    """What each arm gained and paid against the baseline, where all seeds agree."""
    for arm in report["arms"]:
        words: dict[str, list[str]] = {"better": [], "worse": []}
        for entry in report["summary"]:
            word = (entry["paired"] or {"word": ""})["word"]
            if entry["arm"] == arm["name"] and word in words:
                words[word].append(report["figures"][entry["figure"]]["label"])
        if any(words.values()):
            told = [f"{word} in {'; '.join(labels)}" for word, labels in words.items() if labels]
            yield f"{arm['name']} against the baseline, in every seed: {', '.join(told)}"


def _groups(report: Mapping[str, Any]) -> Iterator[str]:
    for bars in (report.get("data") or {"bars": []})["bars"]:
        pairs = zip(bars["categories"], bars["values"], strict=True)
        yield f"{bars['label']}: " + ", ".join(f"{name} {shown(value, bars['y_unit'])}" for name, value in pairs)


def _parts(report: Mapping[str, Any]) -> Iterator[str]:
    """Values of groups, arm by arm, means over seeds."""
    for key, spec in report["bars"].items():
        if spec["axis"] not in ("fairness", "privacy") or "class" in key:
            continue
        for arm in report["arms"]:
            runs = [run["bars"][key] for run in report["runs"] if run["arm"] == arm["name"] and key in run["bars"]]
            cells = []
            for i, category in enumerate(spec["categories"]):
                seeds = [values[i] for values in runs if values[i] is not None]
                cells.append(f"{category} {shown(sum(seeds) / len(seeds) if seeds else None, spec.get('y_unit', ''))}")
            if runs:
                yield f"{spec['label']}, {arm['name']}: {', '.join(cells)}"
