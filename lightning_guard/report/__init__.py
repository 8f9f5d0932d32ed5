"""Evidence from a comparison: plain data in, four files out. Knows neither torch nor any safeguard.

>>> from lightning_guard.report import write_report  # doctest: +SKIP
>>> write_report(results, "evidence")  # doctest: +SKIP
PosixPath('evidence/report.html')
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_guard.report.document import ReportError

__all__ = ["ReportError", "load_report", "write_report"]


def write_report(results: Mapping[str, Any], folder: str | os.PathLike[str]) -> Path:
    """Writes ``report.json``, ``metrics.csv``, ``report.md`` and ``report.html`` and returns the page's path.

    ``results`` follows ``schema.json`` beside this module; its ``summary``, ``checks`` and ``fronts`` are computed
    here.
    The same results give the same bytes. Each file is replaced in one step, the truth (``report.json``) first,
    so that a fault in a drawing cannot lose what was measured.

    Raises:
        ReportError: if ``results`` is not a version 1 comparison; names every problem, and nothing is written.
    """
    from lightning_guard.report import document, front, html, markdown, summary, tables

    report = document.prepare(results)
    report["summary"] = summary.summarise(report)
    report["checks"] = summary.checks(report)
    report["fronts"] = front.fronts(report)
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    renderers = {
        "report.json": document.dump,
        "metrics.csv": tables.metrics,
        "report.md": markdown.text,
        "report.html": html.page,
    }
    for name, render in renderers.items():
        document.write(place / name, render(report))
    return place / "report.html"


def load_report(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads the ``report.json`` that :func:`write_report` left in ``folder``.

    Raises:
        ReportError: if there is none, it is no JSON, or another version of the schema; says what to do.
    """
    from lightning_guard.report.document import load

    return load(Path(folder, "report.json"))
