"""The figures of a report, each with a text that says what it shows, written from the same numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lightning_guard.report import drawing, marks
from lightning_guard.report.drawing import MUTED, elide
from lightning_guard.report.summary import baseline, by_axis, headlines
from lightning_guard.report.units import change, scale, shown


class Picture(NamedTuple):
    """A drawn figure. ``legend`` says that the drawing itself does not name the arms."""

    title: str
    about: str
    svg: str
    legend: bool = False


def overview(document: Mapping[str, Any]) -> list[Picture]:
    """Draws each headline figure as distances from the baseline: one small panel a figure, one row an arm."""
    entries, reference = _entries(document), baseline(document)
    panels = [key for key in headlines(document) if reference and entries[key, reference]["n"]]
    panels = [
        key for key in panels if any(entries[key, arm["name"]]["n"] for arm in document["arms"] if not arm["baseline"])
    ]
    return [_panel(document, key, number) for number, key in enumerate(panels)]


def of_axes(document: Mapping[str, Any]) -> dict[str, list[Picture]]:
    """Draws, for every axis, its bars, its curves, and the task's headline against its own."""
    pictures: dict[str, list[Picture | None]] = {}
    swept = {(front["x"], front["y"]) for front in document.get("fronts", ())}
    from lightning_guard.report import rocs  # which draws by what is here

    for axis in by_axis(document["curves"]):
        pictures.setdefault(axis, []).append(rocs.roc(document, axis))
    for kind, draw in (("bars", bars), ("curves", curves)):
        for axis, keys in by_axis(document[kind]).items():
            pictures.setdefault(axis, []).extend(draw(document, key) for key in keys if not rocs.is_part(key))
    first: dict[str, str] = {}
    for key in headlines(document):
        first.setdefault(document["figures"][key]["axis"], key)
    if task := first.pop("task", None):
        for axis, key in first.items():
            if (key, task) not in swept:  # a front shows it already, and more
                pictures.setdefault(axis, []).append(trade_off(document, key, task))
    return {axis: [picture for picture in drawn if picture] for axis, drawn in pictures.items()}


def bars(document: Mapping[str, Any], key: str, called: str = "") -> Picture | None:
    """Draws one value a category and arm as dots, so that the seeds can be seen; ``called`` names the drawing."""
    spec, looks = document["bars"][key], drawing.looks(document)
    unit = spec.get("y_unit", "")
    table = {
        category: {
            arm: _present(run["bars"][key][index] for run in _runs(document, arm) if key in run["bars"])
            for arm in looks
        }
        for index, category in enumerate(spec["categories"])
    }
    means = {
        category: {arm: sum(seeds) / len(seeds) for arm, seeds in arms.items() if seeds}
        for category, arms in table.items()
    }
    count = sum(map(len, means.values()))
    if not count:
        return None
    roomy = count <= 16  # else the arms of a category share a line, and a legend names them
    rows, names, heads, y = [], [], [], 0.0
    for category, arms in means.items():
        heads.append((y, category))
        for arm, mean in arms.items():
            y -= 18.0 * roomy
            rows.append(marks.Dots(y, looks[arm], table[category][arm], mean))
            names.append(arm)
        y -= 28.0
    with drawing.sheet(400, -y + 50) as page:
        axes = drawing.axes(page, 132, 40, 64 if roomy else 16, 10)
        axes.set_ylim(y + 16, 12)
        marks.dots(axes, rows, unit)
        axes.grid(axis="x")
        for place, category in heads:
            marks.write(axes, elide(category, 20), 0, place, -12, side="right", weight="bold" if roomy else "normal")
        for row, name in zip(rows, names, strict=True) if roomy else ():
            marks.write(axes, elide(name, 22), 0, row.y, -12, side="right", colour=MUTED)
            marks.write(axes, shown(row.mean, unit), 1, row.y, 12)
        marks.titles(axes, elide(spec["y_label"], 44))
        said = "; ".join(
            f"{category}: " + (", ".join(f"{arm} {shown(mean, unit)}" for arm, mean in arms.items()) or "not estimable")
            for category, arms in means.items()
        )
        svg = drawing.to_svg(page, called or _name("bars", document["bars"], key), f"{spec['label']}. {said}.")
    return Picture(spec["label"], spec["about"], svg, legend=not roomy)


