"""The pen: colours, sheets of one width, and SVG that can stand inside a page."""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, HAIR = "#1d2433", "#596273", "#dfe3e9"

_NUMBER = re.compile(r"-?\d+\.\d{3,}")
_REFERENCE = re.compile(r"#([^)\s]+)")


class Look(NamedTuple):
    """How an arm looks in every figure: the shape repeats what the colour says."""

    colour: str
    marker: str
    path: str  # the same shape on 12 by 12 units, for lists in the page


BASELINE = Look("#737b87", "o", "M6 1a5 5 0 1 0 0 10a5 5 0 1 0 0-10z")
# At least 3:1 on white, and apart (CIE 1976 difference above 14) for every kind of colour-blindness
# (simulated after Machado et al., 2009).
GUARDED = (
    Look("#1769c2", "s", "M1.5 1.5h9v9h-9z"),
    Look("#d8620a", "^", "M6 1l5.5 10h-11z"),
    Look("#0d9f7c", "D", "M6 .5l5.5 5.5-5.5 5.5-5.5-5.5z"),
    Look("#9c2f8f", "v", "M6 11l5.5-10h-11z"),
    Look("#5c4300", "P", "M4 .5h4v3.5h3.5v4h-3.5v3.5h-4v-3.5h-3.5v-4h3.5z"),
    Look("#111d3a", "p", "M6 .5l5.5 4-2.1 6.5h-6.8l-2.1-6.5z"),
)


def looks(document: Mapping[str, Any]) -> dict[str, Look]:
    """Returns the look of every arm, the same in all figures and lists of a report."""
    guarded = [arm["name"] for arm in document["arms"] if not arm["baseline"]]
    return {
        arm["name"]: BASELINE if arm["baseline"] else GUARDED[guarded.index(arm["name"]) % len(GUARDED)]
        for arm in document["arms"]
    }


@contextmanager
def sheet(width: float, height: float) -> Iterator[Figure]:
    """Yields an empty figure of this size in points, whatever the user's matplotlib settings are.

    Widths stay below 440, so that the letters can be read on a phone.
    """
    import matplotlib.style
    from matplotlib.figure import Figure

    settings = {
        "svg.fonttype": "none",  # text stays text: small, searchable, read aloud, in the font of the page
        "svg.hashsalt": "lightning-guard",  # else identifiers are random and no two reports are equal
        "text.parse_math": False,  # a dollar sign in a name is a dollar sign
        "font.size": 10.0,
        "text.color": INK,
        "axes.edgecolor": HAIR,
        "axes.axisbelow": True,
        "grid.color": HAIR,
        "grid.linewidth": 0.8,
    }
    with matplotlib.style.context(["default", settings]), warnings.catch_warnings():
        # The browser has the letters that the measuring font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield Figure(figsize=(width / 72, height / 72), dpi=72)


def axes(figure: Figure, left: float, bottom: float, right: float, top: float) -> Axes:
    """Adds bare axes with these margins in points."""
    width, height = figure.get_size_inches() * 72
    box = (left / width, bottom / height, (width - left - right) / width, (height - bottom - top) / height)
    result = figure.add_axes(box)
    result.spines[:].set_visible(False)
    result.tick_params(length=0, labelsize=9, colors=MUTED, pad=5)
    return result


_collecting: ContextVar[list[tuple[str, Figure]] | None] = ContextVar("collecting", default=None)


@contextmanager
def collected() -> Iterator[list[tuple[str, Figure]]]:
    """Yields a list of the names and figures that are drawn inside, for who wants them in another form."""
    found: list[tuple[str, Figure]] = []
    token = _collecting.set(found)
    try:
        yield found
    finally:
        _collecting.reset(token)


def to_svg(figure: Figure, name: str, description: str) -> str:
    """Returns ``figure`` as an ``<svg>`` element for the middle of a page.

    ``description`` is what a screen reader says. Identifiers get the prefix ``name``, because a page has many
    figures; the style sheet goes, because inside a page it would apply to the whole of it.
    """
    if (found := _collecting.get()) is not None:
        found.append((name, figure))
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(stream.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")) or (child.tag.endswith("}defs") and not len(child)):
                parent.remove(child)
    used = {
        match for element in root.iter() for value in element.attrib.values() for match in _REFERENCE.findall(value)
    }
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        if attributes.get("id") not in used:
            attributes.pop("id", None)
        element.attrib = {key: _attribute(key, value, name) for key, value in attributes.items()}
    _, _, width, height = root.attrib["viewBox"].split()
    root.attrib = {
        "viewBox": f"0 0 {width} {height}",
        "role": "img",
        "aria-label": description,
        "stroke-linejoin": "round",
    }
    return ElementTree.tostring(root, encoding="unicode")


def elide(text: str, length: int) -> str:
    """Shortens ``text`` in its middle, where names of combinations differ least.

    >>> elide("adversarial-training+fairness", 16)
    'adversa…fairness'
    """
    if len(text) <= length:
        return text
    tail = length // 2
    return f"{text[: length - tail - 1]}\u2026{text[-tail:]}"


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Moves labels apart to at least ``gap``, in their order and within ``low`` and ``high`` where they fit.

    >>> spread([10.0, 11.0, 50.0], 12.0, 0.0, 100.0)
    [10.0, 22.0, 50.0]
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [0.0] * len(wanted)
    floor = low
    for i in order:
        placed[i] = max(wanted[i], floor)
        floor = placed[i] + gap
    ceiling = high
    for i in reversed(order):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    return placed


def _attribute(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key == "href" or "url(#" in value:
        return value.replace("#", f"#{name}-", 1)
    if key == "d":  # two digits are a hundredth of a point
        return _NUMBER.sub(lambda match: f"{float(match[0]):.2f}", value)
    if key == "style":  # the page chooses the typeface
        return "; ".join(part for part in value.split("; ") if not part.startswith("font-family"))
    return value
