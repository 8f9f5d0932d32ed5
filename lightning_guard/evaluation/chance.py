"""What chance adds to the gap between groups, and the gap without it."""

import numpy as np
import torch
from torch import Tensor

from lightning_guard.evaluation.table import Sums, TableNotion, gaps, rates

_REPLICATES = 2000  # suffice for a mean


def chance_gaps(
    found: Sums | Tensor,
    notion: TableNotion,
    draws: np.random.Generator,
    counted: Tensor | None = None,
    share: float = 0.0,
) -> Tensor:
    """Gaps ``(2000,)`` that samples of these sizes show if all groups have the rate of their union.

    Args:
        found: sums ``(G, C)``, or a table ``(G, C, C)``.
        notion: see :func:`rates`.
        draws: where chance comes from.
        counted: which rates take part, as in :func:`gaps`.
        share: of the way from the rate of the union to each group's own, in [0, 1]; 0 are equal rates.
    """
    numerator, denominator = rates(found, notion)
    counted = torch.ones_like(numerator, dtype=torch.bool) if counted is None else counted
    counted = counted & (denominator > 0)
    inside = numerator * counted, denominator * counted
    pooled = inside[0].sum(0) / inside[1].sum(0)
    rate = pooled + share * ((numerator / denominator).where(counted, pooled) - pooled)
    size = (_REPLICATES, *denominator.shape)
    drawn = draws.binomial(denominator.long().numpy(), rate.nan_to_num().clamp(0, 1).numpy(), size=size)
    shown = torch.from_numpy(drawn) / denominator
    gap = shown.masked_fill(~counted, -torch.inf).amax(1) - shown.masked_fill(~counted, torch.inf).amin(1)
    return gap.masked_fill(counted.sum(0) < 2, torch.nan).amax(1)


def corrected_gap(found: Sums | Tensor, notion: TableNotion, seed: int = 0, counted: Tensor | None = None) -> float:
    r"""The gap without most of its upward bias: the one whose samples would show the observed gap on average.

    The rates :math:`\bar r + \lambda (r_g - \bar r)` lie between their union's and the observed ones. Samples of these
    sizes show a mean gap :math:`m(\lambda)`, rising in :math:`\lambda` and larger than the gap of the rates. The
    corrected gap is :math:`\lambda` times the observed one, at the :math:`\lambda` where :math:`m` is the observed
    gap (indirect inference). It is 0 where equal rates would show as much, and NaN where there is no gap.

    Reference:
        Gourieroux, Monfort and Renault, Indirect Inference, Journal of Applied Econometrics 8, 1993.

    Example:
        >>> from lightning_guard.evaluation.table import tabulate
        >>> few = tabulate(torch.arange(20) % 2, torch.ones(20), (torch.arange(20) < 9).long(), 2, 2)
        >>> round(float(gaps(few, "demographic_parity")), 3), corrected_gap(few, "demographic_parity")
        (0.1, 0.0)
    """
    observed = float(gaps(found, notion, counted))
    if observed != observed:
        return observed
    ways = np.linspace(0, 1, 9)
    # The same draws on the way, so that what differs is the way.
    shown = [float(chance_gaps(found, notion, np.random.default_rng(seed), counted, way).mean()) for way in ways]
    shown = np.maximum.accumulate(shown).tolist()
    return 0.0 if observed <= shown[0] else float(np.interp(observed, shown, ways)) * observed
