"""A bound on the difference between groups, kept by multipliers that rise while it is broken."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_guard.functional.fairness import OF_NUMBERS, Census, Multipliers, Notion, errors_of, gaps_of, moments
from lightning_guard.parity.base import Mode, Seen
from lightning_guard.parity.running import Running, over_processes, table

_UPDATES = 16  # of the multipliers, an epoch


class Constraint(Mode):
    r"""Adds to each example the price of what it does to the rate of its group.

    .. math:: \frac{1}{B} \sum_i \sum_{r,g} \mu_{r,g} \frac{m_{r,i} 1[s_i = g]}{\pi_{r,g}} v_{r,i}

    with :math:`v` a soft decision, :math:`\pi` the share of the training data that counts for the rate, and prices
    :math:`\mu` that follow running **hard** rates. Prices and shares are constants of the step, so the loss of an
    example depends on no other example of its batch, and a group that is absent adds nothing.

    Args:
        notion: what is compared.
        bound: largest gap.
        margin: how much below it to aim; None is one standard error of the gap on the training data.
        steepness: of the soft decision.
        step_size: of the multipliers, an epoch.
        memory: of the running rates, in epochs.
        cap: largest multiplier.
        min_support: rates of fewer training examples are not bounded.
    """

    couples_examples = False

    def __init__(
        self,
        notion: Notion,
        bound: float,
        margin: float | None = None,
        steepness: float = 3.0,
        step_size: float = 4.0,
        memory: float = 0.5,
        cap: float = 20.0,
        min_support: int = 30,
    ):
        self.notion: Notion = notion
        self.bound, self.margin, self.steepness = bound, margin, steepness
        self.step_size, self.cap, self.min_support = step_size, cap, min_support
        self.running = Running(memory)
        self.numbers = notion in OF_NUMBERS  # the target is a quantity
        self.active = False  # whether multipliers move, and weigh
        self.gap = 0.0
        self.multipliers: Multipliers | None = None
        self.thresholds: Tensor | None = None
        self._pending: Tensor | None = None  # the table of the steps since the last update
        self._rows = 0  # of it
        self._at = -1  # the optimizer step of the last batch
        self._price: Tensor | None = None  # of each rate and group, until the next update
        self._state: Mapping[str, Any] = {}

    def begin(self, module: nn.Module, census: Census) -> None:
        self.census = census

    def present(self, rates: int) -> Tensor:
        """Which rates are bounded, ``(R, G)``."""
        return self.census.support(self.notion, rates) >= max(self.min_support, 1)

    def aims(self, table: Tensor, present: Tensor) -> Tensor:
        """The gap of each rate to aim at ``(R,)``, given sums, squares and counts ``(3, R, G)``."""
        if self.margin is not None:
            return torch.full((table.shape[1],), self.bound - self.margin, dtype=torch.float64)
        counts = table[2].clamp_min(1e-12)
        support = self.census.support(self.notion, table.shape[1])
        error = errors_of(table[0] / counts, table[1] / counts, support, present, self.census.families, self.notion)
        return (self.bound - error).clamp_min(self.bound / 4)

    def judged(self, table: Tensor) -> tuple[float, bool]:
        """The gap in sums, squares and counts ``(3, R, G)``, and whether it keeps what is aimed at."""
        counts = table[2]
        present = self.present(counts.shape[0]) & (counts > 0)
        gaps = gaps_of(table[0] / counts.clamp_min(1), present, self.census.families, self.notion)
        return float(gaps.amax()), bool((gaps <= self.aims(table, present)[: len(gaps)]).all())

    def refuted(self, table: Tensor) -> bool:
        """Whether the gap in this table alone is too wide to be so by chance."""
        counts = table[2]
        present = self.present(counts.shape[0]) & (counts > 0)
        rates, squares = table[0] / counts.clamp_min(1), table[1] / counts.clamp_min(1)
        gaps = gaps_of(rates, present, self.census.families, self.notion)
        errors = errors_of(rates, squares, counts, present, self.census.families, self.notion)
        return bool((gaps - 2 * errors > self.bound).any())

    def _speed(self, rates: int, present: Tensor) -> Tensor:
        """How fast multipliers of each rate move: a rate of few examples is noisy, and its price weighs on each."""
        share = self.census.support(self.notion, rates) / self.census.total
        inverse = torch.where(present, 1 / share.clamp_min(1e-12), 0.0)
        return self.step_size * present.sum(1) / inverse.sum(1).clamp_min(1e-12)

    def _ready(self, rates: int) -> Multipliers:
        if self.multipliers is None:
            self.multipliers = Multipliers(self.notion, self.census.families, rates, self.cap)
            if self._state:
                self.multipliers.up, self.multipliers.down = self._state["up"].clone(), self._state["down"].clone()
        return self.multipliers

    def moments(self, seen: Seen, steepness: float | None) -> Any:
        losses = seen.losses() if self.notion == "bounded_group_loss" else None
        return moments(seen.logits, seen.target, self.notion, steepness, self.thresholds, losses)

    def term(self, seen: Seen) -> Tensor | None:
        with torch.no_grad():
            hard = self.moments(seen, None)
            rates = hard.values.shape[1]
            multipliers, present = self._ready(rates), self.present(rates)
            if not seen.step.rehearsal:
                now = seen.step.run.trainer.global_step
                # Between optimizer steps alone: batches whose gradients accumulate pay the same prices.
                if self._pending is not None and now != self._at and self._rows >= self.census.total / _UPDATES:
                    self._learn(multipliers, present)
                self._at = now
                part = table(hard, seen.members)
                rows = over_processes(torch.cat([part.flatten(), torch.tensor([float(len(seen.members))])]), seen)
                part = rows[:-1].reshape(part.shape)
                self._pending = part if self._pending is None else self._pending + part
                self._rows += int(rows[-1])
            if not self.active or not bool(multipliers.up.any() or multipliers.down.any()):
                return None
            if self._price is None:
                share = self.census.support(self.notion, rates) / self.census.total
                price = torch.where(present, multipliers.costs(present) / share.clamp_min(1e-12), 0.0)
                self._price = price.to(seen.logits.device, torch.float32)
            price = self._price
        soft = self.moments(seen, self.steepness)
        own = seen.members.to(price) @ price.T  # (N, R): the price of each rate for this example
        return (own * soft.counted * soft.values).sum() / max(len(seen.members), 1)

    def _learn(self, multipliers: Multipliers, present: Tensor) -> None:
        assert self._pending is not None
        share = self._rows / self.census.total
        self.running.add(self._pending, share)
        self._pending, self._rows, self._price = None, 0, None
        known = present & (self.running.counts > 0)
        self.gap = float(gaps_of(self.running.rates, known, self.census.families, self.notion).amax())
        if self.active:
            assert self.running.parts is not None
            speed = self._speed(len(known), present)
            multipliers.update(self.running.rates, known, self.aims(self.running.parts, known), speed * share)

    def figures(self) -> dict[str, float | Tensor]:
        most = (
            0.0 if self.multipliers is None else float(torch.maximum(self.multipliers.up, self.multipliers.down).max())
        )
        found = {"multiplier": most}
        if self.running.parts is not None:
            found["gap"] = self.gap
        elif self._pending is not None:  # an epoch of one step
            found["gap"] = self.judged(self._pending)[0]
        return dict(found)

    @property
    def capped(self) -> bool:
        """Whether a multiplier stands at its cap: the bound asks for more than the cap allows."""
        return self.multipliers is not None and float(self.multipliers.up.max()) >= self.cap

    def state(self) -> dict[str, Any]:
        if self.multipliers is None:  # resumed, and no step since
            return dict(self._state)
        pending = {} if self._pending is None else {"pending": self._pending, "rows": self._rows, "at": self._at}
        multipliers = {"up": self.multipliers.up.clone(), "down": self.multipliers.down.clone(), "gap": self.gap}
        return {**multipliers, **pending, **self.running.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._state, self.multipliers, self._price = state, None, None
        self._pending, self._rows = state.get("pending"), state.get("rows", 0)
        self._at = state.get("at", -1)
        self.gap = state.get("gap", 0.0)
        self.running.restore(state)
