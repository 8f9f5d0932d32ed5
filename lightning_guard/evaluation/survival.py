"""Which examples a model still gets right wherever an attack takes them."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_guard.evaluation.straight import StraightThrough
from lightning_guard.evaluation.subject import Subject, predicted
from lightning_guard.functional import ThreatModel, pgd
from lightning_guard.functional.attacks.objectives import log_odds, margin

NOISE = 10
"""Random points that are tried around each example."""


class Survival(NamedTuple):
    """What an attack left.

    Args:
        right: which examples ``(N,)`` are right at every point that the attack visited.
        moved: of each example the first visited point that is wrong, else the last, ``(N, ...)``.
    """

    right: Tensor
    moved: Tensor


@dataclass(frozen=True)
class Victim:
    """A model as attacks see it: called, it gives the logits that they climb.

    Args:
        subject: the model.
        passes: forward passes a point, for a model that draws numbers: attacks climb the mean of their logits
            (expectation over transformation, EOT), and a point is right only if it is in every pass.
        straight: let gradients through rounding and detached tensors (BPDA); values are the same.
        logarithm: climb the logarithm of the outputs, which are probabilities.
    """

    subject: Subject
    passes: int = 1
    straight: bool = False
    logarithm: bool = False

    def __call__(self, moved: Tensor) -> Tensor:
        """Logits ``(N,)`` or ``(N, C)``, tied to ``moved``."""
        with StraightThrough() if self.straight and moved.requires_grad else nullcontext():
            logits = torch.stack([self.subject.forward(moved) for _ in range(self.passes)]).mean(0)
        if self.logarithm:
            logits = logits.clamp_min(torch.finfo(logits.dtype).tiny).log()
        # Tied to the input, because a model that detaches it has no gradient at all, and torch would raise.
        tie = 0 * moved.flatten(1).sum(1)
        return logits + (tie[:, None] if logits.dim() > 1 else tie)

    def right(self, x: Tensor, y: Tensor) -> Tensor:
        """Which examples ``(N,)`` are given their class, in every pass."""
        with torch.no_grad():
            return torch.stack([predicted(self.subject.forward(x)) == y for _ in range(self.passes)]).all(0)

    def behind_walls(self) -> "Victim":
        """The same, with a way back through rounding and detached tensors."""
        return replace(self, straight=True)


def survives_ascent(
    victim: Victim, x: Tensor, y: Tensor, threat: ThreatModel, steps: int, draws: torch.Generator | None = None
) -> Survival:
    """Which examples are right at every point of a projected gradient ascent.

    Args:
        victim: the model; gradients with respect to its parameters are never taken.
        x: inputs ``(N, ...)``.
        y: classes ``(N,)``.
        threat: what the attacker may do.
        steps: gradient steps; of a threat with categories or whole numbers only where they end is judged.
        draws: where the random start is drawn from; the attack then climbs the cross-entropy, in the form that stays
            steep where the model is sure. None starts at ``x`` and climbs the margin between the logits.

    Raises:
        RuntimeError: if the attack leaves the threat model, so that it would prove nothing.
    """
    right, fooling = torch.ones(len(x), dtype=torch.bool, device=x.device), x.detach().clone()
    climbed, rounding = margin if draws is None else log_odds, threat.rounding(x)

    def losses(moved: Tensor) -> Tensor:
        nonlocal right
        if moved.requires_grad:
            moved.register_hook(torch.nan_to_num)  # a gradient that is no number leads nowhere
        logits = victim(moved)
        if not threat.discrete:  # on the way to a valid row an ascent passes through what is none
            _inside(moved, x, threat, rounding)
            wrong = right & (predicted(logits) != y)
            fooling[wrong], right = moved.detach()[wrong], right & ~wrong
        return climbed(logits, y)

    last = pgd(losses, x, threat, steps, random_start=draws is not None, generator=draws)
    final = survives_points(victim, last, x, y, threat)
    return Survival(right & final.right, torch.where(_like(right, x), last, fooling))


def survives_noise(victim: Victim, x: Tensor, y: Tensor, threat: ThreatModel, draws: torch.Generator) -> Survival:
    """Which examples are right at random points of the threat model."""
    right, moved = torch.ones(len(x), dtype=torch.bool, device=x.device), x
    for _ in range(NOISE):
        found = survives_points(victim, threat.draw(x, draws), x, y, threat)
        right, moved = right & found.right, torch.where(_like(right, x), found.moved, moved)
    return Survival(right, moved)


def survives_points(victim: Victim, moved: Tensor, x: Tensor, y: Tensor, threat: ThreatModel) -> Survival:
    """Which examples are right at these points, one each.

    Raises:
        RuntimeError: if a point lies outside the threat model.
    """
    moved = moved.detach()
    _inside(moved, x, threat, threat.rounding(x))
    return Survival(victim.right(moved, y), moved)


def without_gradient(
    victim: Victim, x: Tensor, y: Tensor, threat: ThreatModel, objective: Callable[[Tensor, Tensor], Tensor] = margin
) -> Tensor:
    """Of which examples ``(N,)`` the objective has an input gradient that is zero, or no number."""
    x = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(objective(victim(x), y).sum(), x)
    return (torch.nan_to_num(gradient) * threat.scale(x) == 0).flatten(1).all(1)


def _inside(moved: Tensor, x: Tensor, threat: ThreatModel, rounding: float) -> None:
    inside = threat.contains(moved.detach(), x, rounding)
    if not inside.all():
        raise RuntimeError(
            f"{int((~inside).sum())} of {len(x)} attacked inputs lie outside {threat}; please report this"
        )


def _like(rows: Tensor, x: Tensor) -> Tensor:
    return rows.reshape(-1, *[1] * (x.dim() - 1))
