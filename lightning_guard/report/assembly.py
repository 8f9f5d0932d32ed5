"""What finished runs say together: the document that a report is made of."""

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import torch

from lightning_guard.report.runs import Arm, sha256, versions

_LIMITS = (
    "Every figure is of this data, these networks and these seeds; another data set may order the arms differently.",
    "Accuracy under attack is an upper bound: a stronger attack can only lower it. The standard is AutoAttack.",
    "Group gaps are of the test set's groups; groups that nobody recorded are not seen.",
    "Publishing a guarded and its unguarded model together can leak more about training data than either alone.",
)


def assembled(
    arms: Sequence[Arm],
    seeds: Sequence[int],
    results: Sequence[dict[str, Any]],
    title: str,
    command: str | None,
    matrices: Mapping[str, Any] | None = None,
    resplit: bool = False,
) -> dict[str, Any]:
    def described(kind: str, values: tuple[str, ...]) -> dict[str, Any]:
        merged = {key: item for result in reversed(results) for key, item in result[kind].items()}
        return {
            key: {"axis": key.split("/")[0], **{k: v for k, v in item.items() if k not in values}}
            for key, item in merged.items()
        }

    categories: dict[str, list[str]] = {}  # of all arms: one may have layers, classes or groups that another has not
    for result in results:
        for key, item in result["bars"].items():
            known = categories.setdefault(key, [])
            known += [category for category in item["categories"] if category not in known]

    def heights(key: str, item: Mapping[str, Any]) -> list[float | None]:
        own = dict(zip(item["categories"], item["values"], strict=True))
        return [own.get(category) for category in categories[key]]

    bars = described("bars", ("values", "categories"))
    guards = {result["arm"]: result["guards"] for result in results}
    data: dict[str, Any] = next((result["data"] for result in results), {"name": ""})
    return {
        "schema": 1,
        "title": title,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "provenance": {
            "command": command,
            "config_sha256": sha256("".join(arm.config for arm in arms)),
            "versions": versions(),
            "recipes": {name: digest for arm in arms for name, digest in arm.recipes.items()},
            "seeds": list(seeds),
            "machine": {
                "processor": platform.processor() or platform.machine(),
                "cores": os.cpu_count() or 1,
                "threads": torch.get_num_threads(),
                "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
            },
            "data": {
                "name": data["name"],
                "sha256": data.get("sha256"),
                "train": data.get("rows", {}).get("train"),
                "test": data.get("rows", {}).get("test"),
            },
            "git": _git(),
            "resplit": resplit,
        },
        "arms": [
            {"name": arm.name, "recipes": list(arm.recipes), "baseline": i == 0, "guards": guards.get(arm.name, [])}
            | ({"trained": False} if arm.given is not None else {})
            | ({"sweep": dict(arm.sweep)} if arm.sweep else {})
            for i, arm in enumerate(arms)
        ],
        "figures": described("figures", ("value",)),
        "curves": described("curves", ("x", "y")),
        "bars": {key: {**item, "categories": categories[key]} for key, item in bars.items()},
        "matrices": dict(matrices or {}),
        "runs": [
            {
                "arm": result["arm"],
                "seed": result["seed"],
                "values": {key: item["value"] for key, item in result["figures"].items()},
                "curves": {key: {"x": item["x"], "y": item["y"]} for key, item in result["curves"].items()},
                "bars": {key: heights(key, item) for key, item in result["bars"].items()},
                "intervals": result["intervals"],
                "notes": result["notes"],
                "doubts": result["doubts"],
                "pictures": result["pictures"],
                "initial_weights_sha256": result["initial_weights_sha256"],
                "data_order_sha256": result["data_order_sha256"],
            }
            for result in results
        ],
        "limits": list(_LIMITS),
    }


def _git() -> str | None:
    try:
        found = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return found.stdout.strip() or None
