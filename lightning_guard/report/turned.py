"""Which predictions of an arm differ from the baseline's, on the same test examples and seed."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from lightning_guard.evaluation.families import families
from lightning_guard.evaluation.flips import turned_evidence
from lightning_guard.report.again import kept_tensors
from lightning_guard.report.runs import ArmRun

_PARTS = ("figures", "bars", "intervals")


def with_flips(runs: Sequence[ArmRun]) -> list[dict[str, Any]]:
    """The results of all finished runs, with how many predictions flipped against the baseline's of the same seed.

    Accuracy can stay while predictions change, and small models change them most where examples are few (Hooker et
    al., 2020, arXiv:2010.03058): so flips are told by class and by group too.

    | case                                      | result                          |
    |-------------------------------------------|---------------------------------|
    | efficiency is not measured                | no flips                        |
    | a regression, or several labels an example | no flips                       |
    | a baseline without a finished run          | no flips for that seed          |
    | test examples differ between the arms     | no flips for that run           |
    | flips against a file were asked for       | those are kept                  |
    """
    first, found = runs[0].arm.name, []
    base = {run.seed: kept_tensors(run) for run in runs if run.arm.name == first and run.result() is not None}
    for run in runs:
        result = run.result()
        if result is None:
            continue
        if any(judge.name == "efficiency" for judge in run.judges) and "efficiency/flips" not in result["figures"]:
            result = result | _against(base.get(run.seed, {}), kept_tensors(run), result, first)
        found.append(result)
    return found


def _against(before: Mapping[str, Tensor], after: Mapping[str, Tensor], result: Mapping[str, Any], first: str) -> Any:
    keys = ("task/decision", "task/target")
    if not all(key in kept for kept in (before, after) for key in keys):
        return {}
    target = after[keys[1]]
    if target.dim() != 1 or not torch.equal(before[keys[1]], target):
        return {}
    group = after.get("fairness/group")
    kin = families(group.long()) if group is not None and len(group) == len(target) else []
    same = result["arm"] == first
    evidence = asdict(
        turned_evidence(before[keys[0]], after[keys[0]], target, [] if same else kin, than=f"the baseline, {first}")
    )
    if same:
        evidence["bars"] = {}  # none, of any class
    return {part: result[part] | evidence[part] for part in _PARTS}
