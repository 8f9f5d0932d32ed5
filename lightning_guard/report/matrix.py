"""What safeguards do together beside what each does alone: a matrix a figure, as a drawing and as a table."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lightning_guard.report import drawing
from lightning_guard.report.drawing import HAIR, INK, MUTED, elide
from lightning_guard.report.figures import Picture, directed
from lightning_guard.report.summary import baseline, by_axis, headlines
from lightning_guard.report.tables import harmless
from lightning_guard.report.units import change, shown

ABOUT = (
    "Rows and columns are safeguards, the diagonal is each alone, and the other cells are two at once. The second line "
    "is the difference from the better of the two alone. \u25b2 better than either alone, \u25bc worse than either, "
    "by more than the choice of test examples explains; no mark: between them, or too close to tell. A line runs from "
    "the worse of the two alone, left, to the better, right, and the dot on it is both at once."
)
COMPARED = (
    "In brackets the difference from the best of them alone: \u25b2 better than any, \u25bc worse than any of them."
)
_ALSO = ("privacy/epsilon", "efficiency/sparsity", "efficiency/compressed_bytes")  # told beside the headlines
_GOOD, _BAD = "#1769c2", "#d8620a"
_CLOSE = {"fraction": 5e-3}  # too close to tell, where nothing says how sure a figure is; of others, a share
_CLOSE_SHARE = 0.01


class Entry(NamedTuple):
    """Some safeguards at once. ``best`` and ``worst`` are those of its parts alone; ``word`` compares with both."""

    parts: tuple[str, ...]
    value: float | None
    best: float | None
    worst: float | None
    word: str  # alone, better, between, worse, refused, not measured
    close: float = 0.0  # differences up to this cannot be told

    @property
    def change(self) -> float | None:
        """From the better of its parts alone; 0 where figures are the same to three digits."""
        if self.value is None or self.best is None:
            return None
        apart = self.value - self.best
        return 0.0 if abs(apart) < 1e-3 * abs(self.best) else apart


def keys(document: Mapping[str, Any]) -> list[str]:
    """Returns the figures that a matrix is drawn of: the first headline of each axis, epsilon, sparsity and size."""
    first: dict[str, str] = {}
    for key in headlines(document):
        figure = document["figures"][key]
        if figure["axis"] != "cost" and figure["better"]:
            first.setdefault(figure["axis"], key)
    measured = {key for run in document["runs"] for key, value in run["values"].items() if value is not None}
    chosen = {*first.values(), *(key for key in _ALSO if key in document["figures"] and key in measured)}
    return [key for group in by_axis(document["figures"]).values() for key in group if key in chosen]


def entries(document: Mapping[str, Any], key: str) -> list[Entry]:
    """Returns each safeguard alone, then all that were combined, in the order of ``combinations``.

    | case                                     | result                                              |
    |------------------------------------------|-----------------------------------------------------|
    | refused                                  | ``refused``, without a value                        |
    | no value, or none of any part alone      | ``not measured``                                    |
    | a part without a value (epsilon of none) | compared with the parts that have one               |
    | too close to tell from a part            | ``between``                                         |

    Too close is half of the interval that the test set leaves of the figure, its mean over seeds; where there is none,
    half a point or a hundredth.
    """
    told, figure = document["combinations"], document["figures"][key]
    means = {entry["arm"]: entry["mean"] for entry in document["summary"] if entry["figure"] == key}
    found = [Entry((part,), means[part], means[part], means[part], "alone") for part in told["parts"]]
    for one in told["arms"]:
        parts, value = tuple(one["parts"]), means[one["arm"]]
        alone = sorted(known for part in parts if (known := means[part]) is not None)
        if value is None or not alone:
            found.append(Entry(parts, value, None, None, "not measured"))
            continue
        worst, best = (alone[0], alone[-1]) if figure["better"] == "higher" else (alone[-1], alone[0])
        sign = 1.0 if figure["better"] == "higher" else -1.0
        slack = _slack(document, key, one["arm"])
        if slack is None:
            slack = _CLOSE.get(figure["unit"], _CLOSE_SHARE * max(abs(best), abs(worst)))
        word = "better" if sign * (value - best) > slack else "worse" if sign * (worst - value) > slack else "between"
        found.append(Entry(parts, value, best, worst, word, slack))
    return found + [Entry(tuple(one["parts"]), None, None, None, "refused") for one in told["refused"]]


def _slack(document: Mapping[str, Any], key: str, arm: str) -> float | None:
    spans = [run["intervals"].get(key) for run in document["runs"] if run["arm"] == arm]
    known = [(high - low) / 2 for low, high in (span for span in spans if span and None not in span)]
    return sum(known) / len(known) if known else None


def pictures(document: Mapping[str, Any]) -> list[Picture]:
    """Draws a matrix of every figure that there is one of; none where nothing was combined."""
    return [_picture(document, key) for key in keys(document)] if document.get("combinations") else []


def _picture(document: Mapping[str, Any], key: str) -> Picture:
    figure, parts = document["figures"][key], document["combinations"]["parts"]
    unit, cells = figure["unit"], {frozenset(entry.parts): entry for entry in entries(document, key)}
    size, high, left = len(parts), 44.0, 84.0
    wide = min(84.0, 344.0 / size)
    beyond = max((_beyond(entry) for entry in cells.values()), default=0.0) or 1.0
    said = []
    with drawing.sheet(left + wide * size + 6, high * size + 34) as page:
        axes = drawing.axes(page, left, 30, 6, 4)
        axes.set_xlim(0, size)
        axes.set_ylim(size, 0)
        axes.set_xticks([i + 0.5 for i in range(size)], [_broken(part) for part in parts], color=INK)
        axes.set_yticks([i + 0.5 for i in range(size)], [elide(part, 15) for part in parts], color=INK)
        for row, one in enumerate(parts):
            for column, other in enumerate(parts[: row + 1]):
                entry = cells.get(frozenset((one, other)))
                if entry is not None:
                    _cell(axes, column, row, entry, unit, _beyond(entry) / beyond)
                    said.append(_said(entry, unit))
        for line, (name, value) in enumerate(_beside(document, key)):
            axes.annotate(
                f"{name}  {shown(value, unit)}",
                (1, 1),
                (-2, -11 - 13 * line),
                xycoords="axes fraction",
                textcoords="offset points",
                ha="right",
                fontsize=9,
                color=MUTED,
            )
        described = "; ".join([*said, *(f"{name} {shown(value, unit)}" for name, value in _beside(document, key))])
        number = sorted(document["figures"]).index(key)
        svg = drawing.to_svg(
            page, f"combined{number}", f"{figure['label']}, of safeguards alone and in pairs: {described}."
        )
    return Picture(figure["label"], directed({**figure, "label": ""}, "\u2191", "\u2193").strip(), svg)


def _cell(axes: Any, column: int, row: int, entry: Entry, unit: str, strength: float) -> None:
    from matplotlib.patches import Rectangle

    colour = {"better": _GOOD, "worse": _BAD}.get(entry.word, "white")
    alpha = 0.10 + 0.22 * strength if entry.word in ("better", "worse") else 1.0
    # Edges and hatches in a grey that also prints: nothing is said by colour alone.
    axes.add_patch(Rectangle((column, row), 1, 1, facecolor=colour, alpha=alpha, linewidth=0))
    style: dict[str, Any] = {"hatch": "////", "edgecolor": HAIR} if entry.word == "refused" else {"edgecolor": MUTED}
    thick = 1.6 if entry.word == "alone" else 0.5
    axes.add_patch(Rectangle((column, row), 1, 1, fill=False, linewidth=thick, **style))
    mark = {"better": "\u25b2 ", "worse": "\u25bc "}.get(entry.word, "")
    first = "refused" if entry.word == "refused" else shown(entry.value, unit)
    known = entry.change is not None and entry.word != "alone"
    second = mark + change(entry.change, unit, like=entry.value) if known else ""
    weight = "bold" if entry.word == "alone" else "normal"
    if second:
        _gauge(axes, column, row, entry)
    for text, place, letters in ((first, 0.29 if second else 0.5, 9.5), (second, 0.58, 8.0)):
        colour = MUTED if entry.word in ("refused", "not measured") else INK
        axes.text(
            column + 0.5, row + place, text, ha="center", va="center", fontsize=letters, color=colour, weight=weight
        )


def _gauge(axes: Any, column: int, row: int, entry: Entry) -> None:
    """A line from the worse of its parts alone to the better, and a dot for what they do together."""
    assert entry.value is not None
    assert entry.best is not None
    assert entry.worst is not None
    if abs(entry.best - entry.worst) <= entry.close:
        return
    share = (entry.value - entry.worst) / (entry.best - entry.worst)
    place = column + 0.5 + 0.7 * (min(1.12, max(-0.12, share)) - 0.5)
    axes.hlines(row + 0.83, column + 0.15, column + 0.85, colors=MUTED, linewidth=0.8)
    axes.plot([place], [row + 0.83], marker="o", markersize=4, markerfacecolor=INK, markeredgewidth=0)


def _beyond(entry: Entry) -> float:
    """How far outside of what its parts do alone."""
    if entry.value is None or entry.best is None or entry.worst is None:
        return 0.0
    return {"better": abs(entry.value - entry.best), "worse": abs(entry.value - entry.worst)}.get(entry.word, 0.0)


def _beside(document: Mapping[str, Any], key: str) -> list[tuple[str, float | None]]:
    """What a matrix of pairs has no cell for: nothing guarded, and everything at once."""
    means = {entry["arm"]: entry["mean"] for entry in document["summary"] if entry["figure"] == key}
    told, reference = document["combinations"], baseline(document)
    found: list[tuple[str, float | None]] = [] if reference is None else [("unguarded", means[reference])]
    whole = [one["arm"] for one in told["arms"] if len(one["parts"]) == len(told["parts"]) > 2]
    return found + [("all at once", means[arm]) for arm in whole]


def _said(entry: Entry, unit: str) -> str:
    name = " with ".join(entry.parts)
    if entry.word in ("refused", "not measured"):
        return f"{name} {entry.word}"
    if entry.word == "alone":
        return f"{name} alone {shown(entry.value, unit)}"
    told = {"better": "better than either alone", "worse": "worse than either alone", "between": "between them"}
    return f"{name} {shown(entry.value, unit)}, {told[entry.word]}"


def _broken(name: str, length: int = 12) -> str:
    if len(name) <= length:
        return name
    head, dash, tail = elide(name, 2 * length).partition("-")
    return f"{head}{dash}\n{elide(tail, length)}" if tail else elide(name, length)


# In words ------------------------------------------------------------------------------------------------------------


def heads(document: Mapping[str, Any]) -> list[str]:
    """Returns the heads of :func:`rows`."""
    return ["Together", *(document["figures"][key]["label"] for key in keys(document))]


def rows(document: Mapping[str, Any], least: int = 2) -> list[list[str]]:
    """Returns every combination of at least so many safeguards: value, and change from the best of them alone."""
    columns = [(key, document["figures"][key]["unit"], entries(document, key)) for key in keys(document)]
    told = []
    for place, entry in enumerate(columns[0][2] if columns else ()):
        if len(entry.parts) >= least:
            cells = [_words(found[place], unit) for _, unit, found in columns]
            told.append([" + ".join(entry.parts), *cells])
    return told


def _words(entry: Entry, unit: str) -> str:
    value = entry.word if entry.word == "refused" else shown(entry.value, unit)
    mark = {"better": " \u25b2", "worse": " \u25bc"}.get(entry.word, "")
    return value + (f" ({change(entry.change, unit, like=entry.value)}{mark})" if entry.change is not None else "")


def refused(document: Mapping[str, Any]) -> list[tuple[str, Sequence[str]]]:
    """Returns what was not trained, and why."""
    told = document.get("combinations") or {"refused": []}
    return [(" + ".join(one["parts"]), one["reasons"]) for one in told["refused"]]


def table(document: Mapping[str, Any]) -> str:
    """Returns ``combinations.csv``: a line a combination and figure. A value that is not estimable is empty."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["parts", "figure", "value", "best_alone", "worst_alone", "compared", "unit", "reasons"])
    reasons = dict(refused(document))
    for key in keys(document):
        for entry in entries(document, key):
            name = " + ".join(entry.parts)
            numbers = entry.value, entry.best, entry.worst
            unit, why = document["figures"][key]["unit"], " ".join(reasons.get(name, ()))
            writer.writerow([harmless(name), harmless(key), *numbers, entry.word, harmless(unit), harmless(why)])
    return stream.getvalue()
