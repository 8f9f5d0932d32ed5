"""Evidence from a comparison: plain data in, four files out. Knows neither torch nor any safeguard.

>>> from lightning_guard.report import write_report  # doctest: +SKIP
>>> write_report(results, "evidence")  # doctest: +SKIP
PosixPath('evidence/report.html')
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_guard.report.document import ReportError

__all__ = ["ReportError", "load_report", "write_report"]


def write_report(results: Mapping[str, Any], folder: str | os.PathLike[str], publishable: bool = False) -> Path:
    """Writes ``report.json``, ``metrics.csv``, ``report.md`` and ``report.html`` and returns the page's path.

    ``results`` follows ``schema.json`` beside this module; its ``summary``, ``checks``, ``claims``, ``gates`` and
    ``fronts`` are computed here. ``publishable`` writes a second set into ``public/``, without what names examples.
    The same results give the same bytes. Each file is replaced in one step, the truth (``report.json``) first,
    so that a fault in a drawing cannot lose what was measured.

    Raises:
        ReportError: if ``results`` is not a version 1 comparison; names every problem, and nothing is written.
    """
    from lightning_guard.report import document
    from lightning_guard.report.computed import computed
    from lightning_guard.report.rendered import renderings

    report = computed(document.prepare(results))
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    text = document.dump(report)
    document.write(place / "report.json", text)
    report = json.loads(text)  # in the order of the file, so that whoever draws it again draws the same
    for name, text in renderings(report, place, publishable):
        (place / name).parent.mkdir(exist_ok=True)
        document.write(place / name, text)
    return place / "report.html"


def load_report(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads the ``report.json`` that :func:`write_report` left in ``folder``.

    Raises:
        ReportError: if there is none, it is no JSON, or another version of the schema; says what to do.
    """
    from lightning_guard.report.document import load

    return load(Path(folder, "report.json"))
