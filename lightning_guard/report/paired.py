"""Whether an arm really treats groups otherwise than the baseline does, on the same test examples."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_guard.evaluation.families import families
from lightning_guard.evaluation.table import TABLE_NOTIONS, Panel, cells, percentiles, resampled
from lightning_guard.report.again import kept_tensors
from lightning_guard.report.runs import ArmRun

_REPLICATES = 10_000
_KEYS = ("fairness/group", "fairness/target", "fairness/decision")


def changes(runs: Sequence[ArmRun]) -> list[dict[str, Any]]:
    """Returns the section ``changes`` of a report: how much each gap differs from the baseline's, and how surely.

    As :func:`lightning_guard.evaluation.table.paired_change` for one seed. With several the statistic is the mean
    difference, and the examples are drawn again for all seeds at once: these share the test examples, so that their
    intervals cannot be combined as if they were independent.

    | case                                       | result                          |
    |--------------------------------------------|---------------------------------|
    | a run kept no decisions, or no group       | its seed takes no part          |
    | the test examples of two arms differ       | that seed takes no part         |
    | a gap that cannot be estimated in a seed   | no entry for that gap           |
    | no seed left for an arm                    | no entry                        |
    """
    first = runs[0].arm.name
    kept = {(run.arm.name, run.seed): found for run in runs if (found := _kept(run))}
    judge = next((judge for judge in runs[0].judges if judge.name == "fairness"), None)
    seeds = list(dict.fromkeys(run.seed for run in runs))
    entries: list[dict[str, Any]] = []
    for arm in dict.fromkeys(run.arm.name for run in runs if run.arm.name != first):
        pairs = [(kept[first, seed], kept[arm, seed]) for seed in seeds if {(first, seed), (arm, seed)} <= kept.keys()]
        pairs = [
            pair for pair in pairs if all(torch.equal(pairs[0][0][key], one[key]) for key in _KEYS[:2] for one in pair)
        ]
        if pairs and len(pairs[0][0][_KEYS[0]]):
            group, target, _ = (pairs[0][0][key] for key in _KEYS)
            decisions = [(base[_KEYS[2]], own[_KEYS[2]]) for base, own in pairs]
            support, crossed = getattr(judge, "min_support", 30), getattr(judge, "intersections", False)
            entries += [{"arm": arm, **one} for one in mean_changes(group, target, decisions, support, crossed)]
    order = [f"fairness/{notion}" for notion in TABLE_NOTIONS]
    return sorted(entries, key=lambda entry: order.index(entry["figure"]))


def mean_changes(
    group: Tensor,
    target: Tensor,
    decisions: Sequence[tuple[Tensor, Tensor]],
    min_support: int = 30,
    intersections: bool = False,
    replicates: int = _REPLICATES,
) -> Iterator[dict[str, Any]]:
    """The mean over pairs of models of how much each gap differs between the two, on the same examples.

    Args:
        group: whole numbers ``(N,)``, or ``(N, A)`` of several attributes; negative is unknown.
        target: classes ``(N,)``, or ``(N, L)`` of 0 and 1 for several labels.
        decisions: predicted classes of the first and of the second model of each pair, of the shape of ``target``.
        min_support: rates of fewer examples take no part.
        intersections: judge the crossed groups of several attributes too.
        replicates: how many samples are drawn.

    Returns:
        For each gap that all models have: ``figure``, ``n`` (pairs), ``difference``, ``interval``, ``p`` (two-sided)
        and ``narrower`` (pairs in which the second has the narrower gap).
    """
    every = [decision for pair in decisions for decision in pair]
    kin = families(group, intersections=intersections)
    chosen = cells(*(family.group for family in kin), target, *every)
    classes = 1 + max(1, *(int(part.max()) for part in (target, *every)))
    panels = [Panel(kin, target, decision, min_support, classes, chosen) for decision in every]
    values = [panel.values() for panel in panels]
    known = [notion for notion in TABLE_NOTIONS if all(one[notion] == one[notion] for one in values)]

    def difference(counts: Tensor) -> dict[str, Tensor]:
        total = {notion: torch.zeros(len(counts), dtype=torch.float64) for notion in known}
        for base, own in zip(panels[::2], panels[1::2], strict=True):
            before, after = base(counts), own(counts)
            total = {notion: total[notion] + after[notion] - before[notion] for notion in known}
        return {notion: total[notion] / len(decisions) for notion in known}

    if not known:
        return
    width = sum(3 * sheet.groups * sheet.classes for sheet in panels[0].sheets)
    drawn = resampled(chosen[1], difference, replicates, np.random.default_rng(0), width)
    for notion in known:
        single = [after[notion] - before[notion] for before, after in zip(values[::2], values[1::2], strict=True)]
        interval = percentiles(drawn[notion])
        if interval is not None:
            beyond = min(int((drawn[notion] <= 0).sum()), int((drawn[notion] >= 0).sum()))
            yield {
                "figure": f"fairness/{notion}",
                "n": len(single),
                "difference": statistics.fmean(single),
                "interval": list(interval),
                "p": min(1.0, 2 * (beyond + 1) / (replicates + 1)),
                "narrower": sum(one < 0 for one in single),
            }


def _kept(run: ArmRun) -> Mapping[str, Tensor] | None:
    tensors = kept_tensors(run)
    return tensors if all(key in tensors for key in _KEYS) else None
