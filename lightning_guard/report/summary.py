"""What the seeds say: per arm, and paired with the baseline. No significance is claimed.

Pure functions on a normalised document (see :mod:`lightning_guard.report.document`).
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

AXES = ("task", "robustness", "certificate", "fairness", "efficiency", "cost")

# Recorded hash, what is wrong when it differs, what is unknown when it is absent.
_SHARED = (
    ("initial_weights_sha256", "did not start from the same weights", "started from the same weights"),
    ("data_order_sha256", "were not trained on the same data order", "trained on the same data order"),
)


def summarise(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns one entry a figure and arm, in the order of display.

    ``mean``, ``sd`` (of a sample, n - 1), ``min`` and ``max`` are over the ``n`` seeds with a value.
    ``paired`` is this arm minus the baseline on the seeds where both have one; ``None`` for the baseline.

    | edge case                       | result                                               |
    |---------------------------------|------------------------------------------------------|
    | no value in any seed            | ``n`` 0, every statistic ``None``                    |
    | one value                       | ``sd`` ``None``                                      |
    | no seed with a value in both    | ``paired`` with ``n`` 0, word "not measured"         |
    | no arm is the baseline          | ``paired`` ``None`` for all                          |
    """
    values: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for run in document["runs"]:
        for figure, value in run["values"].items():
            if value is not None:
                values[figure, run["arm"]][run["seed"]] = value

    reference = baseline(document)
    entries = []
    for figure in in_order(document["figures"]):
        for arm in document["arms"]:
            mine = values[figure, arm["name"]]
            sample = [mine[seed] for seed in sorted(mine)]
            paired = None
            if reference is not None and arm["name"] != reference:
                theirs = values[figure, reference]
                differences = [mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())]
                paired = _paired(differences, document["figures"][figure]["better"])
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


def smallest_p(seeds: int) -> float:
    """Returns the smallest two-sided p-value of a sign-flip test on ``seeds`` pairs: ``2 / 2^n``, at most 1.

    >>> smallest_p(3), smallest_p(6)
    (0.25, 0.03125)
    """
    return min(1.0, 2.0 / 2.0**seeds)


def caution(seeds: int) -> str:
    """Returns the sentence that says what ``seeds`` paired seeds cannot show."""
    count = f"{seeds} seed{'' if seeds == 1 else 's'}"
    p = smallest_p(seeds)
    if p > 0.05:
        return (
            f"No significance is claimed: with {count}, a two-sided sign-flip test cannot give a p-value below {p:.3g}."
        )
    return (
        f"No significance is claimed: the words only say whether every seed agrees. With {count}, a "
        f"two-sided sign-flip test of one figure could at best give a p-value of {p:.2g}, before any "
        "correction for the number of figures."
    )


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


def _paired(differences: Sequence[float], better: str | None) -> dict[str, Any]:
    return {
        "n": len(differences),
        "mean": statistics.fmean(differences) if differences else None,
        "lowest": min(differences, default=None),
        "highest": max(differences, default=None),
        "word": word(differences, better),
    }


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'' if len(seeds) == 1 else 's'} {', '.join(map(str, seeds))}"
