"""A layer that turns gradients round."""

from typing import Any

import torch
from torch import Tensor


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * grads[0], None


def reverse_gradient(x: Tensor, strength: float = 1.0) -> Tensor:
    r"""The same values, with the gradient turned round: what descends on the output climbs in the input.

    Args:
        x: of any shape.
        strength: :math:`\lambda`; the gradient of the input is :math:`-\lambda` times that of the output.

    Reference:
        Ganin et al., Domain-Adversarial Training of Neural Networks, JMLR 17, 2016, arXiv:1505.07818.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> reverse_gradient(x, 3.0).sum().backward()
        >>> x.grad
        tensor([-3., -3.])
    """
    reversed_: Tensor = _Reversal.apply(x, strength)
    return reversed_
