"""Ranges of activations that are estimated from noisy counts, where the examples are private."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

EDGES = torch.tensor([0.0, *(2.0**k for k in range(-4, 11))])
"""What a range may end at: 0, and the powers of two from 1/16 to 1024. They are public: no data decide them."""
CELLS = len(EDGES) + 1  # up to each edge, and beyond the last
_SURE = 3.5  # standard deviations above which a count is not noise, wherever in a hundred cells it stands
_MOST = 0.1  # standard deviation of all cells together, of the examples counted, from which on a range may be told


def range_rows(lows: Sequence[Tensor], highs: Sequence[Tensor]) -> Tensor:
    r"""Which cell the smallest and the largest input of each layer falls into, as one vector an example.

    An example has one entry a layer and side, each :math:`1 / \sqrt{2L}` for :math:`L` layers, so the vector has norm
    1 whatever the example is.

    Args:
        lows: of each layer the smallest input of each example, ``(N,)``.
        highs: of each layer the largest, ``(N,)``.

    Returns:
        ``(N, 2 * L * CELLS)`` in float32; a value that is not finite is in no cell.

    Example:
        >>> rows = range_rows([torch.tensor([-1.0, 0.0])], [torch.tensor([3.0, float("nan")])])
        >>> rows.shape, rows.norm(dim=1)
        (torch.Size([2, 34]), tensor([1.0000, 0.7071]))
    """
    sides = torch.stack([value for low, high in zip(lows, highs, strict=True) for value in (-low, high)], dim=1)
    cells = torch.bucketize(sides.float().clamp_min(0), EDGES.to(sides.device))
    rows = torch.zeros(*sides.shape, CELLS, device=sides.device)
    rows.scatter_(2, cells.unsqueeze(2), sides.isfinite().float().unsqueeze(2))
    return rows.flatten(1).div_(math.sqrt(sides.shape[1]))


class NoisyRanges:
    r"""The smallest ranges that most examples' inputs stay within, as noisy counts tell.

    Counts of each draw enter a moving average of weight ``momentum``. Of each side of each layer the range ends at the
    smallest edge that no more than

    .. math:: (1 - q)\, B + 3.5\, \sigma \sqrt m

    examples lie beyond, neither in the cell behind it (:math:`m = 1`) nor in all :math:`m` cells behind it together,
    nor behind any edge above it. :math:`B` are the examples of a draw as expected, :math:`\sigma` is the standard
    deviation of the noise in a cell. So noise alone hardly widens a range, and what it hides is clipped.

    Args:
        layers: :math:`L`.
        noise: standard deviation of the noise on a vector of :func:`range_rows`, over its norm.
        batch_size: :math:`B`.
        quantile: :math:`q`, the fraction of examples whose inputs shall not be clipped.
        momentum: weight of a new draw.

    | case                                            | result                                           |
    |-------------------------------------------------|--------------------------------------------------|
    | too few draws for the noise                     | no ranges yet, see :meth:`draws_needed`          |
    | a layer that no example has passed              | both sides end at 0                              |
    | inputs below 0 in no example                    | the lower end is 0                               |
    | inputs beyond the largest edge                  | clipped there                                    |

    Reference:
        Quantiles of a noisy histogram are post-processing of the Gaussian mechanism (Dwork et al., EUROCRYPT 2006).

    Example:
        >>> found = NoisyRanges(layers=1, noise=0.01, batch_size=4)
        >>> found.add(range_rows([torch.zeros(4)], [torch.tensor([0.5, 1.0, 2.0, 2.9])]).double().sum(0))
        >>> found.ranges()
        [(0.0, 4.0)]
    """

    def __init__(self, layers: int, noise: float, batch_size: int, quantile: float = 0.99, momentum: float = 0.02):
        self.layers, self.noise, self.batch_size = layers, noise, batch_size
        self.quantile, self.momentum = quantile, momentum
        self._sums = torch.zeros(2 * layers, CELLS, dtype=torch.float64)
        self._weight = self._square = 0.0  # of all draws so far, and the sum of their squares

    def add(self, sums: Tensor) -> None:
        """Count a draw, given the noisy sum of its rows ``(2 * L * CELLS,)``."""
        keep = 1 - self.momentum
        counts = sums.double().reshape(2 * self.layers, CELLS) * math.sqrt(2 * self.layers)
        self._sums = keep * self._sums + self.momentum * counts
        self._weight = keep * self._weight + self.momentum
        self._square = keep**2 * self._square + self.momentum**2

    @property
    def _error(self) -> float:
        """Standard deviation of the noise in one cell of the average, in examples."""
        if not self._weight:
            return math.inf
        return self.noise * math.sqrt(2 * self.layers * self._square) / self._weight

    @property
    def resolved(self) -> bool:
        """Whether the noise is small enough for a range to be told."""
        return self._error * math.sqrt(CELLS) <= _MOST * self.batch_size

    def draws_needed(self, most: int) -> int | None:
        """After how many draws ranges can be told; None if not within ``most``."""
        other = NoisyRanges(self.layers, self.noise, self.batch_size, self.quantile, self.momentum)
        for draw in range(1, most + 1):
            other.add(torch.zeros(1, dtype=torch.float64).expand(2 * self.layers * CELLS))
            if other.resolved:
                return draw
        return None

    def ranges(self) -> list[tuple[float, float]]:
        """The range of each layer's inputs; empty until they can be told."""
        if not self.resolved:
            return []
        counts = self._sums / self._weight
        beyond = counts.flip(1).cumsum(1).flip(1)[:, 1:]  # examples past each edge
        cells = torch.arange(CELLS - 1, 0, -1, dtype=torch.float64)
        few, error = (1 - self.quantile) * self.batch_size, _SURE * self._error
        fine = (beyond <= few + error * cells.sqrt()) & (counts[:, 1:] <= few + error)
        kept = fine.int().flip(1).cumprod(1).sum(1)  # from the top down to the first that is not
        ends = EDGES[(len(EDGES) - kept).clamp_max(len(EDGES) - 1)].reshape(-1, 2)
        return [(0.0 - low, high) for low, high in ends.tolist()]

    def state(self) -> dict[str, Any]:
        """Numbers and a tensor: everything in it has noise."""
        return {"sums": self._sums.clone(), "weight": self._weight, "square": self._square}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state` gave."""
        self._sums, self._weight, self._square = state["sums"].clone(), state["weight"], state["square"]
