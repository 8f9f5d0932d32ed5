"""A comparison in Python: as pandas frames, and shown in a notebook."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, Any

from lightning_guard.report.summary import baseline, in_order
from lightning_guard.report.units import change, shown

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped]

_COLUMNS = {
    "runs": ("arm", "seed", "figure", "value", "low", "high", "unit"),
    "summary": ("arm", "figure", "n", "mean", "sd", "min", "max", "difference", "word", "unit"),
    "curves": ("arm", "seed", "curve", "x", "y"),
    "bars": ("arm", "seed", "bars", "category", "value"),
    "lira": ("arm", "figure", "value", "low", "high", "unit"),
    "notes": ("arm", "seed", "note"),
    "arms": ("arm", "baseline", "guard", "option", "value"),
}


def frames(report: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    """The content of a report as tidy pandas frames, one value a row.

    Args:
        report: what :func:`lightning_guard.compare` returned or ``load_report`` read.

    Returns:
        ``runs`` (arm, seed, figure, value, low and high of its test-set interval, unit), ``summary`` (over seeds, with
        the mean paired difference from the baseline), ``curves``, ``bars``, ``lira``, ``notes`` and ``arms`` (guards
        and their options). What is not estimable is missing. Frames without rows keep their columns.

    Example::

        frames(report)["runs"].pivot_table(index="arm", columns="figure", values="value")
    """
    import pandas as pd

    rows: dict[str, list[tuple[Any, ...]]] = {name: [] for name in _COLUMNS}
    figures = report["figures"]
    for run in report["runs"]:
        place = run["arm"], run["seed"]
        for figure in in_order(figures):
            if figure in run["values"]:
                low, high = run.get("intervals", {}).get(figure) or (None, None)
                rows["runs"].append((*place, figure, run["values"][figure], low, high, figures[figure]["unit"]))
        for key, curve in run.get("curves", {}).items():
            rows["curves"] += [(*place, key, x, y) for x, y in zip(curve["x"], curve["y"], strict=True)]
        for key, values in run.get("bars", {}).items():
            named = zip(report["bars"][key]["categories"], values, strict=True)
            rows["bars"] += [(*place, key, category, value) for category, value in named]
        rows["notes"] += [(*place, note) for note in run.get("notes", ())]
    for entry in report.get("summary", ()):
        paired = entry["paired"] or {"mean": None, "word": None}
        told = (entry[key] for key in ("n", "mean", "sd", "min", "max"))
        unit = figures[entry["figure"]]["unit"]
        rows["summary"].append((entry["arm"], entry["figure"], *told, paired["mean"], paired["word"], unit))
    section = report.get("lira") or {"arms": [], "figures": []}
    for one in section["arms"]:
        for item in section["figures"]:
            if item["key"] in one["values"]:
                low, high = one["intervals"].get(item["key"]) or (None, None)
                rows["lira"].append((one["arm"], item["key"], one["values"][item["key"]], low, high, item["unit"]))
    for arm in report["arms"]:
        for guard in arm["guards"]:
            for option, value in guard["options"].items():
                rows["arms"].append((arm["name"], arm["baseline"], guard["name"], option, value))
    return {name: pd.DataFrame(rows[name], columns=list(columns)) for name, columns in _COLUMNS.items()}


class Comparison(dict[str, Any]):
    """The content of ``report.json``, which shows itself in a notebook: a table of the arms, escaped, without scripts.

    Example:
        >>> Comparison({"title": "<b>", "figures": {}, "arms": [], "runs": [], "summary": []})._repr_html_()[:25]
        '<h3>&lt;b&gt;</h3><table>'
    """

    @property
    def frames(self) -> dict[str, pd.DataFrame]:
        """See :func:`frames`."""
        return frames(self)

    def _repr_html_(self) -> str:
        reference = baseline(self)
        entries = {(entry["figure"], entry["arm"]): entry for entry in self["summary"]}
        heads = [arm["name"] + (" (baseline)" if arm["name"] == reference else "") for arm in self["arms"]]
        lines = [f"<h3>{escape(str(self['title']))}</h3><table>"]
        lines.append("<thead><tr><th scope='col'></th>" + "".join(f"<th scope='col'>{escape(h)}</th>" for h in heads))
        lines.append("</tr></thead><tbody>")
        axis = None
        for figure in in_order(self["figures"]):
            spec = self["figures"][figure]
            if spec["axis"] != axis:
                axis = spec["axis"]
                lines.append(f"<tr><th scope='rowgroup' colspan='{len(heads) + 1}'>{escape(axis)}</th></tr>")
            cells = [_cell(entries.get((figure, arm["name"])), spec["unit"]) for arm in self["arms"]]
            lines.append(f"<tr><th scope='row'>{escape(spec['label'])}</th>{''.join(cells)}</tr>")
        return "".join([*lines, "</tbody></table>"])


def _cell(entry: Mapping[str, Any] | None, unit: str) -> str:
    if entry is None:
        return "<td></td>"
    text = shown(entry["mean"], unit)
    paired = entry["paired"]
    if paired and paired["n"]:
        text += f" ({change(paired['mean'], unit, like=entry['mean'])}, {paired['word']})"
    return f"<td>{escape(text)}</td>"
