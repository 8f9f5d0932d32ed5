"""A bound on the difference between groups, kept by multipliers that rise while it is broken."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_guard.functional.fairness import (
    OF_NUMBERS,
    Census,
    Multipliers,
    Notion,
    errors_of,
    gaps_of,
    histogram,
    largest,
    moments,
    table_of,
)
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
        damping: of the multipliers, in epochs: how far they follow the change of a gap.
        min_support: rates of fewer training examples are not bounded.
        query: where examples are private, the name of the query that answers for the hard decisions of each draw.
        noise: of that query. The multipliers then follow what it releases and nothing else.
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
        min_support: float = 30,
        query: str = "",
        noise: float = 0.0,
        damping: float = 0.0,
    ):
        self.query, self.noise = query, noise
        self.notion: Notion = notion
        self.bound, self.margin, self.steepness = bound, margin, steepness
        self.step_size, self.damping, self.cap, self.min_support = step_size, damping, cap, min_support
        self.running = Running(memory)
        self.numbers = notion in OF_NUMBERS  # the target is a quantity
        self.active = False  # whether multipliers move, and weigh
        self.gap = 0.0
        self.multipliers: Multipliers | None = None
        self.thresholds: Tensor | None = None
        self._pending: Tensor | None = None  # the table of the steps since the last update
        self._rows = 0  # of it
        self._at = -1  # the optimizer step of the last batch
        self._unit = 0.0  # of the query's contributions; 0 before it is asked
        self._draws = 0  # released since the last update
        self._noise = 0.0  # in the running table: squared weights of the draws in it, summed
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
        error = (error.square() + self._noise_of(table, present)[: len(error)].square()).sqrt()
        return (self.bound - error).clamp_min(self.bound / 4)

    def error(self, table: Tensor) -> float:
        """The standard error of the widest gap in sums, squares and counts ``(3, R, G)``."""
        counts = table[2].clamp_min(1e-12)
        present = self.present(len(counts)) & (table[2] > 0)
        rates = table[0] / counts
        errors = errors_of(rates, table[1] / counts, counts, present, self.census.families, self.notion)
        whole = (errors.square() + self._noise_of(table, present)[: len(errors)].square()).sqrt()
        return float(whole[int(gaps_of(rates, present, self.census.families, self.notion).argmax()) % len(whole)])

    def _noise_of(self, table: Tensor, present: Tensor) -> Tensor:
        """What the query's noise adds to the standard error of each rate's gap ``(R,)``, at most."""
        counts = table[2].clamp_min(1.0)
        rates = (table[0] / counts).clamp(0, 1)
        each = self._noise * (self.noise * self._unit) ** 2 * (rates.square() + (1 - rates).square()) / counts.square()
        return torch.where(present, 2 * each, 0.0).amax(1).sqrt()

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
            self.multipliers = Multipliers(self.notion, self.census.families, rates, self.cap, self.damping)
            if self._state:
                self.multipliers.up, self.multipliers.down = self._state["up"].clone(), self._state["down"].clone()
                self.multipliers.before = self._state.get("before")
        return self.multipliers

    def moments(self, seen: Seen, steepness: float | None) -> Any:
        losses = seen.losses() if self.notion == "bounded_group_loss" else None
        return moments(seen.logits, seen.target, self.notion, steepness, self.thresholds, losses)

    def term(self, seen: Seen) -> Tensor | None:
        with torch.no_grad():
            hard = self.moments(seen.clean(), None)
            rates = hard.values.shape[1]
            multipliers, present = self._ready(rates), self.present(rates)
            if self.query and not self._unit:
                self._ask(seen, rates)
            if not seen.step.rehearsal:
                now = seen.step.run.trainer.global_step
                # Between optimizer steps alone: batches whose gradients accumulate pay the same prices.
                if self._pending is not None and now != self._at and self._rows >= self.census.total / _UPDATES:
                    self._learn(multipliers, present)
                self._at = now
                if self.query:
                    assert seen.step.run.private is not None
                    seen.step.run.private.add(self.query, histogram(hard, seen.members, self._unit))
            if not seen.step.rehearsal and not self.query:
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

    def _ask(self, seen: Seen, rates: int) -> None:
        """Ask for the hard decisions of each draw, in place of looking at them."""
        private = seen.step.run.private
        assert private is not None
        self._unit = largest(self.notion, rates, len(self.census.families.unique()))

        def take(sums: Tensor) -> None:
            part = table_of(sums, rates, self._unit)
            self._pending = part if self._pending is None else self._pending + part
            self._rows += private.batch_size
            self._draws += 1

        private.open(self.query, 2 * rates * self.census.groups, take)

    def _learn(self, multipliers: Multipliers, present: Tensor) -> None:
        assert self._pending is not None
        share = self._rows / self.census.total
        keep = self.running.add(self._pending, share)
        self._noise, self._draws = keep**2 * self._noise + self._draws, 0
        self._pending, self._rows, self._price = None, 0, None
        known = present & (self.running.counts > 0)
        parts = self.standing()
        rates = parts[0] / parts[2].clamp_min(1e-12)
        self.gap = float(gaps_of(rates, known, self.census.families, self.notion).amax())
        if self.active:
            speed = self._speed(len(known), present)
            multipliers.update(rates, known, self.aims(parts, known), speed, share)

    def standing(self) -> Tensor:
        """Running sums, squares and counts ``(3, R, G)``, such as there can be: noise leaves sums beyond counts."""
        parts = self.running.parts
        assert parts is not None
        if not self.query:
            return parts
        counts = parts[2].clamp_min(1.0)
        sums = parts[0].clamp_min(0).minimum(counts)
        return torch.stack([sums, sums, counts])

    def figures(self) -> dict[str, float | Tensor]:
        most = (
            0.0 if self.multipliers is None else float(torch.maximum(self.multipliers.up, self.multipliers.down).max())
        )
        found = {"multiplier": most}
        if self.running.parts is not None:
            found["gap"] = self.gap
        elif self._pending is not None and not self.query:  # an epoch of one step
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
        if self.multipliers.before is not None:
            multipliers["before"] = self.multipliers.before
        noise = {"draws": self._draws, "noise": self._noise} if self.query else {}
        return {**multipliers, **pending, **noise, **self.running.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._state, self.multipliers, self._price = state, None, None
        self._pending, self._rows = state.get("pending"), state.get("rows", 0)
        self._at = state.get("at", -1)
        self.gap = state.get("gap", 0.0)
        self._draws, self._noise = state.get("draws", 0), state.get("noise", 0.0)
        self.running.restore(state)
