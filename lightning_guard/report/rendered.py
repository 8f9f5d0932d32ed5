"""Everything that is drawn from a report: made when it is written, and again by whoever signs or verifies it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_guard.report import annex, card, document, html, markdown, tables
from lightning_guard.report.computed import computed
from lightning_guard.report.public import PUBLIC, publishable
from lightning_guard.report.sign import signatures


def renderings(report: Mapping[str, Any], place: Path, public: bool = False) -> Iterator[tuple[str, str]]:
    """Yields the name and the text of every file that follows from ``report.json`` and the signatures in ``place``.

    Those of ``public/`` are among them where they are asked for or there already; no signature is published there,
    since it is one of the whole folder.
    """
    signed = signatures(place)
    yield "metrics.csv", tables.metrics(report)
    yield "report.md", markdown.text(report, signed)
    yield "report.html", html.page(report, signed)
    yield "card.md", card.card(report)
    yield "annex.md", annex.annex(report)
    if report.get("combinations"):
        from lightning_guard.report import matrix

        yield "combinations.csv", matrix.table(report)
    if public or (place / PUBLIC).is_dir():
        shared = json.loads(document.dump(computed(publishable(report))))
        yield f"{PUBLIC}/report.json", document.dump(shared)
        yield f"{PUBLIC}/metrics.csv", tables.metrics(shared)
        yield f"{PUBLIC}/report.md", markdown.text(shared)
        yield f"{PUBLIC}/report.html", html.page(shared)
        yield f"{PUBLIC}/card.md", card.card(shared)
        yield f"{PUBLIC}/annex.md", annex.annex(shared)
