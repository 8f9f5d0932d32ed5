"""The report as one page that needs nothing but itself."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_guard.report import attacked, composed, drawing, figures, front, groups, matrix, verdict, view
from lightning_guard.report.summary import baseline

if TYPE_CHECKING:
    from markupsafe import Markup

    from lightning_guard.report.sign import Signature


def page(document: Mapping[str, Any], signatures: Sequence[Signature] = ()) -> str:
    """Returns ``report.html``: no network, no script, and every name escaped."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    # The drawings are trusted because drawing.to_svg writes them with an XML serialiser, names included.
    environment.filters["drawn"] = Markup
    environment.filters["breakable"] = breakable
    environment.filters["option"] = view.option
    environment.filters["elide"] = drawing.elide
    template = environment.from_string(Path(__file__).with_name("template.html").read_text(encoding="utf-8"))
    return (
        template.render(
            document=document,
            baseline=baseline(document),
            answers=verdict.answers(document),
            caution=verdict.certainty(document),
            changes=groups.changes(document),
            changes_about=groups.reading(document),
            combined=matrix.pictures(document),
            combined_about=matrix.ABOUT,
            combined_heads=matrix.heads(document) if document.get("combinations") else [],
            combined_rows=matrix.rows(document, 3) if document.get("combinations") else [],
            combined_refused=matrix.refused(document),
            composition=composed.composition(document),
            data=groups.data(document),
            drawn=view.drawn(document),
            fronts=front.pictures(document),
            lira=attacked.table(document),
            lira_about=attacked.about(document),
            lira_pictures=attacked.pictures(document),
            lira_title=attacked.TITLE,
            looks=drawing.looks(document),
            matched=groups.matched(document),
            matched_about=groups.matched_reading(document) if document.get("matched") else "",
            matrices=view.matrices(document),
            notes=view.notes(document),
            opening=view.opening(document),
            outcome=verdict.outcome(document),
            overview=figures.overview(document),
            pictures=figures.of_axes(document),
            provenance=view.provenance(document),
            reading=view.reading(document),
            references=front.told(document),
            sections=view.sections(document),
            signatures=signatures,
            verdicts=verdict.verdicts(document),
        )
        + "\n"
    )


def breakable(name: str) -> Markup:
    """Returns ``name``, escaped, with places to break a line where its parts are joined.

    >>> print(breakable("dp-sgd+fairness"))
    dp-<wbr>sgd+<wbr>fairness
    """
    from markupsafe import Markup

    # A number stays whole: "max_gap=0.05".
    return Markup("<wbr>").join(re.split(r"(?<=[-+_/])(?=\w)|(?<=\.)(?=[^\W\d])", name))
