"""Gates: what must hold of an arm for a comparison to pass, and whether it does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning_guard.recipe import RecipeError
from lightning_guard.report.summary import baseline, differences, values
from lightning_guard.report.units import change, shown
from lightning_guard.report.view import between

STATES = ("met", "not met", "inconclusive", "not measured")
KINDS = ("min", "max", "change", "within")
_FORM = "; write FIGURE: {min: 0.8}, {max: 0.05}, {change: -0.02} or {within: 0.01}"


class GateError(RecipeError):
    """A section ``accept`` that cannot be judged; names what is wrong and what to write."""


def rules(accept: Mapping[str, Any], arms: Sequence[str], axes: Sequence[str]) -> list[dict[str, Any]]:
    """Returns what a section ``accept`` asks of these arms, one rule a limit.

    Args:
        accept: by figure, a mapping of limits. ``min`` and ``max`` bound the value; ``change`` bounds the difference
            from the baseline on its worse side (with ``min`` or ``max`` under it, on that side); ``within`` asks
            that the difference be smaller than this, either way. The key ``inconclusive`` is no figure.
        arms: names of the arms that it is asked of.
        axes: those that are measured.

    Raises:
        GateError: for an axis that is not measured, an unknown limit, or one that is no number.

    Example:
        >>> rules({"task/accuracy": {"change": -0.02}}, ["fair"], ["task"])
        [{'arm': 'fair', 'figure': 'task/accuracy', 'kind': 'change', 'limit': -0.02, 'side': None}]
    """
    found: list[dict[str, Any]] = []
    for figure, limits in accept.items():
        if figure == "inconclusive":
            continue
        axis, slash, _ = figure.partition("/")
        if not slash or axis not in axes:
            raise GateError(
                f"accept: {figure!r} is no figure of an axis that is measured ({', '.join(axes)}); figures are named "
                "as in metrics.csv, task/accuracy for example"
            )
        if not isinstance(limits, Mapping) or not limits:
            raise GateError(f"accept: {figure}={limits!r} states no limit{_FORM}")
        for kind, side, limit in _limits(figure, limits):
            found += [{"arm": arm, "figure": figure, "kind": kind, "limit": limit, "side": side} for arm in arms]
    return found


def _limits(figure: str, limits: Mapping[str, Any]) -> Iterator[tuple[str, str | None, float]]:
    for kind, limit in limits.items():
        if kind not in KINDS:
            raise GateError(f"accept: {figure} has no limit {kind!r}{_FORM}")
        sides = limit if kind == "change" and isinstance(limit, Mapping) else {None: limit}
        for side, number in sides.items():
            if side not in (None, "min", "max"):
                raise GateError(f"accept: {figure}: a change has no side {side!r}; give min or max")
            if isinstance(number, bool) or not isinstance(number, int | float) or number != number:
                raise GateError(f"accept: {figure}: {kind}={number!r} is no number{_FORM}")
            if kind == "within" and number <= 0:
                raise GateError(f"accept: {figure}: within={number} holds no difference; give a number above 0")
            yield kind, side, float(number)


def stated(accept: Mapping[str, Any], default: str = "fail") -> str:
    """Returns what an inconclusive gate does, ``fail`` or ``pass``.

    Raises:
        GateError: for anything else.
    """
    choice = accept.get("inconclusive", default)
    if choice not in ("fail", "pass"):
        raise GateError(f"accept: inconclusive={choice!r}; give fail or pass")
    return str(choice)


def asked_of(accept: Mapping[str, Mapping[str, Any]], axes: Sequence[str]) -> dict[str, Any] | None:
    """Returns the section ``accept`` of a report, None if nothing is asked.

    Args:
        accept: by arm, what is asked of it.
        axes: those that are measured beside the cost of training.

    Raises:
        GateError: before training, for what could never be judged.
    """
    found = [rule for arm, limits in accept.items() for rule in rules(limits, [arm], [*axes, "cost"])]
    choices = {stated(limits) for limits in accept.values() if "inconclusive" in limits}
    if len(choices) > 1:
        raise GateError("accept: one arm lets inconclusive gates pass and another does not; say one thing for all")
    return {"inconclusive": choices.pop() if choices else "fail", "rules": found} if found else None


def gates(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns every rule of ``accept`` with what was found: ``met``, ``not met``, ``inconclusive``, ``not measured``.

    A gate is met if the 95% interval over seeds (Student) lies on the right side of its limit, and so does the
    interval over test examples where there is one. It is not met if either lies on the wrong side. Anything else is
    inconclusive, one seed among it. Whether all is well is ``passed``: an inconclusive gate fails unless
    ``accept.inconclusive`` says ``pass``; one that is not measured always fails.
    """
    accept = document.get("accept")
    if not accept:
        return []
    return [_judged(document, rule, accept["inconclusive"]) for rule in accept["rules"]]


