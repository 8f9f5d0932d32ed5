"""The squared difference between groups as a penalty."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_guard.functional.fairness import Census, Notion, gaps_of, moments
from lightning_guard.parity.base import Mode, Seen
from lightning_guard.parity.running import Running, over_processes, table


class Penalty(Mode):
    r"""Adds :math:`\lambda \sum_r (\max_g \hat p_{r,g} - \min_g \hat p_{r,g})^2`, for each family of groups.

    The value of a rate is a running mean of hard rates, its gradient that of the batch's soft rates: the gap of a
    small batch is mostly noise, and pushing noise down pushes towards a constant prediction.

    Args:
        notion: what is compared.
        weight: :math:`\lambda`, nats per squared gap.
        steepness: of the soft decision.
        memory: of the running rates, in epochs.
    """

    def __init__(self, notion: Notion, weight: float, steepness: float = 3.0, memory: float = 0.1):
        self.notion: Notion = notion
        self.weight, self.steepness = weight, steepness
        self.running = Running(memory)
        self.gap = 0.0

    def begin(self, module: nn.Module, census: Census) -> None:
        self.census = census

    def term(self, seen: Seen) -> Tensor | None:
        losses = seen.losses() if self.notion == "bounded_group_loss" else None
        with torch.no_grad():
            hard = moments(seen.logits, seen.target, self.notion, None, None, losses)
            batch = over_processes(table(hard, seen.members), seen)
            if not seen.step.rehearsal or self.running.parts is None:
                self.running.add(batch, len(seen.members) * seen.processes / self.census.total)
            rates, present = self.running.rates, self.running.counts > 0
            self.gap = float(gaps_of(rates, present, self.census.families, self.notion).amax())
        soft = moments(seen.logits, seen.target, self.notion, self.steepness, None, losses)
        members = seen.members.to(soft.values)
        # DDP averages gradients over ranks; the rate of the union is the sum of their parts over its count.
        rate = (soft.values * soft.counted).T @ members * seen.processes / batch[2].to(members).clamp_min(1)
        rate = rates.to(members) + (rate - rate.detach())  # value of the running rate, gradient of the batch's
        present = present.to(members.device)
        term = rate.sum() * 0
        for family in self.census.families.unique().tolist():
            own = (self.census.families == family).to(members.device)
            r, known = rate[:, own], present[:, own]
            gap = r.masked_fill(~known, -torch.inf).amax(1) - r.masked_fill(~known, torch.inf).amin(1)
            term = term + torch.where(known.sum(1) > 1, gap, 0.0).square().sum()
        return self.weight * term

    def figures(self) -> dict[str, float | Tensor]:
        return {"gap": self.gap}

    def state(self) -> dict[str, Any]:
        return self.running.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        self.running.restore(state)
