"""The report as one page that needs nothing but itself."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_guard.report import drawing, figures, front, groups, verdict, view
from lightning_guard.report.summary import baseline

if TYPE_CHECKING:
    from markupsafe import Markup


def page(document: Mapping[str, Any]) -> str:
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
            caution=verdict.warning(document),
            changes=groups.changes(document),
            changes_about=groups.reading(document),
            data=groups.data(document),
            drawn=view.drawn(document),
            fronts=front.pictures(document),
            looks=drawing.looks(document),
            matrices=view.matrices(document),
            notes=view.notes(document),
            opening=view.opening(document),
            overview=figures.overview(document),
            pictures=figures.of_axes(document),
            provenance=view.provenance(document),
            reading=view.reading(document),
            references=front.told(document),
            sections=view.sections(document),
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