def _judged(document: Mapping[str, Any], rule: Mapping[str, Any], inconclusive: str) -> dict[str, Any]:
    from lightning_guard.functional.statistics import student_interval

    figure, arm, kind, limit = rule["figure"], rule["arm"], rule["kind"], rule["limit"]
    spec = document["figures"].get(figure)
    low, high = _bounds(kind, limit, rule["side"], spec["better"] if spec else None)
    of_value = kind in ("min", "max")
    sample = [] if spec is None else list(values(document, figure, arm).values()) if of_value else []
    if spec is not None and not of_value and baseline(document) is not None:
        sample = differences(document, figure, arm)
    over_seeds = student_interval(sample)
    over_examples = _examples(document, figure, arm, of_value)
    if not sample or (low is None and high is None):
        state = "not measured"
    else:
        states = [_side(one, low, high) for one in (over_seeds, over_examples) if one is not None]
        states += [] if over_seeds else ["inconclusive"]
        state = next((word for word in ("not met", "inconclusive") if word in states), "met")
    return {
        **rule,
        "value": sum(sample) / len(sample) if sample else None,
        "n": len(sample),
        "interval": list(over_seeds) if over_seeds else None,
        "examples": list(over_examples) if over_examples else None,
        "state": state,
        "passed": state == "met" or (state == "inconclusive" and inconclusive == "pass"),
    }


def _bounds(kind: str, limit: float, side: str | None, better: str | None) -> tuple[float | None, float | None]:
    if kind == "within":
        return -limit, limit
    if kind == "change":  # on the worse side; nothing to bound where no side is worse and none was given
        side = side or {"higher": "min", "lower": "max"}.get(better or "")
    else:
        side = kind
    return (limit if side == "min" else None), (limit if side == "max" else None)


def _side(interval: Sequence[float], low: float | None, high: float | None) -> str:
    if (low is None or interval[0] >= low) and (high is None or interval[1] <= high):
        return "met"
    beyond = (low is not None and interval[1] < low) or (high is not None and interval[0] > high)
    return "not met" if beyond else "inconclusive"


def _examples(document: Mapping[str, Any], figure: str, arm: str, of_value: bool) -> Sequence[float] | None:
    """The interval over test examples: of a value the mean ends over the seeds, of a change the paired one."""
    if not of_value:
        for section in ("matched", "changes"):
            for entry in document.get(section, ()):
                if (entry["arm"], entry["figure"]) == (arm, figure):
                    interval: Sequence[float] = entry["interval"]
                    return interval
        return None
    pairs = [run["intervals"].get(figure) for run in document["runs"] if run["arm"] == arm]
    known = [pair for pair in pairs if pair and None not in pair]
    if not known or len(known) < len(pairs):
        return None
    return [sum(pair[end] for pair in known) / len(known) for end in (0, 1)]


def passed(document: Mapping[str, Any]) -> bool:
    """Whether every gate of a report is passed; true where there is none."""
    return all(gate["passed"] for gate in document.get("gates", ()))


def asked(gate: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    """Returns what a gate asks, in words: "Accuracy: at least 80.0%"."""
    spec = document["figures"].get(gate["figure"])
    label, unit = (spec["label"], spec["unit"]) if spec else (gate["figure"], "")
    if gate["kind"] == "within":
        return f"{label}: within {change(gate['limit'], unit).lstrip('+')} of {baseline(document)}"
    if gate["kind"] == "change":
        side = gate["side"] or ("max" if spec and spec["better"] == "lower" else "min")
        word = "at least" if side == "min" else "at most"
        return f"{label}: change of {word} {change(gate['limit'], unit)} from {baseline(document)}"
    return f"{label}: {'at least' if gate['kind'] == 'min' else 'at most'} {shown(gate['limit'], unit)}"


def found(gate: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    """Returns what was found at a gate, in words: "82.1%; over seeds 81.0% to 83.2%; test set 79.6% to 84.0%"."""
    spec = document["figures"].get(gate["figure"])
    unit = spec["unit"] if spec else ""
    tell = shown if gate["kind"] in ("min", "max") else change
    if gate["value"] is None:
        return "without a value"
    parts = [tell(gate["value"], unit)]
    if gate["interval"]:
        parts.append(_span("seeds", [tell(end, unit) for end in gate["interval"]]))
    else:
        parts.append("one seed, so nothing is known of others")
    if gate["examples"]:
        parts.append(_span("test set", [tell(end, unit) for end in gate["examples"]]))
    return "; ".join(parts)


def _span(of: str, ends: Sequence[str]) -> str:
    return f"{of} {between(*ends) or f'all {ends[0]}'}"
