"""Whether the arms of a comparison look at the same things as the baseline does, on the same examples."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from lightning_guard.evaluation import Evidence, Figure
from lightning_guard.functional.agreement import rank_correlation, top_overlap
from lightning_guard.report.again import kept_tensors
from lightning_guard.report.runs import ArmRun

_TOP = 0.1  # of the inputs, at least 3
_KEYS = ("attributions", "examples", "target")


def with_agreement(runs: Sequence[ArmRun], results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results, with how alike each arm's explanations are to the baseline's of the same seed.

    Seeds alone make explanations differ, so the baseline gets figures too: against itself of the next seed.
    That is the yardstick for the others.

    | case                                       | result                        |
    |--------------------------------------------|-------------------------------|
    | explanations are not asked for             | the results as they are       |
    | one seed                                   | no yardstick                  |
    | test examples differ                       | no figures for that run       |
    """
    first = runs[0].arm.name
    kept = {(run.arm.name, run.seed): found for run in runs if (found := _kept(run))}
    seeds = [seed for arm, seed in kept if arm == first]
    told = []
    for result in results:
        arm, seed = result["arm"], result["seed"]
        other = seed
        if arm == first and seed in seeds:
            other = seeds[(seeds.index(seed) + 1) % len(seeds)]
        pair = kept.get((first, other)), kept.get((arm, seed))
        if pair[0] is None or pair[1] is None or (arm == first and other == seed):
            told.append(result)
            continue
        found = asdict(_alike(pair[0], pair[1], first))
        told.append(result | {part: result[part] | found[part] for part in ("figures", "intervals")})
    return told


def _alike(base: Mapping[str, Tensor], own: Mapping[str, Tensor], than: str) -> Evidence:
    if any(not torch.equal(base[key], own[key]) for key in _KEYS[1:]):
        return Evidence()
    first, second = base["attributions"], own["attributions"]
    if first.shape != second.shape:
        return Evidence()
    top = min(first.shape[1], max(3, round(_TOP * first.shape[1])))
    evidence = Evidence()
    about = (
        f"Mean over {len(first)} test examples, of the score of the right class, against {than} of the same seed; "
        f"{than} itself against its next seed, which is what seeds alone change. Examples without any attribution are "
        "left out."
    )
    for key, label, values, told in (
        ("rank_correlation", "Explanations as the baseline's, rank correlation", rank_correlation(first, second), ""),
        ("top_overlap", "Explanations as the baseline's, top inputs", top_overlap(first, second, top),
         f"The {top} inputs that matter most that both have in common; by chance {top / first.shape[1]:.0%}. "),
    ):  # fmt: skip
        values = values[values.isfinite()]
        unit = "fraction" if key == "top_overlap" else "ratio"
        name = f"explanation/{key}"
        evidence.figures[name] = Figure(
            float(values.mean()) if len(values) else None, label, unit, None, f"{told}{about}"
        )
        if len(values) > 1:
            reach = 1.96 * float(values.std()) / len(values) ** 0.5
            mean, low = float(values.mean()), 0.0 if unit == "fraction" else -1.0
            evidence.intervals[name] = (max(low, mean - reach), min(1.0, mean + reach))
    return evidence


def _kept(run: ArmRun) -> Mapping[str, Tensor] | None:
    tensors = kept_tensors(run)
    found = {key: tensors[f"explanation/{key}"] for key in _KEYS if f"explanation/{key}" in tensors}
    return found if len(found) == len(_KEYS) else None
