"""What the seeds say: per arm, and paired with the baseline. Nothing is claimed here, see claims.

Pure functions on a normalised document (see :mod:`lightning_guard.report.document`).
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

AXES = ("task", "privacy", "robustness", "certificate", "fairness", "explanation", "efficiency", "cost")

FEWEST_SHOWN = 3  # seeds: an interval of two is twenty times as wide as what it is of

# Recorded hash, what is wrong when it differs, what is unknown when it is absent.
_SHARED = (
    ("initial_weights_sha256", "did not start from the same weights", "started from the same weights"),
    ("data_order_sha256", "were not trained on the same data order", "trained on the same data order"),
)


def summarise(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns one entry a figure and arm, in the order of display.

    ``mean``, ``sd`` (of a sample, n - 1), ``min`` and ``max`` are over the ``n`` seeds with a value.
    ``paired`` is this arm minus the baseline on the seeds where both have one, with the 95% interval of its mean over
    seeds from three of them on; ``None`` for the baseline.

    | edge case                       | result                                               |
    |---------------------------------|------------------------------------------------------|
    | no value in any seed            | ``n`` 0, every statistic ``None``                    |
    | one value                       | ``sd`` ``None``                                      |
    | no seed with a value in both    | ``paired`` with ``n`` 0, word "not measured"         |
    | no arm is the baseline          | ``paired`` ``None`` for all                          |
    """
    from lightning_guard.functional.statistics import student_interval

    found = _by_run(document)
    reference = baseline(document)
    entries = []
    for figure in in_order(document["figures"]):
        for arm in document["arms"]:
            mine = found[figure, arm["name"]]
            sample = [mine[seed] for seed in sorted(mine)]
            paired = None
            if reference is not None and arm["name"] != reference:
                apart = _apart(mine, found[figure, reference])
                interval = student_interval(apart) if len(apart) >= FEWEST_SHOWN else None
                paired = _paired(apart, document["figures"][figure]["better"], interval)
            entries.append(
                {
                    "figure": figure,
                    "arm": arm["name"],
                    "n": len(sample),
                    "mean": statistics.fmean(sample) if sample else None,
                    "sd": float(statistics.stdev(sample)) if len(sample) > 1 else None,
                    "min": min(sample, default=None),
                    "max": max(sample, default=None),
                    "paired": paired,
                }
            )
    return entries


def word(differences: Sequence[float], better: str | None) -> str:
    """Says what paired differences show, and no more.

    "better" and "worse" ("higher" and "lower" where neither is better) need every seed to agree in sign.
    A difference of exactly 0 agrees with no sign.

    >>> word([0.2, 0.1, 0.3], "higher"), word([0.2, 0.1, 0.3], "lower"), word([0.2, -0.1], "higher")
    ('better', 'worse', 'seeds disagree')
    """
    if not differences:
        return "not measured"
    if len(differences) < 2:
        return "one seed"
    if all(difference == 0 for difference in differences):
        return "same"
    up, down = ("higher", "lower") if better is None else ("better", "worse")
    if better == "lower":
        up, down = down, up
    if all(difference > 0 for difference in differences):
        return up
    if all(difference < 0 for difference in differences):
        return down
    return "seeds disagree"


def values(document: Mapping[str, Any], figure: str, arm: str) -> dict[int, float]:
    """Returns the values of a figure of an arm, by seed."""
    return {
        run["seed"]: run["values"][figure]
        for run in sorted(document["runs"], key=lambda run: run["seed"])
        if run["arm"] == arm and run["values"].get(figure) is not None
    }


def differences(document: Mapping[str, Any], figure: str, arm: str) -> list[float]:
    """Returns an arm minus the baseline, in the order of the seeds that have a value in both."""
    reference = baseline(document)
    return [] if reference is None else _apart(values(document, figure, arm), values(document, figure, reference))


def _apart(mine: Mapping[int, float], theirs: Mapping[int, float]) -> list[float]:
    return [mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())]


