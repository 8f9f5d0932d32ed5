"""Rates of groups as they are by now."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_guard.functional.fairness import Moments
from lightning_guard.parity.base import Seen


class Running:
    """Sums of values within groups that forget: after ``memory`` epochs a batch counts e times less.

    Args:
        memory: in epochs; 0 is the last batch alone, infinity forgets nothing.
    """

    def __init__(self, memory: float):
        self.memory = memory
        self.parts: Tensor | None = None  # sums, squares, counts: (3, R, G)

    def add(self, part: Tensor, share: float) -> float:
        """Add a batch, ``(3, R, G)``, that is this share of an epoch; returns how much the others still count."""
        keep = math.exp(-share / self.memory) if self.memory else 0.0
        self.parts = part if self.parts is None else keep * self.parts + part
        return keep

    @property
    def rates(self) -> Tensor:
        """Mean values, ``(R, G)``; 0 where nothing was counted."""
        return self._mean(0)

    @property
    def squares(self) -> Tensor:
        """Mean squared values, ``(R, G)``."""
        return self._mean(1)

    @property
    def counts(self) -> Tensor:
        """Examples, ``(R, G)``."""
        assert self.parts is not None
        return self.parts[2]

    def _mean(self, which: int) -> Tensor:
        assert self.parts is not None
        return self.parts[which] / self.counts.clamp_min(1e-12)

    def state(self) -> dict[str, Any]:
        return {} if self.parts is None else {"parts": self.parts}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.parts = state.get("parts")


def table(found: Moments, members: Tensor) -> Tensor:
    """Sums, sums of squares, and counts within groups, ``(3, R, G)``, in float64 on the CPU."""
    members = members.double()
    counted = found.counted.double()
    values = found.values.double() * counted
    return torch.stack([values.T @ members, values.square().T @ members, counted.T @ members]).cpu()


def over_processes(part: Tensor, seen: Seen) -> Tensor:
    """A table of the union of all processes' batches."""
    return seen.summed(part.to(seen.logits.device)).cpu() if seen.processes > 1 else part
