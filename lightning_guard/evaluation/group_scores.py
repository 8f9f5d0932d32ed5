"""What the scores of a classifier say of groups: loss, calibration and ranking."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lightning_guard.evaluation.base import Bars, Curve, Evidence, Figure
from lightning_guard.evaluation.families import Family, some
from lightning_guard.evaluation.group_values import (
    GroupValues,
    between,
    group_aucs,
    group_means,
    highest,
    jointly,
    largest_gap,
)
from lightning_guard.functional import example_losses

_MOST_CURVES = 4  # groups; more would drown the page
_MOST_LABELS = 50  # classes or labels that are ranked one by one
_ROC = torch.linspace(0, 1, 51, dtype=torch.float64)


def score_evidence(
    kin: Sequence[Family],
    names: Sequence[Sequence[str]],
    logits: Tensor,
    target: Tensor,
    several: bool,
    min_support: int,
    bins: int,
    replicates: int,
    draws: np.random.Generator,
) -> Evidence:
    """Loss of the worst group, calibration error of the worst group, gap in AUC, and their bars and curves.

    Args:
        kin: families of groups.
        names: how each family's groups are shown.
        logits: ``(N,)``, or ``(N, C)``.
        target: ``(N,)``, or ``(N, C)`` of several labels.
        several: whether there are several labels.
        min_support: groups of fewer examples, or for AUC fewer of either class, are not judged.
        bins: of the calibration error.
        replicates: samples of the intervals.
        draws: where chance comes from.
    """
    evidence = Evidence()

    def add(
        key: str, value: Tensor, label: str, unit: str, better: Literal["higher", "lower"], about: str, drawn: Tensor
    ) -> None:
        number = float(value) if value.isfinite() else None
        evidence.figures[f"fairness/{key}"] = Figure(number, label, unit, better, about)
        interval = between(drawn, 0.0, np.inf if unit == "nats" else 1.0) if number is not None else None
        if interval is not None:
            evidence.intervals[f"fairness/{key}"] = interval

    losses = example_losses(logits.double(), target.double() if several else target)
    if not bool(losses.isfinite().all()):
        evidence.notes.append("The loss of a group is infinite: a logit is.")
    means = [group_means(losses, family, min_support) for family in kin]
    about = "The highest mean cross-entropy of any group" + (", summed over the labels." if several else ".")
    nothing = torch.full((1,), torch.nan)
    drawn = highest(means, jointly(means, replicates, draws)) if bool(losses.isfinite().all()) else nothing
    add("worst_group_loss", highest(means)[0], "Loss of the worst group", "nats", "lower", about, drawn)

    logits = logits.double().nan_to_num()  # infinite ones become the largest numbers, in the same order
    columns = _columns(logits, target, several)
    binary = logits.dim() == 1 or (logits.shape[1] == 2 and not several)
    errors = _calibration(evidence, kin, names, logits, target, columns if several else None, min_support, bins)
    if len(columns) > _MOST_LABELS:
        evidence.notes.append(f"AUC by group was not measured: there are {len(columns)} classes to be ranked.")
        return evidence
    areas = [group_aucs(score, positive, family, min_support) for score, positive in columns for family in kin]
    rest = "" if binary else ", each class against the rest, worst class" if not several else ", worst label"
    about = f"Largest minus smallest of the groups' areas under the ROC curve{rest}."
    drawn = largest_gap(areas, jointly(_estimable(areas), replicates, draws))
    add("auc_gap", largest_gap(areas)[0], "AUC gap", "ratio", "lower", about, drawn)
    small = [
        own[number]
        for area, own in zip(areas, [*names] * len(columns), strict=True)
        for number in (~area.counted).nonzero()[:, 0].tolist()
    ]
    if small and evidence.figures["fairness/auc_gap"].value is not None:
        evidence.doubts["fairness/auc_gap"] = [f"Too few examples to be judged, so not in it: {some(small)}."]
    if not binary:
        return evidence
    everyone = [name for family in names for name in family]
    about = "How often an example of class 1 scores above one of class 0 of its group; ties count half."
    evidence.bars["fairness/auc"] = Bars(
        everyone, _listed(torch.cat([area.value for area in areas])), "AUC by group", "AUC", about, "ratio"
    )
    shown = [
        (family.group == number, name)
        for family, own, counted in zip(kin, names, errors, strict=True)
        for number, name in enumerate(own)
        if counted[number]
    ]
    for number, (inside, name) in enumerate(shown if len(shown) <= _MOST_CURVES else ()):
        score, positive = columns[0][0][inside], columns[0][1][inside]
        evidence.curves[f"fairness/reliability_{number}"] = _reliability(score.sigmoid(), positive, name, bins)
        if 0 < positive.sum() < len(positive):
            evidence.curves[f"fairness/roc_{number}"] = _roc(score, positive, name)
    return evidence


def calibration_errors(
    probability: Tensor, happened: Tensor, group: Tensor, groups: int, bins: int
) -> tuple[Tensor, Tensor]:
    r"""Expected calibration error of each group, :math:`\sum_b \frac{n_b}{n} |\bar y_b - \bar p_b|`, and by chance.

    Args:
        probability: ``(N,)`` in [0, 1].
        happened: ``(N,)`` of bool.
        group: ``(N,)``, negative is unknown.
        groups: number of groups.
        bins: number of equally wide bins of the probability.

    Returns:
        Errors ``(G,)``, NaN for a group without examples, and what probabilities that are exactly right would show in
        as many examples on average.

    Reference:
        Naeini, Cooper and Hauskrecht, Obtaining Well Calibrated Probabilities Using Bayesian Binning, AAAI 2015.

    Example:
        >>> p, happened = torch.tensor([0.75, 0.75]), torch.tensor([True, False])
        >>> calibration_errors(p, happened, torch.zeros(2).long(), 1, 15)[0].tolist()
        [0.25]
    """
    probability, known = probability.double(), group >= 0
    place = group * bins + (probability * bins).long().clamp_max(bins - 1)
    excess, variance = (
        torch.bincount(place[known], part[known], minlength=groups * bins).reshape(groups, bins)
        for part in (probability - happened.double(), probability * (1 - probability))
    )
    count = torch.bincount(group[known], minlength=groups)
    return excess.abs().sum(1) / count, (2 / torch.pi * variance).sqrt().sum(1) / count


def _columns(logits: Tensor, target: Tensor, several: bool) -> list[tuple[Tensor, Tensor]]:
    """A score and whether it should be high, of each class or label; the log odds, so that two classes are one."""
    if logits.dim() == 1:
        return [(logits, target == 1)]
    if several:
        return list(zip(logits.unbind(1), (target == 1).unbind(1), strict=True))
    if logits.shape[1] == 2:
        return [(logits[:, 1] - logits[:, 0], target == 1)]
    share = logits.log_softmax(1)
    return [(share[:, c], target == c) for c in range(logits.shape[1])]


def _calibration(
    evidence: Evidence,
    kin: Sequence[Family],
    names: Sequence[Sequence[str]],
    logits: Tensor,
    target: Tensor,
    labels: list[tuple[Tensor, Tensor]] | None,
    min_support: int,
    bins: int,
) -> list[Tensor]:
    """Adds the figure, bars and note; returns which groups are judged."""
    of = "the probability of class 1"
    if labels is not None:
        pairs, of = [(score.sigmoid(), positive) for score, positive in labels], "the probability of the worst label"
    elif logits.dim() == 2 and logits.shape[1] > 2:
        confidence, decision = logits.softmax(1).max(1)
        pairs, of = [(confidence, decision == target)], "the confidence"
    else:
        score, positive = _columns(logits, target, False)[0]
        pairs = [(score.sigmoid(), positive)]
    worst, counted = (0.0, 0.0, ""), []
    values: list[float | None] = []
    for family, own in zip(kin, names, strict=True):
        found = [calibration_errors(p, happened, family.group, len(own), bins) for p, happened in pairs]
        error, which = torch.stack([one for one, _ in found]).max(0)
        chance = torch.stack([one for _, one in found]).gather(0, which[None])[0]
        enough = torch.bincount(family.group[family.group >= 0], minlength=len(own)) >= max(1, min_support)
        counted.append(enough)
        values += _listed(error)
        for number in enough.nonzero()[:, 0].tolist():
            worst = max(worst, (float(error[number]), float(chance[number]), own[number]))
    label = "Calibration error of the worst group"
    comes = "is right" if of == "the confidence" else "comes true"
    about = f"|{of} - how often it {comes}|, averaged over {bins} equally wide bins of it (Naeini et al., 2015)."
    value = worst[0] if worst[2] else None
    evidence.figures["fairness/calibration"] = Figure(value, label, "fraction", "lower", about)
    if worst[2]:
        evidence.notes.append(
            f"The calibration error of {worst[2]} is {worst[0]:.1%}; probabilities that are exactly right would show "
            f"{worst[1]:.1%} in as many examples."
        )
    everyone = [name for own in names for name in own]
    evidence.bars["fairness/calibration"] = Bars(
        everyone, values, "Calibration error by group", "Calibration error", about, "fraction"
    )
    return counted


def _reliability(probability: Tensor, positive: Tensor, name: str, bins: int) -> Curve:
    place = (probability * bins).long().clamp_max(bins - 1)
    happened = torch.bincount(place, positive.double(), minlength=bins) / torch.bincount(place, minlength=bins)
    centres = [(b + 0.5) / bins for b in range(bins)]
    about = "How often class 1 happens where it is predicted with this probability; calibrated is the diagonal."
    return Curve(
        centres, _listed(happened), f"Reliability, {name}", "Predicted probability", "Frequency", about,
        "fraction", "fraction",
    )  # fmt: skip


def _roc(score: Tensor, positive: Tensor, name: str) -> Curve:
    order = score.argsort(descending=True)
    last = torch.cat([score[order][1:] != score[order][:-1], torch.tensor([True])])  # of equal scores
    true, false = ((hit[order].cumsum(0)[last] / hit.sum()).double() for hit in (positive, ~positive))
    heights = np.interp(_ROC, np.append(0, false), np.append(0, true)).tolist()
    about = "True positive rate at each false positive rate, over all thresholds."
    return Curve(
        _ROC.tolist(), heights, f"ROC, {name}", "False positive rate", "True positive rate", about,
        "fraction", "fraction",
    )  # fmt: skip


def _estimable(found: Sequence[GroupValues]) -> list[GroupValues]:
    """Without the groups that have no value, which would spoil the others' draws; they are not counted."""
    return [one._replace(value=one.value.nan_to_num()) for one in found]


def _listed(values: Tensor) -> list[float | None]:
    return [value if np.isfinite(value) else None for value in values.double().tolist()]
