"""Membership inference: how well one can tell what a model was trained on from what it was not."""

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_guard.functional.losses import example_losses

Vector = NDArray[np.float64]

_OWN_SPREAD = 16  # references from which a row has a spread of its own; fewer share one
_FEW = 10  # non-members of a class below which it has no scale of its own


def confidence_scores(logits: Tensor, target: Tensor) -> Tensor:
    r"""How surely a model gives each example its label, on a scale on which these are close to normal.

    With one label an example this is :math:`\log p_y - \log(1 - p_y)` (Carlini et al., 2022), which orders examples as
    their losses do; elsewhere it is the negative loss itself.

    Args:
        logits: ``(N,)`` or ``(N, C, ...)``.
        target: as :func:`lightning_guard.functional.example_losses` takes it.

    Returns:
        Scores ``(N,)`` in float64, higher for examples that the model knows better.

    Reference:
        Carlini et al., Membership Inference Attacks From First Principles, 2022, arXiv:2112.03570.

    Example:
        >>> confidence_scores(torch.tensor([[0.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1])).tolist()
        [0.0, 2.0]
    """
    logits = logits.double()
    if logits.dim() == 2 and logits.shape[1] > 1 and target.dim() == 1 and not target.is_floating_point():
        own = logits.gather(1, target[:, None].long())
        others = logits.scatter(1, target[:, None].long(), -torch.inf)
        return own[:, 0] - others.logsumexp(1)
    if logits.dim() == 1 and bool(((target == 0) | (target == 1)).all()):
        return torch.where(target.reshape(-1) == 1, logits, -logits)
    return -example_losses(logits, target)


def by_class(members: Vector, classes: NDArray[np.int64], others: Vector, known: NDArray[np.int64]) -> list[Vector]:
    """Scores less what non-members of the same class show, over how much these spread.

    A class that the model finds hard has low scores throughout; a threshold for each class (Song and Mittal, 2021)
    does not take its members for strangers. Each non-member is compared with the others of its class only, so that it
    does not count as its own yardstick.

    Args:
        members: scores of what was trained on ``(N,)``.
        classes: their classes.
        others: scores of what was not ``(M,)``.
        known: their classes.

    Returns:
        The calibrated scores of both. A class of fewer than 10 non-members is measured by all non-members.

    Reference:
        Song and Mittal, Systematic Evaluation of Privacy Risks of Machine Learning Models, 2021, arXiv:2003.10595.

    Example:
        >>> others = np.r_[np.zeros(10), np.ones(10)] + np.tile([-1.0, 1.0], 10)
        >>> by_class(np.array([0.0, 1.0]), np.array([0, 1]), others, np.repeat([0, 1], 10))[0].tolist()
        [0.0, 0.0]
    """
    found = [np.empty(len(members)), np.empty(len(others))]
    for label in np.union1d(classes, known):
        mine, same = classes == label, known == label
        yard = same if same.sum() >= _FEW else np.ones(len(others), bool)
        found[0][mine] = _apart(members[mine], others[yard], own=False)
        found[1][same] = _apart(others[same], others[yard], own=True)
    return found


def _apart(scores: Vector, yard: Vector, own: bool) -> Vector:
    """Distances from the mean of a yardstick in its standard deviations, without the score itself if it is in there."""
    count, total, square = len(yard), yard.sum(), np.square(yard).sum()
    if own:
        count, total, square = count - 1, total - scores, square - np.square(scores)
    mean = total / max(count, 1)
    spread = np.sqrt(np.maximum(square / max(count, 1) - mean**2, 0))
    result: Vector = (scores - mean) / np.where(spread > 1e-12, spread, 1.0)
    return result


