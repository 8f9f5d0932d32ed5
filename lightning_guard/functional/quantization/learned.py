"""Learned step sizes (LSQ): the step of a grid as something that training moves."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_guard.functional.quantization.grids import along, short

_FRACTIONS = [i / 20 for i in range(4, 21)]  # of the largest magnitude, tried by `fitted_step`


def lsq(
    x: Tensor,
    step: Tensor,
    low: int,
    high: int,
    zero: Tensor | None = None,
    axis: int | None = None,
    gradient_scale: float | None = None,
) -> Tensor:
    r"""Values on a grid whose step is learned (Esser et al., 2020): :math:`s (\mathrm{clip}(\lfloor x/s \rceil))`.

    With :math:`v = x / s` and bounds :math:`-Q_N = l - z`, :math:`Q_P = h - z` the gradients are those of the paper:

    .. math::
        \frac{\partial \hat x}{\partial x} = 1 \text{ if } -Q_N < v < Q_P \text{, else } 0, \qquad
        \frac{\partial \hat x}{\partial s} = g \cdot \begin{cases}
            -v + \lfloor v \rceil & -Q_N < v < Q_P \\ -Q_N & v \le -Q_N \\ Q_P & v \ge Q_P \end{cases}

    Args:
        x: values of any shape.
        step: positive steps :math:`s`, a number ``()``, or ``(channels,)`` with ``axis``.
        low: the lowest code.
        high: the highest code.
        zero: the code of zero, a number ``()``, not learned; None for 0.
        axis: the dimension of the channels; None for one step for all values.
        gradient_scale: :math:`g`; None for the paper's :math:`1 / \sqrt{N Q_P}`, N values to a step.

    Reference:
        Esser et al., Learned Step Size Quantization, ICLR 2020, arXiv:1902.08153.

    Example:
        >>> step = torch.tensor(0.5, requires_grad=True)
        >>> lsq(torch.tensor([0.3, 9.0]), step, -7, 7)
        tensor([0.5000, 3.5000], grad_fn=<_LsqBackward>)
    """
    if gradient_scale is None:
        gradient_scale = (x.numel() / step.numel() * max(high, 1)) ** -0.5
    shaped = step if axis is None else along(step, x, axis)
    rounded: Tensor = _Lsq.apply(x, shaped, zero, low, high, gradient_scale)
    return rounded


def fitted_step(x: Tensor, low: int, high: int, axis: int = 0) -> Tensor:
    """The step of each channel whose rounding loses least, in squares, among 17 fractions of the largest magnitude.

    A start for learned steps; that of the paper, :math:`2 E|x| / sqrt(Q_P)`, is far too wide for 8 bits.

    Reference:
        Bhalgat et al., LSQ+, 2020, arXiv:2004.09576, start by least squares.

    Example:
        >>> fitted_step(torch.tensor([[0.1, 0.2, 0.7]]), -7, 7)
        tensor([0.1000])
    """
    rows = x.detach().transpose(0, axis).flatten(1).float()
    largest = rows.abs().amax(1, keepdim=True)
    widest = torch.where(largest > 0, largest / max(high, -low), 1.0)
    best, least = widest, torch.full_like(widest, torch.inf)
    for fraction in reversed(_FRACTIONS):
        step = short(widest * fraction)
        loss = (torch.div(rows, step).round_().clamp_(low, high).mul_(step) - rows).square_().sum(1, keepdim=True)
        best, least = torch.where(loss < least, step, best), torch.minimum(loss, least)
    return best.squeeze(1)


def fitted_range(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """The range, a fraction of that of the values around zero, whose grid of ``bits`` loses least, in squares."""
    values, levels = x.detach().float().flatten(), 2**bits - 1
    low, high = (bound.clone() for bound in torch.aminmax(values))
    low, high = low.clamp_max(0), high.clamp_min(0)
    best, least = (low, high), torch.full_like(low, torch.inf)
    widest = torch.where(high > low, (high - low) / levels, 1.0)
    zero = (-low / widest).round()
    for fraction in reversed(_FRACTIONS):
        step = widest * fraction
        loss = ((values / step).round_().add_(zero).clamp_(0, levels).sub_(zero).mul_(step) - values).square_().sum()
        better = loss < least
        best = torch.where(better, low * fraction, best[0]), torch.where(better, high * fraction, best[1])
        least = torch.minimum(loss, least)
    return best


class _Lsq(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, step: Tensor, zero: Tensor | None, low: int, high: int, gradient_scale: float) -> Tensor:
        codes = torch.div(x, step).round_()
        codes = codes.clamp_(low, high) if zero is None else codes.add_(zero).clamp_(low, high).sub_(zero)
        return codes.mul_(step)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, step, zero, ctx.low, ctx.high, ctx.gradient_scale = inputs
        ctx.save_for_backward(x, step, zero, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, step, zero, rounded = ctx.saved_tensors
        middle = (ctx.high + ctx.low) / 2 - (0 if zero is None else zero)
        distance = torch.sub(x, step * middle).abs_() if zero is not None or middle else x.abs()
        inside = distance.lt_(step * ((ctx.high - ctx.low) / 2))
        # Codes minus x / s where nothing is clipped, times s: (rounded - x) inside, rounded outside.
        slope = torch.addcmul(rounded, x, inside, value=-1).mul_(grad)
        by_step = slope.sum_to_size(step.shape) * (ctx.gradient_scale / step)
        return inside.mul_(grad), by_step.to(step.dtype), None, None, None, None


class StepLearner:
    """Trains the logarithms of steps with Adam, whose pace is relative to a step's size and not to its gradient's.

    So one rate fits whatever optimizer trains the weights. The rate falls to 0 in a straight line.

    Args:
        logarithms: leaves whose gradients backward passes have left.
        lr: the largest relative change of a step in one update, at the start.

    Reference:
        Kingma and Ba, Adam, ICLR 2015, arXiv:1412.6980; steps as powers: Jain et al. (TQT), MLSys 2020,
        arXiv:1903.08066.
    """

    def __init__(self, logarithms: Sequence[Tensor], lr: float):
        self.logarithms, self.lr = list(logarithms), lr
        self.adam = torch.optim.Adam(self.logarithms, lr, betas=(0.9, 0.99), eps=1e-12)

    def update(self, left: float, mean: Callable[[Tensor], Tensor] = lambda gradient: gradient) -> None:
        """One update at ``left`` of the rate; gradients are averaged by ``mean`` over processes, and dropped."""
        if left > 0:
            grads = [torch.zeros_like(one) if one.grad is None else one.grad for one in self.logarithms]
            flat = mean(torch.cat([grad.flatten() for grad in grads]))
            for one, grad in zip(self.logarithms, flat.split([one.numel() for one in self.logarithms]), strict=True):
                one.grad = grad.view_as(one)
            self.adam.param_groups[0]["lr"] = self.lr * left
            self.adam.step()
        self.adam.zero_grad()
