"""Which examples a model still gets right wherever an attack takes them."""

import torch
from torch import Tensor

from lightning_guard.evaluation.subject import Subject, predicted
from lightning_guard.functional import ThreatModel, example_losses, pgd

NOISE = 10
"""Random points that are tried around each example."""


def survives_ascent(
    subject: Subject,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    steps: int,
    draws: torch.Generator | None = None,
) -> Tensor:
    """Which examples are right at every point of a projected gradient ascent.

    Args:
        subject: the model; gradients with respect to its parameters are never taken.
        x: inputs ``(N, ...)``.
        y: classes ``(N,)``.
        threat: what the attacker may do.
        steps: gradient steps.
        draws: where the random start is drawn from; the attack then climbs the cross-entropy. None starts at
            ``x`` and climbs the margin between the logits, whose gradient stays where the model is sure.

    Returns:
        Truth values ``(N,)``.

    Raises:
        RuntimeError: if the attack leaves the threat model, so that it would prove nothing.
    """
    right, rounding = torch.ones(len(x), dtype=torch.bool, device=x.device), _rounding(x, threat)

    def losses(moved: Tensor) -> Tensor:
        nonlocal right
        moved.register_hook(torch.nan_to_num)  # a gradient that is no number leads nowhere
        logits = _visit(subject, moved, x, threat, rounding)
        right &= predicted(logits) == y
        # Tied to the input, because a model that detaches it has no gradient at all, and torch would raise.
        return (margins if draws is None else example_losses)(logits, y) + 0 * moved.flatten(1).sum(1)

    last = pgd(losses, x, threat, steps, random_start=draws is not None, generator=draws)
    return right & (predicted(_visit(subject, last, x, threat, rounding)) == y)


def survives_noise(subject: Subject, x: Tensor, y: Tensor, threat: ThreatModel, draws: torch.Generator) -> Tensor:
    """Which examples ``(N,)`` are right at random points of the threat model."""
    right, rounding = torch.ones(len(x), dtype=torch.bool, device=x.device), _rounding(x, threat)
    for _ in range(NOISE):
        right &= predicted(_visit(subject, threat.draw(x, draws), x, threat, rounding)) == y
    return right


def without_gradient(subject: Subject, x: Tensor, y: Tensor, threat: ThreatModel) -> Tensor:
    """Of which examples ``(N,)`` the margin has an input gradient that is zero, or no number."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad((margins(subject.forward(x), y) + 0 * x.flatten(1).sum(1)).sum(), x)
    return (torch.nan_to_num(gradient) * threat.scale(x) == 0).flatten(1).all(1)


def margins(logits: Tensor, y: Tensor) -> Tensor:
    """How far the best wrong logit is above the right one ``(N,)``; positive is wrong.

    Example:
        >>> margins(torch.tensor([[1.0, 3.0, 0.0]]), torch.tensor([1]))
        tensor([-2.])
        >>> margins(torch.tensor([2.0]), torch.tensor([0]))
        tensor([2.])
    """
    if logits.dim() == 1:
        return logits * (1 - 2 * y)
    right = torch.nn.functional.one_hot(y, logits.shape[1]).bool()
    return logits.masked_fill(right, -torch.inf).amax(1) - logits[right]


def _visit(subject: Subject, moved: Tensor, x: Tensor, threat: ThreatModel, rounding: float) -> Tensor:
    inside = threat.contains(moved.detach(), x, rounding)
    if not inside.all():
        raise RuntimeError(
            f"{int((~inside).sum())} of {len(x)} attacked inputs lie outside {threat}; please report this"
        )
    return subject.forward(moved)


def _rounding(x: Tensor, threat: ThreatModel) -> float:
    """How far rounding alone may carry an input, in input units before normalisation."""
    scale = threat.scale(x)
    magnitude = torch.where(scale > 0, x / scale.clamp_min(torch.finfo(x.dtype).tiny), 0).abs().amax()
    features = x[0].numel() if threat.norm == "l2" else 1
    return 8 * torch.finfo(x.dtype).eps * (1 + float(magnitude) + threat.eps) * features**0.5
