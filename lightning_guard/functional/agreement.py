"""How alike two explanations of the same example are."""

import torch
from torch import Tensor


def rank_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's correlation of each example's values, ``(N,)`` in [-1, 1]; equal values share their mean rank.

    Args:
        first: ``(N, D)``.
        second: ``(N, D)``.

    Returns:
        NaN where all values of an example are equal.

    Example:
        >>> rank_correlation(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[10.0, 30.0, 20.0]]))
        tensor([0.5000], dtype=torch.float64)
    """
    one, other = (_ranks(part) for part in (first, second))
    one, other = (part - part.mean(1, keepdim=True) for part in (one, other))
    return (one * other).sum(1) / (one.square().sum(1) * other.square().sum(1)).sqrt()


def _ranks(values: Tensor) -> Tensor:
    ranks = torch.empty(values.shape, dtype=torch.float64)
    for row, own in enumerate(values):
        _, place, count = own.unique(return_inverse=True, return_counts=True)
        ranks[row] = (count.cumsum(0) - (count - 1) / 2).double()[place]
    return ranks


def top_overlap(first: Tensor, second: Tensor, top: int) -> Tensor:
    """Share of the largest absolute values that both explanations of an example have in common, ``(N,)`` in [0, 1].

    Args:
        first: ``(N, D)``.
        second: ``(N, D)``.
        top: how many are the largest, between 1 and D.

    Example:
        >>> top_overlap(torch.tensor([[3.0, -2.0, 0.0]]), torch.tensor([[0.0, 2.0, 1.0]]), top=2)
        tensor([0.5000], dtype=torch.float64)
    """
    chosen = [torch.zeros(part.shape, dtype=torch.bool) for part in (first, second)]
    for mask, part in zip(chosen, (first, second), strict=True):
        mask.scatter_(1, part.abs().topk(top, dim=1).indices, True)
    return (chosen[0] & chosen[1]).sum(1).double() / top
