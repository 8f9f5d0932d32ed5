"""Square: random search that needs no gradient."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_guard.functional.attacks.balls import Norm, lengths
from lightning_guard.functional.attacks.objectives import classes, fooled, margin
from lightning_guard.functional.attacks.threat import ThreatModel

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Queries, of 10,000, after which the window covers half as much."""


@torch.no_grad()
def square(
    forward: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    queries: int = 5000,
    share: float = 0.8,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Random search over square windows, by the scores of the model alone (Andriushchenko et al., 2020).

    Each query changes the perturbation in one window and is kept if the margin of the right class shrinks. For
    ``linf`` the window goes to :math:`\pm\mathrm{eps}` in each channel. For ``l2`` and ``l1`` it gets the budget of a
    second window, which is cleared, shaped as two opposite pyramids. Masked gradients do not hinder it: if it beats
    a gradient attack, the gradients mislead.

    Args:
        forward: maps inputs ``(N, ...)`` to logits ``(N, C)``, ``(N, 1)`` or ``(N,)``. An example leaves the batch as
            soon as it is fooled: ``forward`` never sees it again.
        x: inputs as the network sees them. Images ``(N, C, H, W)`` have square windows; the movable features of any
            other shape are laid in a row, and windows are stretches of it.
        y: right classes ``(N,)``.
        threat: what the attacker may do. Every query is projected onto it, discrete columns included.
        queries: forward passes of an example, that of ``x`` itself not counted.
        share: fraction of the features in the first windows, :math:`p` of the paper; it halves on its schedule.
        generator: where windows and signs are drawn from. Windows are common to the examples of a batch, signs not.

    Returns:
        Points ``(N, ...)`` inside the threat model: the first that fools the model, else that of the highest margin.

    | case                                  | result                                       |
    |---------------------------------------|----------------------------------------------|
    | ``x`` is not given its class as it is | ``x``                                        |
    | ``eps=0``, or ``x`` of no rows        | ``x``, and ``forward`` is not called         |

    Reference:
        Andriushchenko et al., Square Attack: a query-efficient black-box adversarial attack via random search, ECCV
        2020, arXiv:1912.00049; for ``l1`` Croce & Hein, ICML 2021, arXiv:2103.01208.

    Example:
        >>> forward = lambda x: x.round() @ torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> threat = ThreatModel(eps=0.2)
        >>> seeded = torch.Generator().manual_seed(0)
        >>> forward(square(forward, torch.tensor([[0.6, 0.4]]), torch.tensor([0]), threat, generator=seeded)).argmax(1)
        tensor([1])
    """
    if queries < 1:
        raise ValueError(f"queries={queries} attacks nothing; give at least 1")
    if not 0 < share <= 1:
        raise ValueError(f"share={share} is no part of the features; give a number in (0, 1]")
    if threat.eps == 0 or not len(x):
        return x.detach()
    x, y = x.detach(), y.long()
    logits = classes(forward(x))
    found, rows = x.clone(), (~fooled(logits, y)).nonzero()[:, 0]
    board = _Board(threat, x, generator)
    best = margin(logits, y)[rows]
    for query in range(queries):
        if not len(rows):
            break
        if query == 0:
            delta = board.start(len(rows))
        else:
            done = query * 10_000 / queries
            delta = board.change(board.delta(found[rows], x[rows]), share / 2 ** sum(done > at for at in HALVINGS))
        points = board.points(delta, x[rows])
        logits = classes(forward(points))
        value, wrong = margin(logits, y[rows]), fooled(logits, y[rows])
        # The first point is always taken: the search starts from the surface of the ball.
        better = (value > best) | wrong | (query == 0)
        found[rows[better]], best = points[better], torch.where(better, value, best)
        rows, best = rows[~wrong], best[~wrong]
    return found


class _Board:
    """Perturbations laid out as ``(N, C, H, W)``, in units of ``eps``."""

    def __init__(self, threat: ThreatModel, x: Tensor, generator: torch.Generator | None) -> None:
        self.threat, self.generator, self.x = threat, generator, x[:1]
        self.free = threat.scale(x[:1]).expand_as(x[:1]).flatten() > 0
        self.shape = tuple(x.shape[1:]) if x.dim() == 4 else (1, 1, max(int(self.free.sum()), 1))
        self.flat = x.dim() != 4
        # Where each position has a ball of its own, the example has the budget of all; projection divides it.
        balls = 1 if threat.per == "example" else x[0].numel() // x.shape[-1]
        self.eps = threat.eps * balls ** {"linf": 0, "l2": 0.5, "l1": 1}[threat.norm]

    def delta(self, points: Tensor, x: Tensor) -> Tensor:
        scale = self.threat.scale(x).expand_as(x)
        delta = torch.where(scale > 0, (points - x) / scale.clamp_min(1e-30), 0).flatten(1)
        return (delta[:, self.free] if self.flat and self.free.any() else delta).reshape(-1, *self.shape)

    def points(self, delta: Tensor, x: Tensor) -> Tensor:
        if self.flat:
            laid = x.new_zeros(len(x), len(self.free))
            if self.free.any():
                laid[:, self.free] = delta.flatten(1)
            delta = laid.reshape(x.shape)
        return self.threat.project(x + delta * self.threat.scale(x), x)

    def start(self, n: int) -> Tensor:
        channels, height, width = self.shape
        if self.threat.norm == "linf":  # vertical stripes
            return self.eps * self._signs(n, channels, 1, width).expand(n, *self.shape).clone()
        side = max(min(height, width) // 5, 1) if not self.flat else 1
        long = side if not self.flat else max(width // 5, 1)
        delta = self.x.new_zeros(n, *self.shape)
        for row in range(0, height - side + 1, side):
            for column in range(0, width - long + 1, long):
                bump = self._bump(side, long) * self._signs(n, channels, 1, 1)
                delta[:, :, row : row + side, column : column + long] = bump
        return self._stretch(delta)

    def change(self, delta: Tensor, share: float) -> Tensor:
        height, width = self._window(share)
        to = self._place(height, width)
        if self.threat.norm == "linf":
            signs = self.eps * self._signs(*delta.shape[:2], 1, 1)
            same = (delta[to] == signs).flatten(1).all(1)
            delta[to] = torch.where(same[:, None, None, None], -signs, signs)
            return delta
        source = self._place(height, width)
        both = torch.zeros_like(delta[:1])
        both[to] = both[source] = 1
        held, here = self._length(delta * both), self._length(delta[to])
        spare = self._left(delta) / delta.shape[1]
        bump = self._bump(height, width) * self._signs(*delta.shape[:2], 1, 1) + delta[to] / here.clamp_min(1e-12)
        power = 2 if self.threat.norm == "l2" else 1
        length = (held**power + spare) ** (1 / power)
        delta[source] = 0
        delta[to] = bump / self._length(bump).clamp_min(1e-12) * length
        return self._stretch(delta)

    def _window(self, share: float) -> tuple[int, int]:
        _, height, width = self.shape
        if self.flat:
            return 1, min(max(round(share * width), 1), width)
        side = max(round(math.sqrt(share * height * width)), 1)
        side = side if self.threat.norm == "linf" else max(side, 3) | 1
        return min(side, height), min(side, width)

    def _place(self, height: int, width: int) -> tuple[slice, slice, slice, slice]:
        row, column = (
            int(torch.randint(size - side + 1, (), generator=self.generator, device=self.x.device))
            for size, side in zip(self.shape[1:], (height, width), strict=True)
        )
        return slice(None), slice(None), slice(row, row + height), slice(column, column + width)

    def _bump(self, height: int, width: int) -> Tensor:
        """Two opposite pyramids of length 1, side by side."""
        turned = height > 1 and bool(torch.rand((), generator=self.generator, device=self.x.device) < 0.5)
        rows, columns = (width, height) if turned else (height, width)
        parts = [_pyramid(rows, columns // 2), -_pyramid(rows, columns - columns // 2)]
        bump = torch.cat([part for part in parts if part.shape[1]], 1)
        bump = (bump.T if turned else bump).to(self.x)
        return bump / lengths(bump.reshape(1, -1), self.threat.norm)

    def _signs(self, *shape: int) -> Tensor:
        draws = torch.randint(2, shape, generator=self.generator, device=self.x.device)
        return (2 * draws - 1).to(self.x)

    def _length(self, part: Tensor) -> Tensor:
        """Of each channel ``(N, C, 1, 1)``."""
        return _lengths(part, 2, self.threat.norm)

    def _left(self, delta: Tensor) -> Tensor:
        """What an example does not use of the budget, ``(N, 1, 1, 1)``; squared for ``l2``."""
        power = 2 if self.threat.norm == "l2" else 1
        return (self.eps**power - _lengths(delta, 1, self.threat.norm) ** power).clamp_min(0)

    def _stretch(self, delta: Tensor) -> Tensor:
        return delta * (self.eps / _lengths(delta, 1, self.threat.norm).clamp_min(1e-12))


def _lengths(part: Tensor, dims: int, norm: Norm) -> Tensor:
    """Over all but the first ``dims`` dimensions."""
    shape = (*part.shape[:dims], *[1] * (part.dim() - dims))
    return lengths(part.flatten(dims).flatten(0, dims - 1) if dims > 1 else part.flatten(1), norm).reshape(shape)


def _pyramid(rows: int, columns: int) -> Tensor:
    r"""Nested squares around the middle: :math:`\sum_{k \ge d} 1 / (k + 1)^2` at distance :math:`d` from it.

    Example:
        >>> _pyramid(1, 3)
        tensor([[0.2500, 1.2500, 0.2500]])
    """
    distance = torch.maximum(
        (torch.arange(rows) - rows // 2).abs()[:, None], (torch.arange(columns) - columns // 2).abs()[None]
    )
    weights = 1 / torch.arange(1, max(rows, columns) // 2 + 2, dtype=torch.float32) ** 2
    return weights.flip(0).cumsum(0).flip(0)[distance]
