"""What an attack within a training step climbs, and where."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_guard.functional.embeddings import embedded, shifted
from lightning_guard.functional.robust_losses import Divergence, divergence
from lightning_guard.guard import GuardConflict, Step

Climb = Callable[[Tensor], Tensor]  # from moved inputs to what each example's attack climbs, (N,)


@dataclass
class Ground:
    """Where an attack moves: the inputs themselves, or what an embedding makes of them."""

    step: Step
    given: Any  # to the network
    x: Tensor  # what moves
    free: Tensor | None = None  # where it may, None for everywhere
    layer: nn.Module | None = None

    @classmethod
    def of(cls, step: Step, given: Any, embedding: str | None) -> "Ground":
        """The ground of a step; a forward pass is made if it is an embedding's."""
        if embedding is None:
            return cls(step, given, given)
        layer = step.module.get_submodule(embedding)
        with explained(f"embedding={embedding!r}"):
            return cls(step, given, *embedded(layer, lambda: step.forward(given)), layer)

    @contextmanager
    def at(self, moved: Tensor) -> Iterator[None]:
        """While this lasts the embedding, if there is one, puts out the moved point."""
        if self.layer is None:
            yield
        else:
            with shifted(self.layer, moved - self.x):
                yield

    def logits(self, moved: Tensor | None = None) -> Tensor:
        """Logits at a moved point; None is the clean one."""
        if moved is None:
            return self.step.forward(self.given)
        with self.at(moved):
            return self.step.forward(moved if self.layer is None else self.given)


def up(at: Ground, y: Any) -> Climb:
    """The loss of each example."""
    return lambda moved: at.step.losses(at.logits(moved), y)


def away(at: Ground, y: Any, kind: Divergence) -> Climb:
    """The divergence from the predictions for clean inputs, as TRADES climbs it."""
    with torch.no_grad():
        clean = at.logits()

    def climb(moved: Tensor) -> Tensor:
        with explained("objective='trades'"):
            return divergence(clean, at.logits(moved), y, kind)

    return climb


def towards(at: Ground, y: Any, generator: torch.Generator) -> Climb:
    """Down the loss of a random other class of each example."""
    if not isinstance(y, Tensor) or y.is_floating_point():
        raise GuardConflict("targeted=True needs whole numbers as targets; set targeted=False")
    turn = torch.rand(y.shape, generator=generator, device=y.device)

    def climb(moved: Tensor) -> Tensor:
        logits = at.logits(moved)
        classes = logits.shape[1] if logits.dim() > 1 else 1
        if classes < 2:
            raise GuardConflict(
                f"targeted=True heads for another class, and logits of shape {tuple(logits.shape)} are of one; "
                "set targeted=False"
            )
        return -at.step.losses(logits, (y + 1 + (turn * (classes - 1)).long()) % classes)

    return climb


@contextmanager
def explained(option: str) -> Iterator[None]:
    """Says which option a ValueError of the mathematics is about."""
    try:
        yield
    except ValueError as error:
        if isinstance(error, GuardConflict):
            raise
        raise GuardConflict(f"{option}: {error}") from None
