"""Attackers' rates on scales on which few false alarms can be seen, with what a claim of privacy allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_guard.report import drawing, marks
from lightning_guard.report.drawing import MUTED
from lightning_guard.report.figures import Picture
from lightning_guard.report.units import shown

FOUND, ALLOWED = "/roc", "/allowed"
"""How the keys of the two curves end."""

_TICKS = {0.001: "0.1%", 0.01: "1%", 0.1: "10%", 1.0: "100%"}
_SAID = (0.001, 0.01, 0.1)


def is_part(key: str) -> bool:
    """Returns whether a curve is drawn here and not by itself."""
    return key.endswith((FOUND, ALLOWED))


def roc(document: Mapping[str, Any], axis: str) -> Picture | None:
    """Draws, both on logarithmic scales, how many members an attack finds at each rate of false alarms in each arm.

    A thin line a seed, a thick one for their mean; dashed what the arm's claim of (epsilon, delta) allows any attacker,
    which the truth cannot exceed; dotted a blind guess.
    """
    key = f"{axis}{FOUND}"
    if key not in document["curves"]:
        return None
    looks = drawing.looks(document)
    found = {arm: _curves(document, arm, key) for arm in looks}
    found = {arm: own for arm, own in found.items() if own}
    if not found:
        return None
    lowest = min(x for own in found.values() for curve in own for x in curve["x"])
    said = []
    with drawing.sheet(420, 300) as page:
        axes = drawing.axes(page, 50, 40, 16, 26)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.plot([lowest, 1], [lowest, 1], color=MUTED, linewidth=0.9, linestyle=(0, (1, 2)))
        for arm, own in found.items():
            colour = looks[arm].colour
            for curve in own:
                axes.plot(*_positive(curve), color=colour, linewidth=0.8, alpha=0.4)
            mean = _mean(own)
            axes.plot(*_positive(mean), color=colour, linewidth=2.0)
            told = [(x, y) for x, y in zip(mean["x"], mean["y"], strict=True) if _near(x)]
            text = ", ".join(f"{shown(y, 'fraction')} at {shown(x, 'fraction')}" for x, y in told)
            allowed = _curves(document, arm, f"{axis}{ALLOWED}")
            if allowed:
                most = _mean(allowed)
                axes.plot(*_positive(most), color=colour, linewidth=1.2, linestyle=(0, (4, 3)))
                at = [(x, y) for x, y in zip(most["x"], most["y"], strict=True) if _near(x)]
                text += "; allowed " + ", ".join(f"{shown(y, 'fraction')} at {shown(x, 'fraction')}" for x, y in at)
            said.append(f"{arm} finds {text} false alarms")
        axes.set_xlim(lowest, 1)
        axes.set_ylim(lowest / 2, 1.05)
        for one in (axes.xaxis, axes.yaxis):
            one.set_minor_locator(_nothing())
            one.set_ticks(list(_TICKS), list(_TICKS.values()))
        axes.set_xlim(lowest, 1)
        axes.set_ylim(lowest / 2, 1.05)
        axes.grid()
        spec = document["curves"][key]
        marks.titles(axes, spec["x_label"], spec["y_label"])
        svg = drawing.to_svg(page, f"roc-{axis}", f"{spec['label']}. {'; '.join(said)}.")
    about = f"{spec['about']} Both scales are logarithmic. Dotted: a blind guess."
    if f"{axis}{ALLOWED}" in document["curves"]:
        about += " Dashed: the most that the claim of epsilon and delta allows any attacker, for one example at a time."
    return Picture(spec["label"], about, svg, legend=True)


def _curves(document: Mapping[str, Any], arm: str, key: str) -> list[Mapping[str, Any]]:
    runs = sorted((run for run in document["runs"] if run["arm"] == arm), key=lambda run: run["seed"])
    return [run["curves"][key] for run in runs if run["curves"].get(key, {"x": []})["x"]]


def _mean(curves: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """The mean where all seeds have a place; held-out sets of other sizes begin elsewhere."""
    own = [dict(zip(curve["x"], curve["y"], strict=True)) for curve in curves]
    shared = [x for x in own[0] if all(one.get(x) is not None for one in own)]
    return {"x": shared, "y": [sum(one[x] for one in own) / len(own) for x in shared]}


def _positive(curve: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """A curve without its zeros, for which a logarithm has no place."""
    pairs = [(x, y) for x, y in zip(curve["x"], curve["y"], strict=True) if y]
    return [x for x, _ in pairs], [y for _, y in pairs]


def _near(x: float) -> bool:
    return any(abs(x / place - 1) < 1e-6 for place in _SAID)


def _nothing() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()
