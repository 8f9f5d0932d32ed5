"""The groups of a data set and their rates as sums of bounded contributions, so that noise can hide any one example."""

from collections.abc import Sequence
from itertools import product
from math import prod, sqrt

import torch
from torch import Tensor

from lightning_guard.functional.fairness.census import Census
from lightning_guard.functional.fairness.moments import Moments, Notion

OF_RATES: frozenset[Notion] = frozenset(
    {"demographic_parity", "equal_opportunity", "predictive_equality", "equalized_odds", "accuracy_parity"}
)


def joint(group: Tensor, target: Tensor | None, sizes: Sequence[int], classes: int) -> Tensor:
    """What each example contributes to a count by attributes and class: a one in one place, so its norm is 1.

    Args:
        group: whole numbers ``(N,)`` or ``(N, A)``, negative where unknown.
        target: classes ``(N,)``; None where there are none.
        sizes: values of each attribute, 0 to ``size - 1``; others count as unknown.
        classes: C; another class, or none, has a place of its own.

    Returns:
        ``(N, K)`` with K = (C + 1) times the product of the sizes plus one.

    Example:
        >>> joint(torch.tensor([1, -1]), torch.tensor([0, 1]), [2], classes=2).nonzero().tolist()
        [[0, 6], [1, 1]]
    """
    codes = group.reshape(len(group), -1).long()
    if codes.shape[1] != len(sizes):
        raise ValueError(f"groups={list(sizes)} are of {len(sizes)} attributes, and an example has {codes.shape[1]}")
    place = torch.zeros(len(codes), dtype=torch.long, device=codes.device)
    for column, size in zip(codes.T, sizes, strict=True):
        place = place * (size + 1) + torch.where((column >= 0) & (column < size), column + 1, 0)
    cls = torch.full_like(place, classes)
    if target is not None:
        target = target.reshape(-1).to(place.device)
        cls = torch.where((target >= 0) & (target < classes) & (target == target.long()), target.long(), classes)
    return torch.nn.functional.one_hot(place * (classes + 1) + cls, _places(sizes) * (classes + 1)).float()


def census_of(counts: Tensor, sizes: Sequence[int], units: int, intersections: bool = False) -> Census:
    """The census that noisy counts of :func:`joint` tell; a count below zero is none.

    Args:
        counts: ``(K,)``.
        sizes: as of :func:`joint`.
        units: examples of the data set, a public number.
        intersections: as of :class:`Census`.
    """
    classes = len(counts) // _places(sizes) - 1
    cells = counts.clamp_min(0).reshape(-1, classes + 1).double()
    rows = []
    for codes, own in zip(product(*(range(-1, size) for size in sizes)), cells, strict=True):
        rows.append([*codes, -1, float(own.sum())])
        rows += [[*codes, cls, float(n)] for cls, n in enumerate(own[:classes])]
    census = Census(intersections)
    census.restore({"rows": torch.tensor(rows, dtype=torch.float64), "total": float(units), "several": False})
    return census


def _places(sizes: Sequence[int]) -> int:
    return prod(size + 1 for size in sizes)


def histogram(found: Moments, members: Tensor, unit: float) -> Tensor:
    """What each example contributes to the counts of hard decisions, yes and no, of each rate and group.

    Args:
        found: hard moments ``(N, R)``, values of 0 and 1.
        members: ``(N, G)`` of 0 and 1.
        unit: from :func:`largest`; contributions are divided by it.

    Returns:
        ``(N, 2 R G)`` of norms at most 1.
    """
    counted = found.counted.float().unsqueeze(2) * members.float().unsqueeze(1)  # (N, R, G)
    yes = found.values.float().unsqueeze(2) * counted
    return torch.stack([yes, counted - yes], 1).flatten(1) / unit


def largest(notion: Notion, rates: int, families: int) -> float:
    """The largest norm of yes and no of an example: it is in one group of each family, and counts for some rates."""
    if notion not in OF_RATES:
        raise ValueError(f"notion={notion!r} has no rates of 0 and 1; give one of {', '.join(sorted(OF_RATES))}")
    classes = rates // 2 if notion == "equalized_odds" else rates  # one column of two classes
    counted = {"equal_opportunity": 1, "predictive_equality": max(classes - 1, 1)}.get(notion, classes)
    return sqrt(families * counted)


def table_of(sums: Tensor, rates: int, unit: float) -> Tensor:
    """Sums, squares and counts ``(3, R, G)`` from noisy sums of :func:`histogram`."""
    yes, no = (sums * unit).reshape(2, rates, -1)
    return torch.stack([yes, yes, yes + no])
