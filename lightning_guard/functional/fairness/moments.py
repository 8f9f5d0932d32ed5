"""What a notion of fairness compares: a number of each example, and whether it counts."""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_guard.functional.fairness.rates import positive_scores

Notion = Literal[
    "demographic_parity",
    "equal_opportunity",
    "predictive_equality",
    "equalized_odds",
    "accuracy_parity",
    "bounded_group_loss",
    "calibration",
    "mean_parity",
    "quantile_parity",
]
NOTIONS: tuple[Notion, ...] = get_args(Notion)
ABSOLUTE: frozenset[Notion] = frozenset({"bounded_group_loss", "calibration"})  # each group by itself, not a difference
OF_NUMBERS: frozenset[Notion] = frozenset({"mean_parity", "quantile_parity"})
BINS = 10  # of calibration in training


class Moments(NamedTuple):
    """The numbers whose means within groups are compared, each ``(N, R)``.

    Args:
        values: a number of each example and rate.
        counted: 1 where the example counts for the rate, else 0.
    """

    values: Tensor
    counted: Tensor


def moments(
    logits: Tensor,
    target: Tensor | None,
    notion: Notion,
    steepness: float | None = None,
    thresholds: Tensor | None = None,
    losses: Tensor | None = None,
) -> Moments:
    r"""The per-example terms of a notion: hard as it is judged, or soft with a gradient.

    The mean of ``values`` over the counted examples of a group is the group's rate. Each row depends on its own
    example alone.

    Args:
        logits: ``(N,)`` or ``(N, 1)`` for one logit or a regression, ``(N, C)`` for a logit a class, ``(N, L)`` for a
            logit a label.
        target: classes ``(N,)``; 0 and 1 of the shape of the logits for several labels; numbers for a regression.
        notion: what is compared.
        steepness: :math:`k` of :math:`\sigma(k z)` in place of the step; None is hard.
        thresholds: ``(R,)``, of ``quantile_parity``, in units of the prediction.
        losses: ``(N,)``, of ``bounded_group_loss``.

    | notion                  | values                             | counted              |
    |-------------------------|------------------------------------|----------------------|
    | ``demographic_parity``  | predicted to be of the class       | all                  |
    | ``equal_opportunity``   | the same                           | those of the class   |
    | ``predictive_equality`` | the same                           | those not of it      |
    | ``equalized_odds``      | the same, twice                    | of it, then not of it |
    | ``accuracy_parity``     | right                              | all                  |
    | ``bounded_group_loss``  | the loss                           | all                  |
    | ``calibration``         | probability less outcome, by bin   | all                  |
    | ``mean_parity``         | the prediction                     | all                  |
    | ``quantile_parity``     | whether it is up to the threshold  | all                  |

    Raises:
        ValueError: if the notion needs what is not given.

    Reference:
        Agarwal et al., A reductions approach to fair classification, ICML 2018, arXiv:1803.02453 (linear moments);
        Fair regression, ICML 2019, arXiv:1905.12843 (thresholds, bounded group loss).

    Example:
        >>> values, counted = moments(torch.tensor([2.0, -1.0]), torch.tensor([1, 1]), "equal_opportunity")
        >>> values[:, 0].tolist(), counted[:, 0].tolist()
        ([1.0, 0.0], [1.0, 1.0])
    """
    if notion not in NOTIONS:
        raise ValueError(f"notion={notion!r} is not known; give one of {', '.join(NOTIONS)}")
    logits = logits if logits.dtype.itemsize > 2 else logits.float()
    if notion == "bounded_group_loss":
        if losses is None:
            raise ValueError(f"notion={notion!r} bounds losses; give the loss of each example")
        return _all(losses.reshape(-1, 1))
    if notion in OF_NUMBERS:
        return _all(_of_numbers(logits, notion, steepness, thresholds))
    if target is None:
        if notion != "demographic_parity":
            raise ValueError(f"notion={notion!r} compares rates among true classes; give the target")
        return _all(positive_scores(logits, steepness))
    several = target.dim() == 2 and target.shape[1] > 1
    if several:
        scores = (logits > 0).to(logits) if steepness is None else torch.sigmoid(steepness * logits)
        actual = target.to(scores)
    else:
        scores = positive_scores(logits, steepness)
        first = 0 if scores.shape[1] > 1 else 1  # the single column of two classes is class 1
        actual = (target.reshape(-1, 1) == torch.arange(first, first + scores.shape[1], device=target.device)).to(
            scores
        )
    if notion == "demographic_parity":
        return _all(scores)
    known = (target >= 0).reshape(len(target), -1).to(scores)  # e.g. -100 is ignored: of no class, and not of the rest
    actual = actual.clamp_min(0)
    if notion == "equal_opportunity":
        return Moments(scores, actual)
    others = (1 - actual) * known
    if notion == "predictive_equality":
        return Moments(scores, others)
    if notion == "equalized_odds":
        return Moments(torch.cat([scores, scores], 1), torch.cat([actual, others], 1))
    if notion == "accuracy_parity":
        if scores.shape[1] > 1 and not several:
            return Moments((scores * actual).sum(1, keepdim=True), known)
        return Moments(scores * actual + (1 - scores) * (1 - actual), known.expand_as(scores))
    if several:
        raise ValueError("notion='calibration' of several labels an example is not built; use it on one label")
    missed = _miscalibration(logits, actual)
    return Moments(missed, known.expand_as(missed))