def offline_lira(scores: Vector, members: NDArray[np.bool_], fewest: int = 2) -> Vector:
    r"""How far each score lies above what models show that were not trained on the row: the offline likelihood ratio.

    The scores of a row under models without it are taken for normal, with mean :math:`\mu` and spread
    :math:`\sigma`; what is returned is :math:`(\phi - \mu) / \sigma \sqrt{1 + 1/n}`, which orders as the probability
    of a smaller score does. Every model is attacked with the help of all others.

    Args:
        scores: of :func:`confidence_scores`, ``(models, rows)``; NaN where a row was not scored.
        members: which rows each model was trained on, ``(models, rows)``.
        fewest: models without the row that it takes.

    Returns:
        ``(models, rows)``, NaN where there are too few models without the row. The spread is a row's own from 16 such
        models on; with fewer it is that of all rows together, as the authors advise.

    Reference:
        Carlini et al., Membership Inference Attacks From First Principles, 2022, arXiv:2112.03570, section V.

    Example:
        >>> scores = np.array([[5.0, 0.0], [0.0, 5.0], [1.0, 0.0], [-1.0, 0.0]])
        >>> members = np.array([[True, False], [False, True], [False, False], [False, False]])
        >>> offline_lira(scores, members)[0, 0] > offline_lira(scores, members)[2, 0]
        np.True_
    """
    out = ~members & np.isfinite(scores)
    found = np.full(scores.shape, np.nan)
    filled = np.where(out, scores, 0.0)
    count, total, square = out.sum(0), filled.sum(0), np.square(filled).sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        freedom = np.maximum(count - 1, 0).sum()
        pooled = (square - total**2 / count)[count > 1].sum() / max(freedom, 1)
        for one in range(len(scores)):
            n, sums, squares = count - out[one], total - filled[one], square - filled[one] ** 2
            mean = sums / n
            own = np.maximum(squares - n * mean**2, 0) / np.maximum(n - 1, 1)
            spread = np.sqrt(np.where(n >= _OWN_SPREAD, own, pooled) * (1 + 1 / n))
            far = (scores[one] - mean) / np.where(spread > 1e-12, spread, 1.0)
            found[one] = np.where(n >= fewest, far, np.nan)
    return found


class Rate(NamedTuple):
    """What an attacker gets at a false-positive rate of at most what was asked for.

    Args:
        hits: members that score above the threshold.
        members: all members.
        alarms: non-members that do.
        others: all non-members.
    """

    hits: int
    members: int
    alarms: int
    others: int


def rate_at(members: Vector, others: Vector, limit: float) -> Rate:
    """How many members score above a threshold that at most this share of non-members do.

    Args:
        members: scores ``(N,)``.
        others: scores of non-members ``(M,)``.
        limit: false-positive rate in [0, 1].

    Example:
        >>> rate_at(np.array([3.0, 1.0]), np.array([0.0, 2.0]), 0.0)
        Rate(hits=1, members=2, alarms=0, others=2)
    """
    allowed = math.floor(limit * len(others) + 1e-9)
    threshold = np.sort(others)[::-1][allowed] if allowed < len(others) else -np.inf
    return Rate(int((members > threshold).sum()), len(members), int((others > threshold).sum()), len(others))


def area(members: Vector, others: Vector) -> tuple[float, tuple[float, float]]:
    """How often a member outscores a non-member, ties half, with a 95% interval (DeLong et al., 1988).

    Example:
        >>> area(np.array([1.0, 2.0, 3.0]), np.array([0.0, 1.0]))[0]
        0.9166666666666666
    """
    from scipy.stats import rankdata

    n, m = len(members), len(others)
    rank = rankdata(np.concatenate([members, others]))
    wins = (rank[:n] - rankdata(members)) / m  # of each member, the share of non-members below it
    losses = 1 - (rank[n:] - rankdata(others)) / n
    value = float(wins.mean())
    variance = (wins.var(ddof=1) / n if n > 1 else 0.25) + (losses.var(ddof=1) / m if m > 1 else 0.25)
    reach = 1.959963984540054 * math.sqrt(float(variance))
    return value, (max(0.0, value - reach), min(1.0, value + reach))


def roc(members: Vector, others: Vector, rates: Vector) -> Vector:
    """The true-positive rate at each of these false-positive rates.

    Example:
        >>> roc(np.array([3.0, 1.0]), np.array([0.0, 2.0]), np.array([0.0, 0.5, 1.0])).tolist()
        [0.5, 1.0, 1.0]
    """
    ordered = np.sort(others)[::-1]
    place = np.floor(np.asarray(rates) * len(others) + 1e-9).astype(int)
    threshold = np.where(place < len(others), ordered[np.minimum(place, len(others) - 1)], -np.inf)
    above: Vector = 1 - np.searchsorted(np.sort(members), threshold, side="right") / len(members)
    return above
