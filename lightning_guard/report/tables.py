"""The measured values as a long table: one line an arm, seed and figure."""

from __future__ import annotations

import csv
import io
import unicodedata
from collections.abc import Mapping
from typing import Any

from lightning_guard.report.summary import in_order


def metrics(document: Mapping[str, Any]) -> str:
    """Returns ``metrics.csv``: arm, seed, figure, value, unit. A value that is not estimable is empty.

    What is of an arm and of no seed, as offline LiRA is, has none.
    """
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["arm", "seed", "figure", "value", "unit"])
    arms = [arm["name"] for arm in document["arms"]]
    for run in sorted(document["runs"], key=lambda run: (arms.index(run["arm"]), run["seed"])):
        for figure in in_order(document["figures"]):
            if figure in run["values"]:
                value, unit = run["values"][figure], document["figures"][figure]["unit"]
                # csv writes a float by repr, so a number comes back bit for bit, and None as nothing.
                writer.writerow([harmless(run["arm"]), run["seed"], harmless(figure), value, harmless(unit)])
    section = document.get("lira") or {"arms": [], "figures": []}
    for one in section["arms"]:
        for item in section["figures"]:
            if item["key"] in one["values"]:
                told = one["values"][item["key"]], harmless(item["unit"])
                writer.writerow([harmless(one["arm"]), "", harmless(item["key"]), *told])
    return stream.getvalue()


def harmless(text: str) -> str:
    """Returns a name that a spreadsheet reads as text and not as a formula.

    >>> harmless("=1+1"), harmless("dp-sgd")
    ("'=1+1", 'dp-sgd')
    """
    # Spreadsheets take full-width signs for signs, and some trim spaces first.
    first = unicodedata.normalize("NFKC", text).lstrip()[:1]
    return f"'{text}" if first in ("=", "+", "-", "@") and first else text
