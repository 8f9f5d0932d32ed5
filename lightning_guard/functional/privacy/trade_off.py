"""What a claim of differential privacy allows an attacker, in the attacker's own terms."""

import math
from collections.abc import Iterable, Sequence

from lightning_guard.functional.privacy.accounting import Segment, epsilon

Claim = tuple[float, float]
"""Epsilon, in nats, and delta."""

DELTAS = (1e-7, 1e-4, 1e-3, 1e-2, 0.05, 0.2)


def profile(ledger: Sequence[Segment], delta: float, deltas: Iterable[float] = DELTAS) -> list[Claim]:
    """The epsilons of one training at several deltas, which together say more than the one at ``delta``.

    Example:
        >>> [round(e, 1) for e, _ in profile([Segment(1.0, 1.0, 1)], 1e-5, [1e-3, 1e-1])]
        [4.4, 3.1, 1.2]
    """
    return [(epsilon(ledger, one), one) for one in sorted({delta, *deltas})]


def largest_rate(claims: Iterable[Claim], alarms: float) -> float:
    r"""The largest true-positive rate that any attacker on one example can have at this false-positive rate.

    From :math:`(\epsilon, \delta)` follows :math:`\mathrm{TPR} \le \min(e^\epsilon\, \mathrm{FPR} + \delta,\; 1 -
    e^{-\epsilon} (1 - \delta - \mathrm{FPR}))`; of several claims the tightest counts. It is the trade-off function of
    f-DP, from above.

    Args:
        claims: pairs of epsilon and delta, see :func:`profile`.
        alarms: false-positive rate in [0, 1].

    | case               | result |
    |--------------------|--------|
    | no claim           | 1      |
    | epsilon 0, delta 0 | the false-positive rate: a blind guess |

    Reference:
        Kairouz, Oh and Viswanath, The Composition Theorem for Differential Privacy, 2015, arXiv:1311.0776.
        Dong, Roth and Su, Gaussian Differential Privacy, 2022, arXiv:1905.02383.

    Example:
        >>> largest_rate([(math.log(2), 0.0)], 0.1), largest_rate([], 0.1)
        (0.2, 1.0)
    """
    rate = 1.0
    for one, delta in claims:
        rise = math.exp(one) * alarms if one < 700 else math.inf if alarms else 0.0
        rate = min(rate, rise + delta, 1 - math.exp(-one) * (1 - delta - alarms))
    return min(1.0, max(rate, alarms))
