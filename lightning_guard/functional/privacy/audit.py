"""A lower bound on epsilon from one training: what guesses about canaries can and cannot have been luck."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

_FRACTIONS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)  # of the canaries that are guessed, each paid for


@dataclass(frozen=True)
class AuditResult:
    """What guesses about canaries say about the privacy of the training that saw some of them.

    Args:
        epsilon_lower: epsilon is at least this, with ``confidence``, at ``delta``; 0 if nothing was shown.
        ceiling: what ``epsilon_lower`` would be had every guess been right. More needs more canaries.
        guesses: how many canaries were guessed, the rest being left out; of the number that gave the bound.
        correct: how many guesses were right.
        canaries: how many there were, in the training data or not.
        confidence: probability that the bound holds, over the coins.
        delta: of (epsilon, delta)-differential privacy.
    """

    epsilon_lower: float
    ceiling: float
    guesses: int
    correct: int
    canaries: int
    confidence: float
    delta: float


def audit(scores: Tensor, coins: Tensor, confidence: float = 0.95, delta: float = 0.0) -> AuditResult:
    r"""Guess which canaries were trained on, and bound epsilon by how many guesses are right.

    The highest scores are guessed to be in, as many of the lowest to be out, the rest is left out. That is done for
    1/16, 1/8, 1/4, 1/2 and all of the canaries, at a confidence that pays for each (Bonferroni); the best bound counts.

    Args:
        scores: how much each canary was learnt, shape ``(M,)``, computed without knowing the coins; NaN is the least.
        coins: which were in the training data, booleans ``(M,)``, drawn by independent fair coins.
        confidence: probability that the bound holds.
        delta: at which epsilon is bounded.

    | case                       | result                                                                    |
    |----------------------------|---------------------------------------------------------------------------|
    | half of the guesses right  | ``epsilon_lower=0``                                                       |
    | all of the guesses right   | ``epsilon_lower`` is ``ceiling``, about :math:`\ln(M / 4.6)` for delta 0  |
    | fewer than 6 canaries      | bound and ceiling are 0 at 95 % confidence, whatever the guesses          |
    | equal scores               | guessed in the order of their positions                                   |

    Reference:
        Steinke, Nasr and Jagielski, Privacy auditing with one (1) training run, NeurIPS 2023, arXiv:2305.08846.

    Example:
        >>> coins = torch.arange(1000) % 2 == 0
        >>> round(audit(coins.float(), coins).epsilon_lower, 2)
        5.38
    """
    if scores.shape != coins.shape or scores.dim() != 1:
        raise ValueError(f"scores of shape {tuple(scores.shape)} and coins of shape {tuple(coins.shape)} are no pairs")
    canaries = len(coins)
    order = torch.nan_to_num(scores.double(), nan=-math.inf).argsort(stable=True)
    ordered = coins.bool()[order]
    counts = guess_counts(canaries)
    each = 1 - (1 - confidence) / max(len(counts), 1)
    best = AuditResult(0.0, 0.0, 0, 0, canaries, confidence, delta)
    for guesses in counts:
        side = guesses // 2
        correct = int((~ordered[:side]).sum()) + int(ordered[canaries - side :].sum())
        bound = epsilon_lower_bound(correct, guesses, canaries, delta, each)
        if bound > best.epsilon_lower or not best.guesses:
            best = AuditResult(bound, 0.0, guesses, correct, canaries, confidence, delta)
    return AuditResult(**{**vars(best), "ceiling": ceiling(canaries, confidence, delta)})


def guess_counts(canaries: int) -> list[int]:
    """The numbers of guesses that :func:`audit` tries, half of each ``in`` and half ``out``.

    Example:
        >>> guess_counts(1000)
        [62, 124, 250, 500, 1000]
    """
    return sorted({2 * int(canaries * fraction / 2) for fraction in _FRACTIONS} - {0})


def ceiling(canaries: int, confidence: float = 0.95, delta: float = 0.0) -> float:
    """The bound of :func:`audit` if every guess were right: no training can be shown to be worse.

    Example:
        >>> round(ceiling(1000), 2), ceiling(5)
        (5.38, 0.0)
    """
    counts = guess_counts(canaries)
    each = 1 - (1 - confidence) / max(len(counts), 1)
    return max((epsilon_lower_bound(n, n, canaries, delta, each) for n in counts), default=0.0)


@lru_cache(maxsize=1024)
def epsilon_lower_bound(
    correct: int, guesses: int, canaries: int, delta: float = 0.0, confidence: float = 0.95
) -> float:
    """The largest epsilon (to 1e-6, rounded down) under which so many right guesses are too unlikely.

    Args:
        correct: right guesses.
        guesses: all guesses, a number that was fixed before.
        canaries: fair coins that were tossed, guessed or not.
        delta: at which epsilon is bounded.
        confidence: probability that the bound holds.
    """
    level = 1 - confidence

    def refuted(epsilon: float) -> bool:
        return p_value(correct, guesses, canaries, epsilon, delta) < level

    low, high = 0.0, 1.0
    if not refuted(low):
        return 0.0
    while refuted(high):
        low, high = high, 2 * high
        if high > 64:  # all guesses of 1e27 canaries
            return low
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def p_value(correct: int, guesses: int, canaries: int, epsilon: float, delta: float = 0.0) -> float:
    r"""Most probable that ``correct`` or more guesses are right, over all (epsilon, delta)-private trainings.

    .. math:: \Pr[B \ge v] + 2 m \delta \max_{1 \le i \le v} \frac{1}{i} \Pr[v > B \ge v - i],
              \qquad B \sim \mathrm{Binomial}\Big(r, \frac{e^\epsilon}{1 + e^\epsilon}\Big)

    for v right guesses of r about m canaries. (Add or remove one example; each canary is in by a fair coin.)

    Reference:
        Steinke, Nasr and Jagielski, NeurIPS 2023, arXiv:2305.08846, Theorem 5.2 (with delta; Theorem 3.1 without).

    Example:
        >>> p_value(correct=10, guesses=10, canaries=10, epsilon=0.0) == 0.5**10
        True
    """
    if not 0 <= correct <= guesses <= canaries:
        raise ValueError(f"{correct} right of {guesses} guesses about {canaries} canaries is not possible")
    if not guesses or not correct:
        return 1.0
    right = torch.arange(guesses + 1, dtype=torch.float64)
    chances = torch.lgamma(torch.tensor(guesses + 1.0, dtype=torch.float64))
    chances = chances - torch.lgamma(right + 1) - torch.lgamma(guesses - right + 1)
    log_right, log_wrong = -math.log1p(math.exp(-epsilon)), -epsilon - math.log1p(math.exp(-epsilon))
    pmf = (chances + right * log_right + (guesses - right) * log_wrong).exp()
    tail = float(pmf[correct:].flip(0).sum())
    below = pmf[:correct].flip(0).cumsum(0) / torch.arange(1, correct + 1, dtype=torch.float64)
    return min(1.0, tail + 2 * canaries * delta * float(below.max()))


def contrast(own: Tensor, others: Sequence[Tensor]) -> Tensor:
    """How much better a model likes each canary's label than others that it could as well have been given.

    A model that never saw the canary has no reason to prefer the one to the others, however hard the input is; so this
    says more than the loss itself. With cross-entropy it is the canary's logit less the mean of the others'.

    Args:
        own: loss of each canary with its label, shape ``(M,)``.
        others: losses with other labels, each ``(M,)``, NaN where a label does not count; none give ``-own``.

    Example:
        >>> contrast(torch.tensor([1.0]), [torch.tensor([2.0]), torch.tensor([4.0]), torch.tensor([float("nan")])])
        tensor([2.])
    """
    return torch.stack(list(others)).nanmean(0) - own if others else -own
