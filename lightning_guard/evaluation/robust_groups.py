"""How differently attacks hurt groups."""

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lightning_guard.evaluation.base import Evidence, Figure
from lightning_guard.evaluation.chance import chance_gaps
from lightning_guard.evaluation.families import Family, some
from lightning_guard.evaluation.table import Panel, TableNotion, percentiles

_MOST_GROUPS = 50  # more are identifiers rather than groups
_LABELS: dict[TableNotion, str] = {
    "accuracy_parity": "accuracy gap",
    "demographic_parity": "demographic parity gap",
}


def under_attack(logits: Tensor, target: Tensor, standing: Tensor) -> Tensor:
    """The class ``(N,)`` that a model gives each example under attack: its own, or the likeliest other one.

    Args:
        logits: at the point to which the attack took each example, ``(N,)`` or ``(N, C)``.
        target: classes ``(N,)``.
        standing: which examples ``(N,)`` are right at every point.

    Example:
        >>> logits = torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
        >>> under_attack(logits, torch.tensor([0, 0]), torch.tensor([True, False])).tolist()
        [0, 1]
    """
    if logits.dim() == 1:
        return torch.where(standing, target, 1 - target)
    # A model that draws numbers may be right again when it is asked once more, and yet it has fallen there.
    others = logits.masked_fill(torch.nn.functional.one_hot(target, logits.shape[1]).bool(), -torch.inf)
    return torch.where(standing, target, others.argmax(1))


def robust_groups(
    kin: Sequence[Family],
    target: Tensor,
    clean: Tensor,
    attacked: Tensor,
    classes: int,
    min_support: int = 30,
    replicates: int = 10_000,
    seed: int = 0,
) -> Evidence:
    """Accuracy under attack of the worst group, and the gaps between groups when every example is attacked.

    Gaps and intervals are those of :class:`lightning_guard.evaluation.Fairness`, of the attacked decisions.

    Args:
        kin: families of groups; the worst counts.
        target: classes ``(N,)``.
        clean: decisions ``(N,)`` without attack.
        attacked: decisions ``(N,)`` under attack, see :func:`under_attack`.
        classes: number of classes.
        min_support: a rate of fewer examples is not judged.
        replicates: samples drawn for the 95% intervals.
        seed: of these draws.

    | case                                   | result                              |
    |----------------------------------------|-------------------------------------|
    | no family                              | nothing                             |
    | fewer than two judged groups           | gaps are None                       |
    | no judged group                        | all are None                        |
    | group unknown (negative)               | counts nowhere                      |
    | more than 50 groups                    | not judged, and a note              |
    """
    evidence = Evidence()
    for family in kin:
        if len(family.names) > _MOST_GROUPS:
            evidence.notes.append(
                f"No gaps under attack between the {len(family.names)} groups of {family.name}: they look like "
                "identifiers; say where groups are with Batch(group=...)."
            )
    kin = [family for family in kin if 0 < len(family.names) <= _MOST_GROUPS]
    if not kin:
        return evidence
    panel, before = (Panel(kin, target, decision, min_support, classes) for decision in (attacked, clean))
    found, drawn = panel.values(), panel.bootstrap(replicates, np.random.default_rng(seed))
    small = {
        name: int(count)
        for family, own in zip(kin, panel.sums, strict=True)
        for name, count in zip(family.names, own.actual.sum(1).tolist(), strict=True)
        if count < min_support
    }
    worst = ", the worst attribute" if len(kin) > 1 else ""
    rest = "" if classes == 2 else ", each class against the rest, the worst class"

    def add(name: str, key: str, label: str, better: Literal["higher", "lower"], about: str) -> None:
        figure, known = f"robustness/{name}", found[key] == found[key]
        evidence.figures[figure] = Figure(found[key] if known else None, label, "fraction", better, about)
        interval = percentiles(drawn[key]) if known else None
        if interval is not None:
            evidence.intervals[figure] = interval
        if known and small:
            evidence.doubts[figure] = [f"Too few examples to be judged, so not in it: {some(list(small))}."]

    about = f"The lowest accuracy under attack of any group{worst}."
    add("worst_group", "worst_group_accuracy", "Accuracy under attack, worst group", "higher", about)
    about = f"Largest minus smallest of the groups' accuracies under attack{worst}."
    add("accuracy_gap", "accuracy_parity", "Accuracy gap under attack", "lower", about)
    about = (
        f"Largest minus smallest of the groups' selection rates{rest}{worst}, when each example is attacked so that it "
        "is not given its class."
    )
    add("demographic_parity", "demographic_parity", "Demographic parity gap under attack", "lower", about)
    if small:
        few = some([f"{name} has {count}" for name, count in small.items()])
        evidence.notes.append(f"Fewer than {min_support} examples that were attacked, so not judged: {few}.")
    evidence.notes += _beside(before, panel, seed)
    return evidence


def _beside(before: Panel, panel: Panel, seed: int) -> Iterator[str]:
    """What the gaps are to be seen beside: those without attack, and those by chance."""
    clean, chance = [], []
    for notion, label in _LABELS.items():
        worst, unhurt = panel.worst(notion), before.values()[notion]
        if worst is not None:
            own, counted = panel.sums[worst[0]], panel.counted[worst[0]][notion]
            shown = chance_gaps(own, notion, np.random.default_rng(seed), counted)
            chance.append(f"{label} {shown.mean():.1%} (19 times in 20 up to {shown.quantile(0.95):.1%})")
        if unhurt == unhurt:
            clean.append(f"{label} {unhurt:.1%}")
    if clean:
        yield f"Without attack the same examples show: {', '.join(clean)}."
    if chance:
        yield f"Under attack, groups of these sizes with equal rates would show by chance: {', '.join(chance)}."
