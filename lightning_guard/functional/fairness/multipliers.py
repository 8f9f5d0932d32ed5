"""Lagrange multipliers of a bound on the differences between groups."""

import torch
from torch import Tensor

from lightning_guard.functional.fairness.moments import ABSOLUTE, BINS, Notion, deviations


class Multipliers:
    r"""What the excess of each rate costs: rises while the bound is broken, falls while there is room.

    .. math:: \mu^\pm_{r,g} \leftarrow [\mu^\pm_{r,g} + \eta (\pm 2 d_{r,g} - \varepsilon)]_0^{cap}

    with :math:`d` from :func:`lightning_guard.functional.fairness.deviations`. The cost of a rate is
    :math:`\mu^+ - \mu^-`, less its mean in the family: only differences between groups are priced.

    A gap answers to its price with a delay, so that multipliers which follow the gap alone overshoot, and swing. With
    ``damping`` they follow its change as well, :math:`\kappa (d - d_{before})`: they rise early, and stop rising
    where the gap already closes.

    Args:
        notion: what is bounded.
        families: of each group, ``(G,)``.
        rates: R.
        cap: largest multiplier.
        damping: :math:`\kappa` over the step size, in units of its time: of a step size an epoch, in epochs.

    Reference:
        Cotter et al., Optimization with non-differentiable constraints, JMLR 20(172), 2019, arXiv:1809.04198: the
        multiplier follows the rate itself, the gradient a surrogate of it. Sohrabi et al., On PI controllers for
        updating Lagrange multipliers in constrained optimization, ICML 2024, arXiv:2406.04558.

    Example:
        >>> cost = Multipliers("demographic_parity", torch.tensor([0, 0]), rates=1)
        >>> present = torch.ones(1, 2, dtype=torch.bool)
        >>> cost.update(torch.tensor([[0.2, 0.5]]), present, bound=0.1, step_size=1.0)
        >>> cost.costs(present)
        tensor([[-0.2000,  0.2000]], dtype=torch.float64)
    """

    def __init__(self, notion: Notion, families: Tensor, rates: int, cap: float = 20.0, damping: float = 0.0):
        self.notion, self.families, self.cap, self.damping = notion, families, cap, damping
        self.up = torch.zeros(rates, len(families), dtype=torch.float64)
        self.down = torch.zeros_like(self.up)
        self.before: Tensor | None = None  # the deviations of the last update

    def update(
        self, rates: Tensor, present: Tensor, bound: Tensor | float, step_size: Tensor | float, time: float = 1.0
    ) -> None:
        """One step of dual ascent on the rates ``(R, G)`` as they are, after this time since the last.

        Bound and step size may be of each rate; the step size is of a unit of time.
        """
        bound, step_size = (torch.as_tensor(x, dtype=torch.float64).reshape(-1, 1) for x in (bound, step_size))
        away = deviations(rates.double(), present, self.families, self.notion)
        if self.notion == "calibration":  # bins that each keep their part keep the sum
            bound = bound / BINS
        elif self.notion != "bounded_group_loss":
            away = 2 * away
        change = 0.0 if self.before is None else self.damping * (away - self.before)
        self.before = away if self.damping else None
        self._step(self.up, time * (away - bound) + change, present, step_size)
        if self.notion != "bounded_group_loss":
            self._step(self.down, time * (-away - bound) - change, present, step_size)

    def _step(self, multiplier: Tensor, move: Tensor, present: Tensor, step_size: Tensor) -> None:
        multiplier.add_(torch.where(present, step_size * move, 0.0)).clamp_(0, self.cap)

    def costs(self, present: Tensor) -> Tensor:
        """The price of each group's rate ``(R, G)``; 0 where it is not judged."""
        cost = torch.where(present, self.up - self.down, 0.0)
        if self.notion in ABSOLUTE:
            return cost
        for family in self.families.unique().tolist():
            own = (self.families == family) & present
            mean = torch.where(own, cost, 0.0).sum(1, keepdim=True) / own.sum(1, keepdim=True).clamp_min(1)
            cost = torch.where(own, cost - mean, cost)
        return cost
