"""The gradient attacks that train against a threat."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_guard.functional.attacks.threat import ThreatModel


def pgd(
    loss: Callable[[Tensor], Tensor],
    x: Tensor,
    threat: ThreatModel,
    steps: int = 7,
    step_size: float | None = None,
    random_start: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Projected gradient ascent on the loss within the threat model (Madry et al., 2018).

    :math:`x_{t+1} = \Pi(x_t + \alpha \cdot \mathrm{sign}\, \nabla_x \ell(x_t))` for ``linf``; the gradient divided by
    its Euclidean length takes the place of its sign for ``l2``. The gradient is taken with respect to the input
    alone: no parameter's ``.grad`` is touched, and the weight half of the backward pass is never computed.

    Args:
        loss: maps inputs ``(N, ...)`` to losses ``(N,)`` or their **sum** (a mean underflows in half precision). The
            loss of an example must depend on that example alone.
        x: inputs ``(N, ...)`` as the network sees them.
        threat: what the attacker may do.
        steps: gradient steps; 0 gives ``x``, or the random start.
        step_size: :math:`\alpha`, in input units before normalisation; None is ``min(2.5 / steps, 1.25) * eps``, and
            ``eps`` for a single step from ``x`` itself.
        random_start: begin at a point drawn uniformly from the threat model.
        generator: where the random start is drawn from.

    Returns:
        Adversarial inputs ``(N, ...)``, detached.

    | case                       | result                                               |
    |----------------------------|------------------------------------------------------|
    | ``eps=0``                  | ``x``, and ``loss`` is not called                    |
    | an example of zero gradient | it stays where it is in that step                   |
    | ``x`` of no rows           | ``x``                                                |

    Reference:
        Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018, arXiv:1706.06083.

    Example:
        >>> x = torch.tensor([[0.5, 0.5]])
        >>> pgd(lambda x: x[:, 0] - x[:, 1], x, ThreatModel(eps=0.1), random_start=False)
        tensor([[0.6000, 0.4000]])
    """
    if steps < 0:
        raise ValueError(f"steps={steps} is no number of gradient steps; give at least 0")
    x = x.detach()
    if threat.eps == 0 or not len(x):
        return x
    if step_size is None:
        step_size = threat.eps * (min(2.5 / max(steps, 1), 1.25) if steps != 1 or random_start else 1.0)
    scale = threat.scale(x)
    box = threat._box(x) if threat.norm == "linf" else None
    moved = threat.draw(x, generator) if random_start else x
    for _ in range(steps):
        moved = moved.detach().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(loss(moved).sum(), moved)
        with torch.no_grad():
            if box is not None:
                moved = (moved + gradient.sign() * (step_size * scale)).clamp_(*box)
            else:
                moved = threat.project(moved + _unit(gradient * scale) * (step_size * scale), x)
    return moved.detach()


def fgsm(
    loss: Callable[[Tensor], Tensor],
    x: Tensor,
    threat: ThreatModel,
    step_size: float | None = None,
    random_start: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One signed gradient step: PGD with ``steps=1`` (Goodfellow et al., 2015; from a random start Wong et al., 2020).

    Training on it is cheap and may suddenly fail (catastrophic overfitting, Wong et al., 2020): watch accuracy under
    a stronger attack.

    Example:
        >>> fgsm(lambda x: x.sum(1), torch.zeros(1, 2), ThreatModel(eps=0.1), random_start=False)
        tensor([[0.1000, 0.1000]])
    """
    return pgd(loss, x, threat, 1, step_size, random_start, generator)


def _unit(gradient: Tensor) -> Tensor:
    """Each example's gradient at Euclidean length 1; 0 where it is 0."""
    tiny, flat = torch.finfo(gradient.dtype).tiny, gradient.flatten(1)
    # Confident examples have gradients near 1e-25: their squares would vanish, and with them the direction.
    flat = flat / flat.abs().amax(1, keepdim=True).clamp_min(tiny)
    return (flat / flat.norm(dim=1, keepdim=True).clamp_min(tiny)).reshape(gradient.shape)
