"""FAB: the smallest perturbation that fools the model."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_guard.functional.attacks.balls import Norm, lengths
from lightning_guard.functional.attacks.objectives import classes, fooled, input_gradient, ranking
from lightning_guard.functional.attacks.threat import ThreatModel

OVERSHOOT = 1.05  # eta of the paper: how far beyond the linearised boundary
BIAS = 0.1  # alpha_max: how much of a step starts from the input itself
RETREAT = 0.9  # beta: how far a point that fools the model is drawn back to the input
BISECTIONS = 6


@torch.no_grad()
def fab(
    forward: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    steps: int = 100,
    targets: int | None = None,
    restarts: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Fast Adaptive Boundary attack, targeted form: the closest points that fool the model (Croce & Hein, 2020).

    Each step goes to the plane :math:`\pi` where the linearised logits of the right and a wrong class are equal,

    .. math:: x_{t+1} = \Pi_B((1 - \alpha)(x_t + \eta\, d(x_t, \pi)) + \alpha (x + \eta\, d(x, \pi))), \qquad
        \alpha = \min(|d(x_t, \pi)| / (|d(x_t, \pi)| + |d(x, \pi)|), 0.1)

    where :math:`d(\cdot, \pi)` is the shortest way to the plane within the bounds :math:`B`, in closed form for each
    norm. A point that fools the model is remembered if it is the closest so far, and drawn back to ``x`` by a tenth.
    At last the line from ``x`` to the closest point is searched.

    ``threat.eps`` does not limit the search, so that one run gives accuracy at every radius: that of the examples
    which are right as they are and whose point is farther away.

    Args:
        forward: maps inputs ``(N, ...)`` to logits ``(N, C)``, ``(N, 1)`` or ``(N,)``. Gradients are taken with respect
            to the inputs alone.
        x: inputs ``(N, ...)`` as the network sees them.
        y: right classes ``(N,)``.
        threat: norm, bounds, scale and features that may move. ``eps`` is only the radius of random starts.
        steps: gradient steps towards each wrong class.
        targets: wrong classes that are tried, the most likely first; None is ``min(9, C - 1)``.
        restarts: searches; all but the first begin at a random point of the threat model.
        generator: where random starts are drawn from.

    Returns:
        Points ``(N, ...)`` within the bounds; ``x`` itself where nothing was found.

    Raises:
        ValueError: for threats of categories, whole numbers, or a ball for each position.

    | case                                     | result                                |
    |------------------------------------------|---------------------------------------|
    | ``x`` is not given its class as it is    | ``x``                                 |
    | no gradient, or no feature that may move | ``x``                                 |
    | ``x`` of no rows                         | ``x``, and ``forward`` is not called  |

    Reference:
        Croce & Hein, Minimally distorted Adversarial Examples with a Fast Adaptive Boundary Attack, ICML 2020,
        arXiv:1907.02044.

    Example:
        >>> forward = lambda x: x @ torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> fab(forward, torch.tensor([[0.6, 0.5]]), torch.tensor([0]), ThreatModel(eps=1.0)).round(decimals=2)
        tensor([[0.5500, 0.5500]])
    """
    if threat.discrete or threat.per != "example":
        raise ValueError(
            f"{threat} has no distance that FAB could make smallest; attack it with apgd, square or search"
        )
    for name, number in (("steps", steps), ("restarts", restarts), ("targets", 1 if targets is None else targets)):
        if number < 1:
            raise ValueError(f"{name}={number} attacks nothing; give at least 1")
    if not len(x):
        return x.detach()
    x, y = x.detach(), y.long()
    logits = classes(forward(x))
    rows = (~fooled(logits, y)).nonzero()[:, 0]
    if not len(rows):
        return x.clone()
    search = _Search(forward, x[rows], y[rows], threat)
    for restart in range(restarts):
        for target in ranking(logits, y)[rows][:, : targets or 9].unbind(1):
            start = threat.draw(search.x, generator) if restart else search.x
            search.approach(start, target, steps)
    search.shorten()
    points = x.clone()
    points[rows] = search.points(search.best)
    return points


