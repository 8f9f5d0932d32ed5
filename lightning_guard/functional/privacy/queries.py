"""Sums over examples that others need of private data, with noise that the plan pays for."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_guard.functional.privacy.noise import Noise
from lightning_guard.functional.privacy.sampling import Deal


class Queries:
    r"""Releases :math:`\sum_i q_i + \sigma z` over the units of each draw, :math:`\lVert q_i \rVert_2 \le 1`.

    A unit with several rows in a draw contributes their weighted mean. Whatever a caller gives, no unit contributes
    more than norm 1: longer vectors are scaled down, and vectors that are not finite contribute nothing.

    Args:
        noise: where noise comes from.
        rank: of this process; the noise is that of the first.
        world: number of processes.

    Reference:
        Dwork et al., Our data, ourselves, EUROCRYPT 2006: the Gaussian mechanism. A noisy histogram of each draw beside
        DP-SGD: arXiv:2505.22703. As part of one release with the gradient it shares the amplification by sampling.

    Example:
        >>> queries, seen = Queries(Noise(seed=0)), []
        >>> queries.open("rates", size=2, noise=0.0, take=seen.append)
        >>> queries.add("rates", torch.eye(2), Deal(units=2, rows=1, weights=None, first=True, last=True, step=0))
        >>> queries.release()
        >>> seen
        [tensor([1., 1.], dtype=torch.float64)]
    """

    def __init__(self, noise: Noise, rank: int = 0, world: int = 1):
        self.noise, self.rank, self.world = noise, rank, world
        self._open: dict[str, tuple[Tensor, float, Callable[[Tensor], None]]] = {}

    def open(self, name: str, size: int, noise: float, take: Callable[[Tensor], None]) -> None:
        """A sum over every draw from now on.

        Args:
            name: of the query.
            size: numbers of the sum.
            noise: standard deviation of the noise, in contributions of one unit.
            take: gets each noisy sum ``(size,)`` in float64, the same on every process.
        """
        self._open[name] = torch.zeros(size, dtype=torch.float64), noise, take

    def add(self, name: str, rows: Tensor, deal: Deal) -> None:
        """Add what the rows of a batch contribute, ``(N, size)``.

        Raises:
            ValueError: if the rows are not those of the batch.
        """
        total = self._open[name][0]
        if len(rows) != max(deal.units, 1) * deal.rows:
            raise ValueError(
                f"{len(rows)} contributions to {name!r} for {max(deal.units, 1) * deal.rows} rows of a batch"
            )
        if deal.units:  # padding is nobody
            total += contributions(rows, deal.rows, deal.weights).sum(0)

    def release(self) -> None:
        """The draw is complete: every sum goes out with its noise, also one to which nobody has contributed."""
        for name in sorted(self._open):
            total, noise, take = self._open[name]
            sent = self.noised(total, noise)
            total.zero_()
            take(sent)

    def noised(self, total: Tensor, noise: float) -> Tensor:
        """A sum over the parts of all processes, with noise."""
        sent = total.clone()
        if self.rank == 0:
            sent += self.noise.fill_(torch.empty_like(sent), noise)
        if self.world > 1:
            torch.distributed.all_reduce(sent)
        return sent


def contributions(rows: Tensor, rows_per_unit: int = 1, weights: Tensor | None = None) -> Tensor:
    """What each unit contributes, of norm at most 1.

    Args:
        rows: ``(units * rows_per_unit, K)``, those of a unit consecutive.
        rows_per_unit: rows of each.
        weights: of every row, adding up to one within a unit; None is the mean.

    Returns:
        ``(units, K)`` in float64, on the CPU.

    Example:
        >>> contributions(torch.tensor([[3.0, 4.0], [0.0, 0.5], [float("nan"), 0.0]])).tolist()
        [[0.6, 0.8], [0.0, 0.5], [0.0, 0.0]]
    """
    own = rows.detach().double().cpu().reshape(-1, rows_per_unit, rows.shape[1])
    share = 1 / rows_per_unit if weights is None else weights.double().cpu().reshape(-1, rows_per_unit, 1)
    units = (own * share).sum(1)
    units = torch.where(units.isfinite().all(1, keepdim=True), units, 0.0)
    return units / units.norm(dim=1, keepdim=True).clamp_min(1)
