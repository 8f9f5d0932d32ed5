"""Weight sharing: few distinct values for many weights."""

import torch
from torch import Tensor


def linear_codebook(values: Tensor, size: int) -> Tensor:
    """``size`` values spread evenly from the smallest to the largest, where k-means begins.

    Even spacing keeps the few large weights, which matter most (Han et al., 2016, section 3.2).

    Example:
        >>> linear_codebook(torch.tensor([-1.0, 0.0, 1.0]), 3)
        tensor([-1.,  0.,  1.])
    """
    low, high = (float(edge) for edge in values.aminmax())
    return torch.linspace(low, high, size, dtype=values.dtype, device=values.device)


def nearest(values: Tensor, codebook: Tensor) -> Tensor:
    """The place of the nearest entry of a sorted codebook for each value, of two equally near ones the lower.

    Example:
        >>> nearest(torch.tensor([-1.0, 0.4, 0.6]), torch.tensor([0.0, 1.0]))
        tensor([0, 0, 1])
    """
    return torch.bucketize(values, (codebook[1:] + codebook[:-1]) / 2)


def cluster_means(values: Tensor, labels: Tensor, codebook: Tensor) -> Tensor:
    """The mean of each cluster; an entry without values stays what it is.

    Sums are formed in float64 in a fixed order, so that processes agree to the bit.

    Args:
        values: of any shape.
        labels: the cluster of each value, in ``[0, K)``.
        codebook: ``(K,)``.

    Example:
        >>> cluster_means(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0, 0, 2]), torch.tensor([0.0, 5.0, 9.0]))
        tensor([1.5000, 5.0000, 6.0000])
    """
    flat, where = values.detach().flatten().double(), labels.flatten()
    if values.is_cuda:  # bincount adds in any order there
        masks = [where == j for j in range(len(codebook))]
        sums = torch.stack([torch.where(mask, flat, 0.0).sum() for mask in masks])
        counts = torch.stack([mask.sum() for mask in masks])
    else:
        sums = torch.bincount(where, flat, minlength=len(codebook))
        counts = torch.bincount(where, minlength=len(codebook))
    return torch.where(counts > 0, sums / counts.clamp_min(1), codebook.double()).to(codebook.dtype)


def kmeans(values: Tensor, size: int, rounds: int = 100) -> tuple[Tensor, Tensor]:
    """K-means of numbers by Lloyd's iteration from :func:`linear_codebook`; deterministic.

    In one dimension clusters are intervals, so values are sorted once and a round costs next to nothing.

    Args:
        values: of any shape, finite.
        size: clusters, at least 1.
        rounds: most iterations; it ends earlier where nothing changes any more.

    Returns:
        The sorted codebook ``(K,)`` and the label of each value, of the values' shape. ``K`` may be less than ``size``:
        clusters that are empty in the end are left out.

    | case                                 | result                            |
    |--------------------------------------|-----------------------------------|
    | no more distinct values than ``size`` | every value is kept as it is     |
    | all values equal                     | one cluster                       |
    | no values                            | an empty codebook                 |

    Reference:
        Han, Mao and Dally, Deep Compression, ICLR 2016, arXiv:1510.00149.

    Example:
        >>> codebook, labels = kmeans(torch.tensor([0.9, -1.0, 1.1, -3.0]), 3)
        >>> codebook, labels
        (tensor([-3., -1.,  1.]), tensor([2, 1, 2, 0]))
    """
    flat = values.detach().flatten()
    if not flat.numel():
        return flat, torch.zeros_like(values, dtype=torch.long)
    ordered = flat.sort().values
    distinct = torch.unique_consecutive(ordered)
    if len(distinct) <= size:
        return distinct, torch.searchsorted(distinct, values.contiguous())
    wide = torch.cat([ordered.new_zeros(1, dtype=torch.float64), ordered.double().cumsum(0)])
    codebook = linear_codebook(ordered, size)
    cuts = None
    for _ in range(rounds):
        inner = torch.searchsorted(ordered, (codebook[1:] + codebook[:-1]) / 2, right=True)
        now = torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), len(ordered))])
        if cuts is not None and torch.equal(now, cuts):
            break
        cuts, counts = now, now.diff()
        means = wide[now].diff() / counts.clamp_min(1)
        codebook = torch.where(counts > 0, means, codebook.double()).to(codebook.dtype)
    assert cuts is not None
    codebook = codebook[cuts.diff() > 0]
    return codebook, nearest(values, codebook)
