"""Weights that stand in a worse place for one step, and come back bit for bit."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def worst_weights(weights: Sequence[Tensor], gradients: Sequence[Tensor | None], gamma: float) -> list[Tensor]:
    r"""How far adversarial weight perturbation moves each weight tensor.

    :math:`\gamma \, \|w\| \, g / \|g\|` for each layer by itself: a fraction ``gamma`` of its own length, along the
    gradient of the loss.

    Args:
        weights: the weight tensors.
        gradients: the gradient of the loss by each, None where it plays no part.
        gamma: relative size of the move.

    Returns:
        One move a tensor; 0 where the gradient is None or 0.

    Reference:
        Wu, Xia and Wang, Adversarial Weight Perturbation Helps Robust Generalization, NeurIPS 2020, arXiv:2004.05884.

    Example:
        >>> import torch
        >>> worst_weights([torch.tensor([[3.0, 4.0]])], [torch.tensor([[0.0, 2.0]])], 0.1)
        [tensor([[0.0000, 0.5000]])]
    """
    moves = []
    for weight, gradient in zip(weights, gradients, strict=True):
        if gradient is None:
            moves.append(torch.zeros_like(weight))
            continue
        tiny = torch.finfo(gradient.dtype).tiny
        direction = gradient / gradient.abs().amax().clamp_min(tiny)  # squares of small gradients would vanish
        # With 1 as its largest entry a direction is at least 1 long; clamped higher than tiny, 0 stays 0.
        moves.append(direction * (gamma * weight.detach().norm() / direction.norm().clamp_min(1)))
    return moves


class Elsewhere:
    """Weights that are moved for a while and come back bit for bit.

    Example:
        >>> import torch
        >>> weight, away = torch.tensor([0.1]), Elsewhere()
        >>> away.move([weight], [torch.tensor([0.2])])
        >>> weight
        tensor([0.3000])
        >>> away.back()
        >>> weight
        tensor([0.1000])
    """

    def __init__(self) -> None:
        self._kept: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def move(self, weights: Sequence[Tensor], by: Sequence[Tensor]) -> None:
        """Move each of ``weights`` in place; what an earlier move left is put back first."""
        self.back()
        self._kept = [(weight, weight.detach().clone()) for weight in weights]
        for weight, step in zip(weights, by, strict=True):
            weight.add_(step)

    @torch.no_grad()
    def back(self) -> None:
        """Put every weight back; nothing is done a second time."""
        kept, self._kept = self._kept, []
        for weight, original in kept:
            weight.copy_(original)

    def originals(self, stored: dict[str, Tensor]) -> None:
        """Put what the weights were into a state dict whose tensors are moved ones."""
        where = {weight.data_ptr(): original for weight, original in self._kept}
        stored.update({name: where[t.data_ptr()] for name, t in stored.items() if t.data_ptr() in where})


@contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """Passes inside this block may write buffers, as BatchNorm does in training; afterwards they are what they were."""
    kept = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)
