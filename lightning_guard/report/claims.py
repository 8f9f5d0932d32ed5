"""What a report claims: for every headline figure of every arm whether it differs from the baseline, and how surely."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_guard.report.summary import baseline, differences, headlines

ALPHA = 0.05
_BCA_FROM = 20  # seeds; with fewer its intervals hold the truth too seldom, see docs/comparison.md


def claims(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns one entry for every guarded arm and headline figure, and for every figure whose change was asked about.

    Headlines are chosen before values are looked at. Other figures are described and no claim is made of them. The
    p-values of all claims of a report that at least six seeds stand behind are corrected together (Holm), those of
    equivalence among them.

    | edge case                          | result                              |
    |------------------------------------|-------------------------------------|
    | no baseline                        | no claims                           |
    | no seed with a value in both arms  | ``verdict`` "not measured"          |
    | one seed                           | no interval, "inconclusive"         |
    | fewer than 20 seeds                | ``bca`` None                        |
    """
    from lightning_guard.functional import statistics

    reference = baseline(document)
    if reference is None:
        return []
    margins = {
        (rule["arm"], rule["figure"]): float(rule["limit"])
        for rule in (document.get("accept") or {"rules": []})["rules"]
        if rule["kind"] == "within"
    }
    asked = dict.fromkeys(rule["figure"] for rule in (document.get("accept") or {"rules": []})["rules"])
    figures = [*headlines(document), *(key for key in asked if key in document["figures"])]
    entries: list[dict[str, Any]] = []
    tested: list[tuple[dict[str, Any], str, float]] = []
    samples = {}
    for arm in (arm["name"] for arm in document["arms"] if arm["name"] != reference):
        for figure in dict.fromkeys(figures):
            sample, margin = differences(document, figure, arm), margins.get((arm, figure))
            interval = statistics.student_interval(sample)
            bca = statistics.bca_interval(sample) if len(sample) >= _BCA_FROM else None
            entry: dict[str, Any] = {
                "arm": arm,
                "figure": figure,
                "n": len(sample),
                "difference": sum(sample) / len(sample) if sample else None,
                "interval": list(interval) if interval else None,
                "bca": list(bca) if bca else None,
                "p": statistics.student_p(sample),
                "sign_flip_p": statistics.sign_flip_p(sample),
                "holm_p": None,
                "margin": margin,
                "equivalence_p": None,
            }
            entries.append(entry)
            samples[arm, figure] = sample
            if len(sample) >= statistics.FEWEST_SEEDS:
                tested.append((entry, "holm_p", entry["p"]))
                if margin is not None:
                    tested.append((entry, "equivalence_p", statistics.equivalence_p(sample, margin) or 0.0))
    for (entry, key, _), corrected in zip(tested, statistics.holm([p for *_, p in tested]), strict=True):
        entry[key] = corrected
    number = max(len(tested), sum(bool(sample) for sample in samples.values()))
    for entry in entries:
        sample = samples[entry["arm"], entry["figure"]]
        better = document["figures"][entry["figure"]]["better"]
        equal = 1.0 if entry["equivalence_p"] is None else entry["equivalence_p"]
        entry["verdict"] = statistics.judge(sample, better, entry["holm_p"], ALPHA, equal)
        needed = statistics.seeds_needed(sample, number, ALPHA) if entry["verdict"] == "inconclusive" else None
        entry["seeds_needed"] = needed
    return entries


def telling(entry: Mapping[str, Any]) -> str:
    """Returns how many seeds would show what an inconclusive claim leaves open; nothing where it is not known."""
    if entry["verdict"] != "inconclusive" or entry["n"] < 2:
        return ""
    needed = entry["seeds_needed"]
    return f"about {needed} seeds would tell" if needed else "no number of seeds up to 1000 would tell"