class _Search:
    """The closest points so far, as perturbations ``(N, D)`` in units of ``eps``."""

    def __init__(self, forward: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, threat: ThreatModel) -> None:
        self.forward, self.x, self.y, self.norm = forward, x, y, threat.norm
        self.scale = threat.scale(x).expand_as(x).flatten(1)
        low, high = threat.limits(x)
        self.low, self.high = (
            torch.full_like(self.scale, end).where(self.scale > 0, 0) if edge is None else self._room(edge)
            for edge, end in ((low, -torch.inf), (high, torch.inf))
        )
        self.low, self.high = self.low.clamp_max(0), self.high.clamp_min(0)
        self.edges = low, high
        self.best, self.length = torch.zeros_like(self.scale), self.scale.new_full((len(x),), torch.inf)

    def _room(self, edge: Tensor) -> Tensor:
        room = (edge - self.x).flatten(1)
        return torch.where(self.scale > 0, room / self.scale.clamp_min(1e-30), 0)

    def points(self, delta: Tensor) -> Tensor:
        points = self.x + (delta * self.scale).reshape(self.x.shape)
        low, high = self.edges
        if low is None or high is None:
            return points
        return points.clamp(torch.minimum(low, self.x), torch.maximum(high, self.x))

    def approach(self, start: Tensor, target: Tensor, steps: int) -> None:
        delta = self._room(start)
        for _ in range(steps):
            with torch.enable_grad():
                moved = self.points(delta).requires_grad_()
                logits = classes(self.forward(moved))
                ahead = (logits.gather(1, target[:, None]) - logits.gather(1, self.y[:, None]))[:, 0]
                gradient = input_gradient(ahead, moved).flatten(1) * self.scale
            crossed = self._remember(delta, fooled(logits.detach(), self.y))
            delta = torch.where(crossed[:, None], RETREAT * delta, self._step(delta, gradient, -ahead.detach()))
        self._remember(delta, fooled(self.forward(self.points(delta)), self.y))

    def _step(self, delta: Tensor, gradient: Tensor, gap: Tensor) -> Tensor:
        to_plane = shortest(gradient, gap, self.low - delta, self.high - delta, self.norm)
        from_input = shortest(gradient, gap + (gradient * delta).sum(1), self.low, self.high, self.norm)
        near, far = lengths(to_plane, self.norm), lengths(from_input, self.norm)
        bias = (near / (near + far).clamp_min(1e-30)).clamp_max(BIAS)[:, None]
        moved = (1 - bias) * (delta + OVERSHOOT * to_plane) + bias * OVERSHOOT * from_input
        return moved.clamp(self.low, self.high)

    def _remember(self, delta: Tensor, wrong: Tensor) -> Tensor:
        length = lengths(delta, self.norm)
        closer = wrong & (length < self.length)
        self.best[closer], self.length[closer] = delta[closer], length[closer]
        return wrong

    def shorten(self) -> None:
        """Bisects the line from the input to the closest point."""
        right, wrong, longest = torch.zeros_like(self.length), torch.ones_like(self.length), self.best
        for _ in range(BISECTIONS):
            middle = (right + wrong) / 2
            delta = longest * middle[:, None]
            crossed = self._remember(delta, fooled(self.forward(self.points(delta)), self.y))
            right, wrong = torch.where(crossed, right, middle), torch.where(crossed, middle, wrong)


def shortest(gradient: Tensor, gap: Tensor, low: Tensor, high: Tensor, norm: Norm) -> Tensor:
    r"""The shortest step within a box that gains ``gap`` to first order: :math:`\nabla \cdot \delta = \mathrm{gap}`.

    For ``linf`` all entries move alike until each meets the box, for ``l2`` in proportion to the gradient; the length
    at which the gain suffices is found by sorting where they meet. For ``l1`` the steepest entries go first, each as
    far as the box lets it.

    Args:
        gradient: rows ``(N, D)``.
        gap: gain that is wanted ``(N,)``; a negative one is a loss.
        low: lower sides of the box ``(N, D)``, at most 0; may be ``-inf``.
        high: upper sides of the box ``(N, D)``, at least 0; may be ``inf``.
        norm: in which the step is short.

    Returns:
        Steps ``(N, D)``. Where the box does not allow the gain, the corner that comes closest to it; where the gradient
        is 0, 0.

    Example:
        >>> gradient, box = torch.tensor([[3.0, -1.0]]), torch.tensor([[1.0, 1.0]])
        >>> [shortest(gradient, torch.tensor([2.0]), -box, box, norm) for norm in ("linf", "l2", "l1")]
        [tensor([[ 0.5000, -0.5000]]), tensor([[ 0.6000, -0.2000]]), tensor([[0.6667, -0.0000]])]
    """
    gradient = gradient * gap.sign()[:, None]
    largest = gradient.abs().amax(1, keepdim=True)
    still = largest == 0
    gradient, gap = gradient / largest.clamp_min(1e-30), (gap.abs() / largest[:, 0].clamp_min(1e-30))[:, None]
    slope = gradient.abs()
    room = torch.where(gradient > 0, high, -low).clamp_min(0).where(slope > 0, 0)
    if norm == "l1":
        slope, order = slope.sort(1, descending=True)
        room = room.gather(1, order)
        gains = torch.where(slope > 0, slope * room, 0)
        missing = gap - torch.cat([torch.zeros_like(gap), gains.cumsum(1)[:, :-1]], 1)
        step = torch.minimum((missing / slope.clamp_min(1e-30)).clamp_min(0), room)
        step = torch.zeros_like(step).scatter(1, order, step)
    else:
        weight, reach = (slope, room) if norm == "linf" else (slope**2, room / slope.clamp_min(1e-30))
        ends, order = reach.sort(1)
        weights = weight.gather(1, order)
        gains = torch.where(weights > 0, weights * ends, 0).cumsum(1)  # of the entries that have met the box
        met = torch.cat([torch.zeros_like(gap), gains[:, :-1]], 1)
        moving = weights.flip(1).cumsum(1).flip(1)
        enough = met + torch.where(moving > 0, moving * ends, 0) >= gap
        first = torch.where(enough.any(1), enough.to(torch.uint8).argmax(1), ends.shape[1] - 1)[:, None]
        pace = (gap - met.gather(1, first)) / moving.gather(1, first).clamp_min(1e-30)
        step = torch.minimum(pace.clamp_min(0), reach) * (1 if norm == "linf" else slope)
    return torch.where(still, 0, gradient.sign() * step)