def curves(document: Mapping[str, Any], key: str) -> Picture | None:
    """Draws the arms over each other: a thin line a seed, a thick one for their mean."""
    spec, looks = document["curves"][key], drawing.looks(document)
    lines = {arm: [run["curves"][key] for run in _runs(document, arm) if key in run["curves"]] for arm in looks}
    lines = {arm: own for arm, own in lines.items() if any(_present(curve["y"]) for curve in own)}
    if not lines:
        return None
    every = [curve for own in lines.values() for curve in own]
    units = spec.get("x_unit", ""), spec.get("y_unit", "")
    (wide, suffix_x), (high, suffix_y) = (
        scale(unit, max(abs(value) for curve in every for value in _present(curve[side])))
        for side, unit in zip("xy", units, strict=True)
    )
    ends, said = {}, []
    margin = 24 + 5.4 * max(len(elide(arm, 22)) for arm in lines)
    with drawing.sheet(420, 250) as page:
        axes = drawing.axes(page, 46, 40, margin, 26)
        for arm, own in lines.items():
            # Without common places there is no mean; the first seed then stands for the arm at the line's end.
            mean = _mean(own)
            for curve in own:
                marks.line(
                    axes,
                    _over(curve["x"], wide),
                    _over(curve["y"], high),
                    looks[arm].colour,
                    0.9 if mean else 1.4,
                    0.4 if mean else 0.8,
                )
            if mean:
                marks.line(axes, _over(mean["x"], wide), _over(mean["y"], high), looks[arm].colour, 2.2, 1.0)
            for curve in (mean, *own):
                points = [(x, y) for x, y in zip(curve["x"], curve["y"], strict=True) if y is not None] if curve else []
                if points:
                    ends[arm] = points[-1][0] / wide, points[-1][1] / high
                    said.append(
                        f"{arm} from "
                        + " to ".join(
                            f"{shown(y, units[1])} at {shown(x, units[0])}" for x, y in (points[0], points[-1])
                        )
                    )
                    break
        marks.ticks(axes.xaxis, suffix_x, 5, whole=all(x == int(x) for curve in every for x in curve["x"]))
        marks.ticks(axes.yaxis, suffix_y, 5)
        axes.grid(axis="y")
        axes.margins(x=0.0, y=0.06)
        marks.titles(axes, elide(spec["x_label"], 48), elide(spec["y_label"], 60))
        marks.name_ends(axes, ends, looks)
        svg = drawing.to_svg(page, _name("curve", document["curves"], key), f"{spec['label']}. {'; '.join(said)}.")
    doubted = [arm for arm in lines if any(key in run["doubts"] for run in _runs(document, arm))]
    about = spec["about"] + (f" Doubtful, see the notes: {', '.join(doubted)}." if doubted else "")
    return Picture(spec["label"], about, svg)


def trade_off(document: Mapping[str, Any], key: str, task: str) -> Picture | None:
    """Draws the task's headline over that of another axis: what is paid in one for the other."""
    figures, entries, looks = document["figures"], _entries(document), drawing.looks(document)
    both = {
        arm: [
            (run["values"][key], run["values"][task])
            for run in _runs(document, arm)
            if None not in (run["values"].get(key), run["values"].get(task))
        ]
        for arm in looks
    }
    both = {arm: pairs for arm, pairs in both.items() if pairs}
    if len(both) < 2:
        return None
    # The means of the tables, so that a mark and a cell never differ.
    means = {arm: (entries[key, arm]["mean"], entries[task, arm]["mean"]) for arm in both}
    (wide, suffix_x), (high, suffix_y) = (
        scale(figures[name]["unit"], max(abs(mean[side]) for mean in means.values()))
        for side, name in enumerate((key, task))
    )
    with drawing.sheet(420, 270) as page:
        axes = drawing.axes(page, 46, 40, 16, 28)
        for arm, pairs in both.items():
            x, y = means[arm]
            marks.points(axes, looks[arm], [(x / wide, y / high) for x, y in pairs], (x / wide, y / high))
        reference = baseline(document)
        if reference in means:
            style: dict[str, Any] = {"color": MUTED, "linewidth": 0.9, "dashes": (2, 3), "zorder": 0}
            axes.axvline(means[reference][0] / wide, **style)
            axes.axhline(means[reference][1] / high, **style)
        axes.margins(0.14)
        marks.widen(axes, figures[key]["unit"], figures[task]["unit"])
        axes.grid()
        marks.ticks(axes.xaxis, suffix_x, 5)
        marks.ticks(axes.yaxis, suffix_y, 5)
        marks.titles(axes, directed(figures[key], "\u2192", "\u2190"), directed(figures[task], "\u2191", "\u2193"))
        marks.name_points(axes, {arm: (x / wide, y / high) for arm, (x, y) in means.items()}, 420, reference)
        title = f"{figures[task]['label']} against {figures[key]['label']}"
        said = "; ".join(
            f"{arm} {shown(y, figures[task]['unit'])} at {shown(x, figures[key]['unit'])}"
            for arm, (x, y) in means.items()
        )
        svg = drawing.to_svg(page, _name("trade", figures, key), f"{title}. {said}.")
    about = "Small dots are seeds" + ("; the dashed lines cross at the baseline." if reference in means else ".")
    return Picture(title, about, svg)


