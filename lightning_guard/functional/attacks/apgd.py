"""Auto-PGD: projected gradient ascent that finds its own step size."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from lightning_guard.functional.attacks.objectives import (
    classes,
    dlr,
    fooled,
    input_gradient,
    log_odds,
    ranking,
    targeted_dlr,
)
from lightning_guard.functional.attacks.threat import ThreatModel

Objective = Literal["ce", "dlr", "targeted"]
MOMENTUM = 0.75  # alpha of the paper
RISES = 0.75  # rho of the paper
FINALISTS = 3  # wrong classes that the pair climbs towards in full


@torch.no_grad()
def apgd(
    forward: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    steps: int = 100,
    objective: Objective = "ce",
    targets: int | None = None,
    restarts: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Auto-PGD: gradient ascent with momentum whose step halves where it brings nothing (Croce & Hein, 2020).

    .. math::
        z_{t+1} &= \Pi(x_t + \eta_t \, s(\nabla f(x_t))) \\
        x_{t+1} &= \Pi(x_t + \alpha (z_{t+1} - x_t) + (1 - \alpha)(x_t - x_{t-1}))

    from :math:`\eta_0 = 2\,\mathrm{eps}`, with :math:`\alpha = 0.75` and :math:`s` the steepest direction of the norm.
    At checkpoints the step is halved, and the ascent goes on from its best point, if fewer than three steps in four
    went up, or if neither step nor best value changed since the last checkpoint. For ``l1`` the steps are sparse and
    their sparsity follows that of the best point, on radii of 3, 2 and 1 times ``eps`` (Croce & Hein, 2021).

    An example leaves the batch as soon as it is fooled: ``forward`` never sees it again.

    Args:
        forward: maps inputs ``(N, ...)`` to logits ``(N, C)``, ``(N, 1)`` or ``(N,)``. Gradients are taken with respect
            to the inputs alone. The logits of an example must depend on that example alone.
        x: inputs ``(N, ...)`` as the network sees them.
        y: right classes ``(N,)``.
        threat: what the attacker may do. A discrete one is climbed in its continuous form, and each point is judged
            after settling on the nearest valid one.
        steps: gradient steps of each ascent.
        objective: ``"ce"`` (cross-entropy, in the form of :func:`log_odds`), ``"dlr"``, or ``"targeted"``, which climbs
            :func:`targeted_dlr` towards one wrong class after the other, the most likely first.
        targets: wrong classes that ``"targeted"`` tries; None is ``min(9, C - 1)``.
        restarts: ascents, each from a random point of the threat model.
        generator: where the random starts are drawn from.

    Returns:
        Points ``(N, ...)`` inside the threat model: the first that fools the model, else that of the highest objective.

    | case                                    | result                                       |
    |-----------------------------------------|----------------------------------------------|
    | ``x`` is not given its class as it is   | ``x``, and no step is made                   |
    | ``eps=0``, or ``x`` of no rows          | ``x``, and ``forward`` is not called         |
    | gradient of zero, or no number, or none | such entries do not move in that step        |

    Reference:
        Croce & Hein, Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks,
        ICML 2020, arXiv:2003.01690; Croce & Hein, Mind the box: l1-APGD for sparse adversarial attacks on image
        classifiers, ICML 2021, arXiv:2103.01208.

    Example:
        >>> forward = lambda x: x @ torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> apgd(forward, torch.tensor([[0.6, 0.5]]), torch.tensor([0]), ThreatModel(eps=0.1)).argmax(1)
        tensor([1])
    """
    if objective not in _OBJECTIVES:
        raise ValueError(f"objective={objective!r} is not known; give one of {', '.join(map(repr, _OBJECTIVES))}")
    _refuse_nothing(steps=steps, restarts=restarts, targets=targets)
    if threat.eps == 0 or not len(x):
        return x.detach()
    hunt = _Hunt(forward, x, y, threat, generator)
    for _ in range(restarts):
        for aim in hunt.aims(targets or 9) if objective == "targeted" else [y]:
            hunt.ascend(objective, aim, steps)
    return hunt.found


