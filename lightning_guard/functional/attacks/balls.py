"""Norm balls, one a row: lengths, steepest directions, random points and projections.

All take rows ``(R, D)`` in the units of the radius and know nothing of bounds' or networks' units.
"""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

Norm = Literal["linf", "l2", "l1"]


def lengths(delta: Tensor, norm: Norm) -> Tensor:
    """How long each row is, ``(R,)``.

    Example:
        >>> [lengths(torch.tensor([[3.0, -4.0]]), norm).item() for norm in ("linf", "l2", "l1")]
        [4.0, 5.0, 7.0]
    """
    if norm == "linf":
        return delta.abs().amax(1)
    return delta.norm(dim=1) if norm == "l2" else delta.abs().sum(1)


def unit(gradient: Tensor) -> Tensor:
    """Each row at Euclidean length 1; 0 where it is 0.

    Example:
        >>> unit(torch.tensor([[3e-25, 4e-25], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    tiny = torch.finfo(gradient.dtype).tiny
    # Confident examples have gradients near 1e-25: their squares would vanish, and with them the direction.
    gradient = gradient / gradient.abs().amax(1, keepdim=True).clamp_min(tiny)
    return gradient / gradient.norm(dim=1, keepdim=True).clamp_min(tiny)


def steepest_l1(gradient: Tensor, low: Tensor, high: Tensor, length: float, share: float) -> Tensor:
    """The L1 step along which each row rises fastest, spread over a ``share`` of its entries.

    Entries are taken by the size of their gradient. Each moves by its part of ``length``, ``length / (share * D)``,
    or to its end if that is nearer, until ``length`` is used up: what has no room leaves its part to the next. A
    single entry would be steepest, and slow; signs of the top share are the step of SLIDE (Tramèr and Boneh, 2019).

    Args:
        gradient: rows ``(R, D)``; entries that are 0 are never taken.
        low: room to the lower ends ``(R, D)``, at most 0; may be ``-inf``.
        high: room to the upper ends ``(R, D)``, at least 0; may be ``inf``.
        length: of the step.
        share: fraction of ``D``, at least one entry.

    Reference:
        Tramèr and Boneh, Adversarial Training and Robustness for Multiple Perturbations, NeurIPS 2019,
        arXiv:1904.13000.

    Example:
        >>> gradient, open_end = torch.tensor([[1.0, -3.0, 2.0, 0.0]]), torch.full((1, 4), torch.inf)
        >>> steepest_l1(gradient, -open_end, open_end, length=1.0, share=0.5)
        tensor([[ 0.0000, -0.5000,  0.5000,  0.0000]])
        >>> steepest_l1(gradient, torch.full((1, 4), -0.2), open_end, length=1.0, share=0.5)
        tensor([[ 0.3000, -0.2000,  0.5000,  0.0000]])
    """
    part = length / max(round(share * gradient.shape[1]), 1)
    room = torch.where(gradient > 0, high, -low).clamp(0, part) * (gradient != 0)
    order = gradient.abs().argsort(dim=1, descending=True)
    room = room.gather(1, order)
    left = (length - (room.cumsum(1) - room)).clamp_min(0)
    return torch.zeros_like(gradient).scatter(1, order, torch.minimum(room, left)) * gradient.sign()


def project_l1(delta: Tensor, low: Tensor, high: Tensor, radius: float) -> Tensor:
    r"""The nearest point in the L1 ball **and** the box (Croce and Hein, 2021).

    Each entry goes to :math:`\mathrm{sign}(\delta_i) \cdot \mathrm{clamp}(|\delta_i| - \lambda, 0, c_i)`, where
    :math:`c_i` is the room on its side of the box and :math:`\lambda \ge 0` is the smallest that keeps the length
    within ``radius``. It is found by Newton's method within a bisection; on sorted entries the length costs a look-up.
    The ball and then the box would be within both as well, but short of the nearest point, and an attack that
    stops short finds less.

    Args:
        delta: rows ``(R, D)``.
        low: lower sides of the box ``(R, D)``, at most 0; may be ``-inf``.
        high: upper sides of the box ``(R, D)``, at least 0; may be ``inf``.
        radius: of the ball.

    Returns:
        Rows ``(R, D)`` of the type of ``delta``.

    Reference:
        Croce and Hein, Mind the box: l1-APGD for sparse adversarial attacks on image classifiers, ICML 2021,
        arXiv:2103.01208.

    Example:
        >>> project_l1(torch.tensor([[2.0, 2.0, 0.1]]), torch.full((1, 3), -1.0), torch.tensor([[0.5, 9, 9]]), 2.0)
        tensor([[0.5000, 1.5000, 0.0000]])
    """
    size = delta.abs().double()  # double: thousands of entries add up
    room = torch.where(delta > 0, high, -low).double().clamp_min(0)
    whole, beyond = _Shrinking(size), _Shrinking((size - room).clamp_min(0))

    cut, bottom, top = torch.zeros_like(size[:, :1]), torch.zeros_like(size[:, :1]), size.amax(1, keepdim=True)
    for turn in range(200):
        excess = whole.sum(cut) - beyond.sum(cut) - radius
        long, done = excess > 0, excess.abs() <= 1e-12 * radius
        done |= ~long & (cut == 0)
        if done.all():
            break
        bottom, top = torch.where(long, cut, bottom), torch.where(long, top, cut)
        newton = cut + excess / (whole.count(cut) - beyond.count(cut))
        # The length is no convex function, so Newton's method may leave the interval or be slow: halve it then.
        trusted = (newton > bottom) & (newton < top) & (turn % 3 < 2)
        cut = torch.where(done, cut, torch.where(trusted, newton, (bottom + top) / 2))
    return (delta.sign() * torch.minimum((size - cut).clamp_min(0), room)).to(delta.dtype)


class _Shrinking:
    """The sum of ``max(value - cut, 0)`` over each row, for many cuts."""

    def __init__(self, values: Tensor):
        if values.device.type == "cpu":  # numpy sorts thirty times as fast
            self.values = torch.from_numpy(np.sort(values.numpy(), axis=1))
        else:
            self.values = values.sort(dim=1).values
        above = self.values.flip(1).cumsum(1).flip(1)
        self.above = torch.cat([above, above.new_zeros(len(above), 1)], dim=1)  # of what is left from each value on

    def sum(self, cut: Tensor) -> Tensor:
        count = self.count(cut)
        return self.above.gather(1, self.values.shape[1] - count) - count * cut

    def count(self, cut: Tensor) -> Tensor:
        return self.values.shape[1] - torch.searchsorted(self.values, cut, right=True)


def draw_l1(delta: Tensor, allowed: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """A point drawn uniformly from the unit L1 ball of the allowed entries, in the shape of ``delta`` ``(R, D)``.

    Exponential variables, divided by their sum and one more, are uniform in the simplex.
    """
    heights = torch.empty_like(delta).exponential_(generator=generator) * allowed
    rest = delta.new_empty(len(delta), 1).exponential_(generator=generator)
    signs = torch.rand(delta.shape, dtype=delta.dtype, device=delta.device, generator=generator).sub_(0.5).sign()
    return heights * signs / (heights.sum(1, keepdim=True) + rest)
