"""What a report says beyond what was measured: made from the runs alone, and made again by whoever verifies it."""

from __future__ import annotations

from typing import Any

from lightning_guard.report import claims, front, gates, summary


def computed(document: dict[str, Any]) -> dict[str, Any]:
    """Returns ``document`` with its summary, checks, claims, gates and fronts, whatever was there replaced."""
    document["summary"] = summary.summarise(document)
    document["checks"] = summary.checks(document)
    document["claims"] = claims.claims(document)
    document["gates"] = gates.gates(document)
    document["fronts"] = front.fronts(document)
    return document