def _panel(document: Mapping[str, Any], key: str, number: int) -> Picture:
    figure, entries, looks = document["figures"][key], _entries(document), drawing.looks(document)
    unit, reference = figure["unit"], baseline(document) or ""
    rows: list[marks.Dots] = []
    labels, said = [], []
    for arm in (arm for arm in looks if entries[key, arm]["n"]):
        mean, paired = entries[key, arm]["mean"], entries[key, arm]["paired"]
        difference = change(paired["mean"], unit, like=mean) if paired and paired["n"] else ""
        hollow = bool(paired) and paired["word"] == "seeds disagree"
        seeds = _present(run["values"].get(key) for run in _runs(document, arm))
        rows.append(marks.Dots(-float(len(rows)), looks[arm], seeds, mean, hollow))
        labels.append((arm, shown(mean, unit), difference))
        said.append(f"{arm} {shown(mean, unit)}" + (f" ({difference}, {paired['word']})" if difference else ""))
    with drawing.sheet(330, 42 * len(rows) + 26) as page:
        axes = drawing.axes(page, 8, 24, 8, 2)
        axes.set_ylim(-len(rows) + 0.65, 0.65)
        marks.dots(axes, rows, unit, entries[key, reference]["mean"])
        for row, (arm, value, difference) in zip(rows, labels, strict=True):
            marks.write(axes, elide(arm, 26), 0, row.y, -8, 16, size=11)
            marks.write(axes, value, 1, row.y, -68, 16, side="right", size=11)
            marks.write(axes, difference, 1, row.y, 8, 16, side="right", colour=MUTED, size=11)
        alt = f"{figure['label']}, mean over seeds and difference from {reference}: {'; '.join(said)}."
        svg = drawing.to_svg(page, f"overview{number}", alt)
    return Picture(figure["label"], f"{figure['better']} is better" if figure["better"] else "", svg)


def _mean(lines: Sequence[Mapping[str, list[float | None]]]) -> dict[str, list[float | None]] | None:
    """Returns the mean over seeds where all were measured, or ``None`` where these places are not the first of each."""
    shared = lines[0]["x"][: min(len(line["x"]) for line in lines)]
    if any(line["x"][: len(shared)] != shared for line in lines):
        return None
    columns = list(zip(*(line["y"][: len(shared)] for line in lines), strict=True))
    return {"x": shared, "y": [None if None in column else sum(column) / len(column) for column in columns]}


def _over(values: Sequence[float | None], step: float) -> list[float | None]:
    return [None if value is None else value / step for value in values]


def directed(figure: Mapping[str, Any], higher: str, lower: str) -> str:
    """Returns the label of a figure with an arrow to where it is better."""
    arrow = {"higher": f"  {higher} better", "lower": f"  {lower} better", None: ""}[figure["better"]]
    return elide(figure["label"], 44) + arrow


def _entries(document: Mapping[str, Any]) -> dict[tuple[str, str], Mapping[str, Any]]:
    return {(entry["figure"], entry["arm"]): entry for entry in document["summary"]}


def _runs(document: Mapping[str, Any], arm: str) -> list[Mapping[str, Any]]:
    return sorted((run for run in document["runs"] if run["arm"] == arm), key=lambda run: run["seed"])


def _present(values: Any) -> list[float]:
    return [value for value in values if value is not None]


def _name(kind: str, described: Mapping[str, Any], key: str) -> str:
    return f"{kind}{sorted(described).index(key)}"