def _all(values: Tensor) -> Moments:
    return Moments(values, torch.ones_like(values))


def _of_numbers(logits: Tensor, notion: Notion, steepness: float | None, thresholds: Tensor | None) -> Tensor:
    prediction = logits.reshape(len(logits), -1)
    if prediction.shape[1] != 1:
        raise ValueError(f"notion={notion!r} compares one number an example; these have {prediction.shape[1]}")
    if notion == "mean_parity":
        return prediction
    if thresholds is None or not len(thresholds):
        raise ValueError(f"notion={notion!r} compares shares of predictions up to thresholds; give thresholds")
    distance = thresholds.to(prediction) - prediction
    if steepness is None:
        return (distance >= 0).to(prediction)
    # Between the outer thresholds lies most of the data: a measure of their scale.
    scale = (thresholds.max() - thresholds.min()).clamp_min(1e-12).to(prediction) / 2 if len(thresholds) > 1 else 1.0
    return torch.sigmoid(steepness * distance / scale)


def _miscalibration(logits: Tensor, actual: Tensor) -> Tensor:
    scores = positive_scores(logits, 1.0)
    if scores.shape[1] > 1:  # of the class that is predicted, as it is usually measured
        confidence, chosen = scores.max(1)
        outcome = actual.gather(1, chosen.unsqueeze(1))[:, 0]
    else:
        confidence, outcome = scores[:, 0], actual[:, 0]
    place = (confidence.detach() * BINS).long().clamp(0, BINS - 1)
    return torch.nn.functional.one_hot(place, BINS).to(scores) * (confidence - outcome).unsqueeze(1)


def deviations(rates: Tensor, present: Tensor, families: Tensor, notion: Notion) -> Tensor:
    """How far each group's rate ``(R, G)`` is from where it should be; 0 where it is not judged.

    Differences between groups are taken from the middle of the largest and the smallest rate of their family, so that
    the largest deviation is half the gap; absolute notions are the rate itself.

    Example:
        >>> rates, present = torch.tensor([[0.2, 0.5]]), torch.ones(1, 2, dtype=torch.bool)
        >>> deviations(rates, present, torch.tensor([0, 0]), "demographic_parity")
        tensor([[-0.1500,  0.1500]])
    """
    if notion in ABSOLUTE:
        return torch.where(present, rates, 0.0)
    found = torch.zeros_like(rates)
    for family in families.unique().tolist():
        own = families == family
        r, known = rates[:, own], present[:, own]
        high = r.masked_fill(~known, -torch.inf).amax(1, keepdim=True)
        low = r.masked_fill(~known, torch.inf).amin(1, keepdim=True)
        judged = known & (known.sum(1, keepdim=True) > 1)
        found[:, own] = torch.where(judged, r - (high + low) / 2, 0.0)
    return found


def gaps_of(rates: Tensor, present: Tensor, families: Tensor, notion: Notion) -> Tensor:
    """What ``max_gap`` bounds, ``(R,)``: the gap of each rate in its worst family, or the worst group's own value.

    Calibration has one such number for all its bins, which add up to the expected calibration error of a group.

    Example:
        >>> rates, present = torch.tensor([[0.25, 0.5]]), torch.ones(1, 2, dtype=torch.bool)
        >>> gaps_of(rates, present, torch.tensor([0, 0]), "equal_opportunity").tolist()
        [0.25]
    """
    if not rates.numel():
        return torch.zeros(1, dtype=torch.float64)
    away = deviations(rates, present, families, notion)
    if notion == "calibration":
        return away.abs().sum(0).amax(0, keepdim=True)
    return away.amax(1) if notion == "bounded_group_loss" else 2 * away.abs().amax(1)


def errors_of(
    rates: Tensor, squares: Tensor, counts: Tensor, present: Tensor, families: Tensor, notion: Notion
) -> Tensor:
    """The standard error of each of :func:`gaps_of` from so many examples, by the groups that make the gap.

    Args:
        rates: ``(R, G)``, mean values.
        squares: ``(R, G)``, mean squared values.
        counts: ``(R, G)``, examples.
        present: ``(R, G)``, which are judged.
        families: ``(G,)``.
        notion: what is compared.
    """
    if not rates.numel():
        return torch.zeros(1, dtype=torch.float64)
    variance = torch.where(present, (squares - rates.square()).clamp_min(0) / counts.clamp_min(1), 0.0)
    away = deviations(rates, present, families, notion)
    if notion == "calibration":
        return variance[:, int(away.abs().sum(0).argmax())].sum().sqrt().unsqueeze(0)
    each = torch.arange(len(rates))
    if notion == "bounded_group_loss":
        return variance[each, away.argmax(1)].sqrt()
    extreme = away.abs().argmax(1)
    own = (families.unsqueeze(0) == families[extreme].unsqueeze(1)) & present
    highest = rates.masked_fill(~own, -torch.inf).argmax(1)
    lowest = rates.masked_fill(~own, torch.inf).argmin(1)
    return (variance[each, highest] + variance[each, lowest]).sqrt()