@torch.no_grad()
def apgd_pair(
    forward: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    steps: int = 50,
    targets: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Auto-PGD on the cross-entropy, then towards the wrong classes: near the standard AutoAttack for a fraction of it.

    Towards each wrong class goes an ascent of a fifth of the ``steps``. The three classes that came closest are then
    climbed towards in full. An example leaves as soon as it is fooled, so most never see the later ascents.

    Args:
        forward: maps inputs ``(N, ...)`` to logits, see :func:`apgd`.
        x: inputs ``(N, ...)`` as the network sees them.
        y: right classes ``(N,)``.
        threat: what the attacker may do.
        steps: gradient steps of a full ascent.
        targets: wrong classes that are tried, the most likely first; None is ``min(9, C - 1)``.
        generator: where the random starts are drawn from.

    Returns:
        Points ``(N, ...)`` inside the threat model: the first that fools the model, else that of the highest
        :func:`targeted_dlr`. For the cases see :func:`apgd`.

    Example:
        >>> forward = lambda x: x @ torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> apgd_pair(forward, torch.tensor([[0.6, 0.5]]), torch.tensor([0]), ThreatModel(eps=0.1)).argmax(1)
        tensor([1])
    """
    _refuse_nothing(steps=steps, targets=targets)
    if threat.eps == 0 or not len(x):
        return x.detach()
    hunt = _Hunt(forward, x, y, threat, generator)
    hunt.ascend("ce", hunt.y, steps)
    hunt.value.fill_(-torch.inf)  # log-odds do not compare with what follows
    aims = list(hunt.aims(targets or 9))
    if len(aims) > FINALISTS:
        reached = torch.stack([hunt.ascend("targeted", aim, max(steps // 5, 1)) for aim in aims], dim=1)
        closest = reached.topk(FINALISTS, dim=1).indices
        aims = list(torch.stack(aims, dim=1).gather(1, closest).unbind(1))
    for aim in aims:
        hunt.ascend("targeted", aim, steps)
    return hunt.found


def _refuse_nothing(**numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ValueError(f"{name}={number} attacks nothing; give at least 1")


def _log_odds(logits: Tensor, y: Tensor, _: Tensor) -> Tensor:
    return log_odds(logits, y)


def _dlr(logits: Tensor, y: Tensor, _: Tensor) -> Tensor:
    return dlr(logits, y)


_OBJECTIVES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "ce": _log_odds,
    "dlr": _dlr,
    "targeted": targeted_dlr,
}


class _Hunt:
    """What several ascents on the same examples have found so far.

    Args:
        found: for each example the first point that fools the model, else the best one.
        standing: which examples no point has fooled yet.
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        generator: torch.Generator | None,
    ) -> None:
        self.x, self.y, self.threat, self.generator = x.detach().clone(), y.clone().long(), threat, generator
        self.forward = lambda x: classes(forward(x))
        self.space = threat.relaxed()
        logits = self.forward(self.x)
        self.found, self.standing = self.x.clone(), ~fooled(logits, self.y)
        self.value = torch.full_like(logits[:, 0], -torch.inf)
        self.wrong_classes = ranking(logits, self.y)

    def aims(self, targets: int) -> Iterator[Tensor]:
        yield from self.wrong_classes[:, :targets].unbind(1)

    def ascend(self, objective: Objective, aim: Tensor, steps: int) -> Tensor:
        """One ascent of those that still stand, from random points.

        Returns:
            The highest objective that each of them reached ``(N,)``; ``-inf`` for those that are fooled.
        """
        reached = torch.full_like(self.value, -torch.inf)
        rows = self.standing.nonzero()[:, 0]
        points, value = self.space.draw(self.x[rows], self.generator), self.value[rows]
        for radius, share in _radii(self.threat.norm, steps):
            if len(rows):
                space = replace(self.space, eps=radius * self.threat.eps)
                points = space.project(points, self.x[rows])
                s = self._climb(rows, points, space, _OBJECTIVES[objective], aim, share)
                rows, points, value = s.rows, s.best, s.best_value
        reached[rows] = value
        return reached

    def _climb(
        self, rows: Tensor, start: Tensor, space: ThreatModel, objective: Callable[..., Tensor], aim: Tensor, steps: int
    ) -> "_State":
        """What is known after so many steps of those that still stand."""
        s = _State(rows, self.x[rows], self.y[rows], aim[rows], start, self.value, space)
        sparse, judged = space.norm == "l1", space.eps == self.threat.eps
        self._look(s, objective, judged)
        checks = _sparse_checkpoints(steps) if sparse else _checkpoints(steps)
        checked = 0
        for step in range(1, steps + 1):
            if not len(s.rows):
                break
            moved = _sparse_step(s, space) if sparse else _step(s, space, 1.0 if step == 1 else MOMENTUM)
            s.previous, s.point = s.point, moved
            self._look(s, objective, judged)
            if step in checks:
                if sparse:
                    _sparsify(s, space)
                else:
                    _halve(s, step - checked)
                checked = step
        if judged and len(s.rows):
            self._settle(s, objective)
        return s

    def _look(self, s: "_State", objective: Callable[..., Tensor], judged: bool) -> None:
        """Evaluate the points, and let go of those that fool the model."""
        with torch.enable_grad():
            moved = s.point.detach().requires_grad_()
            logits = self.forward(moved)
            value = objective(logits, s.y, s.aim)
            gradient = input_gradient(value, moved)
        s.see(value.detach().to(s.value).nan_to_num(-torch.inf), gradient)
        if not judged:
            return
        valid = self.threat.settle(s.point, s.x)
        wrong = fooled(logits if valid is s.point else self.forward(valid), s.y)
        if wrong.any():
            self.found[s.rows[wrong]], self.standing[s.rows[wrong]] = valid[wrong], False
            s.keep(~wrong)

    def _settle(self, s: "_State", objective: Callable[..., Tensor]) -> None:
        """Keep the best points of those that still stand if they beat earlier ascents."""
        valid, value = self.threat.settle(s.best, s.x), s.best_value
        if valid is not s.best:
            value = objective(self.forward(valid), s.y, s.aim).to(s.value)
        better = value > self.value[s.rows]
        self.found[s.rows[better]], self.value[s.rows[better]] = valid[better], value[better]


