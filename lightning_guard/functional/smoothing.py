"""Randomised smoothing: noise around an input, and what the votes of noisy copies prove."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_guard.functional.attacks.threat import ThreatModel


@dataclass(frozen=True)
class GaussianNoise:
    r"""Independent noise :math:`\mathcal{N}(0, \sigma^2)` on every feature of an input.

    ``sigma`` is in the user's units, before normalisation: with ``std`` the network's inputs move by
    :math:`\sigma / \mathrm{std}` of their channel. Noise knows no bounds: noisy inputs leave those of images, by
    design, since the certificate is about the Gaussian itself and not about a clipped one.

    Args:
        sigma: standard deviation, in input units before normalisation.
        std: what the inputs were divided by before the network, one number or one a channel (dimension 1).

    Raises:
        ValueError: for values that describe no noise, naming the option.

    Example:
        >>> noise = GaussianNoise(sigma=0.5, std=0.25)
        >>> drawn = noise.add(torch.zeros(1, 10_000), torch.Generator().manual_seed(0))
        >>> round(drawn.std().item(), 1)
        2.0
    """

    sigma: float
    std: float | Sequence[float] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.sigma < float("inf"):
            raise ValueError(f"sigma={self.sigma} is no standard deviation; give a finite number of at least 0")
        ThreatModel(0.0, std=self.std)  # refuses what is no std

    def add(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Inputs ``(N, ...)`` with noise drawn for each of them, as the network sees them."""
        drawn = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
        return x + drawn * (self.sigma * self.check(x))

    def check(self, x: Tensor) -> Tensor:
        """How far the network's input moves for one unit of the user's; raises if ``std`` does not fit ``x``."""
        return ThreatModel(0.0, std=self.std).scale(x)


def clopper_pearson_lower(successes: Tensor, trials: int, alpha: float) -> Tensor:
    r"""Lower confidence bound of a proportion (Clopper and Pearson, 1934): it is above the truth with at most alpha.

    The largest :math:`p` with :math:`P(\mathrm{Bin}(n, p) \ge k) \le \alpha`, by bisection from below, in
    float64.

    Args:
        successes: whole numbers ``(N,)`` of at most ``trials``.
        trials: number of independent draws, at least 1.
        alpha: probability of being wrong, in (0, 1).

    Returns:
        Bounds ``(N,)`` in float64.

    | case                 | result                              |
    |----------------------|-------------------------------------|
    | no success           | 0                                   |
    | nothing but success  | :math:`\alpha^{1/n}`, always below 1 |

    Raises:
        ValueError: for counts that are none, or an ``alpha`` that is no probability.

    Example:
        >>> clopper_pearson_lower(torch.tensor([0, 100]), 100, alpha=0.001)
        tensor([0.0000, 0.9333], dtype=torch.float64)
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha={alpha} is no probability of being wrong; give a number in (0, 1), e.g. 0.001")
    if trials < 1 or bool(((successes < 0) | (successes > trials)).any()):
        raise ValueError(f"successes={successes.tolist()} of trials={trials}; give counts from 0 to trials")
    counts, place = successes.long().cpu().unique(return_inverse=True)
    bounds = [_lower(int(count), trials, alpha) for count in counts]
    return torch.tensor(bounds, dtype=torch.float64)[place].to(successes.device)


def _lower(count: int, trials: int, alpha: float) -> float:
    if count == 0:
        return 0.0
    k, n = torch.arange(count, trials + 1, dtype=torch.float64), torch.tensor(float(trials), dtype=torch.float64)
    ways = (n + 1).lgamma() - (k + 1).lgamma() - (n - k + 1).lgamma()
    limit, low, high = torch.tensor(alpha, dtype=torch.float64).log(), 0.0, count / trials
    for _ in range(60):
        p = torch.tensor((low + high) / 2, dtype=torch.float64)
        tail = torch.logsumexp(ways + torch.xlogy(k, p) + torch.xlogy(n - k, 1 - p), 0)
        low, high = (p.item(), high) if tail <= limit else (low, p.item())
    return low


def certified_radius(lower: Tensor, sigma: float) -> Tensor:
    r"""Euclidean radius within which the smoothed classifier cannot change its mind, :math:`\sigma \Phi^{-1}(p)`.

    Args:
        lower: lower bound of the probability of the likeliest class under the noise ``(N,)``.
        sigma: standard deviation of the noise.

    Returns:
        Radii ``(N,)`` in the units of ``sigma`` and in float64; 0 where ``lower`` is at most 1/2, and nothing is
        certified.

    Reference:
        Cohen, Rosenfeld and Kolter, Certified Adversarial Robustness via Randomized Smoothing, ICML 2019,
        arXiv:1902.02918, theorem 1.

    Example:
        >>> certified_radius(torch.tensor([0.4, 0.9]), sigma=0.5)
        tensor([0.0000, 0.6408], dtype=torch.float64)
    """
    return sigma * torch.special.ndtri(lower.double().clamp_min(0.5))
