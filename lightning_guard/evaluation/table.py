"""Group rates and their uncertainty, from counts by group, label and prediction."""

import numpy as np
import torch
from torch import Tensor

from lightning_guard.functional import NOTIONS, Notion

_AT_ONCE = 4_000_000  # cells of the tables that are in memory at the same time


def tabulate(group: Tensor, target: Tensor, decision: Tensor, groups: int, classes: int) -> Tensor:
    """Counts of examples ``(G, C, C)`` by group, label and prediction, in float64.

    Args:
        group: ``(N,)`` in [0, ``groups``).
        target: ``(N,)`` in [0, ``classes``).
        decision: ``(N,)`` in [0, ``classes``).
        groups: number of groups.
        classes: number of classes.

    Example:
        >>> tabulate(torch.tensor([0, 0]), torch.tensor([1, 0]), torch.tensor([1, 1]), 1, 2).tolist()
        [[[0.0, 1.0], [0.0, 1.0]]]
    """
    cell = (group * classes + target.long()) * classes + decision
    return torch.bincount(cell, minlength=groups * classes**2).double().reshape(groups, classes, classes)


def rates(table: Tensor, notion: Notion) -> tuple[Tensor, Tensor]:
    """Numerators and denominators of the rates that a notion compares.

    Args:
        table: counts ``(..., G, C, C)``.
        notion: see :func:`lightning_guard.functional.rate_sums`, which gives the same for examples.

    Returns:
        Two tensors ``(..., G, R)``. ``R`` is 1 for two classes, where class 1 says it all, and ``C`` for
        more; for equalized odds true positive rates are followed by as many false positive rates.
    """
    first = 1 if table.shape[-1] == 2 else 0
    hits = table.diagonal(dim1=-2, dim2=-1)[..., first:]
    selected, actual = table.sum(-2)[..., first:], table.sum(-1)[..., first:]
    everyone = table.sum((-2, -1)).unsqueeze(-1).expand_as(actual)
    if notion == "demographic_parity":
        return selected, everyone
    if notion == "equal_opportunity":
        return hits, actual
    return torch.cat([hits, selected - hits], -1), torch.cat([actual, everyone - actual], -1)


def gaps(table: Tensor, notion: Notion) -> Tensor:
    """The gap between groups in each table ``(..., G, C, C)``; NaN where a rate has no example."""
    numerator, denominator = rates(table, notion)
    rate = numerator / denominator
    return (rate.amax(-2) - rate.amin(-2)).amax(-1)  # each of these passes NaN on


def bootstrap(table: Tensor, replicates: int, draws: np.random.Generator) -> dict[Notion, Tensor]:
    """Gaps ``(replicates,)`` in tables of as many examples, drawn with the frequencies of this one.

    Group rates depend on the examples through their table alone, so this is the bootstrap over examples, in
    milliseconds.
    """
    filled = table.flatten().nonzero()[:, 0]  # a cell without examples stays without
    frequency = table.flatten()[filled] / table.sum()
    found: dict[Notion, list[Tensor]] = {notion: [] for notion in NOTIONS}
    at_once = max(1, _AT_ONCE // table.numel())
    for start in range(0, replicates, at_once):
        drawn = draws.multinomial(int(table.sum()), frequency.numpy(), size=min(at_once, replicates - start))
        tables = torch.zeros(len(drawn), table.numel(), dtype=torch.float64)
        tables[:, filled] = torch.from_numpy(drawn).double()
        for notion in NOTIONS:
            found[notion].append(gaps(tables.reshape(-1, *table.shape), notion))
    return {notion: torch.cat(parts) for notion, parts in found.items()}


def chance_gap(table: Tensor, notion: Notion, replicates: int, draws: np.random.Generator) -> float:
    """The mean gap of groups of these sizes that all have the rate of their union."""
    numerator, denominator = rates(table, notion)
    pooled = (numerator.sum(0) / denominator.sum(0)).clamp(0, 1)
    drawn = draws.binomial(denominator.long().numpy(), pooled.numpy(), size=(replicates, *denominator.shape))
    rate = torch.from_numpy(drawn) / denominator
    return float((rate.amax(1) - rate.amin(1)).amax(1).mean())
