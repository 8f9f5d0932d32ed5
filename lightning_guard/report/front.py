"""The front of a sweep: what is paid in the task for what a guard gains, as numbers and as a drawing."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from lightning_guard.report import drawing, marks
from lightning_guard.report.drawing import INK, MUTED, Look, elide
from lightning_guard.report.figures import Picture, directed
from lightning_guard.report.groups import Listing
from lightning_guard.report.summary import baseline, headlines
from lightning_guard.report.units import scale, shown
from lightning_guard.report.view import between

# The figure that a guard is for, by its name; what stands in braces is one of its options.
_GAINS = {
    "fairness": "fairness/{notion}",
    "adversarial_training": "robustness/accuracy",
    "feature_squeezing": "robustness/accuracy",
    "randomized_smoothing": "certificate/accuracy",
    "magnitude_pruning": "efficiency/compressed_bytes",
    "weight_clustering": "efficiency/compressed_bytes",
    "quantization": "efficiency/compressed_bytes",
    "channel_pruning": "efficiency/macs",
    "low_rank": "efficiency/macs",
}
_REFERENCE_LOOKS = (Look("#5a3ea6", "X", ""), Look("#8a1c4a", "*", ""), Look("#2f5d00", "h", ""))


def recognised(arms: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The sweep that each arm belongs to, by name, where arms differ in one option of one guard alone.

    | arms                                             | result                     |
    |--------------------------------------------------|----------------------------|
    | the same guards, one option with another value   | a sweep of that option     |
    | two options differ, or two arms do not differ    | none                       |
    | the baseline, and arms that state their sweep    | left alone                 |
    """
    alike: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for arm in arms:
        if not arm["baseline"] and not arm.get("sweep") and arm["guards"]:
            alike.setdefault(tuple(guard["name"] for guard in arm["guards"]), []).append(arm)
    found = {}
    for names, group in alike.items():
        options = [
            {(guard["name"], key): value for guard in arm["guards"] for key, value in guard["options"].items()}
            for arm in group
        ]
        every = dict.fromkeys(key for own in options for key in own)
        differ = [key for key in every if any(own.get(key) != options[0].get(key) for own in options)]
        values = [own.get(key) for own in options for key in differ[:1]]
        plain = all(isinstance(value, str | int | float) for value in values)
        if len(differ) == 1 and plain and len(set(values)) == len(values):
            for arm, value in zip(group, values, strict=True):
                found[arm["name"]] = {"of": "+".join(names), "key": ".".join(("guards", *differ[0])), "value": value}
    return found


