"""Means and areas under curves of groups, and how they vary together with the choice of examples."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_guard.evaluation.base import Interval
from lightning_guard.evaluation.families import Family
from lightning_guard.evaluation.table import percentiles


class GroupValues(NamedTuple):
    """A number for each group of a family.

    Args:
        family: of the groups.
        value: ``(G,)``; NaN where it cannot be estimated.
        influence: how much each example moves the value of its group ``(N,)``: the derivative by its weight.
        counted: the groups ``(G,)`` that have enough examples to be judged.
    """

    family: Family
    value: Tensor
    influence: Tensor
    counted: Tensor


def group_means(values: Tensor, family: Family, min_support: int) -> GroupValues:
    """The mean of each group.

    Args:
        values: ``(N,)``, float64.
        family: of groups.
        min_support: groups of fewer examples are not judged.

    Example:
        >>> family = Family("sex", torch.tensor([0, 0, 1]), ["f", "m"])
        >>> group_means(torch.tensor([1.0, 3.0, 5.0]).double(), family, 1).value.tolist()
        [2.0, 5.0]
    """
    known, groups = family.group >= 0, len(family.names)
    place = family.group[known]
    count = torch.bincount(place, minlength=groups).double()
    mean = torch.zeros(groups, dtype=torch.float64).index_add_(0, place, values[known]) / count
    influence = torch.zeros(len(values), dtype=torch.float64)
    influence[known] = (values[known] - mean[place]) / count[place]
    return GroupValues(family, mean, influence, count >= max(1, min_support))


def group_aucs(score: Tensor, positive: Tensor, family: Family, min_support: int) -> GroupValues:
    """The area under the ROC curve within each group, equal scores counting half.

    Args:
        score: ``(N,)``, of any scale; larger is more positive.
        positive: ``(N,)`` of bool.
        family: of groups.
        min_support: groups of fewer positives or fewer negatives are not judged.

    Reference:
        DeLong, DeLong and Clarke-Pearson, Comparing the areas under two or more correlated receiver operating
        characteristic curves, Biometrics 44, 1988.

    Example:
        >>> family = Family("sex", torch.tensor([0, 0, 0, 0]), ["f"])
        >>> positive = torch.tensor([False, False, True, True])
        >>> group_aucs(torch.tensor([0.1, 0.4, 0.4, 0.8]), positive, family, 1).value.tolist()
        [0.875]
    """
    groups = len(family.names)
    value = torch.full((groups,), torch.nan, dtype=torch.float64)
    counted, influence = torch.zeros(groups, dtype=torch.bool), torch.zeros(len(score), dtype=torch.float64)
    for group in range(groups):
        inside = family.group == group
        ones, zeros = (inside & positive).nonzero()[:, 0], (inside & ~positive).nonzero()[:, 0]
        counted[group] = min(len(ones), len(zeros)) >= max(1, min_support)
        if len(ones) and len(zeros):
            below = _share_below(score[ones], score[zeros])  # of the negatives, for each positive
            above = 1 - _share_below(score[zeros], score[ones])
            value[group] = below.mean()
            influence[ones], influence[zeros] = (below - value[group]) / len(ones), (above - value[group]) / len(zeros)
    return GroupValues(family, value, influence, counted)


def largest_gap(found: Sequence[GroupValues], drawn: Sequence[Tensor] | None = None) -> Tensor:
    """The largest minus the smallest value of judged groups, of the worst family; NaN if no two can be compared.

    Args:
        found: families of groups.
        drawn: values ``(B, G)`` in their place, from :func:`jointly`; the result is then ``(B,)``.
    """
    values = [one.value[None] for one in found] if drawn is None else drawn
    gaps = [
        value[:, one.counted].amax(1) - value[:, one.counted].amin(1)
        for one, value in zip(found, values, strict=True)
        if one.counted.sum() > 1
    ]
    if not gaps:
        return torch.full((1 if drawn is None else len(values[0]),), torch.nan, dtype=torch.float64)
    return torch.stack(gaps).amax(0)


def highest(found: Sequence[GroupValues], drawn: Sequence[Tensor] | None = None) -> Tensor:
    """The largest value of any judged group; arguments and result as of :func:`largest_gap`."""
    values = [one.value[None] for one in found] if drawn is None else drawn
    tops = [value[:, one.counted].amax(1) for one, value in zip(found, values, strict=True) if one.counted.any()]
    if not tops:
        return torch.full((1 if drawn is None else len(values[0]),), torch.nan, dtype=torch.float64)
    return torch.stack(tops).amax(0)


def jointly(found: Sequence[GroupValues], replicates: int, draws: np.random.Generator) -> list[Tensor]:
    """Values ``(replicates, G)`` of each family as other examples would give them.

    Smooth statistics of many examples are close to normal. Their covariance, over groups and families that share
    examples, is that of the sums of influences (the infinitesimal jackknife), so no example is drawn again: the cost
    does not grow with replicates times examples, as it does for the bootstrap, which gives the same.

    Reference:
        Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 21.
    """
    sizes = [len(one.value) for one in found]
    covariance = torch.zeros(sum(sizes), sum(sizes), dtype=torch.float64)
    starts = np.cumsum([0, *sizes]).tolist()
    for i, one in enumerate(found):
        for j, other in enumerate(found[: i + 1]):
            both = (one.family.group >= 0) & (other.family.group >= 0)
            place = one.family.group[both] * sizes[j] + other.family.group[both]
            product = (one.influence * other.influence)[both]
            block = torch.bincount(place, product, minlength=sizes[i] * sizes[j]).reshape(sizes[i], sizes[j])
            covariance[starts[i] : starts[i + 1], starts[j] : starts[j + 1]] = block
            covariance[starts[j] : starts[j + 1], starts[i] : starts[i + 1]] = block.T
    spread, direction = torch.linalg.eigh(covariance)
    root = direction * spread.clamp_min(0).sqrt()
    normal = torch.from_numpy(draws.standard_normal((replicates, len(root))))
    drawn = torch.cat([one.value for one in found]) + normal @ root.T
    return list(drawn.split(sizes, 1))


def between(drawn: Tensor, low: float = -torch.inf, high: float = torch.inf) -> Interval | None:
    """The 95% interval of replicates, inside what is possible."""
    found = percentiles(drawn)
    return None if found is None else (max(low, found[0]), min(high, found[1]))


def _share_below(score: Tensor, others: Tensor) -> Tensor:
    ordered = others.sort().values
    low, high = torch.searchsorted(ordered, score), torch.searchsorted(ordered, score, right=True)
    return (low + high).double() / (2 * len(others))
