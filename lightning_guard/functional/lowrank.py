"""Layers as the product of two thin ones."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from lightning_guard.functional.reshaping import CONVOLUTIONS, blank_pair


def singular_values(layer: nn.Module) -> Tensor:
    """Singular values of a layer's weight as a matrix ``(out, in * kernel)``, descending, in float64 on the CPU.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> layer.weight.data = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
        >>> singular_values(layer)
        tensor([4., 3.], dtype=torch.float64)
    """
    return torch.linalg.svdvals(_matrix(layer))


def rank_of(layer: nn.Module, rank: int | float | None = None, energy: float | None = None) -> int:
    r"""The rank to give a layer.

    Args:
        layer: a Linear or a convolution.
        rank: itself (int), or a fraction of the full rank (float), rounded up.
        energy: the fraction of :math:`\sum_i \sigma_i^2` that is to be left, in (0, 1].

    | case                           | result                  |
    |--------------------------------|-------------------------|
    | ``rank`` above the full rank   | the full rank           |
    | a weight of zeros              | 1 with ``energy``       |

    Raises:
        ValueError: unless exactly one of both is given, within its range.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> layer.weight.data = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
        >>> rank_of(layer, 1), rank_of(layer, 0.75), rank_of(layer, energy=0.6), rank_of(layer, energy=0.7)
        (1, 2, 1, 2)
    """
    check_rank(rank, energy)
    full = min(_shape(layer))
    if energy is not None:
        squares = singular_values(layer).square()
        left = squares.cumsum(0) / squares.sum().clamp_min(1e-300)
        return min(int((left < energy - 1e-12).sum()) + 1, full) if squares.sum() else 1
    assert rank is not None
    return min(rank if isinstance(rank, int) else math.ceil(rank * full), full)


def check_rank(rank: int | float | None, energy: float | None) -> None:
    """Refuse what is no rank and no energy; see :func:`rank_of`."""
    if (rank is None) == (energy is None):
        raise ValueError(f"rank={rank} and energy={energy}: give one of them, and leave the other out")
    if rank is not None and (rank < 1 if isinstance(rank, int) else not 0 < rank <= 1):
        raise ValueError(
            f"rank={rank} is no rank; give a whole number from 1, or a fraction of the full rank in (0, 1]"
        )
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy={energy} is no fraction of the squared singular values; give a number in (0, 1]")


def saves(layer: nn.Module, rank: int) -> bool:
    """Whether two layers of this rank have fewer weights than the one, ``rank (out + in) < out in``."""
    out, inn = _shape(layer)
    return rank * (out + inn) < out * inn


def factorized(layer: nn.Module, rank: int) -> nn.Sequential:
    r"""Two layers in the place of one, the best of this rank: :math:`W \approx U_r \Sigma_r V_r^\top`.

    The first has weights :math:`\Sigma_r^{1/2} V_r^\top`, the second :math:`U_r \Sigma_r^{1/2}` and the bias, so both
    are of one size (Khodak et al., 2021). A convolution becomes one to ``rank`` channels and a convolution of kernel
    size 1 behind it. What is lost is the least that can be, :math:`\|W - W_r\|_F^2 = \sum_{i > r} \sigma_i^2`
    (Eckart and Young, 1936).

    Args:
        layer: a Linear, or a convolution without groups.
        rank: :math:`r`, from 1 to the full rank.

    Returns:
        A Sequential of two layers of the same kind, on the device and in the type of the layer; the bias is the
        layer's own parameter.

    Raises:
        ValueError: if the layer is another, or has not that rank.

    Reference:
        Eckart and Young, The approximation of one matrix by another of lower rank, Psychometrika 1936. Khodak et al.,
        Initialization and regularization of factorized neural layers, ICLR 2021, arXiv:2105.01029.

    Example:
        >>> layer, x = nn.Linear(6, 4), torch.ones(2, 6)
        >>> torch.allclose(factorized(layer, 4)(x), layer(x), atol=1e-5)
        True
        >>> factorized(layer, 1)
        Sequential(
          (0): Linear(in_features=6, out_features=1, bias=False)
          (1): Linear(in_features=1, out_features=4, bias=True)
        )
    """
    matrix = _matrix(layer)
    if not 1 <= rank <= min(matrix.shape):
        raise ValueError(f"rank={rank} is none of a layer with a weight of {matrix.shape[0]} x {matrix.shape[1]}")
    pair: Any = blank_pair(layer, rank, layer.bias is not None)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    root = s[:rank].sqrt()
    with torch.no_grad():
        pair[0].weight.copy_((root.unsqueeze(1) * v[:rank]).reshape(pair[0].weight.shape))
        pair[1].weight.copy_((u[:, :rank] * root).reshape(pair[1].weight.shape))
    if layer.bias is not None:
        pair[1].bias = layer.bias
    trains = bool(layer.weight.requires_grad)
    for thin in pair:
        thin.weight.requires_grad_(trains)
    return pair.train(layer.training)


def _matrix(layer: Any) -> Tensor:
    _shape(layer)
    return layer.weight.detach().flatten(1).double().cpu()


def _shape(layer: Any) -> tuple[int, int]:
    if not isinstance(layer, (nn.Linear, *CONVOLUTIONS)):
        raise ValueError(f"a {type(layer).__name__} is no Linear and no convolution, so it has no rank")
    return len(layer.weight), layer.weight[0].numel()
