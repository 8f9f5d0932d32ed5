"""How differently a regression treats groups."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lightning_guard.evaluation.base import Bars, Evidence, Figure
from lightning_guard.evaluation.families import Family
from lightning_guard.evaluation.group_values import between, group_means, highest, jointly, largest_gap
from lightning_guard.evaluation.table import cells, percentiles, resampled

_DECILES = torch.arange(1, 10, dtype=torch.float64) / 10
_MOST_OUTPUTS = 50


def regression_evidence(
    kin: Sequence[Family],
    names: Sequence[Sequence[str]],
    prediction: Tensor,
    target: Tensor,
    min_support: int,
    replicates: int,
    draws: np.random.Generator,
) -> Evidence:
    """Gaps between groups in mean and distribution of the predictions, and the squared error of the worst group.

    Args:
        kin: families of groups.
        names: how each family's groups are shown.
        prediction: ``(N,)``, or ``(N, D)`` of several outputs, of which the worst counts.
        target: of the same shape.
        min_support: groups of fewer examples are not judged.
        replicates: samples of the intervals.
        draws: where chance comes from.
    """
    outputs = prediction.double().reshape(len(prediction), -1)
    errors = (prediction.double() - target.double()).square().reshape(len(prediction), -1).mean(1)
    if outputs.shape[1] > _MOST_OUTPUTS:
        return Evidence(notes=[f"No group gaps: {outputs.shape[1]} outputs are more than {_MOST_OUTPUTS}."])
    evidence = Evidence()
    worst = "" if outputs.shape[1] == 1 else " Of several outputs, the worst."

    def add(key: str, value: Tensor, drawn: Tensor, label: str, unit: str, about: str) -> None:
        better: Literal["lower"] = "lower"
        number = float(value) if value.isfinite() else None
        evidence.figures[f"fairness/{key}"] = Figure(number, label, unit, better, about)
        interval = between(drawn, low=0.0) if number is not None else None
        if interval is not None:
            evidence.intervals[f"fairness/{key}"] = interval

    means = [group_means(column, family, min_support) for column in outputs.unbind(1) for family in kin]
    about = f"Largest minus smallest of the groups' mean predictions.{worst}"
    drawn = largest_gap(means, jointly(means, replicates, draws))
    add("mean_parity", largest_gap(means)[0], drawn, "Mean parity gap", "target units", about)

    value, drawn = _quantile_parity(kin, outputs, min_support, replicates, draws)
    about = (
        "Largest difference between groups of the share of predictions up to a threshold, over nine thresholds: the "
        f"deciles of all predictions for test examples of known group.{worst}"
    )
    add("quantile_parity", value, drawn, "Quantile parity gap", "fraction", about)

    losses = [group_means(errors, family, min_support) for family in kin]
    drawn, about = highest(losses, jointly(losses, replicates, draws)), "The highest mean squared error of any group."
    add("worst_group_loss", highest(losses)[0], drawn, "Loss of the worst group", "squared target units", about)

    everyone = [name for own in names for name in own]
    for key, found, label, unit in (
        ("mean_prediction", means[: len(kin)] if outputs.shape[1] == 1 else [], "Mean prediction", "target units"),
        ("mean_squared_error", losses, "Mean squared error", "squared target units"),
    ):
        if found:
            heights = torch.cat([one.value for one in found]).tolist()
            about = f"{label} of the test examples of each group."
            evidence.bars[f"fairness/{key}"] = Bars(everyone, heights, f"{label} by group", label, about, unit)
    return evidence


def _quantile_parity(
    kin: Sequence[Family], outputs: Tensor, min_support: int, replicates: int, draws: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """The gap, and its replicates: shares up to a threshold are rates of a table, so they are drawn as a table."""
    known = torch.stack([family.group >= 0 for family in kin]).any(0)
    thresholds = torch.from_numpy(np.quantile(outputs[known].numpy(), _DECILES.numpy(), axis=0))  # (9, D)
    place = torch.stack(
        [torch.searchsorted(*map(torch.Tensor.contiguous, one)) for one in zip(thresholds.T, outputs.T, strict=True)],
        1,
    )  # how many thresholds lie below each prediction
    chosen, counts = cells(*(family.group for family in kin), place)
    counted = [torch.bincount(family.group[family.group >= 0]) >= max(1, min_support) for family in kin]

    def gap(drawn: Tensor) -> dict[str, Tensor]:
        found = [torch.full((len(drawn),), torch.nan, dtype=torch.float64)]
        for family, enough in zip(kin, counted, strict=True):
            if enough.sum() < 2:
                continue
            group = family.group[chosen]
            shares = [drawn[:, group == number] for number in enough.nonzero()[:, 0].tolist()]
            below = [
                (place[chosen][group == number][:, :, None] <= torch.arange(9)).double().flatten(1)
                for number in enough.nonzero()[:, 0].tolist()
            ]  # (k, D * 9): at most threshold t if no more than t thresholds lie below
            rate = torch.stack(
                [share @ which / share.sum(1, keepdim=True) for share, which in zip(shares, below, strict=True)]
            )
            found.append((rate.amax(0) - rate.amin(0)).amax(1))
        return {"gap": torch.stack(found[1:]).amax(0) if found[1:] else found[0]}

    width = max(len(family.names) for family in kin) * outputs.shape[1] * 9
    drawn = resampled(counts, gap, replicates, draws, width)["gap"]
    return gap(counts[None])["gap"][0], drawn if percentiles(drawn) is not None else torch.full((1,), torch.nan)
