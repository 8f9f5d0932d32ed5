"""Group rates, hard and soft, and the gaps between them."""

from typing import Literal, get_args

import torch
from torch import Tensor

RateNotion = Literal["demographic_parity", "equal_opportunity", "equalized_odds"]
RATE_NOTIONS: tuple[RateNotion, ...] = get_args(RateNotion)


def positive_scores(logits: Tensor, steepness: float | None = None) -> Tensor:
    r"""How positive each prediction is, ``(N, K)``: one column for two classes, one a class for more.

    Args:
        logits: ``(N,)`` or ``(N, 1)`` for one logit, ``(N, C)`` for a logit a class.
        steepness: :math:`k` in :math:`\sigma(k z)`, or in the softmax of :math:`k z`. Large values follow the hard
            prediction closely and send gradients through examples near the boundary only. None gives the hard
            predictions, 0 or 1, without a gradient; of equal logits the first class wins, as with ``argmax``.

    Returns:
        Scores ``(N, K)`` in [0, 1], in float32 or wider.

    Example:
        >>> positive_scores(torch.tensor([-1.0, 2.0])).tolist()
        [[0.0], [1.0]]
        >>> positive_scores(torch.tensor([[0.0, 1.0, 5.0]])).tolist()
        [[0.0, 0.0, 1.0]]
    """
    logits = logits if logits.dtype.itemsize > 2 else logits.float()  # half precision cannot count beyond 2048
    if logits.dim() == 1:
        logits = logits.unsqueeze(1)
    if logits.dim() != 2:
        raise ValueError(f"logits of shape {tuple(logits.shape)} have no group rates; give (N,), (N, 1) or (N, C)")
    if logits.shape[1] == 2:
        logits = logits[:, 1:] - logits[:, :1]
    if logits.shape[1] == 1:
        return (logits > 0).to(logits) if steepness is None else torch.sigmoid(steepness * logits)
    if steepness is None:
        return torch.nn.functional.one_hot(logits.argmax(1), logits.shape[1]).to(logits)
    return torch.softmax(steepness * logits, dim=1)


def rate_sums(
    scores: Tensor, group: Tensor, target: Tensor | None, notion: RateNotion, num_groups: int | None = None
) -> tuple[Tensor, Tensor]:
    """Numerators and denominators of each group's rates: rates are their quotient, batches and ranks add up.

    Args:
        scores: ``(N, K)`` from :func:`positive_scores`.
        group: whole numbers ``(N,)``; negative ones are examples of unknown group and count nowhere.
        target: classes ``(N,)``, or 0 and 1 where ``K`` is 1; only demographic parity goes without.
        notion: which examples count. ``demographic_parity``: all (selection rate).
            ``equal_opportunity``: those of the class (true positive rate). ``equalized_odds``: those of the class and,
            as further rows, those not of the class (true and false positive rate).
        num_groups: number of groups; None is the highest in ``group`` plus one.

    Returns:
        Two tensors ``(R, G)``: sums of scores, and counts. ``R`` is ``K``, or ``2 K`` for equalized odds.

    Example:
        >>> scores, group = torch.tensor([[1.0], [0.0], [1.0]]), torch.tensor([0, 0, 1])
        >>> sums, counts = rate_sums(scores, group, None, "demographic_parity")
        >>> (sums / counts).tolist()
        [[0.5, 1.0]]
    """
    if notion not in RATE_NOTIONS:
        raise ValueError(f"notion={notion!r} is not known; give one of {', '.join(RATE_NOTIONS)}")
    if num_groups is None:
        num_groups = int(group.max()) + 1 if len(group) else 0
    members = (group.reshape(-1, 1) == torch.arange(num_groups, device=group.device)).to(scores)
    counted = torch.ones_like(scores)
    if notion != "demographic_parity":
        if target is None:
            raise ValueError(f"notion={notion!r} compares rates among true classes; give the target")
        first = 0 if scores.shape[1] > 1 else 1  # the single column of two classes is class 1
        classes = torch.arange(first, first + scores.shape[1], device=target.device)
        counted = (target.reshape(-1, 1) == classes).to(scores)
        if notion == "equalized_odds":
            scores, counted = torch.cat([scores, scores], 1), torch.cat([counted, 1 - counted], 1)
    return (scores * counted).T @ members, counted.T @ members


def rate_gaps(sums: Tensor, counts: Tensor) -> Tensor:
    """The largest minus the smallest rate of each row, over the groups that have examples.

    Args:
        sums: ``(R, G)`` from :func:`rate_sums`.
        counts: ``(R, G)`` from :func:`rate_sums`.

    Returns:
        Gaps ``(R,)`` in [0, 1]; 0 where fewer than two groups have examples, so nothing can be compared.

    Example:
        >>> rate_gaps(torch.tensor([[1.0, 3.0, 0.0]]), torch.tensor([[4.0, 4.0, 0.0]]))
        tensor([0.5000])
    """
    if not counts.numel():
        return sums.sum(1)  # zeros, still part of the graph
    present = counts > 0
    rates = sums / counts.clamp_min(torch.finfo(counts.dtype).tiny)
    gaps = rates.masked_fill(~present, -torch.inf).amax(1) - rates.masked_fill(~present, torch.inf).amin(1)
    return torch.where(present.sum(1) > 1, gaps, 0.0)


def group_gap(
    logits: Tensor,
    group: Tensor,
    target: Tensor | None = None,
    notion: RateNotion = "demographic_parity",
    steepness: float | None = None,
) -> Tensor:
    """The gap between groups in a fairness notion, hard by default and differentiable with a ``steepness``.

    The hard gap is what fairlearn calls ``demographic_parity_difference``, ``equal_opportunity_difference`` and
    ``equalized_odds_difference`` (``agg="worst_case"``) wherever every rate can be estimated. With more than two
    classes it is the worst over classes, each against the rest.

    Args:
        logits: ``(N,)`` or ``(N, 1)`` for one logit, ``(N, C)`` for a logit a class.
        group: whole numbers ``(N,)``; negative is unknown and counts nowhere.
        target: classes ``(N,)``; only demographic parity goes without.
        notion: ``demographic_parity``, ``equal_opportunity`` or ``equalized_odds`` (Hardt et al., 2016).
        steepness: see :func:`positive_scores`.

    Returns:
        A scalar in [0, 1].

    | case                            | result                                                        |
    |---------------------------------|---------------------------------------------------------------|
    | a group absent from the batch   | it contributes nothing                                        |
    | fewer than two groups present   | 0, with a zero gradient                                       |
    | no example of the class         | that rate cannot be estimated and contributes nothing          |

    Reference:
        Hardt, Price and Srebro, Equality of Opportunity in Supervised Learning, NeurIPS 2016, arXiv:1610.02413.

    Example:
        >>> group_gap(torch.tensor([1.0, -1.0, 1.0, 1.0]), torch.tensor([0, 0, 1, 1]))
        tensor(0.5000)
    """
    return rate_gaps(*rate_sums(positive_scores(logits, steepness), group, target, notion)).amax()
