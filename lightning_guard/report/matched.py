"""Whether an arm is right where the baseline is, on the same test examples: McNemar's test, and an interval."""

from collections.abc import Sequence
from typing import Any

import torch

from lightning_guard.functional.statistics import example_interval, mcnemar_p
from lightning_guard.report.again import kept_tensors
from lightning_guard.report.runs import ArmRun

_KEYS = ("task/decision", "task/target")


def matched(runs: Sequence[ArmRun]) -> list[dict[str, Any]]:
    """Returns the section ``matched`` of a report: accuracy minus the baseline's, and how surely on these examples.

    The interval is of the mean over seeds of what each example shows, since all seeds share the test examples. It
    says whether these trained models differ, not whether other seeds would.

    | case                                            | result                   |
    |-------------------------------------------------|--------------------------|
    | a run kept no classes (a regression)            | its seed takes no part   |
    | the test examples of two arms or seeds differ   | that seed takes no part  |
    | no seed left for an arm                         | no entry                 |
    """
    first = runs[0].arm.name
    kept = {(run.arm.name, run.seed): kept_tensors(run) for run in runs}
    kept = {key: found for key, found in kept.items() if all(name in found for name in _KEYS)}
    entries = []
    for arm in dict.fromkeys(run.arm.name for run in runs if run.arm.name != first):
        seeds = [
            run.seed for run in runs if run.arm.name == arm and {(arm, run.seed), (first, run.seed)} <= kept.keys()
        ]
        pairs = {seed: (kept[first, seed], kept[arm, seed]) for seed in seeds}
        target = next((base[_KEYS[1]] for base, _ in pairs.values()), None)
        hits = {
            seed: [one[_KEYS[0]] == target for one in pair]
            for seed, pair in pairs.items()
            if target is not None and target.dim() == 1 and all(torch.equal(one[_KEYS[1]], target) for one in pair)
        }
        if not hits or target is None or not len(target):
            continue
        apart = torch.stack([own.double() - base.double() for base, own in hits.values()]).mean(0)
        counts = {seed: (int((own & ~base).sum()), int((base & ~own).sum())) for seed, (base, own) in hits.items()}
        entries.append(
            {
                "figure": "task/accuracy",
                "arm": arm,
                "n": len(hits),
                "examples": len(target),
                "difference": float(apart.mean()),
                "interval": list(example_interval(apart.numpy()) or ()),
                "seeds": [
                    {"seed": seed, "gained": gained, "lost": lost, "p": mcnemar_p(gained, lost)}
                    for seed, (gained, lost) in counts.items()
                ],
            }
        )
    return entries
