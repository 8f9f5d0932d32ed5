"""Small comparisons to write reports from; the numbers are drawn, the shapes are those of a real one."""

import hashlib
import random
from collections.abc import Sequence
from typing import Any

HOSTILE = (
    "<script>alert(1)</script>",
    "</text></svg><img src=x onerror=alert(1)>",
    '"\' onload="alert(1)" x=\'',
    '=HYPERLINK("https://evil.example")',
    "| a | [b](javascript:x) `c` **d** <e>",
    "$x^2$ {{ 7 * 7 }} {% raw %} %s",
    "\u202egnitrevni \x00\x07\x1b[31m \ud800 \ufffe",
    "\u6f22\u5b57 \u0645\u062d\u0645\u062f \u2728 e\u0301",
    "long-" * 300,
)


def digest(*what: Any) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()


def comparison(
    arms: int | Sequence[str] = 3, seeds: int = 2, curves: bool = True, bars: bool = True, seed: int = 0
) -> dict[str, Any]:
    """Returns a valid comparison; its first arm is the baseline."""
    names = [f"arm-{i}" for i in range(arms)] if isinstance(arms, int) else list(arms)
    draw = random.Random(seed)

    def figure(axis: str, label: str, unit: str, better: str | None) -> dict[str, Any]:
        return {"axis": axis, "label": label, "unit": unit, "better": better, "about": f"{label}, measured."}

    figures = {
        "task/accuracy": figure("task", "Accuracy", "fraction", "higher"),
        "robustness/pgd": figure("robustness", "Accuracy under PGD", "fraction", "higher"),
        "fairness/rate": figure("fairness", "Selection rate", "fraction", None),
        "efficiency/bytes": figure("efficiency", "File size", "bytes", "lower"),
        "cost/time": figure("cost", "Training time", "s", "lower"),
    }
    scales = (1.0, 1.0, 1.0, 4e5, 90.0)
    runs = []
    for name in names:
        for number in range(seeds):
            runs.append(
                {
                    "arm": name,
                    "seed": number,
                    "values": {key: scale * draw.random() for key, scale in zip(figures, scales, strict=True)},
                    "curves": {"robustness/eps": {"x": [0, 0.1, 0.2], "y": [draw.random() for _ in range(3)]}}
                    if curves
                    else {},
                    "bars": {"fairness/rates": [draw.random(), draw.random()]} if bars else {},
                    "notes": ["Half of the test images were attacked."],
                    "initial_weights_sha256": digest("weights", number),
                    "data_order_sha256": digest("order", number),
                }
            )
    curve = {"axis": "robustness", "label": "Under attack", "x_label": "eps", "y_label": "Accuracy", "about": "PGD."}
    bar = {"axis": "fairness", "label": "Rates", "y_label": "Rate", "categories": ["Female", "Male"], "about": "Rates."}
    return {
        "schema": 1,
        "title": "A comparison",
        "created": "2026-11-21T18:00:00Z",
        "provenance": {
            "command": "lightning-guard compare",
            "config_sha256": digest("config"),
            "versions": {"torch": "2.13.0"},
            "recipes": {"dp-sgd": digest("recipe")},
            "seeds": list(range(seeds)),
            "machine": {"processor": "x86_64", "cores": 2, "threads": 1, "system": "Linux"},
            "data": {"name": "toys", "sha256": None, "train": 60, "test": 10},
            "git": None,
        },
        "arms": [
            {
                "name": name,
                "recipes": [],
                "baseline": number == 0,
                "guards": []
                if number == 0
                else [{"name": "a_guard", "promise": "Keeps its promise.", "options": {"eps": 0.1, "norm": "inf"}}],
            }
            for number, name in enumerate(names)
        ],
        "figures": figures,
        "curves": {"robustness/eps": curve} if curves else {},
        "bars": {"fairness/rates": bar} if bars else {},
        "runs": runs,
        "limits": ["Two seeds show little."],
    }
