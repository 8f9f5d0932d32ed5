"""What every mode is given, and what it gives."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_guard.functional.fairness import Census
from lightning_guard.guard import Step


@dataclass
class Seen:
    """One batch as a mode sees it.

    Args:
        step: the training step.
        census: the groups of the training data.
        logits: of this very step, with their graph, ``(N,)`` or ``(N, C)``.
        target: ``(N, ...)``; None if the batch has none.
        members: ``(N, G)``, 1 where an example belongs to a group, 0 where not or unknown.
        attribute: ``(N, A)`` floats, NaN where unknown.
    """

    step: Step
    census: Census
    logits: Tensor
    target: Any
    members: Tensor
    attribute: Tensor

    def clean(self) -> "Seen":
        """The batch as the data hold it, without a graph: an attack decides about nobody who is in them."""
        if self.step.clean is None:
            return replace(self, logits=self.logits.detach())
        with self.step.probe(), torch.no_grad():
            return replace(self, logits=self.step.forward(self.step.clean).float())

    def losses(self) -> Tensor:
        """The loss of each example ``(N,)``, with its graph."""
        return self.step.losses(self.logits, self.target)

    def summed(self, value: Tensor) -> Tensor:
        """The sum over all processes."""
        trainer = self.step.run.trainer
        return trainer.strategy.reduce(value, reduce_op="sum") if trainer.world_size > 1 else value

    @property
    def processes(self) -> int:
        """How many processes train; each sees its own part of the batch, and their gradients are averaged."""
        return int(self.step.run.trainer.world_size)


class Mode:
    """Adds a term to the loss. What it learns on the way is kept in ``state`` and agrees on every process."""

    couples_examples: bool = True
    """Whether the term of one example depends on the others of its batch."""

    def begin(self, module: nn.Module, census: Census) -> None:
        """Training starts or goes on; a restored state is there already."""

    def end(self) -> None:
        """Training has ended or failed: undo what :meth:`begin` did."""

    def term(self, seen: Seen) -> Tensor | None:
        """What is added to the loss; None for nothing. In a rehearsal nothing may be learnt."""
        raise NotImplementedError

    def figures(self) -> dict[str, float | Tensor]:
        """What to log of the last step."""
        return {}

    def state(self) -> dict[str, Any]:
        """Numbers, strings and tensors only."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state` gave."""