def _radii(norm: str, steps: int) -> list[tuple[float, int]]:
    """Radii in units of ``eps``, and the steps on each."""
    if norm != "l1" or steps < 10:
        return [(1, steps)]
    wide = math.ceil(0.3 * steps)
    return [(3, wide), (2, wide), (1, steps - 2 * wide)]


class _State:
    """What an ascent knows of each example that still stands: tensors whose first dimension is the same."""

    def __init__(
        self, rows: Tensor, x: Tensor, y: Tensor, aim: Tensor, start: Tensor, like: Tensor, space: ThreatModel
    ) -> None:
        self.rows, self.x, self.y, self.aim = rows, x, y, aim
        self.point = self.previous = start
        self.best, self.gradient, self.best_gradient = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
        self.value = like.new_full((len(x),), -torch.inf)
        self.best_value, self.checked_value = self.value.clone(), self.value.clone()
        self.rises = torch.zeros(len(x), dtype=torch.long, device=x.device)
        self.halved = torch.ones(len(x), dtype=torch.bool, device=x.device)
        self.size = x.new_full((len(x),), space.eps if space.norm == "l1" else 2 * space.eps)
        # Features that the best point moves, and that the next sparse step moves.
        self.moved = x.new_full((len(x),), x[0].numel())
        self.features = 0.2 * self.moved

    def keep(self, kept: Tensor) -> None:
        for name, values in vars(self).items():
            setattr(self, name, values[kept])

    def see(self, value: Tensor, gradient: Tensor) -> None:
        self.rises += value > self.value
        self.value, self.gradient = value, gradient
        better = value > self.best_value
        self.best[better], self.best_gradient[better] = self.point[better], gradient[better]
        self.best_value[better] = value[better]

    def return_to_best(self, rows: Tensor) -> None:
        self.point = torch.where(_column(rows, self.point), self.best, self.point)
        self.gradient = torch.where(_column(rows, self.point), self.best_gradient, self.gradient)


def _step(s: _State, space: ThreatModel, momentum: float) -> Tensor:
    ahead = space.project(s.point + space.steepest(s.gradient, s.x) * _column(s.size, s.x), s.x)
    return space.project(s.point + momentum * (ahead - s.point) + (1 - momentum) * (s.point - s.previous), s.x)


def _sparse_step(s: _State, space: ThreatModel) -> Tensor:
    """Moves the features of the largest gradient that have room to the bounds left, all by the same length."""
    low, high = space.limits(s.x)
    gradient = s.gradient * space.scale(s.x)
    if low is not None and high is not None:
        gradient = torch.where(torch.where(gradient > 0, s.point < high, s.point > low), gradient, 0)
    size = gradient.flatten(1).abs()
    last = (s.features.long().clamp_min(1) - 1)[:, None]
    chosen = (size >= size.sort(1, descending=True).values.gather(1, last)) & (size > 0)
    length = s.size / chosen.sum(1).clamp_min(1)
    direction = gradient.sign() * chosen.reshape(s.x.shape)
    return space.project(s.point + direction * space.scale(s.x) * _column(length, s.x), s.x)


def _halve(s: _State, steps: int) -> None:
    """The checkpoint of Auto-PGD, after so many steps since the last one."""
    stuck = ~s.halved & (s.best_value <= s.checked_value)
    s.halved = (s.rises <= RISES * steps) | stuck
    s.size = torch.where(s.halved, s.size / 2, s.size)
    s.return_to_best(s.halved)
    s.checked_value, s.rises = s.best_value.clone(), torch.zeros_like(s.rises)


def _sparsify(s: _State, space: ThreatModel) -> None:
    """The checkpoint of l1-APGD: a step moves two thirds of the features that the best point moves.

    Where that point got sparser, the ascent goes on from it with a full step; elsewhere the step shrinks.
    """
    moved = (s.best != s.x).flatten(1).sum(1).to(s.size)
    sparser = moved < 0.95 * s.moved
    s.size = torch.where(sparser, space.eps, (s.size / 1.5).clamp_min(space.eps / 10))
    s.features, s.moved = moved / 1.5, moved
    s.return_to_best(sparser)


def _checkpoints(steps: int) -> set[int]:
    """After which steps the step size is decided upon: at 22% of them, then more and more often, up to every 6%.

    Example:
        >>> sorted(_checkpoints(100))
        [22, 41, 57, 70, 80, 87, 93, 99]
    """
    found, last, gap = set(), 0, max(int(0.22 * steps), 1)
    while last + gap <= steps:
        last += gap
        found.add(last)
        gap = max(gap - max(int(0.03 * steps), 1), int(0.06 * steps), 1)
    return found


def _sparse_checkpoints(steps: int) -> set[int]:
    every = max(int(0.04 * steps), 1)
    return set(range(every, steps + 1, every))


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.dim() - 1))