def fronts(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns a front for every sweep whose guard has a figure that it is for; needs the ``summary``.

    A point is an arm: the mean over its seeds, from the lowest to the highest of them, or with one seed the 95%
    interval of the test set. An arm of the sweep, or the baseline, is on the front if no other of these is at least
    as good in both figures and better in one. References stand beside it.
    """
    task = next((key for key in headlines(document) if document["figures"][key]["axis"] == "task"), None)
    families: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for arm in document["arms"]:
        key = _gain(arm, document)
        if key is not None and task is not None and document["figures"][task]["better"]:
            families.setdefault((arm["sweep"]["of"], key), []).append(arm)
    found = []
    for (of, key), family in families.items():
        assert task is not None  # else there is no family
        swept = [arm["name"] for arm in family]
        points = [point for arm in document["arms"] if (point := _point(document, arm, key, task, swept))]
        if sum(point["kind"] == "swept" for point in points) > 1:
            judged = [point for point in points if point["kind"] != "other"]
            signs = [1 if document["figures"][name]["better"] == "higher" else -1 for name in (key, task)]
            for point in points:
                point["front"] = point in judged and not any(_beats(other, point, signs) for other in judged)
            keys = dict.fromkeys(one["key"] for arm in family for one in _stated(arm))
            points += _references(document, key, task)
            found.append({"of": of, "keys": list(keys), "x": key, "y": task, "points": points})
    return found


class Drawn(NamedTuple):
    """A front as a page shows it."""

    picture: Picture
    table: Listing


def pictures(document: Mapping[str, Any]) -> dict[str, list[Drawn]]:
    """Draws the fronts of every axis."""
    found: dict[str, list[Drawn]] = {}
    for number, front in enumerate(document.get("fronts", ())):
        one = Drawn(drawn(document, front, number), table(document, front))
        found.setdefault(document["figures"][front["x"]]["axis"], []).append(one)
    return found


def drawn(document: Mapping[str, Any], front: Mapping[str, Any], number: int) -> Picture:
    """Draws a front: points with their intervals, those that no other beats joined, the baseline at the cross."""
    figures, points = document["figures"], front["points"]
    x_key, y_key = front["x"], front["y"]
    methods = list(dict.fromkeys(point["method"] for point in points if point["kind"] == "reference"))
    looks = drawing.looks(document)
    labels = (document.get("references") or {"methods": {}})["methods"]
    (wide, suffix_x), (high, suffix_y) = (
        scale(figures[key]["unit"], max(abs(point[side]) for point in points))
        for side, key in (("x", x_key), ("y", y_key))
    )
    below = 16.0 * len(methods)
    with drawing.sheet(420, 290 + below) as page:
        axes = drawing.axes(page, 46, 40 + below, 16, 28)
        for point in points:
            reference = point["kind"] == "reference"
            look = _REFERENCE_LOOKS[methods.index(point["method"]) % 3] if reference else looks[point["name"]]
            x, y = point["x"] / wide, point["y"] / high
            for side, step in (("x", wide), ("y", high)):
                if point[f"{side}_interval"]:
                    ends = [end / step for end in point[f"{side}_interval"]]
                    pair = (ends, [y, y]) if side == "x" else ([x, x], ends)
                    axes.plot(*pair, color=look.colour, linewidth=1.1, alpha=0.3 if reference else 0.55, zorder=2)
            marks.points(axes, look, [], (x, y), hollow=reference)
        joined = sorted((point["x"] / wide, point["y"] / high) for point in points if point.get("front"))
        axes.plot(*zip(*joined, strict=True), color=INK, linewidth=1.3, zorder=1)
        cross = next((point for point in points if point["kind"] == "baseline"), None)
        if cross is not None:
            style: dict[str, Any] = {"color": MUTED, "linewidth": 0.9, "dashes": (2, 3), "zorder": 0}
            axes.axvline(cross["x"] / wide, **style)
            axes.axhline(cross["y"] / high, **style)
        axes.margins(0.1)
        marks.widen(axes, figures[x_key]["unit"], figures[y_key]["unit"])
        axes.grid()
        marks.ticks(axes.xaxis, suffix_x, 5)
        marks.ticks(axes.yaxis, suffix_y, 5)
        marks.titles(axes, directed(figures[x_key], "\u2192", "\u2190"), directed(figures[y_key], "\u2191", "\u2193"))
        arms = [point for point in points if point["kind"] != "reference"]
        places = {point["name"]: (point["x"] / wide, point["y"] / high) for point in arms}
        line = [(a + (c - a) * t / 12, b + (d - b) * t / 12) for (a, b), (c, d) in pairwise(joined) for t in range(13)]
        beside = [(point["x"] / wide, point["y"] / high) for point in points if point["kind"] == "reference"]
        texts = {point["name"]: point["label"] for point in arms}
        marks.name_points(axes, places, 420, cross and cross["name"], [*beside, *line], texts)
        for row, method in enumerate(methods):
            marks.key(page, 46, below - 8 - 16 * row, _REFERENCE_LOOKS[row % 3], labels[method]["label"])
        said = "; ".join(
            f"{_spoken(point, labels)} {shown(point['y'], figures[y_key]['unit'])} at "
            f"{shown(point['x'], figures[x_key]['unit'])}" + ", on the front" * bool(point.get("front"))
            for point in points
        )
        title = title_of(document, front)
        svg = drawing.to_svg(page, f"front{number}", f"{title}. {said}.")
    return Picture(title, about(document, front), svg)


def title_of(document: Mapping[str, Any], front: Mapping[str, Any]) -> str:
    """Returns what a front is called."""
    return f"Front of {front['of']}: {front_labels(document, front)}"


def front_labels(document: Mapping[str, Any], front: Mapping[str, Any]) -> str:
    """Returns the names of its two figures."""
    y, x = (document["figures"][front[side]]["label"] for side in "yx")
    return f"{y} against {x[:1].lower() + x[1:]}"


def about(document: Mapping[str, Any], front: Mapping[str, Any]) -> str:
    """Returns how to read a front."""
    options = " and ".join(key.rpartition(".")[2] for key in front["keys"])
    over = {point["over"] for point in front["points"] if point["over"]}
    bars = {
        "seeds": "from the lowest to the highest seed",
        "test set": "95% intervals of the test set",
    }
    words = f"Numbers: {options}. The line joins what no other arm of the sweep, nor the baseline, beats in both."
    if over:
        words += f" Bars: {', where there are not several '.join(bars[each] for each in bars if each in over)}."
    return words


def table(document: Mapping[str, Any], front: Mapping[str, Any]) -> Listing:
    """Returns the numbers of a front, in the order of its arms, references last."""
    figures = document["figures"]
    labels = (document.get("references") or {"methods": {}})["methods"]

    def cell(point: Mapping[str, Any], side: str) -> tuple[str, str]:
        unit, ends = figures[front[side]]["unit"], point[f"{side}_interval"]
        return shown(point[side], unit), between(*(shown(end, unit) for end in ends)) if ends else ""

    rows = [
        (_row_name(point, labels), [cell(point, "x"), cell(point, "y"), ("yes" if point.get("front") else "", "")])
        for point in front["points"]
    ]
    option = ", ".join(key.rpartition(".")[2] for key in front["keys"])
    return Listing([option, figures[front["x"]]["label"], figures[front["y"]]["label"], "On front"], rows)


def told(document: Mapping[str, Any]) -> list[str]:
    """Returns what must be said of each reference, and why others are not there."""
    section = document.get("references") or {"methods": {}, "runs": [], "notes": []}
    used = [section["methods"][method] for method in dict.fromkeys(run["method"] for run in section["runs"])]
    return [f"{one['label']}: {one['about']}" for one in used] + list(section["notes"])


def _gain(arm: Mapping[str, Any], document: Mapping[str, Any]) -> str | None:
    """The figure that the swept guard of an arm is for, if it is measured and has a direction."""
    stated = _stated(arm)
    if not stated:
        return None
    name = stated[0]["key"].split(".")[1]
    options: Mapping[str, Any] = next((guard["options"] for guard in arm["guards"] if guard["name"] == name), {})
    try:
        key = _GAINS.get(name, "").format(**options)
    except KeyError:  # an option that the guard does not have
        return None
    figure = document["figures"].get(key)
    return key if figure is not None and figure["better"] else None


def _stated(arm: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    sweep = arm.get("sweep")
    return [] if not sweep else [sweep, *sweep.get("also", [])]


def _point(
    document: Mapping[str, Any], arm: Mapping[str, Any], x: str, y: str, swept: Sequence[str]
) -> dict[str, Any] | None:
    entries = {entry["figure"]: entry for entry in document["summary"] if entry["arm"] == arm["name"]}
    if not entries[x]["n"] or not entries[y]["n"]:
        return None
    many = min(entries[x]["n"], entries[y]["n"]) > 1
    runs = [run for run in document["runs"] if run["arm"] == arm["name"]]
    intervals = {
        key: [entries[key]["min"], entries[key]["max"]]
        if many
        else next((pair for run in runs if (pair := run["intervals"].get(key)) and None not in pair), None)
        for key in (x, y)
    }
    inside, is_base = arm["name"] in swept, arm["name"] == baseline(document)
    label = ", ".join(_short(one["value"]) for one in _stated(arm)) if inside else arm["name"]
    return {
        "kind": "swept" if inside else "baseline" if is_base else "other",
        "name": arm["name"],
        "label": label,
        "x": entries[x]["mean"],
        "y": entries[y]["mean"],
        "x_interval": intervals[x],
        "y_interval": intervals[y],
        "over": "seeds" if many else "test set" if any(intervals.values()) else None,
    }


def _references(document: Mapping[str, Any], x: str, y: str) -> Iterator[dict[str, Any]]:
    """A point for each method and bound: the mean over the seeds of the baselines that it was fitted to."""
    runs = (document.get("references") or {"runs": []})["runs"]
    for method, bound in dict.fromkeys((run["method"], run["bound"]) for run in runs):
        own = [run for run in runs if (run["method"], run["bound"]) == (method, bound)]
        own = [run for run in own if None not in (run["values"].get(x), run["values"].get(y))]
        if own:
            values = {key: [run["values"][key] for run in own] for key in (x, y)}
            spans = {
                key: [min(values[key]), max(values[key])] if len(own) > 1 else own[0]["intervals"].get(key)
                for key in (x, y)
            }
            yield {
                "kind": "reference",
                "method": method,
                "name": method,
                "label": "",
                "bound": bound,
                "x": statistics.fmean(values[x]),
                "y": statistics.fmean(values[y]),
                "x_interval": spans[x],
                "y_interval": spans[y],
                "over": "seeds" if len(own) > 1 else "test set" if any(spans.values()) else None,
            }


def _beats(one: Mapping[str, Any], other: Mapping[str, Any], signs: Sequence[int]) -> bool:
    gains = [sign * (one[side] - other[side]) for side, sign in zip("xy", signs, strict=True)]
    return min(gains) >= 0 and max(gains) > 0


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _row_name(point: Mapping[str, Any], labels: Mapping[str, Any]) -> str:
    return str(point["label"]) or _spoken(point, labels)


def _spoken(point: Mapping[str, Any], labels: Mapping[str, Any]) -> str:
    if point["kind"] != "reference":
        return str(elide(point["name"], 60))
    bound = "" if point["bound"] is None else f" at {point['bound']:g}"
    return f"{labels[point['method']]['label']}{bound}"
