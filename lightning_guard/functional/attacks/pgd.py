"""The gradient attacks that train against a threat."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lightning_guard.functional.attacks.balls import unit
from lightning_guard.functional.attacks.threat import ThreatModel

Loss = Callable[[Tensor], Tensor]


def pgd(
    loss: Loss,
    x: Tensor,
    threat: ThreatModel,
    steps: int = 7,
    step_size: float | None = None,
    random_start: bool = True,
    generator: torch.Generator | None = None,
    restarts: int = 1,
    free: Tensor | None = None,
) -> Tensor:
    r"""Projected gradient ascent on the loss within the threat model (Madry et al., 2018).

    :math:`x_{t+1} = \Pi(x_t + \alpha \cdot \mathrm{sign}\, \nabla_x \ell(x_t))` for ``linf``; the gradient divided by
    its Euclidean length takes the place of its sign for ``l2``, and the signs of its largest entries for ``l1``
    (:meth:`ThreatModel.steepest`). The gradient is taken with respect to the input alone: no parameter's ``.grad`` is
    touched, and the weight half of the backward pass is never computed.

    Numbers of a discrete threat climb in its continuous form and are settled at the end. Categories are chosen anew
    at each step: those that gain most to first order, by the gradients of all steps so far.

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
        restarts: ascents from different random starts; of each example the point of highest loss is kept. More than
            one cost a forward pass each besides, and need a ``loss`` of shape ``(N,)``.
        free: where the attacker may act, truth values that broadcast to ``x`` (e.g. not on padding).

    Returns:
        Adversarial inputs ``(N, ...)``, detached.

    Raises:
        ValueError: for numbers that make no attack, and for a summed loss with restarts.

    | case                                    | result                                  |
    |-----------------------------------------|-----------------------------------------|
    | ``eps=0``, and no category may switch   | ``x``, and ``loss`` is not called       |
    | an example of zero gradient             | it stays where it is in that step       |
    | ``x`` of no rows                        | ``x``                                   |

    Reference:
        Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018, arXiv:1706.06083.

    Example:
        >>> x = torch.tensor([[0.5, 0.5]])
        >>> pgd(lambda x: x[:, 0] - x[:, 1], x, ThreatModel(eps=0.1), random_start=False)
        tensor([[0.6000, 0.4000]])
    """
    if steps < 0:
        raise ValueError(f"steps={steps} is no number of gradient steps; give at least 0")
    if restarts < 1:
        raise ValueError(f"restarts={restarts} makes no attack; give at least 1")
    if restarts > 1 and not random_start:
        raise ValueError(f"restarts={restarts} from the input itself find the same point; set random_start=True")
    x = x.detach()
    if _powerless(threat, x):
        return x
    if step_size is None:
        step_size = threat.eps * (min(2.5 / max(steps, 1), 1.25) if steps != 1 or random_start else 1.0)
    best = _climb(loss, x, threat, steps, step_size, random_start, generator, free)
    if restarts == 1:
        return best
    height = _heights(loss, best)
    for _ in range(restarts - 1):
        moved = _climb(loss, x, threat, steps, step_size, random_start, generator, free)
        now = _heights(loss, moved)
        higher = now > height
        best = torch.where(higher.reshape(-1, *[1] * (x.dim() - 1)), moved, best)
        height = torch.where(higher, now, height)
    return best


def fgsm(
    loss: Loss,
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


def n_fgsm(
    loss: Loss,
    x: Tensor,
    threat: ThreatModel,
    step_size: float | None = None,
    noise: float = 2.0,
    generator: torch.Generator | None = None,
    free: Tensor | None = None,
) -> Tensor:
    r"""One signed gradient step from strong noise, without clipping to the ball (N-FGSM; de Jorge et al., 2022).

    .. math:: x' = x + \eta + \alpha \cdot \mathrm{sign}\, \nabla_x \ell(x + \eta), \qquad
        \eta \sim U(-k \epsilon, k \epsilon)^d

    Noise beyond ``eps`` that is kept makes single steps train as well as several and prevents catastrophic
    overfitting. The points lie **outside** ``threat``, within :math:`k \epsilon + \alpha` of ``x``:
    :func:`n_fgsm_threat` is the threat model that holds them. As in the authors' code, the noise and the result are
    clipped to the bounds of the data.

    Args:
        loss: as for :func:`pgd`.
        x: inputs ``(N, ...)`` as the network sees them.
        threat: what the attacker may do, in ``linf``. Categories are not switched.
        step_size: :math:`\alpha`, in input units before normalisation; None is ``eps``.
        noise: :math:`k`, in multiples of ``eps``.
        generator: where the noise is drawn from.
        free: where the attacker may act, truth values that broadcast to ``x``.

    Returns:
        Inputs ``(N, ...)`` to train on, detached.

    Raises:
        ValueError: for another norm, or for numbers that make no attack.

    Reference:
        de Jorge et al., Make Some Noise: Reliable and Efficient Single-Step Adversarial Training, NeurIPS 2022,
        arXiv:2202.01181.

    Example:
        >>> x, threat = torch.zeros(1, 2), ThreatModel(eps=0.1)
        >>> moved = n_fgsm(lambda x: x.sum(1), x, threat, generator=torch.Generator().manual_seed(0))
        >>> threat.contains(moved, x).item(), n_fgsm_threat(threat).contains(moved, x).item()
        (False, True)
    """
    wide = n_fgsm_threat(threat, step_size, noise)
    x = x.detach()
    if threat.eps == 0 or not len(x):
        return x
    start = replace(threat.relaxed(), eps=noise * threat.eps).draw(x, generator, free)
    step = threat.steepest(_gradient(loss, start), x, length=threat.eps if step_size is None else step_size, free=free)
    return wide.settle(wide.relaxed().project(start + step, x, free), x, free)


def n_fgsm_threat(threat: ThreatModel, step_size: float | None = None, noise: float = 2.0) -> ThreatModel:
    """The threat model that holds the points of :func:`n_fgsm`: ``eps`` is ``noise * eps + step_size``.

    Example:
        >>> n_fgsm_threat(ThreatModel(eps=1.0)).eps
        3.0
    """
    if threat.norm != "linf":
        raise ValueError(f"norm={threat.norm!r} has no single step from uniform noise; use norm='linf', or pgd")
    if not 0 <= noise < float("inf"):
        raise ValueError(f"noise={noise} is no multiple of eps; give a number of at least 0, e.g. 2.0")
    if step_size is not None and not 0 < step_size < float("inf"):
        raise ValueError(f"step_size={step_size} is no step; give a positive length in input units, or None")
    return replace(threat, eps=noise * threat.eps + (threat.eps if step_size is None else step_size))


def _powerless(threat: ThreatModel, x: Tensor) -> bool:
    return not len(x) or (threat.eps == 0 and not (threat.one_hot and threat.switches))


def _climb(
    loss: Loss,
    x: Tensor,
    threat: ThreatModel,
    steps: int,
    step_size: float,
    random_start: bool,
    generator: torch.Generator | None,
    free: Tensor | None,
) -> Tensor:
    relaxed = threat.relaxed()
    box = relaxed._box(x, free) if threat.norm == "linf" else None  # what stays is made once
    stride = step_size * relaxed.scale(x, free)
    moved = threat.draw(x, generator, free) if random_start else x
    rise = torch.zeros_like(x) if threat.one_hot else None
    for _ in range(steps):
        gradient = _gradient(loss, moved)
        with torch.no_grad():
            if box is not None:
                moved = (moved + gradient.sign() * stride).clamp_(*box)
            else:
                step = relaxed.steepest(gradient, x, moved, length=step_size, free=free)
                moved = relaxed.project(moved + step, x, free)
            if rise is not None:
                rise += unit(gradient)
                moved = threat.switch(rise, x, moved, free)
    return threat.settle(moved, x, free).detach()


def _gradient(loss: Loss, moved: Tensor) -> Tensor:
    moved = moved.detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(loss(moved).sum(), moved)
    return gradient


def _heights(loss: Loss, moved: Tensor) -> Tensor:
    with torch.no_grad():
        heights = loss(moved)
    if heights.shape != moved.shape[:1]:
        raise ValueError(
            f"a loss of shape {tuple(heights.shape)} cannot tell which of several restarts is best; "
            f"return the {len(moved)} losses of the examples, or set restarts=1"
        )
    return heights
