"""The best weights that keep a bound, by rates measured on them and not by those of training steps."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Choice:
    """Keeps the best of the weights that were looked at.

    Those that keep the aim come first, by merit; then those that keep the bound, by gap; then those that break it.
    A model that decides alike for nearly everybody has no gap and is of no use: it comes last.
    """

    rank: tuple[float, float] = (-1.0, 0.0)
    found: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)

    def offer(
        self,
        module: nn.Module,
        epoch: int,
        gap: float,
        bound: float,
        kept: bool,
        merit: float,
        constant: bool,
        error: float = 0.0,
    ) -> None:
        """Look at the weights of now.

        Args:
            module: that has them.
            epoch: when.
            gap: measured on them.
            bound: that is promised.
            kept: the bound is kept with a margin of its uncertainty.
            merit: accuracy, or minus the loss.
            constant: nearly everybody is decided alike.
            error: standard error of the gap.
        """
        rank = (0.0, -gap) if constant else (3.0, merit) if kept else (2.0, -gap) if gap <= bound else (1.0, -gap)
        if math.isnan(gap) or math.isnan(merit):
            rank = (-0.5, 0.0)
        if rank <= self.rank:
            return
        self.rank = rank
        self.found = {"epoch": epoch, "gap": gap, "merit": merit, "constant": constant, "feasible": gap <= bound}
        self.found["error"] = error
        self.weights = {k: v.detach().clone() for k, v in module.state_dict().items() if isinstance(v, Tensor)}

    @torch.no_grad()
    def take(self, module: nn.Module) -> None:
        """Give the module the weights that were chosen."""
        for name, value in module.state_dict().items():
            if name in self.weights:
                value.copy_(self.weights[name])

    def state(self) -> dict[str, Any]:
        return {"rank": list(self.rank), "found": dict(self.found), "weights": dict(self.weights)} if self.found else {}

    def restore(self, state: Mapping[str, Any]) -> None:
        if state:
            first, second = state["rank"]
            self.rank, self.found, self.weights = (first, second), dict(state["found"]), dict(state["weights"])