def _by_run(document: Mapping[str, Any]) -> dict[tuple[str, str], dict[int, float]]:
    found: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for run in document["runs"]:
        for figure, value in run["values"].items():
            if value is not None:
                found[figure, run["arm"]][run["seed"]] = value
    return found


def checks(document: Mapping[str, Any]) -> list[str]:
    """Returns a sentence for everything that the arms of a seed do not share, and for every missing run."""
    runs = {(run["arm"], run["seed"]): run for run in document["runs"]}
    arms = [arm["name"] for arm in document["arms"]]
    lines = []
    for arm in arms:
        missing = [seed for seed in document["provenance"]["seeds"] if (arm, seed) not in runs]
        if missing:
            lines.append(f"There is no run of {arm} for {_seeds(missing)}.")
    for key, fault, promise in _SHARED:
        apart: dict[tuple[str, tuple[str, ...]], list[int]] = defaultdict(list)
        unknown: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for seed in document["provenance"]["seeds"]:
            hashes = {arm: runs[arm, seed][key] for arm in arms if (arm, seed) in runs}
            known = {arm: value for arm, value in hashes.items() if value is not None}
            if len(known) < len(hashes):
                unknown[tuple(arm for arm in hashes if arm not in known)].append(seed)
            if known:
                reference = baseline(document)
                first = reference if reference is not None and reference in known else next(iter(known))
                different = tuple(arm for arm, value in known.items() if value != known[first])
                if different:
                    apart[first, different].append(seed)
        for (first, who), seeds in apart.items():
            verb = "differs" if len(who) == 1 else "differ"
            lines.append(f"The arms {fault} for {_seeds(seeds)}: {', '.join(who)} {verb} from {first}.")
        for who, seeds in unknown.items():
            lines.append(f"It was not recorded whether {', '.join(who)} {promise} for {_seeds(seeds)}.")
    return lines


def baseline(document: Mapping[str, Any]) -> str | None:
    """Returns the name of the unguarded arm that the others are compared with, or ``None``."""
    return next((arm["name"] for arm in document["arms"] if arm["baseline"]), None)


def in_order(described: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns the keys of figures, curves or bars in the order of display: known axes first, then as given."""

    def place(key: str) -> tuple[int, str, int, str]:
        axis = described[key]["axis"]
        known = AXES.index(axis) if axis in AXES else len(AXES)
        return known, "" if axis in AXES else axis, described[key]["order"], key

    return sorted(described, key=place)


def headlines(document: Mapping[str, Any]) -> list[str]:
    """Returns the figures of the verdict: those marked ``headline``, or else the first of each axis.

    The choice is made before the values are looked at, so that it cannot flatter an arm. Figures without
    a value in any arm are left out.
    """
    measured = {key for run in document["runs"] for key, value in run["values"].items() if value is not None}
    chosen: list[str] = []
    for keys in by_axis(document["figures"]).values():
        keys = [key for key in keys if key in measured]
        marked = [key for key in keys if document["figures"][key].get("headline")]
        directed = [key for key in keys if document["figures"][key]["better"]]
        chosen += marked or directed[:1] or keys[:1]
    return chosen


def by_axis(described: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Groups the keys of figures, curves or bars by axis, in the order of display."""
    groups: dict[str, list[str]] = {}
    for key in in_order(described):
        groups.setdefault(described[key]["axis"], []).append(key)
    return groups


def _paired(differences: Sequence[float], better: str | None, interval: tuple[float, float] | None) -> dict[str, Any]:
    return {
        "n": len(differences),
        "mean": statistics.fmean(differences) if differences else None,
        "lowest": min(differences, default=None),
        "highest": max(differences, default=None),
        "interval": list(interval) if interval else None,
        "word": word(differences, better),
    }


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'' if len(seeds) == 1 else 's'} {', '.join(map(str, seeds))}"
