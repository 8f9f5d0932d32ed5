"""What a report shows of offline LiRA: a table of the arms, the curves in one figure, groups and classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_guard.report import figures, rocs
from lightning_guard.report.figures import Picture
from lightning_guard.report.groups import Listing
from lightning_guard.report.units import shown
from lightning_guard.report.view import between

TITLE = "Reference models: offline LiRA"
_CURVES = {"privacy/lira_roc": f"lira{rocs.FOUND}", "privacy/allowed": f"lira{rocs.ALLOWED}"}


def table(document: Mapping[str, Any]) -> Listing | None:
    """Returns the figures by arm, each with its interval; none if nothing was attacked so."""
    section = document.get("lira")
    if not section or not section["figures"]:
        return None
    rows = []
    for item in section["figures"]:
        key, unit = item["key"], item["unit"]
        cells = []
        for one in section["arms"]:
            low, high = one["intervals"].get(key) or (None, None)
            span = between(shown(low, unit), shown(high, unit)) if None not in (low, high) else ""
            cells.append((shown(one["values"].get(key), unit), span))
        rows.append((f"{item['label']} ({item['better']} is better)", cells))
    return Listing(["Figure", *(one["arm"] for one in section["arms"])], rows)


def about(document: Mapping[str, Any]) -> list[str]:
    """Returns how the figures are made, and what is to be said of single arms."""
    section = document.get("lira")
    if not section:
        return []
    notes: dict[str, list[str]] = {}
    for one in section["arms"]:
        for note in one["notes"]:
            notes.setdefault(note, []).append(one["arm"])
    told = [f"{item['label']}: {item['about']}" for item in section["figures"]]
    return [section["about"], *told, *(f"{note} ({', '.join(arms)})" for note, arms in notes.items())]


def pictures(document: Mapping[str, Any]) -> list[Picture]:
    """Draws the curves of all arms with what their claims allow, and the attack on each group and class."""
    section = document.get("lira")
    if not section:
        return []
    parts = {
        kind: {_CURVES.get(item["key"], item["key"]): {**item, "axis": "lira"} for item in section[kind]}
        for kind in ("curves", "bars")
    }
    runs = [
        {
            "arm": one["arm"],
            "seed": section["seed"],
            "curves": {_CURVES.get(key, key): curve for key, curve in one["curves"].items()},
            "bars": one["bars"],
            "doubts": {},
        }
        for one in section["arms"]
    ]
    drawn = {**document, **parts, "runs": runs}
    found = [rocs.roc(drawn, "lira")]
    found += [figures.bars(drawn, key, f"lira-bars{number}") for number, key in enumerate(parts["bars"])]
    return [picture for picture in found if picture]
